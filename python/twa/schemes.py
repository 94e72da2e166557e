"""Classical averages as merge weights beta (n,), sum 1, over candidates in order; float64.

theta = sum_i beta_i w_i. `Subspace.set_merge_weights` turns them into coefficients of the same space that TWA searches.
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
    """Exponential moving average a <- decay * a + (1 - decay) * w_i, started at the first candidate."""
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay: expected 0 <= decay < 1, found {decay}")
    beta = (1.0 - decay) * decay ** torch.arange(n - 1, -1, -1, dtype=torch.float64)
    beta[0] = decay ** (n - 1)
    return beta


def greedy_soup(losses: Sequence[float], evaluate: Callable[[Tensor], float]) -> Tensor:
    """Greedy soup (Wortsman et al., 2022): candidates in order of their own loss join the uniform mean if it does not get worse.

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
