"""Subspace: what becomes of tied, frozen, integer, constant and mixed-dtype tensors; export;
granularity; streaming.
"""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
import twa
from safetensors.torch import load_file, save_file
from torch import nn
from twa.basis.segments import segment_labels
from twa.io.errors import CandidateError, TwaError


class Zoo(nn.Module):
    """Tied embedding, frozen layer, BatchNorm and its integer buffer, 0-d and constant tensors."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.frozen = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.constant = nn.Parameter(torch.full((3,), 0.1))
        self.head = nn.Linear(6, 20, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, tokens):
        return (
            self.head(self.norm(self.frozen(self.embed(tokens)))) * self.scale + self.constant.sum()
        )


def zoo_state(k, tied_name="embed.weight"):
    torch.manual_seed(k)
    state = Zoo().state_dict()
    state["scale"] = torch.tensor(1.0 + k)
    state["constant"] = torch.full((3,), 0.1)
    state["norm.running_mean"] = torch.full((6,), float(k))
    state["norm.num_batches_tracked"] = torch.tensor(100 + k)
    state["mask"] = torch.tensor([k == 2, True])
    state.pop("head.weight" if tied_name == "embed.weight" else "embed.weight")
    return state


def save_zoo(folder, dtype=torch.float32, **options):
    for k in range(3):
        state = {
            key: t.to(dtype) if t.is_floating_point() else t
            for key, t in zoo_state(k, **options).items()
        }
        save_file(state, folder / f"c{k}.safetensors")
    return twa.Candidates(folder / "c*.safetensors")


@pytest.mark.parametrize("bits", [32, 8, 4, 1])
@pytest.mark.parametrize("tied_name", ["embed.weight", "head.weight"])
def test_every_kind_of_tensor(tmp_path, bits, tied_name):
    candidates = save_zoo(tmp_path, tied_name=tied_name)
    model = Zoo()
    subspace = twa.Subspace.from_candidates(model, candidates, bits=bits)
    mean = {
        k: torch.stack([zoo_state(i, tied_name)[k].double() for i in range(3)]).mean(0)
        for k in candidates.info
    }
    assert list(subspace.key_map.trained) == [
        "scale",
        "constant",
        "embed.weight",
        "norm.weight",
        "norm.bias",
    ]
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(model.embed.weight.double(), mean[tied_name], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        model.frozen.weight.double(), mean["frozen.weight"], rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(model.norm.running_mean, torch.full((6,), 1.0))
    assert model.norm.num_batches_tracked == 102 and model.mask.tolist() == [True, True]
    assert torch.equal(model.constant, torch.full((3,), 0.1))

    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.01)
    frozen = model.frozen.weight.clone()
    for _ in range(3):
        model(torch.arange(20)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.equal(model.constant, torch.full((3,), 0.1)) and torch.equal(
        model.frozen.weight, frozen
    )
    assert model.embed.weight is model.head.weight and not torch.equal(
        model.embed.weight.double(), mean[tied_name]
    )
    beta = subspace.merge_weights()
    torch.testing.assert_close(beta.sum(0), torch.ones(5, dtype=torch.float64))

    subspace.save(tmp_path / "out")
    exported = load_file(tmp_path / "out" / "averaged.safetensors")
    assert {k: (tuple(t.shape), t.dtype) for k, t in exported.items()} == {
        k: (i.shape, i.dtype) for k, i in candidates.info.items()
    }
    fresh = Zoo()
    fresh.load_state_dict(exported, strict=False)
    model.eval(), fresh.eval()
    assert torch.equal(fresh(torch.arange(20)), model(torch.arange(20)))
    written = json.loads((tmp_path / "out" / "coefficients.json").read_text())
    assert (
        torch.equal(torch.tensor(written["x"]), subspace.coefficients)
        and written["segments"] == subspace.segments.labels
    )


def test_dense_export_is_the_weighted_sum_of_the_files(tmp_path):
    candidates, model = save_zoo(tmp_path), Zoo()
    subspace = twa.Subspace.from_candidates(model, candidates, bits=32)
    with torch.no_grad():
        subspace.coefficients.normal_()
    subspace.write_weights()
    beta = subspace.merge_weights()
    for l, name in enumerate(subspace.key_map.trained):
        direct = sum(beta[i, l] * zoo_state(i)[name].double() for i in range(3))
        torch.testing.assert_close(
            dict(model.named_parameters())[name].double(), direct, rtol=1e-5, atol=1e-5
        )


def test_what_others_have_in_a_directory_stays(tmp_path):
    """A folder that had no result of ours: its averaged/ is the user's own."""
    subspace = twa.Subspace.from_candidates(Zoo(), save_zoo(tmp_path))
    own = tmp_path / "out" / "averaged" / "mine.bin"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    subspace.save(tmp_path / "out")
    assert own.read_text() == "mine"


