"""The command `python bench/claims`: the published data's formats end to end, what is kept, what is
said.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path

import claims
import processes
import pytest
import torch
from claims import head, images, page, suite, tail, workloads
from claims.models.resnet import ResNet
from claims.models.vgg import VGG
from claims.rows import Rows, table
from claims.runs import Plan, round_to_grid, train
from stand_ins import cifar10, digits, folder_of, little_digits, little_text, python2, times
from twa.io.errors import StateError, TaskError

BENCH = Path(claims.__file__).parents[1]
FILES = ("head.md", "head.png", "head.json")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    monkeypatch.setattr(suite, "cores", lambda: 1)


@pytest.fixture
def tiny(monkeypatch):
    """Small workloads, in place of those that take minutes."""
    little_text(monkeypatch)
    little_digits(monkeypatch)
    monkeypatch.setattr("claims.text.EVAL_WINDOWS", 32)
    gpt, plan = workloads.gpt(width=16, depth=1, context=16), Plan(12, 2, 1e-2)
    gpt_plan = dataclasses.replace(gpt.usual, steps=12, every=2, warmup=4)
    gpt = dataclasses.replace(gpt, usual=gpt_plan, twa_steps=4)
    built_in = {m: lambda m=m: digits(m, plan, twa_steps=4) for m in ("resnet", "vgg", "vit")}
    monkeypatch.setattr("claims.job.BUILT_IN", built_in | {"gpt": lambda: gpt})
    monkeypatch.setattr("claims.job.BN_BATCHES", 1)
    monkeypatch.setattr(head, "PARTS", (0.5,))
    monkeypatch.setattr("claims.job.SCALES", {"quick": 1.0, "small": 1.0, "full": 1.0})
    return gpt


def command(*arguments):
    return suite.main(list(map(str, arguments)))


# The command -------------------------------------------------------------------------------------


def test_seeds_are_made_once_and_one_that_fails_keeps_the_others(
    tiny, tmp_path, capsys, monkeypatch
):
    arguments, run = ("head", "-o", tmp_path, "--seeds", 2, "--jobs", 1), head.run
    monkeypatch.setattr(suite, "code_of", lambda name: "unchanged")

    def fails(job):
        if job.seed == 1:
            raise RuntimeError("no luck")
        return run(job)

    monkeypatch.setattr(head, "run", fails)
    assert command(*arguments) == 2
    said = capsys.readouterr()
    assert "2 runs (1 claims, 2 seeds), 0 of them done before; 1 at a time" in said.out
    assert "claims: error: head, seed 1: no luck" in said.err and "1 of 2 runs failed" in said.err
    assert "Traceback" in said.err  # it is none about what was given
    rows = Rows(json.loads((tmp_path / "head.json").read_text())["rows"])
    assert rows.of("seed") == [0]

    monkeypatch.setattr(head, "run", run)
    assert command(*arguments) == 0
    said = capsys.readouterr()
    assert "1 of them done before" in said.out and "1 of 1: head, seed 1" in said.out
    assert all((tmp_path / name).exists() for name in FILES)
    assert (tmp_path / "head.png").read_bytes()[:4] == b"\x89PNG"
    text = (tmp_path / "head.md").read_text()
    parts = ("GPT, source text", "ResNet, digits", "±", "annealing, same cost", "**")
    assert all(part in text for part in parts) and text.strip() in said.out
    assert f"    python bench/claims head -o {tmp_path} --seeds 2 --jobs 1\n" in text
    rows = Rows(json.loads((tmp_path / "head.json").read_text())["rows"])
    assert rows.of("seed") == [0, 1] and all(r["cost"] >= r["steps"] for r in rows)

    before = times(tmp_path)
    assert command(*arguments) == 0
    assert "2 of them done before" in capsys.readouterr().out and before == times(tmp_path)


def test_ctrl_c_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def stopped(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(head, "run", stopped)
    assert command("head", "-o", tmp_path, "--seeds", 1, "--jobs", 1) == 130
    said = capsys.readouterr().err
    how = "the same command goes on from there"
    assert said == f"claims: stopped; what is done is in {tmp_path}/; {how}\n"


def test_other_errors_are_tracebacks(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "check", lambda args, names: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("head", "-o", tmp_path)


def test_from_a_clone_with_worker_processes(tmp_path):
    """Each worker finds the package, and says what is wrong with the data."""
    (tmp_path / "data.bin").write_bytes(b"no text")
    arguments = ["head", "tail", "--data", "data.bin", "-o", "out", "--seeds", "1", "--jobs", "2"]
    done = processes.run([sys.executable, BENCH / "claims", *arguments], cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "2 runs (2 claims, 1 seeds), 0 of them done before; 2 at a time" in done.stdout
    for name in ("head", "tail"):
        message = rf"claims: error: {name}, seed 0: text '.*data.bin': expected a file ending in"
        assert re.search(message, done.stderr)
    assert "claims: error: 2 of 2 runs failed" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "--data nowhere: there is no such file or directory"),
        (["--scale", "full"], "--scale: expected full with --data"),
        (["--finetunes", "x"], "--finetunes: expected the claim soup alone"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path, capsys):
    assert command("head", "-o", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_rows_depend_on_the_code():
    """All of twa, which a default may be in, and of this package what the claim imports and is not
    for show alone.
    """
    import twa

    found = {"tail": set(suite.sources_of("tail")), "head": set(suite.sources_of("head"))}
    package, here = Path(twa.__file__).parent, BENCH / "claims"
    assert found["tail"] >= set(package.rglob("*.py"))
    assert found["tail"] >= {here / "job.py", here / "images.py", here / "models" / "vgg.py"}
    assert found["tail"] ^ found["head"] == {here / "tail.py", here / "head.py"}
    assert not found["tail"] & {here / f"{name}.py" for name in ("suite", "page", "soup")}
    assert not found["tail"] & {here / "glosses.py", here / "lora.py"}
    assert here / "lora.py" in suite.sources_of("beyond")
    assert {here / "glosses.py", here / "soup.py"} <= set(suite.sources_of("pretrained"))


# Data of the user's ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["head", "tail"])
def test_cifar_as_torchvision_leaves_it(name, tmp_path, monkeypatch):
    """The command for the paper's own data, on a stand-in of a few images in its format."""
    monkeypatch.setattr("claims.job.BN_BATCHES", 1)
    monkeypatch.setattr(head, "PARTS", (0.5,))
    monkeypatch.setattr(tail, "CHECKPOINTS", 2)
    monkeypatch.setattr(tail, "settings", lambda rates: [("constant", rates[0])])
    monkeypatch.setattr(images, "vgg16", lambda classes: VGG(classes, 3, plan=(4, 0, 4, 0, 4, 0)))
    cifar10(tmp_path / "data", python2, 16)
    out, sizes = tmp_path / "out", ["--epochs", 2, "--batch", 16, "--seeds", 1]
    assert command(name, "-o", out, "--data", tmp_path / "data", "--model", "vgg", *sizes) == 0
    text = (out / f"{name}.md").read_text()
    assert "vgg, data" in text and "TWA-t fine" in text and "test accuracy" in text


