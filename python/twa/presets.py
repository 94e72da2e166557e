"""Published ways to train the coefficients, ready to use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import averages
from .distributed.weights import load_untrained
from .io.candidates import Candidates
from .io.errors import TwaError
from .optimizer import SubspaceOptimizer
from .subspace import Subspace


def conference_method(
    model: nn.Module,
    candidates: Candidates,
    *,
    steps: int,
    lr: float = 1.0,
    weight_decay: float = 1e-5,
    start: int | Tensor | None = None,
    bits: int = 32,
) -> tuple[Subspace, SubspaceOptimizer, torch.optim.lr_scheduler.MultiStepLR]:
    """The conference version of trainable weight averaging (Li et al., ICLR 2023).

    SGD with momentum 0.9 on gradients that are projected onto the span of the candidates, one
    coefficient a candidate, weight decay, a rate that falls to a tenth after 1/2 and 3/4 of the
    steps. Defaults are as in the authors' code.

        subspace, optimizer, schedule = twa.conference_method(model, candidates, steps=1000)
        for batch in loader:
            loss(model, batch).backward(); optimizer.step(); schedule.step(); optimizer.zero_grad()

    Published: theta = optimizer(theta, P^T P g) with P an orthonormal basis of the candidates. Here
    theta = P^T x and x = optimizer(x, P g): the same step by step, as theta never leaves the span;
    weight decay on x is weight decay on theta.

    Args:
        model: its trainable parameters are in the subspace
        candidates: the n checkpoints
        steps: of the training, after which the rate is at a hundredth
        lr: the rate at the start
        weight_decay: of SGD
        start: candidate to start from, or merge weights (n,) that sum to 1; None: the mean of all,
            as for the published tables
        bits: 32: dense, as published. Packed bits keep the center at the start, whose rounding does
            not matter then, and pull towards it: weight decay is then on the distance from the
            start

    Returns:
        the subspace with the model at the start, the optimizer, and the schedule of its rate

    Raises:
        TwaError: steps is less than 1, or another argument is none of what it can be
        CandidateError: files and model do not fit
    """
    if steps < 1:
        raise TwaError(f"steps: expected at least 1, found {steps}")
    n = len(candidates)
    if start is None:
        weights = averages.uniform(n)
    else:
        weights = averages.candidate(n, start) if isinstance(start, int) else start
    center = "zero" if bits == 32 else weights
    subspace = Subspace.from_candidates(
        model,
        candidates,
        bits=bits,
        granularity="model",
        center=center,
        basis="orthonormal",
        normalize="none",
    )
    if bits == 32:
        subspace.set_merge_weights(weights)
        load_untrained(subspace.sharding, weights)
    optimizer = SubspaceOptimizer(
        subspace, torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=weight_decay
    )
    milestones = [max(1, steps // 2), max(1, int(steps * 0.75))]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    return subspace, optimizer, schedule
