"""Recordings as candidates: what reads them, and files that are damaged or mean harm. More by
chance: fuzz.py.
"""

import json
import os
import shutil
import textwrap
import warnings

import pytest
import torch
import twa
from crash import TASK
from safetensors.torch import load_file, save_file
from torch import nn
from twa.cli import main as cli
from twa.io.errors import CandidateError, CandidateWarning, TwaError
from twa.tasks import contract as tasks

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = [4, 8, 12, 16]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """task.py; run/twa, a recording; run/epoch_0.safetensors, ..., of the same training."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "task.py").write_text(textwrap.dedent(TASK.format(wide=30)))
    task = tasks.load_task(str(folder / "task.py"))
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1 / 30)
    recorder = twa.Recorder(model, every=4, path=folder / "run" / "twa")
    recorder.attach(optimizer)
    for epoch in range(4):
        for batch in task.train:
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
        save_file(model.state_dict(), folder / "run" / f"epoch_{epoch}.safetensors")
    recorder.close()
    return folder


@pytest.fixture
def recording(run, tmp_path, monkeypatch):
    """A copy to damage, as `twa` in the current directory."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(run / "run" / "twa", tmp_path / "twa")


def resume():
    """A recorder of another model, which looks at the files first."""
    return twa.Recorder(nn.Linear(2, 2), every=1, path="twa", resume=True)


def twa_says(capsys, *arguments):
    """Exit status, and what it printed."""
    code = cli.main([str(a) for a in arguments])
    out = capsys.readouterr()
    return code, out.out + out.err


def steps_of(path, **options):
    return [c.step for c in twa.Candidates(path, **options)]


# What reads them ---------------------------------------------------------------------------------


def test_inspect(run, tmp_path, capsys):
    code, text = twa_says(capsys, "inspect", run / "run" / "twa", "-o", tmp_path / "out")
    assert code == 0, text
    found = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert [f["format"] for f in found["files"]] == ["recording"] * 4
    assert [os.path.basename(f["path"]) for f in found["files"]] == [
        f"step_{s}.safetensors" for s in STEPS
    ]
    assert len(found["norms"]) == 4
    _, text = twa_says(capsys, "inspect", run / "run" / "twa", "--entry", "x")
    assert "entry 'x': a recording has none" in text


def test_merge_and_export(run, tmp_path, capsys):
    path = run / "run" / "twa"
    found = twa.Candidates(path)
    code, text = twa_says(capsys, "merge", path, "-o", tmp_path / "m", "--scheme", "lawa:2")
    assert code == 0 and "oldest first: step_4, step_8, step_12, step_16\n" in text, text
    beta = twa.averages.lawa(4, 2)
    written = load_file(tmp_path / "m" / "averaged.safetensors")
    for key, t in found.average(beta).items():
        assert torch.equal(written[key], t)
    for at, k in (("step_8", 1), ("step_4", 0), ("last", 3)):
        code, text = twa_says(capsys, "export", path, "--at", at, "-o", tmp_path / at)
        assert code == 0, text
        written = load_file(tmp_path / at / "averaged.safetensors")
        tasks.load_task(str(run / "task.py")).model().load_state_dict(written, strict=True)
        assert all(torch.equal(t, found[k].tensor(key)) for key, t in written.items())
    code, text = twa_says(capsys, "export", path, "--at", "step_5", "-o", tmp_path / "x")
    assert code == 2 and "--at step_5: expected one of step_4, step_8" in text


def test_commands_say_what_cannot_be_read(recording, tmp_path, capsys):
    damaged = recording / "step_12.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    code, text = twa_says(capsys, "merge", "twa", "-o", "m", "--scheme", "uniform")
    assert code == 0 and "step_12.safetensors and what comes after it is left out" in text


def test_nothing_is_written_into_a_recording(recording, capsys):
    for name in ("step_8.safetensors", "step_10.safetensors"):
        out = ("-o", f"twa/{name}", "--overwrite")
        code, text = twa_says(capsys, "export", "twa", "--at", "step_16", *out)
        assert code == 2 and "is inside a recording" in text
    assert steps_of("twa") == STEPS


