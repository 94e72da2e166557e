"""Modes of modules: what they keep of their weights in evaluation mode, and frozen BatchNorm."""

import copy

import pytest
import torch
import twa
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from twa.distributed import weights
from twa.export.weights import write_dcp
from twa.merge.evaluate import Evaluator, mean_over
from twa.merge.run import Merge
from twa.merge.settings import Settings, TwaMethod
from twa.modes import plain_weights
from twa.tasks.contract import Task

N = 3
DATA = torch.randn(24, 6, generator=torch.Generator().manual_seed(0)) * 2 + 1
BATCHES = list(DATA.split(10))  # 10, 10, 4


class Cached(nn.Module):
    """Attention biases looked up once, as LeViT keeps them."""

    def __init__(self):
        super().__init__()
        self.linear, self.biases = nn.Linear(6, 4), nn.Parameter(torch.randn(3))
        self.register_buffer("places", torch.tensor([0, 2, 1, 2]), persistent=False)
        self.kept = {}

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def forward(self, x):
        if self.training:
            return self.linear(x) + self.biases[self.places]
        if not self.kept:
            self.kept["cpu"] = self.biases[self.places]
        return self.linear(x) + self.kept["cpu"]


class Merged(nn.Module):
    """Factors that are added to a frozen weight in evaluation mode, as loralib does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6), requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(4, 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            with torch.no_grad():
                self.weight.add_(self.b @ self.a, alpha=-1.0 if mode else 1.0)
            self.merged = not mode
        return self

    def forward(self, x):
        return x @ (self.weight if self.merged else self.weight + self.b @ self.a).T


class Fused(nn.Module):
    """Branches, one with BatchNorm, that are one matrix in evaluation mode, as in RepVGG."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 4), nn.Linear(6, 4), nn.BatchNorm1d(4)
        self.whole = None

    def train(self, mode=True):
        super().train(mode)
        self.whole = None
        if not mode:
            with torch.no_grad():
                scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
                bias = self.norm.bias + (self.a.bias - self.norm.running_mean) * scale
                self.whole = scale[:, None] * self.a.weight + self.b.weight, bias + self.b.bias
        return self

    def forward(self, x):
        if self.training:
            return self.norm(self.a(x)) + self.b(x)
        weight, bias = self.whole
        return x @ weight.T + bias


