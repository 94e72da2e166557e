"""The main job through the command line: outputs, the winner's guarantee, and bad input with exit
status 2.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
import twa
from conftest import run_python
from safetensors.torch import load_file, save_file
from twa.cli import main as cli
from twa.io.atomic import LOCK, only_run_in
from twa.io.errors import TaskError
from twa.merge import report
from twa.merge.baselines import BASELINES
from twa.merge.evaluate import mean_over
from twa.merge.run import Merge
from twa.merge.settings import Settings, TwaMethod
from twa.merge.train import MOST_STEPS, look_steps, ramp
from twa.tasks import digits
from twa.tasks.contract import load_task

FILES = {"averaged.safetensors", "coefficients.json", "report.md", "report.png", "results.json"}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """10 checkpoints of the digits network, a BatchNorm model, on its way."""
    folder = tmp_path_factory.mktemp("digits")
    torch.manual_seed(0)
    model, data = digits.model(), digits.train_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(10):
        for batch in data:
            optimizer.zero_grad()
            digits.loss(model, batch).backward()
            optimizer.step()
        save_file(model.state_dict(), folder / f"epoch_{epoch}.safetensors")
    return folder


@pytest.fixture(scope="session")
def finished(checkpoints, tmp_path_factory):
    """Output folder and standard output of one whole run in a process of its own."""
    out = tmp_path_factory.mktemp("run") / "out"
    command = [
        sys.executable,
        "-m",
        "twa",
        "average",
        "digits",
        f"{checkpoints}/epoch_*.safetensors",
        "-o",
        str(out),
        "--steps",
        "20",
        "--compare",
    ]
    done = processes.run(command)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_outputs(finished):
    out, printed = finished
    assert {p.name for p in out.iterdir()} == FILES
    results = json.loads((out / "results.json").read_text())["rows"]
    names = [r["method"] for r in results]
    assert names == [*BASELINES, "start", "TWA-t fine, 4 bits", "TWA-v per tensor, 4 bits"]
    for r in results:
        assert (
            f"| {r['method']}" in printed and f"| {r['method']}" in (out / "report.md").read_text()
        )
        assert 0.9 < float(r["test accuracy"]) <= 1
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_winner_has_the_lowest_validation_loss(finished):
    out, printed = finished
    results = {
        r["method"]: float(r["val loss"])
        for r in json.loads((out / "results.json").read_text())["rows"]
    }
    winner = printed.split("winner on the validation data: ")[1].split(", validation loss")[0]
    assert results[winner] == min(results.values()) <= results["best single"]


def test_exported_model_gives_the_reported_loss_in_a_fresh_process(finished):
    out, printed = finished
    reported = float(printed.split("test loss ")[-1].split()[0])
    code = f"""
import torch
from safetensors.torch import load_file
from twa.tasks import digits
model = digits.model()
model.load_state_dict(load_file({str(out / "averaged.safetensors")!r}))
model.eval()
total = count = 0
with torch.no_grad():
    for images, labels in digits.test_data():
        total += torch.nn.functional.cross_entropy(model(images), labels, reduction="sum").item()
        count += len(labels)
