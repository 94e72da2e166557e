"""Every way to install, tried from a clone of the last commit: `make install-check`.

    python3 bench/install_check.py [--only TEXT ...] [--torch VERSION ...] [--save]

It needs network, and 30 GB of disk for the PyTorch versions of the group `stack`.
Results are kept in build/install-check as they come: a second call goes on where the first ended;
a cell that was wrong is tried again. With --save also in bench/results/install.json, from which
`python3 bench/install_check.py --page` makes the tables of docs/install.md. The exit status is 1 if
a cell is wrong.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

from installcheck.box import ROOT, Absent, Box, Wrong, progress
from installcheck.cells import cells

from twa_kernels.machine import processor

RESULTS = ROOT / "bench" / "results" / "install.json"
TORCHES = ("2.13.0", "2.10.0", "2.11.0", "newest")
WORKS = "works"
HEADS = {
    "ways": "Ways",
    "tools": "Tools",
    "places": "Places",
    "metadata": "Metadata",
    "wheels": "Wheels",
    "demo": "`twa demo` from a wheel",
}


def tried(box: Box, name: str, function) -> dict[str, object]:
    """Result of a cell."""
    box.log = box.folder / "logs" / ("".join(c if c.isalnum() else "-" for c in name) + ".txt")
    box.log.unlink(missing_ok=True)
    begin = time.monotonic()
    try:
        row = {"result": WORKS, "detail": function(box)}
    except Absent as error:
        row = {"result": "not tried", "detail": f"{error} is not here"}
    except Wrong as error:
        row = {"result": "wrong", "detail": str(error)}
    except (OSError, StopIteration) as error:  # a program or a file that should be there
        row = {"result": "wrong", "detail": f"{type(error).__name__}: {error}"}
    return row | {"seconds": round(time.monotonic() - begin), "commit": box.commit}


def page(results: dict[str, dict]) -> str:
    """The tables of docs/install.md."""
    rows, machine = results["cells"], results["machine"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows.values()))
    lines = [f"{machine['processor']}, {machine['system']}; commits", f"{commits}.", ""]
    for group, head in HEADS.items():
        lines += [f"**{head}**", "", "| | result | |", "|---|---|---|"]
        for key, row in rows.items():
            if key.startswith(f"{group}: "):
                detail = str(row["detail"]).replace("|", "\\|").replace("<", "&lt;")
                result = row["result"]
                if detail.startswith("refused: "):  # as it should be
                    result, detail = detail.split(": ", 1)
                lines.append(f"| {key.split(': ', 1)[1]} | {result} | {detail} |")
        lines.append("")
    return "\n".join(lines + grid(rows))


def grid(rows: dict[str, dict]) -> list[str]:
    """Python and NumPy by PyTorch."""
    found = {
        tuple(part.split(" ")[1] for part in key.split(": ", 1)[1].split(", ")): row
        for key, row in rows.items()
        if key.startswith("stack: ")
    }
    torches = sorted({torch for _, torch, _ in found}, key=lambda t: (t == "newest", t))
    lines = ["**Python, NumPy and PyTorch**", ""]
    lines.append("| Python | NumPy | " + " | ".join(f"torch {t}" for t in torches) + " |")
    lines.append("|---|---|" + "---|" * len(torches))
    for python, numpy in dict.fromkeys((p, n) for p, _, n in found):
        results = []
        for torch in torches:
            row = found.get((python, torch, numpy), {"result": "not tried"})
            version = str(row.get("detail", "")).split(",")[0] if torch == "newest" else ""
            results.append(f"{row['result']} {version.removeprefix('torch ')}".strip())
        lines.append(f"| {python} | {numpy} | " + " | ".join(results) + " |")
    return [*lines, ""]


def main() -> int:
    """Runs the cells that are not done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[""], help="cells whose name has this text")
    parser.add_argument("--again", action="store_true", help="also those that are done")
    parser.add_argument("--torch", nargs="*", default=list(TORCHES), help="versions of PyTorch")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "install-check")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--page", action="store_true", help="print the tables of docs/install.md")
    args = parser.parse_args()
    if args.page:
        print(page(json.loads(RESULTS.read_text())))
        return 0
    box = Box(args.out.resolve(), sys.executable)
    file = box.folder / "cells.json"
    rows = json.loads(file.read_text()) if file.is_file() else {}
    for group, name, function in cells(args.torch):
        key = f"{group}: {name}"
        if not any(text in key for text in args.only):
            continue
        if not args.again and rows.get(key, {}).get("result") == WORKS:
            continue
        rows[key] = tried(box, key, function)
        progress(
            f"{rows[key]['result']:9s} {rows[key]['seconds']:5d} s  {key}: {rows[key]['detail']}"
        )
        file.write_text(json.dumps(rows, indent=1))
    if args.save:
        libc = " ".join(platform.libc_ver())
        machine = {"processor": processor(), "system": f"{platform.system()}, {libc}"}
        RESULTS.write_text(json.dumps({"machine": machine, "cells": rows}, indent=1) + "\n")
    wrong = [key for key, row in rows.items() if row["result"] == "wrong"]
    progress(f"{len(rows) - len(wrong)} cells, {len(wrong)} wrong: {', '.join(wrong)}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
