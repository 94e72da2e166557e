"""Where TWA starts: an average that at most six looks choose.

The options are the last candidate, averages with a longer and longer horizon, and the mean of all.
The loss falls along them, and then rises: so the choice walks downhill, from the middle on. Two of
them are compared on no more validation batches than it takes to tell them apart.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import averages
from ..io.progress import PeakMemory
from ..io.steps import steps_between
from ..tasks.batches import count_batches
from .evaluate import Evaluator, difference, mean_of
from .results import START, Result

#: averages over about 2, 4, 8 and 16 candidates
DECAYS = (0.5, 0.75, 0.875, 0.9375)
#: what TWA may start from, by name, with the shortest horizon first: candidates -> merge weights
OPTIONS: dict[str, Callable[[int], Tensor]] = {
    "last": functools.partial(averages.candidate, k=-1),
    **{f"EMA decay {d}": functools.partial(averages.ema, decay=d) for d in DECAYS},
    "uniform": averages.uniform,
}
LEAST_BATCHES = 4  # of a sample
#: two averages are told apart by a difference of so many standard errors; they are alike where the
#: standard error is so small a part of the loss
ERRORS, NEGLIGIBLE = 2.0, 0.002


def options(n: int) -> list[tuple[str, Tensor]]:
    """What TWA may start from: (name, merge weights), with the shortest horizon first.

    An EMA begins with the first candidate, which keeps much of the weight where the horizon is more
    than half of the list: such a one is older than the mean of all, and left out.

    Args:
        n: number of candidates, more than one
    """
    too_long = {f"EMA decay {d}" for d in DECAYS if 2 / (1 - d) > n}
    return [(name, make(n)) for name, make in OPTIONS.items() if name not in too_long]


def choose(
    evaluator: Evaluator, on_look: Callable[[], None], per_epoch: int | None = None
) -> Result:
    """Chooses where TWA starts, and leaves the model there.

    The stride of the last comparison stays in `evaluator.stride`. Of one candidate there is nothing
    to choose: the row is then that of "last".

    Args:
        evaluator: of the model
        on_look: called after each average that was looked at
        per_epoch: steps of an epoch of the candidates' own training; None: unknown

    Returns:
        its row of the table, without test figures
    """
    begun, memory = time.perf_counter(), PeakMemory(evaluator.sharding.device)
    evaluator.cost = 0.0
    names = evaluator.sharding.candidates.names
    n = len(names)
    method, note, beta = "last", names[-1], averages.candidate(n, -1)
    gain = None
    if n > 1:
        walk = _Walk(evaluator, on_look)
        chosen = walk.run()
        method, beta = START, chosen.beta
        note = (
            f"{chosen.name}; of {walk.looks} averages, on {len(chosen.values)} of {walk.total}"
            " validation batches"
        )
        gain = _gain(evaluator, chosen, per_epoch)
    evaluator.load(beta)
    members = int((beta != 0).sum())
    has_statistics = evaluator.has_batchnorm and members > 1
    if n > 1 and evaluator.stride == 1 and not has_statistics:
        val_loss = mean_of(chosen.values)  # that was all of the data
    else:
        val_loss = evaluator.loss()
    seconds, peak = time.perf_counter() - begun, evaluator.ranks.most(memory.bytes())
    result = Result(method, members, 0, seconds, peak, val_loss, note=note, beta=beta)
    result.looks, result.gain = evaluator.cost, gain
    result.device_memory = evaluator.ranks.most(memory.device_bytes())
    result.averaged_bn_loss = evaluator.averaged_bn_loss(beta) if has_statistics else None
    return result


def _gain(evaluator: Evaluator, chosen: _Option, per_epoch: int | None) -> float | None:
    """By how much a step of the candidates' own training lowered the loss of such an average.

    Over the last eighth of the candidates: the average as it was before them is looked at. None
    where the steps between candidates are not known, or a loss is not finite.
    """
    n = len(chosen.beta)
    steps, back = steps_between(list(evaluator.sharding.candidates), per_epoch), max(1, n // 8)
    if not steps or n < 3:  # of one candidate there is no average
        return None
    evaluator.load(_before(chosen, n - back), for_look=True)
    gain, _ = difference(evaluator.look(), chosen.values)
    return gain / sum(steps[-back:]) if math.isfinite(gain) else None


def _before(chosen: _Option, count: int) -> Tensor:
    """The merge weights (n,) that such an average had when there were `count` candidates."""
    beta = OPTIONS[chosen.name](count)
    rest = torch.zeros(len(chosen.beta) - count, dtype=torch.float64, device="cpu")
    return torch.cat([beta, rest])


@dataclass
class _Option:
    """An average that was looked at.

    Attributes:
        name: for the note
        beta: merge weights (n,)
        values: its losses on the sample: see `batch_values`
    """

    name: str
    beta: Tensor
    values: Tensor


class _Walk:
    """A walk along the options.

    Args:
        evaluator: of the model; its stride is set
        on_look: called after each option that was looked at

    Attributes:
        total: number of validation batches
        looks: options looked at so far
        at: the one that the model is at
    """

    def __init__(self, evaluator: Evaluator, on_look: Callable[[], None]) -> None:
        self.evaluator, self.on_look = evaluator, on_look
        self.options = options(len(evaluator.sharding.candidates))
        self.total, self.looks = count_batches(evaluator.task.val), 0
        evaluator.stride = first_stride(self.total, evaluator.share.world_size)

    def run(self) -> _Option:
        """The option that downhill leads to."""
        middle = (len(self.options) - 1) // 2  # there are more after it, or as many
        first = best = self._look(middle)
        for direction in (1, -1):
            place = middle + direction
            while 0 <= place < len(self.options):
                other = self._look(place)
                if not self._is_better(other, best):
                    break
                best, place = other, place + direction
            if best is not first:
                break
        if mean_of(best.values) == math.inf:
            return self._look(0)  # the last candidate alone
        return best

    def _look(self, place: int) -> _Option:
        """An option, measured on the sample; the model is at it then."""
        name, beta = self.options[place]
        self.evaluator.load(beta, for_look=True)
        self.at = _Option(name, beta, self.evaluator.look())
        self.looks += 1
        self.on_look()
        return self.at

    def _is_better(self, a: _Option, b: _Option) -> bool:
        """Whether a has a lower loss than b: on more and more batches, until that shows."""
        while True:
            apart, error = difference(a.values, b.values)
            alike = error < NEGLIGIBLE * abs(mean_of(b.values))
            if abs(apart) > ERRORS * error or alike or self.evaluator.stride == 1:
                return apart < 0
            self._refine(a, b)

    def _refine(self, a: _Option, b: _Option) -> None:
        """Halves the stride, and measures both on the batches that are new."""
        half = self.evaluator.stride // 2
        for option in (a, b) if self.at is a else (b, a):
            if option is not self.at:
                self.evaluator.load(option.beta, for_look=True)
                self.at = option
            option.values = _together(option.values, self.evaluator.look(offset=half))
        self.evaluator.stride = half


def _together(a: Tensor, b: Tensor) -> Tensor:
    """What `batch_values` gave of two samples, in the order of the batches' positions."""
    rows = torch.cat([a, b])
    return rows[rows[:, 2].argsort()]


def first_stride(batches: int, world_size: int) -> int:
    """The largest power of two that leaves enough batches for a sample, and for each share one."""
    stride, least = 1, max(LEAST_BATCHES, world_size)
    while -(-batches // (2 * stride)) >= least:
        stride *= 2
    return stride
