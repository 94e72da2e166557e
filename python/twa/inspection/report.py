"""What `twa inspect` prints and writes: a table of files, findings, heat maps."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..io.atomic import write_bytes, write_json, write_text
from ..merge.report import markdown_table
from .samples import SEVERITIES, many

if TYPE_CHECKING:
    from .geometry import Geometry
    from .run import Barrier, Inspection, Row

FILES = ("inspect.md", "inspect.json", "inspect.png")
MOST_TICKS = 20  # candidates named along an axis
MOST_NUMBERS = 10  # candidates up to which a heat map's cells have their number
LABEL = 22  # characters


def check_folder(folder: Path) -> None:
    """Raises ValueError for something that is no directory."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a directory for the output, found a file")


def table(result: Inspection) -> tuple[list[str], list[list[str]]]:
    """Header and cells: one row per file."""
    header = ["candidate", "#", "format", "MB", "tensors", "parameters", "dtypes"]
    g, b = result.geometry, result.barrier
    if g is not None:
        header += ["norm", f"from {'the mean' if g.reference is None else 'reference'}", "nearest"]
    if b is not None:
        header += ["val loss"]
    return [*header, "remark"], [_cells(result, k, row) for k, row in enumerate(result.rows)]


def _cells(result: Inspection, k: int, row: Row) -> list[str]:
    opened = row.candidate is not None
    cells = [
        row.candidate.name if opened else row.path.name,
        str(k + 1),
        row.format,
        f"{row.bytes / 1e6:.1f}" if opened else "-",
    ]
    cells += (
        [str(len(row.candidate.info)), f"{row.parameters:,}", row.dtypes]
        if opened
        else ["-", "-", "-"]
    )
    g, b = result.geometry, result.barrier
    at = next((i for i, path in enumerate(result.members) if path == row.path), None)
    if g is not None:
        cells += (
            ["-", "-", "-"]
            if at is None
            else [f"{g.norms[at]:.2f}", f"{g.from_center[at]:.4f}", _nearest(g, at)]
        )
    if b is not None:
        cells += ["-" if at is None else f"{b.losses[at]:.4f}"]
    return [*cells, shortened(row.problem, 60)]


def _nearest(g: Geometry, at: int) -> str:
    """Distance to the nearest other candidate."""
    others = [j for j in range(len(g)) if j != at]
    return f"{float(g.distances[at, others].min()):.4f}" if others else "-"


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def text(result: Inspection) -> str:
    """For a terminal."""
    lines = [markdown_table(*table(result)), ""]
    lines += [f"- {finding}" for finding in result.findings] or [
        "Nothing was found that speaks against averaging these candidates."
    ]
    return "\n".join([*lines, "", *_explanations(result)])


def _explanations(result: Inspection) -> list[str]:
    lines = []
    if g := result.geometry:
        lines.append(
            f"Distances are relative to the mean norm of the candidates, {g.scale:.4g}; nearest: to"
            " the nearest other candidate."
        )
    if b := result.barrier:
        settled = (
            f"; BatchNorm re-estimated on {b.bn_batches} training batches for every average"
            if b.bn_batches
            else ""
        )
        lines.append(
            f"Validation losses: uniform mean {b.mean:.4f}, best candidate"
            f" {min(b.losses):.4f}{settled}."
        )
    return lines


def markdown(result: Inspection) -> str:
    counts = {s: sum(f.severity == s for f in result.findings) for s in SEVERITIES}
    total = ", ".join(many(count, severity) for severity, count in counts.items())
    lines = [
        f"# {many(len(result.rows), 'candidate')}: {total}",
        "",
        *(f"- **{f.severity}** {str(f).split(': ', 1)[1]}" for f in result.findings),
        "",
    ]
    lines += [markdown_table(*table(result)), "", *_explanations(result), ""]
    if result.geometry is not None:
        lines += ["![distances and similarities of the candidates](inspect.png)", ""]
    return "\n".join(lines)


