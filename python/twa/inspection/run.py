"""`twa inspect`: what is wrong with a heap of checkpoints, before they are averaged
(docs/inspect.md).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .. import averages as schemes
from ..basis.segments import layout_of
from ..batchnorm import tracked_batchnorms, update_bn_of
from ..distributed.choose import resolve
from ..distributed.ranks import World
from ..distributed.weights import load_merge, round_to_files
from ..io.candidates import (
    Candidate,
    CandidateError,
    Candidates,
    check_info,
    find_checkpoints,
    in_order,
)
from ..io.progress import mean_over
from ..merge.settings import Settings
from ..tasks.batches import shared_out
from ..tasks.contract import BUILT_IN, Task, load_task
from . import report as inspect_report
from .geometry import Geometry
from .samples import (
    SEVERITIES,
    Finding,
    content_findings,
    geometry_findings,
    numel,
    read_heap,
    some,
    tensor_findings,
)
from .samples import heap_findings as heap_findings

LINE_POINTS = 5  # along the straight line between two candidates, its ends included
BN_BATCHES = Settings.bn_batches


@dataclass
class Row:
    """One file of the heap. candidate:

    None if it could not be opened. problem: why, or how it differs from the others; "" if nothing
    is wrong.
    """

    path: Path
    candidate: Candidate | None
    problem: str = ""

    @property
    def format(self) -> str:
        return self.candidate.kind if self.candidate else "-"

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(f.stat().st_size for f in self.candidate.files) if self.candidate else 0

    @property
    def parameters(self) -> int:
        return sum(numel(i) for i in self.candidate.info.values()) if self.candidate else 0

    @property
    def dtypes(self) -> str:
        counts = (
            Counter(str(i.dtype).removeprefix("torch.") for i in self.candidate.info.values())
            if self.candidate
            else {}
        )
        return ", ".join(sorted(counts, key=lambda name: -counts[name]))


@dataclass
class Barrier:
    """Validation losses: of single candidates (n,), of their uniform mean, and along the line
    between two of them.

    ends         positions of the two among the candidates
    line         (share of the second end, loss)
    bn_batches   training batches that BatchNorm was re-estimated on for each average; 0: the model
                 has none
    """

    names: list[str]
    losses: list[float]
    mean: float
    ends: tuple[int, int]
    line: list[tuple[float, float]]
    bn_batches: int


@dataclass
class Inspection:
    """All that `twa inspect` finds. members: paths of the candidates in `geometry` and `barrier`,
    in their order.
    """

    rows: list[Row]
    findings: list[Finding] = field(default_factory=list)
    members: list[Path] = field(default_factory=list)
    geometry: Geometry | None = None
    barrier: Barrier | None = None


# Files -------------------------------------------------------------------------------------------


def expand(patterns: Iterable[str]) -> list[Path]:
    """Paths in the order that `Candidates` gives them; a pattern that matches nothing as it is."""
    found: list[Path] = []
    for pattern in patterns:
        try:
            found += find_checkpoints([pattern])
        except CandidateError:
            found.append(Path(pattern))  # opening it says what is wrong
    return in_order(found)


def open_each(paths: Iterable[Path], entry: str | None = None) -> list[Row]:
    """Every candidate by itself. entry: as for `Candidates`."""
    rows = []
    for path in paths:
        try:
            rows.append(Row(path, Candidate(path, entry)))
        except CandidateError as error:
            rows.append(Row(path, None, str(error).removeprefix(f"{path}: ")))
    return rows


def signature(candidate: Candidate) -> frozenset:
    """What candidates of one heap have in common: keys, shapes, kinds of dtype."""
    return frozenset(
        (key, i.shape, i.dtype.is_floating_point, i.dtype == torch.bool, i.dtype.is_complex)
        for key, i in candidate.info.items()
    )


def matching(rows: list[Row], reference: int | None) -> list[Row]:
    """The rows with the layout of the reference, else of most (of equally many: the first); the
    problem of the others is set.
    """
    opened = [row for row in rows if row.candidate is not None]
    if not opened:
        return []
    signatures = [signature(row.candidate) for row in opened]
    if reference is not None and rows[reference].candidate is None:
        raise CandidateError(
            f"--reference {reference + 1}: {rows[reference].path}: {rows[reference].problem}"
        )
    layout = (
        signature(rows[reference].candidate)
        if reference is not None
        else Counter(signatures).most_common(1)[0][0]
    )
    expected = opened[signatures.index(layout)].candidate
    for row, s in zip(opened, signatures, strict=True):
        if s != layout:
            row.problem = "; ".join(differences(expected, row.candidate))
    return [row for row, s in zip(opened, signatures, strict=True) if s == layout]


def differences(expected: Candidate, found: Candidate) -> list[str]:
    """How the tensors of one candidate differ from those of another, in a few words each."""
    missing, unexpected = (
        sorted(expected.info.keys() - found.info.keys()),
        sorted(found.info.keys() - expected.info.keys()),
    )
    words = []
    if missing:
        words.append(f"{len(missing)} of {len(expected.info)} tensors missing: {some(missing, 3)}")
    if unexpected:
        words.append(f"{len(unexpected)} unexpected: {some(unexpected, 3)}")
    if hint := key_hint(missing, unexpected):
        words.append(hint)
    others = []
    for key in expected.info.keys() & found.info.keys():
        try:
            check_info(found.path, key, expected.info[key], found.info[key], f"in {expected.name}")
        except CandidateError as error:
            others.append(str(error).removeprefix(f"{found.path}: "))
    return (
        words
        + sorted(others)[:3]
        + (
            [f"and {len(others) - 3} more tensors of other shapes or kinds"]
            if len(others) > 3
            else []
        )
    )


def key_hint(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """What keys that do not match suggest."""
    if any("lora_" in key for key in unexpected):
        return "this looks like an adapter (LoRA): merge it into its base model first"
    for more, fewer, of in ((unexpected, missing, "these"), (missing, unexpected, "the others'")):
        prefix = next(
            (key.removesuffix(short) for key in more[:1] for short in fewer if key.endswith(short)),
            "",
        )
        if prefix and {key.removeprefix(prefix) for key in more} == set(fewer):
            return f"{of} keys have the prefix {prefix!r} before the same names"
    return ""


def file_findings(rows: list[Row], matched: list[Row]) -> list[Finding]:
    """Files that cannot be read, and those that do not match the others."""
    found = []
    for row in rows:
        if row.candidate is None:
            found.append(
                Finding(
                    "error",
                    "unreadable",
                    f"{row.path}: {row.problem}",
                    "save it again or leave it out",
                )
            )
        elif row not in matched:
            message = (
                f"{row.path} does not match the {len(matched)} candidates like"
                f" {matched[0].path.name}: {row.problem}"
            )
            found.append(
                Finding(
                    "error",
                    "layout",
                    message,
                    "leave it out: candidates must be checkpoints of one model",
                )
            )
    return found


# The loss of averages ----------------------------------------------------------------------------


class Losses:
    """Validation loss at merge weights, as `twa average` measures it: exact merge, rounded to the
    files' dtypes, BatchNorm of an average re-estimated."""

    def __init__(self, task: Task, candidates: Candidates) -> None:
        self.task, self.model, self.n = task, task.model(), len(candidates)
        self.placement = resolve(
            "single", self.model, candidates, layout_of(self.model, candidates), 4, World()
        )
        self.bn_batches = 0

    def at(self, beta: Tensor) -> float:
        """beta (n,). Inf for NaN."""
        load_merge(self.placement, beta)
        round_to_files(self.placement)
        if int((beta != 0).sum()) > 1 and tracked_batchnorms(self.model):
            batches = shared_out(self.task.train, World(), BN_BATCHES)
            self.bn_batches = update_bn_of(batches, self.model, self.task.loss, World())
            round_to_files(self.placement)
        loss = mean_over(self.model, self.task.loss, self.task.val)
        return loss if math.isfinite(loss) else math.inf

    def between(self, ends: tuple[int, int], share: float) -> float:
        return self.at(
            (1 - share) * schemes.candidate(self.n, ends[0])
            + share * schemes.candidate(self.n, ends[1])
        )


