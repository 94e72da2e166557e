"""Small files that would take long, or much memory, or that forge what is printed of them."""

import json
import os
import pickle
import struct
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import save_file
from test_hostile import (
    entry,
    quick_and_nothing_run,  # noqa: F401 (a fixture)
    records_of,
    refused,
    with_pickle,
    write,
    zipped,
)
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from twa.basis.sources import Sources
from twa.export.small_files import differences, with_dtype
from twa.inspection.report import markdown, picture
from twa.inspection.run import inspect
from twa.io import torch_zip
from twa.io.candidate import Candidate
from twa.io.candidates import Candidates
from twa.io.checks import MAX_LEVELS, check_levels, is_shown, parse_json, read_json
from twa.io.compare import check_extra, quantised
from twa.io.dcp import METADATA
from twa.io.deepspeed import refusal
from twa.io.errors import CandidateError, CandidateWarning
from twa.io.mapped import TensorInfo, covered
from twa.io.peft import check_adapters
from twa.io.tables import in_code
from twa.io.unpickle import MAX_PART, Made, checked_key, unpickle
from twa.merge.report import markdown_table


def text_of(length):
    """The instruction that pushes so long a text, and puts it into the memo."""
    return b"X" + struct.pack("<I", length) + b"a" * length + b"q\0"


# Pickles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "begin, call",
    [
        (b"X\x06\0\0\0latin1\x86q\x010c_codecs\nencode\nq\x020]", b"h\x02h\x01R"),
        (b"\x85q\x010ctorch\nSize\nq\x020]", b"h\x02h\x01R"),
        (b"0cx\ny\nh\0\x86q\x010cbuiltins\ngetattr\nq\x020]", b"h\x02h\x01R"),
    ],
)
def test_one_long_text_given_again_and_again(begin, call, tmp_path):
    """To what copies it: 1 MB, 100,000 times."""
    data = b"\x80\x04" + text_of(1 << 20) + begin + (call + b"a") * 100_000 + b"."
    refused(
        with_pickle(tmp_path / "x.pt", data),
        "not a complete torch checkpoint .*its calls are given more than it has",
    )


def test_one_long_name_looked_up_again_and_again(tmp_path):
    data = b"\x80\x04" + text_of(1 << 20) + b"0]" + b"h\0h\0\x93a" * 100_000 + b"."
    refused(with_pickle(tmp_path / "x.pt", data), "a function or class with a name of 1048576")


def one_hash(count):
    """Tuples of two numbers that all have the hash of the first (CPython's xxHash, inverted)."""
    mask, prime, one, two = 2**64 - 1, 2870177450012600261, 11400714785074694791, 0
    two = 14029467366897019727

    def turned(x, by):
        return ((x << by) | (x >> (64 - by))) & mask

    def after(acc, lane):
        return turned((acc + lane * two) & mask, 31) * one & mask

    wanted = turned(after(after(prime, 1), 1) * pow(one, -1, 2**64) & mask, 33)
    found = []
    for first in range(1, 8 * count + 64):
        lane = (wanted - after(prime, first)) * pow(two, -1, 2**64) & mask
        if lane < 2**61 - 1:
            found.append((first, lane))
    return found[:count]


def test_tuples_of_one_hash(tmp_path):
    """As keys of a dict 20,000 of them take 10 seconds, and 200,000 take 1,000."""
    keys = one_hash(20_000)
    assert len(keys) == 20_000 and len(set(map(hash, keys))) == 1
    items = b"".join(
        b"".join(b"\x8a\x09" + v.to_bytes(9, "little") for v in key) + b"\x86N" for key in keys
    )
    refused(with_pickle(tmp_path / "x.pt", b"\x80\x02}(" + items + b"u."), "expected a dict")
    assert sum(checked_key(key) is key for key in keys) <= 1


def test_tuples_that_are_keys():
    for key in ((0, "a"), (True, None, b"x"), (MAX_PART - 1, torch.float32), ()):
        assert unpickle(pickle.dumps({key: 1}), {"torch.float32": torch.float32}) == {key: 1}
    for key in ((MAX_PART,), (0.5,), ((1,),), (0,) * 9):
        assert list(unpickle(pickle.dumps({key: 1}), {})) != [key]


