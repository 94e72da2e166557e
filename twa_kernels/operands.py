"""What the backends are given: operands with names, checked once.

`torch.library` knows flat lists of tensors and numbers only. Behind that boundary an op's operands
are one of these views and the lists of the model's tensors. Every rule about them is written here
once, for real and for fake tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from . import native
from .layout import FLOATS, MAX_ROWS, check_bits, tile_offsets, total_tiles

T = TypeVar("T")

#: Gaussian vectors of orthonormalize's certificate
PROBES = 6


@dataclass(frozen=True)
class BasisView:
    """A packed basis (csrc/packing.h): n rows, tensors of `numels` elements, L segments.

    Attributes:
        codes: (num_tiles, n, 16 * bits) uint8.
        scales: (num_tiles, n) uint8, the bits of e4m3.
        row_scale: (n, L) float32.
        tile_segment: (num_tiles,) int32.
        numels: number of elements of each tensor; tensor k starts at tile tile_offsets(numels)[k].
        bits: 8, 4, 3, 2 or 1.
    """

    codes: Tensor
    scales: Tensor
    row_scale: Tensor
    tile_segment: Tensor
    numels: tuple[int, ...]
    bits: int

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.row_scale.shape[0]

    @property
    def num_segments(self) -> int:
        """Number of segments, L."""
        return self.row_scale.shape[1]

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.codes.device

    def check(self) -> None:
        """Raises ValueError or TypeError where tensors do not fit each other."""
        check_bits(self.bits)
        shape = self.row_scale.shape
        check_rows("row_scale", shape)
        n, tiles, device = shape[0], total_tiles(self.numels), self.codes.device
        check_tensor("codes", self.codes, (tiles, n, 16 * self.bits), torch.uint8, device)
        check_tensor("scales", self.scales, (tiles, n), torch.uint8, device)
        check_tensor("row_scale", self.row_scale, shape, torch.float32, device)
        check_tensor("tile_segment", self.tile_segment, (tiles,), torch.int32, device)

    def check_coefficients(self, x: Tensor) -> None:
        """Raises ValueError or TypeError unless x is (n, L) float32 on the basis's device."""
        if x.shape != self.row_scale.shape:
            raise ValueError(
                f"x: expected shape (n, L) = {tuple(self.row_scale.shape)}, found {tuple(x.shape)}"
            )
        if x.dtype != torch.float32:
            raise TypeError(f"x: expected torch.float32, found {x.dtype}")
        if x.device != self.device:
            raise ValueError(f"x: expected device {self.device}, found {x.device}")


@dataclass(frozen=True)
class PackArgs:
    """Rows to pack, where the codes go, and what is summed over calls.

    Attributes:
        rows: the n rows of tensor 0, then those of tensor 1, ...
        center: one tensor per tensor, or none: subtracted from each row.
        numels: number of elements of each tensor.
        tile_segment: (tiles,) int32.
        bits: 8, 4, 3, 2 or 1.
        codes: (tiles, n, 16 * bits) uint8, written.
        scales: (tiles, n) bfloat16, written: 4 significant bits.
        sum_sq: (n, L) float64: squared norms are added.
        max_scale: (n, L) float32: maximised with the scales.
    """

    rows: Sequence[Tensor]
    center: Sequence[Tensor]
    numels: tuple[int, ...]
    tile_segment: Tensor
    bits: int
    codes: Tensor
    scales: Tensor
    sum_sq: Tensor
    max_scale: Tensor

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.sum_sq.shape[0]

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.codes.device

    def check(self, backend: str) -> None:
        """Raises ValueError or TypeError where tensors do not fit each other."""
        check_bits(self.bits)
        check_rows("sum_sq", self.sum_sq.shape)
        n, device, tiles = self.n, self.device, total_tiles(self.numels)
        check_list("rows", self.rows, repeated(self.numels, n), device, backend)
        if self.center:
            check_list("center", self.center, self.numels, device, backend)
        check_tensor("tile_segment", self.tile_segment, (tiles,), torch.int32, device)
        check_tensor("codes", self.codes, (tiles, n, 16 * self.bits), torch.uint8, device)
        check_tensor("scales", self.scales, (tiles, n), torch.bfloat16, device)
        check_tensor("sum_sq", self.sum_sq, self.sum_sq.shape, torch.float64, device)
        check_tensor("max_scale", self.max_scale, self.sum_sq.shape, torch.float32, device)


