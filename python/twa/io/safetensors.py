"""safetensors files, read and written.

8 bytes of header length, a JSON header, then the tensors without gaps or overlap
(https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .atomic import replace
from .checks import MAX_HEADER, are_sizes, first_line, is_shape, parse_json, shown
from .errors import CandidateError
from .foreign import foreign
from .mapped import MappedFile, Stored, TensorInfo

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
#: float8 is written for scales of a packed basis; as weights it is not read
DTYPES = SAFETENSORS_DTYPES | {"F8_E4M3": torch.float8_e4m3fn}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def header(
    info: Mapping[str, TensorInfo], metadata: Mapping[str, str], alignment: int = 8
) -> tuple[bytes, dict[str, int], int]:
    """The first bytes of a file of these tensors, in this order.

    Args:
        info: shape and dtype of each tensor
        metadata: what to put beside {"format": "pt"}
        alignment: number of bytes of which the tensors begin at a multiple

    Returns:
        the bytes; where each tensor begins behind them; the bytes of all tensors
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offsets: dict[str, int] = {}
    end = 0
    for key, i in info.items():
        offsets[key], end = end, end + i.nbytes
        name, span = DTYPE_NAMES[i.dtype], [offsets[key], end]
        entries[key] = {"dtype": name, "shape": list(i.shape), "data_offsets": span}
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text, offsets, end


def write_stream(
    path: Path | None, info: Mapping[str, TensorInfo], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Writes a file from tensors that come one at a time.

    The tensors are read to the end even if writing fails, since other ranks may take part in making
    them.

    Args:
        path: the file; None: the tensors are only read
        info: shape and dtype of each tensor
        tensors: (key, tensor) for each of them, on the CPU
    """
    stream = iter(tensors)
    try:
        if path is not None:
            replace(path, lambda p: write_blocks(p, info, stream))
    finally:
        for _ in stream:
            pass


def write_blocks(
    path: Path, info: Mapping[str, TensorInfo], blocks: Iterable[tuple[str, Tensor]]
) -> None:
    """Writes a file where it stands, from tensors or blocks of their columns.

    Args:
        path: the file
        info: shape and dtype of each tensor
        blocks: (key, the tensor or its next columns), on the CPU
    """
    # The widest first, so that all are aligned.
    ordered = dict(sorted(info.items(), key=lambda item: -item[1].dtype.itemsize))
    first, offsets, size = header(ordered, {})
    with open(path, "wb") as f:
        f.write(first)
        for key, t in blocks:
            f.seek(len(first) + offsets[key])
            offsets[key] += f.write(raw_bytes(t))
        f.truncate(len(first) + size)


def raw_bytes(t: Tensor) -> memoryview:
    """The bytes of a CPU tensor in order; its own memory if it is contiguous."""
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a file of these tensors, which are on the CPU.

    Raises:
        OSError: it cannot be written
    """
    info = {key: TensorInfo(tuple(t.shape), t.dtype) for key, t in tensors.items()}
    write_stream(path, info, tensors.items())


def read_header(path: Path) -> tuple[dict[str, object], int]:
    """The JSON header of a safetensors file, and the byte at which its data begin."""
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        length = int.from_bytes(f.read(8), "little") if size >= 8 else 0
        if size < 8 or length > size - 8:
            if what := foreign(path):
                raise CandidateError(f"not a safetensors file: {what}", path)
            raise CandidateError(
                f"not a complete safetensors file (header of {length} bytes in a file of {size})",
                path,
            )
        if length > MAX_HEADER:
            raise CandidateError(
                f"expected a header of at most {MAX_HEADER} bytes, found {length}", path
            )
        text = f.read(length)
    try:
        header = parse_json(text)
    except (ValueError, RecursionError) as error:
        if what := foreign(path):
            raise CandidateError(f"not a safetensors file: {what}", path) from error
        raise CandidateError(
            f"not a safetensors file: its header is no valid JSON ({first_line(error)})", path
        ) from error
    if not text.startswith(b"{") or not isinstance(header, dict):
        raise CandidateError(
            f"not a safetensors file: expected a JSON object as header, found"
            f" {type(header).__name__}",
            path,
        )
    return header, 8 + length


def read_safetensors(
    path: Path, dtypes: Mapping[str, torch.dtype] = SAFETENSORS_DTYPES
) -> dict[str, Stored]:
    """Where the tensors of a safetensors file lie, by key.

    Args:
        path: the file
        dtypes: dtype for each name of one that is read

    Raises:
        CandidateError: the file is damaged, or holds another dtype
    """
    header, data = read_header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CandidateError("__metadata__: expected names and texts", path)
    file = MappedFile(path)
    tensors: dict[str, Stored] = {}
    spans: list[tuple[int, int, str]] = []
    for key, value in header.items():
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise CandidateError(f"tensor {key!r}: expected dtype, shape and data_offsets", path)
        name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        dtype = dtypes.get(name) if isinstance(name, str) else None
        if dtype is None:
            raise CandidateError(
                f"tensor {key!r} has dtype {shown(name)}, expected one of {sorted(dtypes)}", path
            )
        if not is_shape(shape) or not are_sizes(offsets) or len(offsets) != 2:
            raise CandidateError(
                f"tensor {key!r}: expected sizes as shape and two offsets, found"
                f" {shown(shape)} and {shown(offsets)}",
                path,
            )
        begin, end = offsets
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise CandidateError(
                f"tensor {key!r}: {name} {shape} does not fill the bytes {begin} to {end}", path
            )
        spans.append((begin, end, key))
        tensors[key] = Stored(file, TensorInfo(tuple(shape), dtype), data + begin)
    at = 0
    for begin, end, key in sorted(spans):
        if begin != at:
            raise CandidateError(
                f"tensor {key!r}: expected data from byte {at} on, found {begin}: gap or overlap",
                path,
            )
        at = end
    if data + at != file.size:
        raise CandidateError(
            f"not a complete safetensors file: expected {data + at} bytes, found {file.size}", path
        )
    return tensors
