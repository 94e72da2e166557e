"""The report of a check: what is right, what is wrong, percent of a copy, the largest gaps."""

from __future__ import annotations

import json
from pathlib import Path

from . import ROOT
from .events import ABSENT, GOOD
from .plan import BACKENDS, EVERY

RESULTS = ROOT / "bench" / "results"
TARGET = 90.0  # percent of a copy, where nothing is predicted
MOST_LINES = 40


def cases(events: list[dict], *stages: str) -> list[dict]:
    return [e for e in events if "case" in e and (not stages or e["stage"] in stages)]


def tally(rows: list[dict]) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["result"]] = counts.get(row["result"], 0) + 1
    return ", ".join(f"{number} {result}" for result, number in counts.items())


def wrong(events: list[dict]) -> list[dict]:
    """Every result that someone has to mend, a stage that broke among them."""
    found = [e for e in cases(events) if e["result"] not in GOOD + ABSENT]
    return found + [e for e in events if "case" not in e and e.get("result") in ("error", "wrong")]


def copy_rate(events: list[dict]) -> float:
    """Bytes per second of a copy, read + written; the larger of the two; 0 if there is none."""
    rows = [e for e in cases(events, "speed") if e["op"] == "copy" and e.get("ms")]
    return max((e["bytes"] / e["ms"] * 1e3 for e in rows), default=0.0)


def share(row: dict, copy: float) -> float | None:
    """Percent of a copy."""
    if not (row.get("ms") and copy):
        return None
    return 100 * row["bytes"] / (row["ms"] * 1e-3) / copy


def predicted(row: dict, found: dict, copy: float) -> float | None:
    """Percent of a copy that the model of a CUDA kernel says (bench/gpu_model.py)."""
    static = RESULTS / "cuda_static_cost.json"
    if row["backend"] != "cuda" or not static.exists() or not copy:
        return None
    from gpu_model import predicted as of

    return of(json.loads(static.read_text()), row, found.get("multiprocessors", 0), copy)


def gaps(events: list[dict], found: dict) -> list[dict]:
    """Where the most is missing, largest first, one of each op and backend; Gram-Schmidt last.

    [{"of": row, "share": percent of a copy, "target": percent expected}, ...]
    """
    copy, rows = copy_rate(events), []
    for row in cases(events, "speed"):
        percent = share(row, copy)
        if percent is None or row["backend"] not in BACKENDS:
            continue
        target = predicted(row, found, copy) or TARGET
        if percent < target:
            rows.append({"of": row, "share": percent, "target": target})
    rows.sort(key=lambda g: (g["of"]["op"] == "orthonormalize", g["share"] - g["target"]))
    first: dict[tuple, dict] = {}
    for g in rows:
        first.setdefault((g["of"]["op"], g["of"]["backend"]), g)
    return list(first.values())