def test_lists_in_lists(tmp_path):
    """50^14 of them in the extra state of a module: whoever compares two never comes back."""
    value = [1]
    for _ in range(14):
        value = [value] * 50
    paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for path in paths:
        torch.save({"w": torch.zeros(2), "m._extra_state": value}, path)
    with pytest.raises(CandidateError, match="an object of more values than it has bytes"):
        check_extra(Candidates(paths))
    few = value
    for _ in range(11):
        few = few[0]
    states = {f"m{k}._extra_state": few for k in range(9)}
    torch.save({"w": torch.zeros(2), **states}, paths[0])  # each is 252,551 of them
    extra = Candidates(paths[0])[0].extra
    assert [isinstance(v, Made) for v in extra.values()] == [False] * 4 + [True] * 5


# Archives ----------------------------------------------------------------------------------------


def test_a_directory_without_end(tmp_path):
    """1 GB of zeros that are on no disk, as the archive's directory."""
    path = zipped(tmp_path / "x.pt", records_of({"w": torch.zeros(3)}))
    data = path.read_bytes()
    last = data.rfind(b"PK\5\6")
    begin, size = struct.unpack("<I", data[last + 16 : last + 20])[0], 1 << 30
    with open(path, "wb") as f:
        f.write(data[:begin])
        f.seek(begin + size)
        f.write(data[last : last + 12] + struct.pack("<II", size, begin) + data[last + 20 :])
    refused(path, f"its directory is {size} bytes: expected {torch_zip.MAX_DIRECTORY}")


def test_much_out_of_little(tmp_path):
    """1,000 names of a number that is expanded to 16 million: 64 GB for every one who averages."""
    one = torch.zeros(1).expand(torch_zip.MAX_EXPANDED)
    torch.save({f"w{k}": one for k in range(1000)}, "x.pt")
    refused(
        tmp_path / "x.pt", "its tensors are 67108864000 bytes that lie in .* at most 4294967296"
    )
    torch.save({f"w{k}": torch.zeros(64) for k in range(3)} | {"v": one}, "x.pt")
    assert len(Candidates(tmp_path / "x.pt")[0].info) == 4


# torch.distributed.checkpoint --------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2), "z": torch.zeros(0, 3)}
    torch_dcp.save(state, checkpoint_id=tmp_path / "c", no_dist=True)
    return tmp_path / "c"


def change(saved, how):
    metadata = pickle.loads((saved / METADATA).read_bytes())
    how(metadata, metadata.state_dict_metadata)
    (saved / METADATA).write_bytes(pickle.dumps(metadata, protocol=4))


def with_empty_block(metadata, tensors):
    of_z = next(place for index, place in metadata.storage_data.items() if index.fqn == "z")
    metadata.storage_data[MetadataIndex("a", torch.Size((0,)))] = of_z
    tensors["a"].chunks.append(ChunkStorageMetadata(torch.Size((0,)), torch.Size((0,))))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    "how, message",
    [
        (with_empty_block, r"'a': its blocks do not cover its shape \[2, 3\] once"),
        (
            lambda metadata, tensors: setattr(tensors["z"], "size", torch.Size((0,))),
            r"'z': its blocks do not cover its shape \[0\] once",
        ),
        (
            lambda metadata, tensors: setattr(tensors["z"], "size", (0, 1 << 59, 1 << 59)),
            "'z': expected a shape and a dtype",
        ),
        (
            lambda metadata, tensors: setattr(metadata, "planner_data", {"a": ("n" * 5000,)}),
            "expected names of at most 1000 characters, found one of 5000",
        ),
        (
            lambda metadata, tensors: setattr(metadata, "planner_data", {"a": ("\udc80",)}),
            r"expected names that are texts, found '\\udc80'",
        ),
    ],
)
def test_metadata(saved, how, message):
    change(saved, how)
    refused(saved, message)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_empty_tensor_of_another_size(saved):
    """Its shape is that of the metadata, as it is said of it."""
    change(saved, lambda metadata, tensors: setattr(tensors["z"], "size", torch.Size((0, 7))))
    candidate = Candidates(saved)[0]
    assert candidate.info["z"] == TensorInfo((0, 7), torch.float32)
    assert candidate.tensor("z").shape == (0, 7)
    assert not covered((2,), [((0,), (2,)), ((0, 0), (0, 1))])


