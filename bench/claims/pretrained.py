"""A soup of a pretrained transformer: fine-tunes that a team has left over from its search.

MiniLM-L6 (22.7 million weights) is fine-tuned to sort WordNet's glosses into 45 classes, over rate,
weight decay, length, word dropout and seed. As in "Model soups" (Wortsman et al., arXiv 2203.05482)
a head alone is trained first, which all of them start with. TWA-t and TWA-v (Li et al., arXiv
2205.13104v4) average them by segments of three sizes, at 4 and at 2 bits.

Beside them: the best fine-tune, uniform, greedy and learned soup. And training on: the best
fine-tune, the uniform soup, and the best fine-tune on the held-out data that TWA-v has, each for as
many steps as TWA costs in all. What choosing the best fine-tune took comes on top.

Models are scored on glosses of the test set, and on example sentences, which are unlike anything
that they were trained on. The best trained average on validation data is exported, and loaded and
scored by a new process.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from twa import averages
from twa.export.bundle import write_bundle
from twa.io.candidates import Candidates
from twa.merge.baselines import measure
from twa.merge.run import Merge
from twa.merge.settings import TwaMethod

from . import glosses
from .finetunes import Bench, Finetunes, Kind
from .glosses import Splits, scored
from .job import Job
from .rows import Rows, number
from .runs import Plan
from .soup import mean_of_two

TITLE = "Soup of a pretrained transformer: fine-tunes of MiniLM-L6 on real text"
CLAIM = (
    "A trained average of the fine-tunes of a pretrained model is better than the best of them, and"
    " than uniform, greedy and learned soup."
)
METRIC = "accuracy"
PIVOT = ACCURACIES = True  # a column per test set, and the same of accuracies
FIGURE = (14, 7)
IN, OUT = "glosses", "example sentences"  # the test sets
SOUP = "greedy soup"
FIXED = ("best single", "uniform", SOUP)
SEGMENTS, BITS = ("model", "tensor", "fine"), (4, 2)
TRAINED = tuple(f"{k}:{s}:{b}" for k, s, b in itertools.product("vt", SEGMENTS, BITS))
QUICK = ("v:fine:4", "t:fine:4", "v:model:4")
OURS = tuple(TwaMethod.parse(text).name for text in ("v:fine:4", "t:fine:4"))
LEARNED = {"learned soup": "v:model:4:simplex"}
LEARNED_LR = 0.05  # see soup.py
BEST_ON, SOUP_ON, BEST_HELDOUT = (
    "best single, trained on",
    "uniform, trained on",
    "best single, trained on held-out data",
)
OTHERS = (*FIXED, *LEARNED, BEST_ON, SOUP_ON, BEST_HELDOUT)
RATES = 2e-4, 6e-4  # from .. to


def run(job: Job) -> Rows:
    bench = Bench.of(job)
    full = Kind("full", f"{bench.name}, fine-tunes", lambda m: m, bench.scale.finetunes, RATES)
    trained = QUICK if job.scale == "quick" else TRAINED
    rivals = BEST_ON, SOUP_ON, BEST_HELDOUT
    exported = Exported(job.folder / "pretrained" / f"soup-{job.seed}")
    return rows_of(bench, bench.finetunes(full), trained, LEARNED, rivals, exported)


# Rows --------------------------------------------------------------------------------------------


def scores(bench: Bench, where: dict, row: dict, model: nn.Module) -> Rows:
    """A row for each test set."""
    rows = Rows()
    for setting, part in ((IN, "test"), (OUT, "examples")):
        if part in bench.splits.rows:
            found = scored(model, bench.splits.batches(part))
            rows.append(where | {"setting": setting} | row | found)
    return rows


def rows_of(
    bench: Bench,
    made: Finetunes,
    trained: Iterable[str],
    learned: dict[str, str],
    rivals: Iterable[str],
    exported: Exported | None = None,
) -> Rows:
    """Fixed averages, trained ones, and training on, by the names of the rivals.

    Args:
        exported: what keeps the best trained average
    """
    where, job = {"task": made.kind.label}, bench.job
    n = len(made.folders)
    merge = job.merge(made.task, Candidates(made.folders), bench.scale.steps)
    rows, fixed, names = Rows(), {}, merge.candidates.names
    for method in FIXED:  # EMA and LAWA are left out, as fine-tunes have no order
        result = measure(method, merge.evaluator, names, lambda: None)
        fixed[method] = result
        merge.evaluator.load(result.beta)
        rows += scores(bench, where, job.row({}, result, merge), merge.model)
    rows[0] |= {"mean of two": mean_of_two(merge), "n": n}
    rows[0] |= {"members": fixed[SOUP].candidates}
    start = merge.start()
    todo = [(TwaMethod.parse(text), "", None, {}) for text in trained]
    uniform = {"start": averages.uniform(n), "start_name": "uniform"}
    todo += [(TwaMethod.parse(text), name, LEARNED_LR, uniform) for name, text in learned.items()]
    for method, name, rate, options in todo:
        merge.settings = replace(merge.settings, lr=rate)
        result = merge.train(method, coarsen=False, **options)
        before = 0.0 if options else start.looks
        row = job.row({}, result, merge, name, start=before)
        found = scores(bench, where, row, merge.model)
        rows += found
        if exported is not None and not name:
            exported.keep(merge, found[0])
    single = fixed["best single"]
    steps = max(1, round(max(rows.mean("cost", method=m) for m in OURS)))
    for name in rivals:
        rows += scores(bench, where, *trained_on(bench, made, merge, name, single, steps))
    if exported is not None:
        rows[0] |= exported.reloaded(bench)
    return rows


def trained_on(
    bench: Bench, made: Finetunes, merge: Merge, name: str, single: object, steps: int
) -> tuple[dict, nn.Module]:
    """What so many more steps of usual training give: the row without test figures, and the
    model. The rate is that of the best fine-tune: it rises to it, and falls to zero.
    """
    k = int(single.beta.argmax())
    best, data = made.runs[k]
    decay = best.plan.weight_decay
    plan = Plan(steps, steps, best.plan.lr, "linear", weight_decay=decay, warmup=steps // 10)
    cost, options = single.looks, {"start": (best, best.last), "seed": bench.seed(k)}
    if name == BEST_HELDOUT:
        data = bench.task(made.kind, part="heldout")
        options["optimizer_state"] = False
    if name == SOUP_ON:
        merge.evaluator.load(averages.uniform(len(made.folders)))
        data, cost, options = made.task, 0.0, {}
        options["model"] = made.task.model()
        options["model"].load_state_dict(merge.model.state_dict())
    title = name.replace(", ", "-").replace(" ", "-")
    run = bench.job.run(bench.workload, f"{made.kind.name}-{title}-{steps}", data, plan, **options)
    model = run.load(made.task, run.last)
    val = scored(model, bench.splits.batches("val"))["test"]
    row = {"seed": bench.job.seed, "method": name, "steps": steps, "looks": 0.0}
    return row | {"cost": cost + steps, "val": val, "note": f"rate {plan.lr:.1e}"}, model


# The exported soup -------------------------------------------------------------------------------


@dataclass
class Exported:
    """The best trained average so far, written for from_pretrained.

    Attributes:
        row: its test figures
    """

    folder: Path
    row: dict | None = None

    def keep(self, merge: Merge, row: dict) -> None:
        """Writes the merge's model, if its validation loss is the lowest so far."""
        if self.row is None or row["val"] < self.row["val"]:
            self.row = row
            coefficients = merge.results[-1].coefficients | {"method": row["method"]}
            write_bundle(self.folder, merge.sharding, coefficients)

    def reloaded(self, bench: Bench) -> dict:
        """What a new process finds in the folder."""
        job, context = bench.job, multiprocessing.get_context("spawn")
        arguments = (self.folder / "averaged", bench.splits, job.device, torch.get_num_threads())
        with ProcessPoolExecutor(1, context) as pool:
            found = pool.submit(loaded_and_scored, *arguments).result()
        return {
            "exported": self.row["method"],
            "reported": self.row["metric"],
            "reported loss": self.row["test"],
            "loaded": found["metric"],
            "loaded loss": found["test"],
        }


