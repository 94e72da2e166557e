"""`twa.integrations.lightning` in Lightning's own Trainer."""

import pytest

pytest.importorskip("lightning")


import importlib.util
import sys
import types
import warnings
from pathlib import Path

import lightning as L
import pytorch_lightning
import torch
import torchmetrics
import twa
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from twa.integrations import lightning as integration
from twa.integrations.lightning import RecorderCallback, train_average

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
]
LAWA = {"evaluate": "lawa", "last": 12}
SAMPLES, BATCH = 64, 8  # 8 steps an epoch


def samples():
    g = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, 6, generator=g)
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())


def loaders(shuffle=False, generator=None):
    train = DataLoader(samples(), BATCH, shuffle=shuffle, generator=generator)
    return train, DataLoader(samples(), 24, shuffle=shuffle, generator=generator)


def make_module(base=L.LightningModule, dropout=0.0):
    """A module with what modules have: a metric, a list of outputs, BatchNorm."""

    class Module(base):
        def __init__(self):
            super().__init__()
            torch.manual_seed(7)
            self.net = nn.Sequential(
                nn.Linear(6, 12),
                nn.BatchNorm1d(12),
                nn.Dropout(dropout),
                nn.Tanh(),
                nn.Linear(12, 2),
            )
            self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=2)
            self.mean = torchmetrics.MeanMetric()
            self.outputs = []
            self.seen = []  # (hook, first weight) of validation
            self.in_validation = None

        def training_step(self, batch, batch_idx):
            loss = cross_entropy(self.net(batch[0]), batch[1])
            self.log("train_loss", loss)
            self.mean(loss)
            return {"loss": loss}

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            out = self.net(batch[0])
            loss = cross_entropy(out, batch[1])
            self.log("val_loss", loss, prog_bar=True)
            self.accuracy(out, batch[1])
            self.log("val_accuracy", self.accuracy, logger=False)
            self.log("val_now", loss, on_step=True, on_epoch=False)
            self.outputs.append(loss)
            self.seen.append(("step", self.first()))

        def on_validation_epoch_end(self):
            self.log("val_worst", torch.stack(self.outputs).max())
            self.outputs.clear()
            self.seen.append(("end", self.first()))
            if self.in_validation is not None:
                self.in_validation(self)

        def first(self):
            return float(self.net[0].weight[0, 0].detach())

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.02)

    return Module()


class Lines(Logger):
    """Keeps what it is given."""

    name, version = "lines", "v"

    def __init__(self):
        super().__init__()
        self.lines = []

    def log_metrics(self, metrics, step):
        self.lines.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


def make_trainer(folder, *callbacks, epochs=3, library=L, **options):
    options = {"logger": False, "enable_progress_bar": False, **options}
    return library.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=epochs,
        callbacks=list(callbacks),
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        log_every_n_steps=1,
        **options,
    )


def state_of(module):
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def files_of(folder):
    """The files of a recording but for its random name, which each run has of its own."""
    return {p.name: p for p in sorted(Path(folder).glob("*.safetensors"))}


def snapshots(recorder):
    """Decoded weights of each snapshot."""
    found = {}
    for step in recorder.steps:
        with recorder.averaged("last", until=step):
            found[step] = state_of(recorder.model)
    return found


# Recording and evaluating ------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("evaluate", [{}, LAWA])
def test_the_run_is_the_same(tmp_path, evaluate, shared):
    class Watch(Callback):
        """What others see of the trainer's figures."""

        def __init__(self):
            self.seen = []

        def look(self, trainer, *_):
            shown = {**trainer.callback_metrics, **trainer.progress_bar_metrics}
            own = {name: float(v) for name, v in shown.items() if not name.startswith("avg_")}
            self.seen.append((trainer.global_step, own))

        on_validation_start = on_validation_batch_end = on_validation_end = look
        on_train_batch_start = look

    found = []
    for name, more in (("without", []), ("with", [RecorderCallback(every=3, **evaluate)])):
        module, lines, watch = make_module(dropout=0.3), Lines(), Watch()
        # of training and validation data, or neither has one
        generator = torch.Generator().manual_seed(2) if shared else None
        torch.manual_seed(11)
        trainer = make_trainer(tmp_path / name, *more, watch, logger=lines, val_check_interval=4)
        trainer.fit(module, *loaders(shuffle=True, generator=generator))
        same = state_of(module), torch.rand(3), trainer.fit_loop.state_dict(), watch.seen
        found.append((same, lines.lines, module.seen))
    (expected, lines, _), (same, more_lines, seen) = found
    assert equal(expected[0], same[0]) and torch.equal(expected[1], same[1])
    assert expected[2:] == same[2:]
    own = [
        (step, {k: v for k, v in line.items() if not k.startswith("avg_")})
        for step, line in more_lines
    ]
    assert own == lines  # each metric once, with the same values
    assert bool(evaluate) == (len(seen) > len(found[0][2]))


