"""`python bench/claims NAME ...`: runs claims seed by seed, keeps what is done, and writes a page
for each.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import multiprocessing
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
import twa
from twa.io.atomic import write_json
from twa.io.errors import TwaError

from twa_kernels import version
from twa_kernels.machine import processor

from . import CLAIMS, GPU, OWN_DATA, claim
from .job import SCALES, Job
from .page import write_page
from .rows import merged

COMMAND = "python bench/claims"
#: modules of this package that only run claims or show rows: no row depends on them
ONLY_SHOW = ("__main__", "page", "suite")


# One seed of one claim ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """One seed of one claim, and the file that holds its rows.

    Args:
        code: digest of the sources that the rows depend on, as they were when the command began
    """

    name: str
    job: Job
    threads: int
    code: str

    @property
    def path(self) -> Path:
        return self.job.folder / self.name / f"seed-{self.job.seed}.json"

    @property
    def facts(self) -> dict[str, object]:
        """What the rows depend on."""
        job = self.job
        options = {k: str(v) for k, v in job.options.items() if v is not None}
        return {
            "scale": job.scale,
            "data": str(job.data or ""),
            "device": job.device,
            "options": options,
            "code": self.code,
        }

    def finished(self) -> dict | None:
        """What an earlier run has written, if it was of the same facts."""
        if not self.path.exists():
            return None
        found = json.loads(self.path.read_text())
        return found if found["facts"] == self.facts else None

    def run(self) -> float:
        """Makes the rows and writes them; the seconds that it took."""
        torch.set_num_threads(self.threads)
        begun = time.perf_counter()
        rows = claim(self.name).run(self.job)
        seconds = time.perf_counter() - begun
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"facts": self.facts, "seconds": seconds, "rows": rows})
        return seconds


def sources_of(name: str) -> list[Path]:
    """Files that a claim's rows depend on: all of twa, which any default may be in, and what the
    claim imports of this package, but for what only shows rows.
    """
    here, package = Path(__file__).parent, Path(twa.__file__).parent
    found = [here / f"{name}.py"]
    for path in found:  # which grows
        found += [p for p in imports_of(path) if p not in found and p.stem not in ONLY_SHOW]
    return [*sorted(package.rglob("*.py")), *sorted(found)]


def imports_of(path: Path) -> list[Path]:
    """Modules that a module of this package imports from its own folder or below."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            paths = [path.parent.joinpath(*n.split(".")).with_suffix(".py") for n in names]
            found += [p for p in paths if p.exists()]
    return found


def code_of(name: str) -> str:
    """A digest of those files."""
    content = b"".join(path.read_bytes() for path in sources_of(name))
    return hashlib.sha256(content).hexdigest()[:16]


def _run(unit: Unit) -> float:
    return unit.run()


