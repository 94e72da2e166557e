"""Coordinates against autograd and a float64 merge: what is trained, rows of P, merge weights."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from twa.coordinates import (
    BASES,
    CONSTRAINTS,
    Deltas,
    Differences,
    Orthonormal,
    constrained,
    trained_count,
)

N, D, L = 4, 50, 2
COLUMNS = (slice(0, 20), slice(20, D))  # of the segments
KINDS = [*BASES, *(f"moved {basis}" for basis in BASES)]  # around another center, once or twice


def rows_of(basis):
    """Weights (n, D), a center of them, rows of P (rows, D), and what the rows are."""
    if basis.startswith("moved"):
        w, weights, P, rows = rows_of(basis.split()[1])
        other = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
        return w, other, P, rows.around(weights.flip(0)).around(other)
    g = torch.Generator().manual_seed(0)
    w = torch.randn(N, D, generator=g, dtype=torch.float64)
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    deltas = w - weights @ w
    if basis == "deltas":
        divisor = torch.tensor([[1.0, 2.0], [3.0, 0.5], [1.5, 1.0], [2.0, 4.0]]).double()
        P = torch.cat([deltas[:, at] / divisor[:, l, None] for l, at in enumerate(COLUMNS)], 1)
        return w, weights, P, Deltas(weights, divisor)
    if basis == "differences":
        divisor = torch.tensor([[1.0, 2.0], [3.0, 0.5], [1.5, 1.0]]).double()
        parts = [w[:, at].diff(dim=0) / divisor[:, l, None] for l, at in enumerate(COLUMNS)]
        return w, weights, torch.cat(parts, 1), Differences(weights, divisor)
    rank, scale = N - 1, torch.tensor([2.0, 0.5]).double()  # deltas from a mean depend
    Q = [torch.linalg.qr(deltas[:rank, at].T)[0].T for at in COLUMNS]
    R = torch.stack([deltas[:, at] @ q.T for at, q in zip(COLUMNS, Q, strict=True)])  # (L, n, r)
    transform = torch.zeros(L, rank, N, dtype=torch.float64)
    transform[:, :, :rank] = torch.linalg.inv(R[:, :rank])
    P = torch.cat([q * s for q, s in zip(Q, scale, strict=True)], 1)
    return w, weights, P, Orthonormal(weights, transform, R, scale, ((), ()))


@pytest.fixture(params=[(b, c) for b in KINDS for c in CONSTRAINTS], ids=str)
def case(request):
    basis, constraint = request.param
    w, weights, P, rows = rows_of(basis)
    coordinates = constrained(rows, constraint)
    assert (coordinates.basis, coordinates.constraint, coordinates.rows) == (
        basis.split()[-1],
        constraint,
        rows,
    )
    return w, weights, P, coordinates


def theta_of(P, center, x):
    """center + sum_r x[r, l] P[r, :]"""
    return center + torch.cat([x[:, l] @ P[:, at] for l, at in enumerate(COLUMNS)])


def merged(w, beta):
    return torch.cat([beta[:, l] @ w[:, at] for l, at in enumerate(COLUMNS)])


def trained(coordinates):
    g = torch.Generator().manual_seed(1)
    return torch.randn(coordinates.shape, generator=g, dtype=torch.float64) * 0.3


def test_shape_is_what_files_say(case):
    _, _, P, coordinates = case
    count = trained_count(coordinates.constraint, N, len(P))
    assert coordinates.shape == (count, L) == tuple(coordinates.start().shape)
    assert coordinates.trains_rows == (coordinates.constraint == "none")


def test_merge_weights_make_the_same_weights(case):
    w, weights, P, coordinates = case
    y = trained(coordinates)
    beta = coordinates.merge_weights(y)
    torch.testing.assert_close(beta.sum(0), torch.ones(L).double())
    theta = theta_of(P, weights @ w, coordinates.to_basis(y))
    torch.testing.assert_close(merged(w, beta), theta, rtol=1e-10, atol=1e-10)


def test_merge_weights_there_and_back(case):
    w, weights, P, coordinates = case
    g = torch.Generator().manual_seed(2)
    beta = torch.rand(N, L, generator=g, dtype=torch.float64).add(0.1)
    beta /= beta.sum(0)
    x = coordinates.to_basis(coordinates.from_merge_weights(beta))
    theta = theta_of(P, weights @ w, x)
    torch.testing.assert_close(merged(w, beta), theta, rtol=1e-10, atol=1e-10)


def test_start_is_the_center(case):
    w, weights, P, coordinates = case
    theta = theta_of(P, weights @ w, coordinates.to_basis(coordinates.start().double()))
    torch.testing.assert_close(theta, weights @ w, rtol=1e-6, atol=1e-6)


def test_pull_back_is_the_gradient(case):
    """Of every column, and of one column at a time, as low_memory takes them."""
    _, _, _, coordinates = case
    y, h = trained(coordinates), 1e-6
    g = torch.Generator().manual_seed(3)
    c = torch.randn(coordinates.rows.shape, generator=g, dtype=torch.float64)  # dL/dx
    expected = torch.zeros_like(y)
    for k in range(y.numel()):
        step = torch.zeros(y.numel(), dtype=torch.float64)
        step[k] = h
        up, down = (coordinates.to_basis(y + s * step.view_as(y)) for s in (1, -1))
        expected.view(-1)[k] = ((up - down) * c).sum() / (2 * h)
    found = coordinates.pull_back(y, c, slice(None))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    for l in range(L):
        at = slice(l, l + 1)
        torch.testing.assert_close(coordinates.pull_back(y, c[:, at], at), found[:, at])


@pytest.mark.parametrize("basis", KINDS)
def test_pull_shares_is_the_transpose(basis):
    """<x(s), c> = <s, pull(c)> for any shares, and some columns at a time."""
    rows, g = rows_of(basis)[-1], torch.Generator().manual_seed(4)
    s = torch.randn(N, L, generator=g, dtype=torch.float64)
    c = torch.randn(rows.shape, generator=g, dtype=torch.float64)
    pulled = rows.pull_shares(c, slice(None))
    assert pulled.shape == s.shape
    torch.testing.assert_close((rows.from_shares(s) * c).sum(0), (s * pulled).sum(0))
    for l in range(L):
        at = slice(l, l + 1)
        torch.testing.assert_close(rows.pull_shares(c[:, at], at), pulled[:, at])


@pytest.mark.parametrize("basis", KINDS)
def test_nothing_is_copied_to_the_device_twice(basis):
    """A step does this twice, and a copy from pageable memory waits."""

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            copies.append(op is torch.ops.aten._to_copy.default)
            return op(*args, **kwargs or {})

    *_, rows = rows_of(basis)
    counts = []
    for _ in range(2):
        copies = []
        with Copies():
            rows.from_shares(torch.zeros(N, L, dtype=torch.float64, device="meta"))
            rows.pull_shares(torch.zeros(rows.shape, dtype=torch.float64, device="meta"), slice(L))
        counts.append(sum(copies))
    assert counts[0] > 0 == counts[1]


@pytest.mark.parametrize("basis", BASES)
def test_there_and_back_to_the_first_center(basis):
    _, weights, _, rows = rows_of(basis)
    other = rows.around(weights.flip(0))
    s = torch.randn(N, L, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    assert not torch.allclose(other.from_shares(s), rows.from_shares(s))
    torch.testing.assert_close(other.around(weights).from_shares(s), rows.from_shares(s))
    if basis == "deltas":
        assert other.origin is weights and other.around(weights).origin is None


def test_a_candidate_that_is_the_origin():
    """Its row is zero; its merge weight is what the others leave, around any center."""
    w, weights, _, _ = rows_of("deltas")
    last, divisor = torch.tensor([0.0, 0, 0, 1]).double(), torch.ones(N, L).double()
    divisor[-1] = 0.0
    rows = Deltas(last, divisor).around(weights)
    beta = torch.rand(N, L, generator=torch.Generator().manual_seed(7)).double()
    beta /= beta.sum(0)
    x = rows.from_merge_weights(beta)
    assert not x[-1].any()
    torch.testing.assert_close(rows.merge_weights(x), beta)
    torch.testing.assert_close(theta_of(w - w[-1], weights @ w, x), merged(w, beta))


def test_shares_of_differences():
    """They sum to zero; a row that is zero has none, and gets no coefficient."""
    _, weights, _, rows = rows_of("differences")
    g = torch.Generator().manual_seed(5)
    x = torch.randn(rows.shape, generator=g, dtype=torch.float64)
    s = rows.shares(x)
    torch.testing.assert_close(s.sum(0), torch.zeros(L).double())
    torch.testing.assert_close(rows.from_shares(s), x)
    divisor = rows.divisor.clone()
    divisor[1, 0] = 0.0
    rows = Differences(weights, divisor)
    assert not rows.shares(torch.eye(N - 1, L).roll(1, 0))[:, 0].any()
    assert rows.from_shares(s)[1, 0] == 0.0
    two = Differences(torch.tensor([0.25, 0.75]).double(), torch.ones(1, 1).double())
    y = two.from_merge_weights(torch.tensor([[0.4], [0.6]]).double())
    torch.testing.assert_close(y, torch.tensor([[-0.15]]).double())


def test_a_name_that_nobody_knows():
    with pytest.raises(KeyError):
        constrained(rows_of("deltas")[-1], "convex")
