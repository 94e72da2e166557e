"""orthonormalize_pass in CUDA C++ beyond what every GPU backend is tested for.

Sizes around its tiles and panels, addresses, dtypes, order.
"""

import pytest
import torch
from conftest import ON_GPU, exhaustive, tensors
from test_orthonormalize import compare

from twa_kernels.backends import cuda
from twa_kernels.orthonormalize.gram_schmidt import probes

DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    pytest.mark.skipif(cuda.why_unusable() is not None, reason=str(cuda.why_unusable()))
] + [pytest.mark.gpu] * ON_GPU
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
FORMS = ("gram", "again", "write")


@pytest.fixture(params=["sm_90", "sm_80"])
def instructions(request, monkeypatch):
    """The products of sm_90, and those of before."""
    if ON_GPU and request.param != "sm_90":
        pytest.skip("a GPU has one kind")
    monkeypatch.setenv("TWA_EMULATOR_BULK", "1" if request.param == "sm_90" else "0")


def problem(n, r, numels, seed=0, offset=0, dtypes=(F32,), center=True):
    """Rows that begin `offset` elements into their memory, dtypes in turn.

    And a transform whose rows reach beyond the diagonal.
    """
    g = torch.Generator().manual_seed(seed)
    parent = torch.tensor(
        [-1] + [int(torch.randint(-1, i, (), generator=g)) for i in range(1, n)], dtype=torch.int32
    )
    transform = torch.randn(r, n, generator=g, dtype=F64).tril(n - r)

    def placed(t, k):
        dtype = dtypes[k % len(dtypes)]
        memory = torch.empty(t.numel() + offset, dtype=dtype, device=DEVICE)
        memory[offset:] = t.to(dtype)
        return memory[offset:]

    rows = [
        placed(torch.randn(numel, generator=g), i + k)
        for k, numel in enumerate(numels)
        for i in range(n)
    ]
    centers = (
        [placed(t, k) for k, t in enumerate(tensors([(m,) for m in numels], seed + 1))]
        if center
        else []
    )
    return rows, centers, parent.to(DEVICE), transform.to(DEVICE)


def run(backend, given, numels, form, first=0, out=None, dtype=F32):
    rows, center, parent, transform = given
    r = len(transform)
    if form == "write" and out is None:
        out = [torch.full((m,), 7.0, dtype=dtype, device=DEVICE) for m in numels for _ in range(r)]
    by = (None if form == "gram" else transform, probes(r).to(DEVICE) if form == "write" else None)
    gram, norms = torch.ops.twa_kernels.orthonormalize_pass(
        rows,
        center,
        list(numels),
        parent,
        *by,
        first,
        False,
        out or [],
        "reference" if backend == "reference" else "cuda",
    )
    return gram.cpu(), norms.cpu(), [o.cpu() for o in out or []]


def agree(given, numels, form, first=0, dtype=F32):
    found = run("cuda", given, numels, form, first, dtype=dtype)
    compare(run("reference", given, numels, form, first, dtype=dtype), found, False, form)
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "r"), [(16, 9), (17, 17), (48, 48), (64, 57), (100, 97)])
def test_rows_around_the_tiles(n, r, form, instructions, monkeypatch):
    monkeypatch.setenv("TWA_EMULATOR_SEED", str(n))
    numels = [1, 95, 0, 32, 129]
    agree(problem(n, r, numels), numels, form, first=min(3, r))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("n", "r"),
    [
        (65, 65),
        exhaustive(72, 60),
        (96, 81),
        exhaustive(112, 112),
        (128, 127),
        (129, 129),
        (150, 41),
        exhaustive(200, 200),
        exhaustive(257, 250),
        (300, 20),
    ],
)
def test_more_rows_than_one_warp_holds(n, r, form, monkeypatch):
    """In one block, in pairs of groups, in panels; more chunks than slots."""
    monkeypatch.setenv("TWA_EMULATOR_SEED", str(n))
    numels = [0, 33, 1] if n >= 257 else [40, 0, 1, 157]
    agree(problem(n, r, numels), numels, form, first=5)


@pytest.mark.parametrize("parents", ["before", "first", "none"])
def test_parents_of_other_groups(parents):
    """Whatever a row's parent is, a block of two groups of rows finds it."""
    n, numels = 193, [70]
    given = list(problem(n, n, numels, center=parents != "first"))
    given[2] = (
        {
            "before": torch.arange(-1, n - 1),
            "first": torch.zeros(n).index_fill(0, torch.tensor(0), -1),
            "none": torch.full((n,), -1),
        }[parents]
        .to(torch.int32, copy=True)
        .to(DEVICE)
    )
    agree(given, numels, "gram")