def test_pack_and_average(run, tmp_path, capsys):
    task, path = run / "task.py", run / "run" / "twa"
    code, text = twa_says(capsys, "pack", task, path, "-o", tmp_path / "p.safetensors")
    assert code == 0 and "packed 4 candidates" in text, text
    subspace = twa.Subspace.load(tmp_path / "p.safetensors", tasks.load_task(str(task)).model())
    assert subspace.merge_weights().shape[0] == 4
    code, text = twa_says(capsys, "average", task, path, "-o", tmp_path / "a", "--steps", "5")
    assert code == 0 and "winner on the validation data" in text, text
    coefficients = json.loads((tmp_path / "a" / "coefficients.json").read_text())
    assert [os.path.basename(p) for p in coefficients["candidates"]] == [
        f"step_{s}.safetensors" for s in STEPS
    ]
    code, text = twa_says(capsys, "average", task, path, "-o", tmp_path / "b", "--ignore", "norm.*")
    assert code == 2 and "'norm.weight' of the model is missing" in text, text


def test_beside_ordinary_files(run):
    """They are the same weights up to a few bits; so are averages of both kinds together."""
    path = run / "run"
    mixed = twa.Candidates([path / "twa", *(path / f"epoch_{k}.safetensors" for k in range(4))])
    assert [c.kind for c in mixed] == ["recording"] * 4 + ["safetensors"] * 4
    assert mixed.kind == "mixed" and mixed.recording is None
    assert sorted(twa.Candidates(path).names) == sorted(mixed.names)
    assert sorted(twa.Candidates(f"{path}/*").names) == sorted(mixed.names)
    alone, files = twa.Candidates(path / "twa"), twa.Candidates(f"{path}/epoch_*.safetensors")
    assert alone.recording is not None and alone.kind == "recording"
    average = mixed.average(twa.averages.uniform(8))
    for key, t in average.items():
        if not t.is_floating_point():
            continue
        both = [c.average(twa.averages.uniform(4))[key].double() for c in (alone, files)]
        torch.testing.assert_close(t.double(), (both[0] + both[1]) / 2, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(both[0], both[1], rtol=0, atol=0.02)
    task = tasks.load_task(str(run / "task.py"))
    subspace = twa.Subspace.from_candidates(task.model(), mixed)
    assert subspace.merge_weights().shape[0] == 8


def test_the_same_twice(recording):
    os.symlink("twa", "link")
    for paths in (["twa", "twa"], ["twa", "twa/"], ["twa", recording], ["link", "twa"]):
        with pytest.warns(CandidateWarning, match="the same weights count once"):
            assert steps_of(paths) == STEPS
    shutil.copytree("twa", "copy")
    assert len(twa.Candidates(["twa", "copy"])) == 8
    assert steps_of("link") == STEPS


def test_patterns_and_options(recording):
    with pytest.raises(CandidateError, match=r"entry 'model': a recording has none"):
        twa.Candidates("twa", entry="model")
    kept = twa.Candidates("twa", ignore=["norm.*", "calls"])
    assert {k.split(".")[0] for k in kept[0].info} == {"first", "last"}
    assert set(kept.average(twa.averages.uniform(4))) == set(kept[0].info)
    with pytest.raises(CandidateError, match="found all ignored"):
        twa.Candidates("twa", ignore=["*"])
    one = r"one file of a recording: give its directory, .*twa; `twa export --at` makes a file"
    for path in ("twa/step_8.safetensors", "twa/anchor_4.safetensors", "twa/*", "twa/step_*"):
        with pytest.raises(CandidateError, match=one):
            twa.Candidates(path)
    with pytest.raises(CandidateError, match=r"twa/recording.lock"):
        twa.Candidates("twa/recording.lock")
    assert steps_of("t*") == STEPS


def test_files_of_such_names_that_are_ordinary(tmp_path):
    """anchor_model and step_3 are names that others may use, too."""
    for name in ("anchor_model", "anchor_", "step_3", "step_4"):
        save_file({"w": torch.randn(3)}, tmp_path / f"{name}.safetensors")
    assert len(twa.Candidates(tmp_path)) == 4


# Damage ------------------------------------------------------------------------------------------


def rewritten(path, change=lambda contents: None, tensors=lambda found: found, **metadata):
    """The file with other metadata, and other tensors."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    value = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["twa"])
    if "contents" in value:
        change(value["contents"])
    value |= metadata
    save_file(tensors(load_file(path)), path, metadata={"twa": json.dumps(value)})


def cut_after(count, said, path="twa"):
    """The first snapshots are there, and a warning says why the others are not."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert steps_of(path) == STEPS[:count]
    (text,) = [str(w.message) for w in seen if w.category is CandidateWarning]
    assert said in text and text.isprintable(), text


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "this is an empty file"),
        (b"garbage" * 99, "not a complete safetensors file"),
        (bytes(8), "header"),
        ((1 << 40).to_bytes(8, "little"), "not a complete safetensors file"),
    ],
)
@pytest.mark.parametrize("name", ["anchor_4", "step_12"])
def test_garbage(recording, name, data, said):
    path = recording / f"{name}.safetensors"
    path.write_bytes(data)
    if name == "step_12":
        cut_after(2, "step_12.safetensors and what comes after it is left out: ")
    else:
        with pytest.raises(CandidateError, match=f"anchor_4.safetensors: .*{said}"):
            twa.Candidates("twa")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_cut_files(recording, share):
    for name, count in (("step_16", 3), ("step_12", 2), ("step_8", 1)):
        path = recording / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        cut_after(count, f"{name}.safetensors and what comes after it is left out: ")
    path = recording / "anchor_4.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CandidateError, match=r"anchor_4.safetensors: "):
        twa.Candidates("twa")


