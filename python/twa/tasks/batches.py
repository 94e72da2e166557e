"""Batches that come again: each pass over a task's data has an order of its own that depends on
nothing else, and is shared out over ranks.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ..distributed.ranks import World

#: where a data source's generators are looked for: attributes of attributes, lists and dicts of so
#: many items, objects in all
SEARCH_DEPTH, SEARCH_ITEMS, SEARCH_OBJECTS = 5, 100, 10_000


def mix(*numbers: int) -> int:
    """A seed below 2^63 from several numbers."""
    return (
        int.from_bytes(hashlib.sha256(",".join(map(str, numbers)).encode()).digest()[:8], "little")
        >> 1
    )


def seed_all(seed: int) -> None:
    """Python's, NumPy's and torch's generators."""
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # torch.manual_seed writes down the stack for each kind of device: 0.3 ms or more
        torch.default_generator.manual_seed(seed)


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
    return (
        type(batch)(to_device(v, device) for v in batch)
        if isinstance(batch, list | tuple)
        else batch
    )


Source = torch.Generator | random.Random | numpy.random.Generator | numpy.random.RandomState


def _generators(source: object) -> list[Source]:
    """Random number generators among the attributes of a data source, its sampler, its dataset,
    ..., and in short lists and dicts there.
    """
    found: list[Source] = []
    seen: dict[int, object] = {}

    def visit(value: object, depth: int) -> None:
        if (
            id(value) in seen
            or len(seen) > SEARCH_OBJECTS
            or isinstance(value, Tensor | nn.Module | type | ModuleType | str | numpy.ndarray)
        ):
            return
        seen[id(value)] = value
        if isinstance(value, Source):
            found.append(value)
        elif isinstance(value, list | tuple | dict):
            if len(value) <= SEARCH_ITEMS:
                for item in value.values() if isinstance(value, dict) else value:
                    visit(item, depth)
        elif depth and isinstance(getattr(value, "__dict__", None), dict):
            for item in list(value.__dict__.values()):
                visit(item, depth - 1)

    visit(source, SEARCH_DEPTH)
    return found


def _state(g: Source) -> object:
    if isinstance(g, numpy.random.Generator):
        return g.bit_generator.state
    return g.getstate() if isinstance(g, random.Random) else g.get_state()


def _set_state(g: Source, state: object) -> None:
    if isinstance(g, numpy.random.Generator):
        g.bit_generator.state = state
    elif isinstance(g, random.Random):
        g.setstate(state)
    else:
        g.set_state(state)


def _own_seed(g: Source) -> int:
    """What it was seeded with, where that is known."""
    return g.initial_seed() if isinstance(g, torch.Generator) else 0


def _seed(g: Source, seed: int) -> None:
    if isinstance(g, torch.Generator):
        g.manual_seed(seed)
    elif isinstance(g, numpy.random.RandomState):
        g.seed(seed & 0xFFFFFFFF)
    elif isinstance(g, numpy.random.Generator):
        g.bit_generator.state = type(g.bit_generator)(seed).state
    else:
        g.seed(seed)


class _OwnRandom:
    """Global and found generators, with states that are swapped in for as long as they are used
    here.
    """

    def __init__(self, generators: list[Source]) -> None:
        self.generators = generators
        self._mine: tuple | None = None

    def _states(self) -> tuple:
        return (
            random.getstate(),
            numpy.random.get_state(),
            torch.get_rng_state(),
            [_state(g) for g in self.generators],
        )

    def _put(self, states: tuple) -> None:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        for g, state in zip(self.generators, states[3], strict=True):
            _set_state(g, state)

    def __enter__(self) -> None:
        self._outside = self._states()
        if self._mine is not None:
            self._put(self._mine)

    def __exit__(self, *error) -> None:
        self._mine = self._states()
        self._put(self._outside)


