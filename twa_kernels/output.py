"""What a command does when nobody reads any more what it prints, as after `| head`."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Iterator

UNREAD = 128 + 13  # the exit status that a shell gives a program that SIGPIPE ends


def is_unread(error: BaseException) -> bool:
    """Whether an error is that nobody reads standard output or standard error any more."""
    return isinstance(error, BrokenPipeError) and bool(_unread())


def _unread() -> list[int]:
    """Those of the two, as file descriptors, that are a pipe which nobody reads."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError):  # None; a test's, without a descriptor
            poll.register(stream.fileno(), 0)  # for errors alone
    return [descriptor for descriptor, _ in poll.poll(0)]


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Ends the process without a word, as other tools end, once nobody reads what it prints.

    Raises:
        SystemExit: with status 141 in that case
    """
    try:
        try:
            yield
        except SystemExit:  # --help
            print(end="", flush=True)
            raise
        print(end="", flush=True)  # here, not at Python's end, which would complain
    except BrokenPipeError as error:
        if not is_unread(error):
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in _unread():
            os.dup2(nowhere, descriptor)  # Python's end writes what is left
        sys.exit(UNREAD)
