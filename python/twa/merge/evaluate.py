"""`Evaluator`: the loss of a model at an average of the candidates, as it would be exported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..batchnorm import batch_size, tracked_batchnorms, trained_batchnorms, update_bn_of
from ..distributed.batch_shares import Share
from ..distributed.ranks import Ranks
from ..distributed.sharding import Sharding
from ..distributed.weights import load_buffers, load_merge, load_untrained, round_to_files
from ..io.errors import TaskError
from ..io.loading import named_tensors
from ..modes import plain_weights
from ..spectral_norm import refresh_spectral_norms
from ..tasks.batches import first_batch, sampled, shared_out
from ..tasks.contract import Task

BN_BATCHES = 100  # training batches that BatchNorm is re-estimated on
LEAST_BN_BATCHES = 4  # for a look
#: share of a training step's arithmetic that its forward pass has: backward takes twice as much
FORWARD = 1 / 3
#: the running statistics of a BatchNorm, and what they are before it has seen data
FIRST_STATISTICS = {"running_mean": 0.0, "running_var": 1.0}


@torch.no_grad()
def batch_values(
    model: nn.Module,
    function: Callable[[nn.Module, object], Tensor | float],
    data: Iterable,
    ranks: Ranks | None = None,
    stride: int = 1,
    offset: int = 0,
    share: Share | None = None,
) -> Tensor:
    """function(model, batch) of some batches, with the model in evaluation mode.

    Args:
        model: what is measured
        function: mean over a batch of what is measured
        data: batches
        ranks: those that share the batches; None: this process alone
        stride, offset: which batches, see `tasks.batches.sampled`
        share: this rank's of the batches; None: each rank has its own

    Returns:
        (batches, 3) float64, in order: value, size, 0 where it does not show, and position. It is
        the same on all ranks
    """
    ranks = ranks or Ranks()
    share = share or Share.of(ranks)
    training = model.training
    model.eval()
    mine: list[tuple[float, int, int]] = []
    try:
        for position, batch, counts in sampled(data, share, stride=stride, offset=offset):
            value = float(function(model, batch))
            if counts:
                mine.append((value, batch_size(batch) or 0, position))
    finally:
        model.train() if training else model.eval()
    own = torch.tensor([len(mine)], dtype=torch.int64, device="cpu")
    count = int(ranks.all_reduce_(own)[0])
    values = torch.zeros(count, 3, dtype=torch.float64, device="cpu")
    if mine:
        values[share.rank :: share.world_size] = torch.tensor(
            mine, dtype=torch.float64, device="cpu"
        )
    return ranks.all_reduce_(values)


def mean_over(
    model: nn.Module,
    function: Callable[[nn.Module, object], Tensor | float],
    data: Iterable,
    ranks: Ranks | None = None,
    share: Share | None = None,
) -> float:
    """Mean of function(model, batch) over the data, with the model in evaluation mode.

    Args:
        model: what is measured
        function: mean over a batch of what is measured
        data: batches; each is weighted by its size, or all alike if there is one whose size does
            not show
        ranks: those that share the batches; None: this process alone
        share: this rank's of the batches; None: each rank has its own

    Raises:
        TaskError: there is no batch
    """
    return _mean(batch_values(model, function, data, ranks, share=share))


def mean_of(values: Tensor) -> float:
    """Mean of what `batch_values` gave; Inf for NaN and -Inf, which so lose every comparison.

    Raises:
        TaskError: there is no batch
    """
    mean = _mean(values)
    return mean if math.isfinite(mean) else math.inf


def difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """How much higher the mean of a is than that of b, and the standard error of that.

    Args:
        a: (batches, 3), as `batch_values` gives it
        b: of the same batches

    Returns:
        the mean of the paired batches' differences, weighted as in `mean_over`, and its standard
        error: Inf for fewer than 2 batches. Where a mean is Inf the difference is exact: 0 where
        both are
    """
    means = mean_of(a), mean_of(b)
    if math.inf in means:
        return (0.0 if means[0] == means[1] else means[0] - means[1]), 0.0
    shares, apart = _shares(a), a[:, 0] - b[:, 0]
    mean, n = (shares * apart).sum(), len(apart)
    if n < 2:
        return float(mean), math.inf
    squares = (shares * (apart - mean)).square().sum()
    return float(mean), math.sqrt(squares * n / (n - 1))


def _mean(values: Tensor) -> float:
    """The mean of what `batch_values` gave. TaskError if there is no batch."""
    return float((values[:, 0] * _shares(values)).sum())


def _shares(values: Tensor) -> Tensor:
    """The weights (batches,) of `batch_values`, with sum 1: by size, or all alike.

    Raises:
        TaskError: there is no batch
    """
    if not len(values):
        raise TaskError("expected at least one batch to evaluate on, found none")
    sizes = values[:, 1]
    if not sizes.all():
        sizes = torch.ones_like(sizes)
    return sizes / sizes.sum()


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
        batches_per_step: training batches of a gradient step
        share: this rank's of all batches; None: each rank has its own

    Attributes:
        frozen: BatchNorm layers that keep the candidates' statistics, which are all the same
        has_batchnorm: whether the model has BatchNorm statistics that are re-estimated
        bn_used: batches of the last re-estimation
        stride: looks read one of so many validation batches
        cost: what evaluations by which something is chosen took since it was set to 0, in training
            steps: a batch that goes forward only counts a third, by its size in training batches;
            BatchNorm's batches count, too
        known: validation losses so far and what each cost, by the bytes of merge weights (n,)
            float64
    """

    def __init__(
        self,
        task: Task,
        sharding: Sharding,
        bn_batches: int = BN_BATCHES,
        batches_per_step: int = 1,
        share: Share | None = None,
    ) -> None:
        self.task, self.sharding, self.bn_batches = task, sharding, bn_batches
        self.model, self.ranks = sharding.model, sharding.ranks
        self.share = share or Share.of(self.ranks)
        self.frozen = frozen_batchnorms(sharding)
        self.has_batchnorm = any(m not in self.frozen for m in trained_batchnorms(self.model))
        self.bn_used = 0
        self.stride = 1
        self.cost = 0.0
        self.known: dict[bytes, tuple[float, float]] = {}
        self._batch_cost = FORWARD / batches_per_step  # of a training batch that goes forward only
        self._batch_size = batch_size(first_batch(task.train)) or 0

    def train_mode(self) -> None:
        """Puts the model in training mode, but for frozen BatchNorm layers."""
        self.model.train()
        for m in self.frozen:
            m.eval()

    def load(self, beta: Tensor, *, for_look: bool = False) -> None:
        """Moves the model to exact merge weights (n,), as it would be exported.

        Args:
            beta: the merge weights
            for_look: as for `settle`
        """
        load_merge(self.sharding, beta)
        self.settle(own_statistics=int((beta != 0).sum()) == 1, for_look=for_look)

    def settle(self, own_statistics: bool = False, *, for_look: bool = False) -> None:
        """Makes the model, which is at some weights, what would be exported.

        Args:
            own_statistics: whether BatchNorm's statistics belong to the weights, and stay
            for_look: whether BatchNorm is re-estimated on fewer batches, as the validation data of
                a look are fewer
        """
        with plain_weights(self.model):
            refresh_spectral_norms(self.model)
            round_to_files(self.sharding)
        if own_statistics or not self.has_batchnorm:
            return
        limit = self.bn_batches
        if for_look:
            limit = min(limit, max(LEAST_BN_BATCHES, -(-limit // self.stride)))
        batches = shared_out(self.task.train, self.share, limit)
        loss = self.task.loss
        self.bn_used = update_bn_of(batches, self.model, loss, self.ranks, self.frozen)
        self.cost += self.bn_used * self._batch_cost
        round_to_files(self.sharding)

    def loss(self) -> float:
        """Loss on the validation data; Inf for NaN and -Inf, so that they lose every comparison."""
        return mean_of(self._values(1))

    def look(self, offset: int = 0) -> Tensor:
        """Losses of the model as it is on every `stride`-th validation batch.

        Args:
            offset: position of the first of them, below `stride`

        Returns:
            (batches, 3): see `batch_values`
        """
        return self._values(self.stride, offset)

    def _values(self, stride: int, offset: int = 0) -> Tensor:
        """`batch_values` of the validation loss, whose cost is counted."""
        task = self.task
        share = self.share
        values = batch_values(self.model, task.loss, task.val, self.ranks, stride, offset, share)
        sizes = values[:, 1]
        batches = torch.ones_like(sizes)
        if self._batch_size:
            batches = torch.where(sizes > 0, sizes / self._batch_size, batches)
        self.cost += float(batches.sum()) * self._batch_cost
        return values

    def at(self, beta: Tensor) -> float:
        """Validation loss at merge weights (n,).

        Where it is known, the model stays as it is, and what the loss took counts again.
        """
        key = beta.numpy().tobytes()
        if key in self.known:
            loss, cost = self.known[key]
            self.cost += cost
            return loss
        before, self.cost = self.cost, 0.0
        self.load(beta)
        loss = self.loss()
        self.known[key] = loss, self.cost
        self.cost += before
        return loss

    def averaged_bn_loss(self, weights: Tensor) -> float | None:
        """Validation loss with averaged BatchNorm statistics in the place of re-estimated ones.

        They are averaged by these weights (n,), as other buffers are. The re-estimated ones are put
        back. None for a model without BatchNorm. It is for the table only: its cost is not counted.
        """
        if not self.has_batchnorm:
            return None
        with plain_weights(self.model):
            saved = {name: b.clone() for name, b in self.model.named_buffers()}
        load_untrained(self.sharding, weights)
        self.settle(own_statistics=True)
        task = self.task
        value = mean_of(batch_values(self.model, task.loss, task.val, self.ranks, share=self.share))
        load_buffers(self.model, saved)
        return value

    def test(self) -> tuple[float | None, float | None]:
        """Loss and metric on the test data; None for what the task does not have."""
        task = self.task
        if task.test is None:
            return None, None
        loss = mean_over(self.model, task.loss, task.test, self.ranks, self.share)
        if task.metric is None:
            return loss, None
        return loss, mean_over(self.model, task.metric, task.test, self.ranks, self.share)
