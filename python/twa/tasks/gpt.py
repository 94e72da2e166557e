"""A small causal transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..io.errors import TwaError


class Block(nn.Module):
    """Pre-norm transformer block with self-attention: (b, t, width) -> the same shape.

    The perceptron has four times the width.

    Args:
        width: of the embeddings, a multiple of `heads`
        heads: of attention
        causal: whether a place sees only itself and those before it
    """

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        b, t, w = h.shape
        q, k, v = (
            self.qkv(self.norm1(h))
            .view(b, t, 3, self.heads, w // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        # (b, heads, t, w / heads)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        h = h + self.proj(a.transpose(1, 2).reshape(b, t, w))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class GPT(nn.Module):
    """Causal transformer over tokens; input and output embeddings share one (tied) matrix.

    tokens (b, t) int64 in [0, vocabulary), t <= context -> logits (b, t, vocabulary) of the token
    that follows each. The defaults have 360,288 parameters. Names, initialisation and the order of
    random draws are fixed: the demo's published figures depend on them.

    Args:
        vocabulary: how many tokens there are
        context: longest row of tokens
        width: of the embeddings, a multiple of `heads`
        depth: number of blocks
        heads: of attention in each block

    Raises:
        TwaError: `width` is no multiple of `heads`, or, from `forward`, t exceeds `context`
    """

    def __init__(
        self,
        vocabulary: int = 128,
        context: int = 128,
        width: int = 96,
        depth: int = 3,
        heads: int = 4,
    ) -> None:
        super().__init__()
        if width % heads:
            raise TwaError(f"expected a width that is a multiple of {heads} heads, found {width}")
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(context, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        for name, p in self.named_parameters():
            if p.dim() == 2 and name != "position":
                nn.init.normal_(p, std=0.02 if "down" not in name and "proj" not in name else 0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > len(self.position):
            raise TwaError(
                f"expected at most {len(self.position)} tokens in a row, found {tokens.shape[1]}"
            )
        h = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))
