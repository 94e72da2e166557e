"""`twa average --basis`: trained averages start from the rows of a file of `twa pack`, around
whichever center is chosen.
"""

import json
import shutil
import textwrap

import pytest
import torch
import twa
from safetensors.torch import save_file
from test_resume import TASK, launch, result, rows, wait
from twa import subspace as subspaces
from twa.cli import main as cli
from twa.packing.to_file import PackToFile
from twa.tasks.contract import load_task

STEPS = 30
#: shards of two ranks begin at multiples of 128 weights
WIDE = TASK.replace("(8, 30)", "(8, 256)").replace("d(30)", "d(256)").replace("(30, 1)", "(256, 1)")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A task, six candidates of it, and packed bases of them around the last: at 8 and at 4
    bits.
    """
    folder = tmp_path_factory.mktemp("job")
    (folder / "task.py").write_text(textwrap.dedent(WIDE))
    task = load_task(str(folder / "task.py"))
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for k in range(6):
        for batch in task.train:
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
        save_file(model.state_dict(), folder / f"step_{13 * (k + 1)}.safetensors")
    for bits, granularity in ((8, "tensor"), (4, "fine")):
        options = {"bits": bits, "granularity": granularity, "center": "last"}
        PackToFile(folder / f"b{bits}", task.model(), candidates(folder), **options).run()
    return folder


def candidates(job):
    return twa.Candidates(job / "step_*.safetensors")


def average(job, out, *options, methods=("t:tensor:8", "t:tensor:8:simplex"), ranks=0):
    """Exit status and error output of `twa average`, here or on several ranks."""
    paths = [job / f"step_{13 * (k + 1)}.safetensors" for k in range(6)]
    fixed = ["--steps", STEPS, "--save-every", 1, "--patience", 0, "-o", out]
    twas = [part for m in methods for part in ("--twa", m)]
    arguments = [str(a) for a in ["average", job / "task.py", *paths, *fixed, *twas, *options]]
    if ranks:
        return wait(launch(ranks, arguments))
    return cli.main(arguments)


def notes(out):
    table = json.loads((out / "results.json").read_text())["rows"]
    return {row["method"]: row["note"] for row in table if row["method"].startswith("TWA")}


@pytest.fixture
def packed_anew(monkeypatch):
    """Counts how often candidates are packed."""
    calls, build = [], subspaces.build
    monkeypatch.setattr(subspaces, "build", lambda *args: calls.append(args) or build(*args))
    return calls


@pytest.fixture(scope="module")
def alone(job, tmp_path_factory):
    """What one process makes of the file at 8 bits."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert average(job, out, "--basis", job / "b8") == 0
    return out


@pytest.mark.parametrize("option", ["", ":simplex"])
def test_like_packing_anew(job, tmp_path, packed_anew, option):
    """Losses and merge weights agree; the chosen center is not the one that was packed for."""
    methods, found = [f"t:tensor:8{option}"], []
    for options in ([], ["--basis", job / "b8"]):
        out = tmp_path / str(len(options))
        packed_anew.clear()
        assert average(job, out, *options, methods=methods) == 0
        assert len(packed_anew) == (0 if options else 1)
        found.append((rows(out), *result(out)[:2], notes(out)))
    (table, _, beta, before), (others, _, other_beta, after) = found
    for row, other in zip(table, others, strict=True):
        assert row["method"] == other["method"]
        assert float(other["val loss"]) == pytest.approx(float(row["val loss"]), rel=2e-3)
    torch.testing.assert_close(torch.tensor(beta), torch.tensor(other_beta), rtol=0, atol=0.02)
    assert not any("rows of" in note for note in before.values())
    assert all("from start; rows of b8" in note for note in after.values()), after


def test_the_chosen_center_is_another_one(alone):
    """Else the tests here would show nothing."""
    center = json.loads((alone / "coefficients.json").read_text())
    assert center["origin"] == [0, 0, 0, 0, 0, 1] != center["center_weights"]


def test_methods_that_the_file_does_not_fit_are_packed(job, tmp_path, packed_anew):
    methods = ["t:tensor:8", "t:tensor:4", "t:model:8", "t:tensor:8:differences", "t:tensor:32"]
    assert average(job, tmp_path, "--basis", job / "b8", methods=methods) == 0
    assert len(packed_anew) == 4
    assert ["rows of" in note for note in notes(tmp_path).values()] == [True] + [False] * 4


def test_fine_rows_and_their_file_by_its_folder(job, tmp_path, packed_anew):
    """The defaults; TWA-v falls back to coarser coefficients here, which the file does not have."""
    (tmp_path / "packed").mkdir()
    shutil.copy(job / "b4", tmp_path / "packed" / "basis.safetensors")
    out = tmp_path / "out"
    assert average(job, out, "--basis", tmp_path / "packed", methods=()) == 0
    told = notes(out)
    assert "rows of basis.safetensors" in told["TWA-t fine, 4 bits"] and len(packed_anew) == 1
    assert not any("rows of" in note for name, note in told.items() if "TWA-v" in name)


