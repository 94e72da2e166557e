"""The files that a version leaves with its users, small ones of each kind, and what is in them.

    python tests/compat/old_files.py tests/compat/COMMIT [--only PATTERN ...]

writes them with the twa that it imports to COMMIT.tar.xz, and what it reads in them to COMMIT.json.
Archives stay: `test_old_files.py` reads all of `ARCHIVES`. A new one has the kinds that are written
in another way than before.

`--early` writes a basis alone, and works with commits as old as 4810383
(TWA_KERNELS_BACKEND=reference, where their native module is not built). The commit 1b50e8d, to
which this was written, could not read merge.json and coefficients_fixed.json: their values are of
weights that were taken from them by hand.

Numbers come from whole numbers by one division, so that no file depends on a random generator.
"""

import argparse
import contextlib
import fnmatch
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import types
import warnings
from pathlib import Path

import torch
import twa
from safetensors.torch import load_file, save_file
from torch import nn
from twa import Candidates, Subspace

import twa_kernels as tk

#: oldest first
ARCHIVES = ("4810383", "33700b4", "1b50e8d", "fe2829d", "fd72880")
STOP = 5  # step of training at which a run is interrupted
TASK = '''\
"""The task of the run that was interrupted: batches are numbers, and it stops where it is told."""

import os

import torch
from torch import nn

STOP = int(os.environ.get("STOP_AFTER", "0"))
seen = [0]


def numbers(count, seed):
    return ((torch.arange(count) * 7919 + seed * 104729) % 2003 - 1001) / 1001.0


def batches(first, count):
    of = [(numbers(20, first + k).reshape(4, 5), numbers(4, 90 + k)) for k in range(count)]
    return [(x, y[:, None]) for x, y in of]


def model():
    return nn.Linear(5, 1)


def train_data():
    return batches(0, 3)


def val_data():
    return batches(3, 4)


def loss(model, batch):
    if model.training:
        seen[0] += 1
        if seen[0] == STOP:
            raise RuntimeError("stopped")
    return (model(batch[0]) - batch[1]).square().mean()
'''


class Net(nn.Module):
    """Of 195 weights in five tensors; BatchNorm's buffers, a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(15, 10)
        self.norm = nn.BatchNorm1d(10)
        self.last = nn.Linear(10, 2, bias=False)
        self.scale = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x)))) * self.scale.sum()


def numbers(shape, seed):
    count = torch.Size(shape).numel()
    return (((torch.arange(count) * 7919 + seed * 104729) % 2003 - 1001) / 1001.0).reshape(shape)


def state(seed, model=None):
    """A state_dict; each candidate is its own."""
    return {
        key: numbers(t.shape, seed + k) if t.is_floating_point() else torch.tensor(seed)
        for k, (key, t) in enumerate((model or Net()).state_dict().items())
    }


def weights_of(model):
    """Some of each tensor of a model, as numbers that JSON keeps."""
    return {key: t.reshape(-1)[::39].tolist() for key, t in model.state_dict().items()}


def digest(*tensors):
    """Of the bits."""
    total = hashlib.sha256()
    for t in tensors:
        total.update(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


# Writing -----------------------------------------------------------------------------------------

TRAINED = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
BASES = {
    "deltas": {"bits": 4},
    "differences": {"bits": 3, "basis": "differences", "constraint": "simplex"},
    "orthonormal": {"bits": 2, "basis": "orthonormal", "granularity": "model"},
    "balanced": {"bits": 8, "balance": True, "granularity": 128},
}


@contextlib.contextmanager
def inside(folder):
    """A context in a directory: files then have relative paths in them."""
    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def write_candidates(model=None, count=3):
    Path("c").mkdir(exist_ok=True)
    for k in range(count):
        save_file(state(10 * k, model), f"c/c{k}.safetensors")
    return Candidates("c")


def write_bases(folder, names):
    """A file of each kind of rows and coefficients, and what a subspace leaves beside it."""
    with tempfile.TemporaryDirectory() as work, inside(Path(work)):
        candidates = write_candidates()
        for name in names:
            subspace = Subspace.from_candidates(Net(), candidates, **BASES[name])
            if name == "balanced":
                x = numbers(subspace.coefficients.shape, 4) / 8
                with torch.no_grad():
                    subspace.coefficients.copy_(x)
                subspace.write_weights()
            else:
                subspace.set_merge_weights(TRAINED)
            subspace.save(name, basis=True)
            shutil.copy(f"{name}/basis.safetensors", folder / f"basis_{name}.safetensors")
            if name in ("deltas", "balanced"):
                shutil.copy(f"{name}/coefficients.json", folder / f"coefficients_{name}.json")
        if len(names) > 1:
            moved = Subspace.load("deltas/basis.safetensors", Net(), candidates, center="last")
            moved.set_merge_weights(TRAINED)
            moved.save("moved", basis=True)
            shutil.copy("moved/basis.safetensors", folder / "basis_moved.safetensors")


def record(recorder, first, count):
    """Steps of a training whose weights are given."""
    for step in range(first, first + count):
        recorder.model.load_state_dict(state(step))
        recorder.step()


def write_recordings(folder):
    """One that was closed; one of which old snapshots were dropped, killed while it wrote."""
    closed = twa.Recorder(Net(), every=2, path=folder / "recording_closed")
    record(closed, 1, 6)
    closed.close()
    killed = twa.Recorder(Net(), every=1, keep=2, bits=2, path=folder / "recording_killed")
    for step in range(1, 6):
        record(killed, step, 1)
        killed.flush()  # so that each is dropped in its turn
    torch.save(killed.state_dict(), folder / "recorder_files.pt")
    killed.close()
    torn = folder / "recording_killed" / ".step_6.safetensors.4194303.tmp"  # of no process
    torn.write_bytes((folder / "recording_killed" / "step_5.safetensors").read_bytes()[:100])
    memory = twa.Recorder(Net(), every=1, bits=2)
    record(memory, 1, 3)
    torch.save(memory.state_dict(), folder / "recorder_memory.pt")


def trained(options, optimizer, steps=3, **more):
    """An optimizer that has taken some steps."""
    model = Net()
    states = [state(10 * k) for k in range(3)]
    subspace = Subspace.from_candidates(model, Candidates.of_states(states), **options)
    made = twa.SubspaceOptimizer(subspace, optimizer, **more)
    for _ in range(steps):
        for k, p in enumerate(subspace.parameters):
            p.grad = numbers(p.shape, 50 + k)
        made.step()
    return made


def write_states(folder):
    """What a training loop's checkpoint holds."""
    adamw = trained({"balance": True}, torch.optim.AdamW, lr=1e-2)
    torch.save(adamw.state_dict(), folder / "optimizer_adamw.pt")
    sgd = trained({"bits": 32}, torch.optim.SGD, lr=1e-2, momentum=0.9)
    torch.save(sgd.state_dict(), folder / "optimizer_sgd.pt")
    torch.save(adamw.subspace.state_dict(), folder / "subspace.pt")
    average = twa.IterateAverage(sgd.subspace)
    average.update()
    torch.save(average.state_dict(), folder / "iterate_average.pt")


