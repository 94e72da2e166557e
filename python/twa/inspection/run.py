"""What is wrong with candidates, before they are averaged (docs/inspect.md)."""

from __future__ import annotations

from collections.abc import Sequence

from ..io.candidates import Candidates
from ..io.errors import CandidateError, TwaError
from ..tasks.contract import Task
from .barrier import barrier_findings, measure_barrier
from .contents import content_findings, geometry_findings, read_contents, tensor_findings
from .files import file_findings, matching, open_each
from .findings import SEVERITIES, Finding
from .geometry import Geometry
from .results import Inspection, Row
from .samples import sample_findings


def inspect(
    paths: Sequence[str],
    task: Task | None = None,
    reference: int | None = None,
    entry: str | None = None,
    ignore: Sequence[str] = (),
) -> Inspection:
    """Looks at files, tensors, weights and, with a task, losses.

    Args:
        paths: files, patterns and directories, as for `Candidates`; what cannot be read is a row
            and a finding
        task: model, data and loss, for validation losses
        reference: position of the candidate that the others are compared with; None: keys and
            shapes are compared with those of most, weights with their mean
        entry, ignore: as for `Candidates`

    Returns:
        all that was found, errors first

    Raises:
        TwaError: there is no such reference
        CandidateError: the reference cannot be read
        TaskError: the task does not keep its contract
    """
    rows, of_names = open_each(paths, entry, ignore)
    if reference is not None and not 0 <= reference < len(rows):
        raise TwaError(f"--reference: expected 1 to {len(rows)}, found {reference + 1}")
    matched = matching(rows, reference)
    result = Inspection(rows, [*file_findings(rows, matched), *of_names])
    if matched:
        chosen = None if reference is None else rows[reference]
        try:
            _inspect_matching(result, matched, chosen, task)
        except CandidateError as error:  # such as a model of the task that the files do not fit
            finding = Finding("error", "candidates", str(error), "see docs/inspect.md")
            result.findings.append(finding)
    result.findings.sort(key=lambda f: SEVERITIES.index(f.severity))
    return result


def _inspect_matching(
    result: Inspection,
    matched: list[Row],
    reference: Row | None,
    task: Task | None,
) -> None:
    """Looks at the candidates that match each other, and adds what is found to the result."""
    candidates = Candidates.of([row.candidate for row in matched if row.candidate is not None])
    found = result.findings
    # Only these kinds: the rest is found exactly below.
    found += [f for f in sample_findings(candidates) if f.kind in ("unrelated", "stray")]
    content = read_contents(candidates)
    candidates.check()
    found += content_findings(candidates, content)
    found += tensor_findings(candidates)
    paths = [c.path for c in candidates]
    for row in matched:
        if paths.index(row.path) not in content.sound:
            row.problem = "NaN or Inf"
    if not content.sound:
        return
    sound = Candidates.of([candidates[i] for i in content.sound])
    result.members = [c.path for c in sound]
    positions = content.sound
    at = None
    if reference is not None and reference.path in result.members:
        at = result.members.index(reference.path)
    matrices, others = content.matrices[positions], content.others[positions]
    result.geometry = Geometry(sound.names, matrices, others, at)
    found += geometry_findings(sound, result.geometry)
    if task is not None and len(sound) > 1:
        result.barrier = measure_barrier(task, sound, result.geometry.farthest())
        found += barrier_findings(result.barrier)
