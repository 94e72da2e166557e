"""`Contents`: what a packed basis is of, as the metadata of its file say; and their checks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from twa_kernels.layout import BITS, MAX_ROWS, TILE, tile_offsets
from twa_kernels.scaling import NORMALIZE

from ..coordinates import BASES, CONSTRAINTS, trained_count
from ..io.checks import are_sizes, is_shape, is_text, shown
from ..io.key_map import KeyMap, Written
from ..io.lazy import Block
from ..io.mapped import TensorInfo, span
from ..io.safetensors import DTYPE_NAMES, SAFETENSORS_DTYPES
from ..io.versions import BASIS, problem
from .segments import Segments


@dataclass(frozen=True)
class Contents:
    """What a packed basis is of: the metadata of its file.

    Attributes:
        bits: of the codes
        basis: what the rows of P are, see `Coordinates`
        normalize: see `Subspace.from_candidates`
        rows: of the basis: the candidates, all but one for differences, or the rank of an
            orthonormal one
        candidates: path and fingerprint of each source, in order
        kind: format of the sources
        info: key in the sources -> [shape, dtype as safetensors names it]
        trained: as in `KeyMap`, like fixed, copied, aliases and names
        segments: of each trained tensor, see `Segments.first`
        labels: names of the segments
        chunk: see `Segments`
        constraint: what the coefficients are kept to, see `Coordinates`
        balanced: whether they are of balanced rows, see `Balanced`
        moved: whether deltas are distances from another point than the center, see `Deltas`
        written: as in `KeyMap`: key -> [shape, dtype, [[name, begin, sizes, strides, offset], ...]]
        checked: as in `KeyMap`
        dropped: of an orthonormal basis: per segment, [candidate, relative distance] of those that
            depend on earlier ones
        format: BASIS
    """

    bits: int
    basis: str
    normalize: str
    rows: int
    candidates: list[list[str]]
    kind: str
    info: dict[str, list[Any]]
    trained: dict[str, str]
    fixed: dict[str, str]
    copied: dict[str, str]
    aliases: dict[str, str]
    names: dict[str, str]
    segments: list[int]
    labels: list[str]
    chunk: int = 0
    constraint: str = "none"
    balanced: bool = False
    moved: bool = False
    written: dict[str, list[Any]] = field(default_factory=dict)
    checked: bool = True
    dropped: list[list[list[float]]] = field(default_factory=list)
    format: str = BASIS

    @property
    def shapes(self) -> list[torch.Size]:
        """Shapes of the trained tensors."""
        return [torch.Size(self.info[key][0]) for key in self.trained.values()]

    @property
    def numels(self) -> list[int]:
        """Number of weights of each trained tensor."""
        return [shape.numel() for shape in self.shapes]

    def as_json(self) -> dict[str, object]:
        """Plain values; what is trained as pairs, since their order is that of the codes."""
        return asdict(self) | {"trained": [list(pair) for pair in self.trained.items()]}

    @property
    def tensor_segments(self) -> Segments:
        """The segments of the trained tensors."""
        return Segments(self.labels, self.segments, self.chunk)

    @property
    def key_map(self) -> KeyMap:
        """Which tensor of the model is which of the sources."""
        return KeyMap(
            dict(self.trained),
            dict(self.fixed),
            dict(self.copied),
            dict(self.aliases),
            dict(self.names),
            {key: _parse_written(key, value) for key, value in self.written.items()},
            self.checked,
        )

    def tensors(self) -> dict[str, TensorInfo]:
        """Names, shapes and dtypes of the tensors in the file, the large ones first."""
        n, rows, L = len(self.candidates), self.rows, len(self.labels)
        tiles = tile_offsets(self.numels)[-1]
        trained = trained_count(self.constraint, n, rows, self.balanced)
        found = {
            "codes": TensorInfo((tiles, rows, 16 * self.bits), torch.uint8),
            "center": TensorInfo((sum(self.numels),), torch.float32),
            "scales": TensorInfo((tiles, rows), torch.float8_e4m3fn),
            "row_scale": TensorInfo((rows, L), torch.float32),
            "divisor": TensorInfo((rows, L), torch.float64),
            "center_weights": TensorInfo((n,), torch.float64),
            "coefficients": TensorInfo((trained, L), torch.float32),
        }
        if self.balanced:
            groups = len(self.tensor_segments.groups)
            found["mix"] = TensorInfo((groups, n, n), torch.float64)
            found["unit"] = TensorInfo((n,), torch.float64)
        if self.moved:
            found["origin"] = TensorInfo((n,), torch.float64)
        if self.basis == "orthonormal":
            found |= {
                "transform": TensorInfo((L, rows, n), torch.float64),
                "R": TensorInfo((L, n, rows), torch.float64),
                "scale": TensorInfo((L,), torch.float64),
            }
        for key in (self.fixed | self.copied).values():
            shape, dtype = self.info[key]
            found[f"state.{key}"] = TensorInfo(tuple(shape), unrounded(SAFETENSORS_DTYPES[dtype]))
        return found


def rows_of(basis: str, n: int) -> int:
    """Rows of a basis of n candidates; of an orthonormal one at most."""
    return n - 1 if basis == "differences" else n


def unrounded(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an average is kept until it is exported: float32 or float64."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def parse_contents(value: object) -> Contents:
    """Contents from parsed JSON; ValueError says what is wrong."""
    found = value.get("format") if isinstance(value, dict) else value
    if text := problem(found, BASIS):
        raise ValueError(text)
    assert isinstance(value, dict)  # nothing else has a version
    fields = set(Contents.__dataclass_fields__)
    # what early files do not have
    absent = {"chunk": 0, "constraint": "none", "balanced": False, "moved": False}
    absent |= {"written": {}, "checked": True}
    given: dict[str, Any] = absent | value
    if odd := sorted(fields ^ given.keys()):
        raise ValueError(
            f"metadata: {odd[0]!r} is {'missing' if odd[0] in fields else 'unexpected'}"
        )
    pairs = given["trained"]
    _want(_is_list(pairs, _is_pair), "trained", "pairs of a name and a key", pairs)
    _want(len({name for name, _ in pairs}) == len(pairs), "trained", "each name once", pairs)
    contents = Contents(**given | {"trained": dict(pairs)})
    # each of these relies on those before it
    _check_options(contents)
    _check_candidates(contents)
    _check_tensors(contents)
    _check_written(contents)
    _check_segments(contents)
    return contents


def _check_options(c: Contents) -> None:
    _want(c.bits in BITS and type(c.bits) is int, "bits", f"one of {BITS}", c.bits)
    _want(c.basis in BASES, "basis", f"one of {BASES}", c.basis)
    _want(c.constraint in CONSTRAINTS, "constraint", f"one of {CONSTRAINTS}", c.constraint)
    _want(c.normalize in NORMALIZE, "normalize", f"one of {NORMALIZE}", c.normalize)
    good = c.balanced is False or (
        c.balanced is True and c.constraint == "none" and c.basis != "orthonormal"
    )
    _want(good, "balanced", "true or false, and false for this basis", c.balanced)
    good = c.moved is False or (c.moved is True and c.basis == "deltas")
    _want(good, "moved", "true or false, and false for this basis", c.moved)


def _check_candidates(c: Contents) -> None:
    _want(isinstance(c.kind, str), "kind", "a text", c.kind)
    good = _is_list(c.candidates, _is_pair)
    _want(good, "candidates", "paths and fingerprints", c.candidates)
    n = len(c.candidates)
    _want(1 <= n <= MAX_ROWS, "candidates", f"1 to {MAX_ROWS}", n)
    good = type(c.rows) is int and 1 <= c.rows <= n
    good = good and (c.basis == "orthonormal" or c.rows == rows_of(c.basis, n))
    _want(good, "rows", "one per candidate or difference, or the rank", c.rows)


def _check_tensors(c: Contents) -> None:
    for name in ("fixed", "copied", "trained", "aliases", "names"):
        mapping = getattr(c, name)
        good = isinstance(mapping, dict) and all(map(is_text, mapping.values()))
        _want(good, name, "names", mapping)
    good = isinstance(c.info, dict) and all(map(_is_info, c.info.values()))
    _want(good, "info", "a shape and a dtype for each key", c.info)
    keys = [*c.trained.values(), *c.fixed.values(), *c.copied.values()]
    good = len(set(keys)) == len(keys) and set(keys) <= c.info.keys()
    _want(good, "keys", "each key in use once, with its shape", keys)
    _want(c.names.keys() == c.info.keys(), "names", "a name for each key", c.names)
    dtypes = [SAFETENSORS_DTYPES[c.info[key][1]] for key in c.trained.values()]
    good = bool(dtypes) and all(dtype.is_floating_point for dtype in dtypes)
    _want(good, "trained", "float tensors", c.trained)


def _check_written(c: Contents) -> None:
    _want(isinstance(c.written, dict), "written", "names", c.written)
    _want(isinstance(c.checked, bool), "checked", "true or false", c.checked)
    sizes = {name: tuple(c.info[key][0]) for key, name in c.names.items()}
    for key, value in c.written.items():
        _want(_is_written(value, sizes), "written", f"parts that fill {key[:100]!r}", value)


def _is_written(value: object, sizes: dict[str, tuple[int, ...]]) -> bool:
    """Whether this is a tensor [shape, dtype, parts] whose parts, if there are any, fill it."""
    if not isinstance(value, list) or len(value) != 3 or not _is_info(value[:2]):
        return False
    shape, _, parts = value
    if not _is_list(parts, lambda part: _is_part(part, shape, sizes)):
        return False
    return not parts or sum(math.prod(part[2]) for part in parts) == math.prod(shape)


def _is_part(part: object, shape: list[int], sizes: dict[str, tuple[int, ...]]) -> bool:
    """Whether this is [name, begin, sizes, strides, offset] of a part that is in both tensors."""
    if not isinstance(part, list) or len(part) != 5 or part[0] not in sizes:
        return False
    name, begin, own, strides, offset = part
    if not all(are_sizes(v) and isinstance(v, list) for v in (begin, own, strides)):
        return False
    if not are_sizes([offset]) or not len(begin) == len(own) == len(strides) == len(sizes[name]):
        return False
    within = all(b + s <= whole for b, s, whole in zip(begin, own, sizes[name], strict=True))
    return within and offset + span(own, strides) <= math.prod(shape)


def _parse_written(key: str, value: list[Any]) -> Written:
    """What was checked, as `KeyMap` has it."""
    shape, dtype, parts = value
    blocks = (
        (name, Block(tuple(begin), tuple(sizes), key, tuple(strides), offset))
        for name, begin, sizes, strides, offset in parts
    )
    return Written(TensorInfo(tuple(shape), SAFETENSORS_DTYPES[dtype]), tuple(blocks))


def written_json(written: Mapping[str, Written]) -> dict[str, list[Any]]:
    """What `Contents.written` holds."""
    return {
        key: [
            list(w.info.shape),
            DTYPE_NAMES[w.info.dtype],
            [
                [name, list(b.begin), list(b.sizes), list(b.strides), b.offset]
                for name, b in w.parts
            ],
        ]
        for key, w in written.items()
    }


def _check_segments(c: Contents) -> None:
    _want(
        _is_list(c.labels, is_text) and len(c.labels) >= 1, "labels", "names of segments", c.labels
    )
    num_segments = len(c.labels)
    good = _is_list(c.segments, lambda s: type(s) is int and 0 <= s < num_segments)
    good = good and len(c.segments) == len(c.trained)
    expected = f"an index below {num_segments} for each trained tensor"
    _want(good, "segments", expected, c.segments)
    good = type(c.chunk) is int and 0 <= c.chunk < 1 << 62 and c.chunk % TILE == 0
    good = good and (not c.chunk or _counts_up(c))
    expected = f"0, or a multiple of {TILE} that makes {num_segments} segments of the tensors"
    _want(good, "chunk", expected, c.chunk)
    n = len(c.candidates)
    good = _is_list(c.dropped, lambda pairs: _is_list(pairs, lambda p: _is_distance(p, n)))
    good = good and len(c.dropped) == (num_segments if c.basis == "orthonormal" else 0)
    _want(good, "dropped", "candidates and distances for each segment", c.dropped)


def _want(good: bool, name: str, expected: str, found: object) -> None:
    """ValueError unless this is good."""
    if not good:
        raise ValueError(f"metadata: {name}: expected {expected}, found {shown(found)}")


def _is_list(value: object, good: Callable[[Any], bool]) -> bool:
    """Whether this is a list of good items."""
    return isinstance(value, list) and all(map(good, value))


def _is_pair(value: object) -> bool:
    """Whether this is a list of two texts."""
    return isinstance(value, list) and len(value) == 2 and all(map(is_text, value))


def _is_info(value: object) -> bool:
    """Whether this is a list of a shape and the name of a dtype."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    shape, dtype = value
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_DTYPES:
        return False
    return isinstance(shape, list) and is_shape(shape)


def _is_distance(pair: object, n: int) -> bool:
    """Whether this is one of n candidates and its distance from the others' span."""
    if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not int:
        return False
    return 0 <= pair[0] < n and type(pair[1]) in (int, float) and 0 <= pair[1] < 1e9


def _counts_up(c: Contents) -> bool:
    """Whether segments are those that `chunk` makes, tensor after tensor."""
    ends = list(itertools.accumulate((-(-numel // c.chunk) for numel in c.numels), initial=0))
    return c.basis != "orthonormal" and [*c.segments, len(c.labels)] == ends
