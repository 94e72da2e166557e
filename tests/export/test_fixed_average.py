"""Fixed averages without a model: in memory and streamed into a file, against float64 sums."""

import copy
import json
import os
import signal
import sys

import processes
import pytest
import torch
import twa
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel
from twa import averages
from twa.export.average import write_fixed, write_merge
from twa.io.averaging import FixedAverage
from twa.io.candidates import UNIT, Candidates
from twa.io.errors import CandidateError, CandidateWarning, TwaError

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
BETAS = [averages.uniform(5), averages.ema(5, 0.7), averages.wsm(5, 4, "sqrt")]
IDS = ["uniform", "ema", "wsm"]


def state(seed, dtype=F32):
    """Sizes around a block's unit, tensors without elements and dimensions, integers and a mask."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, UNIT + 1, generator=generator).to(dtype)
    return {
        "weight": weight,
        "tied": weight.clone(),
        "scalar": torch.tensor(0.1 * seed, dtype=dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "mask": torch.triu(torch.full((5, 5), -torch.inf, dtype=dtype), 1),
        "steps": torch.tensor([seed, 7]),
        "flags": torch.tensor([seed % 2 == 0, True]),
        "turn": torch.polar(torch.ones(4), torch.arange(4.0)),
    }


def saved(folder, states, name="c{}.safetensors", **options):
    """The candidates that these states are."""
    folder.mkdir(exist_ok=True, parents=True)
    for k, tensors in enumerate(states):
        save_file(tensors, folder / name.format(k))
    return Candidates(folder, **options)


def write_average(path, candidates, beta, dtype=None, progress=None):
    write_fixed(path, FixedAverage(candidates, beta, dtype), progress)


def exact(states, beta, key):
    """What is right: float64 sums in the order of the candidates, then the last one's dtype."""
    if not states[-1][key].is_floating_point():
        return states[-1][key]
    total = sum(b * s[key].double() for b, s in zip(beta.tolist(), states, strict=True) if b)
    return total.to(states[-1][key].dtype)


def check(found, expected):
    assert found.keys() == expected.keys()
    for key, t in expected.items():
        assert found[key].dtype == t.dtype and torch.equal(found[key], t), key


# Bit by bit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS, ids=IDS)
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_all_tensors_are_float64_sums_rounded(tmp_path, dtype, beta):
    states = [state(k, dtype) for k in range(5)]
    candidates = saved(tmp_path / "in", states)
    found = candidates.average(beta)
    check(found, {key: exact(states, beta, key) for key in states[0]})
    assert torch.equal(found["mask"], states[0]["mask"])
    write_average(tmp_path / "out.safetensors", candidates, beta)
    check(load_file(tmp_path / "out.safetensors"), found)


def test_the_result_loads_into_the_model(tmp_path):
    def net():
        return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))

    states = [net().state_dict() for _ in range(3)]
    model, candidates = net(), saved(tmp_path, states)
    model.load_state_dict(candidates.average(averages.uniform(3)))
    assert torch.equal(
        model[0].weight, exact(states, averages.uniform(3), "0.weight").requires_grad_()
    )


@pytest.mark.parametrize(
    ("block_bytes", "columns"), [(1, UNIT), (2 * 5 * 4 * UNIT, 2 * UNIT), (1 << 26, 80_000)]
)
def test_blocks_change_no_bit_and_bound_what_is_held(tmp_path, monkeypatch, block_bytes, columns):
    """A tensor larger than a block goes through in pieces, in memory and into the file."""
    beta, states = averages.ema(5, 0.8), []
    for k in range(5):
        t = torch.randn(40, 2000, generator=torch.Generator().manual_seed(k))
        t.view(-1)[: UNIT + 9] = 1.0 / 3.0  # equal in all, also where a block ends
        t[3, 5] = -torch.inf
        states.append({"large": t, "small": t[0, :7].clone(), "count": torch.full((9999,), k)})
    candidates = saved(tmp_path / "in", states, block_bytes=block_bytes)
    widest, blocks = 0, FixedAverage.blocks

    def noted(self):
        nonlocal widest
        for key, block in blocks(self):
            widest = max(widest, block.numel())
            yield key, block

    monkeypatch.setattr(FixedAverage, "blocks", noted)
    told = []
    write_average(tmp_path / "out.safetensors", candidates, beta, progress=told.append)
    expected = {key: exact(states, beta, key) for key in states[0]}
    check(load_file(tmp_path / "out.safetensors"), expected)
    check(candidates.average(beta), expected)
    assert widest == columns
    assert sum(told) == FixedAverage(candidates, beta).nbytes and len(told) >= 3


