"""Tasks: what `twa average` needs to know about a model, as a Python file or a built-in name.

A task file defines

    model()                 a new nn.Module
    train_data()            re-iterable batches for TWA-t and BatchNorm re-estimation
    val_data()              re-iterable batches on which every choice is made
    loss(model, batch)      scalar mean loss over the batch; runs the model

and may define

    heldout_data()          batches for TWA-v's gradient steps, disjoint from val_data. Without it,
                            TWA-v takes every other batch of val_data and all choices are made on
                            the rest.
    test_data()             batches for the report only
    metric(model, batch)    mean over the batch of a second figure for the report, such as accuracy;
                            METRIC names it

Data functions may take a `seed` argument, which then orders the batches.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from .batches import EveryOther, Moved, batch_digest, first_batch

BUILT_IN = ("chars", "digits")
REQUIRED = ("model", "train_data", "val_data", "loss")


class TaskError(ValueError):
    """The task cannot be loaded or does not keep the contract."""


def _same(a: object, b: object) -> bool:
    """Whether two batches hold equal tensors."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return True


@dataclass
class Task:
    """A loaded task; see the module's text.

    Without `heldout`, `split_validation` makes it from `val`.
    """

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, object], Tensor]
    train: Iterable
    val: Iterable
    heldout: Iterable | None
    test: Iterable | None
    metric: Callable[[nn.Module, object], float] | None
    metric_name: str
    fingerprint: str = ""  # of the file that defines it

    def first_batches(self) -> dict[str, str]:
        """Digests of the first batch of each kind of data: what must be the same on all ranks, and
        when a run is continued.
        """
        data = {
            "training": self.train,
            "validation": self.val,
            "held-out": self.heldout,
            "test": self.test,
        }
        return {
            f"first batch of the {name} data": str(batch_digest(first_batch(b)))
            for name, b in data.items()
            if b is not None
        }

    def on(self, device: torch.device) -> Task:
        """The same with model and batches on a device."""
        data = {name: getattr(self, name) for name in ("train", "val", "heldout", "test")}
        moved = {
            name: None if batches is None else Moved(batches, device)
            for name, batches in data.items()
        }
        return replace(self, model=lambda: self.model().to(device), **moved)

    def split_validation(self) -> None:
        """Gives every other batch of the validation data to TWA-v, if the task has no held-out data
        of its own.
        """
        if self.heldout is not None:
            return
        if sum(1 for _ in zip(self.val, range(2), strict=False)) < 2:
            raise TaskError(
                f"task {self.name}: TWA-v needs heldout_data(), or a val_data() of at least 2"
                " batches to take every other one from; found fewer"
            )
        if not _same(next(iter(self.val)), next(iter(self.val))):
            raise TaskError(
                f"task {self.name}: val_data() gives other batches at each pass (shuffled?), so"
                " TWA-v cannot take every other one; fix its order or define heldout_data()"
            )
        self.val, self.heldout = EveryOther(self.val, 1), EveryOther(self.val, 0)


def load_task(name: str, seed: int = 0) -> Task:
    """A built-in task by name, or a Python file (which is run)."""
    if name in BUILT_IN:
        module = importlib.import_module(f"twa.tasks.{name}")
    else:
        module = _run_file(Path(name))
    if missing := [part for part in REQUIRED if not callable(getattr(module, part, None))]:
        raise TaskError(
            f"task {name}: expected functions {', '.join(REQUIRED)}; {', '.join(missing)} missing"
        )

    def data(function: str) -> Iterable | None:
        make = getattr(module, function, None)
        if make is None:
            return None
        batches = make(seed=seed) if "seed" in inspect.signature(make).parameters else make()
        if iter(batches) is batches:
            raise TaskError(
                f"task {name}: {function}() returned an iterator, which can be read only once;"
                " return a DataLoader or a list of batches"
            )
        if (sampler := getattr(batches, "sampler", None)) is not None and getattr(
            sampler, "num_replicas", 1
        ) > 1:
            raise TaskError(
                f"task {name}: {function}() shares its data out over ranks (DistributedSampler);"
                " twa does that itself: return all of them"
            )
        return batches

    return Task(
        name=name,
        model=module.model,
        loss=_named(module.loss, f"task {name}: loss()"),
        train=data("train_data"),
        val=data("val_data"),
        heldout=data("heldout_data"),
        test=data("test_data"),
        metric=(
            _named(module.metric, f"task {name}: metric()") if hasattr(module, "metric") else None
        ),
        metric_name=getattr(module, "METRIC", "metric"),
        fingerprint=(
            f"{Path(name).name}"
            f" {hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()[:16]}"
        ),
    )


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise TaskError(
            f"task {str(path)!r}: expected one of {', '.join(BUILT_IN)}, or a Python file; there is"
            " no such file"
        )
    spec = importlib.util.spec_from_file_location(f"twa_task_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise TaskError(f"task {str(path)!r}: expected a file ending in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and worker processes look it up
    # modules beside the file, as when it is run as a script
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        hint = (
            f"; for a file beside it: import its name, {path.parent} is on the path"
            if isinstance(error, ImportError)
            else ""
        )
        raise TaskError(f"task {str(path)!r}: {type(error).__name__}: {error}{hint}") from error
    return module


def _named(function: Callable, name: str) -> Callable:
    """The task's function; a ValueError says whose it is, and keeps its traceback."""

    @functools.wraps(function)
    def run(model: nn.Module, batch: object):
        try:
            return function(model, batch)
        except ValueError as error:
            raise TaskError(f"{name}: {error}") from error

    return run
