"""When in training candidates were saved, as far as names and files say it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from .candidate import Candidate
from .formats import stem_of
from .order import EPOCHS, FACTORS, FILES, LABELLED, STEPS, is_metric
from .recording import Recorded

#: labels of numbers that count neither steps nor epochs
OTHERS = ("tokens",)


def steps_between(candidates: Sequence[Candidate], per_epoch: int | None = None) -> list[float]:
    """Training steps from each candidate to the next, (n - 1,); empty if they are not known.

    They are those of a recording, those in the names of files and directories, or else those in the
    files; they have to grow.

    Args:
        candidates: in order
        per_epoch: steps of an epoch, for candidates whose epoch is known, and not their step
    """
    for label, unit in (("step", 1), ("epoch", per_epoch)):
        if unit is None:
            continue
        times = [_time(c, label) for c in candidates]
        known = [t * unit for t in times if t is not None]
        steps = [b - a for a, b in pairwise(known)]
        if len(known) == len(candidates) and steps and min(steps) > 0:
            return steps
    return []


def _time(candidate: Candidate, label: str) -> float | None:
    """The step or the epoch of a candidate."""
    if isinstance(candidate, Recorded):
        return float(candidate.step) if label == "step" else None
    labels = EPOCHS if label == "epoch" else (*STEPS, *FILES)
    for name in (stem_of(candidate.path), *reversed(candidate.path.parent.parts[-2:])):
        for found in LABELLED.finditer(name):
            known = found["label"].lower()
            if known in labels and known not in OTHERS and not is_metric(found):
                return float(found["number"]) * FACTORS.get((found["factor"] or "").lower(), 1)
    return getattr(candidate.progress, label)
