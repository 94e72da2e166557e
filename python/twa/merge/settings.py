"""What `twa average` is asked to do, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from torch import Tensor

from ..basis.segments import parse_granularity
from ..distributed.sharding import Placement
from ..distributed.weights import export


@dataclass(frozen=True)
class TwaMethod:
    """kind "t": trained on training data; "v": on held-out data."""

    kind: str
    granularity: str | int
    bits: int
    basis: str = "deltas"
    constraint: str = "none"

    @property
    def name(self) -> str:
        options = "".join(
            f", {option}" for option in (self.basis, self.constraint) if option in OPTIONS
        )
        segments = (
            "fine"
            if self.granularity == "fine"
            else f"per {self.granularity}{' weights' if isinstance(self.granularity, int) else ''}"
        )
        return (
            f"TWA-{self.kind} {segments},"
            f" {'float32' if self.bits == 32 else f'{self.bits} bits'}{options}"
        )

    @classmethod
    def parse(cls, text: str) -> TwaMethod:
        """ "t:tensor:4", "t:1024:4", "t:tensor:4:orthonormal", "v:model:4:simplex" """
        parts = text.split(":")
        try:
            if (
                len(parts) not in (3, 4)
                or parts[0] not in ("t", "v")
                or parts[2] not in ("32", "8", "4", "3", "2", "1")
            ):
                raise ValueError("kind t or v, bits 32, 8, 4, 3, 2 or 1")
            segments = parse_granularity(parts[1])
            if parts[3:] and parts[3] not in (*OPTIONS, "deltas"):
                raise ValueError(f"option {' or '.join(OPTIONS)}")
        except ValueError as error:
            expected = str(error).removeprefix(
                f"granularity {parts[min(1, len(parts) - 1)]!r}: expected "
            )
            raise ValueError(
                f"method {text!r}: expected KIND:GRANULARITY:BITS[:OPTION] such as t:tensor:4;"
                f" {expected}"
            ) from error
        return cls(
            parts[0], segments, int(parts[2]), **OPTIONS.get(parts[3] if parts[3:] else "", {})
        )


#: last parts of a method's text
OPTIONS = {"orthonormal": {"basis": "orthonormal"}, "simplex": {"constraint": "simplex"}}

DEFAULT_METHODS = (TwaMethod("t", "fine", 4), TwaMethod("v", "model", 4))


@dataclass(frozen=True)
class Settings:
    """patience: looks at the validation data (of six) in a row without a new best after which a
    trained average is stopped; 0: none. batches_per_step: over all ranks; 0: one per rank.
    placement: see Subspace.from_candidates; "columns" shards the task's model."""

    methods: tuple[TwaMethod, ...] = DEFAULT_METHODS
    steps: int = 100
    lr: float = 0.01
    weight_decay: float = 0.0
    bn_batches: int = 100
    batches_per_step: int = 0
    seed: int = 0
    placement: str = "auto"
    low_memory: bool = False
    save_every: int = 10
    patience: int = 3

    def facts(self) -> dict[str, str]:
        """What a run may not change when it is continued: not the placement, nor the number of
        ranks.
        """
        free = {"placement", "low_memory", "save_every"}
        return {
            f.name.replace("_", " "): str(getattr(self, f.name))
            for f in fields(self)
            if f.name not in free
        }


@dataclass
class Result:
    """One row of the table.

    Losses are means per batch sample; memory is the process's peak in bytes while the method ran.
    """

    method: str
    candidates: int
    steps: int
    seconds: float
    memory: int
    val_loss: float
    test_loss: float | None = None
    test_metric: float | None = None
    # passes over the validation data that it takes on its own, BatchNorm re-estimated before each
    evaluations: int = 0
    note: str = ""
    curve: list[float] = field(default_factory=list)  # training loss per step
    val_curve: list[tuple[int, float]] = field(default_factory=list)
    beta: Tensor | None = None  # (n,) or (n, L) merge weights
    coefficients: dict | None = None
    is_average: bool = True  # False: a comparison that is no weighted average (annealing)
    # validation loss with BatchNorm statistics averaged, not re-estimated; None where that is no
    # question
    averaged_bn_loss: float | None = None


@dataclass
class Outcome:
    """All results; the model is at the winner's weights until it is used for something else."""

    results: list[Result]
    winner: Result
    placement: Placement

    @property
    def state(self) -> dict[str, Tensor]:
        """The winner's weights as they are exported."""
        return dict(export(self.placement))
