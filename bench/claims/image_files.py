"""Images on disk, and what they look like to a model: scikit-learn's digits, CIFAR as torchvision
unpacks it or in binary, folders of pictures.

Nothing in a file is run: CIFAR's pickles are interpreted (`twa.io.unpickle`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from twa.io.errors import TaskError
from twa.io.unpickle import INERT, OPS, Name, Refused, bytes_of_length, unpickle

# mean and standard deviation of each channel
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class Look:
    """How 8-bit images become a model's input, (x / white - mean) / std per channel; and how
    training images are changed.

    Args:
        pad: shift by up to so many pixels, black coming in
        flip: left to right, half of them
        noise: standard deviation, of the normalised image
        erase: a square of 3 x 3 pixels becomes the mean, in half of them
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    white: float = 255.0
    pad: int = 0
    flip: bool = False
    noise: float = 0.0
    erase: bool = False

    def normalised(self, images: Tensor) -> Tensor:
        """A model's input: uint8 (b, h, w, c) -> float32 (b, c, h, w)."""
        mean, std = (torch.tensor(v, device=images.device) for v in (self.mean, self.std))
        x = images.float().mul_(1 / (self.white * std)).sub_(mean / std)
        return x.permute(0, 3, 1, 2).contiguous()

    def changed(self, images: Tensor, g: torch.Generator) -> Tensor:
        """Shifts and flips: uint8 (b, h, w, c) -> the same."""
        b, h, w, c = images.shape
        pad = self.pad
        top, left = torch.randint(0, 2 * pad + 1, (2, b, 1), generator=g)
        # (b, h), (b, w): which rows and columns of the padded image
        ys, xs = top + torch.arange(h), left + torch.arange(w)
        if self.flip:
            xs = torch.where(torch.rand(b, 1, generator=g) < 0.5, xs.flip(1), xs)
        padded = F.pad(images, (0, 0, pad, pad, pad, pad))
        rows = (torch.arange(b)[:, None] * (h + 2 * pad) + ys) * (w + 2 * pad)
        at = rows[:, :, None] + xs[:, None]  # (b, h, w): of all the batch's pixels
        # 2.5 times as fast as indices per dimension
        return padded.view(-1, c).index_select(0, at.flatten().to(images.device)).view(b, h, w, c)

    def disturbed(self, x: Tensor, g: torch.Generator) -> Tensor:
        """Adds noise and erases squares: float32 (b, c, h, w) -> the same."""
        b, _, h, w = x.shape
        if self.noise:
            x = x + self.noise * torch.randn(x.shape, generator=g).to(x.device)
        if self.erase:
            row = torch.randint(0, h, (b, 1, 1), generator=g)
            column = torch.randint(0, w, (b, 1, 1), generator=g)
            above_or_below = (torch.arange(h)[:, None] - row).abs() > 1
            beside = (torch.arange(w) - column).abs() > 1
            left_alone = torch.rand(b, 1, 1, generator=g) < 0.5
            stays = above_or_below | beside | left_alone  # (b, h, w)
            x = x * stays[:, None].to(x.device)
        return x


@dataclass(frozen=True)
class Arrays:
    """A data set in memory: images (n, h, w, c) uint8, labels (n,) int64."""

    kind: str
    classes: int
    look: Look
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@functools.cache
def read_digits() -> Arrays:
    """1297 images for training and 500 for the test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise TaskError(
            "the digits come with scikit-learn: pip install scikit-learn, or give the path of other"
            " images"
        ) from error
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.uint8)[..., None]
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:500], order[500:]
    look = Look((0.3053,), (0.3760,), white=16.0, pad=1, noise=0.3, erase=True)
    return Arrays("digits", 10, look, (images[train], labels[train]), (images[test], labels[test]))


_CIFAR10 = Look((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), pad=4, flip=True)
_CIFAR100 = Look((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), pad=4, flip=True)
_TEN = tuple(f"data_batch_{k}" for k in range(1, 6))
_TEN_BINARY = tuple(f"{name}.bin" for name in _TEN)
#: folder -> classes, look, training files, test file, and in binary files which of the bytes before
#: an image is its label, of how many
_CIFAR = {
    "cifar-10-batches-py": (10, _CIFAR10, _TEN, "test_batch", None),
    "cifar-100-python": (100, _CIFAR100, ("train",), "test", None),
    "cifar-10-batches-bin": (10, _CIFAR10, _TEN_BINARY, "test_batch.bin", (0, 1)),
    "cifar-100-binary": (100, _CIFAR100, ("train.bin",), "test.bin", (1, 2)),
}
_PIXELS = 3 * 32 * 32
#: strings of Python 2, which may hold anything, become bytes
_PYTHON2 = OPS | {ord("U"): bytes_of_length(1), ord("T"): bytes_of_length(4)}
_ARRAY_NAMES = {
    "numpy.core.multiarray._reconstruct": INERT,
    "numpy._core.multiarray._reconstruct": INERT,
    "numpy.ndarray": INERT,
    "numpy.dtype": INERT,
    # how Python 3 writes bytes for Python 2
    "_codecs.encode": Name(lambda text, encoding: text.encode("latin1")),
}


def _pickled(path: Path, classes: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Pixels (n, 3072) uint8 and labels of a CIFAR pickle."""
    data = path.read_bytes()
    try:
        return _parsed(unpickle(data, _ARRAY_NAMES, instructions=_PYTHON2), classes)
    except Refused as error:
        raise TaskError(
            f"refused: reading it would run code from the file ({error})", path
        ) from error
    except Exception as error:  # whatever a damaged pickle sets off
        raise TaskError(
            f"not a batch of CIFAR-{classes} ({type(error).__name__}: {error})", path
        ) from error


