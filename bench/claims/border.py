"""The border between averaging and annealing: what decides which of the two is better.

Around one base point one factor varies at a time: how long a run at a constant rate has trained,
how much a run with a schedule has left, the spacing of the candidates, the batch, and the size of
the model. Runs are of the small character transformer, for up to four passes over 32,768 windows.

A trained average takes a fixed number of steps, not as many as are worth it: so only the factor
varies, not what is spent. It starts where `twa average` starts. Annealing gets as many steps, or
as many as the trained average costs with all its looks. The third rival trains on at the run's own
rate and takes the EMA, for the same total cost.

At some points both are combined: annealing, and the EMA of the branch's last checkpoints and those
before it, for that cost; and half of the steps for annealing, half for a trained average.

Greedy soup is left out, as it would take a tenth of the time: 31 looks of 16 candidates.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from twa.io.errors import TwaError

from .border_points import (
    APART,
    BATCH,
    BATCH_OF,
    COARSE,
    LEFT_OF,
    METHOD,
    SIZE_OF,
    TRAINED,
    N,
    Point,
    points,
    short,
)
from .job import Job
from .rows import Difference, Rows
from .runs import Run

TITLE = "The border between averaging and annealing"
CLAIM = (
    "Open: from where on is a trained average worth more than annealing for the same steps or the"
    " same cost?"
)
METRIC = ""
PIVOT = True  # a column per setting
FIGURE = (16, 9)
TICKS, LINEAR = (-0.1, -0.03, -0.01, 0, 0.01, 0.03, 0.1), 0.01  # of gains; linear up to there
RATIOS = (0.01, 0.1, 1, 10)
AXES = {
    TRAINED: "steps trained at a constant rate",
    LEFT_OF: "part of the schedule that is left",
    APART: "steps between candidates",
    BATCH_OF: "samples of a batch",
    SIZE_OF: "weights of the model",
}
FIXED = {"last": "last", "uniform": "SWA", "EMA": "EMA", "LAWA": "LAWA"}
EQUAL_STEPS, EQUAL_COST = "annealing", "annealing, same cost"
ON, EMA_AFTER = "train on, then EMA, same cost", "annealing, then EMA, same cost"
TWA_AFTER = "annealing, then TWA, half of the steps each"
BRANCH = N // 2  # checkpoints of an annealed branch
#: what a trained average is compared with, by what findings and the picture call it
RIVALS = {
    "best fixed average": tuple(FIXED.values()),
    "annealing, equal steps": (EQUAL_STEPS,),
    "annealing, equal cost": (EQUAL_COST,),
    "training on, then EMA": (ON,),
}


def run(job: Job) -> Rows:
    if job.data is not None:
        raise TwaError("it has data of its own: expected none", "border --data")
    rows, known = Rows(), {}
    for factor, setting, x, point in points(job):
        if point.key not in known:
            known[point.key] = rows_at(job, point)
        where = {"task": factor, "setting": setting, "x": x, "point": point.key}
        rows += [where | row for row in known[point.key]]
    return rows


# Rows --------------------------------------------------------------------------------------------


def rows_at(job: Job, point: Point) -> Rows:
    """All methods at a point, and what tells how far the run is from its end.

    On the row of the trained average, in validation loss:

        fall    by how much the EMA gets better if the run goes on for what the average costs
        pace    the same as it is expected before, from how much the start has got better
        noise   what the best fixed average is below the last candidate
    """
    merge = job.merge(point.task, point.candidates(), point.steps)
    rows = Rows(job.fixed({}, merge, name, label) for name, label in FIXED.items())
    start = merge.start()
    rows += [job.row({}, merge.train(method), merge) for method in point.methods]
    ours, ema = rows.where(method=METHOD.name)[0], rows.where(method="EMA")[0]
    equal = max(1, round(ours["cost"]))
    for name, steps in ((EQUAL_STEPS, point.steps), (EQUAL_COST, equal)):
        rows.append(job.anneal({}, *point.place, steps, name))
    left = max(1, round(ours["cost"] - ema["cost"]))  # what an EMA's looks leave for steps
    on = trained_on(job, point, left)
    rows.append(on)
    if point.combine:
        rows += [annealed_ema(job, point, left), annealed_twa(job, point)]
    if point.spacing != point.usual.spacing:
        ema = job.fixed({}, job.merge(point.task, point.usual.candidates(), 1), "EMA")
    ours["fall"] = ema["val"] - on["val"]
    ours["pace"] = None if start.gain is None else start.gain * ours["cost"]
    best = rows.chosen(*FIXED.values())[0]
    ours["noise"] = rows.where(method="last")[0]["val"] - best["val"]
    for row in rows:
        row["looks"], row["cost"] = row["looks"] * point.unit, row["cost"] * point.unit
        row["stopped"] = point.stop
    return rows


def trained_on(job: Job, point: Point, steps: int) -> dict:
    """The run goes on as it was to go on, and its EMA is taken, of candidates as far apart as the
    base point's.

    A run with a schedule does for as many steps as come nearest, and no further than to its end.
    """
    run, stop, spacing = point.run, point.stop, point.usual.spacing
    if run.plan.schedule == "constant":
        last = min(N, steps // spacing) * spacing  # those that leave checkpoints
        after, at, name = [], (run, stop), f"{run.folder.name}-on-{stop}"
        for length, every in ((steps - last, steps - last), (last, spacing)):
            if length:
                plan = replace(run.plan, steps=length, every=every, warmup=0)
                name = f"{name}-{length}"
                made = job.run(point.workload, f"{name}-{every}", point.task, plan, start=at)
                after, at = [*after, made], (made, made.last)
        candidates = point.usual.candidates(after)
    else:
        every = run.plan.every
        end = min(run.last, round((stop + steps) / every) * every)
        steps, candidates = end - stop, replace(point, stop=end).candidates()
    found = job.fixed({}, job.merge(point.task, candidates, 1), "EMA", ON)
    return found | {"steps": steps, "cost": steps + found["cost"]}


def annealed_ema(job: Job, point: Point, steps: int) -> dict:
    """Annealing for at most as many steps, and the EMA of its checkpoints and those before it."""
    made = branch(job, point, steps)
    merge, steps = job.merge(point.task, point.candidates([made]), 1), made.plan.steps
    found = job.fixed({}, merge, "EMA", EMA_AFTER)
    return found | {"steps": steps, "cost": steps + found["cost"]}


def annealed_twa(job: Job, point: Point) -> dict:
    """Annealing for half of the steps, and a trained average for the other half, of the branch's
    checkpoints and all candidates.
    """
    made = branch(job, point, point.steps // 2)
    candidates = point.candidates([made], N + BRANCH)
    merge = job.merge(point.task, candidates, max(1, point.steps - made.plan.steps))
    merge.start()
    row, more = job.row({}, merge.train(METHOD), merge, TWA_AFTER), made.plan.steps
    return row | {"steps": row["steps"] + more, "cost": row["cost"] + more}


def branch(job: Job, point: Point, steps: int) -> Run:
    """An annealed branch with some checkpoints, of at most so many steps."""
    run, every = point.run, max(1, steps // BRANCH)
    plan = run.falling(point.stop, BRANCH * every, every)
    name = f"{run.folder.name}-branch-{point.stop}-{plan.steps}"
    return job.run(point.workload, name, point.task, plan, start=(run, point.stop))


# What is shown -----------------------------------------------------------------------------------


def findings(rows: Rows) -> list[str]:
    """What the trained average gains on each rival, column by column; where the border is; what
    goes along with it; what the combination gains.
    """
    found = [
        "gains are theirs less ours, seed by seed, with the standard error of their mean; clear"
        " where an interval of 95 % (Student's t) leaves out zero. Costs are in steps of a batch of"
        f" {BATCH}. Training on does not go beyond the end of a schedule"
    ]
    for task in rows.of("task"):
        mine = rows.where(task=task)
        for name, methods in RIVALS.items():
            text = "; ".join(
                f"{s} {said(gain(mine.where(setting=s), methods))}" for s in mine.of("setting")
            )
            found.append(f"{task}: gain of {METHOD.name} over {name}: {text}")
    found += [border(rows, name) for name in RIVALS if "annealing" in name]
    found += decides(rows)
    both = rows.where(point=tuple(rows.where(method=EMA_AFTER).of("point")))
    for ours in (EMA_AFTER, TWA_AFTER):
        for name in (METHOD.name, "annealing, equal cost", "training on, then EMA"):
            methods = RIVALS.get(name, (name,))
            text = "; ".join(f"{s} {said(gain(one, methods, ours))}" for s, one in each(both))
            found.append(f"gain of {ours}, over {name}: {text}")
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


def border(rows: Rows, name: str) -> str:
    """At which points a trained average is clearly ahead of a rival, at which behind."""
    sides: dict[str, list[str]] = {"ahead": [], "not told apart": [], "behind": []}
    for label, one in each(rows):
        d = gain(one, RIVALS[name])
        side = "ahead" if d.mean > 0 else "behind"
        sides[side if d.is_clear else "not told apart"].append(label)
    text = "; ".join(f"{side} at {', '.join(labels) or 'none'}" for side, labels in sides.items())
    return f"{METHOD.name} and {name}, of {len(each(rows))} points, by intervals of 95 %: {text}"


def ratio(rows: Rows) -> float:
    """What a fixed average gains at once, by what training on gains."""
    return rows.mean("noise") / max(1e-4, rows.mean("fall"))


#: what may decide, of a point's rows
MEASURES: dict[str, Callable[[Rows], float]] = {
    "what training on gains, for the cost of the average": lambda rows: rows.mean("fall"),
    "the same, as expected from the past": lambda rows: rows.mean("pace"),
    "what the best fixed average gains over the last candidate": lambda rows: rows.mean("noise"),
    "that by what training on gains": ratio,
}


def decides(rows: Rows) -> list[str]:
    """How the gain over annealing at equal cost goes with each factor, and, over all points, with
    what can be measured of the run.
    """
    methods, texts = RIVALS["annealing, equal cost"], []
    for task in rows.of("task"):
        mine = rows.where(task=task)
        gains = [gain(mine.where(x=x), methods).mean for x in mine.of("x")]
        texts.append(f"{task} {correlation(mine.of('x'), gains)}")
    head = "the gain over annealing at equal cost"
    found = [f"rank correlation of {head} with each factor: {'; '.join(texts)}"]
    ones = [one for _, one in each(rows) if one.of("pace")]
    gains = [gain(one, methods).mean for one in ones]
    for name, value in MEASURES.items():
        values = [value(one) for one in ones]
        ahead = [v for v, g in zip(values, gains, strict=True) if g > 0]
        behind = [v for v, g in zip(values, gains, strict=True) if g <= 0]
        found.append(
            f"{head} and, in validation loss, {name}: rank correlation"
            f" {correlation(values, gains)}; TWA ahead at {span(ahead)}; behind at {span(behind)}"
        )
    return found


def span(values: Sequence[float]) -> str:
    """How many there are, from where to where."""
    return f"{len(values)} points, {min(values):.2g} to {max(values):.2g}" if values else "none"


def correlation(x: Sequence[float], y: Sequence[float]) -> str:
    """Of the ranks; "-" where there is none."""
    if len(set(x)) < 3 or len(set(y)) < 3:
        return "-"
    ranks = [[sorted(values).index(v) for v in values] for values in (x, y)]
    return f"{statistics.correlation(*ranks):+.2f}"


def picture(figure, rows: Rows) -> None:
    """Gains against each factor, and against what may decide."""
    *panels, last = figure.subplots(2, 3, sharey=True).flat
    for axes, (task, label) in zip(panels, AXES.items(), strict=True):
        mine = rows.where(task=task)
        axes.set_visible(bool(mine))
        for k, methods in enumerate(RIVALS.values()):
            d = [gain(mine.where(x=x), methods) for x in mine.of("x")]
            mean, error = [v.mean for v in d], [v.error for v in d]
            axes.errorbar(mine.of("x"), mean, error, fmt="o-", color=f"C{k}", capsize=3)
        axes.set_xscale("log")
        axes.set_xticks(mine.of("x"), [short(x) for x in mine.of("x")])
        axes.set_xlabel(label)
        if task == LEFT_OF:
            axes.invert_xaxis()  # the end of the run is on the right, as in the panel before
    ones = [one for _, one in each(rows)]
    x = [max(RATIOS[0], ratio(one)) for one in ones]
    for k, (name, methods) in enumerate(RIVALS.items()):
        last.scatter(x, [gain(one, methods).mean for one in ones], color=f"C{k}", label=name)
    last.set_xscale("log")
    last.set_xticks(RATIOS, [f"{x:g}" for x in RATIOS])
    last.set_xlabel("what averaging gains / what training on gains\n(validation loss, all points)")
    for axes in (*panels, last):
        axes.axhline(0, color="0.6", linewidth=1)
        axes.set_yscale("symlog", linthresh=LINEAR)
        axes.set_yticks(TICKS, [f"{y:g}" for y in TICKS])
        axes.minorticks_off()
    for axes in (panels[0], panels[3]):
        axes.set_ylabel("gain of TWA in test loss")
    figure.legend(loc="outside lower center", ncols=len(RIVALS), title="TWA against")
