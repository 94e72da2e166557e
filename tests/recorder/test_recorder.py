"""twa.Recorder while a model is trained, in memory and in files: what it records, what it leaves
out, what it leaves alone, and averages of it.
"""

import contextlib
import copy
import gc
import os
import pickle
import random
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import twa
from conftest import BITS
from safetensors.torch import load_file
from states import assert_same
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from twa import averages
from twa.io import recording_files
from twa.io.errors import CandidateWarning, StateError, TwaError
from twa.recorder import store

import twa_kernels as tk

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("memory", "files")
#: scheme and its horizon, and the merge weights that it is for snapshots of steps 0, 2, 4, 6
SCHEMES = {
    "uniform": ({}, [0.25, 0.25, 0.25, 0.25]),
    "last": ({}, [0, 0, 0, 1]),
    "lawa": ({"last": 4}, [0, 0, 0.5, 0.5]),
    "ema": ({"half_life": 2}, [0.125, 0.125, 0.25, 0.5]),
    "wsm": ({"last": 6, "decay": "linear"}, [0, 1 / 3, 1 / 3, 1 / 3]),
}
#: largest error of a decoded snapshot, as a share of the difference that was coded
SHARES = {8: 0.02, 4: 0.15, 3: 0.3, 2: 0.6, 1: 1.0}


class Net(nn.Module):
    """A matrix, a BatchNorm, buffers that change and that do not."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(9, 20), nn.BatchNorm1d(20)
        self.last = nn.Linear(20, 3, bias=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.zeros(5), persistent=False)

    def forward(self, x):
        self.calls += 1
        return self.last(torch.tanh(self.norm(self.first(x))))


def net(make=Net, seed=0):
    torch.manual_seed(seed)
    return make()


@torch.no_grad()
def move(model, seed, step=0.05):
    """One step of a run: the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p += step * torch.randn(p.shape, generator=g).to(p.dtype)
    for name, b in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            b += torch.rand(b.shape, generator=g)
        elif name.endswith(("calls", "num_batches_tracked")):
            b += 1


def recorder_of(kind, model, tmp_path, **options):
    path = tmp_path / "run" if kind == "files" else None
    return twa.Recorder(model, **{"every": 1, "path": path} | options)


def state_of(model):
    return {k: t.detach().clone() for k, t in model.state_dict().items()}


def recorded(recorder, count=4, begin=0):
    """The states of so many snapshots that were taken; steps 0, 2, 4, ..."""
    states = []
    for k in range(begin, begin + count):
        move(recorder.model, k)
        assert recorder.record(2 * k)
        states.append(state_of(recorder.model))
    return states


def chain(states, names, bits):
    """The decoded snapshots, by the reference backend alone."""
    first = [states[0][n] for n in names]
    reference = [(w if w.dim() < 2 else w.to(torch.bfloat16)).float().contiguous() for w in first]
    rows = [dict(zip(names, [r.clone() for r in reference], strict=True))]
    for state in states[1:]:
        tk.record([state[n] for n in names], reference, bits, backend="reference")
        rows.append(dict(zip(names, [r.clone() for r in reference], strict=True)))
    return rows


def snapshots(source):
    """key -> tensor of each candidate."""
    found = source.recording() if isinstance(source, twa.Recorder) else twa.Candidates(source)
    return [{key: c.tensor(key).clone() for key in c.info} for c in found]


