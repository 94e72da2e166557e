"""Tensors to addresses for the CUDA C++ kernels (csrc/cuda).

Operands as in ops.py, which has checked them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import native
from .native import (
    DTYPES,
    _addresses,
    _contiguous,
    _targets,
    _write_back,
    capturing,
    finish_pack,
    kept,
    on_device,
    refuse_capture,
)
from .reference import PROBES, tile_offsets

#: the native module; tests put in its place the same kernels compiled for a CPU (tests/emulator)
module = native._C


def why_unusable() -> str | None:
    """Reason why the CUDA kernels do not run here; None if they do."""
    if native._C is None:
        return native.why_unusable()
    if not module.with_cuda:
        return "built without CUDA (no nvcc was found, or TWA_CUDA=off)"
    if module.cuda_device_count() == 0:
        return "no CUDA device on this machine"
    return _no_code_for_device()


def _has_code_for(device: int) -> bool:
    """Whether something was compiled that runs on devices of this number (90 for sm_90).

    Machine code runs on devices of its major version and no lower minor one; code that has PTX (no
    "-real") runs on every later device.
    """
    for architecture in module.cuda_architectures.split():
        number = int("".join(c for c in architecture if c.isdigit()))
        if number <= device and (number // 10 == device // 10 or "-real" not in architecture):
            return True
    return False


@functools.cache
def _no_code_for_device() -> str | None:
    """Reason, if no device of this machine has code; None if one has.

    Every device is asked, not only the current one. A launch on one without code, beside one that
    has it, is refused by CUDA, by name.
    """
    if not torch.cuda.is_available():
        return None
    capabilities = [torch.cuda.get_device_capability(k) for k in range(torch.cuda.device_count())]
    devices = sorted({10 * major + minor for major, minor in capabilities})
    if any(_has_code_for(device) for device in devices):
        return None
    built = module.cuda_architectures.replace(" ", ", sm_")
    names = [str(device) for device in devices]
    found = "the device is sm_" if len(devices) == 1 else "the devices are sm_"
    return (
        f"compiled for sm_{built}, {found}{', sm_'.join(names)}: "
        f"build with TWA_CUDA_ARCHITECTURES={';'.join(names)}"
    )


def _place(device: torch.device) -> tuple[int, int]:
    """Device number and stream."""
    if device.type != "cuda":  # emulated
        return 0, 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.current_stream(device).cuda_stream


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def tensor_table(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """(tensors, 2) int64 on the device: address and dtype number, 0 for an empty tensor.

    A kernel whose arguments they are writes the table, so that no memory of the host has to outlive
    the call. Training loops pass the same tensors again and again, so most calls write nothing. A
    CUDA graph gets a table of its own, which every replay writes, since it knows only its address.

    The caller must hold the table until its kernel is launched: memory of a table that nobody holds
    goes to the next one.
    """
    entries = tuple(v for t in tensors for v in (t.data_ptr() if t.numel() else 0, DTYPES[t.dtype]))
    if capturing(device):
        return _write_table(entries, device)
    return _tensor_table(entries, device, _place(device)[1])


@functools.lru_cache(maxsize=64)
def _tensor_table(entries: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """Table of these entries, one per stream.

    The kernel that writes it is not waited for, and only its own stream is sure to come after it.
    """
    return _write_table(entries, device)


def _write_table(entries: tuple[int, ...], device: torch.device) -> Tensor:
    table = torch.empty(len(entries) // 2, 2, dtype=torch.int64, device=device)
    module.table_cuda(list(entries), table.data_ptr(), *_place(device))
    return table


@dataclass(frozen=True)
class Work:
    """Work items of one basis (csrc/twa.h, DeviceWork), on its device."""

    arrays: list[Tensor]  # keeps what `native` points to
    host: native._C.HostWork
    native: native._C.Work
    items: int
    groups: int
    #: window -> order of a step's tasks, None where it cannot be fused
    tasks: dict[int, Tensor | None]


def _build(tile_segment: Tensor, numels: Sequence[int], num_segments: int, bits: int) -> Work:
    segments = tile_segment.cpu()
    host = module.HostWork(list(numels), segments.data_ptr(), num_segments, bits)
    dtypes = [torch.int32, torch.int64, *[torch.int32] * 5, torch.int64]
    arrays = [
        torch.frombuffer(bytearray(b), dtype=d) if b else torch.empty(0, dtype=d)
        for b, d in zip(host.arrays, dtypes, strict=True)
    ]
    arrays.insert(7, torch.tensor(list(numels), dtype=torch.int64))
    items, groups = len(arrays[0]), len(arrays[5]) - 1
    arrays = [a.to(tile_segment.device) for a in arrays]  # waits: used by every stream from here on
    view = module.Work([a.data_ptr() for a in arrays], items, groups)
    return Work(arrays, host, view, items, groups, {})


def work_items(tile_segment: Tensor, numels: Sequence[int], num_segments: int, bits: int) -> Work:
    """Work items of a basis, made on the first call.

    That call reads tile_segment back, which waits for the device.
    """
    key = ("cuda", tuple(numels), num_segments, bits)
    return kept(tile_segment, key, lambda: _build(tile_segment, numels, num_segments, bits))


def _basis(
    codes: Tensor, scales: Tensor, row_scale: Tensor, tile_segment: Tensor, bits: int
) -> native._C.Basis:
    if codes.data_ptr() % 16:
        raise ValueError(
            f"codes begin at address {codes.data_ptr():#x}, expected a multiple of 16, "
            "which asynchronous copies need: clone() them"
        )
    return native._basis(codes, scales, row_scale, tile_segment, bits, module)


def project(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    grads: Sequence[Tensor],
    numels: Sequence[int],
    bits: int,
) -> Tensor:
    device, (n, num_segments) = codes.device, row_scale.shape
    grads = _contiguous(grads)
    work = work_items(tile_segment, numels, num_segments, bits)
    c = torch.empty_like(row_scale)
    partial = torch.empty(work.items, n, device=device)
    sums = torch.empty(work.groups, n, dtype=torch.float64, device=device)
    with on_device(device):
        grad_table = tensor_table(grads, device)
        module.project_cuda(
            _basis(codes, scales, row_scale, tile_segment, bits),
            grad_table.data_ptr(),
            work.native,
            partial.data_ptr(),
            sums.data_ptr(),
            c.data_ptr(),
            *_place(device),
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
    device, (n, num_segments) = codes.device, row_scale.shape
    if out is None:
        out = [
            codes.new_empty(numel, dtype=center[k].dtype if center else torch.float32)
            for k, numel in enumerate(numels)
        ]
    targets, center, x = _targets(out), _contiguous(center), x.contiguous()
    work = work_items(tile_segment, numels, num_segments, bits)
    x_rows = torch.empty(num_segments, n, device=device)
    with on_device(device):
        center_table = tensor_table(center, device) if center else None
        target_table = tensor_table(targets, device)
        module.reconstruct_cuda(
            _basis(codes, scales, row_scale, tile_segment, bits),
            x.data_ptr(),
            _address(center_table),
            target_table.data_ptr(),
            work.native,
            x_rows.data_ptr(),
            *_place(device),
        )
    _write_back(out, targets)
    return list(out)


@functools.lru_cache(maxsize=256)
def _window(n: int, bits: int, device: int) -> int:
    return module.step_window(n, bits, device)


def step_tasks(work: Work, window: int, device: torch.device) -> Tensor | None:
    """Order of a fused step's tasks on the device; None: the step runs as separate kernels."""
    if window not in work.tasks:
        refuse_capture(device)
        order = bytearray(work.host.tasks(window))
        work.tasks[window] = (
            torch.frombuffer(order, dtype=torch.int32).to(device) if order else None
        )
    return work.tasks[window]


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
    device, (n, num_segments) = codes.device, row_scale.shape
    grads, center, targets = _contiguous(grads), _contiguous(center), _targets(out)
    work = work_items(tile_segment, numels, num_segments, bits)
    c = torch.empty_like(row_scale)
    with on_device(device):
        number, stream = _place(device)
        window = _window(n, bits, number)
        tasks = step_tasks(work, window, device)
        workspaces = [
            torch.empty(work.items, n, device=device),
            torch.empty(work.groups, n, dtype=torch.float64, device=device),
            torch.empty(num_segments, n, device=device),
            torch.empty(
                module.step_counters(work.groups, num_segments), dtype=torch.int32, device=device
            ),
        ]
        corrections = torch.empty(2, device=device)
        steps_before = state[-1] if count == 0 else None
        first, second = [*state, x, x][:2]  # what the rule does not keep, the kernel does not touch
        grad_table = tensor_table(grads, device)
        center_table = tensor_table(center, device) if center else None
        target_table = tensor_table(targets, device)
        module.step_cuda(
            _basis(codes, scales, row_scale, tile_segment, bits),
            grad_table.data_ptr(),
            rule == "adamw",
            list(options),
            max(count, 1),
            x.data_ptr(),
            first.data_ptr(),
            second.data_ptr(),
            _address(center_table),
            target_table.data_ptr(),
            work.native,
            [_address(w) for w in (*workspaces, tasks, steps_before, corrections)],
            window,
            c.data_ptr(),
            number,
            stream,
        )
    _write_back(out, targets)
    return c


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
) -> tuple[int, int, int] | None:
    rows, center = _contiguous(rows), _contiguous(center)
    device, n = codes.device, sum_sq.shape[0]
    offsets = tile_offsets(numels)
    row_addresses, row_dtypes = _addresses(rows)
    center_addresses, center_dtypes = _addresses(center)
    row_table, center_table, sizes, begins = (
        torch.tensor(v, dtype=torch.int64, device=device)
        for v in (row_addresses, center_addresses, list(numels), offsets)
    )
    dtypes = torch.tensor(row_dtypes + center_dtypes, dtype=torch.int32, device=device)
    squares = torch.empty(offsets[-1], n, dtype=torch.float64, device=device)
    bad = torch.zeros((), dtype=torch.int32, device=device)
    with on_device(device):
        module.pack_cuda(
            row_table.data_ptr(),
            center_table.data_ptr() if center else 0,
            sizes.data_ptr(),
            begins.data_ptr(),
            dtypes.data_ptr(),
            len(numels),
            offsets[-1],
            n,
            bits,
            codes.data_ptr(),
            scales.data_ptr(),
            squares.data_ptr(),
            bad.data_ptr(),
            *_place(device),
        )
    squares.masked_fill_(bad.bool(), torch.nan)  # some group was not finite: see finish_pack
    return finish_pack(
        rows, center, numels, tile_segment, bits, codes, scales, sum_sq, max_scale, errors, squares
    )


