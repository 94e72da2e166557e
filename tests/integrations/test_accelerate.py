"""twa.Recorder in loops of Accelerate: attached before and after prepare, to its optimizer and the
one inside; steps that are accumulated or left out; checkpoints; two ranks, DDP and FSDP2.
"""

import json
import sys
import warnings
from pathlib import Path

import processes
import pytest
import torch
import twa
from states import assert_same
from torch import nn

pytest.importorskip("accelerate")

import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from twa.distributed.ranks import DistributedError
from twa.io.errors import StateError, TwaError

pytestmark = pytest.mark.usefixtures("one_thread", "alone")
UNIFORM = twa.averages.uniform(4)


@pytest.fixture
def alone():
    """Accelerate keeps its state for the process: each test has its own."""
    forget()
    yield
    forget()


def forget():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def net(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), norm(20), nn.Tanh(), nn.Linear(20, 3))


def batches(count, begin=0, rank=0):
    g = torch.Generator().manual_seed(10 * rank)
    drawn = [(torch.randn(8, 6, generator=g), torch.randn(8, 3, generator=g)) for _ in range(32)]
    return drawn[begin : begin + count]


class Run:
    """A loop of Accelerate: two batches a step, clipped, with a schedule, and a recorder.

    record: "before" or "after" prepare; None: without a recorder
    to: which optimizer it is attached to
    """

    def __init__(self, record="after", to="wrapper", path=None, resume=False, **options):
        scaler, norm = options.pop("scaler", None), options.pop("norm", nn.BatchNorm1d)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
        self.accelerator.scaler = scaler
        model, self.states = net(norm), []
        inner = torch.optim.AdamW(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda k: 1 / (1 + k))
        given = {"every": 1, "path": path, "resume": resume}
        if record == "before":
            self.recorder = twa.Recorder(model, **given)
        prepared = self.accelerator.prepare(model, inner, schedule)
        self.model, self.optimizer, self.schedule = prepared
        if record == "after":
            self.recorder = twa.Recorder(self.model, **given)
        if record:
            self.recorder.attach(self.optimizer if to == "wrapper" else inner)
            self.accelerator.register_for_checkpointing(self.recorder)

    def train(self, count, begin=0, spoilt=()):
        """So many batches; `spoilt` are those whose loss is infinite."""
        rank = self.accelerator.process_index
        for k, (x, y) in enumerate(batches(count, begin, rank), begin):
            with self.accelerator.accumulate(self.model):
                loss = (self.model(x) - y).square().mean()
                self.accelerator.backward(loss * torch.inf if k in spoilt else loss)
                if self.accelerator.sync_gradients and not spoilt:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients and not self.optimizer.step_was_skipped:
                self.states.append(self.state())
        return self

    def state(self):
        """The model's tensors, by the names that a plain model has."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return {key: whole(t).clone() for key, t in model.state_dict().items()}


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def assert_same_snapshots(a, b):
    for mine, theirs in zip(a.recording(), b.recording(), strict=True):
        assert_same(*({key: c.tensor(key) for key in c.info} for c in (mine, theirs)))


def assert_recorded(recorder, states):
    """Snapshots are those states, as near as 4 bits are."""
    found = recorder.recording()
    assert [c.step for c in found] == list(range(1, len(states) + 1)) == recorder.steps
    for c, state in zip(found, states, strict=True):
        assert c.info.keys() == state.keys()
        for key, t in state.items():
            limit = 0.003 if t.is_floating_point() and "running" not in key else 0
            assert (c.tensor(key).float() - t.float()).abs().max() <= limit, key


@pytest.mark.parametrize(
    "options", [{}, {"mixed_precision": "bf16"}, {"dynamo_backend": "eager"}], ids=str
)
@pytest.mark.parametrize("record", ["before", "after"])
def test_the_optimizer_of_accelerate(record, options):
    """A snapshot for each step that is taken, none for batches in between; nothing else changes."""
    run = Run(record, **options).train(8)
    assert run.recorder.count == 4
    assert_recorded(run.recorder, run.states)
    forget()
    assert_same(Run(None, **options).train(8).state(), run.state())
    forget()
    inner = Run(record, "inner", **options).train(8).recorder
    assert_same_snapshots(run.recorder, inner)


def test_steps_that_the_scaler_leaves_out():
    """They do not count, as Accelerate's own scheduler has it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    run = Run(scaler=scaler).train(12, spoilt=(4, 7))
    assert run.schedule.scheduler.last_epoch == run.recorder.count == 4
    assert_recorded(run.recorder, run.states)


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_save_state_and_load_state(kind, tmp_path):
    """A run that goes on from a checkpoint has the codes of one that was never stopped."""
    path = tmp_path / "run" if kind == "files" else None
    run = Run(path=path).train(8)
    run.accelerator.save_state(tmp_path / "checkpoint")
    run.train(3, begin=8)  # lost, when the process ends
    run.recorder.close()
    forget()
    resumed = Run(path=path, resume=kind == "files")
    assert resumed.recorder.count == (5 if path else 0)
    resumed.accelerator.load_state(tmp_path / "checkpoint")
    assert resumed.recorder.count == 4 and resumed.recorder.steps == [1, 2, 3, 4]
    resumed.train(8, begin=8)
    forget()
    straight = Run(path=path and tmp_path / "straight").train(16)
    assert_same(resumed.state(), straight.state())
    assert_same_snapshots(resumed.recorder, straight.recorder)
    file = tmp_path / "checkpoint" / "custom_checkpoint_0.pkl"
    assert torch.load(file, weights_only=True)["count"] == 4


