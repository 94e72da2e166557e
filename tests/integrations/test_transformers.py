"""RecorderCallback in transformers' Trainer: what is recorded, what is left alone, what the average
is measured to be, and how a training goes on.
"""

import pytest

pytest.importorskip("transformers")


import importlib
import math
import signal
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path

import processes
import torch
import twa
from conftest import run_python
from safetensors.torch import load_file
from states import assert_same
from tiny_hf import AtStep, callback_of, data, files, model, trainer, weights_of
from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, TrainerCallback
from twa import averages
from twa.integrations.transformers import FOLDER, RecorderCallback
from twa.io.errors import CandidateWarning, TwaError
from twa.recorder import store

pytestmark = pytest.mark.usefixtures("one_thread")

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
SCHEMES = {
    "uniform": {},
    "ema": {"half_life": 4},
    "lawa": {"last": 6},
    "wsm": {"last": 9, "decay": "sqrt"},
    "last": {},
}
BEST = {
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_avg_loss",
}


def logged(trained, prefix):
    """The metrics whose names begin so, by step; without times."""
    found = {}
    for row in trained.state.log_history:
        for key, value in row.items():
            timed = key.endswith("per_second") or key in ("eval_runtime", "train_runtime")
            if key.startswith(prefix) and not timed:
                found.setdefault(row["step"], {})[key] = value
    return found


def distance(a, b):
    return sum((a[k].double() - b[k].double()).square().sum() for k in b).sqrt().item()


def steps_of(folder):
    return [c.step for c in twa.Candidates(folder)]


def checkpoint(folder, step):
    return load_file(folder / f"checkpoint-{step}" / "model.safetensors")


def kept(trained):
    """The weights of the training at each step, filled while it is trained."""
    found = {}
    trained.add_callback(AtStep(lambda step: found.update({step: weights_of(trained)})))
    return found


# What is recorded --------------------------------------------------------------------------------


def test_snapshots_outlive_checkpoints(tmp_path):
    """With save_total_limit=1 one checkpoint is left, and all snapshots."""
    options = dict(save_strategy="steps", save_steps=3, save_total_limit=1)
    trainer(tmp_path, {"every": 3}, **options).train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-12"]
    assert steps_of(tmp_path / FOLDER) == [3, 6, 9, 12]


def test_averages_are_those_of_the_checkpoints(tmp_path):
    """Made of the recording, and of the Trainer's own files: they differ by a part of a step."""
    trained = trainer(tmp_path, {"every": 3}, save_strategy="steps", save_steps=3)
    trained.train()
    recorder, steps = callback_of(trained).recorder, [3, 6, 9, 12]
    whole = [checkpoint(tmp_path, step) for step in steps]
    length = sum(distance(a, b) for a, b in pairwise(whole)) / 3
    for scheme, horizon in SCHEMES.items():
        beta = averages.of_steps(steps, scheme, **horizon)
        exact = {
            k: sum(b * w[k].double() for b, w in zip(beta, whole, strict=True)) for k in whole[0]
        }
        recorder.apply(scheme, **horizon)
        found = {k: t for k, t in weights_of(trained).items() if k in exact}
        assert 0 < distance(found, exact) < 0.2 * length, scheme


@pytest.mark.parametrize("path", ["auto", None])
@pytest.mark.parametrize("evaluate", [None, "ema"])
def test_training_is_the_same_with_it(tmp_path, path, evaluate):
    """Weights, optimizer and the model's own metrics have the same bits, with dropout and shuffled
    batches; so have the weights in checkpoints."""
    options = dict(**EVALUATED, save_strategy="steps", save_steps=6)
    plain = trainer(tmp_path / "plain", **options)
    plain.train()
    recorder = {"every": 3, "path": path, "evaluate": evaluate}
    recorder |= {"half_life": 4} if evaluate else {}
    recorded = trainer(tmp_path / "recorded", recorder, **options)  # seeds, as the first did
    recorded.train()
    assert_same(weights_of(recorded), weights_of(plain))
    states = [trained.optimizer.state_dict()["state"] for trained in (plain, recorded)]
    for k, state in states[0].items():
        assert_same(states[1][k], state)
    own = logged(recorded, "eval")
    for row in own.values():
        assert (row.pop("eval_avg_loss", None) is None) == (evaluate is None)
    assert own == logged(plain, "eval")
    for step in (6, 12):
        expected = checkpoint(tmp_path / "plain", step)
        assert_same(checkpoint(tmp_path / "recorded", step), expected)
    assert callback_of(recorded).recorder.steps == [3, 6, 9, 12]
    assert (tmp_path / "recorded" / FOLDER).exists() == (path == "auto")


