"""Checkpoint formats: from a path to named tensors and where they lie.

Nothing of a file is run, and every size, offset and name in it is checked before it is used.
docs/formats.md lists what is read, docs/safety.md what is promised."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from . import dcp
from .atomic import SAFETENSORS_DTYPES
from .mapped import (
    MAX_ELEMENTS,
    MAX_NAME,
    CandidateError,
    MappedFile,
    Source,
    Stored,
    TensorInfo,
    are_sizes,
    first_line,
    is_file_name,
    shown,
)
from .torch_zip import read_torch

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
#: keys under which training scripts put the weights of a larger checkpoint
NESTED_KEYS = ("state_dict", "model_state_dict", "model")
# bytes of a safetensors header or a JSON index: names of some 100,000 tensors
MAX_HEADER = 32 << 20
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
    """kind:

    "safetensors", "torch", "huggingface" (a directory or index), "adapter" (PEFT), "dcp".
    """

    kind: str
    tensors: Mapping[str, Source]
    files: tuple[Path, ...]


def open_checkpoint(path: Path, entry: str | None = None) -> Checkpoint:
    """entry: the key under which a torch or DCP checkpoint holds the weights, with dots between
    levels; None: a usual one, or the whole.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) and not path.exists():
        raise CandidateError(
            f"{path}: expected a path of this machine; remote locations are not read: copy or mount"
            " them first"
        )
    if path.is_dir():
        return _directory(path, entry)
    if not path.exists():
        raise CandidateError(f"{path}: no such file")
    if not path.is_file():
        raise CandidateError(f"{path}: expected a regular file")
    if path.name.endswith(".index.json"):
        return _indexed(path, entry)
    return Checkpoint(
        "safetensors" if path.suffix == ".safetensors" else "torch", _one_file(path, entry), (path,)
    )


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
        f"{folder}: expected a directory with a Hugging Face checkpoint ({', '.join(MODEL_FILES)}),"
        " a PEFT adapter (adapter_model.safetensors) or a torch.distributed.checkpoint"
        f" ({dcp.METADATA}), or with checkpoints in it"
    )


def _one_file(path: Path, entry: str | None) -> dict[str, Source]:
    if path.suffix == ".safetensors":
        if entry is not None:
            raise CandidateError(
                f"{path}: entry {entry!r}: a safetensors file has no entries to choose from"
            )
        return dict(read_safetensors(path))
    if path.suffix in SUFFIXES:
        return _weights_of(read_torch(path), path, entry)
    raise CandidateError(
        f"{path}: expected a file ending in {', '.join(SUFFIXES)}, or a directory with a sharded"
        " checkpoint's index"
    )


# Hugging Face shards -----------------------------------------------------------------------------


