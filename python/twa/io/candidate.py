"""`Candidate`: one checkpoint, whose tensors are mapped into memory where they lie."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from .errors import CandidateError, NoWeights
from .formats import MODEL_FILES, Checkpoint, open_checkpoint, stem_of
from .mapped import Part, Source, check_torn, shape_of
from .torch_zip import EXTRA_STATE
from .training import Progress, progress_beside, progress_of

Value = TypeVar("Value")
#: places of a file that its fingerprint looks at, and bytes of each
SAMPLES, SAMPLE_BYTES = 16, 4096
#: bytes of tensors that files of so many may claim: so many times theirs, or so many
SHARED, MOST_CLAIMED = 64, 1 << 32
#: parts of names that wrappers (torch.compile, FSDP, activation checkpointing) add, and no user
WRAPPER_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
#: what DataParallel and AveragedModel put before every key, and AveragedModel's own buffer
MODULE, N_AVERAGED = "module.", "n_averaged"


class Candidate:
    """One checkpoint.

    A file, or a directory as Hugging Face, PEFT or torch.distributed.checkpoint write it.

    Args:
        path: the file or directory
        entry: the key under which a torch or DCP checkpoint holds the weights, such as
            "state_dict_ema"; None: the usual ones
        ignore: patterns of keys to leave out, such as "loss.*"

    Attributes:
        kind: format of the checkpoint, see `formats.Checkpoint`
        files: the files that it is made of
        info: shape and dtype of each tensor, by key
        extra: what modules keep beside their tensors (get_extra_state), by key
        metadata: versions of the modules that were saved, as torch.save keeps them
        progress: how far its training had come, as it says itself
        nest: keys that lead to the weights in it
        siblings: entries beside the weights that have tensors of the same names

    Raises:
        CandidateError: it cannot be read, or holds no weights
    """

    progress = Progress()
    nest: tuple[str, ...] = ()
    siblings: tuple[str, ...] = ()

    def __init__(self, path: Path, entry: str | None = None, ignore: Sequence[str] = ()) -> None:
        found = open_checkpoint(path, entry)
        self._take(path, found, entry, ignore)
        self.progress = progress_beside(path) if path.is_dir() else progress_of(found.numbers)
        self.check_torn()

    def _take(
        self, path: Path, found: Checkpoint, entry: str | None, ignore: Sequence[str]
    ) -> None:
        """Makes this the candidate that an open checkpoint is; CandidateError as above."""
        self.path, self.entry, self.kind, self.files = path, entry, found.kind, found.files
        self.ignore, self.metadata = tuple(ignore), found.metadata
        self.nest, self.siblings = found.nest, found.siblings
        if not found.tensors:
            raise NoWeights("expected a checkpoint, found no tensors", path)
        tensors = self._wanted(plain_keys(found.tensors))
        if not tensors:
            raise CandidateError(f"expected tensors, found all ignored by {self.ignore}", path)
        self.extra = self._wanted(plain_keys(found.extra))
        for key in [key for key in tensors if key.rpartition(".")[2] == EXTRA_STATE]:
            self.extra[key] = tensors.pop(key).read().clone()
        self._hold(tensors)
        self._check_claim()
        for key, info in self.info.items():
            if info.dtype.is_floating_point and info.dtype.itemsize == 1:
                raise CandidateError(
                    f"tensor {key!r} is {info.dtype}: expected weights of at least 16 bits;"
                    " convert the checkpoint first",
                    path,
                )

    def _check_claim(self) -> None:
        """CandidateError if its tensors share their bytes so as to make very much out of little."""
        claimed, size = sum(i.nbytes for i in self.info.values()), sum(m.size for m in self._maps)
        most = max(SHARED * size, MOST_CLAIMED)
        if self._maps and claimed > most:
            raise CandidateError(
                f"its tensors are {claimed} bytes that lie in {size} of its files: expected at most"
                f" {most}",
                self.path,
            )

    def _wanted(self, found: Mapping[str, Value]) -> dict[str, Value]:
        """What is not to be left out."""
        return {
            key: value
            for key, value in found.items()
            if not any(fnmatch.fnmatchcase(key, pattern) for pattern in self.ignore)
        }

    def _hold(self, tensors: Mapping[str, Source]) -> None:
        """Makes these its tensors."""
        self._tensors = tensors
        self.info = {key: t.info for key, t in tensors.items()}
        self._maps = tuple(dict.fromkeys(file for t in tensors.values() for file in t.files))

    def translated(self, tensors: Mapping[str, Source]) -> Candidate:
        """The same checkpoint with its tensors as a model has them."""
        made = copy.copy(self)
        made._hold(tensors)
        return made

    def source(self, key: str) -> Source:
        """Where a tensor lies."""
        return self._tensors[key]

    @property
    def is_pretrained(self) -> bool:
        """Whether it is laid out as transformers' save_pretrained writes models."""
        return self.kind == "huggingface" or self.path.name in MODEL_FILES

    @property
    def name(self) -> str:
        """File name without suffix (.pth.tar is one), or name of the directory."""
        return stem_of(self.path) if self.path.is_file() else self.path.name

    def tensor(self, key: str, part: Part | None = None) -> Tensor:
        """The tensor, or a part of it: one slice per dimension.

        It is mapped from the file where the format allows, and is to be read only.
        """
        return self._tensors[key].read(part)

    def columns(self, key: str, begin: int, end: int, part: Part | None = None) -> Tensor:
        """Elements [begin, end) of the flat tensor, or of a part of it: (end - begin,)."""
        slab, skip = _slab(self.info[key].shape, part, begin, end)
        return self.tensor(key, slab).reshape(-1)[skip : skip + end - begin]

    def prefetch(self, key: str, begin: int, end: int, part: Part | None = None) -> None:
        """Asks the system to read what `columns` will."""
        self._tensors[key].prefetch(_slab(self.info[key].shape, part, begin, end)[0])

    def fingerprint(self) -> str:
        """Digest of the files' sizes, of samples of each, and of the entry that is read."""
        return fingerprint_of(self.files, self.entry or "")

    def check(self) -> None:
        """Raises CandidateError if a file has been written to since it was opened."""
        for file in self._maps:
            file.check()

    def check_torn(self) -> None:
        """Raises CandidateError if bytes of a file were gone when they were read."""
        check_torn(self._maps)

    def release(self) -> None:
        """Gives back the memory of what was read; tensors still held stay valid.

        Raises CandidateError if bytes of a file were gone when they were read.
        """
        self.check_torn()
        for file in self._maps:
            file.drop()


