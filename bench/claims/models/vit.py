"""Vision transformer, after Dosovitskiy et al., arXiv:2010.11929: pre-norm blocks, a class token,
learned positions. No BatchNorm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twa.io.errors import TwaError


class Block(nn.Module):
    """Self-attention, then a perceptron of four times the width, each with its LayerNorm before it.

    (b, t, width) -> the same
    """

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
        q, k, v = (
            self.qkv(self.norm1(h))
            .view(b, t, 3, self.heads, w // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        a = F.scaled_dot_product_attention(q, k, v)  # (b, heads, t, w / heads)
        h = h + self.proj(a.transpose(1, 2).reshape(b, t, w))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class ViT(nn.Module):
    """Vision transformer: (b, channels, image, image) float -> logits (b, classes).

    `image` and `patch` are edges in pixels. TwaError if the patch does not divide the image, or the
    heads the width.
    """

    def __init__(
        self,
        image: int,
        patch: int,
        channels: int,
        classes: int,
        width: int,
        depth: int,
        heads: int,
    ) -> None:
        super().__init__()
        if image % patch or image < patch:
            raise TwaError(
                f"expected a multiple of the patch of {patch} pixels, found {image}", "image"
            )
        if width % heads:
            raise TwaError(f"expected a multiple of {heads} heads, found {width}", "width")
        # the usual 0.02 is too little then: 400 steps on the digits reach 66 %, with these 91 %
        narrow = width < 192
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(
            torch.randn((image // patch) ** 2 + 1, width) * (0.3 if narrow else 0.02)
        )
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=width**-0.5 if narrow else 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        h = self.embed(images).flatten(2).transpose(1, 2)  # (b, patches, width)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.position
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h[:, 0]))
