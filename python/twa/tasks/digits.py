"""Convolutional network with BatchNorm on scikit-learn's bundled digits.

They are 1797 images of 8 x 8 pixels. The task is small and fast: it shows that BatchNorm statistics
are treated right. It ranks no methods, all reach 98-99 %. It needs scikit-learn.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ..io.errors import TaskError

METRIC = "accuracy"


@functools.cache
def _splits() -> dict[str, TensorDataset]:
    """Images (b, 1, 8, 8) and labels (b,) by split."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise TaskError("the task digits needs scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device="cpu")
    images = images[:, None] / 16.0  # (1797, 1, 8, 8)
    labels = torch.tensor(digits.target, dtype=torch.int64, device="cpu")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0), device="cpu")
    parts = {
        "train": order[:1000],
        "heldout": order[1000:1200],
        "val": order[1200:1400],
        "test": order[1400:],
    }
    return {name: TensorDataset(images[index], labels[index]) for name, index in parts.items()}


def model() -> nn.Module:
    """Two convolutions with BatchNorm, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


def train_data(seed: int = 0) -> DataLoader:
    return DataLoader(
        _splits()["train"],
        batch_size=64,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )


def heldout_data(seed: int = 0) -> DataLoader:
    return DataLoader(
        _splits()["heldout"],
        batch_size=64,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )


def val_data() -> DataLoader:
    return DataLoader(_splits()["val"], batch_size=256)


def test_data() -> DataLoader:
    return DataLoader(_splits()["test"], batch_size=256)


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Mean cross-entropy in nats per image."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def metric(model: nn.Module, batch: list[Tensor]) -> float:
    """Part of the images whose digit is found."""
    images, labels = batch
    return (model(images).argmax(1) == labels).float().mean().item()