def test_files_that_are_gone(recording):
    (recording / "step_8.safetensors").unlink()
    cut_after(1, "step_12.safetensors and what comes after it is left out: snapshot 1 is missing")
    (recording / "anchor_4.safetensors").unlink()
    with pytest.raises(CandidateError, match="one file of a recording"):
        twa.Candidates("twa")


def test_what_cannot_be_read_is_moved_aside(recording, run):
    """And can be put back."""
    damaged = recording / "step_12.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    task = tasks.load_task(str(run / "task.py"))
    with pytest.warns(CandidateWarning, match="step_12.safetensors and what comes after it"):
        recorder = twa.Recorder(task.model(), every=4, path="twa", resume=True)
    recorder.close()
    assert (recorder.count, steps_of("twa")) == (8, [4, 8])
    aside = sorted(recording.glob("*.aside"))
    assert [p.name for p in aside] == ["step_12.safetensors.aside", "step_16.safetensors.aside"]
    damaged.write_bytes(whole)
    aside[1].rename(recording / "step_16.safetensors")
    assert steps_of("twa") == STEPS


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf, -0.0])
def test_scales_that_are_none(recording, value):
    """Found when they are read, in every way that reads them."""

    def spoil(found):
        found["scales"][1] = value
        return found

    rewritten(recording / "step_12.safetensors", tensors=spoil)
    found = twa.Candidates("twa")
    said = r"step_12.safetensors: scales: expected finite numbers of at least 0"
    for read in (
        lambda: [c.tensor("first.weight") for c in found],
        lambda: found.average(twa.averages.uniform(4)),
        lambda: found.average(twa.averages.candidate(4, -1)),
    ):
        with pytest.raises(CandidateError, match=said):
            read()


@pytest.mark.parametrize(
    "tensors, said",
    [
        (lambda f: f | {"codes": f["codes"][:-1]}, "codes: expected uint8"),
        (lambda f: f | {"codes": f["codes"].to(torch.int8)}, "codes: expected uint8"),
        (lambda f: f | {"codes": f["codes"][:, :32].contiguous()}, "codes: expected uint8"),
        (lambda f: f | {"scales": f["scales"].float()}, "scales: expected bfloat16"),
        (lambda f: f | {"scales": f["scales"][None]}, "scales: expected bfloat16"),
        (lambda f: {k: t for k, t in f.items() if k != "codes"}, "codes: expected uint8"),
        (lambda f: f | {"state.unknown": torch.ones(2)}, "tensor 'state.unknown' is unexpected"),
        (lambda f: f | {"more": torch.ones(2)}, "tensor 'more' is unexpected"),
        (lambda f: f | {"weights.first.bias": torch.ones(2)}, "'weights.first.bias' is unexp"),
    ],
)
def test_tensors_of_a_snapshot(recording, tensors, said):
    rewritten(recording / "step_12.safetensors", tensors=tensors)
    cut_after(2, said)