print(total / count)
"""
    assert float(run_python(code)) == pytest.approx(reported, rel=1e-5)


def test_coefficients_file(finished):
    written = json.loads((finished[0] / "coefficients.json").read_text())
    beta = torch.tensor(written["beta"], dtype=torch.float64)
    assert beta.shape == (10, len(written["segments"])) and [
        Path(p).name for p in written["candidates"]
    ] == [f"epoch_{k}.safetensors" for k in range(10)]
    torch.testing.assert_close(
        beta.sum(0), torch.ones(beta.shape[1], dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


def test_candidates_are_listed_in_order(finished):
    out, printed = finished
    names = [f"epoch_{k}" for k in range(10)]
    assert printed.startswith(f"10 candidates, oldest first: {', '.join(names)}\n")
    listed = (out / "report.md").read_text().split("oldest first:\n\n")[1].split("\n\n")[0]
    assert [Path(path.strip("`")).stem for path in listed.split()[1::2]] == names


def run_cli(*arguments):
    return cli.main([str(a) for a in arguments])


def test_one_candidate_is_evaluated_and_exported(checkpoints, tmp_path, capsys):
    path = checkpoints / "epoch_9.safetensors"
    assert run_cli("average", "digits", path, "-o", tmp_path / "out") == 0
    assert "nothing to learn" in capsys.readouterr().err
    exported = load_file(tmp_path / "out" / "averaged.safetensors")
    assert all(torch.equal(exported[k], t) for k, t in load_file(path).items())


def test_what_is_said_of_the_candidates(checkpoints, tmp_path, capsys):
    """Their order first; then, each in a line, what is left out, the same, or in doubt."""
    folder = tmp_path / "run"
    folder.mkdir()

    def moved(epoch, by):
        state = load_file(checkpoints / f"epoch_{epoch}.safetensors")
        return {k: t + by if t.is_floating_point() else t for k, t in state.items()}

    for epoch in range(10):
        save_file(moved(epoch, 0.0), folder / f"epoch_{epoch}.safetensors")
        torch.save(moved(epoch, 1e-3), folder / f"epoch_{epoch + 10}.pt")
    torch.save({"epoch": 3}, folder / "scheduler.pt")
    (folder / "last.pt").symlink_to("epoch_19.pt")
    save_file(moved(9, 2e-3), folder / "best.safetensors")
    line = "21 candidates, oldest first: best, epoch_0, ..., epoch_19\n"
    notes = [
        "twa: left out, since no weights are in it: scheduler.pt",
        "twa: the same weights count once: last.pt is epoch_19.pt",
        "twa: no epoch or step is in the name of best.safetensors: it counts as older than those"
        " with one; list the files oldest first if the order is another",
    ]
    assert run_cli("pack", "digits", folder, "-o", tmp_path / "basis.safetensors") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(line) and printed.err.splitlines()[:3] == notes
    small = ["--steps", "1", "--twa", "t:model:4"]
    assert run_cli("average", "digits", folder, "-o", tmp_path / "out", *small) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(line) and printed.err.splitlines()[:3] == notes
    report_text = (tmp_path / "out" / "report.md").read_text()
    assert f"1. `{folder}/best.safetensors`\n2. `{folder}/epoch_0" in report_text
    assert f"21. `{folder}/epoch_19.pt`" in report_text and "last.pt" not in report_text
    beta = json.loads((tmp_path / "out" / "coefficients.json").read_text())["beta"]
    assert len(beta) == 21


def test_output_directory_is_protected(checkpoints, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep")
    pattern = checkpoints / "epoch_[89].safetensors"
    assert run_cli("average", "digits", pattern, "-o", out) == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["precious.txt"]
    assert run_cli("average", "digits", pattern, "-o", out / "precious.txt") == 2
    assert "expected a directory" in capsys.readouterr().err
    assert run_cli("average", "digits", pattern, "-o", out / "precious.txt" / "deeper") == 2
    assert run_cli("average", "digits", pattern, "-o", "/proc/out") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert run_cli("average", "digits", pattern, "-o", out, "--steps", "2", "--overwrite") == 0
    assert {p.name for p in out.iterdir()} == FILES | {"precious.txt"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["average", "digits", "nowhere/*.pt"], "nothing matches"),
        (["average", "nosuch.py", "{ok}"], "there is no such file"),
        (["average", "chars", "{ok}"], "is unexpected"),
        (["average", "digits", "{ok}", "--twa", "x:tensor:4"], "expected KIND:GRANULARITY:BITS"),
        (["average", "digits", "{ok}", "{nan}"], "NaN or Inf"),
        (["average", "digits", "{ok}", "{cut}"], "not a complete safetensors file"),
    ],
)
def test_bad_input_writes_nothing(checkpoints, tmp_path, capsys, arguments, message):
    state = load_file(checkpoints / "epoch_9.safetensors")
    state["0.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(
        (checkpoints / "epoch_9.safetensors").read_bytes()[:-50]
    )
    names = {
        "{ok}": checkpoints / "epoch_9.safetensors",
        "{nan}": tmp_path / "nan.safetensors",
        "{cut}": tmp_path / "cut.safetensors",
    }
    out = tmp_path / "out"
    assert run_cli(*[names.get(a, a) for a in arguments], "-o", out) == 2
    error = capsys.readouterr().err
    assert message in error and error.splitlines()[-1].startswith("twa: error: ")
    assert not out.exists() or not list(out.iterdir())


TASK = """
import torch
from twa.tasks import digits
model, train_data, val_data = digits.model, digits.train_data, digits.val_data
calls = 0
def loss(model, batch):
    global calls
    value = digits.loss(model, batch)
    if model.training and torch.is_grad_enabled():
        calls += 1
        if calls > {limit}:
            return value * float("nan")
    return value
