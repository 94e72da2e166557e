"""`SubspaceOptimizer`: a torch optimizer over the coefficients that drops into a training loop."""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any, overload

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from twa_kernels.ops.step import UNSUPPORTED_OPTIONS

from .grad_hooks import GradientHooks
from .io.errors import TwaError
from .subspace import Subspace

#: optimizers whose step is fused with the projection and the reconstruction: all of it is one call,
#: segment by segment
FUSED = {torch.optim.SGD: "sgd", torch.optim.AdamW: "adamw"}


class SubspaceOptimizer(torch.optim.Optimizer):
    """Trains the coefficients of a subspace with any torch optimizer.

        optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW, lr=0.01)
        for batch in loader:
            loss(model, batch).backward(); optimizer.step(); optimizer.zero_grad()

    A step is, in plain PyTorch, per segment:

        x.grad = P @ g; inner.step(); theta = center + x @ P

    With SGD or AdamW on a packed basis in CPU memory all of that is one call (twa_kernels.step), to
    the same result. On several ranks each calls it with gradients of its own data, and the
    coefficients follow their average.

    `param_groups`, `state` and `defaults` are the inner optimizer's, so learning-rate schedulers
    work as usual. Gradients accumulate in the model's .grad over several backward calls; clipping
    them before step() works too. `state_dict` holds the inner state and x; `load_state_dict` also
    moves the model.

    Args:
        subspace: whose coefficients are trained
        optimizer: class of the inner optimizer
        low_memory: project each gradient as soon as backward has it, and free it. Never more than
            one of them is held, several backward calls accumulate in the coefficients' gradient,
            and torch.amp.GradScaler works: it scales what it sees in param_groups, and without
            low_memory it raises "No inf checks were recorded". Clip the coefficients' gradient
            then, the model has none
        options: of the inner optimizer: lr, ...

    Attributes:
        inner: the inner optimizer

    Raises:
        TwaError: low_memory with sharding "rows"
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
        if low_memory and subspace.sharding.name == "rows":
            raise TwaError(
                "low_memory: not with sharding='rows', which sums whole gradients; use 'replicate'"
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
        """A context for gradient accumulation on several ranks with low_memory: it saves messages.

        Backward calls in it add to this rank's part only; the next one outside sums it with the
        other ranks'. Without low_memory nothing is sent before step() anyway.
        """
        return self._hooks.no_sync() if self.low_memory else contextlib.nullcontext()

    # One source of truth: schedulers read and change these, the inner optimizer owns them.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._ready:  # not while the base class initialises itself
            self.inner.param_groups = groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises TwaError unless the group is the subspace's coefficients alone."""
        if not self._ready:
            return
        params = param_group["params"]
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        if [id(p) for p in params] != [id(self.subspace.coefficients)]:
            raise TwaError(
                "SubspaceOptimizer trains the subspace's coefficients only; use another optimizer"
                " beside it for other parameters"
            )

    @property
    def state(self) -> defaultdict[torch.Tensor, Any]:
        return self.inner.state

    @state.setter
    def state(self, value: defaultdict[torch.Tensor, Any]) -> None:
        if self._ready:
            self.inner.state = value

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @overload
    def step(self, closure: Callable[[], torch.Tensor]) -> torch.Tensor: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the coefficients, and the model at them.

        Args:
            closure: evaluates the model and its gradients again, for inner optimizers that ask for
                that

        Returns:
            the loss that the inner optimizer returns: averaged over ranks; None without a closure

        Raises:
            RuntimeError: there is no gradient
        """
        if closure is None and (rule := self._fused_rule()):
            coefficients = self.subspace.coefficients
            state = self.inner.state.get(coefficients, {})
            self.subspace.step(rule, self.inner.param_groups[0], state)
            if state:  # plain SGD keeps none
                self.inner.state[coefficients] = state
            return None
        if closure is None:
            self._set_gradient()
            loss = self.inner.step()
        else:
            loss = self.inner.step(lambda: self._evaluate(closure))
        self.subspace.write_weights()
        return loss

    def _fused_rule(self) -> str | None:
        """The rule of twa_kernels.step that does what the parts of a step would do here.

        None if there is none.
        """
        group = self.inner.param_groups[0]
        if self.low_memory or any(group.get(name) for name in UNSUPPORTED_OPTIONS):
            return None
        own = self.inner._optimizer_step_pre_hooks or self.inner._optimizer_step_post_hooks
        if own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
            return None
        return FUSED.get(type(self.inner)) if self.subspace.can_fuse() else None

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        """The loss at the coefficients as they are, and their gradient.

        It is for optimizers such as L-BFGS that try several coefficients in one step.
        """
        self.subspace.write_weights()
        with torch.enable_grad():
            loss = closure()
        self._set_gradient()
        ranks = self.subspace.sharding.ranks
        if ranks.world_size == 1:
            return loss
        # Line searches and stopping rules look at the loss: that of all ranks, so that all do the
        # same.
        total = ranks.all_reduce_(torch.as_tensor(loss).detach().clone().reshape(1))
        return (total / ranks.world_size).reshape(())

    def _set_gradient(self) -> None:
        """Sees to it that the coefficients have their gradient."""
        if not self.low_memory:
            self.subspace.coefficients.grad = self.subspace.project_gradients()
        elif self.subspace.coefficients.grad is None:
            raise RuntimeError(
                "no gradient has reached the coefficients: call loss.backward() before"
                " optimizer.step()"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the model and of the coefficients."""
        if self.low_memory:
            self._hooks.clear()
        self.subspace.model.zero_grad(set_to_none=set_to_none)
        self.inner.zero_grad(set_to_none=set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler puts a `step` bound to this object into it; hooks belong to this model's
        # parameters.
        left_out = ("step", "_opt_called", "_hooks", "_unhook")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        inner: dict[str, Any] = {k: state[k] for k in ("state", "param_groups") if k in state}
        self.__dict__.update({key: value for key, value in state.items() if key not in inner})
        if inner:
            self.inner.__setstate__(inner)
        # a copy or an unpickled optimizer, not load_state_dict
        if "subspace" in state and self.low_memory:
            self._hook()

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, the coefficients, and the subspace that they belong to.

        Raises:
            DistributedError: the ranks' coefficients were not the same bits
        """
        self.subspace.sharding.ranks.check_drift()
        return super().state_dict() | {
            "coefficients": self.subspace.coefficients.detach().clone(),
            "subspace": self.subspace.identity(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Sets coefficients, inner state and model to what they were.

        Raises:
            TwaError: the state belongs to a subspace of other candidates, segments, center, bits,
                basis, constraint or normalisation
        """
        theirs = state_dict["subspace"]
        for key, ours in self.subspace.identity().items():
            if theirs.get(key) != ours:
                raise TwaError(
                    f"{key}: expected {ours}, found {theirs.get(key)}",
                    "optimizer state of another subspace",
                )
        self.subspace.sharding.ranks.reset_drift()
        own = ("coefficients", "subspace")
        super().load_state_dict({k: value for k, value in state_dict.items() if k not in own})
        self.subspace.coefficients.copy_(state_dict["coefficients"])
        self.subspace.write_weights()
