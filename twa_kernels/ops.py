"""The ops as torch.library entries: schema, checks, fake and autograd of each sit together.

Tensors of a packed basis (csrc/packing.h):

    codes         (num_tiles, n, 16 * bits) uint8
    scales        (num_tiles, n) uint8, the bits of e4m3
    row_scale     (n, L) float32
    tile_segment  (num_tiles,) int32

Lists hold one tensor per tensor of the model, `numels` their sizes; the k-th starts at tile
sum(num_tiles(numels[:k])). Users call the functions of `api.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from . import dispatch, native
from .reference import BITS, MAX_ROWS, PROBES, tile_offsets

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BASIS = "Tensor codes, Tensor scales, Tensor row_scale, Tensor tile_segment"

P = ParamSpec("P")
R = TypeVar("R")

_library = torch.library.Library("twa_kernels", "DEF")
_library.define(
    "pack(Tensor[] rows, Tensor[] center, int[] numels, Tensor tile_segment, int bits, "
    "Tensor(a!) codes, Tensor(b!) scales, Tensor(c!) sum_sq, Tensor(d!) max_scale, "
    "Tensor(e!)? errors, str backend) -> ()"
)
_library.define("average(Tensor[] rows, float[] weights, Tensor(a!) out, str backend) -> ()")
_library.define(f"unpack({BASIS}, int[] numels, int bits, str backend) -> Tensor[]")
_library.define(f"gram({BASIS}, int[] numels, int bits, str backend) -> Tensor")
_library.define(f"project({BASIS}, Tensor[] grads, int[] numels, int bits, str backend) -> Tensor")
_library.define(
    f"reconstruct({BASIS}, Tensor x, Tensor[] center, int[] numels, int bits, "
    "str backend) -> Tensor[]"
)
_library.define(
    f"reconstruct_out({BASIS}, Tensor x, Tensor[] center, int[] numels, int bits, "
    "Tensor(a!)[] out, str backend) -> ()"
)
_library.define(
    f"step({BASIS}, Tensor[] grads, Tensor(a!) x, Tensor(b!)[] state, Tensor[] center, "
    "int[] numels, int bits, str rule, float[] options, int count, Tensor(c!)[] out, "
    "str backend) -> Tensor"
)
_library.define(
    "orthonormalize_pass(Tensor[] rows, Tensor[] center, int[] numels, Tensor parent, "
    "Tensor? transform, Tensor? probes, int first, bool fast, Tensor(a!)[] out, "
    "str backend) -> (Tensor, Tensor)"
)


class _Context(Protocol):
    """What autograd hands from the setup of project and reconstruct to their backward."""

    saved_tensors: tuple[Tensor, ...]
    numels: list[int]
    bits: int
    backend: str
    like: list[tuple[torch.Size, torch.dtype]]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


# Rules, each written once; they hold for real and for fake tensors. -------------------------------


def check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, found {bits!r}")


def _check_tensor(
    name: str, t: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    if t.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, found {t.dtype}")
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, found {tuple(t.shape)}")
    if t.device != device:
        raise ValueError(f"{name}: expected device {device}, found {t.device}")
    if not t.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, found strides {t.stride()}")


def _check_basis(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    numels: Sequence[int],
    bits: int,
) -> None:
    check_bits(bits)
    if row_scale.dim() != 2 or not 1 <= row_scale.shape[0] <= MAX_ROWS:
        raise ValueError(
            f"row_scale: expected shape (n, L) with 1 <= n <= {MAX_ROWS}, "
            f"found {tuple(row_scale.shape)}"
        )
    n, tiles = row_scale.shape[0], tile_offsets(numels)[-1]
    _check_tensor("codes", codes, (tiles, n, 16 * bits), torch.uint8, codes.device)
    _check_tensor("scales", scales, (tiles, n), torch.uint8, codes.device)
    _check_tensor("row_scale", row_scale, row_scale.shape, torch.float32, codes.device)
    _check_tensor("tile_segment", tile_segment, (tiles,), torch.int32, codes.device)


def _check_list(
    name: str,
    tensors: Sequence[Tensor],
    numels: Sequence[int],
    device: torch.device,
    backend: str,
    absent: bool = False,
) -> None:
    if len(tensors) != len(numels):
        raise ValueError(
            f"{name}: expected {len(numels)} tensors, one per tensor of the basis, "
            f"found {len(tensors)}"
        )
    dtypes = (*FLOATS, torch.float64) if backend == "reference" else FLOATS
    for k, (t, numel) in enumerate(zip(tensors, numels, strict=True)):
        found = t.numel()
        if absent and found == 0:
            continue
        if (
            found == numel
            and t.dtype in dtypes
            and t.device == device
            and t.layout == torch.strided
        ):
            continue  # the usual case first: this runs for every tensor of every call
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


def _check_x(x: Tensor, row_scale: Tensor) -> None:
    if x.shape != row_scale.shape:
        raise ValueError(
            f"x: expected shape (n, L) = {tuple(row_scale.shape)}, found {tuple(x.shape)}"
        )
    if x.dtype != torch.float32:
        raise TypeError(f"x: expected torch.float32, found {x.dtype}")
    if x.device != row_scale.device:
        raise ValueError(f"x: expected device {row_scale.device}, found {x.device}")


def _check_disjoint(tensors: Sequence[Tensor], name: str = "out") -> None:
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), k)
        for k, t in enumerate(tensors)
        if t.numel()
    )
    for (_, end, a), (begin, _, b) in itertools.pairwise(spans):
        if begin < end:
            raise ValueError(
                f"{name}[{min(a, b)}] and {name}[{max(a, b)}] share memory: "
                "pass each tied weight once"
            )


def _impl(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Registers the eager implementation for every device; `dispatch` picks the backend."""
    return torch.library.impl(_library, name, "CompositeExplicitAutograd")


