"""Reading candidates: formats, order, and a clear error for everything that is wrong."""

import json
import os
import pickle

import pytest
import torch
import twa
from safetensors.torch import save_file
from twa.io.candidates import Candidates
from twa.io.errors import CandidateError
from twa.io.mapped import MappedFile
from twa.io.order import numeric_order


def state(seed=0, **extra):
    g = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(4, 3, generator=g),
        "a.bias": torch.randn(4, generator=g),
    } | extra


def save(path, tensors):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_formats(tmp_path, suffix):
    for k in range(3):
        save(tmp_path / f"c{k}{suffix}", state(k))
    candidates = Candidates(str(tmp_path / f"*{suffix}"))
    assert len(candidates) == 3 and candidates.names == ["c0", "c1", "c2"]
    for k, t in enumerate(candidates.tensors("a.weight")):
        assert torch.equal(t, state(k)["a.weight"])


def test_numeric_order_of_names(tmp_path):
    for k in (9, 10, 100, 1):
        save(tmp_path / f"step_{k}.pt", state(k))
    assert Candidates(tmp_path / "step_*.pt").names == ["step_1", "step_9", "step_10", "step_100"]
    assert sorted(["x10y2", "x9", "x10y10"], key=numeric_order) == ["x9", "x10y2", "x10y10"]


def test_order_of_lists(tmp_path):
    paths = [save(tmp_path / f"step_{k}.pt", state(k)) for k in (1, 10, 2, 9)]
    # alphabetic, as from a shell
    assert Candidates(paths).names == ["step_1", "step_2", "step_9", "step_10"]
    # somebody's own order
    assert Candidates([paths[3], paths[1], paths[2]]).names == ["step_9", "step_10", "step_2"]


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_nested_and_wrapped(tmp_path, key):
    wrapped = {f"_orig_mod.module.{k}": v for k, v in state().items()}
    save(tmp_path / "c.pt", {key: wrapped, "epoch": 3, "optimizer": {"state": {}}})
    candidates = Candidates(tmp_path / "c.pt")
    assert set(candidates.info) == {"a.weight", "a.bias"}
    assert torch.equal(candidates[0].tensor("a.bias"), state()["a.bias"])


def test_old_torch_format(tmp_path):
    torch.save(state(), tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CandidateError, match=r"c\.pt: .*before PyTorch 1\.6 must be loaded with"):
        Candidates(tmp_path / "c.pt")


def sharded(folder, seed=0):
    folder.mkdir()
    save_file({"a.weight": state(seed)["a.weight"]}, folder / "model-1.safetensors")
    save_file({"a.bias": state(seed)["a.bias"]}, folder / "model-2.safetensors")
    index = {"weight_map": {"a.weight": "model-1.safetensors", "a.bias": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


#: weights in a directory, in from_pretrained's order
FORMS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def saved_as(form, folder, seed):
    """Weights in a directory: one file, or two shards and their index."""
    weights = {key: state(seed)[key] for key in ("a.weight", "a.bias")}
    suffix = ".bin" if "bin" in form else ".safetensors"
    save = torch.save if suffix == ".bin" else save_file
    if form.endswith(suffix):
        save(weights, folder / form)
        return
    shards = {key: f"part-{k}{suffix}" for k, key in enumerate(weights)}
    for key, name in shards.items():
        save({key: weights[key]}, folder / name)
    (folder / form).write_text(json.dumps({"metadata": {}, "weight_map": shards}))


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("broken", [False, True])
def test_a_directory_that_was_saved_into_twice(tmp_path, k, broken):
    """What from_pretrained would read, whatever older weights and indexes lie beside it."""
    for seed, form in enumerate(FORMS[k:]):
        if broken and seed:
            (tmp_path / form).write_text("left over, and damaged")
        else:
            saved_as(form, tmp_path, seed)
    candidate = Candidates(tmp_path)[0]
    assert candidate.kind == "huggingface" and candidate.files[0].name == FORMS[k]
    for key in ("a.weight", "a.bias"):
        assert torch.equal(candidate.tensor(key), state(0)[key])


def test_hugging_face_shards(tmp_path):
    paths = [sharded(tmp_path / f"run{k}", k) for k in range(2)]
    candidates = Candidates(paths)
    assert candidates.names == ["run0", "run1"]
    assert torch.equal(candidates[1].tensor("a.bias"), state(1)["a.bias"])
    assert torch.equal(
        Candidates(paths[0] / "model.safetensors.index.json")[0].tensor("a.weight"),
        state(0)["a.weight"],
    )


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "", "..", 7, None])
def test_index_cannot_leave_its_folder(tmp_path, name):
    folder = sharded(tmp_path / "run")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a.weight": name}})
    )
    with pytest.raises(CandidateError, match=r"index\.json"):
        Candidates(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000, '{"weight_map": {"a": ["x"]}}']
)
def test_broken_index(tmp_path, text):
    folder = sharded(tmp_path / "run")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CandidateError, match="weight_map"):
        Candidates(folder)


