"""Worker: launch configurations of one op side by side. `python -m gpucheck.variants`.

    VARIANTS[backend](op, bits)  yields (name, context): calls inside `context()` use the variant

Rounds go through all variants in turn, so that a clock that drifts meets all of them alike.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from . import rehearsal
from .cases import DEVICE, DTYPES, backend_of, call, make, wait
from .children import label, one_line, serve
from .events import emit
from .speed import tiles_of, timer

import twa_kernels.backends.cuda  # isort: skip
from twa_kernels import tune  # isort: skip

ROUNDS, MOST = 3, 8
Variants = Iterator[tuple[str, Callable[[], AbstractContextManager]]]


def triton(op: str, bits: int) -> Variants:
    from twa_kernels.backends.triton import config

    arch = config.architecture(DEVICE)
    shipped = config.configuration(op, bits, arch)
    yield "shipped", contextlib.nullcontext
    # One number at a time (tiles of reconstruct follow from its warps): what matters shows.
    most = 2 if op == "reconstruct" else 1
    every = tune.candidates(op, bits)
    changes = ({k: v for k, v in c.items() if shipped.get(k) != v} for c in every)
    for change in itertools.islice((c for c in changes if 1 <= len(c) <= most), MOST):
        name = " ".join(f"{k} {v}" for k, v in change.items())
        yield name, functools.partial(config.overridden, op, bits, arch, change)


@contextlib.contextmanager
def separate_launches() -> Iterator[None]:
    """A step as project, update and reconstruct, instead of one kernel."""
    cuda, build = twa_kernels.backends.cuda, twa_kernels.backends.cuda.step_tasks
    cuda.step_tasks = lambda work, window, device: None
    try:
        yield
    finally:
        cuda.step_tasks = build


#: csrc/twa.h, CudaVariant: other ways to launch project, reconstruct and step; and those of step
RING: dict[str, dict[str, int | bool]] = {
    "no fence before a copy": {"fence": False},
    "rings of 5 KiB": {"ring_kib": 5},
    "rings of 20 KiB": {"ring_kib": 20},
}
STEP: dict[str, dict[str, int | bool]] = {
    "2 blocks a multiprocessor": {"step_blocks": 2},
    "4 blocks a multiprocessor": {"step_blocks": 4},
}


@contextlib.contextmanager
def cuda_variant(options: dict[str, int | bool]) -> Iterator[None]:
    twa_kernels.backends.cuda.set_variant(**options)
    try:
        yield
    finally:
        twa_kernels.backends.cuda.set_variant()


def cuda(op: str, bits: int) -> Variants:
    yield "shipped", contextlib.nullcontext
    if op in ("project", "reconstruct", "step"):
        for name, options in (RING | (STEP if op == "step" else {})).items():
            yield name, functools.partial(cuda_variant, options)
    if op == "step":
        yield "separate launches", separate_launches


VARIANTS: dict[str, Callable[[str, int], Variants]] = {"cuda": cuda, "triton": triton}


def run(case: dict) -> dict:
    rehearsal.plant("variants", case)
    op, bits, n, backend = case["op"], case["bits"], case["n"], case["backend"]
    tiles, sets = tiles_of(op, n, bits, 4)
    of = make(n, tiles, bits, DEVICE, max(1, sets), op == "pack", DTYPES["fp32"])
    variants = list(VARIANTS[backend](op, bits))
    times, refused = {}, {}
    for turn, (name, context) in itertools.product(range(ROUNDS), variants):
        if name in refused:
            continue
        try:
            with context():
                run_op = functools.partial(call, op, of, backend_of(case))
                found = timer()(run_op, budget=0.05, profile=False)
            times.setdefault(name, []).append(found["ms"])
            emit(1, event="variant", of=label(case), variant=name, turn=turn, ms=found["ms"])
        except Exception as error:  # a configuration that the compiler refuses is a result too
            refused[name] = one_line(error)
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    best = min(medians, key=medians.get)
    note = f"{best}: {medians[best] / medians['shipped']:.3f} of the shipped time"
    return {"result": "measured", "note": note, "variants": medians, "refused": refused}


if __name__ == "__main__":
    serve(run, wait)
