"""`Recording`: the snapshots of a run as candidates, and averages of them without decoding."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from twa_kernels.layout import TILE

from .candidate import Candidate
from .errors import CandidateError, CandidateWarning
from .mapped import Part, Pieces, Source, TensorInfo, covered
from .recording_files import STEP, Contents, folders_of, read_log
from .trail import Decoded, Trail


class Recorded(Candidate):
    """A snapshot of a recording, as a candidate.

    Args:
        recording: that it is of
        number: of the snapshot
        path: its file
        tensors: by key
        ignore: patterns of keys to leave out
    """

    def __init__(
        self,
        recording: Recording,
        number: int,
        path: Path,
        tensors: Mapping[str, Source],
        ignore: Sequence[str],
    ) -> None:
        self.path, self.entry, self.kind = path, None, "recording"
        self.recording, self.number = recording, number
        self.ignore, self.metadata, self.extra = tuple(ignore), {}, {}
        wanted = self._wanted(tensors)
        if not wanted:
            raise CandidateError(f"expected tensors, found all ignored by {self.ignore}", path)
        self._hold(wanted)
        self._check_claim()
        self.files = tuple(file.path for file in self._maps)

    @property
    def step(self) -> int:
        """Of training."""
        return self.recording.steps[self.number]

    @property
    def name(self) -> str:
        """Such as step_900."""
        return f"step_{self.step}"

    def fingerprint(self) -> str:
        """Digest of the recording's name, the step, and samples of the files."""
        digest = hashlib.sha256(f"{self.recording.run} {self.step}".encode())
        digest.update(super().fingerprint().encode())
        return digest.hexdigest()[:16]


