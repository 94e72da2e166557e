"""Published claims about trainable weight averaging, each tested by an experiment of its own.

    python bench/claims pretrained  # or paper, border, head, tail, soup, ..., all

A claim is a module with TITLE, CLAIM, `run(job)`, which makes the rows of its table,
`findings(rows)` and `picture(figure, rows)`; METRIC, PIVOT, ACCURACIES and FIGURE if they are not
the usual.
"""

from __future__ import annotations

import importlib
from types import ModuleType

CLAIMS = (
    "pretrained",
    "adapters",
    "paper",
    "border",
    "head",
    "tail",
    "soup",
    "boundary",
    "bits",
    "beyond",
)
GPU = ("pretrained", "adapters", "paper")  # those with a form for a GPU, `--scale gpu`
#: those that `all --data` leaves out: border takes none, the others labelled texts alone
OWN_DATA = ("pretrained", "adapters", "border")


def claim(name: str) -> ModuleType:
    """The module of a claim, imported when it is asked for."""
    return importlib.import_module(f"claims.{name}")
