"""`Finding`: one thing that is wrong with candidates, or worth a word, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: "error": the candidates cannot be averaged as they are, or their average is surely
            nonsense; "warning": probably not what was meant; "note"
        kind: short name of what was found, for programs
        message: what was found, and where
        advice: what to do, in one sentence
    """

    severity: str
    kind: str
    message: str
    advice: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.message}. {self.advice[:1].upper()}{self.advice[1:]}."


def some(names: Sequence[object], most: int = 4) -> str:
    """Names in a row, such as "a, b, c, d and 12 more"."""
    shown = ", ".join(str(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def many(count: int, what: str) -> str:
    """A number of things, such as "1 tensor" or "2 tensors"."""
    return f"{count} {what}{'' if count == 1 else 's'}"
