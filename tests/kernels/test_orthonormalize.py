"""orthonormalize: the passes, the basis, and everything that can be wrong with W.

Every backend's pass against the reference, the basis against float64 Gram-Schmidt.
"""

import sys
import textwrap
import warnings
from pathlib import Path

import processes
import pytest
import torch
from conftest import exhaustive, has_isa, rows_of, run_python, tensors

import twa_kernels as tk
from twa_kernels import native, registry
from twa_kernels.layout import FLOATS
from twa_kernels.orthonormalize.gram_schmidt import (
    choose_parents,
    probes,
    rounded_inverse,
    row_cholesky,
    schatten4,
)

#: where a child process finds this file, and conftest.py
PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

F64 = torch.float64
SHAPES = [(1,), (127,), (0,), (9, 126), (2049,), (), (33, 100)]
BACKENDS = [b for b in ("cpp", "reference") if registry.why_unusable(b) is None]
#: loss of orthogonality at most: what "high" promises, and float32's rounding of unit rows; what
#: "fast" promises by an estimate, which may be half of it
LOSS = {"high": 1e-7 + 2 * 2.0**-24, "fast": 2 * 3e-7}


def trajectory(n, columns, seed=0, step=1e-3, dtype=torch.float32):
    """A random walk with momentum around weights of size 0.05: neighbours are nearly collinear."""
    g = torch.Generator().manual_seed(seed)
    w, v, rows = torch.randn(columns, generator=g) * 0.05, torch.zeros(columns), []
    size = 0.05 * step * torch.rand(columns, generator=g)
    for _ in range(n):
        v = 0.9 * v + size * torch.randn(columns, generator=g)
        w = w + v
        rows.append(w.clone())
    return torch.stack(rows).to(dtype)


def conditioned(n, columns, condition, seed=0):
    """Rows with singular values from 1 down to 1 / condition."""
    g = torch.Generator().manual_seed(seed)
    v = torch.linalg.qr(torch.randn(columns, n, generator=g, dtype=F64))[0].T
    u = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=F64))[0]
    return (
        u * torch.logspace(0, -torch.log10(torch.tensor(float(condition))).item(), n, dtype=F64) @ v
    ).float()


def exact(W):
    """Gram-Schmidt in float64: twice Householder's QR on differences, signs made positive."""
    d = W.double().clone()
    d[1:] -= W[:-1].double()
    for _ in range(2):
        q, r = torch.linalg.qr(d.T)
        d = (q * r.diagonal().sign()).T
    return d


def loss(Q):
    Q = Q.double().reshape(len(Q), -1)
    return (
        float(torch.linalg.matrix_norm(Q @ Q.T - torch.eye(len(Q), dtype=F64), 2))
        if len(Q)
        else 0.0
    )


def apart(n, condition):
    """How far a unit row in float32 may be from `exact`: rounded, and n rows of this condition by
    another float64 factorisation, whose backward error of n units the condition multiplies.

    Source: Higham (see bounds.py), theorem 19.4 and section 19.9.
    """
    return 2.0**-24 + 8 * n * 2.0**-53 * condition


def check(o, W, tolerance=LOSS["high"], center=None):
    """Everything that a result promises."""
    flat = W.double().reshape(len(W), -1)
    Q = o.Q.double().reshape(o.rank, -1)
    assert loss(Q) <= tolerance, loss(Q)
    assert o.report.certificate >= 0.5 * loss(Q) - 1e-8
    shifted = flat if center is None else flat - center.double().reshape(-1)
    error = (o.R @ Q - shifted).norm(dim=1) / flat.norm(dim=1).clamp(min=1e-300)
    assert error.max() <= 1e-6, error
    assert o.R.shape == (len(W), o.rank) and len(o.kept) == o.rank
    for j, i in enumerate(
        o.kept
    ):  # lower triangular in the order of the rows, positive on the diagonal
        assert o.R[i, j] > 0 and not o.R[:i, j].any()
    assert sorted([*o.kept, *(i for i, _ in o.dropped)]) == list(range(len(W)))


# The pass -----------------------------------------------------------------------------------------


