"""The notebook of examples/: its code runs as plain Python, and what it says of results holds."""

import ast
import json
import os
import re
import sys
from pathlib import Path

import processes
import pytest
import torch

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[2] / "examples"
CELLS = json.loads((EXAMPLES / "averaging_a_fine_tune.ipynb").read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
TEXT = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]

#: run behind the notebook's own code
FOUND = """
torch.save(
    {
        "log": log,
        "found": found,
        "last": [row["eval_loss"] for row in log if "eval_loss" in row][-1],
        "results": [(r.method, r.val_loss, r.test_loss, r.is_trained) for r in outcome.results],
        "winner": outcome.winner.method,
        "beta": beta,
        "reached": reached,
        "sizes": (size(folder / "_twa"), count * weights, count * checkpoint),
        "count": count,
    },
    "found.pt",
)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What the notebook's code has left in its variables, and the directory that it ran in."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "notebook.py").write_text("\n".join([*CODE, FOUND]))
    folders = [str(EXAMPLES), os.environ.get("PYTHONPATH", "")]
    environment = {"MPLBACKEND": "agg", "PYTHONPATH": os.pathsep.join(folders)}
    done = processes.run(
        [sys.executable, "notebook.py"],
        cwd=folder,
        env=os.environ | environment | {"TMPDIR": str(tmp_path_factory.mktemp("temporary"))},
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "found.pt"), folder


@pytest.fixture(scope="module")
def found(ran):
    return ran[0]


def test_it_leaves_nothing_beside_it(ran):
    assert sorted(path.name for path in ran[1].iterdir()) == ["found.pt", "notebook.py"]


def test_the_average_beside_the_model(found):
    steps = [
        [row["step"] for row in found["log"] if name in row]
        for name in ("eval_loss", "eval_avg_loss")
    ]
    assert steps[0] == steps[1] == list(range(40, 321, 40)) and found["count"] == 32
    average = [row["eval_avg_loss"] for row in found["log"] if "eval_avg_loss" in row]
    model = [row["eval_loss"] for row in found["log"] if "eval_loss" in row]
    assert all(a < m for a, m in zip(average[3:], model[3:], strict=True))


@pytest.mark.parametrize("scheme", ["ema", "lawa", "wsm"])
def test_horizons(found, scheme):
    """The best is neither the shortest nor the longest, and better than the last weights."""
    first, *between, last = found["found"][scheme]
    assert min(between) < min(first, found["last"]) and last > found["last"]


def test_the_winner(found):
    results = {method: (val, test) for method, val, test, _ in found["results"]}
    val, test = results[found["winner"]]
    assert val == min(val for val, _ in results.values())
    assert test < results["last"][1] - 0.05
    trained = [val for _, val, _, is_trained in found["results"] if is_trained]
    assert len(trained) == 2 and max(trained) <= results["start"][0] + 1e-6
    assert found["reached"]["trained"] == pytest.approx((val, test), abs=1e-4)


def test_merge_weights_sum_to_one(found):
    assert found["beta"].shape[0] == 32
    torch.testing.assert_close(found["beta"].sum(0), torch.ones_like(found["beta"][0]))


def test_loaded_models_reach_the_same(found):
    assert len(found["reached"]) == 3 and len(set(found["reached"].values())) == 1


def test_sizes(found):
    recording, weights, checkpoints = found["sizes"]
    assert 5 * recording < weights and 2.5 * weights < checkpoints


# The file -----------------------------------------------------------------------------------------


def test_it_is_kept_without_outputs():
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert 12 <= len(CELLS) <= 18
    for text in CODE:
        ast.parse(text)
    assert max(len(line) for text in [*CODE, *TEXT] for line in text.splitlines()) <= 100


def test_links_lead_somewhere():
    links = [link for text in TEXT for link in re.findall(r"\]\(([^()\s]+)\)", text)]
    assert links and all((EXAMPLES / link).exists() for link in links)
