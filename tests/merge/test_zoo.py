"""The zoo: models on which averaging weights goes wrong in silence, every stage against the
reference in zoo.py.
"""

import os
import resource

import pytest
import torch
import twa
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations
from twa.distributed.weights import load_merge
from twa.export.bundle import write_bundle
from twa.io.errors import CandidateError, TwaError
from twa.merge.evaluate import mean_over
from twa.merge.report import AVERAGED_BN, table_rows
from twa.merge.run import Merge
from twa.merge.settings import Settings, TwaMethod
from twa.tasks.contract import load_task
from zoo import (
    CENTER,
    GPT,
    VECTORS,
    ZOO,
    Frozen,
    N,
    Odd,
    Reference,
    ResNet,
    animal,
    born,
    each,
    flat,
    loss_of,
    near,
    old_style,
    save,
    stacked,
    walk,
)

import twa_kernels as tk

WALKS = [
    (4, "tensor", ".pt", False),
    (4, "block", ".safetensors", True),
    (32, "model", ".safetensors", False),
    (32, "tensor", ".pt", True),
]


@pytest.mark.parametrize(("bits", "granularity", "suffix", "low_memory"), WALKS)
@pytest.mark.parametrize("name", ZOO)
def test_zoo(tmp_path, name, bits, granularity, suffix, low_memory):
    make, inputs = animal(name)
    walk(
        tmp_path,
        make,
        inputs,
        [born(make, k) for k in range(N)],
        bits,
        granularity,
        suffix,
        low_memory,
    )


@pytest.mark.parametrize("bits", [4, 32])
def test_one_candidate(tmp_path, bits):
    """Nothing to learn: gradients of zero, and the candidate's own bits."""
    subspace = walk(
        tmp_path,
        GPT,
        ZOO["gpt"][1],
        [born(GPT, 0)],
        bits,
        "tensor",
        ".pt",
        False,
        center=torch.ones(1, dtype=torch.float64),
    )
    assert not subspace.coefficients.any() and all(
        torch.equal(t, born(GPT, 0).state_dict()[k]) for k, t in subspace.model.state_dict().items()
    )


@pytest.mark.parametrize(("bits", "suffix"), [(4, ".safetensors"), (32, ".pt")])
def test_512_candidates_with_few_file_descriptors(tmp_path, bits, suffix):
    def make():
        return nn.Sequential(nn.Linear(6, 1), nn.BatchNorm1d(1))

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 12, hard)
    )
    try:
        walk(
            tmp_path,
            make,
            VECTORS,
            [born(make, k) for k in range(512)],
            bits,
            "tensor",
            suffix,
            False,
            center=twa.averages.ema(512, 0.99),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Equal candidates --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"constraint": "simplex"},
        {"basis": "differences"},
        {"basis": "orthonormal"},
        {"normalize": "none"},
        {"center": "last"},
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [4, 32])
def test_identical_candidates_stay(tmp_path, bits, options):
    model, only = Odd(), born(Odd, 0)
    for k in range(5):
        save(only, tmp_path / f"c{k}.pt")
    subspace = twa.Subspace.from_candidates(
        model, each(tmp_path.glob("c*.pt")), bits=bits, **options
    )
    subspace.set_merge_weights(torch.tensor([3.0, -1.0, -1.0, 0.0, 0.0]))
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW, lr=0.1)
    for _ in range(2):
        loss_of(model(VECTORS)).backward()
        optimizer.step()
    assert all(torch.equal(t, only.state_dict()[k]) for k, t in model.state_dict().items())
    assert torch.isfinite(subspace.coefficients).all() and not subspace.coefficients.grad.any()
    torch.testing.assert_close(
        subspace.merge_weights().sum(0),
        torch.ones(len(subspace.segments.labels), dtype=torch.float64),
    )


@pytest.mark.parametrize(
    "center", [twa.averages.uniform(5), twa.averages.candidate(5, 0)], ids=["mean", "at the copies"]
)
@pytest.mark.parametrize("bits", [4, 32])
def test_duplicates_share_their_gradient(tmp_path, bits, center):
    """Four copies and one other: neither the zero norms nor the copies upset what the other one can
    do.
    """
    models = [born(GPT, 0)] * 4 + [born(GPT, 1)]
    subspace = walk(
        tmp_path, GPT, ZOO["gpt"][1], models, bits, "tensor", ".pt", False, center=center, lr=1e-3
    )
    assert all(torch.equal(subspace.coefficients[0], row) for row in subspace.coefficients[1:4])
    subspace.set_merge_weights(twa.averages.candidate(5, 4))
    for name, p in subspace.model.named_parameters():
        near(
            p.detach(),
            dict(models[4].named_parameters())[name].detach().double(),
            1e-6 if bits == 32 else 0.3,
        )