class Outer(nn.Module):
    """A module around one that keeps something, with a train() of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = Merged(), nn.Linear(4, 4)

    def train(self, mode=True):
        return super().train(mode)

    def forward(self, x):
        return self.head(self.inner(x))


KEEPERS = {"cached": Cached, "merged": Merged, "fused": Fused, "nested": Outer}


def born(make, seed):
    """A model of its own, in training mode."""
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Linear(4, 2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
        for name, b in model.named_buffers():
            if name.endswith(("mean", "var")):
                b.copy_(torch.rand(b.shape, generator=generator) + 0.5)
    return model


def saved(tmp_path, make):
    """States of N candidates, which are also in files."""
    states = [copy.deepcopy(born(make, k).state_dict()) for k in range(N)]
    for k, state in enumerate(states):
        torch.save(state, tmp_path / f"c{k}.pt")
    return states, twa.Candidates(tmp_path / "c*.pt")


def used(model):
    """The model after a forward pass in evaluation mode: it keeps what it makes."""
    model.eval()
    model(DATA)
    return model


def mean_of(states, beta):
    return {
        key: sum(b * s[key].double() for b, s in zip(beta, states, strict=True))
        for key in states[0]
        if states[0][key].is_floating_point()
    }


def check(subspace, make, expected=None):
    """The model gives what one does that is loaded with its weights; all of it is still in
    evaluation mode; the weights are the expected ones.
    """
    model = subspace.model
    assert not any(m.training for m in model.modules())
    found = weights.snapshot(subspace.sharding)
    for key, t in (expected or {}).items():
        torch.testing.assert_close(found[key].double(), t, rtol=1e-5, atol=1e-5)
    fresh = born(make, 99)
    fresh.load_state_dict(found)
    torch.testing.assert_close(model(DATA), fresh.eval()(DATA), rtol=1e-4, atol=1e-4)
    assert not any(m.training for m in model.modules())


UNIFORM, OTHER = [1 / N] * N, [0.2, 0.7, 0.1]


@pytest.mark.parametrize("make", KEEPERS.values(), ids=KEEPERS)
@pytest.mark.parametrize("bits", [4, 32])
def test_what_a_module_keeps_is_of_the_weights_written_last(tmp_path, make, bits):
    states, candidates = saved(tmp_path, make)
    subspace = twa.Subspace.from_candidates(used(born(make, 99)), candidates, bits=bits)
    check(subspace, make, mean_of(states, UNIFORM) if bits == 32 else None)
    before = weights.snapshot(subspace.sharding)

    subspace.set_merge_weights(torch.tensor(OTHER))
    check(subspace, make)
    average = twa.IterateAverage(subspace)
    with average.applied():
        check(subspace, make)
    weights.load_merge(subspace.sharding, torch.tensor(OTHER).double())
    check(subspace, make, mean_of(states, OTHER))
    weights.load_untrained(subspace.sharding, torch.tensor(UNIFORM).double())
    check(subspace, make)
    weights.restore(subspace.sharding, before)
    check(subspace, make, {k: t.double() for k, t in before.items() if t.is_floating_point()})
    for optimizer in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad):
        steps = twa.SubspaceOptimizer(subspace, optimizer, lr=0.1)
        subspace.write_weights()
        subspace.model(DATA)  # keeps something before the step
        with plain_weights(subspace.model):
            subspace.model(DATA).square().mean().backward()
        steps.step()
        steps.zero_grad()
        check(subspace, make)
    average.apply()
    check(subspace, make)
    if bits == 4:
        subspace.save(tmp_path / "out", basis=True)
        loaded = twa.Subspace.load(tmp_path / "out", used(born(make, 98)))
        for key, t in weights.snapshot(subspace.sharding).items():
            torch.testing.assert_close(weights.snapshot(loaded.sharding)[key], t)
        check(loaded, make)


@pytest.mark.parametrize("make", KEEPERS.values(), ids=KEEPERS)
def test_what_is_exported_is_not_merged(tmp_path, make):
    """Whichever mode the model is in, files hold the weights, not what is made of them."""
    states, candidates = saved(tmp_path, make)
    for k, model in enumerate((born(make, 99), used(born(make, 98)))):
        subspace = twa.Subspace.from_candidates(model, candidates, bits=32)
        subspace.save(tmp_path / f"out{k}")
        write_dcp(tmp_path / f"dcp{k}", subspace.sharding)
        for path in (f"out{k}/averaged.safetensors", f"dcp{k}"):
            exported = twa.Candidates(tmp_path / path)[0]
            for key, t in mean_of(states, UNIFORM).items():
                torch.testing.assert_close(exported.tensor(key).double(), t, rtol=1e-5, atol=1e-5)


def test_re_estimated_statistics_reach_what_is_made_of_them():
    model, plain = used(born(Fused, 1)), born(Fused, 1)
    assert twa.update_bn(BATCHES, model) == twa.update_bn(BATCHES, plain) == 3
    assert torch.equal(model[0].norm.running_var, plain[0].norm.running_var)
    torch.testing.assert_close(model(DATA), plain.eval()(DATA))


@pytest.mark.parametrize("kinds", [(Cached, Merged), (Outer, Fused)])
def test_every_mode_is_as_it_was(kinds):
    """Also of a module that trains inside one that does not, and the other way round."""
    model = nn.ModuleList([nn.Sequential(make(), nn.Dropout()) for make in (*kinds, *kinds)])
    model.eval()
    model[1].train()
    model[2][1].training = True
    model[3].training = True
    if kinds[0] is Outer:
        model[0][0].inner.train()
    modes = [m.training for m in model.modules()]
    states = copy.deepcopy(model.state_dict())
    merged = [m.merged for m in model.modules() if isinstance(m, Merged)]
    with pytest.raises(KeyError), plain_weights(model), plain_weights(model):
        assert not any(m.merged for m in model.modules() if isinstance(m, Merged))
        raise KeyError
    assert [m.training for m in model.modules()] == modes
    assert [m.merged for m in model.modules() if isinstance(m, Merged)] == merged
    for key, t in model.state_dict().items():
        torch.testing.assert_close(t, states[key])


def test_models_without_such_modules_are_left_alone(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    monkeypatch.setattr(nn.Module, "train", None)  # nobody calls it
    with plain_weights(model):
        assert not model[1].training


def test_losses_in_the_table_are_those_of_the_weights(tmp_path):
    """The task's model comes in evaluation mode, and has seen data."""
    states, candidates = saved(tmp_path, Cached)
    task = task_of(lambda: used(born(Cached, 99)), loss_of)
    outcome = Merge(
        task, candidates, Settings((TwaMethod("t", "tensor", 4),), steps=4, compare=True)
    ).run()
    found = {r.method: r.val_loss for r in outcome.results}

    def true_loss(state):
        fresh = born(Cached, 98)
        fresh.load_state_dict(state, strict=False)
        return mean_over(fresh, loss_of, BATCHES)

    singles = [true_loss(state) for state in states]
    assert found["last"] == pytest.approx(singles[-1], rel=1e-5)
    assert found["best single"] == pytest.approx(min(singles), rel=1e-5)
    assert found["uniform"] == pytest.approx(true_loss(mean_of(states, UNIFORM)), rel=1e-5)
    assert outcome.winner.val_loss == pytest.approx(true_loss(outcome.state), rel=1e-5)


