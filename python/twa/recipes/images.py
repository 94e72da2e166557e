"""Image classification as a task: scikit-learn's digits, CIFAR-10 and -100 as they are on disk, or a folder of pictures as ImageNet's; and CLIP
fine-tunes with such a folder. Nothing is downloaded, and nothing from the files is run.

Batches are (images (b, c, h, w) float32, labels (b,) int64). Held-out and validation images are cut from the training set by a fixed seed, so that
they are the same for every run that trains candidates; `seed` orders the training batches only.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..candidates import Candidates
from ..data import Moved
from ..tasks import Task, TaskError
from ..unpickle import _OPS, _STOP, INERT, Made, Name, Refused, _Machine
from .models.clip import CLIPClassifier
from .models.resnet import ResNet, preresnet, resnet18, resnet50
from .models.vgg import vgg16, vgg_digits
from .models.vit import ViT

METRIC = "accuracy"
MODELS = ("resnet", "vgg", "vit", "preresnet164", "resnet50")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of each channel
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Mean cross-entropy in nats."""
    images, labels = batch
    return F.cross_entropy(model(images).float(), labels)


def accuracy(model: nn.Module, batch: Sequence[Tensor]) -> float:
    images, labels = batch
    return (model(images).argmax(1) == labels).float().mean().item()


@dataclass(frozen=True)
class Look:
    """How 8-bit images become a model's input: (x / white - mean) / std per channel; and how training images are changed.

    pad     shift by up to so many pixels, black coming in;  flip: left to right, half of them
    noise   standard deviation, of the normalised image;  erase: a square of 3 x 3 pixels becomes the mean, in half of them
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    white: float = 255.0
    pad: int = 0
    flip: bool = False
    noise: float = 0.0
    erase: bool = False

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 (b, h, w, c) -> float32 (b, c, h, w)"""
        mean, std = (torch.tensor(v, device=images.device) for v in (self.mean, self.std))
        return images.float().mul_(1 / (self.white * std)).sub_(mean / std).permute(0, 3, 1, 2).contiguous()

    def changed(self, images: Tensor, g: torch.Generator) -> Tensor:
        """uint8 (b, h, w, c) -> the same, shifted and flipped."""
        b, h, w, c = images.shape
        pad = self.pad
        top, left = torch.randint(0, 2 * pad + 1, (2, b, 1), generator=g)
        ys, xs = top + torch.arange(h), left + torch.arange(w)  # (b, h), (b, w): which rows and columns of the padded image
        if self.flip:
            xs = torch.where(torch.rand(b, 1, generator=g) < 0.5, xs.flip(1), xs)
        padded = F.pad(images, (0, 0, pad, pad, pad, pad))
        at = ((torch.arange(b)[:, None] * (h + 2 * pad) + ys) * (w + 2 * pad))[:, :, None] + xs[:, None]  # (b, h, w): of all the batch's pixels
        return padded.view(-1, c).index_select(0, at.flatten().to(images.device)).view(b, h, w, c)  # 2.5 times as fast as indices per dimension

    def disturbed(self, x: Tensor, g: torch.Generator) -> Tensor:
        """float32 (b, c, h, w) -> the same with noise and erased squares."""
        b, _, h, w = x.shape
        if self.noise:
            x = x + self.noise * torch.randn(x.shape, generator=g).to(x.device)
        if self.erase:
            row, column = torch.randint(0, h, (b, 1, 1), generator=g), torch.randint(0, w, (b, 1, 1), generator=g)
            off = ((torch.arange(h)[:, None] - row).abs() > 1) | ((torch.arange(w) - column).abs() > 1)  # (b, h, w)
            x = x * (off | (torch.rand(b, 1, 1, generator=g) < 0.5))[:, None].to(x.device)
        return x


class Batches:
    """Re-iterable batches of images in memory. With a generator each pass has a new order, drawn from it with all that changes the images, and leaves
    out what does not fill a batch: BatchNorm's statistics of one or two images are worth nothing.

    images (n, h, w, c) uint8, labels (n,) int64, on the device of the batches; augment: needs a generator
    """

    def __init__(
        self, images: Tensor, labels: Tensor, look: Look, batch: int, generator: torch.Generator | None = None, augment: bool = False
    ) -> None:
        self.images, self.labels, self.look, self.batch, self.generator, self.augment = images, labels, look, batch, generator, augment

    def __len__(self) -> int:
        whole, rest = divmod(len(self.labels), self.batch)
        return whole + (rest > 0 and (self.generator is None or not whole))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n, g = len(self.labels), self.generator
        order = torch.arange(n) if g is None else torch.randperm(n, generator=g)
        for rows in order.split(self.batch)[: len(self)]:
            rows = rows.to(self.images.device)
            images = self.images[rows]
            x = self.look.normalised(self.look.changed(images, g) if self.augment else images)
            yield (self.look.disturbed(x, g) if self.augment else x), self.labels[rows]


