"""`twa recipe`: runs recipes seed by seed, keeps what is done, and writes a table, a picture and
findings for each.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from twa.io.atomic import write_bytes, write_json, write_text
from twa.merge.report import processor_name

from .job import SCALES, Job
from .rows import Rows, merged, pivot, table

RECIPES = ("head", "tail", "soup", "boundary", "bits", "beyond")


def recipe(name: str) -> ModuleType:
    return importlib.import_module(f"twa.recipes.{name}")


@dataclass(frozen=True)
class Unit:
    """One seed of one recipe."""

    name: str
    job: Job
    threads: int

    @property
    def path(self) -> Path:
        return self.job.folder / self.name / f"seed-{self.job.seed}.json"

    @property
    def facts(self) -> dict[str, object]:
        """What the rows depend on."""
        job = self.job
        # all of twa: what a default is, too
        sources = sorted(Path(__file__).parents[1].rglob("*.py"))
        code = hashlib.sha256(
            b"".join(
                p.read_bytes()
                for p in sources
                if p.stem not in ("suite", "rows") and p.stem not in {*RECIPES} - {self.name}
            )
        )
        options = {k: str(v) for k, v in job.options.items() if v is not None}
        return {
            "scale": job.scale,
            "data": str(job.data or ""),
            "device": job.device,
            "options": options,
            "code": code.hexdigest()[:16],
        }

    def finished(self) -> dict | None:
        """What an earlier run has written, if it was of the same facts."""
        if not self.path.exists():
            return None
        found = json.loads(self.path.read_text())
        return found if found["facts"] == self.facts else None

    def run(self) -> float:
        torch.set_num_threads(self.threads)
        begun = time.perf_counter()
        rows = recipe(self.name).run(self.job)
        seconds = time.perf_counter() - begun
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"facts": self.facts, "seconds": seconds, "rows": rows})
        return seconds


def _run(unit: Unit) -> float:
    return unit.run()


def run_units(units: list[Unit], jobs: int) -> Iterator[tuple[Unit, float | BaseException]]:
    """Each unit as it ends, with its seconds or what went wrong."""
    if jobs == 1:
        for unit in units:
            try:
                yield unit, unit.run()
            except (ValueError, RuntimeError, OSError) as error:
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


def write_page(
    folder: Path, name: str, rows: Rows, command: str, seconds: float, machine: str
) -> str:
    """NAME.md, NAME.png and NAME.json in the folder; returns the page."""
    module = recipe(name)
    whole = table(rows, getattr(module, "METRIC", ""))
    pivoted = getattr(module, "PIVOT", False)
    text = [
        f"# {module.TITLE}",
        "",
        f"Claim: {module.CLAIM}",
        "",
        pivot(rows) if pivoted else whole,
        "",
    ]
    text += [f"- {finding}" for finding in module.findings(rows)]
    text += ["", f"![{module.TITLE}]({name}.png)", "", f"    {command}", ""]
    seeds = ", ".join(map(str, rows.of("seed")))
    text += [
        (
            f"Seeds {seeds}, mean ± sample standard deviation; {seconds / 60:.1f} minutes of one"
            f" process in all; {machine}."
        ),
        (
            "cost: in training steps, where a batch that is only evaluated counts a third. Every"
            " choice was made on validation data."
        ),
        "",
    ]
    text += ["Every row:", "", whole, ""] if pivoted else []
    write_text(folder / f"{name}.md", "\n".join(text))
    write_bytes(folder / f"{name}.png", draw(module, rows))
    write_json(
        folder / f"{name}.json",
        {"command": command, "hardware": machine, "seconds": seconds, "rows": rows},
    )
    return "\n".join(text)


def draw(module: ModuleType, rows: Rows) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=getattr(module, "FIGURE", (14, 5)), layout="constrained")
    module.picture(figure, rows)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    plt.close(figure)
    return buffer.getvalue()


def run_recipe(args: argparse.Namespace) -> None:
    """Runs experiments that test the published claims, on data that is on every machine or at
    --data.
    """
    names = RECIPES if "all" in args.names else tuple(dict.fromkeys(args.names))
    data = args.data.absolute() if args.data else None
    if data is not None and not data.exists():
        raise ValueError(f"--data {args.data}: there is no such file or directory")
    scale = args.scale or ("full" if data else "small")
    if (scale == "full") != (data is not None):
        raise ValueError("--scale: expected full with --data, quick or small without")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available")
    options = {name: getattr(args, name) for name in ("model", "epochs", "batch")}
    options["finetunes"] = str(args.finetunes.absolute()) if args.finetunes else None
    if args.finetunes and names != ("soup",):
        raise ValueError("--finetunes: expected the recipe soup alone")
    if any(n is not None and n < 1 for n in (args.seeds, args.jobs, args.epochs, args.batch)):
        raise ValueError("--seeds, --jobs, --epochs, --batch: expected at least 1")
    seeds = args.seeds or (1 if scale == "quick" else 3)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    jobs = args.jobs or (1 if args.device == "cuda" or data else cores)
    threads = max(1, cores // jobs)
    made = [
        Unit(
            name,
            Job(seed, args.output.absolute(), scale, data, args.device, jobs == 1, options),
            threads,
        )
        for name in names
        for seed in range(seeds)
    ]
    todo = [unit for unit in made if unit.finished() is None]
    args.how_to_go_on = lambda: (
        f"what is done is in {args.output}/; the same command goes on from there"
    )
    begun, failed = time.perf_counter(), []
    print(
        f"{len(made)} runs ({len(names)} recipes, {seeds} seeds), {len(made) - len(todo)} of them"
        f" done before; {jobs} at a time",
        flush=True,
    )
    for count, (unit, result) in enumerate(run_units(todo, min(jobs, max(1, len(todo)))), 1):
        minutes = (time.perf_counter() - begun) / 60
        if isinstance(result, BaseException):
            failed.append(unit)
            print(f"twa: error: {unit.name}, seed {unit.job.seed}: {result}", file=sys.stderr)
        else:
            print(
                f"{count} of {len(todo)}: {unit.name}, seed {unit.job.seed}: {result:.0f} s"
                f" ({minutes:.1f} minutes so far)",
                flush=True,
            )
    machine = f"{processor_name()}, torch {torch.__version__}"
    for name in names:
        found = [done for unit in made if unit.name == name and (done := unit.finished())]
        if found:
            rows = merged(done["rows"] for done in found)
            command = (
                shlex.join(["twa", *sys.argv[1:]])
                if len(names) == 1
                else f"twa recipe {name}" + (f" --scale {scale}" if scale == "quick" else "")
            )
            print(
                "\n"
                + write_page(
                    args.output,
                    name,
                    rows,
                    command,
                    sum(done["seconds"] for done in found),
                    machine,
                )
            )
    print(f"written to {args.output}/: " + ", ".join(f"{name}.md" for name in names))
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(todo)} runs failed; the same command does them again, and only"
            " them"
        )


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "names",
        metavar="NAME",
        nargs="+",
        choices=(*RECIPES, "all"),
        help=f"{', '.join(RECIPES)}, or all",
    )
    p.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        type=Path,
        default=Path("twa-recipes"),
        help="directory for runs and results (default: %(default)s)",
    )
    p.add_argument(
        "--data",
        metavar="PATH",
        type=Path,
        help=(
            "CIFAR as torchvision unpacks it, an ImageFolder (train/CLASS, val/CLASS), text, or a"
            " saved Hugging Face dataset; nothing is downloaded"
        ),
    )
    p.add_argument(
        "--finetunes",
        metavar="DIR",
        type=Path,
        help="for soup: a directory of fine-tunes of CLIP ViT-B/32, with --data their images",
    )
    p.add_argument(
        "--model",
        help=(
            "with --data: resnet, vgg, vit, timm:NAME, torchvision:NAME; gpt, transformers:DIR for"
            " text"
        ),
    )
    p.add_argument("--seeds", type=int, help="how many (default: 3; quick: 1)")
    p.add_argument(
        "--scale",
        choices=tuple(SCALES),
        help="quick: a fifth of the steps, one task a recipe; small (default); full: with --data",
    )
    p.add_argument(
        "--epochs", type=int, help="with --data: of the usual run, instead of the published number"
    )
    p.add_argument("--batch", type=int, help="with --data: batch size")
    p.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)"
    )
    p.add_argument(
        "--jobs",
        type=int,
        help="runs side by side (default: one per core; one with --data or a GPU)",
    )