"""


def test_task_file_and_a_loss_that_turns_nan(checkpoints, tmp_path):
    (tmp_path / "task.py").write_text(TASK.format(limit=8))
    task = load_task(str(tmp_path / "task.py"))
    assert task.test is None and task.metric is None
    method = TwaMethod("t", "tensor", 4)
    outcome = Merge(
        task,
        twa.Candidates(checkpoints / "epoch_*.safetensors"),
        Settings((method,), steps=20),
        progress=False,
    ).run()
    trained = outcome.results[-1]
    assert trained.steps == 8 and "stopped: loss nan at step 8" in trained.note
    # BatchNorm is re-estimated
    assert trained.val_loss <= 1.05 * min(r.val_loss for r in outcome.results[:-1])
    assert all(torch.isfinite(t.float()).all() for t in outcome.state.values())
    assert "test loss" not in report.table_rows(outcome.results, task)[0]
    assert "GPU peak MB" not in report.table_rows(outcome.results, task)[0]
    outcome.results[0].device_memory = 3_000_000
    header, (first, *_) = report.table_rows(outcome.results, task)
    assert dict(zip(header, first, strict=True))["GPU peak MB"] == "3"


def test_validation_data_is_split_for_twa_v_only(checkpoints, tmp_path):
    (tmp_path / "task.py").write_text(TASK.format(limit=10**9))
    candidates = twa.Candidates(checkpoints / "epoch_[789].safetensors")
    with pytest.raises(TaskError, match="at least 2 batches"):
        Merge(load_task(str(tmp_path / "task.py")), candidates, Settings(steps=2), progress=False)
    (tmp_path / "task.py").write_text(
        TASK.format(limit=10**9).replace("digits.val_data", "lambda: list(digits.train_data())[:5]")
    )
    task = load_task(str(tmp_path / "task.py"))
    batches = list(task.val)
    task.split_validation()
    assert [b is batches[k] for k, b in zip((1, 3), task.val, strict=True)] == [True, True]
    assert [b is batches[k] for k, b in zip((0, 2, 4), task.heldout, strict=True)] == [True] * 3


def test_a_shuffled_validation_set_cannot_be_split(tmp_path):
    (tmp_path / "task.py").write_text(
        TASK.format(limit=10**9).replace("digits.val_data", "digits.train_data")
    )
    with pytest.raises(TaskError, match="other batches at each pass"):
        load_task(str(tmp_path / "task.py")).split_validation()


def test_candidates_with_nan_loss_never_win(checkpoints, tmp_path):
    """Finite weights, NaN loss: the first and the last candidate; and a run where nothing is
    finite.
    """
    (tmp_path / "helper.py").write_text("LIMIT = 50.0")
    text = "from __future__ import annotations\nfrom helper import LIMIT\n" + TASK.format(
        limit=10**9
    ).replace(
        "    return value\n",
        "    return value if model[7].bias.abs().max() < LIMIT else value * float('nan')\n",
    )
    (tmp_path / "task.py").write_text(text)
    for k, path in enumerate(sorted(checkpoints.glob("*.safetensors"))[:5]):
        state = load_file(path)
        if k in (0, 4):
            state["7.bias"] += 1000.0
        save_file(state, tmp_path / f"c{k}.safetensors")
    task = load_task(str(tmp_path / "task.py"))
    candidates = twa.Candidates(tmp_path / "c*.safetensors")
    settings = Settings((TwaMethod("t", "tensor", 4),), steps=4)
    with pytest.raises(ValueError, match=r"every method is NaN or Inf: .*--compare tries each"):
        # the last candidate spoils all that it may start at
        Merge(task, candidates, settings, progress=False).run()
    outcome = Merge(task, candidates, replace(settings, compare=True), progress=False).run()
    assert outcome.winner.val_loss < 1 and outcome.results[1].note in ("c1", "c2", "c3")
    outcome.save(tmp_path, command="command")
    assert (tmp_path / "report.png").exists()
    with pytest.raises(ValueError, match="every method is NaN or Inf"):
        Merge(task, twa.Candidates(tmp_path / "c0.safetensors"), Settings(), progress=False).run()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_measured_is_exported_in_half_precision(checkpoints, tmp_path, dtype):
    """BatchNorm statistics are re-estimated in float32 and exported in the files' dtype: measured
    after that rounding.
    """
    for path in checkpoints.glob("*.safetensors"):
        save_file(
            {k: t.to(dtype) if t.is_floating_point() else t for k, t in load_file(path).items()},
            tmp_path / path.name,
        )
    task = load_task("digits")
    outcome = Merge(
        task,
        twa.Candidates(tmp_path / "*.safetensors"),
        Settings((TwaMethod("t", "tensor", 4),), steps=5),
        progress=False,
    ).run()
    model = digits.model()
    model.load_state_dict(outcome.state)
    assert all(t.dtype == dtype for t in outcome.state.values() if t.is_floating_point())
    assert mean_over(model, digits.loss, task.test) == pytest.approx(
        outcome.winner.test_loss, rel=1e-5
    )


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(TaskError, match="needs scikit-learn: pip install scikit-learn"):
        digits._splits.__wrapped__()


def test_tasks_that_break_the_contract(tmp_path):
    (tmp_path / "a.py").write_text("def model(): pass")
    with pytest.raises(TaskError, match="train_data, val_data, loss missing"):
        load_task(str(tmp_path / "a.py"))
    (tmp_path / "b.py").write_text(
        "model = loss = lambda *a: 0\ndef train_data(): return iter([])\nval_data = train_data"
    )
    with pytest.raises(TaskError, match="can be read only once"):
        load_task(str(tmp_path / "b.py"))
    (tmp_path / "d.py").write_text(
        "model = loss = lambda *a: object()\ndef train_data(): return []\nval_data = train_data"
    )
    with pytest.raises(TaskError, match=r"d\.py: loss\(\): .* with one number, found object"):
        load_task(str(tmp_path / "d.py")).loss(None, None)
    (tmp_path / "c.txt").write_text("")
    with pytest.raises(TaskError, match=r"ending in \.py"):
        load_task(str(tmp_path / "c.txt"))


def test_the_rate_rises_over_25_steps():
    assert [ramp(k) for k in (0, 11, 24, 25, 999)] == [1 / 25, 12 / 25, 1.0, 1.0, 1.0]


def test_looks_are_at_growing_distances():
    assert sorted(look_steps(100)) == [0, 15, 24, 39, 62, 100]
    assert sorted(look_steps(1)) == [0, 1]
    assert sorted(look_steps(None))[:6] == [0, 25, 40, 64, 102, 164]
    assert max(look_steps(None)) == MOST_STEPS


# twa merge and twa export -------------------------------------------------------------------------

UPDATE_BN = "twa: averaged BatchNorm statistics are not those of the averaged weights"


def test_merge_writes_a_fixed_average(checkpoints, tmp_path, capsys):
    """The average that the library gives, by each kind of scheme; into a directory or a file."""
    pattern, out = checkpoints / "epoch_*.safetensors", tmp_path / "out"
    candidates = twa.Candidates(pattern)
    (weights := tmp_path / "w.json").write_text('{"epoch_9": 0.75, "epoch_0": 0.25}')
    for scheme, beta in (
        ("lawa:4", twa.averages.lawa(10, 4)),
        (weights, torch.tensor([0.25, *[0.0] * 8, 0.75])),
    ):
        assert run_cli("merge", pattern, "--scheme", scheme, "-o", out, "--overwrite") == 0
        printed = capsys.readouterr()
        used = int(beta.count_nonzero())
        assert printed.out.startswith("10 candidates, oldest first: epoch_0, epoch_1, ")
        assert printed.out.splitlines()[1].startswith(
            f"written to {out}/: averaged.safetensors, merge.json; the average of {used} of 10"
            " candidates, 0.00 GB read in "
        )
        assert printed.err.startswith(UPDATE_BN) and "reading candidates" in printed.err
        expected, found = candidates.average(beta), load_file(out / "averaged.safetensors")
        assert all(torch.equal(found[key], t) for key, t in expected.items())
        assert {p.name for p in out.iterdir()} == {"averaged.safetensors", "merge.json"}
        described = json.loads((out / "merge.json").read_text())
        assert described["scheme"] == str(scheme) and described["weights"] == beta.tolist()
        assert described["candidates"] == [str(c.path) for c in candidates]
    file = tmp_path / "new" / "x.safetensors"
    options = ["--scheme", "ema:0.5", "--dtype", "bfloat16"]
    assert run_cli("merge", pattern, *options, "-o", file) == 0
    assert f"written to {file}; the average of 10 of 10" in capsys.readouterr().out
    halves = load_file(file)
    for key, t in candidates.average(twa.averages.ema(10, 0.5)).items():
        assert torch.equal(halves[key], t.bfloat16() if t.is_floating_point() else t)
    digits.model().load_state_dict(load_file(out / "averaged.safetensors"))


def test_merge_by_the_weights_of_another_run(checkpoints, tmp_path, capsys):
    """merge.json and coefficients.json: by the names of their candidates, in any order."""
    paths = [checkpoints / f"epoch_{k}.safetensors" for k in (0, 1, 2)]
    (weights := tmp_path / "w.json").write_text("[0.5, 0.25, 0.25]")
    assert run_cli("merge", *paths, "--scheme", weights, "-o", tmp_path / "a") == 0
    fixed = {"format": "twa-coefficients-1", "candidates": [f"elsewhere/{p.name}" for p in paths]}
    (coefficients := tmp_path / "coefficients.json").write_text(
        json.dumps(fixed | {"beta": [[0.5], [0.25], [0.25]]})
    )
    expected = load_file(tmp_path / "a" / "averaged.safetensors")
    for k, scheme in enumerate((tmp_path / "a" / "merge.json", coefficients)):
        assert run_cli("merge", *paths[::-1], "--scheme", scheme, "-o", tmp_path / f"{k}") == 0
        found = load_file(tmp_path / f"{k}" / "averaged.safetensors")
        for key, t in expected.items():
            if t.is_floating_point():  # of others, the last candidate's
                torch.testing.assert_close(found[key], t)
        capsys.readouterr()
        assert run_cli("merge", *paths[1:], "--scheme", scheme, "-o", tmp_path / "none") == 2
        assert "expected names of candidates (epoch_1, epoch_2), found" in capsys.readouterr().err


def test_export_writes_one_candidate(checkpoints, tmp_path, capsys):
    pattern = checkpoints / "epoch_*.safetensors"
    path = f"{checkpoints}/epoch_3.safetensors"
    for k, at in ((3, "epoch_3"), (3, path), (3, "3"), (9, "last"), (8, "-2")):
        out = tmp_path / "out"
        assert run_cli("export", pattern, "--at", at, "-o", out, "--overwrite") == 0
        printed = capsys.readouterr()
        assert f"merge.json; epoch_{k}, one of 10 candidates, 0.00 GB read in" in printed.out
        assert "BatchNorm" not in printed.err
        found = load_file(out / "averaged.safetensors")
        for key, t in load_file(checkpoints / f"epoch_{k}.safetensors").items():
            assert torch.equal(found[key], t) and found[key].dtype == t.dtype
        described = json.loads((out / "merge.json").read_text())
        assert described["names"] == [f"epoch_{k}"] and described["weights"] == [1.0]
        assert described["scheme"] == f"at epoch_{k}"
    for at in ("epoch_", "10", "-11", "first", ""):
        assert run_cli("export", pattern, "--at", at, "-o", tmp_path / "none") == 2
        assert f"--at {at}: expected one of epoch_0," in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_export_of_a_name_that_several_have(checkpoints, tmp_path, capsys):
    paths = [tmp_path / run / "model.safetensors" for run in "ab"]
    for k, path in enumerate(paths):
        path.parent.mkdir()
        path.write_bytes((checkpoints / f"epoch_{k}.safetensors").read_bytes())
    out = tmp_path / "out.safetensors"
    assert run_cli("export", *paths, "--at", "model", "-o", out) == 2
    assert "--at model: 2 candidates have this name: give a path" in capsys.readouterr().err
    assert run_cli("export", *paths, "--at", paths[1], "-o", out) == 0
    expected, found = load_file(paths[1]), load_file(out)
    assert all(torch.equal(found[key], t) for key, t in expected.items())


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("mean", "twa: error: scheme: expected uniform, last, ema:DECAY, lawa:K"),
        ("lawa:3", "twa: error: scheme lawa:3: k: expected 1 to 2, found 3"),
        ("none.json", "none.json: expected weights as JSON, in a regular file"),
        ('{"a": 1', "w.json: expected weights as JSON (JSONDecodeError"),
        ("[0.5, 0.4]", "w.json: expected merge weights that sum to 1, found a sum of 0.9"),
        ('{"epoch_7": 1}', "w.json: expected names of candidates (epoch_8, epoch_9), found"),
        ("[1]", "w.json: expected 2 merge weights, one for each candidate"),
    ],
)
def test_merge_by_a_bad_scheme_writes_nothing(checkpoints, tmp_path, capsys, scheme, message):
    if scheme[0] in "[{":
        (tmp_path / "w.json").write_text(scheme)
        scheme = tmp_path / "w.json"
    out = tmp_path / "out"
    pattern = checkpoints / "epoch_[89].safetensors"
    assert run_cli("merge", pattern, "--scheme", scheme, "-o", out) == 2
    assert message in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("name", ["none", "none*"])
def test_inspect_of_nothing(tmp_path, capsys, name):
    assert run_cli("inspect", tmp_path / name, tmp_path / "nor.pt") == 2
    assert f"no candidates: nothing matches '{tmp_path / name}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["merge", "--scheme", "last"], "out.pt"),
        (["export", "--at", "last"], "out.ckpt"),
        (["average", "digits"], "out.safetensors"),
    ],
)
def test_a_file_name_for_a_directory(checkpoints, tmp_path, capsys, command, name):
    given = [*command, str(checkpoints / "epoch_*.safetensors"), "-o", tmp_path / name]
    assert run_cli(*given) == 2
    assert f"{name}: expected a directory for the output" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


def test_merge_is_one_run_a_directory(checkpoints, tmp_path, capsys):
    out, pattern = tmp_path / "out", checkpoints / "epoch_[89].safetensors"
    with only_run_in(out):
        for how in ([], ["--overwrite"]):
            assert run_cli("merge", pattern, "--scheme", "uniform", "-o", out, *how) == 2
            assert "another run is at work in this directory" in capsys.readouterr().err
    assert not out.exists()
    assert run_cli("merge", pattern, "--scheme", "uniform", "-o", out) == 0
    assert (out / "averaged.safetensors").exists() and not (out / LOCK).exists()


def test_merge_protects_what_is_there(checkpoints, tmp_path, capsys):
    (out := tmp_path / "out").mkdir()
    (out / "precious.txt").write_text("keep")
    arguments = ["merge", checkpoints / "epoch_[89].safetensors", "--scheme", "uniform", "-o"]
    assert run_cli(*arguments, out) == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["precious.txt"]
    assert run_cli(*arguments, out, "--overwrite") == 0
    assert (out / "precious.txt").read_text() == "keep" and len(list(out.iterdir())) == 3
    file = tmp_path / "x.safetensors"
    file.write_text("keep")
    assert run_cli(*arguments, file) == 2
    assert "exists; pass --overwrite" in capsys.readouterr().err and file.read_text() == "keep"
    assert run_cli(*arguments, file, "--overwrite") == 0
    assert run_cli(*arguments, "/proc/x.safetensors") == 2
    assert "cannot be written" in capsys.readouterr().err
    (tmp_path / "d.safetensors").mkdir()
    assert run_cli(*arguments, tmp_path / "d.safetensors") == 2
    assert "expected a file for the output" in capsys.readouterr().err
    # what it reads
    state = load_file(file)
    for output in (file, out / "averaged.safetensors"):
        read = ["merge", checkpoints / "epoch_7.safetensors", output, "--scheme", "uniform"]
        target = output if output == file else out
        assert run_cli(*read, "-o", target, "--overwrite") == 2
        assert "is a candidate" in capsys.readouterr().err
        found = load_file(output)
        assert all(torch.equal(found[key], t) for key, t in state.items())


def test_merge_looks_at_the_candidates_first(checkpoints, tmp_path, capsys):
    """Unrelated ones need --force; those without weight do not matter; a mask is no fault."""
    torch.manual_seed(1)
    save_file(digits.model().state_dict(), tmp_path / "epoch_99.safetensors")
    paths = [checkpoints / "epoch_9.safetensors", tmp_path / "epoch_99.safetensors"]
    out = tmp_path / "out.safetensors"
    for scheme, options, code in (
        ("uniform", [], 2),
        ("last", [], 0),
        ("uniform", ["--force", "--overwrite"], 0),
    ):
        assert run_cli("merge", *paths, "--scheme", scheme, "-o", out, *options) == code
        error = capsys.readouterr().err
        assert ("unrelated" in error) == (scheme == "uniform")
        assert ("pass --force" in error) == (code == 2) and out.exists() == (code == 0)
    for k in range(2):
        mask = torch.triu(torch.full((8, 8), -torch.inf), 1)
        state = load_file(checkpoints / f"epoch_{k}.safetensors") | {"mask": mask}
        save_file(state, tmp_path / f"m{k}.safetensors")
    pattern = tmp_path / "m*.safetensors"
    assert run_cli("merge", pattern, "--scheme", "uniform", "-o", out, "--overwrite") == 0
    assert torch.equal(load_file(out)["mask"], mask)
    assert run_cli("export", pattern, "--at", "m1", "-o", out, "--overwrite") == 0
    state["0.weight"][0, 0] = torch.nan
    save_file(state, tmp_path / "m1.safetensors")
    for options, message in (([], "pass --force"), (["--force"], "has 9 NaN or Inf")):
        out.unlink(missing_ok=True)
        assert run_cli("merge", pattern, "--scheme", "uniform", "-o", out, *options) == 2
        assert message in capsys.readouterr().err and not out.exists()
    assert run_cli("export", pattern, "--at", "m1", "-o", out) == 2
    assert "has 9 NaN or Inf" in capsys.readouterr().err and not out.exists()


def test_merge_runs_as_one_process(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    path = checkpoints / "epoch_9.safetensors"
    assert run_cli("merge", path, "--scheme", "last", "-o", tmp_path / "out") == 2
    assert "twa merge runs as one process" in capsys.readouterr().err
