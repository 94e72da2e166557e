"""Relative error of the packed basis per bit width.

Beside it the published per-tensor min/max quantiser, and a rotated variant: a 128-column Hadamard
rotation before and after, which makes heavy tails Gaussian.

||P - dequantised P|| / ||P|| on Gaussian rows, Student-t(4) rows, and the deltas of the demo's own
checkpoints (candidate - mean, all tensors of two dimensions).

Run: python bench/quantisation_error.py [--checkpoints 'twa-demo/checkpoints/*.safetensors'].
Writes bench/results/quantisation_error.md.
"""

from __future__ import annotations

import argparse
import glob
import sys

import torch
import twa
from common import RESULTS
from torch import Tensor
from twa.io.tables import markdown_table

import twa_kernels as tk

BITS = (8, 4, 3, 2, 1)


def min_max_error(v: Tensor, bits: int) -> float:
    """Published quantiser: 2^bits uniform levels from the tensor's minimum to its maximum."""
    low, high = v.min(), v.max()
    step = (high - low) / (2**bits - 1)
    back = low + torch.round((v - low) / step) * step
    return ((back - v).norm() / v.norm()).item()


def hadamard(size: int) -> Tensor:
    h = torch.ones(1, 1)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / size**0.5


def rotated(v: Tensor) -> Tensor:
    """Rotates whole groups of 128 columns.

    The rotation is orthonormal, so errors are the same before and after turning back.
    """
    groups = v[: v.numel() // 128 * 128].view(-1, 128)
    return (groups @ hadamard(128)).flatten()


def samples(pattern: str) -> dict[str, list[Tensor]]:
    torch.manual_seed(0)
    data = {
        "Gaussian": [torch.randn(1 << 20)],
        "Student-t(4)": [torch.distributions.StudentT(4.0).sample((1 << 20,))],
    }
    if not glob.glob(pattern):
        sys.exit(f"no checkpoints match {pattern}: run `make demo` first, or pass --checkpoints")
    candidates = twa.Candidates(pattern)
    mean = twa.averages.uniform(len(candidates))
    deltas = []
    for key, info in candidates.info.items():
        if len(info.shape) == 2:
            center = candidates.weighted(key, mean)
            deltas += [
                (c.tensor(key).float() - center).flatten() for c in (candidates[0], candidates[-1])
            ]
    return data | {"checkpoint deltas": deltas}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", default="twa-demo/checkpoints/*.safetensors")
    args = parser.parse_args()
    header, rows = ["data", "quantiser", *(f"{b} bits" for b in BITS), ""], []
    for name, vectors in samples(args.checkpoints).items():
        for quantiser, error in (
            ("packed (ours)", tk.relative_error),
            ("packed, rotated", lambda v, b: tk.relative_error(rotated(v), b)),
            ("published min/max", min_max_error),
        ):
            means = [sum(error(v, b) for v in vectors) / len(vectors) for b in BITS]
            rows.append([name, quantiser, *(f"{m:.4f}" for m in means), ""])
    table = markdown_table(header, rows)
    print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quantisation_error.md").write_text(f"# Relative quantisation error\n\n{table}\n")


if __name__ == "__main__":
    main()