def as_json(result: Inspection) -> dict[str, object]:
    """Everything that was measured; None for NaN and Inf."""
    g, b = result.geometry, result.barrier
    files = [
        {
            "path": str(row.path),
            "format": row.format,
            "bytes": row.bytes,
            "tensors": len(row.candidate.info) if row.candidate else 0,
            "parameters": row.parameters,
            "dtypes": row.dtypes,
            "problem": row.problem,
        }
        for row in result.rows
    ]
    out: dict[str, object] = {
        "format": "twa-inspect-1",
        "files": files,
        "findings": [dict(vars(f)) for f in result.findings],
    }
    if g is not None:
        out["members"] = [str(path) for path in result.members]
        out["center"] = g.center
        for name in ("norms", "from_center", "distances", "cosines", "delta_cosines"):
            out[name] = getattr(g, name).tolist()
    if b is not None:
        out["losses"], out["mean_loss"] = [_finite(v) for v in b.losses], _finite(b.mean)
        out["line"] = {
            "ends": list(b.ends),
            "points": [[share, _finite(loss)] for share, loss in b.line],
        }
        out["bn_batches"] = b.bn_batches
    return out


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_outputs(folder: Path, result: Inspection) -> None:
    """inspect.md, inspect.json and, where there are weights to draw, inspect.png; each appears
    whole. Raises ValueError where that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "inspect.json", as_json(result))
        if result.geometry is not None:
            write_bytes(folder / "inspect.png", picture(result))
        else:
            (folder / "inspect.png").unlink(missing_ok=True)  # of other candidates
        write_text(folder / "inspect.md", markdown(result))
    except OSError as error:
        raise ValueError(
            f"{folder}: the result could not be written ({error.strerror}): {error.filename or ''}"
        ) from error


# Picture -----------------------------------------------------------------------------------------


def picture(result: Inspection) -> bytes:
    """PNG: distances, cosine similarities of weights and of differences from the center; with a
    task losses, too.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    g, b = result.geometry, result.barrier
    layout = (
        [["a", "a", "b", "b", "c", "c"], ["d", "d", "d", "e", "e", "e"]]
        if b is not None
        else [["a", "a", "b", "b", "c", "c"]]
    )
    size, heights = ((16, 9.6), [5.4, 4]) if b is not None else ((16, 5), None)
    figure, axes = plt.subplot_mosaic(
        layout, figsize=size, height_ratios=heights, layout="constrained"
    )
    distances = dict(cmap="viridis", vmin=0.0, vmax=_upper(g.distances))
    paths = [row.path for row in result.rows]
    numbers = [str(paths.index(path) + 1) for path in result.members]  # as in the table
    names = [f"{_label(name)}  {number}" for name, number in zip(g.names, numbers, strict=True)]
    _heat_map(
        figure,
        axes["a"],
        g.distances,
        numbers,
        names,
        "Distance (1 = mean norm of a candidate)",
        **distances,
    )
    low = min(0.0, float(g.cosines.min()))
    _heat_map(
        figure,
        axes["b"],
        g.cosines,
        numbers,
        numbers,
        "Cosine similarity of weights (matrices)",
        cmap="viridis",
        vmin=low,
        vmax=1.0,
    )
    title = f"Cosine similarity of differences from {_label(g.center)}"
    _heat_map(
        figure,
        axes["c"],
        g.delta_cosines,
        numbers,
        numbers,
        title,
        cmap="RdBu_r",
        vmin=-1.0,
        vmax=1.0,
    )
    if b is not None:
        _losses(axes["d"], b, numbers)
        _line(axes["e"], b)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80, pil_kwargs={"optimize": True})
    plt.close(figure)
    return buffer.getvalue()


def _upper(distances: Tensor) -> float:
    """End of the colour scale: an outlier may not flatten all else."""
    apart = distances[distances > 0]
    return min(float(apart.max()), 4 * float(apart.median())) if apart.numel() else 1.0


def _label(name: str) -> str:
    """Beginning and end of a long name."""
    return name if len(name) <= LABEL else f"{name[:7]}...{name[10 - LABEL :]}"


def _heat_map(
    figure, axes, values: Tensor, columns: list[str], rows: list[str], title: str, **scale
) -> None:
    n = len(values)
    image = axes.imshow(values.numpy(), interpolation="nearest", **scale)
    axes.set_title(title, fontsize=11)
    ticks = range(0, n, -(-n // MOST_TICKS))
    size = 10 if n <= MOST_NUMBERS else 8
    axes.set_xticks(
        ticks, columns[:: ticks.step], fontsize=size, rotation=0 if n <= MOST_NUMBERS else 90
    )
    axes.set_yticks(ticks, rows[:: ticks.step], fontsize=size)
    if n <= MOST_NUMBERS:
        _write_numbers(axes, image, values)
    cut = float(values.max()) > scale["vmax"] + 1e-9
    figure.colorbar(image, ax=axes, shrink=0.75, extend="max" if cut else "neither")


def _write_numbers(axes, image, values: Tensor) -> None:
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            r, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * r + 0.6 * green + 0.1 * blue < 0.5
            axes.text(
                j,
                i,
                f"{round(value, 2) + 0.0:.2f}",
                ha="center",
                va="center",
                fontsize=9,
                color="white" if dark else "black",
            )


def _losses(axes, b: Barrier, numbers: list[str]) -> None:
    """Every candidate's own loss; the uniform mean's as a line."""
    n = len(numbers)
    axes.plot(
        range(n),
        [v if math.isfinite(v) else math.nan for v in b.losses],
        "o-",
        markersize=4,
        label="candidates",
    )
    _references(axes, b)
    axes.set_title("Validation loss of each candidate", fontsize=11)
    axes.set_xlabel("candidate")
    ticks = range(0, n, -(-n // MOST_TICKS))
    axes.set_xticks(ticks, numbers[:: ticks.step], fontsize=10 if n <= MOST_NUMBERS else 8)
    axes.set_ylabel("loss")
    axes.legend(fontsize=9)


def _references(axes, b: Barrier) -> None:
    if math.isfinite(b.mean):
        axes.axhline(
            b.mean, color="tab:orange", linestyle="--", label=f"uniform mean of all, {b.mean:.4f}"
        )
    if math.isfinite(min(b.losses)):
        axes.axhline(
            min(b.losses),
            color="tab:green",
            linestyle=":",
            label=f"best candidate, {min(b.losses):.4f}",
        )


def _line(axes, b: Barrier) -> None:
    first, last = (b.names[k] for k in b.ends)
    shares = [share for share, _ in b.line]
    axes.plot(
        shares,
        [v if math.isfinite(v) else math.nan for _, v in b.line],
        "o-",
        label="on the straight line",
    )
    _references(axes, b)
    axes.set_title("Validation loss between the two candidates farthest apart", fontsize=11)
    axes.set_xticks(shares, [f"{share:.0%}" for share in shares])
    axes.set_xlabel(f"from {_label(first)} to {_label(last)}")
    axes.set_ylabel("loss")
    axes.legend(fontsize=9)
