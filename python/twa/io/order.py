"""The order of candidates, oldest first: what the numbers in their names say of their age."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .checks import is_shown
from .formats import stem_of

Numeric = list[tuple[int, int, str]]

EPOCHS = ("epoch", "epochs", "ep")
STEPS = (
    *("step", "steps", "globalstep", "iter", "iters", "iteration", "iterations", "it", "itr"),
    *("update", "updates", "batch", "batches", "ba", "tokens"),
)
#: labels of steps, unless a decimal point shows that the number is a metric: ckpt-0.91
FILES = ("ckpt", "checkpoint")
METRICS = (
    *("loss", "acc", "accuracy", "ppl", "perplexity", "auc", "error", "err", "score", "metric"),
    *("bleu", "rouge", "wer", "cer", "iou", "miou", "mse", "mae", "rmse", "psnr", "fid", "reward"),
)
FACTORS = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}

#: a label and its number: epoch=3, step-500, ep_3, iter0000500, tokens_1.5B
LABELLED = re.compile(
    rf"(?<![A-Za-z])(?P<label>{'|'.join((*EPOCHS, *STEPS, *FILES))})[=_-]?"
    r"(?P<number>\d+(?:\.\d+)?(?:e\+?\d+(?![A-Za-z\d]))?)(?P<factor>[kmbt](?![A-Za-z\d]))?",
    re.IGNORECASE,
)
#: a number that is a metric: it has a decimal point (and is no date such as 2026.11.28), or comes
#: after a metric's name
METRIC = re.compile(
    r"(?<![\d.])\d+\.\d+(?:e[-+]?\d+)?(?!\.?\d)"
    rf"|(?<![A-Za-z])(?P<name>{'|'.join(METRICS)})[=_-]?\d+(?!\.?\d)",
    re.IGNORECASE,
)
AFTER_METRIC = re.compile(rf"(?:{'|'.join(METRICS)})_$", re.IGNORECASE)  # val_loss_epoch=0.53
LAST = re.compile(r"(?<![A-Za-z])(?:last|latest|final)(?![A-Za-z])", re.IGNORECASE)
ALIAS = re.compile(r"(?<![A-Za-z])(?:last|latest|final|best)(?![A-Za-z])", re.IGNORECASE)
VERSION = re.compile(r"-v(\d+)$")  # Lightning's, of a second file of one name


def numeric_order(path: Path | str) -> Numeric:
    """Sort key that orders step_9 before step_10."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", str(path))
        if part
    ]


@dataclass(frozen=True, order=True)
class Age:
    """What one part of a path, a file's stem or a directory's name, says of age; it is sorted by.

    Attributes:
        rank: 0 without an epoch or step; 1 with one; 2 for last, latest and final without one
        epoch: -1 without one
        steps: what else is numbered and grows, in order
        rest: the numeric order of what is left without metrics and version
        version: Lightning's
        whole: the numeric order of all of it
    """

    rank: int
    epoch: float
    steps: tuple[float, ...]
    rest: Numeric
    version: int
    whole: Numeric

    @classmethod
    def of(cls, name: str) -> Age:
        """That of a file's stem, or of a directory's name."""
        epoch, steps = -1.0, []
        for found in LABELLED.finditer(name):
            label, text = found["label"].lower(), found["number"]
            if is_metric(found):
                continue
            number = int(text) if text.isdecimal() else float(text)
            if label in EPOCHS:
                epoch = number
            else:
                steps.append(number * FACTORS.get((found["factor"] or "").lower(), 1))
        version = VERSION.search(name)
        base = name[: version.start()] if version else name
        has_age = epoch >= 0 or bool(steps)
        rank = 1 if has_age else 2 if LAST.search(name) else 0
        rest = numeric_order(without_metrics(base))
        return cls(
            rank, epoch, tuple(steps), rest, int(version[1]) if version else 0, numeric_order(name)
        )


def is_metric(found: re.Match[str]) -> bool:
    """Whether a label and its number are a metric, such as ckpt-0.91 and val_loss_epoch=0.53."""
    before = found.string[: found.start()]
    named = found["label"].lower() in FILES or AFTER_METRIC.search(before)
    return "." in found["number"] and not found["factor"] and bool(named)


def without_metrics(name: str) -> str:
    """A name without the numbers in it that are metrics."""
    return METRIC.sub(lambda found: found["name"] or "", name)


