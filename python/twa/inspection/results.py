"""What `twa inspect` finds: files, findings, geometry, losses."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ..io.candidate import Candidate
from .findings import Finding
from .geometry import Geometry


@dataclass
class Row:
    """One of the files.

    Attributes:
        path: of the file
        candidate: what is in it; None if it could not be opened
        problem: why not, or how it differs from the others; "" if nothing is wrong
    """

    path: Path
    candidate: Candidate | None
    problem: str = ""

    @property
    def format(self) -> str:
        """Kind of checkpoint, or "-"."""
        return self.candidate.kind if self.candidate else "-"

    @property
    def bytes(self) -> int:
        """Size of its files on disk."""
        return sum(f.stat().st_size for f in self.candidate.files) if self.candidate else 0

    @property
    def parameters(self) -> int:
        """Numbers in its tensors."""
        return sum(i.numel for i in self.candidate.info.values()) if self.candidate else 0

    @property
    def dtypes(self) -> str:
        """Names of its dtypes, that of most tensors first."""
        info = self.candidate.info if self.candidate else {}
        counts = Counter(str(i.dtype).removeprefix("torch.") for i in info.values())
        return ", ".join(sorted(counts, key=lambda name: -counts[name]))


@dataclass
class Barrier:
    """Validation losses of candidates and of averages of them.

    Attributes:
        names: of the n candidates
        losses: of each of them
        mean: of their uniform mean
        ends: positions of two of them, between which there is a line
        line: (share of the second end, loss) along it, with both ends
        bn_batches: training batches that BatchNorm was re-estimated on for each average; 0: the
            model has none
    """

    names: list[str]
    losses: list[float]
    mean: float
    ends: tuple[int, int]
    line: list[tuple[float, float]]
    bn_batches: int


@dataclass
class Inspection:
    """All that `twa inspect` finds.

    Attributes:
        rows: the files, in order
        findings: what is wrong or worth a word, errors first
        members: paths of the candidates in `geometry` and `barrier`, in their order
        geometry: norms, distances and angles; None if there are no candidates to compare
        barrier: validation losses; None without a task
    """

    rows: list[Row]
    findings: list[Finding] = field(default_factory=list)
    members: list[Path] = field(default_factory=list)
    geometry: Geometry | None = None
    barrier: Barrier | None = None
