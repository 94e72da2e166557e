"""Whether checkpoints have the same tensors: keys, shapes and kinds of dtype."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .errors import CandidateError
from .mapped import TensorInfo

if TYPE_CHECKING:
    from .candidate import Candidate

#: parts of the names of tensors that have one row for each token
VOCABULARY = re.compile(r"emb|wte|vocab|lm_head|tok")


def check_same(first: Candidate, other: Candidate) -> None:
    """CandidateError unless both have the same keys, shapes and kinds of dtype.

    Kinds are float, integer, bool and complex.
    """
    if missing := sorted(first.info.keys() - other.info.keys()):
        raise CandidateError(
            f"tensor {missing[0]!r} is missing ({len(missing)} in all) but is in {first.path}",
            other.path,
        )
    if unexpected := sorted(other.info.keys() - first.info.keys()):
        raise CandidateError(
            f"tensor {unexpected[0]!r} is unexpected ({len(unexpected)} in all):"
            f" {first.path} does not have it",
            other.path,
        )
    for key, expected in first.info.items():
        check_info(other.path, key, expected, other.info[key], f"in {first.path}")


def check_info(path: Path, key: str, expected: TensorInfo, found: TensorInfo, where: str) -> None:
    """CandidateError unless tensor `key` of the file `path` is as `expected`.

    Args:
        path: the file that `found` is in
        key: name of the tensor
        expected: its shape and dtype elsewhere
        found: its shape and dtype in the file
        where: where that is, for the message: "in the model"
    """
    if expected.shape != found.shape:
        raise CandidateError(
            f"tensor {key!r}: expected shape {list(expected.shape)} as {where}, found"
            f" {list(found.shape)}{_vocabulary_hint(key, expected.shape, found.shape)}",
            path,
        )
    if _kind(expected.dtype) != _kind(found.dtype):
        raise CandidateError(
            f"tensor {key!r}: expected {expected.dtype} as {where}, found {found.dtype}", path
        )


def _kind(dtype: torch.dtype) -> tuple[bool, bool, bool]:
    """Float, bool, complex, or none of them: an integer."""
    return dtype.is_floating_point, dtype == torch.bool, dtype.is_complex


def _vocabulary_hint(key: str, expected: tuple[int, ...], found: tuple[int, ...]) -> str:
    """More words for the message if only the number of tokens differs."""
    if len(expected) != len(found) or expected[1:] != found[1:] or not VOCABULARY.search(key):
        return ""
    return (
        f"; this looks like a vocabulary mismatch ({expected[0]} and {found[0]}"
        " tokens): candidates must share one tokenizer"
    )
