"""A packed basis around another center than it was packed for: the same rows, other
coefficients.
"""

import json

import pytest
import torch
import twa
from safetensors.torch import save_file
from test_pack_file import Model, equal, heap, parts, write
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from twa.basis import file as basis_file
from twa.coordinates import BASES
from twa.io.candidates import Candidates
from twa.io.errors import BasisError, TwaError
from twa.packing.to_file import PackToFile

CENTER = torch.tensor([0.0, 0.1, 0.2, 0.4, 0.3])


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    return heap(tmp_path_factory.mktemp("heap"))


@pytest.fixture(scope="module")
def packed(candidates, tmp_path_factory):
    """Of 8 bits, around the mean."""
    path = tmp_path_factory.mktemp("packed") / "b.safetensors"
    PackToFile(path, Model(), candidates, bits=8).run()
    return path


def train(subspace, steps=4):
    """A few steps that leave the center, and the numbers finite."""
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(9, 200, generator=generator)
        subspace.model(x).square().mean().sqrt().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.isfinite(subspace.coefficients).all() and subspace.coefficients.detach().any()
    return subspace


def betas(subspace):
    """Merge weights of the segments that have columns."""
    empty = subspace.segments.first[list(subspace.key_map.trained).index("nothing")]
    beta = subspace.merge_weights()
    return torch.cat([beta[:, :empty], beta[:, empty + 1 :]], 1) if beta.shape[1] > 1 else beta


def weights(subspace):
    return torch.cat([p.detach().double().flatten() for p in subspace.parameters])


def relative(found, expected, around):
    return float((found - expected).norm() / (expected - around).norm())


@pytest.mark.parametrize("center", ["last", 1, CENTER])
@pytest.mark.parametrize("balance", [False, True])
def test_like_one_that_is_packed_there(candidates, packed, center, balance):
    """Center, buffers and start have its bits; any merge weights make its weights, up to what 8
    bits leave; training goes the same way if what is trained is the same.
    """
    options = {"center": center, "balance": balance}
    there = twa.Subspace.from_candidates(Model(), candidates, bits=8, **options)
    moved = twa.Subspace.load(packed, Model(), candidates, **options)
    assert all(torch.equal(a, b) for a, b in zip(there.center, moved.center, strict=True))
    mine, theirs = there.model.state_dict(), moved.model.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    start, g = weights(moved), torch.Generator().manual_seed(0)
    for _ in range(3):
        beta = torch.rand(5, moved.coefficients.shape[1], generator=g).double()
        beta /= beta.sum(0)
        for subspace in (there, moved):
            subspace.set_merge_weights(beta)
        torch.testing.assert_close(betas(moved), betas(there), rtol=1e-4, atol=1e-5)
        assert relative(weights(moved), weights(there), start) < 0.02
    if balance:
        for subspace in (there, moved):
            subspace.coefficients.detach().zero_()
            subspace.write_weights()
            train(subspace, 20)
        assert relative(weights(moved), weights(there), start) < 0.02
        torch.testing.assert_close(betas(there), betas(moved), rtol=0, atol=0.02)


def test_the_gradient_is_that_of_the_weights(candidates, packed):
    """Rows and columns: what P and the coordinates say is how the weights move."""
    moved = twa.Subspace.load(packed, Model(), candidates, center=CENTER, balance=True)
    start = weights(moved)
    g = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in moved.parameters]
    for p, of in zip(moved.parameters, g, strict=True):
        p.grad = of.clone()
    c, y = moved.project_gradients(), torch.randn_like(moved.coefficients)
    with torch.no_grad():
        moved.coefficients.copy_(y)
    moved.write_weights()
    expected = torch.dot(weights(moved) - start, torch.cat([t.double().flatten() for t in g]))
    torch.testing.assert_close((c * y).double().sum(), expected, rtol=1e-3, atol=1e-3)


def test_the_fused_step_and_the_separate_calls(candidates, packed):
    moved = [twa.Subspace.load(packed, Model(), candidates, center=CENTER) for _ in range(2)]
    assert moved[0].can_fuse()
    moved[1].can_fuse = lambda: False
    start = weights(moved[0])
    fused, separate = (weights(train(subspace)) for subspace in moved)
    assert relative(fused, separate, start) < 1e-4


