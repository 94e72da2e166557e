"""Step hooks of optimizers: whose run once after each step that is taken, and which steps count."""

from __future__ import annotations

import sys

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
    while isinstance(found, Optimizer) and "_optimizer_step_post_hooks" not in vars(found):
        found = getattr(found, "optimizer", None)
    if isinstance(found, Optimizer) and not getattr(type(found).step, "hooked", False):
        if "step" not in vars(found):
            found._patch_step_function()
            return found
        found = None  # a scheduler has taken down the step without hooks
    if not isinstance(found, Optimizer):
        raise TwaError(
            f"expected a torch.optim.Optimizer whose step hooks run, found"
            f" {type(optimizer).__name__}: attach before a scheduler is made, or call"
            " recorder.step() after each step",
            "optimizer",
        )
    return found


def is_of_training() -> bool:
    """Whether a step that is under way is one of the training: a step hook asks."""
    frame = sys._getframe() if DCP in sys.modules else None
    while frame is not None:
        if frame.f_globals.get("__name__") == DCP:
            return False
        frame = frame.f_back
    return True
