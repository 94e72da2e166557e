"""A model's weights, whichever part of it this rank holds: merged exactly from candidates, rounded
as files store them, kept, exported.
"""

from __future__ import annotations

import errno
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .. import averages as schemes
from ..io.atomic import replace_folder, write_stream
from ..io.candidates import Candidate, CandidateError, Candidates, average_into
from ..spectral_norm import refresh_spectral_norms
from .ranks import World
from .sharding import Placement, local, reshard


def not_finite(candidates: Sequence[Candidate], name: str, rows: list[Tensor]) -> CandidateError:
    """The error that says which file holds the NaN or Inf of this tensor."""
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


def _state(placement: Placement) -> dict[str, Tensor]:
    """The model's own tensors, to read or to write."""
    reshard(placement.model)
    return placement.model.state_dict(keep_vars=True)


def check_range(placement: Placement) -> None:
    """ValueError if finite weights have become Inf in the dtype of the model's parameter."""
    for name, t in zip(placement.layout.trained, placement.tensors, strict=True):
        _check_range(name, local(t), local(t).numel())


def _check_range(name: str, written: Tensor, finite: int) -> None:
    if (lost := finite - int(torch.isfinite(written).sum())) > 0:
        raise ValueError(
            f"model: tensor {name!r}: {lost} of {written.numel()} values of the candidates' average"
            f" overflow {written.dtype}"
        )


@torch.no_grad()
def load_untrained(placement: Placement, weights: Tensor) -> None:
    """Frozen parameters and float buffers: the candidates' weighted mean (zero weights, those of a
    center at zero: their mean); integer and bool buffers: the last candidate's, or those of the one
    that has all the weight."""
    candidates, state = placement.candidates, placement.model.state_dict(keep_vars=True)
    weights = weights if weights.any() else schemes.uniform(len(candidates))
    for name, key in placement.layout.fixed.items():
        rows = candidates.tensors(key, part=placement.part_of(name, state[name]))
        if all(torch.equal(rows[0], r) for r in rows[1:]):  # a mask of -Inf stays, too
            value, bad = rows[0], torch.isnan(rows[0])
        else:
            value = average_into(
                torch.empty(rows[0].shape, dtype=torch.promote_types(rows[0].dtype, torch.float32)),
                rows,
                weights,
            )
            bad = ~torch.isfinite(value)
        if bad.any():
            raise not_finite(candidates, key, rows)
        mine = local(state[name])
        mine.copy_(value)
        _check_range(name, mine, int(torch.isfinite(value).sum()))
    single = torch.nonzero(weights == 1.0).flatten().tolist()
    at = single[0] if single else len(candidates) - 1
    for name, key in placement.layout.copied.items():
        local(state[name]).copy_(
            candidates.tensors(
                key, rows=slice(at, at + 1), part=placement.part_of(name, state[name])
            )[0]
        )


@torch.no_grad()
def load_merge(placement: Placement, beta: Tensor) -> None:
    """model = sum_i beta[i] w_i, exactly (no basis, no quantisation), streamed tensor by tensor."""
    with placement.world.together("averaging the candidates"):
        reshard(placement.model)
        for k, t in enumerate(placement.tensors):
            local(t).copy_(placement.average(k, beta))
        load_untrained(placement, beta)
        refresh_spectral_norms(placement.model)


@torch.no_grad()
def round_to_files(placement: Placement) -> None:
    """Rounds the model's weights to the dtypes of the candidate files, so that what is measured is
    what is exported.
    """
    state = _state(placement)
    for name, key in (placement.layout.trained | placement.layout.fixed).items():
        dtype = placement.candidates.info[key].dtype
        if dtype != state[name].dtype:
            mine = local(state[name])
            mine.copy_(mine.to(dtype))


def share_buffers(model: nn.Module, world: World) -> None:
    """The first rank's, on every rank: what the saved state holds."""
    with torch.no_grad():
        for b in model.buffers():
            b.copy_(
                world.broadcast_(b.reshape(-1).view(torch.uint8), 0).view(b.dtype).view(b.shape)
            )


