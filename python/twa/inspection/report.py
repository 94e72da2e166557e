"""What `twa inspect` prints and writes: a table of files, findings, heat maps."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..io.atomic import write_bytes, write_json, write_text
from ..io.errors import TwaError
from ..io.tables import escaped, markdown_table
from ..io.versions import INSPECT
from .findings import SEVERITIES, many

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from .geometry import Geometry
    from .results import Barrier, Inspection, Row

FILES = ("inspect.md", "inspect.json", "inspect.png")
MOST_TICKS = 20  # candidates named along an axis
MOST_NUMBERS = 10  # candidates up to which a heat map's cells have their number
LABEL = 22  # characters


def check_folder(folder: Path) -> None:
    """Raises TwaError for something that is no directory."""
    if os.path.exists(folder) and not folder.is_dir():
        raise TwaError("expected a directory for the output, found a file", folder)


def table(result: Inspection) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table: one row per file."""
    header = ["candidate", "#", "format", "MB", "tensors", "parameters", "dtypes"]
    g, b = result.geometry, result.barrier
    if g is not None:
        header += ["norm", f"from {'the mean' if g.reference is None else 'reference'}", "nearest"]
    if b is not None:
        header += ["val loss"]
    return [*header, "remark"], [_cells(result, k, row) for k, row in enumerate(result.rows)]


def _cells(result: Inspection, k: int, row: Row) -> list[str]:
    """One row of the table, that of file k."""
    candidate = row.candidate
    if candidate is None:
        cells = [row.path.name, str(k + 1), row.format, "-", "-", "-", "-"]
    else:
        cells = [candidate.name, str(k + 1), row.format, f"{row.bytes / 1e6:.1f}"]
        cells += [str(len(candidate.info)), f"{row.parameters:,}", row.dtypes]
    g, b = result.geometry, result.barrier
    at = result.members.index(row.path) if row.path in result.members else None
    if g is not None and at is not None:
        cells += [f"{g.norms[at]:.2f}", f"{g.from_center[at]:.4f}", _nearest(g, at)]
    elif g is not None:
        cells += ["-", "-", "-"]
    if b is not None:
        cells += ["-" if at is None else f"{b.losses[at]:.4f}"]
    return [*cells, shortened(row.problem, 60)]


def _nearest(g: Geometry, at: int) -> str:
    """Distance to the nearest other candidate."""
    others = [j for j in range(len(g)) if j != at]
    return f"{float(g.distances[at, others].min()):.4f}" if others else "-"


def shortened(text: str, most: int) -> str:
    """The beginning of a text, so that it has at most so many characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def text(result: Inspection) -> str:
    """What a terminal shows: table, findings, explanations."""
    lines = [markdown_table(*table(result)), ""]
    lines += [f"- {finding}" for finding in result.findings]
    if not result.findings:
        lines.append("Nothing was found that speaks against averaging these candidates.")
    return "\n".join([*lines, "", *_explanations(result)])


def _explanations(result: Inspection) -> list[str]:
    """What the table's figures mean."""
    lines = []
    if g := result.geometry:
        lines.append(
            f"Distances are relative to the mean norm of the candidates, {g.scale:.4g}; nearest: to"
            " the nearest other candidate."
        )
    if b := result.barrier:
        settled = ""
        if b.bn_batches:
            settled = f"; BatchNorm re-estimated on {b.bn_batches} training batches"
            settled += " for every average"
        lines.append(
            f"Validation losses: uniform mean {b.mean:.4f}, best candidate"
            f" {min(b.losses):.4f}{settled}."
        )
    return lines


def markdown(result: Inspection) -> str:
    """The page inspect.md."""
    counts = {s: sum(f.severity == s for f in result.findings) for s in SEVERITIES}
    total = ", ".join(many(count, severity) for severity, count in counts.items())
    lines = [
        f"# {many(len(result.rows), 'candidate')}: {total}",
        "",
        *(f"- **{f.severity}** {escaped(str(f).split(': ', 1)[1])}" for f in result.findings),
        "",
    ]
    lines += [markdown_table(*table(result)), "", *_explanations(result), ""]
    if result.geometry is not None:
        lines += ["![distances and similarities of the candidates](inspect.png)", ""]
    return "\n".join(lines)


def as_json(result: Inspection) -> dict[str, object]:
    """What inspect.json holds: everything that was measured; None for NaN and Inf."""
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
        "format": INSPECT,
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
    """The value, or None for NaN and Inf, which JSON does not have."""
    return value if math.isfinite(value) else None


def write_outputs(folder: Path, result: Inspection) -> None:
    """Writes inspect.md, inspect.json and, where there are weights to draw, inspect.png.

    Each appears whole.

    Raises:
        TwaError: one cannot be written
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
        raise TwaError(
            f"the result could not be written ({error.strerror}): {error.filename or ''}", folder
        ) from error


# Picture -----------------------------------------------------------------------------------------


class Scale(NamedTuple):
    """Values at the ends of a colour map."""

    low: float
    high: float
    colours: str = "viridis"


def picture(result: Inspection) -> bytes:
    """The PNG inspect.png: distances, cosine similarities and, with a task, losses.

    Similarities are those of weights, and of differences from the center. There must be a geometry.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    g, b = result.geometry, result.barrier
    assert g is not None
    mosaic, height = ("aabbcc", 5.0) if b is None else ("aabbcc;dddeee", 9.6)
    figure, axes = plt.subplot_mosaic(
        mosaic,
        figsize=(16, height),
        height_ratios=None if b is None else [5.4, 4],
        layout="constrained",
    )
    paths = [row.path for row in result.rows]
    numbers = [str(paths.index(path) + 1) for path in result.members]  # as in the table
    _heat_maps(figure, axes, g, numbers)
    if b is not None:
        _losses(axes["d"], b, numbers)
        _line(axes["e"], b)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80, pil_kwargs={"optimize": True})
    plt.close(figure)
    return buffer.getvalue()


