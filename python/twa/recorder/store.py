"""Where snapshots go: into memory, or into a directory by a thread of its own."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..io.atomic import clear_unfinished, lock, open_lock, unlock
from ..io.checks import first_line
from ..io.errors import CandidateError, CandidateWarning, TwaError
from ..io.mapped import Held, MappedFile, Source
from ..io.recording_files import (
    ANCHOR,
    ANCHORS,
    STATE,
    STEP,
    STEPS,
    WEIGHTS,
    Contents,
    Log,
    read_log,
    run_of,
    write_snapshot,
)
from ..io.trail import Trail

BACKLOG = 4  # snapshots that wait for the disk, at most
LOCK = "recording.lock"


@dataclass(frozen=True)
class Snapshot:
    """What a later snapshot adds: a row of a trail, in memory.

    Attributes:
        step: of training
        all_codes: (tiles, 16 * bits) uint8
        all_scales: (tiles,) bfloat16
        state: what else has changed, by key
    """

    step: int
    all_codes: Tensor
    all_scales: Tensor
    state: Mapping[str, Tensor]

    def codes(self, first: int, last: int) -> Tensor:
        """Codes of some tiles."""
        return self.all_codes[first:last]

    def scales(self, first: int, last: int) -> Tensor:
        """Their scales."""
        return self.all_scales[first:last]

    def prefetch(self, first: int, last: int) -> None:
        """It is there."""

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """It lies in none."""
        return ()


@dataclass(frozen=True)
class Reference:
    """The last snapshot as the base of a trail.

    Attributes:
        tensors: float32
    """

    tensors: Sequence[Tensor]

    def columns(self, k: int, begin: int, end: int) -> Tensor:
        """Some weights of tensor k as they lie flat: float32, a copy."""
        return self.tensors[k].view(-1)[begin:end].clone()

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """It lies in none."""
        return ()


class Memory:
    """Snapshots in memory: the codes of all but the first, whose weights the last one gives.

    Args:
        keep: how many are kept, the newest; None: all
    """

    def __init__(self, keep: int | None) -> None:
        self.keep = keep
        self.first: tuple[int, Mapping[str, Tensor]] | None = None  # step and state
        self.rows: deque[Snapshot] = deque()

    @property
    def steps(self) -> list[int]:
        """Steps of the snapshots."""
        return [] if self.first is None else [self.first[0], *(r.step for r in self.rows)]

    @property
    def written(self) -> list[int]:
        """Steps of the snapshots that can be read."""
        return self.steps

    @property
    def state(self) -> dict[str, Tensor]:
        """What else there was at the last snapshot, by key."""
        found = {} if self.first is None else dict(self.first[1])
        for row in self.rows:
            found |= row.state
        return found

    def begin(
        self, contents: Contents, step: int, weights: Sequence[Tensor], state: Mapping[str, Tensor]
    ) -> None:
        """Takes the first snapshot, whose weights the reference gives."""
        self.first = (step, {key: _pageable(t) for key, t in state.items()})

    def add(self, snapshot: Snapshot) -> None:
        """Takes a later one; the oldest is dropped."""
        assert self.first is not None
        codes, scales = _pageable(snapshot.all_codes), _pageable(snapshot.all_scales)
        state = {key: _pageable(t) for key, t in snapshot.state.items()}
        self.rows.append(Snapshot(snapshot.step, codes, scales, state))
        while self.keep is not None and len(self.rows) >= self.keep:
            oldest = self.rows.popleft()
            self.first = (oldest.step, {**self.first[1], **oldest.state})

    def problem(self) -> str:
        """There is none."""
        return ""

    def flush(self) -> None:
        """All is there."""

    def trail(
        self, contents: Contents, reference: Sequence[Tensor]
    ) -> tuple[Trail, list[Mapping[str, Source]]]:
        """The snapshots, and what else there was at each."""
        assert self.first is not None
        state: dict[str, Source] = {key: Held(t) for key, t in self.first[1].items()}
        states: list[Mapping[str, Source]] = [state]
        for row in self.rows:
            state = {**state, **{key: Held(t) for key, t in row.state.items()}}
            states.append(state)
        base, last = Reference(reference), len(self.rows)
        rows = list(self.rows)
        return Trail(contents.bits, contents.trained, self.steps, base, last, rows), states

    def close(self) -> None:
        """Nothing to do."""


class Folder:
    """Snapshots in files, written by a thread; an error stays until a later attempt succeeds.

    Args:
        folder: where they go
        keep: how many are kept, the newest, and up to a quarter more; None: all

    Raises:
        TwaError: another process records there
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
        self.folder, self.keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = open_lock(folder / LOCK)
        if not lock(self._lock):
            self._lock.close()
            raise TwaError("another process records there", folder)
        names = [*(f"{kind}_*.safetensors" for kind in ("anchor", "step"))]
        clear_unfinished(folder, names)
        self.contents: Contents | None = None
        self._steps: list[int] = []  # written, or waiting
        self._number = 0  # of the last of them
        self._waiting: deque[tuple[int, Snapshot]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="twa-recorder")
        self._work: Future[None] | None = None
        self._error: Exception | None = None
        self._anchor: tuple[int, ...] = ()  # which file was found to be this run's
        self._notes: dict[str, bool] = {}  # warnings, and whether they are out
        self._process = os.getpid()

    @property
    def steps(self) -> list[int]:
        """Steps of the snapshots, written or waiting."""
        return list(self._steps)

    @property
    def written(self) -> list[int]:
        """Steps of the snapshots that can be read, when nothing is being written."""
        return self._steps[: len(self._steps) - len(self._waiting)]

    def begin(
        self, contents: Contents, step: int, weights: Sequence[Tensor], state: Mapping[str, Tensor]
    ) -> None:
        """Writes the first snapshot; OSError if that fails."""
        on_cpu = [w.detach().cpu().contiguous() for w in weights]
        tensors = {WEIGHTS + e.key: w for e, w in zip(contents.trained, on_cpu, strict=True)}
        tensors |= {STATE + key: t for key, t in state.items()}
        write_snapshot(self.folder, contents, 0, step, tensors)
        self.contents, self._steps, self._number = contents, [step], 0

    def resume(self, log: Log) -> None:
        """Goes on after the snapshots of a log; files that it cannot read are moved aside."""
        for path in log.left:
            path.unlink()
        for path in log.beyond:
            path.rename(path.with_name(f"{path.name}.aside"))
        self.contents = log.contents
        self._steps = [log.anchor.step, *(s.step for s in log.steps)]
        self._number = log.anchor.number + len(log.steps)

    def add(self, snapshot: Snapshot) -> None:
        """Has the thread write a later one."""
        self._steps.append(snapshot.step)
        self._number += 1
        self._waiting.append((self._number, snapshot))
        self._start()
        if len(self._waiting) > BACKLOG and self._work is not None:
            self._work.result()

    def _start(self) -> None:
        """Has the thread write what waits, after what it is at."""
        try:
            self._work = self._pool.submit(self._write_waiting)
        except RuntimeError as error:  # no further thread is allowed, or the interpreter ends
            self._work, self._error = None, error

    def _write_waiting(self) -> None:
        """Writes in order; stops at an error, since nothing can be read beyond a gap."""
        assert self.contents is not None
        if self._error is not None and (damage := self._damage()):
            self._error = damage
            return
        while self._waiting:
            number, snapshot = self._waiting[0]
            tensors = {"codes": snapshot.all_codes, "scales": snapshot.all_scales}
            tensors |= {STATE + key: t for key, t in snapshot.state.items()}
            try:
                self._check_there()
                write_snapshot(self.folder, self.contents, number, snapshot.step, tensors)
                self._waiting.popleft()
            except Exception as error:  # whatever it is, the training goes on
                self._error = error
                return
            try:
                if self.keep is not None:
                    self._drop(self.keep)
            except Exception as error:
                self._notes.setdefault(f"{self.folder}: old snapshots stay: {error}", False)
        self._error = None

    def _check_there(self, whole: bool = False) -> None:
        """CandidateError if a file without which the next one cannot be read has been removed.

        Args:
            whole: looks for all files; else, as for each snapshot, for the first and the last: the
                directory of a recording of months is long
        """
        assert self.contents is not None
        first, *later = self.written
        anchor = self.folder / ANCHOR.format(first)
        paths = [anchor, *(self.folder / STEP.format(k) for k in (later if whole else later[-1:]))]
        there = set(os.listdir(self.folder)) if whole else {p.name for p in paths if p.exists()}
        for path in paths:
            if path.name not in there:
                raise CandidateError("is gone, and later snapshots cannot be read without", path)
        stat = anchor.stat()
        found = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if found != self._anchor and run_of(anchor) != self.contents.run:
            raise CandidateError("is of another run", anchor)
        self._anchor = found

    def _damage(self) -> Exception | None:
        """Why not all that is written can be read, if so."""
        try:
            self._check_there(whole=True)
        except (OSError, TwaError) as error:
            return error
        return None

    def _drop(self, keep: int) -> None:
        """Drops the oldest, several at a time, by writing an anchor in the place of one."""
        files = [p for p in self.folder.iterdir() if STEPS.fullmatch(p.name)]
        if len(files) + 1 <= keep + keep // 4:
            return
        log = read_log(self.folder)
        at = len(log.steps) + 1 - keep
        if at <= 0:
            return
        trail, anchor = log.trail(), log.steps[at - 1]
        tensors = {STATE + key: t.read() for key, t in log.states()[at].items()}
        for k, e in enumerate(log.contents.trained):
            # float32: what comes after was coded against just these numbers
            tensors[WEIGHTS + e.key] = trail.snapshot(k, 0, e.numel, at).view(e.sizes)
        write_snapshot(self.folder, log.contents, anchor.number, anchor.step, tensors)
        del self._steps[: self._steps.index(anchor.step)]
        for path in [log.anchor.path, *(s.path for s in log.steps[:at]), *log.left]:
            path.unlink()

    def problem(self) -> str:
        """Why no further snapshot can be taken now; what failed is tried again meanwhile."""
        if self._is_forked():
            return f"{self.folder}: the process that this one was forked from records there"
        error = self._error  # which the thread may clear meanwhile
        if error is None:
            return ""
        text = f"{self.folder}: {said(error)}"
        if self._work is None or self._work.done():
            self._start()
        return text

    def flush(self) -> None:
        """Returns when all is written that can be; warns of what is not."""
        if self._is_forked():
            return
        if self._waiting:
            self._start()
        if self._work is not None:
            self._work.result()
        elif self._waiting:  # there can be no thread
            self._write_waiting()
        if self._steps and not self._waiting and not self._lock.closed:
            self._error = self._damage()
        for text in [text for text, is_out in self._notes.items() if not is_out]:
            warnings.warn(text, CandidateWarning, stacklevel=3)
            self._notes[text] = True
        if (error := self._error) is not None:
            text = said(error)
            if self._waiting:
                text = (
                    f"{len(self._waiting)} snapshots could not be written ({text}); they wait in"
                    " memory"
                )
            warnings.warn(f"{self.folder}: {text}", CandidateWarning, stacklevel=3)

    def _is_forked(self) -> bool:
        """Whether this process is a copy of the one that has the thread and the lock."""
        return os.getpid() != self._process

    def log(self) -> Log:
        """What is written."""
        return read_log(self.folder)

    def cut(self, step: int | None) -> Log | None:
        """Removes the snapshots after a step, None: all; returns what is left."""
        if self._is_forked():
            raise TwaError(self.problem())
        self.flush()
        log = self.log()
        if step is not None and log.anchor.step > step:
            raise TwaError(
                f"expected a step of at least {log.anchor.step}, the first that is kept: to train"
                " on from an earlier one, record into another path",
                self.folder,
            )
        self._waiting.clear()
        self._error = None
        kept = [s for s in log.steps if step is not None and s.step <= step]
        # the last one first: what is left can be read whenever this is interrupted
        for s in reversed(log.steps[len(kept) :]):
            s.path.unlink()
        log = replace(log, steps=kept)
        self.resume(log)
        if step is not None:
            return log
        log.anchor.path.unlink()
        self._steps, self._number = [], 0
        return None

    def close(self) -> None:
        """Ends the thread; another process may then record there."""
        if self._is_forked():
            return
        self._pool.shutdown(wait=True)
        unlock(self._lock)
        self._lock.close()


def said(error: BaseException) -> str:
    """What an error says, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, TwaError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}"


def _pageable(t: Tensor) -> Tensor:
    """A tensor outside of pinned memory, which is for what is on its way."""
    return t.clone() if t.is_pinned() else t


def is_empty(folder: Path) -> bool:
    """Whether there are no files of a recording in a directory, or no directory."""
    if not folder.is_dir():
        return True
    return not any(ANCHORS.fullmatch(p.name) or STEPS.fullmatch(p.name) for p in folder.iterdir())


def unchanged(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
