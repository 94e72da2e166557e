"""The model's weights as files, whichever part of them each rank holds. All ranks call these."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from ..distributed.sharding import Sharding
from ..distributed.weights import (
    exported_info,
    exported_tensors,
    sharded_tensors,
    whole_tensors,
)
from ..io.atomic import replace_folder
from ..io.safetensors import write_stream
from ..modes import plain_weights


def write_export(path: Path, sharding: Sharding) -> None:
    """Writes a safetensors file of the whole model as the candidate files have it.

    All ranks call it, the first writes. One tensor is in memory at a time, but for those that the
    model has packed out of several in the files.
    """
    here = path if sharding.ranks.is_rank_zero else None
    with plain_weights(sharding.model):
        write_stream(here, exported_info(sharding), exported_tensors(sharding))


def write_model(path: Path, sharding: Sharding) -> None:
    """Writes a safetensors file of the model's own tensors, for `parts_of`; ranks as above."""
    here = path if sharding.ranks.is_rank_zero else None
    with plain_weights(sharding.model):
        write_stream(here, sharding.candidates.info, whole_tensors(sharding))


def write_dcp(folder: Path, sharding: Sharding) -> None:
    """Writes a torch.distributed.checkpoint directory; every rank writes its own shards.

    It replaces an older one when it is complete.
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
                sharded_tensors(sharding),
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