@pytest.mark.parametrize("n", [40, 70, 121, 130])
@pytest.mark.parametrize("form", ["gram", "write"])
def test_nan_stays_where_it_is(n, form):
    """In its row, and the rows that are differences from it; in its column of the result."""
    numels, bad, column = [300], n - 3, 45
    given = problem(n, n, numels)
    given[2][bad + 1 :] = 0
    clean = run("cuda", given, numels, form)
    given[0][bad][column] = torch.nan
    gram, norms, out = run("cuda", given, numels, form)
    assert norms.isnan().nonzero().flatten().tolist() == [bad]
    if form == "gram":
        rows = torch.arange(n) != bad
        assert gram[bad, : bad + 1].isnan().all() and gram[bad:, bad].isnan().all()
        assert torch.equal(gram[rows][:, rows], clean[0][rows][:, rows])
    else:
        columns = torch.arange(numels[0]) != column
        assert all(torch.equal(f[columns], c[columns]) for f, c in zip(out, clean[2], strict=True))
        assert out[bad][column].isnan() and not out[0][column].isnan()


def test_several_panels_of_columns(form="write"):
    """More columns than the workspace holds at once."""
    n, r, numels = 1025, 3, [6000, 2000]
    plan, chunks = cuda.module.orthonormalize_plan, sum(-(-m // 32) for m in numels)
    assert (
        plan(n, r, chunks, True, form == "write")[2]
        == plan(n, r, 10 * chunks, True, form == "write")[2]
    )
    given = problem(n, r, numels)
    given[3][:, 20:1010] = 0.0  # tiles without a number take no time
    agree(given, numels, form)


@pytest.mark.parametrize(("n", "offset"), [(5, 1), (5, 2), (5, 3), (5, 4), (70, 1), (130, 3)])
@pytest.mark.parametrize("center", [True, False])
def test_rows_at_any_address(offset, center, n):
    numels = [97, 33] if n == 5 else [33]
    agree(problem(n, n, numels, offset=offset, center=center), numels, "gram")
    agree(problem(n, n, numels, offset=offset, center=center), numels, "write")


@pytest.mark.parametrize(
    "offset, n", [(0, 9), (1, 9), (4, 9), (1, 66), (4, 80), exhaustive(4, 130)]
)
@pytest.mark.parametrize(
    "dtypes", [(BF16,), exhaustive((F16,)), exhaustive((BF16, F16)), (F32, BF16, F16)]
)
def test_dtypes(dtypes, offset, n):
    """Rows of one dtype, or of several; results in each."""
    numels = [66, 64] if n == 9 else [33]
    given = problem(n, n, numels, offset=offset, dtypes=dtypes)
    for form in ("gram", "again"):
        agree(given, numels, form)
    agree(given, numels, "write", dtype=dtypes[0])


@pytest.mark.parametrize("n", [1, 6, 64, 70, 130])
def test_one_column(n):
    for form in FORMS:
        agree(problem(n, n, [1]), [1], form)


@pytest.mark.parametrize("n", [4, 80, 140])
def test_no_columns(n):
    for form in FORMS:
        gram, norms, _ = run("cuda", problem(n, n, [0, 0]), [0, 0], form)
        assert not gram.any() and not norms.any()


@pytest.mark.parametrize("seed", [1, exhaustive(2), exhaustive(3)])
@pytest.mark.parametrize(
    ("n", "r"), [(7, 5), (64, 60), (72, 70), exhaustive(128, 128), (140, 140), exhaustive(256, 200)]
)
def test_in_place(n, r, seed, monkeypatch):
    """V takes the place of the first rows, whatever runs first."""
    monkeypatch.setenv("TWA_EMULATOR_SEED", str(seed))
    numels = [200, 0, 77]
    given = problem(n, r, numels, seed)
    expected = run("reference", given, numels, "write")
    out = [given[0][k * n + j] for k in range(len(numels)) for j in range(r)]
    compare(expected, run("cuda", given, numels, "write", out=out), False, "write")
    for k in range(len(numels)):
        assert all(torch.equal(given[0][k * n + j], out[k * r + j]) for j in range(r))


@pytest.mark.parametrize("n", [20, 66, exhaustive(130)])
def test_the_same_bits_in_any_order(n, monkeypatch):
    numels = [3000, 5, 700] if n == 20 else [300, 5]
    given = problem(n, n, numels)
    for form in FORMS:
        results = []
        for seed in (1, 2, 3) if n == 20 else (1, 2):
            monkeypatch.setenv("TWA_EMULATOR_SEED", str(seed))
            results.append(run("cuda", given, numels, form))
        for found in results[1:]:
            assert all(
                torch.equal(a, b)
                for a, b in zip(
                    [*found[:2], *found[2]], [*results[0][:2], *results[0][2]], strict=True
                )
            )


def test_workspaces_are_bounded():
    plan = cuda.module.orthonormalize_plan
    for n in (1, 16, 64, 65, 128, 129, 256, 257, 1024, 4096):
        for chunks in (0, 1, 1000, 10**8):
            for transform, write in ((False, False), (True, False), (True, True)):
                parts, stride, space = plan(n, n, chunks, transform, write)
                assert parts * stride * 8 <= 72 << 20 and space * 8 <= 64 << 20, (
                    n,
                    chunks,
                    transform,
                    write,
                )
