"""What a long run shows of itself: a bar of progress, and its highest memory."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch
from tqdm import tqdm

from .memory import proc_bytes


class PeakMemory:
    """Highest resident memory of this process since the object was made, and that of its GPU.

    Where the kernel does not let a process reset its high-water mark, it is the peak since the
    process started.

    Args:
        device: where tensors are; what a GPU's allocator has handed out is counted, too
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device if device is not None and device.type == "cuda" else None
        if self.device is not None:
            torch.cuda.reset_peak_memory_stats(self.device)
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

    def device_bytes(self) -> int:
        """The peak of what PyTorch had allocated on the GPU, in bytes; 0 without one."""
        return 0 if self.device is None else torch.cuda.max_memory_allocated(self.device)


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
