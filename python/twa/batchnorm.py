"""Re-estimation of BatchNorm statistics, which no averaging of checkpoints gets right."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .distributed.ranks import Ranks
from .io.errors import TwaError
from .modes import plain_weights


def batch_size(batch: object) -> int:
    """Samples in a batch: the first dimension of its first tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    items: Iterable[object] = ()
    if isinstance(batch, Mapping):
        items = batch.values()
    elif isinstance(batch, list | tuple):
        items = batch
    for item in items:
        if isinstance(item, Tensor) and item.dim():
            return item.shape[0]
    raise TypeError(
        "batch: expected a tensor, or a tuple, list or dict that holds one, found"
        f" {type(batch).__name__}"
    )


def run_model(model: nn.Module, batch: object) -> object:
    """Forward pass on a batch as loaders give it.

    It is model(**batch) for a dict, without the keys that forward does not take; model(batch[0])
    for a tuple or list; model(batch) for a tensor.
    """
    if isinstance(batch, Mapping):
        accepted = inspect.signature(model.forward).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            batch = {k: v for k, v in batch.items() if k in accepted}
        return model(**batch)
    return model(batch[0] if isinstance(batch, list | tuple) else batch)


def tracked_batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers of a model that keep running statistics."""
    return [
        m
        for m in model.modules()
        if isinstance(m, _BatchNorm) and m.track_running_stats and m.running_mean is not None
    ]


def trained_batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """Those of `tracked_batchnorms` whose statistics follow the data in `model.train()`.

    The others are frozen: the model's own `train()` leaves them in evaluation mode (norm_eval).
    """
    with plain_weights(model):
        modes = {m: m.training for m in model.modules()}
        model.train()
        found = [m for m in tracked_batchnorms(model) if m.training]
        _set_modes(modes)
    return found


def _set_modes(modes: Mapping[nn.Module, bool]) -> None:
    """Each module's own mode, whatever that of the module around it."""
    for module, training in modes.items():
        module.training = training


