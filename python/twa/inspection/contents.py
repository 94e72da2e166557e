"""What one read of all float tensors shows, and the findings that come of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

import twa_kernels as tk
from twa_kernels import NotFiniteError

from ..io.candidates import Candidates, readable
from ..io.compare import quantised
from ..io.mapped import TensorInfo
from ..io.progress import progress_bar
from .findings import Finding, many, some
from .geometry import SAME, Geometry
from .samples import floats, groups_of, is_matrix


@dataclass(frozen=True)
class Content:
    """What one read of all float tensors shows; NaN and Inf count as 0.

    Attributes:
        broken: (position of the candidate, key) -> how many NaN and Inf
        constant: keys of tensors that are the same in all candidates
        matrices: (n, r) float64: the candidates' matrices in an orthonormal basis of them
        others: (n, s) float64: the other float tensors in an orthonormal basis of them
    """

    broken: dict[tuple[int, str], int]
    constant: list[str]
    matrices: Tensor
    others: Tensor

    @property
    def sound(self) -> list[int]:
        """Positions of the candidates without NaN and Inf."""
        bad = {i for i, _ in self.broken}
        return [i for i in range(len(self.matrices)) if i not in bad]


class Scan:
    """A stream of some tensors of all candidates that takes down what the first read shows.

    Args:
        candidates: the n candidates
        keys: of the tensors
        bar: moves with the bytes of the first read
        check: whether it looks for NaN and Inf, and gives 0 for them

    Attributes:
        broken: (position of the candidate, key) -> how many NaN and Inf
        varying: keys of the tensors that are not the same in all candidates
    """

    def __init__(
        self, candidates: Candidates, keys: list[str], bar: tqdm, check: bool = False
    ) -> None:
        self.candidates, self.keys, self.bar, self.check = candidates, keys, bar, check
        self.broken: dict[tuple[int, str], int] = {}
        self.varying: set[str] = set()
        self._bad: list[list[int]] = []  # rows of each block with NaN or Inf

    def __iter__(self) -> Iterator[list[Tensor]]:
        for number, block in enumerate(self.candidates.stream([(key, None) for key in self.keys])):
            rows = readable(block.rows)
            if number == len(self._bad):
                self._note(self.keys[block.index], rows)
            for i in self._bad[number]:
                rows[i] = rows[i].nan_to_num(0.0, 0.0, 0.0)
            yield rows

    def _note(self, key: str, rows: list[Tensor]) -> None:
        """Takes down what a block of a tensor, read for the first time, shows."""
        counts = {}
        if self.check:
            counts = {i: int((~torch.isfinite(r)).sum()) for i, r in enumerate(rows)}
        self._bad.append([i for i, count in counts.items() if count])
        for i in self._bad[-1]:
            self.broken[i, key] = self.broken.get((i, key), 0) + counts[i]
        if key not in self.varying and not all(torch.equal(rows[0], r) for r in rows[1:]):
            self.varying.add(key)
        self.bar.update(sum(r.nbytes for r in rows))


def read_contents(candidates: Candidates) -> Content:
    """Reads every float tensor of every candidate once.

    It reads again where there is NaN or Inf, and where `tk.orthonormalize` has doubts. Memory does
    not grow with the files.
    """
    keys = floats(candidates)
    of_matrices = [key for key in keys if is_matrix(candidates.info[key])]
    of_others = [key for key in keys if not is_matrix(candidates.info[key])]
    matrices, matrix_factor = _read(candidates, of_matrices, "matrices")
    others, other_factor = _read(candidates, of_others, "vectors")
    constant = [key for key in keys if key not in matrices.varying | others.varying]
    return Content(matrices.broken | others.broken, constant, matrix_factor, other_factor)


def _read(candidates: Candidates, keys: list[str], what: str) -> tuple[Scan, Tensor]:
    """Reads some tensors.

    Returns:
        what the read showed, and the candidates in an orthonormal basis of the tensors (n, r)
    """
    if not keys:
        nothing = torch.zeros(len(candidates), 0, dtype=torch.float64, device="cpu")
        return Scan(candidates, keys, tqdm(disable=True)), nothing
    try:
        return _read_once(candidates, keys, f"{what} of {len(candidates)} candidates")
    except NotFiniteError:  # found in the norms; another read says where, and counts
        return _read_once(candidates, keys, f"NaN and Inf in {what}", check=True)


def _read_once(
    candidates: Candidates, keys: list[str], text: str, check: bool = False
) -> tuple[Scan, Tensor]:
    """Reads some tensors, with or without a look for NaN and Inf, under a bar."""
    size = sum(c.info[key].nbytes for c in candidates for key in keys)
    with progress_bar(text, size, unit="B", unit_scale=True) as bar:
        scan = Scan(candidates, keys, bar, check)
        return scan, tk.orthonormalize(scan, form="implicit").R


def content_findings(candidates: Candidates, content: Content) -> list[Finding]:
    """Findings of NaN and Inf, and of tensors that are the same everywhere."""
    names, sizes = candidates.names, {key: i.numel for key, i in candidates.info.items()}
    found = []
    for i in sorted({i for i, _ in content.broken}):
        counts = {key: count for (j, key), count in content.broken.items() if j == i}
        where = [f"{key} ({count} of {sizes[key]})" for key, count in counts.items()]
        message = f"{names[i]} holds NaN or Inf in {some(where)}"
        found.append(Finding("error", "not-finite", message, "leave this candidate out"))
    if content.constant and len(candidates) > 1:
        weights = sum(sizes[key] for key in content.constant)
        share = weights / max(1, sum(sizes[key] for key in floats(candidates)))
        message = (
            f"the same in all candidates: {many(len(content.constant), 'tensor')}, {share:.1%} of"
            f" the weights: {some(content.constant)}"
        )
        advice = "an average leaves them as they are (frozen, or not trained yet)"
        found.append(Finding("note", "constant", message, advice))
    return found


def geometry_findings(candidates: Candidates, geometry: Geometry) -> list[Finding]:
    """Findings of duplicates, of candidates that are averages of others, and of outliers."""
    found, names = duplicates(candidates, geometry), geometry.names
    matrices = [i for i in candidates.info.values() if i.numel and is_matrix(i)]
    unit = max((torch.finfo(i.dtype).eps / 2 for i in matrices), default=2.0**-24)
    for i, others in geometry.weighted_means(unit):
        which = some([f"{names[j]} ({beta:.2f})" for j, beta in others if beta > 0.005])
        message = f"{names[i]} is a weighted mean of other candidates, up to rounding: {which}"
        advice = "leave out an average that was made from the others before"
        found.append(Finding("warning", "mean-of-others", message, advice))
    for i, times in geometry.outliers():
        message = (
            f"{names[i]} is {times:.0f} times as far from the most central candidate as the median"
            " candidate is"
        )
        advice = "leave it out if it is of another run, diverged, or from the start of training"
        found.append(Finding("warning", "outlier", message, advice))
    return found


def duplicates(candidates: Candidates, geometry: Geometry) -> list[Finding]:
    """Findings of candidates that are the same, or the same up to rounding.

    Equality is checked number by number.
    """
    found = []
    for group in groups_of(geometry.distances <= SAME):
        if len(group) < 2:
            continue
        names = some([geometry.names[i] for i in group])
        if equal(candidates, group):
            message = f"{names} are the same, every tensor"
            advice = "give each candidate once: twice is double weight"
            found.append(Finding("warning", "duplicates", message, advice))
        else:
            message = f"{names} differ by less than {SAME:g} of their weights"
            advice = "keep one of them: the others add nothing but weight"
            found.append(Finding("note", "near-duplicates", message, advice))
    return found


def equal(candidates: Candidates, members: list[int]) -> bool:
    """Whether these candidates have equal tensors, integers too."""
    for block in candidates.stream([(key, None) for key in candidates.info]):
        if not all(torch.equal(block.rows[members[0]], block.rows[i]) for i in members[1:]):
            return False
    return True


def tensor_findings(candidates: Candidates) -> list[Finding]:
    """Findings of tensors that need a word: not float, empty, 0-d, tied, of several dtypes."""
    found, info = [], candidates.info
    integers = {key: i for key, i in info.items() if not i.dtype.is_floating_point}
    if integers:
        found.append(_integer_finding(candidates, integers))
    odd = [f"{key} {list(i.shape)}" for key, i in info.items() if _is_odd(i)]
    if odd:
        message = f"empty or a single number: {many(len(odd), 'tensor')}: {some(odd)}"
        found.append(Finding("note", "odd-shapes", message, "nothing needs to be done"))
    for names in tied(candidates):
        message = f"{' = '.join(names)} in every candidate: one weight under several names"
        advice = "the task's model must tie them too, else they part while coefficients train"
        found.append(Finding("note", "tied", message, advice))
    mixed = [key for key in info if len({c.info[key].dtype for c in candidates}) > 1]
    if mixed:
        count = many(len(mixed), "tensor")
        message = f"of different dtypes in different candidates: {count}: {some(mixed)}"
        advice = f"the result takes those of the first, {candidates.names[0]}"
        found.append(Finding("note", "dtypes", message, advice))
    return found


def _is_odd(info: TensorInfo) -> bool:
    """Whether a tensor is empty, or a single float."""
    return not info.numel or (not info.shape and info.dtype.is_floating_point)


def _integer_finding(candidates: Candidates, integers: dict[str, TensorInfo]) -> Finding:
    """What there is to say of tensors that are not floating point."""
    if reason := quantised(candidates.info):
        message = f"the checkpoints look quantised: {reason}"
        advice = "dequantise them first: twa average does not average integers"
        return Finding("error", "integers", message, advice)
    shown = some([f"{key} ({info})" for key, info in integers.items()])
    message = f"not floating point: {many(len(integers), 'tensor')}: {shown}"
    advice = "they are not averaged: the last candidate's are taken"
    return Finding("note", "integers", message, advice)


def tied(candidates: Candidates) -> list[list[str]]:
    """Names of matrices with equal content in every candidate, in groups.

    Only what begins and ends alike in the first is compared.
    """
    alike: dict[object, list[str]] = {}
    for key in (key for key in floats(candidates) if is_matrix(candidates.info[key])):
        size = candidates.info[key].numel
        begin = candidates[0].columns(key, 0, min(64, size))
        end = candidates[0].columns(key, max(0, size - 64), size)
        ends = (*begin.tolist(), *end.tolist())
        if len(set(ends)) > 1:  # a matrix of zeros is tied to nothing
            alike.setdefault((candidates.info[key], ends), []).append(key)
    groups = []
    for keys in alike.values():
        same = keys[:1] + [key for key in keys[1:] if _equal_everywhere(candidates, keys[0], key)]
        groups += [same] if len(same) > 1 else []
    return groups


def _equal_everywhere(candidates: Candidates, a: str, b: str) -> bool:
    """Whether two tensors are equal in every candidate."""
    first, second = candidates.stream([(a, None)]), candidates.stream([(b, None)])
    for one, other in zip(first, second, strict=True):
        if not all(torch.equal(x, y) for x, y in zip(one.rows, other.rows, strict=True)):
            return False
    return True