def measure_barrier(
    task: Task, candidates: Candidates, ends: tuple[int, int], progress: bool = True
) -> Barrier:
    """Losses of every candidate, of their mean, and between two of them."""
    n, losses = len(candidates), Losses(task, candidates)
    shares = [k / (LINE_POINTS - 1) for k in range(1, LINE_POINTS - 1)]
    with tqdm(
        total=n + 1 + len(shares),
        desc=f"{'validation losses':32.32s}",
        disable=not progress,
        mininterval=0.5,
        file=sys.stderr,
    ) as bar:

        def seen(loss: float) -> float:
            bar.update(1)
            return loss

        singles = [seen(losses.at(schemes.candidate(n, k))) for k in range(n)]
        mean = seen(losses.at(schemes.uniform(n)))
        line = [(share, seen(losses.between(ends, share))) for share in shares]
    line = [(0.0, singles[ends[0]]), *line, (1.0, singles[ends[1]])]
    return Barrier(candidates.names, singles, mean, ends, line, losses.bn_batches)


def barrier_findings(b: Barrier) -> list[Finding]:
    """What the losses say, in plain words."""
    found = []
    if broken := [
        name for name, loss in zip(b.names, b.losses, strict=True) if not math.isfinite(loss)
    ]:
        found.append(
            Finding(
                "warning",
                "loss-not-finite",
                f"the loss of {some(broken)} is NaN or Inf",
                "leave out what diverged",
            )
        )
    best, worst = min(b.losses), max(b.losses)
    figures = (
        f"mean {b.mean:.4f}, best {best:.4f} ({b.names[b.losses.index(best)]}), worst {worst:.4f}"
    )
    if b.mean <= best:
        advice = "average them: they lie around one minimum"
        found.append(
            Finding(
                "note",
                "barrier",
                f"the uniform mean is at least as good as the best candidate ({figures})",
                advice,
            )
        )
    elif b.mean <= worst:
        advice = (
            "average a shorter tail, or let `twa average` choose: it starts at the best fixed"
            " average"
        )
        found.append(
            Finding(
                "note",
                "barrier",
                "the uniform mean is worse than the best candidate, better than the worst"
                f" ({figures})",
                advice,
            )
        )
    else:
        advice = (
            "have they one initialisation, and was the learning rate moderate? Average a shorter"
            " tail, or fine-tunes of one base; `twa average` starts at the best fixed average,"
            " which may be a single candidate"
        )
        message = (
            f"the uniform mean is worse than the worst candidate ({figures}): the candidates are"
            " not linearly connected"
        )
        found.append(Finding("warning", "barrier", message, advice))
    height, share = bump(b.line)
    first, last = (b.names[k] for k in b.ends)
    if height > 0:
        message = (
            f"the line from {first} to {last}, the two farthest apart, rises above both ends by"
            f" {height:.4f} at {share:.0%} of the way"
        )
        found.append(
            Finding("warning", "line", message, "do not average these two with equal weights")
        )
    return found


