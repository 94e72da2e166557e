"""A packed basis on disk: a safetensors file that is mapped when it is loaded, with all that a
subspace needs besides the model. docs/formats.md has the layout. Everything in it is checked before
it is used."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import twa_kernels as tk
from twa_kernels.packed import NORMALIZE, segments_to_tiles
from twa_kernels.reference import BITS, MAX_ROWS, TILE, tile_offsets

from ..io.atomic import DTYPE_NAMES, SAFETENSORS_DTYPES, lock, sync_folder
from ..io.candidates import BLOCK_BYTES, CandidateError
from ..io.formats import SUFFIXES, parse_json, read_header, read_safetensors
from ..io.mapped import MAX_ELEMENTS, Stored, TensorInfo, are_sizes, first_line, shown
from ..packing.orthonormal import Coordinates
from .segments import Layout, Segments

FORMAT = "twa-basis-1"
NAME = "basis.safetensors"
DTYPES = SAFETENSORS_DTYPES | {"F8_E4M3": torch.float8_e4m3fn}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 4096  # of the data in the file: codes lie in memory as the kernels like them
CHUNK = 1 << 22  # elements that are checked at a time
LARGEST_SCALE = 0x7E  # of e4m3 without sign; above it are NaN and negative numbers


class BasisError(ValueError):
    """The file is no packed basis, or not one that fits; the message names file, tensor, what was
    expected and what was found.
    """


@dataclass(frozen=True)
class Contents:
    """What a packed basis is of: the metadata of its file.

    candidates    path and fingerprint of each source, in order
    info          key in the sources -> (shape, dtype as safetensors names it)
    trained ...   as in twa.layout.Layout
    segments      of each trained tensor;  labels: of each segment;  chunk: see twa.layout.Segments
    rows          of the basis: the candidates, or the rank of an orthonormal one
    dropped       of an orthonormal basis: per segment, (candidate, relative distance) of those that
                  depend on earlier ones
    """

    bits: int
    basis: str
    normalize: str
    rows: int
    candidates: list[list[str]]
    kind: str
    info: dict[str, list]
    trained: dict[str, str]
    fixed: dict[str, str]
    copied: dict[str, str]
    aliases: dict[str, str]
    names: dict[str, str]
    segments: list[int]
    labels: list[str]
    chunk: int = 0
    dropped: list[list[list[float]]] = field(default_factory=list)
    format: str = FORMAT

    @property
    def shapes(self) -> list[torch.Size]:
        return [torch.Size(self.info[key][0]) for key in self.trained.values()]

    @property
    def numels(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    def as_json(self) -> dict[str, object]:
        """Plain values; what is trained as pairs, since their order is that of the codes."""
        return asdict(self) | {"trained": [list(pair) for pair in self.trained.items()]}

    @property
    def parts(self) -> Segments:
        return Segments(self.labels, self.segments, self.chunk)

    @property
    def layout(self) -> Layout:
        return Layout(
            *(
                dict(getattr(self, name))
                for name in ("trained", "fixed", "copied", "aliases", "names")
            )
        )

    def tensors(self) -> dict[str, TensorInfo]:
        """Names, shapes and dtypes of the tensors in the file, the large ones first."""
        n, rows, L, tiles = (
            len(self.candidates),
            self.rows,
            len(self.labels),
            tile_offsets(self.numels)[-1],
        )
        found = {
            "codes": TensorInfo((tiles, rows, 16 * self.bits), torch.uint8),
            "center": TensorInfo((sum(self.numels),), torch.float32),
            "scales": TensorInfo((tiles, rows), torch.float8_e4m3fn),
            "row_scale": TensorInfo((rows, L), torch.float32),
            "divisor": TensorInfo((n if self.basis == "deltas" else rows, L), torch.float64),
            "center_weights": TensorInfo((n,), torch.float64),
            "coefficients": TensorInfo((rows, L), torch.float32),
        }
        if self.basis == "orthonormal":
            found |= {
                "transform": TensorInfo((L, rows, n), torch.float64),
                "R": TensorInfo((L, n, rows), torch.float64),
            }
            found |= {"scale": TensorInfo((L,), torch.float64)}
        for key in (self.fixed | self.copied).values():
            shape, dtype = self.info[key]
            found[f"state.{key}"] = TensorInfo(tuple(shape), unrounded(DTYPES[dtype]))
        return found


def unrounded(dtype: torch.dtype) -> torch.dtype:
    """Averages are float32 or float64 until they are exported."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


