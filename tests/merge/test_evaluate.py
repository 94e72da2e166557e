"""How a model is measured, on batches of whatever shape."""

import collections
import dataclasses
import hashlib
import math
from pathlib import Path

import numpy
import pytest
import torch
import twa
from conftest import run_python
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from twa.distributed.ranks import Ranks
from twa.io.errors import TaskError
from twa.merge.evaluate import Evaluator, batch_values, difference, mean_of, mean_over
from twa.tasks.batches import Moved, batch_digest, count_batches, scattered, to_device
from twa.tasks.contract import Task


def test_a_loss_that_raises_leaves_the_model_as_it_was():
    model = torch.nn.Dropout()
    seen = []

    def loss(model, batch):
        seen.append(model.training)
        raise ArithmeticError("of the task")

    for training in (True, False):
        model.train(training)
        with pytest.raises(ArithmeticError, match="of the task"):
            mean_over(model, loss, [torch.ones(2)])
        assert model.training == training
    assert seen == [False, False]


class Object:
    def __init__(self, x, **more):
        self.x = x
        self.__dict__.update(more)


DATA = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    "wrap, read, sized",
    [
        (lambda b: b, lambda b: b, True),
        (lambda b: {"x": {"x": b}}, lambda b: b["x"]["x"], True),
        (lambda b: (tuple(b), tuple(range(len(b)))), lambda b: torch.stack(b[0]), True),
        (
            lambda b: [*map(str, b[:, 0].tolist())],
            lambda b: numpy.mean([*map(float, b)]),
            True,
        ),
        (lambda b: Object(b, num_graphs=len(b)), lambda b: b.x, True),
        (lambda b: Object(b), lambda b: b.x, False),
    ],
)
def test_means_over_batches_of_any_shape(wrap, read, sized):
    batches = list(DATA[:, :1].split(16))
    found = mean_over(torch.nn.Identity(), lambda m, b: read(b).mean(), [wrap(b) for b in batches])
    shares = [len(b) if sized else 1 for b in batches]
    expected = sum(b.mean().item() * share for b, share in zip(batches, shares, strict=True))
    assert found == pytest.approx(expected / sum(shares), rel=1e-12)


def test_one_rule_for_all_batches():
    batches = list(DATA.split(16))
    for at in range(len(batches)):
        objects = [Object(b, batch_size=len(b)) for b in batches]
        objects[at].batch_size = None
        found = mean_over(torch.nn.Identity(), lambda m, b: b.x.mean(), objects)
        assert found == pytest.approx(sum(b.mean().item() for b in batches) / 4, rel=1e-12)


# A sample of the batches -----------------------------------------------------------------------


def samples(count):
    """Batches of one, two or three samples; one whose size does not show."""
    batches = [DATA[k : k + 1 + k % 3, 0] for k in range(count)]
    return [Object(b) if k == 3 else b for k, b in enumerate(batches)]


def values_of(batches, *arguments):
    return batch_values(
        torch.nn.Identity(), lambda m, b: getattr(b, "x", b).sum(), batches, *arguments
    )


def values_on_a_rank(group, count, stride, offset):
    return values_of(samples(count), Ranks(group), stride, offset)


def test_samples_are_drawn_and_nested():
    """Of every `stride` batches in a row one is taken; of twice as many, one of these."""
    for stride in (1, 2, 4, 8, 64):
        for row in range(0, 640, stride):
            assert sorted(scattered(p, stride) for p in range(row, row + stride)) == list(
                range(row, row + stride)
            )
    chosen = {s: {p for p in range(640) if scattered(p, s) % s == 0} for s in (2, 4, 8)}
    assert chosen[8] < chosen[4] < chosen[2]
    assert {p % 8 for p in chosen[8]} == set(range(8))  # in step with nothing