@pytest.mark.parametrize("basis", ["differences", "orthonormal"])
def test_other_rows(job, tmp_path, packed_anew, basis):
    """As `Subspace.save` writes them: they stand for any center, too."""
    model = load_task(str(job / "task.py")).model()
    options = {"bits": 8, "basis": basis}
    twa.Subspace.from_candidates(model, candidates(job), **options).save(tmp_path, basis=True)
    method, found = f"t:tensor:8:{basis}", []
    for options in ([], ["--basis", tmp_path]):
        packed_anew.clear()
        out = tmp_path / f"out{len(options)}"
        assert average(job, out, *options, methods=[method]) == 0
        assert len(packed_anew) == (0 if options else 1)
        found.append([float(row["val loss"]) for row in rows(out)])
    assert found[0] == pytest.approx(found[1], rel=2e-3)


def test_a_file_that_fits_no_method(job, tmp_path, capsys):
    assert average(job, tmp_path / "out", "--basis", job / "b8", methods=["t:model:4"]) == 2
    text = capsys.readouterr().err
    assert "b8: it has 8 bits, deltas, granularity tensor: expected --twa t:tensor:8" in text
    assert "found TWA-t per model, 4 bits" in text
    assert not (tmp_path / "out").exists()
    model = load_task(str(job / "task.py")).model()
    unscaled = twa.Subspace.from_candidates(model, candidates(job), normalize="none")
    unscaled.save(tmp_path / "n", basis=True)
    assert average(job, tmp_path / "out", "--basis", tmp_path / "n", methods=["t:tensor:4"]) == 2
    assert "no --twa fits it" in capsys.readouterr().err
    PackToFile(tmp_path / "z", model, candidates(job), center="zero").run()
    assert average(job, tmp_path / "out", "--basis", tmp_path / "z", methods=["t:tensor:4"]) == 2
    assert "z: its center is zero" in capsys.readouterr().err
    assert average(job, tmp_path / "out", "--basis", tmp_path / "none") == 2
    assert "none: no such file" in capsys.readouterr().err


def test_a_file_of_other_candidates(job, tmp_path, capsys):
    other = twa.Candidates([job / f"step_{13 * (k + 1)}.safetensors" for k in range(5)])
    PackToFile(tmp_path / "b", load_task(str(job / "task.py")).model(), other, bits=8).run()
    assert average(job, tmp_path / "out", "--basis", tmp_path / "b") == 2
    text = capsys.readouterr().err
    assert "candidate 5: expected the one that the basis was packed from (none), found step" in text


def test_interrupted_and_continued(job, alone, tmp_path, monkeypatch, capsys):
    """To the same bits; and not with another basis, or without one."""
    out, steps, original = tmp_path / "out", 0, twa.SubspaceOptimizer.step

    def step(self, *args):
        nonlocal steps
        steps += 1
        if steps in (STEPS // 3, STEPS + 12):
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(twa.SubspaceOptimizer, "step", step)
    assert average(job, out, "--basis", job / "b8") == 130
    capsys.readouterr()
    model = load_task(str(job / "task.py")).model()
    PackToFile(tmp_path / "b8", model, candidates(job), bits=8, center=0).run()
    for options in (["--basis", tmp_path / "b8"], []):
        assert average(job, out, "--resume", *options) == 2
        assert "the state of another run: basis: expected" in capsys.readouterr().err
    shutil.copy(job / "b8", tmp_path / "b8")  # the same content elsewhere is the same
    assert average(job, out, "--resume", "--basis", tmp_path / "b8") == 130
    assert average(job, out, "--resume", "--basis", tmp_path / "b8") == 0
    assert result(out) == result(alone)


@pytest.mark.parametrize("sharding", ["replicate", "columns", "rows"])
def test_several_ranks(job, alone, tmp_path, sharding):
    """The same steps as alone: coefficients agree to rounding."""
    options = ["--basis", job / "b8", "--sharding", sharding, "--batches-per-step", "1"]
    for code, error in average(job, tmp_path / "out", *options, ranks=2):
        assert code == 0, error
    assert all("; rows of b8" in note for note in notes(tmp_path / "out").values())
    if sharding == "rows":  # which is not balanced
        return
    beta, expected = result(tmp_path / "out")[1], result(alone)[1]
    torch.testing.assert_close(torch.tensor(beta), torch.tensor(expected), rtol=0, atol=1e-3)


def test_from_python(job, alone):
    task = load_task(str(job / "task.py"))
    outcome = twa.average(
        task.model(),
        candidates(job),
        task.train,
        task.val,
        task.loss,
        methods=["t:tensor:8"],
        steps=3,
        basis=job / "b8",
        progress=False,
    )
    assert "; rows of b8" in outcome.results[-1].note
    with pytest.raises(twa.BasisError, match="no such file"):
        twa.average(
            task.model(), candidates(job), task.train, task.val, task.loss, basis=job / "none"
        )


def test_a_recording_around_any_center(tmp_path):
    """Its rows are differences, and its own codes at any center: nothing is coded anew."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    recorder = twa.Recorder(model, path=tmp_path, every=1)
    for _ in range(5):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
        recorder.step()
    recorder.close()
    recording = twa.Candidates(tmp_path)
    codes = [
        twa.Subspace.from_candidates(model, recording, basis="differences", center=c).basis.codes
        for c in ("mean", "last", torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]))
    ]
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])
