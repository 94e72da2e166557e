"""Checkpoint formats: from a path to named tensors and where they lie.

Nothing of a file is run, and every size, offset and name in it is checked before it is used.
docs/formats.md lists what is read, docs/safety.md what is promised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import dcp
from .checks import is_file_name, read_json
from .errors import CandidateError
from .foreign import foreign
from .mapped import Source
from .safetensors import read_safetensors
from .torch_zip import Entries, read_torch

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
#: keys under which training scripts put the weights of a larger checkpoint
NESTED_KEYS = ("state_dict", "model_state_dict", "model")
#: what makes a directory one checkpoint, in order
MODEL_FILES = (
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "pytorch_model.bin",
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk.

    Attributes:
        kind: "safetensors", "torch", "huggingface" (a directory or index), "adapter" (PEFT), "dcp"
        tensors: where each tensor lies, by key
        files: all files that it is made of
        metadata: of a saved state_dict: name of each module -> what it stores beside its tensors,
            such as a version; {} if there is none
        extra: key -> what modules store that is no tensor (`_extra_state`): plain values with
            tensors in memory; an `unpickle.Made` for a value that holds an object of another class
        others: names that stood among the weights with plain values, which are left out
    """

    kind: str
    tensors: Mapping[str, Source]
    files: tuple[Path, ...]
    metadata: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    extra: Mapping[str, object] = field(default_factory=dict)
    others: tuple[str, ...] = ()


class Weights(dict[str, Source]):
    """The tensors of a checkpoint, and what was beside them: see `Checkpoint`."""

    def __init__(self, tensors: Mapping[str, Source], of: object = None) -> None:
        super().__init__(tensors)
        self.metadata = of.metadata if isinstance(of, Entries) else {}
        self.extra = of.extra if isinstance(of, Entries) else {}
        self.others = tuple(of.others) if isinstance(of, Entries) else ()

    def checkpoint(self, kind: str, files: tuple[Path, ...]) -> Checkpoint:
        """The checkpoint of this kind that they are of."""
        return Checkpoint(kind, self, files, self.metadata, self.extra, self.others)