@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_values_of_every_so_many_batches(ranks, count):
    batches = samples(count)
    rows = [(getattr(b, "x", b), isinstance(b, Object)) for b in batches]
    rows = [
        (float(x.sum()), 0 if is_hidden else len(x), k) for k, (x, is_hidden) in enumerate(rows)
    ]
    expected = torch.tensor(rows, dtype=torch.float64).view(-1, 3)
    for stride, offset in ((1, 0), (2, 1), (4, 0)):
        found = values_of(batches, None, stride, offset)
        wanted = [k for k in range(count) if scattered(k, stride) % stride == offset]
        assert torch.equal(found, expected[wanted])
        for size in (2, 3):
            for theirs in ranks.run(size, values_on_a_rank, count, stride, offset):
                assert torch.equal(theirs, found)
    if not count:
        with pytest.raises(TaskError, match="expected at least one batch to evaluate on"):
            mean_of(values_of(batches))


def test_batches_are_counted_without_loading_them():
    class Items(Dataset):
        def __len__(self):
            return 11

        def __getitem__(self, k):
            raise AssertionError("nothing is loaded")

    cpu = torch.device("cpu")
    assert count_batches(DataLoader(Items(), 4)) == 3
    assert count_batches(Moved(DataLoader(Items(), 4, drop_last=True), cpu)) == 2
    assert count_batches(range(5)) == 5 and count_batches([]) == 0


def pairs(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_difference_of_paired_batches():
    x = DATA[:12].abs()
    a, b = x[:, :2].clone(), x[:, 2:].clone()
    a[:, 1] = b[:, 1] = 8  # all alike: as for any mean
    mean, error = difference(a, b)
    apart = a[:, 0] - b[:, 0]
    assert mean == pytest.approx(float(apart.mean()))
    assert error == pytest.approx(float(apart.std()) / math.sqrt(12))
    a[:, 1] = b[:, 1] = torch.arange(12) + 1.0
    shares = a[:, 1] / 78
    mean, error = difference(a, b)
    assert mean == pytest.approx(float(shares @ apart)) == pytest.approx(mean_of(a) - mean_of(b))
    squares = [(w * (d - mean)) ** 2 for w, d in zip(shares.tolist(), apart.tolist(), strict=True)]
    assert error == pytest.approx(math.sqrt(sum(squares) * 12 / 11))
    a[3, 1] = b[3, 1] = 0  # its size does not show
    assert difference(a, b)[0] == pytest.approx(float(apart.mean()))
    # what all batches have in common says nothing of the difference
    assert difference(a + 1e-3, a)[1] < 1e-12


def test_differences_that_no_error_has():
    assert difference(pairs([1, 4]), pairs([3, 4])) == (-2.0, math.inf)
    good, bad = pairs([1, 4], [2, 4]), pairs([1, 4], [math.nan, 4])
    assert difference(good, bad) == (-math.inf, 0.0)
    assert difference(bad, good) == (math.inf, 0.0)
    assert difference(bad, pairs([1, 4], [-math.inf, 4])) == (0.0, 0.0)
    assert mean_of(bad) == mean_of(pairs([-math.inf, 1])) == math.inf


# What evaluations take ---------------------------------------------------------------------------


class Normed(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))


def evaluator_of(folder, model, train, val, *arguments):
    """Of two candidates."""
    for k in range(2):
        torch.manual_seed(k)
        save_file(model().state_dict(), folder / f"c{k}.safetensors")
    task = Task("t", model, lambda m, b: m(b.float()).square().mean(), train, val, *[None] * 3, "")
    subspace = twa.Subspace.from_candidates(model(), twa.Candidates(folder / "*.safetensors"))
    return Evaluator(task, subspace.sharding, *arguments)