@contextlib.contextmanager
def warned(*texts):
    """Exactly these warnings, in this order: beginnings of them."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", CandidateWarning)
        yield
    found = [str(w.message) for w in seen if issubclass(w.category, CandidateWarning)]
    assert len(found) == len(texts), found
    for text, message in zip(texts, found, strict=True):
        assert text in message, message


# What is recorded --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_snapshots(kind, bits, tmp_path):
    recorder = recorder_of(kind, net(), tmp_path, bits=bits)
    states = recorded(recorder, 6)
    names = [n for n, _ in recorder.model.named_parameters()]
    expected, found = chain(states, names, bits), snapshots(recorder)
    assert recorder.steps == [0, 2, 4, 6, 8, 10] and len(recorder) == 6
    assert [c.name for c in recorder.recording()] == [f"step_{2 * k}" for k in range(6)]
    for k, (mine, theirs, state) in enumerate(zip(found, expected, states, strict=True)):
        assert mine.keys() == state.keys()
        for key, t in state.items():
            if key not in names:
                assert torch.equal(mine[key], t), key
            elif kind == "files" or k == 5:  # the reference's own bits
                assert torch.equal(mine[key], theirs[key]), key
            else:
                torch.testing.assert_close(mine[key], theirs[key], rtol=1e-6, atol=1e-6)
        if k:
            w, before, after = (
                torch.cat([s[n].flatten() for n in names]) for s in (state, expected[k - 1], mine)
            )
            assert (after - w).norm() <= SHARES[bits] * (w - before).norm()
    for k, e in enumerate(recorder._watched.contents.trained):
        assert torch.equal(recorder._reference[k], found[-1][e.key])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_averages(scheme, tmp_path):
    """beta, apply, averaged, save and subspace agree, in memory and in files."""
    horizon, weights = SCHEMES[scheme]
    beta = torch.tensor(weights, dtype=torch.float64)
    results = []
    for kind in KINDS:
        model = net()
        recorder = recorder_of(kind, model, tmp_path)
        recorded(recorder)
        live = state_of(model)
        torch.testing.assert_close(recorder.beta(scheme, **horizon), beta)
        expected = recorder.recording().average(recorder.beta(scheme, **horizon))
        with recorder.averaged(scheme, **horizon):
            assert_same(state_of(model), expected)
        assert_same(state_of(model), live)
        recorder.save(tmp_path / f"{kind}.safetensors", scheme, **horizon)
        assert_same(load_file(tmp_path / f"{kind}.safetensors"), expected)
        recorder.apply(scheme, **horizon)
        assert_same(state_of(model), expected)
        subspace = recorder.subspace(center=recorder.beta(scheme, **horizon))
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(subspace.merge_weights()[:, 0], beta, rtol=0, atol=1e-6)
        results.append(expected)
    for key, t in results[0].items():
        torch.testing.assert_close(t, results[1][key], rtol=1e-6, atol=1e-6)
    recorder.save(tmp_path / "half.safetensors", scheme, dtype=torch.bfloat16, **horizon)
    found = load_file(tmp_path / "half.safetensors")
    assert found["first.weight"].dtype == torch.bfloat16 and found["calls"].dtype == torch.int64
    with pytest.raises(TwaError, match="expected one of last, uniform, ema, lawa, wsm"):
        recorder.apply("mean")


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_snapshot(kind, tmp_path):
    recorder = recorder_of(kind, net(), tmp_path / "run")
    for use in (
        lambda: recorder.apply("uniform"),
        lambda: recorder.save(tmp_path / "out.safetensors", "uniform"),
        recorder.recording,
        recorder.subspace,
    ):
        with pytest.raises(TwaError, match="there is no snapshot yet"):
            use()


def test_merge_weights_of_ones_own(tmp_path):
    recorder = recorder_of("memory", net(), tmp_path)
    recorded(recorder)
    beta = torch.tensor([1.5, 0.0, 0.0, -0.5])
    recorder.apply(beta)
    assert_same(state_of(recorder.model), recorder.recording().average(beta))
    for bad in (torch.ones(4), [0.5] * 4, torch.full((4,), torch.nan)):
        with pytest.raises(TwaError, match="merge weights that sum to 1"):
            recorder.apply(bad)
    for bad in (torch.tensor([1.0]), [0.5, 0.5], (1.0,), 3, None, {"a": 1.0}, ["uniform"]):
        with pytest.raises(TwaError, match="one for each candidate"):
            recorder.apply(bad)


@pytest.mark.parametrize("form", [list, tuple, torch.tensor])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_weights_in_any_form(kind, form, tmp_path):
    recorder = recorder_of(kind, net(), tmp_path)
    recorded(recorder)
    weights = form([0.25, 0.75])
    beta = torch.tensor([0.25, 0.75, 0.0, 0.0], dtype=torch.float64)
    until = recorder.steps[1]
    assert torch.equal(recorder.beta(weights, until=until), beta)
    expected = recorder.recording().average(beta)
    with recorder.averaged(weights, until=until):
        assert torch.equal(recorder.model.first.weight, expected["first.weight"])
    recorder.save(tmp_path / "out.safetensors", form(beta.tolist()))
    assert_same(load_file(tmp_path / "out.safetensors"), expected)


def test_files_are_read_once(tmp_path, monkeypatch):
    """The headers of a recording of months are many."""
    recorder, read = recorder_of("files", net(), tmp_path / "run"), []
    recorded(recorder)
    recorder.flush()
    original = recording_files.read_header

    def read_header(path):
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(recording_files, "read_header", read_header)

    def averaged():
        with recorder.averaged("uniform"):
            pass

    for use in (
        averaged,
        lambda: recorder.apply("uniform"),
        lambda: recorder.save(tmp_path / "out.safetensors", "uniform"),
    ):
        read.clear()
        use()
        assert len(read) == len(set(read)) == 4, read


def test_buffers_are_written_once(tmp_path):
    """Again only when they change; masks with -Inf and flags survive an average."""
    model = net()
    recorder = recorder_of("files", model, tmp_path)
    recorded(recorder)
    model.flags[:] = False
    move(model, 9)
    recorder.record(20)
    recorder.state_dict()  # waits for the disk
    files = {p.name: set(load_file(p)) for p in (tmp_path / "run").glob("*.safetensors")}
    assert {"state.mask", "state.flags", "state.calls"} < files["anchor_0.safetensors"]
    changing = {f"state.norm.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert files["step_2.safetensors"] == {"codes", "scales", "state.calls", *changing}
    assert files["step_20.safetensors"] == files["step_2.safetensors"] | {"state.flags"}
    assert not any("scratch" in name for names in files.values() for name in names)
    recorder.apply("uniform")
    assert torch.equal(model.mask, Net().mask) and not model.flags.any() and model.calls == 5


def test_batchnorm_is_measured_inside(tmp_path):
    """update_bn inside averaged() leaves nothing behind."""
    model = net()
    recorder = recorder_of("memory", model, tmp_path)
    recorded(recorder)
    live = state_of(model)
    data = [torch.randn(8, 9) for _ in range(3)]
    with recorder.averaged("uniform"):
        before = model.norm.running_mean.clone()
        twa.update_bn(data, model)
        assert not torch.equal(model.norm.running_mean, before)
    assert_same(state_of(model), live)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 6), nn.Linear(6, 12, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("here", torch.zeros(2))
        self.register_buffer("there", self.here)


@pytest.mark.parametrize("kind", KINDS)
def test_tied_weights(kind, tmp_path):
    model = net(Tied)
    recorder = recorder_of(kind, model, tmp_path)
    recorded(recorder)
    if kind == "files":
        keys = set(load_file(tmp_path / "run" / "anchor_0.safetensors"))
        assert keys == {"weights.embed.weight", "state.here"}
    for found in snapshots(recorder):
        assert torch.equal(found["embed.weight"], found["head.weight"])
        net(Tied, 1).load_state_dict(found, strict=True)
    average = recorder.recording().average(averages.uniform(4))
    net(Tied, 1).load_state_dict(average, strict=True)
    recorder.save(tmp_path / "new" / "x.safetensors", "uniform")
    assert_same(load_file(tmp_path / "new" / "x.safetensors"), average)
    with pytest.raises(TwaError, match=r"x\.pt: expected a name that ends in \.safetensors"):
        recorder.save(tmp_path / "x.pt", "uniform")
    recorder.apply("uniform")
    assert model.head.weight is model.embed.weight
    assert_same(state_of(model), average)
    assert recorder.subspace().merge_weights().shape[0] == 4


@pytest.mark.parametrize("few", [True, False])
def test_frozen_parameters(few, tmp_path):
    """Kept once if they are fewer than the trained ones; else the model's own stay."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4 if few else 40))
    (model[0] if few else model[1]).requires_grad_(False)
    model[0 if few else 1].bias.requires_grad_(few)  # what a name says is of no account
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    recorder = recorder_of("files", model, tmp_path)
    recorded(recorder, 3)
    recorder.close()
    written = [load_file(p) for p in sorted((tmp_path / "run").glob("*.safetensors"))]
    for name in frozen:
        assert [f"state.{name}" in f for f in written] == [few, False, False]
        assert all((name in c) == few for c in snapshots(tmp_path / "run"))
    other = net(lambda: copy.deepcopy(model))
    with torch.no_grad():
        for name in frozen:
            other.get_parameter(name).fill_(7.0)
    for name, p in other.named_parameters():
        p.requires_grad_(name not in frozen)
    subspace = twa.Subspace.from_candidates(other, twa.Candidates(tmp_path / "run"), bits=4)
    assert set(subspace.key_map.trained) == {n for n in state_of(model) if n not in frozen}
    kept = dict(model.named_parameters())
    for name in frozen:
        expected = kept[name] if few else torch.full_like(kept[name], 7.0)
        assert torch.equal(other.get_parameter(name), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(kind, dtype, tmp_path):
    """Candidates and averages have the model's dtype; half precision is warned of."""
    model = net().to(dtype)
    recorder = recorder_of(kind, model, tmp_path, bits=8)
    half = dtype != torch.float64
    with warned(*[f"recorded in {dtype}, in which small steps"] * half):
        states = recorded(recorder)
    for found, state in zip(snapshots(recorder), states, strict=True):
        assert all(found[key].dtype == t.dtype for key, t in state.items())
        w = found["first.weight"].double() - state["first.weight"].double()
        assert w.abs().max() < 0.02
    expected = recorder.recording().average(averages.uniform(4))
    recorder.apply("uniform")
    assert_same(state_of(model), expected)


@pytest.mark.parametrize("way", ["weights", "master", "fp32_param"])
def test_masters(way, tmp_path):
    """bfloat16 weights that do not move; float32 masters that do."""
    model = nn.Linear(6, 5).bfloat16()
    masters = {n: p.detach().float().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    weights = (lambda name, p: masters[name]) if way == "weights" else None
    recorder = recorder_of("files", model, tmp_path, bits=8, weights=weights)
    recorder.attach(optimizer)
    for name, p in model.named_parameters():
        p.grad = torch.zeros_like(p)
        if way != "weights":
            optimizer.state[p][way] = masters[name]
    with warned():
        for _ in range(4):
            for w in masters.values():
                w += 1e-4
            optimizer.step()
    first, *_, last = snapshots(recorder)
    recorder.save(tmp_path / "x.safetensors", "last", dtype=torch.float32)
    found = load_file(tmp_path / "x.safetensors")
    for name, w in masters.items():
        assert last[name].dtype == torch.bfloat16
        assert torch.equal(last[name], recorder._reference[list(masters).index(name)].bfloat16())
        assert (recorder._reference[list(masters).index(name)] - w).abs().max() < 2e-5
        assert found[name].dtype == torch.float32 and first[name].shape == w.shape


def test_weights_that_do_not_fit(tmp_path):
    for bad, said in (
        (None, "expected a tensor, found None"),
        (torch.zeros(3), r"expected floating-point numbers of shape \[5, 6\]"),
        (torch.zeros(5, 6, dtype=torch.int64), "found torch.int64"),
    ):
        recorder = recorder_of("memory", nn.Linear(6, 5), tmp_path, weights=lambda n, p, b=bad: b)
        with pytest.warns(CandidateWarning, match=said):
            assert not recorder.record(0)


class Odd(nn.Module):
    """Strides, sizes and dtypes that are rare."""

    def __init__(self):
        super().__init__()
        self.turned = nn.Parameter(torch.randn(30, 7).T)
        self.conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
        self.part = nn.Parameter(torch.randn(20, 20)[3:9, ::2])
        self.none, self.flat = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(3, 0))
        self.one, self.scalar = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(()))
        for name, t in {
            "complex": torch.randn(3, dtype=torch.complex64),
            "eighth": torch.ones(3).to(torch.float8_e4m3fn),
            "short": torch.arange(3, dtype=torch.int16),
            "empty": torch.zeros(0, 2),
            "turned_too": torch.randn(3, 4).T,
        }.items():
            self.register_buffer(name, t)
        self.register_buffer("nothing", None)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_tensors(kind, tmp_path):
    model = net(Odd)
    strides = {n: p.stride() for n, p in model.named_parameters()}
    recorder = recorder_of(kind, model, tmp_path)
    states = recorded(recorder)
    found = snapshots(recorder)
    names = [n for n, _ in model.named_parameters()]
    for mine, theirs in zip(found, chain(states, names, 4), strict=True):
        for name in names:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-6, atol=1e-6)
    own = {"eighth": model.eighth}  # no candidate may have 8-bit floats
    with recorder.averaged("last"):
        assert_same(state_of(model), found[-1] | own)
    assert_same(state_of(model), states[-1])
    assert {n: p.stride() for n, p in model.named_parameters()} == strides


