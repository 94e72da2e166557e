"""`twa recipe` from the command line: the published data's formats end to end, what is kept, what
is said.
"""

import dataclasses
import json

import pytest
import torch
from claims import head, images, suite, workloads
from claims.models.resnet import ResNet
from claims.models.vgg import VGG
from claims.rows import Rows, table
from claims.runs import Plan, round_to_grid, train
from test_images import cifar10, folder_of, python2
from twa.cli import main as cli

FILES = ("head.md", "head.png", "head.json")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(monkeypatch):
    """Small workloads, in place of those that take minutes."""

    def gpt():
        made = workloads.gpt(width=16, depth=1, context=16)
        return dataclasses.replace(
            made, usual=dataclasses.replace(made.usual, steps=20, every=2, warmup=4), twa_steps=4
        )

    def digits(model):
        made = workloads.digits(model)
        return dataclasses.replace(
            made, usual=dataclasses.replace(made.usual, steps=20, every=2), twa_steps=4
        )

    monkeypatch.setattr(
        workloads,
        "BUILT_IN",
        {"gpt": gpt} | {m: lambda m=m: digits(m) for m in ("resnet", "vgg", "vit")},
    )
    monkeypatch.setattr("twa.recipes.job.BUILT_IN", workloads.BUILT_IN)
    monkeypatch.setattr("twa.recipes.text.EVAL_WINDOWS", 32)
    monkeypatch.setattr("twa.recipes.job.BN_BATCHES", 1)
    monkeypatch.setattr(head, "PARTS", (0.5,))
    monkeypatch.setattr("twa.recipes.job.SCALES", {"quick": 1.0, "small": 1.0, "full": 1.0})


def recipe(*arguments):
    return cli.main(["recipe", *map(str, arguments)])


def test_two_seeds_are_made_once(tiny, tmp_path, capsys):
    assert recipe("head", "-o", tmp_path, "--seeds", 2, "--jobs", 1) == 0
    said = capsys.readouterr()
    assert (
        "2 runs (1 recipes, 2 seeds), 0 of them done before; 1 at a time" in said.out
        and "2 of 2: head, seed 1" in said.out
    )
    assert (
        all((tmp_path / name).exists() for name in FILES)
        and (tmp_path / "head.png").read_bytes()[:4] == b"\x89PNG"
    )
    page = (tmp_path / "head.md").read_text()
    assert (
        "GPT, source text" in page
        and "ResNet, digits" in page
        and "±" in page
        and "annealing, same cost" in page
        and "**" in page
    )
    assert page in said.out + "\n" or page.strip() in said.out
    rows = Rows(json.loads((tmp_path / "head.json").read_text())["rows"])
    assert {r["seed"] for r in rows} == {0, 1} and all(r["cost"] >= r["steps"] for r in rows)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("step-*.safetensors")}
    assert recipe("head", "-o", tmp_path, "--seeds", 2, "--jobs", 1) == 0
    assert "2 of them done before" in capsys.readouterr().out and before == {
        p: p.stat().st_mtime_ns for p in tmp_path.rglob("step-*.safetensors")
    }


def test_a_run_that_fails_keeps_the_others(tiny, tmp_path, capsys, monkeypatch):
    run = head.run
    monkeypatch.setattr(
        head,
        "run",
        lambda job: (_ for _ in ()).throw(ValueError("no luck")) if job.seed == 1 else run(job),
    )
    assert recipe("head", "-o", tmp_path, "--seeds", 2, "--jobs", 1) == 2
    said = capsys.readouterr()
    assert (
        "head, seed 1: no luck" in said.err
        and "1 of 2 runs failed" in said.err
        and (tmp_path / "head.md").exists()
    )
    monkeypatch.setattr(head, "run", run)
    assert recipe("head", "-o", tmp_path, "--seeds", 2, "--jobs", 1) == 0
    assert "1 of them done before" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["head", "tail"])
def test_cifar_as_torchvision_leaves_it(name, tmp_path, capsys, monkeypatch):
    """The command for the paper's own data, on a stand-in of a few images in its format."""
    monkeypatch.setattr("twa.recipes.job.BN_BATCHES", 1)
    monkeypatch.setattr(head, "PARTS", (0.5,))
    monkeypatch.setattr(images, "vgg16", lambda classes: VGG(classes, 3, plan=(4, 0, 4, 0, 4, 0)))
    cifar10(tmp_path / "data", python2)
    assert (
        recipe(
            name,
            "-o",
            tmp_path / "out",
            "--data",
            tmp_path / "data",
            "--model",
            "vgg",
            "--epochs",
            3,
            "--batch",
            16,
            "--seeds",
            1,
        )
        == 0
    )
    text = (tmp_path / "out" / f"{name}.md").read_text()
    assert "vgg, data" in text and "TWA-t fine" in text and "test accuracy" in text


def test_image_folder(tmp_path, monkeypatch):
    """ImageNet's layout."""
    make = workloads.image_task
    monkeypatch.setattr(workloads, "image_task", lambda model, **o: make(model, size=32, **o))
    monkeypatch.setattr(
        images,
        "resnet18",
        lambda classes: ResNet(classes, 3, widths=(4, 8), blocks=1, stem="imagenet"),
    )
    monkeypatch.setattr("twa.recipes.job.BN_BATCHES", 1)
    folder_of(tmp_path / "data", each=8)
    assert (
        recipe(
            "head",
            "-o",
            tmp_path / "out",
            "--data",
            tmp_path / "data",
            "--epochs",
            4,
            "--batch",
            4,
            "--seeds",
            1,
        )
        == 0
    )
    assert "resnet, data" in (tmp_path / "out" / "head.md").read_text()


