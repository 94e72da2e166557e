"""`twa`: the command line. Exit status 2 for anything wrong with what was given."""

from __future__ import annotations

import argparse
import gc
import sys
import traceback

import torch.distributed as dist

from ..distributed.ranks import DistributedError, Ranks
from ..io.errors import TaskError, TwaError
from ..version import __version__
from . import average, demo, export, inspect, merge, pack, plan
from .advice import advice_of

COMMANDS = (average, merge, export, plan, pack, inspect, demo)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    p = argparse.ArgumentParser(
        prog="twa",
        description="Trainable weight averaging: from a heap of checkpoints to one better model.",
    )
    p.add_argument("--version", action="version", version=f"twa {__version__}")
    commands = p.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: its arguments; None: those of the process

    Returns:
        the exit status: 0; 1 if another rank failed; 2 for a TwaError; 130 after Ctrl-C
    """
    try:
        return _main(argv)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            # An error's traceback may still hold a process group, and gloo aborts the process if
            # its threads live to the end of it.
            gc.collect()


def _main(argv: list[str] | None) -> int:
    """Runs a command, and prints its error, if there is one, as the user should see it."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except TwaError as error:
        if isinstance(error, TaskError) and error.__cause__ is not None:  # in the user's own code
            traceback.print_exception(error.__cause__)
        if not getattr(error, "said_by_rank_zero", False):
            print(f"twa: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if Ranks.find().is_rank_zero:
            after = advice_of(stop) or "no result was written: start again with the same command"
            print(f"twa: stopped; {after}", file=sys.stderr)
        return 130
    except Exception as error:
        ranks = Ranks.find()
        lost = ranks.lost_rank(error) if ranks.is_lost_rank(error) else error
        if not isinstance(lost, DistributedError):
            print(
                "twa: this is no error about what was given, but a fault in twa or in the task's"
                " own functions; please report what is not the task's, with these lines:",
                file=sys.stderr,
            )
            raise
        if lost.said_by_rank_zero:
            return 1
        print(f"twa: error: {lost}", file=sys.stderr)
        if after := advice_of(error):
            print(f"twa: {after}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
