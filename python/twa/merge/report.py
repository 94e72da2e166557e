"""What is shown of the main job's result: a table, a Markdown page and a picture."""

from __future__ import annotations

import io
import itertools
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from twa_kernels.machine import processor

from ..io.tables import in_code, markdown_table
from ..tasks.contract import Task
from .advice import advice
from .results import Result, fixed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .outcome import Outcome

AVERAGED_BN = "val loss, BatchNorm averaged"

#: what the page says of the table
REMARKS = (
    "- `averaged.safetensors` holds the winner, `coefficients.json` the merge weights.\n"
    "- Every choice (the start, TWA's stopping point, the winner) was made on the validation data;"
    " the test data only fills its column.\n"
    "- start: the fixed average that trained averages start from, which its note names.\n"
    "- steps: gradient steps beyond the candidates' own training. looks: what evaluations on the"
    " validation data took, in such steps. seconds: wall time to build and choose, without the"
    " test. Those of the start come on top of a trained average's. peak MB: highest resident memory"
    " of the whole process while the method ran."
)
GPU_REMARK = "- GPU peak MB: the most that PyTorch had allocated on a rank's GPU meanwhile."
COMPARED_REMARK = (
    "- The other fixed averages are there to compare with. What each chooses (best single, EMA"
    " decay, LAWA length, soup members) it chose on all of the validation data. A loss that"
    " another had measured counts in its looks as if it had been measured again."
)
AVERAGED_BN_REMARK = (
    f"- {AVERAGED_BN}: the same weights with the candidates' BatchNorm statistics averaged (a"
    " trained average: those of the average it starts from). Everything else is measured, and"
    " exported, with statistics re-estimated on training data."
)


def table_rows(results: list[Result], task: Task) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the result table."""
    header = ["method", "candidates", "steps", "looks", "seconds", "peak MB", "val loss"]
    on_gpu = any(r.device_memory for r in results)
    if on_gpu:
        header.insert(-1, "GPU peak MB")
    both = any(r.averaged_bn_loss is not None for r in results)
    if both:
        header.append(AVERAGED_BN)
    if task.test is not None:
        header.append("test loss")
        if task.metric is not None:
            header.append(f"test {task.metric_name}")
    header.append("note")
    rows = []
    for r in results:
        row = [r.method, str(r.candidates), str(r.steps), f"{r.looks:.1f}", f"{r.seconds:.1f}"]
        row.append(f"{r.memory / 1e6:.0f}")
        if on_gpu:
            row.append(f"{r.device_memory / 1e6:.0f}")
        row.append(f"{r.val_loss:.4f}")
        if both:
            row.append("" if r.averaged_bn_loss is None else f"{r.averaged_bn_loss:.4f}")
        if r.test_loss is not None:
            row.append(f"{r.test_loss:.4f}")
        if r.test_metric is not None:
            row.append(f"{r.test_metric:.4f}")
        rows.append([*row, r.note])
    return header, rows


def cost_line(cost: Mapping[str, float]) -> str:
    """What a run took in words, of `Outcome.cost`."""
    parts = [f"start {cost['start']:.1f}", f"steps {cost['steps']}", f"looks {cost['looks']:.1f}"]
    if cost["comparison"]:
        parts.append(f"comparison {cost['comparison']:.1f}")
    said = "cost in training steps (a batch that is only evaluated counts a third)"
    return f"{said}: {', '.join(parts)}"


def markdown(outcome: Outcome, task: Task, names: list[str], command: str) -> str:
    """The page report.md.

    Args:
        outcome: of the run
        task: names the test figures
        names: paths of the candidates, in order
        command: what was run
    """
    winner = outcome.winner
    note = f" ({winner.note})" if winner.note else ""
    said, remarks = advice(outcome.results), [REMARKS]
    if any(r.device_memory for r in outcome.results):
        remarks.append(GPU_REMARK)
    if len(fixed(outcome.results)) > 1:
        remarks.append(COMPARED_REMARK)
    if any(r.averaged_bn_loss is not None for r in outcome.results):
        remarks.append(AVERAGED_BN_REMARK)
    lines = [
        f"# Average for task {Path(task.name).stem}",
        "",
        markdown_table(*table_rows(outcome.results, task)),
        "",
        f"{cost_line(outcome.cost).capitalize()}.",
        "",
        f"Winner on the validation data: **{winner.method}**{note}, {winner.losses}.",
        "",
        *([f"{said[:1].upper()}{said[1:]}.", ""] if said else []),
        *remarks,
        "",
        "![loss curves, methods and merge weights](report.png)",
        "",
        "Candidates in the order used, oldest first:",
        "",
        *(f"{k}. {in_code(name)}" for k, name in enumerate(names, 1)),
        "",
        f"    {command}",
        "",
        f"torch {torch.__version__}, Python {platform.python_version()}, {processor()},"
        f" {torch.get_num_threads()} threads",
        "",
    ]
    return "\n".join(lines)


# Picture -----------------------------------------------------------------------------------------

FIXED, TRAINED, WINNER, OTHER = "0.72", "tab:blue", "tab:orange", "tab:green"
MOST_SEGMENTS = 4096  # that quantiles are taken of: evenly chosen ones if there are more


def picture(outcome: Outcome, task: Task) -> bytes:
    """The PNG report.png: losses of all methods, curves of the trained averages, merge weights."""
    from matplotlib.figure import Figure  # not pyplot, whose backend is the user's

    trained = [r for r in outcome.results if r.curve and r.is_average]
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=[1.25, 1, 1])
    _bars(axes[0], outcome, task)
    _curves(axes[1], outcome, trained)
    _weights(axes[2], outcome, trained)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _bars(axes: Axes, outcome: Outcome, task: Task) -> None:
    """Draws the loss of each method, with its number."""
    from matplotlib.patches import Patch

    results = outcome.results
    losses = [r.test_loss if r.test_loss is not None else r.val_loss for r in results]
    # A uniform average far off would flatten the rest: such bars run out of the picture, their
    # number does not.
    ordered = sorted(v for v in losses if math.isfinite(v))
    low, typical = ordered[0], ordered[len(ordered) // 2]
    high = max(v for v in ordered if v <= typical + 4 * (typical - low) + 1e-9)
    span = (high - low) or abs(high) or 1.0
    shown = [min(v, high + span) if math.isfinite(v) else high + span for v in losses]
    axes.barh(range(len(results)), shown, color=[_colour(r, outcome) for r in results])
    axes.set_xlim(low - 0.4 * span, high + 0.35 * span)
    for k, v in enumerate(losses):
        if v <= high:
            axes.text(v, k, f" {v:.4f}", va="center")
        else:
            axes.text(high, k, f" {v:.4f} (cut)", va="center", backgroundcolor="white")
    axes.set_yticks(range(len(results)), [r.method for r in results])
    axes.invert_yaxis()
    which = "Test" if task.test is not None else "Validation"
    axes.set_title(f"{which} loss (the axis does not start at 0)")
    names = {WINNER: "best on validation", TRAINED: "trained average", FIXED: "fixed average"}
    names |= {OTHER: "no average"}
    used = {_colour(r, outcome) for r in results}
    patches = [Patch(color=colour, label=name) for colour, name in names.items() if colour in used]
    axes.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.4, -0.06), ncols=4)


def _colour(result: Result, outcome: Outcome) -> str:
    """The colour of a method's bar."""
    if result is outcome.winner:
        return WINNER
    if not result.is_average:
        return OTHER
    return TRAINED if result.curve else FIXED


