"""Small stand-ins of data and checkpoints, in the formats that are on disk."""

import struct
from dataclasses import replace

import numpy
import torch
from claims import images, text, workloads
from PIL import Image
from twa.tasks import chars


def times(folder, names="*.safetensors"):
    """When each checkpoint below a folder was written."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob(names)}


def python2(value):
    """A protocol 2 pickle as Python 2's cPickle writes it: bytes as strings, arrays by numpy 1's
    names.
    """

    def put(v):
        if isinstance(v, bytes):
            short = len(v) < 256
            return (b"U" + bytes([len(v)]) if short else b"T" + struct.pack("<I", len(v))) + v
        if isinstance(v, bool):
            return b"\x88" if v else b"\x89"
        if isinstance(v, int):
            if 0 <= v < 256:
                return b"K" + bytes([v])
            return b"M" + struct.pack("<H", v) if 0 <= v < 65536 else b"J" + struct.pack("<i", v)
        if v is None:
            return b"N"
        if isinstance(v, tuple):
            return b"(" + b"".join(map(put, v)) + b"t"
        if isinstance(v, list):
            return b"](" + b"".join(map(put, v)) + b"e"
        if isinstance(v, dict):
            return b"}(" + b"".join(put(k) + put(x) for k, x in v.items()) + b"u"
        kind = b"cnumpy\ndtype\n" + put((v.dtype.str[1:].encode(), 0, 1)) + b"R"
        kind += put((3, b"|", None, None, None, -1, -1, 0)) + b"b"
        empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
        empty += put((0,)) + put(b"b") + b"tR"
        return empty + b"(" + put(1) + put(v.shape) + kind + put(False) + put(v.tobytes()) + b"tb"

    return b"\x80\x02" + put(value) + b"."


def pictures_of(n, classes, seed):
    """Pixels (n, 3072) uint8, red, green, blue, of noise that is brighter the higher the label;
    labels.
    """
    r = numpy.random.default_rng(seed)
    labels = r.integers(0, classes, n)
    labels[0] = classes - 1
    pixels = r.integers(0, 100, (n, 3072)) + labels[:, None] * (150 // classes)
    return pixels.astype(numpy.uint8), labels.tolist()


def cifar10(root, write, n=24):
    """CIFAR-10 as torchvision unpacks it, with n images a file; write: an object's pickle."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for k, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        pixels, labels = pictures_of(n, 10, k)
        content = {b"batch_label": b"batch", b"filenames": [b"a.png"] * n}
        content |= {b"labels": labels, b"data": pixels}
        (folder / name).write_bytes(write(content))
    return folder


def cifar100(root, n=60):
    """CIFAR-100 as torchvision unpacks it, with n images a file."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, seed in (("train", 0), ("test", 1)):
        pixels, labels = pictures_of(n, 100, seed)
        content = {b"filenames": [b"a.png"] * n, b"coarse_labels": [0] * n}
        content |= {b"fine_labels": labels, b"data": pixels}
        (folder / name).write_bytes(python2(content))
    return folder


def binary(root, layout, names, classes, before, n=24):
    """CIFAR's binary files, with n records of `before` bytes and an image each."""
    folder = root / layout
    folder.mkdir(parents=True)
    for k, name in enumerate(names):
        pixels, labels = pictures_of(n, classes, k)
        head = numpy.zeros((n, before), numpy.uint8)
        head[:, -1] = labels  # the fine label is the last byte before the pixels
        numpy.concatenate([head, pixels], 1).tofile(folder / name)
    return folder


BATCHES = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]


def folder_of(root, classes=3, each=6):
    """Pictures in ImageNet's layout: `each` a class to train on, two a class to test on."""
    r = numpy.random.default_rng(0)
    for part, count in (("train", each), ("val", 2)):
        for c in range(classes):
            (root / part / f"n{c:03}").mkdir(parents=True)
            for i in range(count):
                # upright and across, some grey
                shape = (20 + 3 * i, 31 - i) if i % 2 else (25, 20, 3)
                pixels = (r.integers(0, 60, shape) + 90 * c).astype(numpy.uint8)
                name = f"{i}.{'png' if i % 2 else 'JPEG'}"
                Image.fromarray(pixels).save(root / part / f"n{c:03}" / name)
    return root


def clip_state(depth=2, classes=3):
    """Shapes of the ViT-B/32 fine-tunes, with 768 -> 8, 224 -> 16, 32 -> 8, 512 -> 6, 77 -> 5 and
    49408 -> 11.
    """

    def pair(name, *shape):
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    text = {"positional_embedding": (5, 6), "text_projection": (6, 6), "logit_scale": ()}
    text |= {"token_embedding.weight": (11, 6)} | pair("ln_final", 6)
    visual = {"class_embedding": (8,), "positional_embedding": (5, 8), "proj": (8, 6)}
    visual |= {"conv1.weight": (8, 3, 8, 8)} | pair("ln_pre", 8) | pair("ln_post", 8)
    for k in range(depth):
        b = f"transformer.resblocks.{k}"
        visual |= {f"{b}.attn.in_proj_weight": (24, 8), f"{b}.attn.in_proj_bias": (24,)}
        visual |= pair(f"{b}.attn.out_proj", 8, 8) | pair(f"{b}.ln_1", 8) | pair(f"{b}.ln_2", 8)
        visual |= pair(f"{b}.mlp.c_fc", 32, 8) | pair(f"{b}.mlp.c_proj", 8, 32)
    found = {f"model.{key}": shape for key, shape in text.items()}
    found |= {f"model.visual.{key}": shape for key, shape in visual.items()}
    return found | pair("classification_head", classes, 6)


def clip_files(folder, n=3):
    """State dicts of fine-tunes, which share the text side."""
    folder.mkdir()
    base = {key: torch.randn(shape) for key, shape in clip_state().items()}
    for i in range(n):
        state = {
            key: t + 0.1 * torch.randn(t.shape) if "visual" in key or "head" in key else t
            for key, t in base.items()
        }
        torch.save(state, folder / f"model_{i}.pt")
    return folder


def little_text(patch, length=60_000):
    """Cuts the built-in text to as many characters a domain, in place of megabytes."""
    whole, some = text._domain, chars.files()[::40]

    def short(domain):
        if domain == "help":
            return whole(domain)[:length]
        return b"".join(p.read_bytes() for p in some)[:length]

    patch.setattr(text, "_domain", short)


def little_digits(patch):
    """A few of the digits, in place of 1797."""
    whole = images.read_digits()
    few = {"train": tuple(t[:320] for t in whole.train), "test": tuple(t[:64] for t in whole.test)}
    patch.setattr(images, "read_digits", lambda: replace(whole, **few))


def digits(model, plan, twa_steps):
    """A workload on `little_digits`: 3 batches of 64 to train on."""
    sizes = {"heldout": 48, "val": 48}

    def make(**options):
        return images.image_task(model, **sizes | options)

    return replace(workloads.digits(model), make=make, usual=plan, twa_steps=twa_steps)
