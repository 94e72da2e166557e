"""Beyond the paper: what Li et al. (arXiv 2205.13104v4) leave to future work, tried at small scale.

LoRA              adapters averaged, as factors and multiplied into the weights (lora.py)
bfloat16, int8    a run whose weights have few bits, averaged
unlabelled        merge weights trained on images without labels (unlabelled.py)
warm start        what a trained average starts from
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from twa import averages
from twa.merge.baselines import EMA_DECAYS, lawa_lengths
from twa.merge.results import Result
from twa.merge.run import Merge
from twa.merge.settings import TwaMethod
from twa.tasks.contract import Task

from .job import Job
from .lora import SOUPS, lora
from .rows import Rows
from .runs import Plan, measured, round_to_grid
from .unlabelled import LONG, UNLABELLED, unlabelled
from .workloads import Workload

TITLE = "Beyond the paper: LoRA, weights of few bits, no labels, warm starts"
CLAIM = (
    "Left to future work: TWA where others average today (adapters, low precision), without labels,"
    " and from better starts."
)
METRIC = "accuracy"
FIGURE = (16, 10)
DEFAULT = TwaMethod("t", "fine", 4)
CANDIDATES = 32  # of a run, at most: the last ones
STORED: dict[str, dict[str, object]] = {
    "float32 weights": {},
    "bfloat16 weights": {"dtype": "bfloat16"},
    "int8 weights": {"grid": 8},
}
# WSM of a linear decay is LAWA
STARTS = ("last", "uniform", "EMA", "LAWA", "WSM, 1-sqrt", "greedy soup")
PANELS = {
    "LoRA": ("LoRA", "LoRA, merged"),
    "weights of few bits": tuple(STORED),
    "no labels": ("unlabelled",),
    "warm start": ("warm start",),
}


def run(job: Job) -> Rows:
    (workload,) = job.workloads("gpt")
    if job.data is not None:
        return Rows(stored(job, workload) + warm_start(job, workload))
    (images,) = job.workloads("vit")
    rows = lora(job, workload) + stored(job, workload)
    return Rows(rows + unlabelled(job, images) + warm_start(job, workload))


# Weights of few bits -----------------------------------------------------------------------------


def stored(job: Job, workload: Workload) -> Rows:
    """Rows of half of the usual run at a constant rate, with weights in float32, bfloat16 or on a
    grid of 8 bits after every step.

    Averages of bfloat16 files are in bfloat16, as `twa average` exports them; those of the grid are
    in float32, or rounded to it again.
    """
    task, rows = job.task(workload), Rows()
    for setting, kind in STORED.items():
        plan = replace(workload.usual, steps=half_of(workload.usual), schedule="constant", **kind)
        name, data = "constant-" + setting.split()[0], of_dtype(task, getattr(torch, plan.dtype))
        candidates = job.run(workload, name, data, plan).candidates(count=CANDIDATES)
        merge = job.merge(task, candidates, workload.twa_steps)
        n, where = len(candidates), {"task": workload.label, "setting": setting}
        options = {
            "last": [(averages.candidate(n, -1), "")],
            "uniform": [(averages.uniform(n), "")],
            "EMA": [(averages.ema(n, d), f"decay {d}") for d in EMA_DECAYS],
            "LAWA": [(averages.lawa(n, k), f"last {k}") for k in lawa_lengths(n)],
        }
        for name, betas in options.items():
            result = chosen(merge, name, betas)
            rows += stored_rows(job, where, task, result, merge, plan.grid)
        best = min(merge.results, key=lambda r: r.val_loss)
        result = merge.train(DEFAULT, start=best.beta, start_name=best.method)
        rows += stored_rows(job, where, task, result, merge, plan.grid, best.looks)
    return rows


def stored_rows(
    job: Job, where: dict, task: Task, result: Result, merge: Merge, grid: int, start: float = 0.0
) -> list[dict]:
    """The result that the model is at; and the same rounded, if it is an average of weights on a
    grid.

    Args:
        start: looks that chose where a trained average starts
    """
    row = job.row(where, result, merge, start=start)
    if not grid or result.method == "last":
        return [row]
    round_to_grid(merge.model, grid)
    merge.evaluator.settle()
    rounded = {"method": f"{result.method}, rounded to int{grid}"}
    return [row, row | rounded | measured(task, merge.model)]


def half_of(plan: Plan) -> int:
    """Half of a plan's steps, with a checkpoint after the last."""
    return max(1, plan.steps // 2 // plan.every) * plan.every


def of_dtype(task: Task, dtype: torch.dtype) -> Task:
    """The same for a model of this dtype: so are floats in its batches."""

    def cast(batch: object) -> object:
        if isinstance(batch, Tensor):
            return batch.to(dtype) if batch.is_floating_point() else batch
        return type(batch)(map(cast, batch)) if isinstance(batch, list | tuple) else batch

    return replace(task, loss=lambda model, batch: task.loss(model, cast(batch)))


# Warm start --------------------------------------------------------------------------------------


def warm_start(job: Job, workload: Workload) -> Rows:
    """Rows of the same training from different fixed averages of the first half of the usual
    run.
    """
    task = job.task(workload)
    usual = job.usual(workload, task)
    candidates = usual.candidates(until=half_of(workload.usual), count=CANDIDATES)
    merge, n = job.merge(task, candidates, workload.twa_steps), len(candidates)
    merge.baselines()
    wsm = [(averages.wsm(n, k, "sqrt"), f"last {k}") for k in lawa_lengths(n)]
    chosen(merge, "WSM, 1-sqrt", wsm)
    where, rows = {"task": workload.label, "setting": "warm start"}, Rows()
    for start in [r for r in merge.results if r.method in STARTS]:
        result = merge.train(DEFAULT, start=start.beta, start_name=f"{start.method} {start.note}")
        name = "LAWA (WSM, linear)" if start.method == "LAWA" else start.method
        rows.append(job.row(where, start, merge, name))
        rows.append(job.row(where, result, merge, f"TWA from {name}", start=start.looks))
    return rows


def chosen(merge: Merge, name: str, options: Sequence[tuple[Tensor, str]]) -> Result:
    """Of some (merge weights, note) the fixed average with the lowest validation loss, added to the
    results; the model is at it.
    """
    merge.evaluator.cost = 0.0
    losses = [merge.evaluator.at(beta) for beta, _ in options]
    looks = merge.evaluator.cost
    loss, (beta, note) = min(zip(losses, options, strict=True), key=lambda pair: pair[0])
    merge.evaluator.load(beta)
    members = int((beta != 0).sum())
    result = Result(name, members, 0, 0.0, 0, loss, note=note, beta=beta)
    result.looks = looks
    result.test_loss, result.test_metric = merge.evaluator.test()
    merge.results.append(result)
    return result


# What is shown -----------------------------------------------------------------------------------


def findings(rows: Rows) -> list[str]:
    found = []
    for task in rows.of("task"):
        mine = rows.where(task=task)
        for setting in mine.of("setting"):
            part = mine.where(setting=setting)
            if setting.startswith("LoRA"):
                found.append(f"{setting}: {_lora(part, mine)}")
            elif setting in STORED:
                found.append(f"{task}, {setting}: {_stored(part, mine)}")
            elif setting == "unlabelled":
                found += [f"{task}, {setting}: {text}" for text in _unlabelled(part)]
            else:
                found.append(f"{task}, {setting}: {_warm(part)}")
    if not any(setting in ("LoRA", "unlabelled") for setting in rows.of("setting")):
        found.append(
            "LoRA and unlabelled: left out, they need the built-in data (run without --data)"
        )
    return found


def _best(rows: Rows, names: Iterable[str]) -> str:
    """Of these methods the one with the lowest mean test loss."""
    return min((n for n in names if rows.where(method=n)), key=lambda n: rows.mean(method=n))


def _trained(rows: Rows) -> list[str]:
    return [m for m in rows.of("method") if m.startswith("TWA")]


def _listed(rows: Rows, names: Iterable[str]) -> str:
    return ", ".join(
        f"{name} {rows.mean(method=name):.4f}" for name in names if rows.where(method=name)
    )


def _against(rows: Rows, ours: str, theirs: str) -> str:
    return f"{ours} against {theirs}: {rows.against({'method': ours}, {'method': theirs})}"


def _lora(rows: Rows, all_rows: Rows) -> str:
    twa, fixed, longer = _best(rows, _trained(rows)), _best(rows, SOUPS), "best single, trained on"
    text = (
        f"test loss of {_listed(rows, ('pretrained', *SOUPS, longer, twa))};"
        f" {_against(rows, twa, fixed)}"
    )
    return (
        f"{text}; against {longer}:"
        f" {all_rows.against({'method': twa, 'setting': rows[0]['setting']}, {'method': longer})}"
    )


def _stored(rows: Rows, all_rows: Rows) -> str:
    (twa, *rounded), fixed = _trained(rows), _best(rows, ("uniform", "EMA", "LAWA"))
    text = f"test loss of {_listed(rows, ('last', fixed, twa))}; {_against(rows, twa, fixed)}"
    if rounded:
        best = _best(rows, [m for m in rows.of("method") if "rounded" in m])
        text += (
            f"; rounded to the grid again, the best is {_listed(rows, [best])};"
            f" {_against(rows, best, 'last')}"
        )
    whole = all_rows.where(setting="float32 weights")
    if not whole or rows[0]["setting"] == "float32 weights":
        return text
    lost = ", ".join(
        f"{rows.mean(method=m) - whole.mean(method=m):+.4f} {m}" for m in ("last", fixed, twa)
    )
    return f"{text}; against float32 weights, same method: {lost}"


def _unlabelled(rows: Rows) -> list[str]:
    found = [
        f"test loss of {_listed(rows, [m for m in rows.of('method') if not m.startswith('TWA')])}"
    ]
    for label, (*_, names) in UNLABELLED.items():
        found.append(
            "; ".join(_against(rows, f"TWA-v {label}, {name}", "uniform") for name in names)
        )
    before, after = (
        [rows.mean(key, method=m) for key in ("entropy", "share", "metric")]
        for m in ("uniform", f"TWA-v {LONG}, entropy")
    )
    said = (
        "entropy of the predictions {:.3f} nats, after {} {:.3f}; share of the most frequent class"
        " {:.1%} and {:.1%}, accuracy {:.1%} and {:.1%}"
    )
    found.append(
        said.format(
            before[0], f"TWA-v {LONG}, entropy", after[0], before[1], after[1], before[2], after[2]
        )
    )
    return found


def _warm(rows: Rows) -> str:
    def apart(names: list[str]) -> tuple[str, str, str]:
        first, *_, last = sorted(names, key=lambda m: rows.mean(method=m))
        low, high = rows.mean(method=first), rows.mean(method=last)
        return (
            first,
            last,
            f"{high - low:.4f} apart, from {low:.4f} ({first}) to {high:.4f} ({last})",
        )

    trained = _trained(rows)
    best, worst, after = apart(trained)
    *_, before = apart([m.removeprefix("TWA from ") for m in trained])
    return (
        f"starts are {before}; after TWA {after}; {_against(rows, best, worst)};"
        f" {_against(rows, best, 'TWA from LAWA (WSM, linear)')}"
    )


def picture(figure, rows: Rows) -> None:
    """Test loss of every method; a panel for each part."""
    panels = {title: settings for title, settings in PANELS.items() if rows.where(setting=settings)}
    columns = min(2, len(panels))
    for k, (title, settings) in enumerate(panels.items()):
        axes = figure.add_subplot(-(-len(panels) // columns), columns, k + 1)
        groups = [(s, m) for s in settings for m in rows.where(setting=s).of("method")]
        means = [rows.mean(setting=s, method=m) for s, m in groups]
        colours = ["tab:blue" if m.startswith("TWA") else "0.7" for _, m in groups]
        axes.barh(
            range(len(groups)),
            means,
            xerr=[rows.spread(setting=s, method=m) for s, m in groups],
            color=colours,
            ecolor="0.3",
        )
        labels = [
            (m if len(settings) == 1 else f"{s.removesuffix(' weights')}: {m}").replace(
                ", 4 bits", ""
            )
            for s, m in groups
        ]
        axes.set_yticks(range(len(groups)), labels, fontsize=8)
        low, high = min(means), max(means)
        # differences are small: bars do not start at 0
        axes.set_xlim(max(0.0, low - 0.2 * (high - low) - 1e-3), high + 0.1 * (high - low) + 1e-3)
        axes.invert_yaxis()
        axes.set_xlabel("test loss")
        axes.set_title(title)