@pytest.mark.parametrize("per_step", [1, 2])
def test_cost_is_in_training_steps(tmp_path, per_step):
    """A batch forward only is a third of a training batch, by its size."""
    train, val = [DATA[:8], DATA[:4]], [DATA[:8], DATA[:4], DATA[4:6]]
    evaluator = evaluator_of(tmp_path, lambda: torch.nn.Linear(4, 3), train, val, 5, per_step)
    third = 1 / 3 / per_step
    beta = torch.tensor([0.5, 0.5], dtype=torch.float64)
    loss = evaluator.at(beta)
    assert evaluator.cost == pytest.approx(14 / 8 * third)
    evaluator.cost = 0.0
    evaluator.stride = 2
    sample = [k for k in range(3) if scattered(k, 2) % 2 == 0]
    assert mean_of(values := evaluator.look()) != loss
    assert values[:, 2].tolist() == sample
    assert evaluator.cost == pytest.approx(sum(len(val[k]) for k in sample) / 8 * third)
    assert len(evaluator.look(offset=1)) == 3 - len(sample)
    assert evaluator.cost == pytest.approx(14 / 8 * third)
    # one that is known takes as much again
    evaluator.load(torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert evaluator.at(beta) == loss and evaluator.cost == pytest.approx(28 / 8 * third)
    evaluator.test()
    assert evaluator.cost == pytest.approx(28 / 8 * third)


def test_cost_of_batches_whose_size_does_not_show(tmp_path):
    """They count as one training batch each."""

    class Sizeless:
        def __init__(self, x):
            self.x = x

        def float(self):
            return self.x.float()

    plain = [DATA[:8], DATA[:4]]
    hidden = [Sizeless(x) for x in plain]
    for train, val, expected in ((plain, hidden, 2), (hidden, plain, 2), (plain, plain, 1.5)):
        evaluator = evaluator_of(tmp_path, lambda: torch.nn.Linear(4, 3), train, val)
        evaluator.loss()
        assert evaluator.cost == pytest.approx(expected / 3)


def test_a_look_re_estimates_batchnorm_on_fewer_batches(tmp_path):
    train, beta = list(DATA.split(2)), torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert len(train) == 25
    for bn_batches, stride, used in (
        (20, 1, 20),
        (20, 2, 10),
        (20, 16, 4),
        (3, 2, 3),
        (100, 4, 25),
    ):
        evaluator = evaluator_of(tmp_path, Normed, train, [DATA[:2]], bn_batches)
        evaluator.stride = stride
        evaluator.load(beta, for_look=True)
        assert evaluator.bn_used == used and evaluator.cost == pytest.approx(used / 3)
        evaluator.load(beta)
        assert evaluator.bn_used == min(bn_batches, 25)
        evaluator.cost = 0.0
        assert evaluator.averaged_bn_loss(beta) is not None and evaluator.cost == 0


# Digests, and batches on a device ----------------------------------------------------------------


@dataclasses.dataclass
class Fields:
    x: torch.Tensor
    more: object = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    name: str = "x"


class Slots:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class Moving:
    """As a graph library's batch, or transformers' BatchEncoding."""

    def __init__(self, x):
        self.x, self.device = x, None

    def to(self, device):
        moved = Moving(self.x.to(device))
        moved.device = device
        return moved


Pair = collections.namedtuple("Pair", "x y")


def cyclic(x):
    found = Object(x)
    found.itself = found
    return found


KINDS = {
    "texts": lambda x: [str(v) for v in x.tolist()],
    "numbers": lambda x: (x.tolist(), {"a": 3.5, "b": None, "c": True}),
    "sets": lambda x: {"s": {str(v) for v in x.tolist()}, "f": frozenset(map(str, range(50)))},
    "arrays": lambda x: {"a": x.numpy(), "b": numpy.array(["a", None], dtype=object)},
    "an object": lambda x: Object(x, name="a", function=print, kind=dict, inner=Object(x)),
    "slots": Slots,
    "a data class": Fields,
    "a frozen data class": Frozen,
    "inside": lambda x: [(Object({"x": [x]}),)],
    "cyclic": cyclic,
    "a user's dict": lambda x: collections.UserDict(x=x),
    "a queue": lambda x: collections.deque([x, "a"]),
    "sparse": lambda x: x.diag().to_sparse(),
    "sparse rows": lambda x: x.diag().to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor([x, x[:1]]),
    "conjugated": lambda x: (x * 1j).conj(),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.01, 0, torch.qint8),
    "packed": lambda x: torch.nn.utils.rnn.pack_sequence([x, x[:1]]),
    "a random state": lambda x: numpy.random.RandomState(int(abs(x[0]) * 1e6)).get_state(),
}
WRITE = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path[:0] = {folders!r}
import test_evaluate, torch
from twa.tasks.batches import batch_digest
for make in test_evaluate.KINDS.values():
    print(batch_digest(make(test_evaluate.DATA[0])))
