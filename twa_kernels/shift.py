"""Packed groups of 128 columns without their first ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends.reference import bytes_to_codes, codes_to_bytes
from .layout import TILE

CODES = 1 << 22  # at a time, of 8 bytes


def shift_columns(codes: Tensor, shift: Tensor, bits: int) -> None:
    """Moves each row's codes of a group by so many places to its begin, in place.

    Column c of a group is then the one that was shift + c. Its last columns are padding.

    Args:
        codes: (groups, n, 16 * bits) uint8
        shift: (groups,) int64, 0 to 127
        bits: 8, 4, 3, 2 or 1
    """
    moved = torch.nonzero(shift).flatten()
    for at in moved.split(max(1, CODES // (codes.shape[1] * TILE))):
        columns = (torch.arange(TILE, device=codes.device) + shift[at, None]) % TILE
        values = bytes_to_codes(codes[at], bits)  # (groups, n, 128)
        values = values.gather(2, columns[:, None].expand_as(values))
        codes[at] = codes_to_bytes(values, bits)
