"""basis="differences": closed loop, so that errors do not add up; every dtype, size and option."""

import pytest
import torch
import twa
from safetensors.torch import save_file
from torch import nn
from twa.basis.file import read_basis
from twa.io.errors import BasisError
from twa.merge.settings import TwaMethod

import twa_kernels as tk

BITS = [32, 8, 4, 3, 2, 1]
#: relative error of one Gaussian row (docs/format.md); float32's own
ROW_ERROR = {32: 1e-6, 8: 0.007, 4: 0.094, 3: 0.184, 2: 0.339, 1: 0.601}


class Model(nn.Module):
    """Sizes around tiles and blocks of 8192 columns; tensors without elements and of one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(300, 60), nn.Linear(60, 3)
        self.one, self.nothing = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(0, 3))

    def forward(self, x):
        return self.head(torch.tanh(self.first(x))) * self.one + self.nothing.sum()


def heap(folder, n=6, step=0.05, dtype=torch.float32, changed=lambda k, state: None):
    """Checkpoints of a random walk: neighbours are step apart, others sqrt of that many."""
    folder.mkdir(exist_ok=True)
    model, generator = Model(), torch.Generator().manual_seed(1)
    for k in range(n):
        for p in model.parameters():
            p.data += step * torch.randn(p.shape, generator=generator)
        state = {key: v.to(dtype).clone() for key, v in model.state_dict().items()}
        changed(k, state)
        save_file(state, folder / f"c{k:02}.safetensors")
    return twa.Candidates(folder / "c*.safetensors")


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    return heap(tmp_path_factory.mktemp("heap"))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return heap(tmp_path_factory.mktemp("many"), 40)


def subspace_of(candidates, **options):
    return twa.Subspace.from_candidates(Model(), candidates, basis="differences", **options)


def flat(model):
    return torch.cat([p.detach().reshape(-1).double() for p in model.parameters()])


def weights_of(candidates):
    names = list(dict(Model().named_parameters()))
    return torch.stack(
        [torch.cat([c.tensor(k).reshape(-1).double() for k in names]) for c in candidates]
    )


def one(n, k):
    return torch.eye(n, dtype=torch.float64)[k]


def errors(subspace, W):
    """||theta - w_k|| at the merge weights e_k, for each k."""
    found = []
    for k, w in enumerate(W):
        subspace.set_merge_weights(one(len(W), k))
        found.append(float((flat(subspace.model) - w).norm()))
    return found


@pytest.mark.parametrize("normalize", ["row", "none"])
@pytest.mark.parametrize("bits", BITS)
def test_errors_do_not_add_up(many, bits, normalize):
    """At every candidate the error is that of one difference, at the last as at the first."""
    W = weights_of(many)
    step = float((W[-1] - W[-2]).norm())
    found = errors(subspace_of(many, bits=bits, normalize=normalize), W)
    # each difference mends the error of the one before, and so is longer than the step
    one_row = ROW_ERROR[bits] * step / (1 - ROW_ERROR[bits] ** 2) ** 0.5
    assert max(found) < 1.3 * one_row + 1e-6 * float(W[-1].norm())


@pytest.mark.parametrize("bits", [4, 2])
def test_much_closer_than_packing_alone(many, bits):
    """Open loop: rows coded each by itself, whose errors add up to the last candidate."""
    W = weights_of(many)
    found = errors(subspace_of(many, bits=bits, center=0), W)
    numels = [p.numel() for p in Model().parameters()]
    shapes = [(numel,) for numel in numels]
    packer = tk.Packer(len(W) - 1, shapes, bits)
    for d in W.float().diff(dim=0).split(numels, 1):
        packer.add(d.contiguous())
    decoded = torch.cat(tk.unpack(packer.finish("none")), 1).double()
    opened = float((W[0] + decoded.sum(0) - W[-1]).norm())
    assert max(found) < 0.3 * opened


@pytest.mark.parametrize("granularity", ["model", "tensor", "fine", 256, lambda n: n[-4:]])
@pytest.mark.parametrize("bits", [32, 4])
def test_merge_weights_go_there_and_back(candidates, bits, granularity):
    center = torch.tensor([0.3, 0.0, -0.2, 0.5, 0.3, 0.1], dtype=torch.float64)
    subspace = subspace_of(candidates, bits=bits, granularity=granularity, center=center)
    W = weights_of(candidates)
    torch.testing.assert_close(flat(subspace.model), center @ W, rtol=1e-6, atol=1e-6)
    L = len(subspace.segments.labels)
    assert subspace.coefficients.shape == (5, L) and not subspace.coefficients.any()
    torch.testing.assert_close(subspace.merge_weights(), center[:, None].expand(6, L))
    beta = torch.tensor([0.3, 0.2, -0.1, 0.25, 0.15, 0.2], dtype=torch.float64)
    subspace.set_merge_weights(beta)
    most = {32: 1e-6, 4: ROW_ERROR[4]}[bits] * float((W[1] - W[0]).norm())
    assert (flat(subspace.model) - beta @ W).norm() <= 2 * most + 1e-5
    found = subspace.merge_weights()
    known = subspace.basis.divisor.gt(0).all(0)  # parameters without elements have no segment
    expected = beta[:, None].expand(6, L)
    torch.testing.assert_close(found[:, known], expected[:, known], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.sum(0), torch.ones(L).double())


@pytest.mark.parametrize("bits", [8, 4, 3, 1])
def test_rows_are_what_record_makes(candidates, bits):
    """Codes of the whole tensors, as a run would have recorded them."""
    subspace = subspace_of(candidates, bits=bits)
    basis, at = subspace.basis, 0
    for p, name in zip(subspace.parameters, subspace.key_map.trained, strict=True):
        reference = candidates[0].tensor(name).clone()
        tiles = -(-p.numel() // 128)
        for r in range(5):
            codes, _, _ = tk.record([candidates[r + 1].tensor(name)], [reference], bits)
            assert torch.equal(basis.codes[at : at + tiles, r], codes), (name, r)
        at += tiles


@pytest.mark.parametrize("bits", [32, 4, 3])
@pytest.mark.parametrize("granularity", ["tensor", 128])
def test_blocks_and_threads_give_the_same_bits(candidates, bits, granularity):
    expected = subspace_of(candidates, bits=bits, granularity=granularity)
    small = twa.Candidates([c.path for c in candidates], block_bytes=1)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found = subspace_of(small, bits=bits, granularity=granularity)
            assert all(
                torch.equal(a, b) for a, b in zip(found.center, expected.center, strict=True)
            )
            if bits == 32:
                pairs = zip(found.basis.rows, expected.basis.rows, strict=True)
                assert all(torch.allclose(a, b, rtol=1e-6) for a, b in pairs)
                continue
            for name in ("codes", "row_scale", "divisor"):
                assert torch.equal(getattr(found.basis, name), getattr(expected.basis, name)), name
            assert torch.equal(*(s.basis.scales.view(torch.uint8) for s in (found, expected)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_of_candidates(tmp_path, bits, dtype):
    candidates = heap(tmp_path / "run", dtype=dtype)
    W = weights_of(candidates)
    found = errors(subspace_of(candidates, bits=bits), W)
    step = float((W[1] - W[0]).norm())
    assert max(found) < 1.3 * ROW_ERROR[bits] * step + 1e-6 * float(W[-1].norm())


def train(subspace, low_memory=False, steps=4, rule=torch.optim.AdamW):
    optimizer = twa.SubspaceOptimizer(subspace, rule, lr=0.02, low_memory=low_memory)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        loss = subspace.model(torch.randn(9, 300, generator=generator)).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("constraint", ["none", "simplex"])
@pytest.mark.parametrize("bits", [32, 4])
def test_training(candidates, bits, constraint):
    """The fused step, the separate one and low_memory; merge weights say where it went."""
    found = []
    for low_memory in (False, True):
        subspace = subspace_of(candidates, bits=bits, constraint=constraint)
        losses = train(subspace, low_memory, 30)
        assert losses[-1] < losses[0]
        found.append(flat(subspace.model))
        beta = subspace.merge_weights()
        torch.testing.assert_close(beta.sum(0), torch.ones(beta.shape[1]).double())
        if constraint == "simplex":
            assert float(beta.min()) > 0
        again = subspace_of(candidates, bits=bits)
        again.set_merge_weights(beta)
        torch.testing.assert_close(flat(again.model), found[-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("constraint", ["none", "simplex"])
@pytest.mark.parametrize("granularity", ["tensor", 128])
def test_saved_and_loaded(candidates, tmp_path, constraint, granularity):
    subspace = subspace_of(candidates, constraint=constraint, granularity=granularity)
    train(subspace)
    subspace.save(tmp_path, basis=True)
    contents = read_basis(tmp_path / "basis.safetensors").contents
    assert (contents.basis, contents.rows, len(contents.candidates)) == ("differences", 5, 6)
    loaded = twa.Subspace.load(tmp_path, Model(), candidates)
    assert loaded.identity() == subspace.identity()
    assert loaded.coefficients_json() == subspace.coefficients_json()
    assert torch.equal(flat(loaded.model), flat(subspace.model))
    train(subspace)
    train(loaded)
    assert torch.equal(flat(loaded.model), flat(subspace.model))


def test_equal_candidates_and_constant_tensors(tmp_path):
    """A first difference of zero: its row is zero, and so is its coefficient's gradient."""

    def changed(k, state):
        state["head.bias"] = torch.ones(3)
        if k in (0, 1):
            state["first.bias"] = torch.zeros(60)

    candidates = heap(tmp_path, changed=changed)
    for bits in BITS:
        subspace = subspace_of(candidates, bits=bits)
        train(subspace, rule=torch.optim.SGD)
        names, x = list(subspace.key_map.trained), subspace.x()
        assert not x[0, names.index("first.bias")] and x[1, names.index("first.bias")]
        assert torch.equal(subspace.model.head.bias.detach(), torch.ones(3))
        assert torch.isfinite(subspace.merge_weights()).all()
    same = twa.Candidates.of([candidates[0]] * 2)
    subspace = subspace_of(same)
    train(subspace)
    assert torch.equal(flat(subspace.model), weights_of(same)[0])