# JSON --------------------------------------------------------------------------------------------


def nested(levels, inside="1"):
    return f'{{"dtype": "float16", "x": {"[" * levels}{inside}{"]" * levels}}}'.encode()


def test_levels_of_json(tmp_path):
    """Fewer than Python's parser takes, so that whoever walks through them has stack left."""
    assert check_levels(json.loads(nested(MAX_LEVELS - 1))) is None
    with pytest.raises(ValueError, match=f"more than {MAX_LEVELS} levels"):
        parse_json(nested(MAX_LEVELS))
    for folder, value in (("a", "1"), ("b", "2")):
        (tmp_path / folder).mkdir()
        weights = {"w": torch.rand(2)}
        save_file(weights, tmp_path / folder / "adapter_model.safetensors")
        for name in ("config.json", "adapter_config.json"):
            (tmp_path / folder / name).write_bytes(nested(900, value))
    with pytest.raises(CandidateError, match=r"adapter_config\.json: expected JSON .*100 levels"):
        check_adapters(Candidates([tmp_path / "a", tmp_path / "b"]))
    assert differences([tmp_path / "a", tmp_path / "b"], [Path("config.json")])
    assert with_dtype(nested(900), "float32") == nested(900)


def test_configurations_that_grow_or_cannot_be_written():
    text = b'{"dtype": "float16", "x": "\\ud800"}'
    assert json.loads(with_dtype(text, "float32")) == {"dtype": "float32", "x": "\ud800"}
    wide = nested(90, ",".join("0" * 600_000))  # each in a line of its own would be 100 times that
    assert len(with_dtype(wide, "float32")) < 3 * len(wide)


def test_fields_of_adapters_in_messages(tmp_path):
    for folder, value in (("a", 1), ("b", "x" * 100_000)):
        (tmp_path / folder).mkdir()
        weights = {"w": torch.rand(2)}
        save_file(weights, tmp_path / folder / "adapter_model.safetensors")
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps({"\x1b[2J": value}))
    with pytest.raises(CandidateError, match=r"'\\x1b\[2J': expected 1 as in") as raised:
        check_adapters(Candidates([tmp_path / "a", tmp_path / "b"]))
    assert str(raised.value).isprintable() and len(str(raised.value)) < 1000


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="no /proc/self/pagemap")
def test_files_whose_size_is_a_lie(tmp_path):
    """Of 0 bytes, they say, and of 256 GB when they are read."""
    os.symlink("/proc/self/pagemap", tmp_path / "x.json")
    with pytest.raises(CandidateError, match=r"expected JSON .*at most 65536 bytes, found more"):
        read_json(tmp_path / "x.json", limit=1 << 16)
    (tmp_path / "global_step1").mkdir()
    (tmp_path / "global_step1" / "x_optim_states.pt").touch()
    os.symlink("/proc/self/pagemap", tmp_path / "latest")
    assert "OUT -t global_step1" in refusal(tmp_path / "global_step1")
    os.symlink("/proc/self/pagemap", tmp_path / "model.safetensors.index.json")
    refused(tmp_path, "expected JSON with a 'weight_map'")


# Many of something -------------------------------------------------------------------------------


def test_many_integers_in_one_module(tmp_path):
    """30,000 that could each be one that stands beside its scale."""
    count = 30_000
    header = {f"t{k}": entry([1, 1], [k, k + 1], "I8") for k in range(count)}
    header["w"] = entry([count], [count, 5 * count])
    path = write(tmp_path / "x.safetensors", header, bytes(5 * count))
    assert quantised(Candidates(path)[0].info) is None
    header = {"a.w": entry([1, 1], [0, 1], "I8"), "a.w_scale": entry([1], [1, 5])}
    path = write(tmp_path / "y.safetensors", header, bytes(5))
    assert "stands beside 'a.w_scale'" in quantised(Candidates(path)[0].info)


