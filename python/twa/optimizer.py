"""`SubspaceOptimizer`: a torch optimizer over the coefficients that drops into a training loop."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, overload

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from twa_kernels.ops.step import UNSUPPORTED_OPTIONS

from .grad_hooks import GradientHooks
from .io.errors import StateError, TwaError, check_type
from .io.versions import OPTIMIZER, problem
from .rate import learning_rate
from .subspace import Subspace

#: optimizers whose step is fused with the projection and the reconstruction: all of it is one call,
#: segment by segment
FUSED = {torch.optim.SGD: "sgd", torch.optim.AdamW: "adamw"}
#: optimizers that `learning_rate` is made for
RATED = (torch.optim.Adam, torch.optim.AdamW)


class SubspaceOptimizer(torch.optim.Optimizer):
    """Trains the coefficients of a subspace with any torch optimizer.

        optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW)
        for batch in loader:
            loss(model, batch).backward(); optimizer.step(); optimizer.zero_grad()

    A step is, in plain PyTorch, per segment:

        x.grad = P @ g; inner.step(); theta = center + x @ P

    With SGD or AdamW on a packed basis in CPU memory all of that is one call (twa_kernels.step), to
    the same result. On several ranks each calls it with gradients of its own data, and the
    coefficients follow their average.

    `param_groups`, `state` and `defaults` are the inner optimizer's, so learning-rate schedulers
    work as usual. But the parameters in the group are the model's: their gradients are what step()
    takes, so whoever accumulates, clips, scales or clears gradients, by the model or by the
    optimizer, does what it does in other training. `state_dict` holds the inner state and x;
    `load_state_dict` also moves the model.

    A CUDA graph can capture a whole training step after some that were not captured, with
    capturable=True for AdamW. It repeats the learning rate; one that is a tensor on the device may
    change between replays, and the step is not fused then.

    torch.amp.GradScaler works, and on several ranks a step that one of them skips is skipped by
    all.

    Args:
        subspace: whose coefficients are trained
        optimizer: class of the inner optimizer
        low_memory: project each gradient as soon as backward has it, and free it. Never more than
            one of them is held, and several backward calls accumulate in the coefficients'
            gradient, which a step uses up. The parameter in the group is then the coefficients:
            clip those, the model has no gradients
        options: of the inner optimizer: lr, ... Without lr, Adam and AdamW have that of
            `twa.learning_rate`

    Warns:
        RuntimeWarning: somebody else has changed the model's weights since the last step, which
            starts from the coefficients nevertheless

    Attributes:
        inner: the inner optimizer

    Raises:
        TwaError: low_memory with sharding "rows"; no lr, and candidates that are not at hand; an
            argument is of another type
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
        check_type("subspace", subspace, Subspace, "a twa.Subspace")
        if not callable(optimizer):
            raise TwaError(
                "expected a class, such as torch.optim.AdamW, found an object of"
                f" {type(optimizer).__name__}",
                "optimizer",
            )
        self.subspace, self.low_memory = subspace, low_memory
        if "lr" not in options and optimizer in RATED:
            options["lr"] = learning_rate(subspace)
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
        else:
            self.inner.param_groups[0]["params"] = list(subspace.parameters)

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

    @contextlib.contextmanager
    def _coefficients_in_group(self) -> Iterator[None]:
        """A context for calls of the inner optimizer: it trains what its group holds."""
        shown = self.inner.param_groups[0]["params"]
        self.inner.param_groups[0]["params"] = [self.subspace.coefficients]
        try:
            yield
        finally:
            self.inner.param_groups[0]["params"] = shown

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asks GradScaler to leave it to `step` whether there is a step; see `_is_finite`.

        So a gradient that a skipped step leaves is dropped with low_memory, and ranks agree.
        """
        return self.low_memory or self.subspace.sharding.ranks.world_size > 1

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
            DistributedError: another rank is lost; it quotes that rank's error if it was in a step
        """
        with self.subspace.sharding.ranks.telling(lambda: " in a step of the optimizer"):
            return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        """`step`, of which other ranks are told if it fails."""
        self.subspace.warn_if_moved()
        loss = None
        if closure is not None and type(self.inner) in FUSED:  # which ask once
            loss, closure = self._loss(closure), None
        if not self._is_finite():
            if self.low_memory:
                self._hooks.use_up()
        elif closure is None and (rule := self._fused_rule()):
            coefficients = self.subspace.coefficients
            state = self.inner.state.get(coefficients, {})
            self.subspace.step(rule, self.inner.param_groups[0], state)
            if state:  # plain SGD keeps none
                self.inner.state[coefficients] = state
        else:
            with self._coefficients_in_group():
                if closure is None:
                    self._set_gradient()
                    self.inner.step()
                else:
                    loss = self.inner.step(functools.partial(self._evaluate, closure))
            self.subspace.write_weights()
        return loss

    def _fused_rule(self) -> str | None:
        """The rule of twa_kernels.step that does what the parts of a step would do here.

        None if there is none.
        """
        group = self.inner.param_groups[0]
        if self.low_memory or any(group.get(name) for name in UNSUPPORTED_OPTIONS):
            return None
        lr = group["lr"]
        if isinstance(lr, torch.Tensor) and lr.device.type != "cpu":
            return None  # torch's own step reads it there; the fused one would wait for it
        own = self.inner._optimizer_step_pre_hooks or self.inner._optimizer_step_post_hooks
        if own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
            return None
        return FUSED.get(type(self.inner)) if self.subspace.can_fuse() else None

    def _is_finite(self) -> bool:
        """What GradScaler leaves to an optimizer: unscales gradients, says whether to step.

        It then has set `grad_scale`, unless gradients are unscaled, and `found_inf`.
        """
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is not None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(1.0 / scale.to(p.grad.device))
        if found is None:
            return True
        bad = torch.tensor([float(found)], dtype=torch.float64, device="cpu")
        return not self.subspace.sharding.ranks.all_reduce_(bad)

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        """The loss at the coefficients as they are, and their gradient.

        It is for optimizers such as L-BFGS that try several coefficients in one step.
        """
        self.subspace.write_weights()
        loss = self._loss(closure)
        self._set_gradient()
        return loss

    def _loss(self, closure: Callable[[], Any]) -> Any:
        """The loss of the model as it is, and gradients; that of all ranks, on several."""
        with torch.enable_grad():
            loss = closure()
        ranks = self.subspace.sharding.ranks
        if ranks.world_size == 1 or loss is None:
            return loss
        # Line searches and stopping rules look at the loss: all ranks must do the same.
        if not isinstance(loss, torch.Tensor):
            loss = torch.tensor(loss, dtype=torch.float32, device="cpu")
        total = ranks.all_reduce_(loss.detach().clone().reshape(1))
        return (total / ranks.world_size).reshape(())

    def _set_gradient(self) -> None:
        """Sees to it that the coefficients have their gradient."""
        if not self.low_memory:
            self.subspace.coefficients.grad = self.subspace.project_gradients()
            return
        if self.subspace.coefficients.grad is None:
            raise RuntimeError(
                "no gradient has reached the coefficients: call loss.backward() before"
                " optimizer.step()"
            )
        self._hooks.use_up()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the model and of the coefficients."""
        if self.low_memory:
            self._hooks.clear()
        self.subspace.model.zero_grad(set_to_none=set_to_none)
        with self._coefficients_in_group():
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

        It has the form of any optimizer's: the state, and the coefficients in it, stands under the
        first parameter. So torch.distributed.checkpoint.state_dict takes it (not with low_memory).
        torch.distributed.checkpoint.load into the state of an optimizer that has not stepped yet
        would leave out the inner state: `load_state_dict` refuses that.

        Raises:
            DistributedError: the ranks' coefficients were not the same bits
        """
        subspace = self.subspace.state_dict()
        with self._coefficients_in_group():
            inner = super().state_dict()
        numbers = list(range(len(self.param_groups[0]["params"])))
        state: dict[int, dict[str, Any]] = {k: {} for k in numbers}
        identity = subspace.pop("identity")
        del subspace["format"]  # the group has one for all
        own = inner["state"].get(0, {})
        state[0] = own | subspace
        # which dcp.load must have filled in: what the state_dict it is given lacks, it leaves out
        group = {"params": numbers, "subspace": identity, "state_names": " ".join(sorted(own))}
        group = inner["param_groups"][0] | group | {"format": OPTIMIZER}
        return {"state": state, "param_groups": [group]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Sets coefficients, inner state and model to what they were.

        Raises:
            StateError: it is no state of a SubspaceOptimizer, or a newer twa has made it
            TwaError: it belongs to a subspace of other candidates, segments, center, bits, basis,
                constraint or normalisation
        """
        try:
            group = dict(state_dict["param_groups"][0])
            # without: from before there were versions
            if text := problem(group.pop("format", OPTIMIZER), OPTIMIZER):
                raise StateError(text, "state of a SubspaceOptimizer")
            own = dict(state_dict["state"][group["params"][0]])
            subspace = {"coefficients": own.pop("coefficients")}
            subspace |= {name: own.pop(name) for name in ("mix", "unit") if name in own}
            identity = dict(group.pop("subspace"))
            names = group.pop("state_names", " ".join(sorted(own))).split()
        except (KeyError, IndexError, TypeError) as error:
            raise StateError("expected the state of a SubspaceOptimizer") from error
        if missing := set(names) - own.keys():
            raise StateError(
                f"the state of a SubspaceOptimizer without {', '.join(sorted(missing))}: dcp.load"
                " fills in what is there already, so take get_optimizer_state_dict(model,"
                " optimizer), or load after a first step"
            )
        self.subspace.check_identity(identity, "optimizer state")
        state = {0: own} if own else {}
        with self._coefficients_in_group():
            super().load_state_dict({"state": state, "param_groups": [group | {"params": [0]}]})
        self.subspace.load_state_dict(subspace | {"identity": identity})