class Merging(nn.Linear):
    """Merges its factors into its weight while it is in evaluation mode."""

    def __init__(self):
        super().__init__(6, 6)
        self.a, self.b = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.a @ self.b
            self.merged = not mode
        return self


def test_modules_that_merge_their_weights(tmp_path):
    """What is recorded and averaged are the weights that files hold."""
    model, other = nn.Sequential(net(Merging)), nn.Sequential(net(Merging))
    recorders = [recorder_of("memory", m, tmp_path) for m in (model, other)]
    for k in range(3):
        for recorder in recorders:
            move(recorder.model, k)
        model.eval()
        for recorder in recorders:
            recorder.record(k)
        assert not model[0].training
        model.train()
    for mine, theirs in zip(*map(snapshots, recorders), strict=True):
        for key, t in theirs.items():
            torch.testing.assert_close(mine[key], t, rtol=1e-5, atol=1e-5)
    model.eval()
    merged = model[0].weight.detach().clone()
    with recorders[0].averaged("uniform"), recorders[1].averaged("uniform"):
        other.eval()
        x = torch.randn(4, 6)
        torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model[0].weight, merged)
    assert model[0].merged


PARAMETRIZED = {
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6))),
    "spectral_norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 6))),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6))),
}


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrizations(name, tmp_path):
    model = net(PARAMETRIZED[name])
    recorder = recorder_of("files", model, tmp_path)
    recorded(recorder)
    model.eval()  # the power method goes on while it trains
    live, x = model[0].weight.detach().clone(), torch.randn(3, 6)
    with recorder.averaged("uniform"):
        inside = model(x)
        assert not torch.equal(model[0].weight, live)
    assert torch.equal(model[0].weight, live)
    fresh = net(PARAMETRIZED[name]).eval()
    twa.Subspace.from_candidates(fresh, recorder.recording(), center="mean", basis="differences")
    torch.testing.assert_close(fresh(x), inside, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrap", ["compile", "data_parallel", "averaged_model"])
def test_wrapped_models(wrap, tmp_path):
    """The recording is the same with a wrapper and without."""
    wraps = {
        "compile": lambda m: torch.compile(m, backend="eager"),
        "data_parallel": nn.DataParallel,
        "averaged_model": AveragedModel,
    }
    plain, model = net(), wraps[wrap](net())
    recorder = recorder_of("files", model, tmp_path / "a")
    other = recorder_of("files", plain, tmp_path / "b")
    recorded(recorder), recorded(other)
    found, expected = snapshots(recorder), snapshots(other)
    for mine, theirs in zip(found, expected, strict=True):
        mine.pop("n_averaged", None)
        assert_same(mine, theirs)
    recorder.apply("uniform"), other.apply("uniform")
    inner = model.module if hasattr(model, "module") else model._orig_mod
    assert_same(state_of(inner), state_of(plain))


def test_what_cannot_be_recorded(tmp_path):
    frozen = nn.Linear(2, 2).requires_grad_(False)
    half = nn.ParameterList([torch.randn(2, dtype=torch.complex64)])
    sparse = nn.ParameterList([nn.Parameter(torch.eye(3).to_sparse())])
    for model, said in (
        (nn.ReLU(), "no trainable parameter"),
        (frozen, "no trainable parameter"),
        (nn.LazyLinear(3), "'weight' has no shape yet: run a batch"),
        (nn.Linear(3, 3, device="meta"), "'weight' is on the meta device"),
        (half, "'0': expected a dense floating-point parameter, found torch.complex64"),
        (sparse, "'0': expected a dense floating-point parameter, .*sparse_coo"),
    ):
        with pytest.raises(TwaError, match=said):
            recorder_of("files", model, tmp_path)
    assert not (tmp_path / "run").exists()
    lazy = nn.LazyLinear(3)
    lazy(torch.ones(2, 4))
    assert recorder_of("memory", lazy, tmp_path).record(0)


def test_options(tmp_path):
    for options, said in (
        ({"every": 0}, "every: expected a whole number of at least 1"),
        ({"every": 1.0}, "every: .*found 1.0"),
        ({"start": -1}, "start: "),
        ({"keep": 1}, "keep: expected a whole number of at least 2"),
        ({"bits": 5}, "bits: expected one of"),
        ({"bits": 4.0}, "bits: expected one of"),
        ({"bits": True}, "bits: expected one of"),
        ({"resume": True}, "expected path="),
    ):
        with pytest.raises(TwaError, match=said):
            twa.Recorder(net(), **{"every": 1} | options)
    recorder = twa.Recorder(net(), every=1)
    for step in (-1, 10**18, 2.0, "3", True):
        with pytest.raises(TwaError, match="step: expected a whole number"):
            recorder.record(step)


# While training ----------------------------------------------------------------------------------


def optimizer_of(name, model):
    return {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
        "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    }[name](list(model.parameters()))


def train(model, optimizer, steps, scaler=None, begin=0):
    for k in range(begin, begin + steps):
        g = torch.Generator().manual_seed(k)
        x = torch.randn(6, 9, generator=g)

        def closure(x=x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
            continue
        closure()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["sgd", "adamw", "lbfgs"])
def test_training_is_left_alone(kind, rule, tmp_path):
    """Weights, buffers, gradients, modes and random numbers have the same bits without it."""
    results = []
    for record in (True, False):
        model = net()
        optimizer = optimizer_of(rule, model)
        model.first.eval()
        random.seed(0)
        if record:
            recorder = recorder_of(kind, model, tmp_path, every=2)
            recorder.attach(optimizer)
        train(model, optimizer, 7)
        if record:
            with recorder.averaged("uniform"):
                pass
            recorder.state_dict()
            assert recorder.steps == [2, 4, 6] and recorder.count == 7
        train(model, optimizer, 2, begin=7)
        modes = [m.training for m in model.modules()]
        grads = {f"{n}.grad": p.grad for n, p in model.named_parameters()}
        drawn = (torch.rand(()).item(), random.random())
        results.append((state_of(model) | grads, modes, drawn))
    assert_same(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


def test_every_and_start(tmp_path):
    for every, start, expected in (
        (3, 0, [3, 6, 9]),
        (3, 2, [2, 5, 8]),
        (4, 5, [5, 9]),
        (1, 0, list(range(1, 11))),
        (2, 11, []),
    ):
        recorder = twa.Recorder(net(), every=every, start=start)
        assert [k for k in range(1, 11) if recorder.step()] == expected == recorder.steps
        assert recorder.count == 10


def test_grad_scaler_and_handles(tmp_path):
    """A step that the scaler leaves out does not count; nor does one after remove()."""
    model = net()
    optimizer, other = optimizer_of("sgd", model), optimizer_of("adamw", model)
    recorder = twa.Recorder(model, every=1)
    handle = recorder.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    train(model, optimizer, 2, scaler)
    assert recorder.steps == [1, 2]
    scaler.scale(model(torch.ones(6, 9)).sum() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert recorder.count == 2
    train(model, other, 2)
    assert recorder.count == 2
    handle.remove()
    train(model, optimizer, 2)
    assert recorder.count == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_twice(kind, tmp_path):
    recorder = recorder_of(kind, net(), tmp_path)
    states = recorded(recorder, 3)
    for step in (4, 3, 0):
        move(recorder.model, 50 + step)
        with warned(f"step {step} is not recorded: the last snapshot is of step 4; rewind()"):
            assert not recorder.record(step)
    assert recorder.steps == [0, 2, 4]
    recorder.model.load_state_dict(states[-1])
    recorded(recorder, 2, begin=3)
    other = recorder_of("memory", net(), tmp_path)
    recorded(other, 5)
    for mine, theirs in zip(recorder._reference, other._reference, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 2.0**127])
def test_weights_that_are_not_finite(kind, value, tmp_path):
    """They are named, and all else is as in a run where this record was never called."""
    results = []
    for bad in (True, False):
        recorder = recorder_of(kind, net(), tmp_path / str(bad))
        states = []
        for k in range(-1, 4):
            move(recorder.model, k + 1)
            if k in (-1, 1):
                w = recorder.model.last.weight
                before = w.detach().clone()
                with torch.no_grad():
                    w[1, :2] = value
                said = f"step {k + 1} is not recorded: 'last.weight' has 2 NaN or Inf of 60 weights"
                if bad:
                    with warned(said):
                        assert not recorder.record(k + 1)
                with torch.no_grad():
                    w.copy_(before)
            else:
                assert recorder.record(k + 1)
                states.append(state_of(recorder.model))
        assert recorder.steps == [1, 3, 4]
        results.append(snapshots(recorder))
    for mine, theirs in zip(*results, strict=True):
        assert_same(mine, theirs)


def test_a_restart_from_an_older_checkpoint(tmp_path):
    """A jump without rewind() is a large difference, which the next ones mend."""
    recorder = recorder_of("memory", net(), tmp_path, bits=4)
    recorded(recorder, 3)
    recorder.model.load_state_dict(state_of(net(seed=1)))
    for k in range(8):
        assert recorder.record(10 + k)
    last = snapshots(recorder)[-1]
    for name, p in recorder.model.named_parameters():
        torch.testing.assert_close(last[name], p.detach(), rtol=0, atol=1e-5)


def changed(model, how):
    """What users do to models while they are trained."""
    if how == "gone":
        del model.last
    elif how == "resized":
        model.first = nn.Linear(9, 21)
    elif how == "merged":  # LoRA: other parameters, of other names
        model.first = nn.Sequential(nn.Linear(9, 20))
    elif how == "unfrozen":
        model.extra.requires_grad_(True)
    elif how == "added":
        model.more = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how, said",
    [
        ("gone", "'last.weight': expected [3, 20] as at the first snapshot, found none"),
        ("resized", "'first.weight': expected [20, 9] as at the first snapshot, found [21, 9]"),
        ("merged", "'first.weight': expected [20, 9] as at the first snapshot, found none"),
        ("unfrozen", "'extra' is trainable, and was not when the recorder was made"),
        ("added", "'more' is trainable, and was not when the recorder was made"),
    ],
)
def test_a_model_that_changes(kind, how, said, tmp_path):
    """The recording ends with a warning; what is there stays, and training goes on."""
    model = net()
    model.extra = nn.Parameter(torch.zeros(2), requires_grad=False)
    recorder = recorder_of(kind, model, tmp_path)
    recorded(recorder, 3)
    before = snapshots(recorder)
    changed(model, how)
    with warned(f"recording ends before step 6: {said}; make another Recorder"):
        assert not recorder.record(6)
    with warned():
        assert not recorder.record(8) and not recorder.step()
    for mine, theirs in zip(snapshots(recorder), before, strict=True):
        assert_same(mine, theirs)
    with pytest.raises(TwaError, match=said[:12]), recorder.averaged("uniform"):
        pass
    state = recorder.state_dict()
    recorder.close()
    if kind == "files" and how not in ("unfrozen", "added"):
        with pytest.raises(TwaError, match="another model or job: trained differs"):
            recorder_of(kind, model, tmp_path, resume=True)
    if kind == "memory" and how == "resized":
        with pytest.raises(StateError, match="another model"):
            recorder_of(kind, model, tmp_path).load_state_dict(state)


def test_a_frozen_layer_is_still_recorded(tmp_path):
    model = net()
    recorder = recorder_of("memory", model, tmp_path)
    recorded(recorder, 2)
    model.first.requires_grad_(False)
    recorded(recorder, 2, begin=2)
    found = snapshots(recorder)
    assert torch.equal(found[-1]["first.bias"], found[-1]["first.bias"])
    recorder.apply("uniform")
    assert not torch.equal(found[-1]["first.bias"], model.first.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_that_come_and_go(kind, tmp_path):
    """Those of another shape, or that are gone, stay the model's own."""
    model = net()
    model.register_buffer("queue", torch.zeros(2))
    model.register_buffer("gone", torch.zeros(2))
    recorder = recorder_of(kind, model, tmp_path)
    recorded(recorder, 2)
    model.queue, _ = torch.ones(5), delattr(model, "gone")
    model.register_buffer("new", torch.ones(1))
    recorded(recorder, 2, begin=2)
    recorder.apply("uniform")
    assert torch.equal(model.queue, torch.ones(5)) and torch.equal(model.new, torch.ones(1))
    found = snapshots(recorder)
    assert [c["queue"].shape[0] for c in found] == [2, 2, 5, 5]


# averaged() --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_recorded_inside(kind, tmp_path):
    """Nor counted, in a nested one either; exceptions bring the weights back."""
    model = net()
    recorder = recorder_of(kind, model, tmp_path)
    recorded(recorder)
    live = state_of(model)
    for call in (recorder.step, lambda: recorder.record(99)):
        with recorder.averaged("uniform"):
            refusal = pytest.raises(TwaError, match=r"leave averaged\(\) before training goes on")
            with recorder.averaged("last"), refusal:
                call()
            with pytest.raises(TwaError, match=r"leave averaged\(\)"):
                call()
    with pytest.raises(ZeroDivisionError), recorder.averaged("uniform"):
        model.norm.running_mean.zero_()
        recorder.apply("last")
        raise ZeroDivisionError
    assert_same(state_of(model), live)
    with pytest.raises(TwaError, match="expected half_life="), recorder.averaged("ema"):
        pass
    assert_same(state_of(model), live)
    assert recorder.count == 0 and recorder.record(99)


def test_a_checkpoint_inside(tmp_path):
    """state_dict() of the recorder does not depend on what is in the model, which it says."""
    recorder = recorder_of("memory", net(), tmp_path)
    recorded(recorder)
    with recorder.averaged("uniform"), warned("while the model holds an average"):
        state = recorder.state_dict()
    with warned():
        recorder.state_dict()
    other = recorder_of("memory", net(), tmp_path)
    other.load_state_dict(state)
    for mine, theirs in zip(snapshots(other), snapshots(recorder), strict=True):
        assert_same(mine, theirs)


# keep, rewind, resume, state ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [2, 3, 8])
def test_keep(kind, keep, tmp_path):
    """The newest, with the bits of a recording that keeps all."""
    recorder = recorder_of(kind, net(), tmp_path, keep=keep)
    whole = recorder_of("files", net(), tmp_path / "whole")
    for k in range(20):
        for r in (recorder, whole):
            move(r.model, k)
            if k == 15:
                r.model.flags[:] = False
            r.record(k)
        recorder.state_dict()  # waits for the disk
        kept = min(k + 1, keep)
        assert kept <= len(recorder) <= kept + (keep // 4 if kind == "files" else 0)
        assert recorder.steps == list(range(k + 1 - len(recorder), k + 1))
    found, expected = snapshots(recorder), snapshots(whole)[-len(recorder) :]
    for mine, theirs in zip(found, expected, strict=True):
        for key, t in theirs.items():
            if kind == "files":
                assert torch.equal(mine[key], t)
            else:
                torch.testing.assert_close(mine[key], t, rtol=1e-6, atol=1e-6)
    if kind == "files":
        recorder.close()
        files = sorted(p.name for p in (tmp_path / "run").glob("*.safetensors"))
        assert len(files) == len(found) and sum(f.startswith("anchor") for f in files) == 1


def same_files(a, b):
    """Whether two recordings have the same files, but for the name of the run."""
    names = sorted(p.name for p in a.glob("*.safetensors"))
    assert names == sorted(p.name for p in b.glob("*.safetensors"))
    for name in names:
        assert_same(load_file(a / name), load_file(b / name))
        sizes = [(f / name).stat().st_size for f in (a, b)]
        assert sizes[0] == sizes[1]


@pytest.mark.parametrize("keep", [None, 3])
@pytest.mark.parametrize("bits", [8, 2])
def test_resume(keep, bits, tmp_path):
    """Every few snapshots in a recorder of its own: the bits of an undisturbed recording."""
    options = {"bits": bits, "keep": keep}
    whole = recorder_of("files", net(), tmp_path / "whole", **options)
    recorded(whole, 11)
    whole.close()
    model = net()
    for begin, end in ((0, 1), (1, 2), (2, 5), (5, 9), (9, 11)):
        recorder = recorder_of("files", model, tmp_path, resume=True, **options)
        assert recorder.count == max(0, 2 * begin - 2)
        recorded(recorder, end - begin, begin)
        recorder.close()
        recorder.close()
    same_files(tmp_path / "run", tmp_path / "whole" / "run")
    recorder = recorder_of("files", model, tmp_path, resume=True, **options)
    for mine, theirs in zip(recorder._reference, whole._reference, strict=True):
        assert torch.equal(mine, theirs)


def test_what_cannot_be_resumed(tmp_path):
    recorder = recorder_of("files", net(), tmp_path)
    recorded(recorder)
    with pytest.raises(TwaError, match="another process records there"):
        recorder_of("files", net(), tmp_path, resume=True)
    recorder.close()
    for call in (recorder.state_dict, recorder.recording):
        call()
    for call in (lambda: recorder.rewind(2), lambda: recorder.load_state_dict({})):
        with pytest.raises(TwaError, match="the recorder is closed"):
            call()
    assert not recorder.record(99)
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    with pytest.raises(TwaError, match="holds a recording; pass resume=True"):
        recorder_of("files", net(), tmp_path)
    with pytest.raises(TwaError, match="holds a recording of 4 bits: expected 2"):
        recorder_of("files", net(), tmp_path, bits=2, resume=True)
    with pytest.raises(TwaError, match="another model or job: trained differs"):
        recorder_of("files", nn.Linear(3, 3), tmp_path, resume=True)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before
    assert recorder_of("files", net(), tmp_path, resume=True).steps == [0, 2, 4, 6]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", [6, 7, 2, 0, None])
def test_rewind(kind, to, tmp_path):
    """What comes after has the bits of a run that never went further; buffers too."""
    recorder, other = (recorder_of(kind, net(), tmp_path / n) for n in "ab")
    states = recorded(recorder, 6)
    kept = 0 if to is None else to // 2 + 1
    recorder.rewind(to)
    assert recorder.steps == [0, 2, 4, 6][:kept] and recorder.count == (to or 0)
    for r in (recorder, other):
        r.model.load_state_dict(net().state_dict())
        if r is other:
            recorded(r, kept)
        elif kept:
            r.model.load_state_dict(states[kept - 1])
    for r in (recorder, other):
        r.model.calls.fill_(6)  # what the last snapshot before rewind() had
        r.model.norm.running_mean.copy_(states[-1]["norm.running_mean"])
        recorded(r, 4, begin=kept)
    for mine, theirs in zip(snapshots(recorder), snapshots(other), strict=True):
        for key, t in theirs.items():
            if kind == "files":
                assert torch.equal(mine[key], t), key
            else:
                torch.testing.assert_close(mine[key], t, rtol=1e-5, atol=1e-5)
    if kind == "files":
        same_files(tmp_path / "a" / "run", tmp_path / "b" / "run")


@pytest.mark.parametrize("kind", KINDS)
def test_rewind_too_far(kind, tmp_path):
    recorder = recorder_of(kind, net(), tmp_path, keep=2)
    recorder.rewind(5)
    assert recorder.count == 5
    recorded(recorder, 6)
    with pytest.raises(TwaError, match="expected a step of at least 8"):
        recorder.rewind(3)
    assert recorder.steps == [8, 10]


@pytest.mark.parametrize("way", ["torch", "dcp"])
@pytest.mark.parametrize("kind", KINDS)
def test_state(way, kind, tmp_path):
    """A run that goes on from a checkpoint, after it went further: as if it had not."""
    model = net()
    recorder = recorder_of(kind, model, tmp_path, keep=9)
    states = recorded(recorder)
    recorder.count = 7
    state, before = recorder.state_dict(), snapshots(recorder)
    if way == "torch":
        torch.save({"recorder": state}, tmp_path / "c.pt")
    else:
        dcp.save({"recorder": recorder}, checkpoint_id=tmp_path / "c", no_dist=True)
    recorded(recorder, 2, begin=4)
    recorder.close()
    other = recorder_of(kind, net(seed=1), tmp_path, keep=9, resume=kind == "files")
    if way == "torch":
        other.load_state_dict(torch.load(tmp_path / "c.pt", weights_only=True)["recorder"])
    else:
        dcp.load({"recorder": other}, checkpoint_id=tmp_path / "c", no_dist=True)
    assert other.steps == [0, 2, 4, 6] and other.count == 7
    for mine, theirs in zip(snapshots(other), before, strict=True):
        assert_same(mine, theirs)
    other.model.load_state_dict(states[-1])
    recorded(other, 3, begin=4)
    whole = recorder_of(kind, net(), tmp_path / "whole")
    recorded(whole, 7)
    for mine, theirs in zip(snapshots(other), snapshots(whole), strict=True):
        assert_same(mine, theirs)


def test_states_of_others(tmp_path):
    empty = twa.Recorder(net(), every=1).state_dict()
    recorder = recorder_of("memory", net(), tmp_path)
    recorded(recorder)
    state = recorder.state_dict()
    files = recorder_of("files", net(), tmp_path)
    recorded(files)
    cases = [
        ("memory", {}, "expected the state of a Recorder"),
        ("memory", {"format": "twa-recorder-1"}, "has no 'run'"),
        ("memory", state | {"bits": 2}, "expected 4 bits, found 2"),
        ("memory", {k: v for k, v in state.items() if "rank" not in k}, "nothing of this rank"),
        ("memory", files.state_dict(), r"in files: pass path= and resume=True"),
        ("files", state, "holds another recording than the state's"),
    ]
    for kind, bad, said in cases:
        with pytest.raises(StateError, match=said):
            (recorder if kind == "memory" else files).load_state_dict(bad)
    with pytest.raises(StateError, match="another model"):
        twa.Recorder(nn.Linear(3, 4), every=1).load_state_dict(state)
    assert recorder.steps == files.steps == [0, 2, 4, 6]
    for r in (recorder, files):  # of before the first snapshot
        r.load_state_dict(empty)
        assert r.steps == [] and r.count == 0
        assert r.record(1)


def test_resume_when_snapshots_have_gone(tmp_path):
    recorder = recorder_of("files", net(), tmp_path)
    recorded(recorder)
    state = recorder.state_dict()
    recorder.close()
    (tmp_path / "run" / "step_4.safetensors").unlink()
    with warned("step_6.safetensors and what comes after it is left out: snapshot 2 is missing"):
        other = recorder_of("files", net(), tmp_path, resume=True)
    with pytest.raises(StateError, match="snapshots are missing"):
        other.load_state_dict(state)


# Copies, and ends --------------------------------------------------------------------------------


def test_copies_of_the_model_and_the_optimizer(tmp_path):
    """They are not recorded, and need no recorder."""
    model = net()
    optimizer = optimizer_of("adamw", model)
    recorder = recorder_of("files", model, tmp_path)
    recorder.attach(optimizer)
    train(model, optimizer, 2)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(state_of(made), state_of(model))
        train(made, optimizer_of("sgd", made), 1)
    copy.deepcopy(optimizer), pickle.dumps(optimizer)
    assert recorder.steps == [1, 2]


def test_two_recorders(tmp_path):
    model = net()
    optimizer = optimizer_of("sgd", model)
    a = recorder_of("memory", model, tmp_path, bits=8)
    b = recorder_of("files", model, tmp_path, every=2, bits=3)
    a.attach(optimizer), b.attach(optimizer)
    train(model, optimizer, 4)
    assert a.steps == [1, 2, 3, 4] and b.steps == [2, 4]
    with a.averaged("uniform"), b.averaged("last"):
        pass
    other = net()
    optimizer = optimizer_of("sgd", other)
    alone = recorder_of("files", other, tmp_path / "alone", every=2, bits=3)
    alone.attach(optimizer)
    train(other, optimizer, 4)
    b.close(), alone.close()
    same_files(tmp_path / "run", tmp_path / "alone" / "run")


def test_a_recorder_that_is_dropped(tmp_path):
    """What it was given is written; the directory is free again."""
    model, others = net(), set(threading.enumerate())
    recorder = recorder_of("files", model, tmp_path)
    states = recorded(recorder)
    mine = set(threading.enumerate()) - others
    assert mine
    del recorder
    gc.collect()
    for thread in mine:
        thread.join()
    recorder = recorder_of("files", model, tmp_path, resume=True)
    assert recorder.steps == [0, 2, 4, 6]
    assert torch.equal(snapshots(recorder)[-1]["calls"], states[-1]["calls"])


def test_close_frees_the_directory_though_workers_live(tmp_path):
    """Processes that were forked meanwhile, as DataLoaders do, have its files open."""
    recorder = recorder_of("files", net(), tmp_path)
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(writing)
        os.read(reading, 1)  # until the parent closes its end
        os._exit(0)
    try:
        recorder.close()
        assert recorder_of("files", net(), tmp_path, resume=True).steps == []
    finally:
        os.close(writing)
        os.waitpid(pid, 0)
        os.close(reading)


def test_paths_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        twa.Recorder(net(), every=1, path=tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        twa.Recorder(net(), every=1, path=str(tmp_path / "file" / "more"))
    assert Path(tmp_path / "file").read_text() == "x"


# What was handed out, and where tensors are -------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_stay_as_they_were(kind, tmp_path):
    """Later snapshots move the reference, which candidates in memory are counted back from."""
    model = net()
    recorder = recorder_of(kind, model, tmp_path)
    recorded(recorder)
    candidates = recorder.recording()
    before = candidates.average(averages.uniform(4))
    move(model, 99)
    recorder.record(100)
    after = candidates.average(averages.uniform(4))
    assert all(torch.equal(after[key], t) for key, t in before.items())
    assert len(candidates) == 4 and len(recorder.recording()) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_subspace_of_its_own_codes(kind, tmp_path):
    recorder = recorder_of(kind, net(), tmp_path, bits=2)
    recorded(recorder)
    subspace = recorder.subspace(center=recorder.beta("ema", half_life=2), granularity="fine")
    assert (subspace.basis.bits, subspace.basis.n) == (2, 3)
    candidates = recorder.recording()
    for k in range(4):
        subspace.set_merge_weights(averages.candidate(4, k))
        for name, p in recorder.model.named_parameters():
            assert torch.allclose(p, candidates[k].tensor(name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_load_average(kind, tmp_path):
    model = net()
    recorder = recorder_of(kind, model, tmp_path)
    recorded(recorder)
    beta = recorder.beta("lawa", last=4)
    other = net(seed=1)
    twa.load_average(other, recorder.recording(), beta)
    recorder.apply("lawa", last=4)
    for (name, a), b in zip(other.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-6, atol=1e-7), name
    with pytest.raises(TwaError, match="sum of 2"):
        twa.load_average(other, recorder.recording(), 2 * beta)


@pytest.mark.filterwarnings("ignore:weights are recorded in torch.float16")
def test_an_average_that_overflows_half_precision_is_refused():
    """What is decoded of weights at the limit may be beyond it."""
    model = nn.Linear(64, 4).half()
    recorder = twa.Recorder(model, every=1, bits=1)
    g = torch.Generator().manual_seed(0)
    for step in range(1, 4):
        with torch.no_grad():
            model.weight.copy_((torch.randn(4, 64, generator=g) * 4e4).clamp(-65504, 65504))
        recorder.record(step)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    said = r"'weight': \d+ of 256 values of the candidates' average overflow torch.float16"
    with pytest.raises(TwaError, match=said), recorder.averaged("last"):
        pass
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    with pytest.raises(TwaError, match=said):
        recorder.apply("last")


def test_another_default_device(tmp_path):
    model = net()
    recorder = recorder_of("files", model, tmp_path)
    with torch.device("meta"):
        for step in (1, 2, 3):
            move(model, step)
            recorder.record(step)
    assert recorder.steps == [1, 2, 3]


def test_zero3_is_refused():
    model = nn.Linear(3, 3)
    model.weight.ds_id = 0
    with pytest.raises(TwaError, match="ZeRO-3"):
        twa.Recorder(model, every=1)


def test_a_teacher_that_is_frozen_and_moves(tmp_path):
    """Averages in the model leave it alone; files have the first one's, and say so."""

    class Taught(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)

    model = net(Taught)
    recorder = recorder_of("files", model, tmp_path)
    for step in range(3):
        move(model, step)
        with torch.no_grad():
            model.teacher.weight += 1
        recorder.record(step)
    teacher = model.teacher.weight.clone()
    recorder.apply("uniform")
    assert torch.equal(model.teacher.weight, teacher)
    with pytest.warns(CandidateWarning, match=r"'teacher.weight' is frozen, and has changed"):
        recorder.recording()


@pytest.mark.parametrize("kind", KINDS)
def test_integers_of_the_snapshot_that_has_all_the_weight(kind, tmp_path):
    model = net()
    recorder = recorder_of(kind, model, tmp_path)
    states = recorded(recorder)
    for k in (1, 3):
        recorder.apply(averages.candidate(4, k))
        assert torch.equal(model.calls, states[k]["calls"])


def test_more_snapshots_than_a_kernel_takes(tmp_path):
    model = nn.Linear(3, 3)
    recorder = twa.Recorder(model, every=1, bits=1)
    for step in range(4200):
        with torch.no_grad():
            model.weight += 0.01
        recorder.record(step)
    with recorder.averaged("uniform"):
        middle = model.weight.detach().clone()
    assert torch.allclose(model.weight - middle, torch.full((3, 3), 21.0), atol=0.1)


def test_weights_that_cannot_be_had(tmp_path):
    """What a function of the user's raises ends the recording, and not the training."""
    model = net()
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    recorder = twa.Recorder(model, every=1, weights=lambda name, p: masters[name])
    recorder.record(1)
    del masters["last.weight"]
    with pytest.warns(CandidateWarning, match="recording ends before step 2"):
        assert not recorder.record(2)


def test_a_rewind_that_is_refused_changes_nothing(tmp_path, monkeypatch):
    """While a snapshot waits for a full disk."""
    model = net()
    recorder = recorder_of("files", model, tmp_path)
    for step in (10, 20):
        move(model, step)
        recorder.record(step)
    recorder.flush()
    writes = store.write_snapshot

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_snapshot", full)
    move(model, 30)
    recorder.record(30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TwaError, match="expected a step of at least 10"):
            recorder.rewind(5)
    monkeypatch.setattr(store, "write_snapshot", writes)
    recorder.flush()
    move(model, 40)
    recorder.record(40)
    recorder.flush()
    assert [c.step for c in twa.Candidates(tmp_path / "run")] == recorder.steps == [10, 20, 30, 40]


def test_going_on_without_a_state_is_said(tmp_path):
    """Once: a new run in an old path would be taken for the old one's."""
    first = recorder_of("files", net(), tmp_path)
    for k in range(3):
        move(first.model, k)
        first.step()
    state = first.state_dict()
    first.close()
    for place in (None, lambda r: r.load_state_dict(state), lambda r: r.rewind(2)):
        again = recorder_of("files", net(), tmp_path, resume=True)
        if place is not None:
            place(again)
        with warned(*(["resume=True goes on after step 3"] if place is None else [])):
            for k in range(2):
                move(again.model, k + 10)
                again.step()
        again.rewind(3 if place is None else again.count)
        again.close()