def test_equal_numbers_stay_whatever_the_weights(tmp_path):
    """Where weights miss 1, are large, or are float32; also if only some numbers are equal."""
    same = torch.randn(999, dtype=F64)
    states = [{"w": torch.cat([same, torch.randn(5, dtype=F64)])} for _ in range(3)]
    for dtype in (F64, F32):
        held = [{key: t.to(dtype) for key, t in s.items()} for s in states]
        candidates = saved(tmp_path / str(dtype), held)
        for beta in (
            torch.tensor([0.3333333, 0.3333333, 0.3333333]),
            torch.tensor([1e9, -1e9, 1.0]),
            averages.uniform(3),
        ):
            found = candidates.average(beta)["w"]
            assert torch.equal(found[:999], held[0]["w"][:999])
            assert not torch.equal(found[999:], held[0]["w"][999:])


def test_one_candidate_comes_out_as_it_is(tmp_path):
    """Its own dtypes and integers, its Inf, too."""
    states = [state(k, dtype) for k, dtype in enumerate((BF16, F16, F32))]
    states[1]["turn"] = states[1]["turn"] * 2
    states[1]["weight"][1, 1] = torch.inf
    candidates = saved(tmp_path, states)
    for k in (0, 1, -1):
        check(candidates.average(averages.candidate(3, k)), states[k])


@pytest.mark.parametrize("kinds", [(BF16, F32), (F32, BF16), (F64, F32), (F32, F64), (F64, F16)])
def test_dtypes_that_differ_give_the_last_ones(tmp_path, kinds):
    states = [state(k, dtype) for k, dtype in enumerate(kinds)]
    beta = torch.tensor([0.25, 0.75])
    found = saved(tmp_path, states).average(beta)
    check(found, {key: exact(states, beta, key) for key in states[0]})


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_another_dtype_for_all_floats(tmp_path, dtype):
    states, beta = [state(k) for k in range(2)], averages.uniform(2)
    candidates = saved(tmp_path / "in", states)
    write_average(tmp_path / "out.safetensors", candidates, beta, dtype)
    found = load_file(tmp_path / "out.safetensors")
    for key, t in states[1].items():
        if t.is_floating_point():
            total = 0.5 * states[0][key].double() + 0.5 * t.double()
            assert found[key].dtype == dtype and torch.equal(found[key], total.to(dtype)), key
        else:
            assert torch.equal(found[key], t), key
    with pytest.raises(TwaError, match=r"floating-point dtype .* found torch\.int8"):
        write_average(tmp_path / "int.safetensors", candidates, beta, torch.int8)


def test_candidates_without_weight_are_not_read(tmp_path):
    states = [state(k) for k in range(3)]
    states[1]["weight"][0, 0] = torch.nan
    states[1]["turn"] = states[1]["turn"] * 2
    candidates = saved(tmp_path, states)
    beta = torch.tensor([0.5, 0.0, 0.5])
    before = candidates.bytes_read
    found = candidates.average(beta)
    check(found, {key: exact(states, beta, key) for key in states[0]})
    assert candidates.bytes_read - before == FixedAverage(candidates, beta).nbytes
    floats = sum(t.nbytes for t in states[0].values() if t.is_floating_point())
    others = sum(t.nbytes for t in states[0].values() if not t.is_floating_point())
    assert FixedAverage(candidates, beta).nbytes == 2 * floats + others


