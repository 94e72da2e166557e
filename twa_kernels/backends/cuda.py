"""Backend "cuda": the CUDA C++ kernels for NVIDIA's GPUs (csrc/cuda)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import capture, native
from ..layout import TILE, check_segments
from ..operands import BasisView, PackArgs, PassArgs, RecordArgs, ReplayArgs, StepArgs
from . import handles
from .after_pack import first_not_finite
from .average import average as average  # plain PyTorch, as on every GPU
from .rows import used_rows
from .tensors import Recent, current_stream, kept, on_device

#: the native module; tests put in its place the same kernels compiled for a CPU (tests/emulator)
module: Any = native._C


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


def _place(device: torch.device) -> dict[str, int]:
    """Device number and stream, as every launch takes them."""
    index = 0  # emulated
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
    return {"device": index, "stream": current_stream(device)}


# Tables and work items ----------------------------------------------------------------------------

_tables = Recent()


def tensor_table(tensors: Any, device: torch.device) -> Tensor:
    """(tensors, 2) int64 on the device: address and dtype number of each tensor of a _C.Tensors.

    A kernel whose arguments they are writes the table, so that no memory of the host has to outlive
    the call. It is not waited for, and only its own stream is sure to come after it: each stream
    has tables of its own. A CUDA graph gets one that every replay writes, since it knows only its
    address.

    The caller holds the table and the tensors until its kernel is launched: memory that nobody
    holds goes to the next tensor.
    """

    def make() -> Tensor:
        table = torch.empty(len(tensors), 2, dtype=torch.int64, device=device)
        module.write_table(tensors=tensors, to=table, **_place(device))
        return table

    if capture.capturing(device):
        return make()
    return _tables.get((tensors.key, device, current_stream(device)), len(tensors), make)


def _numbers(numbers: Sequence[int], device: torch.device) -> Tensor:
    """(numbers,) int64 on the device, written as `tensor_table` does."""
    to = torch.empty(len(numbers), dtype=torch.int64, device=device)
    module.write_numbers(numbers=numbers, to=to, **_place(device))
    return to


def _make_sizes(
    numels: tuple[int, ...], unit: int, device: torch.device, stream: int
) -> tuple[Tensor, int]:
    begin = [0]
    for numel in numels:
        begin.append(begin[-1] - -numel // unit)
    return _numbers([*numels, *begin[:-1]], device).view(2, -1), begin[-1]


_kept_sizes = functools.lru_cache(maxsize=256)(_make_sizes)


def _sizes(numels: tuple[int, ...], unit: int, device: torch.device) -> tuple[Tensor, int]:
    """(2, tensors) int64: sizes, and the first unit of columns of each tensor; and all units.

    Per stream: what the cache drops, the same stream may still be reading when its memory is used
    again, and no other one. A CUDA graph gets its own.
    """
    make = _make_sizes if capture.capturing(device) else _kept_sizes
    return make(numels, unit, device, current_stream(device))


@dataclass(frozen=True)
class Work:
    """Work items of one basis (csrc/twa.h, HostWork), on its device."""

    arrays: dict[str, Tensor]  # what `native` points to, under the names of DeviceWork's members
    host: Any
    native: Any
    items: int
    groups: int
    #: window -> order of a step's tasks, None where it cannot be fused
    tasks: dict[int, Tensor | None]


def _build(basis: BasisView) -> Work:
    tile_segment = basis.tile_segment.cpu()
    check_segments(tile_segment, basis.num_segments)
    host = module.HostWork(
        numel=basis.numels,
        tile_segment=tile_segment,
        segments=basis.num_segments,
        bits=basis.bits,
    )
    arrays: dict[str, Tensor] = {}
    for name, data in host.arrays.items():
        dtype = torch.int64 if name in ("item_tile", "numel", "tile_begin") else torch.int32
        array = (
            torch.frombuffer(bytearray(data), dtype=dtype)
            if data
            else torch.empty(0, dtype=dtype, device="cpu")
        )
        arrays[name] = array.to(basis.device)  # waits: used by every stream from here on
    items, groups = len(arrays["item_tile"]), len(arrays["group_begin"]) - 1
    return Work(arrays, host, module.Work(**arrays), items, groups, {})


def work_items(basis: BasisView) -> Work:
    """Work items of a basis, made on the first call.

    That call reads tile_segment back, which waits for the device.
    """
    key = ("cuda", basis.numels, basis.num_segments, basis.bits)
    return kept(basis.tile_segment, key, lambda: _build(basis))


def _handle(basis: BasisView) -> Any:
    if basis.codes.data_ptr() % 16:
        raise ValueError(
            f"codes begin at address {basis.codes.data_ptr():#x}, expected a multiple of 16, "
            "which asynchronous copies need: clone() them"
        )
    return handles.basis_handle(basis, module)


# Ops ----------------------------------------------------------------------------------------------


def project(basis: BasisView, grads: Sequence[Tensor]) -> Tensor:
    device, n = basis.device, basis.n
    sources, work = handles.read(grads, module), work_items(basis)
    c = torch.empty_like(basis.row_scale)
    with on_device(device):
        module.project_cuda(
            basis=_handle(basis),
            grads=tensor_table(sources, device),
            work=work.native,
            partial=torch.empty(work.items, n, dtype=torch.float32, device=device),
            sums=torch.empty(work.groups, n, dtype=torch.float64, device=device),
            c=c,
            **_place(device),
        )
    return c


def reconstruct(
    basis: BasisView, x: Tensor, center: Sequence[Tensor], out: Sequence[Tensor] | None
) -> list[Tensor]:
    device = basis.device
    if out is None:
        out = [
            basis.codes.new_empty(numel, dtype=center[k].dtype if center else torch.float32)
            for k, numel in enumerate(basis.numels)
        ]
    work, sources = work_items(basis), handles.read_or_none(center, module)
    with handles.write(out, module) as targets, on_device(device):
        module.reconstruct_cuda(
            basis=_handle(basis),
            x=x.contiguous(),
            center=tensor_table(sources, device) if center else None,
            out=tensor_table(targets, device),
            work=work.native,
            x_rows=torch.empty(basis.num_segments, basis.n, dtype=torch.float32, device=device),
            **_place(device),
        )
    return list(out)


@functools.lru_cache(maxsize=256)
def _window(n: int, bits: int, device: int) -> int:
    return module.step_window(n, bits, device)


def set_variant(**options: int | bool) -> None:
    """Other ways to launch, for measurements (csrc/twa.h, CudaVariant); none: the shipped one."""
    module.set_cuda_variant(**options)
    _window.cache_clear()  # it follows from the variant


def step_tasks(work: Work, window: int, device: torch.device) -> Tensor | None:
    """Order of a fused step's tasks on the device; None: the step runs as separate kernels."""
    if window not in work.tasks:
        capture.refuse_capture(device)
        order = bytearray(work.host.tasks(window))
        work.tasks[window] = (
            torch.frombuffer(order, dtype=torch.int32).to(device) if order else None
        )
    return work.tasks[window]


