"""Whether checkpoints have the same tensors (keys, shapes, kinds of dtype), and such as averages
are made of: no quantised ones, and the rest the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import equal_values
from .errors import CandidateError
from .mapped import TensorInfo
from .safetensors import DTYPE_NAMES
from .unpickle import Made

if TYPE_CHECKING:
    from .candidate import Candidate

#: parts of the names of tensors that have one row for each token
VOCABULARY = re.compile(r"emb|wte|vocab|lm_head|tok")
#: last parts of the names of what stands beside quantised weights: scale, weight_scale, SCB,
#: quant_map, ...; not of a logit_scale or layer_scale, which models learn
SCALE = re.compile(
    r"(^|(?<!logit)(?<!layer)(?<!attn)_)[wqsz]?scales?(_|$)|absmax|scb$|(^|_|q)zeros?(_|$)|quant",
    re.IGNORECASE,
)
#: last parts of the names of integers that are no weights: places, tokens, masks, tables, counts
LOOKED_UP = re.compile(
    r"ind(ex|ices)|idxs?(_|$)|(^|_)ids?(_|$)|pos(ition)?s?(_|$)|mask|causal|tri[lu]|allowed|hash|lookup|table"
    r"|count|tracked|step|coord|offset",
    re.IGNORECASE,
)
#: names that only packed weights have, whatever stands beside them
PACKED = ("qweight", "qzeros", "weight_packed", "packed_weight", "W_q", "Qidxs")


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


def check_complex(key: str, candidates: Sequence[Candidate], is_trained: bool = False) -> None:
    """CandidateError unless a complex tensor is a buffer that all candidates have the same."""
    first = candidates[0].tensor(key)
    equal = all(torch.equal(first, c.tensor(key)) for c in candidates[1:])
    if is_trained or not equal or first.dtype not in DTYPE_NAMES:
        raise CandidateError(
            f"tensor {key!r} is complex: expected a real dtype; only complex64 buffers that are the"
            " same in all candidates are kept",
            candidates[0].path,
        )


def check_extra(candidates: Sequence[Candidate]) -> None:
    """CandidateError if what modules keep beside their tensors differs between candidates."""
    first = candidates[0]
    for candidate in candidates:
        for key, value in candidate.extra.items():
            if isinstance(value, Made):
                raise CandidateError(
                    f"{key!r}, the extra state of a module, holds an object of {value.kind}:"
                    " expected plain values or tensors; leave it out with ignore",
                    candidate.path,
                )
    for other in candidates[1:]:
        for key in sorted(first.extra.keys() | other.extra.keys()):
            if not equal_values(first.extra.get(key), other.extra.get(key)):
                raise CandidateError(
                    f"{key!r}, the extra state of a module, is not that of {first.path}: it cannot"
                    " be averaged",
                    other.path,
                )


def without_tensors(extra: Mapping[str, object]) -> str:
    """What is to be said of extra state that is no tensor, as in no file of tensors; "" if none is.

    Args:
        extra: of a candidate
    """
    if not (plain := [key for key, value in extra.items() if not isinstance(value, Tensor)]):
        return ""
    return (
        f"{plain[0]!r} ({len(plain)} in all), the extra state of a module, is no tensor and is left"
        " out: set it again when the model is loaded"
    )


def check_not_quantised(info: Mapping[str, TensorInfo], where: object = "") -> None:
    """CandidateError if tensors look quantised: an average of their integers means nothing.

    Args:
        info: shape and dtype of each tensor, by key
        where: the checkpoint, for the message
    """
    if reason := quantised(info):
        raise CandidateError(
            f"{reason}: the checkpoint looks quantised, and integers are not averaged; dequantise"
            " all candidates first, or average the models and quantise the result",
            where,
        )


def quantised(info: Mapping[str, TensorInfo]) -> str | None:
    """Why tensors look quantised, for a message; None if they do not.

    They do if one of the integer tensors that may be weights stands beside its scale, or if these
    hold more numbers than the float tensors.
    """
    integers = {key: i for key, i in info.items() if _may_be_weights(key, i)}
    scales: dict[str, list[str]] = {}  # of a module, or of a tensor that has parts: two at most
    for key, i in info.items():
        found = scales.setdefault(key.rpartition(".")[0], [])
        if len(found) < 2 and _is_scale(key, i):
            found.append(key)
    for key, i in integers.items():
        module, _, name = key.rpartition(".")
        if len(i.shape) < 2:
            continue
        if name in PACKED:
            return f"tensor {key!r} ({i}) has the name of packed weights"
        beside = (k for k in (*scales[module], *scales.get(key, ())) if k != key)
        if scale := next(beside, None):
            return f"tensor {key!r} ({i}) stands beside {scale!r}"
    numbers = sum(i.numel for i in integers.values())
    weights = sum(i.numel for i in info.values() if i.dtype.is_floating_point)
    if numbers > weights:
        largest = max(integers, key=lambda key: integers[key].numel)
        return (
            f"tensor {largest!r} ({integers[largest]}) and others, {numbers} numbers in all, are"
            f" integers, more than the {weights} that are floating point"
        )
    return None


def _may_be_weights(key: str, info: TensorInfo) -> bool:
    """Whether an integer tensor may hold quantised weights.

    One of bools, of no dimension, one that is named like places, masks or counts, or that is a
    square over whose other dimensions it is broadcast (a causal mask), does not.
    """
    if info.dtype.is_floating_point or info.dtype.is_complex or info.dtype == torch.bool:
        return False
    shape, name = info.shape, key.rpartition(".")[2]
    square = len(shape) > 2 and shape[-1] == shape[-2] and math.prod(shape[:-2]) == 1
    return bool(shape) and not square and (name in PACKED or not LOOKED_UP.search(name))


def _is_scale(key: str, info: TensorInfo) -> bool:
    """Whether a tensor is named as scales and zeros are; integers (of MXFP4) only as scales."""
    name = key.rpartition(".")[2]
    if info.dtype.is_floating_point:
        return bool(SCALE.search(name))
    return name.endswith(("_scale", "_scales"))


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