# pack ---------------------------------------------------------------------------------------------


def check_pack(
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
    backend: str,
) -> None:
    check_bits(bits)
    n, device, tiles = sum_sq.shape[0], codes.device, tile_offsets(numels)[-1]
    if not 1 <= n <= MAX_ROWS:
        raise ValueError(f"n: expected 1 to {MAX_ROWS} rows, found {n}")
    _check_list("rows", rows, [numel for numel in numels for _ in range(n)], device, backend)
    if center:
        _check_list("center", center, numels, device, backend)
    _check_tensor("tile_segment", tile_segment, (tiles,), torch.int32, device)
    _check_tensor("codes", codes, (tiles, n, 16 * bits), torch.uint8, device)
    _check_tensor("scales", scales, (tiles, n), torch.bfloat16, device)
    _check_tensor("sum_sq", sum_sq, sum_sq.shape, torch.float64, device)
    _check_tensor("max_scale", max_scale, sum_sq.shape, torch.float32, device)
    if errors is not None:
        _check_tensor("errors", errors, (len(numels), 2), torch.float64, device)


class NotFiniteError(ValueError):
    """NaN or Inf in the input of pack.

    Args:
        row: index of the row, from 0.
        tensor: index of the tensor of the model.
        column: index of the element in the flattened row of that tensor.

    The three are attributes, too.
    """

    def __init__(self, row: int, tensor: int, column: int) -> None:
        super().__init__(f"NaN or Inf in row {row} of tensor {tensor} at column {column}")
        self.row, self.tensor, self.column = row, tensor, column


@_impl("pack")
def _pack(
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
    backend: str,
) -> None:
    check_pack(
        rows, center, numels, tile_segment, bits, codes, scales, sum_sq, max_scale, errors, backend
    )
    native.refuse_reading_back("pack", codes.device)
    kernel = dispatch.select("pack", codes.device.type, backend)
    bad = kernel(rows, center, numels, tile_segment, bits, codes, scales, sum_sq, max_scale, errors)
    if bad is not None:
        raise NotFiniteError(*bad)


# Nothing is returned: the checks are all that the fake does.
torch.library.register_fake("twa_kernels::pack", check_pack, lib=_library)


# average ------------------------------------------------------------------------------------------


def check_average(
    rows: Sequence[Tensor], weights: Sequence[float], out: Tensor, backend: str
) -> None:
    if not rows or len(weights) != len(rows):
        raise ValueError(
            "weights: expected one number per row, at least one, "
            f"found {len(weights)} for {len(rows)} rows"
        )
    _check_tensor("out", out, out.shape, torch.float32, rows[0].device)
    _check_list("rows", rows, [out.numel()] * len(rows), rows[0].device, backend)


@_impl("average")
def _average(rows: Sequence[Tensor], weights: Sequence[float], out: Tensor, backend: str) -> None:
    check_average(rows, weights, out, backend)
    dispatch.select("average", out.device.type, backend)(rows, weights, out)


torch.library.register_fake("twa_kernels::average", check_average, lib=_library)


# unpack -------------------------------------------------------------------------------------------


@_impl("unpack")
def _unpack(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    numels: Sequence[int],
    bits: int,
    backend: str,
) -> list[Tensor]:
    _check_basis(codes, scales, row_scale, tile_segment, numels, bits)
    return dispatch.select("unpack", codes.device.type, backend)(
        codes, scales, row_scale, tile_segment, numels, bits
    )


