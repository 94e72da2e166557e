"""TWA on training data (TWA-t) against TWA on held-out data (TWA-v): how much held-out data so many
coefficients need.

Li et al. leave open where TWA-v begins to overfit. Here the held-out set is varied from a handful
of windows on, the number of coefficients by the granularity, and with both: weight decay on the
coefficients, merge weights on the simplex, stopping at the best look at the validation data.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from twa.merge.run import Average
from twa.merge.settings import TwaMethod

from .job import Job
from .rows import Rows
from .runs import measured

TITLE = "TWA on training data or on held-out data: the overfitting boundary"
CLAIM = (
    "Open in the paper: how TWA-v depends on the size of the held-out set and the number of"
    " coefficients."
)
METRIC = "accuracy"
PIVOT = True  # a column per setting
FIGURE = (16, 5)
PART = 0.5  # of the usual run
CANDIDATES = 32
GRANULARITIES = ("model", "tensor", "fine")
SIZES = (16, 64, 256, 1024, 4096)  # samples of held-out data: windows of 64 characters
BATCH = 16  # at most, of held-out samples a step
VARIANTS = {
    "plain": ({}, ""),
    "weight decay": ({"weight_decay": 2.0}, ""),
    "simplex": ({}, ":simplex"),
}
ALL = "training data"


def run(job: Job) -> Rows:
    rows = Rows()
    (workload,) = job.workloads("gpt")
    task = job.task(workload)
    usual = job.usual(workload, task)
    stop = usual.plan.nearest(PART)
    candidates = usual.candidates(until=stop, count=CANDIDATES)
    start = job.average(task, candidates, 1)
    start.baselines()
    best = min(start.results, key=lambda r: r.val_loss)
    label = {"task": workload.label}
    rows.append(
        job.row(
            label | {"setting": "start", "windows": 0, "coefficients": 0, "variant": ""},
            task,
            best,
            start,
            "best fixed average",
        )
    )
    batches = list(task.heldout)
    total = sum(len(_first(b)) for b in batches)
    sizes = SIZES[::2] if job.scale == "quick" else SIZES
    for size in [s for s in sizes if s <= total] + [None]:
        data = task if size is None else replace(task, heldout=first_samples(batches, size))
        setting = ALL if size is None else f"{size} held-out"
        for granularity in GRANULARITIES:
            for variant, (settings, option) in VARIANTS.items():
                if size is None and variant != "plain":
                    continue
                method = TwaMethod.parse(f"{'t' if size is None else 'v'}:{granularity}:4{option}")
                average = job.average(data, candidates, workload.twa_steps, **settings)
                where = label | {
                    "setting": setting,
                    "windows": size,
                    "variant": variant,
                    "granularity": granularity,
                }
                rows += trained(job, where, average, method, best.beta)
    return rows


def trained(job: Job, where: dict, average: Average, method: TwaMethod, start: Tensor) -> Rows:
    """Two rows of one training: its last coefficients, and those at its best look at the validation
    data.
    """
    looks: list[dict] = []
    result = average.train(
        method,
        start=start,
        start_name="start",
        keep="last",
        on_look=lambda step: looks.append({"step": step} | measured(average.task, average.model)),
    )
    count = len(result.coefficients["x"]) * len(result.coefficients["segments"])
    name = f"{method.name.split(',')[0]}, {where['variant']}"
    found = Rows()
    for text, look in (
        ("last", looks[-1]),
        ("early stopping", min(looks, key=lambda look: look["val"])),
    ):
        row = job.row(
            where | {"coefficients": count, "stop": text},
            average.task,
            result,
            average,
            f"{name}, {text}",
        )
        found.append(
            row
            | {"steps": look["step"], "val": look["val"], "test": look["test"]}
            | ({"metric": look["metric"]} if "metric" in look else {})
        )
    return found


def _first(batch: object) -> Tensor:
    return batch if hasattr(batch, "shape") else batch[0]


def first_samples(batches: list, size: int) -> list:
    """`size` samples of these batches, evenly spread over them, in batches of at most BATCH."""
    parts = [b if isinstance(b, list | tuple) else [b] for b in batches]
    columns = [torch.cat(list(column)) for column in zip(*parts, strict=True)]
    at = torch.linspace(0, len(columns[0]) - 1, size).round().long()
    pieces = [[c[rows] for c in columns] for rows in at.split(BATCH)]
    return [p[0] if hasattr(batches[0], "shape") else p for p in pieces]


def findings(rows: Rows) -> list[str]:
    """Per granularity: from how much held-out data on TWA-v helps; and what each regularisation
    changes.
    """
    found = []
    start = rows.mean(setting="start")
    sizes = [s for s in rows.of("windows") if s]
    for granularity in GRANULARITIES:
        plain = {"granularity": granularity, "variant": "plain", "stop": "last"}
        enough = next((s for s in sizes if rows.mean(windows=s, **plain) < start), None)
        text = (
            f"with {enough} samples or more it is below its start ({start:.4f})"
            if enough
            else f"it is never below its start ({start:.4f})"
        )
        end = (
            f"TWA-v with all {sizes[-1]} {rows.mean(windows=sizes[-1], **plain):.4f}, TWA-t"
            f" {rows.mean(setting=ALL, **plain):.4f}"
        )
        found.append(
            f"{granularity}, {rows.mean('coefficients', **plain):.0f} coefficients, no"
            f" regularisation: {text}; {end}"
        )
    for stop, variant in (
        ("early stopping", "plain"),
        ("last", "weight decay"),
        ("last", "simplex"),
    ):
        cells = [{"windows": s, "granularity": g} for s in sizes for g in GRANULARITIES]
        differences = [
            rows.mean(variant=variant, stop=stop, **c)
            - rows.mean(variant="plain", stop="last", **c)
            for c in cells
        ]
        lower = (
            f"lower test loss in {sum(d < 0 for d in differences)} of {len(cells)} cells, by up to"
            f" {-min(differences):.4f}"
        )
        found.append(
            f"{stop if variant == 'plain' else variant} instead of nothing: {lower}; at worst"
            f" {max(differences):+.4f}"
        )
    return found


def picture(figure, rows: Rows) -> None:
    """Test loss against the size of the held-out set, a panel per granularity."""
    start = rows.mean(setting="start")
    sizes = [s for s in rows.of("windows") if s]
    panels = figure.subplots(1, len(GRANULARITIES), sharey=True)
    for axes, granularity in zip(panels, GRANULARITIES, strict=True):
        count = rows.mean("coefficients", granularity=granularity)
        axes.axhline(start, color="0.6", linestyle=":", label="start: best fixed average")
        axes.axhline(
            rows.mean(setting=ALL, granularity=granularity, stop="last"), color="k", label="TWA-t"
        )
        for k, variant in enumerate(VARIANTS):
            for stop, style in (("last", "-"), ("early stopping", "--")):
                y = [
                    rows.mean(windows=s, granularity=granularity, variant=variant, stop=stop)
                    for s in sizes
                ]
                axes.plot(
                    sizes, y, style, marker="o", color=f"C{k}", label=f"TWA-v, {variant}, {stop}"
                )
        axes.set_xscale("log", base=2)
        axes.set_title(
            f"per {granularity}: {count:.0f} coefficients"
            if granularity != "fine"
            else f"fine: {count:.0f} coefficients"
        )
        axes.set_xlabel("held-out samples")
    ts = [rows.mean(setting=ALL, granularity=g, stop="last") for g in GRANULARITIES]
    low, high = min(ts), start
    panels[0].set_ylim(low - 0.3 * (high - low), high + 2.0 * (high - low))
    panels[0].set_ylabel("test loss (above the frame: not shown)")
    panels[0].legend(fontsize=7)
