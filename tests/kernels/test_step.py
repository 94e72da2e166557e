"""The fused step against the three separate calls, torch's optimizers and the reference.

In the trainer against the unfused path.
"""

import copy

import pytest
import torch
import twa
from conftest import BITS, SEGMENTS, SHAPES, rows_of, tensors
from safetensors.torch import save_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import twa_kernels as tk
from twa_kernels import PackedBasis

RULES = [
    ("sgd", {"lr": 0.1}),
    ("sgd", {"lr": 0.1, "momentum": 0.9}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "maximize": True}),
    ("adamw", {"lr": 0.02}),
    (
        "adamw",
        {"lr": 0.02, "betas": (0.5, 0.9), "weight_decay": 0.1, "eps": 1e-6, "maximize": True},
    ),
    ("adamw", {"lr": 0.02, "betas": (0.0, 0.5), "weight_decay": 0.0}),
]
TORCH = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


def large_segments(bits=8, n=5):
    """One segment above the size that one thread takes alone, one of several tensors, one below."""
    shapes = [(2_000_000,), (300,), (129,), (40_000,)]
    tiles = sum(-(-s[0] // 128) for s in shapes)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (tiles, n, 16 * bits), dtype=torch.uint8, generator=generator)
    scales = torch.randint(40, 100, (tiles, n), dtype=torch.uint8, generator=generator).view(
        torch.float8_e4m3fn
    )
    segment = tk.layout.segments_to_tiles([1, 0, 1, 2], [s[0] for s in shapes])
    return PackedBasis(
        codes,
        scales,
        torch.rand(n, 3),
        segment,
        torch.ones(n, 3),
        tuple(torch.Size(s) for s in shapes),
        bits,
    )


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize(("rule", "options"), RULES)
def test_equals_the_separate_calls(rule, options, backend, basis_of):
    basis, center = basis_of(5, 4), tensors(SHAPES, 11)
    x, state, out = torch.zeros(5, 5), {}, [torch.empty(s) for s in SHAPES]
    theirs = nn.Parameter(x.clone())
    optimizer = TORCH[rule]([theirs], **options)
    for k in range(6):
        grads = tensors(SHAPES, 20 + k)
        grads[3] = None
        c = tk.step(
            basis, grads, x, out, center, rule=rule, options=options, state=state, backend=backend
        )
        theirs.grad = tk.project(basis, grads, backend)
        assert torch.equal(c, theirs.grad)
        optimizer.step()
        torch.testing.assert_close(x, theirs.detach(), rtol=1e-5, atol=1e-6)
        assert all(
            torch.equal(o, t)
            for o, t in zip(out, tk.reconstruct(basis, x, center, backend=backend), strict=True)
        )
    for name, value in optimizer.state[theirs].items():
        if value is not None:
            torch.testing.assert_close(
                torch.as_tensor(state[name]), value, rtol=1e-5, atol=1e-5 * float(value.abs().max())
            )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_large_segments_and_threads(bits, threads):
    basis = large_segments(bits)
    grads, center = tensors(basis.shapes, 1), tensors(basis.shapes, 2)
    x, out = (
        torch.randn(5, 3, generator=torch.Generator().manual_seed(3)),
        [torch.empty(s) for s in basis.shapes],
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        c = tk.step(basis, grads, x, out, center, rule="sgd", options={"lr": 1e-3}, state={})
    finally:
        torch.set_num_threads(before)
    assert torch.equal(c, tk.project(basis, grads))
    assert all(
        torch.equal(o, t) for o, t in zip(out, tk.reconstruct(basis, x, center), strict=True)
    )


def test_a_nan_reaches_its_segment_only(basis_of):
    basis, grads = basis_of(5, 4), tensors(SHAPES, 20)
    grads[0].view(-1)[0] = torch.nan  # segment 0: tensors 0 and 4
    x, out = torch.zeros(5, 5), [torch.empty(s) for s in SHAPES]
    c = tk.step(basis, grads, x, out, rule="adamw", options={"lr": 0.1}, state={})
    assert c[:, 0].isnan().all() and x[:, 0].isnan().all() and not x[:, 1:].isnan().any()
    assert [bool(o.isnan().any()) for o in out] == [s == 0 for s in SEGMENTS]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_writes_other_dtypes_and_layouts(dtype, basis_of):
    basis, grads = basis_of(5, 4), tensors(SHAPES, 20)
    x = torch.zeros(5, 5)
    out = [torch.empty(s, dtype=dtype) for s in SHAPES]
    out[5] = torch.empty(126, 9, dtype=dtype).T
    tk.step(basis, grads, x, out, rule="sgd", options={"lr": 0.1}, state={})
    assert all(
        torch.equal(o, t.to(dtype)) for o, t in zip(out, tk.reconstruct(basis, x), strict=True)
    )


def test_opcheck(basis_of):
    basis, state, out = (
        basis_of(5, 4),
        [torch.rand(5, 5), torch.rand(5, 5)],
        [torch.empty(s) for s in SHAPES],
    )
    options = [0.0, 0.02, 0.01, 0.9, 0.999, 1e-8]
    arguments = (
        *basis.operands,
        tensors(SHAPES, 20),
        [],
        out,
        torch.zeros(5, 5),
        state,
        "adamw",
        options,
        1,
        "",
    )
    torch.library.opcheck(torch.ops.twa_kernels.step.default, arguments)


def test_compiles_without_graph_break(basis_of):
    basis, grads = basis_of(5, 4), tensors(SHAPES, 20)

    def run(step):
        x, out = torch.zeros(5, 5), [torch.empty(s) for s in SHAPES]
        return [step(x, out), x, *out]

    def step(x, out):
        return tk.step(basis, grads, x, out, rule="sgd", options={"lr": 0.1}, state={})

    for ours, eager in zip(
        run(torch.compile(step, fullgraph=True, backend="aot_eager")), run(step), strict=True
    ):
        assert torch.equal(ours, eager)


def test_autograd_refuses_values_from_before(basis_of):
    x = torch.zeros(5, 5, requires_grad=True)
    loss = (x**2).sum()
    tk.step(
        basis_of(5, 4),
        tensors(SHAPES),
        x,
        [torch.empty(s) for s in SHAPES],
        rule="sgd",
        options={},
        state={},
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_refused_step_leaves_the_state_alone(basis_of):
    state: dict = {}
    with pytest.raises(ValueError, match="grads: expected 9 tensors"):
        tk.step(
            basis_of(5, 4),
            [torch.zeros(3)],
            torch.zeros(5, 5),
            [torch.empty(s) for s in SHAPES],
            rule="adamw",
            options={},
            state=state,
        )
    assert state == {}
    tk.step(
        basis_of(5, 4),
        tensors(SHAPES),
        torch.zeros(5, 5),
        [torch.empty(s) for s in SHAPES],
        rule="adamw",
        options={},
        state=state,
    )
    before = state["step"]
    tk.step(
        basis_of(5, 4),
        tensors(SHAPES),
        torch.zeros(5, 5),
        [torch.empty(s) for s in SHAPES],
        rule="adamw",
        options={},
        state=state,
    )
    assert before is state["step"] and int(before) == 2


@pytest.mark.parametrize("rule, kind", [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_all_defaults_of_an_optimizer_of_torch(rule, kind, basis_of):
    """`optimizer.defaults` may be handed on as it is."""
    basis, x = basis_of(5, 4), torch.zeros(5, 5)
    options = kind([torch.zeros(1)]).defaults
    grads, out = [torch.randn(s) for s in SHAPES], [torch.empty(s) for s in SHAPES]
    tk.step(basis, grads, x, out, rule=rule, options=options, state={})
    assert x.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"options": {"decoupled_weight_decay": False}}, ValueError, "is Adam's rule"),
        ({"rule": "lion"}, ValueError, "rule: expected one of"),
        ({"options": {"amsgrad": True}}, ValueError, "amsgrad=True is not supported"),
        ({"options": {"learning_rate": 1}}, ValueError, "some of lr.*found 'learning_rate'"),
        ({"x": [[0.0] * 5] * 5}, TypeError, "x: expected a tensor, found list"),
        ({"x": torch.zeros(5, 4)}, ValueError, r"x: expected shape \(n, L\) = \(5, 5\)"),
        ({"x": torch.zeros(5, 5, dtype=torch.float64)}, TypeError, "x: expected torch.float32"),
        ({"x": torch.zeros(5, 5).T}, ValueError, "x: expected a contiguous tensor"),
        (
            {"state": {"step": 1, "exp_avg": torch.zeros(2, 2), "exp_avg_sq": torch.zeros(5, 5)}},
            ValueError,
            "exp_avg: expected shape",
        ),
        ({"grads": [torch.zeros(3)]}, ValueError, "grads: expected 9 tensors, found 1"),
    ],
)
def test_bad_input(change, error, message, basis_of):
    given = {
        "grads": tensors(SHAPES),
        "x": torch.zeros(5, 5),
        "out": [torch.empty(s) for s in SHAPES],
        "rule": "adamw",
        "options": {},
        "state": {},
    }
    with pytest.raises(error, match=message):
        tk.step(basis_of(5, 4), **(given | change))


def test_shared_outputs_are_refused(basis_of):
    out = [torch.empty(s) for s in SHAPES]
    out[8] = out[6][:3300]
    with pytest.raises(ValueError, match=r"out\[6\] and out\[8\] share memory"):
        tk.step(
            basis_of(5, 4),
            tensors(SHAPES),
            torch.zeros(5, 5),
            out,
            rule="sgd",
            options={},
            state={},
        )


# In the trainer -----------------------------------------------------------------------------------


@pytest.fixture
def candidates(tmp_path):
    for k in range(5):
        torch.manual_seed(k)
        save_file(network().state_dict(), tmp_path / f"c{k}.safetensors")
    return twa.Candidates(tmp_path / "c*.safetensors")


def network():
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 1))