def operands(n, r, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    parent = torch.tensor(
        [-1] + [int(torch.randint(-1, i, (), generator=g)) for i in range(1, n)], dtype=torch.int32
    )
    transform = torch.randn(r, n, generator=g, dtype=F64).tril()
    rows = [t[i] for t in rows_of(n, SHAPES, seed, dtype) for i in range(n)]
    return rows, tensors(SHAPES, seed + 7, dtype), parent, transform


def run(backend, rows, center, parent, transform, form, fast, dtype=torch.float32, first=0):
    numels = [t.numel() for t in center]
    r = len(transform)
    out = (
        [torch.full((m,), 7.0, dtype=dtype, device=parent.device) for m in numels for _ in range(r)]
        if form == "write"
        else []
    )
    given = (None if form == "gram" else transform, probes(r).to(parent.device) if out else None)
    gram, norms = torch.ops.twa_kernels.orthonormalize_pass(
        rows, center, numels, parent, *given, first, fast, out, backend
    )
    return gram.cpu(), norms.cpu(), [o.cpu() for o in out]


@pytest.mark.parametrize("form", ["gram", "again", "write"])
@pytest.mark.parametrize("n, r", [(1, 1), (5, 3), (13, 13), (70, 66)])
@pytest.mark.parametrize("fast", [False, True])
def test_pass_matches_the_reference(n, r, form, fast):
    rows, center, parent, transform = operands(n, r)
    compare(
        run("reference", rows, center, parent, transform, form, fast),
        run("cpp", rows, center, parent, transform, form, fast),
        fast,
        form,
    )


def compare(expected, found, fast, form):
    for k, (e, f) in enumerate(zip(expected[:2], found[:2], strict=True)):
        scale = e.abs().max()
        # The certificate is float32 sums.
        tolerance = 3e-6 if fast or (form == "write" and not k) else 1e-12
        assert ((e - f).abs() <= tolerance * scale).all(), ((e - f).abs().max() / scale, form, k)
    for e, f in zip(expected[2], found[2], strict=True):
        bound = (
            (3e-6 if fast else 6e-8) if e.dtype == torch.float32 else 2 * torch.finfo(e.dtype).eps
        )
        assert e.numel() == 0 or ((e - f).abs() <= bound * e.abs().max().clamp(min=1)).all()


@pytest.mark.parametrize("form", ["gram", "again", "write"])
@pytest.mark.parametrize("n, r", [(1, 1), (5, 3), (20, 17)])
@pytest.mark.parametrize("fast", [False, True])
def test_pass_on_gpus(gpu, n, r, form, fast):
    gpu.needs("orthonormalize_pass")
    rows, center, parent, transform = operands(n, r)
    expected = run("reference", rows, center, parent, transform, form, fast, first=min(1, r))
    found = run(
        gpu.backend,
        *(gpu.put(v) for v in (rows, center, parent, transform)),
        form,
        fast,
        first=min(1, r),
    )
    compare(expected, found, fast, form)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pass_reads_and_writes_every_dtype(backend, dtype):
    rows, center, parent, transform = operands(6, 4, dtype=dtype)
    expected = run(
        "reference",
        [r.float() for r in rows],
        [c.float() for c in center],
        parent,
        transform,
        "write",
        False,
    )
    found = run(backend, rows, center, parent, transform, "write", False, dtype)
    for e, f in zip(expected[2], found[2], strict=True):
        assert torch.equal(e.to(dtype), f)


@pytest.mark.parametrize("dtype", FLOATS)
def test_pass_on_gpus_every_dtype(gpu, dtype):
    gpu.needs("orthonormalize_pass")
    rows, center, parent, transform = operands(6, 4, dtype=dtype)
    expected = run("reference", rows, center, parent, transform, "write", False, dtype)
    found = run(
        gpu.backend, *(gpu.put(v) for v in (rows, center, parent, transform)), "write", False, dtype
    )
    for e, f in zip(expected[2], found[2], strict=True):
        assert torch.equal(e, f)


@pytest.mark.parametrize("form", ["gram", "again", "write"])
@pytest.mark.parametrize(
    "n, r, first",
    [(2, 1, 0), (64, 60, 7), (65, 1, 0), (70, 66, 9), (130, 130, 0), exhaustive(130, 70, 70)],
)
@pytest.mark.parametrize("fast", [False, True])
def test_pass_on_gpus_sizes(gpu, n, r, first, form, fast):
    """Row counts around the blocks of rows.

    Tensors of one column, at odd addresses, of several dtypes; in place.
    """
    gpu.needs("orthonormalize_pass")
    numels, dtypes = (1, 0, 130), (torch.bfloat16, torch.float32, torch.float32)
    g = torch.Generator().manual_seed(n)
    parent = torch.tensor(
        [-1] + [int(torch.randint(-1, i, (), generator=g)) for i in range(1, n)], dtype=torch.int32
    )
    transform = torch.randn(r, n, generator=g, dtype=F64).tril(n - r)
    memory = [
        torch.randn(n * m + 1, generator=g).to(dtype)
        for m, dtype in zip(numels, dtypes, strict=True)
    ]
    probe = probes(r) if form == "write" else None

    def go(backend, put):
        held = [put(t.clone()) for t in memory]
        rows = [t[1 + i * m :][:m] for t, m in zip(held, numels, strict=True) for i in range(n)]
        out = [row for k in range(3) for row in rows[k * n : k * n + r]] if form == "write" else []
        given = (
            put(parent),
            None if form == "gram" else put(transform),
            None if probe is None else put(probe),
        )
        gram, norms = torch.ops.twa_kernels.orthonormalize_pass(
            rows, [], list(numels), *given, first, fast, out, backend
        )
        return gram.cpu(), norms.cpu(), [t.cpu() for t in held]

    expected, found = go("reference", lambda t: t), go(gpu.backend, gpu.put)
    compare(expected, found, fast, form)
    if form != "write":
        assert all(torch.equal(f, m) for f, m in zip(found[2], memory, strict=True))


def test_pass_on_gpus_mixed_dtypes(gpu):
    """Rows of one tensor, the center, and the tensors of a model: each in its own dtype."""
    gpu.needs("orthonormalize_pass")
    rows, center, parent, transform = operands(5, 4)
    rows = [row.to(FLOATS[(k // 5 + k % 5 // 3) % 3]) for k, row in enumerate(rows)]
    center = [c.to(FLOATS[k % 2]) for k, c in enumerate(center)]
    for form in ("gram", "write"):
        expected = run("reference", rows, center, parent, transform, form, False)
        found = run(
            gpu.backend, *(gpu.put(v) for v in (rows, center, parent, transform)), form, False
        )
        compare(expected, found, False, form)


def test_pass_on_gpus_gives_the_same_bits_again(gpu):
    gpu.needs("orthonormalize_pass")
    given = [gpu.put(v) for v in operands(5, 3)]
    for form in ("gram", "write"):
        a, b = (run(gpu.backend, *given, form, True) for _ in range(2))
        assert (
            torch.equal(a[0], b[0])
            and torch.equal(a[1], b[1])
            and all(torch.equal(x, y) for x, y in zip(a[2], b[2], strict=True))
        )


def test_squares_on_gpus_are_not_biased(gpu):
    gpu.needs("orthonormalize_pass")
    W = trajectory(4, 20_000, step=1e-3)
    parent = torch.tensor([-1, 0, 1, 2], dtype=torch.int32)
    given = (list(gpu.put(W)), [], [W.shape[1]], gpu.put(parent))
    short, norms = torch.ops.twa_kernels.orthonormalize_pass(
        *given, None, None, 0, True, [], gpu.backend
    )
    d = W.clone()
    d[1:] -= W[:-1]
    assert torch.allclose(short.diagonal().cpu(), d.double().square().sum(1), rtol=1e-12)
    assert torch.allclose(norms.cpu(), W.double().square().sum(1), rtol=1e-12)


@pytest.mark.parametrize(
    ("n", "accuracy"), [(12, "high"), (12, "fast"), (66, "high"), exhaustive(66, "fast")]
)
def test_basis_on_gpus(gpu, n, accuracy):
    gpu.needs("orthonormalize_pass")
    W = trajectory(n, 3001)
    W[4] = W[2]
    V = gpu.put(W.clone())
    o = tk.orthonormalize(V, out=V, accuracy=accuracy, backend=gpu.backend)
    expected = tk.orthonormalize(W, accuracy=accuracy)
    assert (
        o.kept == expected.kept
        and [i for i, _ in o.dropped] == [4]
        and o.Q.data_ptr() == V.data_ptr()
    )
    assert loss(o.Q.cpu()) <= LOSS[accuracy]
    assert (o.Q.cpu() - expected.Q).norm(dim=1).max() <= (1e-7 if accuracy == "high" else 2e-6)


def test_rows_below_first_are_left_alone():
    rows, center, parent, transform = operands(6, 5)
    _, _, out = run("cpp", rows, center, parent, transform, "write", False, first=2)
    _, _, every = run("cpp", rows, center, parent, transform, "write", False)
    for k, (o, e) in enumerate(zip(out, every, strict=True)):
        assert torch.equal(o, e) if k % 5 >= 2 else bool((o == 7.0).all())


@pytest.fixture(autouse=True)
def _float32_sums_at_every_size(request, monkeypatch):
    """Else accuracy="fast" would not be what is tested at the sizes of these tests."""
    monkeypatch.setattr(sys.modules["twa_kernels.orthonormalize.job"], "FEWEST_FAST", 0)


@pytest.mark.parametrize("accuracy", ["high", "fast"])
def test_same_bits_for_any_number_of_threads(accuracy):
    W = trajectory(12, 70_001)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8, 2, 1):
            torch.set_num_threads(threads)
            results.append(tk.orthonormalize(W, accuracy=accuracy))
    finally:
        torch.set_num_threads(before)
    for o in results[1:]:
        assert (
            torch.equal(o.Q, results[0].Q)
            and torch.equal(o.R, results[0].R)
            and o.report.certificate == results[0].report.certificate
        )


@pytest.mark.parametrize("isa", [i for i in ("portable", "avx2", "avx512") if has_isa(i)])
def test_every_instruction_set(isa):
    code = """
    import torch, twa_kernels.native, test_orthonormalize as t
    assert twa_kernels.native._C.cpu_isa() == "{isa}"
    for n, r in ((1, 1), (13, 9), (70, 66)):
        for form in ("gram", "again", "write"):
            for fast in (False, True):
                args = t.operands(n, r)
                expected, found = (t.run(b, *args, form, fast) for b in ("reference", "cpp"))
                t.compare(expected, found, fast, form)
    W = t.trajectory(20, 30_000)
    for accuracy in ("high", "fast"):
        o = t.tk.orthonormalize(W, accuracy=accuracy)
        bound = t.apart(20, o.report.condition_before) if accuracy == "high" else 1e-6
        t.check(o, W, t.LOSS[accuracy])
        assert (o.Q.double() - t.exact(W)).norm(dim=1).max() < bound
    """
    run_python(
        f"import sys; sys.path[:0] = {PATHS!r}\n" + textwrap.dedent(code).replace("{isa}", isa),
        TWA_KERNELS_ISA=isa,
    )


def test_the_bound_counts_multiply_adds():
    """What bench/orthonormalize.py measures against: twice the lanes in float32."""
    fast, high = (native._C.multiply_adds(10, fast, 3) for fast in (True, False))
    assert fast == 2 * high > 0 and native._C.multiply_adds(20, True, 3) == 2 * fast


# The basis ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accuracy", ["high", "fast"])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5, 1e7])
def test_any_condition(condition, accuracy):
    W = conditioned(24, 50_000, condition)
    o = tk.orthonormalize(W, accuracy=accuracy)
    check(o, W, LOSS[accuracy])
    if accuracy == "high":
        assert (o.Q.double() - exact(W)).norm(dim=1).max() <= apart(24, condition)
    assert condition / 30 <= o.report.condition_before <= condition * 2


@pytest.mark.parametrize("change", ["plain", "shuffled", "minus mean", "bfloat16", "ema"])
@pytest.mark.parametrize("n", [16, 64])
def test_trajectories(n, change):
    W = trajectory(n, 20_000)
    if change == "shuffled":
        W = W[torch.randperm(n, generator=torch.Generator().manual_seed(1))]
    elif change == "minus mean":
        W = W - W.mean(0)
    elif change == "bfloat16":
        W = W.bfloat16()
    elif change == "ema":
        for i in range(1, n):
            W[i] = 0.9 * W[i - 1] + 0.1 * W[i]
    high, fast = tk.orthonormalize(W), tk.orthonormalize(W, accuracy="fast")
    check(high, W)
    check(fast, W, LOSS["fast"])
    if change == "plain":
        assert high.report.reads == 2 and high.rank == n
        assert high.report.condition_after < 0.01 * high.report.condition_before
        most = apart(n, high.report.condition_before)
        assert (high.Q.double() - exact(W)).norm(dim=1).max() <= most
        assert (fast.Q.double() - exact(W)).norm(dim=1).max() <= 1e-6


@pytest.mark.parametrize("accuracy", ["high", "fast"])
def test_dependent_rows_are_named(accuracy):
    W = trajectory(20, 5_000)
    W[3] = W[1]  # a duplicate
    W[7] = 0  # a zero row
    W[9] = 0.5 * W[2] + 0.5 * W[4]  # a combination, rounded
    W[12] = 2 * W[11]  # exact
    W[15] = W[0] - W[5] + W[8]
    o = tk.orthonormalize(W, accuracy=accuracy)
    check(o, W, LOSS["fast"])
    assert [i for i, _ in o.dropped] == [3, 7, 9, 12, 15]
    assert all(distance <= 4 * 2.0**-24 for _, distance in o.dropped)
    assert dict(o.dropped)[3] == dict(o.dropped)[7] == 0.0 and dict(o.dropped)[9] > 0
    assert all(o.report.distances[i] > 4 * 2.0**-24 for i in o.kept)


def test_a_row_just_outside_the_span_is_kept_and_one_just_inside_is_not():
    W = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0))
    e = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    for share, dropped in ((40, False), (0.5, True)):
        V = W.clone()
        V[3] = W[0] + W[1] + share * 4 * 2.0**-24 * e * 1.5
        assert ([i for i, _ in tk.orthonormalize(V).dropped] == [3]) is dropped


def test_a_near_dependence_that_only_a_second_look_can_judge():
    """Rows 0 and 1 differ by 1e-6.

    What is left of row 2 hangs on that difference, with coefficients of a million.
    """
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 50_000, generator=g)
    W = torch.stack(
        [
            torch.randn(50_000, generator=g),
            a,
            a + 1e-5 * b,
            b + 1e-3 * torch.randn(50_000, generator=g),
        ]
    )
    o = tk.orthonormalize(W[[1, 0, 2, 3]])
    check(o, W[[1, 0, 2, 3]])
    assert o.rank == 4


@pytest.mark.parametrize("accuracy", ["high", "fast"])
@pytest.mark.parametrize("seed", range(12))
def test_degenerate_sizes(accuracy, seed):
    """More rows than columns, and low rank.

    What is left of most rows is nothing but rounding errors, however often one looks.
    """
    torch.manual_seed(seed)
    low = torch.randn(12, 3) @ torch.randn(3, 40)
    for W, rank in (
        (torch.randn(20, 5), 5),
        (torch.randn(1, 1), 1),
        (torch.ones(3, 1), 1),
        (torch.randn(5, 5), 5),
        (low, None),
    ):
        o = tk.orthonormalize(W, accuracy=accuracy)
        check(o, W, 1e-6)
        assert o.rank == (rank or o.rank)
    o = tk.orthonormalize(torch.zeros(3, 50), accuracy=accuracy)
    assert o.rank == 0 and o.Q.shape == (0, 50) and len(o.dropped) == 3 and o.R.shape == (3, 0)


@pytest.mark.parametrize("accuracy", ["high", "fast"])
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_tiny_and_huge_numbers(scale, accuracy):
    W = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)) * scale
    o = tk.orthonormalize(W, accuracy=accuracy)
    check(o, W, LOSS["fast"])
    assert o.rank == 5