def loss_of(model, batch):
    return model(batch).square().mean()


def task_of(model, loss, train=None):
    train = BATCHES if train is None else train
    return Task("test", model, loss, train, BATCHES, BATCHES, None, None, "")


# Frozen BatchNorm --------------------------------------------------------------------------------


class Backbone(nn.Module):
    """A BatchNorm in a frozen part, and one that is trained; train() may leave the first alone."""

    def __init__(self, norm_eval=False):
        super().__init__()
        self.body, self.frozen = nn.Linear(6, 5), nn.BatchNorm1d(5)
        self.head, self.free, self.norm_eval = nn.Linear(5, 4), nn.BatchNorm1d(4), norm_eval
        self.body.requires_grad_(False)
        self.frozen.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self.frozen.train(mode and not self.norm_eval)
        return self

    def forward(self, x):
        return self.free(self.head(self.frozen(self.body(x)).tanh()))


def backbones(tmp_path, constant=("frozen",)):
    """States of N candidates whose statistics are the same where they are constant."""
    states = []
    for k in range(N):
        torch.manual_seed(0)
        state, generator = Backbone().state_dict(), torch.Generator().manual_seed(k)
        for name, t in state.items():
            layer = name.split(".")[0]
            if not t.is_floating_point() or layer == "body":
                continue
            own = torch.Generator().manual_seed(7) if layer in constant else generator
            t.add_(torch.rand(t.shape, generator=own))
        states.append(state)
        torch.save(state, tmp_path / f"c{k}.pt")
    return states, twa.Candidates(tmp_path / "c*.pt")


def reference(states, beta):
    """Loss of the average in float64, with frozen's own statistics and re-estimated ones of free;
    and these.
    """
    m = mean_of(states, beta)

    def normed(x, name, mean, var):
        return (x - mean) / (var + 1e-5).sqrt() * m[f"{name}.weight"] + m[f"{name}.bias"]

    def before(x):
        x = x.double() @ m["body.weight"].T + m["body.bias"]
        x = normed(x, "frozen", m["frozen.running_mean"], m["frozen.running_var"]).tanh()
        return x @ m["head.weight"].T + m["head.bias"]

    given = [before(x) for x in BATCHES]
    mean = sum(len(x) * x.mean(0) for x in given) / len(DATA)
    var = sum(len(x) * x.var(0) for x in given) / len(DATA)
    return float(normed(before(DATA), "free", mean, var).square().mean()), mean, var


@pytest.mark.parametrize("norm_eval", [False, True])
def test_equal_statistics_stay_and_others_are_re_estimated(tmp_path, norm_eval):
    states, candidates = backbones(tmp_path)
    task = task_of(lambda: Backbone(norm_eval), loss_of)
    method = TwaMethod("t", "tensor", 4)
    outcome = Merge(task, candidates, Settings((method,), steps=6, lr=0.1, compare=True)).run()
    found = {r.method: r for r in outcome.results}
    expected, *_ = reference(states, UNIFORM)
    assert found["uniform"].val_loss == pytest.approx(expected, rel=1e-5)
    assert found["uniform"].averaged_bn_loss is not None
    assert found[method.name].averaged_bn_loss is not None
    # training in the subspace has not touched them, and what is exported has them
    for key in ("frozen.running_mean", "frozen.running_var"):
        assert torch.equal(outcome.state[key], states[0][key])
        assert torch.equal(outcome.sharding.model.state_dict()[key], states[0][key])


