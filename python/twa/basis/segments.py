"""`Segments`: which columns share coefficients, from whole models down to parts of a tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twa_kernels.layout import TILE, num_tiles

from ..io.errors import TwaError

Granularity = str | int | Mapping[str, object] | Callable[[str], object]
GRANULARITIES = "model, block, tensor, fine, or a number of weights that is a multiple of 128"
FINE_SEGMENTS = 4096  # at most, for granularity "fine"


def parse_granularity(text: str) -> str | int:
    """The granularity that a command line names; TwaError if it is none."""
    if text in ("model", "block", "tensor", "fine"):
        return text
    if text.isascii() and text.isdigit() and int(text) and int(text) % TILE == 0:
        return int(text)
    raise TwaError(f"expected {GRANULARITIES}", f"granularity {text!r}")


@dataclass(frozen=True)
class Segments:
    """Which columns share coefficients.

    Attributes:
        labels: names of the L segments
        first: for each trained tensor its segment, or with `chunk` the first of its own
        chunk: 0; or so many weights of a tensor, in the order in which they lie in memory, make one
            segment (its last one may be shorter)
    """

    labels: list[str]
    first: list[int]
    chunk: int = 0

    @property
    def groups(self) -> list[int]:
        """How many segments each group has, in order: those of a tensor, or one of several."""
        count = len(self.labels)
        if not self.chunk:
            return [1] * count
        firsts = sorted({first for first in self.first if first < count})
        return [end - first for first, end in itertools.pairwise([*firsts, count])]

    def of_tensor(self, k: int, numel: int) -> range:
        """The segments of tensor k, which has so many weights."""
        first = self.first[k]
        return range(first, first + (-(-numel // self.chunk) if self.chunk else 1))

    def of_tiles(self, numels: Sequence[int]) -> Tensor:
        """The segment of each group of 128 weights, (groups,) int32.

        Args:
            numels: weights of each tensor
        """
        width = self.chunk // TILE if self.chunk else max(1, *map(num_tiles, numels))
        of_each = (
            first + torch.arange(num_tiles(numel), dtype=torch.int32, device="cpu") // width
            for first, numel in zip(self.first, numels, strict=True)
        )
        return torch.cat(list(of_each))


def segments_of(names: Sequence[str], numels: Sequence[int], granularity: Granularity) -> Segments:
    """The segments of trained tensors.

    Args:
        names: of the tensors
        numels: weights of each of them
        granularity: see `Subspace.from_candidates`

    Raises:
        TwaError: granularity is none of what it can be
    """
    if granularity == "fine":
        granularity = TILE
        while sum(-(-numel // granularity) for numel in numels) > max(FINE_SEGMENTS, len(numels)):
            granularity *= 2
    if isinstance(granularity, int) and not isinstance(granularity, bool):
        if granularity < 1 or granularity % TILE:
            raise TwaError(
                f"granularity: expected a multiple of {TILE} weights, found {granularity}"
            )
        labels: list[str] = []
        first: list[int] = []
        for name, numel in zip(names, numels, strict=True):
            first.append(len(labels))
            ends = [(a, min(a + granularity, numel)) for a in range(0, numel, granularity)]
            labels += [f"{name}[{a}:{b}]" for a, b in ends]
        return Segments(labels, first, granularity)
    of_tensor = segment_labels(list(names), granularity)
    order = {label: l for l, label in enumerate(dict.fromkeys(of_tensor))}
    return Segments([str(label) for label in order], [order[label] for label in of_tensor])


def segment_labels(names: list[str], granularity: Granularity) -> list[object]:
    """The label of each parameter's segment.

    Args:
        names: of the parameters
        granularity: "model", "block" (the name up to its first number, else its module), "tensor",
            a mapping from parameter name to label, or a function
    """
    if granularity == "model":
        return ["model"] * len(names)
    if granularity == "tensor":
        return list(names)
    if granularity == "block":
        return [_block_of(name) for name in names]
    if isinstance(granularity, Mapping):
        if missing := [name for name in names if name not in granularity]:
            raise TwaError(
                f"granularity: the mapping has no segment for parameter {missing[0]!r}"
                f" ({len(missing)} in all)"
            )
        return [granularity[name] for name in names]
    if callable(granularity):
        return [granularity(name) for name in names]
    raise TwaError(
        "granularity: expected 'model', 'block', 'tensor', 'fine', a number of weights, a mapping"
        f" or a function, found {granularity!r}"
    )


def _block_of(name: str) -> str:
    """The block of a parameter: its name up to the first number, else its module.

    "layers.3.attn.weight" is in "layers.3", "embed.weight" in "embed".
    """
    parts = name.split(".")
    end = next((k for k, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: end + 1]) or name
