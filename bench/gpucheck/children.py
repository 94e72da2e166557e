"""Child processes whose faults and hangs cost one case.

A worker is a module with `serve`: it reads a list of cases, announces each before it runs it, and
says what came of it. When it dies or falls silent, the case in hand is to blame: it is recorded,
what shares its (op, backend, bits) is dropped, and a new worker goes on with the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .events import Events, emit, parse

ROOT = Path(__file__).resolve().parents[2]
FAULT = 70  # exit status of a worker whose device reports an error that does not go away
LOG_BYTES = 12 << 20
START_SECONDS = 60.0  # until the first event: imports, the device's context


class Late(Exception):
    """A stage's time is over."""


class Hung(Exception):
    """A child has been silent for too long."""


class Log:
    """What children print beside events: one file for all, each line with its child's name."""

    def __init__(self, path: Path) -> None:
        self.path, self.left, self.trouble = path, LOG_BYTES, ""
        self._lock = threading.Lock()

    def write(self, name: str, line: str) -> None:
        text = f"[{name}] {line[:2000]}\n".encode(errors="replace")
        with self._lock:
            if self.left < len(text):
                return
            try:
                with open(self.path, "ab") as file:
                    file.write(text)
                self.left -= len(text)
            except OSError as error:
                self.trouble = str(error.strerror)