def test_frozen_and_equal_in_all_candidates_keeps_its_bits(tmp_path):
    for k in range(3):
        state = zoo_state(k) | {"frozen.weight": zoo_state(0)["frozen.weight"]}
        save_file(state, tmp_path / f"c{k}.safetensors")
    model = Zoo()
    twa.Subspace.from_candidates(model, twa.Candidates(tmp_path / "c*.safetensors"))
    assert torch.equal(model.frozen.weight, zoo_state(0)["frozen.weight"])


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_dtypes(tmp_path, model_dtype, file_dtype):
    candidates, model = save_zoo(tmp_path, dtype=file_dtype), Zoo().to(model_dtype)
    subspace = twa.Subspace.from_candidates(model, candidates, bits=4)
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.1)
    model(torch.arange(20)).square().mean().backward()
    optimizer.step()
    assert subspace.coefficients.dtype == torch.float32 and subspace.coefficients.abs().sum() > 0
    assert all(p.dtype == model_dtype and torch.isfinite(p).all() for p in model.parameters())
    subspace.save(tmp_path / "out")
    assert load_file(tmp_path / "out" / "averaged.safetensors")["embed.weight"].dtype == file_dtype


def test_tied_copies_that_differ_are_refused(tmp_path):
    for k in range(2):
        state = zoo_state(k)
        save_file(
            state | {"head.weight": state["embed.weight"] + k}, tmp_path / f"c{k}.safetensors"
        )
    with pytest.raises(
        CandidateError,
        match=r"c1\.safetensors: 'embed.weight' and 'head.weight' are one tied weight",
    ):
        twa.Subspace.from_candidates(Zoo(), twa.Candidates(tmp_path / "c*.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("scale"), "tensor 'scale' of the model is missing"),
        (
            lambda s: s.update(other=torch.zeros(2)),
            "tensor 'other' is unexpected.*the model does not have it",
        ),
        (
            lambda s: s.update({"embed.weight": torch.zeros(25, 6)}),
            r"vocabulary mismatch \(20 and 25 tokens\)",
        ),
        (
            lambda s: s["norm.bias"].fill_(float("nan")),
            r"c0\.safetensors: tensor 'norm.bias' has 6 NaN or Inf",
        ),
        (
            lambda s: s["frozen.bias"].fill_(float("inf")),
            r"c0\.safetensors: tensor 'frozen.bias' has 6 NaN or Inf",
        ),
    ],
)
def test_files_that_do_not_fit_the_model(tmp_path, change, message):
    for k in range(2):
        state = zoo_state(k)
        if k == 0 or "NaN" not in message:
            change(state)
        save_file(state, tmp_path / f"c{k}.safetensors")
    with pytest.raises(CandidateError, match=message):
        twa.Subspace.from_candidates(Zoo(), twa.Candidates(tmp_path / "c*.safetensors"))


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("center", ["mean", "last"])
def test_nan_in_one_candidate_names_its_file(tmp_path, center, bits):
    for k in range(3):
        state = zoo_state(k)
        if k == 1:
            state["embed.weight"][4, 5] = float("nan")
        save_file(state, tmp_path / f"c{k}.safetensors")
    with pytest.raises(
        CandidateError,
        match=(
            r"c1\.safetensors: tensor 'embed.weight' has 1 NaN or Inf of 120 values \(the first at"
            r" \[4, 5\]\)"
        ),
    ):
        twa.Subspace.from_candidates(
            Zoo(), twa.Candidates(tmp_path / "c*.safetensors"), center=center, bits=bits
        )