def update_bn(
    loader: Iterable,
    model: nn.Module,
    forward: Callable[[nn.Module, object], object] = run_model,
    max_batches: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> int:
    """Re-estimates the running statistics of the BatchNorm layers in the model.

    Running mean and variance become their averages over all calls of the layer, each weighted by
    the size of the batch. A batch that leaves a BatchNorm one value per channel, such as a last
    batch of one sample, has no variance and is left out. Training mode and momenta are restored;
    Dropout is off meanwhile.

    A BatchNorm keeps its statistics, and normalises by them, if no forward pass calls it, or if it
    is frozen: where the model's own `train()` leaves it in evaluation mode (norm_eval, a `train()`
    that calls `eval()` on a part). One with `track_running_stats=False` has none. A layer whose
    parameters do not require gradients, but which `train()` does put in training mode, is
    re-estimated like any other.

    Args:
        loader: batches: tensors, tuples or lists (model input first), or dicts (passed by keyword)
        model: its running statistics are written
        forward: how to run the model on a batch, where that guess is wrong
        max_batches: stop after so many; None: read all
        group: process group whose ranks each bring their own batches: all get the statistics of all
            of them

    Returns:
        the number of batches used, of all ranks: 0, without reading any, if the model has no
        BatchNorm with running statistics that are not frozen

    Raises:
        TwaError: no batch could be used; after any error the statistics are as they were
    """
    ranks = Ranks(group)
    batches = ((batch, True) for batch in itertools.islice(loader, max_batches))
    with ranks.fail_together("re-estimating BatchNorm"):
        return update_bn_of(batches, model, forward, ranks)


@torch.no_grad()
def update_bn_of(
    batches: Iterable[tuple[object, bool]],
    model: nn.Module,
    forward: Callable[[nn.Module, object], object],
    ranks: Ranks,
    kept: Collection[nn.Module] = (),
) -> int:
    """`update_bn` on batches that say whether they count.

    Those that do not count only keep a sharded model's ranks in step.

    Args:
        batches: each with whether it counts
        model: as for `update_bn`
        forward: as for `update_bn`
        ranks: those that bring their own batches
        kept: layers that are frozen besides those that `train()` leaves in evaluation mode
    """
    norms = [m for m in trained_batchnorms(model) if m not in kept]
    if not norms:
        return 0
    with plain_weights(model):
        return _update(batches, model, forward, ranks, norms)


def _update(
    batches: Iterable[tuple[object, bool]],
    model: nn.Module,
    forward: Callable[[nn.Module, object], object],
    ranks: Ranks,
    norms: list[_BatchNorm],
) -> int:
    """`update_bn_of` for these layers."""
    modes = {m: m.training for m in model.modules()}
    momenta = {m: m.momentum for m in norms}
    before = [[t.clone() for t in _statistics(m)] for m in norms]
    totals, done = _Totals(norms), False
    try:
        _prepare(model, norms)
        for batch, counts in batches:
            size = batch_size(batch)
            if _measure(model, norms, forward, batch, size) and counts:
                totals.add(norms, size)
        used = totals.write(norms, before, ranks)
        done = True
        return used
    finally:
        if not done:
            _restore(norms, before)
        for m, momentum in momenta.items():
            m.momentum = momentum
        _set_modes(modes)


def _prepare(model: nn.Module, norms: list[_BatchNorm]) -> None:
    """Modes in which a forward pass leaves each layer's mean over its calls since the last reset.

    A shared layer has several calls in a pass. Other layers with statistics only use them.
    """
    model.train()
    for m in model.modules():
        if isinstance(m, nn.modules.dropout._DropoutNd):
            m.eval()
    for m in tracked_batchnorms(model):
        m.eval()
    for m in norms:
        m.train()
        m.momentum = None


def _measure(
    model: nn.Module,
    norms: list[_BatchNorm],
    forward: Callable[[nn.Module, object], object],
    batch: object,
    size: int,
) -> bool:
    """Puts the statistics of one batch into the layers; False if it has no variance."""
    for m in norms:
        m.reset_running_stats()
    try:
        forward(model, batch)
    except ValueError as error:
        if size > 1 or "more than 1 value per channel" not in str(error):
            raise
        return False
    return True


class _Totals:
    """Sums over batches of each layer's statistics, weighted by the size of the batch."""

    def __init__(self, norms: list[_BatchNorm]) -> None:
        self.batches = 0
        # of each layer: samples (once a call), calls
        self.counted = torch.zeros(len(norms), 2, dtype=torch.float64)
        self.sums = [
            [torch.zeros_like(t, dtype=torch.float64) for t in _statistics(m)[:2]] for m in norms
        ]

    def add(self, norms: list[_BatchNorm], size: int) -> None:
        """Adds what one batch has left in the layers."""
        self.batches += 1
        for m, counted, sums in zip(norms, self.counted, self.sums, strict=True):
            *moments, tracked = _statistics(m)
            calls = int(tracked)
            counted += torch.tensor([size * calls, calls])
            for total, t in zip(sums, moments, strict=True):
                total.add_(t, alpha=size * calls)

    def write(self, norms: list[_BatchNorm], before: list[list[Tensor]], ranks: Ranks) -> int:
        """Writes the averages of all ranks to the layers, where there were calls.

        Returns:
            the number of batches of all ranks; TwaError if there are none
        """
        used = int(ranks.all_reduce_(torch.tensor([self.batches])))
        if not used:
            raise TwaError(
                "update_bn: expected at least one batch with more than one value per channel, found"
                " none: is the loader used up?"
            )
        _restore(norms, before)
        counted = ranks.all_reduce_(self.counted).tolist()
        for m, (samples, calls), sums in zip(norms, counted, self.sums, strict=True):
            mean, variance = (ranks.all_reduce_(t) for t in sums)
            if calls:
                running_mean, running_var, tracked = _statistics(m)
                running_mean.copy_(mean / samples)
                running_var.copy_(variance / samples)
                tracked.fill_(int(calls))
        return used


def _statistics(m: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Running mean, running variance and number of calls of a layer that keeps them."""
    mean, variance, tracked = m.running_mean, m.running_var, m.num_batches_tracked
    assert mean is not None and variance is not None and tracked is not None
    return mean, variance, tracked


def _restore(norms: list[_BatchNorm], saved: list[list[Tensor]]) -> None:
    """The statistics as they were."""
    for m, tensors in zip(norms, saved, strict=True):
        for t, value in zip(_statistics(m), tensors, strict=True):
            t.copy_(value)
