"""Loss of a model over data, the process's memory, and progress."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterable

import torch
from torch import nn
from tqdm import tqdm

from ..batchnorm import batch_size
from ..distributed.ranks import World
from ..merge.settings import Result
from ..tasks.batches import shared_out
from ..tasks.contract import Task


@torch.no_grad()
def mean_over(
    model: nn.Module,
    function: Callable[[nn.Module, object], object],
    data: Iterable,
    world: World | None = None,
) -> float:
    """Mean of function(model, batch) over the data in evaluation mode, each batch weighted by its
    size; ranks share the batches.
    """
    world = world or World()
    training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)  # sum, samples
    for batch, counts in shared_out(data, world):
        value = float(function(model, batch))
        if counts:
            size = batch_size(batch)
            total += torch.tensor([value * size, size], dtype=torch.float64)
    model.train(training)
    total, samples = world.sum_(total).tolist()
    if not samples:
        raise ValueError("expected at least one batch to evaluate on, found none")
    return total / samples


class PeakMemory:
    """Highest resident memory of this process since the object was made, in bytes.

    Where the kernel does not let a process reset its high-water mark, the peak since the process
    started.
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


def measure_test(result: Result, model: nn.Module, task: Task, world: World | None = None) -> None:
    if task.test is not None:
        result.test_loss = mean_over(model, task.loss, task.test, world)
        if task.metric is not None:
            result.test_metric = mean_over(model, task.metric, task.test, world)


def progress_bar(text: str, total: int, shown: bool, **options: object) -> tqdm:
    return tqdm(
        total=total,
        desc=f"{text:32.32s}",
        disable=not shown,
        mininterval=0.5,
        file=sys.stderr,
        **options,
    )