def test_granularity(tmp_path):
    names = [
        "embed.weight",
        "layers.0.a.weight",
        "layers.0.b.bias",
        "layers.1.a.weight",
        "head.weight",
        "scale",
    ]
    assert segment_labels(names, "model") == ["model"] * 6
    assert segment_labels(names, "tensor") == names
    assert segment_labels(names, "block") == [
        "embed",
        "layers.0",
        "layers.0",
        "layers.1",
        "head",
        "scale",
    ]
    assert segment_labels(["0.conv.0.weight", "0.conv.1.weight", "12.bias"], "block") == [
        "0",
        "0",
        "12",
    ]
    assert segment_labels(names, lambda name: name[0]) == ["e", "l", "l", "l", "h", "s"]
    with pytest.raises(ValueError, match=r"no segment for parameter 'head.weight'"):
        segment_labels(names, dict.fromkeys(names[:4], 0))
    with pytest.raises(ValueError, match="granularity: expected"):
        segment_labels(names, "layer")
    candidates = save_zoo(tmp_path)
    for bits in (4, 32):
        for granularity, count in (
            ("model", 1),
            ("tensor", 5),
            (
                {
                    n: n == "scale"
                    for n in ["scale", "constant", "embed.weight", "norm.weight", "norm.bias"]
                },
                2,
            ),
        ):
            subspace = twa.Subspace.from_candidates(
                Zoo(), candidates, bits=bits, granularity=granularity
            )
            assert subspace.coefficients.shape == (3, count) == (3, len(subspace.segments.labels))


@pytest.mark.parametrize("center", ["first", 3, torch.tensor([1.0, 1.0, 1.0]), torch.ones(2) / 2])
def test_bad_center(tmp_path, center):
    with pytest.raises((ValueError, CandidateError), match="expected"):
        twa.Subspace.from_candidates(Zoo(), save_zoo(tmp_path), center=center)


def test_merge_weights_as_lists(tmp_path):
    candidates, model, weights = save_zoo(tmp_path), Zoo(), [0.25, 0.5, 0.25]
    expected = candidates.average(torch.tensor(weights))
    assert all(torch.equal(t, expected[key]) for key, t in candidates.average(weights).items())
    subspace = twa.Subspace.from_candidates(model, candidates, center=weights, bits=32)
    twa.load_average(model, candidates, weights)
    assert torch.equal(model.embed.weight, expected["embed.weight"])
    subspace.set_merge_weights([0.0, 0.0, 1.0])
    assert torch.allclose(model.embed.weight, candidates.average([0, 0, 1])["embed.weight"])
    for call in (subspace.set_merge_weights, candidates.average):
        with pytest.raises(TwaError, match="expected numbers, one for each candidate, found"):
            call("uniform")


def test_arguments_of_other_types(tmp_path):
    candidates, model = save_zoo(tmp_path), Zoo()
    subspace = twa.Subspace.from_candidates(model, candidates)
    assert repr(candidates) == "Candidates(3, oldest first: c0, c1, c2)"
    assert repr(subspace) == "Subspace(3 candidates, coefficients (3, 5))"
    for call, said in (
        (lambda: twa.Subspace.from_candidates(Zoo, candidates), "model: .*, found the class Zoo"),
        (lambda: twa.Subspace.from_candidates(model, "run/"), "candidates: .*, found str"),
        (lambda: twa.load_average(model, "run/", [1.0]), "candidates: .*, found str"),
        (lambda: twa.load_average({}, candidates, [1.0]), "model: .*, found dict"),
        (lambda: twa.Recorder(model.state_dict(), every=1), "model: .*, found OrderedDict"),
        (lambda: twa.update_bn(model, []), "model: .*, found list"),
        (lambda: twa.IterateAverage(model), "subspace: .*, found Zoo"),
        (lambda: twa.SubspaceOptimizer(model), "subspace: .*, found Zoo"),
        (lambda: twa.SubspaceOptimizer(subspace, "SGD"), "optimizer: .*, found an object of str"),
        (lambda: twa.average(Zoo, candidates, [], [], min), "model: .*, found the class Zoo"),
        (lambda: twa.average(model, candidates, [], [], "mse"), "loss: .*, found str"),
        (lambda: twa.average(model, candidates, [], None, min), "val: .*, found NoneType"),
    ):
        with pytest.raises(TwaError, match=said):
            call()


def test_nothing_trainable(tmp_path):
    model = Zoo()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable"):
        twa.Subspace.from_candidates(model, save_zoo(tmp_path))


