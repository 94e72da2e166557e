"""The files of examples/: each runs as its docstring says, ends with a loss, and is on a page."""

import ast
import math
import os
import re
import shlex
import sys
from pathlib import Path

import processes
import pytest
import timm_apart

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGES = EXAMPLES.parent / "docs" / "trainers"
#: what others import
SHARED = ("digits.py", "text.py")
FILES = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name not in SHARED)
PROGRAMS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
}
RANK = "import processes, runpy, sys; runpy.run_path(sys.argv[1]); processes.leave_job()"
TIMM = "import runpy, sys, timm_apart; timm_apart.prepare(); runpy.run_path(sys.argv[1])"
#: a loss that is reached only if something was learned: of ten classes; of bytes
MOST = {"digits": 0.5, "text": 2.8}


def docstring(name):
    return ast.get_docstring(ast.parse((EXAMPLES / name).read_text()))


def command(name):
    """The last line of the docstring, for this Python and its environment."""
    program, *options, file = shlex.split(docstring(name).splitlines()[-1])
    assert file == f"examples/{name}"
    path = str(EXAMPLES / name)
    if name == "timm_model.py":  # see timm_apart
        return [*PROGRAMS[program], *options, "-c", TIMM, path]
    if program == "torchrun":
        return [*PROGRAMS[program], *options, "--no-python", sys.executable, "-c", RANK, path]
    return [*PROGRAMS[program], *options, path]


def needed(name):
    """Skips the test without what an example imports."""
    if name == "timm_model.py":
        if not timm_apart.is_here():
            pytest.skip("needs timm")
        return
    known = ("transformers", "trl", "peft", "datasets", "lightning", "accelerate")
    for module in re.findall(r"^(?:from|import) (\w+)", (EXAMPLES / name).read_text(), re.M):
        if module in known:
            pytest.importorskip(module)


@pytest.mark.parametrize("name", FILES)
def test_example_runs(name, tmp_path):
    needed(name)
    environment = processes.environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES), environment["PYTHONPATH"]])
    done = processes.run(command(name), cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    last = next((line for line in lines if line.startswith("winner")), lines[-1])
    losses = re.findall(r"loss(?: of the average:|':)? ([^\s,}]+)", last)
    assert losses, last
    (data,) = (kind for kind in MOST if f"\nfrom {kind} import" in (EXAMPLES / name).read_text())
    for loss in map(float, losses):
        assert math.isfinite(loss) and loss < MOST[data], losses


@pytest.mark.parametrize("name", [*FILES, *SHARED])
def test_example_is_short(name):
    assert len((EXAMPLES / name).read_text().splitlines()) < 60


def test_each_is_on_a_page():
    """test_docs.py sees to it that the pages have nothing else."""
    pages = "".join(page.read_text() for page in PAGES.glob("*.md"))
    for name in FILES:
        text = (EXAMPLES / name).read_text()
        assert f"```python\n{text}```\n" in pages, f"{name} differs from what its page shows"
        assert f"    {docstring(name).splitlines()[-1]}\n" in pages, name