def bump(line: list[tuple[float, float]]) -> tuple[float, float]:
    """How far the loss along a line rises above its higher end, and where."""
    share, highest = max(line[1:-1], key=lambda point: point[1])
    height = highest - max(line[0][1], line[-1][1])
    return (0.0, share) if math.isnan(height) else (height, share)


# All of it ---------------------------------------------------------------------------------------


def inspect(
    paths: Sequence[str],
    task: Task | None = None,
    reference: int | None = None,
    entry: str | None = None,
    progress: bool = True,
) -> Inspection:
    """Looks at files, tensors, weights and, with a task, losses.

    paths       files, patterns and directories, as for `Candidates`; what cannot be read is a row
                and a finding
    reference   position in the heap of the candidate that the others are compared with; None: keys
                and shapes with those of most, weights with their mean
    entry       key under which torch and DCP checkpoints hold the weights

    Raises ValueError if there is no such reference, TaskError.
    """
    rows = open_each(expand(paths), entry)
    if reference is not None and not 0 <= reference < len(rows):
        raise ValueError(f"--reference: expected 1 to {len(rows)}, found {reference + 1}")
    matched = matching(rows, reference)
    result = Inspection(rows, file_findings(rows, matched))
    if matched:
        try:
            _inspect_matching(
                result,
                matched,
                rows[reference] if reference is not None else None,
                task,
                entry,
                progress,
            )
        except CandidateError as error:  # such as a model of the task that the files do not fit
            result.findings.append(
                Finding("error", "candidates", str(error), "see docs/inspect.md")
            )
    result.findings.sort(key=lambda f: SEVERITIES.index(f.severity))
    return result