@torch.library.register_fake("twa_kernels::unpack", lib=_library)
def _unpack_fake(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    numels: Sequence[int],
    bits: int,
    backend: str,
) -> list[Tensor]:
    _check_basis(codes, scales, row_scale, tile_segment, numels, bits)
    return [row_scale.new_empty(row_scale.shape[0], numel) for numel in numels]


# gram ---------------------------------------------------------------------------------------------


@_impl("gram")
def _gram(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    numels: Sequence[int],
    bits: int,
    backend: str,
) -> Tensor:
    _check_basis(codes, scales, row_scale, tile_segment, numels, bits)
    native.refuse_reading_back("gram", codes.device)
    return dispatch.select("gram", codes.device.type, backend)(
        codes, scales, row_scale, tile_segment, numels, bits
    )


@torch.library.register_fake("twa_kernels::gram", lib=_library)
def _gram_fake(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    numels: Sequence[int],
    bits: int,
    backend: str,
) -> Tensor:
    _check_basis(codes, scales, row_scale, tile_segment, numels, bits)
    n, num_segments = row_scale.shape
    return row_scale.new_empty((num_segments, n, n), dtype=torch.float64)


# project ------------------------------------------------------------------------------------------


def _check_project(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    grads: Sequence[Tensor],
    numels: Sequence[int],
    bits: int,
    backend: str,
) -> None:
    _check_basis(codes, scales, row_scale, tile_segment, numels, bits)
    _check_list("grads", grads, numels, codes.device, backend, absent=True)


@_impl("project")
def _project(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    grads: Sequence[Tensor],
    numels: Sequence[int],
    bits: int,
    backend: str,
) -> Tensor:
    _check_project(codes, scales, row_scale, tile_segment, grads, numels, bits, backend)
    return dispatch.select("project", codes.device.type, backend)(
        codes, scales, row_scale, tile_segment, grads, numels, bits
    ).float()


@torch.library.register_fake("twa_kernels::project", lib=_library)
def _project_fake(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    grads: Sequence[Tensor],
    numels: Sequence[int],
    bits: int,
    backend: str,
) -> Tensor:
    _check_project(codes, scales, row_scale, tile_segment, grads, numels, bits, backend)
    return row_scale.new_empty(row_scale.shape)


def _project_setup(
    ctx: _Context,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[int], int, str],
    output: Tensor,
) -> None:
    *basis, grads, ctx.numels, ctx.bits, ctx.backend = inputs
    ctx.save_for_backward(*basis)
    ctx.like = [(g.shape, g.dtype) for g in grads]


def _project_backward(
    ctx: _Context, grad_c: Tensor
) -> tuple[None, None, None, None, list[Tensor], None, None, None]:
    flat = torch.ops.twa_kernels.reconstruct(
        *ctx.saved_tensors, grad_c.contiguous(), [], ctx.numels, ctx.bits, ctx.backend
    )
    grads = [
        f.view(shape).to(dtype) if shape.numel() else f.new_empty(shape, dtype=dtype)
        for f, (shape, dtype) in zip(flat, ctx.like, strict=True)
    ]
    return None, None, None, None, grads, None, None, None


torch.library.register_autograd(
    "twa_kernels::project", _project_backward, setup_context=_project_setup, lib=_library
)


# reconstruct --------------------------------------------------------------------------------------


def _check_reconstruct(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    x: Tensor,
    center: Sequence[Tensor],
    numels: Sequence[int],
    bits: int,
    backend: str,
) -> None:
    _check_basis(codes, scales, row_scale, tile_segment, numels, bits)
    _check_x(x, row_scale)
    if center:
        _check_list("center", center, numels, codes.device, backend)


@_impl("reconstruct")
def _reconstruct(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    x: Tensor,
    center: Sequence[Tensor],
    numels: Sequence[int],
    bits: int,
    backend: str,
) -> list[Tensor]:
    _check_reconstruct(codes, scales, row_scale, tile_segment, x, center, numels, bits, backend)
    return dispatch.select("reconstruct", codes.device.type, backend)(
        codes, scales, row_scale, tile_segment, x, center, numels, bits
    )


@torch.library.register_fake("twa_kernels::reconstruct", lib=_library)
def _reconstruct_fake(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    x: Tensor,
    center: Sequence[Tensor],
    numels: Sequence[int],
    bits: int,
    backend: str,
) -> list[Tensor]:
    _check_reconstruct(codes, scales, row_scale, tile_segment, x, center, numels, bits, backend)
    return [
        x.new_empty(numel, dtype=center[k].dtype if center else torch.float32)
        for k, numel in enumerate(numels)
    ]


