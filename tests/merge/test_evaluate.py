"""How a model is measured, on batches of whatever shape."""

import collections
import dataclasses
import hashlib
from pathlib import Path

import numpy
import pytest
import torch
from conftest import run_python
from twa.io.errors import TaskError
from twa.merge.evaluate import mean_over
from twa.tasks.batches import batch_digest, to_device
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
