"""`twa`: average checkpoints from the command line. Exit status 2 for anything wrong with the input."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch

from . import __version__, demo, report
from .average import DEFAULT_METHODS, Average, Outcome, Settings, TwaMethod
from .candidates import CandidateError, Candidates
from .tasks import BUILT_IN, Task, TaskError, load_task


class OutputError(ValueError):
    """The output directory cannot be used."""


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises OutputError unless `folder` can be made and written, and is empty or may be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: expected a directory for the output, found a file")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputError(f"{folder}: the output directory is not empty; pass --overwrite to replace what is in it, or choose another")
    existing = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OutputError(f"{folder}: the output directory cannot be written ({error.strerror})") from error


def finish(folder: Path, outcome: Outcome, task: Task, candidates: Candidates) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    report.write_outputs(folder, outcome, task, [str(c.path) for c in candidates], shlex.join(["twa", *sys.argv[1:]]))
    print()
    print(report.markdown_table(*report.table_rows(outcome.results, task)))
    print()
    winner = outcome.winner
    print(f"winner on the validation data: {winner.method}, validation loss {winner.val_loss:.6f}", end="")
    print(f", test loss {winner.test_loss:.6f}" if winner.test_loss is not None else "")
    print(f"written to {folder}/: averaged.safetensors, coefficients.json, report.md, report.png, results.json")


def run_average(args: argparse.Namespace) -> None:
    methods = tuple(TwaMethod.parse(m) for m in args.twa) if args.twa else DEFAULT_METHODS
    candidates = Candidates(args.candidates)
    check_output(args.output, args.overwrite)
    torch.manual_seed(args.seed)
    task = load_task(args.task, args.seed)
    settings = Settings(methods, args.steps, args.lr, args.weight_decay)
    job = Average(task, candidates, settings)
    if len(candidates) == 1:
        print(f"twa: one candidate, {candidates[0].path}: there is nothing to learn; it is evaluated and written as it is", file=sys.stderr)
    finish(args.output, job.run(), task, candidates)


def run_demo(args: argparse.Namespace) -> None:
    check_output(args.output, args.overwrite)
    start = time.perf_counter()
    print("Training a character transformer on the standard library's source, keeping 48 checkpoints, then averaging them.")
    outcome, task, candidates = demo.run(args.output, args.seed)
    finish(args.output, outcome, task, candidates)
    print(f"demo took {time.perf_counter() - start:.0f} s")


def positive(kind: type) -> object:
    def parse(text: str):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
        return value

    return parse


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="twa", description="Trainable weight averaging: from a heap of checkpoints to one better model.")
    p.add_argument("--version", action="version", version=f"twa {__version__}")
    commands = p.add_subparsers(dest="command", required=True)

    a = commands.add_parser("average", help="average checkpoints of one model", description=run_average.__doc__)
    a.add_argument("task", metavar="TASK", help=f"{' or '.join(BUILT_IN)}, or a Python file that defines model, train_data, val_data, loss")
    a.add_argument("candidates", metavar="CANDIDATES", nargs="+", help="checkpoint files, glob patterns or Hugging Face directories, oldest first")
    a.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="directory for the result")
    a.add_argument(
        "--twa",
        metavar="KIND:GRANULARITY:BITS[:BASIS]",
        action="append",
        help="a trained average to try, such as t:tensor:4 or t:tensor:4:orthonormal; may be repeated (default: t:tensor:4 and v:model:4)",
    )
    a.add_argument("--steps", type=positive(int), default=Settings.steps, help="gradient steps of each trained average (default: %(default)s)")
    a.add_argument("--lr", type=positive(float), default=Settings.lr, help="learning rate of the coefficients (default: %(default)s)")
    a.add_argument(
        "--weight-decay",
        type=float,
        default=Settings.weight_decay,
        help="pulls coefficients to zero, the best fixed average (default: %(default)s)",
    )
    a.add_argument("--seed", type=int, default=0, help="order of the data (default: %(default)s)")
    a.add_argument("--overwrite", action="store_true", help="replace results in an output directory that is not empty")
    a.set_defaults(run=run_average)

    d = commands.add_parser("demo", help="train a small model and average its checkpoints")
    d.add_argument("-o", "--output", metavar="OUT", type=Path, default=Path("twa-demo"), help="directory for the result (default: %(default)s)")
    d.add_argument("--seed", type=int, default=0, help="of the model and its data (default: %(default)s)")
    d.add_argument("--overwrite", action="store_true", help="replace results in an output directory that is not empty")
    d.set_defaults(run=run_demo)
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except (CandidateError, TaskError, OutputError, ValueError) as error:
        print(f"twa: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("twa: stopped; no result was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