def write_callbacks(folder):
    """What the recorder's callbacks put into checkpoints of Lightning and of transformers."""
    from twa.integrations.lightning import RecorderCallback

    callback = RecorderCallback(every=1, path=None)
    callback.recorder = twa.Recorder(Net(), every=1, bits=1)
    record(callback.recorder, 1, 2)
    torch.save(callback.state_dict(), folder / "lightning.pt")
    at, recorder = begin_training(folder / "recording_trainer")
    record(recorder, 1, 2)
    recorder.close()
    at.global_step = 2
    at.save_to_json(str(folder / "trainer_state.json"))


def begin_training(path, at=None):
    """transformers' Trainer begins, or goes on: its state, and the callback's recorder."""
    from transformers import TrainerControl, TrainerState, TrainingArguments
    from twa.integrations.transformers import RecorderCallback

    trainer = types.SimpleNamespace(callback_handler=types.SimpleNamespace(callbacks=[]))
    callback = RecorderCallback(trainer, every=1, path=path)
    trainer.callback_handler.callbacks.append(callback)
    at, net = at or TrainerState(), Net()
    given = {"model": net, "optimizer": torch.optim.SGD(net.parameters(), lr=0.1)}
    options = TrainingArguments(str(path.parent), report_to=[], use_cpu=True)
    callback.on_train_begin(options, at, TrainerControl(), **given)
    return at, callback.recorder


def command(*arguments):
    """Runs `twa`; its error, if there is one, is raised again."""
    from twa.cli.main import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(a) for a in arguments])
    if code == 2:
        raise twa.TwaError(said.getvalue())
    assert code == 0, said.getvalue()


