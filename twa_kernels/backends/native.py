"""The native module `_C`: whether it is there, and its views of tensors (csrc/bindings).

Arguments are checked by the ops before this; the module checks dtypes and sizes once more.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..operands import BasisView, StepArgs
from .tensors import kept, readable, writable

_import_error = ""
_C: Any = None
try:
    _C = importlib.import_module("twa_kernels._C")
except ImportError as error:
    # Reported by why_unusable(), never hidden: selecting this backend raises it.
    _import_error = str(error)


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
        _C.advise_huge_pages(t.data_ptr(), t.nbytes)
    return t


def read(tensors: Sequence[Tensor], module: Any) -> Any:
    """_C.Tensors of tensors to read, which it keeps alive; odd ones are copied, one by one."""
    made = module.Tensors(list(tensors))
    return module.Tensors(readable(tensors, made.odd)) if made.odd else made


def read_or_none(tensors: Sequence[Tensor], module: Any) -> Any:
    """The same; None for an empty list."""
    return read(tensors, module) if tensors else None


@contextlib.contextmanager
def write(out: Sequence[Tensor], module: Any) -> Iterator[Any]:
    """_C.Tensors of tensors to write; into odd ones what was written is copied at the end."""
    made = module.Tensors(list(out))
    if not made.odd:
        yield made
        return
    with writable(out, made.odd) as targets:
        yield module.Tensors(targets)


def basis_handle(basis: BasisView, module: Any) -> Any:
    """_C.Basis, made once per basis."""
    tensors = {
        "codes": basis.codes,
        "scales": basis.scales,
        "row_scale": basis.row_scale,
        "tile_segment": basis.tile_segment,
    }
    addresses = tuple(t.data_ptr() for t in tensors.values())
    key = (module.__name__, addresses, basis.row_scale.shape, basis.numels, basis.bits)
    return kept(
        basis.tile_segment,
        key,
        lambda: module.Basis(**tensors, numel=basis.numels, bits=basis.bits),
    )


def update(args: StepArgs, module: Any) -> Any:
    """_C.Update: the numbers of an optimizer's step."""
    return module.Update(
        rule=args.rule,
        maximize=args.maximize,
        lr=args.lr,
        weight_decay=args.weight_decay,
        momentum=args.momentum,
        dampening=args.dampening,
        nesterov=args.nesterov,
        beta1=args.beta1,
        beta2=args.beta2,
        eps=args.eps,
        step=max(args.count, 1),
    )
