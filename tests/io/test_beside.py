"""What stands beside the weights of a checkpoint is left out, whatever it is; what stands in their
place is named, and so are files that are something else.
"""

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import io
import json
import operator
import pathlib
import pickle
import random
import re
import types
import uuid
import zipfile

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from twa.io.candidates import Candidates
from twa.io.dcp import METADATA
from twa.io.errors import CandidateError
from twa.io.formats import open_checkpoint
from twa.io.torch_pickle import NAMES
from twa.io.unpickle import Made, unpickle


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)


class Colour(enum.Enum):
    RED = 1


class Flags(enum.IntFlag):
    A = 1
    B = 2


class Text(str, enum.Enum):
    MIN = "min"


@dataclasses.dataclass
class Config:
    lr: float = 0.1
    path: pathlib.PurePath = dataclasses.field(default_factory=lambda: pathlib.PurePath("x"))


@dataclasses.dataclass(frozen=True)
class Slotted:
    __slots__ = ("a",)
    a: int


class Attributes(dict):
    """As EasyDict, AttributeDict and others."""

    __setattr__ = dict.__setitem__

    def __getattr__(self, name):
        if name == "__getstate__":  # which pickle asks for, up to Python 3.10
            raise AttributeError(name)
        return self[name]


class Ordered(collections.OrderedDict):
    pass


class Items(list):
    pass


Point = collections.namedtuple("Point", "x y")


class WithNew:
    """Made by __new__ with arguments by name, and with a state that is a tuple."""

    def __new__(cls, *, a):
        return super().__new__(cls)

    def __init__(self, *, a):
        self.a = a

    def __getnewargs_ex__(self):
        return (), {"a": self.a}

    def __getstate__(self):
        return (None, {"a": self.a})

    def __setstate__(self, state):
        self.a = state[1]["a"]

    @classmethod
    def make(cls):
        return cls(a=1)


def cyclic():
    a = Attributes(x=1)
    a["itself"] = a
    return a


def optimizer():
    model = nn.Linear(2, 2)
    made = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    made.step()
    return made


def of_tensors():
    """Dicts keyed by tensors, tensors that cannot be read, and texts that are no names."""
    return {
        torch.ones(1): 3,
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.ones(2, device="meta"),
        "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        1: torch.ones(1),
        "1": torch.ones(1),
        "x" * 5000: torch.ones(1),
        "\ud800": torch.ones(1),
    }


