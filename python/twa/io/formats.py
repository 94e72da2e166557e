"""Checkpoint formats: from a path to named tensors and where they lie.

Nothing of a file is run, and every size, offset and name in it is checked before it is used.
docs/formats.md lists what is read, docs/safety.md what is promised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import dcp
from .checks import is_file_name, read_json
from .errors import CandidateError
from .mapped import Source
from .safetensors import read_safetensors
from .torch_zip import read_torch

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
#: keys under which training scripts put the weights of a larger checkpoint
NESTED_KEYS = ("state_dict", "model_state_dict", "model")
#: what makes a directory one checkpoint, in the order in which from_pretrained looks for it: a
#: directory that was saved into twice may hold others, too, older ones and indexes without shards
MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk.

    Attributes:
        kind: "safetensors", "torch", "huggingface" (a directory or index), "adapter" (PEFT), "dcp"
        tensors: where each tensor lies, by key
        files: all files that it is made of
        metadata: versions of the modules that were saved, as torch.save keeps them
        extra: what modules keep beside their tensors and is no tensor, by key
    """

    kind: str
    tensors: Mapping[str, Source]
    files: tuple[Path, ...]
    metadata: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    extra: Mapping[str, object] = field(default_factory=dict)


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
    return Checkpoint(kind, _one_file(path, entry), (path,))


def is_checkpoint_folder(folder: Path) -> bool:
    """Whether a directory is one checkpoint, rather than a place where several lie."""
    return any((folder / name).is_file() for name in (*MODEL_FILES, *ADAPTER_FILES, dcp.METADATA))


def _directory(folder: Path, entry: str | None) -> Checkpoint:
    for name in MODEL_FILES:
        if (folder / name).is_file():
            found = open_checkpoint(folder / name, entry)
            return Checkpoint("huggingface", found.tensors, found.files)
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return Checkpoint("adapter", _one_file(folder / name, entry), (folder / name,))
    if (folder / dcp.METADATA).is_file():
        leaves, files = dcp.read(folder)
        return Checkpoint("dcp", _weights_of(leaves, folder, entry), files)
    raise CandidateError(
        f"expected a directory with a Hugging Face checkpoint ({', '.join(MODEL_FILES)}),"
        " a PEFT adapter (adapter_model.safetensors) or a torch.distributed.checkpoint"
        f" ({dcp.METADATA}), or with checkpoints in it",
        folder,
    )


def _one_file(path: Path, entry: str | None) -> dict[str, Source]:
    if path.suffix == ".safetensors":
        if entry is not None:
            raise CandidateError(
                f"entry {entry!r}: a safetensors file has no entries to choose from", path
            )
        return dict(read_safetensors(path))
    if path.suffix in SUFFIXES:
        return _weights_of(read_torch(path), path, entry)
    raise CandidateError(
        f"expected a file ending in {', '.join(SUFFIXES)}, or a directory with a sharded"
        " checkpoint's index",
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
    tensors: dict[str, Source] = {}
    paths = []
    for name in sorted(set(weight_map.values())):
        if not is_file_name(name):
            raise CandidateError(
                f"shard {name[:200]!r} is not the name of a file beside the index", index
            )
        path = index.parent / name
        if not path.is_file():
            raise CandidateError(f"no such file, but {index.name} names it", path)
        paths.append(path)
        for key, source in _one_file(path, entry).items():
            if key in tensors:
                raise CandidateError(f"tensor {key!r} is in {name} and in an earlier shard", index)
            tensors[key] = source
    for key, name in weight_map.items():
        if key not in tensors:
            raise CandidateError(f"tensor {key!r} should be in {name}, but no shard has it", index)
    return Checkpoint("huggingface", tensors, (index, *paths))


# Which of a checkpoint's entries are the weights -------------------------------------------------


def _tensors_in(content: object) -> dict[str, Source]:
    """What of a dict is no dict itself; nothing of anything else."""
    if not isinstance(content, dict):
        return {}
    return {k: v for k, v in content.items() if not isinstance(v, dict)}


def _weights_of(content: object, path: Path, entry: str | None) -> dict[str, Source]:
    """The tensors of a checkpoint.

    It is a state_dict, or a dict that holds one under the given key or else a usual one.
    """
    if entry is not None:
        inner: object = content
        for part in entry.split("."):
            inner = inner.get(part) if isinstance(inner, dict) else None
        if not (tensors := _tensors_in(inner)):
            raise CandidateError(
                f"expected weights under {entry!r}; there are some under:"
                f" {', '.join(entries(content)) or 'none'}",
                path,
            )
        return tensors
    if isinstance(content, dict):
        for key in NESTED_KEYS:
            if tensors := _tensors_in(content.get(key)):
                return tensors
    if tensors := _tensors_in(content):
        return tensors
    hint = ""
    if found := entries(content):
        hint = f"; there are some under: {', '.join(found)}: name one as entry"
    raise CandidateError(f"expected a dict of tensors (a state_dict), found none{hint}", path)


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