# Dtypes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_mixed_dtypes(tmp_path, bits, suffix):
    """Every candidate of another dtype, and its tensors of others again; the result has the first
    one's.
    """
    dtypes, models = [torch.bfloat16, torch.float32, torch.float16, torch.float64], []
    for k in range(N):
        model = born(ResNet, k)
        for i, module in enumerate(m for m in model.modules() if not list(m.children())):
            module.to(dtypes[(i + k) % 4])
        models.append(model)
    for k, m in enumerate(models):
        state = {name: t.contiguous() for name, t in m.state_dict().items()}
        (torch.save if suffix == ".pt" else save_file)(state, tmp_path / f"c{k}{suffix}")
    model, inputs = born(ResNet, 9).train(), ZOO["resnet"][1]
    subspace = twa.Subspace.from_candidates(
        model, twa.Candidates(tmp_path / f"c*{suffix}"), bits=bits, center=CENTER
    )
    states = [m.state_dict() for m in models]
    for load in (lambda: None, lambda: load_merge(subspace.sharding, CENTER)):
        load()
        for name, t in model.state_dict().items():
            if t.is_floating_point():
                near(
                    t, sum(c * s[name].double() for c, s in zip(CENTER, states, strict=True)), 1e-6
                )
    reference = Reference(ResNet, states, subspace)
    expected = reference.step(model.state_dict(), inputs)
    loss_of(model(inputs)).backward()
    near(subspace.project_gradients(), expected, 1e-4)
    subspace.save(tmp_path / "out")
    assert {
        k: t.dtype for k, t in load_file(tmp_path / "out" / "averaged.safetensors").items()
    } == {k: t.dtype for k, t in states[0].items()}


def rounded_once(found, exact, slack):
    """How many numbers are not the nearest ones of their dtype; those that are not must be within
    `slack` of the middle between two.
    """
    inf = torch.full_like(found, torch.inf)
    neighbours = [torch.nextafter(found, way).double() for way in (inf, -inf)]
    further = (
        torch.stack([(t - exact).abs() for t in neighbours]).amin(0)
        - (found.double() - exact).abs()
    )
    assert (further >= -slack).all()
    return int((further < 0).sum())


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(tmp_path, dtype, bits):
    """Center, uniform average and trained weights of half-precision files in a half-precision
    model; many steps, each too small to show.
    """
    generator = torch.Generator().manual_seed(0)
    rows = [(1 + 0.02 * torch.randn(100, 64, generator=generator)).to(dtype) for _ in range(64)]
    for k, row in enumerate(rows):
        save_file({"weight": row, "bias": row[:, 0].clone()}, tmp_path / f"c{k}.safetensors")
    model = nn.Linear(64, 100).to(dtype)
    subspace = twa.Subspace.from_candidates(
        model, twa.Candidates(tmp_path / "c*.safetensors"), bits=bits
    )
    w = torch.stack(rows).double()
    off = rounded_once(model.weight.detach(), w.mean(0), 2.0**-24)
    load_merge(subspace.sharding, twa.averages.uniform(64))
    off += rounded_once(model.weight.detach(), w.mean(0), 2.0**-24)
    assert off < 20  # of 12800; only the sum's own rounding to float32
    still = rows[0]
    for k, row in enumerate(rows[1:], 2):
        still = still + (row - still) / k  # what a running average in half precision comes to
    assert (still.double() - w.mean(0)).abs().mean() > 3 * (model.weight - w.mean(0)).abs().mean()

    subspace.write_weights()
    begin, g = model.weight.detach().clone(), torch.randn(100, 64, generator=generator).to(dtype)
    p = (
        subspace.basis.rows[0].double()
        if bits == 32
        else flat(tk.unpack(subspace.basis)[0].double())
    )
    lr = (
        2 * torch.finfo(dtype).eps / 256 / (p.T @ (p @ g.double().flatten())).abs().median().item()
    )  # all steps together: two units in the last place
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=lr)
    for step in range(256):
        model.weight.grad = g.clone()
        optimizer.step()
        if step == 0:
            assert (model.weight != begin).double().mean() < 0.05  # of the weights
    assert (model.weight != begin).double().mean() > 0.5
    assert subspace.coefficients.dtype == subspace.coefficients.grad.dtype == torch.float32
    x = subspace.coefficients.detach()[:, 0].double()
    near(x, -256 * lr * (p @ g.double().flatten()), 1e-5)
    slack = 2.0**-22 * (1 + x.abs() @ p.abs())
    assert rounded_once(model.weight.detach().flatten(), w.mean(0).flatten() + x @ p, slack) < 20


