"""Head stage: stop the usual run early and average its checkpoints, instead of training to the end.

Li et al. (arXiv 2205.13104v4) report that TWA on the checkpoints of the first half or so reaches
the accuracy of the whole run: over 40 % of the epochs saved on CIFAR, over 30 % on ImageNet.

TWA takes as many steps as are worth it, and once a fixed number. Beside it: SWA, EMA, LAWA and
greedy soup of the same checkpoints; annealing from there, for that number of steps, and for what
TWA costs in all, with its looks at the validation data and those that chose its start; and the
usual run that goes on, with the EMA of its checkpoints.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy
from twa.io.candidates import Candidates
from twa.merge.settings import TwaMethod
from twa.tasks.contract import Task

from .job import Job
from .rows import Rows, number

TITLE = "Head stage: training stopped early, then averaged"
CLAIM = (
    "Averaging the checkpoints of the first 50 to 60 % of training with TWA reaches the whole run's"
    " test loss (over 40 % saved on CIFAR)."
)
METRIC = "accuracy"
PIVOT = True  # a column per setting
FIGURE = (14, 6.5)
PARTS = (0.3, 0.5, 0.6, 0.8)  # of the usual run
CANDIDATES = 32  # at most: the last ones
POINTS = 20  # of the usual run, at which its EMA is measured
METHODS = ("t:fine:4", "t:tensor:4")
OURS, FIXED_STEPS = "TWA-t fine, 4 bits", "TWA-t fine, as many steps as annealing"
EQUAL_STEPS, EQUAL_COST = "annealing", "annealing, same cost"
FIXED = ("last", "uniform", "EMA", "LAWA", "greedy soup")


def run(job: Job) -> Rows:
    rows = Rows()
    for workload in job.workloads("gpt", "resnet"):
        task = job.task(workload)
        usual = job.usual(workload, task)
        full = usual.plan.steps
        label = {"task": workload.label, "full": full}
        where = label | {"setting": "100 %", "stopped": full}
        rows.append(job.measure(where, "whole run", task, usual.load(task, usual.last), 0, 0))
        for part in PARTS:
            stop = usual.plan.nearest(part)
            where = label | {"setting": f"{part:.0%}", "stopped": stop}
            candidates = usual.candidates(until=stop, count=CANDIDATES)
            found = averages(job, where, task, candidates, workload.twa_steps)
            rows += found
            ours = next(r for r in found if r["method"] == OURS)
            for name, steps in ((EQUAL_STEPS, workload.twa_steps), (EQUAL_COST, ours["cost"])):
                extra = max(1, round(steps))
                rows.append(job.anneal(where, workload, task, usual, stop, extra, name))
        # it is what TWA competes with: to train on instead, and take the EMA
        rows += job.train_on(workload, task, usual, min(PARTS), CANDIDATES, POINTS)
    return rows


def averages(job: Job, where: dict, task: Task, candidates: Candidates, steps: int) -> Rows:
    """The fixed averages, TWA with as many steps as are worth it, and with so many."""
    merge = job.merge(task, candidates, None, METHODS, compare=True)
    merge.run()
    rows = Rows(job.row(where, r, merge) for r in merge.results if r.method in FIXED)
    for r in rows.where(method="uniform"):
        r["method"] = "SWA"
    rows += [job.row(where, r, merge) for r in merge.results if r.is_trained]
    merge.settings = replace(merge.settings, steps=steps)
    result = merge.train(TwaMethod.parse(METHODS[0]))
    rows.append(job.row(where, result, merge, FIXED_STEPS))
    return rows


# What is shown -----------------------------------------------------------------------------------


def findings(rows: Rows) -> list[str]:
    """What each method saves of the whole run, and how TWA compares with the others, by task."""
    found = [text for task in rows.of("task") for text in _against_training(rows, task)]
    for task in rows.of("task"):
        mine = rows.where(task=task)
        whole = mine.mean(method="whole run")
        texts = [f"{m} {_saved(mine, m, whole)}" for m in mine.of("method") if m != "whole run"]
        found.append(f"{task}: the whole run's test loss, {whole:.4f}: {'; '.join(texts)}")
        trained = [m for m in mine.of("method") if m.startswith("TWA")]
        others = [m for m in mine.of("method") if m not in ("whole run", *trained)]
        for method in trained:
            text = ", ".join(f"{m} {_below(mine, method, m)}" for m in others)
            found.append(
                f"{task}: {method}: lower mean test loss, at how many of the {len(PARTS)} stops,"
                f" than {text}"
            )
        if mine.of("metric"):
            at_half = mine.where(setting="50%")
            accuracy = ", ".join(
                f"{m} {at_half.mean('metric', method=m):.4f}" for m in at_half.of("method")
            )
            found.append(
                f"{task}: accuracy of the whole run {mine.mean('metric', method='whole run'):.4f};"
                f" stopped at 50%: {accuracy}"
            )
    return found


def _against_training(rows: Rows, task: str) -> list[str]:
    """TWA against training on and taking the EMA, at equal total cost, stop by stop.

    Rows whose cost goes beyond the end of the usual run have nothing to be compared with.
    """
    texts = []
    for method in (OURS, FIXED_STEPS):
        parts = []
        for stop in (f"{part:.0%}" for part in PARTS):
            ours = rows.where(task=task, method=method, setting=stop)
            within = [r for r in ours if r["stopped"] + r["cost"] <= r["full"]]
            if len(within) < len(ours):
                parts.append(f"{stop} beyond the end of the run")
                continue
            apart = [r["test"] - line_at(rows, task, r) for r in ours]
            sd = f" ± {statistics.stdev(apart):.4f}" if len(apart) > 1 else ""
            lower = sum(d < 0 for d in apart)
            cost = number(ours.mean("cost"))
            parts.append(
                f"{stop} {statistics.fmean(apart):+.4f}{sd}, lower on {lower} of {len(apart)}"
                f" seeds (cost {cost})"
            )
        text = "; ".join(parts)
        texts.append(f"{task}: {method} against training on and taking the EMA, same cost: {text}")
    return texts


def line_at(rows: Rows, task: str, row: dict) -> float:
    """Test loss of training on and taking the EMA, at a row's total cost and of its seed."""
    line = rows.where(line=task, seed=row["seed"])
    return float(
        numpy.interp(row["stopped"] + row["cost"], line.values("stopped"), line.values("test"))
    )