class _ChosenIndices:
    """(position, index list) of some of a batch sampler's batches."""

    def __init__(self, batches: Iterable, keep: Callable[[int], bool], limit: float) -> None:
        self.batches, self.keep, self.limit = batches, keep, limit
        self.total = 0
        self.positions: deque[int] = deque()

    def __iter__(self) -> Iterator:
        # Loading a batch reseeds the global generators; a sampler that draws from them as it goes
        # must not notice, as it draws for every batch.
        own = _OwnRandom(_generators(self.batches))
        with own:
            iterator = iter(self.batches)
        while self.total < self.limit:
            with own:
                indices = next(iterator, None)
            if indices is None:
                return
            k, self.total = self.total, self.total + 1
            if self.keep(k):
                self.positions.append(k)
                yield [k, *indices]


class _SeededDataset:
    """A dataset whose batches, [position, *indices], draw the same random numbers in whatever
    process and beside whatever others they are loaded.
    """

    def __init__(self, dataset: object, collate: object, seed: int) -> None:
        self.dataset, self.collate, self.seed = dataset, collate, seed
        # with their seeds, in the process that loads
        self._found: list[tuple[Source, int]] | None = None

    def __getattr__(self, name: str) -> object:  # for a worker_init_fn that looks at its dataset
        if name.startswith("__") or "dataset" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitems__(self, batch: list) -> list:
        k, *indices = batch
        seed_all(mix(self.seed, k))
        if self._found is None:
            self._found = [(g, _own_seed(g)) for g in _generators([self.dataset, self.collate])]
        for g, own in self._found:
            _seed(g, mix(own, self.seed, k))
        fetch = getattr(self.dataset, "__getitems__", None)
        return fetch(indices) if fetch else [self.dataset[i] for i in indices]


