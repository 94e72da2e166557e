"""Head stage: stop the usual run early and average its checkpoints, instead of training to the end.

Li et al. (arXiv 2205.13104v4) report that TWA on the checkpoints of the first half or so reaches
the accuracy of the whole run: over 40 % of the epochs saved on CIFAR, over 30 % on ImageNet. Beside
it: SWA, EMA, LAWA and greedy soup of the same checkpoints, and annealing from there, for as many
steps as TWA takes and for what TWA costs in all, with its looks at the validation data and those
that chose its center.
"""

from __future__ import annotations

from .job import Job
from .rows import Rows

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
METHODS = ("t:fine:4", "t:tensor:4")
FIXED = ("last", "uniform", "EMA", "LAWA", "greedy soup")


def run(job: Job) -> Rows:
    rows = Rows()
    for workload in job.workloads("gpt", "resnet"):
        task = job.task(workload)
        usual = job.usual(workload, task)
        steps = usual.plan.steps
        label = {"task": workload.label, "full": steps}
        rows.append(
            job.measure(
                label | {"setting": "100 %", "stopped": steps},
                "whole run",
                task,
                usual.load(task, usual.last),
                0,
                0,
            )
        )
        for part in PARTS:
            stop = usual.plan.nearest(part)
            where = label | {"setting": f"{part:.0%}", "stopped": stop}
            found = job.averages(
                where,
                task,
                usual.candidates(until=stop, count=CANDIDATES),
                workload.twa_steps,
                METHODS,
                FIXED,
            )
            rows += [r | {"method": "SWA"} if r["method"] == "uniform" else r for r in found]
            cost = round(max(r["cost"] for r in found if r["method"].startswith("TWA")))
            for name, extra in (("annealing", workload.twa_steps), ("annealing, same cost", cost)):
                rows.append(job.anneal(where, workload, task, usual, stop, extra, name))
    return rows


def findings(rows: Rows) -> list[str]:
    """Per task and method: the smallest part of the run from which it reaches the whole run's test
    loss, its own steps included.
    """
    found = []
    for task in rows.of("task"):
        mine = rows.where(task=task)
        whole, full, texts = mine.mean(method="whole run"), mine[0]["full"], []
        for method in mine.of("method"):
            if method == "whole run":
                continue
            reached = [
                (
                    mine.mean("stopped", method=method, setting=s)
                    + mine.mean("cost", method=method, setting=s)
                )
                / full
                for s in mine.of("setting")
                if mine.where(method=method, setting=s)
                and mine.mean(method=method, setting=s) <= whole
            ]
            best = min(
                (mine.mean(method=method, setting=s), s)
                for s in mine.of("setting")
                if mine.where(method=method, setting=s)
            )
            text = (
                f"{1 - min(reached):.0%} of the steps saved"
                if reached
                else f"not reached (best {best[0]:.4f}, stopped at {best[1]})"
            )
            texts.append(f"{method} {text}")
        found.append(f"{task}: the whole run's test loss, {whole:.4f}: {'; '.join(texts)}")
        trained = [m for m in mine.of("method") if m.startswith("TWA")]
        for method in trained:
            others = [m for m in mine.of("method") if m != "whole run" and m not in trained]
            pairs = {
                m: [
                    mine.mean(method=method, setting=s) - mine.mean(method=m, setting=s)
                    for s in mine.where(method=m).of("setting")
                ]
                for m in others
            }
            text = ", ".join(
                f"{m} {sum(d < 0 for d in ds)} ({sum(ds) / len(ds):+.4f} on average)"
                for m, ds in pairs.items()
            )
            found.append(
                f"{task}: {method}: lower mean test loss, at how many of the {len(PARTS)} stops,"
                f" than {text}"
            )
        if mine.of("metric"):
            accuracy = ", ".join(
                f"{m} {mine.mean('metric', method=m, setting='50%'):.4f}"
                for m in mine.where(setting="50%").of("method")
            )
            found.append(
                f"{task}: accuracy of the whole run {mine.mean('metric', method='whole run'):.4f};"
                f" stopped at 50%: {accuracy}"
            )
    return found


def picture(figure, rows: Rows) -> None:
    """Test loss against steps in all."""
    tasks = rows.of("task")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        mine = rows.where(task=task)
        whole = mine.mean(method="whole run")
        axes.axhline(whole, color="0.5", linestyle=":", label="whole run")
        for method in mine.of("method"):
            if method in ("whole run", "SWA", "last"):
                continue
            settings = [s for s in mine.of("setting") if mine.where(method=method, setting=s)]
            x = [
                mine.mean("stopped", method=method, setting=s)
                + mine.mean("cost", method=method, setting=s)
                for s in settings
            ]
            y = [mine.mean(method=method, setting=s) for s in settings]
            axes.plot(
                x,
                y,
                marker="o",
                label=method,
                linewidth=2 if method.startswith("TWA") else 1,
                linestyle="-" if "TWA" in method else "--",
            )
        axes.axvline(mine[0]["full"], color="0.8", linestyle=":")
        axes.set_xlabel("steps of training and averaging (cost)")
        axes.set_ylabel("test loss")
        axes.set_title(task)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