def open_checkpoint(path: Path, entry: str | None = None) -> Checkpoint:
    """The checkpoint at a path: a file, or a directory that is one.

    Args:
        path: file or directory
        entry: the key under which a torch or DCP checkpoint holds the weights, with dots between
            levels; None: a usual one, or the whole

    Raises:
        CandidateError: there is none, it is damaged, or what is in it is not supported
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) and not path.exists():
        raise CandidateError(
            "expected a path of this machine; remote locations are not read: copy or mount"
            " them first",
            path,
        )
    if path.is_dir():
        return _directory(path, entry)
    if not path.exists():
        raise CandidateError("no such file", path)
    if not path.is_file():
        raise CandidateError("expected a regular file", path)
    if path.name.endswith(".index.json"):
        return _indexed(path, entry)
    kind = "safetensors" if path.suffix == ".safetensors" else "torch"
    return _one_file(path, entry).checkpoint(kind, (path,))


def is_checkpoint_folder(folder: Path) -> bool:
    """Whether a directory is one checkpoint, rather than a place where several lie."""
    return any((folder / name).is_file() for name in (*MODEL_FILES, *ADAPTER_FILES, dcp.METADATA))


def _directory(folder: Path, entry: str | None) -> Checkpoint:
    for name in MODEL_FILES:
        if (folder / name).is_file():
            found = open_checkpoint(folder / name, entry)
            return replace(found, kind="huggingface")
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return _one_file(folder / name, entry).checkpoint("adapter", (folder / name,))
    if (folder / dcp.METADATA).is_file():
        leaves, files = dcp.read(folder)
        return _weights_of(leaves, folder, entry).checkpoint("dcp", files)
    raise CandidateError(
        f"expected a directory with a Hugging Face checkpoint ({', '.join(MODEL_FILES)}),"
        " a PEFT adapter (adapter_model.safetensors) or a torch.distributed.checkpoint"
        f" ({dcp.METADATA}), or with checkpoints in it",
        folder,
    )


def _one_file(path: Path, entry: str | None) -> Weights:
    if path.suffix == ".safetensors":
        if entry is not None:
            raise CandidateError(
                f"entry {entry!r}: a safetensors file has no entries to choose from", path
            )
        return Weights(read_safetensors(path))
    if path.suffix in SUFFIXES:
        return _weights_of(read_torch(path), path, entry)
    what = f"; {found}" if (found := foreign(path)) else ""
    raise CandidateError(
        f"expected a file ending in {', '.join(SUFFIXES)}, or a directory with a sharded"
        f" checkpoint's index{what}",
        path,
    )


# Hugging Face shards -----------------------------------------------------------------------------


def _indexed(index: Path, entry: str | None) -> Checkpoint:
    expected = "expected JSON with a 'weight_map' from tensor names to shard files"
    content = read_json(index, expected)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CandidateError(expected, index)
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise CandidateError(expected, index)
    tensors, paths = Weights({}), []
    for name in sorted(set(weight_map.values())):
        if not is_file_name(name):
            raise CandidateError(
                f"shard {name[:200]!r} is not the name of a file beside the index", index
            )
        path = index.parent / name
        if not path.is_file():
            raise CandidateError(f"no such file, but {index.name} names it", path)
        paths.append(path)
        found = _one_file(path, entry)
        for key, source in found.items():
            if key in tensors:
                raise CandidateError(f"tensor {key!r} is in {name} and in an earlier shard", index)
            tensors[key] = source
        tensors.metadata |= found.metadata
        tensors.extra |= found.extra
        tensors.others += found.others
    for key, name in weight_map.items():
        if key not in tensors:
            raise CandidateError(f"tensor {key!r} should be in {name}, but no shard has it", index)
    return tensors.checkpoint("huggingface", (index, *paths))


# Which of a checkpoint's entries are the weights -------------------------------------------------


def _tensors_in(content: object) -> dict[str, Source]:
    """What of a dict is no dict itself; nothing of anything else."""
    if not isinstance(content, dict):
        return {}
    return {k: v for k, v in content.items() if not isinstance(v, dict)}


def _weights_of(content: object, path: Path, entry: str | None) -> Weights:
    """The tensors of a checkpoint.

    It is a state_dict, or a dict that holds one under the given key or else a usual one.
    """
    if entry is not None:
        inner: object = content
        for part in entry.split("."):
            _check_object(inner, part, path)
            inner = inner.get(part) if isinstance(inner, dict) else None
        if tensors := _weights_in(inner, path):
            return tensors
        raise CandidateError(
            f"expected weights under {entry!r}; there are some under:"
            f" {', '.join(entries(content)) or 'none'}",
            path,
        )
    hint = ""
    if found := entries(content):
        hint = f"; there are some under: {', '.join(found)}: name one as entry"
    if isinstance(content, dict):
        for key in NESTED_KEYS:
            _check_object(content, key, path, hint)
            inside = content.get(key)
            if tensors := _weights_in(inside, path, "" if _tensors_in(inside) else hint):
                return tensors
    if tensors := _weights_in(content, path, hint):
        return tensors
    raise CandidateError(f"expected a dict of tensors (a state_dict), found none{hint}", path)


def _weights_in(content: object, path: Path, hint: str = "") -> Weights | None:
    """The tensors of a dict; None if there are none.

    CandidateError if something stands among them, or in their place, that is not understood.
    """
    for key in content.odd if isinstance(content, Entries) else ():
        _check_object(content, key, path, hint)
    tensors = _tensors_in(content)
    return Weights(tensors, content) if tensors else None


def _check_object(content: object, key: str, path: Path, hint: str = "") -> None:
    """CandidateError if what stands under a key is not understood."""
    if isinstance(content, Entries) and (found := content.odd.get(key)):
        raise found.error(path, key, hint)


def entries(content: object) -> list[str]:
    """Names of the nested dicts that hold tensors, for messages, with dots between levels.

    They are the first 20, each dict once.
    """
    found: list[str] = []
    seen: set[int] = set()

    def visit(inside: dict[str, object], prefix: str) -> None:
        for key, value in inside.items():
            if isinstance(value, dict) and id(value) not in seen and len(found) < 20:
                seen.add(id(value))
                found.extend([prefix + key] * bool(_tensors_in(value)))
                visit(value, f"{prefix}{key}.")

    visit(content if isinstance(content, dict) else {}, "")
    return [name if name.isprintable() else repr(name) for name in found]
