"""Merge weights trained on images without labels. A part of the recipe `beyond`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twa import averages as schemes
from twa.io.candidates import Candidates
from twa.io.progress import mean_over
from twa.merge.settings import TwaMethod
from twa.tasks.batches import mix
from twa.tasks.contract import Task

from .job import Job
from .lora import SOUPS
from .rows import Rows
from .runs import FORWARD, measured
from .workloads import Workload

RATES, ORDERS, EPOCHS = (3e-4, 1e-3, 3e-3, 6e-3), 2, 10


def by_labels(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Cross-entropy in nats; batch: images, labels, the experts' mean prediction (b, classes)."""
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def by_entropy(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean entropy of the predictions in nats."""
    log_p = model(batch[0]).float().log_softmax(1)  # (b, classes)
    return -(log_p.exp() * log_p).sum(1).mean()


def by_experts(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """KL divergence of the predictions from the experts' in nats."""
    return F.kl_div(model(batch[0]).float().log_softmax(1), batch[2], reduction="batchmean")


OBJECTIVES = {"labels": by_labels, "entropy": by_entropy, "experts": by_experts}
ALL, LONG = tuple(OBJECTIVES), "fine, 10 times the steps"  # the experts' cannot fall much lower
UNLABELLED = {
    "model": ("v:model:4", 1, ALL),
    "fine": ("v:fine:4", 1, ALL),
    LONG: ("v:fine:4", 10, ("labels", "entropy")),
}


def unlabelled(job: Job, workload: Workload) -> Rows:
    """Fine-tunes from the middle of the usual run, with merge weights from the uniform soup on.

    An objective trains them on the held-out images and chooses between looks on the validation
    images; only cross-entropy sees labels of the three. Best single and greedy soup are chosen by
    labels.

    val, test   of the rows: cross-entropy, whatever the objective
    entropy     mean of the predictions' on test images, in nats; share: of those images, that the
                most frequent predicted class has
    """
    task = job.task(workload)
    usual = job.usual(workload, task)
    middle, epoch = (
        round(usual.plan.steps / 2 / usual.plan.every) * usual.plan.every,
        usual.plan.every,
    )
    runs = []
    for k, (order, lr) in enumerate(itertools.product(range(ORDERS), RATES)):
        plan = replace(
            usual.plan,
            steps=EPOCHS * epoch,
            every=EPOCHS * epoch,
            lr=lr,
            schedule="linear",
            warmup=epoch,
        )
        data = workload.task(mix(job.seed, order), job.device)
        runs.append(
            job.run(
                workload,
                f"unlabelled-{k}",
                data,
                plan,
                start=(usual, middle),
                optimizer_state=False,
            )
        )
    where, rows = {"task": workload.label, "setting": "unlabelled"}, Rows()
    candidates = Candidates([r.path(r.last) for r in runs])

    average = job.average(task, candidates, workload.twa_steps)
    average.baselines()
    for result in [r for r in average.results if r.method in SOUPS]:
        average.load(result.beta)
        name = result.method if result.method == "uniform" else f"{result.method} (by labels)"
        rows.append(job.row(where, task, result, average, name) | confidence(average.model, task))

    experts = [r.load(task, r.last).eval() for r in runs]
    data = {name: with_experts(getattr(task, name), experts) for name in ("heldout", "val")}
    seen = sum(len(labels) for batches in data.values() for _, labels, _ in batches)
    batch = len(next(iter(task.train))[1])
    for label, name in (
        (label, name) for label, (*_, names) in UNLABELLED.items() for name in names
    ):
        method, factor, _ = UNLABELLED[label]
        made = replace(task, loss=OBJECTIVES[name], test=None, metric=None, **data)
        average = job.average(made, candidates, factor * workload.twa_steps)
        result = average.train(
            TwaMethod.parse(method), start=schemes.uniform(len(candidates)), start_name="uniform"
        )
        row = (
            job.row(where, task, result, average, f"TWA-v {label}, {name}")
            | measured(task, average.model)
            | confidence(average.model, task)
        )
        row["cost"] += FORWARD * len(experts) * seen / batch if name == "experts" else 0
        rows.append(
            row | {"objective": result.val_loss, "objective at start": result.val_curve[0][1]}
        )
    return rows


@torch.no_grad()
def with_experts(
    batches: Iterable, experts: list[nn.Module]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Images, labels and the models' mean prediction."""
    return [
        (images, labels, torch.stack([m(images).softmax(1) for m in experts]).mean(0))
        for images, labels in batches
    ]


@torch.no_grad()
def confidence(model: nn.Module, task: Task) -> dict[str, float]:
    """Of the predictions on test data: their mean entropy in nats, and how much of the data the
    most frequent class gets.
    """
    entropy = mean_over(model, by_entropy, task.test)
    model.eval()
    classes = torch.cat([model(images).argmax(1) for images, _ in task.test])
    return {"entropy": entropy, "share": classes.bincount().max().item() / len(classes)}