def test_center():
    W, c = trajectory(8, 3000), trajectory(9, 3000)[8]
    o = tk.orthonormalize(W, center=c)
    check(o, W, center=c)
    assert torch.allclose(o.transform @ (W.double() - c.double()), o.Q.double(), atol=1e-6)


def test_squares_of_differences_are_not_biased():
    """Float32 sums of squares of float32 differences are too large by 2e-8: all on a coarse grid.

    In float64 they are not.
    """
    W = trajectory(4, 200_000, step=1e-3)
    parent = torch.tensor([-1, 0, 1, 2], dtype=torch.int32)
    short, _ = torch.ops.twa_kernels.orthonormalize_pass(
        list(W), [], [W.shape[1]], parent, None, None, 0, True, [], "cpp"
    )
    d = W.clone()
    d[1:] -= W[:-1]
    assert torch.allclose(short.diagonal(), d.double().square().sum(1), rtol=1e-12)


# Forms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_lists_of_tensors(dtype):
    rows = rows_of(7, SHAPES, 3, torch.float32)
    center = tensors(SHAPES, 11)
    o = tk.orthonormalize(rows, center=center, dtype=dtype)
    flat = torch.cat([r.reshape(7, -1) for r in rows], 1)
    joined = torch.cat([q.reshape(7, -1) for q in o.Q], 1)
    whole = tk.orthonormalize(flat, center=torch.cat([c.reshape(-1) for c in center]))
    assert [q.shape for q in o.Q] == [r.shape for r in rows] and all(q.dtype == dtype for q in o.Q)
    assert torch.allclose(joined.float(), whole.Q, atol=2 * torch.finfo(dtype).eps)
    separate = tk.orthonormalize([list(r.unbind(0)) for r in rows], center=center, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(o.Q, separate.Q, strict=True))


