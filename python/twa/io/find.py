"""From paths and glob patterns to the checkpoints that are meant, in order."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .checks import is_shown
from .errors import CandidateError, reading
from .formats import FSDP_FOLDER, is_checkpoint_folder, is_unfinished, suffix_of
from .order import age, in_order, shortened

#: begins of names of directories in a checkpoint that hold parts of it, and no other checkpoints
PARTS = (FSDP_FOLDER, "optimizer", "global_step", "rank_")


@dataclass
class Found:
    """What paths and patterns lead to.

    Attributes:
        paths: of checkpoints, in order
        searched: those that a pattern or a directory has brought: they may turn out to hold no
            weights
        by_age: whether the order is that of `order.age`, and not a list's own
        inside: which directories of these have other checkpoints inside, a sentence each
        notes: what else may have been meant otherwise
    """

    paths: list[Path] = field(default_factory=list)
    searched: set[Path] = field(default_factory=set)
    by_age: bool = True
    inside: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@reading()
def find(patterns: Iterable[str | os.PathLike[str]], keep_unmatched: bool = False) -> Found:
    """What may be checkpoints, before any is opened.

    Args:
        patterns: each a file, a glob pattern, a directory that is one checkpoint, or a directory in
            which checkpoints lie
        keep_unmatched: whether a pattern that matches nothing is taken for a file's name, so that
            opening it says what is wrong

    Raises:
        CandidateError: there are no patterns, one matches nothing, a path cannot be shown, or a
            directory cannot be read
    """
    found = Found()
    named: set[Path] = set()
    for pattern in patterns:
        text = os.fspath(pattern)
        is_path = os.path.exists(text) or not glob.has_magic(text)
        matches = [text] if is_path else glob.glob(text, recursive=True)
        if not matches and keep_unmatched:
            is_path, matches = True, [text]
        if not matches:
            raise CandidateError(f"no candidates: nothing matches {text!r}")
        paths: list[Path] = []
        for match in map(Path, matches):
            inside = _inside(match) if match.is_dir() and not is_checkpoint_folder(match) else []
            paths += inside or [match]  # opening it says what was expected
            (named if is_path and not inside else found.searched).update(inside or [match])
            if match.is_dir() and not inside:
                found.inside += _others_inside(match)
        found.paths += sorted(dict.fromkeys(paths), key=age)  # ** brings a directory and its files
    if not found.paths:
        raise CandidateError("no candidates: expected at least one checkpoint, found none")
    if odd := [path for path in found.paths if not is_shown(str(path))]:
        raise CandidateError(
            f"expected paths that can be shown as they are, found {str(odd[0])!a}: rename it"
        )
    found.searched -= named
    found.paths, found.by_age = in_order(found.paths)
    if not found.by_age and any(a.rank == 1 for p in found.paths for a in age(p)):
        found.notes.append("the order is that of the list, and not of the steps in the names")
    return found


def find_checkpoints(patterns: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The paths of `find`."""
    return find(patterns).paths


def left_out(empty: Sequence[Path], opened: Sequence[Path]) -> list[str]:
    """The note on what a pattern or a directory has brought that holds no weights.

    Args:
        empty: paths of these
        opened: paths of the candidates; a directory around one needs no word
    """
    around = {folder for path in opened for folder in path.parents}
    names = [path for path in empty if path not in around]
    unread = {path for path in names if path.is_file() and not suffix_of(path)}
    unfinished = [path for path in names if path.is_dir() and is_unfinished(path)]
    notes = []
    for why, paths in (
        ("as its save has not ended (no .metadata)", unfinished),
        (
            "since no weights are in it",
            [path for path in names if path not in unread and path not in unfinished],
        ),
        ("as no checkpoint's suffix is known for it", [path for path in names if path in unread]),
    ):
        counts = Counter(path.name for path in paths)
        said = [name if count == 1 else f"{name} ({count} times)" for name, count in counts.items()]
        notes += [f"left out, {why}: {shortened(said)}"] if said else []
    return notes


def _inside(folder: Path) -> list[Path]:
    """The checkpoints in a directory that is none itself."""
    return [
        p
        for p in folder.iterdir()
        if not p.name.startswith(".") and (suffix_of(p) if p.is_file() else is_checkpoint_folder(p))
    ]


def _others_inside(folder: Path) -> list[str]:
    """A note on the checkpoints in a directory that is one itself, such as a Trainer's output."""
    others = [
        p
        for p in sorted(folder.iterdir(), key=age)
        if p.is_dir() and not p.name.startswith((".", *PARTS)) and is_checkpoint_folder(p)
    ]
    if not others:
        return []
    prefixes = {p.name.rstrip("0123456789") for p in others}
    pattern = f"{folder}/{prefixes.pop() if len(prefixes) == 1 else ''}*"
    return [
        f"{folder} is one checkpoint, and has {len(others)} more inside"
        f" ({shortened(others, 4)}): '{pattern}' names those"
    ]