@pytest.mark.parametrize("part", ["weight", "running_mean"])
def test_half_precision_overflow_is_no_silent_inf(tmp_path, part):
    for k in range(2):
        states = born(lambda: nn.BatchNorm1d(4), k).state_dict()
        save_file(
            {
                key: t.bfloat16() * (1e6 if key == part else 1) if t.is_floating_point() else t
                for key, t in states.items()
            },
            tmp_path / f"c{k}.safetensors",
        )
    with pytest.raises(
        ValueError,
        match=rf"'{part}': 4 of 4 values of the candidates' average overflow torch.float16",
    ):
        twa.Subspace.from_candidates(
            nn.BatchNorm1d(4).half(), twa.Candidates(tmp_path / "c*.safetensors")
        )
    with pytest.raises(TwaError, match=rf"'{part}': 4 of 4 values of .* overflow torch.float16"):
        candidates = twa.Candidates(tmp_path / "c*.safetensors")
        twa.load_average(nn.BatchNorm1d(4).half(), candidates, twa.averages.uniform(2))
    save_file(
        {"weight": torch.ones(1, 2).half(), "bias": torch.ones(1).half()},
        tmp_path / "half.safetensors",
    )
    subspace = twa.Subspace.from_candidates(
        nn.Linear(2, 1), twa.Candidates(tmp_path / "half.safetensors")
    )
    nn.init.constant_(subspace.model.weight, 1e5)
    with pytest.warns(UserWarning, match="tensor 'weight': 2 of 2 values overflow torch.float16"):
        write_bundle(tmp_path / "out", subspace.sharding, {})


class Complex(nn.Module):
    def __init__(self, kind, dtype=torch.complex64):
        super().__init__()
        self.linear, phase = nn.Linear(2, 2), torch.randn(3, dtype=dtype)
        (
            self.register_buffer("phase", phase)
            if kind == "buffer"
            else self.register_parameter("phase", nn.Parameter(phase))
        )


