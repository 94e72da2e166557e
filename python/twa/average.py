"""The main job: from candidates to one model, with the averages that people use today beside it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import schemes
from .batchnorm import tracked_batchnorms, update_bn
from .candidates import Candidates
from .measure import PeakMemory, mean_over
from .optimizer import SubspaceOptimizer
from .subspace import BASES, Subspace, export_state, layout_of, load_merge, round_to_files
from .tasks import Task

EMA_DECAYS = (0.5, 0.7, 0.8, 0.9, 0.95)
LAWA_LENGTHS = (2, 4, 6, 8, 12, 16, 24, 32)
BASELINES = ("last", "best single", "uniform", "EMA", "LAWA", "greedy soup")
VALIDATIONS = 4  # looks at the validation data during a TWA run; the best coefficients are kept


@dataclass(frozen=True)
class TwaMethod:
    """kind "t": trained on training data; "v": on held-out data."""

    kind: str
    granularity: str
    bits: int
    basis: str = "deltas"

    @property
    def name(self) -> str:
        basis = ", orthonormal" if self.basis == "orthonormal" else ""
        return f"TWA-{self.kind} per {self.granularity}, {'float32' if self.bits == 32 else f'{self.bits} bits'}{basis}"

    @classmethod
    def parse(cls, text: str) -> TwaMethod:
        """ "t:tensor:4", "t:tensor:4:orthonormal" """
        parts = text.split(":")
        if (
            len(parts) not in (3, 4)
            or parts[3:] not in ([], *([b] for b in BASES))
            or parts[0] not in ("t", "v")
            or parts[1] not in ("model", "block", "tensor")
            or parts[2] not in ("32", "8", "4", "3", "2", "1")
        ):
            raise ValueError(
                f"method {text!r}: expected KIND:GRANULARITY:BITS[:BASIS] such as t:tensor:4 (t or v; model, block or tensor; 32, 8, 4, 3, 2 or 1; "
                "deltas or orthonormal)"
            )
        return cls(parts[0], parts[1], int(parts[2]), *parts[3:])


DEFAULT_METHODS = (TwaMethod("t", "tensor", 4), TwaMethod("v", "model", 4))


@dataclass(frozen=True)
class Settings:
    methods: tuple[TwaMethod, ...] = DEFAULT_METHODS
    steps: int = 100
    lr: float = 0.02
    weight_decay: float = 0.0
    bn_batches: int = 100


@dataclass
class Result:
    """One row of the table. Losses are means per batch sample; memory is the process's peak in bytes while the method ran."""

    method: str
    candidates: int
    steps: int
    seconds: float
    memory: int
    val_loss: float
    test_loss: float | None = None
    test_metric: float | None = None
    note: str = ""
    curve: list[float] = field(default_factory=list)  # training loss per step
    val_curve: list[tuple[int, float]] = field(default_factory=list)
    beta: Tensor | None = None  # (n,) or (n, L) merge weights
    coefficients: dict | None = None
    is_average: bool = True  # False: a comparison that is no weighted average (annealing)


@dataclass
class Outcome:
    results: list[Result]
    winner: Result
    state: dict[str, Tensor]  # of the winner, as exported