@pytest.mark.parametrize(
    "metadata, said",
    [
        ({"run": "another"}, "it is of another run"),
        ({"run": 3}, "it is of another run"),
        ({"number": 1}, ""),
        ({"number": 9}, "snapshot 2 is missing"),
        ({"number": -1}, "number: expected a whole number"),
        ({"number": 2.0}, "number: expected a whole number"),
        ({"number": 1 << 70}, "number: expected a whole number"),
        ({"step": "x" * 5000}, "step: expected a whole number"),
        ({"step": [1] * 9}, "step: expected a whole number"),
        ({"step": None}, "step: expected a whole number"),
    ],
)
def test_metadata_of_a_snapshot(recording, metadata, said):
    rewritten(recording / "step_12.safetensors", **metadata)
    cut_after(2, said)


def test_names_of_other_steps(recording):
    """A file that was renamed: a later snapshot would come before an earlier one."""
    os.rename(recording / "step_12.safetensors", recording / "step_13.safetensors")
    cut_after(2, "step: expected that of the file's name, 13, found 12")
    os.rename(recording / "anchor_4.safetensors", recording / "anchor_3.safetensors")
    with pytest.raises(CandidateError, match="step: expected that of the file's name, 3, found 4"):
        twa.Candidates("twa")


def test_another_runs_file(recording, run):
    shutil.copytree(recording, "other")
    for path in (recording.parent / "other").glob("*.safetensors"):
        rewritten(path, lambda contents: contents.update(run="other"), run="other")
    assert steps_of("other") == STEPS
    shutil.copy("other/step_12.safetensors", recording)
    cut_after(2, "it is of another run")


def test_the_same_step_under_two_names(recording):
    shutil.copy(recording / "step_8.safetensors", recording / "step_08.safetensors")
    assert steps_of("twa") == STEPS


CONTENTS = [
    (
        lambda c: c.update(format="twa-recording-2"),
        "a newer twa than",
    ),
    (lambda c: c.update(format="x\x1b[2J"), "expected format 'twa-recording-1'"),
    (lambda c: c.update(bits=5), "bits: expected one of"),
    (lambda c: c.update(bits=True), "bits: expected one of"),
    (lambda c: c.update(run=""), "run: expected a name"),
    (lambda c: c.update(trained=[]), "trained: expected a list"),
    (lambda c: c.update(trained={}), "trained: expected a list"),
    (lambda c: c.update(rank=[1, 1]), "rank: expected a rank"),
    (lambda c: c.update(rank=[0, 10**9]), "rank: expected a rank"),
    (lambda c: c.update(aliases={"x": "nothing"}), "aliases: expected keys"),
    (lambda c: c.update(names=c["names"] | {"first.weight": "y"}), "each key once"),
    (lambda c: c.update(more=1), "'more' is unexpected"),
    (lambda c: c.pop("names"), "'names' is missing"),
    (lambda c: c["trained"][0].append(3), "expected key, name, dtype and sizes"),
    (lambda c: c["trained"][0].__setitem__(2, "I64"), "expected a floating-point dtype"),
    (lambda c: c["trained"][0].__setitem__(2, "x" * 9999), "expected a floating-point dtype"),
    (lambda c: c["trained"][0].__setitem__(3, [1 << 40, 1 << 40]), "expected"),
    (lambda c: c["trained"][0].__setitem__(3, [-1, 8]), "expected a part of a tensor"),
    (lambda c: c["trained"][0].__setitem__(4, [9, 9]), "expected a part of a tensor"),
    (lambda c: c["trained"][0].__setitem__(5, [30, 7]), "expected weights \\[30, 7\\], found"),
    (lambda c: c["trained"][0].__setitem__(0, "\x1b[2J" * 999), "expected weights"),
    (lambda c: c["trained"].append(c["trained"][0]), "each key once"),
    (lambda c: c["trained"].reverse(), ""),
]


