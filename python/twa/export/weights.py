"""The model's weights as files, whichever part of them each rank holds. All ranks call these."""

from __future__ import annotations

import errno
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..distributed.sharding import Sharding
from ..distributed.weights import (
    exported_info,
    exported_tensors,
    sharded_tensors,
    whole_tensors,
)
from ..dtensors import is_sharded
from ..io.atomic import replace_folder
from ..io.checks import first_line
from ..io.errors import CandidateWarning
from ..io.lazy import located
from ..io.loading import Content, load, load_key, named_tensors
from ..io.mapped import Source
from ..io.safetensors import read_safetensors, write_stream
from ..modes import plain_weights


def write_export(path: Path, sharding: Sharding) -> None:
    """Writes a safetensors file of the whole model as the candidate files have it.

    All ranks call it, the first writes. One tensor is in memory at a time, but for those that the
    model has packed out of several in the files.
    """
    here = path if sharding.ranks.is_rank_zero else None
    with plain_weights(sharding.model):
        write_stream(here, exported_info(sharding), exported_tensors(sharding))


def check_export(path: Path, sharding: Sharding) -> None:
    """Warns if a file that `write_export` has written loads as another model; the first rank calls.

    Files have no versions of modules, and a hook may change a tensor each time it is loaded. Most
    models are known to be free of that: see `KeyMap.checked`.
    """
    if sharding.key_map.checked or is_sharded(sharding.model):
        return
    written = {
        load_key(sharding.model, key)[0]: source for key, source in read_safetensors(path).items()
    }
    with plain_weights(sharding.model):
        try:
            found = load(sharding.model, Content(written), tentative=True).values
        except Exception as error:
            found, odd = {}, [first_line(error)]
        else:
            tensors = named_tensors(sharding.model)
            odd = [name for name, t in found.items() if not _same(t, tensors[name], written)]
    if odd:
        warnings.warn(
            f"{path}: loaded again, {odd[0]!r} ({len(odd)} in all) is another tensor than in the"
            " model: the model's own loading changes it, perhaps since such files have no versions"
            " of modules. Save model.state_dict() with torch.save instead",
            CandidateWarning,
            stacklevel=2,
        )


def _same(loaded: Tensor, t: Tensor, written: Mapping[str, Source]) -> bool:
    """Whether what loading makes of a file is a tensor of the model, as the file rounds it."""
    value = located(loaded, written).read()
    mine = t.detach().cpu()
    if not value.is_floating_point():
        return torch.equal(value.to(mine.dtype), mine)
    eps = max(torch.finfo(dtype).eps for dtype in (value.dtype, mine.dtype))
    return torch.allclose(value.double(), mine.double(), rtol=4 * eps, atol=1e-12, equal_nan=True)


def write_model(path: Path, sharding: Sharding) -> None:
    """Writes a safetensors file of the model's own tensors, for `parts_of`; ranks as above."""
    here = path if sharding.ranks.is_rank_zero else None
    with plain_weights(sharding.model):
        write_stream(here, sharding.candidates.info, whole_tensors(sharding))


def _nest_of(sharding: Sharding) -> tuple[str, ...]:
    """The keys that lead to the weights in candidates of torch.distributed.checkpoint."""
    first = sharding.candidates[0]
    return first.nest if first.kind == "dcp" else ()


def _nested(tensors: Mapping[str, Tensor], nest: Sequence[str]) -> dict[str, object]:
    """Tensors inside dicts, to which these keys lead."""
    inner: dict[str, object] = dict(tensors)
    for key in reversed(nest):
        inner = {key: inner}
    return inner


def write_dcp(folder: Path, sharding: Sharding) -> None:
    """Writes a torch.distributed.checkpoint directory; every rank writes its own shards.

    Its tensors are where those of such candidates are, under "model" for example. It replaces an
    older one when it is complete.
    """
    import torch.distributed.checkpoint as dcp

    temporary = folder.with_name(f".{folder.name}.tmp")
    ranks = sharding.ranks
    if ranks.is_rank_zero:
        shutil.rmtree(temporary, ignore_errors=True)
    ranks.barrier()  # not before the old one is gone
    try:
        with plain_weights(sharding.model):
            dcp.save(
                _nested(sharded_tensors(sharding), _nest_of(sharding)),
                checkpoint_id=str(temporary),
                process_group=ranks.group,
                no_dist=ranks.group is None,
            )
    except dcp.CheckpointException as error:  # no Exception, and without the file's name
        first = next(iter(error.failures.values()))[0]
        raise OSError(
            getattr(first, "errno", None) or errno.EIO,
            getattr(first, "strerror", None) or str(first),
            str(folder),
        ) from error
    if ranks.is_rank_zero:
        replace_folder(temporary, folder)