def train(candidates, rule, steps=12, fused=True, options=None, **kwargs):
    torch.manual_seed(0)
    x, y = torch.randn(64, 6), torch.randn(64, 1)
    model = network()
    subspace = twa.Subspace.from_candidates(model, candidates, bits=4, **kwargs)
    if not fused:
        subspace.can_fuse = lambda: False
    optimizer = twa.SubspaceOptimizer(subspace, rule, **(options or {"lr": 0.02}))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    for _ in range(steps):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        schedule.step()
        gradient = subspace.coefficients.grad.clone()
        optimizer.zero_grad()
    return subspace, optimizer, gradient


@pytest.mark.parametrize("granularity", ["model", "tensor"])
@pytest.mark.parametrize(
    ("rule", "options"),
    [(torch.optim.SGD, {"lr": 0.5, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.02})],
)
def test_trainer_takes_the_fused_step(candidates, rule, options, granularity):
    fused, optimizer, gradient = train(candidates, rule, options=options, granularity=granularity)
    plain, other, expected = train(
        candidates, rule, fused=False, options=options, granularity=granularity
    )
    assert optimizer._fused_rule() and not other._fused_rule()
    torch.testing.assert_close(fused.coefficients, plain.coefficients, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
    assert set(optimizer.state_dict()["state"][0]) == set(other.state_dict()["state"][0])


def test_state_moves_between_fused_and_plain(candidates):
    fused, optimizer, _ = train(candidates, torch.optim.AdamW)
    plain, other, _ = train(candidates, torch.optim.AdamW, steps=3, fused=False)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    for subspace, o in ((fused, optimizer), (plain, other)):
        for p in subspace.parameters:
            p.grad = torch.ones_like(p)
        o.step()
        assert int(o.state[subspace.coefficients]["step"]) == 13
    torch.testing.assert_close(fused.coefficients, plain.coefficients, rtol=1e-5, atol=1e-7)


def test_what_is_not_fused(candidates):
    assert train(candidates, torch.optim.Adam)[1]._fused_rule() is None
    assert (
        train(candidates, torch.optim.AdamW, options={"lr": 0.02, "amsgrad": True})[1]._fused_rule()
        is None
    )
    _, optimizer, _ = train(candidates, torch.optim.AdamW)
    handle = register_optimizer_step_pre_hook(lambda *_: None)
    assert optimizer._fused_rule() is None
    handle.remove()
    assert optimizer._fused_rule()
    optimizer.inner.register_step_pre_hook(lambda *_: None)
    assert optimizer._fused_rule() is None


def test_plain_sgd_keeps_no_state(candidates):
    assert not train(candidates, torch.optim.SGD, options={"lr": 0.1})[1].state


@pytest.mark.parametrize(("rule", "options"), RULES)
def test_gpu_equals_the_separate_calls(rule, options, gpu):
    gpu.needs("step")
    basis = gpu.put(tk.pack(rows_of(5, STEP_SHAPES), 4, segments=[0, 1, 0]))
    center = gpu.put(tensors(STEP_SHAPES, 11))
    x, state = torch.zeros(5, 2, device=gpu.device), {}
    out = [torch.full(s, torch.nan, device=gpu.device) for s in STEP_SHAPES]
    theirs = nn.Parameter(x.clone())
    optimizer = TORCH[rule]([theirs], **options)
    for k in range(3):
        grads = gpu.put(tensors(STEP_SHAPES, 20 + k))
        c = tk.step(
            basis,
            grads,
            x,
            out,
            center,
            rule=rule,
            options=options,
            state=state,
            backend=gpu.backend,
        )
        theirs.grad = tk.project(basis, grads, gpu.backend)
        assert torch.equal(c, theirs.grad)
        optimizer.step()
        torch.testing.assert_close(x, theirs.detach(), rtol=1e-5, atol=1e-6)
        assert all(
            torch.equal(o, t)
            for o, t in zip(out, tk.reconstruct(basis, x, center, backend=gpu.backend), strict=True)
        )


STEP_SHAPES = [(200,), (129,), (3, 7)]
