"""Character model of the Python standard library's own source text.

Real text, megabytes of it, on every machine that runs Python: nothing is downloaded. The files are
concatenated in the order of their names and cut into blocks; every 20 blocks in a row give 17 to
training and one each to held-out, validation and test data, so that all four splits cover the whole
library.
"""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gpt import GPT

VOCABULARY = 128  # ASCII; every other byte becomes 127
CONTEXT = 128
BATCH = 16
EVAL_BATCH = 16
BLOCK_WINDOWS = 16  # windows of (CONTEXT + 1) characters per block of the split
BLOCK = BLOCK_WINDOWS * (CONTEXT + 1)
CYCLE = 20
HELD = {"heldout": 9, "val": 14, "test": 19}  # positions in a cycle; the other 17 are training data
VAL_WINDOWS, TEST_WINDOWS = 192, 512


@functools.cache
def files() -> tuple[Path, ...]:
    """The standard library's modules, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    return tuple(sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)))


def characters(text: bytes) -> Tensor:
    """The text's bytes (len(text),) uint8, each one beyond ASCII as 127."""
    if not text:  # frombuffer refuses it
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).clamp_(max=VOCABULARY - 1)


def whole_cycles(text: bytes) -> bytes:
    """The text without what is left after the last whole cycle of blocks.

    Raises:
        FileNotFoundError: it is not a library's worth of text
    """
    if len(text) < 100 * CYCLE * BLOCK:
        root = sysconfig.get_paths()["stdlib"]
        raise FileNotFoundError(
            f"expected megabytes of .py files under {root}, found {len(text)} bytes: is the"
            " standard library zipped?"
        )
    return text[: len(text) // (CYCLE * BLOCK) * CYCLE * BLOCK]


def cut(tokens: Tensor, context: int, cycle: int, held: dict[str, int]) -> dict[str, Tensor]:
    """Windows that follow each other in a text, by split: {split: (windows, context + 1)}.

    Of every `cycle` blocks of 16 windows in a row, a split in `held` gets the one at that position,
    and "train" the others; less than a window is left over.

    Args:
        tokens: the text (length,)
        context: a window has one token more
        cycle: blocks of a cycle
        held: the position in a cycle, of each split but "train"
    """
    windows = tokens[: len(tokens) // (context + 1) * (context + 1)].view(-1, context + 1)
    position = torch.arange(len(windows), device="cpu") // BLOCK_WINDOWS % cycle  # (windows,)
    splits = {name: windows[position == p] for name, p in held.items()}
    taken = torch.tensor(list(held.values()), dtype=torch.int64, device="cpu")
    return splits | {"train": windows[~torch.isin(position, taken)]}


@functools.cache
def _windows() -> dict[str, Tensor]:
    """The standard library's text as {split: uint8 (windows, CONTEXT + 1)}."""
    text = whole_cycles(b"".join(p.read_bytes() for p in files()))
    return cut(characters(text), CONTEXT, CYCLE, HELD)


class Batches:
    """Re-iterable batches (b, CONTEXT + 1) int64 of windows (n, CONTEXT + 1).

    Args:
        data: the windows
        batch: windows of a batch
        limit: so many windows, evenly spread over the text; None: all of them
        shuffle: a new random order at each pass, drawn from `seed`
        seed: of the orders
    """

    def __init__(
        self,
        data: Tensor,
        batch: int,
        limit: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        if limit is not None and len(data) > limit:  # evenly spread, not the text's beginning
            at = torch.linspace(0, len(data) - 1, limit, dtype=torch.float32, device="cpu")
            data = data[at.long()]
        self.data, self.batch, self.shuffle = data, batch, shuffle
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.data) // self.batch)

    def __iter__(self) -> Iterator[Tensor]:
        n = len(self.data)
        if self.shuffle:
            order = torch.randperm(n, generator=self.generator, device="cpu")
        else:
            order = torch.arange(n, device="cpu")
        for rows in order.split(self.batch):
            yield self.data[rows].long()


def model() -> nn.Module:
    """The transformer at its own initialisation."""
    return GPT()


def train_data(seed: int = 0) -> Batches:
    return Batches(_windows()["train"], BATCH, shuffle=True, seed=seed)


def heldout_data(seed: int = 0) -> Batches:
    return Batches(_windows()["heldout"], BATCH, shuffle=True, seed=seed)


def val_data() -> Batches:
    return Batches(_windows()["val"], EVAL_BATCH, limit=VAL_WINDOWS)


def test_data() -> Batches:
    return Batches(_windows()["test"], EVAL_BATCH, limit=TEST_WINDOWS)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats per character."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1))
