"""The small files of a candidate's directory: which go beside the average, and which are missed.

Configuration, tokenizer, templates: all that is of the model and neither weights nor code. Nothing
of them is run, and a directory that is huge or hostile costs no more than the limits here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

from ..io.checks import check_levels, is_inside, is_unicode, printable
from ..io.dcp import METADATA
from ..io.foreign import foreign
from ..io.formats import INDEX as ANY_INDEX

CONFIG = "config.json"
INDEX = ".index.json"
SMALL_BYTES = 64 << 20  # of a file
LFS_BYTES = 1024  # more than a Git LFS pointer has
INDENTED = 1 << 20  # bytes of a configuration that is written in lines: these may be long
#: of all files together: bytes, files, entries of folders that are looked at, folders in folders
MAX_BYTES, MAX_FILES, MAX_ENTRIES, MAX_DEPTH = 1 << 30, 1000, 10_000, 4
WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|distcp|h5|hdf5|keras|msgpack|onnx|onnx_data|data|pb|tflite"
    r"|mlmodel|gguf|ggml|ot|nemo|npz|npy|tar|gz|tgz|bz2|xz|zst|zip|7z)$",
    re.IGNORECASE,
)
CODE = re.compile(r"\.(py|pyc|pyd|pkl|pickle|joblib|ipynb|so|dll|dylib|exe|sh)$", re.IGNORECASE)
#: of the run that made a candidate, or said of the candidate, not of the model
NOT_OF_THE_MODEL = (
    ".*",
    "optimizer.*",
    "scheduler.*",
    "scaler.*",
    "rng_state*",
    "random_states*",
    "training_args.*",
    "trainer_state.json",
    "trainer_log.jsonl",
    "*_results.json",
    "latest",
    "latest_checkpointed_iteration.txt",
    "events.out.tfevents*",
    "*.log",
    "readme*",
)
#: the same of folders; and the candidate in other formats
OTHER_FOLDERS = (
    ".*",
    "checkpoint-*",
    "global_step*",
    "optimizer_*",
    "runs",
    "logs",
    "wandb",
    "mlruns",
    "tensorboard",
    "lightning_logs",
    "eval",
    "__pycache__",
    "onnx",
    "openvino",
    "coreml",
    "tflite",
    "original",
)
#: files that may name code of the directory itself
NAME_CODE = (
    CONFIG,
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
#: files that decide what weights mean
DECISIVE = (
    CONFIG,
    "modules.json",
    "tokenizer.json",
    "tekken.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
)
#: what in them does not: where they come from, how they are stored, how the last batch was padded
NOT_DECISIVE = {
    CONFIG: {"transformers_version", "_name_or_path", "dtype", "torch_dtype"},
    "tokenizer.json": {"padding", "truncation"},
}


@dataclass
class SmallFiles:
    """What a look through a directory has found.

    Attributes:
        copied: paths in the directory of the files that go beside the average
        left_out: paths of what a user of the model may miss there, and why it is left out
    """

    copied: list[Path] = field(default_factory=list)
    left_out: dict[Path, str] = field(default_factory=dict)

    def missed(self) -> str:
        """What is left out, for a message: ten at most."""
        most = 10
        items = [f"{printable(str(path))} ({why})" for path, why in self.left_out.items()]
        more = [f"{len(items) - most} more"] * (len(items) > most)
        return ", ".join([*items[:most], *more])


def small_files(source: Path, but: Collection[Path] = ()) -> SmallFiles:
    """Looks through a model's directory for its small files.

    Args:
        source: the directory
        but: folders that are no part of it, such as that of the output
    """
    walk = _Walk(source, {os.path.realpath(folder) for folder in but}, _names_code(source))
    walk.visit(Path())
    return walk.found


class _Walk:
    """A look through a directory, which counts what it finds."""

    def __init__(self, source: Path, but: set[str], names_code: bool) -> None:
        self.source, self.but, self.names_code = source, but, names_code
        self.entries, self.bytes = MAX_ENTRIES, 0
        self.found = SmallFiles()

    def visit(self, folder: Path) -> None:
        """Takes down the files of a folder, then those of the folders in it."""
        try:
            with os.scandir(self.source / folder) as scan:
                entries = sorted(islice(scan, self.entries + 1), key=lambda entry: entry.name)
        except OSError as error:
            self.found.left_out[folder] = error.strerror or "cannot be read"
            return
        if len(entries) > self.entries:
            self.found.left_out[folder] = f"some of it: more than {MAX_ENTRIES} files and folders"
            entries = entries[: self.entries]
        self.entries -= len(entries)
        folders = []
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(folder / entry.name)
            elif os.path.isdir(entry.path):  # a link
                if not _matches(entry.name, OTHER_FOLDERS):
                    self.found.left_out[folder / entry.name] = "a link to a folder"
            else:
                self.file(folder / entry.name)
        for inner in folders:
            if not self.is_other(inner):
                self.visit(inner)

    def is_other(self, folder: Path) -> bool:
        """Whether a folder is none of the model, or too deep, which is then taken down."""
        path = self.source / folder
        if _matches(folder.name, OTHER_FOLDERS) or os.path.realpath(path) in self.but:
            return True
        if os.path.lexists(path / METADATA):  # a torch.distributed.checkpoint
            return True
        if len(folder.parts) > MAX_DEPTH:
            self.found.left_out[folder] = f"more than {MAX_DEPTH} folders deep"
        return len(folder.parts) > MAX_DEPTH

    def file(self, path: Path) -> None:
        """Takes down a file, unless nobody will miss it."""
        name = path.name
        if _matches(name, NOT_OF_THE_MODEL) or fnmatch(name, ANY_INDEX):
            return
        if WEIGHTS.search(name):
            if len(path.parts) > 1:  # at the top they are the candidate's own
                self.found.left_out[path] = "weights that are not averaged"
        elif CODE.search(name):
            if name.endswith(".py") and self.names_code:
                self.found.left_out[path] = "code, for you to look at and copy"
        elif why := self.refusal(self.source / path):
            self.found.left_out[path] = why
        else:
            self.found.copied.append(path)

    def refusal(self, file: Path) -> str:
        """Why a file is not copied; "" if it is, and then it counts."""
        if not is_inside(file, self.source):
            return "no regular file of this directory"
        if not os.access(file, os.R_OK):
            return "cannot be read"
        size = file.stat().st_size
        if size < LFS_BYTES and "Git LFS" in foreign(file):
            return "a Git LFS pointer: run 'git lfs pull'"
        if size > SMALL_BYTES:
            return f"larger than {SMALL_BYTES} bytes"
        if len(self.found.copied) >= MAX_FILES:
            return f"more than {MAX_FILES} files"
        if self.bytes + size > MAX_BYTES:
            return f"more than {MAX_BYTES} bytes in all"
        self.bytes += size
        return ""


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name.lower(), pattern) for pattern in patterns)


def _names_code(source: Path) -> bool:
    """Whether the directory's configuration has code of its own run: auto_map and the like."""
    for name in NAME_CODE:
        config = _read(source, Path(name))
        if isinstance(config, dict) and ("auto_map" in config or "custom_pipelines" in config):
            return True
    modules = _read(source, Path("modules.json"))  # of sentence-transformers
    return isinstance(modules, list) and any(
        isinstance(m, dict) and not str(m.get("type")).startswith("sentence_transformers.")
        for m in modules
    )


