"""The image side of CLIP's vision transformers with a linear classifier on top, under the names
that the public fine-tunes of "Model soups" use.

Those files (Wortsman et al., arXiv:2203.05482; ViT-B/32 fine-tuned on ImageNet) hold float32 state
dicts of OpenAI's CLIP (Radford et al., arXiv:2103.00020) as `model.` without its text transformer,
and `classification_head.`:

    model.visual.{class_embedding, positional_embedding, proj, conv1.weight, ln_pre, ln_post}
    model.visual.transformer.resblocks.K.{ln_1, attn.in_proj_weight, attn.in_proj_bias,
        attn.out_proj, ln_2, mlp.c_fc, mlp.c_proj}
    model.{token_embedding.weight, positional_embedding, ln_final, text_projection, logit_scale},
        of the text side, unused
    classification_head.{weight, bias}

    logits = head(f / |f|),  f = proj^T ln_post(class token)
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twa.io.errors import CandidateError

HEAD_WIDTH = 64  # of an attention head, in all of CLIP's models
TEXT = (
    "token_embedding.weight",
    "positional_embedding",
    "ln_final.weight",
    "ln_final.bias",
    "text_projection",
    "logit_scale",
)


class LayerNorm(nn.LayerNorm):
    """Normalisation in float32, whatever the dtype of input and weights."""

    def forward(self, h: Tensor) -> Tensor:
        weights = self.weight.float(), self.bias.float()
        return F.layer_norm(h.float(), self.normalized_shape, *weights, self.eps).to(h.dtype)


class QuickGELU(nn.Module):
    """An approximation of GELU: h * sigmoid(1.702 h)."""

    def forward(self, h: Tensor) -> Tensor:
        return h * torch.sigmoid(1.702 * h)


class Block(nn.Module):
    """Pre-norm transformer block: (b, t, width) -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = LayerNorm(width)
        parts = [
            ("c_fc", nn.Linear(width, 4 * width)),
            ("gelu", QuickGELU()),
            ("c_proj", nn.Linear(4 * width, width)),
        ]
        self.mlp = nn.Sequential(OrderedDict(parts))
        self.ln_2 = LayerNorm(width)

    def forward(self, h: Tensor) -> Tensor:
        a = self.ln_1(h)
        h = h + self.attn(a, a, a, need_weights=False)[0]
        return h + self.mlp(self.ln_2(h))


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))

    def forward(self, h: Tensor) -> Tensor:
        return self.resblocks(h)


class Visual(nn.Module):
    """Image side: (b, 3, image, image) -> features (b, features), in the weights' dtype."""

    def __init__(
        self, image: int, patch: int, width: int, depth: int, heads: int, features: int
    ) -> None:
        super().__init__()
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        positions = (image // patch) ** 2 + 1
        self.positional_embedding = nn.Parameter(scale * torch.randn(positions, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, depth, heads)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, features))

    def forward(self, images: Tensor) -> Tensor:
        # (b, patches, width)
        h = self.conv1(images.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        token = self.class_embedding.to(h.dtype).expand(len(h), 1, -1)
        h = torch.cat([token, h], 1) + self.positional_embedding.to(h.dtype)
        h = self.transformer(self.ln_pre(h))
        return self.ln_post(h[:, 0]) @ self.proj.to(h.dtype)


class Body(nn.Module):
    """The image side, and what is left of the text side: frozen, as nothing uses it.

    Args:
        text: shapes of those of the TEXT tensors that the checkpoints have
    """

    def __init__(self, visual: Visual, text: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.visual = visual
        for key, shape in text.items():
            *folder, name = key.split(".")
            owner = self
            for part in folder:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            frozen = nn.Parameter(torch.zeros(tuple(shape)), requires_grad=False)
            owner.register_parameter(name, frozen)


class CLIPClassifier(nn.Module):
    """Classifier of images that are normalised as CLIP's: (b, 3, image, image) float -> logits
    (b, classes) in the head's dtype.

    ViT-B/32: image 224, patch 32, width 768, depth 12, heads 12, features 512; 88 million
    parameters, and 26 million left of the text side.
    """

    def __init__(
        self,
        image: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        features: int,
        classes: int,
        text: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.image = image
        self.model = Body(Visual(image, patch, width, depth, heads, features), text or {})
        self.classification_head = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        # half floats lose the norm's last digits
        features = F.normalize(self.model.visual(images).float(), dim=-1)
        return self.classification_head(features.to(self.classification_head.weight.dtype))

    @classmethod
    def from_shapes(cls, info: Mapping[str, Any]) -> CLIPClassifier:
        """The model whose state dict has these shapes, in float32 with random weights (call .half()
        for float16).

        Args:
            info: key -> shape, or anything with a .shape, such as a tensor or twa.Candidates' info

        Raises:
            CandidateError: a key is missing, or one is there that does not belong, or shapes
                contradict each other
        """
        shapes = {key: tuple(getattr(value, "shape", value)) for key, value in info.items()}
        sizes = sizes_of(shapes)
        with torch.device("meta"):
            expected = {key: tuple(t.shape) for key, t in cls(*sizes).state_dict().items()}
        for key in sorted(expected.keys() | shapes.keys()):
            if expected.get(key) != shapes.get(key):
                wanted, found = (list(s[key]) if key in s else "none" for s in (expected, shapes))
                _, _, width, depth, *_ = sizes
                raise CandidateError(
                    f"expected shape {wanted} for a width of {width} and {depth} blocks, found"
                    f" {found}",
                    f"tensor {key!r}",
                )
        return cls(*sizes)


def sizes_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Any, ...]:
    """Arguments of `CLIPClassifier` from the shapes of its tensors."""
    width, _, patch, _ = _shape_of(shapes, "model.visual.conv1.weight", 4)
    positions, _ = _shape_of(shapes, "model.visual.positional_embedding", 2)
    _, features = _shape_of(shapes, "model.visual.proj", 2)
    classes, _ = _shape_of(shapes, "classification_head.weight", 2)
    grid = math.isqrt(max(0, positions - 1))
    if grid**2 + 1 != positions or not patch or not grid:
        raise CandidateError(
            f"expected grid^2 + 1 positions, found {positions}",
            "model.visual.positional_embedding",
        )
    heads = max(1, width // HEAD_WIDTH)
    if not width or width % heads:
        raise CandidateError(
            f"expected a width that is a multiple of {HEAD_WIDTH}, or less, found {width}",
            "model.visual.conv1.weight",
        )
    in_block = re.compile(r"model\.visual\.transformer\.resblocks\.\d+\.attn\.in_proj_weight")
    depth = sum(bool(in_block.fullmatch(key)) for key in shapes)
    text = {key: shapes[f"model.{key}"] for key in TEXT if f"model.{key}" in shapes}
    return grid * patch, patch, width, depth, heads, features, classes, text


def _shape_of(shapes: Mapping[str, tuple[int, ...]], key: str, dims: int) -> tuple[int, ...]:
    if len(shapes.get(key, ())) == dims:
        return shapes[key]
    found = f"none of that name among {len(shapes)} (first: {next(iter(shapes), None)})"
    if key in shapes:
        found = f"shape {list(shapes[key])}"
    raise CandidateError(
        f"expected a CLIP vision transformer with a head, with a tensor {key!r} of {dims}"
        f" dimensions; found {found}"
    )
