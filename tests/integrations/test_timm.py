"""twa.Recorder in timm's training loop: its models, optimizers, scheduler, scaler, average and
checkpoints.

timm takes its torchvision into the process, and with it other imports end in errors: all of this
runs in a process of its own, once, and the tests look at how each part of it ended.
"""

import json
import math
import sys
import traceback
from pathlib import Path

import processes
import pytest
import timm_apart
import torch
import torch.nn.functional as F
import twa
from states import assert_same, snapshots

DECAY = 0.8
HALF_LIFE = math.log(0.5) / math.log(DECAY)  # in steps
STEPS, UPDATES = 8, 4  # batches of a training, and steps: two batches each


def batches(begin=0):
    g = torch.Generator().manual_seed(begin)
    return [
        (torch.randn(4, 3, 32, 32, generator=g), torch.randint(4, (4,), generator=g))
        for _ in range(STEPS)
    ]


class Run:
    """The pieces of timm's train.py, and a recorder beside its own average."""

    def __init__(self, rule="adamw", record=True, **options):
        import timm
        from timm.optim import create_optimizer_v2
        from timm.scheduler import create_scheduler_v2
        from timm.utils import ModelEmaV3, NativeScaler

        torch.manual_seed(0)
        self.model = timm.create_model("test_resnet", num_classes=4, drop_rate=0.2)
        self.optimizer = create_optimizer_v2(self.model, rule, lr=0.01, weight_decay=0.05)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, num_epochs=4, updates_per_epoch=UPDATES, step_on_epochs=False
        )
        self.scaler, self.average = NativeScaler("cpu"), ModelEmaV3(self.model, decay=DECAY)
        self.recorder, self.states = None, []
        if record:
            self.recorder = twa.Recorder(self.model, **{"every": 1} | options)
            self.recorder.attach(self.optimizer)

    def train(self, epoch=0):
        torch.manual_seed(epoch)  # of dropout
        for k, (x, y) in enumerate(batches(epoch)):
            last = k % 2 == 1
            loss = F.cross_entropy(self.model(x), y) / 2
            parameters = self.model.parameters()
            self.scaler(loss, self.optimizer, 1.0, parameters=parameters, need_update=last)
            if last:
                self.optimizer.zero_grad()
                updates = epoch * UPDATES + k // 2 + 1
                self.average.update(self.model, step=updates)
                self.scheduler.step_update(updates)
                self.states.append(state_of(self.model))
        return self


def state_of(model):
    return {key: t.detach().clone() for key, t in model.state_dict().items()}


def distance(a, b):
    """Between trained weights, as a root mean square."""
    keys = [key for key, t in b.items() if t.is_floating_point() and "running" not in key]
    return torch.cat([(a[key] - b[key]).flatten() for key in keys]).square().mean().sqrt().item()


# What is tried ------------------------------------------------------------------------------------


def the_average_of_timm():
    """ "ema" of the snapshots is ModelEmaV3's, and BatchNorm can be measured for it."""
    run = Run().train().train(1)
    assert run.recorder.steps == list(range(1, 2 * UPDATES + 1))
    theirs, live = state_of(run.average.module), state_of(run.model)
    with run.recorder.averaged("ema", half_life=HALF_LIFE):
        mine = state_of(run.model)
    assert_same(state_of(run.model), live)
    apart = distance(theirs, live)
    assert apart > 1e-4 and distance(mine, theirs) < 0.05 * apart, (apart, distance(mine, theirs))
    for key in ("bn1.running_mean", "bn1.running_var"):
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-4, atol=1e-5)
    run.recorder.apply("ema", half_life=HALF_LIFE)
    loader = batches(7)
    twa.update_bn(loader, run.model)
    measured = state_of(run.model)
    assert not torch.equal(measured["bn1.running_mean"], mine["bn1.running_mean"])
    assert distance(measured, mine) == 0
    run.model.eval()
    assert torch.isfinite(run.model(loader[0][0])).all()


