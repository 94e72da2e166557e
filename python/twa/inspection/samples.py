"""A look at samples of the candidates' weights, cheap enough to go before every run.

Whether candidates share an initialisation is judged by the cosine similarity of their matrices
alone (tensors of two or more dimensions longer than 1): weights of norm layers are all near 1 and
would hide it. docs/inspect.md has what was measured. So above RELATED = 0.1 two candidates are
related, and candidates belong together if such pairs link all of them. A few unlinked candidates
beside a large group, such as an initialisation, are no error: averages that choose their members
leave them out. Nor are adapters (LoRA) trained from different random factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..io.candidates import Candidates
from ..io.mapped import TensorInfo
from .findings import Finding, some
from .geometry import cosines

RELATED = 0.1  # cosine similarity
STRAYS = 0.25  # of the candidates may be unrelated to the rest before that is an error
FEWEST_WEIGHTS = 1000  # matrices of fewer weights in all have similarities by chance
SAMPLE_BYTES = 1 << 20  # of a candidate, as float32
SAMPLE_RUN = 4096  # neighbouring weights


def is_matrix(info: TensorInfo) -> bool:
    """Whether a float tensor has two or more dimensions longer than 1."""
    return info.dtype.is_floating_point and sum(d > 1 for d in info.shape) >= 2


def floats(candidates: Candidates) -> list[str]:
    """Keys of the float tensors that are not empty."""
    return [
        key for key, info in candidates.info.items() if info.dtype.is_floating_point and info.numel
    ]


# A look at samples -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """What a sample of each candidate's weights shows.

    Attributes:
        broken: for each candidate, keys of tensors whose sample holds NaN or Inf
        identical: whether all candidates have the same sample
        related: (n, n) cosine similarity of the matrices that are not the same everywhere: of all
            weights together, or the mean over tensors by size, whichever is larger; None if they
            are too few to tell by
    """

    broken: list[list[str]]
    identical: bool
    related: Tensor | None


def sample_findings(candidates: Candidates) -> list[Finding]:
    """What is wrong with candidates at first sight, from runs of weights spread over each tensor.

    It is NaN or Inf, candidates that are all the same, groups of unrelated candidates (see the
    module's text). It takes 0.3 s for 48 files of 1.4 MB on 2 cores.
    """
    sample = take_sample(candidates)
    names, found = candidates.names, []
    for name, keys in zip(names, sample.broken, strict=True):
        if keys:
            message = f"{name} holds NaN or Inf in {some(keys)}"
            found.append(Finding("error", "not-finite", message, "leave this candidate out"))
    if len(candidates) < 2:
        return found
    if sample.identical:
        message = f"all {len(candidates)} candidates have the same weights"
        advice = "check what was saved: one is enough"
        found.append(Finding("warning", "identical", message, advice))
    elif sample.related is not None:
        sound = [i for i, keys in enumerate(sample.broken) if not keys]
        adapters = any("lora_" in key for key in candidates.info)
        found += unrelated([names[i] for i in sound], sample.related[sound][:, sound], adapters)
    return found


def take_sample(candidates: Candidates, sample_bytes: int = SAMPLE_BYTES) -> Sample:
    """Reads about `sample_bytes` of each candidate; sums are in float64."""
    n, keys = len(candidates), floats(candidates)
    total = sum(candidates.info[key].numel for key in keys)
    run = min(SAMPLE_RUN, max(64, sample_bytes // 4 // max(1, len(keys))))
    broken: list[list[str]] = [[] for _ in range(n)]
    whole, mean = torch.zeros(2, n, n, dtype=torch.float64, device="cpu")
    weights, identical = 0, True
    for key in keys:
        size = candidates.info[key].numel
        count = max(1, sample_bytes // 4 * size // (total * run))
        x = _runs(candidates, key, run, count)  # (n, columns)
        x[:, (x == -torch.inf).all(0)] = 0.0  # as in a mask, which stays
        # The sums tell, since float64 sums of narrower numbers do not overflow.
        for i in (~torch.isfinite(x.sum(1))).nonzero().flatten().tolist():
            broken[i].append(key)
            x[i] = x[i].nan_to_num(0.0, 0.0, 0.0)
        if all(torch.equal(x[0], row) for row in x[1:]):
            continue
        identical = False
        if is_matrix(candidates.info[key]):
            gram = x @ x.T
            whole += gram * (size / x.shape[1])
            mean += cosines(gram) * size
            weights += size
    for c in candidates:
        c.release()
    related = None
    if weights >= FEWEST_WEIGHTS:
        related = torch.maximum(cosines(whole), mean / weights)
    return Sample(broken, identical and n > 1, related)


def _runs(candidates: Candidates, key: str, run: int, count: int) -> Tensor:
    """Runs of neighbouring weights of a tensor, evenly spread over it: (n, columns) float64.

    Args:
        candidates: the n candidates
        key: of the tensor
        run: weights of a run; a tensor of no more is read whole
        count: number of runs
    """
    size = candidates.info[key].numel
    last = max(0, size - run)
    starts = torch.linspace(0, last, count if last else 1, dtype=torch.float64, device="cpu")
    places = [(start, min(start + run, size)) for start in starts.long().tolist()]
    rows = []
    for c in candidates:
        rows.append(torch.cat([c.columns(key, *place) for place in places]).double())
        if size > 1 << 20:  # a run of a large file may bring megabytes into memory
            c.release()
    return torch.stack(rows)


def groups_of(linked: Tensor) -> list[list[int]]:
    """Connected components of a graph, (n, n) bool, in the order of their first members."""
    left, groups = set(range(len(linked))), []
    while left:
        group, edge = set(), {min(left)}
        while edge:
            group |= edge
            edge = {int(j) for i in edge for j in linked[i].nonzero().flatten()} - group
        groups.append(sorted(group))
        left -= group
    return groups


def unrelated(names: list[str], related: Tensor, adapters: bool = False) -> list[Finding]:
    """Findings of candidates that no chain of similarities above RELATED links.

    Args:
        names: of the n candidates
        related: (n, n) similarities
        adapters: whether the candidates are low-rank factors
    """
    groups = groups_of(related > RELATED)
    if len(groups) < 2:
        return []
    largest = max(groups, key=len)
    strays = [i for group in groups if group is not largest for i in group]
    near = f"cosine similarity at most {_between(groups, related):.2f}"
    if len(strays) <= STRAYS * len(names):
        message = (
            f"{some([names[i] for i in strays])}: weights unrelated to those of the other"
            f" {len(largest)} candidates ({near})"
        )
        advice = "leave out what is of another run or from before training"
        return [Finding("warning", "stray", message, advice)]
    shown = [some([names[i] for i in group]) for group in groups[:4]]
    parts = "; ".join(f"({k}) {members}" for k, members in enumerate(shown, 1))
    more = f"; and {len(groups) - 4} more" if len(groups) > 4 else ""
    message = f"{len(groups)} groups of candidates with unrelated weights ({near}): {parts}{more}"
    if adapters:
        advice = (
            "merge adapters of different random factors into their base model first, and average"
            " that"
        )
        return [Finding("warning", "unrelated", message, advice)]
    advice = (
        "models of different initialisations have no meaningful average: average each group on its"
        " own"
    )
    return [Finding("error", "unrelated", message, advice)]


def _between(groups: list[list[int]], related: Tensor) -> float:
    """The largest similarity between candidates of different groups, or 0."""
    between = related.clone()
    for group in groups:
        at = torch.tensor(group, dtype=torch.int64, device="cpu")
        between[at[:, None], at] = 0.0
    return max(0.0, float(between.max()))
