"""The native module `_C` (csrc/bindings): whether it is there, and what needs no backend."""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
        here = Path(__file__).parent
        root = here.parent
        if not (root / "setup.py").is_file() or any(here.glob("_C*")):
            return f"the native module does not load: {_import_error}"
        return (
            f"{root} holds sources that are not built: run `pip install -e .` there; or, where"
            " twa_kernels is installed already, start Python in another folder: here its sources"
            f" hide it ({_import_error})"
        )
    if _C.cpu_isa() is None:
        found = os.environ.get("TWA_KERNELS_ISA", "")
        return (
            f"TWA_KERNELS_ISA={found!r} asks for an instruction set that this machine lacks; "
            f"expected one of: {', '.join(_C.cpu_isas())}"
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


class Listed(list[Tensor]):
    """Tensors of an operand of an op, of which each is looked at once.

    What was found serves the op's rules, and the backend. The list must not change.

    Attributes:
        found: _C.Tensors of them; None where a tensor is of a class of its own, such as a fake one,
            or no kernel takes it.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__(tensors)
        self._given = tensors  # what `found` keeps: not this object, which keeps `found`
        self._found: Any = None
        self._looked = False

    @property
    def found(self) -> Any:
        if not self._looked and _C is not None:
            self._looked, self._found = True, _C.usual(self._given)
        return self._found


def made_of(tensors: Sequence[Tensor], module: Any) -> Any:
    """_C.Tensors of a list, of that one of the native modules."""
    found = tensors.found if isinstance(tensors, Listed) else None
    is_of_module = found is not None and module.Tensors is type(found)
    return found if is_of_module else module.Tensors(tensors)


def are_usual(
    tensors: Sequence[Tensor], numels: Sequence[int], device: torch.device, absent: bool = False
) -> bool:
    """Whether there is a dense tensor of each size on the device, of a dtype that kernels take.

    False where that is not so, and where it cannot be told in a few nanoseconds a tensor.

    absent: a tensor without elements stands for one that is not there.
    """
    if _C is None or device.type not in _DEVICES:
        return False
    found = tensors.found if isinstance(tensors, Listed) else _C.usual(list(tensors))
    return found is not None and found.are(
        numels=numels, device=_DEVICES[device.type], index=device.index or 0, absent=absent
    )


#: DLPack's numbers of device types; AMD's GPUs count as NVIDIA's, as in PyTorch
_DEVICES = {"cpu": 1, "cuda": 2}


def first_shared(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Numbers of two of the tensors that share memory; None if none do."""
    if isinstance(tensors, Listed) and tensors.found is not None:
        return tensors.found.first_shared()
    if _C is not None:
        return _C.first_shared(tensors)
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.nbytes, k) for k, t in enumerate(tensors) if t.nbytes
    )
    for (_, end, a), (begin, _, b) in itertools.pairwise(spans):
        if begin < end:
            return a, b
    return None
