"""The demo: a small character transformer, its checkpoints, and the main job on them.

It is trained on the source of Python's standard library.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from .io.candidates import Candidates
from .io.progress import PeakMemory, progress_bar
from .io.safetensors import write_safetensors
from .merge.evaluate import mean_over
from .merge.outcome import Outcome
from .merge.results import Result
from .merge.run import Merge
from .merge.settings import DEFAULT_METHODS, Settings, TwaMethod
from .tasks.batches import forever
from .tasks.contract import Task, load_task

STEPS, EVERY = 1200, 25  # 48 checkpoints
RATE, WARMUP = 3e-3, 50  # constant rate after the warm-up
TWA_STEPS = 100
#: not in the table, unless it wins: it tells no part of the story
LEFT_OUT = "best single"


def train(
    task: Task, folder: Path, progress: bool = True
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A run of AdamW at a constant rate that leaves a checkpoint every EVERY steps in `folder`.

    Returns:
        the model and the optimizer as they are at the end
    """
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP)
    )
    with progress_bar("training the demo model", STEPS, progress) as bar:
        for step, batch in zip(range(1, STEPS + 1), forever(task.train), strict=False):
            loss = task.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update(1)
            if step % EVERY == 0:
                # named_parameters has a tied weight once
                state = {name: p.detach().contiguous() for name, p in model.named_parameters()}
                write_safetensors(folder / f"demo_step_{step}.safetensors", state)
    return model, optimizer


def anneal(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    progress: bool = True,
) -> Result:
    """The result of training on from the last checkpoint, with a rate that falls to zero.

    It falls linearly over `steps`; the optimizer keeps its state.
    """
    start, memory, curve = time.perf_counter(), PeakMemory(), []
    with progress_bar("annealing", steps, progress) as bar:
        for step, batch in zip(range(steps), forever(task.train), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - step / steps)
            loss = task.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
            bar.update(1)
    val, seconds = mean_over(model, task.loss, task.val), time.perf_counter() - start
    result = Result("annealing (no average)", 1, steps, seconds, memory.bytes(), val)
    result.is_average, result.curve, result.note = False, curve, "last + rate falling to 0"
    result.test_loss = mean_over(model, task.loss, task.test or task.val)
    return result


def run(
    folder: Path,
    seed: int,
    progress: bool = True,
    methods: Sequence[TwaMethod] = DEFAULT_METHODS,
) -> Outcome:
    """Trains, averages and anneals; checkpoints go to folder/checkpoints.

    Returns:
        the results, with the model at the winner
    """
    torch.manual_seed(seed)
    task = load_task("chars", seed)
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    for old in checkpoints.glob("demo_step_*.safetensors"):
        old.unlink()
    model, optimizer = train(task, checkpoints, progress)
    candidates = Candidates(checkpoints / "demo_step_*.safetensors")
    settings = Settings(methods=tuple(methods), steps=TWA_STEPS, compare=True)
    outcome = Merge(task, candidates, settings, progress).run()
    outcome.results.append(anneal(task, model, optimizer, TWA_STEPS, progress))
    for result in outcome.results:
        if result.method == "uniform":
            result.method = "SWA"
    shown = [r for r in outcome.results if r.method != LEFT_OUT or r is outcome.winner]
    outcome.results = shown
    return outcome
