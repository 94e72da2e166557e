"""Images: models, and data in the formats that are on disk, made small (bench/claims/images.py)."""

import itertools
import os
import pickle
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
import twa
from claims import images
from claims.image_files import CLIP, Look, Pictures
from claims.images import clip_task, image_task
from claims.models import resnet, vgg, vit
from claims.models.clip import CLIPClassifier
from PIL import Image
from safetensors.torch import save_file
from stand_ins import (
    BATCHES,
    binary,
    cifar10,
    cifar100,
    clip_files,
    clip_state,
    folder_of,
    pictures_of,
    python2,
)
from twa.io.errors import CandidateError, TaskError, TwaError
from twa.tasks.batches import Pass

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# Models ------------------------------------------------------------------------------------------


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "make, images, count",
    [
        (lambda: resnet.ResNet(10), (8, 1, 8, 8), 42938),
        (
            lambda: resnet.ResNet(5, 3, (8, 16), (1, 2), "imagenet", bottleneck=True),
            (4, 3, 64, 64),
            None,
        ),
        (lambda: resnet.ResNet(5, 3, (8, 16), 1, "imagenet", preact=True), (4, 3, 64, 64), None),
        (lambda: resnet.preresnet(8, 10), (4, 3, 32, 32), None),
        (lambda: vgg.vgg_digits(10), (8, 1, 8, 8), None),
        (lambda: vgg.VGG(10, 3, (8, 0, 16, 0), (12,), 0.1), (8, 3, 32, 32), None),
        (lambda: vit.ViT(8, 2, 1, 10, 16, 2, 2), (8, 1, 8, 8), None),
        (lambda: CLIPClassifier.from_shapes(clip_state()), (8, 3, 16, 16), None),
    ],
)
def test_models_learn(make, images, count):
    model, x = make(), torch.randn(images)
    y = torch.arange(len(x)) % 3
    assert count is None or parameters(model) == count
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert model.eval()(x).shape == (len(x), len(model(x)[0]))


def test_published_sizes():
    """Parameters as in torchvision's tables and the papers."""
    with torch.device("meta"):
        assert parameters(resnet.resnet18(1000)) == 11_689_512
        assert parameters(resnet.resnet50(1000)) == 25_557_032
        assert 1_690_000 < parameters(resnet.preresnet(164, 10)) < 1_710_000
        assert 15.2e6 < parameters(vgg.vgg16(10)) < 15.3e6
        keys = resnet.resnet18(1000).state_dict()
    assert {
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.bn2.bias",
        "layer2.0.downsample.0.weight",
        "layer4.1.conv2.weight",
        "fc.bias",
    } <= keys.keys()
    assert len(keys) == 122
    with pytest.raises(TwaError, match="9 k \\+ 2"):
        resnet.preresnet(163, 10)
    with pytest.raises(TwaError, match="stem"):
        resnet.ResNet(10, stem="big")
    with pytest.raises(TwaError, match="multiple of the patch"):
        vit.ViT(9, 2, 1, 10, 16, 1, 2)


def test_the_class_token_of_a_vit_sees_every_patch():
    torch.manual_seed(0)
    image = torch.randn(1, 1, 8, 8, requires_grad=True)
    vit.ViT(8, 2, 1, 10, 16, 1, 2)(image)[0, 0].backward()
    assert (image.grad != 0).all()


def test_clip_is_the_equation():
    """Against the network written out in float64."""
    model = CLIPClassifier.from_shapes(clip_state(depth=1)).eval()
    for p in model.parameters():
        p.data = torch.randn(p.shape) * 0.5
    w = {
        key.removeprefix("model.visual.").replace("transformer.resblocks.0.", ""): t.double()
        for key, t in model.state_dict().items()
    }
    x = torch.randn(3, 3, 16, 16)

    def norm(h, name):
        h = h - h.mean(-1, keepdim=True)
        return (
            h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
            + w[f"{name}.bias"]
        )

    patches = (
        x.double().unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(3, 4, -1)
        @ w["conv1.weight"].reshape(8, -1).T
    )
    h = norm(
        torch.cat([w["class_embedding"].expand(3, 1, 8), patches], 1) + w["positional_embedding"],
        "ln_pre",
    )
    q, k, v = (norm(h, "ln_1") @ w["attn.in_proj_weight"].T + w["attn.in_proj_bias"]).chunk(3, -1)
    h = (
        h
        + (q @ k.mT / 8**0.5).softmax(-1) @ v @ w["attn.out_proj.weight"].T
        + w["attn.out_proj.bias"]
    )
    m = norm(h, "ln_2") @ w["mlp.c_fc.weight"].T + w["mlp.c_fc.bias"]
    h = h + m * torch.sigmoid(1.702 * m) @ w["mlp.c_proj.weight"].T + w["mlp.c_proj.bias"]
    f = norm(h[:, 0], "ln_post") @ w["proj"]
    expected = (
        f / f.norm(dim=-1, keepdim=True) @ w["classification_head.weight"].T
        + w["classification_head.bias"]
    )
    torch.testing.assert_close(model(x).double(), expected, atol=1e-5, rtol=1e-5)
    half = model.half()(x)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), expected, atol=2e-2, rtol=2e-2)