def table(header: list[str], rows: list[list[str]], left: set[int]) -> list[str]:
    """Markdown that is as readable on a terminal."""
    widths = [max(len(r[c]) for r in [header, *rows]) for c in range(len(header))]
    rule = ["-" * (w + 2) if c in left else "-" * (w + 1) + ":" for c, w in enumerate(widths)]

    def line(cells: list[str]) -> str:
        put = [
            cell.ljust(w) if c in left else cell.rjust(w)
            for c, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(put) + " |"

    return [line(header), "|" + "|".join(rule) + "|", *map(line, rows)]


def matrix(events: list[dict]) -> list[str]:
    """How many cases of each op and stage are right, of how many."""
    stages = [s for s in ("smoke", "speed", "memcheck", "racecheck") if cases(events, s)]
    keys = [(s, b) for s in stages for b in BACKENDS if b_of(events, s, b)]
    rows = []
    for op in EVERY:
        cells = [op]
        for stage, backend in keys:
            of = [e for e in b_of(events, stage, backend) if e["op"] == op]
            good = sum(e["result"] in GOOD for e in of)
            cells.append(f"{good} of {len(of)}" + ("" if good == len(of) else " !") if of else "")
        rows.append(cells)
    return table(["op", *(f"{s}, {b}" for s, b in keys)], rows, {0})


def b_of(events: list[dict], stage: str, backend: str) -> list[dict]:
    return [e for e in cases(events, stage) if e.get("backend") == backend]


def absent(events: list[dict]) -> list[str]:
    """What was not run, by stage and reason, counted."""
    counts: dict[tuple, list[str]] = {}
    for e in cases(events):
        if e["result"] in ABSENT:
            counts.setdefault((e["stage"], e["note"]), []).append(e["case"])
    return [
        f"- {stage}: {len(of)} ({', '.join(of[:3])}{', ...' if len(of) > 3 else ''}): {why}"
        for (stage, why), of in counts.items()
    ]


HEADER = [
    *("op", "kernel", "bits", "n", "dtype", "D", "GB", "ms", "kernels", "host", "GB/s"),
    *("of copy", "predicted", "peak", "note"),
]


def speeds(events: list[dict], found: dict) -> list[str]:
    copy = copy_rate(events)
    rows = []
    for e in cases(events, "speed"):
        if not e.get("ms"):
            continue
        percent, expected = share(e, copy), predicted(e, found, copy)
        kernels = e.get("kernel_ms")
        what = e["op"] + (f", {e['accuracy']}" if "accuracy" in e else "")
        rows.append(
            [
                *(what, e["backend"], str(e.get("bits", "")), str(e["n"]), e["dtype"]),
                f"{e['D']:.3g}" if "D" in e else "",
                f"{e['bytes'] / 1e9:.2f}",
                f"{e['ms']:.3f}",
                f"{kernels:.3f}" if kernels else "",
                f"{e['host_us']:.0f} us",
                f"{e['bytes'] / e['ms'] / 1e6:.0f}",
                f"{percent:.0f} %" if percent is not None else "",
                f"{expected:.0f} %" if expected else "",
                f"{e['peak_mb']:.0f} MB" if "peak_mb" in e else "",
                "" if e["result"] == "measured" else f"WRONG: {e['note']}",
            ]
        )
    return table(HEADER, rows, {0, 1, 4, 14}) if rows else ["Nothing was measured."]


def page(events: list[dict], found: dict) -> str:
    end = next((e for e in reversed(events) if e.get("event") == "end"), None)
    lines = [f"# GPU check: {found.get('name', 'unknown')}", ""]
    lines += [f"- {k}: {v}" for k, v in found.items() if k not in ("gpu", "name")]
    lines += (
        [f"- {end['seconds']} s of a budget of {end['budget']:.0f} s"] if end else ["- under way"]
    )
    lines += ["", *right(events), "", *what_is_wrong(events, MOST_LINES)]
    lines += ["", "## Not run", "", *(absent(events) or ["Nothing."])]
    lines += ["", "## Percent of a device-to-device copy", "", *speeds(events, found), ""]
    lines += ["Bytes: each input read once and each output written once (bench/gpucheck/cases.py)."]
    lines += [
        "kernels: by the profiler; host: to launch one call; peak: memory beside the operands;"
    ]
    lines += ["predicted: before this run, from the CUDA kernels' code (bench/gpu_model.py).", ""]
    lines += [*largest_gaps(events, found)]
    for e in cases(events, "variants"):
        lines += ["", f"Variants of {e['case']} (ms): {e['note']}", ""]
        ranked = sorted(e.get("variants", {}).items(), key=lambda v: v[1])
        lines += [f"    {ms:9.4f}  {name}" for name, ms in ranked]
        lines += [f"    refused    {name}: {why}" for name, why in e.get("refused", {}).items()]
    return "\n".join(lines) + "\n"


def right(events: list[dict]) -> list[str]:
    lines = ["## Right", "", *matrix(events), ""]
    lines += [f"Tests: {tally(cases(events, 'tests')) or 'none was run'}.", ""]
    for e in events:
        if e.get("event") == "stage":
            lines.append(f"- {e['stage']}: {e['result']} after {e['seconds']:.0f} s: {e['note']}")
    return lines


def what_is_wrong(events: list[dict], most: int) -> list[str]:
    lines, bad = ["## Wrong", ""], wrong(events)
    for e in bad[:most]:
        what = f"{e['stage']}: {e['case']}" if "case" in e else e["stage"]
        lines.append(f"- {what}: {e['result']}: {e.get('note', '')[:200]}")
    lines += [f"- and {len(bad) - most} more"] if len(bad) > most else []
    return lines if bad else [*lines, "Nothing."]


def largest_gaps(events: list[dict], found: dict) -> list[str]:
    largest = gaps(events, found)[:3]
    lines = ["## Largest gaps", ""] if largest else []
    for g in largest:
        percent = f"{g['share']:.0f} % of a copy, expected {g['target']:.0f} %"
        lines.append(f"- {g['of']['case']}: {percent}")
    counted = [e for e in events if e.get("event") == "counters"]
    return lines + [f"- counters of {e['of']}: {e['note']}" for e in counted]


def summary(events: list[dict], found: dict) -> str:
    """What the end of a long output should say once more."""
    lines = [*right(events), "", *what_is_wrong(events, 20), "", *largest_gaps(events, found)]
    return "\n".join(lines)


def picture(path: Path, events: list[dict], found: dict) -> None:
    """Percent of a copy of every row of ours at the first n, beside what was predicted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    copy = copy_rate(events)
    ours = [e for e in cases(events, "speed") if e["backend"] in BACKENDS]
    rows = [e for e in ours if share(e, copy)]
    if not rows:
        return
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.2 * len(rows)), layout="constrained")
    order = ("n", "dtype", "bits", "accuracy", "backend")
    rows.sort(key=lambda e: (EVERY.index(e["op"]), *(str(e.get(k, "")) for k in order)))
    names = [e["case"] for e in rows]
    colors = ["tab:blue" if e["backend"] == "cuda" else "tab:orange" for e in rows]
    bars = axis.barh(names, [share(e, copy) for e in rows], color=colors, height=0.7)
    axis.bar_label(bars, [f"{share(e, copy):.0f}" for e in rows], fontsize=7, padding=2)
    for k, e in enumerate(rows):
        if expected := predicted(e, found, copy):
            axis.plot([expected, expected], [k - 0.4, k + 0.4], color="black", linewidth=1.5)
    axis.axvline(100, color="0.6", linewidth=1)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.tick_params(axis="y", labelsize=7)
    axis.set_xlabel(f"percent of a copy on the device ({copy / 1e12:.2f} TB/s); black: predicted")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(found.get("name", ""), fontsize=10)
    figure.savefig(path, dpi=100)
    plt.close(figure)