@pytest.mark.parametrize("change, said", CONTENTS)
def test_contents(recording, change, said):
    """Errors name the file, what was expected, and what was found, in so many words."""
    rewritten(recording / "anchor_4.safetensors", change)
    if not said:  # nothing but values of other tensors: they are what the file says
        assert steps_of("twa") == STEPS
        return
    with pytest.raises(CandidateError, match=f"anchor_4.safetensors: .*{said}") as error:
        twa.Candidates("twa")
    text = str(error.value)
    assert text.isprintable() and len(text) < 2000, text
    with pytest.raises(TwaError, match=said):
        resume()


def test_huge_shapes_take_no_memory(recording):
    """A shape without end, of which there is a part: no tensor of it is made before it is read."""

    def change(contents):
        contents["trained"][0][3] = [1 << 40, 8]

    rewritten(recording / "anchor_4.safetensors", change)
    with pytest.raises(CandidateError, match="its parts do not make a whole"):
        twa.Candidates("twa")


def test_names_that_are_odd(tmp_path):
    """Any name that a module may have; those of a file are shown, never followed."""
    names = ["ünï ☃", "a/../../b", "x" * 900, "\x1b[2J", "weights", "codes", "state.codes"]
    model = nn.ParameterDict({n.replace(".", "_"): torch.randn(3) for n in names})
    for k, name in enumerate(names):
        model.register_buffer(f"{k}{name}".replace(".", "_"), torch.ones(2))
    recorder = twa.Recorder(model, every=1, path=tmp_path / "run")
    for step in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        recorder.record(step)
    recorder.close()
    found = twa.Candidates(tmp_path / "run")
    assert found[2].info.keys() == model.state_dict().keys()
    for key, t in model.state_dict().items():
        torch.testing.assert_close(found[2].tensor(key), t, rtol=0, atol=0.1)
    for name in ("x" * 3000, "\ud800"):
        with pytest.raises(TwaError, match="no name of a tensor in a file"):
            twa.Recorder(nn.ParameterDict({name: torch.ones(2)}), every=1)


def test_links(recording):
    """A recording whose files are elsewhere reads as any; a circle of links ends."""
    path = recording / "step_12.safetensors"
    os.rename(path, "elsewhere")
    os.symlink("../elsewhere", path)
    assert steps_of("twa") == STEPS
    path.unlink()
    os.symlink("step_12.safetensors", path)
    # what the system cannot read now it may read later: nothing is left out
    said = r"step_12.safetensors: cannot be read \(.+\)"
    for change in (lambda: None, lambda: (path.unlink(), path.mkdir())):
        change()
        for read in (lambda: twa.Candidates("twa"), resume):
            with pytest.raises(CandidateError, match=said):
                read()
    assert (recording / "step_16.safetensors").exists()


def test_files_that_change_while_they_are_read(recording):
    found = twa.Candidates("twa")
    found[2].tensor("first.weight")
    data = (recording / "step_12.safetensors").read_bytes()
    with open(recording / "step_12.safetensors", "r+b") as f:
        f.write(data)
    with pytest.raises(CandidateError, match=r"step_12.safetensors: changed while"):
        found.average(twa.averages.uniform(4))


def test_ranks_that_are_missing(tmp_path):
    """A directory of a rank is gone, or of another run."""
    model = nn.Linear(8, 4)
    for rank in (0, 1):
        folder = tmp_path / "run" / f"rank_{rank}_of_2"
        recorder = twa.Recorder(model, every=1, path=folder)
        recorder.record(0)
        recorder.close()

        def half(contents, rank=rank):
            contents.update(rank=[rank, 2], run="x", aliases={})
            contents["trained"] = contents["trained"][rank : rank + 1]
            contents["trained"][0][3][0] *= 2
            contents["trained"][0][4][0] = 0

        def kept(found, rank=rank):
            key = ("weights.weight", "weights.bias")[rank]
            return {key: found[key]}

        rewritten(folder / "anchor_0.safetensors", half, kept, run="x")
    said = "its parts do not make a whole: are the files of all ranks there"
    with pytest.raises(CandidateError, match=said):
        twa.Candidates(tmp_path / "run")
    rewritten(folder / "anchor_0.safetensors", lambda c: c.update(run="y"), run="y")
    with pytest.raises(CandidateError, match="of different recordings"):
        twa.Candidates(tmp_path / "run")
