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
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from . import ROOT
from .events import Events, emit, parse

FAULT = 70  # exit status of a worker whose device reports an error that does not go away
LOG_BYTES = 12 << 20
START_SECONDS = 90.0  # until the first event: imports, the device's context


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

    def __init__(self, name: str, command: Sequence, log: Log, env: dict) -> None:
        self.name, self.last, self.reported = name, [], 0
        self.rehearses, self.used = env.get("GPUCHECK_PLANTED") == "1", 0.0
        log.write(name, f"$ {shlex.join(map(str, command))}")
        self.process = subprocess.Popen(
            [str(c) for c in command],
            stdin=subprocess.DEVNULL,
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
        """Events, and lines that are none, as they come. Raises Late or Hung; ends the process.

        silence   seconds without a word after which it is hung; `start` before the first event.
                  An event may set another one until the next: {"patience": seconds}

        In a rehearsal what hangs sleeps: a child that has used the CPU meanwhile is only slow. On
        a GPU one that hangs may use it, too.
        """
        patience, heard = max(start, silence), time.monotonic()
        try:
            while True:
                now = time.monotonic()
                if now >= deadline:
                    raise Late(f"ended when the stage's time was over (pid {self.process.pid})")
                if now - heard >= patience and self.rehearses and self._has_worked():
                    heard = now
                if now - heard >= patience:
                    raise Hung(f"no word for {patience:.0f} s")
                try:
                    found = self._lines.get(timeout=0.5)
                except queue.Empty:
                    if self.process.poll() is not None:
                        break  # dead, though something that it started holds its output open
                    continue
                if found is None:
                    break
                heard = time.monotonic()
                if isinstance(found, dict):
                    patience = found.get("patience", silence)
                else:
                    self.last = [*self.last[-11:], found]
                yield found
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10)
        finally:
            self.end()

    def _has_worked(self) -> bool:
        """Whether it has used the CPU since this was last asked; False where there is no /proc."""
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            before, self.used = self.used, sum(map(int, stat[11:15])) / os.sysconf("SC_CLK_TCK")
            return self.used - before > 0.1
        return False

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
        self.absent: dict[str, str] = {}  # backend -> why

    def run(
        self,
        stage: str,
        worker: str,
        cases: Sequence[dict],
        deadline: float,
        silence: float,
        prefix: Sequence = (),
        on_line: Callable[[str], object] = lambda line: None,
        env: dict | None = None,
    ) -> None:
        """Every case gets one event, whatever happens.

        prefix    a program that runs the worker, such as a profiler
        on_line   is called with each line of output that is not an event
        """
        left = {}
        for case in cases:
            why = self.absent.get(case["backend"]) or self.dropped.get(kind(case))
            if why:
                self._say(stage, case, "dropped", why)
            else:
                left[label(case)] = case
        why = ""
        try:
            with tempfile.TemporaryDirectory(prefix="gpucheck-") as folder:
                given = Path(folder) / "cases.json"
                command = [*prefix, sys.executable, "-m", f"gpucheck.{worker}", given]
                starts = 0
                while left and starts < 2 and time.monotonic() < deadline - 1:
                    given.write_text(json.dumps(list(left.values())))
                    names = " ".join(sorted({f"{c['op']} {c['backend']}" for c in left.values()}))
                    name = f"{stage} {names[:60]}"
                    child = Child(name, command, self.log, self.env | (env or {}))
                    if not self._follow(stage, child, left, deadline, silence, on_line):
                        break
                    starts = 0 if child.reported else starts + 1
        except Exception as error:
            traceback.print_exc()
            why = one_line(error)
        for case in left.values():
            late = time.monotonic() >= deadline - 1
            said = "no time was left" if late else "its worker said nothing of it"
            self._say(stage, case, "not run", why or said)

    def _follow(self, stage, child, left, deadline, silence, on_line) -> bool:
        """One worker until it ends; what it reported leaves `left`. False: no other follows."""
        current, launched, began, result = None, False, time.monotonic(), "fault"
        try:
            for word in child.output(deadline, silence, START_SECONDS):
                if isinstance(word, str):
                    on_line(word)
                elif word["event"] == "begin":
                    current, launched, began = word["case"], False, time.monotonic()
                elif word["event"] == "launched":
                    launched = True
                elif word["event"] == "end":
                    case, current = left.pop(word["case"]), None
                    child.reported += 1
                    fields = {k: v for k, v in word.items() if k not in ("event", "case")}
                    self._say(stage, case, **fields)
                    if fields["result"] == "fault":
                        self._drop(stage, left, case, fields["note"], True)
                else:
                    self.events.add(stage=stage, **word)
            if child.process.returncode in (0, FAULT) and current is None:
                return child.process.returncode == FAULT
            found = child.how_it_ended
        except Late:
            if current:
                seconds = time.monotonic() - began
                self._say(
                    stage, left.pop(current), "late", f"the stage ended {seconds:.0f} s into it"
                )
            return False
        except Hung as reason:
            found, result = str(reason), "hang"
        if current:
            case = left.pop(current)
            child.reported += 1
            self._say(stage, case, result, found, seconds=round(time.monotonic() - began, 2))
            # A case that never came to its launch may only have compiled for long: of this stage.
            everywhere = result == "fault" or launched
            self._drop(stage, left, case, f"{result} in {stage}: {found}", everywhere)
        elif left:
            note = f"{child.name}: {found}, with no case in hand"
            self.events.add(stage=stage, result="error", note=note)
        return True

    def _say(self, stage: str, case: dict, result: str, note: str = "", **more) -> None:
        row = self.events.add(
            stage=stage, case=label(case), **case, result=result, note=note, **more
        )
        if result not in ("right", "measured"):
            print(f"{row['at']:6.0f} s  {stage}: {row['case']}: {result}: {note}", flush=True)

    def _drop(self, stage: str, left: dict, case: dict, why: str, everywhere: bool) -> None:
        if everywhere:
            self.dropped[kind(case)] = why
        for name in [name for name, other in left.items() if kind(other) == kind(case)]:
            self._say(stage, left.pop(name), "dropped", why)


# The other side ----------------------------------------------------------------------------------

#: how long a kernel may run once it is launched
KERNEL_SECONDS = 20.0


def launched() -> None:
    """From a worker, between a call and the wait: what is silent from here on is the device."""
    emit(1, event="launched", patience=KERNEL_SECONDS)


def serve(run: Callable[[dict], dict], wait: Callable[[], object]) -> None:
    """A worker's whole program: run(case) -> fields of its event. wait() waits for the device."""
    for case in json.loads(Path(sys.argv[1]).read_text()):
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
        seconds = round(time.monotonic() - begin, 2)
        emit(1, event="end", case=label(case), seconds=seconds, **found)
        if sick:
            os._exit(FAULT)


def one_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:200]}"