def test_two_candidates(tmp_path):
    candidates = heap(tmp_path, 2)
    W = weights_of(candidates)
    subspace = subspace_of(candidates, bits=8, granularity="model")
    assert subspace.coefficients.shape == (1, 1)
    assert max(errors(subspace, W)) < 0.01 * float((W[1] - W[0]).norm())


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("bad", [0, 3])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_candidate_that_is_not_finite(tmp_path, bits, bad, value):
    def changed(k, state):
        if k == bad:
            state["first.weight"][59, 299] = value

    candidates = heap(tmp_path, changed=changed)
    message = rf"c0{bad}.*'first\.weight' has 1 NaN or Inf.*\[59, 299\]"
    for center in ("mean", "last"):
        with pytest.raises(twa.CandidateError, match=message):
            subspace_of(candidates, bits=bits, center=center)


def test_weights_too_large(tmp_path):
    candidates = heap(tmp_path, changed=lambda k, s: s["first.weight"].fill_(3e38 * (-1) ** k))
    for bits in (32, 4):
        with pytest.raises(twa.CandidateError, match=r"'first\.weight'.*overflows float32"):
            subspace_of(candidates, bits=bits)


def test_what_is_refused(candidates):
    one_alone = twa.Candidates.of(candidates[:1])
    with pytest.raises(twa.TwaError, match=r"'differences'.*at least 2 candidates, found 1"):
        subspace_of(one_alone)
    with pytest.raises(twa.TwaError, match=r"'differences'.*a center other than 'zero'"):
        subspace_of(candidates, center="zero")


