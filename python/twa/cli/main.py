"""`twa`: average checkpoints from the command line.

Exit status 2 for anything wrong with the input.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import shlex
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from claims import suite

from .. import __version__
from ..basis.segments import GRANULARITIES
from ..distributed import cost as plan
from ..distributed.choose import PLACEMENTS
from ..distributed.ranks import DistributedError, World, initialise
from ..export import hugging_face
from ..inspection import run as inspect
from ..inspection.samples import heap_findings
from ..io.atomic import clear_unfinished
from ..io.candidates import CandidateError, Candidates
from ..io.memory import limit_memory, parse_bytes, training_bytes
from ..merge import report
from ..merge.resume import Store
from ..merge.run import Average
from ..merge.settings import DEFAULT_METHODS, Outcome, Settings, TwaMethod
from ..packing import to_file as pack
from ..tasks.batches import seed_all
from ..tasks.contract import BUILT_IN, Task, TaskError, load_task
from . import demo


class OutputError(ValueError):
    """The output directory cannot be used."""


def check_output(folder: Path, overwrite: bool, resume: bool = False) -> None:
    """Raises OutputError unless `folder` can be made and written, and is empty, may be overwritten,
    or holds a state to continue.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: expected a directory for the output, found a file")
    if (
        folder.is_dir()
        and any(not _is_left_over(p) for p in folder.iterdir())
        and not overwrite
        and not (resume and (folder / Store.NAME).exists())
    ):
        if (folder / Store.NAME).exists():
            raise OutputError(
                f"{folder}: holds the state of an unfinished run; pass --resume to continue it, or"
                " --overwrite to start anew"
            )
        raise OutputError(
            f"{folder}: the output directory is not empty; pass --overwrite to replace what is in"
            " it, or choose another"
        )
    existing = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OutputError(
            f"{folder}: the output directory cannot be written ({error.strerror})"
        ) from error


def _is_left_over(path: Path) -> bool:
    """Whether a process may have left it that was killed before there was a state to continue from."""
    return (path.name.startswith(".") and path.suffix == ".tmp") or path.match(Store.BEST)


def finish(
    folder: Path, outcome: Outcome, task: Task, candidates: Candidates, sharded: bool = False
) -> None:
    """Files and table; on several ranks all call it, the first writes."""
    world = outcome.placement.world
    with world.together(f"writing {folder}"):
        command = shlex.join(["twa", *sys.argv[1:]])
        try:
            if world.is_writer:
                folder.mkdir(parents=True, exist_ok=True)
            world.meet()
            written = report.write_outputs(
                folder, outcome, task, [str(c.path) for c in candidates], command, sharded
            )
        except OSError as error:
            raise OutputError(
                f"{folder}: the result could not be written ({error.strerror}):"
                f" {error.filename or ''}"
            ) from error
    if not world.is_writer:
        return
    print()
    print(report.markdown_table(*report.table_rows(outcome.results, task)))
    print()
    winner = outcome.winner
    print(
        f"winner on the validation data: {winner.method}, validation loss {winner.val_loss:.6f}",
        end="",
    )
    print(f", test loss {winner.test_loss:.6f}" if winner.test_loss is not None else "")
    print(f"written to {folder}/: {', '.join(written)}")
    if f"{hugging_face.FOLDER}/" in written:
        print(f"from_pretrained loads {folder / hugging_face.FOLDER}/")


def run_average(args: argparse.Namespace) -> None:
    """Averages checkpoints: the fixed averages in use today, then trained ones; writes the best on
    the validation data.
    """
    world = ranks(args.device, args.timeout)
    # What is wrong on one rank stops all of them.
    if not world.is_writer:
        warnings.simplefilter("ignore")  # the first rank says them
    finished = False
    with world.together("reading task and candidates"):
        methods = tuple(TwaMethod.parse(m) for m in args.twa) if args.twa else DEFAULT_METHODS
        candidates = Candidates(args.candidates, entry=args.entry)
        if world.is_writer:
            finished = is_finished(args.output) and args.resume
            if not finished:
                check_output(args.output, args.overwrite, args.resume)
            clear_unfinished(args.output, [*report.FILES, Store.NAME, Store.BEST])
        if world.share(finished):
            if world.is_writer:
                # of a process that was killed while it did that
                Store(args.output, resume=False).remove()
                print(
                    f"{args.output}/ holds a finished result: there is nothing to resume"
                    " (--overwrite runs it again)"
                )
            return
        if world.is_writer:
            check_heap(candidates, args.force)
        seed_all(args.seed)
        task = load_task(args.task, args.seed)
        if args.device != "task":
            task = task.on(
                torch.device(
                    args.device if args.device == "cpu" else f"cuda:{torch.cuda.current_device()}"
                )
            )
        settings = Settings(
            methods,
            args.steps,
            args.lr,
            args.weight_decay,
            batches_per_step=args.batches_per_step,
            seed=args.seed,
            placement=args.placement,
            low_memory=args.low_memory,
            save_every=args.save_every,
            patience=args.patience,
        )
    store = Store(args.output, args.resume)
    if world.is_writer and not args.resume:
        store.remove()
    job = Average(task, candidates, settings, store=store)
    if args.max_memory:
        with world.together("dividing the memory"):
            limit_memory(
                candidates,
                args.max_memory,
                training_bytes(job.placement, max((m.bits for m in methods), default=0)),
            )
    if len(candidates) == 1 and world.is_writer:
        print(
            f"twa: one candidate, {candidates[0].path}: there is nothing to learn; it is evaluated"
            " and written as it is",
            file=sys.stderr,
        )
    args.store = store
    try:
        outcome = job.run()
    except CandidateError:
        if world.is_writer:
            store.remove(unless_resumed=True)  # other files will make another run
        raise
    finish(args.output, outcome, task, candidates, args.sharded)
    args.how_to_go_on = lambda: f"the result is in {args.output}/"
    if world.is_writer:
        store.remove()
    world.gather(None)  # nobody leaves before the others are done


