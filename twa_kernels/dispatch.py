"""Which backend runs an op: one table, one override, no silent fallback."""

from __future__ import annotations

import os
from collections.abc import Callable

from . import native, reference

#: (op, device type) -> backend used unless overridden
DEFAULTS: dict[tuple[str, str], str] = {
    ("pack", "cpu"): "cpp",
    ("unpack", "cpu"): "cpp",
    ("project", "cpu"): "cpp",
    ("reconstruct", "cpu"): "cpp",
    ("step", "cpu"): "cpp",
    ("pack", "cuda"): "cuda",
}

#: (op, backend) -> implementation
IMPLEMENTATIONS: dict[tuple[str, str], Callable] = {
    ("pack", "reference"): reference.pack,
    ("unpack", "reference"): reference.unpack,
    ("project", "reference"): reference.project,
    ("reconstruct", "reference"): reference.reconstruct,
    ("step", "reference"): reference.step,
    ("pack", "cpp"): native.pack,
    ("unpack", "cpp"): native.unpack,
    ("project", "cpp"): native.project,
    ("reconstruct", "cpp"): native.reconstruct,
    ("step", "cpp"): native.step,
    ("pack", "cuda"): native.pack_cuda,
}

#: backend -> device types it runs on
DEVICES: dict[str, tuple[str, ...]] = {"cpp": ("cpu",), "cuda": ("cuda",), "reference": ("cpu", "cuda", "mps", "xpu")}

OPS = ("pack", "unpack", "project", "reconstruct", "step")
ENVIRONMENT = "TWA_KERNELS_BACKEND"


def why_unusable(backend: str) -> str | None:
    """None if `backend` can run on this machine, else the reason."""
    if backend == "cpp":
        return native.why_unusable()
    if backend == "cuda":
        return native.why_cuda_unusable()
    return None


def select(op: str, device: str, override: str = "") -> Callable:
    """Implementation of `op` on tensors of `device` ("cpu", "cuda", ...).

    Order: `override` (an op's `backend` argument), the environment variable TWA_KERNELS_BACKEND, the table DEFAULTS.
    Raises RuntimeError when the chosen backend is absent or does not run on that device; it never picks another one.
    """
    backend = override or os.environ.get(ENVIRONMENT, "") or DEFAULTS.get((op, device), "")
    if not backend:
        raise RuntimeError(
            f"twa_kernels.{op} has no kernel for {device} tensors yet; pass backend='reference' (plain PyTorch) or set {ENVIRONMENT}=reference"
        )
    if backend not in DEVICES:
        raise RuntimeError(f"unknown backend {backend!r} for twa_kernels.{op}: expected one of {sorted(DEVICES)}")
    if (op, backend) not in IMPLEMENTATIONS or device not in DEVICES[backend]:
        raise RuntimeError(f"backend {backend!r} does not implement twa_kernels.{op} for {device} tensors")
    if reason := why_unusable(backend):
        raise RuntimeError(f"backend {backend!r} of twa_kernels.{op} is not usable: {reason}")
    return IMPLEMENTATIONS[op, backend]