def _heat_maps(figure: Figure, axes: dict[str, Axes], g: Geometry, numbers: list[str]) -> None:
    """Draws distances and both kinds of cosine similarities."""
    names = [f"{_label(name)}  {number}" for name, number in zip(g.names, numbers, strict=True)]
    title, scale = "Distance (1 = mean norm of a candidate)", Scale(0.0, _upper(g.distances))
    _heat_map(figure, axes["a"], title, g.distances, scale, names, numbers)
    lowest = min(0.0, float(g.cosines.min()))
    title, scale = "Cosine similarity of weights (matrices)", Scale(lowest, 1.0)
    _heat_map(figure, axes["b"], title, g.cosines, scale, numbers, numbers)
    title = f"Cosine similarity of differences from {_label(g.center)}"
    scale = Scale(-1.0, 1.0, colours="RdBu_r")
    _heat_map(figure, axes["c"], title, g.delta_cosines, scale, numbers, numbers)


def _upper(distances: Tensor) -> float:
    """End of the colour scale: an outlier may not flatten all else."""
    apart = distances[distances > 0]
    return min(float(apart.max()), 4 * float(apart.median())) if apart.numel() else 1.0


def _label(name: str) -> str:
    """Beginning and end of a long name, in which Matplotlib sees no formula."""
    shown = name if len(name) <= LABEL else f"{name[:7]}...{name[10 - LABEL :]}"
    return shown.replace("$", r"\$")


def _heat_map(
    figure: Figure,
    axes: Axes,
    title: str,
    values: Tensor,
    scale: Scale,
    rows: list[str],
    columns: list[str],
) -> None:
    """Draws values (n, n) as colours; of few candidates as numbers, too."""
    n = len(values)
    image = axes.imshow(
        values.numpy(),
        interpolation="nearest",
        cmap=scale.colours,
        vmin=scale.low,
        vmax=scale.high,
    )
    axes.set_title(title, fontsize=11)
    ticks = range(0, n, -(-n // MOST_TICKS))
    size, turned = (10, 0) if n <= MOST_NUMBERS else (8, 90)
    axes.set_xticks(ticks, columns[:: ticks.step], fontsize=size, rotation=turned)
    axes.set_yticks(ticks, rows[:: ticks.step], fontsize=size)
    if n <= MOST_NUMBERS:
        _write_numbers(axes, image, values)
    cut = float(values.max()) > scale.high + 1e-9
    figure.colorbar(image, ax=axes, shrink=0.75, extend="max" if cut else "neither")


def _write_numbers(axes: Axes, image: AxesImage, values: Tensor) -> None:
    """Writes each cell's number, white on dark colours."""
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            red, green, blue, _ = image.cmap(image.norm(value))
            colour = "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else "black"
            text = f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no "-0.00"
            axes.text(j, i, text, ha="center", va="center", fontsize=9, color=colour)


def _losses(axes: Axes, b: Barrier, numbers: list[str]) -> None:
    """Draws every candidate's own loss; the uniform mean's is a line."""
    n = len(numbers)
    losses = [v if math.isfinite(v) else math.nan for v in b.losses]
    axes.plot(range(n), losses, "o-", markersize=4, label="candidates")
    _references(axes, b)
    axes.set_title("Validation loss of each candidate", fontsize=11)
    axes.set_xlabel("candidate")
    ticks = range(0, n, -(-n // MOST_TICKS))
    axes.set_xticks(ticks, numbers[:: ticks.step], fontsize=10 if n <= MOST_NUMBERS else 8)
    axes.set_ylabel("loss")
    axes.legend(fontsize=9)


def _references(axes: Axes, b: Barrier) -> None:
    """Draws the losses of the uniform mean and of the best candidate as lines."""
    best = min(b.losses)
    if math.isfinite(b.mean):
        label = f"uniform mean of all, {b.mean:.4f}"
        axes.axhline(b.mean, color="tab:orange", linestyle="--", label=label)
    if math.isfinite(best):
        axes.axhline(best, color="tab:green", linestyle=":", label=f"best candidate, {best:.4f}")


def _line(axes: Axes, b: Barrier) -> None:
    """Draws the loss along the straight line between two candidates."""
    first, last = (b.names[k] for k in b.ends)
    shares = [share for share, _ in b.line]
    losses = [v if math.isfinite(v) else math.nan for _, v in b.line]
    axes.plot(shares, losses, "o-", label="on the straight line")
    _references(axes, b)
    axes.set_title("Validation loss between the two candidates farthest apart", fontsize=11)
    axes.set_xticks(shares, [f"{share:.0%}" for share in shares])
    axes.set_xlabel(f"from {_label(first)} to {_label(last)}")
    axes.set_ylabel("loss")
    axes.legend(fontsize=9)
