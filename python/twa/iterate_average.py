"""`IterateAverage`: the running average of the coefficients while they are trained.

It is what to evaluate and to keep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .io.errors import StateError, TwaError, check_type
from .io.versions import ITERATE_AVERAGE, problem
from .subspace import Subspace


class IterateAverage:
    """The average of the coefficients over the steps so far, later ones weighing more.

    After step t the weight of x_t is (1 + eta) / (t + eta), so that the last 1 / eta or so of the
    steps count (polynomial-decay averaging: Shamir and Zhang, ICML 2013).

        average = twa.IterateAverage(subspace)
        for batch in loader:
            loss(model, batch).backward(); optimizer.step(); optimizer.zero_grad()
            average.update()
        with average.applied():
            evaluate(model)
        average.apply()      # at the end: the model is at the average

    A training step is noisy, the average over steps is not: a constant learning rate then does as
    well as one that falls to zero, for any number of steps, and little depends on its size
    (docs/claims.md). Ranks of a job that call the same hold the same.

    Args:
        subspace: whose coefficients are averaged
        eta: at least 0; 0 weighs all steps alike

    It is summed in float64: of a long run a step moves it by less than float32 can tell.

    Attributes:
        steps: how many steps are in it

    Raises:
        TwaError: eta is negative or NaN, or the subspace is none
    """

    def __init__(self, subspace: Subspace, eta: float = 2.0) -> None:
        check_type("subspace", subspace, Subspace, "a twa.Subspace")
        if not eta >= 0:
            raise TwaError(f"eta: expected at least 0, found {eta}")
        self.subspace, self.eta, self.steps = subspace, eta, 0
        self._mean = subspace.coefficients.detach().to(torch.float64, copy=True)  # (n, L)

    @property
    def coefficients(self) -> Tensor:
        """The average, in shape and dtype of the subspace's coefficients; a copy."""
        return self._mean.to(self.subspace.coefficients.dtype, copy=True)

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the coefficients as they are; call it after each optimizer.step()."""
        self.steps += 1
        weight = (1 + self.eta) / (self.steps + self.eta)
        self._mean.lerp_(self.subspace.coefficients.detach().double(), weight)

    @torch.no_grad()
    def apply(self) -> None:
        """Sets coefficients and model to the average."""
        self.subspace.coefficients.copy_(self._mean)
        self.subspace.write_weights()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """A context with the model at the average; afterwards it is where training was."""
        now = self.subspace.coefficients.detach().clone()
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                self.subspace.coefficients.copy_(now)
            self.subspace.write_weights()

    def state_dict(self) -> dict[str, object]:
        """What `load_state_dict` takes."""
        own = {"eta": self.eta, "steps": self.steps, "coefficients": self._mean.clone()}
        return {"format": ITERATE_AVERAGE, **own}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the average to what it was when `state_dict` was called.

        Raises:
            TwaError: it is no such state, of coefficients of another shape, or of a newer twa
        """
        # without: from before there were versions
        if text := problem(state.get("format", ITERATE_AVERAGE), ITERATE_AVERAGE):
            raise StateError(text, "state of an IterateAverage")
        if missing := [name for name in ("eta", "steps", "coefficients") if name not in state]:
            raise StateError(f"expected the state of an IterateAverage, found no {missing[0]!r}")
        if state["coefficients"].shape != self._mean.shape:
            found, expected = tuple(state["coefficients"].shape), tuple(self._mean.shape)
            raise TwaError(f"expected shape {expected}, found {found}", "coefficients")
        self.eta, self.steps = float(state["eta"]), int(state["steps"])
        self._mean.copy_(state["coefficients"])