def test_average_beside_the_weights_as_they_are(tmp_path):
    recorder, lines, module = RecorderCallback(every=3, **LAWA), Lines(), make_module()
    trainer = make_trainer(tmp_path, recorder, logger=lines)
    trainer.fit(module, *loaders())
    shown = [(step, line) for step, line in lines.lines if "avg_val_loss" in line]
    assert [step + 1 for step, _ in shown] == [8, 16, 24]
    validation, metric = loaders()[1], torchmetrics.Accuracy("multiclass", num_classes=2)
    for step, line in shown:
        with recorder.recorder.averaged("lawa", last=12, until=step + 1), torch.no_grad():
            module.eval()
            losses = []
            for x, y in validation:
                losses.append(cross_entropy(module.net(x), y))
                metric.update(module.net(x), y)
        sizes = torch.tensor([24.0, 24.0, 16.0])
        wanted = float((torch.stack(losses) * sizes).sum() / SAMPLES)
        assert line["avg_val_loss"] == pytest.approx(wanted, rel=1e-5)
        assert line["avg_val_worst"] == pytest.approx(float(torch.stack(losses).max()), rel=1e-5)
        assert line["avg_val_loss"] != line["val_loss"] and "avg_val_accuracy" not in line
        assert "avg_train_loss" not in line
        accuracy = float(metric.compute())
        metric.reset()
    assert float(trainer.callback_metrics["avg_val_accuracy"]) == pytest.approx(accuracy)
    assert "avg_val_loss" in trainer.progress_bar_metrics
    assert "avg_val_worst" not in trainer.progress_bar_metrics


def test_hooks_of_a_pass_see_the_same_weights(tmp_path):
    recorder, module = RecorderCallback(every=3, start=12, **LAWA), make_module()
    trained = []

    class Watch(Callback):
        def on_validation_start(self, trainer, module):
            trained.append((trainer.sanity_checking, module.first()))

    trainer = make_trainer(tmp_path, recorder, Watch())
    trainer.fit(module, *loaders())
    hooks = [hook for hook, _ in module.seen]
    checked, passes = module.seen[:3], [module.seen[k : k + 4] for k in range(3, 27, 4)]
    assert hooks == [*["step"] * 2, "end", *(["step"] * 3 + ["end"]) * 6]
    assert len(trained) == 4 and trained[0] == (True, checked[0][1])
    assert all(len({weight for _, weight in one}) == 1 for one in (checked, *passes))
    for epoch in range(3):
        average, own = passes[2 * epoch][0][1], passes[2 * epoch + 1][0][1]
        assert own == trained[epoch + 1][1]
        # before the first snapshot the weights of now, not those of the beginning
        assert (average == own) == (epoch == 0)
    assert len({weight for _, weight in module.seen}) == 6


def test_metrics_before_the_first_snapshot_are_those_of_the_weights(tmp_path):
    lines = Lines()
    recorder = RecorderCallback(every=3, start=12, **LAWA)
    make_trainer(tmp_path, recorder, logger=lines).fit(make_module(), *loaders())
    same = [
        line["avg_val_loss"] == line["val_loss"] for _, line in lines.lines if "val_loss" in line
    ]
    assert same == [True, False, False]


def test_several_validation_loaders(tmp_path):
    recorder, module = RecorderCallback(every=3, **LAWA), make_module()
    module.on_validation_epoch_end = lambda: module.outputs.clear()
    trainer = make_trainer(tmp_path, recorder, epochs=2)
    train, val = loaders()
    half = DataLoader(TensorDataset(*samples()[:32]), 16)
    trainer.fit(module, train, [val, half])
    metrics = trainer.callback_metrics
    with recorder.recorder.averaged("lawa", last=12), torch.no_grad():
        module.eval()
        x, y = samples()[:32]
        wanted = float(cross_entropy(module.net(x), y))
    assert float(metrics["avg_val_loss/dataloader_idx_1"]) == pytest.approx(wanted, rel=1e-5)
    assert metrics["avg_val_loss/dataloader_idx_0"] != metrics["avg_val_loss/dataloader_idx_1"]


def test_progress_bar_shows_both_passes(tmp_path):
    class Bar(TQDMProgressBar):
        made = 0

        def init_validation_tqdm(self):
            self.made += 1
            return super().init_validation_tqdm()

    bar = Bar()
    callbacks = [bar, RecorderCallback(every=3, **LAWA)]
    trainer = make_trainer(tmp_path, *callbacks, epochs=2, enable_progress_bar=True)
    trainer.fit(make_module(), *loaders())
    assert bar.made == 4 and trainer.callbacks[0] is bar


