"""Which tensor of the model is which tensor of the candidates, what becomes of it, and which segment it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .candidates import CandidateError, Candidates, TensorInfo, check_info

Granularity = str | Mapping[str, object] | Callable[[str], object]


@dataclass(frozen=True)
class Layout:
    """What becomes of each tensor of the model.

    trained   parameters in the subspace: name -> key in the candidate files
    fixed     float tensors that are averaged but not trained: frozen parameters and float buffers
    copied    integer and bool buffers: taken from the last candidate (or the one that has all the weight)
    aliases   other names of tied parameters: name -> the name that stands for them
    """

    trained: dict[str, str]
    fixed: dict[str, str]
    copied: dict[str, str]
    aliases: dict[str, str]


def layout_of(model: nn.Module, candidates: Candidates) -> Layout:
    """Matches the model's state_dict with the candidates' keys; CandidateError where they do not fit."""
    if isinstance(model, DistributedDataParallel):
        raise ValueError("model: expected the model itself, found DistributedDataParallel around it; pass model.module")
    canonical: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        first = canonical.setdefault(id(p), name)
        if first != name:
            aliases[name] = first
    parameters = dict(model.named_parameters())
    state = model.state_dict(keep_vars=True)
    expected = {name: t for name, t in state.items() if isinstance(t, Tensor)}
    first, info = candidates[0], candidates.info

    if unexpected := sorted(info.keys() - expected.keys()):
        raise CandidateError(f"{first.path}: tensor {unexpected[0]!r} is unexpected ({len(unexpected)} in all): the model does not have it")
    groups: dict[str, list[str]] = {}  # canonical name -> keys present in the files
    for name in expected:
        groups.setdefault(aliases.get(name, name), [])
        if name in info:
            groups[aliases.get(name, name)].append(name)
    if missing := sorted(name for name, keys in groups.items() if not keys):
        raise CandidateError(f"{first.path}: tensor {missing[0]!r} of the model is missing ({len(missing)} in all)")

    layout = Layout({}, {}, {}, {a: n for a, n in aliases.items() if a in expected})
    for name, keys in groups.items():
        tensor, key = expected[name], keys[0]
        for k in keys:
            check_info(first.path, k, TensorInfo(tuple(tensor.shape), tensor.dtype), info[k], "in the model")
        for other in keys[1:]:
            for c in candidates:
                if not torch.equal(c.tensor(key), c.tensor(other)):
                    raise CandidateError(f"{c.path}: {key!r} and {other!r} are one tied weight in the model but differ in the file")
        if not tensor.is_floating_point():
            layout.copied[name] = key
        elif name in parameters and parameters[name].requires_grad:
            layout.trained[name] = key
        else:
            layout.fixed[name] = key
    if not layout.trained:
        raise ValueError("the model has no trainable floating-point parameter: nothing to average")
    return layout


def _block_of(name: str) -> str:
    """ "layers.3.attn.weight" -> "layers.3"; without a number the module: "embed.weight" -> "embed"."""
    parts = name.split(".")
    end = next((k for k, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: end + 1]) or name


def segment_labels(names: list[str], granularity: Granularity) -> list[object]:
    """Label of each parameter's segment: "model", "block" (the name up to its first number, else its module), "tensor", a mapping
    from parameter name to label, or a function."""
    if granularity == "model":
        return ["model"] * len(names)
    if granularity == "tensor":
        return list(names)
    if granularity == "block":
        return [_block_of(name) for name in names]
    if isinstance(granularity, Mapping):
        if missing := [name for name in names if name not in granularity]:
            raise ValueError(f"granularity: the mapping has no segment for parameter {missing[0]!r} ({len(missing)} in all)")
        return [granularity[name] for name in names]
    if callable(granularity):
        return [granularity(name) for name in names]
    raise ValueError(f"granularity: expected 'model', 'block', 'tensor', a mapping or a function, found {granularity!r}")
