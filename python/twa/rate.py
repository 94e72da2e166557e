"""The learning rate of the coefficients: a step as long as one of the candidates' own training."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

import torch
from torch import Tensor

from .io.candidates import Candidates
from .io.errors import TwaError
from .io.steps import steps_between
from .subspace import Subspace

#: training steps from one candidate to the next where nobody says
UNKNOWN_STEPS = 250.0
#: of the best rates for runs that still learn fast, and for those at a high constant rate
FACTOR = 1.25
SAMPLE = 8192  # weights of a tensor that are looked at, evenly spread


def learning_rate(subspace: Subspace, per_epoch: int | None = None) -> float:
    """The learning rate that fits AdamW, Adam and others whose steps are as long as their rate.

        rate = 1.25 * (how far a step of training has moved the weights) / subspace.unit_step()

    It fits candidates of any number and distance, coefficients of any granularity, and all bases
    and bit widths (docs/notes/rate.md). A step of training is taken as the median over neighbouring
    candidates of their distance by the square root of the steps between them, as in a random walk.
    Where names and files do not say the steps, 250 are assumed, among fine-tunes, too. Ranks call
    it together.

    Args:
        subspace: whose coefficients are to be trained
        per_epoch: training steps of an epoch, for candidates that say their epoch and not their
            step; None: unknown

    Returns:
        the rate, above 0

    Raises:
        TwaError: the weights of the candidates are not at hand
    """
    if not subspace.candidates.at_hand:
        raise TwaError("expected a number, since the candidates are not at hand", "learning rate")
    ranks, found = subspace.sharding.ranks, 0.0
    with ranks.fail_together("looking at the candidates"):
        if ranks.is_rank_zero:
            found = _step_length(subspace.candidates, subspace.sharding.keys, per_epoch)
        found = ranks.broadcast_object(found)
    unit = subspace.unit_step()
    return (
        FACTOR * found / unit if found > 0 and unit > 0 else 0.01
    )  # nothing to learn, at any rate


def _step_length(candidates: Candidates, keys: list[str], per_epoch: int | None) -> float:
    """How far a step of training has moved the weights; 0 for one candidate."""
    steps = steps_between(candidates, per_epoch) or [UNKNOWN_STEPS] * (len(candidates) - 1)
    squares = torch.zeros(len(steps), dtype=torch.float64)
    for key in keys:
        rows = [_sample(candidates, i, key) for i in range(len(candidates))]
        scale = candidates.info[key].numel / max(1, len(rows[0]))
        squares += torch.tensor([float((b - a).square().sum()) for a, b in pairwise(rows)]) * scale
    for c in candidates:
        c.release()
    moved = [
        math.sqrt(square / count) for square, count in zip(squares.tolist(), steps, strict=True)
    ]
    return statistics.median(moved) if moved else 0.0


def _sample(candidates: Candidates, i: int, key: str) -> Tensor:
    """Some weights of a tensor of candidate i, in runs that are evenly spread, float64."""
    numel, runs = candidates.info[key].numel, 16
    width = SAMPLE // runs
    if numel <= SAMPLE:
        return candidates[i].columns(key, 0, numel).double()
    begins = torch.linspace(0, numel - width, runs).long().tolist()
    return torch.cat([candidates[i].columns(key, b, b + width) for b in begins]).double()
