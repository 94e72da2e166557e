"""A packed basis on disk: a safetensors file with all that a subspace needs besides the model.

It is mapped when it is loaded, and everything in it is checked before it is used. docs/format.md
has the layout.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

import twa_kernels as tk

from ..coordinates import Coordinates, Deltas, Differences, Orthonormal, constrained
from ..io.atomic import is_at, lock, sync_folder
from ..io.candidates import BLOCK_BYTES
from ..io.checks import first_line, parse_json
from ..io.errors import BasisError, CandidateError
from ..io.mapped import MappedFile, Stored
from ..io.safetensors import DTYPES, header, raw_bytes, read_header, read_safetensors
from .contents import Contents, parse_contents

NAME = "basis.safetensors"
ALIGNMENT = 4096  # of the data in the file: codes lie in memory as the kernels like them
CHUNK = 1 << 22  # elements that are checked at a time
LARGEST_SCALE = 0x7E  # of e4m3 without sign; above it are NaN and negative numbers


# Writing -----------------------------------------------------------------------------------------


class Writer:
    """A basis that is written part by part beside its place, and put there when it is whole.

    Args:
        path: its place
        contents: what it is of
        partial: where it is written; None: at its place with .partial behind the name
    """

    def __init__(self, path: Path, contents: Contents, partial: Path | None = None) -> None:
        self.path, self.contents = path, contents
        self.partial = partial or path.with_name(path.name + ".partial")
        metadata = {"twa": json.dumps(contents.as_json())}
        self.info = contents.tensors()
        self.header, self.offsets, size = header(self.info, metadata, ALIGNMENT)
        self.size = len(self.header) + size
        self._opened: BinaryIO | None = None

    @property
    def is_open(self) -> bool:
        """Whether `lock` or `join` has opened the file, and nobody closed it."""
        return self._opened is not None and not self._opened.closed

    @property
    def _file(self) -> BinaryIO:
        """The file, once `lock` has opened it."""
        assert self._opened is not None, "lock() comes first"
        return self._opened

    def lock(self) -> None:
        """Opens the file, whatever is in it.

        BasisError if another process is writing it: the two would damage each other's.
        """
        descriptor = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666)
        self._opened = open(descriptor, "r+b")  # noqa: SIM115 (closed in close)
        self._check(lock(self._opened) and is_at(self._opened, self.partial))

    def share(self) -> None:
        """Lets other ranks `join`, after `open`: they write parts of the same file."""
        self._check(lock(self._file, shared=True))

    def join(self) -> None:
        """Opens the file that rank 0 shares; BasisError if it is gone, or another's since."""
        self._opened = open(self.partial, "r+b")  # noqa: SIM115 (closed in close)
        self._check(lock(self._file, shared=True) and is_at(self._file, self.partial))

    def _check(self, locked: bool) -> None:
        """BasisError unless the file is locked."""
        if not locked:
            self.close()
            raise BasisError("another process is writing it", self.partial)

    def open(self, keep: bool = False) -> None:
        """Starts the locked file, or goes on with what is in it.

        Args:
            keep: go on

        Raises:
            OSError: the disk has no room for it
            BasisError: what is in it is not the begin of this basis
        """
        there = os.fstat(self._file.fileno())
        free = shutil.disk_usage(self.path.parent).free + there.st_blocks * 512
        if free < self.size:
            text = (
                f"the disk has {free / 1e9:.2f} GB left, the packed basis takes"
                f" {self.size / 1e9:.2f} GB"
            )
            raise OSError(errno.ENOSPC, text, str(self.path))
        if not keep:
            self._file.truncate(0)
            self._file.write(self.header)
            self._file.truncate(self.size)
        elif there.st_size != self.size or (
            os.pread(self._file.fileno(), len(self.header), 0) != self.header
        ):
            raise BasisError(
                f"not the {self.size} bytes of an unfinished basis of these"
                " candidates; pass --overwrite to start anew",
                self.partial,
            )

    def put(self, name: str, t: Tensor, first: int = 0) -> None:
        """Writes elements of a tensor of the file.

        Args:
            name: of the tensor
            t: the elements, on the CPU, in the dtype of the tensor
            first: index of the first of them in the flat tensor
        """
        info = self.info[name]
        fits = t.element_size() == info.dtype.itemsize
        fits = fits and (first + t.numel()) * t.element_size() <= info.nbytes
        assert fits, f"{name}: {t.numel()} of {t.dtype} from {first} on, in {info}"
        self._file.seek(len(self.header) + self.offsets[name] + first * t.element_size())
        self._file.write(raw_bytes(t))

    def sync(self) -> None:
        """Returns when all that was put is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Puts the file at its place."""
        self.sync()
        os.replace(self.partial, self.path)  # still locked: nobody may start it anew in between
        sync_folder(self.path.parent)

    @property
    def finished(self) -> bool:
        """Whether the locked file is at its place."""
        return is_at(self._file, self.path)

    def close(self) -> None:
        """Closes the file; what is not finished may be lost."""
        if self._opened is not None:
            with contextlib.suppress(OSError):
                self._opened.close()


