"""What comes of a method: a row of the table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

#: name of the row that trained averages start from
START = "start"


@dataclass
class Result:
    """One row of the table. Losses are means per sample.

    Attributes:
        method: its name
        candidates: how many have a weight
        steps: gradient steps
        seconds: wall time to build and choose, without the test
        memory: the process's peak in bytes while the method ran
        val_loss: on the validation data
        test_loss: on the test data; None without them
        test_metric: the task's metric on the test data
        looks: what evaluations on the validation data took, in training steps: see `Evaluator`
        note: what was chosen, or how it went
        curve: training loss of each step
        val_curve: (step, validation loss) of each look
        beta: merge weights (n,) or (n, L)
        coefficients: what coefficients.json holds, of a trained average
        gain: by how much a step lowers the validation loss: of a trained average one more; of the
            start one of the candidates' own training; None: unknown
        is_average: False for a comparison that is no weighted average (annealing)
        device_memory: the most that PyTorch had allocated on a rank's GPU meanwhile, in bytes; 0
            without one
        averaged_bn_loss: validation loss with averaged BatchNorm statistics in the place of
            re-estimated ones; None where that is no question
    """

    method: str
    candidates: int
    steps: int
    seconds: float
    memory: int
    val_loss: float
    test_loss: float | None = None
    test_metric: float | None = None
    looks: float = 0.0
    note: str = ""
    curve: list[float] = field(default_factory=list)
    val_curve: list[tuple[int, float]] = field(default_factory=list)
    beta: Tensor | None = None
    coefficients: dict[str, object] | None = None
    gain: float | None = None
    is_average: bool = True
    averaged_bn_loss: float | None = None
    device_memory: int = 0

    @property
    def is_trained(self) -> bool:
        """Whether it is a trained average."""
        return self.coefficients is not None

    @property
    def losses(self) -> str:
        """Its losses in words."""
        test = "" if self.test_loss is None else f", test loss {self.test_loss:.6f}"
        return f"validation loss {self.val_loss:.6f}{test}"


def fixed(results: Iterable[Result]) -> list[Result]:
    """The fixed averages; the last of a run's is where its trained averages start."""
    return [r for r in results if r.is_average and not r.is_trained]
