"""The loss of averages: whether the candidates are linearly connected."""

from __future__ import annotations

import math

from torch import Tensor

from .. import averages
from ..distributed.ranks import Ranks
from ..distributed.sharding import Sharding
from ..io.candidates import Candidates
from ..io.key_map import match_model
from ..io.progress import progress_bar
from ..merge.evaluate import Evaluator
from ..tasks.contract import Task
from .findings import Finding, some
from .results import Barrier

LINE_POINTS = 5  # along the straight line between two candidates, its ends included


def measure_barrier(task: Task, candidates: Candidates, ends: tuple[int, int]) -> Barrier:
    """Measures losses of every candidate, of their mean, and between two of them.

    They are measured as `twa average` does it.

    Args:
        task: model, data and loss
        candidates: what is measured
        ends: positions of the two
    """
    n, model = len(candidates), task.model()
    candidates, key_map = match_model(model, candidates)
    evaluator = Evaluator(task, Sharding(Ranks(), model, candidates, key_map))
    first, last = (averages.candidate(n, k) for k in ends)
    shares = [k / (LINE_POINTS - 1) for k in range(1, LINE_POINTS - 1)]
    with progress_bar("validation losses", n + 1 + len(shares)) as bar:

        def loss(beta: Tensor) -> float:
            bar.update(1)
            return evaluator.at(beta)

        singles = [loss(averages.candidate(n, k)) for k in range(n)]
        mean = loss(averages.uniform(n))
        line = [(share, loss((1 - share) * first + share * last)) for share in shares]
    line = [(0.0, singles[ends[0]]), *line, (1.0, singles[ends[1]])]
    return Barrier(candidates.names, singles, mean, ends, line, evaluator.bn_used)


def barrier_findings(b: Barrier) -> list[Finding]:
    """What the losses say, in plain words."""
    found = []
    losses = zip(b.names, b.losses, strict=True)
    if broken := [name for name, loss in losses if not math.isfinite(loss)]:
        message = f"the loss of {some(broken)} is NaN or Inf"
        found.append(Finding("warning", "loss-not-finite", message, "leave out what diverged"))
    found.append(_mean_finding(b))
    height, share = bump(b.line)
    if height > 0:
        first, last = (b.names[k] for k in b.ends)
        message = (
            f"the line from {first} to {last}, the two farthest apart, rises above both ends by"
            f" {height:.4f} at {share:.0%} of the way"
        )
        advice = "do not average these two with equal weights"
        found.append(Finding("warning", "line", message, advice))
    return found


def _mean_finding(b: Barrier) -> Finding:
    """How the uniform mean compares with the candidates."""
    best, worst = min(b.losses), max(b.losses)
    name = b.names[b.losses.index(best)]
    figures = f"mean {b.mean:.4f}, best {best:.4f} ({name}), worst {worst:.4f}"
    if b.mean <= best:
        message = f"the uniform mean is at least as good as the best candidate ({figures})"
        return Finding("note", "barrier", message, "average them: they lie around one minimum")
    if b.mean <= worst:
        message = (
            f"the uniform mean is worse than the best candidate, better than the worst ({figures})"
        )
        advice = (
            "average a shorter tail, or let `twa average` choose: it looks for the best horizon to"
            " start from"
        )
        return Finding("note", "barrier", message, advice)
    message = (
        f"the uniform mean is worse than the worst candidate ({figures}): the candidates are not"
        " linearly connected"
    )
    advice = (
        "have they one initialisation, and was the learning rate moderate? Average a shorter tail,"
        " or fine-tunes of one base; `twa average --compare` evaluates single candidates, too"
    )
    return Finding("warning", "barrier", message, advice)


def bump(line: list[tuple[float, float]]) -> tuple[float, float]:
    """How far the loss along a line rises above its higher end, and where.

    Args:
        line: (share of the second end, loss), in order, with the ends
    """
    share, highest = max(line[1:-1], key=lambda point: point[1])
    height = highest - max(line[0][1], line[-1][1])
    return (0.0, share) if math.isnan(height) else (height, share)
