"""Worker: every op on a small basis against the CPU. `python -m gpucheck.smoke`, cases on stdin.

Outputs are NaN before the call. Packed bytes must be equal, numbers within LIMITS, and a second
call must give the same bits.
"""

from __future__ import annotations

import functools
import math

import torch

import twa_kernels as tk
from twa_kernels import registry

from . import recorded, rehearsal
from .cases import DEVICE, DTYPES, Operands, backend_of, call, error_of, make, poison, wait, walk
from .children import launched, serve

#: dtype of gradients, centers and weights -> largest relative error: float32 sums of exact
#: products; a rounding to 16 bits may fall on the other side
LIMITS = {"fp32": 1e-5, "bf16": 4e-3, "fp16": 5e-4}
TILES = {1: 400, 5: 400, 16: 200}  # by n; else 90


@functools.lru_cache(maxsize=4)
def operands(n: int, bits: int, dtype: str, dense: bool) -> Operands:
    torch.manual_seed(1000 * n + bits)
    return make(n, TILES.get(n, 90), bits, "cpu", dense=dense, dtype=DTYPES[dtype])


def truth() -> str:
    """C++ has the bits of the reference and is quick; the reference where it is not built (yet)."""
    return "cpp" if registry.why_unusable("cpp") is None else "reference"


@functools.lru_cache(maxsize=4)
def expected(op: str, n: int, bits: int, dtype: str) -> list[torch.Tensor]:
    return call(op, operands(n, bits, dtype, op == "pack").copy("cpu"), truth())


def packed_op(case: dict) -> dict:
    op, n, bits, dtype = case["op"], case["n"], case["bits"], case["dtype"]
    of = operands(n, bits, dtype, op == "pack")
    unaligned = case.get("memory") == "unaligned"
    results = []
    for _ in range(2):
        mine = of.copy(DEVICE, unaligned)
        poison(mine)
        result = call(op, mine, backend_of(case))
        launched()
        wait()
        results.append([t.clone() for t in result])
        if unaligned and not untouched(mine):
            return {"result": "wrong", "note": "wrote beside an output"}
    found = rehearsal.spoiled(results[0])
    error = error_of(op, found, expected(op, n, bits, dtype))
    if not error <= LIMITS[dtype]:
        what = (
            "packed bytes differ"
            if op == "pack" and math.isinf(error)
            else f"relative error {error:.1e}"
        )
        return {"result": "wrong", "note": what}
    if not all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
        return {"result": "wrong", "note": "a second call gave other bits"}
    return {"error": error}


def untouched(operands: Operands) -> bool:
    """Whether the numbers beside each unaligned output are still NaN."""
    for _, _, outputs in operands.sets:
        for out in outputs:
            whole = torch.empty(0, dtype=out.dtype, device=out.device).set_(out.untyped_storage())
            if not (whole[0].isnan() and whole[-1].isnan()):
                return False
    return True


def orthonormalize(case: dict) -> dict:
    """Q Q^T = I and W = R Q, in float64."""
    n, dtype, accuracy = case["n"], DTYPES[case["dtype"]], case["accuracy"]
    torch.manual_seed(n)
    W = walk(n, 5003, "cpu", dtype)
    backend = backend_of(case)
    o = tk.orthonormalize(W.to(DEVICE), accuracy=accuracy, backend=backend)
    launched()
    wait()
    (found,) = rehearsal.spoiled([o.Q.cpu().double()])
    loss = float((found @ found.T - torch.eye(len(found))).norm(2))
    exact = W.double()
    error = float((o.R.cpu() @ found - exact).norm() / exact.norm())
    if not (loss < 1e-5 and error < 1e-5):
        return {"result": "wrong", "note": f"loss of orthogonality {loss:.1e}, error {error:.1e}"}
    return {"error": max(loss, error)}


def run(case: dict) -> dict:
    rehearsal.plant("smoke", case)
    if case["op"] in recorded.OPS:
        return recorded.smoke(case, truth(), launched)
    return orthonormalize(case) if case["op"] == "orthonormalize" else packed_op(case)


if __name__ == "__main__":
    serve(run, wait)
