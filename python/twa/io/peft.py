"""PEFT adapters: which tensor of a PeftModel is which key of its adapter's files.

Needs no peft: it is looked up where the model has brought it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .candidate import Candidate
from .checks import is_inside, printable, read_json, shown
from .errors import CandidateError, TwaError
from .formats import ADAPTER_FILES

if TYPE_CHECKING:
    from .candidates import Candidates

ADAPTER_CONFIG = "adapter_config.json"

#: fields of adapter_config.json that may differ between adapters that are averaged: where things
#: lie, and what only training uses
FREE_FIELDS = {
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


def adapter_names(
    model: nn.Module, state: Mapping[str, object], candidates: Candidates
) -> dict[str, str] | None:
    """Key in the files of PEFT adapters -> name in the model.

    Args:
        model: a PeftModel with one active adapter
        state: its state_dict with keep_vars
        candidates: PEFT adapters, or something else

    Returns:
        None if the candidates are no PEFT adapters

    Raises:
        CandidateError: the adapters' configurations differ from each other or from the model's
        TwaError: the model is no such PeftModel, or would change statistics that adapter files do
            not hold
    """
    if not is_adapter(candidates[0]):
        return None
    peft = sys.modules.get("peft")  # whoever made a PeftModel has imported it
    if peft is None or not isinstance(model, peft.PeftModel):
        raise TwaError(
            f"the candidates are PEFT adapters ({candidates[0].path}): expected the model to be a"
            f" peft.PeftModel, found {type(model).__name__}"
        )
    active = model.active_adapters
    if len(active) != 1:
        raise TwaError(f"model: expected one active adapter, found {active}")
    config = model.peft_config[active[0]]
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    known = {k: value for k, value in defaults.items() if value is not dataclasses.MISSING}
    check_configs(candidates, config.to_dict(), known)
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
    """TwaError if training changes statistics of the model that are not among the exported."""
    for name, module in model.named_modules():
        for buffer in ("running_mean", "running_var"):
            tracked = isinstance(getattr(module, buffer, None), Tensor)
            if tracked and f"{name}.{buffer}" not in exported:
                raise TwaError(
                    f"model: {name}.{buffer} changes in training, but the adapters' files do not"
                    " hold it: expected the layer among modules_to_save"
                )


def adapter_config(folder: Path) -> dict[str, object]:
    """The content of adapter_config.json in an adapter's directory.

    Raises:
        CandidateError: it is missing, too large or no JSON object
    """
    path = folder / ADAPTER_CONFIG
    if not is_inside(path, folder):
        raise CandidateError("expected the adapter's configuration, a file in its directory", path)
    config = read_json(path)
    if not isinstance(config, dict):
        raise CandidateError(f"expected a JSON object, found {type(config).__name__}", path)
    return config


def check_adapters(candidates: Sequence[Candidate]) -> None:
    """CandidateError unless the configurations of PEFT adapters agree with each other.

    Versions of peft write different fields. One that a file lacks counts as it is in the others,
    but for a switch that is on there.
    """
    known: dict[str, object] = {}
    for folder in _folders(candidates):
        for field, value in adapter_config(folder).items():
            if value is not True:
                known.setdefault(field, value)
    check_configs(candidates, {}, known)


def _folders(adapters: Sequence[Candidate]) -> list[Path]:
    """The directories of PEFT adapters."""
    return [c.path if c.path.is_dir() else c.path.parent for c in adapters]


def check_configs(
    candidates: Sequence[Candidate], of_model: Mapping[str, object], defaults: Mapping[str, object]
) -> None:
    """CandidateError unless the adapters' configurations agree with each other and the model's.

    Averaged factors mean something only with the same rank, scale and places.

    Args:
        candidates: PEFT adapters
        of_model: the configuration of the model's adapter
        defaults: of fields that a file lacks, since versions of peft write different ones
    """
    folders = _folders(candidates)
    configs = [{**defaults, **adapter_config(folder)} for folder in folders]
    first = configs[0]
    where = str(folders[0] / ADAPTER_CONFIG)
    for folder, config in zip(folders[1:], configs[1:], strict=True):
        _check_equal(folder, config, first, (first.keys() | config.keys()) - FREE_FIELDS, where)
    fields = of_model.keys() - FREE_FIELDS - SEEN_IN_TENSORS
    _check_equal(folders[0], first, of_model, fields, "the model")


def _check_equal(
    folder: Path,
    found: Mapping[str, object],
    expected: Mapping[str, object],
    fields: Iterable[str],
    where: str,
) -> None:
    """CandidateError if one of these fields of a folder's configuration is not as expected."""
    for field in sorted(fields):
        if _plain(found.get(field)) != _plain(expected.get(field)):
            raise CandidateError(
                f"{printable(field)}: expected {shown(expected.get(field))} as in"
                f" {where}, found {shown(found.get(field))}",
                folder / ADAPTER_CONFIG,
            )


def _plain(value: object) -> object:
    """A value as it is compared.

    A list of names is a set that peft has written in any order, and what is empty is off.
    """
    if isinstance(value, list | tuple | set | frozenset) and all(isinstance(v, str) for v in value):
        value = sorted(value)
    return value or None