def test_progress(candidates):
    seen = []
    subspace_of(candidates, progress=lambda key, count: seen.append((key, count)))
    total = sum(c.path.stat().st_size for c in candidates)
    assert {key for key, _ in seen} == {*Model().state_dict()}
    assert 0.9 * total < sum(count for _, count in seen) <= total


def test_damaged_files(candidates, tmp_path):
    """The sum of the center's weights; rows and chunk are in test_pack_file."""
    subspace_of(candidates).save(tmp_path, basis=True)
    path = tmp_path / "basis.safetensors"
    loaded = read_basis(path)
    stored = loaded.tensors["center_weights"]
    assert stored.read().sum() == pytest.approx(1)
    data = path.read_bytes()
    at = data.index(stored.read().numpy().tobytes())
    path.write_bytes(data[:at] + torch.tensor([0.5]).double().numpy().tobytes() + data[at + 8 :])
    with pytest.raises(BasisError, match=r"center_weights.*sum to 1, found a sum of 1\.333"):
        read_basis(path)


def test_twa_average_takes_the_basis():
    method = TwaMethod.parse("t:tensor:4:differences")
    assert method.basis == "differences" and method.name == "TWA-t per tensor, 4 bits, differences"
    both = TwaMethod.parse("v:fine:2:simplex:differences")
    assert (both.basis, both.constraint) == ("differences", "simplex")
    with pytest.raises(ValueError, match="one basis, found differences and orthonormal"):
        TwaMethod.parse("t:tensor:4:differences:orthonormal")