def test_without_the_candidates(candidates, packed):
    """The center then is what the rows make of it: near, and not trained are the file's own."""
    exact = twa.Subspace.load(packed, Model(), candidates, center="last")
    moved = twa.Subspace.load(packed, Model(), center="last")
    mean = weights(twa.Subspace.load(packed, Model()))
    assert 0 < relative(weights(moved), weights(exact), mean) < 0.01
    torch.testing.assert_close(moved.merge_weights(), exact.merge_weights())
    beta = torch.full((5,), 0.2)
    before = weights(exact)
    for subspace in (moved, exact):
        subspace.set_merge_weights(beta)
        assert relative(weights(subspace), mean, before) < 0.01


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("options", [{}, {"constraint": "simplex"}, {"balance": True}])
def test_saved_and_loaded(candidates, tmp_path, basis, options):
    """A subspace around another center comes back with its coefficients; and once more moved."""
    if basis == "orthonormal" and "balance" in options:
        pytest.skip("an orthonormal basis is not balanced")
    twa.Subspace.from_candidates(Model(), candidates, basis=basis, **options).save(
        tmp_path / "a", basis=True
    )
    moved = train(twa.Subspace.load(tmp_path / "a", Model(), candidates, center=CENTER))
    moved.save(tmp_path / "b", basis=True)
    loaded = equal(moved, twa.Subspace.load(tmp_path / "b", Model()))
    assert loaded.identity() == moved.identity()
    torch.testing.assert_close(loaded.merge_weights(), moved.merge_weights(), rtol=0, atol=0)
    equal(train(moved), train(loaded))
    saved = json.loads((tmp_path / "b" / "coefficients.json").read_text())
    if basis == "deltas":
        torch.testing.assert_close(torch.tensor(saved["origin"]), torch.full((5,), 0.2))
    else:
        assert saved["origin"] is None
    back = twa.Subspace.load(tmp_path / "b", Model(), candidates, center="mean")
    again = twa.Subspace.load(tmp_path / "a", Model(), candidates, center="mean")
    torch.testing.assert_close(weights(back), weights(again), rtol=0, atol=0)
    g = torch.Generator().manual_seed(3)
    beta = torch.rand(5, 1, generator=g).add(0.1).expand(-1, back.coefficients.shape[1]).double()
    for subspace in (back, again):
        subspace.set_merge_weights(beta / beta.sum(0))
    torch.testing.assert_close(weights(back), weights(again), rtol=1e-5, atol=1e-6)


def test_states_of_another_origin(candidates, packed, tmp_path):
    """Coefficients of rows from another point mean something else."""
    PackToFile(tmp_path / "b.safetensors", Model(), candidates, bits=8, center="last").run()
    moved = twa.Subspace.load(packed, Model(), candidates, center="last")
    with pytest.raises(TwaError, match="another subspace: origin: expected"):
        moved.load_state_dict(twa.Subspace.load(tmp_path / "b.safetensors", Model()).state_dict())
    same = twa.Subspace.load(packed, Model(), candidates, center="last")
    same.load_state_dict(train(moved).state_dict())
    assert torch.equal(weights(moved), weights(same))


def test_zero_is_no_other_center(candidates, packed, tmp_path):
    with pytest.raises(TwaError, match="center: expected a center other than 'zero'"):
        twa.Subspace.load(packed, Model(), candidates, center="zero")
    PackToFile(tmp_path / "z.safetensors", Model(), candidates, center="zero").run()
    with pytest.raises(TwaError, match=r"z\.safetensors: expected a center other than 'zero'"):
        twa.Subspace.load(tmp_path / "z.safetensors", Model(), candidates, center="mean")
    with pytest.raises(TwaError, match="center: expected 'mean'"):
        twa.Subspace.load(packed, Model(), candidates, center=torch.ones(5))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"moved": 1}, "moved: expected true or false"),
        ({"basis": "differences", "rows": 4}, "moved: expected true or false"),
        ({"moved": False}, "tensor 'origin': unexpected"),
    ],
)
def test_damaged_metadata(candidates, packed, tmp_path, change, message):
    twa.Subspace.load(packed, Model(), candidates, center="last").save(tmp_path, basis=True)
    path = tmp_path / basis_file.NAME
    header, metadata, data = parts(path)
    write(path, header, metadata | change, data)
    with pytest.raises(BasisError, match=message):
        twa.Subspace.load(path, Model())
    begin = header["origin"]["data_offsets"][0]
    data = data[:begin] + torch.tensor(3.0).double().numpy().tobytes() + data[begin + 8 :]
    write(path, header, metadata, data)
    with pytest.raises(BasisError, match="'origin': expected numbers that sum to 1"):
        twa.Subspace.load(path, Model())