BESIDE = {
    "numbers of NumPy": [numpy.float64(0.5), numpy.int64(3), numpy.bool_(True), numpy.float32(1)],
    "arrays": {"a": numpy.ones(3), "b": numpy.array(["x", None], dtype=object)},
    "a structured array": numpy.zeros(2, dtype=[("a", "f4"), ("b", "i8")]),
    "types of NumPy": [numpy.float32, numpy.dtype("float16")],
    "random states": [numpy.random.get_state(), random.getstate(), torch.get_rng_state()],
    "generators": [numpy.random.default_rng(0), numpy.random.RandomState(0), random.Random(0)],
    "paths": [pathlib.PurePosixPath("/a"), pathlib.Path("b"), pathlib.PureWindowsPath("c")],
    "times": [
        datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc),
        datetime.date(2024, 1, 1),
        datetime.timedelta(1),
        datetime.timezone(datetime.timedelta(hours=1)),
    ],
    "numbers": [decimal.Decimal("1.5"), fractions.Fraction(1, 3), 1 + 2j, 1 << 70, -(1 << 3000)],
    "one more number": 1 << 20_000,
    "collections": [
        collections.defaultdict(list, {"loss": [1.0]}),
        collections.defaultdict(dict),
        collections.Counter("abc"),
        collections.deque([1, 2], maxlen=3),
        collections.deque([torch.ones(2)]),
        collections.ChainMap({"a": 1}),
        collections.UserDict({"a": 1}),
        collections.UserList([1]),
        Ordered(a=1),
        Attributes(a=Attributes(b=1)),
        Items([1, 2]),
        types.SimpleNamespace(a=1),
        argparse.Namespace(a=pathlib.Path("x")),
    ],
    "sets": [{1, 2}, frozenset({"a"}), set(), {frozenset({1})}],
    "bytes": [b"x", bytearray(b"yz"), bytearray()],
    "classes and functions": [
        nn.ReLU,
        Net,
        max,
        operator.attrgetter("a"),
        str.lower,
        Net().forward,
        WithNew.make,
        type(None),
        type(...),
        Ellipsis,
        NotImplemented,
        int,
        dict,
        collections.OrderedDict,
        nn.Parameter,
        torch.Size,
        torch.FloatStorage,
        torch.float32,
        torch.strided,
        torch.device("cuda:1"),
    ],
    "partials": [functools.partial(nn.LayerNorm, eps=1e-6), functools.partial(max, 1)],
    "enums": [Colour.RED, Flags.A | Flags.B, Text.MIN, Text],
    "data classes": [Config(), Slotted(1), Point(1, Point(2, 3))],
    "objects": [WithNew(a=1), uuid.UUID(int=3), slice(1, 2), range(3), object(), io.BytesIO(b"x")],
    "errors": [ValueError("x"), KeyError(3)],
    "patterns": [re.compile("a.*")],
    "losses and models": [nn.MSELoss(), nn.CrossEntropyLoss(torch.ones(2)), Net(), nn.Identity()],
    "schedules": [torch.optim.swa_utils.SWALR(optimizer(), 0.1).state_dict(), nn.ModuleList()],
    "an optimizer": optimizer(),
    "a schedule": torch.optim.lr_scheduler.OneCycleLR(optimizer(), 0.1, 10).state_dict(),
    "odd keys": {
        frozenset({1}): 1,
        (1, (2, 3)): 2,
        1 << 90: 3,
        1 << 63: 4,
        None: 5,
        1.5: 6,
        numpy.int64(3): 7,
        Colour.RED: 8,
        torch.float32: 9,
        pathlib.PurePath("x"): 10,
        1j: 11,
        nn.ReLU: 12,
        tuple(range(1000)): 13,
    },
    "odd tensors": of_tensors(),
    "something cyclic": cyclic(),
    "texts": ["\ud800", "ä\n\0", "x" * 100_000],
}


def weights(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(4, 3, generator=g), "b": torch.randn(4, generator=g).half()}


def check(path, expected=None, **options):
    expected = weights() if expected is None else expected
    found = Candidates(path, **options)[0]
    assert found.info.keys() == expected.keys()
    for key, t in expected.items():
        assert torch.equal(found.tensor(key), t), key


def pickled(value, protocol):
    """The pickle; b"" if Python cannot write it by an old protocol."""
    try:
        return pickle.dumps(value, protocol=protocol)
    except (TypeError, KeyError, ValueError, pickle.PicklingError):
        assert protocol < 4
        return b""


@pytest.mark.parametrize("protocol", range(1, 6))
@pytest.mark.parametrize("beside", BESIDE)
def test_beside_the_weights(beside, protocol, tmp_path):
    value = {"before": BESIDE[beside], "state_dict": weights(), "after": [BESIDE[beside]]}
    if pickled(value, protocol):
        torch.save(value, tmp_path / "x.ckpt", pickle_protocol=protocol)
        check(tmp_path / "x.ckpt")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("beside", BESIDE)
def test_pickles_of_every_protocol(beside, protocol):
    """What is plain in them comes out as it was; and nothing stops at an object."""
    plain = {"x": [1, -2, 1 << 40, -(1 << 80), 1.5, "ä\n'", b"\xff", None, True, False, (), (1,)]}
    value = [plain, BESIDE[beside], {"y": plain}]
    if data := pickled(value, protocol):
        found = unpickle(data, {"_codecs.encode": NAMES["_codecs.encode"]}, unknown=Made)
        assert found[0] == plain and found[2] == {"y": plain}


def test_instructions_that_only_python_2_writes():
    """INST, OBJ, STRING, DUP, POP and others, as pickletools describes them."""

    def of(data):
        return unpickle(data, {}, unknown=Made)

    assert of(b"(lp0\nS'a\\'\\x41'\np1\naI5\naI01\naL7L\naF1.5\na.") == ["a'A", 5, True, 7, 1.5]
    assert of(b'(dp0\nS"k"\nV\\u00e4b\ns.') == {"k": "äb"}
    assert of(b"(S'k'\nI1\nd.") == {"k": 1}
    assert of(b"S'\\xff'\n.") == b"\xff" and of(b"U\x02abT\x01\0\0\0c\x86.") == ("ab", "c")
    assert of(b"K\x01K\x020.") == 1 and of(b"K\x01(K\x02K\x031.") == 1 and of(b"K\x012\x86.")
    for data in (b"(I1\nios\nsystem\n.", b"(cos\nsystem\nI1\no."):
        made = of(data)
        assert type(made) is Made and made.kind == "os.system" and made.arguments == (1,)
    assert of(b"(icopy_reg\n_reconstructor\n.").kind == "copyreg._reconstructor"