def test_accumulated_gradients_are_no_steps(tmp_path):
    recorder, steps = RecorderCallback(every=1, path=None), []

    class Count(Callback):
        def on_train_batch_end(self, trainer, *_):
            steps.append((trainer.global_step, list(recorder.recorder.steps)))

    trainer = make_trainer(tmp_path, recorder, Count(), epochs=1, accumulate_grad_batches=3)
    trainer.fit(make_module(), *loaders())
    assert [step for step, _ in steps] == [0, 0, 1, 1, 1, 2, 2, 3]
    assert all(known == list(range(1, step + 1)) for step, known in steps)


def test_each_step_of_several_optimizers_counts(tmp_path):
    class Manual(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 2), nn.Linear(6, 2)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for layer, optimizer in zip((self.one, self.two), self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(cross_entropy(layer(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.one, self.two)]

    recorder, module = RecorderCallback(every=4, path=None), Manual()
    make_trainer(tmp_path, recorder, epochs=1).fit(module, loaders()[0])
    assert recorder.recorder.steps == [4, 8, 12, 16]
    with pytest.raises(twa.TwaError, match="expected loss="):
        train_average(module.trainer, module, recorder.recorder, val=loaders()[1])


def test_optimizers_are_not_hooked(tmp_path):
    class Bare(torch.optim.SGD):
        def register_step_post_hook(self, hook):
            raise AssertionError

    recorder, module = RecorderCallback(every=4, path=None), make_module()
    module.configure_optimizers = lambda: Bare(module.parameters(), lr=0.1)
    make_trainer(tmp_path, recorder, epochs=1).fit(module, loaders()[0])
    assert recorder.recorder.steps == [4, 8]


@pytest.mark.parametrize(
    ("precision", "kept"), [("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32)]
)
def test_precision(tmp_path, precision, kept):
    recorder, module = RecorderCallback(every=4, **LAWA), make_module()
    trainer = make_trainer(tmp_path, recorder, epochs=2, precision=precision)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, *loaders())
    texts = [str(w.message) for w in said if w.category is twa.CandidateWarning]
    assert bool(texts) == (kept == torch.bfloat16) and module.net[0].weight.dtype == kept
    assert all("recorded in torch.bfloat16" in text for text in texts)
    info = recorder.recorder.recording()[0].info
    assert info["net.0.weight"].dtype == kept


def test_options_are_checked():
    with pytest.raises(twa.TwaError, match="expected one of last, uniform"):
        RecorderCallback(every=2, evaluate="swa")
    with pytest.raises(twa.TwaError, match="expected half_life="):
        RecorderCallback(every=2, evaluate="ema", last=3)
    with pytest.raises(twa.TwaError, match="last=: expected evaluate="):
        RecorderCallback(every=2, last=3)
    trainer = types.SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(twa.TwaError, match="expected ModelParallelStrategy"):
        RecorderCallback(every=2).setup(trainer, None, "fit")


# Checkpoints -------------------------------------------------------------------------------------


def best_of(folder, monitor="avg_val_loss", **options):
    return ModelCheckpoint(folder, monitor=monitor, filename="{step}", **options)


def test_best_by_the_average(tmp_path):
    best, kept = best_of(tmp_path / "best"), {}
    recorder, module, lines = RecorderCallback(every=3, **LAWA), make_module(), Lines()

    class Keep(Callback):
        def on_validation_end(self, trainer, module):
            kept[trainer.global_step] = state_of(module)

        def on_train_epoch_start(self, trainer, module):
            """From epoch 5 on a rate that spoils it: neither the first nor the last is the best."""
            if trainer.current_epoch == 5:
                trainer.optimizers[0].param_groups[0]["lr"] = 10.0

    trainer = make_trainer(tmp_path, best, Keep(), recorder, epochs=8, logger=lines)
    trainer.fit(module, *loaders())
    losses = {
        step + 1: line["avg_val_loss"] for step, line in lines.lines if "avg_val_loss" in line
    }
    step = min(losses, key=losses.get)
    assert 8 < step < 64 and float(best.best_model_score) == pytest.approx(losses[step])
    saved = torch.load(best.best_model_path, weights_only=True)
    assert equal(saved["state_dict"], kept[step])  # as it was trained
    assert recorder.load_best(trainer) == step
    moved = state_of(module)
    recorder.recorder.apply("lawa", until=step, last=12)
    assert equal(moved, state_of(module)) and not equal(moved, kept[step])
    trainer.save_checkpoint(tmp_path / "averaged.ckpt", weights_only=True)
    assert equal(torch.load(tmp_path / "averaged.ckpt")["state_dict"], moved)


def test_best_from_before_the_first_snapshot(tmp_path):
    best = best_of(tmp_path / "best", mode="max")
    recorder = RecorderCallback(every=4, start=20, **LAWA)
    trainer = make_trainer(tmp_path, best, recorder)
    with pytest.raises(twa.TwaError, match="a fit before this"):
        recorder.load_best(trainer)
    trainer.fit(make_module(), *loaders())
    assert Path(best.best_model_path).name == "step=8.ckpt"
    with pytest.raises(twa.TwaError, match="before the first snapshot"):
        recorder.load_best(trainer)


def test_best_needs_all_snapshots(tmp_path):
    recorder, best = RecorderCallback(every=3, keep=4, **LAWA), best_of(tmp_path / "best")
    trainer, module = make_trainer(tmp_path, best, recorder), make_module()
    trainer.fit(module, *loaders())
    before = state_of(module)
    with pytest.raises(twa.TwaError, match=r"^keep: load_best needs all snapshots"):
        recorder.load_best(trainer)
    assert equal(before, state_of(module))


class Thaw(BaseFinetuning):
    """Trains the last layer; from the second epoch on the first, too."""

    def freeze_before_training(self, module):
        self.freeze(module.net[0])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net[0], optimizer)


def test_parameters_that_are_trained_later(tmp_path):
    recorder, lines, best = RecorderCallback(every=3, **LAWA), Lines(), best_of(tmp_path / "best")
    callbacks = [Thaw(), recorder, best, EarlyStopping("avg_val_loss", patience=9)]
    module = make_module()
    trainer = make_trainer(tmp_path, *callbacks, logger=lines)
    with pytest.warns(twa.CandidateWarning, match="step 16: the average is not validated, the w"):
        trainer.fit(module, *loaders())
    same = [
        line["avg_val_loss"] == line["val_loss"] for _, line in lines.lines if "val_loss" in line
    ]
    assert trainer.global_step == 24 and same == [False, True, True]
    assert Path(best.best_model_path).name in {"step=16.ckpt", "step=24.ckpt"}
    with pytest.raises(twa.TwaError):
        recorder.load_best(trainer)  # there is no average of what is trained now


@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_counts_each_validation_once(tmp_path, first):
    class Stop(EarlyStopping):
        runs = 0

        def _run_early_stopping_check(self, trainer):
            self.runs += 1
            super()._run_early_stopping_check(trainer)

    stop = Stop("avg_val_loss", min_delta=9.0, patience=2)
    callbacks = [stop, RecorderCallback(every=3, **LAWA)]
    trainer = make_trainer(tmp_path, *(callbacks if first else callbacks[::-1]), epochs=9)
    trainer.fit(make_module(), *loaders())
    assert stop.runs == 3 and trainer.global_step == 24


def test_checkpoints_saved_by_the_module_in_validation(tmp_path):
    recorder, module, best = (
        RecorderCallback(every=3, **LAWA),
        make_module(),
        best_of(tmp_path / "b"),
    )
    saved = []

    def save(module):
        if not module.trainer.sanity_checking:
            path = tmp_path / f"{len(saved)}.ckpt"
            saved.append((module.trainer.global_step, module.first()))
            module.trainer.save_checkpoint(path)

    module.in_validation = save
    make_trainer(tmp_path, recorder, best).fit(module, *loaders())
    assert [step for step, _ in saved] == [8, 8, 16, 16, 24, 24]
    for k in range(0, 6, 2):
        assert saved[k][1] != saved[k + 1][1]  # one was with the average inside
        average, own = (torch.load(tmp_path / f"{i}.ckpt") for i in (k, k + 1))
        assert equal(average["state_dict"], own["state_dict"])
        assert float(own["state_dict"]["net.0.weight"][0, 0]) == saved[k + 1][1]
        assert average["callbacks"].keys() == own["callbacks"].keys() and len(own["callbacks"]) == 2


# Going on ----------------------------------------------------------------------------------------


class Stop(Exception):
    pass


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise Stop


def every_epoch(folder):
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, auto_insert_metric_name=False)


@pytest.mark.parametrize("where", ["auto", "given", None])
def test_going_on_makes_the_same_recording(tmp_path, where):
    def run(name, epochs=4, stop=None, ckpt_path=None):
        folder = tmp_path / name
        path = folder / "recording" if where == "given" else where
        recorder, module = RecorderCallback(every=3, path=path, **LAWA), make_module()
        more = [] if stop is None else [StopAt(stop)]
        saving = every_epoch(folder / "checkpoints")
        logger = CSVLogger(folder)
        trainer = make_trainer(folder, recorder, saving, *more, epochs=epochs, logger=logger)
        train, val = loaders()
        if stop is None:
            trainer.fit(module, train, val, ckpt_path=ckpt_path)
        else:
            with pytest.raises(Stop):
                trainer.fit(module, train, val)
        return recorder, module

    whole, module = run("whole")
    stopped, _ = run("stopped", stop=23)
    assert stopped.recorder.steps == [3, 6, 9, 12, 15, 18, 21]
    again, same = run("stopped", ckpt_path=tmp_path / "stopped" / "checkpoints" / "16.ckpt")
    assert equal(state_of(module), state_of(same))
    assert again.recorder.steps == whole.recorder.steps == list(range(3, 33, 3))
    expected, found = snapshots(whole.recorder), snapshots(again.recorder)
    assert all(equal(expected[step], found[step]) for step in expected)
    if where is not None:
        assert (again.recorder.path == stopped.recorder.path) == (where == "given")
        one, other = files_of(whole.recorder.path), files_of(again.recorder.path)
        assert one.keys() == other.keys() and len(one) == 10
        versions = (tmp_path / "stopped" / "lightning_logs").iterdir()
        assert sorted(p.name for p in versions) == ["version_0", "version_1"]
    if where == "auto":
        logs = tmp_path / "stopped" / "lightning_logs"
        assert stopped.recorder.path == logs / "version_0" / "twa"
        assert again.recorder.path == logs / "version_1" / "twa"
        assert len(files_of(stopped.recorder.path)) == 7  # it stays as it was


def test_state_is_small_with_files_and_plain(tmp_path):
    sizes = {}
    for path in ("auto", None):
        recorder = RecorderCallback(every=1, path=path)
        saving = every_epoch(tmp_path / str(path))
        make_trainer(tmp_path, recorder, saving, epochs=2).fit(make_module(), loaders()[0])
        saved = torch.load(tmp_path / str(path) / "16.ckpt", weights_only=True)
        state = saved["callbacks"]["RecorderCallback"]["recorder"]
        sizes[path] = len(state["rank_0_of_1"][1])
    assert sizes == {"auto": 0, None: 3}


def test_fit_once_more_goes_on(tmp_path):
    recorder, module = RecorderCallback(every=3, **LAWA), make_module()
    trainer = make_trainer(tmp_path, recorder, epochs=2)
    trainer.fit(module, *loaders())
    before = recorder.recorder.path
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, *loaders())
    assert recorder.recorder.steps == [3, 6, 9, 12, 15, 18, 21, 24]
    assert recorder.recorder.path == before


