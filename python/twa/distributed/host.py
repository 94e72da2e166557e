"""`HostMemory`: one piece of memory for the ranks of a host, so that they hold one basis, not each.

It is an anonymous file in memory (memfd), which is gone when the last process that maps it is:
nothing is left behind, however a rank ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import secrets
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .ranks import Ranks

TOKEN_BYTES = 16  # random ones behind the memory, by which a rank knows that it has the right one
HUGE = 1 << 21  # bytes of a huge page, and where the memory begins
MAP_FIXED = 0x10
MADV_COLLAPSE = 25  # of Linux 6.1: puts a range on huge pages, whatever is set for shared memory
#: (process, its file descriptor, token) of a memory that others may map
Offer = tuple[int, int, bytes]


def host_key() -> str:
    """What processes that can share memory have in common; "" if the system does not tell.

    It is the start of the kernel, and the namespaces of processes and of the network: two network
    namespaces of one machine count as two hosts.
    """
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        spaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "net")]
    except OSError:
        return ""
    return " ".join([started, *spaces])


class HostMemory:
    """Memory that the ranks of each host map; ranks make it together.

    A host where one rank cannot open the memory of another (no /proc, another user) is as many
    hosts as it has ranks: each uses memory of its own.

    Args:
        ranks: those that share the job
        size: bytes at least
        key: says which ranks share; "": this rank shares with none

    Attributes:
        homes: the ranks that share one memory, for each memory, in their order
        allocate: (shape, dtype) -> zeros in the shared memory, called in the same order by all
            that share it, for `size` bytes in all; None on a rank that shares with none
    """

    allocate: Callable[[tuple[int, ...], torch.dtype], Tensor] | None

    def __init__(self, ranks: Ranks, size: int, key: str) -> None:
        self._ranks, self._used, self.allocate = ranks, 0, None
        keys = ranks.all_gather_object(key)
        homes: dict[object, list[int]] = {}
        for rank, found in enumerate(keys):
            homes.setdefault(found or rank, []).append(rank)
        self.homes = list(homes.values())
        if not self.is_shared:
            return
        # of other users' /proc nothing is sure: what opens is compared with what was offered
        mine = self.home_of(ranks.rank)
        made = _make(size) if ranks.rank == mine[0] and len(mine) > 1 else None
        try:
            offer = ranks.all_gather_object(made)[mine[0]]
            self._map = _open(offer, size) if offer else None
            works = ranks.all_gather_object(self._map is not None)
        finally:
            if made:
                os.close(made[1])
        self.homes = [
            part
            for home in self.homes
            for part in ([home] if all(works[r] for r in home) else [[r] for r in home])
        ]
        if self._map is not None and len(self.home_of(ranks.rank)) > 1:
            self._memory = _aligned(self._map)
            self.allocate = self._allocate

    @property
    def is_shared(self) -> bool:
        """Whether some ranks share memory: the same on all."""
        return any(len(home) > 1 for home in self.homes)

    def home_of(self, rank: int) -> list[int]:
        """The ranks that share memory with this one, and itself."""
        return next(home for home in self.homes if rank in home)

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros that begin on a page."""
        begin, end = self._used, self._used + torch.Size(shape).numel() * dtype.itemsize
        self._used = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
        return self._memory[begin:end].view(dtype).view(shape)

    def send(self, owner: Sequence[int], parts: Sequence[Sequence[Tensor]]) -> None:
        """Makes tensors that some rank has written those of every memory; ranks call it together.

        Each crosses to another host once, to one of its ranks: the one with the sender's number
        among its own host's ranks, or counted around where there are fewer.

        Args:
            owner: of each, the rank that has written it
            parts: of each, the tensors that it is, in this rank's memory
        """
        here, me = self.home_of(self._ranks.rank), self._ranks.rank
        sends: list[tuple[Tensor, int]] = []
        receives: list[tuple[Tensor, int]] = []
        for source, tensors in zip(owner, parts, strict=True):
            theirs = self.home_of(source)
            number = theirs.index(source)
            if source == me:
                others = [home for home in self.homes if home is not here]
                sends += [(t, home[number % len(home)]) for home in others for t in tensors]
            elif theirs is not here and here[number % len(here)] == me:
                receives += [(t, source) for t in tensors]
        self._ranks.exchange(sends, receives)

    def settle(self, kept: Tensor, dropped: Tensor) -> None:
        """Ends the building of a basis; ranks call it together, when they have written all.

        With 4 KiB pages a step takes an eighth more time: huge pages are asked for, which each rank
        of a host does for its share. A kernel that has none leaves it as it is.

        Args:
            kept: the codes
            dropped: what nobody needs any more: its memory goes back to the system
        """
        self._ranks.barrier()
        if self.allocate is None or self._map is None:
            return
        home = self.home_of(self._ranks.rank)
        number, base = home.index(self._ranks.rank), torch.frombuffer(self._map, dtype=torch.uint8)
        if number == 0 and dropped.numel():
            begin = dropped.data_ptr() - base.data_ptr()
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_REMOVE, begin, dropped.nbytes)
        first = -(-kept.data_ptr() // HUGE)
        count = (kept.data_ptr() + kept.nbytes) // HUGE - first
        a, b = (first + count * k // len(home) for k in (number, number + 1))
        if count > 0 and a < b:
            with contextlib.suppress(OSError):
                self._map.madvise(MADV_COLLAPSE, a * HUGE - base.data_ptr(), (b - a) * HUGE)


def _make(size: int) -> Offer | None:
    """Makes a memory of so many bytes; None where the system has no such thing."""
    token = secrets.token_bytes(TOKEN_BYTES)
    try:
        descriptor = os.memfd_create("twa", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError):
        return None
    try:
        os.ftruncate(descriptor, size + TOKEN_BYTES)
        os.pwrite(descriptor, token, size)
        # nobody can make it smaller under those who map it
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError:
        os.close(descriptor)
        return None
    return os.getpid(), descriptor, token


def _aligned(reserved: mmap.mmap) -> Tensor:
    """The bytes that `_open` has put at the first multiple of HUGE there."""
    flat = torch.frombuffer(reserved, dtype=torch.uint8)
    return flat[-flat.data_ptr() % HUGE :]


def _open(offer: Offer, size: int) -> mmap.mmap | None:
    """Maps a memory that a process of this host offers; None if it does not open, or is another.

    It lies at the first multiple of HUGE of what is returned.
    """
    process, number, token = offer
    try:
        descriptor = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        same = stat.S_ISREG(found.st_mode) and found.st_size == size + TOKEN_BYTES
        if not same or os.pread(descriptor, TOKEN_BYTES, size) != token:
            return None
        # of the system's calls only this one says where: over a part of what is reserved
        reserved = mmap.mmap(-1, found.st_size + HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        at, libc = _aligned(reserved).data_ptr(), ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        flags = mmap.MAP_SHARED | MAP_FIXED
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        put = libc.mmap(at, found.st_size, protection, flags, descriptor, 0)
        return reserved if put == at else None
    except OSError:
        return None
    finally:
        os.close(descriptor)
