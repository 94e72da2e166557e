"""Draws docs/distributed.png: what each rank holds in every sharding, and what they send each
other in a step.

Run: python bench/distributed_picture.py. Lengths are pixels of the picture, from its upper left
corner.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle

OUT = Path(__file__).parents[1] / "docs" / "distributed.png"
WIDTH, HEIGHT, DPI = 1600, 900, 100
RANKS, ROWS = 3, 6
# in greyscale: dark, middle, light
BASIS, WEIGHTS, GRADIENT, COEFFICIENTS = "#2c5d94", "#e0a04a", "#cfe6c0", "#c9a0d8"
INK, FAINT = "#222222", "#8c8c8c"
PANEL, MARGIN, TOP, BOX, GAP = 506, 20, 122, 166, 78
# the D columns inside a box; height of a row of P, and of weights and gradient
D_LEFT, D_WIDTH, ROW, BAR = 92, 340, 12, 22
GRADIENTS = {"replicate": "of this rank's data", "rows": "of this rank's data, then the sum"}
C_LEFT, C_WIDTH = D_LEFT + D_WIDTH + 22, 20


def cell(axes: Axes, x: float, y: float, width: float, height: float, colour: str | None) -> None:
    """Draws a part that is held (filled) or not (dashed outline)."""
    style = dict(facecolor=colour, edgecolor=INK, linewidth=0.8)
    if not colour:
        style = dict(facecolor="white", edgecolor=FAINT, linewidth=0.8, linestyle=(0, (3, 3)))
    axes.add_patch(Rectangle((x, y), width, height, zorder=3 if colour else 2, **style))


def write(axes: Axes, x: float, y: float, text: str, size: float = 10, **style) -> None:
    usual = dict(color=INK, ha="center", va="center", zorder=5)
    axes.text(x, y, text, fontsize=size, **usual | style)


def box(axes: Axes, left: float, rank: int, sharding: str) -> None:
    """Draws one rank: its part of P (n x D), its addend of c (n x 1), its part of weights and
    gradient (1 x D).
    """
    top = TOP + rank * (BOX + GAP)
    style = dict(boxstyle="round,pad=0,rounding_size=8", facecolor="#f4f4f2", edgecolor=INK)
    axes.add_patch(FancyBboxPatch((left, top), PANEL, BOX, linewidth=1.2, **style))
    write(axes, left + 10, top + 15, f"rank {rank}", 11, ha="left", weight="bold")
    x, part = left + D_LEFT, D_WIDTH / RANKS
    y = top + 26
    for row in range(ROWS):
        mine = sharding != "rows" or row * RANKS // ROWS == rank
        columns = [(x, D_WIDTH, mine)]
        if sharding == "columns":
            columns = [(x + r * part, part, r == rank) for r in range(RANKS)]
        for begin, width, held in columns:
            cell(axes, begin, y + row * ROW, width, ROW, BASIS if held else None)
        cell(axes, left + C_LEFT, y + row * ROW, C_WIDTH, ROW, COEFFICIENTS if mine else None)
    write(axes, x - 12, y + ROWS * ROW / 2, "P", 12, ha="right", style="italic")
    write(axes, x + D_WIDTH / 2, y - 12, "D columns", 9.5)
    write(axes, x - 28, y + ROWS * ROW / 2, "n rows", 9.5, ha="right")
    write(axes, left + C_LEFT + C_WIDTH / 2, y - 10, "c", 12, style="italic")
    for k, (name, colour) in enumerate((("weights", WEIGHTS), ("gradient", GRADIENT))):
        bar = y + ROWS * ROW + 8 + k * (BAR + 6)
        write(axes, x - 12, bar + BAR / 2, name, 10.5, ha="right")
        if sharding == "columns":
            for r in range(RANKS):
                cell(axes, x + r * part, bar, part, BAR, colour if r == rank else None)
            text = "shard" if name == "weights" else "mean's shard"
            write(axes, x + (rank + 0.5) * part, bar + BAR / 2, text, 9.5)
        else:
            cell(axes, x, bar, D_WIDTH, BAR, colour)
            text = "all" if name == "weights" else GRADIENTS[sharding]
            write(axes, x + D_WIDTH / 2, bar + BAR / 2, text, 9.5)


def arrow(
    axes: Axes, x: float, begin: float, end: float, wide: bool, solid: bool, upright: bool = True
) -> None:
    """Draws an arrow with two heads, from begin to end.

    It is thin for n L numbers, wide for D, and hollow for what FSDP moves anyway.
    """
    shaft, head, length = (6, 14, 17) if wide else (1.5, 6, 12)
    side = [(head, begin + length), (shaft, begin + length)]
    side += [(shaft, end - length), (head, end - length)]
    outline = [(0, begin), *side, (0, end), *((-across, along) for across, along in reversed(side))]
    points = [(x + across, along) if upright else (along, x + across) for across, along in outline]
    style = dict(edgecolor=INK, linewidth=1.1, joinstyle="miter", zorder=4)
    axes.add_patch(Polygon(points, facecolor=INK if solid else "white", **style))


#: name, what a rank holds, bytes of a step's messages, messages as (x in the panel, wide, solid,
#: label)
PANELS = [
    (
        "replicate",
        "every rank: all of P, all weights",
        "4 n L + 8 bytes per step",
        [(186, False, True, "sum of c:\n4 n L bytes")],
    ),
    (
        "rows",
        "every rank: n / K rows of P, all weights",
        "8 D + 4 n L + 8 bytes per step",
        [
            (32, True, True, "1. sum of\ngradient:\n4 D bytes"),
            (196, False, True, "2. sum of c:\n4 n L bytes"),
            (356, True, True, "3. sum of $x^T P$:\n4 D bytes"),
        ],
    ),
    (
        "columns",
        "every rank: P for its shards of the weights",
        "4 n L + 8 bytes per step, beside FSDP's own",
        [
            (32, True, False, "FSDP's own: gather weights,\nreduce-scatter gradients"),
            (356, False, True, "sum of c:\n4 n L bytes"),
        ],
    ),
]


def legend(axes: Axes) -> None:
    """Draws what colours, arrows and letters mean."""
    y, text = 822, dict(ha="left", size=11)
    cell(axes, 24, y - 8, 28, 16, BASIS)
    write(axes, 60, y, "held by this rank", **text)
    cell(axes, 208, y - 8, 28, 16, None)
    write(axes, 244, y, "held by other ranks", **text)
    arrow(axes, y, 440, 486, False, True, upright=False)
    write(axes, 496, y, "message of n L numbers: kilobytes", **text)
    arrow(axes, y, 780, 830, True, True, upright=False)
    write(axes, 840, y, "message of D numbers: gigabytes", **text)
    arrow(axes, y, 1138, 1188, True, False, upright=False)
    write(axes, 1198, y, "moved by FSDP, with or without averaging", **text)
    symbols = (
        f"K = {RANKS} ranks.   P (n, D): basis of n candidates, D weights.   L segments.  "
        " x (n, L): coefficients."
    )
    write(axes, 24, y + 32, symbols, **text)
    sent = (
        "c (n, L): gradient of x, here what this rank computes of it.   8 bytes: a check that all"
        " ranks have the same x."
    )
    write(axes, 24, y + 54, sent, **text)


def draw() -> plt.Figure:
    figure = plt.figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    axes.axis("off")
    for k, (name, holds, sends, messages) in enumerate(PANELS):
        left = MARGIN + k * (PANEL + 21)
        write(axes, left + PANEL / 2, 34, name, 20, weight="bold")
        write(axes, left + PANEL / 2, 68, holds, 12.5)
        write(axes, left + PANEL / 2, 94, sends, 12.5)
        for rank in range(RANKS):
            box(axes, left, rank, name)
        for gap in range(RANKS - 1):
            begin = TOP + gap * (BOX + GAP) + BOX
            for x, wide, solid, label in messages:
                arrow(axes, left + x, begin + 3, begin + GAP - 3, wide, solid)
                beside = left + x + (22 if wide else 13)
                style = dict(ha="left", linespacing=1.2)
                write(axes, beside, begin + GAP / 2, label, 10.5, **style)
    legend(axes)
    return figure


def main() -> None:
    figure = draw()
    figure.savefig(OUT, dpi=DPI)
    plt.close(figure)
    print(f"written: {OUT}")


if __name__ == "__main__":
    main()
