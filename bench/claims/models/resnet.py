"""Residual networks with BatchNorm: small ones for 8 x 8 digits, deep pre-activation ones for
CIFAR, ResNet-18 and -50 for ImageNet.

Post-activation networks with the ImageNet stem have torchvision's parameter names, so its
checkpoints load. Sources: He et al., arXiv:1512.03385 (post-activation) and arXiv:1603.05027
(pre-activation).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from twa.io.errors import TwaError

EXPANSION = 4  # output channels of a bottleneck block, over those of its 3 x 3 convolution


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class Block(nn.Module):
    """x + f(x), with f two 3 x 3 convolutions, or a bottleneck of 1 x 1, 3 x 3, 1 x 1.

    (b, inputs, h, w) -> (b, outputs, h / stride, w / stride)

    Args:
        preact: f is BN-ReLU-conv repeated and nothing follows the sum; else conv-BN-ReLU repeated,
            with the last ReLU after the sum
    """

    def __init__(
        self, inputs: int, width: int, stride: int, bottleneck: bool, preact: bool
    ) -> None:
        super().__init__()
        self.preact, self.depth = preact, 3 if bottleneck else 2
        self.outputs = width * EXPANSION if bottleneck else width
        sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, self.outputs, 1, 1)]
        if not bottleneck:
            sizes = [(inputs, width, 3, stride), (width, width, 3, 1)]
        for k, (a, b, kernel, step) in enumerate(sizes, 1):
            self.add_module(f"conv{k}", _conv(a, b, kernel, step))
            self.add_module(f"bn{k}", nn.BatchNorm2d(a if preact else b))
        if stride != 1 or inputs != self.outputs:
            self.downsample = nn.Sequential(_conv(inputs, self.outputs, 1, stride))
            if not preact:
                self.downsample.append(nn.BatchNorm2d(self.outputs))
        else:
            self.downsample = None

    def forward(self, x: Tensor) -> Tensor:
        layers = [
            (getattr(self, f"conv{k}"), getattr(self, f"bn{k}")) for k in range(1, self.depth + 1)
        ]
        if self.preact:
            h = F.relu(layers[0][1](x))
            shortcut = x if self.downsample is None else self.downsample(h)
            h = layers[0][0](h)
            for conv, bn in layers[1:]:
                h = conv(F.relu(bn(h)))
            return h + shortcut
        h = x
        for k, (conv, bn) in enumerate(layers, 1):
            h = bn(conv(h))
            if k < self.depth:
                h = F.relu(h)
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Residual network for images: (b, channels, h, w) float -> logits (b, classes).

    Args:
        widths: channels of each stage; every stage but the first halves the image
        blocks: per stage: one number, or one for each stage
        stem: "small": a 3 x 3 convolution; "imagenet": a 7 x 7 one and a pooling, which quarter the
            image
        bottleneck: blocks of three convolutions with EXPANSION * width output channels
        preact: pre-activation blocks

    Raises:
        TwaError: the stem is unknown, or blocks do not fit the widths
    """

    def __init__(
        self,
        classes: int,
        channels: int = 1,
        widths: Sequence[int] = (16, 32),
        blocks: int | Sequence[int] = 2,
        stem: str = "small",
        bottleneck: bool = False,
        preact: bool = False,
    ) -> None:
        super().__init__()
        blocks = [blocks] * len(widths) if isinstance(blocks, int) else list(blocks)
        if stem not in ("small", "imagenet"):
            raise TwaError(f"expected 'small' or 'imagenet', found {stem!r}", "stem")
        if len(blocks) != len(widths) or not widths or min(blocks) < 1:
            raise TwaError(
                f"expected a positive number for each of {len(widths)} stages, found {blocks}",
                "blocks",
            )
        outputs, kernel, stride = widths[0], *((7, 2) if stem == "imagenet" else (3, 1))
        self.conv1 = _conv(channels, outputs, kernel, stride)
        self.bn1 = None if preact else nn.BatchNorm2d(outputs)
        self.pool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else None
        self.stages = len(widths)
        for k, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            stage = nn.Sequential()
            for i in range(count):
                stage.append(Block(outputs, width, 2 if k and not i else 1, bottleneck, preact))
                outputs = stage[-1].outputs
            self.add_module(f"layer{k + 1}", stage)
        self.bn_last = nn.BatchNorm2d(outputs) if preact else None
        self.fc = nn.Linear(outputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv1(images)
        if self.bn1 is not None:
            h = F.relu(self.bn1(h))
        if self.pool is not None:
            h = self.pool(h)
        for k in range(self.stages):
            h = getattr(self, f"layer{k + 1}")(h)
        if self.bn_last is not None:
            h = F.relu(self.bn_last(h))
        return self.fc(h.mean((2, 3)))  # (b, classes)


def preresnet(depth: int, classes: int, channels: int = 3) -> ResNet:
    """Pre-activation network for 32 x 32 images with widths 16, 32, 64.

    As in the paper's figures: basic blocks up to a depth of 110, 6 k + 2; bottlenecks above,
    9 k + 2 (164: 18 blocks a stage, 1.7 million parameters). TwaError for another depth.
    """
    bottleneck = depth > 110
    layers = 9 if bottleneck else 6
    if depth < 8 or (depth - 2) % layers:
        raise TwaError(f"expected {layers} k + 2, such as 20 or 164, found {depth}", "depth")
    blocks, kind = (depth - 2) // layers, {"bottleneck": bottleneck, "preact": True}
    return ResNet(classes, channels, (16, 32, 64), blocks, **kind)


def resnet18(classes: int, channels: int = 3) -> ResNet:
    """11.7 million parameters with 1000 classes; torchvision's names."""
    return ResNet(classes, channels, (64, 128, 256, 512), 2, "imagenet")


def resnet50(classes: int, channels: int = 3) -> ResNet:
    """25.6 million parameters with 1000 classes; torchvision's names."""
    return ResNet(classes, channels, (64, 128, 256, 512), (3, 4, 6, 3), "imagenet", bottleneck=True)