class Child:
    """A process in a session of its own. `last`: its last lines of output that are not events."""

    def __init__(self, name: str, command: Sequence, log: Log, env: dict, given: str = "") -> None:
        self.name, self.last = name, []
        log.write(name, f"$ {shlex.join(map(str, command))}")
        self.process = subprocess.Popen(
            [str(c) for c in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=env,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        self._lines: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, args=(log,), daemon=True).start()
        threading.Thread(target=self._give, args=(given,), daemon=True).start()

    def _give(self, given: str) -> None:
        try:
            self.process.stdin.write(given)
            self.process.stdin.close()
        except OSError:  # it ended before it had read everything
            pass

    def _read(self, log: Log) -> None:
        for line in self.process.stdout:
            line = line.rstrip("\n")
            if line:
                event = parse(line)
                if event is None:
                    log.write(self.name, line)
                self._lines.put(event if event is not None else line)
        self._lines.put(None)

    def output(self, deadline: float, silence: float, start: float = 0.0) -> Iterator[dict | str]:
        """Events, and lines that are none, as they come. Raises Late or Hung; ends the process."""
        patience = max(start, silence)
        try:
            while True:
                now = time.monotonic()
                if now >= deadline:
                    raise Late(f"ended when the stage's time was over (pid {self.process.pid})")
                try:
                    found = self._lines.get(timeout=max(0.01, min(patience, deadline - now)))
                except queue.Empty:
                    if time.monotonic() >= deadline:
                        continue
                    raise Hung(f"no word for {patience:.0f} s") from None
                if found is None:
                    break
                if isinstance(found, dict):
                    patience = silence
                else:
                    self.last = [*self.last[-11:], found]
                yield found
            self.process.wait(timeout=10)
        finally:
            self.end()

    def end(self) -> None:
        """The process and all it started. One that does not even die is left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            print(f"{self.name}: process {self.process.pid} does not end", flush=True)

    @property
    def how_it_ended(self) -> str:
        code = self.process.poll()
        how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit status {code}"
        # A signal's own report on standard error is the last line already.
        return f"{how}: {self.last[-1][:160]}" if self.last else how


def label(case: dict) -> str:
    return " ".join(str(v) for v in case.values())


def kind(case: dict) -> tuple:
    """What a fault drops: one op of one backend at one bit width."""
    return case.get("op"), case.get("backend"), case.get("bits")


class Supervisor:
    """Runs workers for one check."""

    def __init__(self, events: Events, log: Log, env: dict) -> None:
        self.events, self.log, self.env = events, log, env
        self.dropped: dict[tuple, str] = {}  # kind -> why

    def run(
        self,
        stage: str,
        worker: str,
        cases: Sequence[dict],
        deadline: float,
        silence: float,
        prefix: Sequence = (),
        on_line: Callable[[str], str | None] = lambda line: None,
        env: dict | None = None,
    ) -> None:
        """Every case gets one event, whatever happens. `on_line` may see a fault in the output."""
        left = {}
        for case in cases:
            if kind(case) in self.dropped:
                self._say(stage, case, "dropped", self.dropped[kind(case)])
            else:
                left[label(case)] = case
        starts = 0
        while left and starts < 2 and time.monotonic() < deadline - 1:
            command = [*prefix, sys.executable, "-m", f"gpucheck.{worker}"]
            name = f"{stage} {' '.join(sorted({str(c.get('backend', '')) for c in left.values()}))}"
            child = Child(
                name, command, self.log, self.env | (env or {}), json.dumps(list(left.values()))
            )
            current, seen, found, began = None, "", "", time.monotonic()
            try:
                for word in child.output(deadline, silence, START_SECONDS):
                    if isinstance(word, str):
                        seen = seen or (on_line(word) or "")
                    elif word["event"] == "begin":
                        current, seen, began = word["case"], "", time.monotonic()
                    elif word["event"] == "end":
                        case, current = left.pop(word["case"]), None
                        fields = {k: v for k, v in word.items() if k not in ("event", "case")}
                        if seen:
                            fields |= {"result": "wrong", "note": seen}
                        self._say(stage, case, **fields)
                        if fields["result"] == "fault":
                            self._drop(stage, left, case, fields["note"])
                        starts = 0
                    else:
                        self.events.add(stage=stage, **word)
                found = "" if child.process.returncode in (0, FAULT) else child.how_it_ended
                result = "fault"
                if not found and child.process.returncode == 0:
                    break
            except Late:
                if current:
                    self._say(
                        stage,
                        left.pop(current),
                        "late",
                        f"the stage ended {time.monotonic() - began:.0f} s into it",
                    )
                break
            except Hung as reason:
                found, result = str(reason), "hang"
            if current:
                case = left.pop(current)
                self._say(stage, case, result, found, seconds=round(time.monotonic() - began, 2))
                self._drop(stage, left, case, f"{result} in {stage}: {found}")
            elif found:
                starts += 1
                self.events.add(
                    stage=stage, result="error", note=f"{name}: {found}, with no case in hand"
                )
        for case in left.values():
            why = (
                "no time was left"
                if time.monotonic() >= deadline - 1
                else "its worker said nothing of it"
            )
            self._say(stage, case, "not run", why)

    def _say(self, stage: str, case: dict, result: str, note: str = "", **more) -> None:
        row = self.events.add(
            stage=stage, case=label(case), **case, result=result, note=note, **more
        )
        if result not in ("right", "measured"):
            print(f"{row['at']:6.0f} s  {stage}: {row['case']}: {result}: {note}", flush=True)

    def _drop(self, stage: str, left: dict, case: dict, why: str) -> None:
        self.dropped[kind(case)] = why
        for name in [name for name, other in left.items() if kind(other) == kind(case)]:
            self._say(stage, left.pop(name), "dropped", why)


# The other side ----------------------------------------------------------------------------------


def serve(run: Callable[[dict], dict], wait: Callable[[], object]) -> None:
    """A worker's whole program: run(case) -> fields of its event. wait() waits for the device."""
    for case in json.load(sys.stdin):
        emit(1, event="begin", case=label(case))
        begin = time.monotonic()
        try:
            found = {"result": "right", "note": ""} | run(case)
        except Exception as error:
            traceback.print_exc()
            found = {"result": "error", "note": one_line(error)}
        try:
            wait()
        except Exception as error:  # of this case or not: nothing that follows here would be true
            found, sick = {"result": "fault", "note": one_line(error)}, True
        else:
            sick = False
        emit(1, event="end", case=label(case), seconds=round(time.monotonic() - begin, 2), **found)
        if sick:
            os._exit(FAULT)


def one_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:200]}"
