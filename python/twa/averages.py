"""Classical averages as merge weights over candidates in order.

    theta = sum_i beta_i w_i

beta is (n,) float64 with sum 1, on the CPU. `Subspace.set_merge_weights` turns it into coefficients
of the same space that TWA searches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .io.averaging import merge_weights
from .io.checks import is_number, shown
from .io.errors import TwaError
from .io.order import shortened


def candidate(n: int, k: int) -> Tensor:
    """Candidate k alone.

    Args:
        n: number of candidates
        k: index; a negative one counts from the end

    Returns:
        beta (n,) float64

    Raises:
        TwaError: k is out of range
    """
    if not -n <= k < n:
        raise TwaError(f"k: expected -{n} to {n - 1}, found {k}")
    beta = torch.zeros(n, dtype=torch.float64, device="cpu")
    beta[k] = 1.0
    return beta


def uniform(n: int) -> Tensor:
    """The plain mean of all n candidates: SWA (Izmailov et al., 2018), uniform soup.

    Returns:
        beta (n,) float64
    """
    return torch.full((n,), 1.0 / n, dtype=torch.float64, device="cpu")


def lawa(n: int, k: int) -> Tensor:
    """The mean of the last k candidates: LAWA (Kaddour, 2022).

    Args:
        n: number of candidates
        k: how many of them are averaged

    Returns:
        beta (n,) float64

    Raises:
        TwaError: k is not 1 to n
    """
    if not 1 <= k <= n:
        raise TwaError(f"k: expected 1 to {n}, found {k}")
    beta = torch.zeros(n, dtype=torch.float64, device="cpu")
    beta[n - k :] = 1.0 / k
    return beta


def ema(n: int, decay: float) -> Tensor:
    """The exponential moving average, started at the first candidate.

        a <- decay * a + (1 - decay) * w_i

    Args:
        n: number of candidates
        decay: 0 <= decay < 1

    Returns:
        beta (n,) float64

    Raises:
        TwaError: decay is out of range
    """
    if not 0.0 <= decay < 1.0:
        raise TwaError(f"decay: expected 0 <= decay < 1, found {decay}")
    beta = (1.0 - decay) * decay ** torch.arange(n - 1, -1, -1, dtype=torch.float64, device="cpu")
    beta[0] = decay ** (n - 1)
    return beta


def wsm(n: int, k: int, decay: str = "linear") -> Tensor:
    """An average of the last k candidates that stands for a decay of the learning rate over them.

    WSM (Tian et al., arXiv 2507.17634). Training goes from candidate j - 1 to j by the sum of its
    updates, which are proportional to the learning rate. Had the rate been w_j times as high, and
    the gradients the same, then the run from candidate m = n - k on (k of them are left, itself
    included) would have ended at

        theta = theta_m + sum_{m < j < n} w_j (theta_j - theta_{j-1})
              = sum_{m <= j < n} (w_j - w_{j+1}) theta_j                 w_m = 1, w_n = 0

    so beta_j = w_j - w_{j+1}, with w_{m+i} = f(i / k), where f falls from f(0) = 1 to f(1) = 0.

    Args:
        n: number of candidates
        k: how many of them are averaged
        decay: f. "linear": 1 - t, which is the plain mean, LAWA; "sqrt": 1 - sqrt(t), with more of
            the earlier ones; "cosine": (1 + cos(pi t)) / 2, with more of those in the middle

    Returns:
        beta (n,) float64

    Raises:
        TwaError: k is not 1 to n, or decay is none of these
    """
    if not 1 <= k <= n:
        raise TwaError(f"k: expected 1 to {n}, found {k}")
    if decay not in DECAYS:
        raise TwaError(f"decay: expected one of {', '.join(DECAYS)}, found {decay!r}")
    w = DECAYS[decay](torch.arange(k + 1, dtype=torch.float64, device="cpu") / k)
    beta = torch.zeros(n, dtype=torch.float64, device="cpu")
    beta[n - k :] = w[:-1] - w[1:]
    return beta


DECAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda t: 1 - t,
    "sqrt": lambda t: 1 - t.sqrt(),
    "cosine": lambda t: (1 + torch.cos(torch.pi * t)) / 2,
}


def greedy_soup(losses: Sequence[float], evaluate: Callable[[Tensor], float]) -> Tensor:
    """The greedy soup (Wortsman et al., 2022).

    In order of their own loss, candidates join the uniform mean if it does not get worse.

    Args:
        losses: (n,), each candidate's own validation loss; NaN counts as infinite
        evaluate: merge weights (n,) -> validation loss

    Returns:
        beta (n,) float64
    """
    n, losses = len(losses), [math.inf if math.isnan(loss) else loss for loss in losses]
    order = sorted(range(n), key=lambda i: losses[i])
    members, best = [order[0]], losses[order[0]]
    for i in order[1:]:
        loss = evaluate(_mean_of(n, [*members, i]))
        if loss <= best:
            members, best = [*members, i], loss
    return _mean_of(n, members)


def _mean_of(n: int, members: Sequence[int]) -> Tensor:
    """The mean of some of n candidates."""
    beta = torch.zeros(n, dtype=torch.float64, device="cpu")
    beta[list(members)] = 1.0 / len(members)
    return beta


#: the names that `of_scheme` knows
SCHEMES = f"uniform, last, ema:DECAY, lawa:K, wsm:K or wsm:K:CURVE (CURVE: {', '.join(DECAYS)})"


def of_scheme(text: str, n: int) -> Tensor:
    """The merge weights of an average by its name.

        uniform         uniform(n)
        last            candidate(n, -1)
        ema:0.9         ema(n, 0.9)
        lawa:8          lawa(n, 8)
        wsm:16          wsm(n, 16)
        wsm:16:sqrt     wsm(n, 16, "sqrt")

    Args:
        text: the name
        n: number of candidates

    Returns:
        beta (n,) float64

    Raises:
        TwaError: there is no average of this name, or a number is out of range
    """
    name, *options = text.split(":")
    try:
        match name, options:
            case "uniform", []:
                return uniform(n)
            case "last", []:
                return candidate(n, -1)
            case "ema", [decay]:
                return ema(n, float(decay))
            case "lawa", [k]:
                return lawa(n, int(k))
            case "wsm", [k]:
                return wsm(n, int(k))
            case "wsm", [k, curve]:
                return wsm(n, int(k), curve)
    except TwaError as error:
        raise TwaError(error.problem, f"scheme {text}") from error
    except ValueError:  # no number
        pass
    raise TwaError(f"expected {SCHEMES}, found {shown(text)}", "scheme")


def of_weights(value: object, names: Sequence[str]) -> Tensor:
    """Merge weights as a JSON file may hold them.

    Args:
        value: a list of n numbers, or a dict: name of a candidate -> its number; one that is not
            named has no weight
        names: of the n candidates

    Returns:
        beta (n,) float64

    Raises:
        TwaError: it is neither, a name is unknown, or the sum is not 1
    """
    if isinstance(value, dict):
        if unknown := [name for name in value if name not in names]:
            raise TwaError(
                f"expected names of candidates ({shortened(names)}), found {shown(unknown[0])}",
                "weights",
            )
        value = [value.get(name, 0.0) for name in names]
    if not isinstance(value, list) or not all(is_number(w) and abs(w) < 1e300 for w in value):
        raise TwaError(
            "expected a list of finite numbers, or an object of names and numbers, found"
            f" {shown(value)}",
            "weights",
        )
    return merge_weights(torch.tensor(value, dtype=torch.float64, device="cpu"), len(names))


def of_center(center: str | int | Tensor | Sequence[float], n: int) -> Tensor:
    """The merge weights of a center.

    Args:
        center: "mean", "last", an index, weights (n,) that sum to 1, also as a list, or "zero"
        n: number of candidates

    Returns:
        beta (n,) float64; zeros for "zero"

    Raises:
        TwaError: it is none of these
    """
    if isinstance(center, str) and center in ("mean", "zero", "last"):
        zero = torch.zeros(n, dtype=torch.float64, device="cpu")
        return {"mean": uniform(n), "last": candidate(n, -1), "zero": zero}[center]
    if isinstance(center, int):
        return candidate(n, center)
    if isinstance(center, list | tuple):
        return merge_weights(center, n)
    if isinstance(center, Tensor) and center.shape == (n,):
        total = float(center.double().sum())
        if abs(total - 1.0) < 1e-6:
            return center.double().cpu()
    raise TwaError(
        f"expected 'mean', 'last', 'zero', an index below {n} or {n} merge weights that sum to 1,"
        f" found {center!r}",
        "center",
    )


def of_steps(steps: Sequence[int], scheme: str, **horizon: float | str) -> Tensor:
    """The merge weights of an average whose horizon is in steps of training.

    Args:
        steps: of the candidates, in order
        scheme: and its horizon:

            - "last": the last candidate
            - "uniform": the mean of all, or of those of the `last` steps
            - "ema": `half_life`, the steps after which a candidate's weight has halved; a candidate
              counts for the steps since the one before it
            - "lawa": the mean of those of the `last` steps
            - "wsm": those of the `last` steps, as for a decay of the learning rate over them;
              `decay` as for `wsm`

        horizon: as the scheme has it

    Returns:
        beta (n,) float64

    Raises:
        TwaError: there is no such scheme, or its horizon is none of what it can be
    """
    known = {
        "last": ((), ()),
        "uniform": ((), ("last",)),
        "ema": (("half_life",), ()),
        "lawa": (("last",), ()),
        "wsm": (("last",), ("decay",)),
    }
    if scheme not in known:
        raise TwaError(f"scheme: expected one of {', '.join(known)}, found {scheme!r}")
    needed, more = known[scheme]
    if missing := [name for name in needed if name not in horizon]:
        raise TwaError(f"scheme {scheme!r}: expected {missing[0]}=, in steps of training")
    if odd := [name for name in horizon if name not in (*needed, *more)]:
        raise TwaError(f"scheme {scheme!r} has no {odd[0]}=")
    for name in ("half_life", "last"):
        value = horizon.get(name, 1.0)
        if not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise TwaError(f"{name}: expected a number above 0, found {value!r}")
    n, at = len(steps), torch.tensor(list(steps), dtype=torch.float64, device="cpu")
    if scheme == "ema":
        decay = 0.5 ** (torch.diff(at) / float(horizon["half_life"]))  # from each to the next
        left = decay.flip(0).cumprod(0).flip(0)  # what of each is left at the end
        beta = torch.ones(n, dtype=torch.float64, device="cpu")
        beta[:-1] = left
        beta[1:] *= 1.0 - decay
        return beta
    k = n
    if "last" in horizon:
        k = max(1, int((at > at[-1] - float(horizon["last"])).sum()))
    if scheme == "last":
        return candidate(n, -1)
    return wsm(n, k, str(horizon.get("decay", "linear")))
