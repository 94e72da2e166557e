"""Merge weights trained on images without labels. A part of the claim `beyond`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twa import averages
from twa.io.candidates import Candidates
from twa.merge.evaluate import FORWARD, mean_over
from twa.merge.settings import TwaMethod
from twa.tasks.batches import mix
from twa.tasks.contract import Task

from .job import Job
from .lora import SOUPS
from .rows import Rows
from .runs import Run, measured
from .workloads import Workload

RATES, ORDERS, EPOCHS = (3e-4, 1e-3, 3e-3, 6e-3), 2, 10

Batch = tuple[Tensor, Tensor, Tensor]  # images, labels, the experts' mean prediction (b, classes)


def by_labels(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy in nats."""
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def by_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean entropy of the predictions in nats."""
    log_p = model(batch[0]).float().log_softmax(1)  # (b, classes)
    return -(log_p.exp() * log_p).sum(1).mean()


def by_experts(model: nn.Module, batch: Batch) -> Tensor:
    """KL divergence of the predictions from the experts' in nats."""
    return F.kl_div(model(batch[0]).float().log_softmax(1), batch[2], reduction="batchmean")


OBJECTIVES = {"labels": by_labels, "entropy": by_entropy, "experts": by_experts}
ALL, LONG = tuple(OBJECTIVES), "fine, 10 times the steps"  # the experts' cannot fall much lower
#: label -> method, times the usual steps, objectives
UNLABELLED = {
    "model": ("v:model:4", 1, ALL),
    "fine": ("v:fine:4", 1, ALL),
    LONG: ("v:fine:4", 10, ("labels", "entropy")),
}


def unlabelled(job: Job, workload: Workload) -> Rows:
    """Rows of fine-tunes from the middle of the usual run, with merge weights from the uniform soup
    on.

    An objective trains them on the held-out images and chooses between looks on the validation
    images; only cross-entropy sees labels of the three. Best single and greedy soup are chosen by
    labels.

    Of the rows, `val` and `test` are cross-entropy, whatever the objective; `entropy` is the mean
    entropy of the predictions on test images, in nats; `share` is that of the most frequent
    predicted class among those images.
    """
    task = job.task(workload)
    runs = finetunes(job, workload, task)
    where, rows = {"task": workload.label, "setting": "unlabelled"}, Rows()
    candidates = Candidates([r.path(r.last) for r in runs])

    merge = job.merge(task, candidates, workload.twa_steps)
    merge.baselines()
    for result in [r for r in merge.results if r.method in SOUPS]:
        merge.evaluator.load(result.beta)
        name = result.method if result.method == "uniform" else f"{result.method} (by labels)"
        rows.append(job.row(where, result, merge, name) | confidence(merge.model, task))

    experts = [r.load(task, r.last).eval() for r in runs]
    data = {name: with_experts(getattr(task, name), experts) for name in ("heldout", "val")}
    seen = sum(len(labels) for batches in data.values() for _, labels, _ in batches)
    batch = len(next(iter(task.train))[1])
    start = averages.uniform(len(candidates))
    for label, (method, factor, names) in UNLABELLED.items():
        for name in names:
            made = replace(task, loss=OBJECTIVES[name], test=None, metric=None, **data)
            merge = job.merge(made, candidates, factor * workload.twa_steps)
            options = {"start": start, "start_name": "uniform", "coarsen": False}
            result = merge.train(TwaMethod.parse(method), **options)
            row = job.row(where, result, merge, f"TWA-v {label}, {name}")
            row |= measured(task, merge.model) | confidence(merge.model, task)
            row["cost"] += FORWARD * len(experts) * seen / batch if name == "experts" else 0
            at_start = result.val_curve[0][1]
            rows.append(row | {"objective": result.val_loss, "objective at start": at_start})
    return rows


def finetunes(job: Job, workload: Workload, task: Task) -> list[Run]:
    """Runs from the middle of the usual one, of several rates and orders of the data."""
    usual, epoch = job.usual(workload, task), workload.usual.every
    start = {"start": (usual, usual.plan.nearest(0.5)), "optimizer_state": False}
    size = {"steps": EPOCHS * epoch, "every": EPOCHS * epoch, "warmup": epoch}
    runs = []
    for k, (order, lr) in enumerate(itertools.product(range(ORDERS), RATES)):
        plan = replace(usual.plan, lr=lr, schedule="linear", **size)
        data = workload.task(mix(job.seed, order), job.device)
        runs.append(job.run(workload, f"unlabelled-{k}", data, plan, **start))
    return runs


@torch.no_grad()
def with_experts(batches: Iterable, experts: list[nn.Module]) -> list[Batch]:
    """The batches with the models' mean prediction."""
    return [
        (images, labels, torch.stack([m(images).softmax(1) for m in experts]).mean(0))
        for images, labels in batches
    ]


@torch.no_grad()
def confidence(model: nn.Module, task: Task) -> dict[str, float]:
    """The mean entropy of the predictions on test data, in nats, and the share of the data that the
    most frequent class gets.
    """
    entropy = mean_over(model, by_entropy, task.test)
    model.eval()
    classes = torch.cat([model(images).argmax(1) for images, _ in task.test])
    return {"entropy": entropy, "share": classes.bincount().max().item() / len(classes)}