def _reconstruct_setup(
    ctx: _Context,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], list[int], int, str],
    output: list[Tensor],
) -> None:
    *basis, _, center, ctx.numels, ctx.bits, ctx.backend = inputs
    ctx.save_for_backward(*basis)
    ctx.like = [(c.shape, c.dtype) for c in center]


def _reconstruct_backward(
    ctx: _Context, grads: Sequence[Tensor | None]
) -> tuple[None, None, None, None, Tensor, list[Tensor | None], None, None, None]:
    empty = ctx.saved_tensors[2].new_empty(0)
    present = [empty if g is None else g for g in grads]
    c = torch.ops.twa_kernels.project(
        *ctx.saved_tensors, present, ctx.numels, ctx.bits, ctx.backend
    )
    center = [
        None if g is None else g.view(shape).to(dtype)
        for g, (shape, dtype) in zip(grads, ctx.like, strict=False)
    ]
    return None, None, None, None, c, center, None, None, None


torch.library.register_autograd(
    "twa_kernels::reconstruct",
    _reconstruct_backward,
    setup_context=_reconstruct_setup,
    lib=_library,
)


@_impl("reconstruct_out")
def _reconstruct_out(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    x: Tensor,
    center: Sequence[Tensor],
    numels: Sequence[int],
    bits: int,
    out: Sequence[Tensor],
    backend: str,
) -> None:
    _check_reconstruct(codes, scales, row_scale, tile_segment, x, center, numels, bits, backend)
    _check_list("out", out, numels, codes.device, backend)
    _check_disjoint(out)
    dispatch.select("reconstruct", codes.device.type, backend)(
        codes, scales, row_scale, tile_segment, x, center, numels, bits, out
    )


@torch.library.register_fake("twa_kernels::reconstruct_out", lib=_library)
def _reconstruct_out_fake(
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    tile_segment: Tensor,
    x: Tensor,
    center: Sequence[Tensor],
    numels: Sequence[int],
    bits: int,
    out: Sequence[Tensor],
    backend: str,
) -> None:
    _check_reconstruct(codes, scales, row_scale, tile_segment, x, center, numels, bits, backend)
    _check_list("out", out, numels, codes.device, backend)


# step ---------------------------------------------------------------------------------------------

#: rule -> its options, in the order of the op's list, and the moments it keeps
RULES = {
    "sgd": (
        ("maximize", "lr", "weight_decay", "momentum", "dampening", "nesterov"),
        ("momentum_buffer",),
    ),
    "adamw": (
        ("maximize", "lr", "weight_decay", "beta1", "beta2", "eps"),
        ("exp_avg", "exp_avg_sq"),
    ),
}


#: options of torch's optimizers that change the update in ways the fused step does not know
UNSUPPORTED_OPTIONS = ("amsgrad", "differentiable")


def _check_step(
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
    backend: str,
) -> None:
    _check_project(codes, scales, row_scale, tile_segment, grads, numels, bits, backend)
    _check_reconstruct(codes, scales, row_scale, tile_segment, x, center, numels, bits, backend)
    _check_list("out", out, numels, codes.device, backend)
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {sorted(RULES)}, found {rule!r}")
    names, moments = RULES[rule]
    if len(options) != len(names) or count < 0 or (count == 0 and rule != "adamw"):
        raise ValueError(
            f"step: expected options {names} and a count of at least 1, "
            f"found {len(options)} options and count {count}"
        )
    needed = moments if rule == "adamw" or options[names.index("momentum")] else ()
    if count == 0:  # the steps so far are counted on the device, in a last tensor of the state
        *state, steps = state or [x.new_empty(0)]
        _check_tensor("step", steps, (), torch.float32, codes.device)
    if len(state) != len(needed):
        raise ValueError(f"state: expected {len(needed)} tensors {needed}, found {len(state)}")
    for name, t in zip(("x", *needed), (x, *state), strict=True):
        _check_tensor(name, t, row_scale.shape, torch.float32, codes.device)


def _check_step_capture(
    device: torch.device, state: Sequence[Tensor], rule: str, count: int, counts_on_device: bool
) -> None:
    """Raises RuntimeError for a step that a CUDA graph would repeat with the wrong numbers.

    The graph repeats the numbers of the captured call.
    """
    if not native.capturing(device):
        return
    if count == 0 and not counts_on_device:
        raise RuntimeError(
            "a CUDA graph cannot read the number of steps back: "
            "with options['capturable']=True use backend='cuda'"
        )
    if count == 1 and state:
        raise RuntimeError(
            "a CUDA graph cannot capture the first step of an optimizer with momentum: "
            "run one step before"
        )
    if count > 1 and rule == "adamw":
        raise RuntimeError(
            "a CUDA graph would repeat this step's bias correction: AdamW needs"
            " options['capturable']=True and backend 'cuda', which counts steps on the device"
        )


