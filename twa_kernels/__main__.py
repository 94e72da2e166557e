"""`python -m twa_kernels`: what is built, what runs here, and why something does not."""

from __future__ import annotations

import os
import platform

import torch

from . import native, ops, registry
from .machine import processor
from .output import lasting_streams
from .version import described


def main() -> None:
    """Prints the report."""
    python = platform.python_version()
    print(f"twa_kernels {described()}   torch {torch.__version__}   Python {python}")
    print(f"CPU: {processor()}, {torch.get_num_threads()} threads")
    if native._C is not None:
        print(f"native module: {native._C.__file__}")
        isa = native._C.cpu_isa() or "not available here"
        wanted = os.environ.get("TWA_KERNELS_ISA", "")
        print(f"  instruction set: {isa} (TWA_KERNELS_ISA={wanted!r})")
        cuda = "not compiled"
        if native._C.with_cuda:
            cuda = "compiled for sm_" + native._C.cuda_architectures.replace(" ", ", sm_")
        print(f"  CUDA: {cuda}")
    print("backends:")
    for name, backend in registry.BACKENDS.items():
        reason = backend.why_unusable()
        state = "usable" if reason is None else f"not usable: {reason}"
        print(f"  {name:10s} {', '.join(backend.devices):20s} {state}")
    print(f"default per op ({registry.ENVIRONMENT}={os.environ.get(registry.ENVIRONMENT, '')!r}):")
    try:
        overrides = {device: registry.environment_backend(device) for device in ("cpu", "cuda")}
    except registry.BackendError as error:
        print(f"  {error}")
        return
    for op in ops.__all__:
        row = [
            f"{device}: {override or registry.default_backend(op, device) or 'none'}"
            for device, override in overrides.items()
        ]
        print(f"  {op:20s} {'   '.join(row)}")


if __name__ == "__main__":
    with lasting_streams():
        main()
