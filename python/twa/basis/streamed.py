"""`StreamedBasis`: a packed basis that stays in host memory, for a device that has no room for it.

    host      codes and scales, in memory or mapped from their file; the center
    device    two buffers as large as a block; row_scale (n, L), tile_segment (num_tiles,)

A block is a run of whole tiles, of one tensor or several. It is copied while the one before it is
computed with. A step copies all of the basis twice, to project and to reconstruct, and the center
once: 2 n D (bits / 8 + 1 / 128) + 4 D bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Size, Tensor

import twa_kernels as tk
from twa_kernels.layout import TILE, num_tiles

from ..io.candidates import BLOCK_BYTES
from .feed import Feed


class Relay:
    """Two feeds in turn: a block is on its way while the one before it is used.

    As with `Feed`, a block is valid until the next one is asked for, for work that is queued on the
    stream that was current when it was asked for.

    Args:
        device: where blocks are wanted
        staged: as for `Feed`
    """

    def __init__(self, device: torch.device, staged: bool | None = None) -> None:
        self.device = device
        self.feeds = Feed(device, staged), Feed(device, staged)
        self._turn = 0
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._user: torch.cuda.Stream | None = None  # who was given the last block
        self._used: torch.cuda.Event | None = None  # behind what uses the block before that

    def rows(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the CPU, on the device."""
        self._turn = 1 - self._turn
        feed = self.feeds[self._turn]
        if self._side is None:
            return feed.rows(rows)
        if self._used is not None:
            self._side.wait_event(self._used)
        self._used = None if self._user is None else self._user.record_event()
        with torch.cuda.stream(self._side):
            sent = feed.rows(rows)
            here = self._side.record_event()
        self._user = torch.cuda.current_stream(self.device)
        self._user.wait_event(here)
        for t in sent:  # made on the side stream: its memory is nobody else's before this is done
            t.record_stream(self._user)
        return sent


@dataclass(frozen=True)
class Block:
    """A run of tiles that is on the device at once.

    Attributes:
        tiles: of the basis
        pieces: (tensor, its columns) of each tensor that has some of them
        tile_segment: (tiles,) int32, on the device; made once, since kernels keep what they derive
            from it
    """

    tiles: slice
    pieces: list[tuple[int, slice]]
    tile_segment: Tensor


class StreamedBasis:
    """P in host memory, for a model on a device; the counterpart of twa_kernels.PackedBasis.

    Args:
        host: on the CPU
        device: where gradients and weights are
        block_bytes: that are copied at once; 0: BLOCK_BYTES
        relay: what copies them; None: two buffers of its own, used for copies to other devices than
            the CPU

    Attributes:
        host: as it was given
        device: as it was given
    """

    def __init__(
        self,
        host: tk.PackedBasis,
        device: torch.device | str,
        block_bytes: int = 0,
        relay: Relay | None = None,
    ) -> None:
        self.host, self.device = host, torch.device(device)
        self.block_bytes = block_bytes or BLOCK_BYTES
        self.relay = relay or Relay(self.device)
        self._row_scale = host.row_scale.to(self.device)
        self._blocks = self._cut()

    def _cut(self) -> list[Block]:
        """The blocks, each of as many tiles as make block_bytes with their part of the center."""
        host, segment = self.host, self.host.tile_segment.to(self.device)
        width = max(1, self.block_bytes // (host.n * (16 * host.bits + 1) + 4 * TILE))
        made: list[Block] = []
        pieces: list[tuple[int, slice]] = []
        begin = at = 0  # tiles

        def end_block() -> None:
            tiles = slice(begin, at)
            made.append(Block(tiles, pieces, segment[tiles].clone()))

        for k, numel in enumerate(host.numels):
            column = 0
            while column < numel:
                end = min(numel, column + (begin + width - at) * TILE)
                pieces.append((k, slice(column, end)))
                at, column = at + num_tiles(end - column), end
                if at == begin + width:
                    end_block()
                    begin, pieces = at, []
        if pieces:
            end_block()
        return made

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.host.n

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.host.bits

    @property
    def num_segments(self) -> int:
        """Number of segments, L."""
        return self.host.num_segments

    @property
    def shapes(self) -> tuple[Size, ...]:
        """Shape of each tensor, in order."""
        return self.host.shapes

    @property
    def nbytes(self) -> int:
        """Bytes of the packed tensors, in host memory."""
        return self.host.nbytes

    @property
    def copied(self) -> int:
        """Bytes sent to the device so far."""
        return sum(feed.copied for feed in self.relay.feeds)

    def select(self, k: int, count: int = 1) -> tuple[StreamedBasis, slice]:
        """The basis of `count` tensors from k on, and which segments their coefficients are."""
        host, columns = self.host.select(k, count)
        return StreamedBasis(host, self.device, self.block_bytes, self.relay), columns

    def _sent(
        self, blocks: Sequence[Block], center: Sequence[Tensor] | None = None
    ) -> Iterator[tuple[Block, tk.PackedBasis, list[Tensor]]]:
        """Each block, its basis on the device, and its pieces of the center there."""
        scales = self.host.scales.view(torch.uint8)
        for block in blocks:
            rows = [self.host.codes[block.tiles], scales[block.tiles]]
            if center is not None:
                rows += [center[k].reshape(-1)[columns] for k, columns in block.pieces]
            codes, of_scales, *centers = self.relay.rows(rows)
            basis = tk.PackedBasis(
                codes,
                of_scales.view(torch.float8_e4m3fn),
                self._row_scale,
                block.tile_segment,
                self.host.divisor,  # which no kernel reads
                tuple(Size([columns.stop - columns.start]) for _, columns in block.pieces),
                self.bits,
            )
            yield block, basis, centers

    def project(self, grads: Sequence[Tensor | None]) -> Tensor:
        """c (n, L) = P @ g, per segment; a gradient of None counts as zero.

        Segments that lie in one block have the bits of `twa_kernels.project`. Others are summed
        over blocks in float64, of float32.
        """
        c = torch.zeros(self.n, self.num_segments, dtype=torch.float64, device=self.device)
        flat = [None if g is None else g.reshape(-1) for g in grads]
        needed = [b for b in self._blocks if any(flat[k] is not None for k, _ in b.pieces)]
        for block, basis, _ in self._sent(needed):
            pieces = [(flat[k], columns) for k, columns in block.pieces]
            c += tk.project(basis, [None if g is None else g[columns] for g, columns in pieces])
        return c.float()

    def reconstruct(
        self, x: Tensor, center: Sequence[Tensor] | None, out: Sequence[Tensor]
    ) -> None:
        """Writes center + x^T P to `out`, with the bits of `twa_kernels.reconstruct`.

        Args:
            x: (n, L) float32, on the device
            center: on the CPU, one per tensor; or None
            out: on the device, one per tensor, float32, bfloat16 or float16
        """
        targets = [
            o.detach()
            if o.is_contiguous()
            else torch.empty(o.shape, dtype=o.dtype, device=o.device)
            for o in out
        ]
        flat = [t.view(-1) for t in targets]
        for block, basis, centers in self._sent(self._blocks, center):
            pieces = [flat[k][columns] for k, columns in block.pieces]
            tk.reconstruct(basis, x, centers or None, out=pieces)
        for o, t in zip(out, targets, strict=True):
            if t.data_ptr() != o.data_ptr():
                o.copy_(t)


def in_host_memory(basis: tk.PackedBasis, device: torch.device) -> tk.PackedBasis | StreamedBasis:
    """A basis in host memory for a model on a device: itself, where that is host memory, too."""
    return basis if device.type == "cpu" else StreamedBasis(basis, device)