def step(
    basis: BasisView,
    grads: Sequence[Tensor],
    args: StepArgs,
    center: Sequence[Tensor],
    out: Sequence[Tensor],
) -> Tensor:
    device, n = basis.device, basis.n
    work, handle = work_items(basis), _handle(basis)
    sources, centers = handles.read(grads, module), handles.read_or_none(center, module)
    c = torch.empty_like(basis.row_scale)
    with handles.write(out, module) as targets, on_device(device):
        place = _place(device)
        window = _window(n, basis.bits, place["device"])
        counters = module.step_counters(work.groups, basis.num_segments)
        space = {
            "partial": torch.empty(work.items, n, dtype=torch.float32, device=device),
            "sums": torch.empty(work.groups, n, dtype=torch.float64, device=device),
            "x_rows": torch.empty(basis.num_segments, n, dtype=torch.float32, device=device),
            "counters": torch.empty(counters, dtype=torch.int32, device=device),
            "corrections": torch.empty(2, dtype=torch.float32, device=device),
            "tasks": step_tasks(work, window, device),
            "steps_before": args.steps_before,
        }
        module.step_cuda(
            basis=handle,
            grads=tensor_table(sources, device),
            update=handles.update(args, module),
            x=args.x,
            first=args.first,
            second=args.second,
            center=tensor_table(centers, device) if center else None,
            out=tensor_table(targets, device),
            work=work.native,
            workspace=module.StepWorkspace(basis=handle, work=work.native, window=window, **space),
            c=c,
            **place,
        )
    return c