class Average:
    """Runs every method on one model object and remembers the best on the validation data.

    TWA starts at the best fixed average (its center), looks at the validation data from there on, and keeps the best coefficients:
    so it is never worse there than that average (where BatchNorm is re-estimated, up to what that changes).
    """

    def __init__(self, task: Task, candidates: Candidates, settings: Settings, progress: bool = True) -> None:
        self.task, self.candidates, self.settings = task, candidates, settings
        self.progress = progress
        if len(candidates) > 1 and any(m.kind == "v" for m in settings.methods):
            task.split_validation()
        self.model = task.model()
        self.layout = layout_of(self.model, candidates)
        self.results: list[Result] = []
        self._best: tuple[float, Result, dict[str, Tensor]] | None = None
        self._losses: dict[bytes, float] = {}

    def run(self) -> Outcome:
        """Every method in turn. Raises ValueError if none has a finite validation loss."""
        self._baselines()
        for method in self.settings.methods if len(self.candidates) > 1 else ():
            self.results.append(self._twa(method))
        if self._best is None:
            raise ValueError(f"task {self.task.name}: the validation loss of every method is NaN or Inf: do model, loss and data fit the candidates?")
        _, winner, state = self._best
        return Outcome(self.results, winner, state)

    # Classical averages -------------------------------------------------------------------------------------------

    def _baselines(self) -> None:
        n = len(self.candidates)
        lengths = [k for k in LAWA_LENGTHS if k < n] or [1]
        total = 2 if n == 1 else 3 * n + 1 + len(lengths) + len(EMA_DECAYS)  # greedy soup looks at each candidate twice
        bar = progress_bar(f"baselines ({n} candidates)", total, self.progress)

        def evaluate(beta: Tensor) -> float:
            key = beta.numpy().tobytes()
            if key not in self._losses:
                self._load(beta)
                self._losses[key] = self._validation_loss()
            bar.update(1)
            return self._losses[key]

        def timed(name: str, choose: Callable[[], tuple[Tensor, str]]) -> None:
            start, memory = time.perf_counter(), PeakMemory()
            beta, note = choose()
            self._load(beta)
            members = int((beta != 0).sum())
            # Re-estimated BatchNorm statistics differ from those that the choice was made with: measure what is exported.
            changed = members > 1 and tracked_batchnorms(self.model)
            loss = self._validation_loss() if changed else self._losses[beta.numpy().tobytes()]
            seconds = time.perf_counter() - start
            result = Result(name, members, 0, seconds, memory.bytes(), loss, note=note, beta=beta)
            self._finish(result)
            self.results.append(result)

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
            timed("greedy soup", lambda: (schemes.greedy_soup([evaluate(b) for b in singles], evaluate), ""))
        bar.close()

    def _load(self, beta: Tensor) -> None:
        """The model at exact merge weights; BatchNorm re-estimated unless it is one candidate's own."""
        load_merge(self.model, self.candidates, self.layout, beta)
        self._settle(own_statistics=int((beta != 0).sum()) == 1)

    def _settle(self, own_statistics: bool = False) -> None:
        """Makes the model what would be exported: BatchNorm re-estimated (unless its statistics are its own), the files' dtypes."""
        round_to_files(self.model, self.candidates, self.layout)
        if not own_statistics and update_bn(self.task.train, self.model, forward=self.task.loss, max_batches=self.settings.bn_batches):
            round_to_files(self.model, self.candidates, self.layout)

    def _validation_loss(self) -> float:
        """Inf for NaN and -Inf, so that they lose every comparison."""
        loss = mean_over(self.model, self.task.loss, self.task.val)
        return loss if math.isfinite(loss) else math.inf

    # TWA ----------------------------------------------------------------------------------------------------------

    def _twa(self, method: TwaMethod) -> Result:
        start, memory = time.perf_counter(), PeakMemory()
        s = self.settings
        start_from = min((r for r in self.results if r.coefficients is None), key=lambda r: r.val_loss)
        center, center_name = start_from.beta, " ".join(filter(None, (start_from.method, start_from.note)))
        subspace = Subspace.from_candidates(
            self.model, self.candidates, bits=method.bits, granularity=method.granularity, center=center, basis=method.basis
        )
        optimizer = SubspaceOptimizer(subspace, torch.optim.AdamW, lr=s.lr, weight_decay=s.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_then_linear(step, s.steps))
        data = self.task.train if method.kind == "t" else self.task.heldout
        curve, val_curve, note = [], [], f"from {center_name}"
        best_loss, best_x = math.inf, subspace.coefficients.detach().clone()
        looks = {round(s.steps * k / VALIDATIONS) for k in range(VALIDATIONS + 1)}
        bar = progress_bar(method.name, s.steps, self.progress)
        for step, batch in zip(range(s.steps + 1), forever(data), strict=False):
            if step in looks:
                self._settle()
                val = self._validation_loss()
                subspace.write_weights()  # unrounded again
                val_curve.append((step, val))
                if val < best_loss:
                    best_loss, best_x = val, subspace.coefficients.detach().clone()
            if step == s.steps:
                break
            self.model.train()
            loss = self.task.loss(self.model, batch)
            if not torch.isfinite(loss):
                note += f"; stopped: loss {loss.item()} at step {step}; best coefficients so far kept"
                print(f"twa: {method.name}: {note}", file=sys.stderr)
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            curve.append(loss.item())
            bar.set_postfix(loss=f"{curve[-1]:.4f}", val=f"{val_curve[-1][1]:.4f}", refresh=False)
            bar.update(1)
        bar.close()
        with torch.no_grad():
            subspace.coefficients.copy_(best_x)
        subspace.write_weights()
        self._settle()
        val = self._validation_loss()
        seconds = time.perf_counter() - start
        result = Result(method.name, len(self.candidates), len(curve), seconds, memory.bytes(), val, note=note, curve=curve, val_curve=val_curve)
        result.beta, result.coefficients = subspace.merge_weights(), subspace.coefficients_json()
        optimizer.zero_grad()
        self._finish(result)
        return result

    # ---------------------------------------------------------------------------------------------------------------

    def _finish(self, result: Result) -> None:
        """Test figures of the model as it is, and its state if it is the best so far."""
        measure_test(result, self.model, self.task)
        if result.val_loss < (self._best[0] if self._best else math.inf):
            self._best = (result.val_loss, result, export_state(self.model, self.candidates))


def progress_bar(text: str, total: int, shown: bool) -> tqdm:
    return tqdm(total=total, desc=f"{text:32.32s}", disable=not shown, mininterval=0.5, file=sys.stderr)


def measure_test(result: Result, model: nn.Module, task: Task) -> None:
    if task.test is not None:
        result.test_loss = mean_over(model, task.loss, task.test)
        if task.metric is not None:
            result.test_metric = mean_over(model, task.metric, task.test)


def warmup_then_linear(step: int, steps: int) -> float:
    """Factor of the learning rate: up over the first twentieth of the steps, then down to zero."""
    warm = max(1, steps // 20)
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm), 1.0) if step < steps else 0.0


def forever(data: Iterable) -> Iterator:
    """Batches of the data, pass after pass."""
    while True:
        empty = True
        for batch in data:
            empty = False
            yield batch
        if empty:
            raise ValueError("expected at least one batch of data, found none")