def _curves(axes: Axes, outcome: Outcome, trained: list[Result]) -> None:
    """Draws the validation loss at each look."""
    axes.set_title("Validation loss while coefficients train")
    axes.set_xlabel("gradient step")
    if not trained:
        text = "no trained average in this run"
        axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
        return
    others = itertools.cycle((TRAINED, "tab:purple", "tab:cyan", "tab:brown", "tab:pink"))
    for r in trained:
        steps, losses = zip(*r.val_curve, strict=True)
        colour = WINNER if r is outcome.winner else next(others)
        axes.plot(steps, losses, marker="o", markersize=4, color=colour, label=r.method)
    axes.legend(frameon=False)


def _weights(axes: Axes, outcome: Outcome, trained: list[Result]) -> None:
    """Draws the merge weight of each candidate.

    It is that of the start; and of the best trained average, the mean of its segments, and where
    four of five of them are.
    """
    axes.set_title("Merge weight of each candidate")
    axes.set_xlabel("candidate (in order)")
    axes.axhline(0, color="0.85", linewidth=1)
    start = fixed(outcome.results)[-1]
    if start.beta is not None:
        at = range(1, len(start.beta) + 1)
        axes.step(at, start.beta, where="mid", color="0.5", label=start.method)
    if trained:
        shown = min(trained, key=lambda r: r.val_loss)
        beta = shown.beta
        if beta is None:
            beta = torch.zeros(1, 1, dtype=torch.float32, device="cpu")
        beta = beta[:, :: -(-beta.shape[1] // MOST_SEGMENTS)]
        at = range(1, len(beta) + 1)
        ends = torch.tensor([0.1, 0.9], dtype=beta.dtype, device="cpu")
        low, high = beta.quantile(ends, dim=1)
        axes.plot(at, beta.mean(1), color=WINNER, label=f"{shown.method}, mean of segments")
        label = "four of five segments"
        axes.fill_between(at, low, high, color=WINNER, alpha=0.25, linewidth=0, label=label)
    axes.legend(frameon=False)
