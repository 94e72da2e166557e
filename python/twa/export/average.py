"""A fixed average of candidates as files, streamed: without a model, and without a task."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from ..io import versions
from ..io.atomic import replace, write_json
from ..io.averaging import FixedAverage
from ..io.compare import without_tensors
from ..io.errors import CandidateWarning, TwaError
from ..io.safetensors import DTYPE_NAMES, write_blocks
from . import hugging_face
from .bundle import WEIGHTS, remove_others
from .mergekit import HEADER

MERGE = "merge.json"
#: all that may be written
FILES = (WEIGHTS, MERGE, *hugging_face.OUTPUTS)

Progress = Callable[[int], object]


def write_fixed(path: Path, fixed: FixedAverage, progress: Progress | None = None) -> None:
    """Writes a fixed average as a safetensors file, without holding it.

    In memory are a block of columns of the candidates, and that of their average, however large a
    tensor is. The file appears whole or not at all.

    Args:
        path: the file
        fixed: the average
        progress: called with the number of bytes that were read since its last call

    Raises:
        CandidateError, TwaError: as `FixedAverage.blocks` does

    Warns:
        CandidateWarning: extra state of modules is no tensor, and left out
    """
    for key, info in fixed.info.items():
        if info.dtype not in DTYPE_NAMES:
            raise TwaError(f"tensor {key!r}: safetensors files have no {info.dtype}", path)
    try:
        replace(path, lambda p: write_blocks(p, fixed.info, _telling(fixed, progress)))
    except OSError:  # of reading: the system refuses to write bytes that are gone
        fixed.candidates.check()
        raise
    if text := without_tensors(fixed.used[-1].extra):
        warnings.warn(f"{path}: {text}", CandidateWarning, stacklevel=2)


def _telling(fixed: FixedAverage, progress: Progress | None) -> Iterator[tuple[str, Tensor]]:
    """The blocks of an average, while `progress` is told how many bytes are read for them."""
    told = fixed.candidates.bytes_read
    for block in fixed.blocks():
        yield block
        if progress is not None:
            progress(fixed.candidates.bytes_read - told)
            told = fixed.candidates.bytes_read


def write_merge(
    folder: Path, fixed: FixedAverage, scheme: str, progress: Progress | None = None
) -> list[str]:
    """Writes a fixed average, how it was made, and what suits Hugging Face candidates.

    Each file appears whole. What is there of an average of other candidates is removed.

    Args:
        folder: where they go; it exists
        fixed: the average
        scheme: what its weights are, for merge.json
        progress: as for `write_fixed`

    Returns:
        what is written, for messages
    """
    had_result = (folder / MERGE).exists()
    write_fixed(folder / WEIGHTS, fixed, progress)
    dtype = hugging_face.common_dtype(fixed.info)
    written = hugging_face.write_folder(folder, fixed.used, folder / WEIGHTS, dtype)
    if len(fixed.used) > 1:
        weights = fixed.weights[fixed.weights != 0.0]
        recipe = {"beta": weights[:, None].tolist(), "segments": ["model"]}
        options = {"out_dtype": dtype, "header": HEADER.format(MERGE)}
        written += hugging_face.write_recipe(folder, fixed.used, recipe, **options)
    if had_result:
        remove_others(folder, written, fixed.candidates)
    description = {
        "format": versions.MERGE,
        "scheme": scheme,
        "candidates": [str(c.path) for c in fixed.candidates],
        "names": fixed.candidates.names,
        "weights": fixed.weights.tolist(),
    }
    write_json(folder / MERGE, description)
    return [WEIGHTS, *written, MERGE]
