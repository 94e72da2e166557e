"""Candidates: checkpoints of one architecture, read in blocks of columns.

Files are mapped into memory, not loaded. The next block is fetched by a background thread while one
is worked on, and memory that was touched is given back, so that resident memory does not grow with
the number or the size of the files.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import twa_kernels as tk
from twa_kernels.ops import FLOATS

from .formats import SUFFIXES, is_checkpoint_folder, open_checkpoint
from .mapped import CandidateError, Part, TensorInfo, shape_of

__all__ = [
    "Block",
    "Blocks",
    "Candidate",
    "CandidateError",
    "Candidates",
    "Part",
    "TensorInfo",
    "average_into",
    "check_info",
    "check_same",
]

# of all candidates together: a read that pays on any disk, and little memory
BLOCK_BYTES = 64 << 20
# columns: what blocks are multiples of; the kernels' sums have the same bits wherever a block ends
UNIT = 8192
SAMPLES, SAMPLE_BYTES = 16, 4096  # of a file, for its fingerprint
#: prefixes that wrappers (DataParallel, torch.compile) put before every key
WRAPPER_PREFIXES = ("module.", "_orig_mod.")


class Candidate:
    """One checkpoint: a file, or a directory as Hugging Face, PEFT or torch.distributed.checkpoint
    write it.

    entry   the key under which a torch or DCP checkpoint holds the weights, such as
            "state_dict_ema"; None: the usual ones
    """

    def __init__(self, path: Path, entry: str | None = None) -> None:
        found = open_checkpoint(path, entry)
        self.path, self.entry, self.kind, self.files, tensors = (
            path,
            entry,
            found.kind,
            found.files,
            found.tensors,
        )
        if not tensors:
            raise CandidateError(f"{path}: expected a checkpoint, found no tensors")
        while prefix := next(
            (p for p in WRAPPER_PREFIXES if all(key.startswith(p) for key in tensors)), None
        ):
            tensors = {key.removeprefix(prefix): t for key, t in tensors.items()}
        self._tensors = tensors
        self.info = {key: t.info for key, t in tensors.items()}
        for key, info in self.info.items():
            if info.dtype.is_floating_point and info.dtype.itemsize == 1:
                raise CandidateError(
                    f"{path}: tensor {key!r} is {info.dtype}: expected weights of at least 16 bits;"
                    " convert the checkpoint first"
                )
        self._maps = tuple(dict.fromkeys(file for t in tensors.values() for file in t.files))

    @property
    def name(self) -> str:
        return self.path.stem if self.path.is_file() else self.path.name

    def tensor(self, key: str, part: Part | None = None) -> Tensor:
        """The tensor, or these slices of it, one per dimension: mapped from the file where the
        format allows. To be read only.
        """
        return self._tensors[key].read(part)

    def columns(self, key: str, begin: int, end: int, part: Part | None = None) -> Tensor:
        """Elements [begin, end) of the tensor, or of these slices of it, as it lies flat:

        (end - begin,).
        """
        slab, skip = _slab(self.info[key].shape, part, begin, end)
        return self.tensor(key, slab).reshape(-1)[skip : skip + end - begin]

    def prefetch(self, key: str, begin: int, end: int, part: Part | None = None) -> None:
        """Asks the system to read what `columns` will."""
        self._tensors[key].prefetch(_slab(self.info[key].shape, part, begin, end)[0])

    def fingerprint(self) -> str:
        """Digest of the files' sizes and of `SAMPLES` blocks spread over each, and of which entry
        is read.
        """
        digest = hashlib.sha256((self.entry or "").encode())
        for path in self.files:
            with open(path, "rb") as f:
                size = os.fstat(f.fileno()).st_size
                digest.update(size.to_bytes(8, "little"))
                for k in range(SAMPLES):
                    f.seek(max(0, size - SAMPLE_BYTES) * k // (SAMPLES - 1))
                    digest.update(f.read(SAMPLE_BYTES))
        return digest.hexdigest()[:16]

    def check(self) -> None:
        """Raises CandidateError if a file has been written to since it was opened."""
        for file in self._maps:
            file.check()

    def release(self) -> None:
        """Gives back the memory of what was read; tensors still held stay valid."""
        for file in self._maps:
            file.drop()


def _slab(
    shape: tuple[int, ...], part: Part | None, begin: int, end: int
) -> tuple[Part | None, int]:
    """Slices that hold elements [begin, end) of the flat part: the fewest rows of the first
    dimension longer than 1; and how many elements come before them."""
    if not shape:
        return part, begin
    sizes = shape_of(shape, part)
    axis = next((d for d, size in enumerate(sizes) if size != 1), 0)
    inner = math.prod(sizes[axis + 1 :])
    if not inner:
        return part, begin
    first, last = begin // inner, -(-end // inner)
    start = part[axis].indices(shape[axis])[0] if part else 0
    slab = list(part) if part else [slice(0, size) for size in shape]
    slab[axis] = slice(start + first, start + last)
    return tuple(slab), begin - first * inner


def numeric_order(path: Path | str) -> list[tuple[int, int, str]]:
    """Sort key that orders step_9 before step_10."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", str(path))
        if part
    ]