def test_the_last_candidate_has_a_say_without_weight(tmp_path):
    """What is not averaged is its own, and must fit."""
    states = [state(k, F32 if k < 2 else BF16) for k in range(3)]
    beta = torch.tensor([0.5, 0.5, 0.0])
    found = saved(tmp_path / "a", states).average(beta)
    check(found, {key: exact(states, beta, key) for key in states[0]})
    assert found["steps"].tolist() == [2, 7] and found["weight"].dtype == BF16
    states[2]["turn"] = states[2]["turn"] * 2
    with pytest.raises(CandidateError, match="'turn' is complex"):
        saved(tmp_path / "b", states).average(beta)


def test_n_averaged_of_a_wrapper_is_no_tensor_of_the_model(tmp_path):
    model = torch.nn.Linear(3, 2)
    wrapped = AveragedModel(model)
    for k in range(2):
        torch.nn.init.normal_(model.weight)
        wrapped.update_parameters(model)
        torch.save(wrapped.state_dict(), tmp_path / f"c{k}.pt")
    model.load_state_dict(Candidates(tmp_path).average(averages.uniform(2)))


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "message"),
    [
        ([0.5, 0.5], "expected 3 merge weights, one for each candidate, found float32 .2."),
        ([[0.5, 0.25, 0.25]], "found float32 .1, 3."),
        ([0.5, 0.25, 0.2], "sum to 1, found a sum of 0.95"),
        ([0.5, 0.25, 0.25001], "found a sum of 1.00001"),
        ([0.5, 0.5, float("nan")], "found a sum of nan"),
        ([0.0, 0.0, 0.0], "found a sum of 0"),
    ],
)
def test_weights_that_are_none(tmp_path, beta, message):
    candidates = saved(tmp_path, [state(k) for k in range(3)])
    with pytest.raises(TwaError, match=message):
        candidates.average(torch.tensor(beta))


def spoiled(**changes):
    """Three states of which the last has other tensors."""
    states = [state(k) for k in range(3)]
    states[2] |= changes
    return states


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_names_file_and_tensor(tmp_path, value):
    states = [state(k) for k in range(3)]
    states[1]["weight"][1, 2] = value
    candidates = saved(tmp_path / "in", states, block_bytes=1)
    match = r"c1\.safetensors: tensor 'weight' has 1 NaN or Inf of 24579 values .*\[1, 2\]"
    with pytest.raises(CandidateError, match=match):
        candidates.average(averages.uniform(3))
    with pytest.raises(CandidateError, match=match):
        write_average(tmp_path / "out.safetensors", candidates, averages.uniform(3))
    assert os.listdir(tmp_path) == ["in"]
    if value != value:
        with pytest.raises(CandidateError, match=match):
            candidates.average(averages.candidate(3, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": torch.ones(3)}, "'more' is unexpected"),
        ({"weight": torch.ones(3, 2)}, "expected shape"),
        ({"steps": torch.tensor([1.0, 2.0])}, "expected torch.int64"),
        ({"turn": torch.ones(4) * 1j}, "'turn' is complex: expected a real dtype"),
    ],
)
def test_candidates_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(CandidateError, match=message):
        saved(tmp_path, spoiled(**change)).average(averages.uniform(3))


def test_quantised_checkpoints_are_refused(tmp_path):
    layer = {"l.qweight": torch.ones(8, 4, dtype=torch.int32), "l.scales": torch.ones(4)}
    candidates = saved(tmp_path, [state(k) | layer for k in range(2)])
    with pytest.raises(CandidateError, match=r"c0.*packed weights.*looks quantised"):
        candidates.average(averages.uniform(2))