# Reading -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A file that was found to be sound.

    Attributes:
        path: the file
        contents: what it is of
        tensors: its tensors, mapped
    """

    path: Path
    contents: Contents
    tensors: Mapping[str, Stored]

    def read(self, name: str) -> Tensor:
        """A tensor of the file, mapped: it is to be read only."""
        return self.tensors[name].read()

    @property
    def file(self) -> MappedFile:
        """The file, as it is mapped."""
        return self.tensors["codes"].file

    def check(self) -> None:
        """Raises BasisError if the file is no longer what was found to be sound."""
        self.file.check(BasisError)

    def basis(self) -> tk.PackedBasis:
        """The packed basis, codes and scales mapped."""
        c = self.contents
        tile_segment = c.tensor_segments.of_tiles(c.numels)
        row_scale, divisor = (self.read(name).clone() for name in ("row_scale", "divisor"))
        codes, scales = self.read("codes"), self.read("scales")
        return tk.PackedBasis(
            codes, scales, row_scale, tile_segment, divisor, tuple(c.shapes), c.bits
        )

    def center(self) -> list[Tensor]:
        """The center, float32, in the shapes of the trained tensors, mapped."""
        parts = self.read("center").split(self.contents.numels)
        return [part.view(shape) for part, shape in zip(parts, self.contents.shapes, strict=True)]

    def coordinates(self) -> Coordinates:
        """How coefficients, rows of P and merge weights make each other."""
        c, weights = self.contents, self.read("center_weights").clone()
        if c.basis == "deltas":
            origin = self.read("origin").clone() if c.moved else None
            deltas = Deltas(weights, self.read("divisor").clone(), origin)
            return constrained(deltas, c.constraint)
        if c.basis == "differences":
            return constrained(Differences(weights, self.read("divisor").clone()), c.constraint)
        transform, R, scale = (self.read(name).clone() for name in ("transform", "R", "scale"))
        dropped = tuple(tuple((int(i), d) for i, d in pairs) for pairs in c.dropped)
        return constrained(Orthonormal(weights, transform, R, scale, dropped), c.constraint)


def read_contents(path: Path) -> Contents:
    """What the basis in a file is of, by its header; BasisError if it is none."""
    if not path.is_file():
        raise BasisError("no such file", path)
    try:
        header, _ = read_header(path)
    except (CandidateError, OSError) as error:
        raise BasisError(str(error)) from error
    metadata = header.get("__metadata__")
    text = metadata.get("twa") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise BasisError("not a packed basis: its metadata have no entry 'twa'", path)
    try:
        return parse_contents(parse_json(text.encode()))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BasisError(f"not a packed basis: {first_line(error)}", path) from error


def read_basis(path: Path) -> Loaded:
    """The packed basis in a file; BasisError unless it is whole and sound."""
    contents = read_contents(path)
    try:
        tensors = read_safetensors(path, DTYPES)
    except (CandidateError, OSError) as error:
        raise BasisError(str(error)) from error
    expected = contents.tensors()
    if odd := sorted(expected.keys() ^ tensors.keys()):
        raise BasisError(
            f"tensor {odd[0]!r}: {'missing' if odd[0] in expected else 'unexpected'}", path
        )
    for name, info in expected.items():
        if tensors[name].info != info:
            raise BasisError(f"tensor {name!r}: expected {info}, found {tensors[name].info}", path)
    loaded = Loaded(path, contents, tensors)
    for name in expected:
        _check_values(path, name, tensors[name])
    loaded.check()
    with_sum = ["center_weights"] if contents.basis == "differences" or contents.moved else []
    for name in [*with_sum, *(["origin"] if contents.moved else [])]:
        total = float(tensors[name].read().sum())
        if abs(total - 1) > 2e-6:
            raise BasisError(
                f"tensor {name!r}: expected numbers that sum to 1, found a sum of {total:.7g}", path
            )
    return loaded


def _check_values(path: Path, name: str, stored: Stored) -> None:
    """BasisError unless the elements of a tensor of the file are what they can be."""
    if name == "scales":
        what = "the bits of e4m3 numbers, finite and without sign"
        _check(path, name, stored, lambda t: t.view(torch.uint8) <= LARGEST_SCALE, what)
    elif name == "divisor":
        what = "finite numbers of at least 0"
        _check(path, name, stored, lambda t: torch.isfinite(t) & (t >= 0), what)
    elif stored.info.dtype.is_floating_point and not name.startswith("state."):
        _check(path, name, stored, torch.isfinite, "finite numbers")


def _check(
    path: Path, name: str, stored: Stored, good: Callable[[Tensor], Tensor], expected: str
) -> None:
    """BasisError unless `good` holds for every element."""
    flat = stored.read().reshape(-1)
    for first in range(0, len(flat), CHUNK):
        sound = good(flat[first : first + CHUNK])
        if not sound.all():
            at = first + int(torch.nonzero(~sound)[0])
            raise BasisError(
                f"tensor {name!r}: expected {expected}, found another at element {at}", path
            )
    if stored.info.nbytes > BLOCK_BYTES:
        stored.file.drop()