"""


@pytest.mark.filterwarnings("ignore:.*(Sparse|nested|quantize)")
def test_digests_of_any_batch():
    """Of other data they are others; in other processes, where texts hash otherwise, the same."""
    digests = [batch_digest(make(DATA[0])) for make in KINDS.values()]
    assert None not in digests and len(set(digests)) == len(digests)
    assert digests == [batch_digest(make(DATA[0].clone())) for make in KINDS.values()]
    others = [batch_digest(make(DATA[1])) for make in KINDS.values()]
    assert all(a != b for a, b in zip(digests, others, strict=True))
    folders = [str(folder) for folder in Path(__file__).parents[:2]]
    code = WRITE.format(folders=folders)
    assert run_python(code).split() == digests


def test_digests_of_tensors_are_as_before():
    """A state that was saved by an earlier version is continued."""
    x = torch.arange(3)
    expected = hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16]
    for batch in (x, (x, ["a"]), {"x": x, "more": Object(torch.ones(2))}, [[x], 3], Pair(x, None)):
        assert batch_digest(batch) == expected
    for batch in (None, [], {}, object(), [None]):
        assert batch_digest(batch) is None


@pytest.mark.filterwarnings("ignore:.*(Sparse|nested|quantize)")
def test_batches_of_any_kind_are_moved_or_left():
    cpu = torch.device("cpu")
    for make in KINDS.values():
        batch = make(DATA[0])
        moved = to_device(batch, cpu)
        assert type(moved) is type(batch) and batch_digest(moved) == batch_digest(batch)


def test_what_is_in_a_batch_goes_to_the_device():
    meta, x = torch.device("meta"), torch.ones(2)
    assert to_device(Moving(x), meta).x.device == to_device([Moving(x)], meta)[0].x.device == meta
    pair = to_device(Pair(x, "a"), meta)
    assert type(pair) is Pair and pair.x.device == meta and pair.y == "a"
    for kind in (Fields, Frozen):
        batch = kind(x)
        moved = to_device(batch, meta)
        assert type(moved) is kind and moved.x.device == meta and batch.x is x
    inner = to_device(Fields(x, {"y": [Fields(x)]}), meta)
    assert inner.more["y"][0].x.device == meta
    for kind in (dict, collections.OrderedDict, collections.UserDict):
        batch = kind(x=x, name="a")
        moved = to_device(batch, meta)
        assert type(moved) is kind and moved["x"].device == meta and moved["name"] == "a"
        assert batch["x"] is x
    assert to_device(Moving, meta) is Moving


def test_a_split_of_validation_data_that_are_shuffled_objects():
    class Shuffled(list):
        def __iter__(self):
            self.append(self.pop(0))
            return super().__iter__()

    for kind in (Object, Fields, str):
        data = [kind(x) for x in DATA[:4]]
        fixed = Task("t", torch.nn.Identity, None, data, data, None, None, None, "")
        fixed.split_validation()
        assert list(fixed.val) == data[1::2] and list(fixed.heldout) == data[::2]
        moving = Task("t", torch.nn.Identity, None, data, Shuffled(data), None, None, None, "")
        with pytest.raises(TaskError, match="other batches at each pass"):
            moving.split_validation()