def test_image_folder(tmp_path, monkeypatch):
    """ImageNet's layout."""
    make, size = workloads.image_task, {"widths": (4, 8), "blocks": 1, "stem": "imagenet"}
    monkeypatch.setattr(workloads, "image_task", lambda model, **o: make(model, size=32, **o))
    monkeypatch.setattr(images, "resnet18", lambda classes: ResNet(classes, 3, **size))
    monkeypatch.setattr("claims.job.BN_BATCHES", 1)
    monkeypatch.setattr(head, "PARTS", (0.5,))
    folder_of(tmp_path / "data")
    out, sizes = tmp_path / "out", ["--epochs", 2, "--batch", 4, "--seeds", 1]
    assert command("head", "-o", out, "--data", tmp_path / "data", *sizes) == 0
    assert "resnet, data" in (out / "head.md").read_text()


def test_text_of_the_users(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 3000)
    made = workloads.of_path(tmp_path / "text.txt", None, epochs=2, batch=8)
    task = made.task(0)
    assert made.label == "GPT, text.txt" and task.name.startswith("text:")
    assert made.usual.steps == 2 * len(task.train) > made.usual.every > 0
    assert len(next(iter(task.train))) == 8
    with pytest.raises(TaskError, match="--model resnet is none for text"):
        workloads.of_path(tmp_path / "text.txt", "resnet")


# Training runs -----------------------------------------------------------------------------------


def test_a_run_goes_on_after_a_kill(tiny, tmp_path):
    """Interrupted in the middle, it ends with the bits of one that was not; a finished one is not
    touched.
    """
    task = tiny.task(0)
    plan = Plan(steps=8, every=2, lr=1e-2, warmup=2)
    whole = train(task, plan, tmp_path / "whole", 0)
    losses = iter(range(5))

    def dies(model, batch):
        next(losses)
        return task.loss(model, batch)

    with pytest.raises(StopIteration):
        train(dataclasses.replace(task, loss=dies), plan, tmp_path / "cut", 0)
    assert names_of(tmp_path / "cut") == ["step-000002.safetensors", "step-000004.safetensors"]
    cut = train(task, plan, tmp_path / "cut", 0)
    for step in whole.steps:
        assert cut.path(step).read_bytes() == whole.path(step).read_bytes()
    done = train(dataclasses.replace(task, loss=None), plan, tmp_path / "cut", 0)
    assert done.steps == [2, 4, 6, 8]
    longer = train(task, dataclasses.replace(plan, steps=4), tmp_path / "tail", 0, start=(whole, 8))
    assert longer.steps == [10, 12] and longer.state(12)["step"] == 12
    nan = dataclasses.replace(task, loss=lambda m, b: task.loss(m, b) * float("nan"))
    with pytest.raises(TaskError, match="expected a learning rate below"):
        train(nan, plan, tmp_path / "nan", 0)