def test_clip_shapes():
    state = clip_state(depth=3)
    model = CLIPClassifier.from_shapes(state)
    assert model.image == 16
    assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == state
    assert not model.model.token_embedding.weight.requires_grad
    with pytest.raises(CandidateError, match=r"'model.visual.proj'.*none of that name"):
        CLIPClassifier.from_shapes({k: v for k, v in state.items() if k != "model.visual.proj"})
    without = dict(state)
    del without["model.visual.transformer.resblocks.1.ln_1.bias"]
    message = r"resblocks.1.ln_1.bias': expected shape \[8\].*found none"
    with pytest.raises(CandidateError, match=message):
        CLIPClassifier.from_shapes(without)
    with pytest.raises(CandidateError, match=r"'extra': expected shape none .* found \[2\]"):
        CLIPClassifier.from_shapes(state | {"extra": (2,)})
    with pytest.raises(CandidateError, match=r"grid\^2 \+ 1 positions, found 7"):
        CLIPClassifier.from_shapes(state | {"model.visual.positional_embedding": (7, 8)})


# Data --------------------------------------------------------------------------------------------


def images_of(batches):
    return torch.cat([images for images, _ in batches])


def passes(source, number, seed=0):
    return [batch for _, batch in Pass(source, number, seed, lambda k: True)]


def check_task(task, channels, size, classes):
    """Shapes, passes that repeat and differ, parts that do not overlap."""
    for data in (task.train, task.val, task.heldout, task.test):
        images, labels = next(iter(data))
        assert images.dtype == torch.float32 and images.shape == (len(labels), channels, size, size)
        assert labels.dtype == torch.int64 and labels.min() >= 0 and labels.max() < classes
    first, again, second = passes(task.train, 0), passes(task.train, 0), passes(task.train, 1)
    assert all(
        torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(first, again, strict=True)
    )
    assert not torch.equal(images_of(first), images_of(second))
    assert not torch.equal(images_of(first), images_of(passes(task.train, 0, seed=1)))
    assert torch.equal(images_of(passes(task.val, 0)), images_of(passes(task.val, 1)))
    parts = [
        {image.numpy().tobytes() for image in images_of(passes(data, 0))}
        for data in (task.val, task.heldout)
    ]
    assert not parts[0] & parts[1]
    model = task.model().eval()
    batch = next(iter(task.val))
    assert task.loss(model, batch).dim() == 0 and 0 <= task.metric(model, batch) <= 1
    assert task.metric_name == "accuracy"