def write_outputs(folder):
    """What `twa merge`, `twa inspect` and `twa average` write; a run that was interrupted."""
    with tempfile.TemporaryDirectory() as work, inside(Path(work)):
        candidates = write_candidates()
        given = [f"c/c{k}.safetensors" for k in range(3)]
        command("merge", *given, "--scheme", "ema:0.5", "-o", "merged", "--force")
        with contextlib.suppress(twa.TwaError):  # the candidates are not alike
            command("inspect", *given, "-o", "looked")
        for path in ("merged/merge.json", "looked/inspect.json"):
            shutil.copy(path, folder)
        batches = [numbers((6, 15), 60)]
        fixed = twa.average(
            Net(), candidates, batches, batches * 2, square, methods=(), progress=False
        )
        fixed.save("fixed")
        shutil.copy("fixed/coefficients.json", folder / "coefficients_fixed.json")
    job = folder / "job"
    with inside(job):
        Path("task.py").write_text(TASK)
        write_candidates(nn.Linear(5, 1))
        os.environ["STOP_AFTER"] = str(STOP)
        with contextlib.suppress(RuntimeError):
            command(*run_of("out"))
        del os.environ["STOP_AFTER"]
        shutil.copytree("out", "whole")  # what an undisturbed run would have written
        command(*run_of("whole"), "--resume")
        shutil.copy("whole/coefficients.json", folder / "coefficients_average.json")
        shutil.copy("whole/results.json", folder)
        shutil.rmtree("whole")


def square(model, batch):
    return model(batch).square().mean()


def run_of(out):
    """Arguments of the run that was interrupted."""
    options = "--steps 8 --lr 0.02 --save-every 1 --patience 0 --force --twa t:tensor:4"
    return ["average", "task.py", "c/*.safetensors", "-o", out, *options.split()]


WRITERS = (
    lambda folder: write_bases(folder, BASES),
    write_recordings,
    write_states,
    write_callbacks,
    write_outputs,
)


def write(folder, only=("*",)):
    """Every kind of file, of which those with other names are removed again."""
    folder.mkdir(parents=True)
    for writer in WRITERS:
        writer(folder)
    for path in folder.iterdir():
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in only):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


# Reading -----------------------------------------------------------------------------------------


def read_basis(path):
    model = Net()
    subspace = Subspace.load(path, model)
    exact = [*tk.unpack(subspace.basis), *subspace.center]
    return {
        "bits of rows and center": digest(*exact),
        "coefficients": subspace.coefficients.tolist(),
        "merge weights": subspace.merge_weights().tolist(),
        "weights": weights_of(model),
    }


def read_recording(path):
    candidates = Candidates(path)
    return {c.name: digest(*(c.tensor(key) for key in sorted(c.info))) for c in candidates}


def read_recorder(path):
    """Goes on where the state was taken; a recording in files is copied beside it."""
    saved = torch.load(path, weights_only=True)
    options = {"every": 1, "bits": saved["bits"]}
    with tempfile.TemporaryDirectory() as work:
        if path.stem == "recorder_files":
            there = shutil.copytree(path.parent / "recording_killed", Path(work, "run"))
            options |= {"path": there, "resume": True, "keep": 2}
        recorder = twa.Recorder(Net(), **options)
        recorder.load_state_dict(saved)
        found = {"count": recorder.count, "steps": recorder.steps}
        recorder.apply("uniform")
        recorder.close()
    return found | {"weights": weights_of(recorder.model)}


def read_optimizer(path):
    is_adamw = path.stem == "optimizer_adamw"
    new = (
        trained({"balance": True}, torch.optim.AdamW, 0, lr=1.0)
        if is_adamw
        else trained({"bits": 32}, torch.optim.SGD, 0, lr=1.0, momentum=0.5)
    )
    new.load_state_dict(torch.load(path, weights_only=True))
    x = new.subspace.coefficients
    moments = {k: torch.as_tensor(v).tolist() for k, v in new.state[x].items()}
    group = {k: v for k, v in new.param_groups[0].items() if k in ("lr", "momentum", "betas")}
    weights = weights_of(new.subspace.model)
    return {"x": x.tolist(), "moments": moments, "group": group, "weights": weights}


def read_subspace(path):
    subspace = trained({"balance": True}, torch.optim.AdamW, 0).subspace
    subspace.load_state_dict(torch.load(path, weights_only=True))
    return {"x": subspace.coefficients.tolist(), "weights": weights_of(subspace.model)}


def read_average(path):
    average = twa.IterateAverage(trained({"bits": 32}, torch.optim.SGD, 0, lr=1.0).subspace, 1.0)
    average.load_state_dict(torch.load(path, weights_only=True))
    x = average.coefficients.tolist()
    return {"x": x, "eta": average.eta, "steps": average.steps}


def read_lightning(path):
    """The state as Lightning hands it over; the recorder goes on where it was taken."""
    from twa.integrations.lightning import RecorderCallback

    callback = RecorderCallback(every=1, path=None)
    callback.load_state_dict(torch.load(path, weights_only=True))
    recorder = twa.Recorder(Net(), every=1, bits=1)
    recorder.load_state_dict(callback._loaded["recorder"])
    return {"count": recorder.count, "steps": recorder.steps}