@dataclass(frozen=True)
class RecordArgs:
    """Weights to record, what they are coded against, and where the codes go.

    Attributes:
        weights: one tensor per tensor of the model.
        reference: float32, as many elements each; updated.
        bits: 8, 4, 3, 2 or 1.
        codes: (tiles, 16 * bits) uint8, written.
        scales: (tiles,) bfloat16, written: 4 significant bits.
        bad: () int32, written: not 0 where a weight is NaN, Inf or of 2^126, and nothing else is
            written then.
    """

    weights: Sequence[Tensor]
    reference: Sequence[Tensor]
    bits: int
    codes: Tensor
    scales: Tensor
    bad: Tensor

    @property
    def numels(self) -> tuple[int, ...]:
        """Number of elements of each tensor."""
        return tuple(t.numel() for t in self.weights)

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.codes.device

    def check(self, backend: str) -> None:
        """Raises ValueError or TypeError where tensors do not fit each other."""
        check_bits(self.bits)
        numels, device = self.numels, self.device
        tiles = tile_offsets(numels)[-1]
        check_list("weights", self.weights, numels, device, backend)
        check_float_list("reference", self.reference, numels, device)
        check_tensor("codes", self.codes, (tiles, 16 * self.bits), torch.uint8, device)
        check_tensor("scales", self.scales, (tiles,), torch.bfloat16, device)
        check_tensor("bad", self.bad, (), torch.int32, device)


@dataclass(frozen=True)
class ReplayArgs:
    """Recorded differences, and what their weighted sum is added to.

    Attributes:
        out: float32, one tensor per tensor of the model, or some columns of it from a multiple of
            128 on; updated.
        codes: for each row (tiles, 16 * bits) uint8.
        scales: for each row (tiles,) bfloat16.
        coefficients: of the rows, each rounded to float32.
        bits: 8, 4, 3, 2 or 1.
    """

    out: Sequence[Tensor]
    codes: Sequence[Tensor]
    scales: Sequence[Tensor]
    coefficients: Sequence[float]
    bits: int

    @property
    def numels(self) -> tuple[int, ...]:
        """Number of elements of each tensor."""
        return tuple(t.numel() for t in self.out)

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.out[0].device if self.out else torch.device("cpu")

    def check(self, backend: str) -> None:
        """Raises ValueError or TypeError where tensors do not fit each other."""
        check_bits(self.bits)
        rows, tiles = len(self.coefficients), tile_offsets(self.numels)[-1]
        if rows > MAX_ROWS:
            raise ValueError(f"coefficients: expected at most {MAX_ROWS} rows, found {rows}")
        if len(self.codes) != rows or len(self.scales) != rows:
            raise ValueError(
                f"codes, scales: expected {rows} of each, one per coefficient, "
                f"found {len(self.codes)} and {len(self.scales)}"
            )
        check_float_list("out", self.out, self.numels, self.device)
        for r in range(rows):
            name = f"codes[{r}]"
            check_tensor(name, self.codes[r], (tiles, 16 * self.bits), torch.uint8, self.device)
            check_tensor(f"scales[{r}]", self.scales[r], (tiles,), torch.bfloat16, self.device)


@dataclass(frozen=True)
class StepArgs:
    """An optimizer's update of the coefficients: its rule, its numbers, its tensors.

    Attributes:
        rule: "sgd" or "adamw", as torch.optim defines them.
        count: number of this step, 1 for the first; 0 if `steps_before` has it.
        x: (n, L) float32, updated in place.
        first: (n, L) float32, momentum buffer or first moment; None if the rule keeps none.
        second: (n, L) float32, second moment; None if the rule keeps none.
        steps_before: () float32: the number of steps before this one, on the device; or None.
    """

    rule: str
    maximize: bool
    lr: float
    weight_decay: float
    momentum: float
    dampening: float
    nesterov: bool
    beta1: float
    beta2: float
    eps: float
    count: int
    x: Tensor
    first: Tensor | None
    second: Tensor | None
    steps_before: Tensor | None


@dataclass(frozen=True)
class PassArgs:
    """What one read of the rows does for block Gram-Schmidt.

    V = rows minus parents (or minus the center); V = transform @ V; rounded into `out`.

    Attributes:
        rows: the n rows of tensor 0, then those of tensor 1, ...
        center: one tensor per tensor, or none.
        numels: number of elements of each tensor.
        parent: (n,) int32: row to subtract from each row; -1: the center.
        transform: (r, n) float64, or None.
        probes: (6, r) float64, with `out`.
        first: rows of V below it are neither written nor in the Gram matrix.
        fast: float32 is exact enough.
        out: r tensors per tensor, written; or none.
    """

    rows: Sequence[Tensor]
    center: Sequence[Tensor]
    numels: tuple[int, ...]
    parent: Tensor
    transform: Tensor | None
    probes: Tensor | None
    first: int
    fast: bool
    out: Sequence[Tensor]

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.parent)

    @property
    def rank(self) -> int:
        """Rows of V: r with a transform, else n."""
        return self.n if self.transform is None else len(self.transform)

    @property
    def gram_shape(self) -> tuple[int, int]:
        """V V^T, or with `out` V V^T probes^T."""
        return self.rank, PROBES if self.out else self.rank

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.parent.device

    def check(self, backend: str) -> None:
        """Raises ValueError or TypeError where tensors do not fit each other."""
        shape = tuple(self.parent.shape)
        if len(shape) != 1 or not 1 <= shape[0] <= MAX_ROWS:
            raise ValueError(
                f"parent: expected shape (n,) with 1 <= n <= {MAX_ROWS}, found {shape}"
            )
        n, device = self.n, self.device
        check_tensor("parent", self.parent, (n,), torch.int32, device)
        check_list("rows", self.rows, repeated(self.numels, n), device, backend)
        if self.center:
            check_list("center", self.center, self.numels, device, backend)
        if self.transform is not None:
            check_rows("transform", self.transform.shape)
        r = self.rank
        if self.transform is not None:
            check_tensor("transform", self.transform, (r, n), torch.float64, device)
        if (self.probes is None) != (not self.out) or (self.out and self.transform is None):
            raise ValueError("orthonormalize: expected out, transform and probes together")
        if self.probes is not None:
            check_tensor("probes", self.probes, (PROBES, r), torch.float64, device)
            check_list("out", self.out, repeated(self.numels, r), device, backend)
            for k, o in enumerate(self.out):
                if not o.is_contiguous():
                    raise ValueError(
                        f"out[{k}]: expected a contiguous tensor, found strides {o.stride()}"
                    )
        if not 0 <= self.first <= r:
            raise ValueError(f"first: expected 0 to {r}, found {self.first}")


