"""Candidates: checkpoints of one architecture, read tensor by tensor.

Files are mapped into memory, not loaded: a tensor's bytes are touched when it is asked for, and all mappings are dropped after
every `RELEASE_BYTES` read, so resident memory does not grow with the number or the size of the files.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import SAFETENSORS_DTYPES

RELEASE_BYTES = 32 << 20
SAMPLES, SAMPLE_BYTES = 16, 4096  # of a file, for its fingerprint
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
#: keys under which training scripts put the weights of a larger checkpoint
NESTED_KEYS = ("state_dict", "model_state_dict", "model")
#: prefixes that wrappers (DataParallel, torch.compile) put before every key
WRAPPER_PREFIXES = ("module.", "_orig_mod.")

#: one slice per dimension of a tensor
Part = tuple[slice, ...]


class CandidateError(ValueError):
    """Something is wrong with the candidates; the message names file, tensor, what was expected and what was found."""


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class _File:
    """One file of tensors. `read` maps the file; `release` drops the mapping (tensors still held keep theirs alive)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open = None
        self.info = self._scan()
        self.release()

    def release(self) -> None:
        self._open = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": None}  # a copy maps the file again

    def _scan(self) -> dict[str, TensorInfo]:
        raise NotImplementedError

    def read(self, key: str) -> Tensor:
        raise NotImplementedError