# What configurations say -------------------------------------------------------------------------


def with_dtype(text: bytes, dtype: str) -> bytes:
    """A configuration's JSON whose `dtype` and `torch_dtype`, also of parts, are the given one.

    Everything else is as it was, to the byte if no dtype differs or it is no JSON.
    """
    config = _parsed(text)
    if not _set_dtype(config, dtype):
        return text
    indent = 2 if len(text) <= INDENTED else None
    written = json.dumps(config, indent=indent, ensure_ascii=False)
    if not is_unicode(written):
        written = json.dumps(config, indent=indent)  # with escapes, as it was
    return (written + "\n").encode("utf-8")


def _set_dtype(config: object, dtype: str) -> bool:
    """Sets the dtypes that are there; whether one was another."""
    if not isinstance(config, dict):
        return False
    changed = False
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and not isinstance(value, dict):
            changed |= value != dtype
            config[key] = dtype
        elif key != "quantization_config":
            changed |= _set_dtype(value, dtype)
    return changed


def differences(folders: Sequence[Path], paths: Iterable[Path]) -> list[str]:
    """What candidates' directories say differently of what their weights mean, for a message.

    The last one's lack of a file that another has counts, too.

    Args:
        folders: the directories; the others are compared with the last
        paths: of the last one's small files
    """
    found, last = [], folders[-1]
    for path in paths:
        if not _matches(path.name, DECISIVE):
            continue
        expected = _content(last, path)
        for folder in folders[:-1]:
            content = _content(folder, path)
            if content is None or content == expected:
                continue
            if _decisive(path.name, content) != _decisive(path.name, expected or b""):
                found.append(f"{printable(str(path))} (of {folder} and {last})")
                break
    lacking: dict[str, Path] = {}  # name -> the first candidate that has it
    for folder in folders[:-1]:
        for name in _decisive_names(folder):
            if not os.path.lexists(last / name):
                lacking.setdefault(name, folder)
    return found + [f"{printable(name)} (of {lacking[name]}, not of {last})" for name in lacking]


def _decisive_names(folder: Path) -> list[str]:
    """Names of a directory's own files that decide what weights mean."""
    with os.scandir(folder) as entries:
        names = [e.name for e in islice(entries, MAX_ENTRIES) if _matches(e.name, DECISIVE)]
    return sorted(name for name in names if not WEIGHTS.search(name))


def _decisive(name: str, content: bytes) -> object:
    """What of a file decides: a JSON value without some keys, or the bytes."""
    value = _parsed(content)
    return content if value is None else _without(value, NOT_DECISIVE.get(name, set()))


def _without(value: object, keys: set[str]) -> object:
    if isinstance(value, dict):
        return {k: _without(v, keys) for k, v in value.items() if k not in keys}
    return value


def _read(source: Path, path: Path) -> object:
    """The JSON value of a small file; None for none."""
    content = _content(source, path)
    return None if content is None else _parsed(content)


def _content(source: Path, path: Path) -> bytes | None:
    """A small file's bytes; None if there is none that can be read."""
    file = source / path
    try:
        if not is_inside(file, source) or file.stat().st_size > SMALL_BYTES:
            return None
        return file.read_bytes()
    except OSError:
        return None


def _parsed(text: bytes) -> object:
    """A JSON value, also with the Infinity that some configurations hold; None if it is none."""
    try:
        value = json.loads(text.decode("utf-8"))
        check_levels(value)
    except (ValueError, RecursionError):
        return None
    return value
