"""The border between averaging and annealing: what decides which of the two is better.

Around one base point one factor varies at a time: how long a run at a constant rate has trained,
how much a run with a schedule has left, the spacing of the candidates, the batch, and the size of
the model. Runs are of the small character transformer, for up to four passes over 32,768 windows.

A trained average takes a fixed number of steps, not as many as are worth it: so only the factor
varies, not what is spent. It starts where `twa average` starts. Annealing gets as many steps, or
as many as the trained average costs with all its looks. The third rival trains on at the run's own
rate and takes the EMA, for the same total cost. The combination anneals for half of that cost and
trains an average of the branch's checkpoints and of those before it for the other half.

Greedy soup is left out, as it would take a tenth of the time: 31 looks of 16 candidates.

Batches: all runs see as many samples, at rates that go with the square root of the batch, and their
candidates are as many samples apart. Trained averages and annealing have the run's batch. Their
steps go with 1 / the square root, so that rate times steps is the same: with as many samples, 8
steps would be left at 512. All costs count samples, in batches of 32.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from twa.io.candidates import Candidates
from twa.merge.baselines import measure
from twa.merge.run import Merge
from twa.merge.settings import TwaMethod
from twa.tasks.chars import Batches
from twa.tasks.contract import Task

from .job import Job
from .rows import Difference, Rows
from .runs import Plan, Run
from .text import text_task
from .workloads import Workload, gpt

TITLE = "The border between averaging and annealing"
CLAIM = (
    "Open: from where on is a trained average worth more than annealing for the same steps or the"
    " same cost?"
)
METRIC = ""
PIVOT = True  # a column per setting
FIGURE = (16, 9)
N = 16  # candidates
SPACING, STEPS, WARMUP = 16, 128, 100  # of gradient steps, at a batch of 32
BATCH, WIDTH, CONTEXT, LR = 32, 64, 32, 3e-3
WINDOWS = 32768  # to train on
# stops of a run at a constant rate, and the length of the one with a schedule, in spacings
STOPS, BASE = (16, 32, 64, 128, 256), 128
LEFT = (3 / 4, 1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of the run with a schedule
SPACINGS = (1 / 16, 1 / 4, 1, 4, 8)  # of SPACING
BATCHES = (32, 64, 128, 256, 512)
SIZES = {16: 2, 32: 2, 64: 2, 96: 3}  # width and depth
QUICK = {
    "stops": (32, 128),
    "left": (),
    "spacings": (1, 4),
    "batches": (32, 128),
    "sizes": (32, 64),
}

TRAINED, LEFT_OF = "how long it has trained", "what is left of its schedule"
APART, BATCH_OF, SIZE_OF = "spacing of the candidates", "batch", "size of the model"
AXES = {
    TRAINED: "steps trained at a constant rate",
    LEFT_OF: "part of the schedule that is left",
    APART: "steps between candidates",
    BATCH_OF: "samples of a batch",
    SIZE_OF: "weights of the model",
}
METHOD, COARSE = TwaMethod.parse("t:fine:4"), TwaMethod.parse("t:tensor:4")
FIXED = {"last": "last", "uniform": "SWA", "EMA": "EMA", "LAWA": "LAWA"}
EQUAL_STEPS, EQUAL_COST = "annealing", "annealing, same cost"
ON, BOTH = "train on, then EMA, same cost", "annealing, then TWA, same cost"
#: what a trained average is compared with, by what findings and the picture call it
RIVALS = {
    "best fixed average": tuple(FIXED.values()),
    "annealing, equal steps": (EQUAL_STEPS,),
    "annealing, equal cost": (EQUAL_COST,),
    "training on, then EMA": (ON,),
}


@dataclass(frozen=True)
class Point:
    """Where a run is stopped, and what is done there.

    Args:
        run: whose state at `stop` is kept
        spacing: gradient steps between candidates
        steps: of a trained average
        unit: what a step costs, in steps of a batch of 32
        fine: a run with the last checkpoints before `stop`, where `run` has too few
        combine: whether annealing and a trained average are combined, too
        methods: trained averages
    """

    workload: Workload
    task: Task
    run: Run
    stop: int
    spacing: int
    steps: int
    unit: float = 1.0
    fine: Run | None = None
    combine: bool = False
    methods: tuple[TwaMethod, ...] = field(default=(METHOD,))

    @property
    def key(self) -> str:
        """Its name among the points: one that is in two tables is the same point."""
        return f"{self.workload.name} {self.run.folder.name} {self.stop} {self.spacing}"

    def candidates(self, count: int = N, after: Sequence[Run] = ()) -> Candidates:
        """The last of them up to the stop, and then those of runs that go on from there."""
        source = self.fine or self.run
        steps = {self.stop - k * self.spacing for k in range(N)}
        found = [source.path(s) for s in source.steps if s in steps]
        found += [run.path(s) for run in after for s in run.steps]
        return Candidates(found[-count:])


def run(job: Job) -> Rows:
    rows, known = Rows(), {}
    for factor, setting, x, point in points(job):
        if point.key not in known:
            known[point.key] = rows_at(job, point)
        where = {"task": factor, "setting": setting, "x": x, "point": point.key}
        rows += [where | row for row in known[point.key]]
    return rows


# Runs and points ---------------------------------------------------------------------------------


def model_of(width: int = WIDTH, batch: int = BATCH) -> Workload:
    """The small transformer of a width, on some windows of the standard library's source."""
    size = {"width": width, "depth": SIZES[width], "context": CONTEXT}

    def make(seed: int) -> Task:
        task = text_task(domain="code", batch=batch, seed=seed, **size)
        train = Batches(task.train.data, batch, limit=WINDOWS, shuffle=True, seed=seed)
        return replace(task, train=train)

    return replace(gpt(), name=f"border-{width}-{batch}", make=make)


