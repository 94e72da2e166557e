"""Results as JSON lines: a child prints them, the check appends them to one file and syncs each.

A run that is cut off at any moment leaves every result that came before. A disk that is full costs
nothing but the file: lines are kept, and written as soon as the disk takes them again.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

MARK = "@event "
GOOD = ("right", "measured", "skipped")
ABSENT = ("not run", "late", "dropped")  # no pass and no failure of its own


def emit(to: int, **fields) -> None:
    """From a child: one line to a file descriptor, whole even if others print there too."""
    os.write(to, f"\n{MARK}{json.dumps(fields)}\n".encode())


def parse(line: str) -> dict | None:
    """The event in a line of output, if it is one."""
    if not line.startswith(MARK):
        return None
    try:
        return json.loads(line[len(MARK) :])
    except ValueError:
        return None


def read(path: Path) -> list[dict]:
    """Events of an earlier run; a line that was cut off is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


class Events:
    """All results of a run, in memory and in a file. Used by several threads."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows, self.trouble = path, [], ""
        self._unsaved: list[str] = []
        self._lock, self._begin = threading.Lock(), time.monotonic()

    def add(self, **fields) -> dict:
        with self._lock:
            row = {"at": round(time.monotonic() - self._begin, 2), **fields}
            self.rows.append(row)
            self._unsaved.append(json.dumps(row))
            self._save()
        return row

    def _save(self) -> None:
        # The line break in front ends what an earlier attempt may have left half written.
        data = "".join(
            ["\n"] * bool(self.trouble) + [f"{line}\n" for line in self._unsaved]
        ).encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
        except OSError as error:
            if not self.trouble:
                print(
                    f"{self.path.name}: {error.strerror}; results are kept until it can be written",
                    flush=True,
                )
            self.trouble = f"{error.strerror} (first at {self.rows[-1]['at']} s)"
        else:
            self._unsaved.clear()

    @property
    def unsaved(self) -> int:
        return len(self._unsaved)

    def of(self, *stages: str) -> list[dict]:
        """Results of single cases of these stages."""
        with self._lock:
            return [r for r in self.rows if r["stage"] in stages and "case" in r]
