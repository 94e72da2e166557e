"""`RecorderCallback` and `train_average`: recordings and averages in Lightning's Trainer.

Needs `lightning`, or `pytorch_lightning`. Steps are the trainer's `global_step` everywhere.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from .. import averages
from ..distributed.ranks import DistributedError, Ranks
from ..dtensors import is_sharded, reshard
from ..io.errors import CandidateWarning, StateError, TwaError
from ..io.recording_files import ANCHORS, STEPS, folders_of, is_recording
from ..io.torch_zip import described
from ..io.versions import LIGHTNING, problem
from ..merge.average import Source, average
from ..merge.outcome import Outcome
from ..recorder.contents import Weights
from ..recorder.recorder import Recorder, check_state
from ..tasks.batches import generators_kept, random_state_kept

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        try:  # the same under its older name
            from pytorch_lightning import Callback
        except ModuleNotFoundError as error:
            raise ImportError(
                'twa.integrations.lightning needs lightning: pip install "lightning>=2.5"'
            ) from error

BESIDE = "auto"  # the path that is chosen here
FOLDER = "twa"  # its name


class RecorderCallback(Callback):
    """Records a run of Lightning's Trainer, and shows what an average of it would score.

        recorder = RecorderCallback(every=200, evaluate="lawa", last=5000)
        trainer = L.Trainer(callbacks=[recorder, ModelCheckpoint(monitor="avg_val_loss")])
        trainer.fit(module, data)
        recorder.load_best(trainer)                      # or recorder.recorder.apply("ema", ...)

    A snapshot is taken after each `every` of the trainer's `global_step`: batches that only
    accumulate gradients do not count, and each step of several optimizers does. Weights, gradients
    and random numbers of the run are the same as without the callback.

    With `evaluate`, each validation is run twice: with the average, then with the weights as they
    are. All that the first one logs comes with the second's, as `avg_val_loss` beside `val_loss`,
    so that ModelCheckpoint, EarlyStopping and schedulers may monitor either. Where there is no
    average, "the average" is the weights as they are: before the first snapshot, and, with a
    warning, if it cannot be made, as when frozen parameters are trained later. The module's own
    hooks see both passes, each whole; other callbacks see the second alone, but for the progress
    bar. Checkpoints hold the weights as they are, wherever they are saved.

    A run that goes on from a checkpoint (`fit(ckpt_path=...)`) goes on with its recording as it was
    at that step: the snapshots to come have the bits of a run that was never stopped. With
    path="auto" and another directory than that run's it goes on with a copy there, and the other
    recording stays as it is. In the same directory later snapshots are dropped.

    Args:
        every: steps between snapshots
        bits: of a weight in a snapshot: 8, 4, 3, 2 or 1
        start: step of the first snapshot: none before it
        path: directory for the files, which no other run has used. "auto": `twa` beside Lightning's
            `checkpoints`, in the directory of the logger's version. None: snapshots stay in memory,
            and checkpoints hold all of them
        keep: how many snapshots are kept, the newest; None: all, which `load_best` needs
        weights: (name, parameter) -> tensor to record in the parameter's place, see `Recorder`
        evaluate: the average that is validated, a scheme of `Recorder.averaged`; None: none
        horizon: of it, such as half_life=2000 or last=5000, in steps

    Attributes:
        recorder: of the last fit; None before it. After the fit it is closed: averages of it may
            be made, and no more snapshots taken

    Raises:
        TwaError: an argument is none of what it can be
    """

    def __init__(
        self,
        *,
        every: int,
        bits: int = 4,
        start: int = 0,
        path: str | Path | None = BESIDE,
        keep: int | None = None,
        weights: Weights | None = None,
        evaluate: str | None = None,
        **horizon: float | str,
    ) -> None:
        super().__init__()
        if evaluate is not None:
            averages.of_steps([0], evaluate, **horizon)  # refuses what it does not know
        elif horizon:
            raise TwaError(f"{next(iter(horizon))}=: expected evaluate=, an average to validate")
        self.path, self.evaluate = path, evaluate
        self.horizon: dict[str, Any] = horizon
        self.options: dict[str, Any] = dict(
            every=every, bits=bits, start=start, keep=keep, weights=weights
        )
        self.recorder: Recorder | None = None
        self._begun = False
        self._loaded: Mapping[str, Any] = {}  # state of a checkpoint
        self._averages: dict[str, dict[str, Any]] = {}  # what the average has logged
        self._end = contextlib.ExitStack()  # of what holds during a fit

    # The run -------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets the state of an earlier checkpoint; one may be loaded next."""
        self._loaded, self._begun = {}, False
        if stage == "fit" and type(trainer.strategy).__name__ == "FSDPStrategy":
            raise TwaError(
                "FSDPStrategy keeps flat parameters: expected ModelParallelStrategy, with"
                " fully_shard in configure_model",
                "RecorderCallback",
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the recorder: the module is on its device, and the checkpoint is loaded."""
        self._begin(trainer, pl_module)
        if self.evaluate is not None:
            self._end.enter_context(self._validating_twice(trainer, pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Takes a snapshot where one is due."""
        assert self.recorder is not None
        self.recorder.step(trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what is left."""
        if self._loaded and not self._begun:  # nothing was left to train
            self._begin(trainer, pl_module)
        self._finish()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Writes what is left; an average is out of the module by now."""
        self._finish()

    def _begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Makes the recorder, new or where the run goes on from."""
        state, step = self._loaded, trainer.global_step
        before = self.recorder
        if not state and before is not None and before.model is module and before.count == step > 0:
            state = self.state_dict()  # fit() was called once more
        path, goes_on = self._place(trainer, state)
        reshard(module)  # a validation without a backward leaves FSDP2's weights gathered
        if path is None and is_sharded(module) and not trainer.fast_dev_run:
            raise TwaError("the module is sharded: expected a path", "RecorderCallback")
        recorder = Recorder(module, path=path, resume=goes_on and path is not None, **self.options)
        self.recorder, self._begun, self._loaded = recorder, True, {}
        if goes_on:
            recorder.load_state_dict(state["recorder"])
        else:
            recorder.rewind(step)  # there is none to drop: it counts from here
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, Optimizer):
                recorder.take_masters_of(optimizer)

    def _finish(self) -> None:
        """Ends what holds during a fit."""
        self._end.close()
        if self.recorder is not None:
            self.recorder.close()

    def _place(self, trainer: Trainer, state: Mapping[str, Any]) -> tuple[Path | None, bool]:
        """Where snapshots go, and whether they go on with those of a state. Ranks get the same."""
        ranks = Ranks.find()
        with ranks.fail_together("looking for the recording"):
            chosen = self._choose(trainer, state) if ranks.is_rank_zero else (None, False, None)
            path, goes_on, source = ranks.broadcast_object(chosen)
            if source is not None:
                assert path is not None
                if ranks.is_rank_zero:
                    _copy(source, path, _steps(state))
                ranks.barrier()
                if trainer.local_rank == 0 and not is_recording(path):  # a machine's own disk
                    _copy(source, path, _steps(state))
        if state and not goes_on and _steps(state) and ranks.is_rank_zero:
            _warn(
                f"the checkpoint's recording, in {state['path'] or 'the checkpoint'}, cannot go on"
                f" in {path or 'memory'}: a new one begins here"
            )
        return path, goes_on

    def _choose(
        self, trainer: Trainer, state: Mapping[str, Any]
    ) -> tuple[Path | None, bool, Path | None]:
        """`_place` of the first rank, and the recording to copy there, if any."""
        if self.path is None or trainer.fast_dev_run:
            return None, bool(state) and state["path"] is None, None
        if self.path != BESIDE:
            path = Path(self.path)
            if is_recording(path) and not state:
                raise TwaError("holds a recording: to go on with it, pass fit(ckpt_path=...)", path)
            return path, is_recording(path), None
        folder = _beside(trainer)
        if "://" in str(folder):
            raise TwaError("expected a local directory: pass path=", folder)
        source = Path(state["path"]) if state and state["path"] else None
        if source is not None and not is_recording(source):
            source = None
        if source is not None and source.parent.resolve() == folder.resolve():
            return source, True, None
        if state and not _steps(state):
            source = None  # it had not begun
        taken = 0
        while is_recording(path := folder / (f"{FOLDER}-v{taken}" if taken else FOLDER)):
            taken += 1
        return path, source is not None, source

    # Checkpoints ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the recording is; in memory, all of it. Ranks call it together."""
        recorder = self.recorder
        if recorder is None:
            return dict(self._loaded)
        path = None if recorder.path is None else str(recorder.path.absolute())
        return {"format": LIGHTNING, "path": path, "recorder": recorder.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state for the recorder, which is made when training starts.

        Raises:
            StateError: it is no such state, or a newer twa has made it
        """
        if state_dict:  # nothing was recorded before the first fit
            # without: from before there were versions
            if text := problem(state_dict.get("format", LIGHTNING), LIGHTNING):
                raise StateError(text, "state of RecorderCallback")
            if missing := [name for name in ("path", "recorder") if name not in state_dict]:
                raise StateError(f"expected {missing[0]!r}", "state of RecorderCallback")
            check_state(state_dict["recorder"])
        self._loaded = state_dict

    def load_best(self, trainer: Trainer) -> int:
        """Moves the module to the average as it was when ModelCheckpoint saved its best file.

        Ranks call it together.

        Returns:
            the step of that

        Raises:
            TwaError: there was no average yet, or none was evaluated, or no file was saved, or
                `keep` may have dropped snapshots of it
            DistributedError: another rank cannot read the file
        """
        path = str(getattr(trainer.checkpoint_callback, "best_model_path", ""))
        if self.recorder is None or self.evaluate is None:
            raise TwaError("expected evaluate=, and a fit before this", "load_best")
        if self.options["keep"] is not None:
            raise TwaError("load_best needs all snapshots: expected None", "keep")
        ranks = Ranks.find()
        with ranks.fail_together("looking for the best checkpoint"):
            step = ranks.broadcast_object(_step_of(path) if ranks.is_rank_zero else 0)
        if step < min(self.recorder.common_steps(), default=step + 1):
            raise TwaError("the best checkpoint is from before the first snapshot: load it", path)
        self.recorder.apply(self.evaluate, until=step, **self.horizon)
        return step

    # Validation ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _validating_twice(self, trainer: Trainer, module: LightningModule) -> Iterator[None]:
        """A context in which the trainer's validations begin with one of the average."""
        loop = trainer.fit_loop.epoch_loop.val_loop

        def run() -> list:
            self._averages = self._validate_average(trainer)
            return type(loop).run(loop)

        loop.run = run
        try:
            yield
        finally:
            del loop.run

    def _validate_average(self, trainer: Trainer) -> dict[str, dict[str, Any]]:
        """Validates the average; returns the arguments of `log` for each figure of it, by name."""
        recorder, evaluate = self.recorder, self.evaluate
        assert recorder is not None and evaluate is not None
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.setup_data()  # both passes are over the same loaders
        if loop.skip:
            return {}
        with contextlib.ExitStack() as stack:
            stack.enter_context(random_state_kept())
            for loader in loop._combined_loader.flattened:
                stack.enter_context(generators_kept(loader))
            apart = stack.enter_context(_apart(trainer))
            if recorder.common_steps():
                try:
                    stack.enter_context(recorder.averaged(evaluate, **self.horizon))
                except (TwaError, DistributedError) as error:  # here, or on another rank
                    if trainer.is_global_zero:
                        _warn(
                            f"step {trainer.global_step}: the average is not validated, the weights"
                            f" as they are stand in for it: {error}"
                        )
            before = dict(trainer.callback_metrics)
            apart.run()
            shown, logged = trainer.progress_bar_metrics, trainer.logged_metrics
            return {
                f"avg_{name}": {
                    "value": value,
                    "prog_bar": name in shown,
                    "logger": None if name in logged else False,
                }
                for name, value in trainer.callback_metrics.items()
                if value is not before.get(name)  # others are not of this validation
            }

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the average's figures with those of the weights as they are."""
        # as the first pass has left them on this rank; these two: no collective, and no advice to
        # have one
        alone = {"sync_dist": True, "rank_zero_only": True}
        for name, options in self._averages.items():
            pl_module.log(name, **options, **alone, add_dataloader_idx=False)
        self._averages = {}


@contextlib.contextmanager
def _apart(trainer: Trainer) -> Iterator[Any]:
    """A context for a validation that nobody but the module and the progress bar sees.

    Its figures are the trainer's metrics inside; no logger gets them. Checkpoints that the module
    saves inside are saved at the end.

    Yields:
        the loop to run
    """
    epoch_loop, bar = trainer.fit_loop.epoch_loop, trainer.progress_bar_callback
    before = epoch_loop.val_loop, trainer._logger_connector, trainer.callbacks
    loop, connector = copy.copy(before[0]), copy.copy(before[1])
    loop.__dict__.pop("run", None)
    loop.batch_progress = copy.deepcopy(loop.batch_progress)
    loop._seen_batches_per_dataloader = copy.copy(loop._seen_batches_per_dataloader)
    for name in ("_progress_bar_metrics", "_logged_metrics", "_callback_metrics"):
        setattr(connector, name, dict(getattr(connector, name)))
    connector.log_metrics = lambda *_, **__: None
    saved: list[tuple[tuple, dict]] = []
    trainer.save_checkpoint = lambda *args, **kwargs: saved.append((args, kwargs))
    epoch_loop.val_loop, trainer._logger_connector = loop, connector
    trainer.callbacks = [] if bar is None else [bar]
    try:
        yield loop
    finally:
        epoch_loop.val_loop, trainer._logger_connector, trainer.callbacks = before
        del trainer.save_checkpoint
    for args, kwargs in saved:
        trainer.save_checkpoint(*args, **kwargs)


def _beside(trainer: Trainer) -> Path:
    """The directory in which Lightning makes `checkpoints`."""
    logger = trainer.logger
    if logger is None:
        return Path(trainer.default_root_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version)


# Averages that are trained ------------------------------------------------------------------------


def train_average(
    trainer: Trainer,
    module: LightningModule,
    source: Source,
    *,
    datamodule: LightningDataModule | None = None,
    train: Iterable | None = None,
    val: Iterable | None = None,
    loss: Callable[[LightningModule, Any], Tensor] | None = None,
    **settings: Any,
) -> Outcome:
    """Moves the module to the best average of candidates: `twa.average` with Lightning's parts.

        outcome = train_average(trainer, module, callback.recorder, datamodule=datamodule)
        outcome.save("out/")
        trainer.save_checkpoint("averaged.ckpt", weights_only=True)

    Batches take the way that they take in `fit`, through the hooks of module and datamodule to the
    trainer's device, and the loss runs in the trainer's precision.

    Args:
        trainer: of the run, or a new one: then `prepare_data`, `setup("fit")` and `configure_model`
            are called here. On several ranks, one that has run with the module
        module: that the candidates are of
        source: what is averaged: a recorder, checkpoints, see `twa.average`
        datamodule: whose training and validation data are used where these are not given; None: the
            trainer's, else the module's own loaders, else those that `fit` had
        train: training batches
        val: validation batches, on which every choice is made
        loss: (module, batch) -> scalar mean loss; None: that of `training_step`, for both data;
            what it logs is left out
        settings: more of `twa.average`, such as steps=100

    Returns:
        all results; the module is at the winner

    Raises:
        TwaError: there are no data or no loss, or see `twa.average`
    """
    knows = trainer.model is not None and trainer.lightning_module is module
    if not knows or (datamodule is not None and datamodule is not trainer.datamodule):
        _attach(trainer, module, datamodule)
    fit_loop = trainer.fit_loop
    train = _data(fit_loop, "train") if train is None else train
    val = _data(fit_loop.epoch_loop.val_loop, "val") if val is None else val
    run = _training_loss(module) if loss is None else loss
    precision = trainer.precision_plugin

    def loss_of(module: LightningModule, batch: Any) -> Tensor:
        batch = module._on_before_batch_transfer(precision.convert_input(batch))
        batch = trainer.strategy.batch_to_device(batch)
        with precision.forward_context():
            return run(module, batch)

    module.to(trainer.strategy.root_device)
    with _silent(module):
        return average(module, source, train, val, loss_of, **settings)


def _attach(
    trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None
) -> None:
    """Makes a trainer know module and data, with the hooks that `fit` begins with.

    Callbacks, loggers and other processes are left alone.
    """
    trainer.strategy.connect(module)
    trainer._data_connector.attach_data(module, datamodule=datamodule)
    trainer._data_connector.prepare_data()
    if datamodule is not None:
        datamodule.setup("fit")
    module.setup("fit")
    with trainer.precision_plugin.module_init_context():
        module.configure_model()
    trainer.precision_plugin.convert_module(module)


def _data(loop: Any, name: str) -> Iterable:
    """The batches of a loop of the trainer: a hook's, or what `fit` was given."""
    source = loop._data_source
    if source.instance is None or not source.is_defined():
        raise TwaError(f"there is no {name}_dataloader: expected {name}=, batches", "train_average")
    found = source.dataloader()
    if isinstance(found, list | tuple) and len(found) == 1:
        found = found[0]
    parts = list(found.values()) if isinstance(found, Mapping) else found
    if hasattr(found, "flattened") or (  # Lightning's CombinedLoader
        isinstance(parts, list | tuple) and any(isinstance(part, DataLoader) for part in parts)
    ):
        raise TwaError(f"{name}_dataloader has several loaders: expected {name}=", "train_average")
    return found


def _training_loss(module: LightningModule) -> Callable[[LightningModule, Any], Tensor]:
    """What `training_step` returns, as (module, batch) -> loss."""
    if not module.automatic_optimization:
        raise TwaError("training_step optimizes by itself: expected loss=", "train_average")
    names = list(inspect.signature(module.training_step).parameters)
    if "dataloader_iter" in names:
        raise TwaError("training_step reads batches by itself: expected loss=", "train_average")
    more = () if len(names) < 2 else (0,)  # batch_idx

    def loss(module: LightningModule, batch: Any) -> Tensor:
        found = module.training_step(batch, *more)
        found = found.get("loss") if isinstance(found, Mapping) else found
        if not isinstance(found, Tensor):
            kind = type(found).__name__
            raise TwaError(f"training_step: expected a loss, found {kind}", "train_average")
        return found

    return loss


@contextlib.contextmanager
def _silent(module: LightningModule) -> Iterator[None]:
    """A context in which a module logs nothing, after which its metrics are empty."""
    from torchmetrics import Metric  # comes with Lightning

    module.log = module.log_dict = lambda *_, **__: None
    try:
        yield
    finally:
        del module.log, module.log_dict
        for part in module.modules():
            if isinstance(part, Metric):
                part.reset()


def _step_of(checkpoint: str) -> int:
    """The `global_step` at which Lightning saved a checkpoint; "": there is none."""
    if not checkpoint:
        raise TwaError("ModelCheckpoint has saved no best checkpoint", "load_best")
    path = Path(checkpoint)
    path = path / "meta.pt" if path.is_dir() else path
    content = described(path)
    step = content.get("global_step") if isinstance(content, dict) else None
    if not isinstance(step, int):
        raise TwaError("expected a checkpoint of Lightning, found none", path)
    return step


def _steps(state: Mapping[str, Any]) -> list[int]:
    """Steps of the snapshots that there were when RecorderCallback made a state."""
    ranks = [value for key, value in state["recorder"].items() if key.startswith("rank_")]
    return sorted({step for steps, _ in ranks for step in steps})


def _copy(source: Path, path: Path, steps: list[int]) -> None:
    """Copies a recording as it was when it had these snapshots, the anchors last: they make it one.

    Those that begin it may be later, since `keep` moves them.
    """
    for kind in (STEPS, ANCHORS):
        for folder in folders_of(source):
            to = path / folder.relative_to(source)
            to.mkdir(parents=True, exist_ok=True)
            for file in folder.iterdir():
                match = kind.fullmatch(file.name)
                if match and (kind is ANCHORS or int(match[1]) <= steps[-1]):
                    shutil.copyfile(file, to / file.name)


def _warn(text: str) -> None:
    warnings.warn(text, CandidateWarning, stacklevel=4)
