"""`KeyMap`: which tensor of the model is which tensor of the candidates, and what becomes of it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .candidate import WRAPPER_PREFIXES
from .candidates import Candidates
from .compare import check_info, check_not_quantised
from .errors import CandidateError, TwaError
from .mapped import TensorInfo, span
from .peft import adapter_names


@dataclass(frozen=True)
class KeyMap:
    """What becomes of each tensor of the model.

    With adapters, the base model's own tensors are in none of these: they stay as they are.

    Attributes:
        trained: parameters in the subspace: name -> key in the candidate files
        fixed: float tensors that are averaged but not trained, frozen parameters and float buffers:
            name -> key
        copied: integer and bool buffers, taken from the last candidate or the one that has all the
            weight: name -> key
        aliases: other names of tied parameters and shared float buffers: name -> the name that
            stands for them
        names: every key in the candidate files -> name in the model's state_dict; the same, but for
            wrapped models and PEFT adapters
    """

    trained: dict[str, str]
    fixed: dict[str, str]
    copied: dict[str, str]
    aliases: dict[str, str]
    names: dict[str, str]

    def numels(self, info: Mapping[str, TensorInfo]) -> list[int]:
        """Number of weights of each trained tensor."""
        return [info[key].numel for key in self.trained.values()]


def match_keys(model: nn.Module, candidates: Candidates) -> KeyMap:
    """Matches the model's state_dict with the candidates' keys.

    Raises:
        CandidateError: they do not fit
        TwaError: the model cannot be averaged, or is no PeftModel while the candidates are PEFT
            adapters
    """
    if isinstance(model, DistributedDataParallel):
        raise TwaError(
            "model: expected the model itself, found DistributedDataParallel around it; pass"
            " model.module"
        )
    check_not_quantised(candidates.info, candidates[0].path)
    parameters = dict(model.named_parameters())
    state = model.state_dict(keep_vars=True)
    expected = {name: t for name, t in state.items() if isinstance(t, Tensor)}
    aliases = _aliases(model, expected)
    adapter = adapter_names(model, state, candidates)
    names = _unwrapped(expected, candidates.info) if adapter is None else adapter
    groups = _groups(names, aliases, candidates)
    if adapter is not None:  # the base model is not in the files, so it must be frozen
        for name, p in parameters.items():
            if p.requires_grad:
                groups.setdefault(name, [])
    if missing := sorted(name for name, keys in groups.items() if not keys):
        raise CandidateError(
            f"tensor {missing[0]!r} of the model is missing ({len(missing)} in all)",
            candidates[0].path,
        )

    floats = {a: n for a, n in aliases.items() if a in expected and expected[a].is_floating_point()}
    key_map = KeyMap({}, {}, {}, floats, {key: names[key] for key in candidates.info})
    for name, keys in groups.items():
        tensor, key = expected[name], keys[0]
        _check_tensors(tensor, keys, candidates)
        if not tensor.is_floating_point():
            key_map.copied[name] = key
        elif name in parameters and parameters[name].requires_grad:
            key_map.trained[name] = key
        else:
            key_map.fixed[name] = key
    if not key_map.trained:
        hint = ""
        if adapter is not None:
            hint = " (peft: PeftModel.from_pretrained(..., is_trainable=True))"
        raise TwaError(
            f"the model has no trainable floating-point parameter: nothing to average{hint}"
        )
    _check_memory(key_map, expected)
    return key_map


def _aliases(model: nn.Module, state: Container[str]) -> dict[str, str]:
    """Other names of tied parameters and shared buffers -> the name that stands for them."""
    first_name: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if (first := first_name.setdefault(id(p), name)) != name:
            aliases[name] = first
    for name, b in model.named_buffers(remove_duplicate=False):
        if name in state and (first := first_name.setdefault(id(b), name)) != name:
            aliases[name] = first
    return aliases


def _groups(
    names: Mapping[str, str], aliases: Mapping[str, str], candidates: Candidates
) -> dict[str, list[str]]:
    """Name of each tensor of the model -> its keys in the files: several if it is tied.

    CandidateError if a key of the files is none of the model's.
    """
    info = candidates.info
    if unexpected := sorted(info.keys() - names.keys()):
        raise CandidateError(
            f"tensor {unexpected[0]!r} is unexpected ({len(unexpected)} in all): the"
            " model does not have it",
            candidates[0].path,
        )
    groups: dict[str, list[str]] = {}
    for key, name in names.items():
        keys = groups.setdefault(aliases.get(name, name), [])
        if key in info:
            keys.append(key)
    return groups


def _check_tensors(tensor: Tensor, keys: Sequence[str], candidates: Candidates) -> None:
    """CandidateError unless these keys of the files hold one tensor, as it is in the model."""
    first, expected = candidates[0], TensorInfo(tuple(tensor.shape), tensor.dtype)
    for key in keys:
        check_info(first.path, key, expected, first.info[key], "in the model")
    for other in keys[1:]:
        for c in candidates:
            if not torch.equal(c.tensor(keys[0]), c.tensor(other)):
                raise CandidateError(
                    f"{keys[0]!r} and {other!r} are one tied weight in the model but"
                    " differ in the file",
                    c.path,
                )


def _unwrapped(expected: Iterable[str], keys: Container[str]) -> dict[str, str]:
    """Key -> name of each tensor of the model.

    The key is the name without the prefixes of wrappers around the model that the keys do not have.
    """
    names = {name: name for name in expected}

    def is_extra(prefix: str) -> bool:
        return all(key.startswith(prefix) and key not in keys for key in names)

    while names and (prefix := next(filter(is_extra, WRAPPER_PREFIXES), None)):
        names = {key.removeprefix(prefix): name for key, name in names.items()}
    return names


def _check_memory(key_map: KeyMap, state: Mapping[str, Tensor]) -> None:
    """TwaError if a trained parameter shares memory with another tensor.

    What is written to one would change the other.
    """
    spans = []  # (device, first byte, byte after the last, name)
    for name in [*key_map.trained, *key_map.fixed, *key_map.copied]:
        t = state[name]
        if type(t) in (Tensor, nn.Parameter) and t.device.type != "meta":
            begin, size = t.data_ptr(), span(t.shape, t.stride()) * t.element_size()
            if size:
                spans.append((str(t.device), begin, begin + size, name))
    last = ("", 0, 0, "")
    for this in sorted(spans):
        overlap = this[0] == last[0] and this[1] < last[2]
        if overlap and (this[3] in key_map.trained or last[3] in key_map.trained):
            raise TwaError(
                f"model: {last[3]!r} and {this[3]!r} share memory but are two tensors: expected one"
                " Parameter under both names (a tied weight), or a clone"
            )
        last = max(last, this, key=lambda s: (s[0], s[2]))
