"""Tasks: what `twa average` needs to know about a model, as a Python file or a built-in name.

A task file defines

    model()                 a new nn.Module
    train_data()            re-iterable batches for TWA-t and BatchNorm re-estimation
    val_data()              re-iterable batches on which every choice is made
    loss(model, batch)      scalar mean loss over the batch; runs the model

and may define

    heldout_data()          batches for TWA-v's gradient steps, disjoint from val_data; without it,
                            TWA-v takes every other batch of val_data, and all choices are made on
                            the rest
    test_data()             batches for the report only
    metric(model, batch)    mean over the batch of a second figure for the report, such as accuracy
    METRIC                  that figure's name

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
from typing import Any

import torch
from torch import Tensor, nn

from ..io.errors import TaskError, TwaError
from .batches import EveryOther, Moved, batch_digest, first_batch

BUILT_IN = ("chars", "digits")
REQUIRED = ("model", "train_data", "val_data", "loss")


def _same(a: object, b: object) -> bool:
    """Whether two batches hold equal dense tensors in their tuples, lists and dicts.

    Others, and what is no tensor, are for `batch_digest`.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        dense = all(t.layout == torch.strided and not t.is_nested for t in (a, b))
        return not dense or torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return True


@dataclass
class Task:
    """A model, its data and its loss. `load_task` makes one of a task file.

    Data are batches that can be read again and again.

    Attributes:
        name: for messages
        model: makes a new model
        loss: scalar mean loss over a batch; runs the model
        train: batches for TWA-t and BatchNorm re-estimation
        val: batches on which every choice is made
        heldout: batches for TWA-v; None: `split_validation` makes them from `val`
        test: batches for the report only, or None
        metric: mean over a batch of a second figure for the report, or None
        metric_name: that figure's name
        fingerprint: of the file that defines the task: what a continued run may not change
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
    fingerprint: str = ""

    def first_batches(self) -> dict[str, str]:
        """Digests of the first batch of each kind of data.

        They must be the same on all ranks, and when a run is continued.
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
        """The same task with model and batches on a device."""
        return replace(
            self,
            model=lambda: self.model().to(device),
            train=Moved(self.train, device),
            val=Moved(self.val, device),
            heldout=None if self.heldout is None else Moved(self.heldout, device),
            test=None if self.test is None else Moved(self.test, device),
        )

    def split_validation(self) -> None:
        """Gives every other batch of the validation data to TWA-v.

        A task with held-out data of its own stays as it is.

        Raises:
            TaskError: the validation data are too few, or come in another order at each pass
        """
        if self.heldout is not None:
            return
        if sum(1 for _ in zip(self.val, range(2), strict=False)) < 2:
            raise TaskError(
                f"task {self.name}: TWA-v needs held-out data, or validation data of at least 2"
                " batches to take every other one from; found fewer"
            )
        first, again = next(iter(self.val)), next(iter(self.val))
        if not _same(first, again) or batch_digest(first) != batch_digest(again):
            raise TaskError(
                f"task {self.name}: the validation data are other batches at each pass (shuffled?),"
                " so TWA-v cannot take every other one; fix their order, or give held-out data"
            )
        self.val, self.heldout = EveryOther(self.val, 1), EveryOther(self.val, 0)


def load_task(name: str, seed: int = 0) -> Task:
    """Loads a task.

    Args:
        name: of a built-in task, or path of a Python file, which is run
        seed: orders the batches, where the task's data functions take it

    Returns:
        the task, with its data made and its model yet to be made

    Raises:
        TaskError: there is no such task, or it does not keep the contract
    """
    if name in BUILT_IN:
        module = importlib.import_module(f"twa.tasks.{name}")
    else:
        module = _run_file(Path(name))
    if missing := [part for part in REQUIRED if not callable(getattr(module, part, None))]:
        raise TaskError(
            f"expected functions {', '.join(REQUIRED)}; {', '.join(missing)} missing",
            f"task {name}",
        )

    def named(function: str) -> Callable[..., Any]:
        return _named(getattr(module, function), f"task {name}: {function}()")

    def data(function: str) -> Iterable:
        make = named(function)
        batches = make(seed=seed) if "seed" in inspect.signature(make).parameters else make()
        check_batches(batches, f"task {name}: {function}()")
        return batches

    assert module.__file__ is not None  # it was loaded from there
    digest = hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
    return Task(
        name=name,
        model=named("model"),
        loss=functools.partial(scalar, named("loss"), f"task {name}: loss()"),
        train=data("train_data"),
        val=data("val_data"),
        heldout=data("heldout_data") if hasattr(module, "heldout_data") else None,
        test=data("test_data") if hasattr(module, "test_data") else None,
        metric=named("metric") if hasattr(module, "metric") else None,
        metric_name=getattr(module, "METRIC", "metric"),
        fingerprint=f"{Path(name).name} {digest[:16]}",
    )


def scalar(
    loss: Callable[[nn.Module, Any], Tensor], where: str, model: nn.Module, batch: object
) -> Tensor:
    """The loss of a batch; TaskError if it is no tensor with one number."""
    value = loss(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = "a tensor of shape" if isinstance(value, Tensor) else type(value).__name__
        shape = f" {list(value.shape)}" if isinstance(value, Tensor) else ""
        raise TaskError(f"expected a tensor with one number, found {found}{shape}", where)
    return value


def check_batches(batches: object, where: str) -> None:
    """Checks that data can be read again and again, and that all of them are there.

    Raises:
        TaskError: they cannot, or are a share of one rank
    """
    if not isinstance(batches, Iterable):
        found = type(batches).__name__
        raise TaskError(f"expected batches, such as a DataLoader or a list, found {found}", where)
    if iter(batches) is batches:
        raise TaskError(
            "expected a DataLoader or a list of batches, found an iterator, which can be read only"
            " once",
            where,
        )
    if getattr(getattr(batches, "sampler", None), "num_replicas", 1) > 1:
        raise TaskError(
            "shares its data out over ranks (DistributedSampler); twa does that itself: expected"
            " all of them",
            where,
        )


def _run_file(path: Path) -> ModuleType:
    """The module that a task file is, run."""
    try:
        is_file = path.is_file()
        if is_file:
            path.read_bytes()
    except OSError as error:
        raise TaskError(f"task {str(path)!r}: cannot be read ({error.strerror})") from error
    if not is_file:
        raise TaskError(
            f"task {str(path)!r}: expected one of {', '.join(BUILT_IN)}, or a Python file; there is"
            " no such file"
        )
    spec = importlib.util.spec_from_file_location(f"twa_task_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise TaskError(f"task {str(path)!r}: expected a file ending in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and worker processes look it up
    # Modules beside the file can be imported, as when it is run as a script.
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        hint = ""
        if isinstance(error, ImportError):
            hint = f"; for a file beside it: import its name, {path.parent} is on the path"
        raise TaskError(f"task {str(path)!r}: {type(error).__name__}: {error}{hint}") from error
    return module


def _named(function: Callable[..., Any], where: str) -> Callable[..., Any]:
    """The task's function; a ValueError from it becomes a TaskError that says whose it is.

    The ValueError is its cause, and keeps its traceback.
    """

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except TwaError:
            raise
        except ValueError as error:
            raise TaskError(str(error), where) from error

    return run
