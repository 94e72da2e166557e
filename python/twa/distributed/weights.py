"""A model's weights, whichever part of them this rank holds.

They are merged exactly from candidates, rounded as files store them, kept in memory, and made whole
for an export.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from .. import averages
from ..dtensors import is_dtensor, local, reshard
from ..io import loading
from ..io.averaging import not_finite, sum_of
from ..io.candidates import Candidates
from ..io.errors import TwaError
from ..io.lazy import Block
from ..io.loading import named_tensors
from ..io.mapped import TensorInfo
from ..modes import plain_weights
from ..spectral_norm import refresh_spectral_norms
from .ranks import Ranks
from .sharding import Sharding

P = ParamSpec("P")
T = TypeVar("T")


def checksums(sharding: Sharding) -> dict[str, int]:
    """A sum over the bits of each tensor, or of this rank's part of it, by name."""
    state, key_map = _state(sharding), sharding.key_map
    names = (*key_map.trained, *key_map.fixed, *key_map.copied)
    with torch.no_grad(), plain_weights(sharding.model):
        return {name: _sum_of_bits(local(state[name])) for name in names}


def _sum_of_bits(t: Tensor) -> int:
    """The sum of a tensor's elements taken for whole numbers."""
    t = torch.view_as_real(t) if t.is_complex() else t
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(t.contiguous().view(kinds[t.element_size()]).sum(dtype=torch.int64))


def write_counts(sharding: Sharding) -> list[int]:
    """How often each trained tensor, or this rank's part of it, was written to.

    PyTorch counts that; writes through `.data` it does not see.
    """
    if sharding.name != "columns":
        return [t._version for t in sharding.tensors]
    return [t._local_tensor._version if is_dtensor(t) else t._version for t in sharding.tensors]


def _on_plain_weights(
    function: Callable[Concatenate[Sharding, P], T],
) -> Callable[Concatenate[Sharding, P], T]:
    """The function, called while its model has plain weights."""

    @functools.wraps(function)
    def call(sharding: Sharding, *args: P.args, **options: P.kwargs) -> T:
        with plain_weights(sharding.model):
            return function(sharding, *args, **options)

    return call


def _state(sharding: Sharding) -> dict[str, Tensor]:
    """The model's own tensors by name, to read or to write."""
    reshard(sharding.model)
    return named_tensors(sharding.model)


def check_range(sharding: Sharding) -> None:
    """Checks that the model's weights, which were finite, are so in the dtypes of its parameters.

    Raises:
        TwaError: some have become Inf
    """
    for name, t in zip(sharding.key_map.trained, sharding.tensors, strict=True):
        check_written(name, local(t), local(t).numel())


def check_written(name: str, written: Tensor, finite: int) -> None:
    """Checks that values of an average are finite in the dtype that they were written in.

    Args:
        name: of the tensor
        written: the values there
        finite: how many were finite before

    Raises:
        TwaError: fewer are
    """
    if (lost := finite - int(torch.isfinite(written).sum())) > 0:
        raise TwaError(
            f"model: tensor {name!r}: {lost} of {written.numel()} values of the candidates' average"
            f" overflow {written.dtype}"
        )


@torch.no_grad()
def check_taken(sharding: Sharding) -> None:
    """Reads the model's state_dict back, where a hook makes what is in it.

    Raises:
        TwaError: it has another value than was written
    """
    written = sharding.key_map.written
    made = {
        key: t
        for key, t in loading.made_by_hooks(sharding.model).items()
        if not is_dtensor(t) and (key not in written or written[key].parts)
    }
    for key, t in exported_tensors(sharding) if made else ():
        if key in made and not torch.equal(made[key].to("cpu", t.dtype), t):
            raise TwaError(
                f"model: its state_dict() has another value of {key!r} than was written: what a"
                " hook makes when the model is saved must be what its own loading takes"
            )