def _parsed(content: dict, classes: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Pixels and labels of what was pickled; ValueError says what is wrong with it."""
    found = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
    labels, array = found["labels" if classes == 10 else "fine_labels"], found["data"]
    version, shape, dtype, fortran, raw = array.state
    is_plain = version == 1 and dtype.arguments[0] in ("u1", b"u1") and fortran is False
    if not is_plain or type(raw) is not bytes or type(labels) is not list:
        raise ValueError("expected an array of bytes, and a list of labels")
    n = shape[0] if len(shape) == 2 and shape[1] == _PIXELS else -1
    if len(raw) != n * _PIXELS or len(labels) != n:
        raise ValueError(
            f"expected n x {_PIXELS} bytes and n labels, found {list(shape)} of {len(raw)} bytes"
            f" and {len(labels)} labels"
        )
    if not all(type(label) is int and 0 <= label < classes for label in labels):
        raise ValueError(f"expected labels from 0 to {classes - 1}")
    return numpy.frombuffer(raw, numpy.uint8).reshape(shape), numpy.array(labels, numpy.int64)


def _binary(
    path: Path, classes: int, place: int, before: int
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The same of a binary file: records of `before` bytes, of which number `place` is the label,
    and 3072 pixels.
    """
    records, width = numpy.fromfile(path, numpy.uint8), before + _PIXELS
    if not len(records) or len(records) % width:
        raise TaskError(
            f"not a batch of CIFAR-{classes}: expected a multiple of {width} bytes, found"
            f" {len(records)}",
            path,
        )
    records = records.reshape(-1, width)
    labels = records[:, place].astype(numpy.int64)
    if labels.max() >= classes:
        raise TaskError(
            f"not a batch of CIFAR-{classes}: expected labels from 0 to {classes - 1}, found"
            f" {labels.max()}",
            path,
        )
    return records[:, before:], labels


def read_cifar(folder: Path, layout: str) -> Arrays:
    classes, look, train, test, binary = _CIFAR[layout]
    if missing := [name for name in (*train, test) if not (folder / name).is_file()]:
        raise TaskError(f"expected the files of {layout}; missing {', '.join(missing)}", folder)

    def read(names: Sequence[str]) -> tuple[Tensor, Tensor]:
        parts = [
            _binary(folder / name, classes, *binary) if binary else _pickled(folder / name, classes)
            for name in names
        ]
        pixels, labels = (numpy.concatenate(part) for part in zip(*parts, strict=True))
        images = numpy.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        return torch.from_numpy(images), torch.from_numpy(labels)

    return Arrays("cifar", classes, look, read(train), read([test]))


def find_images(path: Path) -> tuple[Path, str]:
    """The folder of the data at or directly below a path, and its layout: one of CIFAR's, or
    "folder".
    """
    if path.is_file():
        packed = path.name.endswith((".tar.gz", ".tgz", ".tar", ".zip"))
        hint = f"; unpack it first: tar -xf {path.name}" if packed else ""
        raise TaskError(f"expected a folder, found a file{hint}", path)
    if not path.is_dir():
        raise TaskError("expected a folder of images; there is none", path)
    # a folder of its own may have any name; below others only CIFAR's own names count
    found = [
        (path, layout)
        for layout, (_, _, train, test, _) in _CIFAR.items()
        if any((path / name).is_file() for name in (*train, test))
    ]
    if (path / "train").is_dir():
        found.append((path, "folder"))
    found = found or [(path / layout, layout) for layout in _CIFAR if (path / layout).is_dir()]
    if len(found) > 1:
        layouts = ", ".join(layout for _, layout in found)
        raise TaskError(f"expected one data set, found {layouts}; give the folder of one", path)
    if not found:
        packed = sorted(p.name for p in path.glob("cifar-*.tar.gz"))
        hint = f"; unpack it first: tar -xf {packed[0]}" if packed else ""
        raise TaskError(
            f"expected {', '.join(_CIFAR)}, or a folder train/ with a folder for each class{hint}",
            path,
        )
    return found[0]


def _open_picture(path: str):
    """A Pillow image in RGB; TaskError with the path if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # whatever a damaged file sets off in Pillow's readers
        raise TaskError(
            f"cannot be read as an image ({type(error).__name__}: {error})", path
        ) from error


class Pictures(Dataset):
    """A dataset of picture files: (uint8 (size, size, 3), label), read when asked for.

    Args:
        augment: a random part of 8 to 100 % of the area, 3:4 to 4:3, flipped half of the time;
            drawn from torch's global generator, which DataLoader's workers and twa seed. Else the
            shorter edge becomes `edge` pixels, and the middle is cut out
        bicubic: how it is resized, instead of bilinear
    """

    def __init__(
        self,
        root: Path,
        files: numpy.ndarray,
        labels: numpy.ndarray,
        size: int,
        edge: int,
        bicubic: bool,
        augment: bool,
    ) -> None:
        self.root, self.files, self.labels = root, files, labels
        self.size, self.edge, self.bicubic, self.augment = size, edge, bicubic, augment

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        size = self.size
        image = _open_picture(os.path.join(self.root, os.fsdecode(self.files[index])))
        method = Image.Resampling.BICUBIC if self.bicubic else Image.Resampling.BILINEAR
        if self.augment:
            image = image.resize((size, size), method, box=_random_box(*image.size))
            if torch.rand(()) < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        else:
            w, h = image.size
            if w <= h:
                w, h = self.edge, int(self.edge * h / w)
            else:
                w, h = int(self.edge * w / h), self.edge
            left, top = round((w - size) / 2), round((h - size) / 2)
            image = image.resize((w, h), method).crop((left, top, left + size, top + size))
        return torch.from_numpy(numpy.array(image)), int(self.labels[index])


def _random_box(w: int, h: int) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a random part of an image; all of it, cut to 3:4 or 4:3 at most,
    if ten tries do not fit.
    """
    for _ in range(10):
        area, logratio, x, y = torch.rand(4).tolist()
        area, ratio = w * h * (0.08 + 0.92 * area), (4 / 3) ** (2 * logratio - 1)
        bw, bh = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < bw <= w and 0 < bh <= h:
            left, top = int(x * (w - bw + 1)), int(y * (h - bh + 1))
            return left, top, left + bw, top + bh
    bw, bh = min(w, h * 4 / 3), min(h, w * 4 / 3)
    return (w - bw) / 2, (h - bh) / 2, (w + bw) / 2, (h + bh) / 2


class Collate:
    """A batch of pictures: [(uint8 (h, w, 3), label)] -> (float32 (b, 3, h, w), int64 (b,))."""

    def __init__(self, look: Look) -> None:
        self.look = look

    def __call__(self, items: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*items, strict=True)
        return self.look.normalised(torch.stack(images)), torch.tensor(labels)


@dataclass(frozen=True)
class Folder:
    """Pictures in train/CLASS/ and val/CLASS/, in the order of their paths.

    Each part is relative paths (n,) as bytes (a million str objects would be copied into each
    worker as their reference counts change) and labels (n,) int64.
    """

    kind: ClassVar[str] = "folder"
    root: Path
    classes: list[str]
    train: tuple[numpy.ndarray, numpy.ndarray]
    test: tuple[numpy.ndarray, numpy.ndarray]


def read_folder(root: Path) -> Folder:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise TaskError("folders of images are read by Pillow: pip install pillow") from error
    classes = sorted(entry.name for entry in os.scandir(root / "train") if entry.is_dir())
    return Folder(root, classes, _listed(root, "train", classes), _listed(root, "val", classes))


def _listed(root: Path, part: str, classes: list[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Paths and labels of the pictures in root/part."""
    if not (root / part).is_dir():
        raise TaskError(
            f"expected folders train/ and val/ with a folder for each class; there is no {part}/",
            root,
        )
    found = {entry.name for entry in os.scandir(root / part) if entry.is_dir()}
    if extra := sorted(found - set(classes)):
        raise TaskError(f"expected the classes of train/, found another: {extra[0]}", root / part)
    files, labels = [], []
    for label, name in enumerate(classes):
        for folder, _, names in sorted(os.walk(root / part / name, followlinks=True)):
            chosen = sorted(n for n in names if n.lower().endswith(SUFFIXES))
            paths = (os.path.relpath(os.path.join(folder, n), root) for n in chosen)
            files += map(os.fsencode, paths)
            labels += [label] * len(chosen)
    if not files:
        raise TaskError(
            f"expected images ({', '.join(SUFFIXES)}) in a folder for each class, found none",
            root / part,
        )
    return numpy.array(files), numpy.array(labels, numpy.int64)