def test_other_stages_leave_the_recording_alone(tmp_path):
    recorder, module = RecorderCallback(every=3, **LAWA), make_module()
    trainer = make_trainer(tmp_path, recorder, every_epoch(tmp_path / "c"), epochs=2)
    trainer.fit(module, *loaders())
    count = len(module.seen)
    trainer.validate(module, loaders()[1], ckpt_path=tmp_path / "c" / "8.ckpt")
    assert len(module.seen) == count + 4  # of one pass
    assert "avg_val_loss" not in trainer.callback_metrics
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, *loaders())
    assert recorder.recorder.steps == [3, 6, 9, 12, 15, 18, 21, 24]


def test_nothing_left_to_train(tmp_path):
    saving = every_epoch(tmp_path / "c")
    make_trainer(tmp_path, RecorderCallback(every=3), saving).fit(make_module(), *loaders())
    recorder, module = RecorderCallback(every=3), make_module()
    trainer = make_trainer(tmp_path, recorder)
    trainer.fit(module, *loaders(), ckpt_path=tmp_path / "c" / "24.ckpt")
    before = state_of(module)
    recorder.recorder.apply("uniform")
    assert len(recorder.recorder.steps) == 8 and not equal(before, state_of(module))


def test_no_recording_is_lost(tmp_path):
    path = tmp_path / "recording"
    make_trainer(tmp_path, RecorderCallback(every=3, path=path)).fit(make_module(), *loaders())
    before = {name: p.read_bytes() for name, p in files_of(path).items()}
    with pytest.raises(twa.TwaError, match="to go on with it, pass fit"):
        make_trainer(tmp_path, RecorderCallback(every=3, path=path)).fit(make_module(), *loaders())
    assert before == {name: p.read_bytes() for name, p in files_of(path).items()}
    for name in ("twa", "twa-v1", "twa-v2"):  # there is no logger that makes versions
        recorder = RecorderCallback(every=3)
        make_trainer(tmp_path, recorder, epochs=1).fit(make_module(), *loaders())
        assert recorder.recorder.path == tmp_path / name


