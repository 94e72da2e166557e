"""Classical averages as merge weights beta (n,), sum 1, over candidates in order; float64.

theta = sum_i beta_i w_i. `Subspace.set_merge_weights` turns them into coefficients of the same
space that TWA searches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def candidate(n: int, k: int) -> Tensor:
    """Candidate k alone; negative k counts from the end."""
    if not -n <= k < n:
        raise ValueError(f"k: expected -{n} to {n - 1}, found {k}")
    beta = torch.zeros(n, dtype=torch.float64)
    beta[k] = 1.0
    return beta


def uniform(n: int) -> Tensor:
    """Plain mean of all candidates: SWA (Izmailov et al., 2018), uniform soup."""
    return torch.full((n,), 1.0 / n, dtype=torch.float64)


def lawa(n: int, k: int) -> Tensor:
    """Mean of the last k candidates: LAWA (Kaddour, 2022)."""
    if not 1 <= k <= n:
        raise ValueError(f"k: expected 1 to {n}, found {k}")
    beta = torch.zeros(n, dtype=torch.float64)
    beta[n - k :] = 1.0 / k
    return beta


def ema(n: int, decay: float) -> Tensor:
    """Exponential moving average a <- decay * a + (1 - decay) * w_i, started at the first
    candidate.
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay: expected 0 <= decay < 1, found {decay}")
    beta = (1.0 - decay) * decay ** torch.arange(n - 1, -1, -1, dtype=torch.float64)
    beta[0] = decay ** (n - 1)
    return beta


def wsm(n: int, k: int, decay: str = "linear") -> Tensor:
    """Mean of the last k candidates that stands for a decay of the learning rate over them:

    WSM (Tian et al., arXiv 2507.17634).

    Training goes from candidate j - 1 to j by the sum of its updates, which are proportional to the
    learning rate. Had the rate been w_j times as high, and the gradients the same, then the run
    from candidate m = n - k on (k of them are left, itself included) would have ended at

        theta = theta_m + sum_{m < j < n} w_j (theta_j - theta_{j-1}) = sum_{m <= j < n} (w_j -
        w_{j+1}) theta_j, w_m = 1, w_n = 0

    so beta_j = w_j - w_{j+1}, with w_{m+i} = f(i / k). f falls from f(0) = 1 to f(1) = 0:

    decay   "linear": 1 - t, which is the plain mean, LAWA; "sqrt": 1 - sqrt(t), with more of the
            earlier ones; "cosine": (1 + cos(pi t)) / 2, with more of those in the middle
    """
    if not 1 <= k <= n:
        raise ValueError(f"k: expected 1 to {n}, found {k}")
    if decay not in DECAYS:
        raise ValueError(f"decay: expected one of {', '.join(DECAYS)}, found {decay!r}")
    w = DECAYS[decay](torch.arange(k + 1, dtype=torch.float64) / k)
    beta = torch.zeros(n, dtype=torch.float64)
    beta[n - k :] = w[:-1] - w[1:]
    return beta


DECAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda t: 1 - t,
    "sqrt": lambda t: 1 - t.sqrt(),
    "cosine": lambda t: (1 + torch.cos(torch.pi * t)) / 2,
}


def greedy_soup(losses: Sequence[float], evaluate: Callable[[Tensor], float]) -> Tensor:
    """Greedy soup (Wortsman et al., 2022): candidates in order of their own loss join the uniform
    mean if it does not get worse.

    losses     each candidate's own validation loss, (n,)
    evaluate   merge weights -> validation loss
    """
    n = len(losses)
    order = sorted(range(n), key=lambda i: losses[i])
    members, best = [order[0]], losses[order[0]]
    for i in order[1:]:
        loss = evaluate(_mean_of(n, [*members, i]))
        if loss <= best:
            members, best = [*members, i], loss
    return _mean_of(n, members)


def _mean_of(n: int, members: Sequence[int]) -> Tensor:
    beta = torch.zeros(n, dtype=torch.float64)
    beta[list(members)] = 1.0 / len(members)
    return beta