def loaded_and_scored(folder: Path, splits: Splits, device: str, threads: int) -> dict[str, float]:
    """Figures on the test set of what from_pretrained makes of a folder."""
    torch.set_num_threads(threads)
    made = glosses.library().AutoModelForSequenceClassification
    model = made.from_pretrained(folder, local_files_only=True).to(device)
    return scored(model, splits.batches("test"))


# What is shown -----------------------------------------------------------------------------------


def findings(rows: Rows) -> list[str]:
    """The best of TWA on validation data, and TWA fine, against everything else; what segments,
    bits and data change; the exported soup.
    """
    found = [
        "differences below are ours less theirs, seed by seed, with the standard error of their"
        " mean; those of accuracies are in percentage points"
    ]
    for task in rows.of("task"):
        mine = rows.where(task=task)
        basin = mine.mean("mean of two")
        found.append(
            f"{task}: the mean of two of {mine.mean('n'):.0f} has a validation loss"
            f" {abs(basin):.4f} {'above' if basin > 0 else 'below'} the mean of theirs; members of"
            f" greedy soup: {number(mine.mean('members'))}"
        )
        methods = mine.of("method")
        ours = {"the best TWA on validation data": [m for m in methods if m.startswith("TWA")]}
        ours |= {m: [m] for m in OURS}
        others = {"the best of these three": FIXED} | {m: (m,) for m in OTHERS if m in methods}
        for setting, (name, wanted) in itertools.product(mine.of("setting"), ours.items()):
            one = mine.where(setting=setting)
            texts = [
                f"{other} {compared(one.chosen(*wanted), one.chosen(*theirs))}"
                for other, theirs in others.items()
            ]
            found.append(f"{task}, {setting}: {name} less {'; '.join(texts)}")
    full = rows.where(setting=IN)
    for what, pairs in factors().items() if len(rows.of("task")) == 1 else ():
        both = [(full.where(method=a), full.where(method=b), f"{a} less {b}") for a, b in pairs]
        texts = [f"{text} {compared(a, b)}" for a, b, text in both if a and b]
        found += [f"{what}: {'; '.join(texts)}"] if texts else []
    for r in rows:
        if "exported" in r:
            found.append(
                f"seed {r['seed']}: {r['exported']} was exported with an accuracy of"
                f" {r['reported']:.4f} and a loss of {r['reported loss']:.4f}; from_pretrained in a"
                f" new process gives {r['loaded']:.4f} and {r['loaded loss']:.4f}"
            )
    return found


