"""state_dicts in memory as candidates: what a loop has kept, or a script has loaded itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..dtensors import is_dtensor
from .candidate import Candidate
from .duplicates import sample
from .errors import CandidateError, TwaError
from .formats import weights_of
from .mapped import Held, Part
from .torch_zip import EXTRA_STATE, MAX_DEPTH, Entries, named


class State(Candidate):
    """A state_dict in memory, or a larger dict with one in it, as a candidate.

    Args:
        name: what it is called
        state: the dict; its tensors are held, and not copied unless they are on another device
        entry, ignore: as for `Candidate`

    Raises:
        CandidateError: there are no tensors, or some that are not dense
    """

    def __init__(
        self,
        name: str,
        state: Mapping[str, object],
        entry: str | None = None,
        ignore: Sequence[str] = (),
    ) -> None:
        path = Path(name)
        found = weights_of(_entries(state, name), path, entry).checkpoint("state", ())
        self._take(path, found, entry, ignore)

    @property
    def name(self) -> str:
        """What it is called."""
        return str(self.path)

    @property
    def is_pretrained(self) -> bool:
        """It is in no file."""
        return False

    def fingerprint(self) -> str:
        """Digest of names, shapes and dtypes, and of some numbers of each tensor."""
        return sample(self, len(self.info))[:16]


@dataclass(frozen=True, eq=False)
class Borrowed(Held):
    """A tensor of somebody else, who may write to it: reading it is an error then.

    Attributes:
        version: of the tensor, as PyTorch counts its changes; None: it does not
        where: how messages name it
    """

    version: int | None
    where: str

    def read(self, part: Part | None = None) -> Tensor:
        """The tensor, or a part of it; CandidateError if it has been written to."""
        if self.version is not None and self.tensor._version != self.version:
            raise CandidateError(
                "changed since it was given: a model's state_dict() is its own memory; keep a copy,"
                " as in {k: v.clone() for k, v in model.state_dict().items()}",
                self.where,
            )
        return super().read(part)


def of_states(
    found: Sequence[Mapping[str, object]],
    names: Sequence[str] | None,
    entry: str | None,
    ignore: Sequence[str],
) -> list[State]:
    """Dicts as candidates; see `Candidates.of_states`."""
    if isinstance(found, Mapping):
        raise TwaError(f"states: expected a list of dicts, found one {type(found).__name__}")
    if not found:
        raise CandidateError("no candidates: expected at least one state_dict, found none")
    names = [f"state_{k}" for k in range(len(found))] if names is None else list(names)
    if len(names) != len(found):
        raise TwaError(f"names: expected {len(found)}, found {len(names)}")
    made = [State(name, state, entry, ignore) for name, state in zip(names, found, strict=True)]
    seen: dict[frozenset[int], str] = {}
    for candidate in made:
        tensors = (candidate.tensor(key) for key in candidate.info)
        places = frozenset(t.data_ptr() for t in tensors if t.numel() and t.is_floating_point())
        if places and places in seen:
            raise TwaError(
                f"states: {seen[places]} and {candidate.name} are the same memory: keep a copy of"
                " each, as in {k: v.clone() for k, v in model.state_dict().items()}"
            )
        seen[places] = candidate.name
    return made


def _entries(state: Mapping[str, object], where: str, depth: int = 1) -> Entries:
    """A dict as `read_torch` gives those of files."""
    if not isinstance(state, Mapping):
        raise CandidateError(f"expected a state_dict, found {type(state).__name__}", where)
    out = Entries()
    out.has_floats, out.metadata = True, dict(getattr(state, "_metadata", None) or {})
    for key, value in state.items():
        name = named(key)
        if isinstance(value, Tensor):
            out.put(name, _held(value, where, name))
        elif name.endswith(EXTRA_STATE):
            out.extra[name] = value
        elif isinstance(value, Mapping):
            if depth < MAX_DEPTH:
                out.put(name, _entries(value, where, depth + 1))
        else:
            out.others.append(name)
    return out


def _held(t: Tensor, where: str, name: str) -> Borrowed:
    """A tensor as it lies in memory; CandidateError if it is not dense."""
    if is_dtensor(t):
        raise CandidateError(
            f"tensor {name!r}: expected whole tensors, found a DTensor: call full_tensor()", where
        )
    if t.layout is not torch.strided or t.is_quantized or t.is_meta:
        what = f"{t.layout}, {t.dtype}, on {t.device}"
        raise CandidateError(f"tensor {name!r}: expected a dense one, found {what}", where)
    here = t.detach().cpu().resolve_conj().resolve_neg()
    version = None if here.is_inference() else here._version
    return Borrowed(here, version, f"{where}: tensor {name!r}")
