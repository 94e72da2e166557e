"""Bounds on rounding: how far a sum may be from the exact one on any machine.

A sum of n products, in any order, with fused multiply-adds or without, each operation rounded with
unit roundoff u, differs from the exact sum by at most

    gamma_n * sum_i |a_i b_i|,    gamma_n = n u / (1 - n u).

Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, SIAM, 2002,
section 3.1, equation (3.4). The order is that of the machine's instruction set, of its number of
threads and of its libraries; a bound for one order fails elsewhere.
"""

import torch


def gamma(n, dtype=torch.float32):
    """gamma_n for so many roundings to a dtype."""
    nu = n * torch.finfo(dtype).eps / 2
    assert nu < 1, f"no bound for {n} roundings to {dtype}"
    return nu / (1 - nu)


def weighted(c, tensors):
    """sum_i c[i] tensors[i] in float64, and sum_i |c[i] tensors[i]|.

    c       n numbers
    tensors n of one shape, or one of shape (n, ...)
    """
    c = torch.as_tensor(c, dtype=torch.float64).reshape(-1)
    t = torch.stack([t.detach().double() for t in tensors])
    return torch.tensordot(c, t, 1), torch.tensordot(c.abs(), t.abs(), 1)


def assert_weighted(found, c, tensors, more=2, dtype=torch.float32):
    """found is sum_i c[i] tensors[i], computed in a dtype in any order.

    more: roundings of a term beside those of the sum: of its coefficient, of the result.
    """
    exact, size = weighted(c, tensors)
    assert_within(found, exact, gamma(len(tensors) + more, dtype) * size)


def assert_within(found, exact, bound):
    """|found - exact| <= bound, each number; exact and bound in float64."""
    off = (found.detach().double() - exact).abs() - bound
    assert found.shape == exact.shape and not (off > 0).any() and not off.isnan().any(), (
        f"off by up to {off.amax().item():.3g} more than the bound",
        found,
        exact,
    )
