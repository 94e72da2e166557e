"""`Trainer`: the coefficients of one average trained by gradient descent, step by step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..distributed.weights import load_buffers, share_buffers
from ..io.checks import alike
from ..io.errors import StateError
from ..iterate_average import IterateAverage
from ..optimizer import SubspaceOptimizer
from ..rate import learning_rate
from ..subspace import Subspace
from ..tasks.batches import Stream, mix, seed_all
from .evaluate import Evaluator, difference, mean_of
from .settings import Settings

#: of AdamW: far below the gradients of coefficients, whatever the loss is in
EPS = 1e-15
#: steps over which the rate rises: the first gradients say little of their own size
RAMP = 25
#: looks are at the last step, and at steps a factor of this before it, down to an eighth of them
BETWEEN_LOOKS = 1.6
FIRST_STOP = 100  # no training is stopped before
#: without a number of steps: the first look, the most steps
FIRST_LOOK, MOST_STEPS = 25, 1000
#: what a step gains until the next look, by what it has gained over the last two: losses fall about
#: as the logarithm of the steps
NEXT = 0.5


class Trainer:
    """Trains the coefficients of a subspace from where they are.

    What is looked at and kept is their average over the steps. Ranks call all of it together.

    Args:
        evaluator: of the model that the subspace is attached to
        subspace: at its start
        data: batches that the gradients are of
        settings: steps, rate, patience and so on
        keep: "best": the coefficients of the best look at the validation data, or of a later one
            that is no worse than noise explains, and a stop after `settings.patience` looks in a
            row without a new best; "last": those of the last look
        on_look: called with the step at each look, with the model as it would be exported
        pace: by how much a step of the candidates' own training lowers the loss; 0: unknown
        step: how far one of those steps has moved the weights, see `twa.rate.step_length`

    Attributes:
        curve: training loss of each step so far
        val_curve: (step, validation loss) of each look so far
        values: of each look, see `Evaluator.look`
        kept: number of the look whose coefficients are kept; None: none yet
        rate: the learning rate after its rise
        note: why it stopped before the last step; "" if it did not
        diverged: whether that was because the loss was NaN or Inf
    """

    def __init__(
        self,
        evaluator: Evaluator,
        subspace: Subspace,
        data: Iterable,
        settings: Settings,
        *,
        keep: str = "best",
        on_look: Callable[[int], None] | None = None,
        pace: float = 0.0,
        step: float = 0.0,
    ) -> None:
        self.evaluator, self.subspace, self.settings = evaluator, subspace, settings
        self.model, self.ranks = evaluator.model, evaluator.ranks
        self.keep, self.on_look, self.pace = keep, on_look, pace
        self.rate = settings.lr or learning_rate(subspace, step=step)
        self.optimizer = SubspaceOptimizer(
            subspace,
            torch.optim.AdamW,
            lr=self.rate,
            weight_decay=settings.weight_decay,
            low_memory=settings.low_memory,
            eps=EPS,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, ramp)
        self.average = IterateAverage(subspace)
        self.stream = Stream(data, evaluator.share, settings.batches_per_step, settings.seed)
        self.last = settings.steps or MOST_STEPS
        self.looks = look_steps(settings.steps)
        self.curve: list[float] = []
        self.val_curve: list[tuple[int, float]] = []
        self.values: list[Tensor] = []
        self.kept: int | None = None
        self.best = subspace.coefficients.detach().clone()
        self.note, self.diverged = "", False

    @property
    def step(self) -> int:
        """Number of steps so far."""
        return len(self.curve)

    def run(self, bar: tqdm, save: Callable[[], None] | None = None) -> None:
        """Takes all steps that are left, then calls `finish`.

        Args:
            bar: moves with the steps
            save: called every `settings.save_every` steps, when `state_dict` may be called
        """
        with self.ranks.telling(lambda: f" at step {self.step + 1}"):
            self._take_steps(bar, save)
            self.finish()

    def _take_steps(self, bar: tqdm, save: Callable[[], None] | None) -> None:
        """The steps of `run`."""
        resumed_at = self.step
        bar.update(self.step)
        while not self.note:
            if save and self.step % self.settings.save_every == 0 and self.step > resumed_at:
                save()
            if self.step in self.looks:
                self.look()
            if self.step == self.last or self.is_stale() or self.is_spent():
                break
            read_loss = self.backward()
            self.optimizer.step()  # a GPU is given it before the loss is waited for
            self.schedule.step()
            loss = read_loss()
            if not math.isfinite(loss):
                self.diverged = True
                self.note = (
                    f"stopped: loss {loss} at step {self.step}; best coefficients so far kept"
                )
                break
            self.average.update()
            self.curve.append(loss)
            bar.set_postfix(loss=f"{loss:.4f}", val=f"{self.val_curve[-1][1]:.4f}", refresh=False)
            bar.update(1)

    def backward(self) -> Callable[[], float]:
        """Computes one step's gradients from this rank's batches.

        Returns:
            what waits for the step's loss, of all ranks, which call it together
        """
        self.evaluator.train_mode()
        self.optimizer.zero_grad()
        losses: list[tuple[Callable[[], float], float]] = []
        batches = self.stream.next_step()
        for k, (number, batch, weight) in enumerate(batches):
            seed_all(mix(self.settings.seed, number))  # the same Dropout on any number of ranks
            loss = self.evaluator.task.loss(self.model, batch)
            is_last = k + 1 == len(batches)
            with contextlib.nullcontext() if is_last else self.optimizer.no_sync():
                (loss if weight == 1.0 else loss * weight).backward()
            if weight:
                losses.append((read_later(loss), weight))

        def read() -> float:
            total = torch.zeros(1, dtype=torch.float64, device="cpu")
            for loss, weight in losses:
                total += loss() * weight / self.ranks.world_size
            return float(self.ranks.all_reduce_(total))

        return read

    def look(self) -> None:
        """Measures the average over the steps, and keeps it if it is the best."""
        with self.average.applied():
            self.evaluator.settle(for_look=True)
            values = self.evaluator.look()
            if self.on_look:
                self.on_look(self.step)
        if self.is_kept(values):
            self.kept, self.best = len(self.values), self.average.coefficients
        self.values.append(values)
        self.val_curve.append((self.step, mean_of(values)))

    def is_kept(self, values: Tensor) -> bool:
        """Whether a look takes the place of the one that is kept.

        It does if it is better than all others, or, on a sample of the validation data, no worse
        than noise explains: there are more steps in it.
        """
        if self.keep == "last":
            return True
        if self.kept is None:
            return math.isfinite(mean_of(values))
        best = min(self.values, key=mean_of)
        worse, error = difference(values, best)
        is_sample = self.evaluator.stride > 1 and error < math.inf
        return worse < (error if is_sample else 0.0)

    def is_stale(self) -> bool:
        """Whether too many looks in a row brought nothing better; `note` then says so.

        Not among the first steps, after which an average is often worse than its start.
        """
        if self.step < FIRST_STOP or self.step not in self.looks:
            return False
        if self.keep != "best" or not 0 < self.settings.patience <= stale(self.val_curve):
            return False
        best = step_of_best(self.val_curve)
        self.note = f"stopped at step {self.step}: no better on validation since step {best}"
        return True

    def is_spent(self) -> bool:
        """Without a number of steps: whether more of them are not worth it; `note` then says why.

        They are not if they are expected to gain less than as many steps of ordinary training.
        Where that is not known, or nothing: if the last two looks gained less than their noise.
        """
        if self.settings.steps or self.step < FIRST_STOP or self.step not in self.looks:
            return False
        gain, error = difference(self.values[-3], self.values[-1])
        steps = self.step - self.val_curve[-3][0]
        if self.pace > 0 and NEXT * gain / steps < self.pace:
            why = f"one more gains about {NEXT * gain / steps:.2g}, one of training {self.pace:.2g}"
        elif self.pace <= 0 and gain < error < math.inf:
            why = f"the last {steps} gained {gain:.2g}, less than the noise of a look ({error:.2g})"
        else:
            return False
        self.note = f"stopped after {self.step} steps: {why}"
        return True

    @property
    def gain(self) -> float | None:
        """By how much one more step is expected to lower the loss; None before the third look."""
        if len(self.values) < 3:
            return None
        gain, _ = difference(self.values[-3], self.values[-1])
        return NEXT * gain / (self.val_curve[-1][0] - self.val_curve[-3][0])

    def finish(self) -> None:
        """Moves the model to the coefficients that are kept, as it would be exported."""
        with torch.no_grad():
            self.subspace.coefficients.copy_(self.best)
        self.ranks.check_drift()
        self.subspace.write_weights()
        self.evaluator.settle()

    def close(self) -> None:
        """Lets go of the model: its hooks and gradients."""
        self.optimizer.close()
        self.optimizer.zero_grad()

    # State ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that another process needs to go on with the same bits."""
        self.ranks.check_drift()
        share_buffers(self.model, self.ranks)
        return {
            "curve": self.curve,
            "val_curve": self.val_curve,
            "values": self.values,
            "kept": self.kept,
            "best": self.best,
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "buffers": dict(self.model.named_buffers()),
            "position": self.stream.position(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where another trainer was, with the same settings.

        Raises:
            StateError: a part has other names, shapes or types than this trainer's
            TaskError: the data do not come in the same order again
        """
        mine = self.state_dict()
        fixed = ("best", "average", "schedule", "buffers")
        if odd := [name for name in fixed if not alike(state[name], mine[name])]:
            raise StateError(f"{odd[0]!r} has other names, shapes or types than expected")
        if not alike(state["optimizer"]["param_groups"], mine["optimizer"]["param_groups"]):
            raise StateError("'param_groups' has other names, shapes or types than expected")
        self.curve, self.val_curve = list(state["curve"]), list(state["val_curve"])
        self.values = list(state["values"])
        self.kept = state["kept"]
        self.best.copy_(state["best"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        load_buffers(self.model, state["buffers"])
        self.stream.seek(state["position"])


def read_later(number: Tensor) -> Callable[[], float]:
    """What reads a number from its device, without waiting for what is queued there after this."""
    if number.device.type != "cuda":
        return number.detach().item
    here = number.detach().to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(number.device))

    def read() -> float:
        copied.synchronize()
        return float(here)

    return read


def step_of_best(val_curve: list[tuple[int, float]]) -> int:
    """Step of the best look."""
    return min(val_curve, key=lambda look: look[1])[0]


def stale(val_curve: list[tuple[int, float]]) -> int:
    """Number of looks since the best one."""
    best = step_of_best(val_curve)
    return sum(step > best for step, _ in val_curve)


def look_steps(steps: int | None) -> set[int]:
    """When there are looks, the first of them before the first step.

    Args:
        steps: number of them; None: as many as are worth it
    """
    found, at = {0}, float(steps or FIRST_LOOK)
    if steps is None:
        while at < MOST_STEPS:
            found.add(round(at))
            at *= BETWEEN_LOOKS
        return found | {MOST_STEPS}
    while at >= max(1.0, steps / 8):
        found.add(round(at))
        at /= BETWEEN_LOOKS
    return found


def ramp(step: int) -> float:
    """Factor of the learning rate: it rises over the first RAMP steps, then is 1."""
    return min(1.0, (step + 1) / RAMP)
