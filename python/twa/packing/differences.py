"""`basis="differences"`: what each candidate has that the one before it has not.

It is coded in a closed loop: a difference is from what a reader of the codes before it gets. So
the sum of the first k rows is the k-th candidate's distance from the first up to the error of one
row, and the errors of many do not add up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import twa_kernels as tk
from twa_kernels.layout import MOST_WEIGHT, TILE, num_tiles

from ..basis.dense import AnyPacker
from ..basis.feed import Feed
from ..distributed.sharding import Sharding
from ..io.averaging import average_into
from ..io.candidates import Block
from ..io.errors import TwaError
from ..io.trail import Trail


def check(sharding: Sharding) -> None:
    """TwaError unless there are differences, and this rank has the candidates that they are of."""
    where = "basis='differences'"
    if len(sharding.candidates) < 2:
        raise TwaError(f"expected at least 2 candidates, found {len(sharding.candidates)}", where)
    if sharding.name == "rows":
        raise TwaError(
            "each row is coded after the one before it, which sharding 'rows' has on another rank;"
            " use 'replicate' or 'columns', or basis='deltas'",
            where,
        )


def pack(packer: AnyPacker, k: int, block: Block, weights: Tensor, center: Tensor) -> None:
    """Packs a block of tensor k, and writes its center, the candidates' own average, to `center`.

    Packed rows have the same bits wherever blocks end.
    """
    average_into(center, block.rows, weights)
    first, *others = (row.reshape(-1) for row in block.rows)
    reference = first.to(torch.float32, copy=True)
    bad = [(~(reference.abs() < MOST_WEIGHT)).any()]  # read once, for all rows
    if isinstance(packer, tk.Packer):
        recorded = [tk.record([row], [reference], packer.bits) for row in others]
        bad += [of_row for _, _, of_row in recorded]
        _check_finite(bad, k, block.begin)
        codes, scales = [code for code, _, _ in recorded], [scale for _, scale, _ in recorded]
        packer.add_recorded(codes, scales, block.begin)
        return
    _check_finite(bad, k, block.begin)
    rows = []
    for row in others:
        rows.append(row.float() - reference)
        reference += rows[-1]
    packer.add_columns(rows, block.begin)


def _check_finite(bad: list[Tensor], k: int, begin: int) -> None:
    """NotFiniteError for the first row of a block of tensor k that is bad."""
    for row, is_bad in enumerate(torch.stack([b.int() for b in bad]).tolist()):
        if is_bad:
            raise tk.NotFiniteError(row, k, begin)


# Rows of a recording, as they are ----------------------------------------------------------------


def recorded(sharding: Sharding, bits: int) -> dict[int, tuple[Trail, int, int]]:
    """Tensors of a recording whose codes can be taken as they are.

    Returns:
        number of the tensor -> trail, number of the tensor in it, and where this rank's part begins
    """
    recording = sharding.candidates.recording
    if recording is None or recording.bits != bits:
        return {}
    found = {}
    for k, (key, shard) in enumerate(zip(sharding.keys, sharding.shards, strict=True)):
        mine = recording.records(key) and sharding.is_packer(k)
        if mine and (place := recording.block(key, shard.part)) is not None:
            found[k] = place
    return found


def take(
    packer: tk.Packer,
    sharding: Sharding,
    k: int,
    place: tuple[Trail, int, int],
    weights: Tensor,
    center: Tensor,
    progress: Callable[[str, int], None] | None,
    feed: Feed,
) -> None:
    """Packs tensor k of a recording without decoding it, and writes its center to `center`."""
    (trail, number, at), flat = place, center.view(-1)
    width = sharding.block_columns
    for begin in range(0, flat.numel(), width):
        end = min(begin + width, flat.numel())
        flat[begin:end] = trail.average(number, at + begin, at + end, weights)
        first = trail.tiles[number] + (at + begin) // TILE
        last = first + num_tiles(end - begin)
        codes = [row.codes(first, last) for row in trail.rows]
        scales = [row.scales(first, last) for row in trail.rows]
        sent = feed.rows([*codes, *scales])
        packer.add_recorded(sent[: len(codes)], sent[len(codes) :], begin)
        if progress:
            progress(sharding.keys[k], 4 * (end - begin) * len(weights))
