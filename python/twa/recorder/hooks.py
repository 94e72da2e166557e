"""Step hooks of optimizers: whose run once after each step that is taken, and which steps count."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch.optim import Optimizer

from ..io.errors import TwaError

#: makes a step at a rate of zero, where an optimizer has no state, to have one to save or to load
DCP = "torch.distributed.checkpoint.state_dict"


def with_hooks(optimizer: object) -> Optimizer:
    """An optimizer, or the one inside it, whose step hooks run.

    Wrappers may lack them, since they need not call `Optimizer.__init__`: those of Accelerate and
    Lightning have none, and call the inner optimizer for each step that they take; timm's Lookahead
    has some that never run, until its class is patched as `Optimizer.__init__` does.

    Raises:
        TwaError: there is none
    """
    found = optimizer
    while isinstance(found, Optimizer):
        if "_optimizer_step_post_hooks" not in vars(found):
            found = getattr(found, "optimizer", None)
        elif getattr(type(found).step, "hooked", False):
            return found
        elif "step" in vars(found):  # a scheduler has taken it down without hooks
            break
        else:
            found._patch_step_function()
    raise TwaError(
        f"expected a torch.optim.Optimizer whose step hooks run, found {type(optimizer).__name__}:"
        " attach before a scheduler is made, or call recorder.step() after each step",
        "optimizer",
    )


class StepHook:
    """Calls a function after each step of training of an optimizer.

    A copy of the optimizer, or one that was pickled, has a hook that does nothing.
    """

    def __init__(self, call: Callable[[], object] | None) -> None:
        def run() -> None:
            if call is not None and is_of_training():
                call()

        self._run = torch.compiler.disable(run)  # making an optimizer has imported what it needs

    def __call__(self, *_: object) -> None:
        self._run()

    def __reduce__(self) -> tuple[type, tuple[None]]:
        return type(self), (None,)


def is_of_training() -> bool:
    """Whether a step that is under way is one of the training: a step hook asks."""
    frame = sys._getframe() if DCP in sys.modules else None
    while frame is not None:
        if frame.f_globals.get("__name__") == DCP:
            return False
        frame = frame.f_back
    return True