@pytest.mark.parametrize("beside", BESIDE)
def test_among_the_weights(beside, tmp_path):
    """Left out as a number or text would be, or named: never another tensor."""
    torch.save(weights() | {"more": BESIDE[beside]}, tmp_path / "x.pt")
    try:
        check(tmp_path / "x.pt")
    except CandidateError as error:
        assert re.search(r"expected dense tensors, found an? .*\(at 'more'\)", str(error))


@pytest.mark.parametrize(
    "value, name",
    [
        (numpy.ones(3), r"numpy.*_reconstruct: save tensors instead"),
        (numpy.float64(3), r"numpy.*scalar: save tensors instead"),
        (pathlib.PurePosixPath("x"), "pathlib.*PurePosixPath"),
        (Config(), "test_beside.Config"),
        (nn.MSELoss(), r"a whole model \(torch.nn.modules.loss.MSELoss\)"),
        (Net(), r"a whole model \(.*test_beside.Net\)"),
        (nn.ReLU, "torch.nn.modules.activation.ReLU"),
        (functools.partial(max, 1), "functools.partial"),
        (datetime.date(2024, 1, 1), "datetime.date"),
        (Colour.RED, "test_beside.Colour"),
        (torch.eye(2).to_sparse(), "a sparse one"),
        (torch.ones(2, device="meta"), "one without data"),
        (torch.ones(2, dtype=torch.complex64).conj(), "one that is conjugated"),
    ],
)
@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict"])
def test_objects_among_the_weights_are_named(value, name, key, tmp_path):
    for state in (weights() | {"w": value}, {"w": value}):
        content = {key: state, "step": torch.tensor(3)} if key else state
        torch.save(content, tmp_path / "x.pt")
        found = rf"expected dense tensors, found .*{name}.*\(at 'w'\)$"
        with pytest.raises(CandidateError, match=found):
            Candidates(tmp_path / "x.pt")
        if key:
            with pytest.raises(CandidateError, match=name):
                Candidates(tmp_path / "x.pt", entry=key)


@pytest.mark.parametrize("protocol", [1, 2, 4])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: collections.defaultdict(dict, d),
        Ordered,
        Attributes,
        collections.OrderedDict,
        lambda d: {"state_dict": Attributes(d)},
        lambda d: collections.defaultdict(list, {"model": Ordered(d), "args": Config()}),
    ],
)
def test_kinds_of_dicts_that_hold_the_weights(wrap, protocol, tmp_path):
    if pickled(wrap(weights()), protocol):
        torch.save(wrap(weights()), tmp_path / "x.pt", pickle_protocol=protocol)
        check(tmp_path / "x.pt")


def test_the_entries_are_named_where_objects_are_in_the_way(tmp_path):
    torch.save({"net": weights(), "args": Config(), "step": torch.tensor(1)}, tmp_path / "x.pt")
    with pytest.raises(CandidateError, match=r"Config.*some under: net: name one as entry"):
        Candidates(tmp_path / "x.pt")
    check(tmp_path / "x.pt", entry="net")


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"model": m, "ema": None, "epoch": 3}])
@pytest.mark.parametrize("model", [Net(), nn.Sequential(nn.Linear(2, 2)), nn.BatchNorm1d(2)])
def test_whole_models(model, wrap, tmp_path):
    torch.save(wrap(model), tmp_path / "x.pt")
    with pytest.raises(
        CandidateError, match=r"found a whole model \(.*save its state_dict instead"
    ):
        Candidates(tmp_path / "x.pt")