@pytest.mark.parametrize("start", [0, 6])
def test_a_run_elsewhere_leaves_the_recording_as_it_is(tmp_path, start):
    def run(name, **options):
        recorder = RecorderCallback(every=2, start=start)
        saving = every_epoch(tmp_path / name / "c")
        trainer = make_trainer(tmp_path / name, recorder, saving, limit_train_batches=4)
        trainer.fit(make_module(), loaders()[0], **options)
        return recorder.recorder

    first = run("first")
    before = {name: p.read_bytes() for name, p in files_of(first.path).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", twa.CandidateWarning)
        second = run("second", ckpt_path=tmp_path / "first" / "c" / "4.ckpt")
    assert second.path == tmp_path / "second" / "twa"
    assert before == {name: p.read_bytes() for name, p in files_of(first.path).items()}
    assert first.steps == second.steps == list(range(start or 2, 13, 2))
    assert not list(tmp_path.glob("second/twa-*"))
    again = run("first", ckpt_path=tmp_path / "first" / "c" / "8.ckpt")  # in the same directory
    assert again.path == first.path and again.steps == first.steps


def test_a_recording_that_is_gone(tmp_path):
    saving = every_epoch(tmp_path / "c")
    make_trainer(tmp_path, RecorderCallback(every=3), saving, epochs=2).fit(
        make_module(), *loaders()
    )
    (tmp_path / "twa").rename(tmp_path / "elsewhere")
    recorder = RecorderCallback(every=3)
    with pytest.warns(twa.CandidateWarning, match="a new one begins here"):
        make_trainer(tmp_path, recorder).fit(
            make_module(), *loaders(), ckpt_path=tmp_path / "c" / "16.ckpt"
        )
    assert recorder.recorder.steps == [18, 21, 24]  # as ever counted from the beginning


def test_a_recording_that_had_not_begun(tmp_path):
    options, train = {"every": 3, "start": 20}, loaders()[0]
    saving = every_epoch(tmp_path / "c")
    make_trainer(tmp_path, RecorderCallback(**options), saving, epochs=4).fit(make_module(), train)
    first = {name: p.stat().st_size for name, p in files_of(tmp_path / "twa").items()}
    recorder = RecorderCallback(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", twa.CandidateWarning)
        checkpoint = tmp_path / "c" / "16.ckpt"
        make_trainer(tmp_path, recorder, epochs=4).fit(make_module(), train, ckpt_path=checkpoint)
    assert recorder.recorder.steps == [20, 23, 26, 29, 32]
    assert {name: p.stat().st_size for name, p in files_of(tmp_path / "twa").items()} == first
    (tmp_path / "twa").rename(tmp_path / "elsewhere")
    recorder = RecorderCallback(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", twa.CandidateWarning)
        make_trainer(tmp_path, recorder, epochs=4).fit(make_module(), train, ckpt_path=checkpoint)
    assert recorder.recorder.steps == [20, 23, 26, 29, 32]


def test_a_recording_of_another_run(tmp_path):
    saving = every_epoch(tmp_path / "c")
    path = tmp_path / "recording"
    make_trainer(tmp_path, RecorderCallback(every=3, path=path), saving).fit(
        make_module(), *loaders()
    )
    path.rename(tmp_path / "kept")
    make_trainer(tmp_path, RecorderCallback(every=3, path=path)).fit(make_module(), *loaders())
    before = {name: p.read_bytes() for name, p in files_of(path).items()}
    with pytest.raises(twa.StateError, match="another recording than the state"):
        make_trainer(tmp_path, RecorderCallback(every=3, path=path), epochs=4).fit(
            make_module(), *loaders(), ckpt_path=tmp_path / "c" / "24.ckpt"
        )
    assert before == {name: p.read_bytes() for name, p in files_of(path).items()}


def test_error_in_validation_of_the_average(tmp_path):
    recorder, module, trained = RecorderCallback(every=3, **LAWA), make_module(), []

    class Keep(Callback):
        def on_train_epoch_start(self, trainer, module):
            trained.append(state_of(module))

        def on_train_batch_end(self, trainer, module, *_):
            trained.append(state_of(module))

    def fail(module):
        if module.trainer.global_step == 16:
            raise Stop

    module.in_validation = fail
    trainer = make_trainer(tmp_path, Keep(), recorder)
    callbacks = list(trainer.callbacks)
    with pytest.raises(Stop):
        trainer.fit(module, *loaders())
    assert module.seen[-1][1] != module.seen[-5][1]  # it was the first of two passes
    assert equal(trained[-1], state_of(module)) and trainer.callbacks == callbacks
    assert "run" not in vars(trainer.fit_loop.epoch_loop.val_loop)
    assert "save_checkpoint" not in vars(trainer)
    # closed: another may record there
    twa.Recorder(module, every=3, path=recorder.recorder.path, resume=True).close()


def test_fast_dev_run_leaves_no_files(tmp_path):
    recorder = RecorderCallback(every=1, **LAWA)
    trainer = make_trainer(tmp_path, recorder, fast_dev_run=2)
    trainer.fit(make_module(), *loaders())
    assert recorder.recorder.steps == [1, 2] and not list(tmp_path.iterdir())


# Under its older name ----------------------------------------------------------------------------


def test_pytorch_lightning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    spec = importlib.util.spec_from_file_location(
        "twa.integrations.older", integration.__file__, submodule_search_locations=None
    )
    older = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(older)
    assert issubclass(older.RecorderCallback, pytorch_lightning.Callback)
    found = []
    for make in (RecorderCallback, older.RecorderCallback):
        recorder = make(every=3, **LAWA)
        module = make_module(pytorch_lightning.LightningModule)
        trainer = make_trainer(tmp_path, recorder, library=pytorch_lightning)
        trainer.fit(module, *loaders())
        outcome = older.train_average(
            trainer, module, recorder.recorder, steps=2, progress=False, methods=["t:tensor:4"]
        )
        found.append((len(recorder.recorder), float(trainer.callback_metrics["avg_val_loss"])))
        assert [r.method for r in outcome.results] == [
            "start",
            "TWA-t per tensor, 4 bits, differences",
        ]
    assert found[0] == found[1] and found[0][0] == 8


# Trained averages --------------------------------------------------------------------------------


class Data(L.LightningDataModule):
    """Whose hooks must be taken: without them batches are of another shape."""

    def __init__(self):
        super().__init__()
        self.sets_up = 0

    def setup(self, stage):
        self.sets_up += 1
        x, y = samples().tensors
        self.data = TensorDataset(x.double() / 2, y)

    def train_dataloader(self):
        return DataLoader(self.data, BATCH)

    def val_dataloader(self):
        return [DataLoader(self.data, 24)]

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch[0].float(), batch[1]]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * 2, batch[1]]


def test_train_average_of_a_run(tmp_path):
    recorder, module, data, lines = RecorderCallback(every=3), make_module(), Data(), Lines()
    trainer = make_trainer(tmp_path, recorder, logger=lines)
    trainer.fit(module, datamodule=data)
    assert module.mean.update_count == 24
    count = len(lines.lines)
    outcome = train_average(trainer, module, recorder.recorder, steps=4, progress=False)
    assert data.sets_up == 1 and len(lines.lines) == count
    assert module.mean.update_count == 0  # what was seen meanwhile is no part of the next epoch
    with torch.no_grad():
        module.eval()
        x, y = samples().tensors
        sizes = [24, 24, 16]
        parts = zip(x.split(24), y.split(24), sizes, strict=True)
        # of every other batch: the rest is held out
        losses = [(float(cross_entropy(module.net(a), b)) * n, n) for a, b, n in parts][1::2]
    wanted = sum(loss for loss, _ in losses) / sum(n for _, n in losses)
    assert outcome.winner.val_loss == pytest.approx(wanted, rel=1e-4)
    assert "TWA-t" in str(outcome)
    assert "averaged.safetensors" in outcome.save(tmp_path / "out")
    trainer.save_checkpoint(tmp_path / "averaged.ckpt", weights_only=True)
    state = torch.load(tmp_path / "averaged.ckpt", weights_only=True)["state_dict"]
    assert equal(state, state_of(module)) and "log" not in vars(module)
    again = make_module()
    trainer.validate(again, datamodule=data, ckpt_path=tmp_path / "averaged.ckpt")
    assert equal(state_of(again), state)


def test_train_average_in_a_new_process(tmp_path):
    saving = every_epoch(tmp_path / "c")
    make_trainer(tmp_path, saving, epochs=4).fit(make_module(), *loaders())
    data, module = Data(), make_module()
    trainer = make_trainer(tmp_path, precision="bf16-mixed")
    dtypes = set()
    module.net[0].register_forward_hook(lambda *call: dtypes.add(call[2].dtype))
    outcome = train_average(
        trainer,
        module,
        tmp_path / "c",
        datamodule=data,
        steps=2,
        progress=False,
        methods=["t:tensor:4"],
    )
    assert len(outcome.sharding.candidates) == 4 and data.sets_up == 1
    assert dtypes == {torch.bfloat16}
    trainer.save_checkpoint(tmp_path / "averaged.ckpt", weights_only=True)
    again = make_module()
    again.load_state_dict(torch.load(tmp_path / "averaged.ckpt")["state_dict"])
    assert equal(state_of(again), state_of(module))


@pytest.mark.parametrize("as_datamodule", [True, False])
def test_train_average_calls_the_hooks_of_fit(tmp_path, as_datamodule):
    make_trainer(tmp_path, every_epoch(tmp_path / "c"), epochs=4).fit(make_module(), *loaders())
    module, data = make_module(), Data()
    net, module.net, calls = module.net, None, []

    def configure_model():
        calls.append("configure_model")
        module.net = net

    module.prepare_data = lambda: calls.append("prepare_data")
    module.setup = lambda stage: calls.append(f"{stage} {module.trainer is trainer}")
    module.configure_model = configure_model
    data.prepare_data = lambda: calls.append("data")
    precision = "32-true" if as_datamodule else "bf16-true"
    trainer, options = make_trainer(tmp_path, precision=precision), {"datamodule": data}
    if not as_datamodule:
        options = dict(zip(("train", "val"), loaders(), strict=True))
    methods = {"steps": 2, "progress": False, "methods": ["t:tensor:4"]}
    train_average(trainer, module, tmp_path / "c", **options, **methods)
    first = ["data"] if as_datamodule else []
    assert calls == [*first, "prepare_data", "fit True", "configure_model"]
    train_average(trainer, module, tmp_path / "c", **options, **methods)
    assert len(calls) == len(first) + 3 and data.sets_up == len(first)


def test_train_average_says_what_it_needs(tmp_path):
    saving, module = every_epoch(tmp_path / "c"), make_module()
    trainer = make_trainer(tmp_path, saving, epochs=2)
    train, val = loaders()
    trainer.fit(module, train, [val, val])
    options = {"steps": 2, "progress": False, "methods": ["t:tensor:4"]}
    with pytest.raises(twa.TwaError, match="val_dataloader has several loaders"):
        train_average(trainer, module, tmp_path / "c", **options)
    calls = []

    def loss(module, batch):
        calls.append(len(batch[0]))
        return cross_entropy(module.net(batch[0]), batch[1])

    train_average(trainer, module, tmp_path / "c", val=val, loss=loss, **options)
    assert set(calls) == {BATCH, 24, 16}
    other, bare = make_trainer(tmp_path), make_module()
    with pytest.raises(twa.TwaError, match="there is no train_dataloader"):
        train_average(other, bare, tmp_path / "c", **options)
    bare.training_step = lambda batch: None
    with pytest.raises(twa.TwaError, match="expected a loss, found NoneType"):
        train_average(other, bare, tmp_path / "c", train=train, val=val, **options)
    bare.training_step = lambda dataloader_iter: None
    with pytest.raises(twa.TwaError, match="reads batches by itself"):
        train_average(other, bare, tmp_path / "c", train=train, val=val, **options)


# SubspaceOptimizer in configure_optimizers -------------------------------------------------------


def second_phase(folder, low_memory):
    """A module that trains the average of the checkpoints in a directory."""
    module = make_module()
    subspace = twa.Subspace.from_candidates(module, twa.Candidates(folder), bits=4)
    options = {"lr": 0.05, "low_memory": low_memory}
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    module.configure_optimizers = lambda: {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule, "interval": "step"},
    }
    return module, subspace, optimizer, schedule