def test_a_loader_that_is_used_again(tmp_path):
    """Its generator goes on as if the average had not been evaluated."""

    class Kept(Trainer):
        def get_eval_dataloader(self, eval_dataset=None):
            if not hasattr(self, "kept"):
                rows, g = self.eval_dataset[:13], torch.Generator().manual_seed(3)
                self.kept = DataLoader(
                    rows, 8, shuffle=True, generator=g, collate_fn=self.data_collator
                )
            return self.kept

    plain = trainer(tmp_path / "plain", kind=Kept, **EVALUATED)
    plain.train()
    recorder = {"every": 2, "evaluate": "last"}
    recorded = trainer(tmp_path / "recorded", recorder, kind=Kept, **EVALUATED)
    recorded.train()
    assert logged(recorded, "eval_loss") == logged(plain, "eval_loss")


def test_data_that_depend_on_the_pass(tmp_path):
    """The average is evaluated on the same pass as the model, and does not count as one."""

    class Passes(torch.utils.data.Dataset):
        def __init__(self):
            self.epoch, self.seen = 0, []

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __len__(self):
            return 8

        def __getitem__(self, k):
            if k == 0:
                self.seen.append(self.epoch)
            return data(8, 10 + self.epoch)[k]

    class Kept(Trainer):
        def get_eval_dataloader(self, eval_dataset=None):
            if not hasattr(self, "kept"):
                self.kept = super().get_eval_dataloader(eval_dataset)
            return self.kept

    for kind, passes in ((Trainer, [0] * 6), (Kept, [*range(6)])):
        sets = [Passes(), Passes()]
        recorder = {"every": 2, "evaluate": "last"}
        for made, known in zip((None, recorder), sets, strict=True):
            folder, more = tmp_path / f"{kind.__name__}_{made is None}", {"eval_dataset": known}
            trainer(folder, made, kind=kind, more=more, **EVALUATED).train()
        assert sets[0].seen == passes
        assert sets[1].seen == [number for number in passes for _ in range(2)]


def test_masters_are_recorded(tmp_path):
    """Of weights in half precision, those that the optimizer has; weights= goes first."""

    class Masters(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                state.setdefault("master_weight", p.detach().float())
                state["master_weight"] -= 1e-4
                p.copy_(state["master_weight"])

    for weights in (None, lambda name, p: torch.full(p.shape, 2.0)):
        net = model().to(torch.bfloat16)
        optimizer = Masters(net.parameters(), lr=0.1)
        more = {"optimizers": (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))}
        recorder = {"every": 3, "path": None, "bits": 8, "weights": weights}
        trained = trainer(tmp_path, recorder, net=net, more=more)
        with warnings.catch_warnings():
            warnings.simplefilter("error", CandidateWarning)  # of rounded steps
            trained.train()
        last = callback_of(trained).recorder.recording()[-1]
        for name, p in net.named_parameters():
            master = optimizer.state[p]["master_weight"]
            assert not torch.equal(master, p.float())
            expected = master if weights is None else torch.full(p.shape, 2.0)
            assert torch.allclose(last.tensor(name).float(), expected, rtol=0, atol=5e-3), name


# What the average is measured to be --------------------------------------------------------------


def accuracy(prediction):
    found = (prediction.predictions[..., :-1, :].argmax(-1) == prediction.label_ids[..., 1:]).mean()
    return {"accuracy": found, "a_runtime": 2.0}  # not the evaluation's own