def training_is_left_alone():
    """Weights, timm's average and the random numbers have the same bits without a recorder."""
    runs, random = [], []
    for record in (True, False):
        runs.append(Run(record=record).train())
        random.append(torch.get_rng_state())
    assert torch.equal(*random)
    assert_same(*(state_of(run.model) for run in runs))
    assert_same(*(state_of(run.average.module) for run in runs))


def lookahead():
    """What is recorded are the weights after the slow ones were mixed in, not before."""
    from timm.optim import Lookahead

    run = Run("lookahead_adamw").train().train(1)  # they are at each 6th step
    assert isinstance(run.optimizer, Lookahead) and run.recorder.count == 2 * UPDATES
    moved = distance(run.states[5], run.states[4])
    for found, state in zip(snapshots(run.recorder)[1:], run.states[1:], strict=True):
        assert distance(found, state) < 0.2 * moved


def optimizers_of_timm():
    for rule in ("sgd", "muon", "lamb", "adafactorbv", "lion"):
        run = Run(rule).train()
        assert run.recorder.steps == list(range(1, UPDATES + 1)), rule
        assert distance(snapshots(run.recorder)[-1], run.states[-1]) < 1e-3, rule


def going_on(folder):
    """From timm's checkpoint, which holds no recorder: the count is timm's number of updates."""
    from timm.models import resume_checkpoint
    from timm.utils import CheckpointSaver

    run = Run(path=folder / "run").train()
    CheckpointSaver(
        run.model, run.optimizer, amp_scaler=run.scaler, checkpoint_dir=folder, recovery_dir=folder
    ).save_checkpoint(0, metric=1.0)
    run.train(1)
    run.recorder.close()
    resumed = Run(path=folder / "run", resume=True)
    epoch = resume_checkpoint(
        resumed.model, folder / "last.pth.tar", resumed.optimizer, resumed.scaler, log_info=False
    )
    resumed.scheduler.step_update(epoch * UPDATES)
    resumed.recorder.rewind(epoch * UPDATES)
    resumed.train(epoch)
    assert_same(state_of(resumed.model), state_of(run.model))
    straight = Run(path=folder / "straight").train().train(1)
    for mine, theirs in zip(snapshots(resumed.recorder), snapshots(straight.recorder), strict=True):
        assert_same(mine, theirs)


def a_scheduler_before(folder):
    """torch's schedulers take down the step of Lookahead as it is, without hooks: refused."""
    from timm.optim import Lookahead

    model = torch.nn.Linear(3, 3)
    made = [Lookahead(torch.optim.SGD(model.parameters(), lr=0.1)) for _ in range(2)]
    torch.optim.lr_scheduler.LambdaLR(made[0], lambda k: 1.0)
    recorder = twa.Recorder(model, every=1)
    with pytest.raises(twa.TwaError, match="attach before a scheduler is made"):
        recorder.attach(made[0])
    recorder.attach(made[1])
    model(torch.ones(3)).sum().backward()
    made[1].step()
    assert recorder.count == 1


PARTS = {
    part.__name__: part
    for part in (
        a_scheduler_before,  # first: Lookahead is as it comes
        the_average_of_timm,
        training_is_left_alone,
        lookahead,
        optimizers_of_timm,
        going_on,
    )
}


# The process --------------------------------------------------------------------------------------


def main(folder):
    timm_apart.prepare()
    torch.set_num_threads(1)
    ends = {}
    for name, part in PARTS.items():
        try:
            part(*([folder] if part.__code__.co_argcount else []))
            ends[name] = "passed"
        except Exception:
            ends[name] = traceback.format_exc()
    (folder / "ends.json").write_text(json.dumps(ends))


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    if not timm_apart.is_here():
        pytest.skip("needs timm")
    folder = tmp_path_factory.mktemp("timm")
    processes.job(1, [sys.executable, __file__, str(folder)])
    return json.loads((folder / "ends.json").read_text())


@pytest.mark.parametrize("part", PARTS)
def test_in_timms_loop(ends, part):
    assert ends[part] == "passed", ends[part]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