def test_digits():
    task = image_task()
    check_task(task, 1, 8, 10)
    assert [sum(len(y) for _, y in d) for d in (task.val, task.test)] == [200, 500]
    assert [len(d) for d in (task.train, task.heldout)] == [897 // 64, 200 // 64]
    plain = [image_task(augment=False, batch=1297, heldout=0, val=n).train for n in (1, 300)]
    assert len(images_of(plain[0])) == 1296 and len(images_of(plain[1])) == 997
    assert image_task(heldout=0).heldout is None
    labels = [torch.cat([y for _, y in passes(image_task(seed=s).train, 0)]) for s in (0, 0, 1)]
    assert torch.equal(labels[0], labels[1]) and not torch.equal(labels[0], labels[2])
    assert image_task().fingerprint == image_task().fingerprint != image_task(seed=1).fingerprint
    with pytest.raises(TaskError, match="together fewer than 1297"):
        image_task(heldout=1000, val=297)
    with pytest.raises(TaskError, match="found 'preresnet164'"):
        image_task("preresnet164")


def test_augmentation_by_its_words():
    """A shift moves the image and lets black in, a flip mirrors it; vectorised as one by one."""
    images = torch.randint(1, 256, (40, 6, 7, 3), dtype=torch.uint8)
    changed = Look((0.0,) * 3, (1.0,) * 3, pad=2, flip=True).changed(
        images, torch.Generator().manual_seed(3)
    )
    padded = torch.nn.functional.pad(images, (0, 0, 2, 2, 2, 2))
    seen, places = set(), list(itertools.product(range(5), range(5), (0, 1)))
    for image, out in zip(padded, changed, strict=True):
        cuts = {(y, x, flip): image[y : y + 6, x : x + 7] for y, x, flip in places}
        cuts = {where: cut.flip(1) if where[2] else cut for where, cut in cuts.items()}
        match = [where for where, cut in cuts.items() if torch.equal(cut, out)]
        assert len(match) == 1
        seen |= set(match)
    assert [set(part) for part in zip(*seen, strict=True)] == [set(range(5)), set(range(5)), {0, 1}]
    erased = Look((0.0,), (1.0,), erase=True).disturbed(
        torch.ones(50, 2, 8, 8), torch.Generator().manual_seed(0)
    )
    gone = (erased == 0).sum((2, 3))
    assert torch.equal(gone[:, 0], gone[:, 1])
    assert {0, 9} <= set(gone[:, 0].tolist()) <= {0, 4, 6, 9}


def test_normalised():
    images = torch.randint(0, 256, (2, 3, 4, 3), dtype=torch.uint8)
    expected = (images.double() / 255 - torch.tensor(CLIP[0])) / torch.tensor(CLIP[1])
    torch.testing.assert_close(
        Look(*CLIP).normalised(images).double(), expected.permute(0, 3, 1, 2), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "write",
    [
        python2,
        lambda content: pickle.dumps(content, protocol=2),
        lambda content: pickle.dumps(content, protocol=4),
    ],
)
def test_cifar10(tmp_path, write):
    folder = cifar10(tmp_path, write)
    # torchvision leaves it beside the folder
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")
    task = image_task(path=tmp_path, batch=16, heldout=20, val=20)
    check_task(task, 3, 32, 10)
    pixels, labels = pictures_of(24, 10, 5)
    images, found = next(iter(image_task(path=folder, batch=24).test))
    assert found.tolist() == labels
    mean = torch.tensor((0.4914, 0.4822, 0.4465)).view(3, 1, 1)
    std = torch.tensor((0.2470, 0.2435, 0.2616)).view(3, 1, 1)
    expected = torch.from_numpy(pixels.reshape(24, 3, 32, 32) / 255).float()
    torch.testing.assert_close(images * std + mean, expected, atol=1e-5, rtol=1e-5)


def test_cifar100_and_binary(tmp_path):
    check_task(image_task("resnet", cifar100(tmp_path), batch=16, heldout=10, val=10), 3, 32, 100)
    ten = binary(tmp_path, "cifar-10-batches-bin", BATCHES, 10, 1)
    hundred = binary(tmp_path, "cifar-100-binary", ["train.bin", "test.bin"], 100, 2, 60)
    pairs = [(cifar10(tmp_path, python2), ten), (tmp_path / "cifar-100-python", hundred)]
    for pickled, plain in pairs:
        a, b = (image_task(path=p, batch=20, heldout=5, val=5) for p in (pickled, plain))
        for x, y in zip(
            (*passes(a.train, 0), *a.test), (*passes(b.train, 0), *b.test), strict=True
        ):
            assert torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])
    with pytest.raises(
        TaskError, match="expected one data set, found cifar-10-batches-py, cifar-100-python"
    ):
        image_task(path=tmp_path)


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_hostile_pickle(tmp_path):
    folder = cifar10(tmp_path, python2)
    for protocol in (2, 4):
        (folder / "data_batch_3").write_bytes(
            pickle.dumps({b"labels": Hostile(tmp_path / "ran")}, protocol=protocol)
        )
        with pytest.raises(
            TaskError, match=r"data_batch_3: refused: .*asks for (posix|nt)\.system"
        ):
            image_task(path=folder)
    assert not (tmp_path / "ran").exists()


