"""record: a new snapshot of weights as low-bit differences from the decoded one before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout import check_bits, total_tiles
from ..native import empty_for_streaming
from ..operands import RecordArgs, as_list, check_disjoint
from ..registry import select
from .define import Flat, define


def record(
    weights: Tensor | Sequence[Tensor],
    reference: Tensor | Sequence[Tensor],
    bits: int = 4,
    backend: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes weights - reference, and moves the reference to what a reader of the codes gets.

    Called again and again with the weights of a run, it records their trajectory. Each difference
    is from the decoded snapshot before it, so errors do not add up: the next one mends them.
    `replay` reads what was recorded.

    Plain PyTorch, unquantised: `d = weights - reference; reference += d`.

    Args:
        weights: one tensor per tensor of the model, float32, bfloat16 or float16.
        reference: float32 tensors of as many elements, contiguous; updated in place. At first the
            first snapshot.
        bits: 8, 4, 3, 2 or 1; the quantiser is that of `pack`.
        backend: the one to run; "": the default of the device (registry.py).

    Returns:
        codes (tiles, 16 * bits) uint8, in the layout of one row of a PackedBasis; scales (tiles,)
        bfloat16, of 4 significant bits; and bad, () int32. Where bad is not 0, a weight is NaN, Inf
        or at least 2^126, nothing was recorded, and the reference is as it was. On a GPU nothing
        waits for the result.

    Raises:
        ValueError: sizes do not fit.
        TypeError: a dtype is not one of those above.
        RuntimeError: the backend does not run here.
    """
    check_bits(bits)
    weights, reference = as_list(weights), as_list(reference)
    if not weights:
        raise ValueError("weights: expected at least one tensor, found none")
    device = weights[0].device
    tiles = total_tiles(tuple(w.numel() for w in weights))
    codes = empty_for_streaming((tiles, 16 * bits), device)
    scales = torch.empty(tiles, dtype=torch.bfloat16, device=device)
    bad = torch.empty((), dtype=torch.int32, device=device)
    OP(weights, reference, bits, codes, scales, bad, backend)
    return codes, scales, bad


def _with_args(*flat: Any) -> Flat:
    return RecordArgs(*flat[:6]), *flat[6:]


def _run(args: RecordArgs, backend: str) -> None:
    args.check(backend)
    check_disjoint(args.reference, "reference")
    select("record", args.device.type, backend)(args)


OP = define(
    "record",
    "(Tensor[] weights, Tensor(a!)[] reference, int bits, Tensor(b!) codes, Tensor(c!) scales, "
    "Tensor(d!) bad, str backend) -> ()",
    _run,
    RecordArgs.check,
    _with_args,
)