def test_going_back_in_the_same_process(tmp_path):
    run = Run(path=tmp_path / "run").train(8)
    run.accelerator.save_state(tmp_path / "checkpoint")
    run.train(8, begin=8)
    run.accelerator.load_state(tmp_path / "checkpoint")
    assert run.recorder.steps == [1, 2, 3, 4]
    run.train(8, begin=16)
    assert run.recorder.steps == list(range(1, 9))
    assert_recorded(run.recorder, run.states[:4] + run.states[8:])


def test_what_is_saved_inside_is_the_average(tmp_path):
    """Accelerate's own saving writes what is in the model; then training goes on where it was."""
    run = Run().train(8)
    before = run.state()
    with run.recorder.averaged("uniform"):
        inside = run.state()
        run.accelerator.save_model(run.model, tmp_path / "average")
        assert_same(run.accelerator.get_state_dict(run.model), inside)
    assert_same(run.state(), before)
    average = run.recorder.recording().average(UNIFORM)
    saved = twa.Candidates(tmp_path / "average")[0]
    assert_same({key: saved.tensor(key) for key in saved.info}, average)
    assert_same(inside, average)


# Two ranks ----------------------------------------------------------------------------------------


def on_a_rank(kind, folder):
    """What each rank of test_two_ranks does."""
    options = {}
    if kind == "sharded":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="NO_WRAP", cpu_ram_efficient_loading=False
        )
        # on CPUs Accelerate takes no notice of the plugin: it shards for GPUs only
        Accelerator(cpu=True, fsdp_plugin=plugin)
        for state in (PartialState(), AcceleratorState()):
            state.distributed_type = DistributedType.FSDP
        AcceleratorState().fsdp_plugin = plugin
        # FSDP2 leaves BatchNorm's statistics to each rank, and a checkpoint has those of one
        options["norm"] = nn.LayerNorm
    run = Run(path=folder / "run", **options)
    run.accelerator.save_state(folder / "begin")  # FSDP2: steps the optimizer, to have its state
    assert run.recorder.count == 0
    run.train(8).accelerator.save_state(folder / "checkpoint")
    run.train(8, begin=8)
    with run.recorder.averaged("uniform"):
        inside = run.state()
    run.recorder.save(folder / "uniform.safetensors", "uniform")
    steps, end = run.recorder.steps, run.state()
    run.recorder.close()
    dist.barrier()
    resumed = Run(path=folder / "run", resume=True, **options)
    resumed.accelerator.load_state(folder / "checkpoint")
    assert resumed.recorder.count == 4
    resumed.train(8, begin=8)
    with resumed.recorder.averaged("uniform"):
        assert_same(resumed.state(), inside)
    assert_same(resumed.state(), end)
    said = "none"
    if kind == "sharded":
        assert hasattr(run.accelerator.unwrap_model(run.model)[0].weight, "full_tensor")
        with pytest.raises(TwaError) as error:
            Run("before", **options)
        said = str(error.value)
        alone = Run(**options).train(4)  # in memory, a rank's state is its own
        alone.accelerator.save_state(folder / "alone")
        error = StateError if dist.get_rank() == 1 else DistributedError  # which quotes it
        with pytest.raises(error, match="nothing of this rank, rank 1 of 2"):
            alone.accelerator.load_state(folder / "alone")
    print(json.dumps([steps, said]))


@pytest.mark.parametrize("kind", ["copies", "sharded"])
def test_two_ranks(kind, tmp_path):
    """Averages, checkpoints and going on, with DDP and with FSDP2; one process reads the files."""
    command = [sys.executable, __file__, kind, str(tmp_path)]
    first, second = (json.loads(said) for said in processes.job(2, command))
    steps = list(range(1, 9))
    assert first[0] == steps and second[0] == ([] if kind == "copies" else steps)
    if kind == "sharded":
        assert "belongs after fully_shard or accelerator.prepare" in first[1] and second == first
    found = twa.Candidates(tmp_path / "run")
    assert [c.step for c in found] == steps
    saved = twa.Candidates(tmp_path / "uniform.safetensors")[0]
    average = found.average(twa.averages.uniform(8))
    assert_same({key: saved.tensor(key) for key in saved.info}, average)
    net(nn.LayerNorm if kind == "sharded" else nn.BatchNorm1d).load_state_dict(average)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    on_a_rank(sys.argv[1], Path(sys.argv[2]))
    dist.destroy_process_group()
    processes.leave_job()
