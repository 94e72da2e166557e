"""The averages that people use today, each with how it chooses its merge weights.

They are there to compare with, and choose on the validation data.

A new one is a function of merge weights in `twa.averages` and a row in `BASELINES`. It sees names
and losses, never weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from .. import averages
from ..io.progress import PeakMemory
from .evaluate import Evaluator
from .results import Result

#: what EMA and LAWA choose from
EMA_DECAYS = (0.5, 0.7, 0.8, 0.9, 0.95)
LAWA_LENGTHS = (2, 4, 6, 8, 12, 16, 24, 32)

Loss = Callable[[Tensor], float]  # validation loss at merge weights (n,)
Choice = tuple[Tensor, str]  # merge weights, and what was chosen


def _best(options: Iterable[Choice], loss: Loss) -> Choice:
    """The option with the lowest loss."""
    return min(options, key=lambda option: loss(option[0]))


def last(names: Sequence[str], loss: Loss) -> Choice:
    """The last candidate."""
    return _best([(averages.candidate(len(names), -1), names[-1])], loss)


def best_single(names: Sequence[str], loss: Loss) -> Choice:
    """The best candidate."""
    n = len(names)
    return _best([(averages.candidate(n, k), name) for k, name in enumerate(names)], loss)


def uniform(names: Sequence[str], loss: Loss) -> Choice:
    """The mean of all candidates (SWA)."""
    return _best([(averages.uniform(len(names)), "")], loss)


def ema(names: Sequence[str], loss: Loss) -> Choice:
    """The exponential moving average with the best of `EMA_DECAYS`."""
    return _best([(averages.ema(len(names), d), f"decay {d}") for d in EMA_DECAYS], loss)


def lawa(names: Sequence[str], loss: Loss) -> Choice:
    """The mean of the last candidates, as many as is best of `lawa_lengths`."""
    n = len(names)
    return _best([(averages.lawa(n, k), f"last {k}") for k in lawa_lengths(n)], loss)


def lawa_lengths(n: int) -> list[int]:
    """The `LAWA_LENGTHS` below n."""
    return [k for k in LAWA_LENGTHS if k < n] or [1]


def greedy_soup(names: Sequence[str], loss: Loss) -> Choice:
    """The mean of those candidates that improve it, from the best one on."""
    n = len(names)
    singles = [loss(averages.candidate(n, k)) for k in range(n)]
    return averages.greedy_soup(singles, loss), ""


BASELINES: dict[str, Callable[[Sequence[str], Loss], Choice]] = {
    "last": last,
    "best single": best_single,
    "uniform": uniform,
    "EMA": ema,
    "LAWA": lawa,
    "greedy soup": greedy_soup,
}


def number_of_looks(names: Sequence[str]) -> int:
    """Losses that all baselines ask for, also where they are known: they are asked to choose
    without a model.
    """
    looks = 0

    def loss(beta: Tensor) -> float:
        nonlocal looks
        looks += 1
        return 0.0

    for choose in BASELINES.values():
        choose(names, loss)
    return looks


def measure(
    name: str, evaluator: Evaluator, names: Sequence[str], on_look: Callable[[], None]
) -> Result:
    """Makes a baseline, measures it and leaves the model at its weights.

    Args:
        name: of the baseline
        evaluator: of the model
        names: of the candidates
        on_look: called after each loss that was asked for

    Returns:
        its row of the table, without test figures
    """
    begun, memory = time.perf_counter(), PeakMemory(evaluator.sharding.device)
    evaluator.cost = 0.0

    def loss(beta: Tensor) -> float:
        value = evaluator.at(beta)
        on_look()
        return value

    beta, note = BASELINES[name](names, loss)
    evaluator.load(beta)
    members = int((beta != 0).sum())
    # Re-estimated BatchNorm statistics differ from those that the choice was made with: measure
    # what is exported.
    changed = members > 1 and evaluator.has_batchnorm
    val_loss = evaluator.loss() if changed else evaluator.known[beta.numpy().tobytes()][0]
    seconds = time.perf_counter() - begun
    peak = evaluator.ranks.most(memory.bytes())
    result = Result(name, members, 0, seconds, peak, val_loss, note=note, beta=beta)
    result.looks = evaluator.cost
    result.device_memory = evaluator.ranks.most(memory.device_bytes())
    result.averaged_bn_loss = evaluator.averaged_bn_loss(beta) if changed else None
    return result
