"""Versions of the files and states that users keep, and what is said of others.

A version is a text such as "twa-basis-1". Its place in a file never changes, and it grows whenever
what is written can no longer be read by the twa before. docs/compatibility.md has the rules;
`tests/compat` reads files of every version that is read.
"""

from __future__ import annotations

import re

from ..version import __version__
from .checks import shown

BASIS = "twa-basis-1"
RECORDING = "twa-recording-1"
RECORDER = "twa-recorder-1"
SUBSPACE = "twa-subspace-1"
OPTIMIZER = "twa-optimizer-1"
ITERATE_AVERAGE = "twa-iterate-average-1"
RUN = "twa-state-6"
COEFFICIENTS = "twa-coefficients-1"
MERGE = "twa-merge-1"
RESULTS = "twa-results-1"
INSPECT = "twa-inspect-1"
LIGHTNING = "twa-lightning-1"
TRANSFORMERS = "twa-transformers-1"
#: all that are written
CURRENT = (
    BASIS,
    RECORDING,
    RECORDER,
    SUBSPACE,
    OPTIMIZER,
    ITERATE_AVERAGE,
    RUN,
    COEFFICIENTS,
    MERGE,
    RESULTS,
    INSPECT,
    LIGHTNING,
    TRANSFORMERS,
)


def is_newer(found: object, expected: str) -> bool:
    """Whether a version is a later one of the same kind."""
    number = _number(found, expected)
    return number is not None and number > int(expected.rpartition("-")[2])


def problem(found: object, expected: str, older: str = "") -> str:
    """What is wrong with a version; "" if it is the one that is read.

    Args:
        found: what stands in the place of the version
        expected: the version that is read, one of CURRENT
        older: what to do with an earlier one
    """
    if isinstance(found, str) and found == expected:
        return ""
    text = f"expected format {expected!r}, found {shown(found)}"
    if is_newer(found, expected):
        return f"{text}: a newer twa than {__version__} has written it; install that"
    if older and _number(found, expected) is not None:
        return f"{text}: {older}"
    return text


def _number(found: object, expected: str) -> int | None:
    """The number of a version of the same kind; None if it is none."""
    kind = re.escape(expected.rpartition("-")[0])
    match = re.fullmatch(rf"{kind}-([1-9][0-9]{{0,8}})", found) if isinstance(found, str) else None
    return int(match[1]) if match else None
