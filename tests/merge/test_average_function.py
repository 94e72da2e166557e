"""twa.average: the main job from Python is the command's, and leaves the caller's things alone."""

import json
import random

import numpy
import pytest
import torch
import twa
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from twa.io.errors import CandidateError, TaskError, TwaError
from twa.merge.run import Merge
from twa.merge.settings import Settings, TwaMethod
from twa.tasks.contract import Task

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = {"averaged.safetensors", "coefficients.json", "report.md", "report.png", "results.json"}


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Dropout(0.1), nn.Linear(24, 3)
    )


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def data(seed, batches=6, **options):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(16 * batches, 6, generator=g)
    y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 1).long()
    return DataLoader(TensorDataset(x, y), 16, **options)


def shuffled(seed):
    return data(seed, shuffle=True, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A recorded run, its checkpoints, and the model as it was at the end."""
    folder, model = tmp_path_factory.mktemp("run"), make()
    recorder = twa.Recorder(model, every=3, bits=8)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    recorder.attach(optimizer)
    for step in range(1, 19):
        for batch in data(step, 1):
            loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 3 == 0:
            save_file(model.state_dict(), folder / f"step_{step}.safetensors")
    return folder, recorder, model


def test_it_is_the_main_job(run):
    folder, _, _ = run
    method = TwaMethod("t", "tensor", 8)
    settings = Settings((method,), steps=8, lr=0.05, seed=3)
    task = Task("by hand", make, loss, shuffled(1), data(2), None, data(3), None, "metric")
    expected = Merge(task, twa.Candidates(folder), settings, progress=False).run()
    model = make()
    found = twa.average(
        model,
        folder,
        shuffled(1),
        data(2),
        loss,
        test=data(3),
        methods=["t:tensor:8"],
        progress=False,
        **{"steps": 8, "lr": 0.05, "seed": 3},
    )
    assert found.winner.method == expected.winner.method
    for a, b in zip(found.results, expected.results, strict=True):
        assert (a.method, a.val_loss, a.test_loss) == (b.method, b.val_loss, b.test_loss)
    theirs = expected.state
    assert found.state.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[key]) for key, t in found.state.items())
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in theirs.items())
    assert min(r.val_loss for r in found.results) == found.winner.val_loss


@pytest.mark.parametrize("kind", ["folder", "paths", "candidates", "recorder"])
def test_sources(run, kind):
    folder, recorder, model = run
    before = {k: t.clone() for k, t in model.state_dict().items()}
    source = {
        "folder": folder,
        "paths": sorted(map(str, folder.glob("*.safetensors"))),
        "candidates": twa.Candidates(folder),
        "recorder": recorder,
    }[kind]
    options = {"steps": 4, "compare": True, "progress": False}
    outcome = twa.average(model, source, data(1), data(2), loss, **options)
    assert [r.candidates for r in outcome.results if r.method == "uniform"] == [6]
    assert outcome.results[-1].method.startswith("TWA-v")
    last = next(r for r in outcome.results if r.method == "last")
    assert outcome.winner.val_loss <= last.val_loss and last.note == "step_18"
    model.load_state_dict(before)


def test_it_leaves_generators_and_modes_alone(run):
    folder, _, _ = run
    model, train = make(), shuffled(1)
    model.train()
    model[1].eval()
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    order = train.generator.get_state()
    twa.average(model, folder, train, data(2), loss, steps=3, progress=False)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert all(numpy.array_equal(a, b) for a, b in zip(numpy.random.get_state(), before[2]))  # noqa: B905
    assert torch.equal(train.generator.get_state(), order)
    assert [m.training for m in model] == [True, False, True, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_outcome(run, tmp_path):
    folder, _, _ = run
    model = make()
    outcome = twa.average(
        model, folder, data(1), data(2), loss, heldout=data(4), steps=4, progress=False
    )
    assert "| start" in str(outcome) and outcome.winner.method in str(outcome)
    assert "| greedy soup" not in str(outcome)
    assert outcome._repr_markdown_() == str(outcome)
    assert set(outcome.save(tmp_path / "new" / "out")) == FILES
    out = tmp_path / "new" / "out"
    assert {p.name for p in out.iterdir()} == FILES
    state = load_file(out / "averaged.safetensors")
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in state.items())
    page = (out / "report.md").read_text()
    assert page.startswith("# Average for task Sequential") and "twa.average(...)" in page
    methods = [row["method"] for row in json.loads((out / "results.json").read_text())["rows"]]
    assert methods == [r.method for r in outcome.results]
    before = {key: t.clone() for key, t in model.state_dict().items()}
    for name, change in (
        ("4.bias", lambda: model[4].bias.data.add_(1)),
        ("1.running_mean", lambda: model.train()(torch.randn(8, 6))),
    ):
        change()
        for use in (lambda: outcome.save(tmp_path / "late"), lambda: outcome.state):
            with pytest.raises(TwaError, match=rf"'{name}' is another since .*no longer at"):
                use()
        model.load_state_dict(before)  # what was put back counts as the same
        assert torch.equal(outcome.state["4.bias"], before["4.bias"])
    assert not (tmp_path / "late").exists()


def test_figures_of_the_caller_stay(run, tmp_path):
    """The picture is drawn without pyplot, whose backend and figures are the caller's."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("svg")
    folder, _, _ = run
    outcome = twa.average(make(), folder, data(1), data(2), loss, steps=2, progress=False)
    outcome.save(tmp_path)
    assert matplotlib.get_backend().lower() == "svg"
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


BAD = {
    "an iterator": ({"train": iter([1])}, TaskError, "train: .* found an iterator"),
    "no data": ({"val": 3}, TaskError, "val: expected batches, .* found int"),
    "a setting": ({"stepz": 3}, TwaError, "expected one of steps, lr, .* found 'stepz'"),
    "steps": ({"steps": 0}, TwaError, "steps: expected a whole number of at least 1, found 0"),
    "a rate": ({"lr": -1.0}, TwaError, "lr: expected a number above 0, found -1.0"),
    "a method": ({"methods": ["t:8"]}, TwaError, "method 't:8': expected"),
    "no files": ({"source": "nowhere/*.pt"}, CandidateError, "nothing matches"),
    "another model": ({"model": nn.Linear(2, 2)}, CandidateError, "is unexpected"),
}


@pytest.mark.parametrize("value", [(1.0, 2), 0.5, torch.ones(3, requires_grad=True)])
def test_a_loss_that_is_none(run, value):
    folder, _, _ = run
    with pytest.raises(TaskError, match="loss: expected a tensor with one number, found"):
        twa.average(make(), folder, data(1), data(2), lambda *_: value, progress=False)


def test_without_gradients_around(run):
    folder, _, _ = run
    for around in (torch.no_grad(), torch.inference_mode()):
        with around:
            model, train, val = make_outside(), data(1), data(2)
            outcome = twa.average(model, folder, train, val, loss, steps=3, progress=False)
        assert (
            outcome.results[-1].curve and "Outcome(" in repr(outcome) and len(repr(outcome)) < 200
        )


def make_outside():
    with torch.inference_mode(False):
        return make()


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(run, name):
    folder, _, _ = run
    changed, error, text = BAD[name]
    options = {"model": make(), "source": folder, "train": data(1), "val": data(2), "loss": loss}
    with pytest.raises(error, match=text):
        twa.average(**options | {"progress": False} | changed)


def test_a_model_in_ddp(run, tmp_path):
    folder, _, _ = run
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model = make()
        wrapped = DistributedDataParallel(model)
        loss(wrapped, next(iter(data(1)))).backward()
        outcome = twa.average(wrapped, folder, data(1), data(2), loss, steps=3, progress=False)
        assert outcome.sharding.model is model
        loss(wrapped, next(iter(data(1)))).backward()  # it can be trained on
    finally:
        torch.distributed.destroy_process_group()


class Cached(nn.Module):
    """It keeps what it makes of a weight while it is in evaluation mode, as LeViT does."""

    def __init__(self):
        super().__init__()
        self.scale, self.body = nn.Parameter(torch.ones(3)), make()

    def train(self, mode=True):
        super().train(mode)
        self.kept = None if mode else self.scale.exp()
        return self

    def forward(self, x):
        return self.body(x) * (self.scale.exp() if self.kept is None else self.kept)


@pytest.fixture
def cached(tmp_path):
    for k in range(4):
        model = Cached()
        torch.manual_seed(k)
        for p in model.parameters():
            p.data += 0.1 * torch.randn(p.shape)
        save_file(model.state_dict(), tmp_path / f"step_{k}.safetensors")
    return tmp_path


def test_what_modules_keep_is_that_of_the_winner(cached):
    model = Cached().eval()
    outcome = twa.average(
        model, cached, data(1), data(2), loss, heldout=data(3), steps=4, progress=False
    )
    assert not model.training
    with torch.no_grad():
        found = [float(loss(model, batch)) for batch in data(2)]
    assert sum(found) / len(found) == pytest.approx(outcome.winner.val_loss, rel=1e-6)


def test_an_error_leaves_no_hooks(run):
    folder, _, _ = run
    model, calls = make(), []

    def failing(model, batch):
        calls.append(model.training)
        if sum(calls) > 20:  # while coefficients are trained
            raise KeyboardInterrupt
        return loss(model, batch)

    with pytest.raises(KeyboardInterrupt) as kept:
        twa.average(
            model, folder, data(1), data(2), failing, low_memory=True, steps=99, progress=False
        )
    assert kept.tb is not None
    loss(model, next(iter(data(1)))).backward()
    assert all(p.grad is not None for p in model.parameters())