@pytest.mark.parametrize("clip", [None, 0.005])
@pytest.mark.parametrize("low_memory", [False, True])
def test_subspace_optimizer_in_a_module(tmp_path, clip, low_memory):
    saving = every_epoch(tmp_path / "c")
    make_trainer(tmp_path, saving, epochs=4).fit(make_module(), *loaders())
    module, subspace, optimizer, schedule = second_phase(tmp_path / "c", low_memory)
    rates, norms = [], []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *_):
            rates.append(optimizer.param_groups[0]["lr"])

    options = {"accumulate_grad_batches": 2, "gradient_clip_val": clip}
    make_trainer(tmp_path, Watch(), **options).fit(module, *loaders())
    by_hand, same, optimizer, schedule = second_phase(tmp_path / "c", low_memory)
    own_rates = []
    by_hand.train()
    for _ in range(3):
        for k, batch in enumerate(loaders()[0]):
            (cross_entropy(by_hand.net(batch[0]), batch[1]) / 2).backward()
            if k % 2:
                params = [same.coefficients] if low_memory else by_hand.parameters()
                norms.append(float(nn.utils.clip_grad_norm_(params, clip or float("inf"))))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            own_rates.append(optimizer.param_groups[0]["lr"])
    assert rates == own_rates and min(norms) > 0.005  # all are clipped
    assert subspace.coefficients.abs().max() > 0.01
    torch.testing.assert_close(subspace.coefficients, same.coefficients, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state_of(module), state_of(by_hand), rtol=1e-4, atol=1e-5)


def test_without_lightning(monkeypatch):
    monkeypatch.delitem(sys.modules, "twa.integrations.lightning")
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning", "torchmetrics"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "lightning>=2\.5"'):
        importlib.import_module("twa.integrations.lightning")