def points(job: Job) -> list[tuple[str, str, float, Point]]:
    """(factor, setting, x, point) of all columns of the tables, in their order."""
    few = QUICK if job.scale == "quick" else {}
    unit, steps, warmup = job.scaled(SPACING), job.scaled(STEPS), job.scaled(WARMUP)
    stops = [unit * k for k in few.get("stops", STOPS)]
    stop = unit * BASE

    workload = model_of()
    task = job.task(workload)
    begin = stop - N * max(1, unit // 4)  # of the checkpoints that are closer
    constant = Plan(max(stops), unit, LR, warmup=warmup)
    main = job.run(workload, "constant", task, constant, keep=sorted({*stops, begin}))
    at = Point(workload, task, main, stop, unit, steps)
    base = replace(at, combine=True, methods=(METHOD, COARSE))
    found = []
    for k in stops:
        point = base if k == stop else replace(at, stop=k, combine=True)
        found.append((TRAINED, f"{k} steps", float(k), point))
    if left := few.get("left", LEFT):
        every = max(1, unit // 4)
        falling = replace(constant, steps=stop, schedule="cosine", every=every)
        ends = {part: falling.nearest(1 - part) for part in left}
        run = job.run(workload, "cosine", task, falling, keep=sorted(ends.values()))
        for part, k in ends.items():
            point = replace(at, run=run, stop=k, combine=True)
            found.append((LEFT_OF, f"{short(part)} left", part, point))
    for part in few.get("spacings", SPACINGS):
        apart, fine = max(1, round(part * unit)), None
        if part < 1:
            plan = replace(main.plan, steps=stop - begin, every=1, warmup=0)
            fine = job.run(workload, "constant-fine", task, plan, start=(main, begin))
        point = base if part == 1 else replace(at, spacing=apart, fine=fine)
        found.append((APART, f"{apart} apart", float(apart), point))
    for batch in few.get("batches", BATCHES):
        point = base if batch == BATCH else of_batch(job, at, batch)
        found.append((BATCH_OF, f"batch {batch}", float(batch), point))
    for width in few.get("sizes", SIZES):
        point = base if width == WIDTH else of_size(job, at, constant, width)
        weights = sum(p.numel() for p in point.task.model().parameters())
        found.append((SIZE_OF, f"{weights / 1000:.0f} k", float(weights), point))
    return found


def of_batch(job: Job, at: Point, batch: int) -> Point:
    """The base point with larger batches, and fewer steps at a higher rate."""
    times = batch / BATCH
    workload = model_of(batch=batch)
    task, unit = job.task(workload), max(1, round(at.spacing / times))
    steps = at.stop // at.spacing * unit
    warmup = round(at.run.plan.warmup / times)
    plan = Plan(steps, unit, LR * math.sqrt(times), warmup=warmup)
    run, twa = with_end(job, workload, task, plan), round(at.steps / math.sqrt(times))
    return Point(workload, task, run, steps, unit, max(1, twa), times)


def of_size(job: Job, at: Point, plan: Plan, width: int) -> Point:
    """The base point with a model of another width."""
    workload = model_of(width)
    task = job.task(workload)
    run = with_end(job, workload, task, replace(plan, steps=at.stop))
    return replace(at, workload=workload, task=task, run=run)


def with_end(job: Job, workload: Workload, task: Task, plan: Plan) -> Run:
    """The end of a run at a constant rate, which alone leaves candidates."""
    length = N * plan.every
    before = replace(plan, steps=plan.steps - length, every=plan.steps - length)
    start = job.run(workload, "constant", task, before)
    end = replace(plan, steps=length, warmup=0)
    return job.run(workload, "constant-end", task, end, start=(start, start.last))


# Rows --------------------------------------------------------------------------------------------


def rows_at(job: Job, point: Point) -> Rows:
    """All methods at a point, and what tells how far the run is from its end.

    On the row of the trained average, in validation loss:

        fall    by how much the EMA gets better if the run goes on for what the average costs
        pace    the same as it is expected before, from how much the start has got better
        noise   what the best fixed average is below the last candidate
    """
    merge = job.merge(point.task, point.candidates(), point.steps)
    rows = Rows(fixed(job, merge, name) | {"method": label} for name, label in FIXED.items())
    start = merge.start()
    rows += [job.row({}, merge.train(method), merge) for method in point.methods]
    ours = rows.where(method=METHOD.name)[0]
    cost, looks = ours["cost"], rows.where(method="EMA")[0]["cost"]
    equal = max(1, round(cost))
    for name, steps in ((EQUAL_STEPS, point.steps), (EQUAL_COST, equal)):
        rows.append(annealed(job, point, steps, name))
    on = trained_on(job, point, max(1, round(cost - looks)))
    rows.append(on)
    if point.combine:
        rows.append(combined(job, point, equal))
    best = rows.chosen(*FIXED.values())[0]["val"]
    ours["fall"] = rows.where(method="EMA")[0]["val"] - on["val"]
    ours["pace"] = None if start.gain is None else start.gain * cost
    ours["noise"] = rows.where(method="last")[0]["val"] - best
    for row in rows:
        row["looks"], row["cost"] = row["looks"] * point.unit, row["cost"] * point.unit
        row["stopped"] = point.stop
    return rows


def fixed(job: Job, merge: Merge, name: str = "EMA") -> dict:
    """The row of a fixed average."""
    result = measure(name, merge.evaluator, merge.candidates.names, lambda: None)
    result.test_loss, result.test_metric = merge.evaluator.test()
    return job.row({}, result, merge)


def annealed(job: Job, point: Point, steps: int, name: str) -> dict:
    return job.anneal({}, point.workload, point.task, point.run, point.stop, steps, name)


def trained_on(job: Job, point: Point, steps: int) -> dict:
    """The run goes on as it was to go on, and its EMA is taken.

    A run with a schedule does for as many steps as come nearest, and no further than to its end.
    """
    run, stop, spacing = point.run, point.stop, point.spacing
    if run.plan.schedule == "constant":
        last = min(N, steps // spacing) * spacing  # those that leave checkpoints
        after, at, name = [], (run, stop), f"{run.folder.name}-on-{stop}"
        for length, every in ((steps - last, steps - last), (last, spacing)):
            if length:
                plan, name = (
                    replace(run.plan, steps=length, every=every, warmup=0),
                    name + f"-{length}",
                )
                after.append(job.run(point.workload, f"{name}-{every}", point.task, plan, start=at))
                at = after[-1], after[-1].last
        candidates = point.candidates(after=after)
    else:
        every = run.plan.every
        end = min(run.last, round((stop + steps) / every) * every)
        steps, candidates = end - stop, replace(point, stop=end).candidates()
    found = fixed(job, job.merge(point.task, candidates, 1))
    return found | {"method": ON, "steps": steps, "cost": steps + found["cost"]}


def combined(job: Job, point: Point, cost: int) -> dict:
    """Annealing for half of a cost, and a trained average for what is then left.

    It is of the last half of the candidates and of as many checkpoints of the annealed branch. It
    keeps its last coefficients, whatever its looks at validation data say: they are not counted.
    """
    run, half = point.run, N // 2
    every = max(1, cost // 2 // half)
    rate = run.plan.rate(point.stop - run.first - 1)
    plan = replace(run.plan, steps=half * every, every=every, lr=rate, schedule="linear", warmup=0)
    name = f"{run.folder.name}-branch-{point.stop}-{plan.steps}"
    branch = job.run(point.workload, name, point.task, plan, start=(run, point.stop))
    merge = job.merge(point.task, point.candidates(after=[branch]), 1)
    start = merge.start()
    merge.settings = replace(merge.settings, steps=max(1, round(cost - plan.steps - start.looks)))
    row = job.row({}, merge.train(METHOD, keep="last"), merge, BOTH)
    steps = row["steps"] + plan.steps
    return row | {"steps": steps, "looks": start.looks, "cost": steps + start.looks}


# What is shown -----------------------------------------------------------------------------------


def findings(rows: Rows) -> list[str]:
    """What the trained average gains on each rival, column by column; where the border is; what
    goes along with it; what the combination gains.
    """
    found = []
    for task in rows.of("task"):
        mine = rows.where(task=task)
        for name, methods in RIVALS.items():
            text = "; ".join(
                f"{s} {said(gain(mine.where(setting=s), methods))}" for s in mine.of("setting")
            )
            found.append(f"{task}: gain of {METHOD.name} over {name}: {text}")
    found += [
        border(rows, name, methods) for name, methods in RIVALS.items() if "annealing" in name
    ]
    found.append(decides(rows))
    both = rows.where(point=tuple(rows.where(method=BOTH).of("point")))
    for name, methods in {METHOD.name: (METHOD.name,), **RIVALS}.items():
        if "fixed" not in name:
            text = "; ".join(
                f"{label} {said(gain(one, methods, BOTH))}" for label, one in each(both)
            )
            found.append(f"gain of the combination, annealing and then TWA, over {name}: {text}")
    coarse = rows.where(point=tuple(rows.where(method=COARSE.name).of("point")))
    text = "; ".join(said(gain(one, (COARSE.name,))) for _, one in each(coarse))
    return [*found, f"gain of fine coefficients over those per tensor, at the base point: {text}"]


def gain(rows: Rows, methods: Sequence[str], ours: str = METHOD.name) -> Difference:
    """Test loss of some methods' best on validation data, less that of an average, at a point."""
    return rows.chosen(*methods).less(rows.where(method=ours))


def said(d: Difference) -> str:
    """A gain, and whether it is clear."""
    error = f" ± {d.error:.4f}" if d.count > 1 else ""
    return f"{d.mean:+.4f}{error}{' (clear)' if d.is_clear else ''}"


def each(rows: Rows) -> list[tuple[str, Rows]]:
    """The rows of every point once, with its label."""
    found = []
    for point in rows.of("point"):
        first = rows.where(point=point)[0]
        one = rows.where(point=point, task=first["task"], setting=first["setting"])
        found.append((first["setting"], one))
    return found


def border(rows: Rows, name: str, methods: Sequence[str]) -> str:
    """At which points a trained average is clearly ahead of a rival, at which behind."""
    sides: dict[str, list[str]] = {"ahead": [], "not told apart": [], "behind": []}
    for label, one in each(rows):
        d = gain(one, methods)
        sides[("ahead" if d.mean > 0 else "behind") if d.is_clear else "not told apart"].append(
            label
        )
    text = "; ".join(f"{side} at {', '.join(labels) or 'none'}" for side, labels in sides.items())
    return f"{METHOD.name} and {name}, of {len(each(rows))} points, by two standard errors: {text}"


#: what may decide, of a point's rows
MEASURES: dict[str, Callable[[Rows], float]] = {
    "what training on gains": lambda rows: rows.mean("fall"),
    "what it is expected to gain": lambda rows: rows.mean("pace"),
    "what a fixed average gains at once": lambda rows: rows.mean("noise"),
    "the ratio of the two": lambda rows: rows.mean("noise") / max(1e-4, rows.mean("fall")),
}


def decides(rows: Rows) -> str:
    """How the gain over annealing at equal cost goes with what can be measured, over all points,
    and with each factor.
    """
    methods, texts = RIVALS["annealing, equal cost"], []
    for task in rows.of("task"):
        mine = rows.where(task=task)
        ones = [mine.where(x=x) for x in mine.of("x")]
        texts.append(f"{task} {correlation(mine.of('x'), [gain(r, methods).mean for r in ones])}")
    ones = [one for _, one in each(rows) if one.of("pace")]
    gains = [gain(one, methods).mean for one in ones]
    for name, value in MEASURES.items():
        texts.append(f"{name} {correlation([value(one) for one in ones], gains)}")
    return (
        "rank correlation of the gain over annealing at equal cost, within a factor, and over all"
        f" points with figures of the run in validation loss: {'; '.join(texts)}"
    )


def correlation(x: Sequence[float], y: Sequence[float]) -> str:
    """Of the ranks; "-" where there is none."""
    if len(set(x)) < 3 or len(set(y)) < 3:
        return "-"
    ranks = [[sorted(values).index(v) for v in values] for values in (x, y)]
    return f"{statistics.correlation(*ranks):+.2f}"


def picture(figure, rows: Rows) -> None:
    """Gains against each factor, and against what training on gains."""
    panels = iter(figure.subplots(2, 3).flat)
    for axes, (task, label) in zip(panels, AXES.items(), strict=False):
        mine = rows.where(task=task)
        for k, (name, methods) in enumerate(RIVALS.items()):
            d = [gain(mine.where(x=x), methods) for x in mine.of("x")]
            mean, error = [v.mean for v in d], [v.error for v in d]
            axes.errorbar(mine.of("x"), mean, error, fmt="o-", color=f"C{k}", label=name, capsize=3)
        if ticks := mine.of("x"):
            axes.set_xscale("log")
            axes.set_xticks(ticks, [short(x) for x in ticks])
            axes.minorticks_off()
        if task == LEFT_OF:
            axes.invert_xaxis()  # the end of the run is on the right, as in the panel before
        finish(axes, label)
    axes = next(panels)
    for k, (name, methods) in enumerate(RIVALS.items()):
        ones = [one for _, one in each(rows)]
        fall, mean = [one.mean("fall") for one in ones], [gain(one, methods).mean for one in ones]
        axes.scatter(fall, mean, color=f"C{k}", label=name)
    finish(axes, "what training on gains (EMA, validation loss), all points")
    axes.legend(fontsize=9, title="TWA against")


def finish(axes, label: str) -> None:
    axes.axhline(0, color="0.6", linewidth=1)
    axes.set_yscale("symlog", linthresh=0.02)
    axes.set_xlabel(label)
    axes.set_ylabel("gain of TWA in test loss")


def short(x: float) -> str:
    """A tick's label: 1/16, 512, 112k."""
    if x < 1:
        return "3/4" if x == 3 / 4 else f"1/{1 / x:.0f}"
    return f"{x / 1000:.0f}k" if x >= 10_000 else f"{x:g}"
