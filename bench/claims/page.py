"""Pages of claims: a table, findings and a picture of the rows that `claims.suite` has made.

`python bench/claims page [DIR]` takes the results of `python bench/claims all -o DIR` and writes
them as bench/results/claims/, and their tables into docs/claims.md between their marks. Without
DIR the pages are written again from bench/results/claims/*.json.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from pathlib import Path
from types import ModuleType

from twa.io.atomic import write_bytes, write_json, write_text

from . import CLAIMS, claim
from .rows import Rows, pivot, table

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "bench" / "results" / "claims", ROOT / "docs" / "claims.md"


def write_page(
    folder: Path, name: str, rows: Rows, command: str, seconds: float, machine: str
) -> str:
    """Writes NAME.md, NAME.png and NAME.json in the folder; returns the page."""
    module = claim(name)
    text = [f"# {module.TITLE}", "", f"Claim: {module.CLAIM}", "", main_table(module, rows), ""]
    text += [f"- {finding}" for finding in module.findings(rows)]
    text += ["", f"![{module.TITLE}]({name}.png)", "", f"    {command}", ""]
    seeds = ", ".join(map(str, rows.of("seed")))
    text += [
        f"Seeds {seeds}, mean ± sample standard deviation;"
        f" {seconds / 60:.1f} minutes of one process in all; {machine}.",
        "cost: in training steps, where a batch that is only evaluated counts a third."
        " Every choice was made on validation data.",
        "",
    ]
    if is_pivoted(module):
        text += ["Every row:", "", whole_table(module, rows), ""]
    write_text(folder / f"{name}.md", "\n".join(text))
    write_bytes(folder / f"{name}.png", draw(module, rows))
    found = {"command": command, "hardware": machine, "seconds": seconds, "rows": rows}
    write_json(folder / f"{name}.json", found)
    return "\n".join(text)


def is_pivoted(module: ModuleType) -> bool:
    """Whether the claim's main table has a column per setting."""
    return getattr(module, "PIVOT", False)


def whole_table(module: ModuleType, rows: Rows) -> str:
    return table(rows, getattr(module, "METRIC", ""))


def main_table(module: ModuleType, rows: Rows) -> str:
    if not is_pivoted(module):
        return whole_table(module, rows)
    parts = [pivot(rows)]
    if getattr(module, "ACCURACIES", False):
        parts.append(pivot(rows, "metric", f": {module.METRIC}"))
    return "\n\n".join(parts)


def draw(module: ModuleType, rows: Rows) -> bytes:
    """The claim's picture, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=getattr(module, "FIGURE", (14, 5)), layout="constrained")
    module.picture(figure, rows)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    plt.close(figure)
    return buffer.getvalue()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python bench/claims page", description=__doc__)
    parser.add_argument("folder", metavar="DIR", nargs="?", type=Path, default=RESULTS)
    folder = parser.parse_args(argv).folder
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = PAGE.read_text()
    for name in CLAIMS:
        found = json.loads((folder / f"{name}.json").read_text())
        rows = Rows(found["rows"])
        write_page(RESULTS, name, rows, found["command"], found["seconds"], found["hardware"])
        block = f"<!-- {name} -->\n{main_table(claim(name), rows)}\n<!-- end -->"
        marks = rf"<!-- {name} -->.*?<!-- end -->"
        text, count = re.subn(marks, lambda _, b=block: b, text, flags=re.S)
        if count != 1:
            raise SystemExit(f"{PAGE}: expected one place for the table of {name}, found {count}")
    write_text(PAGE, text)
    return 0
