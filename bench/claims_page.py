"""The results of `twa recipe all -o DIR` as pages: bench/results/claims/, and the tables of
docs/claims.md between their marks.

Run: python bench/claims.py [DIR]. Without DIR the pages are written again from
bench/results/claims/*.json.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from claims import suite
from claims.rows import Rows, pivot, table
from common import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "claims.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS / "claims")
    folder = parser.parse_args().folder
    (RESULTS / "claims").mkdir(parents=True, exist_ok=True)
    text = PAGE.read_text()
    for name in suite.RECIPES:
        found = json.loads((folder / f"{name}.json").read_text())
        rows, module = Rows(found["rows"]), suite.recipe(name)
        suite.write_page(
            RESULTS / "claims", name, rows, found["command"], found["seconds"], found["hardware"]
        )
        shown = (
            pivot(rows)
            if getattr(module, "PIVOT", False)
            else table(rows, getattr(module, "METRIC", ""))
        )
        block = f"<!-- {name} -->\n{shown}\n<!-- end -->"
        text, count = re.subn(
            rf"<!-- {name} -->.*?<!-- end -->", lambda _, b=block: b, text, flags=re.S
        )
        if count != 1:
            raise SystemExit(f"{PAGE}: expected one place for the table of {name}, found {count}")
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