def test_rows_of_mixed_dtypes():
    W = trajectory(4, 1000)
    rows = [[W[0], W[1].bfloat16(), W[2].half(), W[3]]]
    o = tk.orthonormalize(rows)
    whole = tk.orthonormalize(torch.stack([r.float() for r in rows[0]]))
    assert torch.equal(o.Q[0], whole.Q)


def test_views_that_are_not_contiguous():
    base = torch.randn(700, 9)
    o = tk.orthonormalize(base.T)
    assert torch.equal(o.Q, tk.orthonormalize(base.T.contiguous()).Q)
    assert torch.equal(
        tk.orthonormalize(base[:, ::2].T).Q, tk.orthonormalize(base[:, ::2].T.contiguous()).Q
    )


@pytest.mark.parametrize("accuracy", ["high", "fast"])
def test_in_place(accuracy):
    W = trajectory(10, 3001)
    W[4] = W[2]
    expected = tk.orthonormalize(W, accuracy=accuracy)
    V = W.clone()
    o = tk.orthonormalize(V, out=V, accuracy=accuracy)
    assert o.Q.data_ptr() == V.data_ptr() and o.rank == 9
    check(o, W, LOSS["fast"])
    assert torch.equal(o.Q, expected.Q)


def test_in_place_when_the_certificate_fails(monkeypatch):
    """W is gone by then: the second try works on Q, and R is the product of both."""
    module = sys.modules["twa_kernels.orthonormalize.job"]
    monkeypatch.setitem(module.PREDICTED, "fast", 1.0)
    W = conditioned(10, 5000, 1e3)
    for target in ("new", "in place"):
        V = W.clone()
        o = tk.orthonormalize(V, out=V if target == "in place" else None, accuracy="fast")
        check(o, W, LOSS["fast"])
        assert o.report.reads >= 4
        assert torch.allclose(o.transform @ W.double(), o.Q.double(), atol=1e-5)


