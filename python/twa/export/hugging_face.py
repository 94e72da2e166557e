"""The result of Hugging Face candidates: a directory for from_pretrained, a recipe for mergekit.

Needs neither transformers nor peft.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from ..io.atomic import replace_folder, write_text
from ..io.candidate import Candidate
from ..io.candidates import Candidates
from ..io.checks import is_inside
from ..io.formats import INDEX, MODEL_FILES
from ..io.peft import ADAPTER_CONFIG, is_adapter
from .mergekit import mergekit_recipe

if TYPE_CHECKING:
    from ..distributed.sharding import Sharding

#: the result in the output directory, and how to make it with mergekit
OUTPUTS = FOLDER, RECIPE = ("averaged", "mergekit.yaml")
CONFIG = "config.json"
MODEL_WEIGHTS, ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"
#: what is copied beside the weights: configuration and tokenizer, never weights or code
SMALL_SUFFIXES = (".json", ".txt", ".model", ".jinja")
SMALL_BYTES = 64 << 20
#: of the training run that made a candidate, not of the model
NOT_OF_THE_MODEL = (
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
)


def source_folder(candidate: Candidate) -> Path | None:
    """The directory, as save_pretrained writes it, that a candidate is.

    The candidate is given by the directory or by its file of weights; it is a model or an adapter.

    Returns:
        None for any other candidate
    """
    path, adapter = candidate.path, is_adapter(candidate)
    if not (adapter or candidate.kind == "huggingface" or path.name in MODEL_FILES):
        return None
    folder = path if path.is_dir() else path.parent
    config = folder / (ADAPTER_CONFIG if adapter else CONFIG)
    return folder if is_inside(config, folder) else None


def write_beside(out: Path, sharding: Sharding, coefficients: Mapping[str, object]) -> list[str]:
    """Writes what goes beside `out`/averaged.safetensors; the first rank calls it.

    It is for candidates that are directories as save_pretrained writes them, models or PEFT
    adapters: averaged/, for from_pretrained. Of models also mergekit.yaml, unless segments are
    smaller than tensors.

    Returns:
        what is written, for messages
    """
    if not sharding.candidates.at_hand:
        return []
    folders = [source_folder(c) for c in sharding.candidates]
    sources = [folder for folder in folders if folder is not None]
    adapter = is_adapter(sharding.candidates[-1])
    written = []
    if (last := folders[-1]) is not None:
        name = ADAPTER_WEIGHTS if adapter else MODEL_WEIGHTS
        write_model_folder(out / FOLDER, last, out / "averaged.safetensors", name)
        written.append(f"{FOLDER}/")
    # mergekit has one weight for a tensor
    if len(sources) == len(folders) and not adapter and not coefficients.get("chunk"):
        key_map = sharding.key_map
        text = mergekit_recipe(
            coefficients,
            sources,
            aliases=key_map.aliases,
            untrained=key_map.fixed,
            out_dtype=_common_dtype(sharding.candidates),
        )
        write_text(out / RECIPE, text)
        written.append(RECIPE)
    return written


def _common_dtype(candidates: Candidates) -> str | None:
    """The dtype of all floating-point tensors, such as "bfloat16"; None if they differ."""
    dtypes = {info.dtype for info in candidates.info.values() if info.dtype.is_floating_point}
    return str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else None


def write_model_folder(
    folder: Path, source: Path, weights: Path, name: str = MODEL_WEIGHTS
) -> None:
    """Writes a directory that from_pretrained loads.

    It appears whole, in the place of an older one. A small file is not copied if it is a link that
    leads out of `source`, or larger than 64 MB: a warning says so.

    Args:
        folder: the directory
        source: directory whose small files are copied: configuration, tokenizer
        weights: file of the weights; a hard link to it is made where links are possible
        name: of the weights in the directory
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _link(weights, temporary / name)
        for file in sorted(source.iterdir()):
            if _is_small_file(file, source):
                shutil.copyfile(file, temporary / file.name)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_small_file(file: Path, source: Path) -> bool:
    """Whether a file of a model's directory is to be copied beside the weights."""
    if file.suffix not in SMALL_SUFFIXES or file.is_dir():
        return False
    if fnmatch(file.name, INDEX) or file.name in NOT_OF_THE_MODEL:
        return False
    if not is_inside(file, source):
        why = "no regular file of this directory"
    elif file.stat().st_size > SMALL_BYTES:
        why = f"larger than {SMALL_BYTES} bytes"
    else:
        return True
    warnings.warn(f"{file}: not copied beside the average: {why}", stacklevel=2)
    return False


def _link(target: Path, link: Path) -> None:
    """A hard link, or a copy."""
    try:
        os.link(target, link)
    except OSError:  # a file system without hard links
        shutil.copyfile(target, link)
