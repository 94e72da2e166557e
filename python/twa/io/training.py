"""What a checkpoint says of the training that it is of: how far it had come, and what is gone.

Frameworks write this inside a file of torch.save (Lightning, timm, plain loops) or beside the
weights (transformers' Trainer). It is read like all else: nothing is run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .checks import read_json
from .errors import CandidateError
from .formats import stem_of
from .order import ALIAS, LAST, METRIC, VERSION, doubts, names_say, shortened
from .torch_zip import described
from .unpickle import Made

#: keys of the number of steps so far, and of the number of epochs, of which the first counts
STEPS = ("global_step", "step", "steps", "global_steps", "iteration", "iter", "num_updates")
EPOCHS = ("epoch", "epochs")
#: files of transformers' Trainer in each of its checkpoints, and how it calls these
TRAINER_STATE, TRAINER_ARGUMENTS = "trainer_state.json", "training_args.bin"
TRAINER_FOLDER = re.compile(r"checkpoint-(\d{1,15})")
NUMBER = re.compile(r"\d+")
#: checkpoints of one run that are counted
MOST = 100_000


class Progress(NamedTuple):
    """How far a training had come.

    Attributes:
        step: number of steps; None: unknown
        epoch: number of epochs; None: unknown
    """

    step: float | None = None
    epoch: float | None = None


def progress_of(values: Mapping[str, object]) -> Progress:
    """What the plain values of a checkpoint say."""

    def first(keys: tuple[str, ...]) -> float | None:
        found = (_number(values.get(key)) for key in keys)
        return next((number for number in found if number is not None), None)

    return Progress(first(STEPS), first(EPOCHS))


def progress_beside(folder: Path) -> Progress:
    """What the Trainer's state in a checkpoint's directory says."""
    return progress_of(_trainer_state(folder))


def _number(value: object) -> float | None:
    """The value, if it can be a number of steps or epochs."""
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > 1e15:
        return None
    return float(value) if math.isfinite(value) and value >= 0 else None


def _trainer_state(folder: Path) -> Mapping[str, object]:
    """What the Trainer has written of its state; nothing if there is none that can be read."""
    path = folder / TRAINER_STATE
    if not path.is_file():
        return {}
    try:
        found = read_json(path)
    except CandidateError:
        return {}
    return found if isinstance(found, dict) else {}


# Order -------------------------------------------------------------------------------------------


class Order(NamedTuple):
    """The order of some checkpoints.

    Attributes:
        places: which of them is first, second, ...
        notes: what it is that of, if it is not that of the names
        doubts: what is doubtful about it, a sentence each
    """

    places: list[int]
    notes: list[str]
    doubts: list[str]


def in_order_of_training(paths: Sequence[Path], progress: Sequence[Progress]) -> Order:
    """Puts checkpoints that are in order of age by their names in that of what is in them.

    This is done in each directory where not all names have a step, but all checkpoints do, and
    leave no doubt: their steps and epochs give one order, which is also that of the names that
    differ in a number. Else the names' order stays, and is in doubt.

    Args:
        paths: in order of age, oldest first
        progress: of each
    """
    order, by_files = Order([*range(len(paths))], [], []), set()
    folders: dict[Path, list[int]] = {}
    for k, path in enumerate(paths):
        folders.setdefault(path.parent, []).append(k)
    for folder, places in folders.items():
        named, inside = [paths[k] for k in places], [progress[k] for k in places]
        values = _known(inside)
        if not values or names_say(named):
            continue
        what = "steps" if len({step for step, _ in values}) > 1 else "epochs"
        numbered = _numbered(named)
        if not all(_rising([values[k] for k in group]) for group in numbered):
            order.doubts.append(
                f"{folder}: the numbers in the names give another order than the {what} in the"
                " files: it is that of the names"
            )
        elif _certain(named, inside, values):
            by_files.update(places)
            right = [k for _, k in sorted(zip(values, places, strict=True))]
            for place, k in zip(places, right, strict=True):
                order.places[place] = k
            if right != places:
                order.notes.append(
                    f"{folder}: the order is that of the {what} in the files, and not of their"
                    " names"
                )
        elif not (_are_all(numbered, named) and _rising(values)):
            order.doubts.append(
                f"{folder}: the {what} in the files begin anew or are the same, which leaves the"
                " order open: it is that of the names"
            )
    order.doubts.extend(doubts([path for k, path in enumerate(paths) if k not in by_files]))
    return order


def _known(progress: Sequence[Progress]) -> list[tuple[float, float]]:
    """(step, epoch) of each checkpoint, with 0 for what some do not say; [] if all are the same."""
    steps, epochs = [p.step for p in progress], [p.epoch for p in progress]
    if None in steps:
        steps = [0.0] * len(steps)
    if None in epochs:
        epochs = [0.0] * len(epochs)
    values = [(step or 0.0, epoch or 0.0) for step, epoch in zip(steps, epochs, strict=True)]
    return values if len(set(values)) > 1 else []


def _by_epoch(value: tuple[float, float]) -> tuple[float, float]:
    """Sort key of (step, epoch) where steps are counted anew in every epoch."""
    return value[1], value[0]


def _rising(values: Sequence[tuple[float, float]]) -> bool:
    """Whether these are in order, steps first or epochs first."""
    return values in (sorted(values), sorted(values, key=_by_epoch))


def _certain(
    paths: Sequence[Path], progress: Sequence[Progress], values: Sequence[tuple[float, float]]
) -> bool:
    """Whether there is one order only that what is in the files can mean.

    One that is called best or last may be as old as another.
    """
    both = [(p.step, p.epoch) for p in progress if p.step is not None and p.epoch is not None]
    names = map(stem_of, paths)
    own = [
        value
        for name, value in zip(names, values, strict=True)
        if not ALIAS.search(name) or NUMBER.search(name)
    ]
    return sorted(both) == sorted(both, key=_by_epoch) and len(set(own)) == len(own)


def _numbered(paths: Sequence[Path]) -> list[list[int]]:
    """Those of some checkpoints whose names give an order by themselves, group by group.

    They have epochs or steps, or are the same but for one number, which is no metric and not
    Lightning's version: it gives these anew when files are gone.
    """
    timed: list[int] = []
    groups: dict[str, list[int]] = {}
    for k, path in enumerate(paths):
        name = stem_of(path)
        if names_say([path]):
            timed.append(k)
        elif not METRIC.search(name) and not VERSION.search(name):
            groups.setdefault(NUMBER.sub("0", name), []).append(k)

    def is_numbered(group: list[int]) -> bool:
        fields = zip(*(NUMBER.findall(stem_of(paths[k])) for k in group), strict=True)
        return sum(len(set(field)) > 1 for field in fields) == 1

    found = [group for group in groups.values() if is_numbered(group)]
    return [timed, *found] if names_say([paths[k] for k in timed]) else found


def _are_all(groups: Sequence[Sequence[int]], paths: Sequence[Path]) -> bool:
    """Whether one group has all checkpoints but those that are called last."""
    others = [k for k, path in enumerate(paths) if not LAST.search(stem_of(path))]
    return any(set(others) <= set(group) for group in groups)


# Checkpoints that are gone -----------------------------------------------------------------------


def removed(paths: Iterable[Path]) -> list[str]:
    """Notes on checkpoints that a Trainer with `save_total_limit` has removed, one an output.

    There is one only where the files leave no doubt: the limit, and which steps were saved.

    Args:
        paths: of the candidates
    """
    folders = dict.fromkeys(path if path.is_dir() else path.parent for path in paths)
    outputs = dict.fromkeys(f.parent for f in folders if TRAINER_FOLDER.fullmatch(f.name))
    return [note for output in outputs if (note := _removed(output))]


def _removed(output: Path) -> str:
    """The note on a Trainer's output directory; "" if nothing is known to be gone."""
    names = ((TRAINER_FOLDER.fullmatch(path.name), path) for path in output.iterdir())
    there = {int(name[1]): path for name, path in names if name and path.is_dir()}
    last = max(there)
    state, arguments = _trainer_state(there[last]), _arguments(there[last])
    limit = arguments.get("save_total_limit")
    if not isinstance(limit, int) or state.get("global_step") != last:
        return ""
    saved = _saved(state, last, _text(arguments.get("save_strategy")))
    gone = sorted(saved - there.keys())
    if not gone or not there.keys() <= saved | {last}:
        return ""
    return (
        f"{output}: {len(gone)} of {len(gone) + len(there)} checkpoints are not there, of steps"
        f" {shortened(gone)}: the Trainer had save_total_limit={limit}"
    )


def _saved(state: Mapping[str, object], last: int, strategy: object) -> set[int]:
    """The steps at which a Trainer has saved until its last checkpoint, as far as it is known."""
    every, epochs = _number(state.get("save_steps")), _number(state.get("epoch"))
    if strategy == "steps" and every and every.is_integer() and every * MOST >= last:
        return set(range(int(every), last + 1, int(every)))
    if strategy == "epoch" and epochs and epochs.is_integer() and epochs <= MOST:
        return {round(last * (k + 1) / epochs) for k in range(int(epochs))}
    return set()


def _arguments(folder: Path) -> Mapping[str, object]:
    """The fields of a Trainer's arguments, as stored; nothing if they cannot be read."""
    path = folder / TRAINER_ARGUMENTS
    try:
        found = described(path) if path.is_file() else None
    except CandidateError:
        return {}
    state = found.state if isinstance(found, Made) else None
    return state if isinstance(state, dict) else {}


def _text(value: object) -> object:
    """The value of an enumeration's member, as stored: its class was called with it."""
    return value.arguments[0] if isinstance(value, Made) and value.arguments else value