@functools.lru_cache(maxsize=64)
def _chunks(numels: tuple[int, ...], device: torch.device, stream: int) -> tuple[Tensor, int]:
    """(2, tensors) int64 on the device, and the number of chunks.

    The rows are the tensors' sizes, and the first chunk of each tensor. Per stream: what the cache
    drops, the same stream may still be reading when its memory is used again, and no other one.
    """
    begin = [0]
    for numel in numels:
        begin.append(begin[-1] - -numel // module.orthonormalize_chunk)
    return torch.tensor([numels, begin[:-1]], dtype=torch.int64, device=device), begin[-1]


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
    """One read of the rows, in float64, `fast` or not; products with probes as on the CPU."""
    rows, center = _contiguous(rows), _contiguous(center)
    device, n, r = parent.device, len(parent), 0 if transform is None else len(transform)
    m = n if transform is None else r
    gram = torch.empty(m, PROBES if out else m, dtype=torch.float64, device=device)
    norms = torch.empty(n, dtype=torch.float64, device=device)
    with on_device(device):
        sizes, chunks = _chunks(tuple(numels), device, _place(device)[1])
        parts, stride, space = module.orthonormalize_plan(
            n, r, chunks, transform is not None, bool(out)
        )
        partials = torch.empty(parts, stride, dtype=torch.float64, device=device)
        workspace = torch.empty(space, dtype=torch.float64, device=device)
        row_table, center_table, out_table = (
            tensor_table(t, device) if t else None for t in (rows, center, out)
        )
        module.orthonormalize_pass_cuda(
            _address(row_table),
            _address(center_table),
            _address(out_table),
            sizes[0].data_ptr(),
            sizes[1].data_ptr(),
            len(numels),
            chunks,
            n,
            parent.data_ptr(),
            _address(transform),
            r,
            _address(probes),
            first,
            partials.data_ptr(),
            workspace.data_ptr(),
            gram.data_ptr(),
            norms.data_ptr(),
            *_place(device),
        )
    return gram, norms
