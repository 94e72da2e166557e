"""Amounts of memory: as text, of this process, and as a limit on what is read at once."""

from __future__ import annotations

import argparse
import contextlib

from ..distributed import cost as plan
from ..distributed.sharding import Placement
from .candidates import UNIT, Candidates

# of a file that is read here and there: the system maps its cache in pages of up to 2 MB
LARGE_PAGES = 6 << 20


def parse_bytes(text: str) -> int:
    """ "2GB", "500 MB", "1.5G", "100000" """
    units = {
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
    number = text.strip().rstrip("BKMGTIbkmgti ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        value = float(number) * units[unit]
    except (ValueError, KeyError):
        value = -1.0
    if not 0 < value < 2**60:
        raise argparse.ArgumentTypeError(
            f"expected an amount of memory such as 2GB or 500MB, found {text!r}"
        )
    return int(value)


def limit_memory(candidates: Candidates, limit: int, fixed: int = 0) -> None:
    """Sets how much is read at once so that the process stays below `limit` bytes, of which `fixed`
    are needed besides what it holds now.
    """
    held = resident()
    mapped = sum(min(LARGE_PAGES, sum(info.nbytes for info in c.info.values())) for c in candidates)
    overhead = mapped + (64 << 20)  # and Python objects
    spare = limit - held - fixed - overhead
    least = UNIT * sum(max(i.dtype.itemsize for i in c.info.values()) for c in candidates)
    if spare < 5 * least:
        raise ValueError(
            f"--max-memory: {limit / 1e9:.2f} GB are not enough: {held / 1e9:.2f} GB are in use,"
            f" {fixed / 1e9:.2f} GB will be needed, and reading {len(candidates)} candidates takes"
            f" at least {(5 * least + overhead) / 1e9:.2f} GB"
        )
    candidates.block_bytes = min(candidates.block_bytes, max(least, spare // 5))


def training_bytes(placement: Placement, bits: int) -> int:
    """What training will hold on this rank beside what it holds now: basis, center, gradients, and
    the best weights so far; without activations.
    """
    held = sum(h.shape.numel() for h in placement.held)
    params, itemsize = (
        sum(t.numel() for t in placement.tensors),
        placement.tensors[0].element_size(),
    )
    job = plan.Job(
        params,
        len(placement.candidates),
        bits,
        segments=1,
        ranks=placement.world.size,
        weight_bytes=itemsize,
    )
    return (
        int(
            plan.memory(job, "replicate" if placement.name == "single" else placement.name)["total"]
        )
        - held * itemsize
        + held * 4
    )


def resident() -> int:
    """Bytes of memory that this process holds now."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmRSS"))
    return 0