@pytest.mark.parametrize("path", ["auto", None])
def test_the_average_is_evaluated(tmp_path, path):
    """As the trainer would evaluate a model at it. Before the first snapshot: the model's own."""
    more = {"compute_metrics": accuracy}
    recorder = {"every": 3, "path": path, "evaluate": "lawa", "last": 6}
    trained = trainer(tmp_path, recorder, more=more, **EVALUATED)
    live, measured = kept(trained), {}
    trained.train()
    found = logged(trained, "eval_avg_")
    assert [*found] == [2, 4, 6, 8, 10, 12]
    other = trainer(tmp_path / "other", more=more)
    recording = callback_of(trained).recorder
    for step in found:
        if step < 3:
            other.model.load_state_dict(live[step])
        else:
            with recording.averaged("lawa", until=step, last=6):
                other.model.load_state_dict(weights_of(trained))
        measured = other.evaluate()
        expected = {key: measured[f"eval_{key}"] for key in ("loss", "accuracy", "a_runtime")}
        for key, value in expected.items():
            assert found[step][f"eval_avg_{key}"] == pytest.approx(value, rel=1e-6), (step, key)
        assert found[step].keys() == {f"eval_avg_{key}" for key in expected}
    # the model's own come last: a notebook shows the last loss as the evaluation's
    assert [k for k in trained.evaluate() if k.endswith("loss")] == ["eval_avg_loss", "eval_loss"]
    own = logged(trained, "eval_loss")
    assert all(own[step]["eval_loss"] != found[step]["eval_avg_loss"] for step in found if step > 3)


def test_several_evaluation_sets(tmp_path):
    """Each has an average of its own; names that contain others are told apart."""
    sets = {"a": data(8, 3), "a_runtime": data(8, 4)}
    recorder = {"every": 2, "evaluate": "last"}
    options = BEST | {"metric_for_best_model": "eval_a_avg_loss"}
    trained = trainer(tmp_path, recorder, more={"eval_dataset": sets}, **EVALUATED, **options)
    trained.train()
    found = logged(trained, "eval")[12]
    for name in sets:
        own, average = found[f"eval_{name}_loss"], found[f"eval_{name}_avg_loss"]
        assert own == pytest.approx(average, rel=1e-2) and own != average
    assert found["eval_a_avg_loss"] != found["eval_a_runtime_avg_loss"]
    assert not any("avg_avg" in key for key in found)
    assert trained.evaluate()["eval_a_loss"] == trained.state.best_metric


def test_the_best_average_is_chosen(tmp_path):
    """metric_for_best_model and early stopping see the average, also if they were there first. The
    model ends at what was best, and is saved so; checkpoints have the weights of the training."""
    early = EarlyStoppingCallback(early_stopping_patience=2)
    recorder = {"every": 1, "evaluate": "uniform"}
    trained = trainer(
        tmp_path,
        recorder,
        callbacks=[early],
        max_steps=60,
        lr_scheduler_type="constant",
        **EVALUATED,
        **BEST,
    )
    live = kept(trained)

    def spoil(step):
        """It learns, and from step 9 on it unlearns: neither the first nor the last is the best."""
        if step >= 9:
            for p in trained.model.parameters():
                p.data.mul_(-1.5)

    trained.add_callback(AtStep(spoil))
    trained.train()
    losses = {step: row["eval_avg_loss"] for step, row in logged(trained, "eval_avg_").items()}
    best = min(losses, key=losses.get)
    assert trained.state.best_global_step == best
    assert trained.state.best_metric == losses[best]
    assert trained.state.global_step == best + 4 < 60
    assert trained.evaluate()["eval_loss"] == losses[best]
    stored = checkpoint(tmp_path, best)
    assert_same(stored, {key: live[best][key] for key in stored})
    trained.save_model(tmp_path / "best")
    again = trainer(tmp_path / "again", net=type(trained.model).from_pretrained(tmp_path / "best"))
    assert again.evaluate()["eval_loss"] == losses[best]


def test_the_best_of_before_the_first_snapshot(tmp_path):
    """It was the model's own, and stays so."""
    recorder = {"every": 9, "evaluate": "uniform"}
    options = dict(greater_is_better=True, **EVALUATED, **BEST)  # the first is
    trained = trainer(tmp_path, recorder, **options)
    live = kept(trained)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CandidateWarning)
        trained.train()
    assert trained.state.best_global_step == 2
    assert_same(weights_of(trained), live[2])


def test_another_name(tmp_path):
    def metrics(prediction):
        return {"avg_accuracy": 0.5}

    more = {"compute_metrics": metrics}
    recorder = {"every": 2, "evaluate": "uniform"}
    with pytest.raises(TwaError, match="'eval_avg_accuracy' is a metric of the model: pass name="):
        trainer(tmp_path / "a", recorder, more=more, **EVALUATED).train()
    options = BEST | {"metric_for_best_model": "ema_loss"}
    trained = trainer(tmp_path / "b", recorder | {"name": "ema"}, more=more, **EVALUATED, **options)
    trained.train()
    found = trained.evaluate()
    assert found["eval_loss"] == trained.state.best_metric
    assert found["eval_avg_accuracy"] == found["eval_ema_avg_accuracy"] == 0.5


