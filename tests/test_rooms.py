"""Imports between the rooms of python/twa point one way, and no files import each other in a
circle.

docs/architecture.md draws the same order.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TWA = ROOT / "python" / "twa"
#: folders and root modules, from the ground up; those in a line know nothing of each other
FLOORS = [
    "version",
    "io",
    "averages coordinates dtensors",
    "basis spectral_norm",
    "distributed",
    "batchnorm packing export",
    "subspace",
    "iterate_average grad_hooks",
    "optimizer",
    "presets tasks",
    "merge",
    "inspection demo",
    "cli",
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms.split()}


def name_of(path):
    """ "io.candidates" of python/twa/io/candidates.py"""
    parts = path.relative_to(TWA).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in TWA.rglob("*.py")}


def imports_of(module):
    """Modules of this package that a module imports, wherever in it, but for type checkers."""
    tree, package = ast.parse(MODULES[module].read_text()), module.split(".")[:-1]
    if MODULES[module].name == "__init__.py":
        package = [part for part in module.split(".") if part]
    for_types = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node in for_types:
            continue
        if node.level:
            base = package[: len(package) - (node.level - 1)]
        elif (node.module or "").split(".")[0] == "twa":
            base = []
        else:
            continue
        inside = (node.module or "").removeprefix("twa").strip(".")
        source = ".".join([*base, *filter(None, [inside])])
        for alias in node.names:
            below = f"{source}.{alias.name}".strip(".")
            found.add(below if below in MODULES else source)
    return found - {"", module}


def room_of(module):
    return module.split(".")[0]


def test_every_room_has_its_floor():
    rooms = {room_of(m) for m in MODULES} - {"", "__main__"}
    assert rooms == set(FLOOR)


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"", "__main__"}))
def test_imports_point_down(module):
    mine = room_of(module)
    for other in map(room_of, imports_of(module)):
        assert other == mine or FLOOR[other] < FLOOR[mine], f"{module} imports {other}"


def test_there_are_no_circles():
    try:
        TopologicalSorter({m: imports_of(m) for m in MODULES if m}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_only_the_command_line_parses_arguments():
    for module, path in MODULES.items():
        if room_of(module) != "cli":
            assert "argparse" not in path.read_text().replace("argparse.Namespace", ""), module
