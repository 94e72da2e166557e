"""`RecorderCallback` and `train_average` in Lightning's Trainer on two ranks: DDP and FSDP2."""

import pytest

pytest.importorskip("lightning")


import sys
from pathlib import Path

import lightning_job
import processes
import torch
import twa
from torch.nn.functional import cross_entropy


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """ranks[kind]: the directory of a job on two ranks, and what each rank has found."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("lightning_job.py")
    done = processes.run([sys.executable, str(script), str(folder)], env=processes.environment())
    assert done.returncode == 0, done.stderr
    assert "self.log('avg_" not in done.stderr  # no advice on what this logs
    return {
        kind: (folder / kind, [torch.load(folder / f"{kind}_{rank}.pt") for rank in (0, 1)])
        for kind in ("ddp", "fsdp2")
    }


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks(ranks, kind):
    folder, found = ranks[kind]
    for mine in found:
        assert equal(mine["trained"], mine["without"]) and equal(mine["trained"], mine["continued"])
        assert mine["best"] == 24 and not equal(mine["average"], mine["trained"])
    assert equal(found[0]["average"], found[1]["average"])
    steps = list(range(3, 25, 3))
    assert [mine["steps"] for mine in found] == [steps, steps if kind == "fsdp2" else []]
    # what was validated is the average in the files
    net, data = lightning_job.make_net(), lightning_job.samples()
    candidates = twa.Candidates(folder / "whole" / "twa")
    average = candidates.average(twa.averages.lawa(8, 4))
    net.load_state_dict({name.removeprefix("net."): t for name, t in average.items()})
    with torch.no_grad():
        wanted = float(cross_entropy(net(data.tensors[0]), data.tensors[1]))
    for mine in found:
        assert float(mine["metrics"]["avg_val_loss"]) == pytest.approx(wanted, rel=1e-5)
        assert mine["metrics"]["val_loss"] != mine["metrics"]["avg_val_loss"]
    for rank, mine in enumerate(found):  # as the module has logged them: together, each, or one
        own = {name: value for name, value in mine["metrics"].items() if name[:4] != "avg_"}
        assert {f"avg_{name}" for name in own} == mine["metrics"].keys() - own.keys()
        assert mine["metrics"]["avg_val_rank"] == mine["metrics"]["val_rank"] == rank
        assert ("avg_val_zero" in mine["metrics"]) == (rank == 0)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_fail_together(ranks, kind):
    _, found = ranks[kind]
    for what, said in (("gone", "gone.ckpt"), ("taken", "to go on with it, pass fit")):
        first, second = (mine[what] for mine in found)
        assert said in first and first.split(":")[0] in {"TwaError", "FileNotFoundError"}
        assert second.startswith("DistributedError: rank 0 failed") and said in second


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_go_on_elsewhere(ranks, kind):
    folder, found = ranks[kind]
    assert [mine["elsewhere"] for mine in found] == [mine["steps"] for mine in found]
    whole, again = (twa.Candidates(folder / name / "twa") for name in ("whole", "elsewhere"))
    beta = twa.averages.lawa(8, 8)
    assert equal(whole.average(beta), again.average(beta))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_go_on_with_the_same_recording(ranks, kind):
    folder, _ = ranks[kind]
    whole, again = (twa.Candidates(folder / name / "twa") for name in ("whole", "stopped"))
    assert whole.names == again.names and len(whole) == 8
    for k in range(8):
        beta = twa.averages.candidate(8, k)
        assert equal(whole.average(beta), again.average(beta))


def test_two_ranks_and_what_is_not_the_same(ranks):
    _, sharded = ranks["fsdp2"]
    assert all("expected a path" in mine["refused"] for mine in sharded)
    folder, copies = ranks["ddp"]
    saved = torch.load(folder / "averaged.ckpt", weights_only=True)["state_dict"]
    for mine in copies:
        assert mine["winner"] == copies[0]["winner"]
        assert equal({f"net.{name}": t for name, t in mine["averaged"].items()}, saved)
