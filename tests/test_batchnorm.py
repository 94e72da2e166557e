"""update_bn: kinds of batches, weights of ragged batches, models without BatchNorm."""

import collections

import numpy
import pytest
import torch
from bounds import assert_weighted
from torch import nn
from twa import update_bn
from twa.batchnorm import batch_size


def model():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))


def statistics(m):
    return m[1].running_mean.clone(), m[1].running_var.clone()


DATA = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1


def expected(m, batches):
    """Size-weighted averages of the batches' means and unbiased variances."""
    outputs = [m[0](b) for b in batches]
    sizes = torch.tensor([float(len(b)) for b in batches])
    share = (sizes / sizes.sum())[:, None]
    return (share * torch.stack([o.mean(0) for o in outputs])).sum(0), (
        share * torch.stack([o.var(0) for o in outputs])
    ).sum(0)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda b: b,
        lambda b: (b, torch.zeros(len(b))),
        lambda b: [b],
        lambda b: {"input": b, "labels": torch.zeros(len(b))},
    ],
)
def test_batches_of_every_kind_with_a_ragged_last(wrap):
    m = model()
    batches = list(DATA.split(16))  # 16, 16, 16, 2
    assert update_bn([wrap(b) for b in batches], m) == 4
    mean, variance = statistics(m)
    want_mean, want_variance = expected(m, batches)
    torch.testing.assert_close(mean, want_mean)
    torch.testing.assert_close(variance, want_variance)


def test_last_batch_of_one_sample_is_left_out():
    m = model()
    assert update_bn(DATA[:33].split(16), m) == 2
    torch.testing.assert_close(statistics(m)[0], expected(m, DATA[:32].split(16))[0])


def test_batches_of_one_image():
    images = torch.randn(5, 3, 8, 8)
    m, whole = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    assert update_bn(images.split(1), m) == 5
    update_bn([images], whole)
    torch.testing.assert_close(m.running_mean, whole.running_mean)
    assert update_bn(iter(images.split(1)), nn.BatchNorm2d(3), max_batches=2) == 2


def test_state_is_restored():
    m = model()
    m.eval()
    m[1].momentum = 0.3
    weight = m[1].weight.clone()
    update_bn([DATA], m)
    assert not m.training and not m[1].training and not m[2].training and m[1].momentum == 0.3
    assert torch.equal(m[1].weight, weight) and all(p.grad is None for p in m.parameters())


def test_no_batchnorm_reads_nothing():
    def fail():
        raise AssertionError("the loader was read")
        yield

    assert update_bn(fail(), nn.Linear(2, 2)) == 0
    assert update_bn(fail(), nn.BatchNorm1d(3, track_running_stats=False)) == 0


def test_own_forward_and_limit():
    m = model()
    assert update_bn(DATA.split(10), m, forward=lambda model, b: model(b), max_batches=3) == 3
    torch.testing.assert_close(statistics(m)[0], expected(m, DATA[:30].split(10))[0])


def test_empty_loader():
    for loader in ([], [DATA[:1]]):
        m = model()
        update_bn([DATA], m)
        mean, variance = statistics(m)
        with pytest.raises(ValueError, match="at least one batch"):
            update_bn(loader, m)
        assert torch.equal(statistics(m)[0], mean) and torch.equal(statistics(m)[1], variance)


# Frozen layers -----------------------------------------------------------------------------------


class NormEval(nn.Module):
    """A body whose BatchNorm its own train() leaves in evaluation mode, as mmseg's norm_eval."""

    def __init__(self, norm=nn.BatchNorm1d, frozen=("first",)):
        super().__init__()
        self.first, self.second = norm(4), nn.BatchNorm1d(4)
        self.frozen = frozen
        with torch.no_grad():
            for m in (self.first, self.second):
                m.running_mean.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
                m.running_var.copy_(torch.tensor([4.0, 0.3, 1.0, 2.0]))

    def train(self, mode=True):
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    def forward(self, x):
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_train_leaves_in_evaluation_mode_keeps_its_statistics(norm, training):
    """The layers after it are estimated on what it gives with them."""
    m = NormEval(norm).train(training)
    before = {k: v.clone() for k, v in m.first.state_dict().items()}
    modes = [child.training for child in m.modules()]
    batches = DATA.split(16)  # the last of 2
    assert update_bn(batches, m) == 4
    assert all(torch.equal(v, before[k]) for k, v in m.first.state_dict().items())
    assert [child.training for child in m.modules()] == modes
    mean, var = before["running_mean"].double(), before["running_var"].double()
    given = [torch.tanh((b.double() - mean) / (var + m.first.eps).sqrt()) for b in batches]
    share = torch.tensor([len(b) / 50 for b in batches], dtype=torch.float64)[:, None]
    for found, of in ((m.second.running_mean, "mean"), (m.second.running_var, "var")):
        want = (share * torch.stack([getattr(x, of)(0) for x in given])).sum(0)
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)
    assert m.second.num_batches_tracked == 4


def test_only_frozen_layers_read_nothing():
    def fail():
        raise AssertionError("the loader was read")
        yield

    m = NormEval(frozen=("first", "second"))
    modes = [child.training for child in m.modules()]
    assert update_bn(fail(), m) == 0
    assert [child.training for child in m.modules()] == modes


def test_statistics_that_are_switched_off_stay():
    m = NormEval(frozen=())
    m.first.track_running_stats = False
    before = m.first.running_mean.clone()
    assert update_bn(DATA.split(16), m) == 4
    assert torch.equal(m.first.running_mean, before)
    assert not torch.equal(m.second.running_mean, before)