def age(path: Path) -> list[Age]:
    """Sort key that orders checkpoints by the epochs and steps in their names, else their numbers.

    Directories come first: all of run1 is older than all of run2.
    """
    return [Age.of(part) for part in (*path.parts[:-1], stem_of(path))]


def in_order(found: list[Path]) -> tuple[list[Path], bool]:
    """Paths in the order of a directory's listing are put in order of age; others stay.

    Shells list what a pattern matches in byte order, without regard to case, or without regard to
    anything but letters and digits at first (glibc, in most languages): step_10 before step_9, and
    with the last even before step_1.

    Returns:
        the paths, and whether they are in order of age
    """
    by_age = sorted(found, key=age)
    texts = [str(path) for path in found]
    if found == by_age or any(_is_sorted(texts, key) for key in SHELLS):
        return by_age, True
    return found, False


def _is_sorted(texts: list[str], key: Callable[[str], str]) -> bool:
    return all(a <= b for a, b in itertools.pairwise(map(key, texts)))


def _letters_and_digits(text: str) -> str:
    return "".join(filter(str.isalnum, text)).casefold()


#: what shells sort by: bytes; text without regard to case; glibc's locales
SHELLS: tuple[Callable[[str], str], ...] = (str, str.casefold, _letters_and_digits)

#: what to do about a doubt
LISTING = "list the files oldest first if the order is another"


def names_say(paths: Sequence[Path]) -> bool:
    """Whether the name of each file or directory says how old it is, in numbers that compare."""
    ages = [Age.of(stem_of(path)) for path in paths]
    return all(a.rank == 1 for a in ages) and len({a.epoch >= 0 for a in ages}) == 1


def doubts(paths: Sequence[Path]) -> list[str]:
    """What is doubtful about an order by `age`, a sentence each."""
    if len(paths) < 2:
        return []
    names = _distinct(paths)
    ages = [[Age.of(part) for part in name] for name in names]
    timed = [any(a.rank == 1 for a in of) for of in ages]
    last = [any(a.rank == 2 for a in of) and not t for of, t in zip(ages, timed, strict=True)]
    without = [p for p, t, z in zip(paths, timed, last, strict=True) if not t and not z]
    if any(timed):
        if without:
            return [
                f"no epoch or step is in the name of {shortened(without)}: it counts as older than"
                " those with one"
            ]
        epochs = [max(a.epoch for a in of) >= 0 for of, t in zip(ages, timed, strict=True) if t]
        if len(set(epochs)) > 1:
            return ["some names have an epoch, others a step alone: these count as older"]
        return []
    plain = ["/".join(map(without_metrics, name)) for name in names]
    numbered = [any(map(str.isdecimal, name)) for name in plain]
    odd = [p for p, n, z in zip(paths, numbered, last, strict=True) if not n and not z]
    if any(numbered) and odd:
        return [f"no number is in the name of {shortened(odd)}: its place is the alphabet's"]
    if odd and any(map(METRIC.search, map("/".join, names))):
        return ["the names have metrics and no steps: they are in the order of the metrics"]
    return []


def _distinct(paths: Sequence[Path]) -> list[tuple[str, ...]]:
    """What of each path is not in all of them, without the suffix."""
    common = len(Path(os.path.commonpath([p.absolute() for p in paths])).parts)
    return [(*p.absolute().parts[common:-1], stem_of(p)) for p in paths]


def best_named(paths: Sequence[Path]) -> int:
    """Which of several paths to one checkpoint says most of its age: one with a step or a number.

    It is none that is called last, best or such, or has Lightning's version, if there is another.
    """

    def vagueness(parts: tuple[str, ...]) -> tuple[bool, bool, bool]:
        alias = any(ALIAS.search(part) or VERSION.search(part) for part in parts)
        timed = any(Age.of(part).rank == 1 for part in parts)
        return alias, not timed, not any(map(str.isdecimal, "".join(map(without_metrics, parts))))

    ranked = [vagueness(parts) for parts in _distinct(paths)]
    return ranked.index(min(ranked))


def shortened(things: Sequence[object], most: int = 12) -> str:
    """Names in a row, such as "step_1, step_2, ..., step_48" if there are more than `most`."""
    names = [n.name if isinstance(n, Path) else str(n) for n in things]
    names = [name if is_shown(name) else ascii(name) for name in names]
    if len(names) > most:
        names[2:-1] = ["..."]
    return ", ".join(names)