@pytest.mark.parametrize("kind", ["buffer", "parameter"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_is_refused_by_name(tmp_path, kind, dtype):
    for k in range(2):  # which differ
        save(Complex(kind, dtype), tmp_path / f"c{k}.pt")
    with pytest.raises(CandidateError, match=r"c\d\.pt: tensor 'phase' is complex"):
        twa.Subspace.from_candidates(Complex(kind, dtype), twa.Candidates(tmp_path / "c*.pt"))


def test_a_complex_buffer_that_is_the_same_everywhere_stays(tmp_path):
    first = Complex("buffer", torch.complex64)
    for k in range(3):
        with torch.no_grad():
            first.linear.weight.add_(1.0)
        save(first, tmp_path / f"c{k}.pt")
    model = Complex("buffer", torch.complex64)
    subspace = twa.Subspace.from_candidates(model, twa.Candidates(tmp_path / "c*.pt"))
    assert torch.equal(model.phase, first.phase)
    subspace.save(tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "averaged.safetensors")["phase"], first.phase)


# Memory and wrappers -----------------------------------------------------------------------------


def test_views_and_parameters_in_files(tmp_path):
    """Transposed, strided, expanded, negated views and tensors that ask for gradients: a .pt file
    keeps all that.
    """
    base = torch.randn(3, 12, 6)
    kinds = {
        "transposed": [b[:3].T for b in base],
        "strided": [b[::2, ::3] for b in base],
        "expanded": [b[:1, 0].expand(4) for b in base],
        "negated": [torch._neg_view(b[0]) for b in base],
        "parameter": [nn.Parameter(b.clone()) for b in base],
    }
    for k in range(3):
        torch.save({name: rows[k] for name, rows in kinds.items()}, tmp_path / f"c{k}.pt")
    for bits in (4, 32):
        model = nn.ParameterDict({name: torch.empty(rows[0].shape) for name, rows in kinds.items()})
        subspace = twa.Subspace.from_candidates(
            model, twa.Candidates(tmp_path / "c*.pt"), bits=bits
        )
        for name, rows in kinds.items():
            near(
                model[name].detach(), torch.stack([r.detach().double() for r in rows]).mean(0), 1e-6
            )
        held = [*subspace.center, *(subspace.basis.rows if bits == 32 else [subspace.basis.codes])]
        assert not any(t.requires_grad for t in held)  # they would keep the files' tensors alive


class Views(nn.Module):
    def __init__(self, how):
        super().__init__()
        base = torch.randn(4, 6)
        self.a = nn.Parameter(base)
        if how == "buffer":
            self.register_buffer("b", base[1])
        else:
            self.b = nn.Parameter(base if how == "data" else base[:, 2:])


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("how", ["data", "part", "buffer"])
def test_two_tensors_in_one_memory_are_refused(tmp_path, how, bits):
    """Tied by .data only: each would have coefficients and a gradient of its own, and the last one
    written would win.
    """
    for k in range(2):
        torch.save(
            {name: t.clone() for name, t in Views(how).state_dict().items()}, tmp_path / f"c{k}.pt"
        )
    with pytest.raises(ValueError, match=r"'[ab]' and '[ab]' share memory but are two tensors"):
        twa.Subspace.from_candidates(Views(how), twa.Candidates(tmp_path / "c*.pt"), bits=bits)


class Module(nn.Module):
    """Its only child happens to have a wrapper's name."""

    def __init__(self, child):
        super().__init__()
        self.module = child

    def forward(self, x):
        return self.module(x)


WRAPPERS = {
    "plain": lambda m: m,
    "DataParallel": nn.DataParallel,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "own": Module,
}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_and_files(tmp_path, wrapper, prefix):
    inner = Frozen()
    models = [born(Frozen, k) for k in range(N)]
    for k, m in enumerate(models):
        torch.save({prefix + name: t for name, t in m.state_dict().items()}, tmp_path / f"c{k}.pt")
    model = WRAPPERS[wrapper](inner)
    subspace = twa.Subspace.from_candidates(
        model, twa.Candidates(tmp_path / "c*.pt"), center=CENTER
    )
    for name, t in inner.state_dict().items():
        if t.is_floating_point():
            near(
                t,
                sum(c * m.state_dict()[name].double() for c, m in zip(CENTER, models, strict=True)),
                1e-6,
            )
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.1)
    loss_of(model(VECTORS)).backward()
    optimizer.step()
    assert subspace.coefficients.grad.any() and inner.head.weight in set(subspace.parameters)
    subspace.save(tmp_path / "out")
    exported = load_file(tmp_path / "out" / "averaged.safetensors")
    Frozen().load_state_dict(exported, strict=True)
    assert torch.equal(exported["head.weight"], inner.head.weight)


# What must not be averaged as it is --------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize(("value", "n"), [("nan", 1), ("nan", 3), ("inf", 3)])
@pytest.mark.parametrize("name", ["head.weight", "backbone.0.weight", "backbone.1.running_var"])
def test_not_finite_names_file_and_tensor(tmp_path, name, value, bits, n):
    models = [born(Frozen, k) for k in range(n)]
    models[-1].state_dict()[name].view(-1)[1] = float(value)
    for k, m in enumerate(models):
        save(m, tmp_path / f"c{k}.safetensors")
    with pytest.raises(
        CandidateError, match=rf"c{n - 1}\.safetensors: tensor '{name}' has 1 NaN or Inf"
    ):
        twa.Subspace.from_candidates(
            Frozen(), twa.Candidates(tmp_path / "c*.safetensors"), bits=bits
        )


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("name", ["head.weight", "backbone.0.weight", "backbone.1.running_var"])
def test_load_average_names_file_and_tensor_that_are_not_finite(name, value):
    states = [born(Frozen, k).state_dict() for k in range(3)]
    states[1][name].view(-1)[1] = float(value)
    candidates = twa.Candidates.of_states(states)
    with pytest.raises(CandidateError, match=rf"state_1: tensor '{name}' has 1 NaN or Inf"):
        twa.load_average(Frozen(), candidates, twa.averages.uniform(3))
    twa.load_average(Frozen(), candidates, twa.averages.lawa(3, 1))  # which does not read it


