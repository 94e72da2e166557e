"""`SubspaceOptimizer`: a torch optimizer over the coefficients that drops into a training loop."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from twa_kernels.ops import UNSUPPORTED_OPTIONS

from .grad_hooks import GradientHooks
from .subspace import Subspace

#: optimizers whose step is fused with the projection and the reconstruction: all of it in one call,
#: segment by segment
FUSED = {torch.optim.SGD: "sgd", torch.optim.AdamW: "adamw"}


class SubspaceOptimizer(torch.optim.Optimizer):
    """Trains the coefficients x (n, L) of a subspace with any torch optimizer; on several ranks,
    each calls it with gradients of its own data, and the coefficients follow their average.

        optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW, lr=0.01)
        for batch in loader:
            loss(model, batch).backward(); optimizer.step(); optimizer.zero_grad()

    step(): x.grad = project(gradients of the model); inner optimizer step on x; model = center +
    x^T P. In plain PyTorch, per segment: `x.grad = P @ g; inner.step(); theta = center + x @ P`.

    With SGD or AdamW on a packed basis in CPU memory all of that is one call (twa_kernels.step), to
    the same result.

    `param_groups`, `state` and `defaults` are the inner optimizer's, so learning-rate schedulers
    work as usual. Gradients accumulate in the model's .grad over several backward calls; clipping
    them before step() works too. `state_dict` holds the inner state and x; `load_state_dict` also
    moves the model.

    low_memory   project each gradient as soon as backward has it, and free it: never more than one
                 of them is held, several backward calls accumulate in the coefficients' gradient,
                 and torch.amp.GradScaler works (it scales what it sees in param_groups; without
                 low_memory it raises "No inf checks were recorded"). Clip the coefficients'
                 gradient then, the model has none.
    """

    def __init__(
        self,
        subspace: Subspace,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        *,
        low_memory: bool = False,
        **options: Any,
    ) -> None:
        self._ready = False
        self.subspace, self.low_memory = subspace, low_memory
        self.inner = optimizer([subspace.coefficients], **options)
        super().__init__([subspace.coefficients], self.inner.defaults)
        self._ready = True
        if low_memory and subspace.placement.name == "rows":
            raise ValueError(
                "low_memory: not with placement='rows', which sums whole gradients; use 'replicate'"
                " or 'columns'"
            )
        if low_memory:
            self._hook()

    def _hook(self) -> None:
        """Projects gradients inside backward for as long as this optimizer lives."""
        self._hooks = GradientHooks(self.subspace)
        self._unhook = weakref.finalize(self, self._hooks.remove)

    def close(self) -> None:
        """Ends low_memory: the model keeps its gradients again.

        Happens by itself when the optimizer is gone.
        """
        if self.low_memory:
            self._unhook()

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """On several ranks with low_memory: backward calls in this context add to this rank's part
        only; the next one outside sums it with the other ranks'. Saves messages in gradient
        accumulation. Without low_memory nothing is sent before step() anyway."""
        return self._hooks.no_sync() if self.low_memory else contextlib.nullcontext()

    # One source of truth: schedulers read and change these, the inner optimizer owns them.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._ready:  # not while the base class initialises itself
            self.inner.param_groups = groups

    def add_param_group(self, group: dict[str, Any]) -> None:
        if not self._ready:
            return
        params = (
            [group["params"]]
            if isinstance(group["params"], torch.Tensor)
            else list(group["params"])
        )
        if [id(p) for p in params] != [id(self.subspace.coefficients)]:
            raise ValueError(
                "SubspaceOptimizer trains the subspace's coefficients only; use another optimizer"
                " beside it for other parameters"
            )

    @property
    def state(self):
        return self.inner.state

    @state.setter
    def state(self, value) -> None:
        if self._ready:
            self.inner.state = value

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None):
        if closure is None and (rule := self._fused_rule()):
            coefficients = self.subspace.coefficients
            state = self.inner.state.get(coefficients, {})
            self.subspace.step(rule, self.inner.param_groups[0], state)
            if state:  # plain SGD keeps none
                self.inner.state[coefficients] = state
            return None
        if closure is None:
            self._project()
            loss = self.inner.step()
        else:
            loss = self.inner.step(lambda: self._evaluate(closure))
        self.subspace.write_weights()
        return loss

    def _fused_rule(self) -> str | None:
        """The rule of twa_kernels.step that does what the three parts of a step would do here, if
        there is one.
        """
        group = self.inner.param_groups[0]
        plain = not any(group.get(name) for name in UNSUPPORTED_OPTIONS)
        own = self.inner._optimizer_step_pre_hooks or self.inner._optimizer_step_post_hooks
        hooked = own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks
        return (
            FUSED.get(type(self.inner))
            if plain and not hooked and not self.low_memory and self.subspace.can_fuse()
            else None
        )

    def _evaluate(self, closure: Callable[[], torch.Tensor]) -> torch.Tensor:
        """For optimizers such as L-BFGS that try several coefficients in one step."""
        self.subspace.write_weights()
        with torch.enable_grad():
            loss = closure()
        self._project()
        world = self.subspace.placement.world
        if world.size == 1:
            return loss
        # Line searches and stopping rules look at the loss: that of all ranks, so that all do the
        # same.
        return (world.sum_(torch.as_tensor(loss).detach().clone().reshape(1)) / world.size).reshape(
            ()
        )

    def _project(self) -> None:
        if not self.low_memory:
            self.subspace.coefficients.grad = self.subspace.project_gradients()
        elif self.subspace.coefficients.grad is None:
            raise RuntimeError(
                "no gradient has reached the coefficients: call loss.backward() before"
                " optimizer.step()"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.low_memory:
            self._hooks.clear()
        self.subspace.model.zero_grad(set_to_none=set_to_none)
        self.inner.zero_grad(set_to_none=set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler puts a `step` bound to this object into it; hooks belong to this model's
        # parameters.
        return {
            key: value
            for key, value in self.__dict__.items()
            if key not in ("step", "_opt_called", "_hooks", "_unhook")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        inner = {key: state[key] for key in ("state", "param_groups") if key in state}
        self.__dict__.update({key: value for key, value in state.items() if key not in inner})
        if inner:
            self.inner.__setstate__(inner)
        # a copy or an unpickled optimizer, not load_state_dict
        if "subspace" in state and self.low_memory:
            self._hook()

    def state_dict(self) -> dict[str, Any]:
        self.subspace.placement.world.check()
        return super().state_dict() | {
            "coefficients": self.subspace.coefficients.detach().clone(),
            "subspace": self.subspace.identity(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the state belongs to a subspace of other candidates, segments,
        center, bits or normalisation.
        """
        for key, ours in self.subspace.identity().items():
            if (
                theirs := state["subspace"].get(
                    key, {"basis": "deltas", "chunk": 0, "constraint": "none"}.get(key)
                )
            ) != ours:
                raise ValueError(
                    f"optimizer state of another subspace: {key}: expected {ours}, found {theirs}"
                )
        self.subspace.placement.world.forget()
        super().load_state_dict(
            {key: value for key, value in state.items() if key not in ("coefficients", "subspace")}
        )
        self.subspace.coefficients.copy_(state["coefficients"])
        self.subspace.write_weights()