def test_weighted_sum_is_float64_inside(tmp_path):
    big = [torch.full((3,), 1e8), torch.full((3,), 1.0), torch.full((3,), -1e8)]
    for k, t in enumerate(big):
        save(tmp_path / f"c{k}.pt", {"t": t})
    mean = Candidates(tmp_path / "c*.pt").weighted("t", twa.averages.uniform(3))
    torch.testing.assert_close(mean, torch.full((3,), 1 / 3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [[0, 0], [1, -1], [2, 0], [1, 1], [0.5, 0.5]])
def test_weighted_sum_with_weights_of_any_sum(tmp_path, weights, dtype):
    """A number that all have stays where they sum to 1, and only there."""
    for k in range(2):
        save(
            tmp_path / f"c{k}.pt",
            {"t": torch.full((3,), 3.0, dtype=dtype), "u": torch.full((1,), k)},
        )
    weights = torch.tensor(weights, dtype=torch.float64)
    found = Candidates(tmp_path / "c*.pt").weighted("t", weights)
    assert torch.equal(found, torch.full((3,), 3 * float(weights.sum()), dtype=dtype))


def test_memory_is_given_back(tmp_path, monkeypatch):
    for c in range(2):
        save(
            tmp_path / f"c{c}.safetensors",
            {f"t{k}": torch.full((20,), float(10 * c + k)) for k in range(5)},
        )
    candidates = Candidates(tmp_path / "c*.safetensors", block_bytes=40)
    dropped = []
    monkeypatch.setattr(MappedFile, "drop", lambda self: dropped.append(self.path.name))
    # 160 bytes each: given back after each one
    tensors = [candidates.tensors(f"t{k}") for k in range(5)]
    assert len(dropped) == 10
    assert [[int(t[0]) for t in pair] for pair in tensors] == [[k, 10 + k] for k in range(5)]


class Evil:
    def __reduce__(self):
        return os.system, ("echo hacked > hacked.txt",)


def bad_files(folder):
    good = save(folder / "good.safetensors", state())
    truncated = folder / "truncated.safetensors"
    truncated.write_bytes(good.read_bytes()[:-10])
    header = folder / "header.safetensors"
    header.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    text = folder / "text.safetensors"
    text.write_text("hello")
    text_pt = folder / "text.pt"
    text_pt.write_text("hello, this is no checkpoint")
    empty = folder / "empty.pt"
    empty.write_bytes(b"")
    cut = folder / "cut.pt"
    cut.write_bytes(save(folder / "whole.pt", state()).read_bytes()[:-200])
    number = folder / "number.pt"
    torch.save(3, number)
    evil_zip = folder / "evil.pt"
    torch.save({"a": Evil()}, evil_zip)
    evil_raw = folder / "evil_raw.pt"
    evil_raw.write_bytes(pickle.dumps({"a": Evil()}))
    return {
        truncated: "not a complete safetensors file",
        header: "not a complete safetensors file",
        text: "not a complete safetensors file",
        text_pt: "not a (complete )?torch checkpoint",
        empty: "not a (complete )?torch checkpoint",
        cut: "not a (complete )?torch checkpoint",
        number: "expected a dict of tensors",
        evil_zip: "expected dense tensors, found an object of|refused: loading it would run code",
        evil_raw: "text.pt|evil_raw.pt",
        folder / "absent.pt": "no such file",
        save(folder / "x.pt", state()).rename(folder / "x.onnx"): "expected a file ending in",
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_are_no_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, message in bad_files(tmp_path).items():
        with pytest.raises(CandidateError, match=message) as error:
            Candidates(path)
        assert path.name in str(error.value)
    assert not (tmp_path / "hacked.txt").exists()


def test_no_candidates(tmp_path):
    with pytest.raises(CandidateError, match="no candidates"):
        Candidates([])
    with pytest.raises(CandidateError, match="nothing matches"):
        Candidates(tmp_path / "*.pt")
    with pytest.raises(CandidateError, match="expected a directory with"):
        Candidates(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("a.bias"), r"c1\.pt: tensor 'a.bias' is missing"),
        (lambda s: s.update(extra=torch.zeros(2)), r"c1\.pt: tensor 'extra' is unexpected"),
        (
            lambda s: s.update({"a.bias": torch.zeros(5)}),
            r"c1\.pt: tensor 'a.bias': expected shape \[4\].*c0\.pt, found \[5\]$",
        ),
        (
            lambda s: s.update({"a.bias": torch.zeros(4, dtype=torch.int64)}),
            "expected torch.float32",
        ),
        (lambda s: s.update({"a.bias": torch.zeros(4, dtype=torch.complex64)}), "complex"),
        (
            lambda s: s.update({"a.bias": torch.zeros(4).to(torch.float8_e4m3fn)}),
            "at least 16 bits",
        ),
    ],
)
def test_candidates_that_do_not_match(tmp_path, change, message):
    save(tmp_path / "c0.pt", state())
    other = state()
    change(other)
    save(tmp_path / "c1.pt", other)
    with pytest.raises(CandidateError, match=message):
        Candidates(tmp_path / "c*.pt").info  # noqa: B018


def test_vocabulary_mismatch_is_named(tmp_path):
    save(tmp_path / "c0.pt", {"embed_tokens.weight": torch.zeros(100, 8)})
    save(tmp_path / "c1.pt", {"embed_tokens.weight": torch.zeros(102, 8)})
    with pytest.raises(CandidateError, match=r"vocabulary mismatch \(100 and 102 tokens\)"):
        Candidates(tmp_path / "c*.pt").info  # noqa: B018
