"""Amounts of memory: as text, of this process, and as a limit on what is read at once."""

from __future__ import annotations

import contextlib

from .candidates import UNIT, Candidates
from .errors import TwaError

#: bytes that a file takes that is read here and there: the system maps its cache in pages of up to
#: 2 MB
LARGE_PAGES = 6 << 20
#: factor of each unit, in capitals
UNITS = {
    "": 1,
    "B": 1,
    "K": 1e3,
    "KB": 1e3,
    "M": 1e6,
    "MB": 1e6,
    "G": 1e9,
    "GB": 1e9,
    "T": 1e12,
    "TB": 1e12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def parse_bytes(text: str) -> int:
    """Bytes of an amount such as "2GB", "500 MB", "1.5G" or "100000"; TwaError if it is none."""
    number = text.strip().rstrip("BKMGTIbkmgti ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        value = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        value = -1.0
    if not 0 < value < 2**60:
        raise TwaError(f"expected an amount of memory such as 2GB or 500MB, found {text!r}")
    return int(value)


def limit_memory(candidates: Candidates, limit: int, fixed: int = 0) -> None:
    """Sets how much is read at once so that the process stays below a limit.

    Args:
        candidates: what will be read; `block_bytes` is set
        limit: bytes of the whole process
        fixed: bytes that it will need besides what it holds now and what it reads

    Raises:
        TwaError: the limit is too low
    """
    held = resident()
    mapped = sum(min(LARGE_PAGES, sum(info.nbytes for info in c.info.values())) for c in candidates)
    overhead = mapped + (64 << 20)  # and Python objects
    spare = limit - held - fixed - overhead
    least = UNIT * sum(max(i.dtype.itemsize for i in c.info.values()) for c in candidates)
    if spare < 5 * least:
        raise TwaError(
            f"--max-memory: {limit / 1e9:.2f} GB are not enough: {held / 1e9:.2f} GB are in use,"
            f" {fixed / 1e9:.2f} GB will be needed, and reading {len(candidates)} candidates takes"
            f" at least {(5 * least + overhead) / 1e9:.2f} GB"
        )
    candidates.block_bytes = min(candidates.block_bytes, max(least, spare // 5))


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return proc_bytes("/proc/self/status", "VmRSS") or 0


def proc_bytes(file: str, field: str) -> int | None:
    """Bytes that a file of /proc says of a field; None where it does not."""
    with contextlib.suppress(OSError, StopIteration), open(file) as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))
    return None
