"""`twa inspect`: what is wrong with candidates before they are averaged.

Files, tensors, duplicates, unrelated groups and, with a task, whether averages of them are any
good. Exit status 0 whatever is found.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..inspection.report import FILES, check_folder, text, write_outputs
from ..inspection.run import inspect
from ..io.errors import CandidateError, TwaError
from ..tasks.contract import BUILT_IN, load_task
from . import arguments


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    p = commands.add_parser(
        "inspect", help="what is wrong with checkpoints, before a run", description=__doc__
    )
    p.set_defaults(run=run)
    add = p.add_argument
    arguments.add_candidates(p)
    task = f"{' or '.join(BUILT_IN)}, or a Python file as for `twa average`"
    add("--task", metavar="TASK", help=f"{task}: measures validation losses, too")
    reference = "number of the candidate that the others are compared with, such as their base"
    add("--reference", metavar="N", type=int, help=reference)
    add("--device", choices=("task", "cpu", "cuda"), default="task", help=arguments.DEVICE)
    output = "directory for inspect.md, inspect.json and inspect.png"
    add("-o", "--output", metavar="OUT", type=Path, help=output)


def run(args: argparse.Namespace) -> None:
    """Looks at the candidates, prints what is found and writes it."""
    if args.output is not None:
        check_folder(args.output)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise TwaError("no CUDA device is available", "--device cuda")
    task = load_task(args.task) if args.task else None
    if task is not None and args.device != "task":
        task = task.on(torch.device(args.device))
    reference = None if args.reference is None else args.reference - 1
    result = inspect(args.candidates, task, reference, args.entry, args.ignore)
    if not any(row.candidate is not None or row.path.exists() for row in result.rows):
        raise CandidateError(f"no candidates: nothing matches {args.candidates[0]!r}")
    if args.output is not None:  # before it prints: `| head` may end that
        write_outputs(args.output, result)
    print(text(result))
    if args.output is not None:
        print(f"\nwritten to {args.output}/: {', '.join(FILES)}")
