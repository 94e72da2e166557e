"""Re-estimation of BatchNorm statistics, which no averaging of checkpoints gets right."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .distributed.ranks import Ranks
from .io.errors import TwaError, check_type
from .modes import plain_weights


def batch_size(batch: object) -> int | None:
    """Samples in a batch, as far as it shows them; None if it does not.

    A tensor has its first dimension; a dict, tuple or list that of the first tensor in it. Without
    a tensor in it, a list of texts, numbers or other samples has its length, a tuple of tuples or
    lists (images, targets) the length of the first, and a dict or anything else in it the size of
    its first item that has one. Other objects have `num_graphs`, `batch_size` or a length.
    """
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    if isinstance(batch, Mapping):
        items = list(batch.values())
    elif isinstance(batch, list | tuple):
        items = list(batch)
    else:
        return _own_size(batch)
    for item in items:
        if isinstance(item, Tensor) and item.dim():
            return item.shape[0]
    if not isinstance(batch, Mapping) and _are_samples(batch):
        return len(items)
    for item in items:
        if isinstance(item, list | tuple) and not hasattr(item, "_fields"):
            size: int | None = len(item)
        else:
            size = None if isinstance(item, Tensor) else batch_size(item)
        if size:
            return size
    return None


def _are_samples(batch: Sequence[object]) -> bool:
    """Whether each item is a sample: a text, a number, a dict of one kind, a pair of unlike things.

    In a list, not in a tuple, also objects of one class.
    """
    first = batch[0] if batch else None
    if isinstance(first, str | bytes | int | float):
        return all(type(item) is type(first) for item in batch)
    if isinstance(first, Mapping):
        return all(isinstance(item, Mapping) and item.keys() == first.keys() for item in batch)
    if isinstance(first, list | tuple):
        unlike = len({type(part) for part in first}) > 1
        return unlike and all(type(i) is type(first) and len(i) == len(first) for i in batch)
    plain = first is None or isinstance(first, Tensor)
    return isinstance(batch, list) and not plain and all(type(i) is type(first) for i in batch)


def _own_size(batch: object) -> int | None:
    """What an object says of its size."""
    if isinstance(batch, str | bytes):
        return None
    for ask in (
        lambda: batch.num_graphs,  # type: ignore[attr-defined]
        lambda: batch.batch_size,  # type: ignore[attr-defined]
        lambda: len(batch),  # type: ignore[arg-type]
    ):
        with contextlib.suppress(Exception):  # whatever a property of it raises
            size = ask()
            if type(size) is int and size > 0:
                return size
    return None


def run_model(model: nn.Module, batch: object) -> object:
    """Forward pass on a batch as loaders give it.

    It is model(**batch) for a dict, without the keys that forward does not take; model(batch[0])
    for a tuple or list; model(batch) for a tensor or any other object, and for a dict of which
    forward takes no key.
    """
    if isinstance(batch, Mapping):
        accepted = inspect.signature(model.forward).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            taken = {k: v for k, v in batch.items() if k in accepted}
            return model(**taken) if taken else model(batch)
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
    the size of the batch; or all alike, if there is a batch whose size does not show. A batch that
    leaves a BatchNorm one value per channel, such as a last batch of one sample, has no variance
    and is left out. Training mode and momenta are restored; Dropout is off meanwhile.

    A BatchNorm keeps its statistics, and normalises by them, if no forward pass calls it, or if it
    is frozen: where the model's own `train()` leaves it in evaluation mode (norm_eval, a `train()`
    that calls `eval()` on a part). One with `track_running_stats=False` has none. A layer whose
    parameters do not require gradients, but which `train()` does put in training mode, is
    re-estimated like any other.

    Args:
        loader: batches: tensors, tuples or lists (model input first), dicts (passed by keyword), or
            any other objects, which the model takes
        model: its running statistics are written
        forward: how to run the model on a batch, where that guess is wrong
        max_batches: stop after so many; None: read all
        group: process group whose ranks each bring their own batches: all get the statistics of all
            of them. For a tensor-parallel model, that of the other dimension of its mesh

    Returns:
        the number of batches used, of all ranks: 0, without reading any, if the model has no
        BatchNorm with running statistics that are not frozen

    Raises:
        TwaError: no batch could be used, or the model is none; after any error the statistics are
            as they were
    """
    check_type("model", model, nn.Module, "a torch.nn.Module")
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
    size: int | None,
) -> bool:
    """Puts the statistics of one batch into the layers; False if it has no variance."""
    for m in norms:
        m.reset_running_stats()
    try:
        forward(model, batch)
    except ValueError as error:
        if (size or 0) > 1 or "more than 1 value per channel" not in str(error):
            raise
        return False
    return True


class _Totals:
    """Sums over batches of each layer's statistics, by the size of the batch and all alike."""

    def __init__(self, norms: list[_BatchNorm]) -> None:
        # all, and those whose size does not show
        self.batches = torch.zeros(2, dtype=torch.int64, device="cpu")
        # of each layer: samples (once a call), calls
        self.counted = torch.zeros(len(norms), 2, dtype=torch.float64, device="cpu")
        # of each layer and statistic: (2, channels), weighted by samples, and by calls
        self.sums = [
            [torch.zeros(2, *t.shape, dtype=torch.float64, device=t.device) for t in moments]
            for moments in (_statistics(m)[:2] for m in norms)
        ]

    def add(self, norms: list[_BatchNorm], size: int | None) -> None:
        """Adds what one batch has left in the layers."""
        self.batches += torch.tensor([1, size is None], dtype=torch.int64, device="cpu")
        for m, counted, sums in zip(norms, self.counted, self.sums, strict=True):
            *moments, tracked = _statistics(m)
            calls = int(tracked)
            weights = (size or 0) * calls, calls
            counted += torch.tensor(weights, dtype=torch.int64, device="cpu")
            for totals, t in zip(sums, moments, strict=True):
                for total, weight in zip(totals, weights, strict=True):
                    total.add_(t, alpha=weight)

    def write(self, norms: list[_BatchNorm], before: list[list[Tensor]], ranks: Ranks) -> int:
        """Writes the averages of all ranks to the layers, where there were calls.

        Returns:
            the number of batches of all ranks; TwaError if there are none
        """
        used, sizeless = ranks.all_reduce_(self.batches).tolist()
        if not used:
            raise TwaError(
                "update_bn: expected at least one batch with more than one value per channel, found"
                " none: is the loader used up?"
            )
        _restore(norms, before)
        counted = ranks.all_reduce_(self.counted).tolist()
        by = 1 if sizeless else 0
        for m, weights, sums in zip(norms, counted, self.sums, strict=True):
            mean, variance = (ranks.all_reduce_(t[by].contiguous()) for t in sums)
            if calls := weights[1]:
                running_mean, running_var, tracked = _statistics(m)
                running_mean.copy_(mean / weights[by])
                running_var.copy_(variance / weights[by])
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
