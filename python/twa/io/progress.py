"""What a long run shows of itself: a bar of progress, and its highest memory."""

from __future__ import annotations

import resource
import sys
from typing import Any

from tqdm import tqdm

from .memory import proc_bytes


class PeakMemory:
    """Highest resident memory of this process since the object was made.

    Where the kernel does not let a process reset its high-water mark, it is the peak since the
    process started.
    """

    def __init__(self) -> None:
        try:
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")
        except OSError:
            pass

    def bytes(self) -> int:
        """The peak in bytes."""
        peak = proc_bytes("/proc/self/status", "VmHWM")
        if peak is None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return peak


def progress_bar(text: str, total: int | None, shown: bool = True, **options: Any) -> tqdm:
    """A bar on the error stream, or none; without a total it counts."""
    return tqdm(
        total=total,
        desc=f"{text:32.32s}",
        disable=not shown,
        mininterval=0.5,
        file=sys.stderr,
        **options,
    )
