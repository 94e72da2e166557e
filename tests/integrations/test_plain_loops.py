"""twa.Recorder in loops of one's own: compiled models and optimizers, kinds of optimizers, wrappers
around them, Lightning Fabric, and what happens around averages that are in the model.
"""

import contextlib
import copy
import io
import json
import pickle
from collections import OrderedDict

import pytest
import torch
import twa
from states import assert_same, snapshots
from torch import nn
from torch._dynamo.testing import CompileCounter
from twa.io.errors import CandidateWarning, TwaError

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        return x + torch.tanh(self.norm(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def net():
    torch.manual_seed(0)
    return Net()


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=0.01, **options)


def backward(model, k):
    g = torch.Generator().manual_seed(k)
    loss = (model(torch.randn(8, 6, generator=g)) - torch.ones(8, 3)).square().mean()
    loss.backward()
    return loss


def train(model, optimizer, steps=STEPS, begin=0, step=None):
    """The states after each step."""
    states = []
    for k in range(begin, begin + steps):
        backward(model, k)
        (step or optimizer.step)()
        optimizer.zero_grad()
        states.append(state_of(model))
    return states


def state_of(model):
    plain = {key.replace("_orig_mod.", ""): t for key, t in model.state_dict().items()}
    return {key: t.detach().clone() for key, t in plain.items()}


def attached(model, optimizer, **options):
    recorder = twa.Recorder(model, **{"every": 1} | options)
    recorder.attach(optimizer)
    return recorder


def assert_recorded(recorder, states, limit=0.003):
    """Snapshots are those states, as near as 4 bits are: a step moves weights by 0.01."""
    assert recorder.steps == list(range(1, len(states) + 1))
    for found, state in zip(snapshots(recorder), states, strict=True):
        assert found.keys() == state.keys()
        for key, t in state.items():
            assert (found[key] - t).abs().max() <= limit, key


# torch.compile ------------------------------------------------------------------------------------


def compiled_blocks():
    model = net()
    for k, layer in enumerate(model.layers):
        model.layers[k] = torch.compile(layer, backend="eager")
    return model


def compiled_in_place():
    model = net()
    model.compile(backend="eager")
    return model


COMPILED = {
    "whole": lambda: torch.compile(net(), backend="eager"),
    "blocks": compiled_blocks,
    "in place": compiled_in_place,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The recording of the model that is not compiled."""
    model = net()
    optimizer = adamw(model)
    recorder = attached(model, optimizer, path=tmp_path_factory.mktemp("plain") / "run")
    train(model, optimizer)
    recorder.close()
    return recorder


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_models(kind, plain, tmp_path):
    """Names, labels and files are those of the plain model; it computes with what is swapped in."""
    model = COMPILED[kind]()
    optimizer = adamw(model)
    recorder = attached(model, optimizer, path=tmp_path / "run")
    train(model, optimizer)
    recorder.flush()
    files = sorted(p.name for p in (tmp_path / "run").glob("*.safetensors"))
    assert len(files) == STEPS
    found, expected = twa.Candidates(tmp_path / "run"), twa.Candidates(plain.path)
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(
            {k: mine.tensor(k) for k in mine.info}, {k: theirs.tensor(k) for k in mine.info}
        )
    average = net().eval()
    average.load_state_dict(found.average(twa.averages.uniform(STEPS)))
    x = torch.randn(8, 6)
    model.eval()
    live = model(x)
    with recorder.averaged("uniform"):
        assert torch.equal(model(x), average(x))
    assert torch.equal(model(x), live) and not torch.equal(live, average(x))
    recorder.save(tmp_path / "uniform.safetensors", "uniform")
    for granularity in ("tensor", "block", 128):
        labels = {}
        for name, m in (("mine", model), ("plain", net())):
            subspace = twa.Subspace.from_candidates(
                m, found, basis="differences", granularity=granularity
            )
            folder = tmp_path / f"{name}-{granularity}"
            subspace.save(folder, basis=True)
            written = json.loads((folder / "coefficients.json").read_text())
            labels[name] = subspace.segments.labels, written["segments"], written["segment_of"]
        assert labels["mine"] == labels["plain"]
    for path in tmp_path.rglob("*.*"):
        assert b"_orig_mod" not in path.read_bytes(), path
    recorder.close()
    other = twa.Recorder(net(), every=1, path=tmp_path / "run", resume=True)
    assert other.count == STEPS and len(other) == STEPS


def test_compiled_after_the_recorder_was_made():
    """And an average swapped in and out compiles nothing anew."""
    model, counter = net(), CompileCounter()
    optimizer = adamw(model)
    recorder = attached(model, optimizer)
    fast = torch.compile(model, backend=counter)
    states = [{k: t.clone() for k, t in s.items()} for s in train(fast, optimizer, 4)]
    assert_recorded(recorder, states)
    x = torch.randn(8, 6)
    with torch.no_grad():
        live, frames = fast.eval()(x), None
        for _ in range(2):
            with recorder.averaged("uniform"):
                inside = fast(x)
            frames = frames or counter.frame_count
        assert torch.equal(fast(x), live) and not torch.equal(inside, live)
    assert counter.frame_count == frames


@pytest.mark.filterwarnings("error:Dynamo:UserWarning")  # of code that it cannot trace
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_steps(backend):
    """The recorder stays outside of what is compiled."""
    model = net()
    optimizer = adamw(model)
    recorder = attached(model, optimizer)
    states = train(model, optimizer, step=torch.compile(optimizer.step, backend=backend))
    assert_recorded(recorder, states)


# Optimizers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("scheduled", ["before", "after"])
def test_kernels_and_schedules(options, scheduled):
    """Schedulers put a step of their own into the optimizer, before or after it is attached."""
    model = net()
    optimizer = adamw(model, **options)
    if scheduled == "before":
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
    recorder = attached(model, optimizer)
    if scheduled == "after":
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
    states = []
    for k in range(STEPS):
        states += train(model, optimizer, 1, begin=k)
        schedule.step()
    assert_recorded(recorder, states)


def test_a_warm_up_that_begins_at_zero():
    """Its first step, which changes nothing, counts."""
    model = net()
    optimizer = adamw(model)
    recorder = attached(model, optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: k / 4)
    for k in range(3):
        train(model, optimizer, 1, begin=k)
        schedule.step()
    assert recorder.steps == [1, 2, 3]


def test_one_of_several_optimizers():
    model = net()
    body = torch.optim.SGD(model.layers.parameters(), lr=0.1, momentum=0.9)
    head = adamw(model.head)
    recorder, states = attached(model, head), []
    for k in range(STEPS):
        backward(model, k)
        body.step(), head.step()
        body.zero_grad(), head.zero_grad()
        states.append(state_of(model))
    assert_recorded(recorder, states, limit=0.01)


class Wrapper(torch.optim.Optimizer):
    """Around another optimizer, whose __init__ is not torch's. It leaves every second step out."""

    def __init__(self, optimizer):
        self.optimizer, self.calls = optimizer, 0

    def step(self, closure=None):
        self.calls += 1
        if self.calls % 2 == 0:
            self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


class Slow(torch.optim.Optimizer):
    """Around another optimizer, with hooks that nothing calls: halves the weights after a step."""

    def __init__(self, optimizer):
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self.inner, self.param_groups = optimizer, optimizer.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step(closure)
        for p in self.param_groups[0]["params"]:
            p /= 2

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)


def test_wrappers():
    model = net()
    wrapper = Wrapper(Wrapper(adamw(model)))
    recorder = attached(model, wrapper)
    states = train(model, wrapper, 8)
    assert recorder.count == 2
    assert_recorded(recorder, states[3::4])
    model = net()
    slow = Slow(adamw(model))
    recorder = attached(model, slow)
    assert_recorded(recorder, train(model, slow, 3), limit=0.03)
    assert recorder.count == 3


def test_what_cannot_be_attached():
    class Late(Slow):
        def step(self, closure=None):
            self.inner.step(closure)

    model = net()
    recorder, late = twa.Recorder(model, every=1), Late(adamw(model))
    torch.optim.lr_scheduler.LambdaLR(late, lambda k: 1.0)
    for optimizer, name in ((late, "Late"), (model, "Net"), (Wrapper(model), "Wrapper")):
        with pytest.raises(TwaError, match=f"found {name}: attach before a scheduler is made, or"):
            recorder.attach(optimizer)
    model.head = nn.Linear(6, 4)
    with pytest.raises(TwaError, match=r"'head.weight': expected \[3, 6\]"):
        recorder.attach(adamw(model))


class Whole(torch.optim.AdamW):
    """It pickles and copies all that it has, its hooks, too."""

    def __getstate__(self):
        return dict(self.__dict__)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, Whole])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_the_optimizer(kind, way):
    """They count for no recorder, and neither it nor the model is in them."""
    sizes = []
    for record in (False, True):
        model = net()
        optimizer = kind(model.parameters(), lr=0.01)
        recorder = attached(model, optimizer) if record else None
        train(model, optimizer, 2)
        if way == "deepcopy":
            made = copy.deepcopy(optimizer)
        elif way == "pickle":
            data = pickle.dumps(optimizer)
            made = pickle.loads(data)
        else:
            file = io.BytesIO()
            torch.save(optimizer, file)
            data = file.getvalue()
            made = torch.load(io.BytesIO(data), weights_only=False)
        sizes.append(0 if way == "deepcopy" else len(data))
        made.step()
    assert recorder.count == 2
    train(model, optimizer, 1)
    assert recorder.count == 3
    assert sizes[1] - sizes[0] < 200


