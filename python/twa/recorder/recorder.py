"""`Recorder`: a run's snapshots as low-bit differences, kept while the model is trained."""

from __future__ import annotations

import contextlib
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

import twa_kernels as tk
from twa_kernels.layout import BITS, MOST_WEIGHT, num_tiles, tile_offsets

from .. import averages
from ..distributed.choose import find_ranks
from ..distributed.weights import check_written
from ..dtensors import local, reshard
from ..export.average import write_fixed
from ..io.averaging import FixedAverage, average_into, merge_weights
from ..io.candidates import Candidates
from ..io.checks import check_whole
from ..io.errors import CandidateWarning, StateError, TwaError
from ..io.loading import named_tensors
from ..io.mapped import Source
from ..io.recording import Recorded, Recording
from ..io.recording_files import MOST_STEP, Log, is_recording, others_in, read_log
from ..io.trail import Trail
from ..io.versions import RECORDER, problem
from ..modes import plain_weights
from ..spectral_norm import refresh_spectral_norms
from ..subspace import Subspace
from .contents import Watched, Weights, master_of, part_of, rounded
from .hooks import StepHook, with_hooks
from .store import Folder, Memory, Snapshot, is_empty, said, unchanged

STATE_KEYS = ("run", "bits", "count")
#: the name of an average, or its merge weights (n,)
Scheme: TypeAlias = str | Tensor | Sequence[float]


@dataclass
class _Pending:
    """A snapshot on its way to the CPU's memory.

    Attributes:
        snapshot: its tensors there, perhaps yet to be filled
        bad: () int32 there, see `twa_kernels.record`
        events: after which all of them are filled
    """

    snapshot: Snapshot
    bad: Tensor
    events: Sequence[torch.cuda.Event] = ()