def test_out():
    W = trajectory(5, 600)
    out = torch.full((8, 600), 3.0)
    o = tk.orthonormalize(W, out=out)
    assert o.Q.data_ptr() == out.data_ptr() and o.Q.shape == (5, 600) and bool((out[5:] == 3).all())
    half = torch.empty(5, 600, dtype=torch.bfloat16)
    assert tk.orthonormalize(W, out=half).Q.dtype == torch.bfloat16
    for bad, message in (
        (torch.empty(5, 601), "expected shape"),
        (torch.empty(4, 600), "room for 5 rows"),
        (torch.empty(5, 600, dtype=F64), "dtype"),
        ([out, out], "expected 1 tensors"),
        (W[1:].flatten()[: 5 * 400].view(5, 400), "expected shape"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            tk.orthonormalize(W, out=bad)
    big = torch.zeros(6, 600)
    big[:5] = W
    with pytest.raises(ValueError, match="shares memory"):
        tk.orthonormalize(
            big.flatten()[: 5 * 600].view(5, 600), out=big.flatten()[7 : 7 + 3000].view(5, 600)
        )
    with pytest.raises(ValueError, match="only form='explicit'"):
        tk.orthonormalize(W, out=out, form="implicit")


@pytest.mark.parametrize("accuracy", ["high", "fast"])
def test_implicit(accuracy):
    rows, g = rows_of(6, SHAPES, 5), tensors(SHAPES, 6)
    explicit, implicit = (
        tk.orthonormalize(rows, accuracy=accuracy),
        tk.orthonormalize(rows, form="implicit", accuracy=accuracy),
    )
    assert (
        implicit.Q is None
        and implicit.report.certificate is None
        and implicit.report.reads == explicit.report.reads - 1
    )
    assert all(torch.equal(a, b) for a, b in zip(implicit.apply(rows), explicit.Q, strict=True))
    # Some columns alone, and a gradient's projection through the transform.
    part = rows[4][:, 100:400]
    assert torch.equal(implicit.apply(part), explicit.Q[4][:, 100:400])
    c = sum(
        r.reshape(6, -1).double() @ v.reshape(-1).double() for r, v in zip(rows, g, strict=True)
    )
    on_q = sum(
        q.reshape(6, -1).double() @ v.reshape(-1).double()
        for q, v in zip(explicit.Q, g, strict=True)
    )
    assert torch.allclose(implicit.transform @ c, on_q, atol=1e-5)


# Streams ------------------------------------------------------------------------------------------


class Stream:
    def __init__(self, blocks):
        self.blocks, self.reads, self.touched = blocks, 0, 0

    def __iter__(self):
        self.reads += 1
        for b in self.blocks:
            self.touched += b[0].numel()
            yield b


def test_streams_give_the_same_basis():
    blocks = [trajectory(8, m, seed) for seed, m in enumerate((500, 1, 3000, 129))]
    stream = Stream(blocks)
    o = tk.orthonormalize(stream)
    whole = tk.orthonormalize(torch.cat(blocks, 1))
    assert torch.allclose(torch.cat(o.Q, 1), whole.Q, atol=1e-7) and o.kept == whole.kept
    columns = sum(b.shape[1] for b in blocks)
    assert o.report.reads == 2 and stream.touched <= 3 * columns  # the sample, the Gram matrix, Q
    written = {}
    o = tk.orthonormalize(lambda: iter(blocks), out=lambda k, q: written.__setitem__(k, q.clone()))
    assert o.Q is None and torch.equal(
        torch.cat([written[k] for k in range(4)], 1), torch.cat(tk.orthonormalize(stream).Q, 1)
    )
    center = [b.mean(0) for b in blocks]
    o = tk.orthonormalize(stream, center=center)
    assert torch.allclose(
        torch.cat(o.Q, 1),
        tk.orthonormalize(torch.cat(blocks, 1), center=torch.cat(center)).Q,
        atol=1e-6,
    )


def test_streams_that_are_wrong():
    blocks = [trajectory(4, 300), trajectory(4, 500, 1)]
    with pytest.raises(TypeError, match="read once"):
        tk.orthonormalize(iter(blocks))
    with pytest.raises(TypeError, match="expected a tensor"):
        tk.orthonormalize(3)
    with pytest.raises(tk.StreamError, match="block 1: expected 4 rows"):
        tk.orthonormalize(Stream([blocks[0], blocks[1][:3]]))
    with pytest.raises(ValueError, match="row 2: expected shape"):
        tk.orthonormalize(Stream([[blocks[0][0], blocks[0][1], blocks[0][2, :7]]]))
    with pytest.raises(ValueError, match="found none"):
        tk.orthonormalize(Stream([]))
    with pytest.raises(ValueError, match="at least one column"):
        tk.orthonormalize(Stream([torch.empty(3, 0)]))

    def changing(change):
        """The third iteration (sample, Gram matrix, Q) gives something else."""
        calls = []

        def blocks_of():
            calls.append(None)
            yield from change([b.clone() for b in blocks]) if len(calls) == 3 else blocks

        return blocks_of

    def touched(found):
        found[1][2, 17] += 0.1
        return found

    with pytest.raises(tk.StreamError, match="row 2 had squared norm"):
        tk.orthonormalize(changing(touched))
    with pytest.raises(tk.StreamError, match="expected 2 blocks"):
        tk.orthonormalize(changing(lambda found: found[:1]))
    with pytest.raises(tk.StreamError, match="no more blocks"):
        tk.orthonormalize(changing(lambda found: [*found, found[0]]))
    with pytest.raises(tk.StreamError, match=r"block 1: expected \(500,\)"):
        tk.orthonormalize(changing(lambda found: [found[0], found[1][:, :499]]))


def test_bad_input():
    W = torch.randn(3, 50)
    W[1, 7] = torch.nan
    for accuracy in ("high", "fast"):
        with pytest.raises(
            tk.NotFiniteError, match=r"row 1 of tensor 0 at column 7.*\[1\]"
        ) as caught:
            tk.orthonormalize(W, accuracy=accuracy)
        assert (caught.value.row, caught.value.tensor, caught.value.column) == (1, 0, 7)
    W[1, 7], W[2, 3] = 0.0, torch.inf
    with pytest.raises(tk.NotFiniteError, match="row 2"):
        tk.orthonormalize(Stream([torch.ones(3, 4), W]))
    good = torch.randn(3, 50)
    with pytest.raises(ValueError, match="center: NaN or Inf"):
        tk.orthonormalize(good, center=torch.full((50,), torch.nan))
    with pytest.raises(ValueError, match="at least one column"):
        tk.orthonormalize(torch.empty(3, 0))
    with pytest.raises(ValueError, match="at least one row"):
        tk.orthonormalize(torch.empty(0, 3))
    with pytest.raises(ValueError, match="at least one tensor"):
        tk.orthonormalize([])
    with pytest.raises(TypeError, match=r"W\[0\], row 0: expected one of .* found torch.int64"):
        tk.orthonormalize(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="float64"):
        tk.orthonormalize(good.double())
    with pytest.raises(ValueError, match=r"W\[1\]: expected 3 rows"):
        tk.orthonormalize([good, good[:2]])
    with pytest.raises(ValueError, match="center: expected 2 tensors"):
        tk.orthonormalize([good, good], center=[good[0]])
    with pytest.raises(ValueError, match="at most 4096"):
        tk.orthonormalize(torch.ones(4097, 2))
    for option in ({"accuracy": "low"}, {"form": "dense"}, {"tolerance": 2.0}, {"dtype": F64}):
        with pytest.raises((ValueError, TypeError), match="expected"):
            tk.orthonormalize(good, **option)


# Appending ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trajectory", "conditioned"])
def test_appending_leaves_earlier_rows_alone(kind):
    W = trajectory(16, 4000) if kind == "trajectory" else conditioned(16, 4000, 1e5)
    W[4] = W[2]
    W[13] = 0.5 * W[1] + 0.5 * W[12]
    first = tk.orthonormalize(W[:9])
    o = tk.orthonormalize(W, extend=first)
    check(o, W)
    assert o.rank == 14 and [i for i, _ in o.dropped] == [4, 13]
    assert (
        torch.equal(o.Q[:8], first.Q)
        and torch.equal(o.R[:9, :8], first.R)
        and o.report.parents[:9] == first.report.parents
    )
    assert torch.equal(o.transform[:8, :9], first.transform)
    whole = tk.orthonormalize(W)
    assert (o.Q.double() - whole.Q.double()).norm(dim=1).max() < 2e-7
    again = tk.orthonormalize(W, extend=o)  # nothing new
    assert torch.equal(again.Q, o.Q) and torch.equal(again.R, o.R)
    with pytest.raises(ValueError, match="row 0 of W is not the one"):
        tk.orthonormalize(W * 2, extend=first)
    with pytest.raises(ValueError, match="at least the 9 rows"):
        tk.orthonormalize(W[:5], extend=first)


def test_appending_to_an_implicit_basis():
    W = trajectory(12, 3000)
    first = tk.orthonormalize(W[:7], form="implicit")
    o = tk.orthonormalize(W, extend=first, form="implicit")
    assert o.rank == 12 and torch.equal(o.transform[:7, :7], first.transform)
    assert loss(o.apply(W)) < 1e-7
    explicit = tk.orthonormalize(W, extend=first)
    assert loss(explicit.Q) < 1e-7
    out = torch.full((12, 3000), 3.0)
    tk.orthonormalize(W, extend=first, out=out)
    assert torch.equal(out, explicit.Q)


# Small matrices -----------------------------------------------------------------------------------


def test_parents_are_the_nearest_earlier_rows():
    W = torch.tensor(
        [
            [1.0, 0.0, 0.0],
            [1.1, 0.0, 0.0],
            [0.0, 5.0, 0.0],
            [1.1, 0.1, 0.0],
            [1.1, 0.1, 0.0],
            [1.1, 0.1, 0.0],
        ],
        dtype=F64,
    )
    assert choose_parents(W, None) == ([-1, 0, -1, 1, 3, 4], 0)
    assert choose_parents(W, None, first=4, columns=7) == ([3, 4], 7)
    assert choose_parents(W, torch.tensor([[1.1, 0.0, 0.0]], dtype=F64))[0][3] == 1


def test_rounded_inverse_makes_up_for_its_roundings():
    d = trajectory(41, 2000).double().diff(dim=0)
    L = torch.linalg.cholesky(d @ d.T)
    A = rounded_inverse(L, 40, list(range(40)))
    assert torch.equal(A, A.float().double())
    eye = torch.eye(40, dtype=F64)
    plain = torch.linalg.inv(L).float().double()
    assert (A @ L - eye).norm() < 0.8 * (plain @ L - eye).norm()


def test_certificate_is_near_the_norm():
    for r, rank in ((64, 1), (64, 64), (7, 2)):
        g = torch.Generator().manual_seed(r + rank)
        b = torch.randn(r, rank, generator=g, dtype=F64)
        E = b @ b.T if rank < r else (b + b.T)
        estimate, norm = schatten4(E @ probes(r).T), float(torch.linalg.matrix_norm(E, 2))
        assert 0.5 * norm < estimate < 3 * norm


def test_row_cholesky_without_noise_keeps_independent_rows():
    W = torch.randn(6, 50, dtype=F64, generator=torch.Generator().manual_seed(0))
    W[4] = W[0] + W[1]
    A, L, kept, distances, length, doubt, _ = row_cholesky(
        W @ W.T,
        0,
        W.new_zeros(0, 0),
        W.new_zeros(0),
        1e-7 * W.norm(dim=1),
        1e-16,
        torch.full((6,), -1),
    )
    assert (
        kept == [0, 1, 2, 3, 5]
        and not doubt
        and torch.allclose(length, W.norm(dim=1))
        and float(distances[4]) < 1e-6
    )
    Q = A @ W
    assert torch.allclose(Q @ Q.T, torch.eye(5, dtype=F64)) and torch.allclose(L @ Q, W)


# Ranks --------------------------------------------------------------------------------------------

RANKS = """
    import sys, torch, torch.distributed as dist
    sys.path[:0] = {paths}
    import processes
    import twa_kernels as tk
    from test_orthonormalize import trajectory
    file, rank = "file://{file}", int(sys.argv[1])
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=2)
    W = trajectory(12, 5000)
    W[7] = W[3]
    mine = W[:, :1777] if dist.get_rank() == 0 else W[:, 1777:]
    sizes = []
    def reduce(v):
        sizes.append(v.numel())
        dist.all_reduce(v)
    whole = tk.orthonormalize(W)
    for accuracy in ("high", "fast"):
        o = tk.orthonormalize(mine.contiguous(), reduce=reduce, accuracy=accuracy)
        part = whole.Q[:, :1777] if dist.get_rank() == 0 else whole.Q[:, 1777:]
        atol = 1e-6 if accuracy == "fast" else 1e-7
        assert o.kept == whole.kept and torch.allclose(o.Q, part, atol=atol)
        assert torch.allclose(o.R, whole.R, atol=1e-5)
    assert max(sizes) <= 12 * 13 // 2 + 12 + 1, sizes
    mine = mine.clone()
    if dist.get_rank() == 1:
        mine[2, 5] = torch.nan
    try:
        tk.orthonormalize(mine, reduce=reduce)
    except ValueError as error:
        said = "row 2" if dist.get_rank() else "rows [2], in columns of another rank"
        assert said in str(error), error
    else:
        raise AssertionError("NaN went unnoticed")
    processes.leave_job()
"""


def test_ranks_that_hold_different_columns(tmp_path):
    code = textwrap.dedent(RANKS).replace("{file}", str(tmp_path / "store"))
    code = code.replace("{paths}", repr(PATHS))
    ranks = [processes.Child([sys.executable, "-c", code, str(r)]) for r in range(2)]
    for rank in processes.finish(*ranks):
        assert rank.returncode == 0, rank.stderr


def test_a_hopeless_certificate_warns(monkeypatch):
    module = sys.modules["twa_kernels.orthonormalize.job"]
    monkeypatch.setitem(module.LIMITS, "high", 0.0)
    monkeypatch.setattr(module, "UNIT", dict.fromkeys(FLOATS, 0.0))
    with pytest.warns(UserWarning, match="certificate"):
        tk.orthonormalize(torch.randn(3, 100))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.undo()
        tk.orthonormalize(torch.randn(3, 100))


# What a reading by another pair of eyes found -----------------------------------------------------


def residuals(o, W):
    """What R Q misses of each row, in units of the row's norm."""
    W = W.double()
    return (o.R @ o.Q.double() - W).norm(dim=1) / W.norm(dim=1).clamp(min=1e-300)


@pytest.mark.parametrize("seed", range(6))
def test_what_a_second_look_drops_is_not_lost_to_later_rows(seed):
    """Row 2 is nearly a combination of rows 0 and 1 that a first look cannot judge.

    Row 1 is nearly row 0, row 3 lies along what row 2 has outside.
    """
    tolerance = 4 * 2.0**-24
    g = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(1000, generator=g, dtype=F64)

    w0, e = draw(), draw()
    e /= e.norm()
    w1 = (0.7 * w0 + 4 * tolerance * draw()).float().double()
    v = w0.float().double() * 0.5 - 0.8 * w1
    W = torch.stack([w0, w1, v + 0.85 * tolerance * v.norm() * e, draw() + 30 * e]).float()
    o = tk.orthonormalize(W)
    assert loss(o.Q) < 1e-7 and residuals(o, W).max() <= 2 * tolerance, (o.kept, residuals(o, W))


def adversarial(seed):
    """Rows that are other rows, sums or differences of them, 0.03 to 300 tolerances beside them."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=g, dtype=F64)

    def pick(low, high):
        return int(torch.randint(low, high, (), generator=g))

    def power(low, high):
        return 10 ** (low + (high - low) * float(torch.rand((), generator=g)))

    columns, n = pick(200, 3000), pick(4, 24)
    rows = [draw(columns)]
    while len(rows) < n:
        kind, k, e = pick(0, 6), len(rows), draw(columns)
        share = power(-1.5, 2.5) * 4 * 2.0**-24
        if kind == 0:
            w = e * power(-2, 2)
        elif kind == 1:
            w = rows[pick(0, k)] + 30 * e
        else:
            if kind == 2:
                w = rows[-1]
            elif kind == 3:
                w = rows[pick(0, k)] * power(-0.3, 0.2)
            elif kind == 4:
                w = (rows[pick(0, k)] - rows[pick(0, k)]) * power(0, 3) + 1e-3 * rows[-1]
            else:
                w = (draw(k) * 10 ** (3 * torch.rand(k, generator=g, dtype=F64) - 1.5)) @ (
                    torch.stack(rows)
                )
            w = w + share * w.norm() * e / e.norm()
        rows.append(w.float().double())
    return torch.stack(rows).float()


@pytest.mark.parametrize("accuracy", ["high", "fast"])
def test_no_row_of_an_adversarial_heap_is_missed(accuracy):
    """Some heaps are looked at twice again.

    R that two provisional factors make misses up to 80 tolerances of a row then.
    """
    looks = set()
    for seed in range(150):
        W = adversarial(seed)
        o = tk.orthonormalize(W, accuracy=accuracy)
        looks.add(o.report.refined)
        assert residuals(o, W).max() <= 1.1 * 4 * 2.0**-24, (seed, residuals(o, W))
        assert loss(o.Q) <= LOSS[accuracy]
    assert {0, 1, 2} <= looks


def family(n, columns, seed):
    """Rows that are each some way from an earlier one: all of it, one column, little, or nothing.

    Their differences depend on each other exactly.
    """
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randn(columns, generator=g)]
    while len(rows) < n:
        like = rows[int(torch.randint(len(rows), (), generator=g))]
        step, kind = torch.randn(columns, generator=g) * 0.02, float(torch.rand((), generator=g))
        if kind < 0.15:
            step *= 0.0
        elif kind < 0.35:
            step[1:] = 0.0
        elif kind < 0.45:
            step *= 1e-3
        rows.append(like + step)
    return torch.stack(rows)


@pytest.mark.parametrize("form", ["explicit", "implicit"])
@pytest.mark.parametrize("n, columns", [(20, 8), (70, 16), (70, 128)])
def test_rows_that_exactly_depend_on_each_other_are_no_directions(n, columns, form):
    """What rounding leaves of them, scaled up look by look, would spoil all later rows."""
    for seed in (3, 8, 14):
        W = family(n, columns, seed)
        center = W.double().mean(0).float()
        o = tk.orthonormalize(W, center=center, form=form)
        Q = o.Q if form == "explicit" else o.apply([W], center=[center])[0]
        assert loss(Q) <= 1e-7 + 2 * 2.0**-24 and o.report.refined <= 1
        missed = (o.R @ Q.double() - W.double() + center.double()).norm(dim=1)
        assert (missed <= 2 * 4 * 2.0**-24 * W.double().norm(dim=1)).all(), seed


def test_steps_too_small_to_keep_add_up():
    g = torch.Generator().manual_seed(0)
    rows = [torch.randn(20_000, generator=g)]
    for _ in range(60):
        rows.append(rows[-1] + 0.7e-3 * torch.randn(20_000, generator=g))
    W = torch.stack(rows)
    o = tk.orthonormalize(W, tolerance=1e-3)
    assert 1 < o.rank < 61 and residuals(o, W).max() <= 1.01e-3
    assert all(distance <= 1e-3 for _, distance in o.dropped)
    later = tk.orthonormalize(W, tolerance=1e-3, extend=tk.orthonormalize(W[:20], tolerance=1e-3))
    assert residuals(later, W).max() <= 1.01e-3


@pytest.mark.parametrize(
    "dtype, columns", [(torch.bfloat16, 1003), (torch.float16, 100_003), (torch.float32, 1000)]
)
def test_rows_of_equal_numbers_round_alike(dtype, columns):
    """All roundings of Q have one sign: no look at W can mend that, and none is wasted on it."""
    W = torch.ones(1, columns, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tk.orthonormalize(W, dtype=dtype).report.reads == 2
        o = tk.orthonormalize(W, out=W)
    assert o.Q.data_ptr() == W.data_ptr() and loss(o.Q) < 2 * torch.finfo(dtype).eps


def test_extending_into_given_tensors():
    W = trajectory(6, 500)
    dense, implicit = tk.orthonormalize(W[:3]), tk.orthonormalize(W[:3], form="implicit")
    for earlier in (dense, implicit):
        o = tk.orthonormalize(W, extend=earlier, out=torch.full((6, 500), 7.0))
        assert loss(o.Q) < 1e-6 and torch.equal(o.Q[:3], dense.Q)
    with pytest.raises(ValueError, match="not written in place"):
        tk.orthonormalize(W, extend=dense, out=W)
    with pytest.raises(ValueError, match="blocks of shapes"):
        tk.orthonormalize([W[:, :200], W[:, 200:]], extend=dense)


def test_extending_other_rows_or_another_center():
    W, c = trajectory(6, 500), trajectory(7, 500)[6]
    with_center = tk.orthonormalize(W[:3], center=c, form="implicit")
    with pytest.raises(ValueError, match="a center"):
        tk.orthonormalize(W, extend=with_center)
    with pytest.raises(ValueError, match="center: expected the one"):
        with_center.apply(W[:3])
    with pytest.raises(ValueError, match="not those of the earlier"):
        tk.orthonormalize(W, extend=with_center, center=c + 0.1 * W[0])
    unit = torch.nn.functional.normalize(
        torch.randn(4, 500, generator=torch.Generator().manual_seed(0)), dim=1
    )
    with pytest.raises(ValueError, match="not those of the earlier"):
        tk.orthonormalize(unit[[1, 2, 0, 3]], extend=tk.orthonormalize(unit[:3]))


def test_out_that_shares_memory():
    A, B = trajectory(4, 300), trajectory(4, 300, 1)
    for out, message in (
        ([B, A], "shares memory"),
        (
            [torch.empty(1, 300).expand(4, 300), torch.empty(4, 300)],
            "share memory: expected separate",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            tk.orthonormalize([A, B], out=out)
    with pytest.raises(TypeError, match="expected one tensor"):
        tk.orthonormalize([list(A)], out=[list(A)])
    X = A.clone()
    with pytest.raises(ValueError, match="block of the stream"):
        tk.orthonormalize(Stream([X]), out=[X])
    assert torch.equal(X, A)


def test_a_rank_without_columns_takes_part():
    W = trajectory(5, 400)
    sums = []
    tk.orthonormalize(W, reduce=lambda v: sums.append(v.clone()))
    # The same calls on a rank that holds nothing, which receives the sums.
    received = iter(sums)
    o = tk.orthonormalize(torch.empty(5, 0), reduce=lambda v: v.copy_(next(received)))
    assert o.rank == 5 and o.Q.shape == (5, 0) and torch.allclose(o.R, tk.orthonormalize(W).R)
    assert max(map(len, sums)) <= max(5 * 6 // 2 + 6, 7 * 5)


def test_surplus_centers_and_partial_tensors():
    W = trajectory(3, 100)
    with pytest.raises(tk.StreamError, match="more than 1"):
        tk.orthonormalize(Stream([W]), center=Stream([W[0], W[0]]))
    packer = tk.Packer(2, [(300,), (300,)], 4)
    with pytest.raises(ValueError, match="all 300 columns, found 0"):
        packer.end_tensor()
    packer.add_columns(torch.randn(2, 128), 0)
    with pytest.raises(ValueError, match="columns from 128 on"):
        packer.add_columns(torch.randn(2, 128), 0)
    with pytest.raises(ValueError, match="the rest of its columns"):
        packer.add(torch.randn(2, 300))
    packer.add_columns(torch.randn(2, 172), 128)
    packer.end_tensor()
    packer.add(torch.randn(2, 300))
    with pytest.raises(ValueError, match="all 2 tensors"):
        packer.add_columns(torch.randn(2, 128), 0)
    assert packer.finish("none").num_columns == 600