def read_trainer_state(path):
    """Goes on with a checkpoint: the recording beside it is known as its own."""
    from transformers import TrainerState

    with tempfile.TemporaryDirectory() as work:
        there = shutil.copytree(path.parent / "recording_trainer", Path(work, "run"))
        _, recorder = begin_training(there, TrainerState.load_from_json(str(path)))
        recorder.close()
    return {"count": recorder.count, "steps": recorder.steps}


def read_job(path):
    """Goes on with the run, as another process does; what it finds in the end."""
    with tempfile.TemporaryDirectory() as work:
        shutil.copytree(path, work, dirs_exist_ok=True)
        with inside(Path(work)):
            command(*run_of("out"), "--resume")
            found = json.loads(Path("out/coefficients.json").read_text())
    return {"method": found["method"], "beta": found["beta"]}


def read_coefficients(path):
    """The average that they stand for, by x and by merge weights.

    `twa merge` knows them, too, and that they are none for it.
    """
    try:
        read_weights(path)
    except twa.TwaError as error:
        if "found weights of segments" not in str(error):
            raise
    found = json.loads(path.read_text())
    model = nn.Linear(5, 1) if "weight" in found["segment_of"] else Net()
    subspace = Subspace.from_candidates(
        model,
        Candidates.of_states([state(10 * k, model) for k in range(3)]),
        bits=found["bits"],
        basis=found["basis"],
        granularity=found["chunk"] or "tensor",
        center=torch.tensor(found["center_weights"], dtype=torch.float64),
    )
    with torch.no_grad():
        subspace.coefficients.copy_(torch.tensor(found["x"]))
    subspace.write_weights()
    beta = torch.tensor(found["beta"], dtype=torch.float64)
    torch.testing.assert_close(subspace.merge_weights(), beta, rtol=1e-5, atol=1e-6)
    return {"weights": weights_of(model)}


def read_weights(path):
    """The average that `twa merge` makes of them."""
    with tempfile.TemporaryDirectory() as work, inside(Path(work)):
        write_candidates()
        command("merge", "c", "--scheme", path, "-o", "merged.safetensors", "--force")
        model = Net()
        model.load_state_dict(load_file("merged.safetensors"))
    return {"weights": weights_of(model)}


#: how what a name stands for is read
READERS = {
    "basis_*.safetensors": read_basis,
    "recording_*": read_recording,
    "recorder_*.pt": read_recorder,
    "optimizer_*.pt": read_optimizer,
    "subspace.pt": read_subspace,
    "iterate_average.pt": read_average,
    "lightning.pt": read_lightning,
    "trainer_state.json": read_trainer_state,
    "job": read_job,
    "coefficients_fixed.json": read_weights,
    "coefficients_[!f]*.json": read_coefficients,
    "merge.json": read_weights,
}
#: reports, which twa writes only
UNREAD = ("inspect.json", "results.json")


def readable(folder):
    """(reader, path) of all that is in a folder."""
    found = []
    for pattern, reader in READERS.items():
        found += [(reader, path) for path in sorted(folder.glob(pattern))]
    return found


def early(folder):
    """A basis by a twa that knows less: its values are those of the model that it was made with."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as work, inside(Path(work)):
        model = Net()
        subspace = Subspace.from_candidates(model, write_candidates(), bits=4)
        subspace.set_merge_weights(TRAINED)
        subspace.save("out", basis=True)
        shutil.copy("out/basis.safetensors", folder / "basis_deltas.safetensors")
        return {
            "basis_deltas.safetensors": {
                "coefficients": subspace.coefficients.tolist(),
                "merge weights": subspace.merge_weights().tolist(),
                "weights": weights_of(model),
            }
        }


def unpacked(archive, folder):
    """The files of an archive, in a folder."""
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder


def main():
    parser = argparse.ArgumentParser(description="Writes a file of each kind, and their values.")
    parser.add_argument("name", type=Path, help="of NAME.tar.xz and NAME.json")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names")
    parser.add_argument("--early", action="store_true", help="by a commit from before the others")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    name, source = arguments.name.resolve(), Path(twa.__file__).parent
    commit = subprocess.check_output(["git", "-C", source, "log", "-1", "--format=%h"], text=True)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, "files")
        if arguments.early:
            values = early(folder)
        else:
            write(folder, arguments.only)
            values = {path.name: reader(path) for reader, path in readable(folder)}
        with tarfile.open(f"{name}.tar.xz", "w:xz") as archive:
            archive.add(folder, ".", filter=anonymous)
    versions = {"commit": commit.strip(), "twa": twa.__version__, "torch": torch.__version__}
    text = json.dumps({**versions, "values": values}, separators=(",", ":"), sort_keys=True)
    Path(f"{name}.json").write_text(text.replace('},"', '},\n"') + "\n")


def anonymous(entry):
    """Without who has written it, and when."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    main()
