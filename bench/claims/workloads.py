"""What recipes train: a model, its data, and how it is usually trained.

Small ones on data that every machine has; the published ones on a path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from twa.tasks.contract import Task, TaskError

from .images import image_task
from .runs import Plan
from .text import text_task


@dataclass(frozen=True)
class Workload:
    """
    make        seed, keyword arguments of the data's loader -> task
    usual       the run as it is usually done: its steps, learning rate, schedule, spacing of
                checkpoints
    tail_rates  learning rates of an SWA tail, in place of the end of the usual run
    twa_steps   gradient steps of a trained average
    """

    name: str
    label: str
    make: Callable[..., Task]
    usual: Plan
    tail_rates: tuple[float, ...]
    twa_steps: int

    def task(self, seed: int, device: str = "cpu", **options: object) -> Task:
        task = self.make(seed=seed, **options)
        return task if device == "cpu" else task.on(torch.device(device))

    def scaled(self, factor: float) -> Workload:
        """The same with as many checkpoints of fewer steps."""
        every = max(1, round(self.usual.every * factor))
        plan = replace(
            self.usual,
            every=every,
            steps=every * (self.usual.steps // self.usual.every),
            warmup=round(self.usual.warmup * factor),
        )
        return replace(self, usual=plan, twa_steps=max(10, round(self.twa_steps * factor)))


def gpt(domain: str = "code", path: Path | None = None, **size: int) -> Workload:
    """Small character transformer on the standard library's source."""
    size = size or {"width": 64, "depth": 2, "context": 64}
    return Workload(
        "gpt",
        "GPT, source text" if path is None else f"GPT, {path.name}",
        lambda **options: text_task(path, **{"domain": domain, "batch": 16} | size | options),
        Plan(steps=4000, every=50, lr=3e-3, schedule="cosine", warmup=100),
        tail_rates=(1e-3, 3e-3, 6e-3),
        twa_steps=200,
    )


def digits(model: str) -> Workload:
    """8 x 8 digits; 14 batches an epoch."""
    plan = Plan(
        steps=40 * 14, every=14, lr=0.1, schedule="step", optimizer="sgd", weight_decay=5e-4
    )
    if model == "vit":
        plan = Plan(
            steps=60 * 14, every=14, lr=3e-3, schedule="cosine", weight_decay=0.1, warmup=28
        )
    rates = (1e-3, 3e-3, 6e-3) if model == "vit" else (0.02, 0.05, 0.1)
    name = {"resnet": "ResNet", "vgg": "VGG", "vit": "ViT"}[model]
    return Workload(
        model,
        f"{name}, digits",
        lambda **options: image_task(model, **options),
        plan,
        rates,
        twa_steps=56,
    )


def images(path: Path, model: str, epochs: int = 0, batch: int = 0) -> Workload:
    """As published by Li et al.

    (code of their conference version): CIFAR, 200 epochs of SGD at 0.1, a tenth from 100 and from
    150, batch 128; ImageNet, 90 epochs, a tenth from 30 and from 60, batch 256. TWA for 10 and 2
    epochs. epochs, batch: others instead."""
    options: dict[str, object] = {"path": path} | ({"batch": batch} if batch else {})
    task = image_task(model, seed=0, **options)
    per_epoch = len(task.train)
    folder = (path / "train").is_dir()
    epochs = epochs or (90 if folder else 200)
    # an epoch, or less where there are few
    every = max(1, min(per_epoch, epochs * per_epoch // 20))
    plan = Plan(
        epochs * per_epoch,
        every,
        lr=0.1,
        schedule="thirds" if folder else "step",
        optimizer="sgd",
        weight_decay=1e-4,
    )
    if model == "vit":
        plan = Plan(
            epochs * per_epoch,
            every,
            lr=1e-3,
            schedule="cosine",
            weight_decay=0.1,
            warmup=8 * per_epoch,
        )
    rates = (5e-4, 1e-3, 2e-3) if model == "vit" else (0.02, 0.05, 0.1)
    twa_steps = min((2 if folder else 10) * per_epoch, plan.steps // 10)
    return Workload(
        model,
        f"{model}, {path.name}",
        lambda **o: image_task(model, **options | o),
        plan,
        rates,
        twa_steps,
    )


def of_path(path: Path, model: str | None, epochs: int = 0, batch: int = 0) -> Workload:
    """Images if they are there, else text."""
    if not path.exists():
        raise TaskError(f"--data {path}: there is no such file or directory")
    looks = path.is_dir() and (
        (path / "train").is_dir()
        or any(p.name.startswith(("cifar", "data_batch", "test")) for p in path.iterdir())
    )
    if looks:
        return images(path, model or "resnet", epochs, batch)
    if model not in (None, "gpt") and not model.startswith("transformers:"):
        raise TaskError(
            f"--data {path}: looks like text, and --model {model} is none for text: expected gpt or"
            " transformers:DIR"
        )
    named = {"model": model} if model and model.startswith("transformers:") else {}
    workload = gpt(path=path, width=96, depth=3, context=128)
    made = (
        replace(workload, make=lambda **o: text_task(path, **{"batch": batch or 16} | named | o))
        if named
        else workload
    )
    if epochs:
        per_epoch = len(made.task(0).train)
        made = replace(
            made, usual=replace(made.usual, steps=epochs * per_epoch, every=max(1, per_epoch // 2))
        )
    return made


BUILT_IN: dict[str, Callable[[], Workload]] = {
    "gpt": gpt,
    "resnet": lambda: digits("resnet"),
    "vgg": lambda: digits("vgg"),
    "vit": lambda: digits("vit"),
}
