"""The result of Hugging Face candidates: a directory for from_pretrained, a recipe for mergekit.

Needs neither transformers nor peft.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.atomic import replace_folder, write_text
from ..io.candidate import Candidate
from ..io.checks import is_inside
from ..io.mapped import TensorInfo
from ..io.peft import ADAPTER_CONFIG, is_adapter
from .mergekit import mergekit_recipe
from .small_files import CONFIG, INDEX, differences, small_files, with_dtype

if TYPE_CHECKING:
    from ..distributed.sharding import Sharding

#: the result in the output directory, and how to make it with mergekit
OUTPUTS = FOLDER, RECIPE = ("averaged", "mergekit.yaml")
MODEL_WEIGHTS, ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"


def source_folder(candidate: Candidate) -> Path | None:
    """The directory, as save_pretrained writes it, that a candidate is.

    The candidate is given by the directory or by its file of weights; it is a model or an adapter.

    Returns:
        None for any other candidate
    """
    path, adapter = candidate.path, is_adapter(candidate)
    if not (adapter or candidate.is_pretrained):
        return None
    folder = path if path.is_dir() else path.parent
    config = folder / (ADAPTER_CONFIG if adapter else CONFIG)
    return folder if is_inside(config, folder) else None


def write_beside(out: Path, sharding: Sharding, coefficients: Mapping[str, object]) -> list[str]:
    """Writes what goes beside `out`/averaged.safetensors; the first rank calls it.

    It is for candidates that are directories as save_pretrained writes them: `write_folder`, and
    `write_recipe` unless segments are smaller than tensors.

    Returns:
        what is written, for messages
    """
    candidates, key_map = sharding.candidates, sharding.key_map
    if not candidates.at_hand:
        return []
    dtype = common_dtype(candidates.info)
    written = write_folder(out, candidates, out / "averaged.safetensors", dtype)
    # mergekit has one weight for a tensor, which it knows by its name in the files
    split = any(len({name for name, _ in w.parts}) != 1 for w in key_map.written.values())
    if not split and not coefficients.get("chunk"):
        in_files = {key: name for key, name in key_map.names.items() if key != name}
        in_files |= {key: w.parts[0][0] for key, w in key_map.written.items()}
        aliases = key_map.aliases | in_files
        options = {"aliases": aliases, "untrained": key_map.fixed, "out_dtype": dtype}
        written += write_recipe(out, candidates, coefficients, **options)
    return written


def write_folder(
    out: Path, candidates: Sequence[Candidate], weights: Path, dtype: str | None
) -> list[str]:
    """Writes `out`/averaged/, for from_pretrained, if the last candidate is such a directory.

    It may be a model or a PEFT adapter. A warning names files that decide what weights mean and
    that differ between candidates.

    Args:
        out: the output directory
        candidates: that are averaged
        weights: file of the average
        dtype: its dtype, for config.json, such as "bfloat16"; None: config.json stays as it is

    Returns:
        what is written, for messages
    """
    folders = [source_folder(c) for c in candidates]
    if (last := folders[-1]) is None:
        return []
    name = ADAPTER_WEIGHTS if is_adapter(candidates[-1]) else MODEL_WEIGHTS
    copied = write_model_folder(out / FOLDER, last, weights, name, dtype)
    if differ := differences([folder for folder in folders if folder is not None], copied):
        warnings.warn(
            f"the candidates differ in {', '.join(differ)}: do their weights mean the same?"
            f" {FOLDER}/ has the last candidate's",
            stacklevel=2,
        )
    return [f"{FOLDER}/"]


def write_recipe(
    out: Path, candidates: Sequence[Candidate], coefficients: Mapping[str, object], **options: Any
) -> list[str]:
    """Writes `out`/mergekit.yaml, if all candidates are directories of models.

    A warning says so if it is not written since mergekit would read other files of a directory.

    Args:
        out: the output directory
        candidates: that are averaged
        coefficients: as for `mergekit_recipe`
        options: of `mergekit_recipe`

    Returns:
        what is written, for messages
    """
    sources = [folder for c in candidates if (folder := source_folder(c)) is not None]
    if len(sources) < len(candidates) or is_adapter(candidates[-1]):
        return []
    if odd := [c for c in candidates if not _is_read_by_mergekit(c)]:
        warnings.warn(
            f"{RECIPE} is not written: in {odd[0].path} mergekit would read other files than"
            f" {odd[0].files[0].name}; remove the old ones",
            stacklevel=2,
        )
        return []
    write_text(out / RECIPE, mergekit_recipe(coefficients, sources, **options))
    return [RECIPE]


def common_dtype(info: Mapping[str, TensorInfo]) -> str | None:
    """The dtype of all floating-point tensors, such as "bfloat16"; None if they differ."""
    dtypes = {i.dtype for i in info.values() if i.dtype.is_floating_point}
    return str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else None


def _is_read_by_mergekit(candidate: Candidate) -> bool:
    """Whether mergekit reads the files that were averaged: it looks for an index first."""
    folder, read = source_folder(candidate), candidate.files[0]
    for name in (MODEL_WEIGHTS, "pytorch_model.bin"):
        for file in (f"{name}{INDEX}", name):
            if folder is not None and (folder / file).exists():
                return read.name == file
    return False


def write_model_folder(
    folder: Path,
    source: Path,
    weights: Path,
    name: str = MODEL_WEIGHTS,
    dtype: str | None = None,
) -> list[Path]:
    """Writes a directory that from_pretrained loads.

    It appears whole, in the place of an older one. Small files are those of `small_files`; a
    warning names what is left out and may be missed.

    Args:
        folder: the directory
        source: directory whose small files are copied: configuration, tokenizer
        weights: file of the weights; a hard link to it is made where links are possible
        name: of the weights in the directory
        dtype: of the weights, for config.json, such as "bfloat16"; None: it stays as it is

    Returns:
        paths of the small files
    """
    found = small_files(source, but=(folder, folder.parent))
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _link(weights, temporary / name)
        if name == MODEL_WEIGHTS:  # of an adapter beside the model, which is not averaged
            found.copied = [path for path in found.copied if path.name != ADAPTER_CONFIG]
        for path in found.copied:
            (temporary / path.parent).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, temporary / path)
        if dtype is not None and (config := temporary / CONFIG).is_file():
            config.write_bytes(with_dtype(config.read_bytes(), dtype))
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if found.left_out:
        warnings.warn(
            f"{source}: not copied beside the average, which may be incomplete without:"
            f" {found.missed()}",
            stacklevel=2,
        )
    return found.copied


def _link(target: Path, link: Path) -> None:
    """A hard link, or a copy."""
    try:
        os.link(target, link)
    except OSError:  # a file system without hard links
        shutil.copyfile(target, link)
