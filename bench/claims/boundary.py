"""TWA on training data (TWA-t) against TWA on held-out data (TWA-v): how much held-out data so many
coefficients need.

Li et al. leave open where TWA-v begins to overfit. Here the held-out set is varied from a handful
of windows on, and the number of coefficients by the granularity; with both: weight decay on the
coefficients, merge weights on the simplex, stopping at the best look at the validation data.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from twa.merge.results import Result
from twa.merge.run import Merge
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
#: settings of the training, and the option of the method
VARIANTS = {
    "plain": ({}, ""),
    "weight decay": ({"weight_decay": 2.0}, ""),
    "simplex": ({}, ":simplex"),
}
ALL = "training data"


def run(job: Job) -> Rows:
    (workload,) = job.workloads("gpt")
    task = job.task(workload)
    usual = job.usual(workload, task)
    candidates = usual.candidates(until=usual.plan.nearest(PART), count=CANDIDATES)
    start = job.merge(task, candidates, 1)
    best = start.start()
    label = {"task": workload.label}
    where = label | {"setting": "start", "windows": 0, "coefficients": 0, "variant": ""}
    rows = Rows([job.row(where, best, start)])
    batches = list(task.heldout)
    total = sum(len(_first(b)) for b in batches)
    sizes = SIZES[::2] if job.scale == "quick" else SIZES
    for size in [s for s in sizes if s <= total] + [None]:
        data = task if size is None else replace(task, heldout=first_samples(batches, size))
        setting, kind = (ALL, "t") if size is None else (f"{size} held-out", "v")
        for granularity in GRANULARITIES:
            for variant, (settings, option) in VARIANTS.items():
                if size is None and variant != "plain":
                    continue
                method = TwaMethod.parse(f"{kind}:{granularity}:4{option}")
                merge = job.merge(data, candidates, workload.twa_steps, **settings)
                where = label | {"setting": setting, "windows": size}
                where |= {"variant": variant, "granularity": granularity}
                rows += trained(job, where, merge, method, best)
    return rows


def trained(job: Job, where: dict, merge: Merge, method: TwaMethod, start: Result) -> Rows:
    """Two rows of one training: its last coefficients, and those at its best look at the validation
    data.
    """
    looks: list[dict] = []

    def on_look(step: int) -> None:
        looks.append({"steps": step} | measured(merge.task, merge.model))

    options = {"start": start.beta, "start_name": start.method, "keep": "last"}
    options["coarsen"] = False
    result = merge.train(method, on_look=on_look, **options)
    count = len(result.coefficients["x"]) * len(result.coefficients["segments"])
    name = f"{method.name.split(',')[0]}, {where['variant']}"
    best = min(looks, key=lambda look: look["val"])
    found = Rows()
    for stop, look in (("last", looks[-1]), ("early stopping", best)):
        at = where | {"coefficients": count, "stop": stop}
        row = job.row(at, result, merge, f"{name}, {stop}", start=start.looks)
        found.append(row | look)
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


# What is shown -----------------------------------------------------------------------------------


def findings(rows: Rows) -> list[str]:
    """From how much held-out data on TWA-v helps, by granularity; and what each regularisation
    changes.
    """
    found = []
    start = rows.mean(setting="start")
    sizes = [s for s in rows.of("windows") if s]
    for granularity in GRANULARITIES:
        plain = rows.where(granularity=granularity, variant="plain", stop="last")
        enough = next((s for s in sizes if plain.mean(windows=s) < start), None)
        text = f"it is never below its start ({start:.4f})"
        if enough:
            text = f"with {enough} samples or more it is below its start ({start:.4f})"
        found.append(
            f"{granularity}, {plain.mean('coefficients'):.0f} coefficients, no regularisation:"
            f" {text}; TWA-v with all {sizes[-1]} {plain.mean(windows=sizes[-1]):.4f},"
            f" TWA-t {plain.mean(setting=ALL):.4f}"
        )
    plain = rows.where(variant="plain", stop="last")
    cells = [{"windows": s, "granularity": g} for s in sizes for g in GRANULARITIES]
    regularised = {
        "early stopping": {"variant": "plain", "stop": "early stopping"},
        "weight decay": {"variant": "weight decay", "stop": "last"},
        "simplex": {"variant": "simplex", "stop": "last"},
    }
    for name, wanted in regularised.items():
        other = rows.where(**wanted)
        differences = [other.mean(**c) - plain.mean(**c) for c in cells]
        lower = f"lower test loss in {sum(d < 0 for d in differences)} of {len(cells)} cells"
        found.append(
            f"{name} instead of nothing: {lower}, by up to {-min(differences):.4f}; at worst"
            f" {max(differences):+.4f}"
        )
    return found


def picture(figure, rows: Rows) -> None:
    """Test loss against the size of the held-out set, a panel per granularity."""
    start = rows.mean(setting="start")
    sizes = [s for s in rows.of("windows") if s]
    panels = figure.subplots(1, len(GRANULARITIES), sharey=True)
    for axes, granularity in zip(panels, GRANULARITIES, strict=True):
        mine = rows.where(granularity=granularity)
        axes.axhline(start, color="0.6", linestyle=":", label="start")
        axes.axhline(mine.mean(setting=ALL, stop="last"), color="k", label="TWA-t")
        for k, variant in enumerate(VARIANTS):
            for stop, style in (("last", "-"), ("early stopping", "--")):
                one, label = mine.where(variant=variant, stop=stop), f"TWA-v, {variant}, {stop}"
                y = [one.mean(windows=s) for s in sizes]
                axes.plot(sizes, y, style, marker="o", color=f"C{k}", label=label)
        axes.set_xscale("log", base=2)
        name = "fine" if granularity == "fine" else f"per {granularity}"
        axes.set_title(f"{name}: {mine.mean('coefficients'):.0f} coefficients")
        axes.set_xlabel("held-out samples")
    ts = [rows.mean(setting=ALL, granularity=g, stop="last") for g in GRANULARITIES]
    low, high = min(ts), start
    panels[0].set_ylim(low - 0.3 * (high - low), high + 2.0 * (high - low))
    panels[0].set_ylabel("test loss (above the frame: not shown)")
    panels[0].legend(fontsize=7)
