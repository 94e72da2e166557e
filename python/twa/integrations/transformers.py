"""The recorder and the main job with transformers' Trainer, and trainers built on it, as TRL's.

    trainer = Trainer(model, args, train_dataset=train, eval_dataset=val)
    callback = RecorderCallback(trainer, every=200, evaluate="ema", half_life=2000)
    trainer.add_callback(callback)
    trainer.train()
    train_average(trainer, callback.recorder).save("out/")

On several ranks all make one and call the same, as of the Trainer itself.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from .. import averages
from ..distributed.choose import find_ranks
from ..distributed.ranks import DistributedError
from ..io.checks import is_text, shown
from ..io.errors import CandidateWarning, StateError, TwaError
from ..io.recording_files import folders_of, is_recording, read_log
from ..io.versions import TRANSFORMERS, problem
from ..merge.average import Source, average
from ..merge.outcome import Outcome
from ..recorder.contents import Weights
from ..recorder.recorder import Recorder
from ..tasks.batches import generators_kept, random_state_kept

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        'twa.integrations.transformers needs transformers: pip install "transformers>=5.0"'
    ) from error

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

#: the folder in a trainer's output_dir; what begins so is not sent to the Hub
FOLDER = "_twa"
#: under which a checkpoint's trainer_state.json has the recordings that it goes with
RUNS = "twa_recordings"
#: of an evaluation, and not of the model
SPEED = (
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "model_preparation_time",
    "jit_compilation_time",
)
#: attributes in which TRL's trainers count what they log next
TRL_METRICS, TRL_TOKENS = "_metrics", "_total_train_tokens"
#: those of this process's callbacks: it may begin again where it was interrupted
_recorders: weakref.WeakSet[Recorder] = weakref.WeakSet()


class RecorderCallback(TrainerCallback):
    """Records a Trainer's run, and evaluates an average of it beside the model.

        trainer.add_callback(RecorderCallback(trainer, every=200, evaluate="ema", half_life=2000))

    Snapshots are taken by `state.global_step`. Checkpoints hold the weights of the training, and
    these are the same bits as without the callback. Training that goes on from a checkpoint
    (`resume_from_checkpoint`) goes on with the recording: later snapshots are dropped, and the ones
    to come are those of a run that was never stopped. A recording that the checkpoint does not
    belong to is refused. Where `auto_find_batch_size` begins the training again, so does the
    recording.

    With `evaluate`, each evaluation of the trainer is followed by one of the average, on the same
    batches, as `eval_avg_loss` and so on; with several evaluation datasets as `eval_NAME_avg_loss`.
    `metric_for_best_model="eval_avg_loss"` and EarlyStoppingCallback work with these. Before the
    first snapshot they are the model's own, and NaN, which is never the best, where the average
    cannot be made. With `load_best_model_at_end` and one of these as
    the metric, the model ends at the average as it was at the best step; if it has BatchNorm, with
    the average of the statistics, as it was evaluated: `twa.update_bn` makes better ones.

    Args:
        trainer: that it is added to
        every: steps between snapshots
        bits: 8, 4, 3, 2 or 1
        start: step of the first snapshot: none before it
        path: directory for the files; "auto": `_twa` in the trainer's output_dir, which the Trainer
            neither deletes nor sends to the Hub; None: snapshots stay in memory
        keep: how many snapshots are kept, the newest; None: all
        weights: as for `Recorder`
        evaluate: None, or the average to evaluate: "uniform", "ema", "lawa", "wsm" or "last"
        name: of the average in the names of metrics
        ignore_keys: outputs of the model that `compute_metrics` is not given; as
            `ignore_keys_for_eval` of `Trainer.train`
        half_life, last, decay: horizon of the average, in steps, see `twa.averages.of_steps`

    Attributes:
        recorder: of the training, from its beginning on; None before

    Raises:
        TwaError: an option is none of what it can be, or the trainer cannot evaluate an average
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        every: int,
        bits: int = 4,
        start: int = 0,
        path: str | Path | None = "auto",
        keep: int | None = None,
        weights: Weights | None = None,
        evaluate: str | None = None,
        name: str = "avg",
        ignore_keys: list[str] | None = None,
        half_life: float | None = None,
        last: float | None = None,
        decay: str | None = None,
    ) -> None:
        horizon = {"half_life": half_life, "last": last, "decay": decay}
        self.horizon: dict[str, Any] = {k: v for k, v in horizon.items() if v is not None}
        if evaluate is not None:
            averages.of_steps([0], evaluate, **self.horizon)
        elif self.horizon:
            raise TwaError(f"{next(iter(self.horizon))}= is of the average: expected evaluate=")
        if evaluate is not None and getattr(trainer, "use_vllm", False):
            raise TwaError(
                "vLLM generates with the weights of the training: expected None", "evaluate"
            )
        self.trainer, self.path, self.evaluate, self.name = trainer, path, evaluate, name
        self.ignore_keys, self._weights = ignore_keys, weights
        self._options: dict[str, Any] = dict(every=every, bits=bits, start=start, keep=keep)
        self._first = start or every  # step of the first snapshot
        self._run, self._batch_size = "", 0  # of the training that goes on
        self.recorder: Recorder | None = None

    def __repr__(self) -> str:
        return f"RecorderCallback({self.recorder})"

    # The recording -------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins a recording, or goes on with one."""
        self._go_first()
        path, callbacks = self._folder(args), self.trainer.callback_handler.callbacks
        others = [c for c in callbacks if isinstance(c, RecorderCallback) and c is not self]
        if path is not None and any(c._folder(args) == path for c in others):
            text = "another RecorderCallback records there: expected a path= of its own"
            raise TwaError(text, path)
        if self._options["keep"] is not None and self._chooses(args):
            raise TwaError(
                f"load_best_model_at_end by {args.metric_for_best_model!r} needs all snapshots:"
                " expected None",
                "keep",
            )
        step, model = state.global_step, kwargs["model"]
        old, again = self.recorder, self._is_again(args, state)
        entries: Any = state.stateful_callbacks  # of trainer_state.json: a dict by now
        runs = _runs_of(entries)
        in_memory = path is None and old is not None and old.model is model
        if not (in_memory and self._run in runs):
            known = [self._run] if again else runs
            self.recorder = self._made(model, path, known, resume=step > 0 or again)
            self._run = self.recorder.run
            if path is None and old is not None and len(old):
                _warn(f"{len(old)} snapshots of the training before are dropped")
        assert self.recorder is not None
        if self._run not in runs:
            runs.append(self._run)
        self._batch_size = state.train_batch_size or 0
        self.recorder.take_masters_of(kwargs["optimizer"])
        if step == 0 and not again:
            return
        first = min(self.recorder.steps, default=step)
        self.recorder.rewind(step if first <= step else None)
        self.recorder.count = step
        if not self.recorder.steps and step >= self._first and state.is_world_process_zero:
            _warn(f"the recording begins at step {step}: there is none of the steps before")

    def _is_again(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether this training has begun before, with larger batches: auto_find_batch_size."""
        is_smaller = (state.train_batch_size or 0) < self._batch_size
        return args.auto_find_batch_size and state.global_step == 0 and is_smaller

    def _folder(self, args: TrainingArguments) -> Path | None:
        """Where the files go."""
        if self.path == "auto":
            return Path(str(args.output_dir)) / FOLDER
        return None if self.path is None else Path(self.path)

    def _made(self, model: nn.Module, path: Path | None, runs: list[str], resume: bool) -> Recorder:
        """A recorder; TwaError if there is a recording in its path, and of none of these runs."""
        for recorder in list(_recorders):
            if path is not None and recorder.path == path:
                recorder.close()
        ranks = find_ranks("auto", model)
        with ranks.fail_together(f"opening {path}"):
            there = path is not None and ranks.is_rank_zero and is_recording(path)
            if path is not None and there and (not runs or _run_in(path) not in runs):
                raise TwaError(
                    "holds the recording of another run: remove it, pass another path=, or go on"
                    " with that run by resume_from_checkpoint",
                    path,
                )
        resume = resume and path is not None
        recorder = Recorder(model, path=path, resume=resume, weights=self._weights, **self._options)
        _recorders.add(recorder)
        return recorder

    def _go_first(self) -> None:
        """Moves before all callbacks that look at metrics, but behind what decides when to save."""
        callbacks = self.trainer.callback_handler.callbacks
        if self not in callbacks:
            raise TwaError("expected the one that it is added to", "trainer")
        callbacks.remove(self)
        callbacks.insert(1, self)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes a snapshot if one is due."""
        assert self.recorder is not None
        self.recorder.step(state.global_step)
        self._before_save(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes what is left, before a checkpoint."""
        self._before_save(control)

    def _before_save(self, control: TrainerControl) -> None:
        """Writes what is left if a checkpoint comes: it has all snapshots before it."""
        if control.should_save and self.recorder is not None:
            self.recorder.flush()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Writes what is left, if another callback had the checkpoint saved."""
        assert self.recorder is not None
        self.recorder.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes what is left; moves the model to the best average, if one was to be chosen."""
        assert self.recorder is not None
        self.recorder.flush()
        self._batch_size = 0
        best = state.best_global_step
        if self.evaluate is None or not self._chooses(args) or best is None or best < self._first:
            return
        try:
            self.recorder.apply(self.evaluate, until=best, **self.horizon)
        except (TwaError, DistributedError) as error:
            _warn(f"the model is not at the best average, which was at step {best}: {error}")

    def _chooses(self, args: TrainingArguments) -> bool:
        """Whether the trainer is to end at the best average."""
        metric = args.metric_for_best_model or ""
        metric = metric if metric.startswith("eval_") else f"eval_{metric}"
        data = self.trainer.eval_dataset
        prefixes = [f"eval_{name}" for name in data] if isinstance(data, dict) else ["eval"]
        is_own = any(metric.startswith(f"{prefix}_{self.name}_") for prefix in prefixes)
        return args.load_best_model_at_end and self.evaluate is not None and is_own

    # The average ---------------------------------------------------------------------------------

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluates the average; its metrics are logged, and added to the others."""
        metrics, batches = kwargs["metrics"], kwargs["eval_dataloader"]
        if self.recorder is None or self.evaluate is None or batches is None:
            return
        prefix = _prefix_of(metrics)
        own = f"{prefix}_{self.name}"
        if odd := [key for key in metrics if key.startswith(f"{own}_")]:
            raise TwaError(f"{odd[0]!r} is a metric of the model: pass name=", "RecorderCallback")
        found = _figures(metrics, prefix, own)
        if self.recorder.common_steps():
            found = self._measured(batches, own) or dict.fromkeys(found, math.nan)
        self.trainer.log(dict(found))
        # the model's own stay the last: a notebook takes those for the evaluation's
        merged = {**found, **metrics}
        metrics.clear()
        metrics.update(merged)

    def _measured(self, batches: DataLoader, prefix: str) -> dict[str, float] | None:
        """The metrics of the average; None if it cannot be made."""
        assert self.recorder is not None and self.evaluate is not None
        trainer = self.trainer
        self._end_bars()
        with contextlib.ExitStack() as stack:
            for kept in (random_state_kept(), generators_kept(batches), _pass_kept(batches)):
                stack.enter_context(kept)
            try:
                stack.enter_context(self.recorder.averaged(self.evaluate, **self.horizon))
            except (TwaError, DistributedError) as error:
                _warn(f"step {trainer.state.global_step}: the average is not evaluated: {error}")
                return None
            output = trainer.evaluation_loop(
                batches,
                description="Evaluation of the average",
                prediction_loss_only=True if trainer.compute_metrics is None else None,
                ignore_keys=self.ignore_keys,
                metric_key_prefix=prefix,
            )
        return _figures(output.metrics or {}, prefix, prefix) | self._of_trl(prefix)

    def _of_trl(self, prefix: str) -> dict[str, float]:
        """What TRL's trainers have measured on their own; `log` would take it for the model's."""
        kept = getattr(self.trainer, TRL_METRICS, None)
        if not isinstance(kept, Mapping) or not isinstance(kept.get("eval"), dict):
            return {}
        found = {}
        for key, values in kept["eval"].items():
            if known := [v for v in values if not math.isnan(v)]:
                found[f"{prefix}_{key}"] = sum(known) / len(known)
        kept["eval"].clear()
        return found

    def _end_bars(self) -> None:
        """Has the bars of the evaluation before end: the next one gets its own."""
        for callback in self.trainer.callback_handler.callbacks:
            if (bar := getattr(callback, "prediction_bar", None)) is not None:
                bar.close()
                callback.prediction_bar = None


def _runs_of(entries: dict[str, Any]) -> list[str]:
    """The recordings that a trainer's state goes with; what is appended is in the state.

    Args:
        entries: of trainer_state.json, under the names of callbacks

    Raises:
        StateError: they are no names of recordings, or a newer twa has written them
    """
    found = entries.setdefault(RUNS, {"format": TRANSFORMERS, "runs": []})
    if isinstance(found, list):  # from before there were versions
        found = entries[RUNS] = {"format": TRANSFORMERS, "runs": found}
    version = found.get("format") if isinstance(found, dict) else found
    if text := problem(version, TRANSFORMERS):
        raise StateError(text, f"{RUNS!r} in trainer_state.json")
    runs = found.get("runs")
    if not isinstance(runs, list) or not all(map(is_text, runs)):
        raise StateError(f"expected names, found {shown(runs)}", f"{RUNS!r} in trainer_state.json")
    return runs


def _run_in(path: Path) -> str:
    """The run that is recorded in a directory."""
    return read_log(next(filter(is_recording, folders_of(path)))).contents.run


def _prefix_of(metrics: Mapping[str, float]) -> str:
    """What the names of an evaluation's metrics begin with, such as "eval"."""
    timed = [key.removesuffix("_runtime") for key in metrics if key.endswith("_runtime")]
    return min(timed, default="eval")  # others of these begin with it


def _figures(metrics: Mapping[str, float], prefix: str, other: str) -> dict[str, float]:
    """The metrics whose names begin with a prefix, with another one; without times."""
    names = {key: key.removeprefix(f"{prefix}_") for key in metrics if key.startswith(f"{prefix}_")}
    return {f"{other}_{name}": metrics[key] for key, name in names.items() if name not in SPEED}


@contextlib.contextmanager
def _pass_kept(batches: DataLoader) -> Iterator[None]:
    """Has Accelerate's loaders count the pass in it as the one before: data may depend on it."""
    count = getattr(batches, "iteration", None)
    if count is None:
        yield
        return
    loader: Any = batches
    try:
        loader.iteration = max(count - 1, 0)
        yield
    finally:
        loader.iteration = count


def _warn(text: str) -> None:
    warnings.warn(text, CandidateWarning, stacklevel=4)


# The main job ------------------------------------------------------------------------------------


def train_average(
    trainer: Trainer,
    source: Source,
    *,
    steps: int = 100,
    eval_dataset: Any = None,
    **options: Any,
) -> Outcome:
    """`twa.average` with a Trainer's model, data and loss; the model moves to the best average.

        outcome = train_average(trainer, callback.recorder)
        trainer.save_model("averaged/")

    The loss is the trainer's `compute_loss` of a batch, under its autocast. Data are the trainer's
    datasets in batches of its sizes, by its collator; for training in another order at each pass.
    Afterwards the trainer can be used as before.

    Args:
        trainer: has it all; it need not have been trained
        source: candidates, a recorder, or what `Candidates` takes
        steps: of each trained average
        eval_dataset: on which all choices are made: a dataset, or the name of one of the trainer's;
            None: the trainer's
        options: others of `twa.average`

    Returns:
        all results; `trainer.model` is at the winner

    Raises:
        TwaError: there is no dataset, or several and no name; or as `twa.average`
    """
    if trainer.train_dataset is None:
        raise TwaError("expected one in the trainer, found None", "train_dataset")
    known = trainer.eval_dataset
    if eval_dataset is None and (known is None or isinstance(known, dict)):
        names = "a dataset" if known is None else f"one of {', '.join(map(repr, known))}"
        raise TwaError(f"expected {names}, found None", "eval_dataset")
    args = trainer.args
    train = _plain(trainer.get_train_dataloader(), args.per_device_train_batch_size, args.seed)
    val = _plain(trainer.get_eval_dataloader(eval_dataset), args.per_device_eval_batch_size)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs = trainer._prepare_inputs(batch)
        count = _labels_in(trainer, inputs)
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            found = trainer.compute_loss(model, inputs, num_items_in_batch=count)
        assert isinstance(found, Tensor)  # without the outputs, which are not asked for
        return found

    assert trainer.model is not None
    with _counts_kept(trainer), _ranks_apart(trainer.args):
        return average(trainer.model, source, train, val, loss, steps=steps, **options)


def _plain(loader: Any, size: int, seed: int | None = None) -> DataLoader:
    """A loader for twa, which shares batches out to ranks by itself.

    Args:
        loader: of the trainer, perhaps of this rank's part
        size: of a batch
        seed: of the order of the batches; None: that of the dataset
    """
    dataset = loader.dataset
    if type(dataset).__name__ == "IterableDatasetShard":
        dataset = dataset.dataset
    shuffle = seed is not None and not isinstance(dataset, IterableDataset)
    return DataLoader(
        dataset,
        batch_size=size,
        shuffle=shuffle,
        generator=torch.Generator().manual_seed(seed or 0) if shuffle else None,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
    )


def _labels_in(trainer: Trainer, inputs: Mapping[str, Any]) -> Tensor | None:
    """How many labels a batch has, counted as the Trainer does; None where it counts none."""
    labels = inputs.get("labels")
    if not (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None):
        return None
    if labels is not None and "shift_labels" in inputs:
        labels = inputs["shift_labels"]
    elif isinstance(labels, Tensor) and getattr(trainer, "_loss_shifts_labels", False):
        labels = labels[..., 1:]
    return labels.ne(-100).sum() if isinstance(labels, Tensor) else None


@contextlib.contextmanager
def _ranks_apart(args: TrainingArguments) -> Iterator[None]:
    """Has losses be those of a rank's own batches: twa averages over ranks."""
    before = args.average_tokens_across_devices
    args.average_tokens_across_devices = False
    try:
        yield
    finally:
        args.average_tokens_across_devices = before


@contextlib.contextmanager
def _counts_kept(trainer: Trainer) -> Iterator[None]:
    """Puts back what TRL's trainers have counted, and log next."""
    found = {name: getattr(trainer, name, None) for name in (TRL_METRICS, TRL_TOKENS)}
    before = {name: value for name, value in found.items() if value is not None}
    try:
        for name, value in before.items():
            setattr(trainer, name, copy.deepcopy(value))
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)
