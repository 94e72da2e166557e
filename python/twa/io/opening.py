"""From what was found to open candidates, each once and in order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .candidate import Candidate
from .duplicates import without_duplicates, without_same_files
from .errors import CandidateError, NoWeights, reading
from .find import Found, left_out
from .order import LISTING, shortened
from .recording import Recorded, Recording, open_recording
from .recording_files import is_recording
from .training import in_order_of_training, removed


def open_each(
    found: Found, entry: str | None, ignore: Sequence[str] = ()
) -> tuple[list[Candidate], list[str]]:
    """Opens what was found.

    Args:
        found: by `find`
        entry, ignore: as for `Candidates`

    Returns:
        the candidates, and a note of what holds no weights

    Raises:
        CandidateError: one cannot be read, or holds no weights and was named; or none holds any
    """
    opened: list[Candidate] = []
    empty, first = [], None
    for path in found.paths:
        try:
            opened += open_all(found, path, entry, ignore)
        except NoWeights as error:
            if path not in found.searched:
                if len(found.paths) == 1:
                    raise
                advice = "leave it out, or put the pattern that brought it in quotes"
                raise NoWeights(f"{error.problem}; {advice}", path) from error
            empty.append(path)
            first = first or error
    if not opened:
        raise CandidateError(f"no candidates: nothing of what was found holds weights; {first}")
    return opened, left_out(empty, [c.path for c in opened])


def open_all(
    found: Found, path: Path, entry: str | None, ignore: Sequence[str] = ()
) -> list[Candidate]:
    """One of those that were found; or, of a recording, its snapshots.

    Raises:
        NoWeights, CandidateError: as `open_one`
    """
    with reading(path):
        if not path.is_dir() or not is_recording(path):
            return [open_one(found, path, entry, ignore)]
        if entry is not None:
            raise CandidateError(f"entry {entry!r}: a recording has none", path)
        return [*open_recording(path).candidates(ignore)]


def open_one(found: Found, path: Path, entry: str | None, ignore: Sequence[str] = ()) -> Candidate:
    """One of those that were found.

    Raises:
        NoWeights: there are no weights in it; a file that was named may have integers alone
        CandidateError: it cannot be read
    """
    candidate = Candidate(path, entry, ignore)
    dtypes = [info.dtype for info in candidate.info.values()]
    if path in found.searched and not any(d.is_floating_point or d.is_complex for d in dtypes):
        raise NoWeights("expected a checkpoint, found no floating-point tensors", path)
    return candidate


@reading()
def sorted_out(
    found: Found, opened: Sequence[Candidate]
) -> tuple[list[Candidate], list[str], list[str]]:
    """Of what was opened each once, and in order.

    Returns:
        the candidates, what may have been meant otherwise, and what else there is to say

    Raises:
        CandidateError: one can no longer be read
    """
    files = [c for c in opened if not isinstance(c, Recorded)]
    snapshots = [c for c in opened if isinstance(c, Recorded)]
    once, same = without_duplicates(files) if len(files) > 1 else (files, "")
    recorded, twice = without_same_files(snapshots)
    doubtful, notes = [text for text in (same, twice) if text], list[str]()
    if files and recorded:
        doubtful.append(
            f"a recording, {recorded[0].path.parent}, and whole files, such as"
            f" {files[0].path.name}: if they are of one run, its weights count twice"
        )
    kept = {id(c) for c in (*once, *recorded)}
    if found.by_age:
        order = in_order_of_training([c.path for c in once], [c.progress for c in once])
        once = [once[k] for k in order.places]
        doubtful += [f"{text}; {LISTING}" for text in order.doubts]
        notes += order.notes
    doubtful += removed([c.path for c in once])
    (doubtful if len(opened) == 1 else notes).extend(found.inside)
    notes += [note for recording in _recordings(snapshots) for note in recording.notes]
    in_turn = iter(once)
    chosen = [c if isinstance(c, Recorded) else next(in_turn) for c in opened if id(c) in kept]
    return chosen, doubtful, [*notes, *_siblings(once), *found.notes]


def _recordings(snapshots: Sequence[Recorded]) -> list[Recording]:
    """The recordings that snapshots are of."""
    return list(dict.fromkeys(c.recording for c in snapshots))


def _siblings(candidates: Sequence[Candidate]) -> list[str]:
    """A note on what stands beside the weights and may be meant, such as a moving average."""
    found = [c for c in candidates if c.siblings]
    if not found:
        return []
    names = shortened([repr(name) for name in found[0].siblings])
    return [
        f"{shortened([c.path for c in found], 2)}: {found[0].nest[0]!r} is read;"
        f" {names} beside it has tensors of the same names, and can be named as entry"
    ]
