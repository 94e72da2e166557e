"""What RecorderCallback costs in transformers' Trainer, beside the Trainer's own checkpoints.

A Llama of a few million weights is trained on random tokens, and recorded, evaluated and saved. The
times are those inside the callback's events, inside Trainer._save_checkpoint and
inside Trainer.evaluation_loop; shares are of a step of a run without any of these. All are medians.

Run: python bench/trainer_overhead.py [--steps 100] [--every 10] [--hidden 192] [--save].
With --save: writes bench/results/trainer_overhead.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from common import publish
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from twa.integrations.transformers import FOLDER, RecorderCallback
from twa.io.tables import markdown_table

VOCABULARY, LENGTH, BATCH = 4096, 64, 4


class Times:
    """Seconds by what was done, each time."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def of(self, name: str, run: Any, *args: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        try:
            return run(*args, **options)
        finally:
            self.seconds[name].append(time.perf_counter() - begun)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


class TimedTrainer(Trainer):
    """A Trainer whose evaluations and checkpoints are timed."""

    times: Times

    def _save_checkpoint(self, *args: Any, **options: Any) -> Any:
        return self.times.of("checkpoint", super()._save_checkpoint, *args, **options)

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        return self.times.of("evaluation", super().evaluation_loop, *args, **options)


class TimedCallback(RecorderCallback):
    """A RecorderCallback whose events are timed."""

    def __init__(self, times: Times, trainer: Trainer, **options: Any) -> None:
        super().__init__(trainer, **options)
        self.times = times

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        due = state.global_step % self._options["every"] == 0
        name = "snapshot" if due else "no snapshot"
        name = "first snapshot" if state.global_step == self._first else name
        name += ", checkpoint" if control.should_save else ""
        self.times.of(name, super().on_step_end, args, state, control, **options)

    def on_evaluate(self, *args: Any, **options: Any) -> None:
        self.times.of("average", super().on_evaluate, *args, **options)


class StepTimes(TrainerCallback):
    """Times from the end of a step to the end of the next."""

    def __init__(self, times: Times) -> None:
        self.times, self.last = times, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        now = time.perf_counter()
        if state.global_step > 1:
            self.times.seconds["step"].append(now - self.last)
        self.last = now


def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (count, LENGTH), generator=g)
    return [{"input_ids": row, "labels": row} for row in tokens]


def train(folder: Path, steps: int, every: int | None, hidden: int) -> tuple[Times, int]:
    """The times of a run, and the number of weights.

    Args:
        every: steps between snapshots, half of those between checkpoints and between evaluations of
            the model and of an average; None: none of these
        hidden: size of the model
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
    )
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=16,
        save_strategy="steps" if every else "no",
        save_steps=2 * (every or steps),
        save_total_limit=2,
        eval_strategy="steps" if every else "no",
        eval_steps=2 * (every or steps),
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    model = LlamaForCausalLM(config)
    trainer = TimedTrainer(model, args, train_dataset=rows(512, 1), eval_dataset=rows(64, 2))
    trainer.times = times = Times()
    trainer.add_callback(StepTimes(times))
    if every is not None:
        average: dict[str, Any] = {"evaluate": "ema", "half_life": 2 * every}
        trainer.add_callback(TimedCallback(times, trainer, every=every, **average))
    trainer.train()
    return times, sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--save", action="store_true", help="write bench/results")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain, weights = train(folder / "plain", args.steps, None, args.hidden)
        times, _ = train(folder / "both", args.steps, args.every, args.hidden)
        recording = sum(f.stat().st_size for f in (folder / "both" / FOLDER).glob("step_*"))
        checkpoint = sum(f.stat().st_size for f in (folder / "both").glob("checkpoint-*/*")) / 2
    evaluations, later = times.seconds["evaluation"], args.steps // args.every - 1
    rate, each = 1 / args.every, plain.median("step")

    def row(what: str, seconds: float, share: float = rate, size: float = 0.0) -> list[str]:
        on_disk = f"{size / 1e6:.1f} MB" if size else ""
        return [
            what,
            f"{1e3 * seconds:.2f} ms",
            f"{100 * seconds * share / each:.2f} %",
            on_disk,
            "",
        ]

    table = [
        row("callback, a step without a snapshot", times.median("no snapshot"), 1 - rate),
        row("callback, a snapshot", times.median("snapshot"), size=recording / later),
        row(
            "the same, waiting for the disk before a checkpoint",
            times.median("snapshot, checkpoint"),
        ),
        row("the Trainer's checkpoint", times.median("checkpoint"), size=checkpoint),
        row("evaluation of the model", statistics.median(evaluations[::2])),
        row("evaluation of the average", times.median("average")),
    ]
    header = ["", "time", f"share, one in {args.every} steps", "on disk, each", ""]
    text = (
        f"transformers' Trainer, {transformers.__version__}: a Llama of {weights:,} weights,"
        f" {1e3 * each:.0f} ms a step of {BATCH} x {LENGTH} tokens; {later + 1} snapshots of 4"
        f" bits in {args.steps} steps. The first one, which is whole and written at once, took"
        f" {1e3 * times.seconds['first snapshot'][0]:.1f} ms."
    )
    publish("trainer_overhead", [text, "", markdown_table(header, table)], args.save)


if __name__ == "__main__":
    main()
