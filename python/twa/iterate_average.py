"""`IterateAverage`: the running average of the coefficients while they are trained, which is what
to evaluate and to keep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .subspace import Subspace


class IterateAverage:
    """The average of the coefficients over the steps so far, later ones weighing more: after step t
    the weight of x_t is (1 + eta) / (t + eta), so that the last 1 / eta or so of the steps count
    (polynomial-decay averaging: Shamir and Zhang, ICML 2013).

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
    """

    def __init__(self, subspace: Subspace, eta: float = 3.0) -> None:
        if not eta >= 0:
            raise ValueError(f"eta: expected at least 0, found {eta}")
        self.subspace, self.eta, self.steps = subspace, eta, 0
        self.coefficients = subspace.coefficients.detach().clone()  # (n, L)

    @torch.no_grad()
    def update(self) -> None:
        """To be called after each optimizer.step()."""
        self.steps += 1
        self.coefficients.lerp_(
            self.subspace.coefficients.detach(), (1 + self.eta) / (self.steps + self.eta)
        )

    @torch.no_grad()
    def apply(self) -> None:
        """Coefficients and model at the average."""
        self.subspace.coefficients.copy_(self.coefficients)
        self.subspace.write_weights()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model at the average; afterwards where training was."""
        now = self.subspace.coefficients.detach().clone()
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                self.subspace.coefficients.copy_(now)
            self.subspace.write_weights()
