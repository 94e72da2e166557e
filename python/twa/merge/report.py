"""The result as a table, a Markdown page and a picture."""

from __future__ import annotations

import io
import math
import platform
from pathlib import Path

import torch
from torch import Tensor

from ..distributed.weights import write_dcp, write_export
from ..export import hugging_face
from ..io.atomic import write_bytes, write_json, write_text
from ..tasks.contract import Task
from .settings import Outcome, Result

AVERAGED_BN = "val loss, BatchNorm averaged"
FILES = (
    "averaged.safetensors",
    "averaged_dcp",
    "coefficients.json",
    "report.md",
    "report.png",
    "results.json",
    *hugging_face.OUTPUTS,
)


def table_rows(results: list[Result], task: Task) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the result table."""
    header = ["method", "candidates", "extra steps", "seconds", "peak MB", "val loss"]
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
        row = [
            r.method,
            str(r.candidates),
            str(r.steps),
            f"{r.seconds:.1f}",
            f"{r.memory / 1e6:.0f}",
            f"{r.val_loss:.4f}",
        ]
        if both:
            row.append("" if r.averaged_bn_loss is None else f"{r.averaged_bn_loss:.4f}")
        if r.test_loss is not None:
            row.append(f"{r.test_loss:.4f}")
        if r.test_metric is not None:
            row.append(f"{r.test_metric:.4f}")
        rows.append([*row, r.note])
    return header, rows


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table that is as readable on a terminal as it is as Markdown: first and last column to the
    left, numbers to the right.
    """
    widths = [max(len(row[c]) for row in [header, *rows]) for c in range(len(header))]
    left = {0, len(header) - 1}

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(w) if c in left else cell.rjust(w)
            for c, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = (
        "|"
        + "|".join(
            "-" * (w + 2) if c in left else "-" * (w + 1) + ":" for c, w in enumerate(widths)
        )
        + "|"
    )
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def processor_name() -> str:
    from twa_kernels.__main__ import processor

    return processor()


def markdown(outcome: Outcome, task: Task, command: str) -> str:
    winner = outcome.winner
    note = f" ({winner.note})" if winner.note else ""
    both = [
        f"- {AVERAGED_BN}: the same weights with the candidates' BatchNorm statistics averaged (a"
        " trained average: those of the average it starts from). Everything else is measured, and"
        " exported, with statistics re-estimated on training data."
    ]
    both = both if any(r.averaged_bn_loss is not None for r in outcome.results) else []
    lines = [
        f"# Average for task {Path(task.name).stem}",
        "",
        markdown_table(*table_rows(outcome.results, task)),
        "",
        f"Winner on the validation data: **{winner.method}**{note}, validation loss"
        f" {winner.val_loss:.6f}"
        + (f", test loss {winner.test_loss:.6f}." if winner.test_loss is not None else "."),
        "",
        "- `averaged.safetensors` holds the winner, `coefficients.json` the merge weights.",
        (
            "- Every choice (best single, EMA decay, LAWA length, soup members, TWA's stopping"
            " point, the winner) was made on the validation data; the test data only fills its"
            " column."
        ),
        (
            "- extra steps: gradient steps beyond the candidates' own training. seconds: wall time"
            " to build and choose, without the test. A trained average starts from the best fixed"
            " one, named in its note, whose seconds come on top. peak MB: highest resident memory"
            " of the whole process while the method ran."
        ),
        *both,
        "",
        "![loss curves, methods and merge weights](report.png)",
        "",
        f"    {command}",
        "",
        (
            f"torch {torch.__version__}, Python {platform.python_version()}, {processor_name()},"
            f" {torch.get_num_threads()} threads"
        ),
        "",
    ]
    return "\n".join(lines)


