"""Checkpoints of DeepSpeed, which are refused by name, with the command that converts them.

With ZeRO each rank has a slice of all weights, without their names, among the states of its
optimizer; DeepSpeed's own script puts them together.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from .checks import bytes_of_file, is_file_name

#: files with a model's states, of one rank each; with ZeRO-3 those of data-parallel ranks, too
STATES = re.compile(r"(?:zero_pp_rank_\d+_)?mp_rank_\d+_model_states\.pt")
#: that with the whole module, unless ZeRO-3 or tensor parallelism has divided it, and its entry
WHOLE, ENTRY = "mp_rank_00_model_states.pt", "module"
#: files that DeepSpeed writes beside its directories: the name of the newest, and the script
LATEST, SCRIPT = "latest", "zero_to_fp32.py"
MAX_LATEST = 1000  # bytes


def states_folder(path: Path) -> Path | None:
    """The directory with DeepSpeed's files: this one, that of a file, or the only one inside.

    Args:
        path: a file or directory

    Returns:
        None if there are no such files, or several such directories inside
    """
    if path.is_file():
        return path.parent if STATES.fullmatch(path.name) else None
    if _states(path):
        return path
    inside = [p for p in path.iterdir() if _states(p)] if (path / LATEST).is_file() else []
    return inside[0] if len(inside) == 1 else None


def whole_module(folder: Path) -> Path | None:
    """The file of a directory with DeepSpeed's files that holds all of the module, if any does."""
    return folder / WHOLE if _states(folder) == [WHOLE] else None


def refusal(folder: Path) -> str:
    """What is said of a directory with DeepSpeed's files."""
    outer = folder.parent
    command = ["python", "-m", "deepspeed.utils.zero_to_fp32", str(outer), "OUT"]
    if (outer / SCRIPT).is_file():
        command[1:3] = [str(outer / SCRIPT)]
    if _newest(outer) != folder.name:
        command += ["-t", folder.name]
    ways = []
    if any(folder.glob("*_optim_states.pt")):
        ways.append(f"`{shlex.join(command)}` puts them together in OUT, to be read in its place")
    if whole_module(folder) is not None:
        ways.append(f"with entry {ENTRY!r} {WHOLE} is read, in the precision of the training")
    what = "this is a checkpoint of DeepSpeed, whose ranks have the weights in slices"
    return f"{what}: {'; or '.join(ways)}" if ways else what


def _states(folder: Path) -> list[str]:
    """Names of DeepSpeed's files of model states in a directory."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if STATES.fullmatch(path.name))


def _newest(folder: Path) -> str:
    """The name of the newest directory inside, as DeepSpeed has noted it; "" without a note."""
    path = folder / LATEST
    if not path.is_file():
        return ""
    try:
        name = bytes_of_file(path, MAX_LATEST).decode().strip()
    except (OSError, ValueError):
        return ""
    return name if is_file_name(name) else ""
