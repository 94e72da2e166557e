"""Batches that come again: each pass over a task's data has an order of its own that depends on nothing else, and is shared out over ranks."""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from .world import World

SEARCH_DEPTH = 4  # attributes of attributes in which a data source's generators are looked for


def mix(*numbers: int) -> int:
    """A seed below 2^63 from several numbers."""
    return int.from_bytes(hashlib.sha256(",".join(map(str, numbers)).encode()).digest()[:8], "little") >> 1


def seed_all(seed: int) -> None:
    """Python's, NumPy's and torch's generators."""
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


class EveryOther:
    """Batches start, start + 2, ... of re-iterable data."""

    def __init__(self, batches: Iterable, start: int) -> None:
        self.batches, self.start = batches, start

    def __iter__(self) -> Iterator:
        return (batch for k, batch in enumerate(self.batches) if k % 2 == self.start)


class Moved:
    """A task's batches, with their tensors on a device."""

    def __init__(self, batches: Iterable, device: torch.device) -> None:
        self.batches, self.device = batches, device

    def __iter__(self) -> Iterator:
        return (to_device(batch, self.device) for batch in self.batches)


def to_device(batch: object, device: torch.device) -> object:
    """The batch with its tensors there, in the same tuples, lists and dicts."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(v, device) for v in batch))
    return type(batch)(to_device(v, device) for v in batch) if isinstance(batch, list | tuple) else batch


class _ChosenIndices:
    """The index lists of some of a batch sampler's batches."""

    def __init__(self, batches: Iterable, keep: Callable[[int], bool], limit: float) -> None:
        self.batches, self.keep, self.limit = batches, keep, limit
        self.total = 0
        self.positions: deque[int] = deque()

    def __iter__(self) -> Iterator:
        for indices in self.batches:
            if self.total >= self.limit:
                return
            k, self.total = self.total, self.total + 1
            if self.keep(k):
                self.positions.append(k)
                yield indices


class _Chosen:
    """(position, batch) of those of the first `limit` batches of one pass that `keep` asks for; `total` is how many there were, once it is over. A
    DataLoader over a dataset with indices loads no others."""

    def __init__(self, source: Iterable, keep: Callable[[int], bool], limit: float) -> None:
        self.total, self._move, self._limit = 0, None, limit
        if isinstance(source, Moved):
            self._move, source = source.device, source.batches
        self._keep, self._indices = keep, None
        if type(source) is DataLoader and source.batch_sampler is not None and not isinstance(source.dataset, IterableDataset):
            self._indices = _ChosenIndices(source.batch_sampler, keep, limit)
            source = DataLoader(
                source.dataset,
                batch_sampler=self._indices,
                num_workers=source.num_workers,
                collate_fn=source.collate_fn,
                pin_memory=source.pin_memory,
                timeout=source.timeout,
                worker_init_fn=source.worker_init_fn,
                multiprocessing_context=source.multiprocessing_context,
                generator=source.generator,
                prefetch_factor=source.prefetch_factor,
            )
        self._iterator = iter(source)

    def __iter__(self) -> _Chosen:
        return self

    def __next__(self) -> tuple[int, object]:
        while True:
            try:
                if self._indices is None and self.total >= self._limit:
                    raise StopIteration
                batch = next(self._iterator)
            except StopIteration:
                self.total = self._indices.total if self._indices else self.total
                raise
            if self._indices:
                return self._indices.positions.popleft(), self._moved(batch)
            k, self.total = self.total, self.total + 1
            if self._keep(k):
                return k, self._moved(batch)

    def _moved(self, batch: object) -> object:
        return batch if self._move is None else to_device(batch, self._move)


def _generators(source: object, depth: int = SEARCH_DEPTH) -> list[torch.Generator]:
    """torch.Generator objects among the attributes of a data source, its sampler, its dataset, ..."""
    found: dict[int, torch.Generator] = {}
    for value in getattr(source, "__dict__", {}).values():
        if isinstance(value, torch.Generator):
            found[id(value)] = value
        elif depth and hasattr(value, "__dict__") and not isinstance(value, Tensor | nn.Module | type) and not callable(value):
            found |= {id(g): g for g in _generators(value, depth - 1)}
    return list(found.values())


def _set_epoch(source: object, number: int, depth: int = 2) -> None:
    for value in (source, *getattr(source, "__dict__", {}).values()):
        if callable(getattr(value, "set_epoch", None)):
            value.set_epoch(number)
        elif value is not source and depth and hasattr(value, "__dict__") and not isinstance(value, Tensor | nn.Module | type):
            _set_epoch(value, number, depth - 1)