def picture(outcome: Outcome, task: Task) -> bytes:
    """PNG: loss curves; loss per method; merge weights of the best trained average."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trained = [r for r in outcome.results if r.curve and r.is_average]
    shown = min(trained, key=lambda r: r.val_loss) if trained else outcome.winner
    figure, axes = plt.subplots(
        1, 3, figsize=(20, 7), width_ratios=[1.0, 1.1, 1.2], layout="constrained"
    )
    _curves(axes[0], trained)
    _bars(axes[1], outcome, task)
    _heat_map(figure, axes[2], shown, outcome)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    return buffer.getvalue()


def _curves(axes, trained: list[Result]) -> None:
    axes.set_title("Validation loss while the coefficients train")
    axes.set_xlabel("gradient step")
    axes.set_ylabel("loss")
    if not trained:
        axes.text(
            0.5,
            0.5,
            "no trained average in this run",
            ha="center",
            va="center",
            transform=axes.transAxes,
        )
        return
    for k, r in enumerate(trained):
        style = dict(color=f"C{k % 10}", linestyle="--" if "float32" in r.method else "-")
        axes.plot(
            *zip(*r.val_curve, strict=True), marker="o", markersize=4, label=r.method, **style
        )
    best = min(trained, key=lambda r: r.val_loss)
    window = min(25, len(best.curve))
    means = [sum(best.curve[k - window : k]) / window for k in range(window, len(best.curve) + 1)]
    axes.plot(
        range(window, len(best.curve) + 1),
        means,
        color="0.6",
        linewidth=1,
        label=f"training loss of the best (mean of {window})",
        zorder=0,
    )
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)


def _bars(axes, outcome: Outcome, task: Task) -> None:
    results = outcome.results
    which = "test" if task.test is not None else "validation"
    losses = [r.test_loss if r.test_loss is not None else r.val_loss for r in results]
    colours = [
        (
            "tab:orange"
            if r is outcome.winner
            else "tab:blue"
            if r.curve and r.is_average
            else "0.7"
            if r.is_average
            else "tab:green"
        )
        for r in results
    ]
    positions = range(len(results))
    # A uniform average far off would flatten the rest: such bars run out of the picture, their
    # number does not.
    ordered = sorted(v for v in losses if math.isfinite(v))
    low, typical = ordered[0], ordered[len(ordered) // 2]
    high = max(v for v in ordered if v <= typical + 4 * (typical - low) + 1e-9)
    span = (high - low) or abs(high) or 1.0
    axes.barh(positions, [v if math.isfinite(v) else high + span for v in losses], color=colours)
    axes.set_xlim(low - 0.25 * span, high + 0.3 * span)
    for p, v in zip(positions, losses, strict=True):
        shown = v <= high
        axes.text(
            (v if shown else high) + 0.02 * span,
            p,
            f"{v:.4f}" + ("" if shown else " (cut)"),
            va="center",
            fontsize=9,
            backgroundcolor="white",
        )
    axes.set_yticks(list(positions), [r.method for r in results], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel(f"{which} loss (axis does not start at 0)")
    axes.set_title(
        "Orange: best on validation, blue: trained, grey: fixed"
        + (", green: no average" if any(not r.is_average for r in results) else "")
    )


def _heat_map(figure, axes, shown: Result, outcome: Outcome) -> None:
    beta = shown.beta if shown.beta is not None else torch.zeros(1, 1)
    beta = beta[:, None] if beta.dim() == 1 else beta  # (n, L)
    labels = shown.coefficients["segments"] if shown.coefficients else ["model"]
    limit = float(beta.abs().max()) or 1.0
    image = axes.imshow(
        beta.T.numpy(),
        aspect="auto",
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        interpolation="nearest",
    )
    axes.set_title(f"Merge weights of {shown.method}")
    axes.set_xlabel("candidate (in order)")
    axes.set_ylabel("segment")
    step = -(-len(labels) // 45)
    axes.set_yticks(range(0, len(labels), step), labels[::step], fontsize=7)
    figure.colorbar(image, ax=axes, label="weight (each segment's sum to 1)", shrink=0.8)


def coefficients(outcome: Outcome, names: list[str]) -> dict:
    """x and merge weights of the winner; a classical average has merge weights only."""
    winner = outcome.winner
    if winner.coefficients is not None:
        return winner.coefficients | {"method": winner.method}
    beta: Tensor = winner.beta if winner.beta is not None else torch.ones(1)
    return {
        "format": "twa-coefficients-1",
        "method": winner.method,
        "candidates": names,
        "segments": ["model"],
        "beta": [[b] for b in beta.tolist()],
    }


def write_outputs(
    folder: Path,
    outcome: Outcome,
    task: Task,
    names: list[str],
    command: str,
    sharded: bool = False,
) -> list[str]:
    """averaged.safetensors (sharded: and averaged_dcp/), coefficients.json, report.md, report.png
    and results.json, and what suits Hugging Face candidates; each appears whole. Returns what the
    caller has written, for messages. All ranks call it; the first writes."""
    # The result first: no fault in a picture may cost a model.
    write_export(folder / "averaged.safetensors", outcome.placement)
    if sharded:
        write_dcp(folder / "averaged_dcp", outcome.placement)
    if not outcome.placement.world.is_writer:
        return []
    chosen = coefficients(outcome, names)
    write_json(folder / "coefficients.json", chosen)
    beside = hugging_face.write_beside(folder, outcome.placement, chosen)
    header, rows = table_rows(outcome.results, task)
    write_json(folder / "results.json", [dict(zip(header, row, strict=True)) for row in rows])
    write_text(folder / "report.md", markdown(outcome, task, command))
    write_bytes(folder / "report.png", picture(outcome, task))
    first = ["averaged.safetensors", *(["averaged_dcp/"] if sharded else []), *beside]
    return [*first, "coefficients.json", "report.md", "report.png", "results.json"]