@_impl("step")
def _step(
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
    backend: str,
) -> Tensor:
    _check_step(
        codes,
        scales,
        row_scale,
        tile_segment,
        grads,
        x,
        state,
        center,
        numels,
        bits,
        rule,
        options,
        count,
        out,
        backend,
    )
    _check_disjoint(out)
    _check_disjoint([x, *state], "x and state")
    kernel = dispatch.select("step", codes.device.type, backend)
    counts_on_device = kernel is dispatch.IMPLEMENTATIONS["step", "cuda"]
    _check_step_capture(codes.device, state, rule, count, counts_on_device)
    if count == 0 and not counts_on_device:  # the others take a number, and wait for it
        *state, steps = state
        count = int(steps) + 1
    return kernel(
        codes,
        scales,
        row_scale,
        tile_segment,
        grads,
        x,
        state,
        center,
        numels,
        bits,
        rule,
        options,
        count,
        out,
    )


@torch.library.register_fake("twa_kernels::step", lib=_library)
def _step_fake(
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
    backend: str,
) -> Tensor:
    _check_step(
        codes,
        scales,
        row_scale,
        tile_segment,
        grads,
        x,
        state,
        center,
        numels,
        bits,
        rule,
        options,
        count,
        out,
        backend,
    )
    return row_scale.new_empty(row_scale.shape)


# orthonormalize -----------------------------------------------------------------------------------


def _check_orthonormalize_pass(
    rows: Sequence[Tensor],
    center: Sequence[Tensor],
    numels: Sequence[int],
    parent: Tensor,
    transform: Tensor | None,
    probes: Tensor | None,
    first: int,
    fast: bool,
    out: Sequence[Tensor],
    backend: str,
) -> None:
    device, n = parent.device, parent.shape[0]
    if not 1 <= n <= MAX_ROWS:
        raise ValueError(f"n: expected 1 to {MAX_ROWS} rows, found {n}")
    _check_tensor("parent", parent, (n,), torch.int32, device)
    _check_list("rows", rows, [numel for numel in numels for _ in range(n)], device, backend)
    if center:
        _check_list("center", center, numels, device, backend)
    r = n
    if transform is not None:
        r = transform.shape[0]
        _check_tensor("transform", transform, (r, n), torch.float64, device)
    if (probes is None) != (not out) or (out and transform is None):
        raise ValueError("orthonormalize: expected out, transform and probes together")
    if probes is not None:
        _check_tensor("probes", probes, (PROBES, r), torch.float64, device)
        _check_list("out", out, [numel for numel in numels for _ in range(r)], device, backend)
        for k, o in enumerate(out):
            if not o.is_contiguous():
                raise ValueError(
                    f"out[{k}]: expected a contiguous tensor, found strides {o.stride()}"
                )
    if not 0 <= first <= r:
        raise ValueError(f"first: expected 0 to {r}, found {first}")


@_impl("orthonormalize_pass")
def _orthonormalize_pass(
    rows: Sequence[Tensor],
    center: Sequence[Tensor],
    numels: Sequence[int],
    parent: Tensor,
    transform: Tensor | None,
    probes: Tensor | None,
    first: int,
    fast: bool,
    out: Sequence[Tensor],
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check_orthonormalize_pass(
        rows, center, numels, parent, transform, probes, first, fast, out, backend
    )
    native.refuse_reading_back("orthonormalize_pass", parent.device)
    kernel = dispatch.select("orthonormalize_pass", parent.device.type, backend)
    return kernel(rows, center, numels, parent, transform, probes, first, fast, out)


@torch.library.register_fake("twa_kernels::orthonormalize_pass", lib=_library)
def _orthonormalize_pass_fake(
    rows: Sequence[Tensor],
    center: Sequence[Tensor],
    numels: Sequence[int],
    parent: Tensor,
    transform: Tensor | None,
    probes: Tensor | None,
    first: int,
    fast: bool,
    out: Sequence[Tensor],
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check_orthonormalize_pass(
        rows, center, numels, parent, transform, probes, first, fast, out, backend
    )
    n = parent.shape[0]
    m = n if transform is None else transform.shape[0]
    gram = parent.new_empty((m, PROBES if out else m), dtype=torch.float64)
    return gram, parent.new_empty(n, dtype=torch.float64)
