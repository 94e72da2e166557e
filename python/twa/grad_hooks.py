"""`low_memory`: each gradient is projected and freed as soon as backward has it.

On several ranks the sums start while backward goes on.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import Variable

from .subspace import Subspace

#: messages that the coefficients' gradient is cut into, each sent when its columns are complete
BUCKETS = 4


class GradientHooks:
    """Hooks on the model's parameters that turn gradients into coefficients.grad.

    They do so until they are removed. In one process each hook adds its projection.

    On several ranks hooks add to this rank's addend. With `replicate` the columns of segments whose
    parameters are all done are sent as soon as backward has passed them, in an order that is the
    same on all ranks. At the end of backward the rest is sent; with `columns` that is all of it,
    behind FSDP's own messages. The sums are added to coefficients.grad, which then is what it would
    be in one process. In `no_sync()` addends are kept for a later backward; `clear()` drops them.

    After `use_up()` the next gradient starts from zero, whoever clears the model's gradients:
    trainers call `model.zero_grad()`, which knows nothing of the coefficients.
    """

    # the state of a backward on several ranks
    _next: int  # message to send
    _under_way: int | None  # the backward whose end will send the rest
    _added: torch.cuda.Event | None  # behind the last addition
    _done: set[int]  # parameters that have their gradient
    _sums: list[Callable[[], list[Tensor]]]  # finish the messages under way

    def __init__(self, subspace: Subspace) -> None:
        self._subspace = weakref.ref(subspace)
        self._sync = True
        self._used = False  # whether a step has used what is in coefficients.grad
        ranks = subspace.sharding.ranks
        self._shared = ranks.group is not None
        if self._shared:
            coefficients = subspace.coefficients.detach()
            self._mine = torch.zeros_like(coefficients)  # this rank's addend since the last sum
            count = BUCKETS if subspace.sharding.name == "replicate" else 1
            segments = [
                list(subspace.segments.of_tensor(k, p.numel()))
                for k, p in enumerate(subspace.parameters)
            ]
            # of each message: its columns, and the parameters that have a part in them
            self._buckets = _buckets(segments, coefficients.shape[1], count)
            self._members = [
                {k for k, mine in enumerate(segments) if not columns.isdisjoint(mine)}
                for columns in map(set, self._buckets)
            ]
            self._columns = [
                torch.tensor(columns, dtype=torch.int64, device=coefficients.device)
                for columns in self._buckets
            ]
            self._reset()
        me = weakref.ref(self)  # the hooks must not keep this object alive

        def absorb(k: int) -> None:
            if (alive := me()) is not None:
                with ranks.telling(lambda: " in backward"):
                    alive._absorb(k)

        self._handles = [
            p.register_post_accumulate_grad_hook(lambda _, k=k: absorb(k))
            for k, p in enumerate(subspace.parameters)
        ]

    def remove(self) -> None:
        """Leaves the parameters their gradients again."""
        for handle in self._handles:
            handle.remove()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """A context in which backward sends nothing."""
        self._sync, before = False, self._sync
        try:
            yield
        finally:
            self._sync = before

    @torch.no_grad()
    def _absorb(self, k: int) -> None:
        """Takes the gradient of parameter k, and sends what is complete with it."""
        subspace = self._subspace()
        if subspace is None:
            return
        c, columns = subspace.take_gradient(k)
        if not self._shared:
            self._total(subspace.coefficients)[:, columns] += c
            return
        task = torch._C._current_graph_task_id()
        if self._under_way not in (None, task):
            self.clear()
            raise RuntimeError(
                "low_memory: a backward began before another had ended. After an error in backward,"
                " call optimizer.zero_grad(); activation checkpointing must be checkpoint(...,"
                " use_reentrant=False); else low_memory=False"
            )
        if self._sync and self._under_way is None:
            self._under_way = task
            # Behind what others queue in this backward, such as FSDP's last reduce-scatters: their
            # order must be the same on all ranks.
            Variable._execution_engine.queue_callback(
                lambda: Variable._execution_engine.queue_callback(self._end)
            )
        if k in self._done and self._sync:
            self.clear()
            raise RuntimeError(
                "low_memory: a parameter got its gradient twice in one backward (reentrant"
                " activation checkpointing?); use checkpoint(..., use_reentrant=False), or"
                " low_memory=False"
            )
        # FSDP calls hooks on a stream of its own.
        stream = torch.cuda.current_stream(c.device) if c.is_cuda else None
        if stream and self._added:
            stream.wait_event(self._added)
        self._mine[:, columns] += c
        if stream:
            self._added = stream.record_event()
        if self._sync:
            self._done.add(k)
            while self._next < len(self._buckets) - 1 and self._members[self._next] <= self._done:
                self._send()

    def _send(self) -> None:
        """Begins the sum of the next bucket; the last one carries the stamp of the coefficients."""
        subspace, columns = self._alive(), self._columns[self._next]
        if self._added:
            torch.cuda.current_stream(self._mine.device).wait_event(self._added)
        last = self._next == len(self._buckets) - 1
        stamped = subspace.coefficients if last else None
        finish = subspace.sharding.all_reduce_async([self._mine[:, columns]], stamped)
        self._sums.append(finish)
        self._next += 1

    @torch.no_grad()
    def _end(self) -> None:
        """Sends what is not sent yet, and adds all sums to coefficients.grad: backward is over."""
        try:
            while self._next < len(self._buckets):
                self._send()
            total = self._total(self._alive().coefficients)
            for columns, finish in zip(self._columns, self._sums, strict=True):
                total[:, columns] += finish()[0]
            self._mine.zero_()
        finally:
            self._reset()

    @torch.no_grad()
    def clear(self) -> None:
        """Drops addends that no sum has taken, as zero_grad drops gradients."""
        self._used = False
        if self._shared:
            for finish in self._sums:  # of a backward that ended in an error
                finish()
            self._mine.zero_()
            self._reset()

    def use_up(self) -> None:
        """Makes the next gradient start from zero."""
        self._used = True

    def _total(self, coefficients: Tensor) -> Tensor:
        """coefficients.grad, to be added to; zero if it is not there or used up."""
        if coefficients.grad is None:
            coefficients.grad = torch.zeros_like(coefficients)
        elif self._used:
            coefficients.grad.zero_()
        self._used = False
        return coefficients.grad

    def _alive(self) -> Subspace:
        """The subspace, while a backward through its model goes on."""
        subspace = self._subspace()
        assert subspace is not None
        return subspace

    def _reset(self) -> None:
        """Forgets a backward that is over."""
        self._next = 0
        self._under_way = None
        self._added = None
        self._done = set()
        self._sums = []


def _buckets(segments: list[list[int]], num_segments: int, most: int) -> list[list[int]]:
    """Columns of the coefficients in the order in which backward completes them.

    A segment is complete with its first parameter.

    Args:
        segments: of each parameter
        num_segments: number of columns
        most: parts at most

    Returns:
        the columns, in parts of about the same size
    """
    first = {l: k for k, mine in reversed(list(enumerate(segments))) for l in mine}
    order = sorted(range(num_segments), key=lambda l: -first[l])
    count = min(most, num_segments)
    ends = [num_segments * b // count for b in range(count + 1)]
    return [order[a:b] for a, b in itertools.pairwise(ends)]