def test_wrong_cifar(tmp_path):
    folder = cifar10(tmp_path, python2)
    pixels, labels = pictures_of(24, 10, 0)
    good = {b"labels": labels, b"data": pixels}
    wrong = [
        (
            good | {b"data": pixels[:, :-1]},
            r"expected n x 3072 bytes and n labels, found \[24, 3071\]",
        ),
        (good | {b"data": pixels.astype(numpy.uint16)}, "expected an array of bytes"),
        (good | {b"data": numpy.asfortranarray(pixels)[:2]}, "24 labels"),
        (good | {b"labels": labels[:-1]}, "23 labels"),
        (good | {b"labels": [10, *labels[1:]]}, "labels from 0 to 9"),
        ({b"data": pixels}, "KeyError: 'labels'"),
        ([1, 2], "AttributeError"),
    ]
    for content, message in wrong:
        (folder / "test_batch").write_bytes(python2(content))
        with pytest.raises(TaskError, match=f"test_batch: not a batch of CIFAR-10 .*{message}"):
            image_task(path=folder)
    (folder / "test_batch").write_bytes(python2(good)[:1000])
    with pytest.raises(TaskError, match="cut off"):
        image_task(path=folder)
    (folder / "data_batch_2").unlink()
    with pytest.raises(TaskError, match=r"missing data_batch_2$"):
        image_task(path=folder)
    records = binary(tmp_path, "cifar-10-batches-bin", BATCHES, 10, 1)
    (records / "test_batch.bin").write_bytes(bytes(3072))
    with pytest.raises(TaskError, match="multiple of 3073 bytes, found 3072"):
        image_task(path=records)
    (records / "test_batch.bin").write_bytes(b"\x0a" + bytes(3072))
    with pytest.raises(TaskError, match="from 0 to 9, found 10"):
        image_task(path=records)


def test_wrong_paths(tmp_path):
    with pytest.raises(TaskError, match="there is none"):
        image_task(path=tmp_path / "no")
    with pytest.raises(TaskError, match=r"expected cifar-10-batches-py, .*, or a folder train/"):
        image_task(path=tmp_path)
    packed = tmp_path / "cifar-100-python.tar.gz"
    packed.write_bytes(b"")
    for path in (packed, tmp_path):
        with pytest.raises(TaskError, match=r"unpack it first: tar -xf cifar-100-python.tar.gz"):
            image_task(path=path)


def test_folder(tmp_path):
    root = folder_of(tmp_path)
    task = image_task("vit", root, batch=4, heldout=3, val=3, size=32)
    check_task(task, 3, 32, 3)
    assert [y.tolist() for _, y in task.test] == [[0, 0, 1, 1], [2, 2]]
    lazy = image_task("resnet", root, batch=4, heldout=0, val=1, size=32, workers=1)
    with_none = image_task("resnet", root, batch=4, heldout=0, val=1, size=32)
    assert lazy.heldout is None
    # the same in a worker process
    for a, b in zip(passes(lazy.train, 2), passes(with_none.train, 2), strict=True):
        assert torch.equal(a[0], b[0])
    pictures = Pictures(
        root, numpy.array([b"train/n002/0.JPEG"]), numpy.array([2]), 16, 18, False, False
    )
    image, label = pictures[0]
    with Image.open(root / "train/n002/0.JPEG") as whole:  # 20 x 25 -> 18 x 22 -> its middle
        resized = whole.convert("RGB").resize((18, 22), Image.Resampling.BILINEAR)
    assert label == 2 and numpy.array_equal(image.numpy(), numpy.asarray(resized)[3:19, 1:17])


def test_wrong_folders(tmp_path):
    root = folder_of(tmp_path)
    (root / "train/n001/2.JPEG").write_bytes(b"no picture")
    with pytest.raises(TaskError, match=r"n001/2.JPEG: cannot be read as an image"):
        task = image_task(path=root, size=32, heldout=0, val=1, batch=1)
        list(task.train), list(task.val)
    (root / "val/other").mkdir()
    with pytest.raises(TaskError, match="expected the classes of train/, found another: other"):
        image_task(path=root)
    (root / "val").rename(root / "valid")
    with pytest.raises(TaskError, match="there is no val/"):
        image_task(path=root)
    (tmp_path / "b/train/x").mkdir(parents=True)
    with pytest.raises(TaskError, match=r"expected images .* found none"):
        image_task(path=tmp_path / "b")