@pytest.mark.parametrize("beta", [[0.5, 0.5], [0.0, 1.0]])
def test_overflow_of_a_narrow_dtype_is_an_error(tmp_path, beta):
    states = [{"w": torch.full((5,), 7e4)}, {"w": torch.full((5,), 8e4)}]
    candidates = saved(tmp_path / "in", states)
    with pytest.raises(TwaError, match=r"tensor 'w': values .* [78]\d*, overflow torch\.float16"):
        write_average(tmp_path / "out.safetensors", candidates, torch.tensor(beta), F16)
    assert os.listdir(tmp_path) == ["in"]


def test_overflow_of_float32(tmp_path):
    candidates = saved(tmp_path, [{"w": torch.full((5,), 3e38)}, {"w": torch.full((5,), -3e38)}])
    with pytest.raises(CandidateError, match="overflows float32"):
        candidates.average(torch.tensor([2.0, -1.0]))


class Extra(torch.nn.Linear):
    """A layer that keeps a value beside its tensors."""

    def __init__(self, value):
        super().__init__(2, 2)
        self.value = value

    def get_extra_state(self):
        return self.value

    def set_extra_state(self, value):
        self.value = value


def with_extra(folder, values):
    for k, value in enumerate(values):
        torch.save(Extra(value).state_dict(), folder / f"c{k}.pt")
    return Candidates(folder)


def test_extra_state(tmp_path):
    folders = [tmp_path / name for name in ("tensor", "plain", "other")]
    for folder in folders:
        folder.mkdir()
    candidates = with_extra(folders[0], [torch.ones(3)] * 2)
    found = candidates.average(averages.uniform(2))
    assert torch.equal(found["_extra_state"], torch.ones(3))
    write_average(tmp_path / "out.safetensors", candidates, averages.uniform(2))
    check(load_file(tmp_path / "out.safetensors"), found)
    plain = with_extra(folders[1], [{"scale": 2}] * 2)
    with pytest.warns(CandidateWarning, match="'_extra_state' .1 in all., .* is left out"):
        assert plain.average(averages.uniform(2)).keys() == {"weight", "bias"}
    with pytest.warns(CandidateWarning, match="out.safetensors: '_extra_state'"):
        write_average(tmp_path / "out.safetensors", plain, averages.uniform(2))
    other = with_extra(folders[2], [torch.ones(3), torch.zeros(3)])
    with pytest.raises(CandidateError, match=r"c1\.pt: '_extra_state'.*cannot be averaged"):
        other.average(averages.uniform(2))
    assert torch.equal(other.average(averages.candidate(2, 0))["_extra_state"], torch.ones(3))


def test_a_dtype_that_the_file_does_not_have(tmp_path):
    for k in range(2):
        weights = {"w": torch.full((3,), float(k)), "n": torch.ones(2, dtype=torch.uint16)}
        torch.save(weights, tmp_path / f"c{k}.pt")
    candidates = Candidates(tmp_path)
    assert candidates.average(averages.uniform(2))["n"].dtype == torch.uint16
    with pytest.raises(TwaError, match=r"tensor 'n': .* files have no torch\.uint16"):
        write_average(tmp_path / "out.safetensors", candidates, averages.uniform(2))


# Whole or not at all ------------------------------------------------------------------------------


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("error", [Stopped, OSError])
def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch, error):
    """And what is left to read is not read."""
    candidates = saved(tmp_path / "in", [state(k) for k in range(2)], block_bytes=1)
    path = tmp_path / "out.safetensors"
    path.write_text("old")
    done = []

    def progress(count):
        done.append(count)
        if len(done) == 3:
            raise error

    with pytest.raises(error):
        write_average(path, candidates, averages.uniform(2), progress=progress)
    assert sorted(os.listdir(tmp_path)) == ["in", "out.safetensors"] and len(done) == 3
    assert path.read_text() == "old"
    write_average(path, candidates, averages.uniform(2))
    check(load_file(path), candidates.average(averages.uniform(2)))


KILLED = """
import os, pathlib, signal, sys, twa
from twa.export.average import write_fixed
from twa.io.averaging import FixedAverage
candidates = twa.Candidates(sys.argv[1], block_bytes=1)
stop = lambda count: os.kill(os.getpid(), signal.SIGKILL)
fixed = FixedAverage(candidates, twa.averages.uniform(2))
write_fixed(pathlib.Path(sys.argv[2]), fixed, stop)
"""


