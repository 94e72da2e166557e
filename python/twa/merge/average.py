"""`average`: the main job as a function, for those who have model, data and loss at hand."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..io.candidates import Candidates
from ..io.errors import TwaError, check_type
from ..modes import modes_kept
from ..recorder.recorder import Recorder
from ..tasks.batches import generators_kept, random_state_kept
from ..tasks.contract import Task, check_batches, scalar
from .outcome import Outcome
from .run import Merge
from .settings import Settings, TwaMethod

#: what candidates can be given as
Source = Candidates | Recorder | str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def average(
    model: nn.Module,
    source: Source,
    train: Iterable,
    val: Iterable,
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    heldout: Iterable | None = None,
    test: Iterable | None = None,
    metric: Callable[[nn.Module, Any], float] | None = None,
    metric_name: str = "metric",
    methods: Sequence[str | TwaMethod] | None = None,
    progress: bool = True,
    group: dist.ProcessGroup | None = None,
    **settings: Any,
) -> Outcome:
    """Trains averages from a fixed one that it chooses, and moves the model to the best of all.

        outcome = twa.average(model, "run/*.safetensors", train, val, loss)
        print(outcome)
        outcome.save("out/")

    It is what `twa average` does. All choices are made on the validation data. Training modes and
    the state of random generators are as before when it returns; gradients are gone. After an error
    the model is at the average that was being tried.

    Args:
        model: that the candidates are of; one in DistributedDataParallel is taken out of it
        source: candidates, a recorder, or what `Candidates` takes
        train: batches for TWA-t and BatchNorm re-estimation, to be read again and again, such as a
            DataLoader or a list. On several ranks all of them on each: twa shares them out
        val: batches on which every choice is made
        loss: (model, batch) -> scalar mean loss over the batch; runs the model
        heldout: batches for TWA-v, disjoint from `val`; None: every other batch of `val`, and all
            choices are made on the rest
        test: batches for the table only
        metric: (model, batch) -> mean over the batch of a second figure, such as accuracy
        metric_name: that figure's name
        methods: trained averages, such as "t:tensor:4"; None: those of `twa average`
        progress: whether bars are shown
        group: the process group; None: all ranks
        settings: others of `twa average`: steps, lr, weight_decay, bn_batches, batches_per_step,
            seed, sharding, low_memory, storage, patience, compare; basis, a file of `twa pack`

    Returns:
        all results; the model is at the winner

    Raises:
        CandidateError: model and candidates do not fit
        TaskError: data can be read only once, or are too few
        BasisError: the basis is of another model, other candidates or other methods
        TwaError: a setting is none of what it can be
    """
    known = [f.name for f in fields(Settings) if f.name not in ("methods", "save_every")]
    if odd := [name for name in settings if name not in known]:
        raise TwaError(f"expected one of {', '.join(known)}, found {odd[0]!r}", "settings")
    if methods is not None:
        parsed = (m if isinstance(m, TwaMethod) else TwaMethod.parse(m) for m in methods)
        settings["methods"] = tuple(parsed)
    chosen = Settings(**settings)
    data = {"train": train, "val": val, "heldout": heldout, "test": test}
    optional = ("heldout", "test")
    given = {k: batches for k, batches in data.items() if batches is not None or k not in optional}
    whole = model.module if isinstance(model, DistributedDataParallel) else model
    check_type("model", whole, nn.Module, "a torch.nn.Module")
    for name, function in {"loss": loss, "metric": metric}.items():
        if function is not None and not callable(function):
            found = type(function).__name__
            raise TwaError(f"expected a function of (model, batch), found {found}", name)
    title = type(whole).__name__
    run = functools.partial(scalar, loss, "loss")
    task = Task(
        title, lambda: whole, run, train, val, heldout, test, metric, metric_name=metric_name
    )
    with contextlib.ExitStack() as kept:
        kept.enter_context(torch.inference_mode(False))
        kept.enter_context(torch.enable_grad())
        kept.enter_context(modes_kept(whole))
        kept.enter_context(random_state_kept())
        for batches in given.values():
            kept.enter_context(generators_kept(batches))
        for name, batches in given.items():
            check_batches(batches, name)  # which may draw random numbers
        candidates = _candidates(source)
        return Merge(task, candidates, chosen, progress, group=group, may_shard=False).run()


def _candidates(source: Source) -> Candidates:
    """The candidates that are meant."""
    if isinstance(source, Candidates):
        return source
    if isinstance(source, Recorder):
        return source.recording()
    return Candidates(source)
