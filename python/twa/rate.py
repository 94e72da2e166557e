"""The learning rate of the coefficients: a step as long as one of the candidates' own training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch

from .distributed.sharding import Sharding
from .io.candidate import Candidate
from .io.candidates import Candidates
from .io.errors import TwaError
from .io.steps import steps_between
from .subspace import Subspace

#: training steps from one candidate to the next where nobody says
UNKNOWN_STEPS = 250.0
#: of the best rates for runs that still learn fast, and for those at a high constant rate
FACTOR = 1.25
PAIRS = 8  # of neighbouring candidates that are looked at, evenly spread
SAMPLE, RUNS = 8192, 8  # weights of a tensor that are looked at, in so many runs
ALIKE = 1e-3  # of the largest distance of a pair: nearer ones are the same but for rounding


def learning_rate(
    subspace: Subspace, per_epoch: int | None = None, step: float | None = None
) -> float:
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
        step: how far a step of training has moved the weights, which does not depend on the
            subspace: see `step_length`; None: it is looked at

    Returns:
        the rate, above 0; 0.01 where the candidates do not differ

    Raises:
        TwaError: the weights of the candidates are not at hand
    """
    step = step_length(subspace.sharding, per_epoch) if step is None else step
    unit = subspace.unit_step()
    return FACTOR * step / unit if step > 0 and unit > 0 else 0.01


def step_length(sharding: Sharding, per_epoch: int | None = None) -> float:
    """How far a step of training has moved the trained weights, from samples of the candidates.

    Ranks call it together.

    Args:
        sharding: of model and candidates
        per_epoch: as for `learning_rate`

    Returns:
        the length; 0 for one candidate, or where none differ

    Raises:
        TwaError: the weights of the candidates are not at hand
    """
    if not sharding.candidates.at_hand:
        raise TwaError("expected a number, since the candidates are not at hand", "learning rate")
    found = 0.0
    with sharding.ranks.fail_together("looking at the candidates"):
        if sharding.ranks.is_rank_zero:
            found = _step_length(sharding.candidates, sharding.keys, per_epoch)
        return sharding.ranks.broadcast_object(found)


def _step_length(candidates: Candidates, keys: Sequence[str], per_epoch: int | None) -> float:
    """That of some pairs of neighbours: the median of those that are not alike."""
    n = len(candidates)
    steps = steps_between(candidates, per_epoch) or [UNKNOWN_STEPS] * (n - 1)
    pairs = min(n - 1, PAIRS)
    places = torch.linspace(0, n - 2, pairs, dtype=torch.float64, device="cpu").round().long()
    lengths = []
    for i in places.tolist():
        square = sum(_square(candidates[i], candidates[i + 1], key) for key in keys)
        lengths.append(math.sqrt(square / steps[i]))
        for c in candidates[i : i + 2]:
            c.release()
    least = ALIKE * max(lengths, default=0.0)
    return statistics.median([length for length in lengths if length > least] or [0.0])


def _square(a: Candidate, b: Candidate, key: str) -> float:
    """The squared distance of two candidates in a tensor, by runs that are spread over it."""
    numel = a.info[key].numel
    if numel <= SAMPLE:
        places = [(0, numel)]
    else:
        width = SAMPLE // RUNS
        begins = torch.linspace(0, numel - width, RUNS, dtype=torch.float64, device="cpu")
        places = [(begin, begin + width) for begin in begins.long().tolist()]
    square = sum(
        float((b.columns(key, *place).double() - a.columns(key, *place).double()).square().sum())
        for place in places
    )
    return square * numel / max(1, sum(end - begin for begin, end in places))