def compared(ours: Rows, theirs: Rows) -> str:
    """Differences of loss and, if there is one, of accuracy in percentage points."""
    text = str(ours.less(theirs))
    if ours.of("metric") and theirs.of("metric"):
        apart = ours.less(theirs, "metric")
        text += f" (accuracy {100 * apart.mean:+.2f} ± {100 * apart.error:.2f})"
    return text


def factors() -> dict[str, list[tuple[str, str]]]:
    """What is varied, and the pairs of methods that differ in that alone."""

    def name(kind: str, segments: str, bits: int) -> str:
        return TwaMethod(kind, segments, bits).name

    kinds, pairs = "vt", itertools.product
    return {
        "2 bits instead of 4": [(name(k, s, 2), name(k, s, 4)) for k, s in pairs(kinds, SEGMENTS)],
        "more segments": [
            (name(k, s, 4), name(k, "model", 4)) for k, s in pairs(kinds, SEGMENTS[1:])
        ],
        "held-out instead of training data": [(name("v", s, 4), name("t", s, 4)) for s in SEGMENTS],
    }


def picture(figure, rows: Rows) -> None:
    """Differences to greedy soup with their standard errors: a line per method, a row of panels per
    task.
    """
    tasks, settings = rows.of("task"), rows.of("setting")
    panels = [(s, key) for s in settings for key in ("test", "metric")]
    grid = figure.subplots(len(tasks), len(panels), squeeze=False)
    for line, task in zip(grid, tasks, strict=True):
        line[0].set_title(f"{task}, less {SOUP}", loc="left")
        methods = [m for m in rows.where(task=task).of("method") if m != SOUP][::-1]
        for axes, (setting, key) in zip(line, panels, strict=True):
            one = rows.where(task=task, setting=setting)
            scale, theirs = 100 if key == "metric" else 1, one.where(method=SOUP)
            for y, method in enumerate(methods):
                d = one.where(method=method).less(theirs, key)
                color = "C0" if method.startswith("TWA") else "C1"
                style = {"xerr": scale * d.error, "fmt": "o", "color": color}
                axes.errorbar(scale * d.mean, y, **style)
            axes.axvline(0, color="0.6", linewidth=1)
            axes.grid(axis="y", color="0.9")
            axes.set_yticks(range(len(methods)), methods if axes is line[0] else [])
            axes.set_xlabel(f"{setting}: {'accuracy, points' if key == 'metric' else 'loss'}")
