"""The files by themselves: which can be read, and which match each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from ..io.candidate import Candidate
from ..io.compare import check_info
from ..io.errors import CandidateError, NoWeights
from ..io.find import find, left_out
from ..io.opening import open_all
from ..io.order import LISTING
from ..io.training import in_order_of_training
from .findings import Finding, some
from .results import Row


def open_each(
    paths: Sequence[str], entry: str | None = None, ignore: Sequence[str] = ()
) -> tuple[list[Row], list[Finding]]:
    """Opens every candidate by itself, in the order that `Candidates` gives them.

    Args:
        paths: files, patterns and directories
        entry, ignore: as for `Candidates`

    Returns:
        a row for each, and what there is to say of their names; one without weights that a pattern
        or a directory brought is no row, if there are others
    """
    found = find(paths, keep_unmatched=True)
    rows, empty = [], []
    for path in found.paths:
        try:
            rows += [Row(c.path, c) for c in open_all(found, path, entry, ignore)]
        except CandidateError as error:
            rows.append(Row(path, None, error.problem))
            if isinstance(error, NoWeights) and path in found.searched:
                empty.append(path)
    opened = [row.path for row in rows if row.candidate is not None]
    advice = "nothing needs to be done"
    of_names = (*found.inside, *found.notes)
    findings = [Finding("note", "inside", text, advice) for text in of_names]
    if opened:
        rows = [row for row in rows if row.path not in empty]
        findings += [Finding("note", "left-out", text, advice) for text in left_out(empty, opened)]
    if found.by_age:
        places = [k for k, row in enumerate(rows) if row.candidate is not None]
        inside = [c for row in rows if (c := row.candidate) is not None]
        order = in_order_of_training([c.path for c in inside], [c.progress for c in inside])
        right = [rows[places[k]] for k in order.places]
        for place, row in zip(places, right, strict=True):
            rows[place] = row
        findings += [Finding("note", "order", text, LISTING) for text in order.doubts]
        findings += [Finding("note", "order", text, advice) for text in order.notes]
    return rows, findings


def signature(candidate: Candidate) -> frozenset:
    """What candidates must have in common: keys, shapes, kinds of dtype."""
    return frozenset(
        (key, i.shape, i.dtype.is_floating_point, i.dtype == torch.bool, i.dtype.is_complex)
        for key, i in candidate.info.items()
    )


def matching(rows: list[Row], reference: int | None) -> list[Row]:
    """The rows that match: those with the keys and shapes of the reference, else of most.

    Of equally many, the first count. The problem of the other rows is set.

    Args:
        rows: of all files
        reference: position of a row, or None

    Raises:
        CandidateError: the reference could not be opened
    """
    opened = [(row, row.candidate) for row in rows if row.candidate is not None]
    if not opened:
        return []
    signatures = [signature(candidate) for _, candidate in opened]
    wanted = Counter(signatures).most_common(1)[0][0]
    if reference is not None:
        chosen = rows[reference]
        if chosen.candidate is None:
            raise CandidateError(f"--reference {reference + 1}: {chosen.path}: {chosen.problem}")
        wanted = signature(chosen.candidate)
    _, expected = opened[signatures.index(wanted)]
    matched = []
    for (row, candidate), found in zip(opened, signatures, strict=True):
        if found == wanted:
            matched.append(row)
        else:
            row.problem = "; ".join(differences(expected, candidate))
    return matched


def differences(expected: Candidate, found: Candidate) -> list[str]:
    """How the tensors of one candidate differ from those of another, in a few words each."""
    missing = sorted(expected.info.keys() - found.info.keys())
    unexpected = sorted(found.info.keys() - expected.info.keys())
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
            others.append(error.problem)
    words += sorted(others)[:3]
    if len(others) > 3:
        words.append(f"and {len(others) - 3} more tensors of other shapes or kinds")
    return words


def key_hint(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """What keys that do not match suggest; "" if it is nothing in particular."""
    if any("lora_" in key for key in unexpected):
        return "this looks like an adapter (LoRA): merge it into its base model first"
    for more, fewer, of in ((unexpected, missing, "these"), (missing, unexpected, "the others'")):
        pairs = ((key, short) for key in more[:1] for short in fewer if key.endswith(short))
        prefix = next((key.removesuffix(short) for key, short in pairs), "")
        if prefix and {key.removeprefix(prefix) for key in more} == set(fewer):
            return f"{of} keys have the prefix {prefix!r} before the same names"
    return ""


def file_findings(rows: list[Row], matched: list[Row]) -> list[Finding]:
    """Files that cannot be read, and those that do not match the others."""
    found = []
    for row in rows:
        if row.candidate is None:
            message, advice = f"{row.path}: {row.problem}", "save it again or leave it out"
            if not row.path.exists():
                advice = "look at the path"
            found.append(Finding("error", "unreadable", message, advice))
        elif row not in matched:
            message = (
                f"{row.path} does not match the {len(matched)} candidates like"
                f" {matched[0].path.name}: {row.problem}"
            )
            advice = "leave it out: candidates must be checkpoints of one model"
            found.append(Finding("error", "layout", message, advice))
    return found
