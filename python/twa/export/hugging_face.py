"""Hugging Face in and out: which tensor of a PeftModel is which key of its adapter's files, and the
result as a directory that from_pretrained loads.

Needs neither transformers nor peft: the latter is looked up where the model has brought it.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..io.atomic import replace_folder, write_text
from ..io.candidates import Candidate, CandidateError, Candidates
from ..io.formats import ADAPTER_FILES, MODEL_FILES, read_json
from .mergekit import mergekit_recipe

if TYPE_CHECKING:
    from ..distributed.sharding import Placement

#: the result in the output directory, and how to make it with mergekit
OUTPUTS = FOLDER, RECIPE = ("averaged", "mergekit.yaml")
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
MODEL_WEIGHTS, ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"
INDEX = ".index.json"
#: what is copied beside the weights: configuration and tokenizer, never weights or code
SMALL_SUFFIXES, SMALL_BYTES = (".json", ".txt", ".model", ".jinja"), 64 << 20
#: of the training run that made a candidate, not of the model
NOT_OF_THE_MODEL = (
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
)
#: fields of adapter_config.json that may differ between adapters that are averaged: where things
#: lie, and what only training uses
FREE = {
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "inference_mode",
    "peft_version",
    "lora_dropout",
}
#: fields that need not be those of the task's model: the names and shapes of its tensors say as
#: much
SEEN_IN_TENSORS = {
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "task_type",
    "init_lora_weights",
}


def is_adapter(candidate: Candidate) -> bool:
    """Whether a candidate is a PEFT adapter: its directory, or its file of weights."""
    return candidate.kind == "adapter" or candidate.path.name in ADAPTER_FILES


def source_folder(candidate: Candidate) -> Path | None:
    """The model or adapter directory, as save_pretrained writes it, that a candidate is: given
    itself or by its file of weights; else None.
    """
    path, adapter = candidate.path, is_adapter(candidate)
    if not (adapter or candidate.kind == "huggingface" or path.name in MODEL_FILES):
        return None
    folder = path if path.is_dir() else path.parent
    return folder if _inside(folder / (ADAPTER_CONFIG if adapter else CONFIG), folder) else None


def _inside(file: Path, folder: Path) -> bool:
    """Whether this is a regular file of the folder: no link that leads out of it, but to the blobs
    of its own Hugging Face cache.
    """
    real, own = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    blobs = own.parent.parent / "blobs" if own.parent.name == "snapshots" else own
    return real.is_file() and real.parent in (own, blobs)


# In: PEFT adapters -------------------------------------------------------------------------------


def adapter_names(
    model: nn.Module, state: Mapping[str, object], candidates: Candidates
) -> dict[str, str] | None:
    """For candidates that are PEFT adapters: key in their files -> name in the PeftModel's `state`
    (its state_dict with keep_vars). None for others.

    Raises CandidateError if the adapters' configurations differ from each other or from the
    model's, ValueError if the model is no PeftModel with one active adapter, or would change
    statistics that adapter files do not hold.
    """
    if not is_adapter(candidates[0]):
        return None
    peft = sys.modules.get("peft")  # whoever made a PeftModel has imported it
    if peft is None or not isinstance(model, peft.PeftModel):
        raise ValueError(
            f"the candidates are PEFT adapters ({candidates[0].path}): expected the model to be a"
            f" peft.PeftModel, found {type(model).__name__}"
        )
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"model: expected one active adapter, found {active}")
    config = model.peft_config[active[0]]
    check_configs(
        candidates,
        config.to_dict(),
        {
            f.name: f.default
            for f in dataclasses.fields(config)
            if f.default is not dataclasses.MISSING
        },
    )
    first_name: dict[int, str] = {}
    for name, t in state.items():
        first_name.setdefault(id(t), name)
    # files hold the embeddings where fine-tuning resized or trained them
    for embeddings in (False, True):
        found = peft.get_peft_model_state_dict(
            model, state_dict=dict(state), adapter_name=active[0], save_embedding_layers=embeddings
        )
        names = {key: first_name[id(t)] for key, t in found.items() if id(t) in first_name}
        if candidates.info.keys() <= names.keys():
            break
    _check_statistics(model, set(names.values()))
    return names


def _check_statistics(model: nn.Module, exported: set[str]) -> None:
    for name, module in model.named_modules():
        for buffer in ("running_mean", "running_var"):
            if (
                isinstance(getattr(module, buffer, None), Tensor)
                and f"{name}.{buffer}" not in exported
            ):
                raise ValueError(
                    f"model: {name}.{buffer} changes in training, but the adapters' files do not"
                    " hold it: expected the layer among modules_to_save"
                )


def adapter_config(folder: Path) -> dict[str, object]:
    """adapter_config.json of an adapter's directory; CandidateError if it is missing, too large or
    no JSON object.
    """
    path = folder / ADAPTER_CONFIG
    if not _inside(path, folder):
        raise CandidateError(
            f"{path}: expected the adapter's configuration, a file in its directory"
        )
    config = read_json(path)
    if not isinstance(config, dict):
        raise CandidateError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def check_configs(
    candidates: Candidates, of_model: Mapping[str, object], defaults: Mapping[str, object]
) -> None:
    """CandidateError unless the adapters' configurations agree with each other and with the
    model's: averaged factors mean something only with the same rank, scale and places. defaults: of
    fields that a file lacks, since versions of peft write different ones."""
    folders = [c.path if c.path.is_dir() else c.path.parent for c in candidates]
    configs = [{**defaults, **adapter_config(folder)} for folder in folders]
    for folder, config in zip(folders[1:], configs[1:], strict=True):
        _check_equal(
            folder,
            config,
            configs[0],
            (configs[0].keys() | config.keys()) - FREE,
            str(folders[0] / ADAPTER_CONFIG),
        )
    _check_equal(
        folders[0], configs[0], of_model, of_model.keys() - FREE - SEEN_IN_TENSORS, "the model"
    )


def _check_equal(
    folder: Path,
    found: Mapping[str, object],
    expected: Mapping[str, object],
    fields: Iterable[str],
    where: str,
) -> None:
    for field in sorted(fields):
        if _plain(found.get(field)) != _plain(expected.get(field)):
            raise CandidateError(
                f"{folder / ADAPTER_CONFIG}: {field}: expected {expected.get(field)!r} as in"
                f" {where}, found {found.get(field)!r}"
            )


def _plain(value: object) -> object:
    """For comparison: a list of names is a set that peft has written in any order, and what is
    empty is off.
    """
    if isinstance(value, list | tuple | set | frozenset) and all(isinstance(v, str) for v in value):
        value = sorted(value)
    return value or None


# Out ---------------------------------------------------------------------------------------------


def write_beside(out: Path, placement: Placement, coefficients: dict) -> list[str]:
    """What goes beside `out`/averaged.safetensors if the candidates are directories as
    save_pretrained writes them, models or PEFT adapters: averaged/, for from_pretrained; of models
    also mergekit.yaml, unless segments are smaller than tensors. The first rank calls it. Returns
    what it has written, for messages."""
    if not placement.candidates.at_hand:
        return []
    sources, adapter, written = (
        [source_folder(c) for c in placement.candidates],
        is_adapter(placement.candidates[-1]),
        [],
    )
    if sources[-1] is not None:
        write_model_folder(
            out / FOLDER,
            sources[-1],
            out / "averaged.safetensors",
            ADAPTER_WEIGHTS if adapter else MODEL_WEIGHTS,
        )
        written.append(f"{FOLDER}/")
    # mergekit has one weight for a tensor
    if all(sources) and not adapter and not coefficients.get("chunk"):
        layout = placement.layout
        text = mergekit_recipe(
            coefficients,
            sources,
            aliases=layout.aliases,
            untrained=layout.fixed,
            out_dtype=_common_dtype(placement.candidates),
        )
        write_text(out / RECIPE, text)
        written.append(RECIPE)
    return written


def _common_dtype(candidates: Candidates) -> str | None:
    """ "bfloat16", if all floating-point tensors are; None if they differ."""
    dtypes = {info.dtype for info in candidates.info.values() if info.dtype.is_floating_point}
    return str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else None


def write_model_folder(
    folder: Path, source: Path, weights: Path, name: str = MODEL_WEIGHTS
) -> None:
    """A directory that from_pretrained loads:

    `weights` under this name, as a hard link where links are possible, and copies of the small
    files of the directory `source` (configuration, tokenizer). It appears whole, in the place of an
    older one.

    A file is not copied if it is a link that leads out of `source`, or larger than 64 MB: a warning
    says so."""
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
    if (
        file.suffix not in SMALL_SUFFIXES
        or file.name.endswith(INDEX)
        or file.name in NOT_OF_THE_MODEL
        or file.is_dir()
    ):
        return False
    if not _inside(file, source):
        why = "no regular file of this directory"
    elif file.stat().st_size > SMALL_BYTES:
        why = f"larger than {SMALL_BYTES} bytes"
    else:
        return True
    warnings.warn(f"{file}: not copied beside the average: {why}", stacklevel=2)
    return False


def _link(target: Path, link: Path) -> None:
    try:
        os.link(target, link)
    except OSError:  # a file system without hard links
        shutil.copyfile(target, link)