def test_numbers_that_all_candidates_have_stay():
    """Also among others that differ, in float64, with weights whose sum misses 1, and as -Inf."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    model.register_buffer("mask", torch.zeros(3, dtype=torch.float64))
    alike = torch.tensor([0.1, 1 / 3, -torch.inf], dtype=torch.float64)
    states = [
        {"weight": alike.index_fill(0, torch.tensor(1), k), "mask": alike + 0} for k in range(7)
    ]
    for k, state in enumerate(states):
        state["mask"][1] = k
    candidates = twa.Candidates.of_states(states)
    for beta in (torch.full((7,), 1 / 7), twa.averages.uniform(7), twa.averages.ema(7, 0.9)):
        twa.load_average(model, candidates, beta)
        assert model.weight[[0, 2]].tolist() == [0.1, -torch.inf]
        assert model.mask[[0, 2]].tolist() == [0.1, -torch.inf]


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, old_style("spectral_norm")])
@pytest.mark.parametrize("bits", [4, 32])
def test_spectral_norm_in_evaluation_mode(tmp_path, wrap, bits):
    """The buffers hold singular vectors, whose signs differ between candidates: an average of them
    would divide by next to nothing.
    """
    for k in range(N):
        save(born(stacked(wrap), k), tmp_path / f"c{k}.pt")
    model = stacked(wrap)().eval()
    subspace = twa.Subspace.from_candidates(model, twa.Candidates(tmp_path / "c*.pt"), bits=bits)
    for change in (
        lambda: None,
        lambda: subspace.set_merge_weights(twa.averages.ema(N, 0.5)),
        lambda: load_merge(subspace.sharding, CENTER),
    ):
        change()
        model(VECTORS)
        assert torch.linalg.matrix_norm(model[0].weight, 2).item() == pytest.approx(1, abs=1e-3)
        assert not any(m.training for m in model.modules())


class Siamese(nn.Module):
    """One BatchNorm called twice in a pass, one never."""

    def __init__(self):
        super().__init__()
        self.norm, self.head, self.idle = nn.BatchNorm1d(6), nn.Linear(6, 1), nn.BatchNorm1d(2)

    def forward(self, x):
        return self.head(self.norm(x)) - self.head(self.norm(2 * x + 1))


def test_batchnorm_called_twice_or_never():
    model = born(Siamese, 0)
    idle, batches = model.idle.running_mean.clone(), [VECTORS[:5], VECTORS[5:]]
    assert twa.update_bn(batches, model) == 2
    calls = [(len(b), x.double()) for b in batches for x in (b, 2 * b + 1)]
    for found, of in (
        (model.norm.running_mean, lambda x: x.mean(0)),
        (model.norm.running_var, lambda x: x.var(0)),
    ):
        torch.testing.assert_close(
            found.double(), sum(size * of(x) for size, x in calls) / 16, rtol=1e-6, atol=1e-6
        )
    assert torch.equal(model.idle.running_mean, idle) and model.norm.num_batches_tracked == 4


TASK = """
import torch
from test_zoo import Siamese
from zoo import VECTORS, loss_of
def model(): return Siamese()
def train_data(): return [VECTORS[:4], VECTORS[4:]]
def val_data(): return [VECTORS * 0.7 + 0.1, VECTORS - 0.1]
def loss(model, batch): return loss_of(model(batch))
"""


def test_both_losses_of_a_model_with_batchnorm(tmp_path):
    """The table has the loss with averaged statistics beside that with re-estimated ones, which is
    the one that counts and is exported.
    """
    (tmp_path / "task.py").write_text(TASK)
    models = [born(Siamese, k) for k in range(N)]
    for k, m in enumerate(models):
        save(m, tmp_path / f"c{k}.pt")
    task = load_task(str(tmp_path / "task.py"))
    method = TwaMethod("t", "tensor", 4)
    settings = Settings((method,), steps=3, compare=True)
    outcome = Merge(task, twa.Candidates(tmp_path / "c*.pt"), settings, progress=False).run()
    results = {r.method: r for r in outcome.results}
    mean = Siamese()
    states = [m.state_dict() for m in models]
    mean.load_state_dict({k: sum(s[k].double() for s in states) / N for k in states[0]})
    assert results["uniform"].averaged_bn_loss == pytest.approx(
        mean_over(mean, task.loss, task.val), rel=1e-5
    )
    twa.update_bn(task.train, mean)
    assert results["uniform"].val_loss == pytest.approx(
        mean_over(mean, task.loss, task.val), rel=1e-5
    )
    assert results["uniform"].val_loss != pytest.approx(
        results["uniform"].averaged_bn_loss, rel=1e-2
    )
    assert (
        results["last"].averaged_bn_loss is None
        and results[method.name].averaged_bn_loss is not None
    )
    header, rows = table_rows(outcome.results, task)
    cells = {row[0]: row[header.index(AVERAGED_BN)] for row in rows}
    assert cells["last"] == "" and cells["uniform"] == f"{results['uniform'].averaged_bn_loss:.4f}"
    mean.load_state_dict(outcome.state)
    assert mean_over(mean, task.loss, task.val) == pytest.approx(outcome.winner.val_loss, rel=1e-6)