class Pass:
    """(position, batch) of one pass over a source. Its random numbers come from the source's own generators and the global ones, seeded with the
    source's seeds, `seed` and `number`; to everyone else it looks as if none had been drawn. So a pass can be repeated, and passes may interleave."""

    def __init__(self, source: Iterable, number: int, seed: int, keep: Callable[[int], bool], limit: float = math.inf) -> None:
        self._sources = _generators(source)
        self._states: tuple | None = None
        with self._own_random():
            for g in self._sources:
                g.manual_seed(mix(g.initial_seed(), seed, number))
            seed_all(mix(seed, number))
            _set_epoch(source, number)
            self._chosen = _Chosen(source, keep, limit)

    def _random_states(self) -> tuple:
        return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), [g.get_state() for g in self._sources]

    def _set_random_states(self, states: tuple) -> None:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        for g, state in zip(self._sources, states[3], strict=True):
            g.set_state(state)

    @contextlib.contextmanager
    def _own_random(self) -> Iterator[None]:
        outside = self._random_states()
        if self._states is not None:
            self._set_random_states(self._states)
        try:
            yield
        finally:
            self._states = self._random_states()
            self._set_random_states(outside)

    def __iter__(self) -> Pass:
        return self

    def __next__(self) -> tuple[int, object]:
        with self._own_random():
            return next(self._chosen)

    @property
    def total(self) -> int:
        return self._chosen.total


class Stream:
    """Pass after pass over a source, `per_step` batches a step, shared out over the ranks of a world. Counted over all passes, batch g belongs to
    step g // per_step and to rank (g % per_step) % size: so a step sees the same batches on any number of ranks."""

    def __init__(self, source: Iterable, world: World, per_step: int, seed: int) -> None:
        if per_step < world.size:
            raise ValueError(f"batches per step: expected at least one for each of the {world.size} ranks, found {per_step}")
        self.source, self.world, self.per_step, self.seed = source, world, per_step, seed
        self.step = 0
        self._first: object = None  # the first batch of the last step, on the first rank
        self._open(0, 0)

    def _open(self, number: int, offset: int) -> None:
        """Pass `number`, whose first batch is the stream's batch `offset`."""
        self._number, self._offset = number, offset
        self._pass = Pass(self.source, number, self.seed, lambda k: self._owner(offset + k) == self.world.rank)

    def _owner(self, g: int) -> int:
        return g % self.per_step % self.world.size

    def _next(self) -> tuple[int, object]:
        """The next batch of this rank, with its number in the stream."""
        for _ in range(self.per_step + 1):  # passes; some may be too short to have a batch for this rank
            try:
                k, batch = next(self._pass)
            except StopIteration:
                if not self._pass.total:
                    break
                self._open(self._number + 1, self._offset + self._pass.total)
            else:
                return self._offset + k, batch
        raise ValueError("expected at least one batch of data, found none")

    def next_step(self) -> list[tuple[int, object, float]]:
        """(number, batch, weight) for this rank, as many on every rank: the gradient of the step is the mean over ranks of the sum of weight times
        gradient. A rank with one batch less repeats its last with weight 0."""
        batches = []
        for _ in range(self.world.rank, self.per_step, self.world.size):
            g, batch = self._next()
            batches.append((g, batch, self.world.size / self.per_step))
        self._first = batches[0][1]
        if len(batches) < -(-self.per_step // self.world.size):
            batches.append((*batches[-1][:2], 0.0))
        self.step += 1
        return batches

    def position(self) -> dict[str, object]:
        """Where the next step begins, and what the first rank saw last."""
        return {"step": self.step, "pass": self._number, "offset": self._offset, "digest": batch_digest(self._first)}

    def seek(self, position: Mapping) -> None:
        """To where another stream was, on any number of ranks; reads the pass up to there again. ValueError if the data are not the same any more."""
        self._open(int(position["pass"]), int(position["offset"]))
        start = int(position["step"]) * self.per_step
        mine = sum(self._owner(g) == self.world.rank for g in range(self._offset, start))
        for _ in range(mine):
            g, batch = self._next()
            if g == start - self.per_step and self.world.rank == 0 and position["digest"] not in (None, batch_digest(batch)):
                raise ValueError(
                    f"the data do not come in the same order again: batch {g} differs from the one that the saved run saw. Seed what orders or "
                    "changes them from the `seed` argument of the data function; or start anew, with --overwrite"
                )
        self.step = int(position["step"])


def batch_digest(batch: object) -> str | None:
    """Of the batch's tensors; None if there is none."""
    found = hashlib.sha256()
    count = 0

    def visit(value: object) -> None:
        nonlocal count
        if isinstance(value, Tensor):
            count += 1
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, Mapping):
            for v in value.values():
                visit(v)
        elif isinstance(value, list | tuple):
            for v in value:
                visit(v)

    visit(batch)
    return found.hexdigest()[:16] if count else None


def shared_out(source: Iterable, world: World, limit: float = math.inf) -> Iterator[tuple[object, bool]]:
    """This rank's batches of the first `limit` of a pass, in the order of pass 0, each with whether it counts; as many on every rank, as a sharded
    model needs: a rank with one batch less gets one that does not count."""
    mine = Pass(source, 0, 0, lambda k: k % world.size == world.rank, limit)
    count, batch = 0, None
    for _, batch in mine:
        count += 1
        yield batch, True
    if count < -(-mine.total // world.size):
        if not count:
            _, batch = next(Pass(source, 0, 0, lambda k: k == 0, 1))
        yield batch, False