def check_heap(candidates: Candidates, force: bool) -> None:
    """A look at samples of the weights: warnings are printed, and a heap whose average is surely
    nonsense is refused.
    """
    findings = heap_findings(candidates)
    for finding in findings:
        if force or finding.severity != "error":
            print(f"twa: {finding}", file=sys.stderr)
    if not force and (errors := [f for f in findings if f.severity == "error"]):
        more = f" ({len(errors) - 1} more: see `twa inspect`)" if len(errors) > 1 else ""
        raise CandidateError(
            f"{str(errors[0]).removeprefix('error: ')}{more} To average them nevertheless, pass"
            " --force."
        )


def is_finished(folder: Path) -> bool:
    return (
        (folder / "averaged.safetensors").exists()
        and (folder / "results.json").exists()
        and not (folder / Store.NAME).exists()
    )


def ranks(device: str, timeout: float) -> World:
    """The ranks that torchrun has started, or this process alone."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available")
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return World()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return initialise(device, timeout)


def run_demo(args: argparse.Namespace) -> None:
    check_output(args.output, args.overwrite)
    start = time.perf_counter()
    print(
        "Training a character transformer on the standard library's source, keeping 48 checkpoints,"
        " then averaging them."
    )
    outcome, task, candidates = demo.run(args.output, args.seed)
    finish(args.output, outcome, task, candidates)
    print(f"demo took {time.perf_counter() - start:.0f} s")


def positive(kind: type) -> object:
    def parse(text: str):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
        return value

    return parse


def not_negative(text: str) -> float:
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, found {text}")
    return float(text)


def whole(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, found {text}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="twa",
        description="Trainable weight averaging: from a heap of checkpoints to one better model.",
    )
    p.add_argument("--version", action="version", version=f"twa {__version__}")
    commands = p.add_subparsers(dest="command", required=True)

    a = commands.add_parser(
        "average", help="average checkpoints of one model", description=run_average.__doc__
    )
    a.add_argument(
        "task",
        metavar="TASK",
        help=(
            f"{' or '.join(BUILT_IN)}, or a Python file that defines model, train_data, val_data,"
            " loss"
        ),
    )
    a.add_argument(
        "candidates",
        metavar="CANDIDATES",
        nargs="+",
        help="checkpoint files, glob patterns or Hugging Face directories, oldest first",
    )
    a.add_argument(
        "-o", "--output", metavar="OUT", type=Path, required=True, help="directory for the result"
    )
    a.add_argument(
        "--twa",
        metavar="KIND:GRANULARITY:BITS[:OPTION]",
        action="append",
        help=(
            "a trained average to try, such as t:tensor:4, t:1024:2 or v:model:4:simplex;"
            f" GRANULARITY is {GRANULARITIES}; may be repeated (default: t:fine:4 and v:model:4)"
        ),
    )
    a.add_argument(
        "--steps",
        type=positive(int),
        default=Settings.steps,
        help="gradient steps of each trained average (default: %(default)s)",
    )
    a.add_argument(
        "--lr",
        type=positive(float),
        default=Settings.lr,
        help="learning rate of the coefficients (default: %(default)s)",
    )
    a.add_argument(
        "--weight-decay",
        type=not_negative,
        default=Settings.weight_decay,
        help="pulls coefficients to zero, the best fixed average (default: %(default)s)",
    )
    a.add_argument("--seed", type=int, default=0, help="order of the data (default: %(default)s)")
    a.add_argument(
        "--batches-per-step",
        type=whole,
        default=0,
        help=(
            "batches of the task's data that make one step, over all ranks (gradient accumulation;"
            " default: one per rank)"
        ),
    )
    a.add_argument(
        "--device",
        choices=("task", "cpu", "cuda"),
        default="task",
        help="where the model runs (default: where the task puts it)",
    )
    a.add_argument(
        "--low-memory", action="store_true", help="project and free each gradient inside backward"
    )
    a.add_argument(
        "--placement",
        choices=PLACEMENTS,
        default="auto",
        help="under torchrun, who holds what: see docs/distributed.md (default: %(default)s)",
    )
    a.add_argument(
        "--entry",
        help="key under which torch and DCP checkpoints hold the weights, such as state_dict_ema",
    )
    a.add_argument(
        "--max-memory",
        metavar="SIZE",
        type=parse_bytes,
        help="most that the process may hold besides activations, such as 8GB",
    )
    a.add_argument(
        "--force",
        action="store_true",
        help=(
            "average candidates that a look at samples finds unrelated, or not finite, nevertheless"
        ),
    )
    a.add_argument(
        "--sharded",
        action="store_true",
        help="also write the result as a torch.distributed.checkpoint directory",
    )
    a.add_argument(
        "--save-every",
        type=positive(int),
        default=Settings.save_every,
        help="steps between saved states (default: %(default)s)",
    )
    a.add_argument(
        "--patience",
        type=whole,
        default=Settings.patience,
        help=(
            "stop a trained average after so many looks at the validation data (of six) without a"
            " new best; 0: never (default: %(default)s)"
        ),
    )
    a.add_argument(
        "--timeout",
        type=positive(float),
        default=600.0,
        help="seconds after which a silent rank counts as lost (default: %(default)s)",
    )
    existing = a.add_mutually_exclusive_group()
    existing.add_argument(
        "--overwrite",
        action="store_true",
        help="replace results in an output directory that is not empty",
    )
    existing.add_argument(
        "--resume",
        action="store_true",
        help="continue from the state in the output directory, if there is one",
    )
    a.set_defaults(run=run_average)

    n = commands.add_parser(
        "plan",
        help="memory, bytes and time per step of each placement",
        description=plan.run_plan.__doc__,
    )
    plan.add_arguments(n)
    n.set_defaults(run=plan.run_plan)

    k = commands.add_parser(
        "pack",
        help="pack checkpoints into a file that later runs map",
        description=pack.run_pack.__doc__,
    )
    pack.add_arguments(k)
    k.set_defaults(run=pack.run_pack)

    i = commands.add_parser(
        "inspect",
        help="what is wrong with a heap of checkpoints",
        description=inspect.run_inspect.__doc__,
    )
    inspect.add_arguments(i)
    i.set_defaults(run=inspect.run_inspect)

    r = commands.add_parser(
        "recipe",
        help="experiments that test the published claims",
        description=suite.run_recipe.__doc__,
    )
    suite.add_arguments(r)
    r.set_defaults(run=suite.run_recipe)

    d = commands.add_parser("demo", help="train a small model and average its checkpoints")
    d.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        type=Path,
        default=Path("twa-demo"),
        help="directory for the result (default: %(default)s)",
    )
    d.add_argument(
        "--seed", type=int, default=0, help="of the model and its data (default: %(default)s)"
    )
    d.add_argument(
        "--overwrite",
        action="store_true",
        help="replace results in an output directory that is not empty",
    )
    d.set_defaults(run=run_demo)
    return p


def main(argv: list[str] | None = None) -> int:
    try:
        return _main(argv)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            # what an error's traceback still holds: gloo aborts the process if its threads live to
            # the end of it
            gc.collect()


def _main(argv: list[str] | None) -> int:
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:
        if isinstance(error, TaskError) and error.__cause__ is not None:  # in the user's own code
            traceback.print_exception(error.__cause__)
        if not getattr(error, "said_by_first", False):
            print(f"twa: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if World.find().is_writer:
            print(
                "twa: stopped;"
                f" {_how_to_go_on(args) or 'no result was written: start again with the same command'}",
                file=sys.stderr,
            )
        return 130
    except RuntimeError as error:
        if not isinstance(error, DistributedError):
            world = World.find()
            if not world.is_loss(error):
                raise
            error = world.lost(error)
        if error.said_by_first:
            return 1
        print(f"twa: error: {error}", file=sys.stderr)
        if after := _how_to_go_on(args):
            print(f"twa: {after}", file=sys.stderr)
        return 1
    return 0


def _how_to_go_on(args: argparse.Namespace) -> str:
    if (how := getattr(args, "how_to_go_on", None)) is not None:
        return how()
    if (store := getattr(args, "store", None)) is None or not store.path.exists():
        return ""
    return (
        "continue with the same command and"
        f" --resume{' in place of --overwrite' if args.overwrite else ''} ({store.path})"
    )


if __name__ == "__main__":
    sys.exit(main())