def moved(tmp_path, **options):
    """A subspace away from its center, and its average."""
    subspace = twa.Subspace.from_candidates(
        Zoo(), twa.Candidates(tmp_path / "c*.safetensors"), **options
    )
    average = twa.IterateAverage(subspace)
    with torch.no_grad():
        g = torch.Generator().manual_seed(1)
        subspace.coefficients += 0.1 * torch.randn(subspace.coefficients.shape, generator=g)
    subspace.write_weights()
    average.update(), average.update()
    return subspace, average


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("way", ["torch", "dcp"])
@pytest.mark.parametrize(
    "options", [{}, {"constraint": "simplex"}, {"basis": "orthonormal"}, {"bits": 32}], ids=str
)
def test_states_of_subspace_and_average(tmp_path, options, way):
    """The coefficients come back, and the model is at them."""
    save_zoo(tmp_path)
    subspace, average = moved(tmp_path, **options)
    kept = {"subspace": subspace, "average": average}
    if way == "torch":
        torch.save({key: value.state_dict() for key, value in kept.items()}, tmp_path / "state.pt")
    else:
        dcp.save(kept, checkpoint_id=tmp_path / "state", no_dist=True)
    fresh = twa.Subspace.from_candidates(
        Zoo(), twa.Candidates(tmp_path / "c*.safetensors"), **options
    )
    other = twa.IterateAverage(fresh)
    if way == "torch":
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        fresh.load_state_dict(state["subspace"]), other.load_state_dict(state["average"])
    else:
        kept = {"subspace": fresh, "average": other}
        dcp.load(kept, checkpoint_id=tmp_path / "state", no_dist=True)
    for (key, t), found in zip(
        subspace.model.state_dict().items(), fresh.model.state_dict().values(), strict=True
    ):
        assert torch.equal(t, found), key
    assert torch.equal(fresh.coefficients, subspace.coefficients)
    assert torch.equal(other.coefficients, average.coefficients) and other.steps == 2


@pytest.mark.parametrize("eta", [0.0, 2.0])
def test_an_average_of_many_steps_still_moves(tmp_path, eta):
    """Late in a run a step moves the average by less than float32 can tell."""
    subspace = twa.Subspace.from_candidates(Zoo(), save_zoo(tmp_path))
    x = subspace.coefficients
    with torch.no_grad():
        x.fill_(1.0)
    average = twa.IterateAverage(subspace, eta)
    average.update()
    average.steps = 10**6  # of the same
    exact = 1.0
    with torch.no_grad():
        x.fill_(1.01)
    for t in range(10**6 + 1, 10**6 + 501):
        average.update()
        exact += (1 + eta) / (t + eta) * (x[0, 0].item() - exact)
    other = twa.IterateAverage(subspace, eta)
    other.load_state_dict(average.state_dict())
    for a in (average, other):
        assert a.coefficients.dtype == torch.float32
        assert (a.coefficients.double() - exact).abs().max() <= 2.0**-24 * 1.01 + 1e-12


def test_states_that_are_refused(tmp_path):
    """Of another subspace, of something else, of a shape that would be spread over the segments."""
    save_zoo(tmp_path)
    subspace, average = moved(tmp_path)
    before = subspace.coefficients.detach().clone()
    optimizer = twa.SubspaceOptimizer(moved(tmp_path, bits=8)[0], torch.optim.SGD, lr=1.0)
    state = subspace.state_dict()
    for bad, said in (
        (optimizer.subspace.state_dict(), "state of another subspace: bits: expected 4, found 8"),
        (optimizer.state_dict(), "expected the state of a Subspace, found no 'coefficients'"),
        (average.state_dict(), "'twa-subspace-1', found 'twa-iterate-average-1'"),
        ({"coefficients": state["coefficients"]}, "expected the state of a Subspace, found no 'id"),
        (state | {"coefficients": torch.ones(3, 1)}, r"expected shape \(3, 5\), found \(3, 1\)"),
    ):
        with pytest.raises(TwaError, match=said):
            subspace.load_state_dict(bad)
    for bad, said in (
        (state, "'twa-iterate-average-1', found 'twa-subspace-1'"),
        ({"eta": 1.0}, "expected the state of an IterateAverage, found no 'steps'"),
    ):
        with pytest.raises(TwaError, match=said):
            average.load_state_dict(bad)
    assert torch.equal(subspace.coefficients, before)