def find_checkpoints(patterns: Iterable[str | os.PathLike]) -> list[Path]:
    """Paths of checkpoints: files, what glob patterns match, directories that are one, and what
    lies in directories that are none, in numeric order."""
    found: list[Path] = []
    for pattern in patterns:
        text = os.fspath(pattern)
        matches = (
            [text]
            if os.path.exists(text) or not glob.has_magic(text)
            else sorted(glob.glob(text, recursive=True), key=numeric_order)
        )
        if not matches:
            raise CandidateError(f"no candidates: nothing matches {text!r}")
        for match in map(Path, matches):
            found += (
                _inside(match) if match.is_dir() and not is_checkpoint_folder(match) else [match]
            )
    if not found:
        raise CandidateError("no candidates: expected at least one checkpoint, found none")
    return in_order(found)


def in_order(found: list[Path]) -> list[Path]:
    """Paths in alphabetic order, as a shell lists what a pattern matches (step_10 before step_9),
    in numeric order; others as they are.
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


@dataclass(frozen=True)
class Block:
    """Columns [begin, end) of the `index`-th tensor asked for, of every candidate: rows[i] (end -
    begin,).
    """

    index: int
    begin: int
    end: int
    rows: list[Tensor]


class Candidates(Sequence[Candidate]):
    """The heap: checkpoints with the same tensors, in numeric order of their names within each
    pattern. A list of files in alphabetic order, as a shell gives it, is put in numeric order too;
    any other list keeps its order.

    paths   files (.safetensors, .pt, .pth, .bin, .ckpt), glob patterns, directories that are a
            checkpoint (Hugging Face, sharded or not, PEFT adapters, torch.distributed.checkpoint)
            or that have checkpoints in them, or a list of those. Order matters to EMA and LAWA:
            earlier candidates first. docs/formats.md has the details.
    entry   the key under which torch and DCP checkpoints hold the weights, such as
            "state_dict_ema"; None: the usual ones
    block_bytes  how much of all candidates together is read at once; about twice that is resident

    Raises CandidateError if there are none, one cannot be read, or their keys, shapes or kinds of
    dtype differ.
    """

    at_hand = True  # unlike those of a basis that is loaded alone

    def __init__(
        self,
        paths: str | os.PathLike | Iterable[str | os.PathLike],
        *,
        entry: str | None = None,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        found = find_checkpoints([paths] if isinstance(paths, str | os.PathLike) else paths)
        self._candidates = [Candidate(path, entry) for path in found]
        for candidate in self._candidates[1:]:
            check_same(self._candidates[0], candidate)
        self.entry, self.block_bytes = entry, block_bytes
        self._touched = 0  # bytes read since memory was last given back
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
    def kind(self) -> str:
        """What the candidates are: see `formats.Checkpoint`; "mixed" if they differ."""
        kinds = {c.kind for c in self}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def info(self) -> dict[str, TensorInfo]:
        """Keys, shapes and dtypes of the first candidate."""
        return self[0].info

    def check(self) -> None:
        """Raises CandidateError if a file has been written to since it was opened."""
        for c in self:
            c.check()

    def _count(self, nbytes: int) -> None:
        """Accounts for bytes that are about to be touched."""
        self.bytes_read += nbytes
        self._touched += nbytes
        if self._touched > 2 * self.block_bytes:
            self.check()
            for c in self:
                c.release()
            self._touched = nbytes

    def _chosen(self, rows: slice | Sequence[int]) -> list[Candidate]:
        return (
            self._candidates[rows]
            if isinstance(rows, slice)
            else [self._candidates[i] for i in rows]
        )

    def tensors(
        self, key: str, rows: slice = slice(None), part: Part | None = None
    ) -> list[Tensor]:
        """This tensor of every candidate (or of those in `rows`), mapped from its file. part: only
        these slices of it, one per dimension; the bytes around them are not touched. For tensors
        larger than memory see `stream`."""
        chosen, count = self._candidates[rows], math.prod(shape_of(self.info[key].shape, part))
        self._count(count * sum(c.info[key].dtype.itemsize for c in chosen))
        return [c.tensor(key, part) for c in chosen]

    def stream(
        self,
        wanted: Sequence[tuple[str, Part | None]],
        rows: slice | Sequence[int] = slice(None),
        columns: int | None = None,
        begin: tuple[int, int] = (0, 0),
    ) -> Iterator[Block]:
        """Blocks of columns of these tensors (key, and slices or None), in order, while a
        background thread fetches the next. A tensor without elements makes one empty block.

        columns   of a block, a multiple of UNIT; default: what makes block_bytes
        begin     (index, column) of the first block
        """
        chosen = self._chosen(rows)

        def prepare(index: int, first: int, last: int) -> Block:
            key, part = wanted[index]
            self._count(sum(c.info[key].dtype.itemsize for c in chosen) * (last - first))
            return Block(index, first, last, [c.columns(key, first, last, part) for c in chosen])

        def prepare_ahead(index: int, first: int, last: int) -> Block:
            for c in chosen:
                c.prefetch(wanted[index][0], first, last, wanted[index][1])
            return prepare(index, first, last)

        blocks = self._cut(wanted, chosen, columns, begin)
        if (place := next(blocks, None)) is None:
            return
        block = prepare(*place)
        with contextlib.ExitStack() as stack:
            pool = None
            while block is not None:
                ahead = None
                if (place := next(blocks, None)) is not None:
                    pool = pool or stack.enter_context(
                        ThreadPoolExecutor(1, thread_name_prefix="twa-prefetch")
                    )
                    ahead = pool.submit(prepare_ahead, *place)
                yield block
                block = ahead and ahead.result()

    def _cut(
        self,
        wanted: Sequence[tuple[str, Part | None]],
        chosen: Sequence[Candidate],
        columns: int | None,
        begin: tuple[int, int],
    ) -> Iterator[tuple[int, int, int]]:
        """(index, begin, end) of each block."""
        for index in range(begin[0], len(wanted)):
            key, part = wanted[index]
            total = math.prod(shape_of(self.info[key].shape, part))
            width = (
                columns
                or max(
                    1, self.block_bytes // (UNIT * sum(c.info[key].dtype.itemsize for c in chosen))
                )
                * UNIT
            )
            at = begin[1] if index == begin[0] else 0
            if total == 0:
                yield index, 0, 0
            for first in range(at, total, width):
                yield index, first, min(first + width, total)

    def fingerprints(self) -> dict[str, str]:
        """For each place in the order, the candidate's name and a digest of its files' sizes and
        samples of their content.
        """
        if self._fingerprints is None:
            self._fingerprints = {
                f"candidate {k}": f"{c.name} ({c.fingerprint()})" for k, c in enumerate(self)
            }
        return self._fingerprints

    def blocks(self, keys: Iterable[str] | None = None, columns: int | None = None) -> Blocks:
        """The candidates' float tensors (or those named) as a stream of blocks of columns: n flat
        tensors of at most `columns` elements each. It can be read again and again, as
        `twa_kernels.orthonormalize` wants; memory does not grow with the files."""
        names = (
            [key for key, info in self.info.items() if info.dtype.is_floating_point]
            if keys is None
            else list(keys)
        )
        if unknown := [name for name in names if name not in self.info]:
            raise CandidateError(
                f"{self[0].path}: expected a tensor {unknown[0]!r}, found none of that name"
            )
        if columns is not None and columns < 1:
            raise ValueError(f"columns: expected at least 1, found {columns}")
        return Blocks(self, names, columns)

    def average(self, key: str, weights: Tensor, part: Part | None = None) -> Tensor:
        """sum_i weights[i] * w_i for one tensor (or these slices of it), summed in float64 block by
        block, returned as float32 (float64 for float64). Candidates of weight 0 are not read."""
        used = torch.nonzero(weights).flatten().tolist() or [0]
        out = torch.empty(
            shape_of(self.info[key].shape, part),
            dtype=torch.promote_types(self.info[key].dtype, torch.float32),
        )
        for block in self.stream([(key, part)], rows=used):
            average_into(out.view(-1)[block.begin : block.end], block.rows, weights[used])
        return out


@dataclass(frozen=True)
class Blocks:
    """Blocks of columns of all candidates; see `Candidates.blocks`. float64 is read as float32."""

    candidates: Candidates
    keys: list[str]
    columns: int | None

    def __iter__(self) -> Iterator[list[Tensor]]:
        for block in self.candidates.stream(
            [(key, None) for key in self.keys], columns=self.columns
        ):
            if block.rows[0].numel():
                yield [row if row.dtype in FLOATS else row.float() for row in block.rows]


CHUNK = 1 << 20  # columns of a float64 accumulator: 8 MB


def average_into(out: Tensor, rows: Sequence[Tensor], weights: Tensor) -> Tensor:
    """out = sum_i weights[i] * rows[i], summed in float64; rows of weight 0 are not read. out:
    contiguous, any float dtype.
    """
    if out.dtype == torch.float32 and all(r.dtype in FLOATS for r in rows):
        tk.average([r.detach() for r in rows], weights, out)
        return out
    flat_out = out.view(-1)
    flat = [(w, r.reshape(-1)) for w, r in zip(weights.tolist(), rows, strict=True) if w != 0.0]
    for start in range(0, flat_out.numel(), CHUNK):
        at = slice(start, start + CHUNK)
        total = torch.zeros_like(flat_out[at], dtype=torch.float64)
        for w, r in flat:
            total += w * r[at].double()
        flat_out[at] = total
    return out


def check_same(first: Candidate, other: Candidate) -> None:
    """Same keys, shapes and kinds of dtype (float, integer, bool), else CandidateError."""
    if missing := sorted(first.info.keys() - other.info.keys()):
        raise CandidateError(
            f"{other.path}: tensor {missing[0]!r} is missing ({len(missing)} in all) but is in"
            f" {first.path}"
        )
    if unexpected := sorted(other.info.keys() - first.info.keys()):
        raise CandidateError(
            f"{other.path}: tensor {unexpected[0]!r} is unexpected ({len(unexpected)} in all):"
            f" {first.path} does not have it"
        )
    for key, expected in first.info.items():
        check_info(other.path, key, expected, other.info[key], f"in {first.path}")


def check_info(path: Path, key: str, expected: TensorInfo, found: TensorInfo, where: str) -> None:
    if expected.shape != found.shape:
        hint = ""
        if (
            len(expected.shape) == len(found.shape) >= 1
            and expected.shape[1:] == found.shape[1:]
            and re.search(r"emb|wte|vocab|lm_head|tok", key)
        ):
            hint = (
                f"; this looks like a vocabulary mismatch ({expected.shape[0]} and {found.shape[0]}"
                " tokens): candidates must share one tokenizer"
            )
        raise CandidateError(
            f"{path}: tensor {key!r}: expected shape {list(expected.shape)} as {where}, found"
            f" {list(found.shape)}{hint}"
        )
    if expected.dtype.is_complex or found.dtype.is_complex:
        raise CandidateError(
            f"{path}: tensor {key!r} is complex, which is not supported: expected a real dtype"
        )
    if expected.dtype.is_floating_point != found.dtype.is_floating_point or (
        expected.dtype == torch.bool
    ) != (found.dtype == torch.bool):
        raise CandidateError(
            f"{path}: tensor {key!r}: expected {expected.dtype} as {where}, found {found.dtype}"
        )
