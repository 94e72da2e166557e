"""The examples of README.md and docs/tasks.md run as they stand, with the names that they take for
granted.
"""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from twa.io.candidates import Candidates
from twa.merge.run import Merge
from twa.merge.settings import Settings, TwaMethod
from twa.tasks.contract import load_task

import twa_kernels as tk

ROOT = Path(__file__).parent.parent


def examples(path):
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.S)


def net():
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 1)
    )


def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    for k in range(4):
        torch.manual_seed(k)
        save_file(net().state_dict(), f"run/step_{k}.safetensors")
    return {
        "model": net(),
        "loss": loss,
        "loader": [(torch.randn(16, 6), torch.randn(16, 1)) for _ in range(5)],
        "twa_kernels": tk,
    }


def test_trainer_example(trainer, tmp_path):
    code = next(e for e in examples("README.md") if "SubspaceOptimizer" in e)
    exec(code, trainer)
    assert (tmp_path / "out" / "averaged.safetensors").exists() and (
        tmp_path / "out" / "coefficients.json"
    ).exists()


def test_kernel_examples():
    shapes = [(130,), (5, 7)]
    names = {
        "torch": torch,
        "rows": [torch.randn(3, *s) for s in shapes],
        "center": [torch.randn(s) for s in shapes],
        "grads": [torch.randn(s) for s in shapes],
        "x": torch.zeros(3, 2, requires_grad=True),
        "model": net(),
        "batch": (torch.randn(16, 6), torch.randn(16, 1)),
        "loss": loss,
        "candidates": [net() for _ in range(3)],
    }
    kernels = [e for e in examples("README.md") if "tk." in e]
    assert len(kernels) == 4
    exec(kernels[0], names)
    assert names["c"].shape == (3, 2) and [t.shape for t in names["theta"]] == [
        torch.Size(s) for s in shapes
    ]
    exec(kernels[1], names)
    assert names["x"].grad.shape == (3, 6) and names["x"].grad.abs().sum() > 0
    before = names["model"][0].weight.detach().clone()
    loss(names["model"], names["batch"]).backward()
    exec(kernels[2], names)
    assert not torch.equal(names["model"][0].weight, before) and int(names["state"]["step"]) == 1
    names["W"] = torch.randn(3, 50)[[0, 1, 1, 2]]
    exec(kernels[3], names)
    assert names["o"].rank == 3 and [row for row, _ in names["o"].dropped] == [2]


def test_task_example(tmp_path):
    (task_file := tmp_path / "mytask.py").write_text(examples("docs/tasks.md")[0])
    for k in range(3):
        torch.manual_seed(k)
        save_file(torch.nn.Linear(10, 1).state_dict(), tmp_path / f"c{k}.safetensors")
    methods = (TwaMethod("t", "tensor", 4), TwaMethod("v", "model", 4))
    job = Merge(
        load_task(str(task_file)),
        Candidates(tmp_path / "c*.safetensors"),
        Settings(methods, steps=30),
        progress=False,
    )
    outcome = job.run()
    assert (
        outcome.winner.method.startswith("TWA")
        and outcome.winner.val_loss < outcome.results[1].val_loss
    )
