"""Which tensor of the model is which tensor of the candidates, what becomes of it, and which
segment it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from twa_kernels.reference import TILE, num_tiles

from ..export.hugging_face import adapter_names
from ..io.candidates import WRAPPER_PREFIXES, CandidateError, Candidates, TensorInfo, check_info

Granularity = str | int | Mapping[str, object] | Callable[[str], object]

FINE_SEGMENTS = 4096  # at most, for granularity "fine"


@dataclass(frozen=True)
class Layout:
    """What becomes of each tensor of the model.

    trained   parameters in the subspace: name -> key in the candidate files
    fixed     float tensors that are averaged but not trained: frozen parameters and float buffers
    copied    integer and bool buffers: taken from the last candidate (or the one that has all the
              weight)
    aliases   other names of tied parameters and shared float buffers: name -> the name that stands
              for them
    names     every key in the candidate files -> name in the model's state_dict: the same, but for
              wrapped models and PEFT adapters

    With adapters, the base model's own tensors are in none of these: they stay as they are.
    """

    trained: dict[str, str]
    fixed: dict[str, str]
    copied: dict[str, str]
    aliases: dict[str, str]
    names: dict[str, str]


def layout_of(model: nn.Module, candidates: Candidates) -> Layout:
    """Matches the model's state_dict with the candidates' keys; CandidateError where they do not
    fit. ValueError for a model that cannot be averaged, or that is no PeftModel while the
    candidates are PEFT adapters."""
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "model: expected the model itself, found DistributedDataParallel around it; pass"
            " model.module"
        )
    canonical: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        first = canonical.setdefault(id(p), name)
        if first != name:
            aliases[name] = first
    parameters = dict(model.named_parameters())
    state = model.state_dict(keep_vars=True)
    expected = {name: t for name, t in state.items() if isinstance(t, Tensor)}
    for name, b in model.named_buffers(remove_duplicate=False):
        if name in expected and (first := canonical.setdefault(id(b), name)) != name:
            aliases[name] = first
    first, info = candidates[0], candidates.info
    adapter = adapter_names(model, state, candidates)
    names = _unwrapped(expected, info) if adapter is None else adapter

    if unexpected := sorted(info.keys() - names.keys()):
        raise CandidateError(
            f"{first.path}: tensor {unexpected[0]!r} is unexpected ({len(unexpected)} in all): the"
            " model does not have it"
        )
    groups: dict[str, list[str]] = {}  # canonical name -> keys present in the files
    for key, name in names.items():
        groups.setdefault(aliases.get(name, name), [])
        if key in info:
            groups[aliases.get(name, name)].append(key)
    if adapter is not None:  # the base model is not in the files, so it must be frozen
        for name, p in parameters.items():
            if p.requires_grad:
                groups.setdefault(name, [])
    if missing := sorted(name for name, keys in groups.items() if not keys):
        raise CandidateError(
            f"{first.path}: tensor {missing[0]!r} of the model is missing ({len(missing)} in all)"
        )

    floats = {a: n for a, n in aliases.items() if a in expected and expected[a].is_floating_point()}
    layout = Layout({}, {}, {}, floats, {key: names[key] for key in info})
    for name, keys in groups.items():
        tensor, key = expected[name], keys[0]
        for k in keys:
            check_info(
                first.path,
                k,
                TensorInfo(tuple(tensor.shape), tensor.dtype),
                info[k],
                "in the model",
            )
        for other in keys[1:]:
            for c in candidates:
                if not torch.equal(c.tensor(key), c.tensor(other)):
                    raise CandidateError(
                        f"{c.path}: {key!r} and {other!r} are one tied weight in the model but"
                        " differ in the file"
                    )
        if not tensor.is_floating_point():
            layout.copied[name] = key
        elif name in parameters and parameters[name].requires_grad:
            layout.trained[name] = key
        else:
            layout.fixed[name] = key
    if not layout.trained:
        hint = (
            "" if adapter is None else " (peft: PeftModel.from_pretrained(..., is_trainable=True))"
        )
        raise ValueError(
            f"the model has no trainable floating-point parameter: nothing to average{hint}"
        )
    _check_memory(layout, expected)
    return layout


def _unwrapped(expected: Iterable[str], keys: Container[str]) -> dict[str, str]:
    """Key -> name of each tensor of the model: its name, without the prefixes of wrappers around
    the model that the keys do not have.
    """
    names = {name: name for name in expected}
    while prefix := next(
        (
            p
            for p in WRAPPER_PREFIXES
            if names and all(key.startswith(p) and key not in keys for key in names)
        ),
        None,
    ):
        names = {key.removeprefix(prefix): name for key, name in names.items()}
    return names


def _check_memory(layout: Layout, state: Mapping[str, Tensor]) -> None:
    """ValueError if a trained parameter shares memory with another tensor: what is written to one
    would change the other.
    """
    spans = []
    for name in [*layout.trained, *layout.fixed, *layout.copied]:
        t = state[name]
        if type(t) in (Tensor, nn.Parameter) and t.numel() and t.device.type != "meta":
            length = 1 + sum(
                (size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)
            )
            spans.append(
                (str(t.device), t.data_ptr(), t.data_ptr() + length * t.element_size(), name)
            )
    last = ("", 0, 0, "")
    for span in sorted(spans):
        if (
            span[0] == last[0]
            and span[1] < last[2]
            and (span[3] in layout.trained or last[3] in layout.trained)
        ):
            raise ValueError(
                f"model: {last[3]!r} and {span[3]!r} share memory but are two tensors: expected one"
                " Parameter under both names (a tied weight), or a clone"
            )
        last = max(last, span, key=lambda s: (s[0], s[2]))


def _block_of(name: str) -> str:
    """ "layers.3.attn.weight" -> "layers.3"; without a number the module:

    "embed.weight" -> "embed".
    """
    parts = name.split(".")
    end = next((k for k, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: end + 1]) or name


GRANULARITIES = "model, block, tensor, fine, or a number of weights that is a multiple of 128"


def parse_granularity(text: str) -> str | int:
    """From a command line; ValueError if it is none."""
    if text in ("model", "block", "tensor", "fine"):
        return text
    if text.isascii() and text.isdigit() and int(text) and int(text) % TILE == 0:
        return int(text)
    raise ValueError(f"granularity {text!r}: expected {GRANULARITIES}")


@dataclass(frozen=True)
class Segments:
    """Which columns share coefficients.

    labels  names of the L segments
    first   of each trained tensor: its segment, or with `chunk` the first of its own
    chunk   0; or so many weights of a tensor, in the order in which they lie in memory, make one
            segment (its last one may be shorter)
    """

    labels: list[str]
    first: list[int]
    chunk: int = 0

    def of_tensor(self, k: int, numel: int, begin: int = 0) -> range:
        """The segments of weights begin to begin + numel of tensor k."""
        if not self.chunk:
            return range(self.first[k], self.first[k] + 1)
        return range(
            self.first[k] + begin // self.chunk, self.first[k] - -(begin + numel) // self.chunk
        )

    def of_tiles(self, numels: Sequence[int], begins: Sequence[int] | None = None) -> list[int]:
        """What twa_kernels takes: a segment per tensor, or with `chunk` per tile of 128 columns of
        parts of the tensors that begin at `begins`.
        """
        if not self.chunk:
            return list(self.first)
        begins = begins or [0] * len(numels)
        parts = zip(self.first, numels, begins, strict=True)
        return [
            first + (begin + t * TILE) // self.chunk
            for first, numel, begin in parts
            for t in range(num_tiles(numel))
        ]


def segments_of(names: Sequence[str], numels: Sequence[int], granularity: Granularity) -> Segments:
    """For trained tensors of these names and sizes."""
    if granularity == "fine":
        granularity = TILE
        while sum(-(-numel // granularity) for numel in numels) > max(FINE_SEGMENTS, len(numels)):
            granularity *= 2
    if isinstance(granularity, int) and not isinstance(granularity, bool):
        if granularity < 1 or granularity % TILE:
            raise ValueError(
                f"granularity: expected a multiple of {TILE} weights, found {granularity}"
            )
        labels, first = [], []
        for name, numel in zip(names, numels, strict=True):
            first.append(len(labels))
            labels += [
                f"{name}[{a}:{min(a + granularity, numel)}]" for a in range(0, numel, granularity)
            ]
        return Segments(labels, first, granularity)
    of_tensor = segment_labels(list(names), granularity)
    order = {label: l for l, label in enumerate(dict.fromkeys(of_tensor))}
    return Segments([str(label) for label in order], [order[label] for label in of_tensor])


def segment_labels(names: list[str], granularity: Granularity) -> list[object]:
    """Label of each parameter's segment:

    "model", "block" (the name up to its first number, else its module), "tensor", a mapping from
    parameter name to label, or a function."""
    if granularity == "model":
        return ["model"] * len(names)
    if granularity == "tensor":
        return list(names)
    if granularity == "block":
        return [_block_of(name) for name in names]
    if isinstance(granularity, Mapping):
        if missing := [name for name in names if name not in granularity]:
            raise ValueError(
                f"granularity: the mapping has no segment for parameter {missing[0]!r}"
                f" ({len(missing)} in all)"
            )
        return [granularity[name] for name in names]
    if callable(granularity):
        return [granularity(name) for name in names]
    raise ValueError(
        "granularity: expected 'model', 'block', 'tensor', 'fine', a number of weights, a mapping"
        f" or a function, found {granularity!r}"
    )
