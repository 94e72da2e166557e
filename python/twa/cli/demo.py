"""`twa demo`: trains a small model on real text, then averages its 48 checkpoints."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from .. import demo
from ..io.atomic import only_run_in
from .output import check_is_directory, check_output, finish, writing


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    p = commands.add_parser(
        "demo", help="train a small model and average its checkpoints", description=__doc__
    )
    p.set_defaults(run=run)
    add, folder = p.add_argument, Path("twa-demo")
    output = "directory for the result (default: %(default)s)"
    add("-o", "--output", metavar="OUT", type=Path, default=folder, help=output)
    add("--seed", type=int, default=0, help="of the model and its data (default: %(default)s)")
    overwrite = "replace results in an output directory that is not empty"
    add("--overwrite", action="store_true", help=overwrite)


def run(args: argparse.Namespace) -> None:
    """Trains, averages and prints how long that took."""
    check_is_directory(args.output)
    start = time.perf_counter()
    with only_run_in(args.output):
        check_output(args.output, args.overwrite)
        print(
            "Training a character transformer on the standard library's source, keeping 48"
            " checkpoints, then averaging them."
        )
        with writing(args.output):
            outcome = demo.run(args.output, args.seed)
        finish(args.output, outcome)
    print(f"demo took {time.perf_counter() - start:.0f} s")
