"""Without a number of steps: a trained average stops when one more is not worth it."""

import math
from types import SimpleNamespace

import pytest
import torch
import twa
from torch import nn
from twa.merge import train
from twa.merge.settings import Settings
from twa.merge.train import NEXT, Trainer, look_steps

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(losses, pace=0.0, noise=0.0, steps=None):
    """One that has looked at every step of the schedule so far, with these losses."""
    made = Trainer.__new__(Trainer)
    made.settings, made.pace, made.keep = Settings(steps=steps), pace, "best"
    made.evaluator = SimpleNamespace(stride=4)
    made.looks, made.note = look_steps(None), ""
    at = sorted(made.looks)[: len(losses)]
    g = torch.Generator().manual_seed(0)
    batches = torch.randn(8, generator=g, dtype=torch.float64)
    made.values = [
        torch.stack([loss + noise * k * batches, torch.ones(8).double()], 1)
        for k, loss in enumerate(losses)
    ]
    made.val_curve = list(zip(at, losses, strict=True))
    made.curve = [0.0] * at[-1]
    return made


def test_it_stops_when_training_on_gains_more():
    # 0.05 over the last 62 steps, so half of 0.0008 a step next
    losses = [2.0, 1.96, 1.95, 1.93, 1.90]
    slow, fast = trainer(losses, pace=0.00039), trainer(losses, pace=0.00041)
    assert not slow.is_spent() and slow.note == ""
    assert fast.is_spent()
    assert (
        fast.note == "stopped after 102 steps: one more gains about 0.0004, one of training 0.00041"
    )
    assert slow.gain == pytest.approx(NEXT * 0.05 / 62)


def test_it_stops_within_the_noise_where_the_pace_is_not_known():
    losses = [2.0, 1.96, 1.95, 1.93, 1.9499]
    made = trainer(losses, noise=0.01)
    assert made.is_spent() and "less than the noise of a look" in made.note
    assert not trainer([2.0, 1.96, 1.95, 1.93, 1.85], noise=0.01).is_spent()


def test_one_batch_has_no_noise_to_stop_at():
    made = trainer([2.0, 1.96, 1.95, 1.93, 1.949])
    made.values = [values[:1] for values in made.values]
    assert not made.is_spent()


def test_it_goes_on_among_the_first_steps_and_with_a_number_of_steps():
    assert not trainer([2.0, 2.1, 2.2, 2.3], pace=1.0).is_spent()
    assert not trainer([2.0, 2.1, 2.2, 2.3, 2.4], pace=1.0, steps=500).is_spent()


def test_patience_counts_at_looks_from_100_steps_on():
    assert not trainer([2.0, 2.1, 2.2, 2.3]).is_stale()
    made = trainer([2.0, 2.1, 2.2, 2.3, 2.4])
    assert made.is_stale() and "no better on validation since step 0" in made.note
    between = trainer([2.0, 2.1, 2.2, 2.3, 2.4])
    between.curve.append(0.0)
    assert not between.is_stale()


def test_a_later_look_is_kept_unless_it_is_worse_for_sure():
    made = trainer([2.0, 1.9])
    noisy = made.values[1] + torch.tensor([[0.03, 0.0]] * 4 + [[-0.02, 0.0]] * 4).double()
    surely = made.values[1] + torch.tensor([0.005, 0.0]).double()
    made.kept = 1
    assert made.is_kept(noisy)  # 0.005 worse, with a standard error of 0.009
    assert not made.is_kept(surely)
    assert not made.is_kept(noisy + 0.006)  # than the best, whichever is kept
    made.evaluator.stride = 1  # all of the validation data: no noise
    assert not made.is_kept(noisy)
    made.evaluator.stride = 4
    made.values = [values[:1] for values in made.values]
    assert not made.is_kept(surely[:1]) and made.is_kept(made.values[1] - 0.001)
    made.kept = None
    assert not made.is_kept(surely * torch.nan) and made.is_kept(surely)
    made.keep = "last"
    assert made.is_kept(surely * torch.nan)


def test_a_run_without_a_number_of_steps():
    torch.manual_seed(0)
    teacher, net = nn.Linear(30, 4), nn.Linear(30, 4)
    x = torch.randn(4096, 30)
    y = teacher(x).detach() + 0.5 * torch.randn(4096, 4)
    batches = list(zip(x.split(32), y.split(32), strict=True))

    def loss(model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    kept, optimizer = [], torch.optim.Adam(net.parameters(), 0.02)
    for step, batch in enumerate(batches[:60], 1):
        optimizer.zero_grad()
        loss(net, batch).backward()
        optimizer.step()
        if step % 10 == 0:
            kept.append({k: t.clone() for k, t in net.state_dict().items()})
    names = [f"step_{10 * (k + 1)}" for k in range(len(kept))]
    candidates = twa.Candidates.of_states(kept, names=names)
    outcome = twa.average(
        net, candidates, batches[60:100], batches[100:], loss, methods=["t:fine:4"], progress=False
    )
    start, trained = outcome.results
    assert start.method == "start" and start.gain > 0
    assert 100 <= trained.steps < 1000 and f"stopped after {trained.steps} steps" in trained.note
    assert trained.val_loss < start.val_loss and outcome.winner is trained
    cost = outcome.cost
    assert cost["steps"] == trained.steps and cost["comparison"] == 0
    assert cost["start"] == pytest.approx(start.looks) and cost["looks"] > 0
    assert "100 more steps of TWA-t" in str(outcome) or "the run still learns" in str(outcome)


def test_a_loss_is_read_after_its_step_is_queued(monkeypatch):
    """And of a step whose loss is NaN nothing is kept."""
    happened, read_later, step = [], train.read_later, twa.SubspaceOptimizer.step

    def watched(number):
        read = read_later(number)

        def later():
            happened.append("read")
            return math.nan if len(happened) > 5 else read()

        return later

    def counted(self):
        happened.append("step")
        step(self)

    monkeypatch.setattr(train, "read_later", watched)
    monkeypatch.setattr(twa.SubspaceOptimizer, "step", counted)
    torch.manual_seed(0)
    net, states = nn.Linear(4, 1), [nn.Linear(4, 1).state_dict() for _ in range(3)]
    data = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(2)]

    def loss(model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    candidates = twa.Candidates.of_states(states, names=["a", "b", "c"])
    outcome = twa.average(
        net, candidates, data, data, loss, methods=["t:tensor:4"], steps=9, progress=False
    )
    assert happened == ["step", "read"] * 3
    assert "stopped: loss nan at step 2" in outcome.results[-1].note
    assert torch.isfinite(net.weight).all()
