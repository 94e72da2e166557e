"""Candidates: checkpoints of one architecture, read in blocks of columns.

Files are mapped into memory, not loaded. A background thread fetches the next block while one is
worked on. Memory that was touched is given back, so that resident memory does not grow with the
number or the size of the files.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from twa_kernels.layout import FLOATS

from .averaging import FixedAverage, sum_of
from .candidate import Candidate
from .compare import check_same, without_tensors
from .errors import CandidateError, CandidateWarning, TwaError
from .find import find
from .mapped import Part, Source, TensorInfo, shape_of
from .opening import open_each, sorted_out
from .order import shortened
from .recording import Recorded
from .states import of_states

#: bytes of a block, of all candidates together: a read that pays on any disk, and little memory
BLOCK_BYTES = 64 << 20
#: columns that blocks are multiples of: the kernels' sums then have the same bits wherever one ends
UNIT = 8192


@dataclass(frozen=True)
class Block:
    """Some columns of one tensor, of every candidate.

    Attributes:
        index: which of the tensors that were asked for
        begin: first column
        end: the column after the last
        rows: for each candidate (end - begin,), in its own dtype
    """

    index: int
    begin: int
    end: int
    rows: list[Tensor]


class Candidates(Sequence[Candidate]):
    """The heap: n checkpoints with the same tensors.

    Earlier candidates come first, which matters to EMA and LAWA: within each pattern they are in
    the order of the epochs, steps or other numbers in their names, or, where not all names have
    some, of the steps in the files. A list of files in the order of a directory's listing, as a
    shell gives it, is put in that order too; any other list keeps its order. Files without weights
    that a pattern or a directory brings are left out, and the same weights count once, whatever
    their names.

        candidates = twa.Candidates("run/step_*.safetensors")

    docs/formats.md has the formats, and the rules of order.

    Args:
        paths: one or several of: a file (.safetensors, .pt, .pth, .bin, .ckpt, .pth.tar), a glob
            pattern, a directory that is a checkpoint (Hugging Face, sharded or not, a PEFT adapter,
            torch.distributed.checkpoint), a directory with checkpoints in it
        entry: the key under which torch and DCP checkpoints hold the weights, such as
            "state_dict_ema"; None: the usual ones
        ignore: patterns of keys to leave out, such as "loss.*"
        block_bytes: how much of all candidates together is read at once, in bytes; about twice that
            is resident

    Attributes:
        recording: the recording that these are all snapshots of, or None
        at_hand: whether weights can be read, as those of a basis that is loaded alone cannot
        bytes_read: bytes of all tensors handed out so far
        notes: what was left out, and what is doubtful about the order, a sentence each

    Raises:
        CandidateError: there are none, or one cannot be read. That their keys, shapes or kinds of
            dtype differ is said at the first use without a model that takes all of them

    Warns:
        CandidateWarning: some are the same, their names leave the order in doubt, a Trainer has
            removed some, or there is one alone, with others inside
    """

    at_hand = True
    notes: Sequence[str] = ()

    def __init__(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        entry: str | None = None,
        ignore: Sequence[str] = (),
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        found = find(_listed(paths))
        opened, without_weights = open_each(found, entry, ignore)
        chosen, doubtful, notes = sorted_out(found, opened)
        for text in doubtful:
            warnings.warn(text, CandidateWarning, stacklevel=2)
        self._hold(chosen, block_bytes)
        self.notes = [*without_weights, *doubtful, *notes]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)}, oldest first: {shortened(self.names)})"

    @classmethod
    def of_states(
        cls,
        states: Sequence[Mapping[str, object]],
        *,
        names: Sequence[str] | None = None,
        entry: str | None = None,
        ignore: Sequence[str] = (),
    ) -> Candidates:
        """state_dicts in memory, oldest first.

            kept.append({key: t.clone() for key, t in model.state_dict().items()})
            candidates = twa.Candidates.of_states(kept)

        Their tensors are held, and not copied; those on another device are copied to the CPU. One
        that is written to afterwards is an error when it is read.

        Args:
            states: state_dicts, or larger dicts with one in each, as checkpoints have them; one
                that is the same as another counts, too
            names: of the candidates; None: state_0, state_1, ...
            entry, ignore: as for `Candidates`

        Raises:
            CandidateError: there are none, or one holds no weights
            TwaError: two are the same memory, as of a model that goes on training
        """
        return cls.of(of_states(states, names, entry, ignore))

    @classmethod
    def of(cls, candidates: Sequence[Candidate]) -> Candidates:
        """Candidates that are open, in this order; one that is the same as another counts, too."""
        made = cls.__new__(cls)
        made._hold(candidates, BLOCK_BYTES)
        return made

    def translated(self, tensors: Sequence[Mapping[str, Source]]) -> Candidates:
        """The same checkpoints with their tensors as a model has them.

        Args:
            tensors: of each of them
        """
        for c in self:  # whose weights the model's own loading may have read
            c.check_torn()
        made = copy.copy(self)
        pairs = zip(self, tensors, strict=True)
        made._hold([c.translated(found) for c, found in pairs], self.block_bytes)
        made._fingerprints, made.checked, made.notes = self._fingerprints, True, self.notes
        return made

    def _hold(self, candidates: Sequence[Candidate], block_bytes: int) -> None:
        """Makes this object out of candidates that are open."""
        self._candidates = list(candidates)
        self.block_bytes = block_bytes
        self.bytes_read = 0
        self._touched = 0  # bytes read since memory was last given back
        self._fingerprints: dict[str, str] | None = None
        first = candidates[0] if candidates else None
        recording = first.recording if isinstance(first, Recorded) else None
        whole = recording is not None and len(candidates) == len(recording.steps)
        for k, c in enumerate(candidates):
            whole = whole and isinstance(c, Recorded) and (c.recording, c.number) == (recording, k)
        self.recording = recording if whole else None
        self.checked = False  # whether all have the same tensors, or a model takes all of them

    def __len__(self) -> int:
        return len(self._candidates)

    @overload
    def __getitem__(self, index: int) -> Candidate: ...

    @overload
    def __getitem__(self, index: slice) -> list[Candidate]: ...

    def __getitem__(self, index: int | slice) -> Candidate | list[Candidate]:
        return self._candidates[index]

    @property
    def names(self) -> list[str]:
        """Names of the candidates; the path where a name is not unique."""
        counts = Counter(c.name for c in self)
        return [c.name if counts[c.name] == 1 else str(c.path) for c in self]

    @property
    def kind(self) -> str:
        """Format of the candidates, see `formats.Checkpoint`; "mixed" if they differ."""
        kinds = {c.kind for c in self}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def info(self) -> dict[str, TensorInfo]:
        """Keys, shapes and dtypes of the first candidate.

        Raises:
            CandidateError: those of another differ: a model's own loading may still take all of
                them, as `Subspace.from_candidates` does
        """
        if not self.checked:
            for candidate in self[1:]:
                check_same(self[0], candidate)
            self.checked = True
        return self[0].info

    def check(self) -> None:
        """Raises CandidateError if a file has been written to since it was opened."""
        for c in self:
            c.check()

    def account(self, nbytes: int) -> None:
        """Accounts for bytes that are about to be touched."""
        self.bytes_read += nbytes
        self._touched += nbytes
        if self._touched > 2 * self.block_bytes:
            self.check()
            for c in self:
                c.release()
            self._touched = nbytes

    def _chosen(self, rows: slice | Sequence[int]) -> list[Candidate]:
        if isinstance(rows, slice):
            return self._candidates[rows]
        return [self._candidates[i] for i in rows]

    def tensors(
        self, key: str, rows: slice = slice(None), part: Part | None = None
    ) -> list[Tensor]:
        """One tensor of every candidate, mapped from its file.

        For tensors larger than memory see `stream`.

        Args:
            key: name of the tensor
            rows: which candidates
            part: only these slices of it, one per dimension; the bytes around them are not touched
        """
        chosen, count = self._candidates[rows], math.prod(shape_of(self.info[key].shape, part))
        self.account(count * sum(c.info[key].dtype.itemsize for c in chosen))
        return [c.tensor(key, part) for c in chosen]

    def stream(
        self,
        wanted: Sequence[tuple[str, Part | None]],
        rows: slice | Sequence[int] = slice(None),
        columns: int | None = None,
        within: Sequence[tuple[int, int]] | None = None,
    ) -> Iterator[Block]:
        """Blocks of columns of some tensors, in order; a background thread fetches the next.

        A tensor without elements makes one empty block.

        Args:
            wanted: keys of the tensors, each with its slices, or None for all of it
            rows: which candidates
            columns: width of a block, a multiple of UNIT; None: what makes block_bytes
            within: of each of wanted, only the columns from one to another, both multiples of UNIT
                (or the end)
        """
        chosen = self._chosen(rows)

        def prepare(index: int, first: int, last: int) -> Block:
            key, part = wanted[index]
            self.account(sum(c.info[key].dtype.itemsize for c in chosen) * (last - first))
            return Block(index, first, last, [c.columns(key, first, last, part) for c in chosen])

        def prepare_ahead(index: int, first: int, last: int) -> Block:
            for c in chosen:
                c.prefetch(wanted[index][0], first, last, wanted[index][1])
            return prepare(index, first, last)

        blocks = self._cut(wanted, chosen, columns, within)
        if (place := next(blocks, None)) is None:
            return
        block: Block | None = prepare(*place)
        with contextlib.ExitStack() as stack:
            pool: ThreadPoolExecutor | None = None
            while block is not None:
                ahead: Future[Block] | None = None
                if (place := next(blocks, None)) is not None:
                    pool = pool or stack.enter_context(
                        ThreadPoolExecutor(1, thread_name_prefix="twa-prefetch")
                    )
                    ahead = pool.submit(prepare_ahead, *place)
                yield block
                for c in chosen:
                    c.check_torn()
                block = None if ahead is None else ahead.result()

    def _cut(
        self,
        wanted: Sequence[tuple[str, Part | None]],
        chosen: Sequence[Candidate],
        columns: int | None,
        within: Sequence[tuple[int, int]] | None,
    ) -> Iterator[tuple[int, int, int]]:
        """(index, begin, end) of each block."""
        for index, (key, part) in enumerate(wanted):
            total = math.prod(shape_of(self.info[key].shape, part))
            begin, end = within[index] if within else (0, total)
            bytes_per_unit = UNIT * sum(c.info[key].dtype.itemsize for c in chosen)
            width = columns or max(1, self.block_bytes // bytes_per_unit) * UNIT
            if total == 0:
                yield index, 0, 0
            for first in range(begin, end, width):
                yield index, first, min(first + width, end)

    def fingerprints(self) -> dict[str, str]:
        """For each place in the order, the candidate's name and its fingerprint."""
        if self._fingerprints is None:
            self._fingerprints = {
                f"candidate {k}": f"{c.name} ({c.fingerprint()})" for k, c in enumerate(self)
            }
        return self._fingerprints

    def blocks(self, keys: Iterable[str] | None = None, columns: int | None = None) -> Blocks:
        """The candidates' float tensors as a stream of blocks of columns.

        It can be read again and again, as `twa_kernels.orthonormalize` wants; memory does not grow
        with the files.

        Args:
            keys: names of the tensors; None: all float tensors
            columns: width of a block, at most; None: what makes block_bytes

        Returns:
            an iterable of lists of n flat tensors

        Raises:
            CandidateError: the candidates have no tensor of this name
            TwaError: columns is less than 1
        """
        if keys is None:
            names = [key for key, info in self.info.items() if info.dtype.is_floating_point]
        else:
            names = list(keys)
        if unknown := [name for name in names if name not in self.info]:
            raise CandidateError(
                f"expected a tensor {unknown[0]!r}, found none of that name", self[0].path
            )
        if columns is not None and columns < 1:
            raise TwaError(f"columns: expected at least 1, found {columns}")
        return Blocks(self, names, columns)

    def average(self, beta: Tensor | Sequence[float]) -> dict[str, Tensor]:
        """All tensors of a fixed average, in memory: theta = sum_i beta[i] * w_i.

            model.load_state_dict(candidates.average(twa.averages.uniform(len(candidates))))

        Floating-point tensors are summed in float64 and rounded to the dtype of the last
        candidate's file; numbers that are the same in all stay, such as -Inf in a mask. Integers
        and bools, and complex tensors, which must be the same in all, are those of the last
        candidate. Where one candidate has all the weight, all is that one's. Others of weight 0 are
        not read.

        BatchNorm's running statistics are averaged, too, which are not those of the averaged
        weights: `twa.update_bn` measures them.

        Args:
            beta: merge weights (n,) that sum to 1, such as those of `twa.averages`, or a list

        Returns:
            tensors by their keys in the files, without the parts of names that wrappers add

        Raises:
            CandidateError: the candidates do not fit each other, look quantised, or the average is
                not finite
            TwaError: beta are no such weights, or the average overflows its dtype

        Warns:
            CandidateWarning: extra state of modules is no tensor, and not there
        """
        fixed = FixedAverage(self, beta)
        if text := without_tensors(fixed.used[-1].extra):
            warnings.warn(text, CandidateWarning, stacklevel=2)
        return fixed.tensors()

    def weighted(self, key: str, weights: Tensor, part: Part | None = None) -> Tensor:
        """sum_i weights[i] * w_i of one tensor, summed in float64 block by block.

        Candidates of weight 0 are not read. Where the weights sum to 1, a number that all others
        have stays.

        Args:
            key: name of the tensor
            weights: (n,)
            part: only these slices of it, one per dimension

        Returns:
            float32 in the shape of the tensor or part; float64 for a float64 tensor
        """
        if self.recording is not None and self.recording.records(key):
            self.account(self.info[key].nbytes * int((weights != 0).sum()))
            found = self.recording.average(key, weights, part)
            return found.to(torch.promote_types(self.info[key].dtype, torch.float32))
        used = torch.nonzero(weights).flatten().tolist() or [0]
        out = torch.empty(
            shape_of(self.info[key].shape, part),
            dtype=torch.promote_types(self.info[key].dtype, torch.float32),
            device="cpu",
        )
        for block in self.stream([(key, part)], rows=used):
            total, _ = sum_of(block.rows, weights[used], out.dtype)
            out.view(-1)[block.begin : block.end] = total
        return out


def _listed(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[str | os.PathLike[str]]:
    """One or several paths as a list; TwaError if they are state_dicts."""
    listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if isinstance(paths, Mapping) or any(isinstance(path, Mapping) for path in listed):
        raise TwaError("paths: expected paths, found a dict: Candidates.of_states takes those")
    return listed


@dataclass(frozen=True)
class Blocks:
    """Blocks of columns of all candidates; see `Candidates.blocks`.

    float64 is read as float32.
    """

    candidates: Candidates
    keys: list[str]
    columns: int | None

    def __iter__(self) -> Iterator[list[Tensor]]:
        wanted = [(key, None) for key in self.keys]
        for block in self.candidates.stream(wanted, columns=self.columns):
            if block.rows[0].numel():
                yield readable(block.rows)


def readable(rows: Sequence[Tensor]) -> list[Tensor]:
    """Rows in a dtype that the kernels read: only float64 is converted, to float32."""
    return [row if row.dtype in FLOATS else row.float() for row in rows]
