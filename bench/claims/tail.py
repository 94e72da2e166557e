"""Tail stage: the last part of training with a learning rate that stays high, so that checkpoints
explore, and is averaged away. SWA's setting.

Li et al. (arXiv 2205.13104v4; first ICLR 2023) report that TWA of such checkpoints is better than
SWA, their mean, and depends less on the rate. Tails begin at 60 % of the usual run and end at 80 %.

Beside SWA: EMA, LAWA, greedy soup and the best single checkpoint; the usual run, which ends at
100 %; and annealing from the tail's end, the rate falling linearly from the tail's highest: for as
many steps as TWA takes, and for what TWA costs in all, with its looks at the validation data and
those that chose its center. TWA-v trains on held-out data that nothing else sees.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from twa.tasks.contract import Task

from .job import Job
from .rows import Rows
from .runs import Run
from .workloads import Workload

TITLE = "Tail stage: checkpoints of a high learning rate, averaged"
CLAIM = (
    "TWA is better than SWA at every learning rate of the tail, and depends less on that rate (Li"
    " et al., ICLR 2023 and arXiv 2205.13104v4)."
)
METRIC = "accuracy"
PIVOT = True  # a column per setting
FIGURE = (14, 6.5)
BEGIN, LENGTH = 0.6, 0.2  # of the usual run
CHECKPOINTS = 16  # of a tail
METHODS = ("t:fine:4", "t:tensor:4", "v:tensor:4")
FIXED = ("best single", "uniform", "EMA", "LAWA", "greedy soup")
AVERAGES = ("SWA", "EMA", "LAWA", "greedy soup")
ANNEALING = ("annealing", "annealing, same cost")


def run(job: Job) -> Rows:
    rows = Rows()
    for workload in job.workloads("gpt", "vgg"):
        task = job.task(workload)
        usual = job.usual(workload, task)
        label = {"task": workload.label, "full": usual.plan.steps}
        where = label | {"setting": "usual run", "stopped": usual.last}
        rows.append(job.measure(where, "whole run", task, usual.load(task, usual.last), 0, 0))
        for schedule, rate in settings(workload.tail_rates):
            tail = tail_of(job, workload, task, usual, schedule, rate)
            where = label | {"setting": f"{schedule} {rate:g}", "stopped": tail.last}
            where |= {"schedule": schedule, "rate": rate}
            found = job.averages(where, task, tail.candidates(), workload.twa_steps, METHODS, FIXED)
            rows += [r | {"method": "SWA"} if r["method"] == "uniform" else r for r in found]
            highest = Run(tail.folder, replace(tail.plan, schedule="constant"), tail.first)
            cost = round(max(r["cost"] for r in found if r["method"].startswith("TWA")))
            for name, steps in zip(ANNEALING, (workload.twa_steps, cost), strict=True):
                rows.append(job.anneal(where, workload, task, highest, tail.last, steps, name))
    return rows


def settings(rates: Iterable[float]) -> list[tuple[str, float]]:
    """(schedule, rate) of each tail: cyclic ones at the lowest and the highest rate."""
    rates = sorted(rates)
    constant = [("constant", rate) for rate in rates]
    return constant + [("cyclic", rate) for rate in sorted({rates[0], rates[-1]})]


def tail_of(
    job: Job, workload: Workload, task: Task, usual: Run, schedule: str, rate: float
) -> Run:
    """The run that goes on from 60 % of the usual run, with its optimizer's state."""
    start = usual.plan.nearest(BEGIN)
    every = max(1, round(usual.plan.steps * LENGTH / CHECKPOINTS))
    size = {"steps": CHECKPOINTS * every, "every": every, "warmup": 0}
    plan = replace(usual.plan, lr=rate, schedule=schedule, **size)
    return job.run(workload, f"tail-{schedule}-{rate:g}", task, plan, start=(usual, start))


# What is shown -----------------------------------------------------------------------------------


