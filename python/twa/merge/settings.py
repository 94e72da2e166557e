"""What `twa average` is asked to do."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

from ..basis.segments import parse_granularity
from ..distributed.cost import check_storage
from ..io.checks import check_whole
from ..io.errors import TwaError
from .evaluate import BN_BATCHES


@dataclass(frozen=True)
class TwaMethod:
    """A way to train an average.

    Attributes:
        kind: "t": on training data; "v": on held-out data
        granularity: segments with their own coefficients, as in Subspace.from_candidates
        bits: of the packed candidates; 32: dense float32
        basis: "deltas", "differences" or "orthonormal"
        constraint: "none" or "simplex"
    """

    kind: str
    granularity: str | int
    bits: int
    basis: str = "deltas"
    constraint: str = "none"

    @property
    def name(self) -> str:
        """What the table calls it, such as "TWA-t per tensor, 4 bits"."""
        chosen = [option for option in (self.basis, self.constraint) if option in OPTIONS]
        options = "".join(f", {option}" for option in chosen)
        segments = f"per {self.granularity}"
        if isinstance(self.granularity, int):
            segments += " weights"
        if self.granularity == "fine":
            segments = "fine"
        bits = "float32" if self.bits == 32 else f"{self.bits} bits"
        return f"TWA-{self.kind} {segments}, {bits}{options}"

    @property
    def can_be_balanced(self) -> bool:
        """Whether what is trained can be balanced, see `twa.coordinates.Balanced`."""
        return self.constraint == "none" and self.basis != "orthonormal"

    @classmethod
    def parse(cls, text: str) -> TwaMethod:
        """Reads a method from a text such as "t:tensor:4" or "v:model:4:simplex".

        Args:
            text: KIND:GRANULARITY:BITS[:OPTION...]

        Raises:
            TwaError: it is no such text
        """
        parts = text.split(":")
        kind, granularity, bits, *options = parts + [""] * (3 - len(parts))
        try:
            if kind not in ("t", "v") or bits not in ("32", "8", "4", "3", "2", "1"):
                raise TwaError("expected kind t or v, bits 32, 8, 4, 3, 2 or 1")
            if not set(options) <= set(OPTIONS):
                *others, last = OPTIONS
                raise TwaError(f"expected option {', '.join(others)} or {last}")
            chosen: dict[str, str] = {}
            for key, value in (pair for o in options for pair in OPTIONS.get(o, {}).items()):
                if key in chosen:
                    raise TwaError(f"expected one {key}, found {chosen[key]} and {value}")
                chosen[key] = value
            segments = parse_granularity(granularity)
        except TwaError as error:
            raise TwaError(
                "expected KIND:GRANULARITY:BITS[:OPTION] such as t:tensor:4;"
                f" {error.problem.removeprefix('expected ')}",
                f"method {text!r}",
            ) from error
        return cls(kind, segments, int(bits), **chosen)


#: what the options in a method's text mean
OPTIONS = {
    "differences": {"basis": "differences"},
    "orthonormal": {"basis": "orthonormal"},
    "simplex": {"constraint": "simplex"},
}

DEFAULT_METHODS = (TwaMethod("t", "fine", 4), TwaMethod("v", "fine", 4))


@dataclass(frozen=True)
class Settings:
    """How trained averages are trained.

    Attributes:
        methods: the trained averages to try, in turn
        steps: gradient steps of each; None: as many as are worth it
        lr: learning rate of the coefficients; None: that of `twa.learning_rate`
        weight_decay: pulls coefficients to zero, where they start
        bn_batches: training batches that BatchNorm is re-estimated on
        batches_per_step: over all ranks; 0: one per rank
        seed: of the order of the data, and of Dropout
        sharding: as in Subspace.from_candidates; "columns" shards the task's model
        low_memory: whether gradients are projected and freed inside backward
        storage: where basis and center are kept, as in Subspace.from_candidates
        save_every: steps between saved states
        patience: looks at the validation data in a row without a new best, after which a trained
            average is stopped; 0: never
        compare: whether the averages in use today are evaluated, too, on all validation data
        basis: a file of `twa pack`: methods that have its bits and segments start from its rows
            instead of packing the candidates anew
    """

    methods: tuple[TwaMethod, ...] = DEFAULT_METHODS
    steps: int | None = None
    lr: float | None = None
    weight_decay: float = 0.0
    bn_batches: int = BN_BATCHES
    batches_per_step: int = 0
    seed: int = 0
    sharding: str = "auto"
    low_memory: bool = False
    storage: str = "device"
    save_every: int = 10
    patience: int = 3
    compare: bool = False
    basis: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        """Raises TwaError if a setting is none of what it can be."""
        if self.steps is not None:
            check_whole(self.steps, 1, "steps")
        for name, least in (("bn_batches", 1), ("save_every", 1), ("patience", 0)):
            check_whole(getattr(self, name), least, name)
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise TwaError(f"expected a number above 0, found {self.lr!r}", "lr")
        check_storage(self.storage, [m.bits for m in self.methods])

    def facts(self) -> dict[str, str]:
        """What a run may not change when it is continued, as texts by name.

        It may change the sharding, the storage, and the number of ranks. What is in a basis is
        another's to say.
        """
        free = {"sharding", "low_memory", "storage", "save_every", "basis"}
        return {
            f.name.replace("_", " "): str(getattr(self, f.name))
            for f in fields(self)
            if f.name not in free
        }