def test_one_dict_under_many_names(tmp_path):
    """20,000 entries of 20,000 tensors each, which are the same."""
    count = 20_000
    weights = dict.fromkeys((f"w{k}" for k in range(count)), torch.zeros(1))
    torch.save({"model": weights} | {f"k{k}": weights for k in range(count)}, "x.pt")
    found = Candidates(tmp_path / "x.pt")
    assert len(found[0].info) == count and len(found[0].siblings) == count
    assert len("".join(found.notes)) < 1000


def test_many_files_that_differ_in_one_number(tmp_path, monkeypatch):
    """No sample of them shows it: each is read about once, and not with each other one."""
    count, read = 12, Counter()
    for k in range(count):
        w = torch.zeros(1000)
        w[900] = k // 2
        torch.save({"v": torch.zeros(3), "w": w}, f"{k}.pt")
    columns = Candidate.columns

    def counted(self, *arguments):
        read[self.path] += 1
        return columns(self, *arguments)

    monkeypatch.setattr(Candidate, "columns", counted)
    with pytest.warns(CandidateWarning, match=r"1\.pt is 0\.pt, .*, 11\.pt is 10\.pt$"):
        found = Candidates(tmp_path)
    assert [c.name for c in found] == [f"{k}" for k in range(0, count, 2)]
    assert max(read.values()) <= 10


# Names that forge --------------------------------------------------------------------------------

FORGED = ["\x1b[2Jm", "a\ntwa: all is well", "a\u202etxt", "\x9b2J", "a\u2028b", "\udcff", "a\x7f"]


@pytest.mark.parametrize("name", FORGED)
def test_names_of_files_that_forge_what_is_printed(name, tmp_path):
    (tmp_path / "d").mkdir()
    save_file({"w": torch.zeros(2)}, "x")
    os.rename("x", tmp_path / "d" / f"{name}.safetensors")
    for path in (tmp_path / "d", tmp_path / "d" / f"{name}.safetensors", tmp_path / "d" / "*"):
        refused(path, "expected paths that can be shown as they are, found ")
    (tmp_path / "e" / "inside").mkdir(parents=True)
    os.rename(tmp_path / "d" / f"{name}.safetensors", tmp_path / "e" / "inside" / f"{name}.pt")
    os.rename(tmp_path / "e" / "inside", tmp_path / "e" / name)
    refused(tmp_path / "e", "expected a directory with a Hugging Face checkpoint")


def test_names_of_candidates_in_a_packed_basis():
    """They were files' names once, and lead nowhere."""
    names = ["\x1b[2J/a\nb.pt", "/etc/passwd", "step 9.pt"]
    contents = SimpleNamespace(info={}, kind="torch", candidates=[[name, "d"] for name in names])
    sources = Sources(SimpleNamespace(contents=contents, path=Path("basis")))
    assert all(f"{c.path} {c.name}".isprintable() and c.files == () for c in sources)
    assert sources.names[1:] == ["passwd", "step 9"]


def test_names_that_are_shown():
    for name in ("step 10", "größe", "重み\u3000一", "a\xa0b", "می\u200cخواهم", "💾", "\ue000"):
        assert is_shown(name)


def test_names_in_markdown_and_pictures(tmp_path):
    """None is a tag, the end of a cell or of code, or a formula, which could be a wrong one."""
    (tmp_path / "d").mkdir()
    for k, name in enumerate(("a|b", "<img src=x onerror=y>", "c$\\nothing{$")):
        save_file({"w": torch.ones(3, 3) + k}, tmp_path / "d" / f"{name}.safetensors")
    result = inspect([str(tmp_path / "d")])
    page = markdown(result)
    assert r"a\|b " in page and "<" not in page.replace(r"\<", "")
    assert picture(result).startswith(b"\x89PNG")
    assert markdown_table(["a", "b"], [[r"\|", "x"]]).splitlines()[-1] == r"| \\\| | x |"
    assert [in_code(name) for name in ("a", "a`b``c")] == ["`a`", "``` a`b``c ```"]
