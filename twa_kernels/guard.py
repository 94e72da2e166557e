"""`GuardedMap`: a mapped file that another process may cut short without ending this one."""

from __future__ import annotations

import mmap

from .native import _C


class GuardedMap(mmap.mmap):
    """A mapping of a file, as mmap.mmap makes it, of which missing bytes read as zeros.

    A program that maps a file is ended by SIGBUS when it touches bytes that are no longer there.
    Here they become zeros, to the end of the file, whoever touches them: a thread, a kernel, torch.
    Whoever has read asks `torn` before anything is made of it. Without the native module, and on
    other systems than Linux, it is a plain mapping.

    Args:
        fileno, length, access: as for mmap.mmap
    """

    _number = -1
    # Held here, since an interpreter that ends forgets modules before the last mapping.
    _unguard = None if _C is None else staticmethod(_C.unguard)

    def __new__(cls, fileno: int, length: int, access: int = mmap.ACCESS_READ) -> GuardedMap:
        made = super().__new__(cls, fileno, length, access=access)
        if _C is not None:
            made._number = _C.guard(made)
        return made

    @property
    def torn(self) -> bool:
        """Whether bytes were missing when they were touched: some that were read were zeros."""
        return _C is not None and bool(_C.is_torn(self._number))

    def __del__(self) -> None:
        # Before it is unmapped, which follows: another mapping may take its place at once.
        if self._unguard is not None:
            self._unguard(self._number)


def torn_maps() -> int:
    """Mappings of this process that were torn so far: 0 says in no time that there is none."""
    return 0 if _C is None else int(_C.torn_ranges())
