"""Candidates that are not at hand: what a basis file knows of those that it was packed from."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NoReturn

from ..io.candidate import Candidate
from ..io.candidates import BLOCK_BYTES, Candidates
from ..io.checks import is_shown, printable
from ..io.errors import BasisError, CandidateError
from ..io.formats import stem_of
from ..io.mapped import Part, TensorInfo
from ..io.safetensors import SAFETENSORS_DTYPES
from .contents import Contents
from .file import Loaded


class Source(Candidate):
    """A candidate by name, shapes and fingerprint, without weights.

    Args:
        path: where the candidate was
        fingerprint: of its files
        kind: its format
        info: shape and dtype of each tensor
        basis: the file that says so, for messages
    """

    def __init__(
        self,
        path: Path,
        fingerprint: str,
        kind: str,
        info: dict[str, TensorInfo],
        basis: Path,
    ) -> None:
        self.path, self.entry, self.kind, self.files = path, None, kind, ()
        self.info = info
        self._tensors, self._maps = {}, ()
        self.ignore, self.metadata, self.extra = (), {}, {}
        self._fingerprint, self._basis = fingerprint, basis

    @property
    def name(self) -> str:
        """File name without suffix, or name of the directory."""
        return stem_of(self.path)

    def fingerprint(self) -> str:
        """The fingerprint of the files when they were packed."""
        return self._fingerprint

    def tensor(self, key: str, part: Part | None = None) -> NoReturn:
        """Raises CandidateError: there are no weights."""
        raise CandidateError(
            "loaded without its candidates, whose weights are needed here: pass candidates to load",
            self._basis,
        )


class Sources(Candidates):
    """Stands for the candidates of a basis that was loaded without them.

    It has their names, shapes and fingerprints. Reading weights raises CandidateError.
    """

    at_hand = False

    def __init__(self, loaded: Loaded) -> None:
        c = loaded.contents
        info = {
            key: TensorInfo(tuple(shape), SAFETENSORS_DTYPES[dtype])
            for key, (shape, dtype) in c.info.items()
        }
        sources = [
            Source(Path(p if is_shown(p) else ascii(p)), digest, c.kind, info, loaded.path)
            for p, digest in c.candidates
        ]
        self._hold(sources, BLOCK_BYTES)


def check_sources(contents: Contents, candidates: Candidates) -> None:
    """BasisError unless these are the candidates that the basis was packed from, in this order."""
    packed = [digest for _, digest in contents.candidates]
    given = [candidate.fingerprint() for candidate in candidates]
    for k, (theirs, ours) in enumerate(itertools.zip_longest(packed, given)):
        if theirs != ours:
            found = f"{candidates[k].name} ({ours})" if ours else "none"
            raise BasisError(
                "expected the one that the basis was packed from"
                f" ({printable(theirs or 'none')}), found {found}",
                f"candidate {k}",
            )
