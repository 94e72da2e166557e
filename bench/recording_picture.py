"""Draws docs/recording.png: how snapshots are coded, and how far decoded ones of the demo's run are
from what was recorded.

Run: python bench/recording_picture.py, after bench/recording.py or with a run of the demo at hand.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import twa
from recording import closed_loop, deltas, demo_run, distance, tensors_of, without_feedback

OUT = Path(__file__).parents[1] / "docs" / "recording.png"
COLOURS = {"closed": "#1f5fa8", "open": "#c2571a", "deltas": "#777777"}


def draw_coding(axes: plt.Axes) -> None:
    """Four snapshots of a path, their coded differences, and what is decoded."""
    true = [(0.0, 0.0), (1.0, 0.55), (2.05, 0.35), (3.0, 1.05), (4.1, 1.2)]
    seen = [(0.0, 0.0), (0.93, 0.73), (2.14, 0.18), (2.9, 1.22), (4.2, 1.06)]
    axes.plot(*zip(*true, strict=True), "o-", color="black", lw=1, ms=6, label="weights $w_i$")
    axes.plot(*zip(*seen, strict=True), "s", color=COLOURS["closed"], ms=6, label="decoded")
    for a, b in pairwise(seen):
        arrow = {"arrowstyle": "-|>", "color": COLOURS["closed"], "lw": 1.6}
        axes.annotate("", xy=b, xytext=a, arrowprops=arrow)
    for (x, y), (u, v) in zip(true[1:], seen[1:], strict=True):
        axes.plot([x, u], [y, v], ":", color=COLOURS["open"], lw=1.4)
    axes.annotate("anchor: whole, 16 bits", (0, 0), (0.12, -0.16), ha="left", fontsize=9)
    axes.annotate(
        "$d_2$ = 2 to 4 bits of\n$w_2$ − decoded $w_1$",
        ((seen[1][0] + seen[2][0]) / 2, (seen[1][1] + seen[2][1]) / 2),
        (1.75, 1.15),
        fontsize=9,
        ha="center",
        arrowprops={"arrowstyle": "-", "color": "0.6"},
    )
    axes.annotate(
        "error of one\ndifference,\nmended by the next",
        ((true[3][0] + seen[3][0]) / 2, (true[3][1] + seen[3][1]) / 2),
        (3.3, 0.1),
        fontsize=9,
        color=COLOURS["open"],
        arrowprops={"arrowstyle": "-", "color": "0.6"},
    )
    axes.set_xlim(-0.3, 4.7)
    axes.set_ylim(-0.6, 1.6)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    axes.set_title("each snapshot: its difference from the decoded one before", fontsize=10)


def draw_errors(axes: plt.Axes) -> None:
    """Errors of decoded snapshots of the demo's run."""
    heap = tensors_of(twa.Candidates(demo_run(0)[1] / "*.safetensors"))
    steps = range(1, len(heap) + 1)
    for bits, style in ((4, "-"), (2, "--")):
        for name, text, found in (
            ("deltas", "deltas from the last", deltas(heap, heap[-1], bits)),
            ("open", "differences, no feedback", without_feedback(heap, bits)),
            ("closed", "differences, closed loop", closed_loop(heap, bits)),
        ):
            errors = [distance(a, b) for a, b in zip(heap, found, strict=True)]
            label = f"{text}, {bits} bits"
            axes.plot(steps[1:], errors[1:], style, color=COLOURS[name], lw=1.6, label=label)
    axes.set_yscale("log")
    axes.set_ylim(0.2, 150)
    axes.set_xlabel("snapshot")
    axes.set_title("distance of the decoded from the recorded weights, demo", fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center")


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    draw_coding(left)
    draw_errors(right)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.spines[["bottom", "left"]].set_visible(False)
    figure.savefig(OUT, dpi=110)
    print(OUT)


if __name__ == "__main__":
    main()
