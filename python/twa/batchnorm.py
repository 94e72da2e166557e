"""Re-estimation of BatchNorm statistics, which no averaging of checkpoints gets right."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .distributed.ranks import World


def batch_size(batch: object) -> int:
    """Samples in a batch: the first dimension of its first tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    items = (
        batch.values()
        if isinstance(batch, Mapping)
        else batch
        if isinstance(batch, list | tuple)
        else ()
    )
    for item in items:
        if isinstance(item, Tensor) and item.dim():
            return item.shape[0]
    raise TypeError(
        "batch: expected a tensor, or a tuple, list or dict that holds one, found"
        f" {type(batch).__name__}"
    )


def run_model(model: nn.Module, batch: object) -> object:
    """Forward pass on a batch as loaders give it: model(**batch) for a dict (keys that forward does
    not take are left out), model(batch[0]) for a tuple or list, model(batch) for a tensor."""
    if isinstance(batch, Mapping):
        accepted = inspect.signature(model.forward).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            batch = {k: v for k, v in batch.items() if k in accepted}
        return model(**batch)
    return model(batch[0] if isinstance(batch, list | tuple) else batch)


def tracked_batchnorms(model: nn.Module) -> list[_BatchNorm]:
    return [
        m
        for m in model.modules()
        if isinstance(m, _BatchNorm) and m.track_running_stats and m.running_mean is not None
    ]


def _statistics(norms: list[_BatchNorm]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [
        (m.running_mean.clone(), m.running_var.clone(), m.num_batches_tracked.clone())
        for m in norms
    ]


def _restore(norms: list[_BatchNorm], saved: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    for m, (mean, variance, tracked) in zip(norms, saved, strict=True):
        m.running_mean.copy_(mean)
        m.running_var.copy_(variance)
        m.num_batches_tracked.copy_(tracked)


def update_bn(
    loader: Iterable,
    model: nn.Module,
    forward: Callable[[nn.Module, object], object] = run_model,
    max_batches: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> int:
    """Sets every BatchNorm's running mean and variance to their averages over all its calls, each
    weighted by the size of the batch.

    loader       tensors, tuples or lists (model input first), or dicts (passed by keyword)
    forward      how to run the model on a batch, if that guess is wrong
    max_batches  stop after so many
    group        process group whose ranks each bring their own batches: all get the statistics of
                 all of them

    Returns the number of batches used: 0, without reading any, if the model has no BatchNorm with
    running statistics. A batch that leaves a BatchNorm one value per channel, such as a last batch
    of one sample, has no variance and is left out. A BatchNorm that no forward pass calls keeps its
    statistics. Training mode and momenta are restored; Dropout is off meanwhile. Raises ValueError
    if no batch could be used; after any error the statistics are as they were.
    """
    world = World(group)
    with world.together("re-estimating BatchNorm"):
        return update_bn_of(
            ((batch, True) for batch in itertools.islice(loader, max_batches)),
            model,
            forward,
            world,
        )


@torch.no_grad()
def update_bn_of(
    batches: Iterable[tuple[object, bool]],
    model: nn.Module,
    forward: Callable[[nn.Module, object], object],
    world: World,
) -> int:
    """update_bn on batches that say whether they count; those that do not only keep a sharded
    model's ranks in step.
    """
    norms = tracked_batchnorms(model)
    if not norms:
        return 0
    modes = {m: m.training for m in model.modules()}
    momenta = {m: m.momentum for m in norms}
    before = _statistics(norms)
    sums = [
        (
            torch.zeros_like(mean, dtype=torch.float64),
            torch.zeros_like(variance, dtype=torch.float64),
        )
        for mean, variance, _ in before
    ]
    # of each: samples (once a call), calls
    counted = torch.zeros(len(norms), 2, dtype=torch.float64)
    used, done = 0, False
    try:
        model.train()
        for m in model.modules():
            if isinstance(m, nn.modules.dropout._DropoutNd):
                m.eval()
        for m in norms:
            m.train()
            # running = mean over the calls since reset_running_stats: a shared module has several
            # in a pass
            m.momentum = None
        for batch, counts in batches:
            size = batch_size(batch)
            for m in norms:
                m.reset_running_stats()
            try:
                forward(model, batch)
            except ValueError as error:
                if size > 1 or "more than 1 value per channel" not in str(error):
                    raise
                continue
            if not counts:
                continue
            used += 1
            calls = [int(m.num_batches_tracked) for m in norms]
            counted += torch.tensor([[size * c, c] for c in calls])
            for m, c, (mean, variance) in zip(norms, calls, sums, strict=True):
                mean.add_(m.running_mean, alpha=size * c)
                variance.add_(m.running_var, alpha=size * c)
        used = int(world.sum_(torch.tensor([used])))
        if not used:
            raise ValueError(
                "update_bn: expected at least one batch with more than one value per channel, found"
                " none: is the loader used up?"
            )
        _restore(norms, before)
        for m, (samples, calls), (mean, variance) in zip(
            norms, world.sum_(counted).tolist(), sums, strict=True
        ):
            world.sum_(mean), world.sum_(variance)
            if calls:
                m.running_mean.copy_(mean / samples)
                m.running_var.copy_(variance / samples)
                m.num_batches_tracked.fill_(int(calls))
        done = True
        return used
    finally:
        if not done:
            _restore(norms, before)
        for m, momentum in momenta.items():
            m.momentum = momentum
        for m, training in modes.items():
            m.training = training