class Special(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "name, hint",
    [
        ("torch.distributed.tensor DTensor", r"a DTensor .*full_tensor\(\).*full_state_dict"),
        ("torch.distributed._shard.sharded_tensor.api ShardedTensor", "FULL_STATE_DICT"),
        ("bitsandbytes.nn.modules Params4bit", "Params4bit .*quantised"),
        ("torchao.dtypes.affine_quantized_tensor AffineQuantizedTensor", "Affine.*quantised"),
        ("diffusers.quantizers.gguf.utils GGUFParameter", "GGUFParameter .*quantised"),
        ("test_beside Special", r"a Special \("),
    ],
)
def test_tensors_of_other_classes(name, hint, tmp_path):
    """As Tensor.__reduce_ex__ writes them."""
    torch.save({"w": Special(torch.ones(2))}, tmp_path / "x.pt")
    module, _, class_ = name.partition(" ")
    data = {}
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        data = {n: archive.read(n) for n in archive.namelist()}
    old = f"c{__name__}\nSpecial\n".encode()
    for record, content in data.items():
        if record.endswith("data.pkl"):
            assert old in content
            data[record] = content.replace(old, f"c{module}\n{class_}\n".encode())
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
        for record, content in data.items():
            archive.writestr(record, content)
    with pytest.raises(CandidateError, match=rf"expected dense tensors, found .*{hint}.*'w'"):
        Candidates(tmp_path / "y.pt")


def test_tensors_of_another_device(tmp_path):
    """As PyTorch writes those of XLA: the array, the dtype, the device."""

    class Elsewhere:
        def __reduce__(self):
            rebuild = torch._utils._rebuild_device_tensor_from_numpy
            return rebuild, (numpy.ones(2), torch.float32, "xla:0", False)

    for value in (weights() | {"w": Elsewhere()}, {"state_dict": {"w": Elsewhere()}}):
        torch.save(value, tmp_path / "x.pt")
        with pytest.raises(CandidateError, match=r"XLA.*move it to the CPU before saving"):
            Candidates(tmp_path / "x.pt")
    torch.save({"state_dict": weights(), "more": Elsewhere()}, tmp_path / "x.pt")
    check(tmp_path / "x.pt")


# What loading a model needs ----------------------------------------------------------------------


class Stateful(nn.Linear):
    def __init__(self, extra):
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}])
def test_metadata_and_extra_states(wrap, protocol, tmp_path):
    plain = {"amax": [1.0, torch.ones(2)], "name": "x", "no": None, "t": (1, b"y")}
    model = nn.ModuleDict(
        {
            "plain": Stateful(plain),
            "number": Stateful(3),
            "none": Stateful(None),
            "tensor": Stateful(torch.tensor([1, 2])),
            "object": Stateful({"recipe": Config()}),
            "set": Stateful({1, 2}),
            "norm": nn.BatchNorm1d(2),
        }
    )
    state = model.state_dict()
    torch.save(wrap(state), tmp_path / "x.pt", pickle_protocol=protocol)
    found = open_checkpoint(tmp_path / "x.pt")
    assert found.metadata == {k: dict(v) for k, v in state._metadata.items()}
    assert found.metadata["norm"] == {"version": 2}
    assert found.tensors.keys() == {k for k, v in state.items() if isinstance(v, torch.Tensor)}
    assert found.tensors["tensor._extra_state"].read().tolist() == [1, 2]
    extra = dict(found.extra)
    assert extra.pop("object._extra_state").kind.endswith("test_beside.Config")
    assert extra.pop("set._extra_state").kind == "builtins.set"
    loaded = extra.pop("plain._extra_state")
    assert torch.equal(loaded["amax"].pop(), torch.ones(2))
    assert loaded == plain | {"amax": [1.0]}
    assert extra == {"number._extra_state": 3, "none._extra_state": None}


@pytest.mark.parametrize(
    "metadata", [None, 3, {"a": 3}, {"a": {"v": [1]}}, {3: {}}, {"a": {"v": Config()}}]
)
def test_metadata_that_are_not_plain(metadata, tmp_path):
    state = collections.OrderedDict(weights())
    state._metadata = metadata
    torch.save(state, tmp_path / "x.pt")
    assert open_checkpoint(tmp_path / "x.pt").metadata == {}
    check(tmp_path / "x.pt")


def test_what_is_no_tensor_among_the_weights_is_listed(tmp_path):
    value = weights() | {"epoch": 3, "names": ["x"], "args": argparse.Namespace()}
    torch.save(value, tmp_path / "x.pt")
    found = open_checkpoint(tmp_path / "x.pt")
    assert found.others == ("epoch", "names", "args") and found.tensors.keys() == weights().keys()


