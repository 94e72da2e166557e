"""Tensors to addresses for the native module `_C`: C++ for CPUs (CUDA: cuda.py).

Argument checks happen in ops.py, before this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .reference import PROBES, TILE, bytes_to_codes, squared_error, tile_offsets

_import_error = ""
if TYPE_CHECKING:  # the module that _C.pyi describes; where it is not built, `_C` is None
    from . import _C
else:
    try:
        from . import _C
    except ImportError as error:
        # Reported by why_unusable(), never hidden: selecting this backend raises it.
        _C, _import_error = None, str(error)

T = TypeVar("T")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def why_unusable() -> str | None:
    """Reason why the module does not run here; None if it does."""
    if _C is None:
        return (
            f"the native module is not built ({_import_error}); "
            "run `pip install -e .` in the source tree"
        )
    if _C.cpu_isa() is None:
        return (
            "TWA_KERNELS_ISA asks for an instruction set that this machine lacks; "
            "expected portable, avx2 or avx512"
        )
    return None


def empty_for_streaming(
    shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.uint8
) -> Tensor:
    """Uninitialised tensor, on huge pages where the system gives them."""
    t = torch.empty(tuple(shape), dtype=dtype, device=device)
    if _C is not None and t.device.type == "cpu":
        _C.advise_huge_pages(t.data_ptr(), t.numel() * t.element_size())
    return t


def _addresses(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Addresses, and dtypes as numbers of DTYPES."""
    return [t.data_ptr() for t in tensors], [DTYPES[t.dtype] for t in tensors]


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous versions; only the tensors that are not get copied, one by one."""
    return [
        t.contiguous().resolve_neg() if not t.is_contiguous() or t.is_neg() else t for t in tensors
    ]


def _targets(out: Sequence[Tensor]) -> list[Tensor]:
    """What a kernel writes for `out`.

    The tensors themselves, or contiguous ones that `_write_back` then copies.
    """
    return [
        o if o.is_contiguous() else torch.empty(o.shape, dtype=o.dtype, device=o.device)
        for o in out
    ]


def _write_back(out: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copies what `_targets` made in place of a tensor of `out` into that tensor."""
    for o, t in zip(out, targets, strict=True):
        if o is not t:
            o.copy_(t)