def load_buffers(model: nn.Module, saved: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, b in model.named_buffers():
            b.copy_(saved[name])


# In and out, under the keys and in the dtypes of the candidate files
# -------------------------------------------------------------------------------------------------


@torch.no_grad()
def kept(placement: Placement) -> dict[str, Tensor]:
    """A copy in CPU memory of this rank's part of every tensor."""
    state, names = _state(placement), placement.layout.names
    return {
        key: local(state[names[key]]).to("cpu", info.dtype, copy=True)
        for key, info in placement.candidates.info.items()
    }


@torch.no_grad()
def put_back(placement: Placement, parts: dict[str, Tensor]) -> None:
    """The model as `kept` or `parts_of` gave it."""
    state, names = _state(placement), placement.layout.names
    for key, part in parts.items():
        local(state[names[key]]).copy_(part)


@torch.no_grad()
def parts_of(placement: Placement, exported: Candidates | None) -> dict[str, Tensor]:
    """This rank's part of every tensor of an exported model, which the first rank reads and sends;
    None on the others.
    """
    state, parts = placement.model.state_dict(keep_vars=True), {}
    for key, info in placement.candidates.info.items():
        whole = (
            exported[0].tensor(key).clone()
            if exported is not None
            else torch.empty(info.shape, dtype=info.dtype)
        )
        sent = (
            placement.world.broadcast_(whole.reshape(-1).view(torch.uint8), 0)
            .view(info.dtype)
            .view(info.shape)
        )
        name = placement.layout.names[key]
        part = placement.part_of(name, state[name])
        parts[key] = sent if part is None else sent[part].clone()
    return parts


@torch.no_grad()
def export(placement: Placement) -> Iterator[tuple[str, Tensor]]:
    """Every tensor whole, one at a time, on every rank: all ranks must read it to its end."""
    placement.world.meet()
    state, names = _state(placement), placement.layout.names
    for key, info in placement.candidates.info.items():
        t = state[names[key]]
        whole = t.full_tensor() if isinstance(t, DTensor) else t.detach()
        written = whole.to("cpu", info.dtype, copy=True).contiguous()
        narrower = (
            info.dtype.is_floating_point and torch.finfo(info.dtype).max < torch.finfo(t.dtype).max
        )
        if narrower and (
            lost := int(torch.isfinite(whole).sum()) - int(torch.isfinite(written).sum())
        ):
            warnings.warn(
                f"tensor {key!r}: {lost} of {written.numel()} values overflow {info.dtype}, the"
                " candidates' dtype",
                stacklevel=2,
            )
        yield key, written


@torch.no_grad()
def sharded(placement: Placement) -> dict[str, Tensor]:
    """Every tensor as it lies on the ranks, for torch.distributed.checkpoint."""
    state, names = _state(placement), placement.layout.names
    return {
        key: state[names[key]].detach().to(info.dtype)
        for key, info in placement.candidates.info.items()
    }


def write_export(path: Path, placement: Placement) -> None:
    """A safetensors file of the whole model, written by the first rank, one tensor in memory at a
    time; all ranks call it.
    """
    info = {key: (i.dtype, i.shape) for key, i in placement.candidates.info.items()}
    write_stream(path if placement.world.is_writer else None, info, export(placement))


def write_dcp(folder: Path, placement: Placement) -> None:
    """A torch.distributed.checkpoint directory; every rank writes its own shards.

    It replaces an older one when it is complete.
    """
    import torch.distributed.checkpoint as dcp

    temporary = folder.with_name(f".{folder.name}.tmp")
    world = placement.world
    if world.is_writer:
        shutil.rmtree(temporary, ignore_errors=True)
    world.gather(None)  # not before the old one is gone
    try:
        dcp.save(
            sharded(placement),
            checkpoint_id=str(temporary),
            process_group=world.group,
            no_dist=world.group is None,
        )
    except dcp.CheckpointException as error:  # no Exception, and without the file's name
        first = next(iter(error.failures.values()))[0]
        raise OSError(
            getattr(first, "errno", None) or errno.EIO,
            getattr(first, "strerror", None) or str(first),
            str(folder),
        ) from error
    if world.is_writer:
        replace_folder(temporary, folder)
