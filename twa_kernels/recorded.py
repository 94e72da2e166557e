"""Rows that `record` has coded, as a basis has them, and their squared norms: not decoded."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .backends.reference import bytes_to_codes
from .layout import LEVELS, TILE
from .operands import check_tensor

CHUNK = 8192  # tiles at a time: indices of four bytes for two of codes stay in the cache


def regroup(
    codes: Sequence[Tensor], scales: Sequence[Tensor], numel: int, into: Tensor, into_scales: Tensor
) -> Tensor:
    """Writes the rows' tiles side by side, as PackedBasis has them, at the speed of memory.

    Args:
        codes: n tensors (tiles, 16 * bits) uint8
        scales: n tensors (tiles,) bfloat16
        numel: real columns of these tiles; the last one may have fewer than 128
        into: (tiles, n, 16 * bits) uint8, written
        into_scales: (tiles, n) bfloat16, written

    Returns:
        squared norms of each row's tiles, (n, tiles) float64

    Raises:
        ValueError: a size does not fit, or a scale is none that `record` makes
        TypeError: a dtype is another
    """
    tiles, n, row = into.shape
    for i in range(n):
        check_tensor(f"codes[{i}]", codes[i], (tiles, row), torch.uint8, into.device)
        check_tensor(f"scales[{i}]", scales[i], (tiles,), torch.bfloat16, into.device)
    torch.stack(list(codes), 1, out=into)
    torch.stack(list(scales), 1, out=into_scales)
    pattern = into_scales.view(torch.int16)
    if ((pattern < 0) | (pattern >= 0x7F80) | (pattern & 15 != 0)).any():
        raise ValueError("scales: expected finite numbers of 4 significant bits, at least 0")
    pairs = zip(codes, scales, strict=True)
    return torch.stack([squared_norms(c, s, row // 16, numel) for c, s in pairs])


def squared_norms(codes: Tensor, scales: Tensor, bits: int, numel: int) -> Tensor:
    """sum_c (scale * level[code(c)])^2 of each tile, exact.

    Plain PyTorch: `(scales.double()[:, None] * levels).square().sum(1)`, padding left out.

    Two bytes of codes are looked up at a time; the sum of levels^2 is an integer of at most 2^21,
    and the square of a scale has 8 significant bits.

    Args:
        codes: (tiles, 16 * bits) uint8
        scales: (tiles,) bfloat16, of 4 significant bits
        bits: 8, 4, 3, 2 or 1
        numel: real columns of these tiles; the last one may have fewer than 128

    Returns:
        (tiles,) float64
    """
    table = _squares_of_pairs(bits, codes.device)
    total = torch.empty(len(codes), dtype=torch.float32, device=codes.device)
    for first in range(0, len(codes), CHUNK):
        pairs = _pairs(codes[first : first + CHUNK], bits)
        found = torch.index_select(table, 0, pairs.flatten()).view(pairs.shape)
        total[first : first + CHUNK] = found.sum(1)
    if odd := numel % TILE:
        levels = torch.tensor(LEVELS[bits], dtype=torch.float32, device=codes.device)
        total[-1] = levels[bytes_to_codes(codes[-1], bits)[:odd]].square().sum()
    return total.double() * scales.double().square()


def _pairs(codes: Tensor, bits: int) -> Tensor:
    """Two bytes of codes as one index, (tiles, 8 * bits) int32.

    At 3 bits: four codes' low bits in the first byte, (tiles, 32); their high bits are bits 0, 2, 4
    and 6 of the second.
    """
    if bits != 3:
        return codes.view(torch.uint16).int()
    low, high = codes[:, :32].int(), codes[:, 32:].int()
    return low | torch.cat([high, high >> 1], 1) << 8


@functools.lru_cache
def _squares_of_pairs(bits: int, device: torch.device) -> Tensor:
    """The sum of level^2 of the codes in two bytes, as `_pairs` puts them: (65536,) float32."""
    index = torch.arange(1 << 16, device="cpu")
    if bits == 3:
        fields = [index >> f & 3 | (index >> 8 + f & 1) << 2 for f in (0, 2, 4, 6)]
    else:
        fields = [index >> f & (1 << bits) - 1 for f in range(0, 16, bits)]
    squares = torch.tensor(LEVELS[bits], dtype=torch.float32, device="cpu").square()
    return torch.stack([squares[f] for f in fields]).sum(0).to(device)
