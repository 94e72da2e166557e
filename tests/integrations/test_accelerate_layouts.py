"""What Accelerate's `save_state` writes: alone, with DDP, with FSDP2 whole and sharded. Averages
come back by its `load_state`.
"""

import sys
from pathlib import Path

import processes
import pytest
import torch
import twa
from safetensors.torch import load_file

pytest.importorskip("accelerate")

SCRIPT = Path(__file__).with_name("accelerate_ranks.py")
COUNT = 12
FSDP = ["FULL_STATE_DICT", "SHARDED_STATE_DICT"]


def launch(folder, size, *kinds):
    """Runs the script alone, or on ranks of one job, as torchrun would."""
    command = [sys.executable, str(SCRIPT), str(folder), *kinds]
    if size > 1:
        processes.job(size, command)
    else:
        done = processes.run(command, env=processes.environment())
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """written(size, kind): the folder of a run on so many ranks."""
    made = {}

    def make(size, kind):
        if size not in made:
            made[size] = tmp_path_factory.mktemp(f"accelerate{size}")
            launch(made[size], size, "plain", *(FSDP if size > 1 else []))
        return made[size] / kind

    return make


@pytest.mark.parametrize(
    ("size", "kind", "files"),
    [
        (1, "plain", ["model.safetensors", "optimizer.bin"]),
        (2, "plain", ["model.safetensors", "random_states_1.pkl"]),
        (2, "FULL_STATE_DICT", ["pytorch_model_fsdp.bin", "optimizer.bin"]),
        (2, "SHARDED_STATE_DICT", ["pytorch_model_fsdp_0", "optimizer_0"]),
    ],
)
def test_save_state(written, size, kind, files):
    folder = written(size, kind)
    out = folder.with_name(f"{kind}_average")
    found, checkpoints = torch.load(out / "found.pt"), folder / "checkpoints"
    beside = {p.name for p in (checkpoints / "checkpoint_0").iterdir()}
    assert beside >= {*files, "scheduler.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"}
    names = [f"checkpoint_{k}" for k in range(COUNT)]
    assert found["names"] == names and not found["notes"]
    for paths in (f"{checkpoints}/*", f"{folder}/*/checkpoint_*"):
        candidates = twa.Candidates(paths)
        assert candidates.names == names and not candidates.notes
    # the last one has been replaced by an average since
    for candidate, state in zip(candidates[:-1], found["states"], strict=False):
        assert candidate.info.keys() == state.keys()
        for key, t in state.items():
            assert torch.equal(candidate.tensor(key), t)
    beta = twa.averages.uniform(COUNT)
    averaged = load_file(out / "averaged.safetensors")
    for key, t in found["average"].items():
        rows = [state[key].double() for state in found["states"]]
        expected = sum(b * row for b, row in zip(beta, rows, strict=True))
        assert torch.equal(t, expected.float()), key
        assert torch.equal(averaged[key], found["weights"][key])
        assert torch.equal(found["loaded"][key], found["weights"][key])
        assert not torch.equal(found["loaded"][key], found["states"][-1][key])


def test_a_project_directory_says_where_its_checkpoints_are(written):
    folder = written(1, "plain")
    with pytest.raises(twa.CandidateError, match=rf"some in checkpoints: '{folder}/\*' names"):
        twa.Candidates(folder)


def test_patterns_into_checkpoints_of_fsdp(written):
    """The optimizer's directory, which is laid out as the model's, is left out and named once."""
    sharded = written(2, "SHARDED_STATE_DICT") / "checkpoints"
    folders = twa.Candidates(f"{sharded}/checkpoint_*/pytorch_model_fsdp_0")
    assert [c.path.parent.name for c in folders] == [f"checkpoint_{k}" for k in range(COUNT)]
    inside = twa.Candidates(f"{sharded}/checkpoint_*/*")
    assert [c.path for c in inside] == [c.path for c in folders]
    assert inside.notes[0].endswith(": optimizer_0 (12 times), scheduler.bin (12 times)")


def test_a_second_model_is_named_by_its_file(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    models = [torch.nn.Linear(2, 2), torch.nn.Linear(3, 1)]
    project = accelerate.utils.ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True)
    accelerator = accelerate.Accelerator(cpu=True, project_config=project)
    prepared = accelerator.prepare(*models)
    seen = []
    for _ in range(COUNT):
        with torch.no_grad():
            prepared[1].weight.add_(1.0)
        accelerator.save_state()
        seen.append(prepared[1].weight.detach().clone())
    candidates = twa.Candidates(f"{tmp_path}/checkpoints/*/model_1.safetensors")
    assert [c.path.parent.name for c in candidates] == [f"checkpoint_{k}" for k in range(COUNT)]
    for candidate, weight in zip(candidates, seen, strict=True):
        assert torch.equal(candidate.tensor("weight"), weight)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
