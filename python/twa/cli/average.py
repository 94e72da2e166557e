"""`twa average`: averages checkpoints of one model.

It chooses a fixed average to start from, trains others from there, and writes the best on the
validation data.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from pathlib import Path

import torch

from ..basis.segments import GRANULARITIES
from ..distributed.choose import SHARDINGS, training_bytes
from ..distributed.cost import STORAGE
from ..distributed.ranks import Ranks, initialise
from ..export.bundle import DCP, WEIGHTS
from ..export.hugging_face import FOLDER
from ..io.atomic import clear_unfinished, only_run_in
from ..io.errors import CandidateError, TwaError
from ..io.memory import limit_memory
from ..merge.outcome import FILES
from ..merge.resume import Store
from ..merge.run import Merge
from ..merge.settings import DEFAULT_METHODS, Settings, TwaMethod
from ..tasks.batches import seed_all
from ..tasks.contract import BUILT_IN, load_task
from . import arguments
from .advice import advising, to_resume
from .output import (
    check_is_directory,
    check_not_read,
    check_output,
    finish,
    has_result,
    is_finished,
    writing,
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    p = commands.add_parser("average", help="average checkpoints of one model", description=__doc__)
    p.set_defaults(run=run)
    add = p.add_argument
    task = f"{' or '.join(BUILT_IN)}, or a Python file that defines model, train_data, val_data,"
    add("task", metavar="TASK", help=f"{task} loss")
    arguments.add_candidates(p)
    add("-o", "--output", metavar="OUT", type=Path, required=True, help="directory for the result")
    add(
        "--twa",
        metavar="KIND:GRANULARITY:BITS[:OPTION]",
        action="append",
        help="a trained average to try, such as t:tensor:4, t:1024:2 or v:model:4:simplex;"
        f" GRANULARITY is {GRANULARITIES}; may be repeated (default: t:fine:4 and v:fine:4)",
    )
    rows = "a file of `twa pack`: trained averages of its bits and segments start from its rows"
    add("--basis", metavar="FILE", type=Path, help=rows)
    steps = "gradient steps of each trained average (default: as many as are worth it)"
    add("--steps", type=arguments.positive_int, metavar="N", help=steps)
    rate = "learning rate of the coefficients (default: that of the candidates' own training)"
    add("--lr", type=arguments.positive_float, metavar="RATE", help=rate)
    add("--seed", type=int, default=0, help="order of the data (default: %(default)s)")
    add(
        "--batches-per-step",
        type=arguments.not_negative_int,
        default=0,
        help="batches of the task's data that make one step, over all ranks (gradient"
        " accumulation; default: one per rank)",
    )
    add("--device", choices=("task", "cpu", "cuda"), default="task", help=arguments.DEVICE)
    low = "project and free each gradient inside backward"
    add("--low-memory", action="store_true", help=low)
    who = "under torchrun, who holds what: see docs/distributed.md (default: %(default)s)"
    add("--sharding", choices=SHARDINGS, default="auto", help=who)
    where = "where the packed candidates are kept: host, for a GPU that has no room for them"
    add("--storage", choices=STORAGE, default="device", help=where)
    memory = "most that the process may hold besides activations, such as 8GB"
    add("--max-memory", metavar="SIZE", type=arguments.amount_of_memory, help=memory)
    force = "average candidates that a look at samples finds unrelated, or not finite, nevertheless"
    add("--force", action="store_true", help=force)
    dcp = "also write the result as a torch.distributed.checkpoint directory"
    add("--dcp", action="store_true", help=dcp)
    every = "steps between saved states (default: %(default)s)"
    add("--save-every", type=arguments.positive_int, default=Settings.save_every, help=every)
    add(
        "--patience",
        type=arguments.not_negative_int,
        default=Settings.patience,
        help="stop a trained average after so many looks at the validation data without a"
        " new best; 0: never (default: %(default)s)",
    )
    compare = "evaluate the averages in use today, too: EMA, LAWA, greedy soup and others"
    add("--compare", action="store_true", help=compare)
    silent = "seconds after which a silent rank counts as lost (default: %(default)s)"
    add("--timeout", type=arguments.positive_float, default=600.0, help=silent)
    existing = p.add_mutually_exclusive_group()
    overwrite = "replace results in an output directory that is not empty"
    existing.add_argument("--overwrite", action="store_true", help=overwrite)
    resume = "continue from the state in the output directory, if there is one"
    existing.add_argument("--resume", action="store_true", help=resume)


def run(args: argparse.Namespace) -> None:
    """Averages, on the ranks that torchrun has started or in this process alone."""
    ranks = start_ranks(args.device, args.timeout)
    if not ranks.is_rank_zero:
        warnings.simplefilter("ignore")  # rank 0 says them
    with contextlib.ExitStack() as locked:
        average(args, ranks, locked)


def average(args: argparse.Namespace, ranks: Ranks, locked: contextlib.ExitStack) -> None:
    """Averages; rank 0 locks the output directory with this stack before it looks into it."""
    finished = False
    # What is wrong on one rank stops all of them.
    with ranks.fail_together("reading task and candidates"):
        settings = settings_of(args)
        candidates = arguments.open_candidates(args)
        if ranks.is_rank_zero:
            check_is_directory(args.output)
            locked.enter_context(only_run_in(args.output))
            finished = args.resume and is_finished(args.output)
            if not finished:
                check_output(args.output, args.overwrite, args.resume)
                check_not_read(candidates, [args.output / name for name in (WEIGHTS, FOLDER, DCP)])
            clear_unfinished(args.output, [*FILES, Store.NAME, Store.BEST])
        if ranks.broadcast_object(finished):
            if ranks.is_rank_zero:
                # What a process left that was killed while it did the same.
                Store(args.output, resume=False).remove()
                print(
                    f"{args.output}/ holds a finished result: there is nothing to resume"
                    " (--overwrite runs it again)"
                )
            return
        if ranks.is_rank_zero:
            arguments.announce(candidates)
        seed_all(args.seed)
        task = load_task(args.task, args.seed)
        if args.device == "cpu":
            task = task.on(torch.device("cpu"))
        elif args.device == "cuda":
            task = task.on(torch.device("cuda", torch.cuda.current_device()))
    store = Store(args.output, args.resume)
    if ranks.is_rank_zero and not args.resume:
        with writing(args.output):
            store.begin(has_result(args.output))
    with advising(lambda: how_to_resume(store, args.overwrite)):
        job = Merge(task, candidates, settings, store=store)
        candidates = job.candidates  # with the tensors as the model has them
        with ranks.fail_together("looking at the candidates"):
            if ranks.is_rank_zero:
                arguments.check_candidates(candidates, args.force)
        if args.max_memory:
            with ranks.fail_together("dividing the memory"):
                most = max((m.bits for m in settings.methods), default=0)
                limit_memory(candidates, args.max_memory, training_bytes(job.sharding, most))
        if len(candidates) == 1 and ranks.is_rank_zero:
            print(
                f"twa: one candidate, {candidates[0].path}: there is nothing to learn; it is"
                " evaluated and written as it is",
                file=sys.stderr,
            )
        try:
            outcome = job.run()
        except CandidateError:
            if ranks.is_rank_zero and not store.resumed:
                with writing(args.output):
                    store.begin(has_result(args.output))  # other files will make another run
            raise
        finish(args.output, outcome, args.dcp)
    with advising(lambda: f"the result is in {args.output}/"):
        if ranks.is_rank_zero:
            store.remove()
        ranks.barrier()  # nobody leaves before the others are done
        locked.close()


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the options ask for."""
    return Settings(
        tuple(map(TwaMethod.parse, args.twa)) if args.twa else DEFAULT_METHODS,
        args.steps,
        args.lr,
        batches_per_step=args.batches_per_step,
        seed=args.seed,
        sharding=args.sharding,
        low_memory=args.low_memory,
        storage=args.storage,
        save_every=args.save_every,
        patience=args.patience,
        compare=args.compare,
        basis=args.basis,
    )


def how_to_resume(store: Store, overwrite: bool) -> str:
    """Advice after an interruption; "" if nothing is saved."""
    return to_resume(overwrite, store.path) if store.path.exists() else ""


def start_ranks(device: str, timeout: float) -> Ranks:
    """The ranks that torchrun has started, or this process alone."""
    if device == "cuda" and not torch.cuda.is_available():
        raise TwaError("no CUDA device is available", "--device cuda")
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return Ranks()
    if device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return initialise(device, timeout)
