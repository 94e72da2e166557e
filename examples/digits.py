"""Data and model of the examples: 8 x 8 images of digits that come with scikit-learn."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def loaders():
    """Batches of 1,200 images to train on, 300 to choose by, 297 to test on."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16).float(), torch.tensor(labels))
    parts = torch.utils.data.random_split(data, [1200, 300, 297], torch.Generator().manual_seed(0))
    return [DataLoader(part, batch_size=50, shuffle=k == 0) for k, part in enumerate(parts)]


def make_model():
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def evaluate(model, loader, loss=loss):
    """Mean loss of the model in evaluation mode."""
    training = model.training
    model.eval()
    value = sum(float(loss(model, batch)) * len(batch[1]) for batch in loader)
    model.train(training)
    return value / len(loader.dataset)