class Recorder:
    """Records snapshots of a model while it is trained, 2 to 4 bits a weight each.

        recorder = twa.Recorder(model, every=100, path="run/twa")
        recorder.attach(optimizer)
        ...                                                  # train as ever
        recorder.apply("ema", half_life=2000)                # or "uniform", "lawa", "wsm"

    Each snapshot is coded as its difference from the decoded one before it, so errors do not add
    up. It costs one float32 copy of the weights beside the model, `bits / 8 + 1 / 64` bytes a
    weight and snapshot, and a few milliseconds each. Any average can be made afterwards, and
    `twa.Candidates(path)` are the snapshots as candidates, for `twa average`, too.

    What goes wrong with a snapshot never stops the training: it is left out with a
    CandidateWarning, and the next one is taken. A step counts once `step` has been called.

    On several ranks (torch.distributed) all make a recorder and call the same methods. Of a sharded
    model (FSDP2, DTensor) each rank records what it holds; of copies (DDP) the first one records.

    Args:
        model: what is recorded; its trainable parameters as differences, buffers as they are
        every: steps between snapshots
        bits: 8, 4, 3, 2 or 1
        start: step of the first snapshot: none before it
        path: directory for the files; None: snapshots stay in memory
        keep: how many snapshots are kept, the newest (in files up to a quarter more); None: all
        resume: go on with the recording in `path`, if there is one: `load_state_dict` or `rewind`
            says where; without them it goes on where it ends, with a warning
        weights: (name, parameter) -> tensor to record in the parameter's place, such as a float32
            master of a parameter in half precision; without it, see `take_masters_of`
        group: the process group; default: that of a sharded model, else all ranks

    Attributes:
        count: steps so far
        steps: steps of the snapshots that this rank has

    Raises:
        TwaError: an argument is none of what it can be; there is a recording in `path`, and
            resume=False, or it is of another model
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int,
        bits: int = 4,
        start: int = 0,
        path: str | Path | None = None,
        keep: int | None = None,
        resume: bool = False,
        weights: Weights | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        _check_options(every, bits, start, keep, resume, path)
        model = model.module if isinstance(model, DistributedDataParallel) else model
        self._ranks = find_ranks("auto", model, group)
        self.every, self.start, self.count = every, start, 0
        self.path, self.keep, self._weights = None if path is None else Path(path), keep, weights
        self._watched = Watched.of(model, bits, self._ranks)
        self._optimizers: list[torch.optim.Optimizer] = []
        self._reference: list[Tensor] = []
        self._state: Mapping[str, Tensor] = {}  # as it was kept last
        self._pending: list[_Pending] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}  # of copies to the CPU
        self._ended = self._swapped = self._closed = False
        self._unsaid = ""  # why recording has ended, if no warning has said so
        self._is_torn = False  # whether the reference may be a step ahead of the codes
        self._is_unplaced = False  # whether it goes on with a recording, and nobody has said where
        self._store: Memory | Folder = Memory(keep)
        if self.path is not None:
            with self._ranks.fail_together(f"opening {self.path}"):
                if self._watched.records:
                    self._open(self.path, resume)
        if resume:
            self._agree()
            self._is_unplaced = self.count > 0

    @property
    def model(self) -> nn.Module:
        """The model that is recorded."""
        return self._watched.model

    @property
    def run(self) -> str:
        """A name of this recording that no other has."""
        return self._watched.contents.run

    @property
    def bits(self) -> int:
        """Of the codes."""
        return self._watched.contents.bits

    @property
    def steps(self) -> list[int]:
        """Steps of the snapshots that this rank has."""
        self._settle(wait=True)
        return self._store.steps

    def __len__(self) -> int:
        return len(self.steps)

    def __bool__(self) -> bool:
        return True  # without snapshots, too: `if recorder: recorder.step()`

    def __repr__(self) -> str:
        where = "memory" if self.path is None else str(self.path)
        return f"Recorder({len(self._store.steps)} snapshots of {self.bits} bits in {where})"

    # While training ------------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Calls `step` after each step of an optimizer; returns a handle whose remove() ends that.

        Of several optimizers that step in turn, one is attached. A wrapper such as Accelerate's may
        leave steps out: those that are taken count.

        Raises:
            TwaError: it has no hooks that run, or the model is not the one that it was
        """
        optimizer = with_hooks(optimizer)
        self._watched.parameters()
        self.take_masters_of(optimizer)
        return optimizer.register_step_post_hook(StepHook(self.step))

    def take_masters_of(self, optimizer: torch.optim.Optimizer) -> None:
        """Records the float32 masters that an optimizer has of parameters in half precision.

        They are those in its state that are named so ("master", "fp32"). `attach` calls it.
        """
        self._optimizers.insert(0, optimizer)  # before one that it takes the place of

    def step(self, count: int | None = None) -> bool:
        """Counts a step of training; records after each `every` of them.

        Args:
            count: steps so far, by the trainer's own count; None: one more. Nothing happens where
                it has not grown, and a snapshot is taken where one was due since

        Returns:
            whether a snapshot was taken

        Raises:
            TwaError: an average is in the model, see `averaged`; count is no number of steps
        """
        self._check_not_swapped()
        count = self.count + 1 if count is None else _checked_step(count)
        if count <= self.count:
            return False
        if self._is_unplaced:
            self._is_unplaced = False
            _warn(
                f"resume=True goes on after step {self.count} of what is there: load_state_dict or"
                " rewind(step) says where a run goes on; a new run needs a new path"
            )
        before, self.count = self._due(self.count), count
        self._settle()
        return self.record() if self._due(count) > before else False

    def _due(self, count: int) -> int:
        """How many snapshots are due in so many steps."""
        first = self.start or self.every
        return (count - first) // self.every + 1 if count >= first else 0

    @torch.no_grad()
    def record(self, step: int | None = None) -> bool:
        """Takes a snapshot now.

        Args:
            step: of training; None: as many as were counted

        Returns:
            whether it was taken; on a GPU one with NaN or Inf is left out later

        Raises:
            TwaError: an average is in the model, see `averaged`; step is no number of one

        Warns:
            CandidateWarning: it was not taken, and why
        """
        self._check_not_swapped()
        step = _checked_step(self.count if step is None else step)
        self._settle()
        if self._ended or not self._watched.records:
            if self._unsaid:
                _warn(self._unsaid)
                self._unsaid = ""
            return False
        known = [*self._store.steps, *(p.snapshot.step for p in self._pending)]
        if known and step <= known[-1]:
            _warn(
                f"step {step} is not recorded: the last snapshot is of step {known[-1]}; rewind()"
                " to where training goes on from"
            )
            return False
        if reason := self._store.problem():
            _warn(f"step {step} is not recorded: {reason}")
            return False
        try:
            with plain_weights(self.model):
                weights = self._current()
                return self._take(step, weights) if known else self._begin(step, weights)
        except BaseException as error:  # of weights=, too
            self._end(step, error)
            return False

    def _end(self, step: int, error: BaseException) -> None:
        """Ends the recording, with a warning; what is no Exception, such as Ctrl-C, goes on up."""
        self._ended = True
        if isinstance(error, Exception):
            _warn(f"recording ends before step {step}: {said(error)}; make another Recorder")
            return
        again = "close() this one, and make another with resume=True"
        if self.path is None:
            again = "make another Recorder"
        self._unsaid = f"recording has ended before step {step}: it was interrupted; {again}"
        raise error

    def _check_not_swapped(self) -> None:
        """TwaError if the weights are not those of the training."""
        if self._swapped:
            raise TwaError("the model holds an average: leave averaged() before training goes on")

    def _current(self) -> list[Tensor]:
        """This rank's part of what is recorded, as it is now."""
        found = []
        for e, p in zip(self._watched.contents.trained, self._watched.parameters(), strict=True):
            w: Tensor | None = p
            if self._weights is not None:
                assert isinstance(p, nn.Parameter)
                w = self._weights(e.name, p)
                if not isinstance(w, Tensor):
                    raise TwaError(f"weights({e.name!r}): expected a tensor, found {w!r}")
            else:
                w = master_of(p, self._optimizers)
                w = p if w is None else w
            flat = local(w)
            if tuple(flat.shape) != e.sizes or not flat.is_floating_point():
                raise TwaError(
                    f"weights({e.name!r}): expected floating-point numbers of shape"
                    f" {list(e.sizes)}, found {flat.dtype} of {list(flat.shape)}"
                )
            found.append(flat.float() if flat.dtype == torch.float64 else flat)
        return found

    def _begin(self, step: int, weights: Sequence[Tensor]) -> bool:
        """Takes the first snapshot, which is kept whole."""
        if bad := self._not_finite(weights):
            _warn(f"step {step} is not recorded: {bad}")
            return False
        if any(w.element_size() == 2 for w in weights):
            dtype = next(w.dtype for w in weights if w.element_size() == 2)
            _warn(
                f"weights are recorded in {dtype}, in which small steps of training are lost: pass"
                " weights= if there are float32 masters"
            )
        entries = self._watched.contents.trained
        kept = [rounded(e, w) for e, w in zip(entries, weights, strict=True)]
        state = self._watched.state(frozen=True)
        _wait_for_gpus(self.model)
        with self._moving():
            try:
                self._store.begin(self._watched.contents, step, kept, state)
            except OSError as error:
                _warn(f"step {step} is not recorded: {error.filename}: {error.strerror}")
                return False
            self._reference = [t.to(torch.float32, copy=True).contiguous() for t in kept]
            self._state = state
        return True

    def _take(self, step: int, weights: Sequence[Tensor]) -> bool:
        """Takes a later snapshot."""
        # a model, or its masters, may have moved since
        self._reference = [t.to(w.device) for t, w in zip(self._reference, weights, strict=True)]
        devices = list(dict.fromkeys(w.device for w in weights))
        if len(devices) > 1 and (bad := self._not_finite(weights)):
            # one device could not undo what another has done
            _warn(f"step {step} is not recorded: {bad}")
            return False
        if devices != [torch.device("cpu")]:
            with self._moving():
                self._pending.append(self._take_from(devices, step, weights))
            return True
        state = self._watched.state()
        _wait_for_gpus(self.model)
        with self._moving():
            codes, scales, is_bad = tk.record(weights, self._reference, self.bits)
            self._add(_Pending(Snapshot(step, codes, scales, state), is_bad), weights)
        return not is_bad

    @contextlib.contextmanager
    def _moving(self) -> Iterator[None]:
        """A context in which the reference is not where the codes lead.

        What ends it early, such as Ctrl-C, leaves it there: in memory all snapshots are counted
        from the reference, and are lost.
        """
        before, self._is_torn = self._is_torn, True
        yield
        self._is_torn = before

    def _take_from(
        self, devices: Sequence[torch.device], step: int, weights: Sequence[Tensor]
    ) -> _Pending:
        """A snapshot on its way from GPUs: nothing waits for them."""
        tiles = tile_offsets([w.numel() for w in weights])
        pinned: dict[str, Any] = {"device": "cpu", "pin_memory": True}
        codes = torch.empty(tiles[-1], 16 * self.bits, dtype=torch.uint8, **pinned)
        scales = torch.empty(tiles[-1], dtype=torch.bfloat16, **pinned)
        bad = torch.empty(len(devices), dtype=torch.int32, **pinned)
        state = self._watched.state()
        events = [s.record_event() for s in map(torch.cuda.current_stream, _gpus(self.model))]
        for d, device in enumerate(devices):
            mine = [k for k, w in enumerate(weights) if w.device == device]
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                made = tk.record(
                    [weights[k] for k in mine], [self._reference[k] for k in mine], self.bits
                )
                with self._side_stream(device):
                    first = 0
                    for k in mine:
                        count = num_tiles(weights[k].numel())
                        at, of = slice(tiles[k], tiles[k + 1]), slice(first, first + count)
                        codes[at].copy_(made[0][of], non_blocking=True)
                        scales[at].copy_(made[1][of], non_blocking=True)
                        first += count
                    bad[d].copy_(made[2], non_blocking=True)
                    if device.type == "cuda":
                        events.append(self._streams[device].record_event())
                        for t in made:
                            t.record_stream(self._streams[device])
        return _Pending(Snapshot(step, codes, scales, state), bad, events)

    def _side_stream(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """A context for copies that wait for the codes, and that the training does not wait for."""
        if device.type != "cuda":
            return contextlib.nullcontext()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        side = self._streams[device]
        side.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(side)

    def _settle(self, wait: bool = False) -> None:
        """Hands snapshots over that have arrived.

        Args:
            wait: for all of them
        """
        while self._pending:
            first, *later = self._pending
            for event in first.events:
                if wait:
                    event.synchronize()
                elif not event.query():
                    return
            try:
                with self._moving():
                    self._pending = []  # if this one is lost, then so are those after it
                    self._add(first)
                    self._pending = later
            except BaseException as error:
                self._end(first.snapshot.step, error)

    def _add(self, pending: _Pending, weights: Sequence[Tensor] | None = None) -> None:
        """Hands a snapshot over, if its weights were finite."""
        snapshot = pending.snapshot
        if pending.bad.any():
            why = ""
            with contextlib.suppress(TwaError):  # the model may have changed meanwhile
                why = self._not_finite(self._current() if weights is None else weights)
            _warn(f"step {snapshot.step} is not recorded: {why or 'NaN or Inf in the weights'}")
            return
        state = {
            key: t
            for key, t in snapshot.state.items()
            if key not in self._state or not unchanged(t, self._state[key])
        }
        self._state = {**self._state, **state}
        self._store.add(replace(snapshot, state=state))

    def _not_finite(self, weights: Sequence[Tensor]) -> str:
        """Which tensor cannot be recorded; "" if all can."""
        for e, w in zip(self._watched.contents.trained, weights, strict=True):
            bad = ~(w.abs() < MOST_WEIGHT)
            if bad.any():
                return f"{e.name!r} has {int(bad.sum())} NaN or Inf of {w.numel()} weights"
        return ""

    # Averages ------------------------------------------------------------------------------------

    def beta(self, scheme: Scheme, *, until: int | None = None, **horizon: float | str) -> Tensor:
        """The merge weights of an average of the snapshots.

        Args:
            scheme: "uniform", "ema", "lawa", "wsm", "last", or merge weights (n,), also
                as a list
            until: the average as it was at this step: later snapshots have no weight; nor have
                those that `keep` has dropped since
            horizon: in steps of training, see `twa.averages.of_steps`

        Returns:
            (n,) float64

        Raises:
            TwaError: there is no such scheme, or no snapshot yet
        """
        return self._beta_of_all(self.common_steps(), scheme, until, **horizon)

    def _beta_of_all(
        self, steps: Sequence[int], scheme: Scheme, until: int | None, **horizon: float | str
    ) -> Tensor:
        """The merge weights of all snapshots of these steps: those after `until` have none."""
        beta = self._beta(known := _until(steps, until), scheme, **horizon)
        return torch.cat([beta, beta.new_zeros(len(steps) - len(known))])

    def common_steps(self) -> list[int]:
        """Steps of the snapshots that averages are made of: those that all ranks can read.

        All ranks call it.
        """
        return self._look()[0]

    def _look(self) -> tuple[list[int], Log | None]:
        """Steps of the snapshots that all ranks can read, and this rank's files, if it has any."""
        self.flush()
        log: Log | None = None
        readable: list[int] | None = None
        with self._ranks.fail_together("looking for snapshots"):
            if self._watched.records:
                self._check_whole()
                readable = self._store.steps
                if isinstance(self._store, Folder):
                    log = self._store.log() if self._store.written else None
                    readable = log.trail().steps if log else []
                for note in log.notes if log else ():
                    _warn(note)
        everyone = [s for s in self._ranks.all_gather_object(readable) if s is not None]
        common = sorted(set(everyone[0]).intersection(*everyone[1:])) if everyone else []
        return common, log

    def _check_whole(self) -> None:
        """TwaError if the snapshots in memory are not what was recorded."""
        if self._is_torn and isinstance(self._store, Memory):
            raise TwaError(
                "the snapshots in memory are lost: taking the last one was interrupted; pass path="
                " to have them in files"
            )

    def _beta(self, steps: Sequence[int], scheme: Scheme, **horizon: float | str) -> Tensor:
        """The merge weights of an average of the snapshots of these steps."""
        if not steps:
            raise TwaError("there is no snapshot yet")
        if isinstance(scheme, str):
            return averages.of_steps(steps, scheme, **horizon)
        return merge_weights(scheme, len(steps))

    def apply(self, scheme: Scheme, *, until: int | None = None, **horizon: float | str) -> None:
        """Moves the model to an average; see `beta`.

        BatchNorm's statistics become the average of the snapshots': call `twa.update_bn`.

        Raises:
            TwaError: as `beta`; or it overflows a parameter's dtype
        """
        common, log = self._look()
        steps = _until(common, until)
        self._write(steps, self._beta(steps, scheme, **horizon), log)

    @contextlib.contextmanager
    def averaged(
        self, scheme: Scheme, *, until: int | None = None, **horizon: float | str
    ) -> Iterator[None]:
        """A context in which the model is at an average, see `beta`; then it is as it was.

        Buffers come back, too, whatever was written to them inside. Before the first snapshot it is
        as it is, with a CandidateWarning: an evaluation does not stop the training.
        """
        common, log = self._look()
        steps = _until(common, until)
        if not steps:
            _warn("there is no snapshot yet: the model is as it is, and no average")
            yield
            return
        beta, was_swapped = self._beta(steps, scheme, **horizon), self._swapped
        reshard(self.model)  # what FSDP2 has gathered would outlive what is written
        with plain_weights(self.model):
            before = [(t, local(t).clone()) for t in self._written_over()]
        try:
            self._swapped = True
            self._write(steps, beta, log)
            yield
        finally:
            reshard(self.model)
            with torch.no_grad(), plain_weights(self.model):
                for t, old in before:
                    local(t).copy_(old)
            self._swapped = was_swapped

    def _written_over(self) -> list[Tensor]:
        """What an average is written to, and all buffers; not the frozen weights of a LoRA's base.

        Each once, if the model has it under several names.
        """
        names = {*self._watched.trained, *(c.name for c in self._watched.copied)}
        weights = [t for name, t in named_tensors(self.model).items() if name in names]
        return list(dict.fromkeys([*weights, *self.model.buffers()]))

    @torch.no_grad()
    def _write(self, steps: Sequence[int], beta: Tensor, log: Log | None) -> None:
        """Moves the model to merge weights (n,) of the snapshots of these steps; see `_look`."""
        watched = self._watched
        doing = self._ranks.fail_together("writing an average into the model")
        with doing, plain_weights(self.model):
            if watched.records:
                trail, states = self._trail(log)
                own = torch.zeros(len(trail.steps), dtype=torch.float64, device="cpu")
                own[[trail.steps.index(step) for step in steps]] = beta
                for k, p in enumerate(watched.parameters()):
                    _copy_average(trail, k, own, to := local(p))
                    check_written(watched.contents.trained[k].name, to, to.numel())
                self._write_state([states[trail.steps.index(step)] for step in steps], beta)
            self._send_copies()
            refresh_spectral_norms(self.model)

    def _write_state(self, states: Sequence[Mapping[str, Source]], beta: Tensor) -> None:
        """Writes the averages of float buffers, and of all others the last.

        Those of the snapshot that has all the weight, if one has. A buffer that has come, gone or
        changed its shape since stays the model's own, and so do frozen parameters.
        """
        tensors = named_tensors(self.model)
        alone = torch.nonzero(beta == 1.0).flatten().tolist()
        chosen = alone[0] if alone else len(states) - 1
        for key, name in self._watched.contents.names.items():
            if name not in tensors or isinstance(tensors[name], nn.Parameter):
                continue
            to = local(tensors[name])
            shapes = {state[key].info.shape if key in state else None for state in states}
            if shapes != {tuple(to.shape)}:
                continue
            rows = [state[key].read() for state in states]
            same = all(unchanged(rows[0], row) for row in rows[1:])
            if rows[0].is_floating_point() and not same:
                dtype = torch.promote_types(rows[0].dtype, torch.float32)
                value = average_into(torch.empty_like(rows[0], dtype=dtype), rows, beta)
            else:
                value = rows[chosen]
            to.copy_(value)

    def _send_copies(self) -> None:
        """Sends what one rank has written to the others that have it, too."""
        tensors = named_tensors(self.model)
        for c in self._watched.copied:
            t = tensors.get(c.name)
            has = t is not None and part_of(c.name, t, self._ranks) == (c.begin, c.sizes)
            values = local(t).to("cpu").contiguous() if t is not None and has else None
            sent = torch.empty(c.sizes, dtype=c.dtype, device="cpu") if values is None else values
            self._ranks.broadcast_(sent.view(-1).view(torch.uint8), c.owner)
            if t is not None and has and self._ranks.rank != c.owner:
                local(t).copy_(sent)

    def recording(self) -> Candidates:
        """The snapshots so far as candidates.

        In memory they are those of now: it takes another float32 copy of the weights. On several
        ranks only of a recording in files, which all of them can read; all call it.

        Raises:
            TwaError: there is no snapshot yet, or they are in the memory of other ranks
        """
        self.flush()
        self._warn_of_thawed()
        self._ranks.barrier()
        if self.path is not None:
            if not is_recording(self.path):
                raise TwaError("there is no snapshot yet: found no anchor_*.safetensors", self.path)
            return Candidates(self.path)
        if self._ranks.world_size > 1:
            raise TwaError("the snapshots are in the memory of several ranks: pass path=")
        if not self.steps:
            raise TwaError("there is no snapshot yet")
        assert isinstance(self._store, Memory)
        self._check_whole()
        # a copy, since the next snapshot changes the reference
        reference = [t.clone() for t in self._reference]
        trail, states = self._store.trail(self._watched.contents, reference)
        found = Recording([trail], [states], [self._watched.contents])
        return Candidates.of(found.candidates())

    def _warn_of_thawed(self) -> None:
        """Warns of frozen parameters that have changed: the first snapshot's are kept."""
        tensors = named_tensors(self.model)
        for key, name in self._watched.contents.names.items():
            t, kept = tensors.get(name), self._state.get(key)
            if not isinstance(t, nn.Parameter) or kept is None:
                continue
            if not unchanged(t.detach().cpu().contiguous(), kept):
                _warn(
                    f"{name!r} is frozen, and has changed since the first snapshot, whose value is"
                    " kept: files of averages have that"
                )
                return

    def subspace(self, *, center: str | int | Tensor = "last", **options: Any) -> Subspace:
        """The subspace of the snapshots, whose rows are the codes themselves.

        Args:
            center: as for `Subspace.from_candidates`, such as `beta("ema", half_life=2000)`
            options: further ones of `Subspace.from_candidates`
        """
        options = {"basis": "differences", "bits": self.bits, **options}
        return Subspace.from_candidates(self.model, self.recording(), center=center, **options)

    def save(
        self,
        path: str | Path,
        scheme: Scheme,
        *,
        until: int | None = None,
        dtype: torch.dtype | None = None,
        **horizon: float | str,
    ) -> None:
        """Writes an average to a safetensors file; the model stays as it is.

        Args:
            path: the file, which ends in .safetensors; its folder is made if there is none
            scheme, until, horizon: see `beta`
            dtype: of all floating-point tensors; None: their own

        Raises:
            TwaError: the path ends otherwise; as `beta` does
        """
        if Path(path).suffix != ".safetensors":
            raise TwaError("expected a name that ends in .safetensors", path)
        candidates = self.recording()
        steps = [c.step for c in candidates if isinstance(c, Recorded)]
        beta = self._beta_of_all(steps, scheme, until, **horizon)
        with self._ranks.fail_together(f"writing {path}"):
            if self._ranks.is_rank_zero:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                write_fixed(Path(path), FixedAverage(candidates, beta, dtype))

    # State ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of the training is to hold; each rank's own.

        With files it is where they are, and any rank's does for all: those of a sharded model call
        it together. Without, it is the snapshots themselves, of this rank.

        Warns:
            CandidateWarning: an average is in the model, and so in the checkpoint's weights
        """
        if self._swapped:
            _warn(
                "a checkpoint is made while the model holds an average, which its weights will be:"
                " leave averaged() first"
            )
        self.flush()
        # tuples: torch.distributed.checkpoint keeps them whole, and needs not know their shapes
        kept: tuple[Any, ...] = ()
        if isinstance(self._store, Memory) and self._store.first is not None:
            self._check_whole()
            first, rows = self._store.first, self._store.rows
            kept = (
                tuple(t.clone() for t in self._reference),
                (first[0], dict(first[1])),
                tuple((r.step, r.all_codes, r.all_scales, dict(r.state)) for r in rows),
            )
        of_ranks = {self._state_key: (tuple(self._store.written), kept)}
        if self.path is not None and self._watched.sharded:
            everyone = self._ranks.all_gather_object(of_ranks)
            of_ranks = {key: value for part in everyone for key, value in part.items()}
        return {
            "format": RECORDER,
            "run": self.run,
            "bits": self.bits,
            "count": self.count,
            **of_ranks,
        }

    @property
    def _state_key(self) -> str:
        """Under which a state has the snapshots of this rank."""
        rank, of = self._watched.contents.rank
        return f"rank_{rank}_of_{of}"

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was called: later snapshots are dropped.

        A recording in files must have been opened with resume=True.

        Raises:
            StateError: it is the state of another recorder, or a newer twa has made it
        """
        with self._ranks.fail_together("going on with a recording"):
            self._take_state(state)

    def _take_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where a state was taken."""
        self._check_open()
        check_state(state)
        if state["bits"] != self.bits:
            raise StateError(f"expected {self.bits} bits, found {state['bits']}")
        self.flush()
        if self._watched.records:
            found = state.get(self._state_key)
            if not isinstance(found, tuple | list) or len(found) != 2:
                kind = self._state_key.replace("_", " ")
                raise StateError(
                    f"it has nothing of this rank, {kind}: expected as many ranks, and with"
                    " path=None this one's own state"
                )
            self._load(state["run"], list(found[0]), found[1])
        self.count = state["count"]
        self._goes_on()

    def _load(self, run: str, steps: list[int], kept: Sequence[Any]) -> None:
        """Takes over, or goes back to, the snapshots of a state."""
        if isinstance(self._store, Memory):
            if steps and not kept:
                raise StateError("its snapshots are in files: pass path= and resume=True")
            self._load_memory(kept)
        elif steps:
            if run != self.run:
                raise StateError(
                    "holds another recording than the state's: expected the path that the state"
                    " was taken with, and resume=True",
                    self.path or "",
                )
            self._rewind(steps[-1])
            if self._store.steps != steps[-len(self._store.steps) :]:
                raise StateError("snapshots are missing", self.path or "")
        elif self._store.steps:
            self._rewind(None)

    def _load_memory(self, kept: Sequence[Any]) -> None:
        """Takes over the snapshots of a state."""
        store, entries = Memory(self.keep), self._watched.contents.trained
        self._is_torn = False
        if kept:
            reference, first, rows = kept
            found = [tuple(t.shape) for t in reference]
            if found != [e.sizes for e in entries]:
                raise StateError("its tensors are those of another model")
            devices = [local(p).device for p in self._watched.parameters()]
            self._reference = [
                t.to(d, torch.float32, copy=True) for t, d in zip(reference, devices, strict=True)
            ]
            store.first = (first[0], first[1])
            store.rows.extend(Snapshot(*row) for row in rows)
            self._state = store.state
        self._store = store

    def rewind(self, step: int | None) -> None:
        """Drops the snapshots after a step, from which training goes on; None: all.

        `count` becomes that step.

        Raises:
            TwaError: the first snapshot that is there is a later one, or the recorder is closed
        """
        with self._ranks.fail_together("dropping snapshots"):
            self._check_open()
            self.flush()
            self._rewind(step)

    def _rewind(self, step: int | None) -> None:
        """Drops this rank's snapshots after a step."""
        if isinstance(self._store, Folder):
            if self._store.steps:
                self._take_over(self._store.cut(step))
        else:
            self._rewind_memory(self._store, step)
        self.count = step or 0
        self._goes_on()

    def _goes_on(self) -> None:
        """Notes that the next snapshot can be taken."""
        self._ended, self._unsaid, self._is_unplaced = False, "", False

    def _rewind_memory(self, store: Memory, step: int | None) -> None:
        """Drops snapshots in memory after a step."""
        if step is None:
            self._is_torn = False
        self._check_whole()
        if step is not None and store.first is not None and store.first[0] > step:
            raise TwaError(f"expected a step of at least {store.first[0]}, the first snapshot's")
        gone = [row for row in store.rows if step is None or row.step > step]
        for row in reversed(gone):
            store.rows.pop()
            if step is not None:
                self._subtract(row)
        if step is None:
            store.first, self._reference = None, []
        self._state = store.state

    @torch.no_grad()
    def _subtract(self, row: Snapshot) -> None:
        """Moves the reference from after a difference to before it, up to rounding."""
        tiles = tile_offsets([t.numel() for t in self._reference])
        for k, t in enumerate(self._reference):
            codes = row.codes(tiles[k], tiles[k + 1]).to(t.device)
            scales = row.scales(tiles[k], tiles[k + 1]).to(t.device)
            tk.replay(t, [codes], [scales], [-1.0], self.bits)

    def flush(self) -> None:
        """Returns when all snapshots are where they belong: in `path`, if there is one."""
        self._settle(wait=True)
        self._store.flush()

    def close(self) -> None:
        """Writes what is left; another process may then record in `path`."""
        if not self._closed:
            self.flush()
            self._store.close()
        self._ended = self._closed = True

    def _check_open(self) -> None:
        """TwaError after `close`."""
        if self._closed:
            raise TwaError("the recorder is closed", self.path or "")

    # Files ---------------------------------------------------------------------------------------

    def _open(self, path: Path, resume: bool) -> None:
        """Opens this rank's directory, and goes on with what is in it."""
        rank, of = self._watched.contents.rank
        folder = path if of == 1 else path / f"rank_{rank}_of_{of}"
        if not resume and (not is_empty(folder) or (path.is_dir() and is_recording(path))):
            raise TwaError(
                "holds a recording; pass resume=True to go on with it, or choose another", folder
            )
        if others := others_in(path, of):
            raise TwaError(f"holds a recording of other ranks, {others}: choose another", path)
        self._store = Folder(folder, self.keep)
        if is_empty(folder):
            return
        try:
            log = read_log(folder)
            mine, theirs = self._watched.contents, log.contents
            for what in ("bits", "trained", "names", "rank"):
                here, there = getattr(mine, what), getattr(theirs, what)
                if here != there:
                    text = f"holds a recording of another model or job: {what} differs"
                    if what == "bits":
                        text = f"holds a recording of {there} bits: expected {here}"
                    raise TwaError(text, folder)
        except TwaError:
            self._store.close()
            raise
        for note in log.notes:
            _warn(note)
        self._watched = replace(self._watched, contents=theirs)
        self._store.resume(log)
        self._take_over(log)

    def _take_over(self, log: Log | None) -> None:
        """Puts reference, state and count where a log ends."""
        self._is_torn = False
        if log is None:
            self._reference, self._state, self.count = [], {}, 0
            return
        trail, last = log.trail(), len(log.steps)
        devices = [local(p).device for p in self._watched.parameters()]
        self._reference = [
            trail.snapshot(k, 0, e.numel, last).view(e.sizes).to(device, copy=True)
            for (k, e), device in zip(enumerate(log.contents.trained), devices, strict=True)
        ]
        self._state = {key: t.read() for key, t in log.states()[-1].items()}
        self.count = trail.steps[-1]

    def _agree(self) -> None:
        """Goes back to the last snapshot that all ranks have: one may have been killed earlier."""
        if self._ranks.world_size == 1:
            return
        everyone = self._ranks.all_gather_object(
            self._store.steps if self._watched.records else None
        )
        there = {rank: set(steps) for rank, steps in enumerate(everyone) if steps is not None}
        common = set.intersection(*there.values())
        if not common and any(len(steps) > 1 for steps in there.values()):
            counts = ", ".join(f"rank {rank} has {len(steps)}" for rank, steps in there.items())
            raise TwaError(f"the ranks have no snapshot in common: {counts}", self.path or "")
        last = max(common, default=None)
        with self._ranks.fail_together("dropping snapshots that other ranks lack"):
            if self._watched.records and self._store.steps:
                self._rewind(last)
        if last is None:  # each may have begun by itself
            run = self._ranks.broadcast_object(uuid.uuid4().hex)
            contents = replace(self._watched.contents, run=run)
            self._watched = replace(self._watched, contents=contents)
        self.count = last or 0

    def _trail(self, log: Log | None) -> tuple[Trail, list[Mapping[str, Source]]]:
        """This rank's snapshots, and what else there was at each; see `_look`."""
        if isinstance(self._store, Memory):
            return self._store.trail(self._watched.contents, self._reference)
        assert log is not None
        return log.trail(), log.states()


def check_state(state: Mapping[str, Any]) -> None:
    """StateError unless this is the state of a recorder, of this version."""
    if text := problem(state.get("format") if isinstance(state, Mapping) else state, RECORDER):
        raise StateError(f"expected the state of a Recorder: {text}")
    if missing := [key for key in STATE_KEYS if key not in state]:
        raise StateError(f"the state of a Recorder has no {missing[0]!r}")


def _checked_step(step: int) -> int:
    """The number of a step; TwaError if it is none."""
    if type(step) is not int or not 0 <= step < MOST_STEP:
        raise TwaError(f"expected a whole number of at least 0, found {step!r}", "step")
    return step


def _until(steps: Sequence[int], last: int | None) -> list[int]:
    """The steps up to one; all without one."""
    known = [step for step in steps if last is None or step <= last]
    if steps and not known:
        raise TwaError(f"expected a step of at least {steps[0]}, the first one's", "until")
    return known


def _copy_average(trail: Trail, k: int, beta: Tensor, to: Tensor) -> None:
    """Writes tensor k of an average to a tensor."""
    whole = (
        to if to.is_contiguous() else torch.empty(to.shape, dtype=torch.float32, device=to.device)
    )
    begin = 0
    for part in trail.average_blocks(k, beta, to.device):
        whole.view(-1)[begin : begin + part.numel()] = part
        begin += part.numel()
    if whole is not to:
        to.copy_(whole)


def _gpus(model: nn.Module) -> set[torch.device]:
    """The GPUs that a model's tensors are on."""
    return {t.device for t in [*model.parameters(), *model.buffers()] if t.is_cuda}


def _wait_for_gpus(model: nn.Module) -> None:
    """Returns when copies of a model's tensors are filled."""
    for device in _gpus(model):
        torch.cuda.synchronize(device)


def _check_options(
    every: int, bits: int, start: int, keep: int | None, resume: bool, path: object
) -> None:
    """TwaError if an option is none of what it can be."""
    for name, value, least in (("every", every, 1), ("start", start, 0), ("keep", keep, 2)):
        if value is not None:
            check_whole(value, least, name)
    if type(bits) is not int or bits not in BITS:
        raise TwaError(f"expected one of {BITS}, found {bits!r}", "bits")
    if resume and path is None:
        raise TwaError("resume=True: expected path=, where the recording is")


def _warn(text: str) -> None:
    warnings.warn(text, CandidateWarning, stacklevel=4)
