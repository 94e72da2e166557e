"""A pytest plugin: -p shuffle --shuffle SEED runs the tests in a random order, the same for a seed.

With pytest-xdist's --dist loadfile the files are in random order, and the tests of each.
"""

from __future__ import annotations

import random

import pytest


def pytest_addoption(parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="tests in the order of this seed")


@pytest.hookimpl(trylast=True)  # after conftest.py's own order
def pytest_collection_modifyitems(config, items) -> None:
    seed = config.getoption("--shuffle")
    if seed is not None:
        random.Random(seed).shuffle(items)