# What is on disk ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrays:
    """A data set in memory: images (n, h, w, c) uint8, labels (n,) int64."""

    kind: str
    classes: int
    look: Look
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def _digits() -> Arrays:
    """1297 images for training and 500 for the test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise TaskError("the digits come with scikit-learn: pip install scikit-learn, or give the path of other images") from error
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.uint8)[..., None], torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:500], order[500:]
    look = Look((0.3053,), (0.3760,), white=16.0, pad=1, noise=0.3, erase=True)
    return Arrays("digits", 10, look, (images[train], labels[train]), (images[test], labels[test]))


_CIFAR10 = Look((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), pad=4, flip=True)
_CIFAR100 = Look((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), pad=4, flip=True)
_TEN = tuple(f"data_batch_{k}" for k in range(1, 6))
#: folder -> classes, look, training files, test file, and in binary files which of the bytes before an image is its label, of how many
_CIFAR = {
    "cifar-10-batches-py": (10, _CIFAR10, _TEN, "test_batch", None),
    "cifar-100-python": (100, _CIFAR100, ("train",), "test", None),
    "cifar-10-batches-bin": (10, _CIFAR10, tuple(f"{name}.bin" for name in _TEN), "test_batch.bin", (0, 1)),
    "cifar-100-binary": (100, _CIFAR100, ("train.bin",), "test.bin", (1, 2)),
}
_PIXELS = 3 * 32 * 32
_ARRAY_NAMES = {f"numpy.{module}.multiarray._reconstruct": Name(Made) for module in ("core", "_core")}
_ARRAY_NAMES |= {
    "numpy.ndarray": INERT,
    "numpy.dtype": INERT,
    "_codecs.encode": Name(lambda text, encoding: text.encode("latin1")),  # how Python 3 writes bytes for Python 2
}
_STRINGS = {ord("U"): 1, ord("T"): 4}  # of Python 2: bytes, here


def _plain(data: bytes) -> object:
    """What a pickle by Python 2 describes, with a Made for each array; `unpickle` would take its strings for text."""
    machine = _Machine(data, _ARRAY_NAMES, None, 0)
    while (op := data[machine.at]) != _STOP:
        machine.at += 1
        if op in _STRINGS:
            machine.stack.append(machine.take(machine.number(_STRINGS[op])))
        elif op in _OPS:
            _OPS[op](machine)
        else:
            raise ValueError(f"unexpected instruction {bytes([op])!r} at byte {machine.at - 1}")
    return machine.stack.pop()


def _pickled(path: Path, classes: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Pixels (n, 3072) uint8 and labels of a CIFAR pickle."""
    try:
        content = _plain(path.read_bytes())
        found = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        labels, array = found["labels" if classes == 10 else "fine_labels"], found["data"]
        version, shape, dtype, fortran, raw = array.state
        if version != 1 or dtype.arguments[0] not in ("u1", b"u1") or fortran is not False or type(raw) is not bytes or type(labels) is not list:
            raise ValueError("expected an array of bytes, and a list of labels")
        if len(shape) != 2 or shape[1] != _PIXELS or len(raw) != shape[0] * _PIXELS or len(labels) != shape[0]:
            raise ValueError(f"expected n x {_PIXELS} bytes and n labels, found {list(shape)} of {len(raw)} bytes and {len(labels)} labels")
        if not all(type(label) is int and 0 <= label < classes for label in labels):
            raise ValueError(f"expected labels from 0 to {classes - 1}")
    except OSError:
        raise
    except Refused as error:
        raise TaskError(f"{path}: refused: reading it would run code from the file ({error})") from error
    except Exception as error:  # whatever a damaged pickle sets off
        raise TaskError(f"{path}: not a batch of CIFAR-{classes} ({type(error).__name__}: {error})") from error
    return numpy.frombuffer(raw, numpy.uint8).reshape(shape), numpy.array(labels, numpy.int64)