class Recording:
    """Snapshots that several trails have together, each of them a part of the model.

    Args:
        trails: one for each rank that has recorded
        states: for each trail: its steps, and what else the model had at each, by key
        contents: what each is of
        path: the directory; None: in memory
        notes: what cannot be read, a sentence each

    Attributes:
        run: a name that no other recording has
        steps: of training, of those snapshots that all parts have
        bits: of the codes
        notes: as they were given

    Raises:
        CandidateError: a part is missing, or there is no snapshot that all parts have
    """

    def __init__(
        self,
        trails: Sequence[Trail],
        states: Sequence[Sequence[Mapping[str, Source]]],
        contents: Sequence[Contents],
        path: Path | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.trails, self.notes = list(trails), list(notes)
        self._numbers = [{step: k for k, step in enumerate(t.steps)} for t in trails]
        self.path, self.run, self.bits = path, contents[0].run, contents[0].bits
        common = set(trails[0].steps).intersection(*(t.steps for t in trails[1:]))
        self.steps = sorted(common)
        if not self.steps:
            raise CandidateError("its ranks have no snapshot in common", path or "")
        # key -> (trail, number of the tensor in it) of each of its parts
        self._parts: dict[str, list[tuple[int, int]]] = {}
        for at, trail in enumerate(trails):
            for k, e in enumerate(trail.entries):
                self._parts.setdefault(e.key, []).append((at, k))
        self._states = states
        self.names = {e.key: e.name for t in trails for e in t.entries}
        for c in contents:
            self.names.update(c.names)
        self.aliases = {a: key for c in contents for a, key in c.aliases.items()}
        for key, parts in self._parts.items():
            entries = [trails[at].entries[k] for at, k in parts]
            blocks = [(e.begin, e.sizes) for e in entries]
            alike = len({(e.shape, e.dtype, e.name) for e in entries}) == 1
            if not alike or not covered(entries[0].shape, blocks):
                raise CandidateError(
                    f"{key!r}: its parts do not make a whole: are the files of all ranks there?",
                    path or "",
                )

    def own_number(self, at: int, number: int) -> int:
        """The number, in trail `at`, of a snapshot of the recording."""
        return self._numbers[at][self.steps[number]]

    def own_beta(self, at: int, beta: Tensor) -> Tensor:
        """Merge weights of trail `at`'s own snapshots, from those of the recording's."""
        trail = self.trails[at]
        if trail.steps == self.steps:
            return beta.double()
        own = torch.zeros(len(trail.steps), dtype=torch.float64, device="cpu")
        own[[self._numbers[at][step] for step in self.steps]] = beta.double()
        return own

    def _source(self, key: str, of: int | Tensor) -> Source:
        """A recorded tensor in a snapshot, or in an average."""
        blocks: list[tuple[tuple[int, ...], Source]] = []
        for at, k in self._parts[key]:
            own = self.own_number(at, of) if isinstance(of, int) else self.own_beta(at, of)
            trail = self.trails[at]
            blocks.append((trail.entries[k].begin, trail.decoded(k, own)))
        shape = self.trails[self._parts[key][0][0]].entries[self._parts[key][0][1]].shape
        if len(blocks) == 1 and blocks[0][1].info.shape == shape:
            return blocks[0][1]
        return Pieces(TensorInfo(shape, blocks[0][1].info.dtype), tuple(blocks))

    def records(self, key: str) -> bool:
        """Whether a tensor is recorded, rather than kept as it is."""
        return self.aliases.get(key, key) in self._parts

    def average(self, key: str, beta: Tensor, part: Part | None = None) -> Tensor:
        """A recorded tensor, or a part of it, in a weighted average of the snapshots: float32.

        Args:
            key: of the tensor
            beta: (n,), sums to 1
            part: one slice per dimension
        """
        return self._source(self.aliases.get(key, key), beta).read(part)

    def average_blocks(self, key: str, beta: Tensor) -> Iterator[Tensor]:
        """The same of all of the tensor, as blocks of flat columns in order: float32."""
        source = self._source(self.aliases.get(key, key), beta)
        if not isinstance(source, Decoded):
            yield source.read().reshape(-1)
            return
        yield from source.trail.average_blocks(source.k, source.beta)

    def block(self, key: str, part: Part | None) -> tuple[Trail, int, int] | None:
        """Where codes of a part of a tensor lie, if they can be taken as they are.

        Returns:
            trail, number of the tensor in it, and where the part begins in it, a multiple of 128;
            None where the part is no run of whole tiles of one trail with the recording's snapshots
        """
        key = self.aliases.get(key, key)
        for at, k in self._parts[key]:
            trail, e = self.trails[at], self.trails[at].entries[k]
            wanted = part or tuple(slice(0, n) for n in e.shape)
            bounds = [s.indices(n)[:2] for s, n in zip(wanted, e.shape, strict=True)]
            inside = [
                b >= o and end <= o + n
                for (b, end), o, n in zip(bounds, e.begin, e.sizes, strict=True)
            ]
            whole = [
                (b, end) == (o, o + n)
                for (b, end), o, n in zip(bounds[1:], e.begin[1:], e.sizes[1:], strict=True)
            ]
            if not all(inside) or not all(whole) or trail.steps != self.steps:
                continue
            first = (bounds[0][0] - e.begin[0]) * math.prod(e.sizes[1:]) if bounds else 0
            return (trail, k, first) if first % TILE == 0 else None
        return None

    def candidates(self, ignore: Sequence[str] = ()) -> list[Recorded]:
        """Its snapshots, oldest first.

        Args:
            ignore: patterns of keys to leave out
        """
        return [self._candidate(number, ignore) for number in range(len(self.steps))]

    def _candidate(self, number: int, ignore: Sequence[str]) -> Recorded:
        tensors: dict[str, Source] = {key: self._source(key, number) for key in self._parts}
        for at, states in enumerate(self._states):
            tensors |= states[self.own_number(at, number)]
        tensors |= {a: tensors[key] for a, key in self.aliases.items() if key in tensors}
        path = (self.path or Path("recording")) / STEP.format(self.steps[number])
        return Recorded(self, number, path, tensors, ignore)


def open_recording(folder: Path) -> Recording:
    """The recording in a directory.

    Raises:
        CandidateError: it is damaged from the first snapshot on, or parts of it are missing

    Warns:
        CandidateWarning: later snapshots cannot be read
    """
    logs = [read_log(f) for f in folders_of(folder)]
    runs = {log.contents.run: log.folder for log in logs}
    if len(runs) > 1 or len({(log.contents.bits, log.contents.rank[1]) for log in logs}) > 1:
        raise CandidateError("its ranks' directories are of different recordings", folder)
    notes = [note for log in logs for note in log.notes]
    for note in notes:
        warnings.warn(note, CandidateWarning, stacklevel=2)
    states = [log.states() for log in logs]
    trails, contents = [log.trail() for log in logs], [log.contents for log in logs]
    return Recording(trails, states, contents, folder, notes)
