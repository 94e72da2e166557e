"""`Ranks`: the ranks that share one subspace.

They are those of a torch.distributed process group (NCCL, gloo), or one process alone.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..io.candidates import Candidates
from ..io.errors import TwaError
from ..version import __version__
from .note import Note

#: what the backends write when the other end is gone or silent
_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|timed out|broken pipe|tcpstore", re.IGNORECASE
)
#: where in its source gloo has noticed
_SOURCE = re.compile(r"^\[[^]]*:\d+\] ")
#: stamps are whole numbers below this: sums of their squares over 4000 ranks are exact in float32
_STAMPS = 64

Value = TypeVar("Value")


class DistributedError(RuntimeError):
    """The ranks cannot go on together.

    One failed, died, hangs, or has something else than the others.

    Attributes:
        said_by_rank_zero: whether rank 0 reports the same, so that this rank need not
    """

    said_by_rank_zero = False


class Ranks:
    """Collectives over the ranks of a process group, which change nothing in a world of one.

    Every rank must call them in the same order.

    Args:
        group: the process group; None: this process alone

    Attributes:
        rank: this process's number in the group
        world_size: how many ranks there are
        backend: name of the group's backend; "none" without a group

    Raises:
        TwaError: this process is not a member of the group
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1
        if self.rank < 0:
            raise TwaError("group: this process is not a member of the process group")
        self.backend = dist.get_backend(group) if group is not None else "none"
        self._doing = ""  # what `fail_together` guards
        self._is_telling = False  # whether in `telling`
        self._drift: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> Ranks:
        return self  # the same ranks

    def __getstate__(self) -> dict:
        if self.group is not None:
            raise TypeError(
                "a subspace or optimizer of several ranks cannot be pickled: save"
                " optimizer.state_dict() and subspace.coefficients"
            )
        return self.__dict__

    @classmethod
    def find(cls, group: dist.ProcessGroup | None = None) -> Ranks:
        """The ranks of a group: the given one, else the default group, else one process alone.

        There is a default group if torch.distributed is initialised.
        """
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        return cls(group)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this rank writes files and messages."""
        return self.rank == 0

    @property
    def has_nccl(self) -> bool:
        """Whether CUDA tensors go through NCCL."""
        return "nccl" in self.backend

    @property
    def needs_cuda(self) -> bool:
        """Whether only CUDA tensors can be sent: NCCL without another backend for the CPU."""
        return self.has_nccl and "gloo" not in self.backend

    # Collectives ---------------------------------------------------------------------------------

    def all_reduce_(self, t: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        return self._collective(t, lambda m: dist.all_reduce(m, group=self.group))

    def all_reduce_max_(self, t: Tensor) -> Tensor:
        """The largest over ranks of each number, in place."""
        largest = dist.ReduceOp.MAX
        return self._collective(t, lambda m: dist.all_reduce(m, largest, group=self.group))

    def most(self, value: int) -> int:
        """The largest of the ranks' numbers."""
        return int(self.all_reduce_max_(torch.tensor([value], dtype=torch.int64, device="cpu"))[0])

    def broadcast_(self, t: Tensor, source: int) -> Tensor:
        """The values of the rank `source`, in place."""
        return self._collective(t, lambda m: dist.broadcast(m, group=self.group, group_src=source))

    def all_gather_object(self, value: Value) -> list[Value]:
        """A small Python object of every rank, in the order of ranks."""
        if self.group is None:
            return [value]
        self._check_failures()
        values: list[Any] = [None] * self.world_size
        with self._explained():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_object(self, value: Value) -> Value:
        """The small Python object of rank 0, on every rank."""
        if self.group is None:
            return value
        self._check_failures()
        values = [value]
        with self._explained():
            dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]

    def exchange(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]
    ) -> None:
        """Sends tensors to single ranks, and receives those of others in place.

        All ranks call it. Between two ranks tensors come in the order in which they were sent.

        Args:
            sends: contiguous tensors, each with the rank that it goes to
            receives: contiguous tensors, each with the rank that it comes from
        """
        self._check_failures()
        with self._explained():
            work = [
                dist.isend(t, group=self.group, group_dst=rank) for t, rank in sends if t.numel()
            ]
            work += [
                dist.irecv(t, group=self.group, group_src=rank) for t, rank in receives if t.numel()
            ]
            for transfer in work:
                assert transfer is not None  # this process is in the group
                transfer.wait()

    def _collective(self, t: Tensor, run: Callable[[Tensor], object]) -> Tensor:
        """Runs a collective on a tensor in place, by way of the GPU if the backend needs that."""
        if self.group is None or not t.numel():
            return t
        self._check_failures()
        moved = (t if t.is_cuda or not self.needs_cuda else t.cuda()).contiguous()
        with self._explained():
            run(moved)
        if moved is not t:
            t.copy_(moved)
        return t

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """A collective's error becomes a DistributedError."""
        try:
            yield
        except RuntimeError as error:
            raise self.lost_rank(error) from error

    def lost_rank(self, error: BaseException) -> DistributedError:
        """The error that a user should see when a collective failed.

        It quotes the rank that gave up, if one has left a note.
        """
        if self.note and (said := self.note.read()):
            return DistributedError(said)
        text = _SOURCE.sub("", str(error).splitlines()[0])[:200]
        return DistributedError(f"rank {self.rank}: another rank died or does not answer ({text})")

    def is_lost_rank(self, error: BaseException) -> bool:
        """Whether an error from elsewhere means that another rank is gone.

        A sharded model's own collectives raise such errors.
        """
        if self.world_size == 1 or not isinstance(error, RuntimeError):
            return False
        if isinstance(error, DistributedError):
            return False  # which says so itself
        return bool(_LOST.search(f"{type(error).__name__} {error}"))

    # Failing alone -------------------------------------------------------------------------------

    @functools.cached_property
    def note(self) -> Note | None:
        """What a rank leaves for those that lose it; None in a world of one."""
        return Note(self.group) if self.group is not None and self.world_size > 1 else None

    @contextlib.contextmanager
    def telling(self, doing: Callable[[], str]) -> Iterator[None]:
        """What ends the body on this rank alone is what others say when they lose it.

        They do so in their next collective, once this process has ended or destroyed its group. One
        that goes on, and comes here again, takes back what it has told.

        Args:
            doing: what the body does by then, for the message, such as " at step 12"
        """
        if self.note is None or self._is_telling:
            yield
            return
        self._is_telling = True
        self.note.withdraw()
        try:
            yield
        except BaseException as error:
            self.tell(error, doing())
            raise
        finally:
            self._is_telling = False

    def tell(self, error: BaseException, doing: str = "") -> None:
        """Leaves a note of an error, unless ranks know of it or the loss of another is its cause.

        Args:
            error: what this rank gives up for
            doing: as in `telling`
        """
        if self.note is None or hasattr(error, "said_by_rank_zero") or self.is_lost_rank(error):
            return
        said = str(error) if isinstance(error, TwaError) else _printed(error)
        self.note.write(f"{doing}: {said}")

    # Failing together ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def fail_together(self, doing: str) -> Iterator[None]:
        """Makes every rank raise if the body raises on one of them.

        That rank raises the error itself, the others a DistributedError that quotes it. Inside,
        every collective is preceded by a look at who has failed, so none waits for a rank that
        never comes.

        Args:
            doing: what the body does, for the message, such as "reading the saved state"
        """
        if self.group is None or self._doing:
            yield
            return
        self._doing = doing
        try:
            yield
            self._agree(None)
        except DistributedError:
            raise
        except Exception as error:
            self._agree(error)
            raise
        finally:
            self._doing = ""

    def barrier(self) -> None:
        """Waits for all ranks; in `fail_together`, raises if one of them has failed."""
        if self.group is not None:
            self._agree(None)

    def _check_failures(self) -> None:
        """Raises, in `fail_together`, before a collective that another rank will not join."""
        if self._doing:
            self._agree(None)

    def _agree(self, error: Exception | None) -> None:
        """Tells all ranks whether this one has failed; DistributedError if only others have."""
        device = "cuda" if self.needs_cuda else "cpu"
        code = self.rank + 1 if error else 0
        failed = torch.tensor([code], dtype=torch.int32, device=device)
        messages: list[Any] = [None] * self.world_size
        with self._explained():
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=self.group)
            if int(failed):
                dist.all_gather_object(messages, str(error) if error else None, group=self.group)
        if error is not None:
            # vars: it may be any exception, and only DistributedError declares the attribute.
            vars(error)["said_by_rank_zero"] = self.rank > 0 and messages[0] == str(error)
        elif int(failed):
            rank = next(r for r, message in enumerate(messages) if message is not None)
            quote = DistributedError(f"rank {rank} failed while {self._doing}: {messages[rank]}")
            quote.said_by_rank_zero = self.rank > 0
            raise quote

    def check_equal(self, mine: Mapping[str, str]) -> None:
        """Checks that these facts, texts by name, are the same on all ranks.

        Raises:
            DistributedError: on every rank, if one of them is not
        """
        everyone = self.all_gather_object(dict(mine))
        for rank, theirs in enumerate(everyone):
            for fact in [*everyone[0], *(f for f in theirs if f not in everyone[0])]:
                expected, found = (facts.get(fact, "nothing") for facts in (everyone[0], theirs))
                if expected != found:
                    error = DistributedError(
                        f"the ranks do not have the same {fact}: rank 0 has {expected}, rank {rank}"
                        f" has {found}"
                    )
                    error.said_by_rank_zero = self.rank > 0
                    raise error

    # The one message of a training step ----------------------------------------------------------

    def all_reduce_async(
        self, parts: list[Tensor], x: Tensor | None = None
    ) -> Callable[[], list[Tensor]]:
        """Begins the sum of some tensors over ranks, as one message.

        With x, two more numbers travel: a stamp of x's bits and its square. From them `check_drift`
        later sees whether all ranks had the same x.

        Returns:
            a function that waits for the sums, and returns them in the tensors' shapes
        """
        if self.group is None:
            return lambda: parts
        message = [p.reshape(-1) for p in parts]
        if x is not None:
            message.append(_stamp(x, parts[0]))
        flat = torch.cat(message)
        with self._explained():
            work = dist.all_reduce(flat, group=self.group, async_op=True)

        def finish() -> list[Tensor]:
            with self._explained():
                work.wait()
            if x is not None:  # equal stamps s: K * sum s^2 = (sum s)^2
                if self._drift is None:  # one tensor for good, so that a CUDA graph adds to it
                    self._drift = torch.zeros((), device=flat.device, dtype=flat.dtype)
                self._drift += (self.world_size * flat[-1] - flat[-2].square()).abs()
            sizes = [p.numel() for p in parts]
            sums = flat[: sum(sizes)].split(sizes)
            return [s.view_as(p) for s, p in zip(sums, parts, strict=True)]

        return finish

    def check_drift(self) -> None:
        """Checks that the ranks had the same coefficients at each step since the last check.

        It reads one number from the device.

        Raises:
            DistributedError: they were not the same bits
        """
        drift = 0.0 if self._drift is None else float(self._drift)
        self.reset_drift()
        if drift != 0:
            raise DistributedError(
                f"rank {self.rank}: the ranks' coefficients have drifted apart: was another"
                " optimizer, schedule or state loaded on one of them?"
            )

    def reset_drift(self) -> None:
        """Forgets the drift that was noticed so far: the coefficients have been made equal."""
        if self._drift is not None:
            self._drift.zero_()