def test_files_from_before(candidates, packed, tmp_path):
    """Such as have no entry `moved`."""
    header, metadata, data = parts(packed)
    del metadata["moved"]
    write(tmp_path / "old.safetensors", header, metadata, data)
    equal(
        twa.Subspace.load(packed, Model()), twa.Subspace.load(tmp_path / "old.safetensors", Model())
    )


def test_not_a_number_in_a_candidate(candidates, packed, tmp_path):
    """That nothing was packed of is no reason to train around it."""
    states = [{k: c.tensor(k).clone() for k in c.info} for c in candidates]
    other = Candidates.of_states(states)
    PackToFile(tmp_path / "b.safetensors", Model(), other).run()
    states[3]["first.bias"][4] = torch.nan
    with pytest.raises(BasisError):  # another fingerprint
        twa.Subspace.load(packed, Model(), Candidates.of_states(states), center="last")


# Several ranks -----------------------------------------------------------------------------------


class Wide(nn.Sequential):
    """Shards of two ranks begin at multiples of 128 weights."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 256, bias=False))


def of_rank(group, path, paths, sharding, at_hand=True):
    model = Wide()
    if sharding == "columns":
        model[0].bias.requires_grad_(False)
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    subspace = twa.Subspace.load(
        path,
        model,
        Candidates(paths) if at_hand else None,
        center=CENTER[1:],
        balance=sharding != "rows",
        sharding=sharding,
        group=group,
    )
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.1)
    g = torch.Generator().manual_seed(1)
    start = {
        k: v.full_tensor() if hasattr(v, "full_tensor") else v.clone()
        for k, v in model.state_dict().items()
    }
    for _ in range(3):
        model(torch.randn(9, 128, generator=g)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return start, subspace.merge_weights()


@pytest.mark.parametrize("sharding", ["replicate", "columns", "rows"])
def test_shardings(ranks, tmp_path, sharding):
    for k in range(4):
        g = torch.Generator().manual_seed(k)
        state = {
            n: p + 0.1 * torch.randn(p.shape, generator=g) for n, p in Wide().state_dict().items()
        }
        save_file(state, tmp_path / f"c{k}.safetensors")
    candidates, model = Candidates(tmp_path / "c*.safetensors"), Wide()
    if sharding == "columns":
        model[0].bias.requires_grad_(False)
    path = tmp_path / "b.safetensors"
    PackToFile(path, model, candidates).run()
    paths = [str(c.path) for c in candidates]
    _, expected = of_rank(None, path, paths, "single") if sharding != "columns" else (None, None)
    answers = ranks.run(2, of_rank, path, paths, sharding)
    average = candidates.average(CENTER[1:].double())
    for start, beta in answers:
        for name, t in start.items():
            torch.testing.assert_close(t, average[name])
        torch.testing.assert_close(beta, answers[0][1], rtol=0, atol=0)
        if expected is not None and sharding == "replicate":
            torch.testing.assert_close(beta, expected, rtol=1e-4, atol=1e-5)
    if sharding == "rows":
        with pytest.raises(AssertionError, match="another center needs the candidates"):
            ranks.run(2, of_rank, path, paths, sharding, False)
        return
    mean = candidates.average(torch.full((4,), 0.25).double())
    for start, _ in ranks.run(2, of_rank, path, paths, sharding, False):
        for name in ("0.weight", "2.weight"):
            assert 0 < relative(start[name], average[name], mean[name]) < 0.3  # of 4 bits