class ScheduleFree(torch.optim.Optimizer):
    """As schedule-free SGD: trains at y, between an average x and z; eval() puts x into the model.

    x = y + (1 - 1 / beta) * (z - y)
    """

    BETA = 0.9

    def __init__(self, params, lr=0.5):
        super().__init__(params, {"lr": lr})
        self.steps, self.training = 0, True

    @torch.no_grad()
    def step(self, closure=None):
        assert self.training
        self.steps += 1
        for group in self.param_groups:
            for y in group["params"]:
                z = self.state[y].setdefault("z", y.clone())
                x = y.lerp(z, 1 - 1 / self.BETA)
                z -= group["lr"] * y.grad
                x += (z - x) / self.steps
                y.copy_(self.BETA * x + (1 - self.BETA) * z)

    @torch.no_grad()
    def swap(self, weight):
        self.training = not self.training
        for group in self.param_groups:
            for p in group["params"]:
                p.lerp_(self.state[p]["z"], weight)

    def eval(self):
        self.swap(1 - 1 / self.BETA)

    def train(self):
        self.swap(1 - self.BETA)


@pytest.mark.parametrize("of", ["training", "evaluation"])
def test_schedule_free_optimizers(of):
    """Recorded are the weights of the training, or with weights= those of the evaluation."""
    model = net()
    optimizer = ScheduleFree(model.parameters())

    def evaluated(name, p):
        return p.lerp(optimizer.state[p]["z"], 1 - 1 / optimizer.BETA)

    weights = evaluated if of == "evaluation" else None
    recorder = attached(model, optimizer, weights=weights, bits=8)
    states = {"training": [], "evaluation": []}
    for k in range(STEPS):
        states["training"] += train(model, optimizer, 1, begin=k)
        optimizer.eval()
        states["evaluation"].append(state_of(model))
        with recorder.averaged("uniform"):
            pass
        assert_same(state_of(model), states["evaluation"][-1])
        optimizer.train()
    (other,) = states.keys() - {of}
    found = [s["head.weight"] for s in snapshots(recorder)]
    right, wrong = ([s["head.weight"] for s in states[kind]] for kind in (of, other))
    for k in range(1, STEPS):  # after the first step both are the same
        assert (found[k] - right[k]).norm() < 0.5 * (found[k] - wrong[k]).norm(), k


