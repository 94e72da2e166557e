"""What the weights of a heap of candidates say about it: a look at samples, cheap enough to go
before every run, and one whole read.

Whether candidates share an initialisation is judged by the cosine similarity of their matrices
alone (tensors of two or more dimensions longer than 1): weights of norm layers are all near 1 and
would hide it. Measured on character transformers, convolutional networks and MLPs of 7 k to 360 k
weights, with the loss half way between the two candidates:

    independent initialisations, before, while and after training -0.06 to 0.04 1.3 to 11 times the
    worse of the two the initialisation and the end of a run 0.02 to 0.69 between the two first and
    last trained checkpoint of a run, 7 to 18 times 1 / (rate * weight decay) steps apart 0.24 to
    0.64 up to 1.4 times the worse of the two
    neighbouring checkpoints of such a run                           0.76 to 0.99   between the two, or better than both
    fine-tunes of one model                                          0.97 to 0.999  better than both

So above RELATED = 0.1 two candidates are related, and a heap is one if its members are linked by
such pairs. A few unlinked candidates beside a large group, such as an initialisation, are no error:
averages that choose their members leave them out. Nor are adapters (LoRA) trained from different
random factors: similarities 0.05 to 0.08, their mean between the base model and either.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

import twa_kernels as tk
from twa_kernels.ops import FLOATS, NotFiniteError

from ..io.candidates import Candidates, TensorInfo
from .geometry import SAME, Geometry, cosines

SEVERITIES = ("error", "warning", "note")
RELATED = 0.1  # cosine similarity
STRAYS = 0.25  # of the heap may be unrelated to the rest before that is an error
FEWEST_WEIGHTS = 1000  # matrices of fewer weights in all have similarities by chance
SAMPLE_BYTES = 1 << 20  # of a candidate, as float32
SAMPLE_RUN = 4096  # neighbouring weights


@dataclass(frozen=True)
class Finding:
    """severity   "error": the heap cannot be averaged as it is, or the average is surely nonsense;
               "warning": probably not what was meant; "note"
    kind       short name of what was found, for programs
    message    what was found, where;  advice: what to do, one sentence"""

    severity: str
    kind: str
    message: str
    advice: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.message}. {self.advice[:1].upper()}{self.advice[1:]}."


def some(names: Sequence[object], most: int = 4) -> str:
    """ "a, b, c, d and 12 more" """
    shown = ", ".join(str(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def many(count: int, what: str) -> str:
    """ "1 tensor", "2 tensors" """
    return f"{count} {what}{'' if count == 1 else 's'}"


def is_matrix(info: TensorInfo) -> bool:
    """Whether a float tensor has two or more dimensions longer than 1."""
    return info.dtype.is_floating_point and sum(d > 1 for d in info.shape) >= 2


def floats(candidates: Candidates) -> list[str]:
    """Keys of the float tensors that are not empty."""
    return [
        key for key, info in candidates.info.items() if info.dtype.is_floating_point and numel(info)
    ]


def numel(info: TensorInfo) -> int:
    return torch.Size(info.shape).numel()


# A look at samples -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """broken     for each candidate, keys of tensors whose sample holds NaN or Inf
    identical  whether all candidates have the same sample
    related    (n, n) cosine similarity of the matrices that are not the same everywhere, of all
               weights together or the mean over tensors, by size, whichever is larger; None if they
               are too few to tell by
    """

    broken: list[list[str]]
    identical: bool
    related: Tensor | None


def heap_findings(candidates: Candidates, sample_bytes: int = SAMPLE_BYTES) -> list[Finding]:
    """What is wrong with a heap at first sight, from runs of weights evenly spread over each
    tensor: NaN or Inf, candidates that are all the same, groups of unrelated candidates (see the
    module's text).

    sample_bytes   read of each candidate, about; 0.3 s for 48 files of 1.4 MB on 2 cores
    """
    sample = take_sample(candidates, sample_bytes)
    names, found = candidates.names, []
    for name, keys in zip(names, sample.broken, strict=True):
        if keys:
            found.append(
                Finding(
                    "error",
                    "not-finite",
                    f"{name} holds NaN or Inf in {some(keys)}",
                    "leave this candidate out",
                )
            )
    if len(candidates) < 2:
        return found
    if sample.identical:
        found.append(
            Finding(
                "warning",
                "identical",
                f"all {len(candidates)} candidates have the same weights",
                "check what was saved: one is enough",
            )
        )
    elif sample.related is not None:
        sound = [i for i, keys in enumerate(sample.broken) if not keys]
        adapters = any("lora_" in key for key in candidates.info)
        found += unrelated([names[i] for i in sound], sample.related[sound][:, sound], adapters)
    return found


def take_sample(candidates: Candidates, sample_bytes: int = SAMPLE_BYTES) -> Sample:
    """Reads about `sample_bytes` of each candidate; float64 sums."""
    n, keys = len(candidates), floats(candidates)
    total = sum(numel(candidates.info[key]) for key in keys)
    run = min(SAMPLE_RUN, max(64, sample_bytes // 4 // max(1, len(keys))))
    broken: list[list[str]] = [[] for _ in range(n)]
    whole, mean, weights, identical = (
        torch.zeros(n, n).double(),
        torch.zeros(n, n).double(),
        0,
        True,
    )
    for key in keys:
        size = numel(candidates.info[key])
        # (n, columns)
        x = _runs(candidates, key, run, max(1, sample_bytes // 4 * size // (total * run)))
        if size > 1 << 20:  # a run of a large file may bring megabytes into memory
            for c in candidates:
                c.release()
        # float64 sums of narrower numbers do not overflow
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
    related = (
        torch.maximum(cosines(whole), mean / max(1, weights)) if weights >= FEWEST_WEIGHTS else None
    )
    return Sample(broken, identical and n > 1, related)


def _runs(candidates: Candidates, key: str, run: int, count: int) -> Tensor:
    """(n, columns) float64:

    `count` runs of neighbouring weights, evenly spread over a tensor; all of it if that is not
    more.
    """
    size = numel(candidates.info[key])
    starts = [0] if size <= run else torch.linspace(0, size - run, count).long().tolist()
    return torch.stack(
        [
            torch.cat([c.columns(key, s, min(s + run, size)) for s in starts]).double()
            for c in candidates
        ]
    )


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
    """Findings about candidates that no chain of similarities above RELATED links. related (n, n);
    adapters: candidates are low-rank factors.
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
        return [
            Finding(
                "warning",
                "stray",
                message,
                "leave out what is of another run or from before training",
            )
        ]
    parts = "; ".join(
        f"({k}) {some([names[i] for i in group])}" for k, group in enumerate(groups[:4], 1)
    )
    more = f"; and {len(groups) - 4} more" if len(groups) > 4 else ""
    message = f"{len(groups)} groups of candidates with unrelated weights ({near}): {parts}{more}"
    if adapters:
        return [
            Finding(
                "warning",
                "unrelated",
                message,
                "merge adapters of different random factors into their base model first, and"
                " average that",
            )
        ]
    return [
        Finding(
            "error",
            "unrelated",
            message,
            "models of different initialisations have no meaningful average: average each group on"
            " its own",
        )
    ]


def _between(groups: list[list[int]], related: Tensor) -> float:
    """The largest similarity between candidates of different groups, or 0."""
    between = related.clone()
    for group in groups:
        between[torch.tensor(group)[:, None], torch.tensor(group)] = 0.0
    return max(0.0, float(between.max()))


# One whole read ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Content:
    """What one read of all float tensors shows.

    broken     (candidate, key) -> how many NaN and Inf
    constant   keys of tensors that are the same in all candidates
    matrices   (n, r) float64: candidates' matrices in an orthonormal basis of them;  others: (n, s), the same of the other float tensors. NaN and
               Inf count as 0
    """

    broken: dict[tuple[int, str], int]
    constant: list[str]
    matrices: Tensor
    others: Tensor

    @property
    def sound(self) -> list[int]:
        """Candidates without NaN and Inf."""
        bad = {i for i, _ in self.broken}
        return [i for i in range(len(self.matrices)) if i not in bad]


class Scan:
    """The stream of some tensors of all candidates; it takes down what the first read shows.

    With `check`, also where there are NaN and Inf, and gives 0 for them."""

    def __init__(
        self, candidates: Candidates, keys: list[str], bar: tqdm, check: bool = False
    ) -> None:
        self.candidates, self.keys, self.bar, self.check = candidates, keys, bar, check
        self.broken: dict[tuple[int, str], int] = {}
        self.varying: set[str] = set()
        self._bad: list[list[int]] = []  # rows of each block with NaN or Inf

    def __iter__(self) -> Iterator[list[Tensor]]:
        for number, block in enumerate(self.candidates.stream([(key, None) for key in self.keys])):
            rows = [row if row.dtype in FLOATS else row.float() for row in block.rows]
            if number == len(self._bad):
                self._note(self.keys[block.index], rows)
            for i in self._bad[number]:
                rows[i] = rows[i].nan_to_num(0.0, 0.0, 0.0)
            yield rows

    def _note(self, key: str, rows: list[Tensor]) -> None:
        counts = (
            {i: int((~torch.isfinite(r)).sum()) for i, r in enumerate(rows)} if self.check else {}
        )
        self._bad.append([i for i, count in counts.items() if count])
        for i in self._bad[-1]:
            self.broken[i, key] = self.broken.get((i, key), 0) + counts[i]
        if key not in self.varying and not all(torch.equal(rows[0], r) for r in rows[1:]):
            self.varying.add(key)
        self.bar.update(sum(r.numel() * r.element_size() for r in rows))


def read_heap(candidates: Candidates, progress: bool = True) -> Content:
    """Reads every float tensor of every candidate once (again where there is NaN or Inf, and where
    `tk.orthonormalize` has doubts); memory does not grow with the files."""
    keys = floats(candidates)
    matrices, matrix_factor = _read(
        candidates, [key for key in keys if is_matrix(candidates.info[key])], "matrices", progress
    )
    others, other_factor = _read(
        candidates,
        [key for key in keys if not is_matrix(candidates.info[key])],
        "vectors",
        progress,
    )
    constant = [key for key in keys if key not in matrices.varying | others.varying]
    return Content(matrices.broken | others.broken, constant, matrix_factor, other_factor)


def _read(
    candidates: Candidates, keys: list[str], what: str, progress: bool
) -> tuple[Scan, Tensor]:
    """What the read of these tensors showed, and the candidates in an orthonormal basis of them (n,
    r).
    """
    if not keys:
        return Scan(candidates, keys, tqdm(disable=True)), torch.zeros(len(candidates), 0).double()
    try:
        return _read_once(candidates, keys, progress, f"{what} of {len(candidates)} candidates")
    except NotFiniteError:  # by its norms; another read says where, and counts
        return _read_once(candidates, keys, progress, f"NaN and Inf in {what}", check=True)


def _read_once(
    candidates: Candidates, keys: list[str], progress: bool, text: str, check: bool = False
) -> tuple[Scan, Tensor]:
    size = sum(c.info[key].nbytes for c in candidates for key in keys)
    with tqdm(
        total=size,
        desc=f"{text:32.32s}",
        unit="B",
        unit_scale=True,
        disable=not progress,
        mininterval=0.5,
        file=sys.stderr,
    ) as bar:
        scan = Scan(candidates, keys, bar, check)
        return scan, tk.orthonormalize(scan, form="implicit").R


# Findings ----------------------------------------------------------------------------------------


def content_findings(candidates: Candidates, content: Content) -> list[Finding]:
    """NaN and Inf, tensors that are the same everywhere."""
    names, found = candidates.names, []
    for i in sorted({i for i, _ in content.broken}):
        where = [
            f"{key} ({count} of {numel(candidates.info[key])})"
            for (j, key), count in content.broken.items()
            if j == i
        ]
        found.append(
            Finding(
                "error",
                "not-finite",
                f"{names[i]} holds NaN or Inf in {some(where)}",
                "leave this candidate out",
            )
        )
    if content.constant and len(candidates) > 1:
        weights = sum(numel(candidates.info[key]) for key in content.constant)
        share = weights / max(1, sum(numel(candidates.info[key]) for key in floats(candidates)))
        message = (
            f"the same in all candidates: {many(len(content.constant), 'tensor')}, {share:.1%} of"
            f" the weights: {some(content.constant)}"
        )
        found.append(
            Finding(
                "note",
                "constant",
                message,
                "an average leaves them as they are (frozen, or not trained yet)",
            )
        )
    return found


def geometry_findings(candidates: Candidates, geometry: Geometry) -> list[Finding]:
    """Duplicates, candidates that are averages of others, outliers."""
    found = duplicates(candidates, geometry)
    info = {key: candidates.info[key] for key in floats(candidates)}
    unit = max(
        (torch.finfo(i.dtype).eps / 2 for i in info.values() if is_matrix(i)), default=2.0**-24
    )
    for i, others in geometry.weighted_means(unit):
        which = some([f"{geometry.names[j]} ({beta:.2f})" for j, beta in others if beta > 0.005])
        message = (
            f"{geometry.names[i]} is a weighted mean of other candidates, up to rounding: {which}"
        )
        found.append(
            Finding(
                "warning",
                "mean-of-others",
                message,
                "leave out an average that was made from the others before",
            )
        )
    for i, times in geometry.outliers():
        message = (
            f"{geometry.names[i]} is {times:.0f} times as far from the most central candidate as"
            " the median candidate is"
        )
        found.append(
            Finding(
                "warning",
                "outlier",
                message,
                "leave it out if it is of another run, diverged, or from the start of training",
            )
        )
    return found


def duplicates(candidates: Candidates, geometry: Geometry) -> list[Finding]:
    """Groups of candidates that are the same, or the same up to rounding; equality is checked
    number by number.
    """
    found = []
    for group in groups_of(geometry.distances <= SAME):
        if len(group) < 2:
            continue
        names = some([geometry.names[i] for i in group])
        if equal(candidates, group):
            found.append(
                Finding(
                    "warning",
                    "duplicates",
                    f"{names} are the same, every tensor",
                    "give each candidate once: twice is double weight",
                )
            )
        else:
            message = f"{names} differ by less than {SAME:g} of their weights"
            found.append(
                Finding(
                    "note",
                    "near-duplicates",
                    message,
                    "keep one of them: the others add nothing but weight",
                )
            )
    return found


def equal(candidates: Candidates, members: list[int]) -> bool:
    """Whether these candidates have equal tensors, integers too."""
    for block in candidates.stream([(key, None) for key in candidates.info]):
        if not all(torch.equal(block.rows[members[0]], block.rows[i]) for i in members[1:]):
            return False
    return True


def tensor_findings(candidates: Candidates) -> list[Finding]:
    """Tensors that need a word: not float, empty, 0-d, tied, of several dtypes."""
    found, info = [], candidates.info
    if integers := [
        f"{key} ({info[key]})" for key in info if not info[key].dtype.is_floating_point
    ]:
        count = sum(numel(i) for i in info.values() if not i.dtype.is_floating_point)
        if count > sum(numel(info[key]) for key in floats(candidates)):
            message = f"most numbers are in tensors that are not floating point: {some(integers)}"
            found.append(
                Finding(
                    "error",
                    "integers",
                    message,
                    "convert quantised checkpoints to floating point first",
                )
            )
        else:
            message = f"not floating point: {many(len(integers), 'tensor')}: {some(integers)}"
            found.append(
                Finding(
                    "note",
                    "integers",
                    message,
                    "they are not averaged: the last candidate's are taken",
                )
            )
    if odd := [
        f"{key} {list(i.shape)}"
        for key, i in info.items()
        if not numel(i) or (not i.shape and i.dtype.is_floating_point)
    ]:
        found.append(
            Finding(
                "note",
                "odd-shapes",
                f"empty or a single number: {many(len(odd), 'tensor')}: {some(odd)}",
                "nothing needs to be done",
            )
        )
    for names in tied(candidates):
        advice = "the task's model must tie them too, else they part while coefficients train"
        found.append(
            Finding(
                "note",
                "tied",
                f"{' = '.join(names)} in every candidate: one weight under several names",
                advice,
            )
        )
    mixed = [key for key in info if len({c.info[key].dtype for c in candidates}) > 1]
    if mixed:
        message = (
            f"of different dtypes in different candidates: {many(len(mixed), 'tensor')}:"
            f" {some(mixed)}"
        )
        found.append(
            Finding(
                "note",
                "dtypes",
                message,
                f"the result takes those of the first, {candidates.names[0]}",
            )
        )
    return found


def tied(candidates: Candidates) -> list[list[str]]:
    """Names of matrices with equal content in every candidate, in groups.

    Only what begins and ends alike in the first is compared.
    """
    alike: dict[object, list[str]] = {}
    for key in (key for key in floats(candidates) if is_matrix(candidates.info[key])):
        size = numel(candidates.info[key])
        ends = (
            *candidates[0].columns(key, 0, min(64, size)).tolist(),
            *candidates[0].columns(key, max(0, size - 64), size).tolist(),
        )
        if len(set(ends)) > 1:  # a matrix of zeros is tied to nothing
            alike.setdefault((candidates.info[key], ends), []).append(key)
    groups = []
    for keys in alike.values():
        same = keys[:1] + [key for key in keys[1:] if _equal_everywhere(candidates, keys[0], key)]
        groups += [same] if len(same) > 1 else []
    return groups


def _equal_everywhere(candidates: Candidates, a: str, b: str) -> bool:
    for one, other in zip(
        candidates.stream([(a, None)]), candidates.stream([(b, None)]), strict=True
    ):
        if not all(torch.equal(x, y) for x, y in zip(one.rows, other.rows, strict=True)):
            return False
    return True
