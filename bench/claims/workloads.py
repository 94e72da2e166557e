"""What claims train: a model, its data, and how it is usually trained.

Small ones on data that every machine has; the published ones on a path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from twa.io.errors import TaskError
from twa.tasks.contract import Task

from .images import image_task
from .runs import Plan
from .text import text_task


@dataclass(frozen=True)
class Workload:
    """A model, its data and its usual training.

    Args:
        make: seed, and keyword arguments of the data's loader -> task
        usual: the run as it is usually done: its steps, learning rate, schedule and spacing of
            checkpoints
        tail_rates: learning rates of an SWA tail, in place of the end of the usual run
        twa_steps: gradient steps of a trained average
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
    """A small character transformer on the standard library's source, or on a path."""
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
    if model == "vit":
        size = {"steps": 60 * 14, "every": 14, "warmup": 28}
        plan = Plan(**size, lr=3e-3, schedule="cosine", weight_decay=0.1)
    else:
        size = {"steps": 40 * 14, "every": 14}
        plan = Plan(**size, lr=0.1, schedule="step", optimizer="sgd", weight_decay=5e-4)
    rates = (1e-3, 3e-3, 6e-3) if model == "vit" else (0.02, 0.05, 0.1)
    name = {"resnet": "ResNet", "vgg": "VGG", "vit": "ViT"}[model]
    make = lambda **options: image_task(model, **options)  # noqa: E731
    return Workload(model, f"{name}, digits", make, plan, rates, twa_steps=56)


def images(path: Path, model: str, epochs: int = 0, batch: int = 0) -> Workload:
    """Images as Li et al. train on them, by the code of their conference version.

    CIFAR: 200 epochs of SGD at 0.1, a tenth of it from epoch 100 and again from 150; TWA for 10
    epochs. ImageNet: 90 epochs, a tenth from 30 and from 60; TWA for 2. Batches are of 128 images
    for both, where the published ones of ImageNet are of 256.

    Args:
        epochs, batch: others instead
    """
    options: dict[str, object] = {"path": path} | ({"batch": batch} if batch else {})
    per_epoch = len(image_task(model, seed=0, **options).train)
    is_folder = (path / "train").is_dir()
    epochs = epochs or (90 if is_folder else 200)
    steps = epochs * per_epoch
    # an epoch, or less where there are few
    size = {"steps": steps, "every": max(1, min(per_epoch, steps // 20))}
    if model == "vit":
        warmup = 8 * per_epoch
        plan = Plan(**size, lr=1e-3, schedule="cosine", weight_decay=0.1, warmup=warmup)
    else:
        schedule = "thirds" if is_folder else "step"
        plan = Plan(**size, lr=0.1, schedule=schedule, optimizer="sgd", weight_decay=1e-4)
    return Workload(
        model,
        f"{model}, {path.name}",
        lambda **o: image_task(model, **options | o),
        plan,
        tail_rates=(5e-4, 1e-3, 2e-3) if model == "vit" else (0.02, 0.05, 0.1),
        twa_steps=max(1, min((2 if is_folder else 10) * per_epoch, steps // 10)),
    )


def of_path(path: Path, model: str | None, epochs: int = 0, batch: int = 0) -> Workload:
    """Images if they are there, else text."""
    if not path.exists():
        raise TaskError("there is no such file or directory", f"--data {path}")
    if _has_images(path):
        return images(path, model or "resnet", epochs, batch)
    is_transformers = model is not None and model.startswith("transformers:")
    if model not in (None, "gpt") and not is_transformers:
        raise TaskError(
            f"looks like text, and --model {model} is none for text: expected gpt or"
            " transformers:DIR",
            f"--data {path}",
        )
    options = {"batch": batch or 16}
    made = gpt(path=path, width=96, depth=3, context=128, **options)
    if is_transformers:
        made = replace(made, make=lambda **o: text_task(path, **options | {"model": model} | o))
    if epochs:
        per_epoch = len(made.task(0).train)
        plan = replace(made.usual, steps=epochs * per_epoch, every=max(1, per_epoch // 2))
        made = replace(made, usual=plan)
    return made


def _has_images(path: Path) -> bool:
    if not path.is_dir():
        return False
    cifar = any(p.name.startswith(("cifar", "data_batch", "test")) for p in path.iterdir())
    return cifar or (path / "train").is_dir()


BUILT_IN: dict[str, Callable[[], Workload]] = {
    "gpt": gpt,
    "resnet": lambda: digits("resnet"),
    "vgg": lambda: digits("vgg"),
    "vit": lambda: digits("vit"),
}
