"""Standard output and error that cost no run its work: on a full disk, into a closed pipe."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

READER_IS_GONE = (errno.EPIPE, errno.EIO)  # as of `| head`, or of a terminal that was closed


class Stream:
    """A text stream that takes everything, also when it can no longer be written.

    What an encoding has no character for is escaped.

    Args:
        stream: where the text goes

    Attributes:
        error: why nothing goes there any more; or None
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:  # of any type: all else is the stream's own
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text, if that is possible."""
        if self.error is None:
            try:
                self._write(text)
            except OSError as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Hands over what has been written, if that is possible."""
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._give_up(error)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def _give_up(self, error: OSError) -> None:
        """Sends what still waits, and what others write to the same descriptor, nowhere."""
        self.error = error
        with contextlib.suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)


@contextlib.contextmanager
def lasting_streams() -> Iterator[Stream]:
    """A context in which sys.stdout and sys.stderr are such streams; gives the first of them.

    Descriptors that are closed are opened: no file that is written later may get the number of
    standard error, to which libraries write by themselves.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (as long as the process)
    before = sys.stdout, sys.stderr
    ours = Stream(sys.stdout), Stream(sys.stderr)
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in ours)
    try:
        yield ours[0]
    finally:
        for stream in ours:
            stream.flush()
        sys.stdout, sys.stderr = before