#: tile_segment -> {key: what `kept` built}
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def kept(tile_segment: Tensor, key: tuple[object, ...], build: Callable[[], T]) -> T:
    """build() once per basis and key, kept as long as tile_segment lives and is not written to.

    The first item of the key names what is built: a key stands for one type.
    """
    of_basis: dict[tuple[object, ...], T] = _kept.setdefault(tile_segment, {})
    key = (*key, None if tile_segment.is_inference() else tile_segment._version)
    if key not in of_basis:
        refuse_capture(tile_segment.device)
        of_basis[key] = build()
    return of_basis[key]


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records what is done on the device's current stream.

    It keeps addresses, not tensors.
    """
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def refuse_reading_back(op: str, device: torch.device) -> None:
    """Raises RuntimeError under the capture of a CUDA graph, for ops that wait for the device."""
    if capturing(device):
        raise RuntimeError(
            f"{op}: reads results back from the device, which a CUDA graph cannot capture"
        )


def refuse_capture(device: torch.device) -> None:
    """Raises RuntimeError under the capture of a CUDA graph, for an op's first call.

    What the op prepares then waits for the device, which a CUDA graph cannot record.
    """
    if capturing(device):
        raise RuntimeError(
            "the first call with this basis (and these options) waits for the device, which a CUDA"
            " graph cannot capture: make the same call once before the capture"
        )


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Context in which `device` is the current one; none for CPU tensors.

    Those are here where a GPU's kernels run interpreted or emulated.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _basis(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    bits: int,
    module: ModuleType = _C,
) -> _C.Basis:
    return module.Basis(
        codes.data_ptr(),
        scales.data_ptr(),
        row_scale.data_ptr(),
        tile_segment.data_ptr(),
        row_scale.shape[0],
        len(tile_segment),
        row_scale.shape[1],
        bits,
    )


def average(rows: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    rows = _contiguous(rows)
    _C.average(
        *_addresses(rows), out.numel(), list(weights), out.data_ptr(), torch.get_num_threads()
    )


def pack(
    rows: Sequence[Tensor],
    center: Sequence[Tensor],
    numels: Sequence[int],
    tile_segment: Tensor,
    bits: int,
    codes: Tensor,
    scales: Tensor,
    sum_sq: Tensor,
    max_scale: Tensor,
    errors: Tensor | None,
    weights: Sequence[float] = (),
) -> tuple[int, int, int] | None:
    """Packs; returns (row, tensor, column) of a NaN or Inf, None if there is none.

    With `weights` the center is written, too: the rows' weighted average, made in the same read of
    the rows.
    """
    rows, center = _contiguous(rows), _contiguous(center)
    n, segments = sum_sq.shape
    return _C.pack(
        *_addresses(rows),
        *_addresses(center),
        list(numels),
        tile_segment.data_ptr(),
        n,
        segments,
        bits,
        codes.data_ptr(),
        scales.data_ptr(),
        sum_sq.data_ptr(),
        max_scale.data_ptr(),
        0 if errors is None else errors.data_ptr(),
        list(weights),
        torch.get_num_threads(),
    )


def unpack(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    numels: Sequence[int],
    bits: int,
) -> list[Tensor]:
    out = [
        empty_for_streaming((row_scale.shape[0], numel), dtype=torch.float32) for numel in numels
    ]
    basis = _basis(codes, scales, row_scale, tile_segment, bits)
    _C.unpack(basis, [o.data_ptr() for o in out], list(numels), torch.get_num_threads())
    return out


def project(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    grads: Sequence[Tensor],
    numels: Sequence[int],
    bits: int,
) -> Tensor:
    grads = _contiguous(grads)
    addresses, dtypes = _addresses(grads)  # an empty tensor's address is 0: an absent gradient
    c = torch.empty(row_scale.shape)
    _C.project(
        _basis(codes, scales, row_scale, tile_segment, bits),
        addresses,
        list(numels),
        dtypes,
        c.data_ptr(),
        torch.get_num_threads(),
    )
    return c


def reconstruct(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    x: Tensor,
    center: Sequence[Tensor],
    numels: Sequence[int],
    bits: int,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    center, x = _contiguous(center), x.contiguous()
    if out is None:
        out = [
            empty_for_streaming((numel,), dtype=center[k].dtype if center else torch.float32)
            for k, numel in enumerate(numels)
        ]
    targets = _targets(out)
    _C.reconstruct(
        _basis(codes, scales, row_scale, tile_segment, bits),
        x.data_ptr(),
        *_addresses(center),
        [t.data_ptr() for t in targets],
        list(numels),
        [DTYPES[t.dtype] for t in targets],
        torch.get_num_threads(),
    )
    _write_back(out, targets)
    return list(out)


def step(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    grads: Sequence[Tensor],
    x: Tensor,
    state: Sequence[Tensor],
    center: Sequence[Tensor],
    numels: Sequence[int],
    bits: int,
    rule: str,
    options: Sequence[float],
    count: int,
    out: Sequence[Tensor],
) -> Tensor:
    grads, center = _contiguous(grads), _contiguous(center)
    targets = _targets(out)
    c = torch.empty(row_scale.shape)
    first, second = ([s.data_ptr() for s in state] + [0, 0])[:2]
    _C.step(
        _basis(codes, scales, row_scale, tile_segment, bits),
        *_addresses(grads),
        rule == "adamw",
        list(options),
        count,
        x.data_ptr(),
        first,
        second,
        *_addresses(center),
        [t.data_ptr() for t in targets],
        list(numels),
        [DTYPES[t.dtype] for t in targets],
        c.data_ptr(),
        torch.get_num_threads(),
    )
    _write_back(out, targets)
    return c


def finish_pack(
    rows: Sequence[Tensor],
    center: Sequence[Tensor],
    numels: Sequence[int],
    tile_segment: Tensor,
    bits: int,
    codes: Tensor,
    scales: Tensor,
    sum_sq: Tensor,
    max_scale: Tensor,
    errors: Tensor | None,
    squares: Tensor,
) -> tuple[int, int, int] | None:
    """What a GPU's pack leaves to PyTorch.

    squares (num_tiles, n) float64 holds squared norms, NaN where a group was not finite.
    """
    n = sum_sq.shape[0]
    if squares.isnan().any():
        for at, row in enumerate(rows):
            k, i = divmod(at, n)
            v = row.reshape(-1).float() - (center[k].reshape(-1).float() if center else 0.0)
            if not torch.isfinite(v).all():
                return i, k, int(torch.nonzero(~torch.isfinite(v))[0])
    if errors is not None:
        _add_errors(
            rows, center, numels, tile_offsets(numels), bits, codes, scales, squares, errors
        )
    # Runs of one segment are summed as slices: a fixed order, without float atomics.
    values, counts = torch.unique_consecutive(tile_segment, return_counts=True)
    first = 0
    for segment, count in zip(values.tolist(), counts.tolist(), strict=True):
        sum_sq[:, segment] += squares[first : first + count].sum(0)
        top = scales[first : first + count].float().amax(0)
        max_scale[:, segment] = torch.maximum(max_scale[:, segment], top)
        first += count
    return None


def _add_errors(
    rows: Sequence[Tensor],
    center: Sequence[Tensor],
    numels: Sequence[int],
    offsets: Sequence[int],
    bits: int,
    codes: Tensor,
    scales: Tensor,
    squares: Tensor,
    errors: Tensor,
) -> None:
    """Adds quantisation errors, from the packed bytes, a row at a time, in PyTorch.

    For backends whose kernel does not count them.
    """
    for k, numel in enumerate(numels):
        n, at = codes.shape[1], slice(offsets[k], offsets[k + 1])
        valid = (
            numel - TILE * torch.arange(offsets[k + 1] - offsets[k], device=codes.device)
        ).clamp(max=TILE)
        for i in range(n):
            v = rows[k * n + i].reshape(-1).float() - (
                center[k].reshape(-1).float() if center else 0.0
            )
            v = torch.nn.functional.pad(v, (0, len(valid) * TILE - numel)).view(-1, TILE)
            errors[k, 0] += squared_error(
                v, bytes_to_codes(codes[at, i], bits), scales[at, i].float(), valid, bits
            )
        errors[k, 1] += squares[at].sum()


def gram(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    numels: Sequence[int],
    bits: int,
) -> Tensor:
    """Gram matrices from blocks of 64 tiles, dequantised to float32.

    Multiplied and summed in float64.
    """
    n, num_segments = row_scale.shape
    total = torch.zeros(num_segments, n, n, dtype=torch.float64)
    offsets = tile_offsets(numels)
    for k, numel in enumerate(numels):
        for begin in range(offsets[k], offsets[k + 1], 64):
            at = slice(begin, min(begin + 64, offsets[k + 1]))
            # Without the padding of the last tile.
            columns = min(64 * TILE, numel - (begin - offsets[k]) * TILE)
            (rows,) = unpack(codes[at], scales[at], row_scale, tile_segment[at], [columns], bits)
            first = 0
            for l, tiles in zip(
                *(
                    v.tolist()
                    for v in torch.unique_consecutive(tile_segment[at], return_counts=True)
                ),
                strict=True,
            ):
                p = rows[:, first * TILE : (first + tiles) * TILE].double()
                total[l] += p @ p.T
                first += tiles
    return total


def orthonormalize_pass(
    rows: Sequence[Tensor],
    center: Sequence[Tensor],
    numels: Sequence[int],
    parent: Tensor,
    transform: Tensor | None,
    probes: Tensor | None,
    first: int,
    fast: bool,
    out: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    rows, center = _contiguous(rows), _contiguous(center)
    n, r = len(parent), 0 if transform is None else len(transform)
    m = n if transform is None else r
    gram = torch.empty(m, PROBES if out else m, dtype=torch.float64)
    norms = torch.empty(n, dtype=torch.float64)
    _C.orthonormalize_pass(
        *_addresses(rows),
        *_addresses(center),
        list(numels),
        n,
        parent.data_ptr(),
        0 if transform is None else transform.data_ptr(),
        r,
        0 if probes is None else probes.data_ptr(),
        first,
        fast,
        *_addresses(out),
        gram.data_ptr(),
        norms.data_ptr(),
        torch.get_num_threads(),
    )
    return gram, norms