# Files that are something else -------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12\n"
LFS = "a Git LFS pointer.*git lfs pull"
HEADS = {
    b"": "empty",
    POINTER: LFS,
    b"\x1f\x8b\x08\0" + b"x" * 100: "compressed with gzip",
    b"BZh91AY": "compressed with bzip2",
    b"\xfd7zXZ\0": "compressed with xz",
    b"(\xb5/\xfd" + b"x" * 100: "compressed with zstd",
    b"GGUF\3\0\0\0" + b"x" * 100: "GGUF",
    b"\x89HDF\r\n\x1a\n" + b"\0" * 100: "HDF5",
    b"\x93NUMPY\1\0" + b"x" * 100: "a NumPy array",
    b"\n<!DOCTYPE html><html>": "a web page",
    b"<html><head>": "a web page",
    b'<?xml version="1.0"?><Error>': "a web page",
    b'{"error": "Not found"}': "JSON text",
    b'model_checkpoint_path: "x"': "TensorFlow",
    b"x" * 257 + b"ustar\0" + b"0" * 300: "a tar archive",
    b"\x08\x07\x12\x07pytorch\x1a\x03": "ONNX",
    b"\x85\xa4beta\xc4": "msgpack",
}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".weights"])
@pytest.mark.parametrize("head", HEADS)
def test_first_bytes(head, suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(head)
    with pytest.raises(CandidateError, match=HEADS[head]):
        Candidates(path)


def test_pointers_inside_directories(tmp_path):
    def refused(folder):
        with pytest.raises(CandidateError, match=LFS):
            Candidates(folder)

    for name in ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(POINTER)
        refused(tmp_path / name)
    index = tmp_path / "index"
    index.mkdir()
    save_file({"a": torch.ones(2)}, index / "1.safetensors")
    (index / "2.safetensors").write_bytes(POINTER)
    map_ = {"a": "1.safetensors", "b": "2.safetensors"}
    (index / "model.safetensors.index.json").write_text(json.dumps({"weight_map": map_}))
    refused(index)
    (index / "model.safetensors.index.json").write_bytes(POINTER)
    refused(index)
    dcp.save(weights(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    next((tmp_path / "dcp").glob("*.distcp")).write_bytes(POINTER)
    refused(tmp_path / "dcp")
    (tmp_path / "dcp" / METADATA).write_bytes(POINTER)
    refused(tmp_path / "dcp")


def test_programs(tmp_path):
    path = tmp_path / "x.pt"
    for program in (
        torch.jit.script(nn.Linear(2, 2)),
        torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)),
    ):
        torch.jit.save(program, path)
        with pytest.raises(CandidateError, match=r"a TorchScript program.*save the state_dict"):
            Candidates(path)
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "x.pt2")
    (tmp_path / "x.pt2").rename(path)
    with pytest.raises(CandidateError, match=r"a program of torch\.export"):
        Candidates(path)


def test_other_archives(tmp_path):
    numpy.savez(tmp_path / "x.npz", a=numpy.ones(2))
    (tmp_path / "x.npz").rename(tmp_path / "x.pt")
    with pytest.raises(CandidateError, match="an archive of NumPy arrays"):
        Candidates(tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
        archive.writestr("model.weights.h5", b"x")
    with pytest.raises(CandidateError, match="a Keras model"):
        Candidates(tmp_path / "y.pt")
    with zipfile.ZipFile(tmp_path / "z.pt", "w") as archive:
        archive.writestr("x/.data/extern_modules", b"x")
    with pytest.raises(CandidateError, match="a package of programs"):
        Candidates(tmp_path / "z.pt")


def test_good_files_are_never_taken_for_something_else(tmp_path):
    """A header of 559,903 bytes begins like a gzip file."""
    name = "x" * 900
    tensors = {f"{name}{k}": torch.ones(1) for k in range(100)}
    header = {
        key: {"dtype": "F32", "shape": [1], "data_offsets": [4 * k, 4 * k + 4]}
        for k, key in enumerate(tensors)
    }
    text = json.dumps(header).encode().ljust(0x088B1F)
    data = len(text).to_bytes(8, "little") + text + torch.ones(100).numpy().tobytes()
    assert data[:3] == b"\x1f\x8b\x08"
    (tmp_path / "x.safetensors").write_bytes(data)
    check(tmp_path / "x.safetensors", tensors)