def test_other_libraries(tmp_path, monkeypatch):
    calls = []

    def create(name, **options):
        calls.append((name, options))
        return torch.nn.Flatten()

    models = SimpleNamespace(get_model=create)
    root = folder_of(tmp_path)
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for name in ("timm", "torchvision"):
        with pytest.raises(TaskError, match=f"pip install {name}"):
            image_task(f"{name}:resnet18", root)
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create))
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    image_task("timm:vit_tiny", root).model()
    image_task("torchvision:resnet18", root).model()
    assert calls == [
        ("vit_tiny", {"pretrained": False, "num_classes": 3, "in_chans": 3}),
        ("resnet18", {"weights": None, "num_classes": 3}),
    ]
    with pytest.raises(TaskError, match="the digits are grey"):
        image_task("torchvision:resnet18")


# Into a subspace ---------------------------------------------------------------------------------


def averages(task, files):
    """Two steps of TWA on the files; the loss on the training data falls."""
    model = task.model()
    subspace = twa.Subspace.from_candidates(model, twa.Candidates(files), bits=8)
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW, lr=0.02)
    batch = next(iter(task.train))
    losses = []
    for _ in range(3):
        losses.append(task.loss(model, batch))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    twa.update_bn(task.train, model, max_batches=2)
    assert losses[2] < losses[0] and subspace.coefficients.abs().max() > 0
    assert 0 <= task.metric(model.eval(), next(iter(task.val))) <= 1


@pytest.mark.parametrize(
    "model, data",
    [
        ("resnet", None),
        ("vgg", None),
        ("vit", None),
        ("resnet", "cifar10"),
        ("vit", "cifar100"),
        ("resnet", "folder"),
    ],
)
def test_candidates_to_subspace(tmp_path, monkeypatch, model, data):
    small = {"widths": (4, 8), "blocks": 1, "stem": "imagenet"}
    monkeypatch.setattr(images, "resnet18", lambda classes: resnet.ResNet(classes, 3, **small))
    monkeypatch.setattr(images, "ViT", lambda *sizes: vit.ViT(*sizes[:4], 48, 2, 3))
    make = {"cifar10": lambda p: cifar10(p, python2), "cifar100": cifar100, "folder": folder_of}
    path = None if data is None else make[data](tmp_path / "data")
    task = image_task(model, path, batch=8, size=32)
    trained, files = task.model(), []
    optimizer = torch.optim.SGD(trained.parameters(), 0.02)
    for k, batch in enumerate(passes(task.train, 0)[:1] * 3):
        task.loss(trained, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        files.append(tmp_path / f"step_{k}.safetensors")
        save_file(trained.state_dict(), files[-1])
    averages(task, files)


def test_clip_task(tmp_path):
    root, finetunes = folder_of(tmp_path / "data"), clip_files(tmp_path / "soup")
    task, files = clip_task(finetunes, root, batch=4, heldout=3, val=3)
    assert [f.name for f in files] == [f"model_{i}.pt" for i in range(3)]
    check_task(task, 3, 16, 3)
    task.model().load_state_dict(torch.load(files[0]), strict=True)
    averages(task, files)
    plain, changed = (clip_task(finetunes, root, batch=4, augment=a)[0] for a in (False, True))
    assert not torch.equal(images_of(passes(changed.train, 0)), images_of(passes(plain.train, 0)))

    unseen = numpy.zeros(18)
    unseen[[0, 4, 8, 17]] = 1
    numpy.save(tmp_path / "unseen.npy", unseen)
    held, _ = clip_task(finetunes, root, batch=4, heldout_file=tmp_path / "unseen.npy")
    parts = [
        {image.numpy().tobytes() for image in images_of(passes(data, 0))}
        for data in (held.train, held.val, held.heldout)
    ]
    assert [len(p) for p in parts] == [12, 2, 2] and not parts[1] & parts[2]
    assert not parts[0] & (parts[1] | parts[2])
    numpy.save(tmp_path / "unseen.npy", unseen[1:])
    with pytest.raises(TaskError, match="0 or 1 for each of 18 training images, found float64"):
        clip_task(finetunes, root, heldout_file=tmp_path / "unseen.npy")
    folder_of(tmp_path / "two", classes=2)
    with pytest.raises(TaskError, match="expected 3 classes, as the fine-tunes have, found 2"):
        clip_task(finetunes, tmp_path / "two")