def test_frozen_parameters_alone_do_not_freeze_statistics():
    m, free = model(), model()
    free.load_state_dict(m.state_dict())
    m.requires_grad_(False)
    assert update_bn(DATA.split(16), m) == update_bn(DATA.split(16), free) == 4
    assert all(map(torch.equal, statistics(m), statistics(free)))


# Batches as libraries give them -----------------------------------------------------------------


class Graph:
    """As a graph library's batch: an object with attributes."""

    def __init__(self, x, **more):
        self.x = x
        self.__dict__.update(more)


class Sized(Graph):
    def __len__(self):
        return len(self.x)


class Unsized(Graph):
    @property
    def num_graphs(self):
        raise RuntimeError("cannot tell")

    def __len__(self):
        raise TypeError("no length")


Pair = collections.namedtuple("Pair", "x y")
T = torch.ones


@pytest.mark.parametrize(
    "batch, size",
    [
        # as before
        (T(4, 2), 4),
        (torch.tensor(3.0), 1),
        ((T(4, 2), T(5)), 4),
        ([torch.tensor(1), T(5)], 5),
        (("texts", ["a", "b"], T(3)), 3),
        ({"x": {"y": T(2)}, "z": T(3)}, 3),
        (Pair(T(6), T(2)), 6),
        # inside others
        ({"inputs": {"x": T(4, 2)}, "targets": {"y": T(5)}}, 4),
        (({"x": T(4, 2)}, {"y": T(5)}), 4),
        ([{"a": {"b": T(3)}}, {"c": T(1)}], 3),
        ({"id": "x", "n": 3, "x": {"x": T(7)}}, 7),
        (collections.UserDict(x={"x": T(7)}), 7),
        # torchvision's detection, and others of samples that differ
        (((T(3, 9, 9), T(3, 8, 8)), ({"y": T(1)}, {"y": T(2)})), 2),
        ([[T(3, 9, 9)] * 5, [{"y": T(1)}] * 5], 5),
        ({"images": [T(3, 9, 9)] * 4, "targets": [{}] * 4}, 4),
        ([{"image": T(3, 9, 9)}, {"image": T(3, 8, 8)}], 2),
        ([{"image": T(3, 9, 9)}], 1),
        ([(T(3, 9), 1), (T(3, 8), 0), (T(3, 7), 1)], 3),
        ((["a", "b", "c"], [1, 2, 3]), 3),
        # texts, objects
        (["a", "bb", "ccc"], 3),
        (("a", Graph(T(2), num_graphs=5)), 5),
        ([Graph(T(2))] * 3, 3),
        (Graph(T(2), num_graphs=5), 5),
        (Graph(T(2), batch_size=6), 6),
        (Sized(T(2), batch_size=torch.Size([9])), 2),
        ((Graph(T(2), num_graphs=5), Graph(T(2), num_graphs=5)), 5),
        (numpy.ones((4, 2)), 4),
        (collections.deque([1, 2, 3]), 3),
        # none that shows
        (Graph(T(2)), None),
        (Graph(T(2), num_graphs=0), None),
        (Unsized(T(2)), None),
        ("text", None),
        (b"bytes", None),
        (3, None),
        (None, None),
        ({}, None),
        ([], None),
        ({"x": torch.tensor(1)}, None),
    ],
)
def test_size_of_a_batch(batch, size):
    assert batch_size(batch) == size


class Reader(nn.Sequential):
    """A model that takes batches of any shape, by a function."""

    def __init__(self, read):
        super().__init__(*model())
        self.read = read

    def forward(self, batch):
        return super().forward(self.read(batch))


@pytest.mark.parametrize(
    "wrap, read, sized",
    [
        (lambda b: Graph(b, num_graphs=len(b)), lambda g: g.x, True),
        (lambda b: Graph(b), lambda g: g.x, False),
        (lambda b: Sized(b), lambda g: g.x, True),
        (lambda b: {"a": {"b": b}, "c": {}}, lambda d: d["a"]["b"], True),
        (lambda b: (tuple(b), tuple({} for _ in b)), torch.stack, True),
        (lambda b: Pair(Graph(b), None), lambda g: g.x, False),
    ],
)
def test_batches_of_any_object(wrap, read, sized):
    batches = list(DATA.split(16))
    m = Reader(read)
    assert update_bn([wrap(b) for b in batches], m) == 4
    outputs = [m[0](b).detach().double() for b in batches]
    shares = [len(b) if sized else 1 for b in batches]
    for found, of in zip(statistics(m), (lambda o: o.mean(0), lambda o: o.var(0)), strict=True):
        expected = sum(of(o) * share for o, share in zip(outputs, shares, strict=True))
        torch.testing.assert_close(found.double(), expected / sum(shares), atol=1e-5, rtol=1e-5)


def test_batches_of_one_loader_count_by_one_rule():
    """Where one size does not show, no batch is weighted by its own."""
    batches = list(DATA.split(20))
    for at in range(3):
        m = Reader(lambda g: g.x)
        graphs = [Graph(b, num_graphs=len(b)) for b in batches]
        del graphs[at].num_graphs
        update_bn(graphs, m)
        outputs = torch.cat([m[0](b).detach() for b in batches])
        shares = [1 / len(b) / 3 for b in batches for _ in b]
        assert_weighted(statistics(m)[0], shares, outputs, more=6)  # of sums, means, their mean


def test_a_batch_without_variance_whose_size_does_not_show():
    m = Reader(lambda g: g.x)
    assert update_bn([Graph(DATA[:16]), Graph(DATA[:1])], m) == 1
