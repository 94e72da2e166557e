"""`twa pack`: packs candidates into a file that Subspace.load maps.

So every later run starts at once, without the candidates.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

from twa_kernels.layout import BITS

from ..basis.file import NAME
from ..basis.segments import GRANULARITIES
from ..io.errors import BasisError
from ..io.memory import limit_memory
from ..io.progress import progress_bar
from ..packing.load import find_basis
from ..packing.to_file import PackToFile, Report, is_unfinished, remove_left_over
from ..tasks.contract import load_task
from . import arguments
from .advice import advising, to_resume
from .average import start_ranks
from .output import writing


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    p = commands.add_parser(
        "pack", help="pack checkpoints into a file that later runs map", description=__doc__
    )
    p.set_defaults(run=run)
    add = p.add_argument
    task = "a built-in task, or a Python file that defines the model (as for twa average)"
    add("task", metavar="TASK", help=task)
    arguments.add_candidates(p)
    output = f"the packed basis (in a directory: {NAME})"
    add("-o", "--output", metavar="FILE", type=Path, required=True, help=output)
    add("--bits", type=int, choices=BITS, default=4, help="(default: %(default)s)")
    segments = f"of the coefficients: {GRANULARITIES} (default: %(default)s)"
    kind = arguments.granularity
    add("--granularity", type=kind, default="tensor", metavar="KIND", help=segments)
    center = "mean, last, zero, or a candidate's index (default: %(default)s)"
    add("--center", metavar="CENTER", type=arguments.center, default="mean", help=center)
    device = "where candidates are packed, a block at a time (default: %(default)s)"
    add("--device", choices=("cpu", "cuda"), default="cpu", help=device)
    memory = "most that the processes of this machine may hold in memory together, such as 2GB"
    add("--max-memory", metavar="SIZE", type=arguments.amount_of_memory, help=memory)
    silent = "seconds after which a silent rank counts as lost (default: %(default)s)"
    add("--timeout", type=arguments.positive_float, default=600.0, help=silent)
    existing = p.add_mutually_exclusive_group()
    overwrite = "replace a file that is there, or an unfinished one"
    existing.add_argument("--overwrite", action="store_true", help=overwrite)
    resume = "go on with an unfinished file, if there is one"
    existing.add_argument("--resume", action="store_true", help=resume)


def run(args: argparse.Namespace) -> None:
    """Packs, or goes on with an unfinished file, on the ranks that torchrun has started."""
    ranks = start_ranks(args.device, args.timeout)
    if not ranks.is_rank_zero:
        warnings.simplefilter("ignore")  # rank 0 says them
    path = find_basis(args.output)
    with ranks.fail_together("reading task and candidates"):
        finished = ranks.broadcast_object(ranks.is_rank_zero and is_finished(path, args))
        candidates = arguments.open_candidates(args)
        if ranks.is_rank_zero:
            arguments.announce(candidates)
        model = load_task(args.task).model()
    job = PackToFile(
        path,
        model,
        candidates,
        bits=args.bits,
        granularity=args.granularity,
        center=args.center,
        device=args.device,
        ranks=ranks,
    )
    with ranks.fail_together("looking at what is there"):
        if finished:
            if ranks.is_rank_zero:
                job.check_finished()
                remove_left_over(path)
                print(
                    f"{path} is finished: there is nothing to resume (--overwrite packs it again)"
                )
            return
        if ranks.is_rank_zero and job.unfinished and not args.resume and not args.overwrite:
            raise BasisError(
                "of an unfinished run; pass --resume to continue it, or --overwrite to start anew",
                job.position,
            )
    with advising(lambda: how_to_go_on(job, args.overwrite)):
        if args.max_memory:
            with ranks.fail_together("dividing the memory"):
                here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if ranks.world_size > 1 else 1
                limit_memory(job.candidates, args.max_memory // here)
        text, options = f"packing {len(candidates)} candidates", dict(unit="B", unit_scale=True)
        with progress_bar(text, job.nbytes, ranks.is_rank_zero, **options) as bar:
            try:
                report = job.run(args.resume, bar.update)
            except OSError as error:
                raise BasisError(
                    f"could not be written ({error.strerror}); {how_to_go_on(job, args.overwrite)}",
                    path,
                ) from error
        if ranks.is_rank_zero:
            print(summary(job, report))


def is_finished(path: Path, args: argparse.Namespace) -> bool:
    """Whether there is a finished file to resume; BasisError if one may not be replaced."""
    with writing(path, "the output cannot be written"):
        exists, unfinished = path.exists(), is_unfinished(path)
    if exists and args.resume and not unfinished:
        return True
    if exists and not args.overwrite and not args.resume:
        raise BasisError("exists; pass --overwrite to replace it", path)
    return False


def summary(job: PackToFile, report: Report) -> str:
    """What is printed of a finished job."""
    done = "continued and finished" if report.resumed else "packed"
    read, written, memory = report.read / 1e9, report.written / 1e9, report.memory / 1e9
    rate = read / report.seconds
    return (
        f"{done} {len(job.candidates)} candidates of {sum(job.contents.numels):,} weights:"
        f" {read:.2f} GB read in {report.seconds:.1f} s ({rate:.2f} GB/s), {written:.2f} GB written"
        f" to {job.path}, highest memory {memory:.2f} GB\n"
        f"load it with twa.Subspace.load({str(job.path)!r}, model)"
    )


def how_to_go_on(job: PackToFile, overwrite: bool) -> str:
    """Advice after an interruption."""
    if job.unfinished:
        return to_resume(overwrite, job.position)
    if job.finished:
        return f"{job.path} is finished"
    return "nothing of it is kept: start again with the same command"