def read_json(path: Path, expected: str = "expected JSON", limit: int = MAX_HEADER) -> object:
    """A JSON file of at most `limit` bytes."""
    if not path.is_file():
        raise CandidateError(f"{path}: {expected}, in a regular file")
    if path.stat().st_size > limit:
        raise CandidateError(
            f"{path}: {expected}, of at most {limit} bytes, found {path.stat().st_size}"
        )
    try:
        return parse_json(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise CandidateError(
            f"{path}: {expected} ({type(error).__name__}: {first_line(error)})"
        ) from error


def _indexed(index: Path, entry: str | None) -> Checkpoint:
    expected = "expected JSON with a 'weight_map' from tensor names to shard files"
    content = read_json(index, expected)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CandidateError(f"{index}: {expected}")
    tensors: dict[str, Source] = {}
    paths = []
    for name in sorted(set(weight_map.values())):
        if not is_file_name(name):
            raise CandidateError(
                f"{index}: shard {name[:200]!r} is not the name of a file beside the index"
            )
        path = index.parent / name
        if not path.is_file():
            raise CandidateError(f"{path}: no such file, but {index.name} names it")
        paths.append(path)
        for key, source in _one_file(path, entry).items():
            if key in tensors:
                raise CandidateError(
                    f"{index}: tensor {key!r} is in {name} and in an earlier shard"
                )
            tensors[key] = source
    for key, name in weight_map.items():
        if key not in tensors:
            raise CandidateError(
                f"{index}: tensor {key!r} should be in {name}, but no shard has it"
            )
    return Checkpoint("huggingface", tensors, (index, *paths))


# safetensors -------------------------------------------------------------------------------------


def parse_json(text: bytes) -> object:
    """JSON as Python values; ValueError also for a name that occurs twice, for NaN and -0, and for
    text that is no UTF-8.
    """

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(items)
        if len(found) != len(items):
            twice = next(
                key for key, count in Counter(key for key, _ in items).items() if count > 1
            )
            raise ValueError(f"{twice!r} occurs twice")
        for key, value in found.items():
            (key + value if isinstance(value, str) else key).encode()  # lone surrogates
            if len(key) > MAX_NAME:
                raise ValueError(f"a name of {len(key)} characters")
        return found

    def refuse(text: str) -> None:
        raise ValueError(f"found {text}")

    def whole(text: str) -> int:
        if text == "-0":  # as the library does
            refuse(text)
        return int(text)

    return json.loads(
        text.decode("utf-8"), object_pairs_hook=pairs, parse_constant=refuse, parse_int=whole
    )


def read_header(path: Path) -> tuple[dict[str, object], int]:
    """The JSON header of a safetensors file and where its data begin."""
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        length = int.from_bytes(f.read(8), "little") if size >= 8 else 0
        if size < 8 or length > size - 8:
            raise CandidateError(
                f"{path}: not a complete safetensors file (header of {length} bytes in a file of"
                f" {size})"
            )
        if length > MAX_HEADER:
            raise CandidateError(
                f"{path}: expected a header of at most {MAX_HEADER} bytes, found {length}"
            )
        text = f.read(length)
    try:
        header = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise CandidateError(
            f"{path}: not a safetensors file: its header is no valid JSON ({first_line(error)})"
        ) from error
    if not text.startswith(b"{") or not isinstance(header, dict):
        raise CandidateError(
            f"{path}: not a safetensors file: expected a JSON object as header, found"
            f" {type(header).__name__}"
        )
    return header, 8 + length


def read_safetensors(
    path: Path, dtypes: Mapping[str, torch.dtype] = SAFETENSORS_DTYPES
) -> dict[str, Stored]:
    """Format: https://github.com/huggingface/safetensors: 8 bytes of header length, a JSON header,
    then the tensors without gaps or overlap.
    """
    header, data = read_header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CandidateError(f"{path}: __metadata__: expected names and texts")
    file = MappedFile(path)
    tensors, spans = {}, []
    for key, value in header.items():
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise CandidateError(f"{path}: tensor {key!r}: expected dtype, shape and data_offsets")
        name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        dtype = dtypes.get(name) if isinstance(name, str) else None
        if dtype is None:
            raise CandidateError(
                f"{path}: tensor {key!r} has dtype {shown(name)}, expected one of {sorted(dtypes)}"
            )
        if (
            not are_sizes(shape)
            or not are_sizes(offsets)
            or len(offsets) != 2
            or math.prod(max(1, s) for s in shape) > MAX_ELEMENTS
        ):
            raise CandidateError(
                f"{path}: tensor {key!r}: expected sizes as shape and two offsets, found"
                f" {shown(shape)} and {shown(offsets)}"
            )
        begin, end = offsets
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise CandidateError(
                f"{path}: tensor {key!r}: {name} {shape} does not fill the bytes {begin} to {end}"
            )
        spans.append((begin, end, key))
        tensors[key] = Stored(file, TensorInfo(tuple(shape), dtype), data + begin)
    at = 0
    for begin, end, key in sorted(spans):
        if begin != at:
            raise CandidateError(
                f"{path}: tensor {key!r}: expected data from byte {at} on, found {begin}: gap or"
                " overlap"
            )
        at = end
    if data + at != file.size:
        raise CandidateError(
            f"{path}: not a complete safetensors file: expected {data + at} bytes, found"
            f" {file.size}"
        )
    return tensors


# Which of a checkpoint's entries are the weights -------------------------------------------------


def _tensors_in(content: object) -> dict[str, Source]:
    return (
        {k: v for k, v in content.items() if not isinstance(v, dict)}
        if isinstance(content, dict)
        else {}
    )


def _weights_of(content: object, path: Path, entry: str | None) -> dict[str, Source]:
    """The tensors of a checkpoint: a state_dict, or a dict that holds one under a usual key or the
    given one.
    """
    if entry is not None:
        inner = content
        for part in entry.split("."):
            inner = inner.get(part) if isinstance(inner, dict) else None
        if not (tensors := _tensors_in(inner)):
            raise CandidateError(
                f"{path}: expected weights under {entry!r}; there are some under:"
                f" {', '.join(entries(content)) or 'none'}"
            )
        return tensors
    if isinstance(content, dict):
        for key in NESTED_KEYS:
            if tensors := _tensors_in(content.get(key)):
                return tensors
    if tensors := _tensors_in(content):
        return tensors
    hint = (
        f"; there are some under: {', '.join(found)}: name one as entry"
        if (found := entries(content))
        else ""
    )
    raise CandidateError(f"{path}: expected a dict of tensors (a state_dict), found none{hint}")


def entries(content: object) -> list[str]:
    """Names of the nested dicts that hold tensors, with dots between levels, for messages: the
    first 20, and each dict once.
    """
    found, seen = [], set()

    def visit(inside: dict, prefix: str) -> None:
        for key, value in inside.items():
            if isinstance(value, dict) and id(value) not in seen and len(found) < 20:
                seen.add(id(value))
                found.extend([prefix + key] * bool(_tensors_in(value)))
                visit(value, f"{prefix}{key}.")

    visit(content if isinstance(content, dict) else {}, "")
    return [name if name.isprintable() else repr(name) for name in found]
