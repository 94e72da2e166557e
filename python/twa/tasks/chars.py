"""Character model of the Python standard library's own source text.

Real text, megabytes of it, on every machine that runs Python: nothing is downloaded. The files are
concatenated in the order of their names and cut into blocks; every 20 blocks in a row give 17 to training and
one each to held-out, validation and test data, so that all four splits cover the whole library.
"""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 128  # ASCII; every other byte becomes 127
CONTEXT = 128
BATCH = 16
EVAL_BATCH = 64
BLOCK = 16 * (CONTEXT + 1)  # characters per block of the split
CYCLE = 20
HELDOUT, VALIDATION, TEST = 9, 14, 19  # positions in a cycle; the other 17 are training data
VAL_WINDOWS, TEST_WINDOWS = 192, 512  # windows of (CONTEXT + 1) characters


class Block(nn.Module):
    """Pre-norm transformer block with causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        b, t, w = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (b, heads, t, w / heads)
        h = h + self.proj(a.transpose(1, 2).reshape(b, t, w))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class CharTransformer(nn.Module):
    """Causal transformer over ASCII; input and output embeddings share one (tied) matrix."""

    def __init__(self, width: int = 96, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        for name, p in self.named_parameters():
            if p.dim() == 2 and name != "position":
                nn.init.normal_(p, std=0.02 if "down" not in name and "proj" not in name else 0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


@functools.cache
def _windows() -> dict[str, Tensor]:
    """The standard library's text as {split: uint8 (windows, CONTEXT + 1)}."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    files = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    text = bytearray(b"".join(p.read_bytes() for p in files))
    if len(text) < 100 * CYCLE * BLOCK:
        raise FileNotFoundError(f"expected megabytes of .py files under {root}, found {len(text)} bytes: is the standard library zipped?")
    data = torch.frombuffer(text, dtype=torch.uint8)
    cycles = data[: len(data) // (CYCLE * BLOCK) * CYCLE * BLOCK].clamp(max=127).view(-1, CYCLE, BLOCK)
    held = {"heldout": HELDOUT, "val": VALIDATION, "test": TEST}
    train = [c for c in range(CYCLE) if c not in held.values()]
    splits = {name: cycles[:, c] for name, c in held.items()} | {"train": cycles[:, train]}
    return {name: s.reshape(-1, CONTEXT + 1) for name, s in splits.items()}


class Batches:
    """Re-iterable batches (b, CONTEXT + 1) int64; a new random order, drawn from `seed`, at each pass."""

    def __init__(self, split: str, batch: int, limit: int | None = None, shuffle: bool = False, seed: int = 0) -> None:
        data = _windows()[split]
        if limit is not None and len(data) > limit:  # evenly spread over the library, not its first files
            data = data[torch.linspace(0, len(data) - 1, limit).long()]
        self.data, self.batch, self.shuffle = data, batch, shuffle
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.data) // self.batch)

    def __iter__(self) -> Iterator[Tensor]:
        n = len(self.data)
        order = torch.randperm(n, generator=self.generator) if self.shuffle else torch.arange(n)
        for rows in order.split(self.batch):
            yield self.data[rows].long()


def model() -> nn.Module:
    return CharTransformer()


def train_data(seed: int = 0) -> Batches:
    return Batches("train", BATCH, shuffle=True, seed=seed)


def heldout_data(seed: int = 0) -> Batches:
    return Batches("heldout", BATCH, shuffle=True, seed=seed)


def val_data() -> Batches:
    return Batches("val", EVAL_BATCH, limit=VAL_WINDOWS)


def test_data() -> Batches:
    return Batches("test", EVAL_BATCH, limit=TEST_WINDOWS)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats per character."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1))