def _stamp(x: Tensor, like: Tensor) -> Tensor:
    """A whole number below 64 made of all bits of x, and its square: (2,)."""
    bits = x.detach().contiguous().view(torch.int32).reshape(-1).long()
    mixed = (bits ^ (bits >> 15)) * 0x2C1B3C6D
    stamp = ((mixed ^ (mixed >> 21)).sum() % _STAMPS).to(like.dtype)
    return torch.stack([stamp, stamp * stamp])


def initialise(device: str, timeout: float) -> Ranks:
    """Starts the default process group, from torchrun's environment.

    Args:
        device: kind of device that is computed on: NCCL for "cuda", gloo for any other
        timeout: seconds after which a silent rank counts as lost
    """
    if not dist.is_initialized():
        # Imported after it, as a model may do, its functions' defaults keep the group to the end.
        import torch.distributed.nn  # noqa: F401

        dist.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo",
            timeout=datetime.timedelta(seconds=timeout),
        )
    return Ranks.find()


def _printed(error: BaseException) -> str:
    """The type of an error, and its text if there is one."""
    return ": ".join(filter(None, (type(error).__name__, str(error))))


def digest(value: object) -> str:
    """A short fingerprint of how a value prints."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def facts(model: nn.Module, candidates: Candidates) -> dict[str, str]:
    """What must be the same on all ranks, and from one run to its continuation.

    It is said of the model's tensors and of the candidates' files.
    """
    tensors = [
        (name, tuple(t.shape), str(t.dtype))
        for name, t in model.state_dict(keep_vars=True).items()
        if isinstance(t, Tensor)
    ]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    files = {"number of candidates": str(len(candidates))} | candidates.fingerprints()
    return files | {"model": digest((tensors, trained))}


def versions() -> dict[str, str]:
    """Versions that must be the same on all ranks."""
    return {"version of twa": __version__, "version of torch": torch.__version__}