def test_a_kill_leaves_the_old_file(tmp_path):
    """The next one removes what is left beside it."""
    candidates = saved(tmp_path / "in", [state(k) for k in range(2)])
    (path := tmp_path / "out.safetensors").write_text("old")
    done = processes.run([sys.executable, "-c", KILLED, str(tmp_path / "in"), str(path)])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_text() == "old" and len(os.listdir(tmp_path)) == 3
    write_average(path, candidates, averages.uniform(2))
    assert sorted(os.listdir(tmp_path)) == ["in", "out.safetensors"]


def test_a_candidate_that_changes_meanwhile_is_noticed(tmp_path):
    candidates = saved(tmp_path / "in", [state(k) for k in range(2)], block_bytes=1)

    def progress(count):
        with open(candidates[0].path, "rb+") as f:
            f.seek(-1, os.SEEK_END)
            f.write(b"x")
            os.utime(f.fileno(), ns=(1, 1))

    with pytest.raises(CandidateError, match=r"c0\.safetensors: changed"):
        write_average(tmp_path / "out.safetensors", candidates, averages.uniform(2), None, progress)
    assert os.listdir(tmp_path) == ["in"]


# Directories of save_pretrained -------------------------------------------------------------------


def sharded(folder, tensors):
    """A model's directory as save_pretrained writes it, in two files and an index."""
    folder.mkdir(parents=True)
    names = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    where = {}
    for k, (key, t) in enumerate(tensors.items()):
        name = list(names)[k % 2]
        names[name][key], where[key] = t, name
    for name, part in names.items():
        save_file(part, folder / name)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "m", "dtype": "float32"}))
    (folder / "tokenizer.json").write_text("{}")


def models(folder, n=3):
    states = [{k: t for k, t in state(s).items() if t.is_floating_point()} for s in range(n)]
    for k, tensors in enumerate(states):
        sharded(folder / f"m{k}", tensors)
    return states, Candidates(str(folder / "m*"))


def test_directories_of_models(tmp_path):
    states, candidates = models(tmp_path / "in")
    (out := tmp_path / "out").mkdir()
    beta = torch.tensor([0.25, 0.0, 0.75])
    written = write_merge(out, FixedAverage(candidates, beta, BF16), "weights.json")
    assert written == ["averaged.safetensors", "averaged/", "mergekit.yaml", "merge.json"]
    files = {p.name for p in (out / "averaged").iterdir()}
    assert files == {"model.safetensors", "config.json", "tokenizer.json"}
    assert (out / "averaged" / "model.safetensors").samefile(out / "averaged.safetensors")
    assert json.loads((out / "averaged" / "config.json").read_text())["dtype"] == "bfloat16"
    found = load_file(out / "averaged.safetensors")
    assert torch.equal(found["weight"], exact(states, beta, "weight").to(BF16))
    recipe = (out / "mergekit.yaml").read_text()
    assert recipe.startswith("# The merge weights of merge.json,") and "trained" not in recipe
    assert "m0" in recipe and "m1" not in recipe and "out_dtype: bfloat16" in recipe
    assert json.loads((out / "merge.json").read_text()) == {
        "format": "twa-merge-1",
        "scheme": "weights.json",
        "candidates": [str(tmp_path / "in" / f"m{k}") for k in range(3)],
        "names": ["m0", "m1", "m2"],
        "weights": [0.25, 0.0, 0.75],
    }
    # of files in the same place: what does not belong to them is gone
    plain = saved(tmp_path / "plain", states)
    written = write_merge(out, FixedAverage(plain, averages.uniform(3)), "uniform")
    assert written == ["averaged.safetensors", "merge.json"] == sorted(os.listdir(out))