def test_text_of_the_users(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 3000)
    made = workloads.of_path(tmp_path / "text.txt", None, epochs=2, batch=8)
    assert (
        made.label == "GPT, text.txt"
        and made.task(0).name.startswith("text:")
        and made.usual.steps > made.usual.every > 0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "--data nowhere: there is no such file or directory"),
        (["--scale", "full"], "--scale: expected full with --data"),
        (["--finetunes", "x"], "--finetunes: expected the recipe soup alone"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path, capsys):
    assert recipe("head", "-o", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_run_goes_on_after_a_kill(tiny, tmp_path, monkeypatch):
    """Interrupted in the middle, it ends with the bits of one that was not; a finished one is not
    touched.
    """
    task = workloads.BUILT_IN["gpt"]().task(0)
    plan = Plan(steps=8, every=2, lr=1e-2, warmup=2)
    whole = train(task, plan, tmp_path / "whole", 0)
    losses = iter(range(5))

    def dies(model, batch):
        next(losses)
        return task.loss(model, batch)

    with pytest.raises(StopIteration):
        train(dataclasses.replace(task, loss=dies), plan, tmp_path / "cut", 0)
    assert sorted(p.name for p in (tmp_path / "cut").glob("step-*")) == [
        "step-000002.safetensors",
        "step-000004.safetensors",
    ]
    cut = train(task, plan, tmp_path / "cut", 0)
    assert [cut.path(s).read_bytes() for s in cut.steps] == [
        whole.path(s).read_bytes() for s in whole.steps
    ]
    assert train(dataclasses.replace(task, loss=None), plan, tmp_path / "cut", 0).steps == [
        2,
        4,
        6,
        8,
    ]
    longer = train(task, dataclasses.replace(plan, steps=4), tmp_path / "tail", 0, start=(whole, 8))
    assert longer.steps == [10, 12] and longer.state(12)["step"] == 12
    with pytest.raises(ValueError, match="expected a learning rate below"):
        train(
            dataclasses.replace(task, loss=lambda m, b: task.loss(m, b) * float("nan")),
            plan,
            tmp_path / "nan",
            0,
        )


def test_schedules():
    rates = {
        s: [Plan(8, 4, 1.0, s).rate(k) for k in range(8)]
        for s in ("constant", "cosine", "linear", "step", "thirds", "cyclic")
    }
    assert (
        rates["constant"] == [1.0] * 8
        and rates["cosine"][4] == pytest.approx(0.5)
        and rates["linear"] == [1 - k / 8 for k in range(8)]
    )
    assert (
        rates["step"] == [1.0] * 4 + [0.1] * 2 + [0.01] * 2
        and rates["thirds"] == [1.0] * 3 + [0.1] * 3 + [0.01] * 2
    )
    assert rates["cyclic"] == pytest.approx([1.0, 0.7, 0.4, 0.1] * 2)
    assert Plan(8, 4, 1.0, warmup=4).rate(0) == 0.25


def test_grid():
    model = torch.nn.Linear(7, 3)
    bias = model.bias.detach().clone()
    round_to_grid(model, 4)
    unit = model.weight.abs().amax(1, keepdim=True) / 7
    torch.testing.assert_close(
        model.weight / unit, (model.weight / unit).round(), atol=1e-4, rtol=0
    )
    assert torch.equal(model.bias, bias) and len((model.weight[0] / unit[0]).round().unique()) <= 15


def test_table_and_differences():
    rows = Rows(
        {
            "seed": s,
            "task": "t",
            "setting": "x",
            "method": m,
            "steps": 1,
            "evaluations": 2,
            "cost": 1.5,
            "val": v,
            "test": v + s / 100,
        }
        for s in range(3)
        for m, v in (("a", 1.0), ("b", 1.1))
    )
    assert (
        rows.against({"method": "a"}, {"method": "b"}) == "-0.1000 ± 0.0000, lower on 3 of 3 seeds"
    )
    assert rows.where(method=("a", "c")) == [r for r in rows if r["method"] == "a"] and rows.of(
        "method"
    ) == ["a", "b"]
    lines = table(rows).splitlines()
    assert (
        len(lines) == 4
        and "**1.0100 ± 0.0100**" in lines[2]
        and " 1.1100 ± 0.0100 |" in lines[3]
        and "1.5" in lines[3]
    )
    with pytest.raises(KeyError):
        rows.mean(method="c")


def test_every_recipe_says_what_it_claims():
    for name in suite.RECIPES:
        module = suite.recipe(name)
        assert (
            module.TITLE
            and module.CLAIM
            and callable(module.run)
            and callable(module.findings)
            and callable(module.picture)
        )


def test_a_folder_of_another_run_is_refused(tiny, tmp_path):
    task, plan = workloads.BUILT_IN["gpt"]().task(0), Plan(steps=4, every=2, lr=1e-2)
    train(task, plan, tmp_path, 0)
    for other, what in (
        (workloads.BUILT_IN["gpt"]().task(1), "first batch"),
        (workloads.gpt(width=32, depth=1, context=16).task(0), "model"),
    ):
        with pytest.raises(ValueError, match=f"holds a training run with another {what}"):
            train(other, plan, tmp_path, 0)
    with pytest.raises(ValueError, match="another plan"):
        train(task, dataclasses.replace(plan, lr=2e-2), tmp_path, 0)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [
        "step-000002.safetensors",
        "step-000004.safetensors",
    ]
