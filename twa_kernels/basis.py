"""`PackedBasis`: n rows in a few bits a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .layout import tile_offsets
from .operands import BasisView, check_list, or_empty


@dataclass(frozen=True, eq=False)  # tensors have no truth value
class PackedBasis:
    """Basis P (n, D) in packed form; the layout is drawn in csrc/packing.h.

    value(i, column c of tile t) = row_scale[i, segment(t)] * scales[t, i] * level[code(t, i, c)]

    n rows, D columns, L segments; tiles of 128 columns, num_tiles of them.

    Attributes:
        codes: (num_tiles, n, 16 * bits) uint8.
        scales: (num_tiles, n) float8_e4m3fn.
        row_scale: (n, L) float32.
        tile_segment: (num_tiles,) int32 in [0, L).
        divisor: (n, L) float64: P[i] = (row i - center) / divisor[i, l] before quantisation; 0
            where that part is zero.
        shapes: shape of each tensor, in order.
        bits: 8, 4, 3, 2 or 1.
        numels: number of elements of each tensor.
    """

    codes: Tensor
    scales: Tensor
    row_scale: Tensor
    tile_segment: Tensor
    divisor: Tensor
    shapes: tuple[torch.Size, ...]
    bits: int
    numels: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "numels", tuple(shape.numel() for shape in self.shapes))

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.row_scale.shape[0]

    @property
    def num_segments(self) -> int:
        """Number of segments, L."""
        return self.row_scale.shape[1]

    @property
    def num_columns(self) -> int:
        """D, without the padding of the last tiles."""
        return sum(self.numels)

    @property
    def device(self) -> torch.device:
        """Where all tensors of the basis are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of the packed tensors: about n * D * (bits / 8 + 1 / 128)."""
        return sum(
            t.numel() * t.element_size()
            for t in (self.codes, self.scales, self.row_scale, self.tile_segment)
        )

    def __getstate__(self) -> dict[str, object]:
        # Pickle does not know float8.
        return self.__dict__ | {"scales": self.scales.view(torch.uint8)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"scales": state["scales"].view(torch.float8_e4m3fn)})
        self.__post_init__()

    def to(self, device: torch.device | str) -> PackedBasis:
        """Copy on another device; the basis itself where it is there already."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("codes", "scales", "row_scale", "tile_segment", "divisor")
        }
        return replace(self, **moved)

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, ...], int]:
        """What the ops take: codes, scales, row_scale, tile_segment, numels, bits.

        Scales as bytes, which more of PyTorch understands than float8.
        """
        scales = self.scales.view(torch.uint8)
        return self.codes, scales, self.row_scale, self.tile_segment, self.numels, self.bits

    @property
    def view(self) -> BasisView:
        """The same as backends are given it."""
        return BasisView(*self.operands)

    def takes(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether kernels take these tensors as they are.

        Args:
            tensors: one per tensor of the basis; None and one without elements count as absent.

        Returns:
            True if each is dense, of that tensor's size, on the basis's device, and float32,
            bfloat16 or float16.
        """
        try:
            given = or_empty(tensors, self.device)
            check_list("tensors", given, self.numels, self.device, "", absent=True)
        except (TypeError, ValueError):
            return False
        return True

    def gram(self, backend: str = "") -> Tensor:
        """Inner products of the dequantised rows within each segment, `P_l @ P_l.T`.

        Error, relative to the norms of both rows: below 1e-12 on CPUs; on GPUs exact per tile, then
        float32 sums over up to 1024 tiles.

        Args:
            backend: the one to run; "": the default of the device (registry.py).

        Returns:
            G (L, n, n) float64.

        Raises:
            RuntimeError: the backend does not run here, or a CUDA graph is being captured.
        """
        return torch.ops.twa_kernels.gram.default(*self.operands, backend)

    def select(self, k: int, count: int = 1) -> tuple[PackedBasis, slice]:
        """The basis of `count` tensors from k on alone, a view of the codes.

        Also returned: which segments of this basis its coefficients are.
        """
        offsets = tile_offsets(self.numels)
        at = slice(offsets[k], offsets[k + count])
        segment = self.tile_segment[at]
        first, last = (int(segment.min()), int(segment.max())) if len(segment) else (0, 0)
        columns = slice(first, last + 1)
        basis = PackedBasis(
            self.codes[at],
            self.scales[at],
            self.row_scale[:, columns].contiguous(),
            segment - first,
            self.divisor[:, columns].contiguous(),
            self.shapes[k : k + count],
            self.bits,
        )
        return basis, columns

    def __repr__(self) -> str:
        return (
            f"PackedBasis(n={self.n}, D={self.num_columns}, L={self.num_segments}, "
            f"bits={self.bits}, tensors={len(self.shapes)}, {self.nbytes / 1e6:.1f} MB, "
            f"{self.device})"
        )