def test_an_error_in_the_evaluation(tmp_path):
    """The weights of the training are there again."""
    recorder = {"every": 2, "evaluate": "uniform"}
    for error in (RuntimeError, KeyboardInterrupt):
        trained, calls = trainer(tmp_path / error.__name__, recorder, **EVALUATED), []
        live = kept(trained)

        def strike(module, args, calls=calls, error=error):
            calls.append(not module.training)
            if sum(calls) == 6:  # of the third evaluation: of step 2, of its average, of step 4 ...
                raise error("no more")

        trained.model.register_forward_pre_hook(strike)
        with pytest.raises(error, match="no more"):
            trained.train()
        assert_same(weights_of(trained), live[trained.state.global_step])


def test_a_bar_for_each_evaluation(tmp_path):
    """The Trainer's own bar is not counted on beyond its end."""
    counts = []

    class Bars(ProgressCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            super().on_prediction_step(args, state, control, **kwargs)
            counts.append((self.prediction_bar.n, self.prediction_bar.total))

    trained = trainer(
        tmp_path, {"every": 2, "evaluate": "uniform"}, callbacks=[Bars()], **EVALUATED
    )
    trained.train()
    assert counts == [(1, 2), (2, 2)] * 12


def test_batch_statistics(tmp_path):
    """The average of the snapshots' is evaluated, and what the model ends with."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.last = nn.BatchNorm1d(12), nn.Linear(12, 1)

        def forward(self, input_ids, labels):
            out = self.last(self.norm(input_ids.float()))
            return {"loss": (out - labels.float().mean(-1, keepdim=True)).square().mean()}

    torch.manual_seed(0)
    recorder = {"every": 2, "evaluate": "uniform"}
    trained = trainer(tmp_path, recorder, net=Net(), **EVALUATED, **BEST)
    live = kept(trained)
    trained.train()
    best = trained.state.best_global_step
    expected = sum(live[step]["norm.running_mean"] for step in range(2, best + 1, 2)) / (best // 2)
    assert torch.allclose(trained.model.norm.running_mean, expected)
    assert trained.evaluate()["eval_loss"] == pytest.approx(trained.state.best_metric, rel=1e-6)


# How it goes on ----------------------------------------------------------------------------------

SAVED = {"save_strategy": "steps", "save_steps": 4}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Folder and final weights of a training that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    torch.set_num_threads(1)
    trained = trainer(folder, {"every": 3, "evaluate": "uniform"}, **SAVED, **EVALUATED)
    trained.train()
    return folder, weights_of(trained)


def check_gone_on(folder, trained, undisturbed):
    expected, weights = undisturbed
    callback_of(trained).recorder.close()
    assert steps_of(folder / FOLDER) == [3, 6, 9, 12]
    assert files(folder / FOLDER) == files(expected / FOLDER)
    assert_same(weights_of(trained), weights)


KILLED = """
import os, signal, sys
sys.path[:0] = [{here!r}, {tests!r}]
import torch
torch.set_num_threads(1)
from tiny_hf import AtStep, trainer

def strike(step):
    if step == 10:
        os.kill(os.getpid(), signal.SIGKILL)

options = {options!r}
trained = trainer({folder!r}, {{"every": 3, "evaluate": "uniform"}}, **options)
trained.add_callback(AtStep(strike))
trained.train()
"""


def test_killed(tmp_path, undisturbed):
    """kill -9 at step 10, with snapshots of steps 3, 6 and 9; the checkpoint is of step 8."""
    here = Path(__file__).parent
    code = KILLED.format(
        here=str(here), tests=str(here.parent), folder=str(tmp_path), options=SAVED | EVALUATED
    )
    done = processes.run([sys.executable, "-c", code])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    trained = trainer(tmp_path, {"every": 3, "evaluate": "uniform"}, **SAVED, **EVALUATED)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CandidateWarning)
        trained.train(resume_from_checkpoint=True)
    check_gone_on(tmp_path, trained, undisturbed)


@pytest.mark.parametrize("again", ["same trainer", "new trainer"])
def test_interrupted(tmp_path, undisturbed, again):
    """In a notebook: Ctrl-C at step 10, and the cell once more."""
    options = {"every": 3, "evaluate": "uniform"}
    trained = trainer(tmp_path, options, **SAVED, **EVALUATED)

    def strike(step):
        if step == 10:
            raise KeyboardInterrupt

    trained.add_callback(strike := AtStep(strike))
    with pytest.raises(KeyboardInterrupt):
        trained.train()
    trained.remove_callback(strike)
    going = trainer(tmp_path, options, **SAVED, **EVALUATED) if again == "new trainer" else trained
    going.train(resume_from_checkpoint=True)
    check_gone_on(tmp_path, going, undisturbed)


def test_the_last_snapshot_is_there_when_a_checkpoint_is(tmp_path, monkeypatch):
    """It is written before, however slow the disk is: a kill in between leaves none out."""
    write = store.write_snapshot

    def slowly(*args):
        time.sleep(0.1)
        write(*args)

    monkeypatch.setattr(store, "write_snapshot", slowly)
    for strategy in ("steps", "epoch"):
        options = dict(save_strategy=strategy, save_steps=4, max_steps=16)
        folder = tmp_path / strategy
        found = {}

        class Looking(Trainer):
            def _save_checkpoint(self, *args, folder=folder, found=found, **kwargs):
                step = self.state.global_step
                found[step] = [p.name for p in (folder / FOLDER).glob(f"*_{step}.safetensors")]
                super()._save_checkpoint(*args, **kwargs)

        trainer(folder, {"every": 4}, kind=Looking, **options).train()
        assert found and all(len(names) == 1 for names in found.values())


def test_a_checkpoint_that_another_callback_asks_for(tmp_path, monkeypatch):
    """The last snapshot is there when it has been saved."""
    write, found = store.write_snapshot, []

    def slowly(*args):
        time.sleep(0.1)
        write(*args)

    monkeypatch.setattr(store, "write_snapshot", slowly)

    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 6

        def on_save(self, args, state, control, **kwargs):
            found.append(len([*(tmp_path / FOLDER).glob("*_6.safetensors")]))

    trainer(tmp_path, {"every": 3}, callbacks=[Asks()]).train()
    assert found == [1]


def gone_on(folder, options, step=8):
    """A training that goes on from its checkpoint, with the warnings of its recorder."""
    trained = trainer(folder, options, **SAVED)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    found = [str(w.message) for w in caught if issubclass(w.category, CandidateWarning)]
    return callback_of(trained).recorder, found


def test_going_on_without_the_snapshots(tmp_path):
    """What is not there is missed with a warning: of a recording in memory, or one begun late."""
    trainer(tmp_path, None, **SAVED).train()
    begins = ["the recording begins at step 8: there is none of the steps before"]
    recorder, said = gone_on(tmp_path, {"every": 3, "path": None})
    assert recorder.steps == [9, 12] and said == begins
    recorder, said = gone_on(tmp_path, {"every": 3})
    assert recorder.steps == [9, 12] and said == begins
    with pytest.raises(TwaError, match="holds the recording of another run"):
        gone_on(tmp_path, {"every": 3}, step=4)  # whose checkpoint is from before it
    assert recorder.steps == [9, 12]


def test_going_on_from_a_checkpoint_of_another_run(tmp_path):
    """Into the files of this one: refused before its first step, and nothing is lost."""
    for name in ("a", "b"):
        trainer(tmp_path / name, {"every": 3}, **SAVED).train()
    before = files(tmp_path / "a" / FOLDER)
    other = str(tmp_path / "b" / "checkpoint-4")
    refused = trainer(tmp_path / "a", {"every": 3}, **SAVED)
    with pytest.raises(TwaError, match="holds the recording of another run"):
        refused.train(resume_from_checkpoint=other)
    assert files(tmp_path / "a" / FOLDER) == before and refused.state.global_step == 4
    # in memory, too, where its snapshots would be gone on with
    trained = trainer(tmp_path / "c", {"every": 3, "path": None}, **SAVED)
    trained.train()
    with pytest.warns(CandidateWarning, match="4 snapshots of the training before are dropped"):
        trained.train(resume_from_checkpoint=other)
    assert callback_of(trained).recorder.steps == [6, 9, 12]


def test_several_recordings(tmp_path):
    """Of one training: each goes on with its own, whatever their order; as when callbacks are
    restored from the checkpoint, and again."""

    def made(names):
        trained = trainer(tmp_path, restore_callback_states_from_checkpoint=True, **SAVED)
        for name in names:
            path, bits = tmp_path / name, {"a": 4, "b": 8}[name]
            trained.add_callback(RecorderCallback(trained, every=3, path=path, bits=bits))
        return trained

    made("ab").train()
    before = [files(tmp_path / name) for name in "ab"]
    for names, step in (("ab", 8), ("ba", 4), ("ab", 12)):
        made(names).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert [files(tmp_path / name) for name in "ab"] == before
    made("").train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))  # without it


@pytest.mark.parametrize("path", ["auto", None])
def test_smaller_batches(tmp_path, path):
    """auto_find_batch_size begins again after a snapshot: so does the recording. A training that
    was interrupted is none that begins again."""
    trained = trainer(tmp_path, {"every": 3, "path": path}, auto_find_batch_size=True)

    def strike(step):
        strikes.append(step)
        if len(strikes) == 7:
            raise RuntimeError("CUDA out of memory.")
        if len(strikes) == 15:
            raise KeyboardInterrupt

    strikes = []
    trained.add_callback(AtStep(strike))
    with pytest.raises(KeyboardInterrupt):
        trained.train()
    assert strikes == [*range(1, 8), *range(1, 9)]
    assert callback_of(trained).recorder.steps == [3, 6]
    if path:
        with pytest.raises(TwaError, match="holds the recording of another run"):
            trained.train()
        assert steps_of(tmp_path / FOLDER) == [3, 6]


def test_going_on_before_the_first_snapshot(tmp_path):
    trained = trainer(tmp_path, {"every": 3, "start": 6}, **SAVED)
    trained.train()
    expected = files(tmp_path / FOLDER)
    recorder, said = gone_on(tmp_path, {"every": 3, "start": 6}, step=4)
    recorder.close()
    assert recorder.steps == [6, 9, 12] and not said
    assert files(tmp_path / FOLDER) == expected


def test_a_second_training(tmp_path):
    """Into the files of another one: refused before its first step. In memory it begins anew."""
    trained = trainer(tmp_path, {"every": 3})
    trained.train()
    before = files(tmp_path / FOLDER)
    for again in (trained, trainer(tmp_path, {"every": 3})):
        with pytest.raises(TwaError, match="holds the recording of another run") as caught:
            again.train()
        assert str(tmp_path / FOLDER) in str(caught.value)
        assert again.state.global_step == 0
    assert files(tmp_path / FOLDER) == before
    trained = trainer(tmp_path, {"every": 3, "path": None})
    trained.train()
    first = callback_of(trained).recorder
    with pytest.warns(CandidateWarning, match="4 snapshots of the training before are dropped"):
        trained.train()
    recorder = callback_of(trained).recorder
    assert recorder is not first and recorder.steps == first.steps == [3, 6, 9, 12]


def test_a_second_training_in_memory_goes_on(tmp_path):
    """From a checkpoint, by the same trainer: with the snapshots up to there."""
    trained = trainer(tmp_path, {"every": 3, "path": None}, **SAVED)
    trained.train()
    recorder = callback_of(trained).recorder
    expected = [c.tensor("lm_head.weight").clone() for c in recorder.recording()]
    trained.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert callback_of(trained).recorder is recorder and recorder.steps == [3, 6, 9, 12]
    for c, t in zip(recorder.recording(), expected, strict=True):
        assert torch.allclose(c.tensor("lm_head.weight"), t, rtol=0, atol=1e-4)


# What is refused ---------------------------------------------------------------------------------


def test_options(tmp_path):
    plain = trainer(tmp_path)
    for options, message in {
        ("evaluate", "swa"): "expected one of last, uniform, ema",
        ("evaluate", "ema"): "expected half_life=",
        ("half_life", 3): "half_life= is of the average: expected evaluate=",
    }.items():
        with pytest.raises(TwaError, match=message):
            RecorderCallback(plain, every=3, **dict([options]))
    plain.add_callback(RecorderCallback(trainer(tmp_path), every=3))
    with pytest.raises(TwaError, match="trainer: expected the one that it is added to"):
        plain.train()
    plain.use_vllm = True
    RecorderCallback(plain, every=3)
    with pytest.raises(TwaError, match="vLLM generates with the weights of the training"):
        RecorderCallback(plain, every=3, evaluate="last")
    with pytest.raises(TwaError, match="expected one of"):
        trainer(tmp_path, {"every": 3, "bits": 5}).train()


def test_the_best_needs_all_snapshots(tmp_path):
    options = {"every": 3, "keep": 2, "evaluate": "last"}
    with pytest.raises(
        TwaError, match=r"keep: load_best_model_at_end by 'eval_avg_loss' needs all"
    ):
        trainer(tmp_path, options, **EVALUATED, **BEST).train()
    trainer(tmp_path, options, **EVALUATED, **BEST | {"metric_for_best_model": "loss"}).train()
    assert steps_of(tmp_path / FOLDER) == [9, 12]


def test_a_model_that_cannot_be_recorded(tmp_path):
    """At the beginning: an error. Later: a warning, and the training goes on."""
    net = model()
    net.lm_head.weight.ds_id = 0  # as ZeRO-3 marks what it shards
    with pytest.raises(TwaError, match="ZeRO-3, which is not supported"):
        trainer(tmp_path / "sharded", {"every": 3}, net=net).train()
    net = model()
    net.lm_head.requires_grad_(False)
    trained = trainer(tmp_path / "thawed", {"every": 3, "evaluate": "last"}, net=net, **EVALUATED)
    trained.add_callback(AtStep(lambda step: step == 5 and net.lm_head.requires_grad_(True)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained.train()
    said = [str(w.message) for w in caught if issubclass(w.category, CandidateWarning)]
    assert said[0].startswith("recording ends before step 6: 'lm_head.weight' is trainable")
    assert said[1].startswith("step 6: the average is not evaluated: 'lm_head.weight' is trainable")
    assert trained.state.global_step == 12 and callback_of(trained).recorder.steps == [3]
    found, own = logged(trained, "eval_avg_"), logged(trained, "eval_loss")
    assert found[2]["eval_avg_loss"] == own[2]["eval_loss"] and found[4]["eval_avg_loss"] < 9
    assert [s for s in found if math.isnan(found[s]["eval_avg_loss"])] == [6, 8, 10, 12]


@pytest.mark.parametrize("thawed", [1, 5])
@pytest.mark.parametrize("greater", [False, True])
def test_what_cannot_be_evaluated_is_not_the_best(tmp_path, thawed, greater):
    """Nor does it count as better in early stopping."""
    net = model()
    net.lm_head.requires_grad_(False)
    early = EarlyStoppingCallback(early_stopping_patience=3)
    recorder = {"every": 1, "evaluate": "last"}
    options = BEST | {"greater_is_better": greater, "max_steps": 30}
    more = {"net": net, "callbacks": [early]}
    trained = trainer(tmp_path, recorder, **more, **EVALUATED, **options)
    trained.add_callback(AtStep(lambda step: step == thawed and net.lm_head.requires_grad_(True)))
    with pytest.warns(CandidateWarning, match="the average is not evaluated"):
        trained.train()
    losses = {step: row["eval_avg_loss"] for step, row in logged(trained, "eval_avg_").items()}
    made = {step: loss for step, loss in losses.items() if not math.isnan(loss)}
    assert [*made] == [2, 4][: thawed // 2] and len(losses) > len(made)
    assert trained.state.global_step < 30
    if made:
        assert trained.state.best_metric == (max if greater else min)(made.values())
        assert made[trained.state.best_global_step] == trained.state.best_metric
    else:
        assert trained.state.best_global_step is None


def test_evaluate_before_the_training(tmp_path):
    found = trainer(tmp_path, {"every": 3, "evaluate": "last"}).evaluate()
    assert "eval_loss" in found and "eval_avg_loss" not in found


def test_without_transformers(monkeypatch):
    monkeypatch.delitem(sys.modules, "twa.integrations.transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "transformers>=5\.0"'):
        importlib.import_module("twa.integrations.transformers")
    assert run_python("import sys, twa; print('transformers' in sys.modules)").strip() == "False"


def test_two_callbacks_do_not_share_a_folder(tmp_path):
    made = trainer(tmp_path)
    for scheme in ("uniform", "last"):
        made.add_callback(RecorderCallback(made, every=2, evaluate=scheme))
    with pytest.raises(TwaError, match="another RecorderCallback records there"):
        made.train()
