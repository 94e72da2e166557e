"""From paths and glob patterns to the checkpoints that are meant, in order."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

from .errors import CandidateError
from .formats import SUFFIXES, is_checkpoint_folder


def numeric_order(path: Path | str) -> list[tuple[int, int, str]]:
    """Sort key that orders step_9 before step_10."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", str(path))
        if part
    ]


def find_checkpoints(patterns: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Paths of checkpoints, in numeric order.

    A pattern is a file, a glob pattern, a directory that is one checkpoint, or a directory in which
    checkpoints lie.
    """
    found: list[Path] = []
    for pattern in patterns:
        text = os.fspath(pattern)
        if os.path.exists(text) or not glob.has_magic(text):
            matches = [text]
        else:
            matches = sorted(glob.glob(text, recursive=True), key=numeric_order)
        if not matches:
            raise CandidateError(f"no candidates: nothing matches {text!r}")
        for match in map(Path, matches):
            is_collection = match.is_dir() and not is_checkpoint_folder(match)
            found += _inside(match) if is_collection else [match]
    if not found:
        raise CandidateError("no candidates: expected at least one checkpoint, found none")
    return in_order(found)


def in_order(found: list[Path]) -> list[Path]:
    """Paths in alphabetic order are put in numeric order; others stay as they are.

    Alphabetic is how a shell lists what a pattern matches: step_10 before step_9.
    """
    return sorted(found, key=numeric_order) if found == sorted(found, key=str) else found


def _inside(folder: Path) -> list[Path]:
    """The checkpoints in a directory that is none itself."""
    inside = [
        p
        for p in folder.iterdir()
        if not p.name.startswith(".")
        and (p.suffix in SUFFIXES if p.is_file() else is_checkpoint_folder(p))
    ]
    return sorted(inside, key=numeric_order) or [folder]  # opening it says what was expected