# Rules --------------------------------------------------------------------------------------------


def as_list(tensors: Tensor | Sequence[T]) -> list[Tensor | T]:
    """A single tensor counts as a list of one."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def or_empty(tensors: Sequence[Tensor | None], device: torch.device) -> list[Tensor]:
    """The tensors; absent ones are empty, which is what the ops know."""
    empty = torch.empty(0, dtype=torch.float32, device=device)
    return [empty if t is None else t for t in tensors]


def check_rows(name: str, shape: Sequence[int]) -> None:
    """Raises ValueError unless this is the shape of a matrix with as many rows as kernels take."""
    if len(shape) != 2 or not 1 <= shape[0] <= MAX_ROWS or shape[1] < 1:
        raise ValueError(
            f"{name}: expected a matrix of 1 to {MAX_ROWS} rows and at least 1 column, found"
            f" shape {tuple(shape)}"
        )


def repeated(numels: Sequence[int], times: int) -> tuple[int, ...]:
    """Each of these numbers so many times in a row."""
    return tuple(numel for numel in numels for _ in range(times))


def check_is_tensor(name: str, given: object) -> None:
    """TypeError unless it is one; an op's own message would hold all of a list."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor, found {type(given).__name__}")


def check_tensor(
    name: str, t: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Raises ValueError or TypeError unless t is contiguous and as the other arguments say."""
    if t.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, found {t.dtype}")
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, found {tuple(t.shape)}")
    if t.device != device:
        raise ValueError(f"{name}: expected device {device}, found {t.device}")
    if not t.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, found strides {t.stride()}")


def check_list(
    name: str,
    tensors: Sequence[Tensor],
    numels: Sequence[int],
    device: torch.device,
    backend: str,
    absent: bool = False,
) -> None:
    """Raises ValueError or TypeError unless there is one dense tensor of each size.

    absent: a tensor without elements stands for one that is not there.
    """
    if len(tensors) != len(numels):
        raise ValueError(
            f"{name}: expected {len(numels)} tensors, one per tensor of the basis, "
            f"found {len(tensors)}"
        )
    # The usual case first, and fast: this runs for every tensor of every call.
    if native.are_usual(tensors, numels, device, absent):
        return
    dtypes = (*FLOATS, torch.float64) if backend == "reference" else FLOATS
    for k, (t, numel) in enumerate(zip(tensors, numels, strict=True)):
        if absent and t.numel() == 0:
            continue
        if t.numel() != numel:
            raise ValueError(
                f"{name}[{k}]: expected {numel} elements, "
                f"found shape {tuple(t.shape)} with {t.numel()}"
            )
        if t.dtype not in dtypes:
            raise TypeError(f"{name}[{k}]: expected one of {dtypes}, found {t.dtype}")
        if t.device != device:
            raise ValueError(f"{name}[{k}]: expected device {device}, found {t.device}")
        if t.layout != torch.strided:
            raise TypeError(
                f"{name}[{k}]: expected a dense (strided) tensor, found layout {t.layout}"
            )


def check_float_list(
    name: str, tensors: Sequence[Tensor], numels: Sequence[int], device: torch.device
) -> None:
    """Raises ValueError or TypeError unless there is a contiguous float32 tensor of each size."""
    if len(tensors) != len(numels):
        raise ValueError(f"{name}: expected {len(numels)} tensors, found {len(tensors)}")
    for k, (t, numel) in enumerate(zip(tensors, numels, strict=True)):
        if t.numel() != numel:
            raise ValueError(f"{name}[{k}]: expected {numel} elements, found {t.numel()}")
        check_tensor(f"{name}[{k}]", t, t.shape, torch.float32, device)


def check_disjoint(tensors: Sequence[Tensor], name: str = "out") -> None:
    """Raises ValueError if two of the tensors, which are all written, share memory."""
    if len(tensors) < 2:
        return
    if shared := native.first_shared(tensors):
        raise ValueError(
            f"{name}[{min(shared)}] and {name}[{max(shared)}] share memory: "
            "pass each tied weight once"
        )
