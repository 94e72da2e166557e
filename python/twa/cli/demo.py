"""`twa demo`: a small character transformer on the standard library's source, its checkpoints, and
the main job on them.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from ..io.atomic import write_safetensors
from ..io.candidates import Candidates
from ..io.progress import PeakMemory, mean_over, measure_test, progress_bar
from ..merge.run import Average
from ..merge.settings import Outcome, Result, Settings, TwaMethod
from ..tasks.batches import forever
from ..tasks.contract import Task, load_task

STEPS, EVERY = 1200, 25  # 48 checkpoints
RATE, WARMUP = 3e-3, 50  # constant rate after the warm-up
TWA_STEPS = 100
METHODS = tuple(
    map(
        TwaMethod.parse,
        (
            "t:fine:4",
            "t:fine:32",
            "t:tensor:4",
            "t:model:4",
            "v:tensor:4",
            "v:model:4",
            "v:model:32",
        ),
    )
)


def train(
    task: Task, folder: Path, progress: bool = True
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Constant-rate AdamW run that leaves a checkpoint every EVERY steps in `folder`."""
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP)
    )
    bar = progress_bar("training the demo model", STEPS, progress)
    for step, batch in zip(range(1, STEPS + 1), forever(task.train), strict=False):
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        bar.update(1)
        if step % EVERY == 0:
            # a tied weight once
            state = {name: p.detach().contiguous() for name, p in model.named_parameters()}
            write_safetensors(folder / f"demo_step_{step}.safetensors", state)
    bar.close()
    return model, optimizer


def anneal(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    progress: bool = True,
) -> Result:
    """The last checkpoint trained on, its optimizer state kept, with the rate falling linearly to
    zero over `steps`.
    """
    start, memory = time.perf_counter(), PeakMemory()
    bar = progress_bar("annealing", steps, progress)
    curve = []
    for step, batch in zip(range(steps), forever(task.train), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
        bar.update(1)
    bar.close()
    val = mean_over(model, task.loss, task.val)
    result = Result(
        "annealing (no average)",
        1,
        steps,
        time.perf_counter() - start,
        memory.bytes(),
        val,
        is_average=False,
    )
    result.curve, result.note = curve, "last + rate falling to 0"
    measure_test(result, model, task)
    return result


def run(folder: Path, seed: int, progress: bool = True) -> tuple[Outcome, Task, Candidates]:
    """Trains, averages and anneals; checkpoints go to folder/checkpoints."""
    torch.manual_seed(seed)
    task = load_task("chars", seed)
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    for old in checkpoints.glob("demo_step_*.safetensors"):
        old.unlink()
    model, optimizer = train(task, checkpoints, progress)
    candidates = Candidates(checkpoints / "demo_step_*.safetensors")
    outcome = Average(task, candidates, Settings(methods=METHODS, steps=TWA_STEPS), progress).run()
    outcome.results.append(anneal(task, model, optimizer, TWA_STEPS, progress))
    return outcome, task, candidates
