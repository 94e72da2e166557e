"""`Evaluator`: the loss of a model at an average of the candidates, as it would be exported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..batchnorm import batch_size, tracked_batchnorms, trained_batchnorms, update_bn_of
from ..distributed.ranks import Ranks
from ..distributed.sharding import Sharding
from ..distributed.weights import load_buffers, load_merge, load_untrained, round_to_files
from ..io.errors import TaskError
from ..io.loading import named_tensors
from ..modes import plain_weights
from ..spectral_norm import refresh_spectral_norms
from ..tasks.batches import shared_out
from ..tasks.contract import Task

BN_BATCHES = 100  # training batches that BatchNorm is re-estimated on
#: the running statistics of a BatchNorm, and what they are before it has seen data
FIRST_STATISTICS = {"running_mean": 0.0, "running_var": 1.0}


@torch.no_grad()
def mean_over(
    model: nn.Module,
    function: Callable[[nn.Module, object], Tensor | float],
    data: Iterable,
    ranks: Ranks | None = None,
) -> float:
    """Mean of function(model, batch) over the data, with the model in evaluation mode.

    Args:
        model: what is measured
        function: mean over a batch of what is measured
        data: batches; each is weighted by its size, or all alike if there is one whose size does
            not show
        ranks: those that share the batches; None: this process alone

    Raises:
        TaskError: there is no batch
    """
    ranks = ranks or Ranks()
    training = model.training
    model.eval()
    # sum by samples, samples; sum by batches, batches; those whose size does not show
    totals = torch.zeros(5, dtype=torch.float64)
    try:
        for batch, counts in shared_out(data, ranks):
            value = float(function(model, batch))
            if counts:
                size = batch_size(batch)
                by_size = (0.0, 0) if size is None else (value * size, size)
                totals += torch.tensor([*by_size, value, 1, size is None], dtype=torch.float64)
    finally:
        model.train() if training else model.eval()
    total, samples, plain, batches, sizeless = ranks.all_reduce_(totals).tolist()
    if sizeless:
        return plain / batches
    if not samples:
        raise TaskError("expected at least one batch to evaluate on, found none")
    return total / samples


def frozen_batchnorms(sharding: Sharding) -> set[nn.Module]:
    """The BatchNorm layers whose running statistics are the same in all candidates.

    They were frozen when the candidates were trained, and stay as every tensor does that is the
    same everywhere. But a mean of 0 and a variance of 1, a layer's first ones, are of no data yet.
    Ranks call it together, and get the same.
    """
    model, candidates, key_map = sharding.model, sharding.candidates, sharding.key_map
    layers = tracked_batchnorms(model)
    names: dict[int, str] = {}  # without parts of wrappers, as the key map has them
    for name, t in named_tensors(model).items():
        names.setdefault(id(t), name)

    def is_frozen(layer: nn.Module) -> bool:
        statistics = [getattr(layer, statistic) for statistic in FIRST_STATISTICS]
        keys = [key_map.fixed.get(names[id(t)]) for t in statistics]
        found = [candidates.tensors(key) for key in keys if key is not None]
        if len(found) < len(keys):  # not in the files: the model's own for every candidate
            return True
        constant = all(torch.equal(rows[0], row) for rows in found for row in rows[1:])
        first = zip(found, FIRST_STATISTICS.values(), strict=True)
        return constant and not all(bool((rows[0] == value).all()) for rows, value in first)

    with sharding.ranks.fail_together("comparing BatchNorm statistics"):
        frozen = sharding.ranks.broadcast_object([is_frozen(m) for m in layers])
    return {m for m, stays in zip(layers, frozen, strict=True) if stays}


class Evaluator:
    """Losses of one model object, which every call may move to other weights.

    What is measured is what would be exported: exact merge, singular vectors and BatchNorm made for
    it, weights rounded to the files' dtypes. Ranks call all of it together.

    Args:
        task: data and loss
        sharding: of the model and the candidates
        bn_batches: training batches that BatchNorm is re-estimated on

    Attributes:
        frozen: BatchNorm layers that keep the candidates' statistics, which are all the same
        has_batchnorm: whether the model has BatchNorm statistics that are re-estimated
        bn_used: batches of the last re-estimation
        known: validation losses so far, by the bytes of merge weights (n,) float64
    """

    def __init__(self, task: Task, sharding: Sharding, bn_batches: int = BN_BATCHES) -> None:
        self.task, self.sharding, self.bn_batches = task, sharding, bn_batches
        self.model, self.ranks = sharding.model, sharding.ranks
        self.frozen = frozen_batchnorms(sharding)
        self.has_batchnorm = any(m not in self.frozen for m in trained_batchnorms(self.model))
        self.bn_used = 0
        self.known: dict[bytes, float] = {}

    def train_mode(self) -> None:
        """Puts the model in training mode, but for frozen BatchNorm layers."""
        self.model.train()
        for m in self.frozen:
            m.eval()

    def load(self, beta: Tensor) -> None:
        """Moves the model to exact merge weights (n,), as it would be exported."""
        load_merge(self.sharding, beta)
        self.settle(own_statistics=int((beta != 0).sum()) == 1)

    def settle(self, own_statistics: bool = False) -> None:
        """Makes the model, which is at some weights, what would be exported.

        Args:
            own_statistics: whether BatchNorm's statistics belong to the weights, and stay
        """
        with plain_weights(self.model):
            refresh_spectral_norms(self.model)
            round_to_files(self.sharding)
        if own_statistics or not self.has_batchnorm:
            return
        batches = shared_out(self.task.train, self.ranks, self.bn_batches)
        loss = self.task.loss
        self.bn_used = update_bn_of(batches, self.model, loss, self.ranks, self.frozen)
        round_to_files(self.sharding)

    def loss(self) -> float:
        """Loss on the validation data; Inf for NaN and -Inf, so that they lose every comparison."""
        value = mean_over(self.model, self.task.loss, self.task.val, self.ranks)
        return value if math.isfinite(value) else math.inf

    def at(self, beta: Tensor) -> float:
        """Validation loss at merge weights (n,). Where it is known, the model stays as it is."""
        key = beta.numpy().tobytes()
        if key not in self.known:
            self.load(beta)
            self.known[key] = self.loss()
        return self.known[key]

    def averaged_bn_loss(self, weights: Tensor) -> float | None:
        """Validation loss with averaged BatchNorm statistics in the place of re-estimated ones.

        They are averaged by these weights (n,), as other buffers are. The re-estimated ones are put
        back. None for a model without BatchNorm.
        """
        if not self.has_batchnorm:
            return None
        with plain_weights(self.model):
            saved = {name: b.clone() for name, b in self.model.named_buffers()}
        load_untrained(self.sharding, weights)
        self.settle(own_statistics=True)
        value = self.loss()
        load_buffers(self.model, saved)
        return value

    def test(self) -> tuple[float | None, float | None]:
        """Loss and metric on the test data; None for what the task does not have."""
        task = self.task
        if task.test is None:
            return None, None
        loss = mean_over(self.model, task.loss, task.test, self.ranks)
        if task.metric is None:
            return loss, None
        return loss, mean_over(self.model, task.metric, task.test, self.ranks)
