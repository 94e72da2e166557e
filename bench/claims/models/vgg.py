"""Plain convolutional networks with BatchNorm, after Simonyan & Zisserman, arXiv:1409.1556."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

#: channels of 3 x 3 convolutions; 0: halve the image. 32 x 32 -> 1 x 1
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
#: the same; 8 x 8 -> 2 x 2
VGG_DIGITS = (16, 16, 0, 32, 32, 0)


class VGG(nn.Module):
    """Convolution-BN-ReLU repeated, pooling, fully connected layers.

    (b, channels, h, w) float -> logits (b, classes). What the poolings leave of the image is
    averaged, so any size of at least 2^poolings does.

    Args:
        plan: channels of each convolution, 0 for a pooling
        hidden: widths of the fully connected layers before the last, each followed by ReLU
        dropout: probability, before each fully connected layer if there are hidden ones
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        plan: Sequence[int] = VGG16,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.features, inputs = nn.Sequential(), channels
        for width in plan:
            if not width:
                self.features.append(nn.MaxPool2d(2))
                continue
            self.features.append(nn.Conv2d(inputs, width, 3, padding=1, bias=False))
            self.features.append(nn.BatchNorm2d(width))
            self.features.append(nn.ReLU(inplace=True))
            inputs = width
        self.classifier = nn.Sequential()
        for width in hidden:
            self.classifier.append(nn.Dropout(dropout))
            self.classifier.append(nn.Linear(inputs, width))
            self.classifier.append(nn.ReLU(inplace=True))
            inputs = width
        if hidden:
            self.classifier.append(nn.Dropout(dropout))
        self.classifier.append(nn.Linear(inputs, classes))
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


def vgg16(classes: int, channels: int = 3) -> VGG:
    """As used on CIFAR: 16 layers with weights, hidden layers of 512 with dropout; 15.3 million
    parameters with 10 classes.
    """
    return VGG(classes, channels, VGG16, (512, 512), 0.5)


def vgg_digits(classes: int, channels: int = 1) -> VGG:
    """Four convolutions, for 8 x 8 images."""
    return VGG(classes, channels, VGG_DIGITS)