# Writing -----------------------------------------------------------------------------------------


class Writer:
    """A basis that is written part by part beside its place (`partial`, by default NAME.partial)
    and put there when it is whole.
    """

    def __init__(self, path: Path, contents: Contents, partial: Path | None = None) -> None:
        self.path, self.contents = path, contents
        self.partial = partial or path.with_name(path.name + ".partial")
        self.info = contents.tensors()
        header: dict[str, object] = {
            "__metadata__": {"format": "pt", "twa": json.dumps(contents.as_json())}
        }
        end, self.offsets = 0, {}
        for name, info in self.info.items():
            header[name] = {
                "dtype": NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [end, end + info.nbytes],
            }
            self.offsets[name], end = end, end + info.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        self.header, self.size = len(text).to_bytes(8, "little") + text, 8 + len(text) + end
        self._file = None

    def lock(self) -> None:
        """Opens the file, whatever is in it.

        BasisError if another process is writing it: the two would damage each other's.
        """
        self._file = open(os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # noqa: SIM115 (closed in finish and close)
        if not (lock(self._file) and self._is_at(self.partial)):
            self.close()
            raise BasisError(f"{self.partial}: another process is writing it")

    def open(self, keep: bool = False) -> None:
        """Starts the locked file, or goes on with what is in it.

        OSError if the disk has no room for it.
        """
        there = os.fstat(self._file.fileno())
        if (free := shutil.disk_usage(self.path.parent).free + there.st_blocks * 512) < self.size:
            text = (
                f"the disk has {free / 1e9:.2f} GB left, the packed basis takes"
                f" {self.size / 1e9:.2f} GB"
            )
            raise OSError(errno.ENOSPC, text, str(self.path))
        if keep and (
            there.st_size != self.size or self._file.read(len(self.header)) != self.header
        ):
            raise BasisError(
                f"{self.partial}: not the {self.size} bytes of an unfinished basis of these"
                " candidates; pass --overwrite to start anew"
            )
        if not keep:
            self._file.truncate(0)
            self._file.write(self.header)
            self._file.truncate(self.size)

    def put(self, name: str, t: Tensor, first: int = 0) -> None:
        """Elements from `first` on."""
        self._file.seek(len(self.header) + self.offsets[name] + first * t.element_size())
        self._file.write(memoryview(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy()))

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        self.sync()
        os.replace(self.partial, self.path)  # still locked: nobody may start it anew in between
        sync_folder(self.path.parent)

    @property
    def finished(self) -> bool:
        """Whether the locked file is at its place."""
        return self._is_at(self.path)

    def _is_at(self, path: Path) -> bool:
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """What is not finished may be lost."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()


# Reading -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A file that was found to be sound. Its tensors are mapped."""

    path: Path
    contents: Contents
    tensors: Mapping[str, Stored]
    coordinates: Coordinates | None

    def read(self, name: str) -> Tensor:
        return self.tensors[name].read()

    def basis(self) -> tk.PackedBasis:
        c = self.contents
        tile_segment = segments_to_tiles(c.parts.of_tiles(c.numels), c.numels)
        small = [self.read(name).clone() for name in ("row_scale", "divisor")]
        return tk.PackedBasis(
            self.read("codes"),
            self.read("scales"),
            small[0],
            tile_segment,
            small[1],
            tuple(c.shapes),
            c.bits,
        )

    def center(self) -> list[Tensor]:
        flat = self.read("center").clone()
        return [
            part.view(shape)
            for part, shape in zip(
                flat.split(self.contents.numels), self.contents.shapes, strict=True
            )
        ]


def read_basis(path: Path) -> Loaded:
    """BasisError unless the file is a whole and sound packed basis."""
    if not path.is_file():
        raise BasisError(f"{path}: no such file")
    try:
        header, _ = read_header(path)
        tensors = read_safetensors(path, DTYPES)
    except (CandidateError, OSError) as error:
        raise BasisError(str(error)) from error
    metadata = header.get("__metadata__")
    text = metadata.get("twa") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise BasisError(f"{path}: not a packed basis: its metadata have no entry 'twa'")
    try:
        contents = _contents(parse_json(text.encode()))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BasisError(
            f"{path}: not a packed basis of format {FORMAT}: {first_line(error)}"
        ) from error
    expected = contents.tensors()
    if odd := sorted(expected.keys() ^ tensors.keys()):
        raise BasisError(
            f"{path}: tensor {odd[0]!r}: {'missing' if odd[0] in expected else 'unexpected'}"
        )
    for name, info in expected.items():
        if tensors[name].info != info:
            raise BasisError(
                f"{path}: tensor {name!r}: expected {info}, found {tensors[name].info}"
            )
    for name in expected:
        if name == "scales":
            _check(
                path,
                name,
                tensors[name],
                lambda t: t.view(torch.uint8) <= LARGEST_SCALE,
                "the bits of e4m3 numbers, finite and without sign",
            )
        elif name == "divisor":
            _check(
                path,
                name,
                tensors[name],
                lambda t: torch.isfinite(t) & (t >= 0),
                "finite numbers of at least 0",
            )
        elif expected[name].dtype.is_floating_point and not name.startswith("state."):
            _check(path, name, tensors[name], torch.isfinite, "finite numbers")
    coordinates = None
    if contents.basis == "orthonormal":
        dropped = tuple(
            tuple((int(i), d) for i, d in of_segment) for of_segment in contents.dropped
        )
        coordinates = Coordinates(
            *(tensors[name].read().clone() for name in ("transform", "R", "scale")), dropped
        )
    return Loaded(path, contents, tensors, coordinates)


def _check(path: Path, name: str, stored: Stored, good: object, expected: str) -> None:
    flat = stored.read().reshape(-1)
    for first in range(0, len(flat), CHUNK):
        sound = good(flat[first : first + CHUNK])
        if not sound.all():
            at = first + int(torch.nonzero(~sound)[0])
            raise BasisError(
                f"{path}: tensor {name!r}: expected {expected}, found another at element {at}"
            )
    if stored.info.nbytes > BLOCK_BYTES:
        stored.file.drop()


def _contents(value: object) -> Contents:
    """From parsed JSON; ValueError says what is wrong."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(
            f"expected format {FORMAT!r}, found"
            f" {shown(value.get('format') if isinstance(value, dict) else value)}"
        )
    fields = set(Contents.__dataclass_fields__)
    value = {"chunk": 0} | value  # files of version 0.1.0 have none
    if odd := sorted(fields ^ value.keys()):
        raise ValueError(
            f"metadata: {odd[0]!r} is {'missing' if odd[0] in fields else 'unexpected'}"
        )
    pairs = value["trained"]
    _want(
        _list_of(pairs, lambda p: _list_of(p, str) and len(p) == 2),
        "trained",
        "pairs of a name and a key",
        pairs,
    )
    _want(len({name for name, _ in pairs}) == len(pairs), "trained", "each name once", pairs)
    c = Contents(**value | {"trained": dict(pairs)})
    names = {
        "fixed": c.fixed,
        "copied": c.copied,
        "trained": c.trained,
        "aliases": c.aliases,
        "names": c.names,
    }
    _want(c.bits in BITS and type(c.bits) is int, "bits", f"one of {BITS}", c.bits)
    _want(c.basis in ("deltas", "orthonormal"), "basis", "deltas or orthonormal", c.basis)
    _want(c.normalize in NORMALIZE, "normalize", f"one of {NORMALIZE}", c.normalize)
    _want(isinstance(c.kind, str), "kind", "a text", c.kind)
    _want(
        _list_of(c.candidates, lambda s: _list_of(s, str) and len(s) == 2),
        "candidates",
        "paths and fingerprints",
        c.candidates,
    )
    n = len(c.candidates)
    _want(1 <= n <= MAX_ROWS, "candidates", f"1 to {MAX_ROWS}", n)
    _want(
        type(c.rows) is int and 1 <= c.rows <= n and (c.basis == "orthonormal" or c.rows == n),
        "rows",
        "one per candidate, or the rank",
        c.rows,
    )
    for name, mapping in names.items():
        _want(
            isinstance(mapping, dict) and all(isinstance(v, str) for v in mapping.values()),
            name,
            "names",
            mapping,
        )
    _want(
        isinstance(c.info, dict) and all(_is_info(i) for i in c.info.values()),
        "info",
        "a shape and a dtype for each key",
        c.info,
    )
    keys = [key for name in ("trained", "fixed", "copied") for key in names[name].values()]
    _want(
        len(set(keys)) == len(keys) and set(keys) <= c.info.keys(),
        "keys",
        "each key in use once, with its shape",
        keys,
    )
    _want(c.names.keys() == c.info.keys(), "names", "a name for each key", c.names)
    _want(
        bool(c.trained)
        and all(DTYPES[c.info[key][1]].is_floating_point for key in c.trained.values()),
        "trained",
        "float tensors",
        c.trained,
    )
    _want(_list_of(c.labels, str) and len(c.labels) >= 1, "labels", "names of segments", c.labels)
    good = _list_of(c.segments, lambda s: type(s) is int and 0 <= s < len(c.labels)) and len(
        c.segments
    ) == len(c.trained)
    _want(good, "segments", f"an index below {len(c.labels)} for each trained tensor", c.segments)
    good = (
        type(c.chunk) is int
        and 0 <= c.chunk < 1 << 62
        and c.chunk % TILE == 0
        and (not c.chunk or _counts_up(c))
    )
    _want(
        good,
        "chunk",
        f"0, or a multiple of {TILE} that makes {len(c.labels)} segments of the tensors",
        c.chunk,
    )
    pair = lambda p: (
        isinstance(p, list)
        and len(p) == 2
        and type(p[0]) is int
        and 0 <= p[0] < n
        and type(p[1]) in (int, float)
        and 0 <= p[1] < 1e9
    )
    good = _list_of(c.dropped, lambda s: _list_of(s, pair)) and len(c.dropped) == (
        len(c.labels) if c.basis == "orthonormal" else 0
    )
    _want(good, "dropped", "candidates and distances for each segment", c.dropped)
    return c


def _counts_up(c: Contents) -> bool:
    """Whether segments are those that `chunk` makes, tensor after tensor."""
    ends = list(itertools.accumulate((-(-numel // c.chunk) for numel in c.numels), initial=0))
    return c.basis == "deltas" and [*c.segments, len(c.labels)] == ends


def _want(good: bool, name: str, expected: str, found: object) -> None:
    if not good:
        raise ValueError(f"metadata: {name}: expected {expected}, found {shown(found)}")


def _list_of(value: object, kind: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, kind) if isinstance(kind, type) else kind(v) for v in value
    )


def _is_info(value: object) -> bool:
    if not (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], list)
        and isinstance(value[1], str)
        and value[1] in DTYPE_NAMES.values()
    ):
        return False
    return are_sizes(value[0]) and math.prod(max(1, s) for s in value[0]) <= MAX_ELEMENTS


# Candidates that are not at hand -----------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A candidate by name: what a basis knows of its sources."""

    path: Path
    digest: str
    kind: str
    info: Mapping[str, TensorInfo]

    @property
    def name(self) -> str:
        return self.path.stem if self.path.suffix in SUFFIXES else self.path.name

    def fingerprint(self) -> str:
        return self.digest


class Sources(Sequence[Source]):
    """Stands for the candidates of a basis that was loaded without them: names, shapes and
    fingerprints, but no weights.
    """

    at_hand = False

    def __init__(self, loaded: Loaded) -> None:
        c = loaded.contents
        self.file, self.kind, self.block_bytes = loaded.path, c.kind, BLOCK_BYTES
        self.info = {
            key: TensorInfo(tuple(shape), DTYPES[dtype]) for key, (shape, dtype) in c.info.items()
        }
        self._sources = [
            Source(Path(path), digest, c.kind, self.info) for path, digest in c.candidates
        ]

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index):
        return self._sources[index]

    @property
    def names(self) -> list[str]:
        return [s.name for s in self]

    def fingerprints(self) -> dict[str, str]:
        return {f"candidate {k}": f"{s.name} ({s.digest})" for k, s in enumerate(self)}

    def _absent(self, *_: object, **__: object) -> None:
        raise CandidateError(
            f"{self.file}: loaded without its candidates, whose weights are needed here: pass"
            " candidates to load"
        )

    tensors = stream = blocks = average = _absent


def facts_of(contents: Contents, fingerprints: Mapping[str, str]) -> None:
    """BasisError unless these are the candidates that the basis was packed from, in this order."""
    theirs = {f"candidate {k}": digest for k, (_, digest) in enumerate(contents.candidates)}
    ours = {k: v.rsplit("(", 1)[1].rstrip(")") for k, v in fingerprints.items()}
    for k in {**theirs, **ours}:
        if theirs.get(k) != ours.get(k):
            raise BasisError(
                f"{k}: expected the one that the basis was packed from ({theirs.get(k, 'none')}),"
                f" found {fingerprints.get(k, 'none')}"
            )