def findings(rows: Rows) -> list[str]:
    """TWA against SWA and the others, tail by tail; what the rate changes; the tails against the
    usual run; all by task.
    """
    found = []
    for task in rows.of("task"):
        mine = rows.where(task=task)
        tails = [s for s in mine.of("setting") if s != "usual run"]
        trained = [m for m in mine.of("method") if m.startswith("TWA")]
        best = "the best fixed average on validation data"
        others = {"SWA": ("SWA",), best: ("best single", *AVERAGES)}
        others |= {name: (name,) for name in ANNEALING}
        for method in trained:
            texts = [f"{name} {below(mine, tails, method, m)}" for name, m in others.items()]
            found.append(
                f"{task}: {method}: lower test loss (tails x seeds) than {'; than '.join(texts)}"
            )
        found.append(
            f"{task}: test loss over constant rates, highest - lowest:"
            f" {', '.join(sensitivity(mine, trained))}"
        )
        ends = ", ".join(best_tail(mine, m, tails) for m in (*AVERAGES, *trained, *ANNEALING))
        found.append(
            f"{task}: the usual run ends at {mine.mean(setting='usual run'):.4f}; best tail of each"
            f" (of its steps, cost included): {ends}"
        )
    return found


def chosen(rows: Rows, *methods: str) -> float:
    """Test loss of that of these methods with the lowest validation loss, of one seed's rows of one
    tail.
    """
    return min((r["val"], r["test"]) for r in rows.where(method=methods))[1]


def below(rows: Rows, tails: list[str], method: str, others: tuple[str, ...]) -> str:
    """A method against the best of others, one seed and tail at a time: "in 4 of 5, -0.0123 on
    average".
    """
    pairs = [rows.where(setting=s, seed=seed) for s in tails for seed in rows.of("seed")]
    differences = [chosen(one, method) - chosen(one, *others) for one in pairs if one]
    wins = f"in {sum(d < 0 for d in differences)} of {len(differences)}"
    return f"{wins}, {sum(differences) / len(differences):+.4f} on average"


def sensitivity(rows: Rows, trained: list[str]) -> list[str]:
    """What the rate of the tail changes in the mean test loss of each method."""
    found, constant = [], rows.where(schedule="constant")
    for method in (*AVERAGES, *trained, *ANNEALING):
        losses = [constant.mean(method=method, setting=s) for s in constant.of("setting")]
        found.append(f"{method} {max(losses) - min(losses):.4f}")
    return found


def best_tail(rows: Rows, method: str, tails: list[str]) -> str:
    """A method's lowest loss, in which tail, and for what part of the usual run's steps: those
    before and in the tail, and the method's own cost.
    """
    loss, setting = min((rows.mean(method=method, setting=s), s) for s in tails)
    at = rows.where(method=method, setting=setting)
    part = (at.mean("stopped") + at.mean("cost")) / rows[0]["full"]
    return f"{method} {loss:.4f} ({setting}, {part:.0%})"


def picture(figure, rows: Rows) -> None:
    """Test loss against the tail's rate; constant solid, cyclic dashed."""
    tasks = rows.of("task")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        mine = rows.where(task=task)
        usual = mine.mean(setting="usual run")
        axes.axhline(usual, color="0.5", linestyle=":", label="usual run's end")
        shown = [m for m in mine.of("method") if m not in ("whole run", "best single")]
        for k, method in enumerate(shown):
            width = 2 if "TWA" in method else 1
            for schedule, style in (("constant", "-"), ("cyclic", "--")):
                line = mine.where(method=method, schedule=schedule)
                x, y = line.of("rate"), [line.mean(rate=rate) for rate in line.of("rate")]
                label = method if schedule == "constant" else None
                axes.plot(x, y, style, marker="o", color=f"C{k}", label=label, linewidth=width)
        axes.set_xscale("log")
        rates = mine.of("rate")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.set_xlabel("learning rate of the tail (cyclic: the highest of each cycle)")
        axes.set_ylabel("test loss")
        axes.set_title(task)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
