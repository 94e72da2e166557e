"""Scaling of project and reconstruct at every bit width: percent of the measured bandwidth over
candidates n, columns D and threads.

    python bench/scaling.py [--quick] [--output FOLDER]

writes cpu_scaling.json, .md and .png there (bench/results/).

Over n with n * D = 64 * 8e6, so that the packed size stays the same; over D at n = 64; over threads
at n = 64, D = 8e6. Bytes moved: project n * D * (bits / 8 + 1 / 128) + 4 * D, reconstruct 4 * D
more. Bounds, measured in this run with the same number of threads: reading for project, copying for
reconstruct. Above 100 %: the packed bytes fit into the processor's cache.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from common import (
    RESULTS,
    bandwidth,
    hardware,
    kernel_runs,
    median_seconds,
)
from twa.io.tables import markdown_table

BITS = (8, 4, 3, 2, 1)
BOUNDS = {"project": "read", "reconstruct": "copy"}
N, COLUMNS = 64, 8_000_000  # the point that the three curves share
MAX_BYTES = 3e9


def points(n: int, columns: int, threads: int) -> list[tuple[str, list[tuple[int, int, int]]]]:
    """(axis, (n, D, threads) along it) for the three curves through one point."""
    return [
        ("n", [(m, n * columns // m, threads) for m in (n // 4, n, 4 * n)]),
        ("D", [(n, d, threads) for d in (columns // 8, columns, 4 * columns)]),
        ("threads", [(n, columns, t) for t in range(1, (os.cpu_count() or 1) + 1)]),
    ]


def measure(n: int, columns: int, threads: int, bits: int) -> list[dict]:
    """One row per op. The caller has set the threads."""
    if n * columns * (bits / 8 + 1 / 128) > MAX_BYTES:
        return []
    rows = []
    for op, (run, moved) in kernel_runs(n, columns, bits).items():
        bound, seconds = BOUNDS[op], median_seconds(run)
        rate = moved / seconds / 1e9
        row = {"op": op, "bits": bits, "n": n, "D": columns, "threads": threads}
        row |= {"ms": 1e3 * seconds, "GB/s": rate}
        rows.append(row | {"percent": 100 * rate / bandwidth()[bound], "bound": bound})
    return rows


def markdown(
    rows: list[dict], machine: dict[str, str], measured: dict[int, dict[str, float]]
) -> str:
    lines = [f"{key}: {value}" for key, value in machine.items() if key != "threads"]
    lines.append("")
    for t, b in measured.items():
        rates = f"read {b['read']:.1f} GB/s, copy {b['copy']:.1f} GB/s (read + write)"
        lines.append(f"bandwidth, threads {t}: {rates}")
    header = ["op", "bits", "n", "D", "threads", "median ms", "GB/s", "percent", "of"]
    shown = "{op} {bits} {n} {D:.3g} {threads} {ms:.2f} {GB/s:.1f} {percent:.0f} {bound}"
    ordered = sorted(rows, key=lambda r: (r["op"], r["threads"], r["n"], r["D"], -r["bits"]))
    table = markdown_table(header, [shown.format(**r).split() for r in ordered])
    title = ["# Scaling of the CPU kernels", "", "![percent of bandwidth](cpu_scaling.png)", ""]
    return "\n".join([*title, *lines, "", table, ""])


# Pictures ----------------------------------------------------------------------------------------


def short(v: float) -> str:
    """A number for an axis: 64 -> "64", 32000000 -> "3.2e7"."""
    return f"{v:.0f}" if v < 1e4 else f"{v:.1e}".replace(".0e", "e").replace("e+0", "e")


def picture(
    path: Path,
    rows: list[dict],
    curves: list[tuple[str, list[tuple[int, int, int]]]],
    machine: dict[str, str],
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n, columns, threads = curves[0][1][1]
    labels = {
        "n": f"candidates n (n × D = {n * columns / 1e6:.3g} M, {threads} threads)",
        "D": f"columns D (n = {n}, {threads} threads)",
        "threads": f"threads (n = {n}, D = {short(columns)})",
    }
    percent = {(r["op"], r["bits"], r["n"], r["D"], r["threads"]): r["percent"] for r in rows}
    figure, axes = plt.subplots(
        2, 3, figsize=(13, 7.5), sharex="col", sharey="row", layout="constrained"
    )
    for down, (op, bound) in enumerate(BOUNDS.items()):
        for across, (axis, along) in enumerate(curves):
            panel = axes[down][across]
            ticks = [point[("n", "D", "threads").index(axis)] for point in along]
            for k, bits in enumerate(BITS):
                keys = [(op, bits, *point) for point in along]
                line = [
                    (t, percent[key]) for t, key in zip(ticks, keys, strict=True) if key in percent
                ]
                style = {"color": f"C{k}", "marker": "o", "markersize": 4}
                label = f"{bits} bit" + "s" * (bits > 1)
                panel.plot(*zip(*line, strict=True), label=label, **style)
            panel.axhline(100, color="0.4", linewidth=1, linestyle="--", zorder=1)
            panel.grid(axis="y", color="0.9")
            panel.set_axisbelow(True)
            if axis != "threads":
                panel.set_xscale("log")
            panel.minorticks_off()
            panel.set_xticks(ticks if len(ticks) <= 8 else ticks[:: -(-len(ticks) // 8)])
            panel.xaxis.set_major_formatter(lambda v, _: short(v))
            if down:
                panel.set_xlabel(labels[axis])
            if not across:
                panel.set_ylabel(f"{op}: percent of {bound} bandwidth")
    for row in axes:
        row[0].set_ylim(bottom=0)  # after all lines of the row, which share the axis
    labels = axes[0][0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=len(BITS), frameon=False)
    where = f"{machine['processor']} ({machine['isa']}), commit {machine['commit']}"
    figure.suptitle(f"Percent of the measured bandwidth, {where}", fontsize=11)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    quick = "a hundredth of the columns: shows that it runs, measures nothing of use"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    torch.manual_seed(0)
    machine = hardware()
    args.output.mkdir(parents=True, exist_ok=True)
    curves = points(N, COLUMNS // 100 if args.quick else COLUMNS, torch.get_num_threads())
    rows, measured = [], {}
    every = {point for _, along in curves for point in along}
    for threads in sorted({t for _, _, t in every}):
        torch.set_num_threads(threads)
        bandwidth.cache_clear()
        measured[threads] = bandwidth()
        for n, columns, _ in sorted(point for point in every if point[2] == threads):
            for bits in BITS:
                rows += measure(n, columns, threads, bits)
                for r in rows[-2:]:
                    size = "{op:12} {bits} bits  n {n:4}  D {D:9}  threads {threads:3}".format(**r)
                    print(size + "  {ms:8.2f} ms  {percent:4.0f} % of {bound}".format(**r))
    found = {"hardware": machine, "bandwidth": measured, "rows": rows}
    (args.output / "cpu_scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.output / "cpu_scaling.md").write_text(markdown(rows, machine, measured))
    picture(args.output / "cpu_scaling.png", rows, curves, machine)


if __name__ == "__main__":
    main()
