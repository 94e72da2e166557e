"""`average` on GPUs: plain PyTorch, in parts. Rows come from files, at a tenth of its speed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 20  # columns of a float64 sum: 8 MB, and as much for a row


def average(rows: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    """out = sum_i weights[i] * rows[i], summed in float64 in order: the bits of the CPU's.

    Rows of weight 0 do not count.
    """
    to = out.view(-1)
    flat = [(w, row.reshape(-1)) for w, row in zip(weights, rows, strict=True) if w != 0.0]
    for begin in range(0, to.numel(), CHUNK):
        at = slice(begin, begin + CHUNK)
        total = torch.zeros_like(to[at], dtype=torch.float64)
        for w, row in flat:
            total += row[at].double().mul_(w)  # a rounding for the product, one for the sum
        to[at] = total
