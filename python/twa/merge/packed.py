"""`--basis`: trained averages that start from a file of `twa pack` instead of packing anew."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from ..basis.file import read_basis
from ..basis.segments import Granularity, segments_of
from ..basis.sources import check_sources
from ..io.candidate import fingerprint_of
from ..io.candidates import Candidates
from ..io.errors import BasisError
from ..io.key_map import KeyMap
from ..packing.load import check_model, find_basis
from .settings import TwaMethod


class Packed:
    """A packed basis of the candidates, and for which methods it holds the rows.

    Args:
        path: of the file, or of its directory
        model: what is averaged
        candidates: which the file must be of
        key_map: which tensor of the model is which of the candidates'

    Attributes:
        path: of the file
        loaded: the file
        fingerprint: of its content

    Raises:
        BasisError: it is damaged, or of another model or other candidates
    """

    def __init__(
        self, path: str | Path, model: nn.Module, candidates: Candidates, key_map: KeyMap
    ) -> None:
        self.path = find_basis(path)
        self.loaded = read_basis(self.path)
        contents = self.contents = self.loaded.contents
        check_sources(contents, candidates)
        check_model(model, contents, self.path)
        if list(contents.trained.items()) != list(key_map.trained.items()):
            raise BasisError(
                "its tensors have other keys in the candidates, or another order", path
            )
        if not bool(self.loaded.read("center_weights").any()):
            raise BasisError("its center is zero: rows of another center are needed", path)
        self.fingerprint = fingerprint_of([self.path])

    def has(self, granularity: Granularity) -> bool:
        """Whether its segments are those."""
        c = self.contents
        return segments_of(list(c.trained), c.numels, granularity) == c.tensor_segments

    def fits(self, method: TwaMethod) -> bool:
        """Whether its rows are those that the method would pack."""
        c = self.contents
        same = (method.bits, method.basis, "row") == (c.bits, c.basis, c.normalize)
        return same and self.has(method.granularity)

    def check(self, methods: Iterable[TwaMethod]) -> None:
        """BasisError unless its rows are those of one of these methods."""
        asked = list(methods)
        if any(map(self.fits, asked)):
            return
        c = self.contents
        sizes = (c.chunk,) if c.chunk else ()
        segments = next(filter(self.has, ("fine", "tensor", "block", "model", *sizes)), None)
        found = f"{c.bits} bits, {c.basis}, granularity {segments or 'of its own'}"
        if segments is None or c.normalize != "row":
            text = f"no --twa fits it: it has {found}, normalize {c.normalize!r}"
            raise BasisError(text, self.path)
        option = "" if c.basis == "deltas" else f":{c.basis}"
        names = ", ".join(m.name for m in asked) or "none"
        raise BasisError(
            f"it has {found}: expected --twa t:{segments}:{c.bits}{option} or"
            f" v:{segments}:{c.bits}{option}, found {names}",
            self.path,
        )
