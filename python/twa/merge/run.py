"""The main job: from candidates to one model."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.batch_shares import share_of
from ..distributed.choose import choose_sharding
from ..distributed.ranks import Ranks, facts, versions
from ..distributed.weights import restore, snapshot
from ..io.candidates import Candidates
from ..io.errors import StateError, TwaError
from ..io.key_map import match_model
from ..io.progress import PeakMemory, progress_bar
from ..rate import step_length
from ..subspace import Subspace, recentred
from ..tasks.batches import length
from ..tasks.contract import Task
from .baselines import BASELINES, measure, number_of_looks
from .evaluate import Evaluator
from .fitting import fitted, for_recording
from .outcome import Outcome
from .packed import Packed
from .results import START, Result
from .resume import Store
from .settings import Settings, TwaMethod
from .start import choose, options
from .train import Trainer

SAVE_SECONDS = 10.0  # between saved states while baselines are evaluated


@dataclass
class Best:
    """The best result so far.

    Attributes:
        result: its row of the table
        weights: this rank's part of its weights, by key; None: its merge weights give them
    """

    result: Result
    weights: dict[str, Tensor] | None


class Merge:
    """Runs every method on one model object and remembers the best on the validation data.

    TWA starts at a fixed average that few looks choose, its center, and looks at the validation
    data from there on. On several ranks (torch.distributed), all make one and call `run`.

    Args:
        task: model, data and loss
        candidates: what is averaged
        settings: methods, steps, rates
        progress: whether bars are shown
        group: the process group; None: all ranks
        store: where the state is saved, to be continued by another object
        may_shard: whether the model may be sharded where it is not

    Attributes:
        candidates: with the tensors as the model has them
        results: rows of the table so far

    Raises:
        CandidateError: model and candidates do not fit
        StateError: the saved state is of another run
        BasisError: the packed basis is of another model, other candidates or other methods
        TwaError: the model cannot have the sharding that is asked for
        DistributedError: the ranks were given different things
    """

    def __init__(
        self,
        task: Task,
        candidates: Candidates,
        settings: Settings,
        progress: bool = True,
        *,
        group: dist.ProcessGroup | None = None,
        store: Store | None = None,
        may_shard: bool = True,
    ) -> None:
        self.task, self.store = task, store
        self.ranks = Ranks() if settings.sharding == "single" else Ranks.find(group)
        self._saved = store.read(self.ranks) if store is not None else None
        before = self._saved["run"].get("batches per step", 0) if self._saved else 0
        self.progress = progress and self.ranks.is_rank_zero
        if len(candidates) > 1 and any(m.kind == "v" for m in settings.methods):
            task.split_validation()
        with self.ranks.fail_together("making the model"):
            self.model = task.model()
            share = share_of(self.model, self.ranks)
            per_step = settings.batches_per_step or int(before) or share.world_size
            self.settings = replace(settings, batches_per_step=per_step)
            candidates, key_map = match_model(self.model, candidates)
            self.candidates = candidates
            self.facts = facts(self.model, candidates) | {"task": task.fingerprint}
            self.facts |= task.first_batches() | self.settings.facts()
            self.packed: Packed | None = None
            if settings.basis is not None and len(candidates) > 1:
                self.packed = Packed(Path(settings.basis), self.model, candidates, key_map)
                self.facts["basis"] = self.packed.fingerprint
            if self._saved and store:
                store.accept(self._saved, self.facts)
        if self.ranks.world_size > 1:
            self.ranks.check_equal(self.facts | versions() | {"settings": str(self.settings)})
        with self.ranks.fail_together("placing the model"):
            self.sharding = choose_sharding(
                self.settings.sharding,
                self.model,
                candidates,
                key_map,
                max((m.bits for m in self.settings.methods), default=4),
                self.ranks,
                may_shard=may_shard,
                storage=self.settings.storage,
            )
            if self.packed:
                methods = (for_recording(m, self.sharding)[0] for m in self.settings.methods)
                self.packed.check(methods)
        self.evaluator = Evaluator(task, self.sharding, self.settings.bn_batches, per_step, share)
        self.per_epoch = length(task.train)
        self.results: list[Result] = []
        self._best: Best | None = None

    def run(self) -> Outcome:
        """Tries every method in turn.

        Returns:
            all results; the model is at the winner's weights

        Raises:
            TwaError: none has a finite validation loss
            StateError: the saved state cannot be continued
        """
        method, under_way = self._resume()
        if self.settings.compare:
            self.baselines()
        self.start()
        for k, m in enumerate(self.settings.methods if len(self.candidates) > 1 else ()):
            if k >= method:
                self.train(m, saved=under_way if k == method else None, index=k)
                self._save(k + 1)
        if self._best is None:
            raise TwaError(
                "the validation loss of every method is NaN or Inf: do model, loss and data fit the"
                " candidates? (--compare tries each of them alone, too)",
                f"task {self.task.name}",
            )
        winner, weights = self._best.result, self._best.weights
        if weights is not None:
            restore(self.sharding, weights)
        elif winner.beta is not None:
            self.evaluator.load(winner.beta)
        return Outcome(self.results, winner, self.sharding, self.task)

    def baselines(self) -> None:
        """Measures every average in use today that has no result yet; results are appended.

        Of one candidate there is none but itself.
        """
        n, done, saved = len(self.candidates), {r.method for r in self.results}, time.perf_counter()
        missing = [name for name in BASELINES if name not in done]
        if n == 1 or not missing:
            return
        looks, known = number_of_looks(self.candidates.names), len(self.evaluator.known)
        with progress_bar(f"baselines ({n} candidates)", looks, self.progress) as bar:

            def on_look() -> None:
                nonlocal saved, known
                bar.update(1)
                is_new, known = len(self.evaluator.known) > known, len(self.evaluator.known)
                if is_new and time.perf_counter() - saved > SAVE_SECONDS:
                    self._save(0)
                    saved = time.perf_counter()

            for name in missing:
                self._add(measure(name, self.evaluator, self.candidates.names, on_look))
                self._save(0)

    def start(self) -> Result:
        """The row that trained averages start from, which is made if it is not there yet."""
        n = len(self.candidates)
        name = START if n > 1 else "last"
        for result in self.results:
            if result.method == name:
                return result
        most = len(options(n)) if n > 1 else 0
        with progress_bar(f"start ({n} candidates)", most, self.progress) as bar:
            result = choose(self.evaluator, lambda: bar.update(1), self.per_epoch)
            bar.total = bar.n  # the walk seldom takes all of them
        self._add(result)
        self._save(0)
        return result

    def train(
        self,
        method: TwaMethod,
        *,
        start: Tensor | None = None,
        start_name: str = "",
        keep: str = "best",
        on_look: Callable[[int], None] | None = None,
        prepare: Callable[[Subspace], None] | None = None,
        coarsen: bool = True,
        saved: dict[str, Any] | None = None,
        index: int = 0,
    ) -> Result:
        """Trains an average, and leaves the model at it.

        Args:
            method: data, granularity, bits
            start: merge weights (n,) of the center; None: those of `start`
            start_name: what the note calls them
            keep: as for `Trainer`
            on_look: as for `Trainer`
            prepare: called with the subspace before training, with the model at the center: to look
                at its basis, or to alter it
            coarsen: whether TWA-v gets fewer coefficients where its held-out samples are too few
            saved: what `Trainer.state_dict` gave in the run that is continued, with "seconds" and
                "looks"
            index: the method's place in the settings, for the saved state

        Returns:
            its row of the table, which is appended to the results

        Raises:
            TwaError: the method needs held-out data, and the task has none
            StateError: `saved` is of another run
        """
        pace = None
        if start is None:
            row = self.start()
            start, start_name, pace = row.beta, START, row.gain
            assert start is not None  # as it is a fixed average
        before = saved or {"seconds": 0.0, "looks": 0.0}
        begun = time.perf_counter() - before["seconds"]
        memory = PeakMemory(self.sharding.device)
        self.evaluator.cost = before["looks"]
        data = self._data_of(method)
        method, why = fitted(method, self.sharding, data if coarsen else None)
        packed = self.packed if self.packed and self.packed.fits(method) else None
        if self.packed:
            why += f"; rows of {self.packed.path.name}" if packed else "; packed, not from the file"
        subspace = self._subspace(method, start, packed)
        if prepare:
            prepare(subspace)
        trainer = Trainer(
            self.evaluator,
            subspace,
            data,
            self.settings,
            keep=keep,
            on_look=on_look,
            pace=pace or 0.0,
            step=self.step_length,
        )
        try:
            if saved is not None:
                self._load(trainer, saved)

            def save() -> None:
                spent = {"seconds": time.perf_counter() - begun, "looks": self.evaluator.cost}
                self._save(index, trainer.state_dict() | spent)

            with progress_bar(method.name, self.settings.steps, self.progress) as bar:
                trainer.run(bar, save if self.store is not None else None)
                if trainer.diverged and self.ranks.is_rank_zero:
                    bar.write(f"twa: {method.name}: {trainer.note}", file=sys.stderr)
            result = self._result(method, trainer)
        finally:
            trainer.close()
        result.note = "; ".join(filter(None, (f"from {start_name}{why}", trainer.note)))
        result.seconds, result.looks = time.perf_counter() - begun, self.evaluator.cost
        result.memory = self.ranks.most(memory.bytes())
        result.device_memory = self.ranks.most(memory.device_bytes())
        result.averaged_bn_loss = self.evaluator.averaged_bn_loss(start)
        self._add(result)
        return result

    @functools.cached_property
    def step_length(self) -> float:
        """How far a step of the candidates' own training has moved the weights."""
        return 0.0 if self.settings.lr else step_length(self.sharding, self.per_epoch)

    def _data_of(self, method: TwaMethod) -> Iterable:
        """The batches that a method's gradients are of."""
        data = self.task.train if method.kind == "t" else self.task.heldout
        if data is None:
            where = f"task {self.task.name}"
            raise TwaError("it has no held-out data, which TWA-v trains on", where)
        return data

    def _result(self, method: TwaMethod, trainer: Trainer) -> Result:
        """The row of a trained average that the model is at, without what it took, and its note."""
        return Result(
            method.name,
            len(self.candidates),
            trainer.step,
            seconds=0.0,
            memory=0,
            val_loss=self.evaluator.loss(),
            curve=trainer.curve,
            val_curve=trainer.val_curve,
            gain=trainer.gain,
            beta=trainer.subspace.merge_weights(),
            coefficients=trainer.subspace.coefficients_json(),
        )

    def _subspace(self, method: TwaMethod, center: Tensor, packed: Packed | None) -> Subspace:
        """The method's subspace around merge weights (n,); the model is then at them."""
        mine = self.candidates[self.sharding.rows]
        is_balanced = method.can_be_balanced and self.sharding.name != "rows"
        total = sum(c.info[key].nbytes for c in mine for key in self.sharding.keys)
        options = dict(unit="B", unit_scale=True, leave=False)
        with progress_bar("packing", total, self.progress, **options) as bar:
            if packed:
                return recentred(
                    packed.loaded,
                    self.sharding,
                    center,
                    method.constraint,
                    is_balanced,
                    lambda _, count: bar.update(count),
                    self.settings.storage,
                )
            return Subspace.from_candidates(
                self.model,
                self.candidates,
                bits=method.bits,
                granularity=method.granularity,
                center=center,
                basis=method.basis,
                constraint=method.constraint,
                balance=is_balanced,
                sharding=self.sharding,
                progress=lambda _, count: bar.update(count),
                storage=self.settings.storage,
            )

    def _add(self, result: Result) -> None:
        """Appends a result with the model's test figures; keeps its weights if it is the best."""
        result.test_loss, result.test_metric = self.evaluator.test()
        self.results.append(result)
        if result.val_loss < (self._best.result.val_loss if self._best else torch.inf):
            self._best = Best(result, snapshot(self.sharding) if result.is_trained else None)
            if result.is_trained and self.store is not None:
                self.store.save_best(self.sharding, len(self.results))

    # Saved state ---------------------------------------------------------------------------------

    def _resume(self) -> tuple[int, dict[str, Any] | None]:
        """Takes over what an earlier run has done.

        Returns:
            the method that it was at, and that method's state if it was under way
        """
        saved, self._saved = self._saved, None
        if saved is None or self.store is None:
            return 0, None
        self.results = [Result(**r) for r in saved["results"]]
        self.evaluator.known = {
            beta.numpy().tobytes(): (loss, cost) for beta, loss, cost in saved["losses"]
        }
        self.evaluator.stride = saved["stride"]
        if saved["best"] is not None:
            best = self.results[saved["best"]]
            weights = self.store.load_best(self.sharding) if best.is_trained else None
            self._best = Best(best, weights)
        return saved["method"], saved["under_way"]

    def _load(self, trainer: Trainer, saved: dict[str, Any]) -> None:
        """Puts the trainer where an earlier run was; its errors name the file."""
        try:
            trainer.load_state_dict(saved)
        except StateError as error:
            where = self.store.path if self.store else ""
            raise StateError(f"not a state of this run: {error.problem}", where) from error

    def _save(self, method: int, under_way: dict[str, Any] | None = None) -> None:
        """Saves the state at method number `method`, and that method's own if it is under way."""
        if self.store is None or not self.ranks.is_rank_zero:
            return
        best = None
        if self._best is not None:
            winner = self._best.result
            best = next(k for k, r in enumerate(self.results) if r is winner)
        losses = [
            (torch.frombuffer(bytearray(beta), dtype=torch.float64), loss, cost)
            for beta, (loss, cost) in self.evaluator.known.items()
        ]
        self.store.save(
            {
                "run": self.facts,
                "results": [dict(vars(r)) for r in self.results],
                "losses": losses,
                "stride": self.evaluator.stride,
                "best": best,
                "method": method,
                "under_way": under_way,
            }
        )
