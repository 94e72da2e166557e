"""What test_accelerate_layouts.py runs, on one or several ranks: python accelerate_ranks.py FOLDER
KIND...

A KIND is plain (one process, or DDP), FULL_STATE_DICT or SHARDED_STATE_DICT of FSDP2; each gets a
folder of its name. Accelerate takes FSDP for GPUs alone; it is told here that these ranks are such,
and all else is its own.
"""

import shutil
import sys
import warnings
from pathlib import Path

import processes
import torch
import twa
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from safetensors.torch import load_file
from torch import nn

COUNT = 12


class Counter:
    """An object that is registered for checkpoints."""

    def state_dict(self):
        return {"count": torch.ones(3)}

    def load_state_dict(self, state):
        assert torch.equal(state["count"], torch.ones(3))


def prepared(folder, kind):
    """An accelerator, the model and its optimizer."""
    sharded = kind.endswith("STATE_DICT")
    options = {}
    if sharded:
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            state_dict_type=kind,
            auto_wrap_policy="no_wrap",
            cpu_ram_efficient_loading=False,
        )
    project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True)
    accelerator = Accelerator(cpu=True, project_config=project, **options)
    if sharded:
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = options["fsdp_plugin"]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * COUNT)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    accelerator.register_for_checkpointing(Counter())
    return accelerator, model, optimizer, schedule


def whole(model):
    """A copy of the model's state_dict, of whole tensors."""
    state = model.state_dict()
    return {
        key.removeprefix("module."): (t.full_tensor() if hasattr(t, "full_tensor") else t).clone()
        for key, t in state.items()
    }


def main(folder, kind):
    accelerator, model, optimizer, schedule = prepared(folder, kind)
    states = []
    for _ in range(COUNT):
        x = torch.randn(8, 3)
        accelerator.backward((model(x) - x.sum(1, keepdim=True)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        accelerator.save_state()
        states.append(whole(model))
    accelerator.wait_for_everyone()
    plain = accelerator.unwrap_model(model)
    checkpoints, out = folder / "checkpoints", folder.with_name(f"{kind}_average")
    candidates = twa.Candidates(checkpoints)
    twa.load_average(plain, candidates, twa.averages.uniform(COUNT))
    average = whole(model)
    subspace = twa.Subspace.from_candidates(plain, candidates)
    subspace.set_merge_weights(twa.averages.ema(COUNT, 0.5))
    subspace.save(out, dcp=True)
    weights = whole(model)
    # the result in the place of a checkpoint's weights
    last = checkpoints / f"checkpoint_{COUNT - 1}"
    if accelerator.is_main_process:
        put_back(out, last)
    accelerator.wait_for_everyone()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    accelerator.load_state(str(last))
    loaded = whole(model)
    if accelerator.is_main_process:
        names = [c.path.name for c in candidates]
        found = {"names": names, "notes": list(candidates.notes), "states": states}
        found |= {"average": average, "weights": weights, "loaded": loaded}
        torch.save(found, out / "found.pt")
    accelerator.wait_for_everyone()


def put_back(average, checkpoint):
    """Puts an average in the place of the weights in a checkpoint, whatever its layout."""
    averaged = average / "averaged.safetensors"
    if (checkpoint / "pytorch_model_fsdp_0").is_dir():
        shutil.rmtree(checkpoint / "pytorch_model_fsdp_0")
        shutil.copytree(average / "averaged_dcp", checkpoint / "pytorch_model_fsdp_0")
    elif (checkpoint / "pytorch_model_fsdp.bin").is_file():
        (checkpoint / "pytorch_model_fsdp.bin").unlink()  # candidates may have it mapped
        torch.save(load_file(averaged), checkpoint / "pytorch_model_fsdp.bin")
    else:
        (checkpoint / "model.safetensors").unlink()
        shutil.copy(averaged, checkpoint / "model.safetensors")


if __name__ == "__main__":
    warnings.simplefilter("error", twa.CandidateWarning)
    torch.set_num_threads(1)
    for kind in sys.argv[2:]:
        main(Path(sys.argv[1]) / kind, kind)
        AcceleratorState._reset_state(reset_partial_state=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    processes.leave_job()
