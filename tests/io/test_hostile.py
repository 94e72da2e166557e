"""Files that mean harm, by hand: each is refused with an error that says why, at once, and nothing
in it is run. More by chance: fuzz.py.
"""

import json
import os
import pickle
import resource
import socket
import struct
import time
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import save_file
from twa.distributed.ranks import Ranks
from twa.io.atomic import write_torch
from twa.io.candidates import Candidates
from twa.io.checks import MAX_HEADER
from twa.io.dcp import METADATA
from twa.io.errors import CandidateError, StateError
from twa.io.mapped import covered
from twa.io.peft import adapter_config
from twa.io.unpickle import Refused, unpickle
from twa.io.versions import RUN
from twa.merge.resume import Store


@pytest.fixture(autouse=True)
def quick_and_nothing_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun = time.process_time()
    yield
    assert time.process_time() - begun < 60  # of the CPU; what is not at once would take hours
    assert not (tmp_path / "canary").exists()


class Evil:
    """What pickle would run: a command, and Python."""

    def __init__(self, function=os.system, argument="touch canary"):
        self.function, self.argument = function, argument

    def __reduce__(self):
        return self.function, (self.argument,)


EVIL = [
    Evil(),
    Evil(exec, "open('canary', 'w')"),
    Evil(eval, "open('canary', 'w')"),
    Evil(getattr, "x"),
]


def refused(path, message, error=CandidateError):
    with pytest.raises(error, match=message) as raised:
        Candidates(path)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 3000


def zipped(path, records, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in records:
            archive.NameToInfo.clear()  # it would warn of names that occur twice
            archive.writestr(zipfile.ZipInfo(name) if not options else name, data)
    return path


def records_of(value):
    torch.save(value, "records.pt")
    with zipfile.ZipFile("records.pt") as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def with_pickle(path, data, value=None):
    """An archive of torch.save with another pickle in it."""
    return zipped(
        path,
        [
            (name, data if name.endswith("data.pkl") else old)
            for name, old in records_of(value or {"w": torch.zeros(3)})
        ],
    )


# Code in pickles ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*would call")
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("zip_", [True, False])
@pytest.mark.parametrize("evil", EVIL)
def test_code_beside_the_weights(suffix, zip_, evil, tmp_path):
    """It is passed over, like any other object there."""
    path = tmp_path / f"x{suffix}"
    torch.save(
        {"state_dict": {"w": torch.ones(2)}, "more": evil},
        path,
        _use_new_zipfile_serialization=zip_,
    )
    if zip_:
        assert Candidates(path)[0].tensor("w").tolist() == [1, 1]
    else:
        refused(path, "not a torch checkpoint: expected a zip archive")


@pytest.mark.filterwarnings("ignore:.*would call")
@pytest.mark.parametrize("evil", EVIL)
def test_code_in_the_place_of_weights(evil, tmp_path):
    name = r"(posix|nt)\.system|builtins\.\w+"
    for value in (
        evil,
        {"w": evil},
        {"state_dict": {"w": torch.zeros(2), "v": evil}},
        {"state_dict": evil, "v": torch.zeros(2)},
        {"model": {"w": evil}, "v": torch.zeros(2)},
    ):
        torch.save(value, "x.pt")
        refused(tmp_path / "x.pt", rf"(would run code|expected dense tensors).*({name})")


def test_code_is_named_in_a_warning(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}, "more": [Evil()]}, "x.pt")
    with pytest.warns(UserWarning, match=r"x\.pt: torch\.load.* would call (posix|nt)\.system"):
        Candidates(tmp_path / "x.pt")


@pytest.mark.parametrize("evil", EVIL)
def test_code_in_a_plain_pickle(evil, tmp_path):
    (tmp_path / "x.bin").write_bytes(pickle.dumps({"w": evil}))
    refused(tmp_path / "x.bin", r"x\.bin: not a torch checkpoint: expected a zip archive")


