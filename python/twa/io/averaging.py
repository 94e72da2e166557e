"""Averages of candidates, in float64: of rows, and fixed ones of whole checkpoints, streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import twa_kernels as tk
from twa_kernels.layout import FLOATS

from .candidate import N_AVERAGED, Candidate
from .checks import shown
from .compare import check_complex, check_extra, check_not_quantised
from .errors import CandidateError, TwaError
from .mapped import TensorInfo
from .peft import check_adapters, is_adapter

if TYPE_CHECKING:
    from .candidates import Candidates

CHUNK = 1 << 20  # columns of a float64 accumulator: 8 MB


def average_into(out: Tensor, rows: Sequence[Tensor], weights: Tensor) -> Tensor:
    """out = sum_i weights[i] * rows[i], summed in float64; rows of weight 0 are not read.

    Args:
        out: contiguous, any float dtype; written
        rows: n tensors of as many elements
        weights: (n,)
    """
    if out.dtype == torch.float32 and all(r.dtype in FLOATS for r in rows):
        tk.average([r.detach() for r in rows], weights, out)
        return out
    flat_out = out.view(-1)
    flat = [(w, r.reshape(-1)) for w, r in zip(weights.tolist(), rows, strict=True) if w != 0.0]
    for start in range(0, flat_out.numel(), CHUNK):
        at = slice(start, start + CHUNK)
        total = torch.zeros_like(flat_out[at], dtype=torch.float64)
        for w, r in flat:
            total += w * r[at].double()
        flat_out[at] = total
    return out


def sum_of(rows: Sequence[Tensor], weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """sum_i weights[i] * rows[i], summed in float64.

    Where the weights sum to 1, a number that all rows have stays.

    Args:
        rows: n tensors of one shape, none of weight 0
        weights: (n,)
        dtype: float32 or float64, of the sum; one row of weight 1 keeps its own

    Returns:
        the sum, and whether each number of it is finite, or the same in all rows and no NaN
    """
    is_average = abs(float(weights.sum()) - 1.0) <= SUM
    if len(rows) == 1 and is_average:
        return rows[0], _are_finite(rows[0]) or not rows[0].isnan().any()
    total = torch.empty(rows[0].shape, dtype=dtype, device="cpu")
    average_into(total, rows, weights)
    is_good = _are_finite(total)
    if is_average and (
        not is_good or dtype == torch.float64 or _relative_error(weights) >= SAME_FLOAT32
    ):
        same = torch.ones(total.shape, dtype=torch.bool, device="cpu")
        for row in rows[1:]:
            same &= rows[0] == row
        total = torch.where(same, rows[-1].to(dtype), total)
        is_good = bool((same | total.isfinite()).all())
    return total, is_good


def not_finite(candidates: Sequence[Candidate], name: str, rows: list[Tensor]) -> CandidateError:
    """The error that says which file holds the NaN or Inf of tensor `name`.

    Args:
        candidates: some candidates
        name: key of the tensor
        rows: the tensor of each of them
    """
    for candidate, row in zip(candidates, rows, strict=True):
        bad = ~torch.isfinite(row)
        if bad.any():
            where = torch.nonzero(bad)[0].tolist()
            return CandidateError(
                f"{candidate.path}: tensor {name!r} has {int(bad.sum())} NaN or Inf of"
                f" {row.numel()} values (the first at {where}): expected finite weights"
            )
    return CandidateError(
        f"tensor {name!r}: the candidates' mean or their distance from it overflows float32"
    )


# Fixed averages of whole checkpoints -------------------------------------------------------------

SUM = 1e-6  # by which the sum of weights may miss 1
SAME_FLOAT32 = 2.0**-26  # a relative error that does not change a float32


def as_weights(beta: Tensor | Sequence[float]) -> Tensor:
    """Merge weights as a tensor; TwaError if they are no numbers.

    Args:
        beta: a tensor, which stays as it is, or numbers in lists of any depth
    """
    if isinstance(beta, Tensor):
        return beta
    try:
        return torch.as_tensor(beta, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        text = f"expected numbers, one for each candidate, found {shown(beta)}"
        raise TwaError(text, "merge weights") from None


def merge_weights(beta: Tensor | Sequence[float], n: int) -> Tensor:
    """Merge weights as they are used.

    Args:
        beta: (n,), or a list of n numbers
        n: number of candidates

    Returns:
        (n,) float64, on the CPU

    Raises:
        TwaError: there are not n of them, or their sum is not 1
    """
    beta = as_weights(beta)
    if beta.shape != (n,) or beta.is_complex():
        found = TensorInfo(tuple(beta.shape), beta.dtype)
        raise TwaError(f"expected {n} merge weights, one for each candidate, found {found}")
    weights = beta.detach().to("cpu", torch.float64)
    total = float(weights.sum())
    if not abs(total - 1.0) <= SUM:  # nor NaN
        raise TwaError(f"expected merge weights that sum to 1, found a sum of {total:.9g}")
    return weights


class FixedAverage:
    """A fixed average of candidates, tensor by tensor as they are in the files.

        theta = sum_i beta[i] * w_i

    Floating-point tensors are summed in float64 and rounded to the dtype of the last candidate's
    file; a number that all have the same stays, such as -Inf in a mask. Integers, bools, and
    complex numbers, which must be the same in all, are those of the last candidate. Where one
    candidate has all the weight, that one counts as the last. Others of weight 0 are not read.

    Args:
        candidates: the n candidates
        beta: merge weights (n,)
        dtype: of all floating-point tensors, in the place of the files'

    Attributes:
        candidates: the n candidates
        weights: beta, (n,) float64
        used: those that have weight
        info: shape and dtype of each tensor of the average, by key
        nbytes: bytes of the files that are read for it

    Raises:
        CandidateError: the candidates differ in their tensors, in the extra state of modules or in
            the configuration of adapters, look quantised, or have complex tensors that differ
        TwaError: beta are no merge weights, or dtype is not floating-point
    """

    def __init__(
        self,
        candidates: Candidates,
        beta: Tensor | Sequence[float],
        dtype: torch.dtype | None = None,
    ) -> None:
        if dtype is not None and dtype not in (*FLOATS, torch.float64):
            raise TwaError(f"expected a floating-point dtype of 16 bits or more, found {dtype}")
        self.candidates, self.weights = candidates, merge_weights(beta, len(candidates))
        self._rows = torch.nonzero(self.weights).flatten().tolist()
        self.used = [candidates[i] for i in self._rows]
        self._last = self._rows[0] if len(self._rows) == 1 else len(candidates) - 1
        last, keys = candidates[self._last], [key for key in candidates.info if key != N_AVERAGED]
        taken = self.used if last is self.used[-1] else [*self.used, last]
        _check_taken(taken)
        self._floats = [key for key in keys if last.info[key].dtype.is_floating_point]
        self._copied = [key for key in keys if not last.info[key].dtype.is_floating_point]
        for key in self._copied:
            if last.info[key].dtype.is_complex:
                check_complex(key, taken)
        self._extra = {key: t for key, t in last.extra.items() if isinstance(t, Tensor)}
        self.info = {key: last.info[key] for key in keys}
        if dtype is not None:
            self.info |= {key: TensorInfo(last.info[key].shape, dtype) for key in self._floats}
        self.info |= {key: TensorInfo(tuple(t.shape), t.dtype) for key, t in self._extra.items()}
        summed = sum(c.info[key].nbytes for c in self.used for key in self._floats)
        self.nbytes = summed + sum(last.info[key].nbytes for key in self._copied)

    def blocks(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the average in blocks of columns: (key, the next of them, flat).

        A block is made of files that are mapped, and is to be read or copied before the next.

        Raises:
            CandidateError: the average is not finite, or a file has changed
            TwaError: it overflows its dtype
        """
        recording = self.candidates.recording
        recorded = [key for key in self._floats if recording and recording.records(key)]
        if recording is not None and len(self._rows) > 1:  # decoded and summed in one go
            for key in recorded:
                size = sum(c.info[key].dtype.itemsize for c in self.used)
                for part in recording.average_blocks(key, self.weights):
                    self.candidates.account(part.numel() * size)
                    yield key, self._rounded(key, part)
        else:
            recorded = []
        streamed = [key for key in self._floats if key not in recorded]
        for block in self.candidates.stream([(key, None) for key in streamed], self._rows):
            key = streamed[block.index]
            yield key, self._rounded(key, self._sum(key, block.rows))
        for block in self.candidates.stream([(key, None) for key in self._copied], [self._last]):
            yield self._copied[block.index], block.rows[0]
        for key, value in self._extra.items():
            yield key, value.reshape(-1)
        self.candidates.check()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the average, in memory; raises what `blocks` does."""
        made = {
            key: torch.empty(i.shape, dtype=i.dtype, device="cpu") for key, i in self.info.items()
        }
        filled = dict.fromkeys(made, 0)
        for key, block in self.blocks():
            made[key].view(-1)[filled[key] : filled[key] + block.numel()] = block
            filled[key] += block.numel()
        return made

    def _sum(self, key: str, rows: Sequence[Tensor]) -> Tensor:
        """The sum of some columns of those that are used, before it is rounded for good."""
        dtypes = {self.info[key].dtype, *(row.dtype for row in rows)}
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        total, is_good = sum_of(rows, self.weights[self._rows], wide)
        if not is_good:
            raise not_finite(self.used, key, [c.tensor(key) for c in self.used])
        return total

    def _rounded(self, key: str, total: Tensor) -> Tensor:
        """These columns in the dtype of the average."""
        rounded = total.to(self.info[key].dtype)
        if rounded.dtype != total.dtype and not _are_finite(rounded):
            lost = total.isfinite() & ~rounded.isfinite()
            if lost.any():
                raise TwaError(
                    f"tensor {key!r}: values of the average, such as {float(total[lost][0]):.6g},"
                    f" overflow {rounded.dtype}"
                )
        return rounded


def _are_finite(t: Tensor) -> bool:
    """Whether all numbers are, by their extremes: much faster than looking at each."""
    return not t.numel() or all(bool(end.isfinite()) for end in t.aminmax())


def _relative_error(weights: Tensor) -> float:
    """A bound on that of the sum of equal numbers: weights miss 1, and float64 is rounded."""
    rounding = 2.0**-52 * len(weights) * float(weights.abs().sum())
    return abs(float(weights.sum()) - 1.0) + rounding


def _check_taken(taken: Sequence[Candidate]) -> None:
    """CandidateError if an average of these candidates, whose tensors fit, would mean nothing."""
    for k, candidate in enumerate(taken):
        if k == 0 or candidate.info != taken[0].info:
            check_not_quantised(candidate.info, candidate.path)
    check_extra(taken)
    if len(taken) > 1 and any(map(is_adapter, taken)):
        check_adapters(taken)
