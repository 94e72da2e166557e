"""What a call costs beside its kernel, against the number of tensors.

Microseconds of the host: Python, torch.library, tables of addresses; the time inside the native
kernels is taken off. Tensors are so small (130 numbers) that kernels hardly count, as many as a
model may have. GPU rows need no GPU: their kernels are replaced by nothing, all else runs.

    python bench/host_cost.py            the table
    python bench/host_cost.py --save     writes bench/results/host_cost.md
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import twa
from common import publish
from safetensors.torch import save_file
from torch import Tensor, nn

import twa_kernels as tk
from twa_kernels import native
from twa_kernels.backends import cpu, cuda

TENSORS = (1, 150, 400, 1600)
COLUMNS, ROWS = 130, 4
KERNELS = ("average", "pack", "unpack", "project", "reconstruct", "step", "orthonormalize_pass")

Run = Callable[[], object]


class Timed:
    """The native module, with the time spent in its kernels."""

    def __init__(self, module: Any) -> None:
        self.module, self.seconds, self.__name__ = module, 0.0, module.__name__

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.module, name)
        if name not in KERNELS:
            return found

        def run(**operands: object) -> object:
            start = time.perf_counter()
            try:
                return found(**operands)
            finally:
                self.seconds += time.perf_counter() - start

        return run


class WithoutKernels:
    """The native module, whose CUDA kernels do nothing."""

    def __init__(self, module: Any) -> None:
        self.module, self.__name__ = module, module.__name__

    def __getattr__(self, name: str) -> Any:
        if name == "step_window":
            return lambda *_: 528
        if name.endswith("_cuda") or name == "write_table":
            return lambda **_: None
        return getattr(self.module, name)


class NoKernel:
    """A Triton kernel that does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *_, **__: None


@contextlib.contextmanager
def replaced(values: list[tuple[Any, str, object]]) -> Iterator[None]:
    """(object, name, value): attributes for a while."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in values]
    for owner, name, value in values:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def microseconds(run: Run, timed: Timed, budget: float = 0.5) -> float:
    """Median time of a call without its kernels, after two to warm up."""
    run(), run()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 7 or (time.perf_counter() - begin < budget and len(times) < 200):
        timed.seconds, start = 0.0, time.perf_counter()
        run()
        times.append(time.perf_counter() - start - timed.seconds)
    return 1e6 * sorted(times)[len(times) // 2]


def ops(count: int, backend: str) -> dict[str, Run]:
    """Each op on so many tensors."""
    rows = [torch.randn(ROWS, COLUMNS) for _ in range(count)]
    center, grads, weights = ([torch.randn(COLUMNS) for _ in range(count)] for _ in range(3))
    basis = tk.pack(rows, 4, center, segments=[0] * count, backend="cpp")
    x, state, options = torch.zeros(ROWS, 1), {}, {"lr": 0.01}
    return {
        "project": lambda: tk.project(basis, grads, backend),
        "reconstruct into weights": lambda: tk.reconstruct(basis, x, center, weights, backend),
        "step": lambda: tk.step(
            basis,
            grads,
            x,
            weights,
            center,
            rule="adamw",
            options=options,
            state=state,
            backend=backend,
        ),
        "project, one tensor at a time": singly(basis, grads, backend),
    }


def singly(basis: tk.PackedBasis, grads: list[Tensor], backend: str) -> Run:
    """What low_memory does inside backward."""
    parts = [basis.select(k)[0] for k in range(len(grads))]
    return lambda: [tk.project(part, [g], backend) for part, g in zip(parts, grads, strict=True)]


class Many(nn.Module):
    """So many small parameters."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(COLUMNS) for _ in range(count))


def trainer(count: int, folder: Path) -> dict[str, Run]:
    """A step of the optimizer, and low_memory's backward and step beside a plain backward."""
    paths = []
    for k in range(ROWS):
        torch.manual_seed(k)
        paths.append(folder / f"{count}_{k}.safetensors")
        save_file(Many(count).state_dict(), paths[-1])

    def made(low_memory: bool) -> tuple[Many, twa.SubspaceOptimizer]:
        model = Many(count)
        subspace = twa.Subspace.from_candidates(model, twa.Candidates(paths), bits=4)
        optimizer = twa.SubspaceOptimizer(
            subspace, torch.optim.AdamW, lr=0.01, low_memory=low_memory
        )
        return model, optimizer

    model, optimizer = made(False)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    low_model, low = made(True)
    gradients = [torch.randn(COLUMNS) for _ in range(count)]

    def low_memory_step() -> None:
        torch.autograd.backward(list(low_model.parameters()), gradients)
        low.step()
        low.zero_grad()

    return {
        "SubspaceOptimizer.step": optimizer.step,
        "low_memory, backward + step": low_memory_step,
    }


@contextlib.contextmanager
def without_gpu(backend: str) -> Iterator[None]:
    """A GPU backend on CPU tensors, its kernels replaced by nothing."""
    table = dict(tk.registry.BACKENDS)
    backends = {name: replace(b, why_unusable=lambda: None) for name, b in table.items()}
    backends["cuda"] = replace(backends["cuda"], devices=("cuda", "cpu"))
    changes: list[tuple[Any, str, object]] = [(tk.registry, "BACKENDS", backends)]
    if backend == "cuda":
        changes.append((cuda, "module", WithoutKernels(native._C)))
    else:
        from twa_kernels.backends.triton import project, reconstruct, step

        changes += [(project, "project_kernel", NoKernel()), (project, "sum_kernel", NoKernel())]
        changes += [(reconstruct, "reconstruct_kernel", NoKernel())]
        changes += [(step, "update_kernel", NoKernel())]
        changes += [(tk.registry, "interpreting", lambda: True)]
    with replaced(changes):
        yield


def table() -> list[str]:
    """Rows: op and backend; columns: numbers of tensors."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in TENSORS:
            timed = Timed(native._C)
            with replaced([(cpu, "_C", timed)]):
                runs = ops(count, "cpp") | trainer(count, Path(folder))
                for name, run in runs.items():
                    found.setdefault(f"{name}, C++", []).append(microseconds(run, timed))
            for backend in ("cuda", "triton"):
                if backend == "cuda" and not native._C.with_cuda:
                    continue
                with without_gpu(backend):
                    for name, run in ops(count, backend).items():
                        key = f"{name}, {'CUDA C++' if backend == 'cuda' else 'Triton'}"
                        found.setdefault(key, []).append(microseconds(run, Timed(native._C)))
    lines = [f"| microseconds at so many tensors | {' | '.join(map(str, TENSORS))} |"]
    lines.append("|---|" + "--:|" * len(TENSORS))
    return lines + [
        f"| {name} | " + " | ".join(f"{t:.0f}" for t in times) + " |"
        for name, times in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    head = [
        "# Host cost",
        "",
        "Microseconds of a call beside its kernel (`python bench/host_cost.py`).",
        f"{COLUMNS} numbers a tensor, {ROWS} rows, 4 bits.",
        "Kernels of GPUs are replaced by nothing.",
        "",
    ]
    publish("host_cost", head + table(), args.save)


if __name__ == "__main__":
    main()