def test_code_in_the_state_of_a_run(tmp_path):
    for evil in EVIL:
        torch.save({"format": RUN, "run": evil}, "state.pt")
        message = "refused: loading it would run code|expected plain values, found an object of"
        with pytest.raises(StateError, match=rf"not a saved state \(.*({message})"):
            Store(tmp_path, resume=True).read(Ranks())


def test_names_of_torch_that_do_much_are_not_called(tmp_path):
    """torch.load(weights_only=True) calls all of these."""
    number = b"\x8a\x05" + (10**11).to_bytes(5, "little") + b"\x85R"
    none = "expected a dict of tensors"
    for name, message in (
        (b"builtins\nbytearray", none),
        (b"builtins\nset", none),
        (b"collections\nCounter", none),
        (b"torch\nTensor", r"expected dense tensors, found an object of torch\.Tensor"),
        (b"torch\nFloatTensor", r"an object of torch\.FloatTensor \(at 'w'\)"),
        (b"torch.sparse\nFloatTensor", r"an object of torch\.sparse\.FloatTensor"),
        (b"torch._C\n_from_dlpack", r"an object of torch\._C\._from_dlpack"),
        (b"a\x1b[2J\nb", r"an object of 'a\\x1b\[2J\.b'"),
    ):
        call = b"\x80\x02}X\x01\x00\x00\x00wc" + name + b"\n" + number + b"s."
        refused(with_pickle(tmp_path / "x.pt", call), message)


def test_pickles_that_call_what_is_no_function():
    with pytest.raises(Refused, match="it calls a str"):
        unpickle(b"\x80\x02X\x01\x00\x00\x00w)R.", {})
    for data in (
        b"",
        b".",
        b"\x80\x02N",
        b"\x80\x07N.",
        b"Nq",
        b"t.",
        b"K\x01b.",
        b"N(s.",
        b"]NNs.",
        b"h\x05.",
        b"NQ.",
        b"\x8e" + b"\xff" * 8 + b".",
        b"cos",
    ):
        with pytest.raises((ValueError, IndexError, KeyError, EOFError)):
            unpickle(data, {})


def test_tuples_in_tuples(tmp_path):
    """2^40 of them as a key: whoever hashes it never comes back. An object stands for it."""
    laughs = b")" + b"".join(bytes([*b"q", k, *b"h", k, 0x86]) for k in range(40))
    refused(
        with_pickle(tmp_path / "x.pt", b"\x80\x02}" + laughs + b"Ns."),
        "expected a dict of tensors",
    )
    refused(
        with_pickle(tmp_path / "x.pt", b"\x80\x02}X\x01\x00\x00\x00w" + laughs + b"s."),
        "expected a dict of tensors",
    )
    many = (
        b"\x80\x02}("
        + b"".join(
            b"\x8a\x0a" + ((k << 61) - k).to_bytes(10, "little") + b"N" for k in range(1, 50_000)
        )
        + b"u."
    )
    # all with the same hash
    refused(with_pickle(tmp_path / "x.pt", many), "expected a dict of tensors")
    # one key of many items, hashed again and again
    long = b"\x80\x02}(" + b"N" * 100_000 + b"tq\0" + b"0(" + b"h\0N" * 100_000 + b"u."
    refused(with_pickle(tmp_path / "x.pt", long), "expected a dict of tensors")


@pytest.mark.parametrize(
    "call",
    [
        b"ccollections\nOrderedDict\n",
        b"ctorch\nSize\n",
        b"ctorch._utils\n_rebuild_parameter\n",
        b"ctorch._utils\n_rebuild_sparse_tensor\n",
    ],
)
def test_one_long_list_given_again_and_again(call, tmp_path):
    """To what copies it: 100,000 times 100,000."""
    items = b"]q\0(" + b"NN\x86" * 100_000 + b"e0" + call + b"q\x010]"
    data = b"\x80\x02" + items + b"h\x01h\0\x85Ra" * 100_000 + b"."
    refused(with_pickle(tmp_path / "x.pt", data), "not a complete torch checkpoint")


