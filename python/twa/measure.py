"""Loss of a model over data, and the process's memory."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable

import torch
from torch import nn

from .batchnorm import batch_size


@torch.no_grad()
def mean_over(model: nn.Module, function: Callable[[nn.Module, object], object], data: Iterable) -> float:
    """Mean of function(model, batch) over the data in evaluation mode, each batch weighted by its size."""
    training = model.training
    model.eval()
    total = samples = 0.0
    for batch in data:
        size = batch_size(batch)
        total += float(function(model, batch)) * size
        samples += size
    model.train(training)
    if not samples:
        raise ValueError("expected at least one batch to evaluate on, found none")
    return total / samples


class PeakMemory:
    """Highest resident memory of this process since the object was made, in bytes.

    Where the kernel does not let a process reset its high-water mark, the peak since the process started.
    """

    def __init__(self) -> None:
        try:
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")
        except OSError:
            pass

    def bytes(self) -> int:
        try:
            with open("/proc/self/status") as f:
                return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
