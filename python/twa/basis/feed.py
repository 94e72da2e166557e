"""`Feed`: columns of candidates on their way from files to the device where they are packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..io.candidates import BLOCK_BYTES, Block

ALIGNMENT = 256  # bytes: of each row, in both buffers


class Feed:
    """Copies blocks to a device through two buffers as large as a block, one of each side.

    That of the host is pinned for a GPU, so that a row is on its way while the next one is read
    from its file. The device holds one block at a time: a block is valid until the next one is
    asked for, and work that is queued on the device's current stream may use it.

    Args:
        device: where blocks are wanted; the CPU's are handed on as they are
        staged: whether they are copied; None: for another device than the CPU

    Attributes:
        device: where blocks are
        copied: bytes sent so far
    """

    def __init__(self, device: torch.device | str, staged: bool | None = None) -> None:
        self.device = torch.device(device)
        self.staged = self.device.type != "cpu" if staged is None else staged
        self.copied = 0
        self._here = self._there = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._sent: torch.cuda.Event | None = None

    def block(self, block: Block) -> Block:
        """The block, on the device."""
        return replace(block, rows=self.rows(block.rows))

    def rows(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the CPU, on the device."""
        if not self.staged:
            return list(rows)
        ends, end = [], 0
        for row in rows:
            end += -(-row.nbytes // ALIGNMENT) * ALIGNMENT
            ends.append(end)
        self._make_room(end)
        found = []
        for row, end in zip(rows, ends, strict=True):
            begin = end - -(-row.nbytes // ALIGNMENT) * ALIGNMENT
            at = slice(begin, begin + row.nbytes)
            self._here[at].view(row.dtype).view(row.shape).copy_(row)
            self._there[at].copy_(self._here[at], non_blocking=True)
            found.append(self._there[at].view(row.dtype).view(row.shape))
            self.copied += row.nbytes
        if self.device.type == "cuda":
            self._sent = torch.cuda.current_stream(self.device).record_event()
        return found

    def whole(self, t: Tensor) -> Tensor:
        """A contiguous tensor of any size, on the device for good: sent a block at a time."""
        if not self.staged or t.device == self.device:
            return t.to(self.device)
        made = torch.empty_like(t, device=self.device)
        to, flat = made.view(-1).view(torch.uint8), t.reshape(-1).view(torch.uint8)
        for begin in range(0, len(flat), BLOCK_BYTES):
            part = flat[begin : begin + BLOCK_BYTES]
            to[begin : begin + BLOCK_BYTES] = self.rows([part])[0]
        return made

    def _make_room(self, size: int) -> None:
        """Waits until the host's buffer may be written, and makes both large enough."""
        if self._sent is not None:
            self._sent.synchronize()
        if len(self._here) < size or self._here is self._there:
            pinned = self.device.type == "cuda"
            # room for the new ones
            self._here = self._there = torch.empty(0, dtype=torch.uint8, device="cpu")
            self._here = torch.empty(size, dtype=torch.uint8, pin_memory=pinned, device="cpu")
            self._there = torch.empty(size, dtype=torch.uint8, device=self.device)