def pack(args: PackArgs) -> tuple[int, int, int] | None:
    """Waits for the device twice: for the segments, and for whether a group is not finite."""
    device, n = args.device, args.n
    check_segments(args.tile_segment, args.sum_sq.shape[1])
    rows = handles.read(args.rows, module)
    center = handles.read_or_none(args.center, module)
    bad = torch.empty((), dtype=torch.int32, device=device)
    with on_device(device):
        (numel, tile_begin), tiles = _sizes(args.numels, TILE, device)
        (_, unit_begin), units = _sizes(args.numels, TILE * module.unit_tiles, device)
        squares = torch.empty(tiles, n, dtype=torch.float64, device=device)
        pieces = torch.empty(units, module.unit_tiles + 1, dtype=torch.int32, device=device)
        row_table = tensor_table(rows, device)
        center_table = tensor_table(center, device) if args.center else None
        module.pack_cuda(
            rows=module.DeviceRows(rows=row_table, center=center_table, numel=numel, n=n),
            tile_begin=tile_begin,
            unit_begin=unit_begin,
            units=units,
            tile_segment=args.tile_segment,
            bits=args.bits,
            codes=args.codes,
            scales=args.scales,
            sum_sq=args.sum_sq,
            max_scale=args.max_scale,
            squares=squares,
            pieces=pieces,
            bad=bad,
            **_place(device),
        )
    return first_not_finite(args) if bad.item() else None


def record(args: RecordArgs) -> None:
    """Two kernels; nothing waits for `bad`, which the second one reads on the device."""
    device = args.device
    weights, reference = handles.read(args.weights, module), module.Tensors(args.reference)
    with on_device(device):
        (numel, tile_begin), _ = _sizes(args.numels, TILE, device)
        # Names hold the tables until the launch: see tensor_table.
        weight_table, reference_table = (
            tensor_table(weights, device),
            tensor_table(reference, device),
        )
        module.record_cuda(
            weights=weight_table,
            reference=reference_table,
            numel=numel,
            tile_begin=tile_begin,
            bits=args.bits,
            codes=args.codes,
            scales=args.scales,
            bad=args.bad,
            **_place(device),
        )


def replay(args: ReplayArgs) -> None:
    """Rows of coefficient 0 are left out here."""
    device = args.device
    rows = used_rows(args)
    out = module.Tensors(args.out)
    with on_device(device):
        (numel, tile_begin), tiles = _sizes(args.numels, TILE, device)
        table = torch.empty(len(rows.coefficients), 3, dtype=torch.int64, device=device)
        module.write_rows(
            codes=rows.codes,
            scales=rows.scales,
            coefficients=rows.coefficients,
            tiles=tiles,
            bits=args.bits,
            to=table,
            **_place(device),
        )
        out_table = tensor_table(out, device)
        module.replay_cuda(
            out=out_table,
            numel=numel,
            tile_begin=tile_begin,
            tiles=tiles,
            bits=args.bits,
            rows=table,
            ones=all(c == 1.0 for c in rows.coefficients),
            **_place(device),
        )


def orthonormalize_pass(args: PassArgs) -> tuple[Tensor, Tensor]:
    """One read of the rows, in float64, `fast` or not; products with probes as on the CPU."""
    device, n = args.device, args.n
    rows, centers = handles.read(args.rows, module), handles.read_or_none(args.center, module)
    out = handles.read_or_none(args.out, module)
    gram = torch.empty(args.gram_shape, dtype=torch.float64, device=device)
    norms = torch.empty(n, dtype=torch.float64, device=device)
    transformed, unit = args.transform is not None, module.orthonormalize_chunk
    with on_device(device):
        sizes, chunks = _sizes(args.numels, unit, device)
        numel, chunk_begin = sizes
        parts, stride, space = module.orthonormalize_plan(
            n, args.rank if transformed else 0, chunks, transformed, bool(args.out)
        )
        row_table = tensor_table(rows, device)
        center_table = tensor_table(centers, device) if args.center else None
        module.orthonormalize_pass_cuda(
            rows=module.DeviceRows(rows=row_table, center=center_table, numel=numel, n=n),
            parent=args.parent,
            transform=args.transform,
            probes=args.probes,
            first=args.first,
            out=tensor_table(out, device) if args.out else None,
            chunk_begin=chunk_begin,
            chunks=chunks,
            partials=torch.empty(parts, stride, dtype=torch.float64, device=device),
            space=torch.empty(space, dtype=torch.float64, device=device),
            gram=gram,
            norms=norms,
            **_place(device),
        )
    return gram, norms