# Lightning Fabric ---------------------------------------------------------------------------------


def test_fabric(tmp_path):
    """The optimizer and the model as Fabric wraps them; the recorder in its checkpoints."""
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)

    def begin():
        model = net()
        model, optimizer = fabric.setup(model, adamw(model))
        return model, optimizer, attached(model, optimizer)

    def train(model, optimizer, begin):
        states = []
        for k in range(begin, begin + 4):
            g = torch.Generator().manual_seed(k)
            fabric.backward(model(torch.randn(8, 6, generator=g)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            states.append(state_of(model))
        return states

    model, optimizer, recorder = begin()
    states = train(model, optimizer, 0)
    kept = {"model": model, "optimizer": optimizer, "recorder": recorder}
    fabric.save(tmp_path / "checkpoint.pt", kept)
    states += train(model, optimizer, 4)
    assert_recorded(recorder, states)
    model, optimizer, other = begin()
    fabric.load(
        tmp_path / "checkpoint.pt", {"model": model, "optimizer": optimizer, "recorder": other}
    )
    assert other.count == 4
    train(model, optimizer, 4)
    for mine, theirs in zip(snapshots(other), snapshots(recorder), strict=True):
        assert_same(mine, theirs)


# An average in the model --------------------------------------------------------------------------


def test_no_average_before_the_first_snapshot():
    """The model is as it is, and a warning says so; it cannot be moved to an average."""
    model = net()
    optimizer = adamw(model)
    recorder, before = attached(model, optimizer, every=3), state_of(model)
    assert recorder and len(recorder) == 0  # as in `if recorder: recorder.step()`
    with pytest.raises(TwaError, match="there is no snapshot yet"):
        recorder.apply("uniform")
    with pytest.warns(CandidateWarning, match="no snapshot yet"), recorder.averaged("uniform"):
        assert_same(state_of(model), before)
    train(model, optimizer, 2)
    with pytest.raises(TwaError, match="there is no snapshot yet"):
        recorder.beta("uniform")
    train(model, optimizer, 1)
    with recorder.averaged("uniform"):
        pass


@pytest.mark.parametrize("end", ["normal", "error", "interrupt", "return"])
def test_a_checkpoint_while_an_average_is_in_the_model(end, tmp_path):
    """A file that is saved inside has the average; however it ends, training goes on unchanged."""
    results = []
    for inside in (False, True):
        model = net()
        optimizer = adamw(model)
        recorder = attached(model, optimizer)
        train(model, optimizer, 3)

        def evaluate(recorder=recorder, model=model):
            with recorder.averaged("uniform"), recorder.averaged("lawa", last=2):
                torch.save(model.state_dict(), tmp_path / "inside.pt")
                model.layers[0].norm.running_mean.add_(1)
                if end == "error":
                    raise ZeroDivisionError
                if end == "interrupt":
                    raise KeyboardInterrupt
                if end == "return":
                    return

        if inside:
            live = state_of(model)
            with contextlib.suppress(ZeroDivisionError, KeyboardInterrupt):
                evaluate()
            assert_same(state_of(model), live)
            beta = recorder.beta("lawa", last=2)
            expected = recorder.recording().average(beta)
            assert_same(torch.load(tmp_path / "inside.pt"), expected)
        train(model, optimizer, 3, begin=3)
        results.append((state_of(model), snapshots(recorder)))
    assert_same(results[0][0], results[1][0])
    for mine, theirs in zip(results[0][1], results[1][1], strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize("order", ["outside", "inside"])
def test_inference_mode(order):
    """Evaluation without gradients, around an average or in it; training goes on afterwards."""
    model = net()
    optimizer = adamw(model)
    recorder = attached(model, optimizer)
    train(model, optimizer, 3)
    live, x = state_of(model), torch.randn(8, 6)
    contexts = [torch.inference_mode(), recorder.averaged("uniform")]
    with contextlib.ExitStack() as stack:
        for context in contexts if order == "outside" else reversed(contexts):
            stack.enter_context(context)
        model(x)
    assert_same(state_of(model), live)
    train(model, optimizer, 2, begin=3)
    assert recorder.steps == [1, 2, 3, 4, 5]
