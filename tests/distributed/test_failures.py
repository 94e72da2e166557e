"""A rank that fails in a training loop of a user's own: the others quote it."""

import sys
import textwrap

import processes
import pytest
import torch
from safetensors.torch import save_file

LOOP = """
    import os, sys
    import processes, torch, twa
    import torch.distributed as dist

    folder, kind = sys.argv[1:]
    dist.init_process_group("gloo")
    rank, step = dist.get_rank(), 0
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 1))
    subspace = twa.Subspace.from_candidates(
        model, twa.Candidates(f"{folder}/c*.safetensors"), granularity="tensor",
        sharding="replicate")
    low_memory = kind == "backward"
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.1, low_memory=low_memory)
    name = "take_gradient" if low_memory else "project_gradients"
    original = getattr(subspace, name)

    def failing(*arguments):
        if rank == 1 and step == 3:
            raise MemoryError("no room")
        return original(*arguments)

    setattr(subspace, name, failing)
    try:
        for step in range(6):
            if rank == 1 and step == 5:
                os._exit(7)
            model(torch.ones(4, 20)).square().mean().backward()
            try:
                optimizer.step()
            except MemoryError:
                if kind != "goes on":
                    raise
                step = -1
                optimizer.step()
            optimizer.zero_grad()
    except twa.DistributedError as error:
        print(error)
        processes.leave_job()
"""


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("step", "rank 1 failed in a step of the optimizer: MemoryError: no room"),
        ("backward", "rank 1 failed in backward: MemoryError: no room"),
        ("goes on", "rank 0: another rank died or does not answer ("),
    ],
)
def test_the_others_say_why(tmp_path, kind, said):
    """Also when a rank goes on after an error: what it is lost for later is another reason."""
    for k in range(3):
        weights = {"0.weight": (30, 20), "0.bias": (30,), "1.weight": (1, 30), "1.bias": (1,)}
        save_file(
            {name: torch.randn(shape) for name, shape in weights.items()},
            tmp_path / f"c{k}.safetensors",
        )
    script = [sys.executable, "-c", textwrap.dedent(LOOP), str(tmp_path), kind]
    first, second = processes.finish(*processes.start_job(script, script))
    assert first.stdout.startswith(said), first.stdout + first.stderr
    assert second.returncode != 0
