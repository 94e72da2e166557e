"""Advice on what to do after an error or Ctrl-C: a command gives it, `main` prints it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def advising(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Gives advice to whatever exception leaves this context, unless an inner one has.

    Args:
        how_to_go_on: is asked for the advice; "" if there is none
    """
    try:
        yield
    except BaseException as error:
        try:
            _advise(error, how_to_go_on)
        except KeyboardInterrupt as again:  # a second Ctrl-C
            _advise(again, how_to_go_on)
            raise
        raise


def _advise(error: BaseException, how_to_go_on: Callable[[], str]) -> None:
    """Gives advice to an exception."""
    if not advice_of(error):
        vars(error)["twa_advice"] = how_to_go_on()  # vars: it may be any exception


def to_resume(overwrite: bool, state: Path) -> str:
    """Advice to continue from a saved state."""
    instead = " in place of --overwrite" if overwrite else ""
    return f"continue with the same command and --resume{instead} ({state})"


def advice_of(error: BaseException) -> str:
    """The advice that an exception carries, or one during which it came, such as Ctrl-C; or ""."""
    link: BaseException | None = error
    while link is not None:
        if text := getattr(link, "twa_advice", ""):
            return str(text)
        link = link.__context__
    return ""