def test_one_model_has_no_recipe(tmp_path):
    states, candidates = models(tmp_path / "in")
    (out := tmp_path / "out").mkdir()
    written = write_merge(out, FixedAverage(candidates, averages.candidate(3, 1)), "at m1")
    assert written == ["averaged.safetensors", "averaged/", "merge.json"]
    check(load_file(out / "averaged" / "model.safetensors"), states[1])


def test_models_of_other_tokenizers_are_named(tmp_path):
    _, candidates = models(tmp_path / "in")
    (tmp_path / "in" / "m0" / "tokenizer.json").write_text('{"other": 1}')
    (out := tmp_path / "out").mkdir()
    with pytest.warns(UserWarning, match=r"the candidates differ in tokenizer\.json"):
        write_merge(out, FixedAverage(candidates, averages.uniform(3)), "uniform")


def adapters(folder, *configs):
    for k, config in enumerate(configs):
        (folder / f"a{k}").mkdir(parents=True)
        weights = {"lora_A": torch.full((2, 3), float(k)), "lora_B": torch.full((3, 2), 2.0 * k)}
        save_file(weights, folder / f"a{k}" / "adapter_model.safetensors")
        (folder / f"a{k}" / "adapter_config.json").write_text(json.dumps(config))
    return Candidates(str(folder / "a*"))


def test_adapters_are_averaged_factor_by_factor(tmp_path):
    old, new = {"r": 2, "lora_alpha": 4}, {"r": 2, "lora_alpha": 4, "group": 16, "use": False}
    (out := tmp_path / "out").mkdir()
    fixed = FixedAverage(adapters(tmp_path / "in", old, new), averages.uniform(2))
    assert write_merge(out, fixed, "uniform") == ["averaged.safetensors", "averaged/", "merge.json"]
    files = {p.name for p in (out / "averaged").iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json"}
    found = load_file(out / "averaged" / "adapter_model.safetensors")
    assert (found["lora_A"] == 0.5).all() and (found["lora_B"] == 1.0).all()


@pytest.mark.parametrize(
    "change", [{"r": 4}, {"lora_alpha": 8}, {"use_rslora": True}, {"use_dora": True}]
)
def test_adapters_that_mean_something_else_are_refused(tmp_path, change):
    first = {"r": 2, "lora_alpha": 4, "use_dora": False}
    candidates = adapters(tmp_path, first, first | change)
    with pytest.raises(CandidateError, match=f"{next(iter(change))}: expected"):
        candidates.average(averages.uniform(2))
    candidates.average(averages.candidate(2, 1))


def test_transformers_loads_the_average(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    first, nets = transformers.LlamaForCausalLM(config), []
    for k in range(2):
        nets.append(copy.deepcopy(first))
        for p in nets[k].parameters():
            p.data += 0.01 * torch.randn_like(p)
        nets[k].save_pretrained(tmp_path / "in" / f"m{k}", max_shard_size="2KB")
    assert (tmp_path / "in" / "m0" / "model.safetensors.index.json").exists()
    (out := tmp_path / "out").mkdir()
    fixed = FixedAverage(Candidates(str(tmp_path / "in" / "m*")), averages.uniform(2))
    write_merge(out, fixed, "uniform")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        out / "averaged", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, p in loaded.named_parameters():
        a, b = (dict(net.named_parameters())[name] for net in nets)
        assert torch.equal(p, (0.5 * a.double() + 0.5 * b.double()).float()), name


def test_a_basis_alone_has_no_weights_to_average(tmp_path):
    model = torch.nn.Linear(3, 2)
    states = [{"weight": torch.randn(2, 3), "bias": torch.randn(2)} for _ in range(3)]
    subspace = twa.Subspace.from_candidates(model, saved(tmp_path / "in", states))
    subspace.save(tmp_path / "out", basis=True)
    loaded = twa.Subspace.load(tmp_path / "out", model)
    with pytest.raises(CandidateError, match="loaded without its candidates"):
        loaded.candidates.average(averages.uniform(3))
    write_fixed(tmp_path / "x.safetensors", FixedAverage(subspace.candidates, averages.uniform(3)))