def names_of(folder):
    return sorted(p.name for p in folder.glob("step-*"))


def test_a_folder_of_another_run_is_refused(tiny, tmp_path):
    task, plan = tiny.task(0), Plan(steps=4, every=2, lr=1e-2)
    train(task, plan, tmp_path, 0)
    wider = workloads.gpt(width=32, depth=1, context=16).task(0)
    for other, what in ((tiny.task(1), "first batch"), (wider, "model")):
        with pytest.raises(StateError, match=f"holds a training run with another {what}"):
            train(other, plan, tmp_path, 0)
    with pytest.raises(StateError, match="another plan"):
        train(task, dataclasses.replace(plan, lr=2e-2), tmp_path, 0)
    assert names_of(tmp_path) == ["step-000002.safetensors", "step-000004.safetensors"]


def test_schedules():
    names = ("constant", "cosine", "linear", "step", "thirds", "cyclic")
    rates = {s: [Plan(8, 4, 1.0, s).rate(k) for k in range(8)] for s in names}
    assert rates["constant"] == [1.0] * 8 and rates["cosine"][4] == pytest.approx(0.5)
    assert rates["linear"] == [1 - k / 8 for k in range(8)]
    assert rates["step"] == [1.0] * 4 + [0.1] * 2 + [0.01] * 2
    assert rates["thirds"] == [1.0] * 3 + [0.1] * 3 + [0.01] * 2
    assert rates["cyclic"] == pytest.approx([1.0, 0.7, 0.4, 0.1] * 2)
    assert Plan(8, 4, 1.0, warmup=4).rate(0) == 0.25


def test_grid():
    model = torch.nn.Linear(7, 3)
    bias = model.bias.detach().clone()
    round_to_grid(model, 4)
    codes = model.weight / (model.weight.abs().amax(1, keepdim=True) / 7)
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    assert torch.equal(model.bias, bias) and len(codes[0].round().unique()) <= 15


# Tables and pages --------------------------------------------------------------------------------


def test_table_and_differences():
    common = {"task": "t", "setting": "x", "steps": 1, "looks": 2.0, "cost": 1.5}
    rows = Rows(
        common | {"seed": s, "method": m, "val": v, "test": v + s / 100}
        for s in range(3)
        for m, v in (("a", 1.0), ("b", 1.1))
    )
    difference = rows.against({"method": "a"}, {"method": "b"})
    assert difference == "-0.1000 ± 0.0000, lower on 3 of 3 seeds"
    assert rows.where(method=("a", "c")) == [r for r in rows if r["method"] == "a"]
    assert rows.of("method") == ["a", "b"]
    lines = table(rows).splitlines()
    assert len(lines) == 4 and "**1.0100 ± 0.0100**" in lines[2]
    assert " 1.1100 ± 0.0100 |" in lines[3] and "1.5" in lines[3]
    with pytest.raises(KeyError):
        rows.mean(method="c")


def test_every_claim_says_what_it_is():
    for name in claims.CLAIMS:
        module = claims.claim(name)
        assert module.TITLE and module.CLAIM
        assert all(callable(getattr(module, part)) for part in ("run", "findings", "picture"))


def test_pages_are_those_of_the_results(tmp_path, monkeypatch):
    """bench/results/claims/*.md and docs/claims.md have the tables and findings of the JSON files;
    pictures are left out.
    """
    results, text = page.RESULTS, page.PAGE.read_text()
    (tmp_path / "claims.md").write_text(text)
    monkeypatch.setattr(page, "RESULTS", tmp_path / "claims")
    monkeypatch.setattr(page, "PAGE", tmp_path / "claims.md")
    monkeypatch.setattr(page, "draw", lambda module, rows: b"")
    assert page.main([str(results)]) == 0
    assert (tmp_path / "claims.md").read_text() == text
    for name in claims.CLAIMS:
        written = (tmp_path / "claims" / f"{name}.md").read_text()
        assert written == (results / f"{name}.md").read_text()