def _inspect_matching(
    result: Inspection,
    matched: list[Row],
    reference: Row | None,
    task: Task | None,
    entry: str | None,
    progress: bool,
) -> None:
    candidates = Candidates([row.path for row in matched], entry=entry)
    found = result.findings
    # the rest is found exactly
    found += [f for f in heap_findings(candidates) if f.kind in ("unrelated", "stray")]
    content = read_heap(candidates, progress)
    found += content_findings(candidates, content)
    found += tensor_findings(candidates)
    paths = [c.path for c in candidates]
    for row in matched:
        if paths.index(row.path) not in content.sound:
            row.problem = "NaN or Inf"
    if not content.sound:
        return
    sound = Candidates([paths[i] for i in content.sound], entry=entry)  # which may order them anew
    result.members = [c.path for c in sound]
    positions = [paths.index(path) for path in result.members]
    at = (
        result.members.index(reference.path)
        if reference is not None and reference.path in result.members
        else None
    )
    result.geometry = Geometry(
        sound.names, content.matrices[positions], content.others[positions], at
    )
    found += geometry_findings(sound, result.geometry)
    if task is not None and len(sound) > 1:
        result.barrier = measure_barrier(task, sound, result.geometry.farthest(), progress)
        found += barrier_findings(result.barrier)


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "candidates",
        metavar="CANDIDATES",
        nargs="+",
        help="checkpoint files, glob patterns or Hugging Face directories",
    )
    p.add_argument(
        "--task",
        metavar="TASK",
        help=(
            f"{' or '.join(BUILT_IN)}, or a Python file as for `twa average`: measures validation"
            " losses, too"
        ),
    )
    p.add_argument(
        "--reference",
        metavar="N",
        type=int,
        help="number of the candidate that the others are compared with, such as their base model",
    )
    p.add_argument(
        "--entry",
        metavar="KEY",
        help="key under which torch and DCP checkpoints hold the weights (default: the usual ones)",
    )
    p.add_argument(
        "--device",
        choices=("task", "cpu", "cuda"),
        default="task",
        help="where the model runs (default: where the task puts it)",
    )
    p.add_argument(
        "--seed", type=int, default=0, help="order of the task's data (default: %(default)s)"
    )
    p.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        type=Path,
        help="directory for inspect.md, inspect.json and inspect.png",
    )


def run_inspect(args: argparse.Namespace) -> None:
    """Says what is wrong with a heap of checkpoints: files, tensors, duplicates, unrelated groups
    and, with a task, whether averages of them are any good. Exit status 0 whatever is found."""
    if args.output is not None:
        inspect_report.check_folder(args.output)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available")
    task = load_task(args.task, args.seed) if args.task else None
    if task is not None and args.device != "task":
        task = task.on(torch.device(args.device))
    result = inspect(
        args.candidates,
        task,
        args.reference - 1 if args.reference is not None else None,
        args.entry,
    )
    print(inspect_report.text(result))
    if args.output is not None:
        inspect_report.write_outputs(args.output, result)
        print(f"\nwritten to {args.output}/: {', '.join(inspect_report.FILES)}")
