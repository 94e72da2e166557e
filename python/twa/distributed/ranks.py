"""`World`: the ranks that share one subspace, over a torch.distributed process group (NCCL, gloo),
or one process alone.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..io.candidates import Candidates

#: what the backends write when the other end is gone or silent
_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|timed out|broken pipe|tcpstore", re.IGNORECASE
)
#: stamps are small whole numbers: sums over ranks of their squares stay exact in float32 for 4000
#: ranks
_STAMPS = 64


class DistributedError(RuntimeError):
    """The ranks cannot go on together: one failed, died, hangs, or has something else than the
    others.
    """

    said_by_first = False  # whether the first rank says the same


class World:
    """Collectives that change nothing in a world of one.

    Every rank must call them in the same order.

    group   a process group, or None: this process alone
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        if self.rank < 0:
            raise ValueError("group: this process is not a member of the process group")
        self.backend = dist.get_backend(group) if group is not None else "none"
        self._doing = ""  # what `together` guards
        self._drift: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> World:
        return self  # the same ranks

    def __getstate__(self) -> dict:
        if self.group is not None:
            raise TypeError(
                "a subspace or optimizer of several ranks cannot be pickled: save"
                " optimizer.state_dict() and subspace.coefficients"
            )
        return self.__dict__

    @classmethod
    def find(cls, group: dist.ProcessGroup | None = None) -> World:
        """The given group, else the default group if torch.distributed is initialised, else one
        process alone.
        """
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        return cls(group)

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes files and messages."""
        return self.rank == 0

    # Collectives ---------------------------------------------------------------------------------

    def sum_(self, t: Tensor) -> Tensor:
        """In place: the sum over ranks."""
        return self._collective(t, lambda m: dist.all_reduce(m, group=self.group))

    def max_(self, t: Tensor) -> Tensor:
        return self._collective(
            t, lambda m: dist.all_reduce(m, dist.ReduceOp.MAX, group=self.group)
        )

    def broadcast_(self, t: Tensor, source: int) -> Tensor:
        """In place: the source's values."""
        return self._collective(t, lambda m: dist.broadcast(m, group=self.group, group_src=source))

    def gather(self, value: object) -> list:
        """One small Python object of every rank, in the order of ranks."""
        if self.group is None:
            return [value]
        self.meet()
        values: list = [None] * self.size
        with self._explained():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def share(self, value: object) -> object:
        """The first rank's value, on every rank."""
        if self.group is None:
            return value
        self.meet()
        values = [value]
        with self._explained():
            dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]

    def _collective(self, t: Tensor, run: Callable[[Tensor], object]) -> Tensor:
        if self.group is None or not t.numel():
            return t
        self.meet()
        cuda_only = "nccl" in self.backend and "gloo" not in self.backend
        moved = (t if t.is_cuda or not cuda_only else t.cuda()).contiguous()
        with self._explained():
            run(moved)
        if moved is not t:
            t.copy_(moved)
        return t

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self.lost(error) from error

    def lost(self, error: BaseException) -> DistributedError:
        """The error that a user should see when a collective failed."""
        return DistributedError(
            f"rank {self.rank}: another rank died or does not answer"
            f" ({str(error).splitlines()[0][:200]})"
        )

    def is_loss(self, error: BaseException) -> bool:
        """Whether an error from elsewhere, such as a sharded model's own collectives, means that
        another rank is gone.
        """
        return (
            self.size > 1
            and isinstance(error, RuntimeError)
            and bool(_LOST.search(f"{type(error).__name__} {error}"))
        )

    # Failing together ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """If the body raises on one rank, every rank raises: there the error itself, elsewhere a
        DistributedError that quotes it. Inside, every collective is preceded by a look at who has
        failed, so none waits for a rank that never comes."""
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

    def meet(self) -> None:
        """In `together`: raises here if another rank has failed, before collectives that are not
        guarded.
        """
        if self._doing:
            self._agree(None)

    def _agree(self, error: Exception | None) -> None:
        failed = torch.tensor(
            [self.rank + 1 if error else 0],
            dtype=torch.int32,
            device="cuda" if self.backend == "nccl" else "cpu",
        )
        messages: list = [None] * self.size
        with self._explained():
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=self.group)
            if int(failed):
                dist.all_gather_object(messages, str(error) if error else None, group=self.group)
        if error is not None:
            error.said_by_first = self.rank > 0 and messages[0] == str(error)
        elif int(failed):
            rank = next(r for r, message in enumerate(messages) if message is not None)
            quote = DistributedError(f"rank {rank} failed while {self._doing}: {messages[rank]}")
            quote.said_by_first = self.rank > 0
            raise quote

    def check_equal(self, mine: Mapping[str, str]) -> None:
        """DistributedError, on every rank, if one of these facts is not the same on all ranks."""
        everyone = self.gather(dict(mine))
        for rank, theirs in enumerate(everyone):
            for fact in [*everyone[0], *(f for f in theirs if f not in everyone[0])]:
                expected, found = (facts.get(fact, "nothing") for facts in (everyone[0], theirs))
                if expected != found:
                    error = DistributedError(
                        f"the ranks do not have the same {fact}: rank 0 has {expected}, rank {rank}"
                        f" has {found}"
                    )
                    error.said_by_first = self.rank > 0
                    raise error

    # The one message of a training step ----------------------------------------------------------

    def start_sum(self, parts: list[Tensor], x: Tensor | None = None) -> Callable[[], list[Tensor]]:
        """Begins the sum of some tensors over ranks as one message; call the result to wait for it.

        With x, two more numbers travel: a stamp of x's bits and its square, from which `check`
        later sees whether all ranks had the same x."""
        if self.group is None:
            return lambda: parts
        flat = torch.cat(
            [p.reshape(-1) for p in parts] + ([_stamp(x, parts[0])] if x is not None else [])
        )
        with self._explained():
            work = dist.all_reduce(flat, group=self.group, async_op=True)

        def finish() -> list[Tensor]:
            with self._explained():
                work.wait()
            if x is not None:  # equal stamps s: K * sum s^2 = (sum s)^2
                if self._drift is None:  # one tensor for good, so that a CUDA graph adds to it
                    self._drift = torch.zeros((), device=flat.device, dtype=flat.dtype)
                self._drift += (self.size * flat[-1] - flat[-2].square()).abs()
            sizes = [p.numel() for p in parts]
            return [
                f.view_as(p) for f, p in zip(flat[: sum(sizes)].split(sizes), parts, strict=True)
            ]

        return finish

    def check(self) -> None:
        """DistributedError if the ranks' coefficients were not the same bits at a step since the
        last check. Reads one number from the device.
        """
        drift = 0.0 if self._drift is None else float(self._drift)
        self.forget()
        if drift != 0:
            raise DistributedError(
                f"rank {self.rank}: the ranks' coefficients have drifted apart: was another"
                " optimizer, schedule or state loaded on one of them?"
            )

    def forget(self) -> None:
        """The coefficients are made equal: what was noticed before does not count."""
        if self._drift is not None:
            self._drift.zero_()


def _stamp(x: Tensor, like: Tensor) -> Tensor:
    """(2,): a whole number below 64 made of all bits of x, and its square."""
    bits = x.detach().contiguous().view(torch.int32).reshape(-1).long()
    mixed = (bits ^ (bits >> 15)) * 0x2C1B3C6D
    stamp = ((mixed ^ (mixed >> 21)).sum() % _STAMPS).to(like.dtype)
    return torch.stack([stamp, stamp * stamp])


def initialise(device: str, timeout: float) -> World:
    """The default process group from torchrun's environment: NCCL for "cuda", gloo for "cpu"."""
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo",
            timeout=datetime.timedelta(seconds=timeout),
        )
    return World.find()


def digest(value: object) -> str:
    """A short fingerprint of what a value prints as."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def facts(model: nn.Module, candidates: Candidates) -> dict[str, str]:
    """What must be the same on all ranks, or from one run to its continuation: the model's tensors,
    the candidates' files.
    """
    tensors = [
        (name, tuple(t.shape), str(t.dtype))
        for name, t in model.state_dict(keep_vars=True).items()
        if isinstance(t, Tensor)
    ]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return (
        {"number of candidates": str(len(candidates))}
        | candidates.fingerprints()
        | {"model": digest((tensors, trained))}
    )


def versions() -> dict[str, str]:
    from .. import __version__

    return {"version of twa": __version__, "version of torch": torch.__version__}
