"""Training runs that leave checkpoints, made once and shared by the claims; ways to go on from
them; what is measured of a model.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from twa.distributed.batch_shares import Share
from twa.io.atomic import write_json, write_torch
from twa.io.candidates import Candidates
from twa.io.errors import StateError, TaskError
from twa.io.progress import progress_bar
from twa.io.safetensors import write_safetensors
from twa.merge.evaluate import mean_over
from twa.tasks.batches import Stream, batch_digest, first_batch, mix, seed_all
from twa.tasks.contract import Task


@dataclass(frozen=True)
class Plan:
    """How a model is trained, and how often a checkpoint is kept.

    Args:
        steps: gradient steps in all
        every: gradient steps between checkpoints
        schedule: of the learning rate: "constant"; "cosine" and "linear" to zero; "step": a tenth
            from 1/2, a hundredth from 3/4 of the steps on; "thirds": from 1/3 and 2/3; "cyclic":
            falls linearly from lr to lr / 10 between any two checkpoints (SWA's)
        optimizer: "adamw", or "sgd" (momentum 0.9)
        dtype: of the weights: "float32" or "bfloat16"
        grid: 0, or so many bits: weights are rounded to a grid of that many bits per output row
            after every step
    """

    steps: int
    every: int
    lr: float
    schedule: str = "constant"
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    warmup: int = 0
    dtype: str = "float32"
    grid: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of the step after `step` steps."""
        t = step / self.steps
        factor = {
            "constant": 1.0,
            "cosine": 0.5 * (1 + math.cos(math.pi * t)),
            "linear": 1 - t,
            "step": 1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01,
            "thirds": 1.0 if t < 1 / 3 else 0.1 if t < 2 / 3 else 0.01,
            "cyclic": 1 - 0.9 * (step % self.every) / max(1, self.every - 1),
        }[self.schedule]
        return self.lr * factor * min(1.0, (step + 1) / max(1, self.warmup))

    def nearest(self, part: float) -> int:
        """The step of the checkpoint nearest to this part of the run."""
        return round(self.steps * part / self.every) * self.every

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        trained = [p for p in model.parameters() if p.requires_grad]
        options = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            return torch.optim.SGD(trained, momentum=0.9, **options)
        return torch.optim.AdamW(trained, **options)


# A run on disk -----------------------------------------------------------------------------------


class Run:
    """A finished training run: step-NNNNNN.safetensors every `plan.every` steps, and
    state-NNNNNN.pt at the end and where it was asked for.
    """

    def __init__(self, folder: Path, plan: Plan, first: int = 0) -> None:
        self.folder, self.plan, self.first = folder, plan, first

    @property
    def last(self) -> int:
        return self.first + self.plan.steps

    @property
    def steps(self) -> list[int]:
        """Those with a checkpoint."""
        return list(range(self.first + self.plan.every, self.last + 1, self.plan.every))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.safetensors"

    def state_path(self, step: int) -> Path:
        return self.folder / f"state-{step:06d}.pt"

    def falling(self, step: int, steps: int, every: int) -> Plan:
        """How it goes on from a step with the rate falling from what it was to zero."""
        rate = self.plan.rate(step - self.first - 1)
        options = {"lr": rate, "schedule": "linear", "warmup": 0}
        return replace(self.plan, steps=steps, every=every, **options)

    def candidates(
        self, after: int = 0, until: int | None = None, count: int | None = None
    ) -> Candidates:
        """Checkpoints of steps in (after, until]; the last `count` of them."""
        steps = [s for s in self.steps if s > after and (until is None or s <= until)]
        return Candidates([self.path(s) for s in (steps if count is None else steps[-count:])])

    def load(self, task: Task, step: int) -> nn.Module:
        """The model as it was at a kept state."""
        model = task.model()
        model.load_state_dict(self.state(step)["model"])
        return model

    def state(self, step: int) -> dict:
        return torch.load(self.state_path(step), weights_only=True)


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint holds: every parameter once, tied ones too, and buffers."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: t.detach().contiguous() for name, t in named.items()}


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other process is in the folder."""
    with open(folder / "lock", "ab") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# Training ----------------------------------------------------------------------------------------


def train(
    task: Task,
    plan: Plan,
    folder: Path,
    seed: int,
    *,
    start: tuple[Run, int] | None = None,
    optimizer_state: bool = True,
    model: nn.Module | None = None,
    keep: Sequence[int] = (),
    title: str = "training",
    progress: bool = False,
) -> Run:
    """Trains, or returns the run if it is there already.

    One that was interrupted goes on from its last checkpoint.

    Args:
        start: (run, step) to go on from: weights, optimizer (unless optimizer_state is False) and
            position in the data
        model: what is trained; None: task.model(), newly initialised from `seed`
        keep: steps whose state is kept for `start`, beside the last

    Raises:
        StateError: what is there is a run of another plan, model or data
        TaskError: the loss became NaN or Inf
    """
    seed_all(mix(seed, 1))
    model = (task.model() if model is None else model).to(getattr(torch, plan.dtype))
    facts = facts_of(task, plan, seed, start, model)
    run = Run(folder, plan, start[1] if start and optimizer_state else 0)
    done, unfinished = folder / "run.json", folder / "unfinished.pt"
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):  # another process may be at it
        if done.exists():
            check_same(folder, json.loads(done.read_text()), facts)
            return run
        training = Training(task, plan, model, seed, run.first, title)
        if unfinished.exists():
            state = torch.load(unfinished, weights_only=True)
            check_same(folder, state["facts"], facts)
            training.load(state)
        elif start is not None:
            training.load(start[0].state(start[1]), optimizer_state)
        finish(training, run, facts, {*keep, run.last}, progress)
        write_json(done, facts)
        unfinished.unlink(missing_ok=True)
    return run


def facts_of(
    task: Task, plan: Plan, seed: int, start: tuple[Run, int] | None, model: nn.Module
) -> dict[str, object]:
    """What a run is of."""
    shapes = str([(name, tuple(t.shape), str(t.dtype)) for name, t in model.state_dict().items()])
    return {
        "plan": asdict(plan),
        "model": hashlib.sha256(shapes.encode()).hexdigest()[:16],
        "first batch": str(batch_digest(first_batch(task.train))),
        "seed": seed,
        "start": f"{start[0].folder.name}, step {start[1]}" if start else "",
    }


def check_same(folder: Path, found: dict, expected: dict) -> None:
    """StateError if a run that was found is not of the expected facts."""
    if odd := [name for name, value in expected.items() if found.get(name) != value]:
        raise StateError(
            f"holds a training run with another {odd[0]}; choose another output directory, or"
            " remove this one",
            folder,
        )


class Training:
    """A training run under way: model, optimizer, place in the data.

    Args:
        first: steps before this run's own, which counts go on from
        title: for messages

    Attributes:
        at: steps so far, `first` included
    """

    def __init__(
        self, task: Task, plan: Plan, model: nn.Module, seed: int, first: int, title: str
    ) -> None:
        self.task, self.plan, self.model, self.seed, self.first = task, plan, model, seed, first
        self.title, self.at = title, first
        self.optimizer = plan.make_optimizer(model)
        self.stream = Stream(task.train, Share(0, 1), 1, seed)

    def load(self, state: dict, optimizer_state: bool = True) -> None:
        """Goes to where another one was, or only to its weights."""
        self.model.load_state_dict(state["model"])
        if optimizer_state:
            self.at = state["step"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.stream.seek(state["position"])

    def state(self) -> dict:
        """What another process goes on from."""
        return {
            "step": self.at,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": self.stream.position(),
        }

    def step(self) -> float:
        """One gradient step; its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.at - self.first)
            group["weight_decay"] = self.plan.weight_decay
        ((_, batch, _),) = self.stream.next_step()
        seed_all(mix(self.seed, 2, self.stream.step))
        loss = self.task.loss(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.plan.grid:
            round_to_grid(self.model, self.plan.grid)
        self.at += 1
        if not math.isfinite(loss.item()):
            raise TaskError(
                f"the loss is {loss.item()} at step {self.at}: expected a learning rate below"
                f" {self.plan.lr} for this task",
                self.title,
            )
        return loss.item()


def finish(
    training: Training, run: Run, facts: dict[str, object], keep: set[int], progress: bool
) -> None:
    """All steps that are left, with checkpoints, and states at the steps in `keep`."""
    plan = run.plan
    training.model.train()
    with progress_bar(training.title, plan.steps, progress) as bar:
        bar.update(training.at - run.first)
        while training.at < run.last:
            loss = training.step()
            bar.update(1)
            at = training.at
            is_checkpoint = (at - run.first) % plan.every == 0
            if is_checkpoint:
                write_safetensors(run.path(at), saved_tensors(training.model))
            if is_checkpoint or at in keep:
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                state = training.state()
                if at < run.last:
                    write_torch(run.folder / "unfinished.pt", state | {"facts": facts})
                if at in keep:
                    write_torch(run.state_path(at), state)


@torch.no_grad()
def round_to_grid(model: nn.Module, bits: int) -> None:
    """Every matrix's rows to multiples of their largest magnitude / (2^(bits - 1) - 1)."""
    for p in model.parameters():
        if p.dim() > 1:
            rows = p.reshape(len(p), -1)
            unit = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
            p.copy_(((rows / unit).round() * unit).view_as(p))


# What is measured --------------------------------------------------------------------------------


def measured(task: Task, model: nn.Module, loss: Callable | None = None) -> dict[str, float]:
    """Losses on validation and test data, and the metric on test data."""
    loss = loss or task.loss
    found = {"val": mean_over(model, loss, task.val), "test": mean_over(model, loss, task.test)}
    if task.metric is not None:
        found["metric"] = mean_over(model, task.metric, task.test)
    return found
