"""Errors about what was given, as one family: `except twa.TwaError` catches all of them.

Anything else that is raised is a fault of this package, or of the user's own functions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class TwaError(ValueError):
    """Something that was given is wrong; the message says what was expected and what was found.

    Attributes:
        problem: what is wrong
        where: the file, argument or setting that it is about; "" if `problem` says so itself
    """

    def __init__(self, problem: str, where: object = "") -> None:
        self.problem, self.where = problem, str(where)
        super().__init__(f"{self.where}: {problem}" if self.where else problem)


def check_type(name: str, value: object, kind: type, expected: str) -> None:
    """TwaError unless an argument is of a type.

    Args:
        name: of the argument
        value: what was given
        kind: the type
        expected: the type in words
    """
    if not isinstance(value, kind):
        found = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise TwaError(f"expected {expected}, found {found}", name)


class CandidateError(TwaError):
    """A checkpoint cannot be read, or does not fit the others or the model."""


@contextlib.contextmanager
def reading(where: object = "") -> Iterator[None]:
    """Makes an OSError from inside, such as that of a file of another user, a CandidateError."""
    try:
        yield
    except OSError as error:
        raise CandidateError(
            f"cannot be read ({error.strerror or error})", error.filename or where
        ) from error


class NoWeights(CandidateError):
    """A file or directory is not damaged, but there are no weights in it.

    It is left out where a directory or a pattern brought it, and an error where it was named.
    """


class NewerVersion(CandidateError):
    """A file is not damaged, but a newer twa has written it: nothing may be made of it."""


class CandidateWarning(UserWarning):
    """Candidates are used in another way than was perhaps meant; the message says how."""


class BasisError(TwaError):
    """A file is no packed basis, or none that fits."""


class TaskError(TwaError):
    """A task cannot be loaded, or does not keep its contract."""


class StateError(TwaError):
    """A saved state cannot be continued."""


class OutputError(TwaError):
    """An output cannot be written where it was asked for."""
