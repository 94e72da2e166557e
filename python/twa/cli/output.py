"""The output of a run, and what is printed of its result."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..export.hugging_face import FOLDER
from ..io.atomic import LOCK
from ..io.candidates import Candidates
from ..io.checks import is_shown
from ..io.errors import OutputError
from ..io.recording_files import is_recording
from ..merge.outcome import Outcome
from ..merge.resume import Store

#: how files of checkpoints are named, so that a directory hardly is
FILE_NAMES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def check_is_directory(folder: Path) -> None:
    """OutputError if a directory is to be made whose name is that of a file of weights."""
    if folder.suffix in FILE_NAMES and not os.path.exists(folder):
        raise OutputError(
            "expected a directory for the output, found a file's name; twa merge and twa export"
            " write a single file, too, whose name ends in .safetensors",
            folder,
        )


def check_output(folder: Path, overwrite: bool, resume: bool = False) -> None:
    """Checks that a run may write its output here.

    Args:
        folder: is made if it does not exist
        overwrite: whether what is in it may be replaced
        resume: whether a state in it may be continued

    Raises:
        OutputError: it cannot be made or written, or holds something that must not be lost
    """
    with writing(folder, "the output directory cannot be written"):
        _check_output(folder, overwrite, resume)
        folder.mkdir(parents=True, exist_ok=True)
        _try_to_write(folder)


def _check_output(folder: Path, overwrite: bool, resume: bool) -> None:
    """OutputError if there is something that is no directory, or must not be lost."""
    _check_name(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError("expected a directory for the output, found a file", folder)
    if folder.is_symlink() and not folder.exists():
        raise OutputError("expected a directory for the output, found a link to nothing", folder)
    has_state = (folder / Store.NAME).exists()
    is_full = folder.is_dir() and any(not _is_left_over(p) for p in folder.iterdir())
    if is_full and not overwrite and not (resume and has_state):
        if has_state:
            raise OutputError(
                "holds the state of an unfinished run; pass --resume to continue it, or --overwrite"
                " to start anew",
                folder,
            )
        raise OutputError(
            "the output directory is not empty; pass --overwrite to replace what is in it, or"
            " choose another",
            folder,
        )


def check_file(path: Path, overwrite: bool) -> None:
    """Checks that an output file may be written here.

    Raises:
        OutputError: it cannot be written, or is there and may not be replaced
    """
    with writing(path, "the output cannot be written"):
        _check_name(path)
        if path.is_dir():
            raise OutputError("expected a file for the output, found a directory", path)
        if path.exists() and not overwrite:
            raise OutputError("exists; pass --overwrite to replace it", path)
        _try_to_write(next(p for p in path.absolute().parents if p.exists()))


def _check_name(path: Path) -> None:
    """OutputError if the path could not be read again: find() takes none that cannot be shown."""
    if not is_shown(str(path)):
        raise OutputError(f"expected a name that can be shown as it is, found {str(path)!a}")


def check_not_read(candidates: Candidates, outputs: list[Path]) -> None:
    """OutputError if an output, or what is in it, is a file of a candidate.

    Snapshots of a recording need each other: nothing is written among its files.
    """
    for output in outputs:
        if output.parent.is_dir() and is_recording(output.parent):
            raise OutputError("is inside a recording: choose another output", output)
    real = [Path(os.path.realpath(output)) for output in outputs]
    for c in candidates:
        for file in c.files:
            path = Path(os.path.realpath(file))
            for output in real:
                if output == path or output in path.parents:
                    raise OutputError(f"is a candidate ({c.path}): choose another output", output)


def _try_to_write(folder: Path) -> None:
    """OSError unless files can be written in a folder."""
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextlib.contextmanager
def writing(output: Path, problem: str = "") -> Iterator[None]:
    """Makes an OSError from inside an OutputError.

    Args:
        output: what is written
        problem: what the error means, before anything is written; else it names the file
    """
    try:
        yield
    except OSError as error:
        what = problem or "the result could not be written"
        where = "" if problem else f": {error.filename or ''}"
        raise OutputError(f"{what} ({error.strerror}){where}", output) from error


def _is_left_over(path: Path) -> bool:
    """Whether a killed process may have left it before there was a state to continue from."""
    is_temporary = path.name.startswith(".") and path.suffix == ".tmp"
    return is_temporary or path.match(Store.BEST) or path.name == LOCK


def has_result(folder: Path) -> bool:
    """Whether the result of a run is there."""
    return all((folder / name).exists() for name in ("averaged.safetensors", "results.json"))


def is_finished(folder: Path) -> bool:
    """Whether a run has ended there."""
    return has_result(folder) and not (folder / Store.NAME).exists()


def finish(folder: Path, outcome: Outcome, dcp: bool = False) -> None:
    """Writes the files of a result, and prints its table.

    All ranks call it; rank 0 writes.

    Raises:
        OutputError: a file cannot be written
    """
    with writing(folder):
        written = outcome.save(folder, dcp=dcp, command=shlex.join(["twa", *sys.argv[1:]]))
    if not outcome.sharding.ranks.is_rank_zero:
        return
    print(f"\n{outcome}")
    print(f"written to {folder}/: {', '.join(written)}")
    if f"{FOLDER}/" in written:
        print(f"from_pretrained loads {folder / FOLDER}/")
