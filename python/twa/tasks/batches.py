"""Batches that come again: each pass over a task's data has an order of its own.

A pass is shared out over ranks.

What twa does so that pass k is the same batches whenever, wherever and on however many ranks it is
read, and what data must do for it:

- before each batch, the generators that everyone shares (random, numpy.random, torch) are seeded
  from the seed, the pass and the batch's place in it: data may draw from them;
- before each pass, every torch.Generator that stands in an attribute `generator` of the data, of
  its sampler or of its dataset is seeded from its own first seed, the seed and the pass;
- before each pass, `set_epoch(k)` of the data, of its sampler or of its dataset is called.

Data with any other state must define `set_epoch`. A run that is continued compares the last batch
that was seen, and refuses data that come in another order.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import inspect
import math
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from types import ModuleType
from typing import Any, TypeGuard

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..distributed.batch_shares import Share
from ..io.errors import TaskError

#: attributes under which data hold what they are made of
PARTS = ("batches", "batch_sampler", "sampler", "dataset")
MAX_LEVELS = 50  # of objects in objects, that are looked into


def mix(*numbers: int) -> int:
    """A seed below 2^63 from several numbers."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_all(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's generators."""
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # torch.manual_seed writes down the stack for each kind of device: 0.3 ms or more
        torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Puts Python's, NumPy's and torch's generators back at the end."""
    before = random.getstate(), numpy.random.get_state()
    kind = torch.accelerator.current_accelerator()
    devices = range(torch.accelerator.device_count()) if kind else ()
    with torch.random.fork_rng(devices, device_type=kind.type if kind else "cuda"):
        try:
            yield
        finally:
            random.setstate(before[0])
            numpy.random.set_state(before[1])


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


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device, in the same tuples, lists, dicts and objects.

    Objects are moved by their own `to`, as those of transformers and PyTorch Geometric have one;
    data classes by their fields. Others stay as they are.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, type):
        return batch
    if callable(move := getattr(batch, "to", None)):
        return move(device)
    if isinstance(batch, Mapping):
        return _like_mapping(batch, {k: to_device(v, device) for k, v in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(v, device) for v in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(v, device) for v in batch)
    if dataclasses.is_dataclass(batch):
        moved = copy.copy(batch)
        for part in dataclasses.fields(batch):
            if hasattr(batch, part.name):  # also of a frozen one
                value = to_device(getattr(batch, part.name), device)
                object.__setattr__(moved, part.name, value)
        return moved
    return batch


def _like_mapping(batch: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    """Items in a mapping of the same class, where it can be changed; else in a dict."""
    if type(batch) is dict or not isinstance(batch, MutableMapping):
        return items
    like = copy.copy(batch)
    like.update(items)
    return like


# One pass ----------------------------------------------------------------------------------------


def parts_of(source: object) -> list[object]:
    """The data and what they are made of: wrapped batches, samplers, the dataset."""
    found = [source]
    for part in found:  # which grows
        for inner in (getattr(part, name, None) for name in PARTS):
            if inner is not None and all(inner is not other for other in found):
                found.append(inner)
    return found


def generators_of(source: object) -> list[torch.Generator]:
    """The torch.Generators in attributes `generator` of the data's parts, each once."""
    found = {id(g): g for part in parts_of(source) if (g := getattr(part, "generator", None))}
    return [g for g in found.values() if isinstance(g, torch.Generator)]


#: what each generator was seeded with before any pass began
_first_seeds: weakref.WeakKeyDictionary[torch.Generator, int] = weakref.WeakKeyDictionary()


def begin_pass(source: object, number: int, seed: int) -> None:
    """Puts data at the beginning of pass `number`."""
    for g in generators_of(source):
        first = _first_seeds.setdefault(g, g.initial_seed())
        g.manual_seed(mix(first, seed, number))
    for part in parts_of(source):
        if callable(set_epoch := getattr(part, "set_epoch", None)):
            set_epoch(number)
    seed_all(mix(seed, number))


@contextlib.contextmanager
def generators_kept(source: object) -> Iterator[None]:
    """Puts the data's generators back at the end.

    A pass over the same data that is under way goes on as if there had been none in between.
    """
    before = [(g, g.get_state()) for g in generators_of(source)]
    try:
        yield
    finally:
        for g, state in before:
            g.set_state(state)


class Pass:
    """The batches of one pass that are wanted, as (position, batch).

    Args:
        source: re-iterable data
        number: of the pass
        seed: of the order, together with the number
        keep: whether the batch at a position is wanted; a DataLoader over a dataset with indices
            loads no others
        limit: the pass ends after so many batches, wanted or not
    """

    def __init__(
        self,
        source: Iterable,
        number: int,
        seed: int,
        keep: Callable[[int], bool],
        limit: float = math.inf,
    ) -> None:
        device = source.device if isinstance(source, Moved) else None
        inner = source.batches if isinstance(source, Moved) else source
        begin_pass(inner, number, seed)
        wanted = _Wanted(number, seed, keep, limit)
        # Neither iterator knows this object: a cycle would keep a DataLoader's workers alive.
        found = _load(inner, wanted) if _has_indices(inner) else wanted.of(inner)
        if device is not None:
            found = ((k, to_device(batch, device)) for k, batch in found)
        self._wanted, self._found = wanted, found

    @property
    def total(self) -> int:
        """Batches so far, wanted or not."""
        return self._wanted.total

    def __iter__(self) -> Pass:
        return self

    def __next__(self) -> tuple[int, Any]:
        return next(self._found)


class _Wanted:
    """Which items of an iterable are wanted, and how many there were so far."""

    def __init__(self, number: int, seed: int, keep: Callable[[int], bool], limit: float) -> None:
        self.number, self.seed, self.keep, self.limit = number, seed, keep, limit
        self.total = 0

    def of(self, items: Iterable) -> Iterator[tuple[int, Any]]:
        """The wanted items, as (position, item).

        The shared generators are seeded before each item is asked for.
        """
        seed_all(mix(self.seed, self.number))
        iterator = iter(items)
        while self.total < self.limit:
            seed_all(mix(self.seed, self.number, self.total))
            try:
                item = next(iterator)
            except StopIteration:
                return
            k, self.total = self.total, self.total + 1
            if self.keep(k):
                yield k, item


def _load(loader: DataLoader, wanted: _Wanted) -> Iterator[tuple[int, Any]]:
    """Asks a DataLoader's dataset for the wanted batches alone."""
    assert loader.batch_sampler is not None  # by _has_indices
    indices = _Indices(loader.batch_sampler, wanted)
    again: DataLoader = DataLoader(
        _SeededDataset(loader.dataset, mix(wanted.seed, wanted.number)),
        batch_sampler=indices,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )
    for batch in again:
        yield indices.positions.popleft(), batch


def _has_indices(source: object) -> TypeGuard[DataLoader]:
    """Whether this is a plain DataLoader whose sampler says what a batch is made of."""
    if type(source) is not DataLoader or source.batch_sampler is None:
        return False
    return not isinstance(source.dataset, IterableDataset)


class _Indices:
    """A batch sampler of the wanted ones of another's batches, as [position, *indices]."""

    def __init__(self, batches: Iterable, wanted: _Wanted) -> None:
        self.batches, self.wanted = batches, wanted
        self.positions: deque[int] = deque()  # of those asked for and not yet loaded

    def __iter__(self) -> Iterator[list]:
        for k, indices in self.wanted.of(self.batches):
            self.positions.append(k)
            yield [k, *indices]


class _SeededDataset(Dataset[Any]):
    """A dataset whose batches, [position, *indices], always draw the same random numbers.

    They do so in whatever process, and beside whatever other batches, they are loaded.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getattr__(self, name: str) -> Any:  # for a worker_init_fn that looks at its dataset
        if name.startswith("__") or "dataset" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitems__(self, batch: list) -> list:
        k, *indices = batch
        seed_all(mix(self.seed, k))
        fetch = getattr(self.dataset, "__getitems__", None)
        return fetch(indices) if fetch else [self.dataset[i] for i in indices]


def first_batch(source: Iterable) -> Any:
    """The first batch of pass 0."""
    with generators_kept(source):
        for _, batch in Pass(source, 0, 0, lambda k: k == 0, 1):
            return batch
    raise TaskError("expected at least one batch of data, found none")


def shared_out(
    source: Iterable, share: Share, limit: float = math.inf
) -> Iterator[tuple[Any, bool]]:
    """`sampled` of the first `limit` batches, without their positions."""
    return ((batch, counts) for _, batch, counts in sampled(source, share, limit))


def sampled(
    source: Iterable, share: Share, limit: float = math.inf, stride: int = 1, offset: int = 0
) -> Iterator[tuple[int, Any, bool]]:
    """This rank's share of some batches of pass 0: (position, batch, whether it counts).

    There are as many on every rank, as a sharded model needs: a rank with one batch less gets one
    that does not count.

    Args:
        source: re-iterable data
        share: whose turn it is; of ranks with the same one, the first counts
        limit: of the first so many batches
        stride: a power of 2; of so many in a row one is taken, see `scattered`
        offset: below `stride`; of those at scattered positions p with p % stride == offset
    """
    turns = 0

    def is_mine(position: int) -> bool:
        nonlocal turns
        if scattered(position, stride) % stride != offset:
            return False
        turns += 1
        return (turns - 1) % share.world_size == share.rank

    with generators_kept(source):
        mine = Pass(source, 0, 0, is_mine, limit)
        count, batch = 0, None
        for position, batch in mine:
            count += 1
            yield position, batch, share.counts
        if count < -(-turns // share.world_size):
            yield -1, batch if count else first_batch(source), False


def scattered(position: int, stride: int) -> int:
    """Where a position comes to lie among the `stride` ones in a row that it belongs to.

    It is a permutation of them for each such row, drawn by a hash: data that repeat every few
    batches do not fall in step with a sample. Those that are multiples of 2 `stride` are among the
    multiples of `stride`.
    """
    place, bit = position, 1
    while bit < stride:
        if mix(bit, position // (2 * bit)) & 1:
            place ^= bit
        bit *= 2
    return place


def length(source: object) -> int | None:
    """The number of batches that data say they have; None if they say none."""
    try:
        return len(source.batches if isinstance(source, Moved) else source)  # type: ignore
    except TypeError:
        return None


def count_batches(source: Iterable) -> int:
    """The number of batches of pass 0. A DataLoader over a dataset with indices loads none."""
    with generators_kept(source):
        nothing = Pass(source, 0, 0, lambda position: False)
        for _ in nothing:
            pass
        return nothing.total


def batch_digest(batch: object) -> str | None:
    """A digest of the batch's tensors; None if there is nothing in it.

    Without a tensor in its tuples, lists and dicts, it is of all that can be looked into: objects'
    attributes, arrays, numbers and texts. It is the same in every process.
    """
    found, count = hashlib.sha256(), 0

    def visit(value: object) -> None:
        nonlocal count
        if isinstance(value, Tensor):
            count += 1
            for part in _parts_of_tensor(value):
                found.update(part)
        elif isinstance(value, Mapping | list | tuple):
            for v in value.values() if isinstance(value, Mapping) else value:
                visit(v)

    visit(batch)
    if not count:
        return _Described().digest(batch)
    return found.hexdigest()[:16]


def _parts_of_tensor(t: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, of whatever layout."""
    t = t.detach()
    if t.is_nested:
        parts = list(t.unbind())
    elif t.is_quantized:
        parts = [t.int_repr()]
    elif t.layout == torch.sparse_coo:
        t = t.coalesce()
        parts = [t.indices(), t.values()]
    elif t.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [t.crow_indices(), t.col_indices(), t.values()]
    elif t.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [t.ccol_indices(), t.row_indices(), t.values()]
    else:
        parts = [t]
    for part in parts:
        flat = part.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


class _Described:
    """A digest of any value: of what it is made of, never of where in memory it is."""

    def __init__(self) -> None:
        self.count = 0  # of what is data
        self.above: set[int] = set()  # objects that are being looked into: they may be cyclic

    def digest(self, batch: object) -> str | None:
        """The digest; None if there is no data in it."""
        found = self.of(batch).hex()[:16]
        return found if self.count else None

    def of(self, value: object) -> bytes:
        """The digest of a value."""
        found = hashlib.sha256(type(value).__qualname__.encode())
        if isinstance(value, Tensor):
            self.count += 1
            for part in _parts_of_tensor(value):
                found.update(part)
        elif isinstance(value, numpy.ndarray | numpy.generic) and not value.dtype.hasobject:
            self.count += 1
            found.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
        elif isinstance(value, str | bytes | int | float | complex):
            self.count += 1
            found.update(value if isinstance(value, bytes) else repr(value).encode())
        elif id(value) not in self.above and len(self.above) < MAX_LEVELS:
            self.above.add(id(value))
            for inner in self.inside(value):
                found.update(inner)
            self.above.remove(id(value))
        return found.digest()

    def inside(self, value: object) -> Iterable[bytes]:
        """Digests of what a value is made of, in an order that is always the same."""
        if isinstance(value, Mapping):
            return [self.of(part) for item in value.items() for part in item]
        if isinstance(value, set | frozenset):
            return sorted(map(self.of, value))
        if isinstance(value, list | tuple | deque) or type(value) is numpy.ndarray:
            return [self.of(part) for part in value]
        if isinstance(value, type | ModuleType) or inspect.isroutine(value):
            return []
        return [self.of(part) for item in _attributes(value).items() for part in item]


def _attributes(value: object) -> dict[str, object]:
    """What an object holds, by name: its __dict__ and __slots__."""
    slots = (
        name
        for kind in type(value).__mro__
        for names in [kind.__dict__.get("__slots__", ())]
        for name in ([names] if isinstance(names, str) else names)
    )
    found = {n: getattr(value, n) for n in slots if n[:2] != "__" and hasattr(value, n)}
    return found | getattr(value, "__dict__", {})


def forever(data: Iterable) -> Iterator[Any]:
    """Batches of the data, pass after pass."""
    while True:
        empty = True
        for batch in data:
            empty = False
            yield batch
        if empty:
            raise TaskError("expected at least one batch of data, found none")


# Pass after pass ---------------------------------------------------------------------------------


class Stream:
    """Pass after pass over data, `per_step` batches a step, shared out over ranks.

    Counted over all passes, batch g belongs to step g // per_step and to rank
    (g % per_step) % world_size: so a step sees the same batches on any number of ranks. Ranks
    beyond per_step repeat what others do, with weight 0. Ranks here are numbers of shares: ranks
    of one share see the same.

    Args:
        source: re-iterable data
        share: this rank's, of the batches
        per_step: batches of a step, of all ranks together
        seed: of the passes' orders

    Attributes:
        step: steps so far
    """

    def __init__(self, source: Iterable, share: Share, per_step: int, seed: int) -> None:
        self.source, self.share, self.per_step, self.seed = source, share, per_step, seed
        self.place = share.rank % per_step if share.rank >= per_step else share.rank
        self.step = 0
        self._first: object = None  # this rank's first batch of the last step
        self._open(0, 0)

    def _open(self, number: int, offset: int) -> None:
        """Begins pass `number`, whose first batch is the stream's batch `offset`."""
        self._number, self._offset = number, offset
        # The lambda does not know self: a cycle would keep a DataLoader's workers alive.
        place, per_step, size = self.place, self.per_step, self.share.world_size
        self._pass = Pass(
            self.source, number, self.seed, lambda k: (offset + k) % per_step % size == place
        )

    def _next(self) -> tuple[int, object]:
        """The next batch of this rank, with its number in the stream."""
        # Of so many passes, since some may be too short to have a batch for this rank.
        for _ in range(self.per_step + 1):
            try:
                k, batch = next(self._pass)
            except StopIteration:
                if not self._pass.total:
                    break
                self._open(self._number + 1, self._offset + self._pass.total)
            else:
                return self._offset + k, batch
        raise TaskError("expected at least one batch of data, found none")

    def next_step(self) -> list[tuple[int, object, float]]:
        """The step's batches for this rank, as (number, batch, weight): as many on every rank.

        The gradient of the step is the mean over ranks of the sum of weight times gradient. A rank
        with one batch less repeats its last with weight 0.
        """
        batches = []
        weight = self.share.world_size / self.per_step if self.place == self.share.rank else 0.0
        for _ in range(self.place, self.per_step, self.share.world_size):
            batches.append((*self._next(), weight))
        self._first = batches[0][1]
        if len(batches) < -(-self.per_step // self.share.world_size):
            batches.append((*batches[-1][:2], 0.0))
        self.step += 1
        return batches

    def position(self) -> dict[str, object]:
        """Where the next step begins, and a digest of what rank 0 saw last."""
        return {
            "step": self.step,
            "pass": self._number,
            "offset": self._offset,
            "digest": batch_digest(self._first),
        }

    def seek(self, position: Mapping[str, Any]) -> None:
        """Goes to where another stream was, on any number of ranks.

        It reads the pass up to there again.

        Raises:
            TaskError: the data do not come in the same order again
        """
        self._open(int(position["pass"]), int(position["offset"]))
        start, size = int(position["step"]) * self.per_step, self.share.world_size
        before = range(self._offset, start)
        for _ in range(sum(g % self.per_step % size == self.place for g in before)):
            g, batch = self._next()
            is_last = g == start - self.per_step and self.share.rank == 0
            if is_last and position["digest"] not in (None, batch_digest(batch)):
                raise TaskError(
                    f"the data do not come in the same order again: batch {g} differs from the one"
                    " that the saved run saw. Draw what orders or changes them from the global"
                    " generators, from a torch.Generator in an attribute `generator`, or by"
                    " set_epoch (docs/tasks.md); or start anew, with --overwrite"
                )
        self.step = int(position["step"])