def test_objects_of_one_long_list(tmp_path):
    """What is not looked into copies nothing of what it was made from."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    items = b"(" + b"N" * 100_000 + b"tq\0" + b"0cposixpath\nx\nq\x010]"
    for call in (b"h\x01h\0R", b"h\x01h\0\x81", b"h\x01h\0}\x92", b"h\x01)Rh\0b"):
        data = b"\x80\x04" + items + (call + b"a") * 100_000 + b"."
        refused(with_pickle(tmp_path / "x.pt", data), "expected a dict of tensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_numbers_of_many_digits(tmp_path):
    for number in (
        b"\x8b" + struct.pack("<I", 1 << 20) + b"\x01" * (1 << 20),
        b"L" + b"9" * (1 << 20) + b"L\n",
        b"I" + b"9" * (1 << 20) + b"\n",
    ):
        for data in (b"\x80\x02" + number + b".", b"\x80\x02}" + number + b"Ns."):
            refused(with_pickle(tmp_path / "x.pt", data), "expected a dict of tensors")
    refused(
        with_pickle(tmp_path / "x.pt", b"\x80\x02Np" + b"9" * 5000 + b"\n."),
        "not a complete torch checkpoint",
    )
    refused(
        with_pickle(tmp_path / "x.pt", b"\x80\x02N" + b"\x82\x01" + b"."),
        "not a complete torch checkpoint .*unexpected instruction",
    )


def test_dicts_in_dicts(tmp_path):
    """20^13 of them, or itself: each is looked into once."""
    data = b"\x80\x02}q\x00"
    for k in range(1, 14):
        data += (
            b"}q"
            + bytes([k])
            + b"("
            + b"".join(b"K" + bytes([i]) + b"h" + bytes([k - 1]) for i in range(20))
            + b"u"
        )
    refused(with_pickle(tmp_path / "x.pt", data + b"."), "expected a dict of tensors")
    refused(
        with_pickle(tmp_path / "x.pt", b"\x80\x02}q\x00X\x01\x00\x00\x00wh\x00s."),
        "expected a dict of tensors",
    )
    refused(
        with_pickle(tmp_path / "x.pt", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
        "expected a dict of tensors",
    )


@pytest.mark.parametrize(
    "tensor, message",
    [
        ((0, (1 << 50,), (0,)), "is expanded from 1 elements"),
        ((0, (4,), (1,)), "needs 16 bytes of its record, found 12"),
        ((2, (2,), (1,)), "needs 16 bytes of its record, found 12"),
        ((0, (2,), (-1,)), "expected a tensor's sizes and strides"),
        ((-1, (2,), (1,)), "expected a tensor's sizes and strides"),
        ((0, (-2,), (1,)), "expected a tensor's sizes and strides"),
        ((0, (1 << 63,), (1,)), "expected a tensor's sizes and strides"),
        ((0, (1 << 29, 1 << 30), (0, 0)), "is expanded"),
        ((0, (1 << 40, 1 << 40), (0, 0)), "expected a tensor's sizes and strides"),
        ((0, (0, 1 << 59, 1 << 59), (1, 1, 1)), "expected a tensor's sizes and strides"),
        ((0, (3,), (1, 1)), "expected a tensor's sizes and strides"),
        ((0, (1,) * 65, (1,) * 65), "expected a tensor's sizes and strides"),
    ],
)
def test_tensors_beyond_their_record(tensor, message, tmp_path):
    records = records_of({"w": torch.zeros(3)})
    data = dict(records)["records/data.pkl"]
    old = b"K\x00K\x03\x85q\x08K\x01\x85q\x09"
    assert old in data
    numbers = [
        b"".join(b"\x8a\x0a" + v.to_bytes(10, "little", signed=True) for v in values)
        for values in tensor[1:]
    ]
    new = (
        b"\x8a\x0a"
        + tensor[0].to_bytes(10, "little", signed=True)
        + b"("
        + numbers[0]
        + b"t("
        + numbers[1]
        + b"t"
    )
    refused(with_pickle(tmp_path / "x.pt", data.replace(old, new)), message)


def test_tensors_that_are_not_plain(tmp_path):
    for t, kind in (
        (torch.eye(2).to_sparse(), "a sparse one"),
        (torch.eye(2, device="meta"), "one without data"),
    ):
        torch.save({"w": t}, "x.pt")
        refused(tmp_path / "x.pt", f"expected dense tensors, found {kind}")
    call = b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_qtensor\n)Rs."
    refused(with_pickle(tmp_path / "x.pt", call), "expected dense tensors, found a quantised one")


# Zip archives ------------------------------------------------------------------------------------


def test_archives(tmp_path):
    path, records = tmp_path / "x.pt", records_of({"w": torch.zeros(3)})
    names = [name for name, _ in records]
    refused(zipped(path, [*records, records[-1]]), "occurs twice")
    refused(
        zipped(path, [r for r in records if not r[0].endswith("data.pkl")]),
        r"expected records data\.pkl and byteorder",
    )
    refused(
        zipped(path, [r for r in records if not r[0].endswith("data/0")]),
        "it has no record '0' for a tensor",
    )
    refused(
        zipped(path, [(n, b"middle" if n.endswith("byteorder") else d) for n, d in records]),
        r"expected records data\.pkl and byteorder",
    )
    bomb = [(n, bytes(100 << 20) if n.endswith("data/0") else d) for n, d in records]
    refused(
        zipped(path, bomb, compression=zipfile.ZIP_DEFLATED),
        "is compressed or encrypted, as torch.save never writes it",
    )
    assert path.stat().st_size < 1 << 20

    def changed(signature, at, value, which=-1):
        data = bytearray(zipped(path, records).read_bytes())
        places = [i for i in range(len(data)) if data[i : i + 4] == signature]
        data[places[which] + at : places[which] + at + len(value)] = value
        path.write_bytes(data)
        return path

    last = len(names) - 1
    refused(changed(b"PK\1\2", 8, b"\1\0"), "is compressed or encrypted")
    refused(changed(b"PK\1\2", 10, b"\x63\0"), "is compressed or encrypted")
    refused(
        changed(b"PK\1\2", 20, struct.pack("<II", 1 << 30, 1 << 30), last),
        "goes beyond the end of the file",
    )
    refused(changed(b"PK\1\2", 34, b"\1\0", last), "claims to be in another file or a directory")
    # PyTorch gives uninitialised memory for it
    refused(changed(b"PK\1\2", 38, b"\x10", last), "claims to be in another file or a directory")
    path.write_bytes(zipped(path, records).read_bytes() * 2)
    refused(path, "expected its first record at its begin")
    refused(
        changed(b"PK\1\2", 42, struct.pack("<I", 1), last),
        "is not where the archive's directory says",
    )
    refused(changed(b"PK\1\2", 42, struct.pack("<I", 0), last), "its records overlap")
    # without the zip64 field that it asks for
    refused(
        changed(b"PK\1\2", 20, b"\xff" * 8, last), "not a complete torch checkpoint|beyond the end"
    )
    refused(changed(b"PK\5\6", 16, b"\xff\xff\xff\xff"), "not a complete torch checkpoint")


def test_zip64_is_read(tmp_path):
    """As torch.save writes sizes beyond 4 GB."""
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name, data in records_of({"w": torch.arange(3.0)}):
            with archive.open(name, "w", force_zip64=True) as f:
                f.write(data)
    assert Candidates(tmp_path / "x.pt")[0].tensor("w").tolist() == [0, 1, 2]


# Paths and what lies there -----------------------------------------------------------------------

PATHS = [
    "../outside.safetensors",
    "/etc/passwd",
    "sub/x.safetensors",
    "..\\outside.safetensors",
    "..",
    ".",
    "",
    "a\0b.safetensors",
    "\x1b[2J.safetensors",
]
PATHS += ["\ud800.safetensors", "a\nb.safetensors", "~/../x/", "x" * 5000]


@pytest.mark.parametrize("path", PATHS)
def test_shards_stay_beside_their_index(path, tmp_path):
    save_file({"w": torch.zeros(2)}, "outside.safetensors")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": path}})
    )
    refused(tmp_path / "c", "is not the name of a file beside the index|expected JSON")


def test_links_beside_the_index_are_followed(tmp_path):
    """Hugging Face's own cache is made of links to ../../blobs.

    What they lead to is only read, and must be a regular file.
    """
    for folder in ("blobs", "snapshots/c"):
        (tmp_path / folder).mkdir(parents=True)
    save_file({"w": torch.ones(2)}, tmp_path / "blobs" / "ab")
    here = tmp_path / "snapshots" / "c"
    (here / "model-1.safetensors").symlink_to("../../blobs/ab")
    (here / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "model-1.safetensors"}})
    )
    assert Candidates(here)[0].tensor("w").tolist() == [1, 1]
    for target in ("/dev/zero", "nothing", "model-1.safetensors", "../c"):
        (here / "model-1.safetensors").unlink()
        (here / "model-1.safetensors").symlink_to(target)
        refused(here, "no such file, but model.safetensors.index.json names it")


@pytest.fixture
def odd_files():
    """Functions that put something there that is no regular file."""

    def listen(path):
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(os.path.relpath(path))

    return [
        os.mkfifo,
        listen,
        os.mkdir,
        lambda path: os.symlink("/dev/zero", path),
        lambda path: os.symlink("/dev/stdin", path),
    ]


@pytest.mark.parametrize("k", range(5))
def test_what_is_no_regular_file(k, odd_files, tmp_path):
    make = odd_files[k]
    for name in ("x.safetensors", "x.pt", "x.index.json"):
        make(tmp_path / name)
        refused(tmp_path / name, "expected a regular file|expected a directory with")
    for name, message in (
        (METADATA, "expected a directory with"),
        ("model.safetensors", "expected a directory with"),
        ("s.safetensors", "no such file"),
    ):
        folder = tmp_path / f"{name} inside"
        folder.mkdir()
        make(folder / name)
        if name == "s.safetensors":
            (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"w": name}})
            )
        refused(folder, message)
    (tmp_path / "adapter").mkdir()
    make(tmp_path / "adapter" / "adapter_config.json")
    with pytest.raises(CandidateError, match="expected the adapter's configuration"):
        adapter_config(tmp_path / "adapter")
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / "state.pt")
    with pytest.raises(StateError, match="expected a regular file"):
        Store(tmp_path / "run", resume=True).read(Ranks())


# JSON and safetensors ----------------------------------------------------------------------------


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DEEP = b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    "header, message",
    [
        (b"", "expected a JSON object|no valid JSON"),
        (b"[]", "expected a JSON object as header, found list"),
        (b" {}", "expected a JSON object"),
        (DEEP, "no valid JSON"),
        (
            b'{"w":' + b"[" * 500 + b"]" * 500 + b"}",
            "expected dtype, shape and data_offsets|no valid JSON",
        ),
        (
            b'{"w":{"dtype":"F32","shape":' + b"[" * 800 + b"]" * 800 + b',"data_offsets":[0,4]}}',
            "expected sizes as shape|no valid JSON",
        ),
        (b'{"w":NaN}', "no valid JSON.*found NaN"),
        (b'{"w":-0}', "no valid JSON.*found -0"),
        (b'{"w":1e999}', "expected dtype, shape and data_offsets"),
        (b'{"w":{"dtype":"F32","shape":[1e2],"data_offsets":[0,400]}}', "expected sizes as shape"),
        (
            b'{"w":{"dtype":"F32","shape":[' + b"1" * 5000 + b'],"data_offsets":[0,4]}}',
            "no valid JSON",
        ),
        (b'{"\\ud800":1}', "no valid JSON"),
        (b'{"__metadata__":{"a":"\\ud800"}}', "no valid JSON"),
        (b'{"\xff":1}', "no valid JSON"),
        (b'{"a":1,"a":1}', "'a' occurs twice"),
        (b'{"a":{"dtype":"F32","dtype":"F16"}}', "'dtype' occurs twice"),
        ({"x" * 2000: entry([1], [0, 4])}, "a name of 2000 characters"),
        ({"\x1b[2J": 3}, r"tensor '\\x1b\[2J': expected dtype"),
        ({"__proto__": 3}, "tensor '__proto__': expected dtype"),
        ({"w": entry([1], [0, 4], "\x1b[2J")}, r"has dtype '\\x1b\[2J', expected one of"),
        ({"w": entry([1], [0, 4], ["F32"] * 100_000)}, "has dtype .*, expected one of"),
        ({"w": entry([1 << 62], [0, 4])}, "expected sizes as shape"),
        ({"w": entry([1 << 40, 1 << 40], [0, 4])}, "expected sizes as shape"),
        ({"w": entry([1 << 40, 1 << 40, 0], [0, 0])}, "expected sizes as shape"),
        ({"w": entry([2] * 1_000_000, [0, 4])}, "expected sizes as shape"),
        ({"w": entry([-1], [0, 4])}, "expected sizes as shape"),
        ({"w": entry([True], [0, 4])}, "expected sizes as shape"),
        ({"w": entry([1], [4, 0])}, "does not fill the bytes"),
        ({"w": entry([1], [0, 1 << 59])}, "does not fill the bytes"),
        ({"w": entry([1], [4, 8])}, "gap or overlap"),
        ({"v": entry([1], [0, 4]), "w": entry([1], [0, 4])}, "gap or overlap"),
        ({"v": entry([2], [0, 8]), "w": entry([1], [4, 8])}, "gap or overlap"),
        ({"v": entry([1], [0, 4]), "w": entry([1], [8, 12])}, "gap or overlap"),
        ({"w": entry([3], [0, 12])}, "expected .* bytes, found"),
        ({"__metadata__": {"a": 3}}, "__metadata__: expected names and texts"),
        ({"__metadata__": []}, "__metadata__: expected names and texts"),
    ],
)
def test_headers(header, message, tmp_path):
    refused(write(tmp_path / "x.safetensors", header, b"\0" * 8), message)


def test_lengths_of_headers(tmp_path):
    for length in (1 << 60, (1 << 64) - 1, 1 << 31, 100):
        refused(
            write(tmp_path / "x.safetensors", b"{}", length=length),
            "not a complete safetensors file",
        )
    refused(
        write(tmp_path / "x.safetensors", b"{" + b" " * (40 << 20) + b"}"),
        f"expected a header of at most {MAX_HEADER} bytes",
    )
    names = [json.dumps(f"name {k}") + ":0" for k in range(300_000)]
    refused(
        write(tmp_path / "x.safetensors", ("{" + ",".join([*names, names[-1]]) + "}").encode()),
        "'name 299999' occurs twice",
    )


def test_very_many_tensors(tmp_path):
    """100,000 names: about a second."""
    header = {f"layer.{k}.weight": entry([1], [4 * k, 4 * k + 4]) for k in range(100_000)}
    path = write(tmp_path / "x.safetensors", header, bytes(400_000))
    assert len(Candidates(path)[0].info) == 100_000


def index(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_bytes(
        text if isinstance(text, bytes) else json.dumps(text).encode()
    )
    return folder


def test_indices(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors")
    save_file({"w": torch.zeros(2), "v": torch.zeros(1)}, tmp_path / "b.safetensors")
    for text in (
        b"",
        b"[]",
        b"{}",
        b'{"weight_map":{}}',
        b'{"weight_map":{"w":3}}',
        b'{"weight_map":[["w","a"]]}',
        b'{"a":NaN}',
        DEEP,
        b'{"weight_map":"w"}',
    ):
        refused(
            index(tmp_path, text),
            "expected JSON with a 'weight_map' from tensor names to shard files",
        )
    refused(
        index(tmp_path, b'{"weight_map":{"w":"a.safetensors","w":"b.safetensors"}}'),
        "'w' occurs twice",
    )
    refused(
        index(tmp_path, {"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}),
        r"tensor 'w' is in b\.safetensors and in an earlier shard",
    )
    refused(
        index(tmp_path, {"weight_map": {"w": "a.safetensors", "\x1b[2J": "a.safetensors"}}),
        r"tensor '\\x1b\[2J' should be in a\.safetensors",
    )
    refused(
        index(tmp_path, {"weight_map": {"w": "model.safetensors.index.json"}}),
        "expected a file ending in",
    )
    refused(index(tmp_path, b" " * (MAX_HEADER + 1)), f"of at most {MAX_HEADER} bytes")


def test_a_configuration_of_100_mb(tmp_path):
    with open(tmp_path / "adapter_config.json", "wb") as f:
        f.truncate(100 << 20)
    with pytest.raises(CandidateError, match=f"of at most {MAX_HEADER} bytes, found {100 << 20}"):
        adapter_config(tmp_path)
    for text in (b"[]", b"3", DEEP, b'{"a":Infinity}', b'{"r":1,"r":2}', b"\xff\xfe"):
        (tmp_path / "adapter_config.json").write_bytes(text)
        with pytest.raises(CandidateError, match=r"expected (a )?JSON"):
            adapter_config(tmp_path)


# torch.distributed.checkpoint --------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    torch_dcp.save(
        {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)},
        checkpoint_id=tmp_path / "c",
        no_dist=True,
    )
    return tmp_path / "c"


def change(saved, how):
    metadata = pickle.loads((saved / METADATA).read_bytes())
    how(metadata, next(iter(metadata.storage_data.values())), metadata.state_dict_metadata["a"])
    (saved / METADATA).write_bytes(pickle.dumps(metadata))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    "path", ["../x.distcp", "/etc/passwd", "a\\b", "a\0b", "..", "", "\x1b[2J", "a/b"]
)
def test_records_stay_in_the_directory(saved, path):
    change(saved, lambda metadata, place, a: setattr(place, "relative_path", path))
    refused(saved, "expected the name of a file in the directory, found ")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    "how, message",
    [
        (
            lambda metadata, place, a: setattr(place, "relative_path", 3),
            "expected the name of a file, and where in it the tensor is",
        ),
        (
            lambda metadata, place, a: setattr(place, "relative_path", METADATA),
            "not a complete torch checkpoint|not complete",
        ),
        (
            lambda metadata, place, a: setattr(place, "offset", -1),
            "expected the name of a file, and where",
        ),
        (
            lambda metadata, place, a: setattr(place, "offset", 1),
            "its records overlap|not a complete",
        ),
        (
            lambda metadata, place, a: setattr(place, "length", 1 << 59),
            "its records overlap|not complete",
        ),
        (
            lambda metadata, place, a: setattr(place, "length", 1 << 80),
            "expected the name of a file, and where",
        ),
        (
            lambda metadata, place, a: setattr(a, "size", torch.Size((4, 3))),
            "its blocks do not cover its shape",
        ),
        (
            lambda metadata, place, a: setattr(a, "size", (2,) * 1000),
            "expected a shape and a dtype",
        ),
        (lambda metadata, place, a: setattr(a, "size", (1 << 70,)), "expected a shape and a dtype"),
        (
            lambda metadata, place, a: setattr(a, "chunks", a.chunks * 2),
            "its blocks do not cover its shape",
        ),
        (lambda metadata, place, a: setattr(a, "chunks", []), "its blocks do not cover its shape"),
        (
            lambda metadata, place, a: setattr(a, "chunks", [3]),
            "expected offsets and sizes of each block",
        ),
        (
            lambda metadata, place, a: setattr(metadata, "storage_data", {}),
            "expected the name of a file, and where",
        ),
        (
            lambda metadata, place, a: setattr(metadata, "storage_data", None),
            "expected the metadata of a torch.distributed.checkpoint",
        ),
        (
            lambda metadata, place, a: setattr(
                metadata, "planner_data", {"a": ("x",), "b": ("x",)}
            ),
            "'b' occurs twice",
        ),
        (
            lambda metadata, place, a: setattr(
                metadata, "planner_data", {"a": ("x",), "b": ("x", "y")}
            ),
            "'b' is inside a tensor",
        ),
        (
            lambda metadata, place, a: metadata.state_dict_metadata.update({"n" * 5000: a}),
            "expected names of at most 1000 characters",
        ),
        (
            lambda metadata, place, a: metadata.state_dict_metadata.update({"n": Evil()}),
            r"refused: it asks for posix\.system|refused: it asks for nt\.system",
        ),
    ],
)
def test_metadata(saved, how, message):
    change(saved, how)
    refused(saved, message)


@pytest.mark.parametrize("names", [1 << 30, (1 << 32) - 1])
def test_pickles_that_claim_much_memory(names, tmp_path):
    """Indices of the memo, lengths of texts: what Python's own unpickler makes room for before it
    looks.
    """
    (tmp_path / "c").mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (b"Nr", b"X", b"B", b"T"):
        (tmp_path / "c" / METADATA).write_bytes(
            b"\x80\x04" + data + struct.pack("<I", names) + b"."
        )
        refused(tmp_path / "c", "metadata of a torch.distributed.checkpoint")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_blocks_are_compared_in_no_time():
    n = 20_000
    stairs = [((k, k), (n - k, 1)) for k in range(n)]
    assert not covered((n, n), stairs)
    assert covered((100, 200), [((a, b), (1, 1)) for a in range(100) for b in range(200)])
    around = [
        ((0, 0), (1, 2)),
        ((0, 2), (2, 1)),
        ((2, 1), (1, 2)),
        ((1, 0), (2, 1)),
        ((1, 1), (1, 1)),
    ]
    assert not covered((3, 3), around)  # it is, but no cut goes through: never written


# The state of a run ------------------------------------------------------------------------------


def whole_state():
    return {
        "format": RUN,
        "best_file": "",
        "best_digest": "",
        "run": {"a": "b"},
        "results": [],
        "losses": [],
        "stride": 1,
        "best": None,
        "method": 0,
        "under_way": None,
    }


def test_states(tmp_path):
    store = Store(tmp_path, resume=True)
    write_torch(tmp_path / "state.pt", whole_state())
    assert store.read(Ranks()) == whole_state()
    for name in whole_state():
        write_torch(tmp_path / "state.pt", {k: v for k, v in whole_state().items() if k != name})
        with pytest.raises(StateError, match=f"'{name}' is missing or|expected format"):
            store.read(Ranks())
    bad = [
        ("best", 0),
        ("best", -1),
        ("method", -1),
        ("method", 1 << 60),
        ("method", 0.5),
        ("run", {"a": 3}),
        ("run", {"batches per step": "9" * 30}),
    ]
    bad += [
        ("best_file", "../state-best-1.safetensors"),
        ("best_file", "/etc/passwd"),
        ("best_file", "x"),
        ("results", [{}]),
        ("losses", [(0.5, 0.5, 0.5)]),
        ("stride", 0),
    ]
    bad += [
        ("losses", [(torch.zeros(2), 0.5, 0.5)]),
        ("under_way", {}),
        ("under_way", 3),
        ("best_digest", None),
        ("results", {}),
        ("run", []),
    ]
    for name, value in bad:
        write_torch(tmp_path / "state.pt", whole_state() | {name: value})
        with pytest.raises(StateError, match="not a whole state"):
            store.read(Ranks())
    write_torch(
        tmp_path / "state.pt",
        whole_state() | {"losses": [(torch.zeros(()).expand(1 << 20), 0.5, 0.5)] * 3},
    )
    with pytest.raises(StateError, match="its tensors claim more bytes than it has"):
        store.read(Ranks())
