"""Which backend runs an op: one table, one override, no silent fallback."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import native
from .backends import cuda

#: an op's implementation; its operands are those of backends/reference.py's function of that name
Kernel = Callable[..., Any]

ENVIRONMENT = "TWA_KERNELS_BACKEND"


class BackendError(RuntimeError):
    """No backend can run an op here, or the one that is asked for cannot."""


@dataclass(frozen=True)
class Backend:
    """Where implementations are, and what they can do.

    Attributes:
        module: implements an op by a function of its name; or package of modules that do, each
            named as its op, imported when first run.
        devices: device types it runs on ("cuda" is PyTorch's name for AMD GPUs too).
        why_unusable: reason why it does not run on this machine; None if it does.
        is_package: whether `module` is such a package.
        counts_steps_on_device: whether its `step` reads the number of steps from the device.
    """

    module: str
    devices: tuple[str, ...]
    why_unusable: Callable[[], str | None]
    is_package: bool = False
    counts_steps_on_device: bool = False

    def implements(self, op: str) -> bool:
        """Whether it has the op; nothing slow is imported to find out."""
        if self.is_package:
            return importlib.util.find_spec(f"{self.module}.{op}") is not None
        return hasattr(importlib.import_module(self.module), op)

    def kernel(self, op: str) -> Kernel:
        """Its implementation of an op that it has."""
        module = f"{self.module}.{op}" if self.is_package else self.module
        return getattr(importlib.import_module(module), op)


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


_HERE = f"{__package__}.backends"
BACKENDS: dict[str, Backend] = {
    "cpp": Backend(f"{_HERE}.cpu", ("cpu",), native.why_unusable),
    "cuda": Backend(
        f"{_HERE}.cuda", ("cuda",), lambda: cuda.why_unusable(), counts_steps_on_device=True
    ),
    # cpu: under the interpreter only
    "triton": Backend(f"{_HERE}.triton", ("cuda", "cpu"), why_triton_unusable, is_package=True),
    "reference": Backend(f"{_HERE}.reference", ("cpu", "cuda", "mps", "xpu"), lambda: None),
}

#: every device type that some backend runs on
KNOWN_DEVICES = tuple(dict.fromkeys(d for backend in BACKENDS.values() for d in backend.devices))

#: device type -> backends in order of preference; an op takes the first that implements it and is
#: usable there, as `default_backend` says
PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}


def why_unusable(backend: str) -> str | None:
    """Reason why `backend` cannot run on this machine; None if it can."""
    return BACKENDS[backend].why_unusable()


@functools.cache
def has(op: str, backend: str) -> bool:
    """Whether a backend implements an op, on whatever device."""
    return BACKENDS[backend].implements(op)


def default_backend(op: str, device: str) -> str:
    """Backend of an op where nobody asks for one; "" if no backend has the op for the device.

    CPUs: C++. GPUs: CUDA C++ where it is built and has the op, else Triton.
    """
    candidates = [name for name in PREFERENCE.get(device, ()) if has(op, name)]
    usable = [name for name in candidates if why_unusable(name) is None]
    return (usable or candidates or [""])[0]


def environment_backend(device: str) -> str:
    """What TWA_KERNELS_BACKEND asks for on `device`; "" if nothing.

    One backend for every device ("reference"), or one per device ("cuda:triton,cpu:reference").
    A device that is not named keeps its default. Raises BackendError on anything else.
    """
    return _asked_for(os.environ.get(ENVIRONMENT, ""), device)


@functools.lru_cache(maxsize=64)
def _asked_for(value: str, device: str) -> str:
    chosen = ""
    for entry in filter(None, (e.strip() for e in value.split(","))):
        where, colon, backend = entry.rpartition(":")
        if backend not in BACKENDS or (colon and where not in KNOWN_DEVICES):
            raise BackendError(
                f"{ENVIRONMENT}: expected a backend ({', '.join(BACKENDS)}) or device:backend pairs"
                f" such as cuda:triton,cpu:cpp (devices: {', '.join(KNOWN_DEVICES)}),"
                f" found {entry!r}"
            )
        if where in ("", device):
            chosen = backend
    return chosen


def _chosen(op: str, device: str, override: str) -> str:
    return override or environment_backend(device) or default_backend(op, device)


def implements(op: str, device: str, override: str = "") -> bool:
    """Whether `select` has a kernel: for an op that others can stand in for."""
    backend = _chosen(op, device, override)
    return backend in BACKENDS and has(op, backend)


def backend_of(op: str, device: str, override: str = "") -> Backend:
    """The backend that runs `op` on tensors of `device` ("cpu", "cuda", ...).

    Never another than the one chosen, by, in this order: `override` (an op's `backend` argument),
    the environment variable TWA_KERNELS_BACKEND, `default_backend`.

    Raises BackendError when the chosen backend is absent or does not run on that device.
    """
    name = _chosen(op, device, override)
    if not name:
        raise BackendError(
            f"twa_kernels.{op} has no kernel for {device} tensors yet; "
            f"pass backend='reference' (plain PyTorch) or set {ENVIRONMENT}=reference"
        )
    if name not in BACKENDS:
        raise BackendError(
            f"unknown backend {name!r} for twa_kernels.{op}: expected one of {sorted(BACKENDS)}"
        )
    backend = BACKENDS[name]
    if not has(op, name) or device not in backend.devices:
        raise BackendError(
            f"backend {name!r} does not implement twa_kernels.{op} for {device} tensors"
        )
    if name == "triton" and device == "cpu" and not interpreting():
        raise BackendError(
            f"backend 'triton' runs twa_kernels.{op} on CPU tensors only in Triton's interpreter: "
            "set TRITON_INTERPRET=1"
        )
    if reason := why_unusable(name):
        raise BackendError(f"backend {name!r} of twa_kernels.{op} is not usable: {reason}")
    return backend


def select(op: str, device: str, override: str = "") -> Kernel:
    """Implementation of `op` on tensors of `device`, of the backend that `backend_of` names."""
    return backend_of(op, device, override).kernel(op)
