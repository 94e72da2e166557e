"""`Note`: why a rank gives up, left in the store of the process group for those that lose it.

A backend tells the other ranks that a connection is gone, not why. Under torchrun the agent holds
the store, so that a note outlives its rank, and a restart of the job: each has a note of its own.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

KEY = "failure"
#: seconds for a store to answer; that a rank stays for the others to read its note
ANSWER, STAY = 2.0, 3.0
MOST = 2000  # bytes of a note

Value = TypeVar("Value")


class Note:
    """The one note of a process group's ranks: the first that is written stays.

    A store that is gone is no error: nothing is written then, and nothing read.

    Args:
        group: the process group
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"twa {attempt}", group.get_group_store())
        self._has_written = False

    def write(self, text: str) -> None:
        """Leaves "rank 1 failed" and this text, unless a rank has left a note."""
        line = f"rank {self.rank} failed{text}".encode(errors="replace")[:MOST]

        def write(store: dist.Store) -> None:
            store.compare_set(KEY, "", line.decode(errors="ignore"))
            store.set(self._read_by(self.rank), "yes")

        self._has_written = True
        self._ask(write, None)

    def withdraw(self) -> None:
        """Takes back what this rank has written, as it goes on after all."""
        if self._has_written:
            self._ask(lambda store: self._is_mine(store) and store.delete_key(KEY), False)
            self._has_written = False

    def read(self) -> str:
        """What a rank has written, such as "rank 1 failed at step 12: too short"; "" if nothing."""

        def read(store: dist.Store) -> str:
            text = store.get(KEY).decode(errors="replace") if store.check([KEY]) else ""
            store.set(self._read_by(self.rank), "yes")
            return text

        return self._ask(read, "")

    def stay_until_read(self) -> None:
        """Waits a while until all others have read the note, if it is this rank's.

        The process may hold the store, and where one ends torchrun ends the others. They read when
        they have lost this rank: destroy the process group first.
        """
        readers = [self._read_by(rank) for rank in range(self.size)]
        last = time.monotonic() + STAY
        while time.monotonic() < last:
            if self._ask(lambda store: not self._is_mine(store) or store.check(readers), True):
                return
            time.sleep(0.02)

    def _is_mine(self, store: dist.Store) -> bool:
        return store.check([KEY]) and store.get(KEY).startswith(f"rank {self.rank} ".encode())

    @staticmethod
    def _read_by(rank: int) -> str:
        return f"read by rank {rank}"

    def _ask(self, question: Callable[[dist.Store], Value], otherwise: Value) -> Value:
        """The store's answer; `otherwise` if it is gone."""
        inner: dist.Store = self.store
        while isinstance(inner, dist.PrefixStore):
            inner = inner.underlying_store
        try:
            if isinstance(inner, dist.TCPStore):
                # Asked in vain it would print frames of C++, or wait for the group's time limit.
                socket.create_connection((inner.host, inner.port), ANSWER).close()
            return question(self.store)
        except (RuntimeError, OSError):
            return otherwise
