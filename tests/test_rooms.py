"""Imports between the rooms of a package point one way, and no files import each other in a circle.

docs/architecture.md draws the same order.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: package -> its folders and root modules, from the ground up; those in a line know nothing of each
#: other
FLOORS = {
    "twa": [
        "version dtensors",
        "io",
        "averages candidates coordinates modes",
        "basis spectral_norm",
        "distributed",
        "batchnorm packing export",
        "subspace",
        "iterate_average grad_hooks rate recorder",
        "optimizer",
        "presets tasks",
        "merge",
        "inspection integrations demo",
        "cli",
    ],
    "twa_kernels": [
        "layout capture machine output version",
        "native",
        "operands scaling guard",
        "basis",
        "backends",
        "registry recorded shift",
        "ops",
        "packer",
        "orthonormalize tune",
    ],
}


class Package:
    """The modules of a package, and what each of them imports from it."""

    def __init__(self, name, folder):
        self.name = name
        self.floor = {
            room: level for level, rooms in enumerate(FLOORS[name]) for room in rooms.split()
        }
        self.modules = {
            self.name_of(path, folder): path
            for path in folder.rglob("*.py")
            if path.name != "_version.py"  # written by a build
        }

    @staticmethod
    def name_of(path, folder):
        """ "io.candidates" of python/twa/io/candidates.py"""
        parts = path.relative_to(folder).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def imports_of(self, module):
        """Modules of this package that a module imports, wherever in it, but for type checkers."""
        path = self.modules[module]
        tree, package = ast.parse(path.read_text()), module.split(".")[:-1]
        if path.name == "__init__.py":
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
            elif (node.module or "").split(".")[0] == self.name:
                base = []
            else:
                continue
            inside = (node.module or "").removeprefix(self.name).strip(".")
            source = ".".join([*base, *filter(None, [inside])])
            for alias in node.names:
                below = f"{source}.{alias.name}".strip(".")
                found.add(below if below in self.modules else source)
        return found - {"", module}


PACKAGES = {
    "twa": Package("twa", ROOT / "python" / "twa"),
    "twa_kernels": Package("twa_kernels", ROOT / "twa_kernels"),
}
FRONT = {"", "__main__"}  # above all rooms
EVERY = [(name, m) for name, p in PACKAGES.items() for m in sorted(p.modules.keys() - FRONT)]


def room_of(module):
    return module.split(".")[0]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_room_has_its_floor(name):
    package = PACKAGES[name]
    assert {room_of(m) for m in package.modules} - FRONT == set(package.floor)


@pytest.mark.parametrize(("name", "module"), EVERY)
def test_imports_point_down(name, module):
    package, mine = PACKAGES[name], room_of(module)
    for other in map(room_of, package.imports_of(module)):
        below = other == mine or package.floor[other] < package.floor[mine]
        assert below, f"{module} imports {other}"


@pytest.mark.parametrize("name", PACKAGES)
def test_there_are_no_circles(name):
    package = PACKAGES[name]
    try:
        TopologicalSorter({m: package.imports_of(m) for m in package.modules if m}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_only_the_command_line_parses_arguments():
    for module, path in PACKAGES["twa"].modules.items():
        if room_of(module) != "cli":
            assert "argparse" not in path.read_text().replace("argparse.Namespace", ""), module
