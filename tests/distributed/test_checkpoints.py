"""Coefficients inside a training's own torch.distributed.checkpoint, also one that is saved while
training goes on, and read by another number of ranks.
"""

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import twa
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from twa.io.errors import CandidateError, StateError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BATCH = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def heap(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heap")
    for k in range(4):
        torch.manual_seed(k)
        save_file(net().state_dict(), folder / f"c{k}.safetensors")
    return folder


def net():
    return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


class Run:
    """A sharded model, its subspace and the optimizer; the same data on any number of ranks."""

    def __init__(self, group, heap, **options):
        self.model = net()
        fully_shard(self.model, mesh=DeviceMesh.from_group(group, "cpu"))
        self.subspace = twa.Subspace.from_candidates(
            self.model, twa.Candidates(f"{heap}/c*.safetensors"), bits=32, group=group
        )
        self.optimizer = twa.SubspaceOptimizer(self.subspace, torch.optim.AdamW, lr=0.05, **options)

    def step(self):
        F.cross_entropy(self.model(BATCH), torch.arange(12) % 3).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self):
        weights = {k: t.full_tensor().clone() for k, t in self.model.state_dict().items()}
        return self.subspace.coefficients.detach().clone(), weights


def saved(group, heap, folder, low_memory):
    """What was saved, and where three more steps lead."""
    run = Run(group, heap, low_memory=low_memory)
    for _ in range(3):
        run.step()
    kept = {"model": run.model.state_dict(), "subspace": run.subspace, "twa": run.optimizer}
    if not low_memory:
        kept["optimizer"] = get_optimizer_state_dict(run.model, run.optimizer)
    x = run.subspace.coefficients
    moved = [x, *run.optimizer.state[x].values()]
    before, values = run.state(), [t.detach().clone() for t in moved]
    writing = dcp.async_save(kept, checkpoint_id=folder, process_group=group)
    with torch.no_grad():  # as training does meanwhile, but without messages on the same group
        for t in moved:
            t += 1
        writing.result()
        for t, value in zip(moved, values, strict=True):
            t.copy_(value)
    for _ in range(3):
        run.step()
    return before, run.state()


def loaded(group, heap, folder, low_memory):
    """The same of a run that goes on from there; and a subspace alone."""
    run, options = Run(group, heap, low_memory=low_memory), {"checkpoint_id": folder}
    options["process_group"] = group
    with pytest.raises(StateError, match=r"without exp_avg, exp_avg_sq, step: dcp\.load fills"):
        dcp.load({"twa": run.optimizer}, **options)
    if low_memory:  # it is all there after a step
        run.step()
        dcp.load({"twa": run.optimizer}, **options)
    else:
        state = get_optimizer_state_dict(run.model, run.optimizer)
        dcp.load({"optimizer": state}, **options)
        set_optimizer_state_dict(run.model, run.optimizer, state)
    before = run.state()
    for _ in range(3):
        run.step()
    other = Run(group, heap)
    dcp.load({"subspace": other.subspace}, **options)
    return before, run.state(), other.state()


@pytest.mark.parametrize("low_memory", [False, True])
def test_saved_while_training_goes_on_and_read_by_other_ranks(ranks, heap, tmp_path, low_memory):
    (x, weights), (y, later) = ranks.run(2, saved, heap, tmp_path / "c", low_memory)[0]
    assert (x - y).abs().max() > 0.05
    for size in (1, 2, 4):
        for before, after, other in ranks.run(size, loaded, heap, tmp_path / "c", low_memory):
            for found, model in (before, other):
                assert torch.equal(found, x)
                assert all(torch.equal(t, weights[key]) for key, t in model.items())
            torch.testing.assert_close(after[0], y, rtol=0, atol=0 if size == 2 else 1e-5)
            for key, t in after[1].items():
                torch.testing.assert_close(t, later[key], rtol=0, atol=0 if size == 2 else 1e-5)
    # and it is a candidate: the model in it is
    found = twa.Candidates(tmp_path / "c")[0]
    assert found.info.keys() == weights.keys()
    assert all(torch.equal(found.tensor(key), t) for key, t in weights.items())


def test_a_checkpoint_from_before_there_were_versions(heap, tmp_path):
    def run(steps):
        model = net()
        candidates = twa.Candidates(f"{heap}/c*.safetensors")
        subspace = twa.Subspace.from_candidates(model, candidates)
        optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW, lr=0.05)
        for _ in range(steps):
            F.cross_entropy(model(BATCH), torch.arange(12) % 3).backward()
            optimizer.step()
        return optimizer

    old, new, options = run(1), run(2), {"checkpoint_id": tmp_path / "c", "no_dist": True}
    kept = old.state_dict()
    assert kept["param_groups"][0].pop("format") == "twa-optimizer-1"
    dcp.save({"twa": kept}, **options)
    state = new.state_dict()
    with pytest.raises(dcp.CheckpointException, match="format"):
        dcp.load({"twa": state}, **options)
    assert not torch.equal(new.subspace.coefficients, old.subspace.coefficients)
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load({"twa": state}, planner=planner, **options)
    new.load_state_dict(state)
    assert torch.equal(new.subspace.coefficients, old.subspace.coefficients)


def unfinished(group, heap, folder):
    """Two whole checkpoints, and one that is being written."""
    run = Run(group, heap)
    for step in (9, 10, 11):
        run.step()
        kept = {"model": run.model.state_dict()}
        writing = dcp.async_save(kept, checkpoint_id=folder / f"step-{step}", process_group=group)
        writing.result()


def test_a_directory_whose_save_has_not_ended(ranks, heap, tmp_path):
    ranks.run(2, unfinished, heap, tmp_path)
    late = tmp_path / "step-10"
    (late / ".metadata").rename(late / ".metadata.tmp")  # as it is called until it is whole
    for paths in (tmp_path, f"{tmp_path}/step-*"):
        found = twa.Candidates(paths)
        assert [c.name for c in found] == ["step-9", "step-11"]
        assert found.notes == ["left out, as its save has not ended (no .metadata): step-10"]
    with pytest.raises(CandidateError, match=r"step-10: not complete: .*\.metadata last"):
        twa.Candidates([tmp_path / "step-9", late])
    assert isinstance(found[0].tensor("0.weight"), torch.Tensor)
    assert not isinstance(found[0].tensor("0.weight"), DTensor)