class _Chosen:
    """(position, batch) of those of the first `limit` batches of one pass that `keep` asks for;
    `total` is how many there were, once it is over. A DataLoader over a dataset with indices loads
    no others."""

    def __init__(
        self, source: Iterable, keep: Callable[[int], bool], limit: float, seed: int
    ) -> None:
        self.total, self._move, self._limit = 0, None, limit
        if isinstance(source, Moved):
            self._move, source = source.device, source.batches
        self._keep, self._indices = keep, None
        if (
            type(source) is DataLoader
            and source.batch_sampler is not None
            and not isinstance(source.dataset, IterableDataset)
        ):
            self._indices = _ChosenIndices(source.batch_sampler, keep, limit)
            source = DataLoader(
                _SeededDataset(source.dataset, source.collate_fn, seed),
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


def _set_epoch(source: object, number: int, depth: int = 2) -> None:
    for value in (source, *getattr(source, "__dict__", {}).values()):
        if callable(getattr(value, "set_epoch", None)):
            value.set_epoch(number)
        elif (
            value is not source
            and depth
            and hasattr(value, "__dict__")
            and not isinstance(value, Tensor | nn.Module | type)
        ):
            _set_epoch(value, number, depth - 1)


class Pass:
    """(position, batch) of one pass over a source.

    Its random numbers come from the source's own generators and the global ones, seeded with the
    source's seeds, `seed` and `number`; to everyone else it looks as if none had been drawn. So a
    pass can be repeated, and passes may interleave."""

    def __init__(
        self,
        source: Iterable,
        number: int,
        seed: int,
        keep: Callable[[int], bool],
        limit: float = math.inf,
    ) -> None:
        self._random = _OwnRandom(_generators(source))
        with self._random:
            for g in self._random.generators:
                _seed(g, mix(_own_seed(g), seed, number))
            seed_all(mix(seed, number))
            _set_epoch(source, number)
            self._chosen = _Chosen(source, keep, limit, mix(seed, number))

    def __iter__(self) -> Pass:
        return self

    def __next__(self) -> tuple[int, object]:
        with self._random:
            return next(self._chosen)

    @property
    def total(self) -> int:
        return self._chosen.total


def first_batch(source: Iterable) -> object:
    """Of pass 0."""
    for _, batch in Pass(source, 0, 0, lambda k: k == 0, 1):
        return batch
    raise ValueError("expected at least one batch of data, found none")


class Stream:
    """Pass after pass over a source, `per_step` batches a step, shared out over the ranks of a
    world. Counted over all passes, batch g belongs to step g // per_step and to rank (g % per_step)
    % size: so a step sees the same batches on any number of ranks. Ranks beyond per_step repeat
    what others do, with weight 0."""

    def __init__(self, source: Iterable, world: World, per_step: int, seed: int) -> None:
        self.source, self.world, self.per_step, self.seed = source, world, per_step, seed
        self.place = world.rank % per_step if world.rank >= per_step else world.rank
        self.step = 0
        self._first: object = None  # the first batch of the last step, on the first rank
        self._open(0, 0)

    def _open(self, number: int, offset: int) -> None:
        """Pass `number`, whose first batch is the stream's batch `offset`."""
        self._number, self._offset = number, offset
        # not self: a cycle would keep a DataLoader's workers alive
        place, per_step, size = self.place, self.per_step, self.world.size
        self._pass = Pass(
            self.source, number, self.seed, lambda k: (offset + k) % per_step % size == place
        )

    def _next(self) -> tuple[int, object]:
        """The next batch of this rank, with its number in the stream."""
        # passes; some may be too short to have a batch for this rank
        for _ in range(self.per_step + 1):
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
        """(number, batch, weight) for this rank, as many on every rank: the gradient of the step is
        the mean over ranks of the sum of weight times gradient. A rank with one batch less repeats
        its last with weight 0."""
        batches = []
        weight = self.world.size / self.per_step if self.place == self.world.rank else 0.0
        for _ in range(self.place, self.per_step, self.world.size):
            batches.append((*self._next(), weight))
        self._first = batches[0][1]
        if len(batches) < -(-self.per_step // self.world.size):
            batches.append((*batches[-1][:2], 0.0))
        self.step += 1
        return batches

    def position(self) -> dict[str, object]:
        """Where the next step begins, and what the first rank saw last."""
        return {
            "step": self.step,
            "pass": self._number,
            "offset": self._offset,
            "digest": batch_digest(self._first),
        }

    def seek(self, position: Mapping) -> None:
        """To where another stream was, on any number of ranks; reads the pass up to there again.

        ValueError if the data are not the same any more.
        """
        self._open(int(position["pass"]), int(position["offset"]))
        start = int(position["step"]) * self.per_step
        mine = sum(
            g % self.per_step % self.world.size == self.place for g in range(self._offset, start)
        )
        for _ in range(mine):
            g, batch = self._next()
            if (
                g == start - self.per_step
                and self.world.rank == 0
                and position["digest"] not in (None, batch_digest(batch))
            ):
                raise ValueError(
                    f"the data do not come in the same order again: batch {g} differs from the one"
                    " that the saved run saw. Seed what orders or changes them from the `seed`"
                    " argument of the data function; or start anew, with --overwrite"
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


def shared_out(
    source: Iterable, world: World, limit: float = math.inf
) -> Iterator[tuple[object, bool]]:
    """This rank's batches of the first `limit` of a pass, in the order of pass 0, each with whether
    it counts; as many on every rank, as a sharded model needs: a rank with one batch less gets one
    that does not count."""
    mine = Pass(source, 0, 0, lambda k: k % world.size == world.rank, limit)
    count, batch = 0, None
    for _, batch in mine:
        count += 1
        yield batch, True
    if count < -(-mine.total // world.size):
        if not count:
            batch = first_batch(source)
        yield batch, False


def forever(data: Iterable) -> Iterator:
    """Batches of the data, pass after pass."""
    while True:
        empty = True
        for batch in data:
            empty = False
            yield batch
        if empty:
            raise ValueError("expected at least one batch of data, found none")