def _binary(path: Path, classes: int, place: int, before: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The same of a binary file: records of `before` bytes, of which number `place` is the label, and 3072 pixels."""
    records = numpy.fromfile(path, numpy.uint8)
    if not len(records) or len(records) % (_PIXELS + before):
        raise TaskError(f"{path}: not a batch of CIFAR-{classes}: expected a multiple of {_PIXELS + before} bytes, found {len(records)}")
    records = records.reshape(-1, _PIXELS + before)
    labels = records[:, place].astype(numpy.int64)
    if labels.max() >= classes:
        raise TaskError(f"{path}: not a batch of CIFAR-{classes}: expected labels from 0 to {classes - 1}, found {labels.max()}")
    return records[:, before:], labels


def _cifar(folder: Path, layout: str) -> Arrays:
    classes, look, train, test, binary = _CIFAR[layout]
    if missing := [name for name in (*train, test) if not (folder / name).is_file()]:
        raise TaskError(f"{folder}: expected the files of {layout}; missing {', '.join(missing)}")

    def read(names: Sequence[str]) -> tuple[Tensor, Tensor]:
        parts = [_binary(folder / name, classes, *binary) if binary else _pickled(folder / name, classes) for name in names]
        images = numpy.concatenate([pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for pixels, _ in parts])
        return torch.from_numpy(numpy.ascontiguousarray(images)), torch.from_numpy(numpy.concatenate([labels for _, labels in parts]))

    return Arrays("cifar", classes, look, read(train), read([test]))


def _find(path: Path) -> tuple[Path, str]:
    """The folder of the data at or directly below a path, and its layout: one of CIFAR's, or "folder"."""
    if path.is_file():
        packed = path.name.endswith((".tar.gz", ".tgz", ".tar", ".zip"))
        raise TaskError(f"{path}: expected a folder, found a file" + (f"; unpack it first: tar -xf {path.name}" if packed else ""))
    if not path.is_dir():
        raise TaskError(f"{path}: expected a folder of images; there is none")
    # a folder of its own may have any name; below others only CIFAR's own names count
    found = [(path, layout) for layout, (_, _, train, test, _) in _CIFAR.items() if any((path / name).is_file() for name in (*train, test))]
    if (path / "train").is_dir():
        found.append((path, "folder"))
    found = found or [(path / layout, layout) for layout in _CIFAR if (path / layout).is_dir()]
    if len(found) > 1:
        raise TaskError(f"{path}: expected one data set, found {', '.join(layout for _, layout in found)}; give the folder of one")
    if not found:
        packed = sorted(p.name for p in path.glob("cifar-*.tar.gz"))
        hint = f"; unpack it first: tar -xf {packed[0]}" if packed else ""
        raise TaskError(f"{path}: expected {', '.join(_CIFAR)}, or a folder train/ with a folder for each class{hint}")
    return found[0]


def _open_picture(path: str):
    """A Pillow image in RGB; TaskError with the path if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # whatever a damaged file sets off in Pillow's readers
        raise TaskError(f"{path}: cannot be read as an image ({type(error).__name__}: {error})") from error


class Pictures(Dataset):
    """(uint8 (size, size, 3), label) of picture files, read when asked for.

    augment   a random part of 8 to 100 % of the area, 3:4 to 4:3, flipped half of the time; drawn from torch's global generator, which DataLoader's
              workers and twa seed. Else: the shorter edge becomes `edge` pixels, and the middle is cut out
    bicubic   how it is resized, instead of bilinear
    """

    def __init__(self, root: Path, files: numpy.ndarray, labels: numpy.ndarray, size: int, edge: int, bicubic: bool, augment: bool) -> None:
        self.root, self.files, self.labels, self.size, self.edge, self.bicubic, self.augment = root, files, labels, size, edge, bicubic, augment

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        image, size = _open_picture(os.path.join(self.root, os.fsdecode(self.files[index]))), self.size
        method = Image.Resampling.BICUBIC if self.bicubic else Image.Resampling.BILINEAR
        if self.augment:
            image = image.resize((size, size), method, box=_random_box(*image.size))
            if torch.rand(()) < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        else:
            w, h = image.size
            w, h = (self.edge, int(self.edge * h / w)) if w <= h else (int(self.edge * w / h), self.edge)
            left, top = round((w - size) / 2), round((h - size) / 2)
            image = image.resize((w, h), method).crop((left, top, left + size, top + size))
        return torch.from_numpy(numpy.array(image)), int(self.labels[index])


def _random_box(w: int, h: int) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a random part of an image; all of it, cut to 3:4 or 4:3 at most, if ten tries do not fit."""
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
    """[(uint8 (h, w, 3), label)] -> (float32 (b, 3, h, w), int64 (b,))"""

    def __init__(self, look: Look) -> None:
        self.look = look

    def __call__(self, items: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*items, strict=True)
        return self.look.normalised(torch.stack(images)), torch.tensor(labels)


@dataclass(frozen=True)
class Folder:
    """Pictures in train/CLASS/ and val/CLASS/, in the order of their paths: relative paths (n,) as bytes (a million str objects would be copied into
    each worker as their reference counts change), labels (n,) int64."""

    root: Path
    classes: list[str]
    train: tuple[numpy.ndarray, numpy.ndarray]
    test: tuple[numpy.ndarray, numpy.ndarray]


def _folder(root: Path) -> Folder:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise TaskError("folders of images are read by Pillow: pip install pillow") from error
    classes = sorted(entry.name for entry in os.scandir(root / "train") if entry.is_dir())

    def listed(part: str) -> tuple[numpy.ndarray, numpy.ndarray]:
        if not (root / part).is_dir():
            raise TaskError(f"{root}: expected folders train/ and val/ with a folder for each class; there is no {part}/")
        if extra := sorted({entry.name for entry in os.scandir(root / part) if entry.is_dir()} - set(classes)):
            raise TaskError(f"{root / part}: expected the classes of train/, found another: {extra[0]}")
        files, labels = [], []
        for label, name in enumerate(classes):
            for folder, _, names in sorted(os.walk(root / part / name, followlinks=True)):
                chosen = sorted(n for n in names if n.lower().endswith(SUFFIXES))
                files += [os.fsencode(os.path.relpath(os.path.join(folder, n), root)) for n in chosen]
                labels += [label] * len(chosen)
        if not files:
            raise TaskError(f"{root / part}: expected images ({', '.join(SUFFIXES)}) in a folder for each class, found none")
        return numpy.array(files), numpy.array(labels, numpy.int64)

    return Folder(root, classes, listed("train"), listed("val"))


# Tasks ----------------------------------------------------------------------------------------------------------------------


def _cut(n: int, heldout: int, val: int, among: numpy.ndarray | None = None) -> dict[str, Tensor]:
    """Which of n training images each part has; held-out and validation images are from `among`, if given, and training images from the rest."""
    g = torch.Generator().manual_seed(0)
    pool = torch.arange(n) if among is None else torch.from_numpy(numpy.flatnonzero(among))
    if heldout < 0 or val < 1 or heldout + val > len(pool) - (among is None):
        raise TaskError(f"expected val of at least 1 and heldout of at least 0, together fewer than {len(pool)} images; found {val} and {heldout}")
    order = pool[torch.randperm(len(pool), generator=g)]
    train = order[heldout + val :] if among is None else torch.from_numpy(numpy.flatnonzero(among == 0))
    return {"heldout": order[:heldout], "val": order[heldout : heldout + val], "train": train}


def _own_model(name: str, kind: str, classes: int, size: int) -> Callable[[], nn.Module]:
    """What makes the model; kind: "digits", "cifar" or "folder" (of images of `size` pixels)."""
    channels = 1 if kind == "digits" else 3
    library, _, inner = name.partition(":")
    if inner and library in ("timm", "torchvision"):
        try:
            module = importlib.import_module("timm" if library == "timm" else "torchvision.models")
        except ImportError as error:
            raise TaskError(f"model {name!r}: needs {library}: pip install {library}; or one of {', '.join(MODELS)}") from error
        if library == "timm":
            return functools.partial(module.create_model, inner, pretrained=False, num_classes=classes, in_chans=channels)
        if channels != 3:
            raise TaskError(f"model {name!r}: torchvision's models take colour images, the digits are grey; expected one of {', '.join(MODELS)}")
        return functools.partial(module.get_model, inner, weights=None, num_classes=classes)
    made: dict[tuple[str, str], Callable[[], nn.Module]] = {
        ("resnet", "digits"): lambda: ResNet(classes),
        ("resnet", "cifar"): lambda: preresnet(20, classes),
        ("preresnet164", "cifar"): lambda: preresnet(164, classes),
        ("resnet", "folder"): lambda: resnet18(classes),
        ("resnet50", "folder"): lambda: resnet50(classes),
        ("vgg", "digits"): lambda: vgg_digits(classes),
        ("vgg", "cifar"): lambda: vgg16(classes),
        ("vgg", "folder"): lambda: vgg16(classes),
        ("vit", "digits"): lambda: ViT(8, 2, 1, classes, 48, 2, 4),
        ("vit", "cifar"): lambda: ViT(32, 4, 3, classes, 192, 6, 3),
        ("vit", "folder"): lambda: ViT(size, 16, 3, classes, 384, 12, 6),  # ViT-S/16
    }
    if (name, kind) not in made:
        names = ", ".join(own for own, of in made if of == kind)
        raise TaskError(f"model: expected {names}, timm:NAME or torchvision:NAME for {kind} images, found {name!r}")
    return made[name, kind]


def _memory_parts(data: Arrays, cut: dict[str, Tensor], batch: int, seed: int, augment: bool, device: torch.device) -> dict[str, Iterable | None]:
    def batches(pair: Sequence[Tensor], size: int, shuffle: bool = False, augment: bool = False) -> Batches | None:
        images, labels = (t.to(device) for t in pair)
        generator = torch.Generator().manual_seed(seed) if shuffle else None
        return Batches(images, labels, data.look, size, generator, augment) if len(labels) else None

    train, heldout, val = ([t[cut[part]] for t in data.train] for part in ("train", "heldout", "val"))
    return {
        "train": batches(train, batch, True, augment),
        "heldout": batches(heldout, batch, True),
        "val": batches(val, 4 * batch),
        "test": batches(data.test, 4 * batch),
    }


def _folder_parts(
    data: Folder, cut: dict[str, Tensor], look: Look, view: Callable, batch: int, seed: int, augment: bool, workers: int, device: torch.device
) -> dict[str, Iterable | None]:
    """view: makes Pictures of root, files, labels and augment."""

    def batches(pair: Sequence[numpy.ndarray], shuffle: bool = False, augment: bool = False) -> DataLoader | Moved | None:
        files, labels = pair
        if not len(files):
            return None
        loader = DataLoader(
            view(data.root, files, labels, augment=augment),
            batch,
            shuffle=shuffle,
            generator=torch.Generator().manual_seed(seed) if shuffle else None,
            drop_last=shuffle and len(files) >= batch,
            num_workers=workers,
            collate_fn=Collate(look),
            pin_memory=device.type == "cuda",
        )
        return loader if device.type == "cpu" else Moved(loader, device)

    train, heldout, val = ([a[cut[part].numpy()] for a in data.train] for part in ("train", "heldout", "val"))
    return {"train": batches(train, True, augment), "heldout": batches(heldout, True), "val": batches(val), "test": batches(data.test)}


def _task(name: str, make: Callable[[], nn.Module], parts: dict[str, Iterable | None], device: torch.device, settings: object) -> Task:
    digest = hashlib.sha256(repr(settings).encode() + Path(__file__).read_bytes()).hexdigest()[:16]
    return Task(name=name, model=lambda: make().to(device), loss=loss, metric=accuracy, metric_name=METRIC, fingerprint=f"{name} {digest}", **parts)


def image_task(
    model: str = "resnet",
    path: str | Path | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    batch: int | None = None,
    augment: bool = True,
    heldout: int | None = None,
    val: int | None = None,
    size: int = 224,
    workers: int = 0,
) -> Task:
    """Classification of images; see the module's text.

    model    "resnet" (digits: 43 thousand parameters; CIFAR: PreResNet-20; folder: ResNet-18), "vgg", "vit", "preresnet164" (CIFAR), "resnet50"
             (folder), "timm:NAME" or "torchvision:NAME", all with random weights
    path     None: scikit-learn's digits. Else CIFAR-10 or -100, pickles or binary, as torchvision leaves it, or a folder with train/CLASS/ and
             val/CLASS/ of picture files; the folder itself, or the one above CIFAR's
    seed     of the order of the training and held-out batches, and of changes to images in memory
    batch    images; default 64 for the digits, else 128
    augment  change training images at random: digits are shifted, noisy and partly erased, CIFAR is shifted and flipped, pictures are cut and flipped
    heldout, val  images cut from the training set. Default: 200 each of the digits' 1297, else 5 % of CIFAR's and 1 % of a folder's. heldout=0: none
    size     of pictures, in pixels; workers: processes that read them
    Raises TaskError if the data or a library are missing or wrong.
    """
    device = torch.device(device)
    batch = batch or (64 if path is None else 128)
    if batch < 1 or size < 1 or workers < 0:
        raise TaskError(f"expected a positive batch and size, and workers of at least 0; found {batch}, {size}, {workers}")
    root, layout = (None, "digits") if path is None else _find(Path(path))
    data = _digits() if root is None else _folder(root) if layout == "folder" else _cifar(root, layout)
    kind, classes = ("folder", len(data.classes)) if isinstance(data, Folder) else (data.kind, data.classes)
    n = len(data.train[1])
    share = 200 if kind == "digits" else max(1, n // (20 if kind == "cifar" else 100))
    cut = _cut(n, share if heldout is None else heldout, share if val is None else val)
    make = _own_model(model, kind, classes, size)
    if isinstance(data, Folder):
        view = functools.partial(Pictures, size=size, edge=size * 256 // 224, bicubic=False)
        parts = _folder_parts(data, cut, Look(*IMAGENET), view, batch, seed, augment, workers, device)
    else:
        parts = _memory_parts(data, cut, batch, seed, augment, device)
    sizes = {name: len(index) for name, index in cut.items()}
    return _task(f"images:{layout}:{model}", make, parts, device, (model, layout, seed, batch, augment, sizes, size))


def clip_task(
    finetunes: str | Path | Sequence[str | Path],
    images: str | Path,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    batch: int = 128,
    augment: bool = False,
    heldout: int | None = None,
    val: int | None = None,
    heldout_file: str | Path | None = None,
    workers: int = 0,
) -> tuple[Task, list[Path]]:
    """Fine-tunes of CLIP's image side, and a folder of pictures that they classify: the task, and the files in numeric order.

    finetunes     what `twa.Candidates` takes: a folder of .pt or .safetensors state dicts, as those of "Model soups" (see models/clip.py)
    images        a folder with train/CLASS/ and val/CLASS/; ImageNet's classes in the order of their names, n01440764 first
    augment       cut training images at random and flip them; else they are prepared as CLIP prepares all images
    heldout, val  training images; default 1 % each
    heldout_file  which training images the fine-tunes have not seen: an .npy of 0 and 1 (unseen), one for each in the order of their paths, such as
                  imagenet_98_idxs.npy of "Model soups". heldout and val are cut from those (default: halves of them). Without it, they are images
                  that the fine-tunes may have been trained on, and figures on them are too good
    The rest as for `image_task`. Raises TaskError, CandidateError or ValueError (tensors that do not make a CLIP classifier).
    """
    device = torch.device(device)
    candidates = Candidates(finetunes)
    shapes = {key: tuple(info.shape) for key, info in candidates.info.items()}
    probe = CLIPClassifier.from_shapes(shapes)
    size, classes = probe.image, probe.classification_head.out_features
    root, layout = _find(Path(images))
    if layout != "folder":
        raise TaskError(f"{images}: expected folders train/ and val/ of pictures, found {layout}")
    data = _folder(root)
    if len(data.classes) != classes:
        raise TaskError(f"{root}: expected {classes} classes, as the fine-tunes have, found {len(data.classes)}")
    n, among = len(data.train[1]), None
    share = max(1, n // 100), max(1, n // 100)
    if heldout_file is not None:
        among = numpy.load(heldout_file, allow_pickle=False)
        if among.shape != (n,) or not numpy.isin(among, (0, 1)).all():
            raise TaskError(f"{heldout_file}: expected 0 or 1 for each of {n} training images, found {among.dtype} {list(among.shape)}")
        share = int(among.sum()) // 2, int(among.sum()) - int(among.sum()) // 2
    cut = _cut(n, share[0] if heldout is None else heldout, share[1] if val is None else val, among)
    view = functools.partial(Pictures, size=size, edge=size, bicubic=True)
    parts = _folder_parts(data, cut, Look(*CLIP), view, batch, seed, augment, workers, device)
    sizes = {name: len(index) for name, index in cut.items()}
    task = _task("images:folder:clip", lambda: CLIPClassifier.from_shapes(shapes), parts, device, (shapes, seed, batch, augment, sizes))
    return task, [c.path for c in candidates]
