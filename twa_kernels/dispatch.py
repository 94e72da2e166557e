"""Which backend runs an op: one table, one override, no silent fallback."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor

from . import cuda, native, reference

#: an op's implementation; its operands are those of reference.py's function of that name
Kernel = Callable[..., object]

OPS = ("pack", "unpack", "project", "reconstruct", "step", "gram", "orthonormalize_pass")
ENVIRONMENT = "TWA_KERNELS_BACKEND"


def _triton(op: str) -> Kernel:
    """The op of the Triton backend, imported when first run: importing triton takes a second."""

    def run(*operands: object) -> object:
        return getattr(importlib.import_module("twa_kernels._triton.ops"), op)(*operands)

    return run


#: (op, backend) -> implementation
IMPLEMENTATIONS: dict[tuple[str, str], Kernel] = {
    **{(op, "reference"): getattr(reference, op) for op in OPS},
    **{(op, "cpp"): getattr(native, op) for op in OPS},
    **{(op, "triton"): _triton(op) for op in OPS},
    # On the CPU, where candidates are read.
    ("average", "reference"): reference.average,
    ("average", "cpp"): native.average,
    **{
        (op, "cuda"): getattr(cuda, op)
        for op in ("pack", "project", "reconstruct", "step", "orthonormalize_pass")
    },
}

#: backend -> device types it runs on ("cuda" is PyTorch's name for AMD GPUs too)
DEVICES: dict[str, tuple[str, ...]] = {
    "cpp": ("cpu",),
    "cuda": ("cuda",),
    "triton": ("cuda", "cpu"),  # cpu: under the interpreter only
    "reference": ("cpu", "cuda", "mps", "xpu"),
}

#: every device type that some backend runs on
KNOWN_DEVICES = tuple(dict.fromkeys(device for devices in DEVICES.values() for device in devices))

#: device type -> backends in order of preference; an op takes the first that implements it and is
#: usable there, as `default_backend` says
PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}


def default_backend(op: str, device: str) -> str:
    """Backend of an op where nobody asks for one; "" if no backend has the op for the device.

    CPUs: C++. GPUs: CUDA C++ where it is built and has the op, else Triton.
    """
    candidates = [
        backend for backend in PREFERENCE.get(device, ()) if (op, backend) in IMPLEMENTATIONS
    ]
    usable = [backend for backend in candidates if why_unusable(backend) is None]
    return (usable or candidates or [""])[0]


def why_unusable(backend: str) -> str | None:
    """Reason why `backend` cannot run on this machine; None if it can."""
    if backend == "cpp":
        return native.why_unusable()
    if backend == "cuda":
        return cuda.why_unusable()
    if backend == "triton":
        return why_triton_unusable()
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "True", "on")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_triton_unusable() -> str | None:
    """Reason why Triton's kernels do not run here; None if they do."""
    if not _has_triton():
        return "triton is not installed (`pip install triton`)"
    if not interpreting() and not torch.cuda.is_available():
        return "no GPU that PyTorch can use (CPU tensors need the interpreter: TRITON_INTERPRET=1)"
    return None


def environment_backend(device: str) -> str:
    """What TWA_KERNELS_BACKEND asks for on `device`; "" if nothing.

    One backend for every device ("reference"), or one per device ("cuda:triton,cpu:reference").
    A device that is not named keeps its default. Raises RuntimeError on anything else.
    """
    chosen = ""
    for entry in filter(None, (e.strip() for e in os.environ.get(ENVIRONMENT, "").split(","))):
        where, colon, backend = entry.rpartition(":")
        if backend not in DEVICES or (colon and where not in KNOWN_DEVICES):
            raise RuntimeError(
                f"{ENVIRONMENT}: expected a backend ({', '.join(DEVICES)}) or device:backend pairs"
                f" such as cuda:triton,cpu:cpp (devices: {', '.join(KNOWN_DEVICES)}),"
                f" found {entry!r}"
            )
        if where in ("", device):
            chosen = backend
    return chosen


@overload
def select(
    op: Literal["pack"], device: str, override: str = ""
) -> Callable[..., tuple[int, int, int] | None]: ...
@overload
def select(
    op: Literal["unpack", "reconstruct"], device: str, override: str = ""
) -> Callable[..., list[Tensor]]: ...
@overload
def select(
    op: Literal["project", "step", "gram"], device: str, override: str = ""
) -> Callable[..., Tensor]: ...
@overload
def select(
    op: Literal["orthonormalize_pass"], device: str, override: str = ""
) -> Callable[..., tuple[Tensor, Tensor]]: ...
@overload
def select(op: str, device: str, override: str = "") -> Kernel: ...
def select(op: str, device: str, override: str = "") -> Kernel:
    """Implementation of `op` on tensors of `device` ("cpu", "cuda", ...).

    It never picks another backend than the one chosen, by, in this order: `override` (an op's
    `backend` argument), the environment variable TWA_KERNELS_BACKEND, `default_backend`.

    Raises RuntimeError when the chosen backend is absent or does not run on that device.
    """
    backend = override or environment_backend(device) or default_backend(op, device)
    if not backend:
        raise RuntimeError(
            f"twa_kernels.{op} has no kernel for {device} tensors yet; "
            f"pass backend='reference' (plain PyTorch) or set {ENVIRONMENT}=reference"
        )
    if backend not in DEVICES:
        raise RuntimeError(
            f"unknown backend {backend!r} for twa_kernels.{op}: expected one of {sorted(DEVICES)}"
        )
    if (op, backend) not in IMPLEMENTATIONS or device not in DEVICES[backend]:
        raise RuntimeError(
            f"backend {backend!r} does not implement twa_kernels.{op} for {device} tensors"
        )
    if backend == "triton" and device == "cpu" and not interpreting():
        raise RuntimeError(
            f"backend 'triton' runs twa_kernels.{op} on CPU tensors only in Triton's interpreter: "
            "set TRITON_INTERPRET=1"
        )
    if reason := why_unusable(backend):
        raise RuntimeError(f"backend {backend!r} of twa_kernels.{op} is not usable: {reason}")
    return IMPLEMENTATIONS[op, backend]
