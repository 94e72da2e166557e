"""The main job: from candidates to one model, with the averages that people use today beside it."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from .. import averages as schemes
from ..basis.segments import layout_of
from ..batchnorm import tracked_batchnorms, update_bn_of
from ..distributed.choose import choose, resolve, shard_model
from ..distributed.ranks import World, facts, versions
from ..distributed.sharding import Placement
from ..distributed.weights import (
    kept,
    load_buffers,
    load_merge,
    load_untrained,
    put_back,
    round_to_files,
    share_buffers,
)
from ..io.candidates import Candidates
from ..io.progress import PeakMemory, mean_over, measure_test, progress_bar
from ..iterate_average import IterateAverage
from ..optimizer import SubspaceOptimizer
from ..spectral_norm import refresh_spectral_norms
from ..subspace import Subspace, choices
from ..tasks.batches import Stream, mix, seed_all, shared_out
from ..tasks.contract import Task
from .resume import Store
from .settings import Outcome, Result, Settings, TwaMethod

EMA_DECAYS = (0.5, 0.7, 0.8, 0.9, 0.95)
LAWA_LENGTHS = (2, 4, 6, 8, 12, 16, 24, 32)
BASELINES = ("last", "best single", "uniform", "EMA", "LAWA", "greedy soup")
SAVE_SECONDS = 10.0  # between saved states while baselines are evaluated
# looks at the validation data during a TWA run after the first; the best coefficients are kept
VALIDATIONS = 6


class Average:
    """Runs every method on one model object and remembers the best on the validation data.

    TWA starts at the best fixed average (its center). Its coefficients are averaged over the steps;
    it looks at the validation data from the start on, keeps the best average, and stops when that
    has not changed for some looks: so it is never worse there than that fixed average (where
    BatchNorm is re-estimated, up to what that changes).

    On several ranks (torch.distributed), all make one and call `run`. store: where the state is
    saved, to be continued by another object.
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
    ) -> None:
        self.task, self.candidates, self.store = task, candidates, store
        self.world = World() if settings.placement == "single" else World.find(group)
        self._saved = store.read(self.world) if store is not None else None
        before = self._saved["run"].get("batches per step", 0) if self._saved else 0
        self.settings = replace(
            settings, batches_per_step=settings.batches_per_step or int(before) or self.world.size
        )
        self.progress = progress and self.world.is_writer
        if len(candidates) > 1 and any(m.kind == "v" for m in settings.methods):
            task.split_validation()
        with self.world.together("making the model"):
            self.model = task.model()
            self.facts = (
                facts(self.model, candidates)
                | {"task": task.fingerprint}
                | task.first_batches()
                | self.settings.facts()
            )
            if self._saved:
                store.accept(self._saved, self.facts)
        if self.world.size > 1:
            self.world.check_equal(self.facts | versions() | {"settings": str(self.settings)})
        with self.world.together("placing the model"):
            self.placement = self._place()
        self.results: list[Result] = []
        # weights of this rank; None: those of its merge weights
        self._best: tuple[float, Result, dict[str, Tensor] | None] | None = None
        self._losses: dict[bytes, float] = {}

    def _place(self) -> Placement:
        name = self.settings.placement
        layout = layout_of(self.model, self.candidates)
        bits = max((m.bits for m in self.settings.methods), default=4)
        if name == "auto" and self.world.size > 1:
            try:
                name = choose(self.world, self.model, self.candidates, bits)
            except ValueError:
                name = "columns"
            name = "columns" if name == "rows" else name  # the model can be sharded here
        if name == "columns" and not any(isinstance(p, DTensor) for p in self.model.parameters()):
            if self.world.group is None:
                raise ValueError(
                    "placement 'columns': torch.distributed is not initialised; start with torchrun"
                )
            shard_model(self.model, self.world.group)
        return resolve(name, self.model, self.candidates, layout, bits, self.world)

    def run(self) -> Outcome:
        """Every method in turn.

        Raises ValueError if none has a finite validation loss, or a saved state is of another run.
        """
        method, under_way = self._resume()
        self.baselines()
        for k, m in enumerate(self.settings.methods if len(self.candidates) > 1 else ()):
            if k >= method:
                self.train(m, saved=under_way if k == method else None, index=k)
                self._save(k + 1)
        if self._best is None:
            raise ValueError(
                f"task {self.task.name}: the validation loss of every method is NaN or Inf: do"
                " model, loss and data fit the candidates?"
            )
        _, winner, parts = self._best
        if parts is None:
            self.load(winner.beta)
        else:
            put_back(self.placement, parts)
        return Outcome(self.results, winner, self.placement)

    # Saved state ---------------------------------------------------------------------------------

    def _resume(self) -> tuple[int, dict | None]:
        """What an earlier run has done: the method that it was at, and how far that was."""
        saved, self._saved = self._saved, None
        if saved is None:
            return 0, None
        self.results = [Result(**r) for r in saved["results"]]
        self._losses = {beta.numpy().tobytes(): loss for beta, loss in saved["losses"]}
        if saved["best"] is not None:
            best = self.results[saved["best"]]
            parts = None if best.coefficients is None else self.store.load_best(self.placement)
            self._best = (best.val_loss, best, parts)
        return saved["method"], saved["under_way"]

    def _save(self, method: int, under_way: dict | None = None) -> None:
        if self.store is None or not self.world.is_writer:
            return
        best = (
            None
            if self._best is None
            else next(k for k, r in enumerate(self.results) if r is self._best[1])
        )
        losses = [
            (torch.frombuffer(bytearray(beta), dtype=torch.float64), loss)
            for beta, loss in self._losses.items()
        ]
        self.store.save(
            {
                "run": self.facts,
                "results": [dict(vars(r)) for r in self.results],
                "losses": losses,
                "best": best,
                "method": method,
                "under_way": under_way,
            }
        )

    # Classical averages --------------------------------------------------------------------------

    def baselines(self) -> None:
        """Every fixed average; results are appended."""
        n = len(self.candidates)
        lengths = [k for k in LAWA_LENGTHS if k < n] or [1]
        # greedy soup looks at each candidate twice
        total = 2 if n == 1 else 3 * n + 1 + len(lengths) + len(EMA_DECAYS)
        done = {r.method for r in self.results}
        if done.issuperset(BASELINES if n > 1 else BASELINES[:2]):
            return
        with progress_bar(f"baselines ({n} candidates)", total, self.progress) as bar:
            self._evaluate_baselines(n, lengths, done, bar)

    def _evaluate_baselines(self, n: int, lengths: list[int], done: set[str], bar: tqdm) -> None:
        saved, passes = time.perf_counter(), 0

        def evaluate(beta: Tensor) -> float:
            nonlocal saved, passes
            passes += 1  # also where it is known already: what the method takes on its own
            key = beta.numpy().tobytes()
            if key not in self._losses:
                self.load(beta)
                self._losses[key] = self.validation_loss()
                if time.perf_counter() - saved > SAVE_SECONDS:
                    self._save(0)
                    saved = time.perf_counter()
            bar.update(1)
            return self._losses[key]

        def timed(name: str, choose: Callable[[], tuple[Tensor, str]]) -> None:
            if name in done:
                return
            nonlocal passes
            start, memory, passes = time.perf_counter(), PeakMemory(), 0
            beta, note = choose()
            self.load(beta)
            members = int((beta != 0).sum())
            # Re-estimated BatchNorm statistics differ from those that the choice was made with:
            # measure what is exported.
            changed = members > 1 and bool(tracked_batchnorms(self.model))
            loss = self.validation_loss() if changed else self._losses[beta.numpy().tobytes()]
            seconds = time.perf_counter() - start
            result = Result(
                name,
                members,
                0,
                seconds,
                self._peak(memory),
                loss,
                note=note,
                beta=beta,
                evaluations=passes + changed,
            )
            result.averaged_bn_loss = self._averaged_bn_loss(beta) if changed else None
            self.results.append(result)
            self._finish(result)
            self._save(0)

        def pick(options: Iterable[tuple[Tensor, str]]) -> tuple[Tensor, str]:
            return min(options, key=lambda option: evaluate(option[0]))

        singles = [schemes.candidate(n, k) for k in range(n)]
        names = self.candidates.names
        timed("last", lambda: pick([(singles[-1], names[-1])]))
        timed("best single", lambda: pick([(b, names[k]) for k, b in enumerate(singles)]))
        if n > 1:
            timed("uniform", lambda: pick([(schemes.uniform(n), "")]))
            timed("EMA", lambda: pick([(schemes.ema(n, d), f"decay {d}") for d in EMA_DECAYS]))
            timed("LAWA", lambda: pick([(schemes.lawa(n, k), f"last {k}") for k in lengths]))
            timed(
                "greedy soup",
                lambda: (schemes.greedy_soup([evaluate(b) for b in singles], evaluate), ""),
            )

    def load(self, beta: Tensor) -> None:
        """The model at exact merge weights; BatchNorm re-estimated unless it is one candidate's
        own.
        """
        load_merge(self.placement, beta)
        self.settle(own_statistics=int((beta != 0).sum()) == 1)

    def settle(self, own_statistics: bool = False) -> None:
        """Makes the model what would be exported:

        BatchNorm re-estimated (unless its statistics are its own), the files' dtypes.
        """
        refresh_spectral_norms(self.model)
        round_to_files(self.placement)
        if own_statistics or not tracked_batchnorms(self.model):
            return
        update_bn_of(
            shared_out(self.task.train, self.world, self.settings.bn_batches),
            self.model,
            self.task.loss,
            self.world,
        )
        round_to_files(self.placement)

    def validation_loss(self) -> float:
        """Inf for NaN and -Inf, so that they lose every comparison."""
        loss = mean_over(self.model, self.task.loss, self.task.val, self.world)
        return loss if math.isfinite(loss) else math.inf

    def _averaged_bn_loss(self, weights: Tensor) -> float | None:
        """Validation loss with BatchNorm statistics averaged by these weights, as other buffers
        are, in place of the re-estimated ones, which are put back; None for a model without
        BatchNorm."""
        if not tracked_batchnorms(self.model):
            return None
        saved = {name: b.clone() for name, b in self.model.named_buffers()}
        load_untrained(self.placement, weights)
        refresh_spectral_norms(self.model)
        round_to_files(self.placement)
        loss = self.validation_loss()
        load_buffers(self.model, saved)
        return loss

    def _peak(self, memory: PeakMemory) -> int:
        """Of the rank that took most."""
        return int(self.world.max_(torch.tensor([memory.bytes()]))[0])

    # TWA -----------------------------------------------------------------------------------------

    def train(
        self,
        method: TwaMethod,
        *,
        start: Tensor | None = None,
        start_name: str = "",
        keep: str = "best",
        on_look: Callable[[int], None] | None = None,
        prepare: Callable[[Subspace], None] | None = None,
        saved: dict | None = None,
        index: int = 0,
    ) -> Result:
        """A trained average, appended to the results; the model is at it.

        start     merge weights (n,) of the center; None: those of the best result so far that is a
                  fixed average
        keep      "best": the coefficients of the best look at the validation data, and stop after
                  `settings.patience` looks in a row without a new best; "last": those of the last
                  step
        on_look   called with the step at each look, with the model as it would be exported
        prepare   called with the subspace before training, with the model at the center: to look at
                  its basis, or to alter it
        saved     what `_save` has kept of it at method `index`
        """
        begun, memory = time.perf_counter(), PeakMemory()
        s = self.settings
        center, center_name = start, start_name
        if center is None:
            start_from = min(
                (r for r in self.results if r.coefficients is None), key=lambda r: r.val_loss
            )
            center, center_name = (
                start_from.beta,
                " ".join(filter(None, (start_from.method, start_from.note))),
            )
        method, why = self._method_for_shards(method)
        total = sum(
            c.info[key].nbytes
            for c in self.candidates[self.placement.rows]
            for key in self.placement.keys
        )
        with progress_bar(
            "packing", total, self.progress, unit="B", unit_scale=True, leave=False
        ) as bar:
            subspace = Subspace.from_candidates(
                self.model,
                self.candidates,
                bits=method.bits,
                granularity=method.granularity,
                center=center,
                basis=method.basis,
                constraint=method.constraint,
                placement=self.placement,
                progress=lambda _, count: bar.update(count),
            )
        if prepare:
            prepare(subspace)
        optimizer = SubspaceOptimizer(
            subspace,
            torch.optim.AdamW,
            lr=s.lr,
            weight_decay=s.weight_decay,
            low_memory=s.low_memory,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup(step, s.steps))
        average = IterateAverage(subspace)
        stream = Stream(
            self.task.train if method.kind == "t" else self.task.heldout,
            self.world,
            s.batches_per_step,
            s.seed,
        )
        curve, val_curve, note = [], [], f"from {center_name}{why}"
        best_loss, best_x = math.inf, subspace.coefficients.detach().clone()
        before = 0.0  # seconds, in an earlier process
        if saved is not None:
            mine = {
                "best_x": best_x,
                "average": average.coefficients,
                "schedule": schedule.state_dict(),
                "buffers": dict(self.model.named_buffers()),
            }
            self.store.check_like(saved, mine)
            self.store.check_like(
                saved["optimizer"],
                {
                    k: v
                    for k, v in optimizer.state_dict().items()
                    if k in ("coefficients", "param_groups")
                },
            )
            curve, val_curve, best_loss, before = (
                saved["curve"],
                saved["val_curve"],
                saved["best_loss"],
                saved["seconds"],
            )
            best_x.copy_(saved["best_x"])
            average.coefficients.copy_(saved["average"])
            average.steps = len(curve)
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
            load_buffers(self.model, saved["buffers"])
            stream.seek(saved["position"])
        looks = {round(s.steps * k / VALIDATIONS) for k in range(VALIDATIONS + 1)}
        with progress_bar(method.name, s.steps, self.progress) as bar:
            bar.update(len(curve))
            for step in range(len(curve), s.steps + 1):
                if (
                    step % s.save_every == 0
                    and step
                    and (saved is None or step > saved["position"]["step"])
                    and self.store is not None
                ):
                    self.world.check()
                    share_buffers(self.model, self.world)
                    under_way = {
                        "curve": curve,
                        "val_curve": val_curve,
                        "best_loss": best_loss,
                        "best_x": best_x,
                        "average": average.coefficients,
                        "seconds": before + time.perf_counter() - begun,
                        "optimizer": optimizer.state_dict(),
                        "schedule": schedule.state_dict(),
                        "buffers": dict(self.model.named_buffers()),
                        "position": stream.position(),
                    }
                    self._save(index, under_way)
                if step in looks:
                    with average.applied():
                        self.settle()
                        val = self.validation_loss()
                        if on_look:
                            on_look(step)
                    val_curve.append((step, val))
                    if val < best_loss or keep == "last":
                        best_loss, best_x = val, average.coefficients.clone()
                if step == s.steps:
                    break
                if keep == "best" and 0 < s.patience <= stale(val_curve):
                    note += (
                        f"; stopped at step {step}: no better on validation since step"
                        f" {step_of_best(val_curve)}"
                    )
                    break
                loss = self._gradients(stream, optimizer)
                if not math.isfinite(loss):
                    note += f"; stopped: loss {loss} at step {step}; best coefficients so far kept"
                    if self.world.is_writer:
                        bar.write(f"twa: {method.name}: {note}", file=sys.stderr)
                    break
                optimizer.step()
                schedule.step()
                average.update()
                curve.append(loss)
                bar.set_postfix(loss=f"{loss:.4f}", val=f"{val_curve[-1][1]:.4f}", refresh=False)
                bar.update(1)
        with torch.no_grad():
            subspace.coefficients.copy_(best_x)
        self.world.check()
        subspace.write_weights()
        self.settle()
        val = self.validation_loss()
        seconds = before + time.perf_counter() - begun
        result = Result(
            method.name,
            len(self.candidates),
            len(curve),
            seconds,
            self._peak(memory),
            val,
            note=note,
            curve=curve,
            val_curve=val_curve,
        )
        result.evaluations = len(val_curve)
        result.beta, result.coefficients = subspace.merge_weights(), subspace.coefficients_json()
        result.averaged_bn_loss = self._averaged_bn_loss(center)
        optimizer.close()
        optimizer.zero_grad()
        self.results.append(result)
        self._finish(result)
        return result

    def _method_for_shards(self, method: TwaMethod) -> tuple[TwaMethod, str]:
        """The method, per tensor instead of with fine segments where the shards of a sharded model
        cannot have those; and a note that says so.
        """
        if method.granularity != "fine" or self.placement.name != "columns":
            return method, ""
        _, segments = choices(self.placement.layout, self.candidates, "fine", "mean")
        if self.placement.can_cut(segments.chunk):
            return method, ""
        return (
            replace(method, granularity="tensor"),
            "; not fine, since shards do not begin at multiples of 128 weights",
        )

    def _gradients(self, stream: Stream, optimizer: SubspaceOptimizer) -> float:
        """One step's gradients, from this rank's batches; the step's loss, of all ranks."""
        self.model.train()
        optimizer.zero_grad()
        total = torch.zeros(1, dtype=torch.float64)
        batches = stream.next_step()
        for k, (g, batch, weight) in enumerate(batches):
            seed_all(mix(self.settings.seed, g))  # the same Dropout on any number of ranks
            loss = self.task.loss(self.model, batch)
            with optimizer.no_sync() if k + 1 < len(batches) else contextlib.nullcontext():
                (loss if weight == 1.0 else loss * weight).backward()
            if weight:
                total += loss.item() * weight / self.world.size
        return float(self.world.sum_(total))

    # ---------------------------------------------------------------------------------------------

    def _finish(self, result: Result) -> None:
        """Test figures of the model as it is, and its weights if it is the best so far."""
        measure_test(result, self.model, self.task, self.world)
        if result.val_loss < (self._best[0] if self._best else math.inf):
            trained = result.coefficients is not None
            self._best = (result.val_loss, result, kept(self.placement) if trained else None)
            if trained and self.store is not None:
                self.store.save_best(self.placement, len(self.results))


def step_of_best(val_curve: list[tuple[int, float]]) -> int:
    return min(val_curve, key=lambda look: look[1])[0]


def stale(val_curve: list[tuple[int, float]]) -> int:
    """Looks since the best one."""
    best = step_of_best(val_curve)
    return sum(step > best for step, _ in val_curve)


def warmup(step: int, steps: int) -> float:
    """Factor of the learning rate: up over the first twentieth of the steps, then constant."""
    return min(1.0, (step + 1) / max(1, steps // 20))