@pytest.mark.parametrize("norm_eval", [False, True])
def test_statistics_of_the_evaluator_in_float64(tmp_path, norm_eval):
    states, candidates = backbones(tmp_path)
    subspace = twa.Subspace.from_candidates(Backbone(norm_eval), candidates, bits=32)
    evaluator = Evaluator(task_of(None, loss_of), subspace.sharding)
    assert evaluator.has_batchnorm
    evaluator.load(torch.tensor(OTHER).double())
    expected, mean, var = reference(states, OTHER)
    assert evaluator.loss() == pytest.approx(expected, rel=1e-5)
    free = subspace.model.free
    torch.testing.assert_close(free.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(free.running_var.double(), var, rtol=1e-5, atol=1e-6)
    evaluator.train_mode()
    assert subspace.model.free.training and not subspace.model.frozen.training


def test_all_statistics_equal_are_no_batchnorm_to_measure(tmp_path):
    """Nothing is re-estimated (the batches would spoil it), and no column shows another loss."""
    states, candidates = backbones(tmp_path, constant=("frozen", "free"))
    task = task_of(Backbone, loss_of, train=[DATA * torch.nan])
    outcome = Merge(task, candidates, Settings((), steps=1, compare=True)).run()
    assert all(r.averaged_bn_loss is None for r in outcome.results)
    plain = Backbone()
    plain.load_state_dict(mean_of(states, UNIFORM), strict=False)
    uniform = next(r for r in outcome.results if r.method == "uniform")
    assert uniform.val_loss == pytest.approx(mean_over(plain, loss_of, BATCHES), rel=1e-5)


def test_one_differing_statistic_is_re_estimated(tmp_path):
    """A mean that is the same everywhere is not enough."""
    states, _ = backbones(tmp_path, constant=("frozen", "free"))
    states[1]["frozen.running_var"][2] *= 1.0001
    torch.save(states[1], tmp_path / "c1.pt")
    subspace = twa.Subspace.from_candidates(Backbone(), twa.Candidates(tmp_path / "c*.pt"))
    evaluator = Evaluator(task_of(None, loss_of), subspace.sharding)
    assert evaluator.has_batchnorm and evaluator.frozen == {subspace.model.free}
    evaluator.load(torch.tensor(UNIFORM).double())
    given = [x @ subspace.model.body.weight.T + subspace.model.body.bias for x in BATCHES]
    mean = sum(len(x) * x.double().mean(0) for x in given) / len(DATA)
    torch.testing.assert_close(
        subspace.model.frozen.running_mean.double(), mean, rtol=1e-5, atol=1e-6
    )
    assert torch.equal(subspace.model.free.running_var, states[0]["free.running_var"])


def test_statistics_of_no_data_are_re_estimated(tmp_path):
    """Equal because no candidate has estimated any: mean 0 and variance 1."""
    for k, state in enumerate(backbones(tmp_path, constant=("frozen", "free"))[0]):
        state["free.running_mean"].zero_()
        state["free.running_var"].fill_(1.0)
        torch.save(state, tmp_path / f"c{k}.pt")
    subspace = twa.Subspace.from_candidates(Backbone(), twa.Candidates(tmp_path / "c*.pt"))
    evaluator = Evaluator(task_of(None, loss_of), subspace.sharding)
    assert evaluator.frozen == {subspace.model.frozen}
    evaluator.load(torch.tensor(UNIFORM).double())
    assert evaluator.bn_used == 3 and bool(subspace.model.free.running_mean.any())


def both_checkpointed(model):
    model.frozen, model.free = (checkpoint_wrapper(m) for m in (model.frozen, model.free))
    return model


@pytest.mark.parametrize(
    "wrap", [both_checkpointed, nn.DataParallel, lambda m: torch.compile(m, backend="eager")]
)
def test_layers_are_known_inside_wrappers(tmp_path, wrap):
    states, candidates = backbones(tmp_path)
    model = Backbone()
    frozen, free = model.frozen, model.free
    subspace = twa.Subspace.from_candidates(wrap(model), candidates, bits=32)
    evaluator = Evaluator(task_of(None, loss_of), subspace.sharding)
    assert evaluator.has_batchnorm and evaluator.frozen == {frozen}
    evaluator.load(torch.tensor(OTHER).double())
    expected, mean, _ = reference(states, OTHER)
    assert evaluator.loss() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(free.running_mean.double(), mean, rtol=1e-5, atol=1e-6)


def frozen_on_a_rank(group, folder, sharding):
    """What a rank has of the uniform mean, its loss, and the layers that it leaves alone."""
    model = Backbone()
    if sharding == "columns":
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    subspace = twa.Subspace.from_candidates(
        model, twa.Candidates(f"{folder}/c*.pt"), sharding=sharding, group=group
    )
    evaluator = Evaluator(task_of(None, loss_of), subspace.sharding)
    evaluator.load(torch.tensor(UNIFORM).double())
    left_alone = [name for name, m in model.named_modules() if m in evaluator.frozen]
    return left_alone, evaluator.loss(), model.frozen.running_mean, model.free.running_mean


@pytest.mark.parametrize("sharding", ["replicate", "columns"])
def test_ranks_leave_the_same_layers_alone(ranks, tmp_path, sharding):
    states, _ = backbones(tmp_path)
    loss, mean, _ = reference(states, UNIFORM)
    for names, found, frozen, free in ranks.run(2, frozen_on_a_rank, str(tmp_path), sharding):
        assert names == ["frozen"] and found == pytest.approx(loss, rel=1e-5)
        assert torch.equal(frozen, states[0]["frozen.running_mean"])
        torch.testing.assert_close(free.double(), mean, rtol=1e-5, atol=1e-6)