def run_units(units: list[Unit], jobs: int) -> Iterator[tuple[Unit, float | BaseException]]:
    """Each unit as it ends, with its seconds or what went wrong."""
    if jobs == 1:
        for unit in units:
            try:
                yield unit, unit.run()
            except Exception as error:
                yield unit, error
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_run, unit): unit for unit in units}
        try:
            for future in as_completed(futures):
                error = future.exception()
                yield futures[future], error if error is not None else future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# The command -------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Runs the command; only what is wrong with what was given becomes one line and status 2."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    try:
        run(args, argv)
    except TwaError as error:
        print(f"claims: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        done = f"what is done is in {args.output}/; the same command goes on from there"
        print(f"claims: stopped; {done}", file=sys.stderr)
        return 130
    return 0


def run(args: argparse.Namespace, argv: list[str]) -> None:
    """Runs what is not done yet of the claims that were asked for, and writes their pages."""
    every = GPU if scale_of(args) == "gpu" else CLAIMS
    if args.data is not None:
        every = tuple(name for name in CLAIMS if name not in OWN_DATA)
    names = every if "all" in args.names else tuple(dict.fromkeys(args.names))
    check(args, names)
    seeds = args.seeds or (1 if scale_of(args) in ("quick", "gpu") else 3)
    jobs = args.jobs or (1 if args.device == "cuda" or args.data else cores())
    threads, code = max(1, cores() // jobs), {name: code_of(name) for name in names}
    units = [
        Unit(name, job_of(args, seed, progress=jobs == 1), threads, code[name])
        for name in names
        for seed in range(seeds)
    ]
    todo = [unit for unit in units if unit.finished() is None]
    print(
        f"{len(units)} runs ({len(names)} claims, {seeds} seeds),"
        f" {len(units) - len(todo)} of them done before; {jobs} at a time",
        flush=True,
    )
    failed = run_and_say(todo, min(jobs, max(1, len(todo))))
    device = f"{torch.cuda.get_device_name()}, " if args.device == "cuda" else ""
    machine = f"{device}{processor()}, torch {torch.__version__}"
    if (commit := version.checked_out()) is not None:
        machine += f", commit {commit}"
    for name in names:
        found = [done for unit in units if unit.name == name and (done := unit.finished())]
        if found:
            rows, seconds = merged(f["rows"] for f in found), sum(f["seconds"] for f in found)
            command = command_for(name, argv, args.names)
            print("\n" + write_page(args.output, name, rows, command, seconds, machine))
    print(f"written to {args.output}/: " + ", ".join(f"{name}.md" for name in names))
    if failed:
        again = "the same command does them again, and only them"
        raise TwaError(f"{failed} of {len(todo)} runs failed; {again}")


def check(args: argparse.Namespace, names: tuple[str, ...]) -> None:
    """TwaError if arguments do not go together."""
    if args.data is not None and not args.data.exists():
        raise TwaError("there is no such file or directory", f"--data {args.data}")
    if (scale_of(args) == "full") != (args.data is not None):
        raise TwaError("expected full with --data, another without", "--scale")
    if scale_of(args) == "gpu" and set(names) - set(GPU):
        raise TwaError(f"expected {', '.join(GPU)}, which have such a form", "--scale gpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise TwaError("no CUDA device is available", "--device cuda")
    if args.finetunes and names != ("soup",):
        raise TwaError("expected the claim soup alone", "--finetunes")
    if any(n is not None and n < 1 for n in (args.seeds, args.jobs, args.epochs, args.batch)):
        raise TwaError("expected at least 1", "--seeds, --jobs, --epochs, --batch")


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def scale_of(args: argparse.Namespace) -> str:
    return args.scale or ("full" if args.data else "small")


def job_of(args: argparse.Namespace, seed: int, progress: bool) -> Job:
    options = {name: getattr(args, name) for name in ("model", "epochs", "batch")}
    options["finetunes"] = str(args.finetunes.absolute()) if args.finetunes else None
    data = args.data.absolute() if args.data else None
    folder = args.output.absolute()
    return Job(seed, folder, scale_of(args), data, args.device, progress, options)


def run_and_say(todo: list[Unit], jobs: int) -> int:
    """Runs units and says how they end; how many failed."""
    begun, failed = time.perf_counter(), 0
    for count, (unit, result) in enumerate(run_units(todo, jobs), 1):
        label = f"{unit.name}, seed {unit.job.seed}"
        if isinstance(result, BaseException):
            failed += 1
            if not isinstance(result, TwaError):
                traceback.print_exception(result)
            print(f"claims: error: {label}: {result}", file=sys.stderr)
        else:
            minutes = (time.perf_counter() - begun) / 60
            so_far = f"{result:.0f} s ({minutes:.1f} minutes so far)"
            print(f"{count} of {len(todo)}: {label}: {so_far}", flush=True)
    return failed


def command_for(name: str, argv: list[str], asked: list[str]) -> str:
    """What makes this claim's page again: the command that was given, for it alone."""
    options = list(argv)
    for one in asked:
        options.remove(one)
    return f"{COMMAND} {shlex.join([name, *options])}"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        COMMAND,
        description=(
            "Runs experiments that test the published claims, on data that is on every machine or"
            " at --data."
        ),
        epilog=f"{COMMAND} page [DIR]: writes pages and docs/claims.md from results in DIR.",
    )
    add = p.add_argument
    names = f"{', '.join(CLAIMS)}, or all"
    add("names", metavar="NAME", nargs="+", choices=(*CLAIMS, "all"), help=names)
    output = "directory for runs and results (default: %(default)s)"
    add("-o", "--output", metavar="OUT", type=Path, default=Path("twa-claims"), help=output)
    data = (
        "CIFAR as torchvision unpacks it, an ImageFolder (train/CLASS, val/CLASS), text, or a saved"
        " Hugging Face dataset; for pretrained .tsv or .csv with columns label and text; nothing is"
        " downloaded"
    )
    add("--data", metavar="PATH", type=Path, help=data)
    finetunes = "for soup: a directory of fine-tunes of CLIP ViT-B/32, with --data their images"
    add("--finetunes", metavar="DIR", type=Path, help=finetunes)
    models = "resnet, vgg, vit, timm:NAME, torchvision:NAME; gpt, transformers:DIR for text"
    own = "for pretrained, with or without: transformers:DIR"
    add("--model", help=f"with --data: {models}; {own}")
    add("--seeds", type=int, help="how many (default: 3; quick and gpu: 1)")
    scales = (
        "quick: a fifth of the steps, one task a claim; small (default); gpu: larger models and"
        f" more data, for {', '.join(GPU)}; full: with --data"
    )
    add("--scale", choices=tuple(SCALES), help=scales)
    epochs = "with --data: of the usual run, instead of the published number"
    add("--epochs", type=int, help=epochs)
    add("--batch", type=int, help="with --data: batch size")
    device = "(default: %(default)s)"
    add("--device", choices=("cpu", "cuda"), default="cpu", help=device)
    jobs = "runs side by side (default: one per core; one with --data or a GPU)"
    add("--jobs", type=int, help=jobs)
    return p