class _SafetensorsFile(_File):
    def _handle(self):
        if self._open is None:
            try:
                self._open = safe_open(self.path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CandidateError(f"{self.path}: not a complete safetensors file ({error})") from error
        return self._open

    def _scan(self) -> dict[str, TensorInfo]:
        handle, info = self._handle(), {}
        for key in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
            piece = handle.get_slice(key)
            dtype = SAFETENSORS_DTYPES.get(piece.get_dtype())
            if dtype is None:
                raise CandidateError(f"{self.path}: tensor {key!r} has dtype {piece.get_dtype()}, expected one of {sorted(SAFETENSORS_DTYPES)}")
            info[key] = TensorInfo(tuple(piece.get_shape()), dtype)
        return info

    def read(self, key: str) -> Tensor:
        return self._handle().get_tensor(key)


class _TorchFile(_File):
    def _load(self) -> dict[str, Tensor]:
        if self._open is None:
            try:
                # Files older than torch 1.6 are no zip archives and cannot be mapped: they are loaded whole.
                loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(self.path))
            except pickle.UnpicklingError as error:
                if "Unsupported" in str(error) or "GLOBAL" in str(error) or "weights_only" in str(error):
                    raise CandidateError(
                        f"{self.path}: refused: loading it would run code from the file; save the state_dict alone, "
                        f"for example as safetensors ({_first_line(error)})"
                    ) from error
                raise CandidateError(f"{self.path}: not a torch checkpoint ({_first_line(error)})") from error
            except (RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError, TypeError, IndexError) as error:
                raise CandidateError(f"{self.path}: not a complete torch checkpoint ({type(error).__name__}: {_first_line(error)})") from error
            self._open = _unwrap(loaded, self.path)
        return self._open

    def _scan(self) -> dict[str, TensorInfo]:
        return {key: TensorInfo(tuple(t.shape), t.dtype) for key, t in self._load().items()}

    def read(self, key: str) -> Tensor:
        return self._load()[key]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _unwrap(loaded: object, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: a state_dict, or a dict that holds one under a usual key."""
    if isinstance(loaded, dict):
        for key in NESTED_KEYS:
            inner = loaded.get(key)
            if isinstance(inner, dict) and any(isinstance(v, Tensor) for v in inner.values()):
                loaded = inner
                break
        tensors = {k: v for k, v in loaded.items() if isinstance(k, str) and isinstance(v, Tensor)}
        if tensors:
            return tensors
    raise CandidateError(f"{path}: expected a dict of tensors (a state_dict), found {type(loaded).__name__} without tensors")


def _open_file(path: Path) -> _File:
    if not path.exists():
        raise CandidateError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _SafetensorsFile(path)
    if path.suffix in SUFFIXES:
        return _TorchFile(path)
    raise CandidateError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}, or a directory with a sharded checkpoint's index")


class Candidate:
    """One checkpoint: a file, or a directory or index of shards as Hugging Face writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            path = _index_in(path)
        files = _shards(path) if path.name.endswith(".index.json") else [_open_file(path)]
        where: dict[str, tuple[_File, str]] = {}
        for file in files:
            for key in file.info:
                if key in where:
                    raise CandidateError(f"{self.path}: tensor {key!r} is in both {where[key][0].path.name} and {file.path.name}")
                where[key] = (file, key)
        if not where:
            raise CandidateError(f"{self.path}: expected a checkpoint, found no tensors")
        while prefix := next((p for p in WRAPPER_PREFIXES if all(key.startswith(p) for key in where)), None):
            where = {key.removeprefix(prefix): v for key, v in where.items()}
        self._where = where
        self.info = {key: file.info[inner] for key, (file, inner) in where.items()}
        for key, info in self.info.items():
            if info.dtype.is_floating_point and info.dtype.itemsize == 1:
                raise CandidateError(
                    f"{self.path}: tensor {key!r} is {info.dtype}: expected weights of at least 16 bits; convert the checkpoint first"
                )

    @property
    def name(self) -> str:
        return self.path.stem if self.path.is_file() else self.path.name

    def tensor(self, key: str) -> Tensor:
        """The tensor, mapped from the file where the format allows."""
        file, inner = self._where[key]
        return file.read(inner)

    def fingerprint(self) -> str:
        """Digest of the files' sizes and of `SAMPLES` blocks spread over each."""
        digest = hashlib.sha256()
        for file in dict.fromkeys(f for f, _ in self._where.values()):
            with open(file.path, "rb") as f:
                size = os.fstat(f.fileno()).st_size
                digest.update(size.to_bytes(8, "little"))
                for k in range(SAMPLES):
                    f.seek(max(0, size - SAMPLE_BYTES) * k // (SAMPLES - 1))
                    digest.update(f.read(SAMPLE_BYTES))
        return digest.hexdigest()[:16]

    def release(self) -> None:
        """Drops the mappings of the candidate's files; tensors still held keep theirs alive."""
        for file in {id(f): f for f, _ in self._where.values()}.values():
            file.release()


def _index_in(folder: Path) -> Path:
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json", "model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return folder / name
    raise CandidateError(
        f"{folder}: expected a directory with model.safetensors.index.json, pytorch_model.bin.index.json, model.safetensors or "
        "pytorch_model.bin; to average the files in a directory, pass them, for example as 'DIR/*.safetensors'"
    )


def _shards(index: Path) -> list[_File]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CandidateError(f"{index}: expected JSON with a 'weight_map' from tensor names to shard files ({type(error).__name__})") from error
    files = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise CandidateError(f"{index}: shard {name!r} is not the name of a file beside the index")
        files.append(_open_file(index.parent / name))
    present = {key for file in files for key in file.info}
    for key, name in weight_map.items():
        if key not in present:
            raise CandidateError(f"{index}: tensor {key!r} should be in {name}, but no shard has it")
    return files


def numeric_order(path: Path | str) -> list[tuple[int, int, str]]:
    """Sort key that orders step_9 before step_10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", str(path)) if part]


class Candidates(Sequence[Candidate]):
    """The heap: checkpoints with the same tensors, in numeric order of their names within each pattern. A list of files in alphabetic
    order, as a shell gives it, is put in numeric order too; any other list keeps its order.

    paths   files (.safetensors, .pt, .pth, .bin), glob patterns, directories with a Hugging Face checkpoint (sharded or not), or a
            list of those. Order matters to EMA and LAWA: earlier candidates first.

    Raises CandidateError if there are none, one cannot be read, or their keys, shapes or kinds of dtype differ.
    """

    def __init__(self, paths: str | os.PathLike | Iterable[str | os.PathLike]) -> None:
        patterns = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        found: list[Path] = []
        for pattern in patterns:
            text = os.fspath(pattern)
            matches = [text] if os.path.exists(text) or not glob.has_magic(text) else sorted(glob.glob(text, recursive=True), key=numeric_order)
            if not matches:
                raise CandidateError(f"no candidates: nothing matches {text!r}")
            found += [Path(m) for m in matches]
        if not found:
            raise CandidateError("no candidates: expected at least one checkpoint, found none")
        if found == sorted(found, key=str):  # as a shell lists what a pattern matches: step_10 before step_9
            found.sort(key=numeric_order)
        self._candidates = [Candidate(path) for path in found]
        for candidate in self._candidates[1:]:
            check_same(self._candidates[0], candidate)
        self._touched = 0  # bytes read since the mappings were last dropped
        self.bytes_read = 0  # of all tensors handed out
        self._fingerprints: dict[str, str] | None = None

    def __len__(self) -> int:
        return len(self._candidates)

    def __getitem__(self, index):
        return self._candidates[index]

    @property
    def names(self) -> list[str]:
        """File names without suffix; with their directory where that is not unique."""
        stems = [c.name for c in self]
        return [c.name if stems.count(c.name) == 1 else str(c.path) for c in self]

    @property
    def info(self) -> dict[str, TensorInfo]:
        """Keys, shapes and dtypes of the first candidate."""
        return self[0].info

    def tensors(self, key: str, share: float = 1.0, rows: slice = slice(None), part: Part | None = None) -> list[Tensor]:
        """This tensor of every candidate (or of those in `rows`), mapped from its file; `share` of it is going to be read. part: only these slices of
        it, one per dimension; the bytes around them are not touched."""
        chosen = self._candidates[rows]
        info = self.info[key]
        if part is not None:
            share = math.prod(len(range(*s.indices(size))) for s, size in zip(part, info.shape, strict=True)) / max(1, math.prod(info.shape))
        read = int(share * sum(c.info[key].nbytes for c in chosen))
        self.bytes_read += read
        self._touched += read
        if self._touched > RELEASE_BYTES:
            for c in self:
                c.release()
            self._touched = read
        return [c.tensor(key) if part is None else c.tensor(key)[part] for c in chosen]

    def fingerprints(self) -> dict[str, str]:
        """For each place in the order, the candidate's name and a digest of its files' sizes and samples of their content."""
        if self._fingerprints is None:
            self._fingerprints = {f"candidate {k}": f"{c.name} ({c.fingerprint()})" for k, c in enumerate(self)}
        return self._fingerprints

    def blocks(self, keys: Iterable[str] | None = None, columns: int = 1 << 18) -> Blocks:
        """The candidates' float tensors (or those named) as a stream of blocks of columns: n flat tensors of at most `columns` elements each.
        It can be read again and again, as `twa_kernels.orthonormalize` wants; memory does not grow with the files."""
        names = [key for key, info in self.info.items() if info.dtype.is_floating_point] if keys is None else list(keys)
        if unknown := [name for name in names if name not in self.info]:
            raise CandidateError(f"{self[0].path}: expected a tensor {unknown[0]!r}, found none of that name")
        if columns < 1:
            raise ValueError(f"columns: expected at least 1, found {columns}")
        return Blocks(self, names, columns)

    def average(self, key: str, weights: Tensor, part: Part | None = None) -> Tensor:
        """sum_i weights[i] * w_i for one tensor (or these slices of it), summed in float64 over column chunks, returned as float32 (float64 for
        float64)."""
        rows = self.tensors(key, part=part)
        return average_into(torch.empty(rows[0].shape, dtype=torch.promote_types(self.info[key].dtype, torch.float32)), rows, weights)


@dataclass(frozen=True)
class Blocks:
    """Blocks of columns of all candidates; see `Candidates.blocks`. float64 is read as float32."""

    candidates: Candidates
    keys: list[str]
    columns: int

    def __iter__(self) -> Iterator[list[Tensor]]:
        for key in self.keys:
            total = torch.Size(self.candidates.info[key].shape).numel()
            for begin in range(0, total, self.columns):
                at = slice(begin, begin + self.columns)
                rows = [row.reshape(-1)[at] for row in self.candidates.tensors(key, share=min(1.0, self.columns / total))]
                yield [row.float() if row.dtype == torch.float64 else row for row in rows]


CHUNK = 1 << 20  # columns of a float64 accumulator: 8 MB


def average_into(out: Tensor, rows: Sequence[Tensor], weights: Tensor) -> Tensor:
    """out = sum_i weights[i] * rows[i], accumulated in float64 chunk by chunk; rows of weight 0 are not read."""
    flat_out = out.view(-1)
    flat = [(w, r.reshape(-1)) for w, r in zip(weights.tolist(), rows, strict=True) if w != 0.0]
    for start in range(0, flat_out.numel(), CHUNK):
        at = slice(start, start + CHUNK)
        total = torch.zeros_like(flat_out[at], dtype=torch.float64)
        for w, r in flat:
            total.add_(r[at].double() if r.dtype != torch.float64 else r[at], alpha=w)
        flat_out[at] = total
    return out


def check_same(first: Candidate, other: Candidate) -> None:
    """Same keys, shapes and kinds of dtype (float, integer, bool), else CandidateError."""
    if missing := sorted(first.info.keys() - other.info.keys()):
        raise CandidateError(f"{other.path}: tensor {missing[0]!r} is missing ({len(missing)} in all) but is in {first.path}")
    if unexpected := sorted(other.info.keys() - first.info.keys()):
        raise CandidateError(f"{other.path}: tensor {unexpected[0]!r} is unexpected ({len(unexpected)} in all): {first.path} does not have it")
    for key, expected in first.info.items():
        check_info(other.path, key, expected, other.info[key], f"in {first.path}")


def check_info(path: Path, key: str, expected: TensorInfo, found: TensorInfo, where: str) -> None:
    if expected.shape != found.shape:
        hint = ""
        if len(expected.shape) == len(found.shape) >= 1 and expected.shape[1:] == found.shape[1:] and re.search(r"emb|wte|vocab|lm_head|tok", key):
            hint = f"; this looks like a vocabulary mismatch ({expected.shape[0]} and {found.shape[0]} tokens): candidates must share one tokenizer"
        raise CandidateError(f"{path}: tensor {key!r}: expected shape {list(expected.shape)} as {where}, found {list(found.shape)}{hint}")
    if expected.dtype.is_complex or found.dtype.is_complex:
        raise CandidateError(f"{path}: tensor {key!r} is complex, which is not supported: expected a real dtype")
    if expected.dtype.is_floating_point != found.dtype.is_floating_point or (expected.dtype == torch.bool) != (found.dtype == torch.bool):
        raise CandidateError(f"{path}: tensor {key!r}: expected {expected.dtype} as {where}, found {found.dtype}")
