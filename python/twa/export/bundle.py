"""What a result is in files: one writer for `Subspace.save` and `twa average`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..distributed.sharding import Sharding
from ..io.atomic import remove, write_json
from ..io.candidate import Candidate
from ..io.compare import without_tensors
from . import hugging_face
from .weights import check_export, write_dcp, write_export

WEIGHTS, DCP, COEFFICIENTS = "averaged.safetensors", "averaged_dcp", "coefficients.json"
#: all that may be written
FILES = (WEIGHTS, DCP, COEFFICIENTS, *hugging_face.OUTPUTS)


def write_bundle(
    folder: Path, sharding: Sharding, coefficients: Mapping[str, object], *, dcp: bool = False
) -> list[str]:
    """The model as it is now, its coefficients, and what suits Hugging Face candidates.

    All ranks call it, the first writes; each file appears whole.

    What an earlier result has left there in other forms, such as averaged/, is removed.

    Args:
        folder: where they go; made if it is not there
        sharding: the model
        coefficients: what coefficients.json is to hold
        dcp: also a torch.distributed.checkpoint, to which each rank writes what it holds

    Returns:
        what is written, for messages; nothing on other ranks than the first
    """
    had_result = (folder / COEFFICIENTS).exists()
    if sharding.ranks.is_rank_zero:
        folder.mkdir(parents=True, exist_ok=True)
    sharding.ranks.barrier()
    write_export(folder / WEIGHTS, sharding)  # first: no fault elsewhere may cost a model
    if dcp:
        write_dcp(folder / DCP, sharding)
    if not sharding.ranks.is_rank_zero:
        return []
    check_export(folder / WEIGHTS, sharding)
    write_json(folder / COEFFICIENTS, coefficients)
    if text := without_tensors(sharding.candidates[0].extra):
        warnings.warn(f"{folder / WEIGHTS}: {text}", stacklevel=2)
    beside = hugging_face.write_beside(folder, sharding, coefficients)
    written = [WEIGHTS, *([f"{DCP}/"] if dcp else []), *beside, COEFFICIENTS]
    if had_result:
        remove_others(folder, written, sharding.candidates)
    return written


def remove_others(folder: Path, written: Sequence[str], candidates: Sequence[Candidate]) -> None:
    """Removes what an earlier result has left of its weights in other forms than those written.

    For a directory that had a result: elsewhere such names are the user's own. A directory in which
    a candidate lies stays.
    """
    used = {p for c in candidates for file in c.files for p in Path(os.path.realpath(file)).parents}
    for name in (DCP, *hugging_face.OUTPUTS):
        is_used = Path(os.path.realpath(folder / name)) in used
        if name not in {w.rstrip("/") for w in written} and not is_used:
            remove(folder / name)