@torch.no_grad()
@_on_plain_weights
def load_untrained(sharding: Sharding, weights: Tensor) -> None:
    """Loads what is not trained.

    Frozen parameters and float buffers get the candidates' weighted mean; where all weights are
    zero, as for a center at zero, their plain mean. Integer and bool buffers get the last
    candidate's values, or those of the one that has all the weight.

    Args:
        sharding: of the model
        weights: of the candidates (n,)

    Raises:
        CandidateError: a file has changed since it was opened, whatever was read of it
    """
    candidates, state = sharding.candidates, named_tensors(sharding.model)
    weights = weights if weights.any() else averages.uniform(len(candidates))
    used = torch.nonzero(weights).flatten().tolist()
    for name, key in sharding.key_map.fixed.items():
        every = candidates.tensors(key, part=sharding.part_of(name, state[name]))
        rows = [every[i] for i in used]
        dtype = torch.promote_types(rows[0].dtype, torch.float32)
        value, is_good = sum_of(rows, weights[used], dtype)  # a mask of -Inf stays
        if not is_good:
            raise not_finite([candidates[i] for i in used], key, rows)
        mine = local(state[name])
        mine.copy_(value)
        check_written(name, mine, int(torch.isfinite(value).sum()))
    single = torch.nonzero(weights == 1.0).flatten().tolist()
    at = single[0] if single else len(candidates) - 1
    for name, key in sharding.key_map.copied.items():
        part = sharding.part_of(name, state[name])
        local(state[name]).copy_(candidates.tensors(key, slice(at, at + 1), part)[0])
    candidates.check()


@torch.no_grad()
@_on_plain_weights
def load_merge(sharding: Sharding, beta: Tensor) -> None:
    """Loads sum_i beta[i] w_i exactly: without a basis and its quantisation, tensor by tensor.

    Args:
        sharding: of the model
        beta: merge weights (n,)

    Raises:
        CandidateError: the average is not finite
        TwaError: it is not in the dtype of a parameter
    """
    with sharding.ranks.fail_together("averaging the candidates"):
        reshard(sharding.model)
        for k, t in enumerate(sharding.tensors):
            key, mine, value = sharding.keys[k], local(t), sharding.average(k, beta)
            if not torch.isfinite(value).all():
                _check_shared(sharding, k, beta)
            mine.copy_(value)
            check_written(key, mine, int(torch.isfinite(value).sum()))
        load_untrained(sharding, beta)
        refresh_spectral_norms(sharding.model)


def _check_shared(sharding: Sharding, k: int, beta: Tensor) -> None:
    """CandidateError unless what is not finite in the average of a tensor is so in all candidates
    that have weight: the same Inf, which stays, such as -Inf in a mask.
    """
    every = sharding.candidates.tensors(sharding.keys[k], part=sharding.shards[k].part)
    used = torch.nonzero(beta).flatten().tolist()
    rows = [every[i] for i in used]
    _, is_good = sum_of(rows, beta[used], torch.promote_types(rows[0].dtype, torch.float32))
    if not is_good:
        raise not_finite([sharding.candidates[i] for i in used], sharding.keys[k], rows)


@torch.no_grad()
@_on_plain_weights
def round_to_files(sharding: Sharding) -> None:
    """Rounds the model's weights to the dtypes of the candidate files.

    So what is measured is what is exported.
    """
    state = _state(sharding)
    for name, key in (sharding.key_map.trained | sharding.key_map.fixed).items():
        dtype = sharding.candidates.info[key].dtype
        if dtype != state[name].dtype:
            mine = local(state[name])
            mine.copy_(mine.to(dtype))


def share_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Makes the buffers of rank 0 those of every rank: they are what a saved state holds."""
    with torch.no_grad(), plain_weights(model):
        for b in model.buffers():
            sent = ranks.broadcast_(b.reshape(-1).view(torch.uint8), 0)
            b.copy_(sent.view(b.dtype).view(b.shape))


def load_buffers(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Copies saved values, by name, into the model's buffers."""
    with torch.no_grad(), plain_weights(model):
        for name, b in model.named_buffers():
            b.copy_(saved[name])


# In and out, under the keys and in the dtypes of the candidate files -----------------------------


@torch.no_grad()
@_on_plain_weights
def snapshot(sharding: Sharding) -> dict[str, Tensor]:
    """A copy in CPU memory of this rank's part of every tensor."""
    state, names = _state(sharding), sharding.key_map.names
    return {
        key: local(state[names[key]]).to("cpu", info.dtype, copy=True)
        for key, info in sharding.candidates.info.items()
    }


@torch.no_grad()
@_on_plain_weights
def restore(sharding: Sharding, parts: dict[str, Tensor]) -> None:
    """Makes the model what `snapshot` or `parts_of` gave."""
    state, names = _state(sharding), sharding.key_map.names
    for key, part in parts.items():
        local(state[names[key]]).copy_(part)


