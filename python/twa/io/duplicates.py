"""Candidates that are the same: links, copies, and weights that were saved under two names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .candidate import Candidate
from .checks import equal_values
from .order import best_named, shortened

#: how many tensors of a candidate are looked at: of all, of those that agree so far, and so on
TENSORS = (4, 64)
NUMBERS = 64  # of each of these
CHUNK = 1 << 22  # numbers that are compared at once


def without_duplicates(candidates: Sequence[Candidate]) -> tuple[list[Candidate], str]:
    """Each set of weights once, in the same order.

    Of several names for one that with a number is kept. Whole files are read only where samples of
    them are the same.

    Returns:
        the candidates, and a sentence that names those left out; "" if there are none
    """
    of_files = _grouped(candidates, _files)
    alike = [[group[0] for group in of_files]]
    for count in TENSORS:
        alike = [
            part
            for group in alike
            for part in (_grouped(group, partial(sample, tensors=count)) if group[1:] else [group])
        ]
    equal = [same for group in alike for same in _equal_ones(group)]
    names = {id(group[0]): group for group in of_files}
    groups = [[c for one in same for c in names[id(one)]] for same in equal]
    chosen = [group[best_named([c.path for c in group])] for group in groups]
    kept = {id(c) for c in chosen}
    pairs = [
        _pair(c.path, one.path)
        for group, one in zip(groups, chosen, strict=True)
        for c in group
        if c is not one
    ]
    return [c for c in candidates if id(c) in kept], _note(pairs)


def without_same_files(candidates: Sequence[Candidate]) -> tuple[list[Candidate], str]:
    """The same for snapshots of recordings, of which none is read: only their files count."""
    groups = _grouped(candidates, _files)
    pairs = [_pair(c.path, group[0].path) for group in groups for c in group[1:]]
    return [group[0] for group in groups], _note(pairs)


def _note(pairs: Sequence[str]) -> str:
    return f"the same weights count once: {shortened(pairs)}" if pairs else ""


def _grouped(
    candidates: Sequence[Candidate], key: Callable[[Candidate], object]
) -> list[list[Candidate]]:
    """The candidates with one key, together."""
    groups: dict[object, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(key(candidate), []).append(candidate)
    return list(groups.values())


def _equal_ones(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Of candidates with one sample those with the same bits, together.

    Two are compared; of more each is read once, as far as it is the same as another.
    """
    if len(candidates) <= 2:
        return _together(candidates, _equal)
    parts = [list(candidates)]
    for key, info in candidates[0].info.items():
        for begin in range(0, info.numel, CHUNK):
            digest = partial(_digest, key=key, begin=begin, end=min(begin + CHUNK, info.numel))
            parts = [p for part in parts for p in (_grouped(part, digest) if part[1:] else [part])]
    return [same for part in parts for same in _together(part, _same_extra)]


def _digest(candidate: Candidate, key: str, begin: int, end: int) -> bytes:
    """Digest of some numbers of a tensor."""
    found = hashlib.sha256(_bytes(candidate.columns(key, begin, end)).numpy().data).digest()
    candidate.check()
    candidate.release()
    return found


def _same_extra(a: Candidate, b: Candidate) -> bool:
    """Whether two candidates have the same extra state."""
    return equal_values(a.extra, b.extra)


def _together(
    candidates: Sequence[Candidate], equal: Callable[[Candidate, Candidate], bool]
) -> list[list[Candidate]]:
    """The candidates that are equal, together."""
    groups: list[list[Candidate]] = []
    for candidate in candidates:
        same = next((group for group in groups if equal(group[0], candidate)), None)
        if same is None:
            groups.append([candidate])
        else:
            same.append(candidate)
    return groups


def _pair(other: Path, kept: Path) -> str:
    """What is said of one that is left out."""
    if other == kept:
        return f"{other} is given twice"
    names = (other.name, kept.name) if other.name != kept.name else (other, kept)
    return "{} is {}".format(*names)


def _files(candidate: Candidate) -> frozenset[tuple[int, int]]:
    """Which files on disk its weights are in, whatever their names."""
    found = [os.stat(file) for file in candidate.files if file.suffix != ".json"]
    return frozenset((status.st_dev, status.st_ino) for status in found)


def sample(candidate: Candidate, tensors: int) -> str:
    """Digest of shapes, dtypes and a few numbers of about so many tensors of a candidate."""
    digest = hashlib.sha256()
    for key in sorted(candidate.info):
        digest.update(f"{key} {candidate.info[key]}\n".encode())
    keys = sorted(key for key, info in candidate.info.items() if info.numel)
    for key in [*keys[:: max(1, len(keys) // tensors)], *keys[-1:]]:
        size = candidate.info[key].numel
        begin = max(0, size - NUMBERS) // 2
        some = candidate.columns(key, begin, min(size, begin + NUMBERS))
        digest.update(_bytes(some).numpy().tobytes())
    candidate.release()
    return digest.hexdigest()


def _equal(a: Candidate, b: Candidate) -> bool:
    """Whether two candidates with one sample have the same bits in all tensors, and extra state."""
    if not _same_extra(a, b):
        return False
    for key, info in a.info.items():
        for begin in range(0, info.numel, CHUNK):
            x, y = (c.columns(key, begin, min(begin + CHUNK, info.numel)) for c in (a, b))
            if not torch.equal(_bytes(x), _bytes(y)):
                return False
            for candidate in (a, b):
                candidate.check()
                candidate.release()
    return True


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)
