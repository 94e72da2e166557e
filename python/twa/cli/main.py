"""`twa`: the command line. Exit status 2 for anything wrong with what was given."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import traceback
from typing import NoReturn

import torch.distributed as dist

from twa_kernels.output import READER_IS_GONE, lasting_streams
from twa_kernels.registry import BackendError

from ..distributed.ranks import DistributedError, Ranks
from ..io.errors import TaskError, TwaError
from ..version import described
from . import average, demo, export, inspect, merge, pack, plan
from .advice import advice_of

COMMANDS = (average, merge, export, plan, pack, inspect, demo)


class Version(argparse.Action):
    """`--version`: asks git where the sources lie in a clone, so only when it is wanted."""

    def __call__(self, parser: argparse.ArgumentParser, *args: object) -> NoReturn:
        print(f"twa {described()}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    p = argparse.ArgumentParser(
        prog="twa",
        description="Trainable weight averaging: from a heap of checkpoints to one better model.",
    )
    p.add_argument("--version", action=Version, nargs=0, help="print the version and exit")
    commands = p.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: its arguments; None: those of the process

    Returns:
        the exit status: 0; 1 if another rank failed; 2 for a TwaError, where the kernels do not
        run, or if what was printed could not be written; 130 after Ctrl-C
    """
    with lasting_streams() as out:
        code = _with_ranks(argv)
    if code == 0 and out.error is not None and out.error.errno not in READER_IS_GONE:
        why = out.error.strerror
        print(f"twa: error: what it printed could not be written ({why})", file=sys.stderr)
        return 2
    return code


def _with_ranks(argv: list[str] | None) -> int:
    """Runs a command, and leaves the other ranks in order."""
    code: int | None = None
    try:
        code = _main(argv)
        return code
    except BaseException as error:
        _let_go(error)
        raise
    finally:
        if dist.is_initialized():
            note = Ranks.find().note
            dist.destroy_process_group()
            # An error's traceback may still hold a process group, and gloo aborts the process if
            # its threads live to the end of it.
            gc.collect()
            if note is not None and code != 0:
                note.stay_until_read()


def _let_go(error: BaseException) -> None:
    """Frees what an error's traceback holds: others wait for this rank while it is connected."""
    link: BaseException | None = error
    while dist.is_initialized() and link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


def _run(args: argparse.Namespace) -> None:
    """Runs a command. Of its error other ranks are told, and torchrun, which prints a summary."""
    try:
        try:
            args.run(args)
        except SystemExit as stop:
            if stop.code not in (None, 0):
                raise
            text = "expected functions that return, found sys.exit(): the run is not finished"
            raise TaskError(text, "task") from stop
    except BaseException as error:
        Ranks.find().tell(error)
        if isinstance(error, Exception) and "TORCHELASTIC_ERROR_FILE" in os.environ:
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)
        raise


def _main(argv: list[str] | None) -> int:
    """Runs a command, and prints its error, if there is one, as the user should see it."""
    try:
        _run(parser().parse_args(argv))
    except (TwaError, BackendError) as error:
        if isinstance(error, TaskError) and error.__cause__ is not None:  # in the user's own code
            traceback.print_exception(error.__cause__)
        if not getattr(error, "said_by_rank_zero", False):
            print(f"twa: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if argv is None:  # a second one ends the process at once, without a traceback
            signal.signal(signal.SIGINT, signal.SIG_DFL)
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
            if after := advice_of(error):
                print(f"twa: {after}", file=sys.stderr)
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