def fingerprint_of(files: Sequence[Path], entry: str = "") -> str:
    """Digest of files' sizes, of samples of each, and of a text."""
    digest = hashlib.sha256(entry.encode())
    for path in files:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            digest.update(size.to_bytes(8, "little"))
            for k in range(SAMPLES):
                f.seek(max(0, size - SAMPLE_BYTES) * k // (SAMPLES - 1))
                digest.update(f.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def without_wrappers(key: str) -> str:
    """A key without the parts that no module of a user has."""
    return ".".join(part for part in key.split(".") if part not in WRAPPER_PARTS)


def plain_keys(found: Mapping[str, Value]) -> Mapping[str, Value]:
    """Keys without the parts of names that wrappers around modules add.

    They stay where two keys would be the same.
    """
    plain = {without_wrappers(key): value for key, value in found.items()}
    if len(plain) < len(found):
        return found
    while plain and all(key.startswith(MODULE) or key == N_AVERAGED for key in plain):
        inner = {key.removeprefix(MODULE): value for key, value in plain.items()}
        if len(inner) < len(plain) or inner.keys() == plain.keys():
            break
        plain = inner
    return plain


def _slab(
    shape: tuple[int, ...], part: Part | None, begin: int, end: int
) -> tuple[Part | None, int]:
    """Slices that hold elements [begin, end) of the flat part, and how many come before those.

    The slices are the fewest rows of the first dimension that is longer than 1.
    """
    if not shape:
        return part, begin
    sizes = shape_of(shape, part)
    axis = next((d for d, size in enumerate(sizes) if size != 1), 0)
    inner = math.prod(sizes[axis + 1 :])
    if not inner:
        return part, begin
    first, last = begin // inner, -(-end // inner)
    start = part[axis].indices(shape[axis])[0] if part else 0
    slab = list(part) if part else [slice(0, size) for size in shape]
    slab[axis] = slice(start + first, start + last)
    return tuple(slab), begin - first * inner