def _steps_in_all(rows: Rows) -> float:
    """Steps before the stop, and the method's own cost."""
    return rows.mean("stopped") + rows.mean("cost")


def _saved(rows: Rows, method: str, whole: float) -> str:
    """The most of the whole run's steps that a method saves where it reaches its test loss."""
    mine, full = rows.where(method=method), rows[0]["full"]
    stops = {s: mine.where(setting=s) for s in mine.of("setting")}
    reached = [_steps_in_all(at) / full for at in stops.values() if at.mean() <= whole]
    if reached:
        return f"{1 - min(reached):.0%} of the steps saved"
    best, stop = min((at.mean(), s) for s, at in stops.items())
    return f"not reached (best {best:.4f}, stopped at {stop})"


def _below(rows: Rows, method: str, other: str) -> str:
    """At how many stops one method is below another, and by how much on average."""
    differences = [
        rows.mean(method=method, setting=s) - rows.mean(method=other, setting=s)
        for s in rows.where(method=other).of("setting")
    ]
    mean = sum(differences) / len(differences)
    return f"{sum(d < 0 for d in differences)} ({mean:+.4f} on average)"


def picture(figure, rows: Rows) -> None:
    """Test loss against steps in all."""
    tasks = rows.of("task")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        mine, line = rows.where(task=task), rows.where(line=task)
        axes.axhline(mine.mean(method="whole run"), color="0.5", linestyle=":", label="whole run")
        stops = line.of("stopped")
        axes.plot(
            stops, [line.mean(stopped=s) for s in stops], color="k", label="train on, then EMA"
        )
        for method in mine.of("method"):
            if method in ("whole run", "SWA", "last", "EMA"):
                continue
            one, is_ours = mine.where(method=method), method.startswith("TWA")
            at = [one.where(setting=s) for s in one.of("setting")]
            style = {"linewidth": 2 if is_ours else 1, "linestyle": "-" if is_ours else "--"}
            x, y = [_steps_in_all(r) for r in at], [r.mean() for r in at]
            axes.plot(x, y, marker="o", label=method, **style)
        axes.axvline(mine[0]["full"], color="0.8", linestyle=":")
        axes.set_xlabel("steps of training and averaging (cost)")
        axes.set_ylabel("test loss")
        axes.set_title(task)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