@torch.no_grad()
def parts_of(sharding: Sharding, exported: Candidates | None) -> dict[str, Tensor]:
    """This rank's part of every tensor of an exported model, by key.

    Rank 0 reads the tensors and sends them to the others.

    Args:
        sharding: of the model
        exported: the model's file on rank 0; None on the others
    """
    state, parts = named_tensors(sharding.model), {}
    for key, info in sharding.candidates.info.items():
        whole = torch.empty(info.shape, dtype=info.dtype, device="cpu")
        if exported is not None:
            whole = exported[0].tensor(key).clone()
        sent = sharding.ranks.broadcast_(whole.reshape(-1).view(torch.uint8), 0)
        sent = sent.view(info.dtype).view(info.shape)
        name = sharding.key_map.names[key]
        part = sharding.part_of(name, state[name])
        parts[key] = sent if part is None else sent[part].clone()
    return parts


@torch.no_grad()
def whole_tensors(sharding: Sharding) -> Iterator[tuple[str, Tensor]]:
    """Every tensor whole, by key, one at a time: all ranks must read the iterator to its end.

    They must read it while the model has plain weights.
    """
    sharding.ranks.barrier()
    state, names = _state(sharding), sharding.key_map.names
    for key, info in sharding.candidates.info.items():
        t = state[names[key]]
        whole = t.full_tensor() if is_dtensor(t) else t.detach()
        written = whole.to("cpu", info.dtype, copy=True).contiguous()
        floats = info.dtype.is_floating_point and t.is_floating_point()
        if floats and torch.finfo(info.dtype).max < torch.finfo(t.dtype).max:
            lost = int(torch.isfinite(whole).sum()) - int(torch.isfinite(written).sum())
            if lost:
                warnings.warn(
                    f"tensor {key!r}: {lost} of {written.numel()} values overflow {info.dtype}, the"
                    " candidates' dtype",
                    stacklevel=2,
                )
        yield key, written


@torch.no_grad()
def exported_tensors(sharding: Sharding) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an export, as the candidate files have them; see `KeyMap.written`.

    All ranks must read the iterator to its end.
    """
    key_map = sharding.key_map
    wanted: dict[str, list[tuple[str, Block]]] = {}  # name -> (key in the files, part)
    for key, w in key_map.written.items():
        for name, block in w.parts:
            wanted.setdefault(name, []).append((key, block))
    begun: dict[str, Tensor] = {}
    left = {key: len(w.parts) for key, w in key_map.written.items()}
    for key, t in whole_tensors(sharding):
        if (name := key_map.names[key]) not in wanted:
            if key not in left:
                yield key, t
            continue
        for key_in_files, block in wanted[name]:
            if key_in_files not in begun:
                info = key_map.written[key_in_files].info
                begun[key_in_files] = torch.empty(info.shape, dtype=info.dtype, device="cpu")
            at = tuple(slice(b, b + s) for b, s in zip(block.begin, block.sizes, strict=True))
            begun[key_in_files].as_strided(block.sizes, block.strides, block.offset).copy_(t[at])
            left[key_in_files] -= 1
            if not left[key_in_files]:
                yield key_in_files, begun.pop(key_in_files)
    if any(not w.parts for w in key_map.written.values()):
        for key, t in loading.made_by_hooks(sharding.model).items():
            if key in key_map.written and not key_map.written[key].parts:
                whole = t.full_tensor() if is_dtensor(t) else t
                yield key, whole.to("cpu", key_map.written[key].info.dtype).contiguous()
    for key, value in sharding.candidates[0].extra.items():
        if isinstance(value, Tensor):
            yield key, value


def exported_info(sharding: Sharding) -> dict[str, TensorInfo]:
    """Shape and dtype of each tensor that `exported_tensors` gives."""
    found = sharding.key_map.written_info(sharding.candidates.info)
    for key, value in sharding.candidates[0].extra.items():
        if isinstance(value, Tensor):
            found[key] = TensorInfo(tuple(value.shape), value.dtype)
    return found


@torch.no_grad()
def sharded_tensors(sharding: Sharding) -> dict[str, Tensor]:
    """Every tensor as it lies on the ranks, for torch.distributed.checkpoint.

    To be called and used while the model has plain weights.
    """
    state, names = _state(sharding), sharding.key_map.names
    return {
        key: state[names[key]].detach().to(info.dtype)
        for key, info in sharding.candidates.info.items()
    }
