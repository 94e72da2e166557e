"""Everything that needs a GPU, in one command: what is right, what is wrong, how near to a copy.

    python3 bench/gpu_check.py --out FOLDER [--budget 430] [--objects FOLDER]
    python3 bench/gpu_check.py --out FOLDER --only-failed EVENTS     a second round
    python3 bench/gpu_check.py --out FOLDER --variants               launch configurations, A/B
    python3 bench/gpu_check.py --out FOLDER --ncu                    counters of four kernels
    python3 bench/gpu_check.py --out FOLDER --rehearse               on a CPU, with planted faults

For a machine with PyTorch for its GPU; no network, no pip. Each result is one line of
FOLDER/events.jsonl, synced as it comes; page.md and page.png are written at the end, log.txt has
what the programs said. Stages do not depend on each other. What faults or hangs costs one
(op, backend, bits) and nothing else; "not run" is no pass, and the page says why.
Exit status: 0, 1 if something is wrong, 2 if there is no PyTorch or no GPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib.util
import os
import re
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from gpucheck import ROOT, build, counters, machine, page, plan, rehearsal, sanitizer
from gpucheck.children import Child, Hung, Late, Log, Supervisor, label
from gpucheck.events import ABSENT, GOOD, Events, read

#: stage -> share of the budget at whose end it is over; a stage that ends early lets the next begin
ENDS = {"build": 0.45, "smoke": 0.38, "speed": 0.62, "counters": 0.70, "tests": 0.94}
ENDS |= {"memcheck": 0.94, "racecheck": 0.94, "variants": 0.95}


class NotRun(Exception):
    """A stage cannot run here; the message says why."""


class Check:
    """One run: what was found of the machine, and its stages."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.begin = args, time.monotonic()
        self.failed = failed_cases(args.only_failed) if args.only_failed else None
        args.out.mkdir(parents=True, exist_ok=True)
        for name in ("events.jsonl", "log.txt", "page.md", "page.png"):
            (args.out / name).unlink(missing_ok=True)
        self.events, self.log = Events(args.out / "events.jsonl"), Log(args.out / "log.txt")
        self.env = machine.environment(args.rehearse)
        self.supervisor = Supervisor(self.events, self.log, self.env)
        self.found: dict = {}
        self.built, self.writing = threading.Event(), threading.Lock()

    def deadline(self, stage: str) -> float:
        last = ENDS[stage] == max(ENDS[s] for s in self.args.stages)
        return self.begin + self.args.budget * (0.95 if last else ENDS[stage])

    def silence(self, seconds: float) -> float:
        """How long a worker may say nothing, with a compile in it, before it counts as hung."""
        return rehearsal.SILENCE if self.args.rehearse else seconds

    def wanted(self, stage: str, cases: list[dict]) -> list[dict]:
        if self.failed is None:
            return cases
        return [c for c in cases if (stage, label(c)) in self.failed]

    def stage(self, name: str, run: Callable[[], str]) -> None:
        """Runs a stage; whatever it raises is its own result."""
        begin = time.monotonic()
        print(f"{begin - self.begin:6.0f} s  {name}", flush=True)
        try:
            if self.args.rehearse and name == rehearsal.BROKEN_STAGE:
                raise RuntimeError("planted: this stage raises")
            result, note = "done", run()
        except NotRun as reason:
            result, note = "not run", str(reason)
        except Exception as error:
            traceback.print_exc()
            result, note = "error", f"{type(error).__name__}: {error}"
        seconds = round(time.monotonic() - begin, 1)
        self.events.add(stage=name, event="stage", result=result, note=note, seconds=seconds)
        self.write_page()
        print(f"{time.monotonic() - self.begin:6.0f} s  {name}: {result}: {note}", flush=True)

    # Stages --------------------------------------------------------------------------------------

    def probe(self) -> str:
        """What is here. Exits with status 2 where nothing can run."""
        self.found = machine.probe(self.env, self.args.rehearse)
        self.found["commit"] = os.environ.get("TWA_COMMIT") or machine.commit(self.env["PATH"])
        self.events.add(stage="probe", event="probe", **self.found)
        return ", ".join(
            f"{k} {v}" for k, v in self.found.items() if k in ("name", "torch", "triton")
        )

    def build(self) -> str:
        architecture = (
            self.found["architecture"] if build.find_nvcc() and not self.found["hip"] else ""
        )
        command = [sys.executable, "-m", "gpucheck.build", "--module", ROOT / "twa_kernels"]
        command += ["--architecture", architecture]
        command += ["--objects", self.args.objects.resolve()] if self.args.objects else []
        try:
            child = Child("build", command, self.log, self.env)
            for _ in child.output(self.deadline("build"), self.args.budget):
                pass
            if child.process.returncode:
                raise RuntimeError(child.how_it_ended)
        except Exception as error:
            self.supervisor.absent["cuda"] = f"the native module was not built: {error}"
            raise
        finally:
            self.built.set()
        return child.last[-1] + ("" if architecture else ", without CUDA C++: no nvcc, or ROCm")

    def smoke(self) -> str:
        deadline = self.deadline("smoke")
        groups = [self.wanted("smoke", g) for g in plan.smoke(self.args.rehearse)]
        groups = [g for g in groups if g]
        # Triton's compile for most of the time; the others wait for the build, then take no time.
        compiling = threading.Semaphore(max(2, (os.cpu_count() or 2) - 1))

        def run(group: list[dict]) -> None:
            mine = contextlib.nullcontext()
            if group[0]["backend"] == "triton":
                mine = compiling
            else:
                self.built.wait(max(0.0, deadline - time.monotonic()))
            with mine:
                self.supervisor.run("smoke", "smoke", group, deadline, self.silence(120))

        with concurrent.futures.ThreadPoolExecutor(max(1, len(groups))) as pool:
            for job in [pool.submit(run, group) for group in groups]:
                job.result()
        return page.tally(self.events.of("smoke"))

    def speed(self) -> str:
        cases = self.wanted("speed", plan.speed(self.args.rehearse))
        if cases and cases[0]["op"] != "copy":
            copies = [c for c in plan.speed(self.args.rehearse) if c["op"] == "copy"]
            cases = [copies[0], *cases]
        self.supervisor.run("speed", "speed", cases, self.deadline("speed"), self.silence(60))
        return page.tally(self.events.of("speed"))

    def counters(self) -> str:
        ncu = shutil.which("ncu", path=self.env["PATH"])
        if ncu is None:
            raise NotRun("ncu: not found on PATH or in " + str(build.CUDA / "bin"))
        if self.args.ncu:
            chosen = plan.counted()
        else:
            chosen = [g["of"] for g in page.gaps(self.events.rows, self.found)[:3]]
        for k, case in enumerate(chosen):
            left = self.deadline("counters") - time.monotonic()
            self.count(ncu, case, time.monotonic() + left / (len(chosen) - k))
        return page.tally(self.events.of("counters")) or "no gap to look at"

    def count(self, ncu: str, case: dict, deadline: float) -> None:
        names = ("op", "backend", "bits", "n", "dtype", "accuracy")
        case = {k: case[k] for k in names if k in case}
        values, lines = {}, []
        for sections in (False, True):
            lines.clear()
            of = case | ({"metrics": "ncu's own"} if sections else {})
            self.supervisor.run(
                "counters",
                "speed",
                [of],
                deadline,
                self.silence(120),
                counters.command(ncu, sections),
                lines.append,
                {"GPUCHECK_ONCE": "1"},
            )
            values = counters.table(lines)
            if values or time.monotonic() > deadline - 1:
                break
        note = counters.brief(values) if values else "; ".join(lines[-2:]) or "ncu said nothing"
        self.events.add(
            stage="counters", event="counters", of=label(case), counters=values, note=note
        )

    def tests(self) -> str:
        if importlib.util.find_spec("pytest") is None:
            raise NotRun("pytest is not installed for this Python")
        command, env = self.pytest()
        child = Child("tests", command, self.log, env)
        todo: list[str] = []
        running: set[str] = set()
        said: dict[str, str] = {}
        note = ""
        try:
            for word in child.output(self.deadline("tests"), self.args.budget):
                event = word.get("event") if isinstance(word, dict) else ""
                if event == "todo":
                    todo = word["cases"]
                elif event == "running":
                    running.add(word["case"])
                elif event == "test" and said.get(word["case"]) in (None, "right"):
                    # A teardown may fail after the call was right.
                    said[word["case"]] = word["result"]
                    self.say_test(**{k: v for k, v in word.items() if k != "event"})
        except (Late, Hung) as reason:
            note = f"; {reason}"
        if not said and not todo:
            raise RuntimeError(f"no test ran: {child.how_it_ended}")
        for case in todo:
            if case not in said:
                late = case in running
                why = "the stage ended while it ran" if late else "not reached"
                self.say_test(case=case, result="late" if late else "not run", note=why)
        return page.tally(self.events.of("tests")) + note

    def say_test(self, case: str, result: str, note: str, **more) -> None:
        row = self.events.add(stage="tests", case=case, result=result, note=note, **more)
        if result not in GOOD + ABSENT:
            print(f"{row['at']:6.0f} s  tests: {case}: {result}: {note[:160]}", flush=True)

    def pytest(self) -> tuple[list, dict]:
        seconds = rehearsal.TEST_SECONDS if self.args.rehearse else 45
        env = self.env | {"GPUCHECK_TEST_SECONDS": str(seconds)}
        command = [sys.executable, "-m", "pytest", "-p", "gpucheck.pytest_events", "-s", "-q"]
        command += ["-p", "no:cacheprovider", "-p", "no:warnings"]
        command += ["--continue-on-collection-errors"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", "2" if self.args.rehearse else "8", "--max-worker-restart", "200"]
        if self.args.rehearse:
            return [*command, ROOT / "bench/gpucheck/planted_tests.py"], env
        if self.failed is not None:
            names = sorted(name for stage, name in self.failed if stage == "tests")
            if not names:
                raise NotRun("no test failed the last time")
            return [*command, *names], env
        # Only files with GPU tests: others may need packages that this Python lacks.
        files = [p for p in ROOT.glob("tests/*/test_*.py") if re.search(r"\bgpu\b", p.read_text())]
        first = ("test_trainer_gpu", "test_nccl", "test_step", "test_project", "test_reconstruct")
        files.sort(key=lambda p: (first.index(p.stem) if p.stem in first else len(first), p.stem))
        return [*command, "-m", "gpu", *files], env

    def sanitizer(self, tool: str) -> str:
        program = shutil.which("compute-sanitizer", path=self.env["PATH"])
        if program is None:
            raise NotRun("compute-sanitizer: not found on PATH or in " + str(build.CUDA / "bin"))
        command = [program, "--tool", tool, "--target-processes", "application-only"]
        command += sanitizer.options(program, tool)
        groups = [self.wanted(tool, g) for g in plan.sanitized(tool)]

        def run(group: list[dict]) -> None:
            lines: list[str] = []
            self.supervisor.run(
                tool,
                "smoke",
                group,
                self.deadline(tool),
                self.silence(120),
                command,
                lines.append,
                # Without PyTorch's cache each tensor is an allocation of its own: past its end is
                # found.
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            # It reports when it likes, some of it at the end: of the group, not of a case.
            self.events.add(stage=tool, event="sanitized", **sanitizer.verdict(tool, group, lines))

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for job in [pool.submit(run, group) for group in groups if group]:
                job.result()
        found = [
            e for e in self.events.rows if e["stage"] == tool and e.get("event") == "sanitized"
        ]
        return f"{page.tally(self.events.of(tool))}; by the tool: {page.tally(found)}"

    def variants(self) -> str:
        cases = plan.variants()
        self.supervisor.run(
            "variants", "variants", cases, self.deadline("variants"), self.silence(120)
        )
        return page.tally(self.events.of("variants"))

    def run(self) -> int:
        self.stage("probe", self.probe)
        if not self.found:
            return 2
        chosen = self.args.stages
        builder = threading.Thread(target=lambda: self.stage("build", self.build))
        if self.args.rehearse:
            self.built.set()
        else:
            builder.start()
        if "smoke" in chosen:
            self.stage("smoke", self.smoke)
        if not self.args.rehearse:
            builder.join()
        for name in ("speed", "counters", "variants"):  # the GPU to themselves
            if name in chosen:
                self.stage(name, getattr(self, name))
        beside = [threading.Thread(target=self.stage, args=("tests", self.tests_or_full_disk))]
        beside += [
            threading.Thread(target=self.stage, args=(t, lambda t=t: self.sanitizer(t)))
            for t in ("memcheck", "racecheck")
        ]
        names = ("tests", "memcheck", "racecheck")
        beside = [thread for name, thread in zip(names, beside, strict=True) if name in chosen]
        for thread in beside:
            thread.start()
        for thread in beside:
            thread.join()
        return self.finish()

    def tests_or_full_disk(self) -> str:
        if not (self.args.rehearse and rehearsal.FULL_DISK == "tests"):
            return self.tests()
        path, self.events.path = self.events.path, Path("/dev/full")
        try:
            return self.tests()
        finally:
            self.events.path = path

    def write_page(self) -> str:
        """After every stage: a run that is cut off leaves the page so far."""
        with self.writing:
            try:
                text = page.page(list(self.events.rows), self.found)
                (self.args.out / "page.md").write_text(text)
            except Exception as error:
                traceback.print_exc()
                text = f"page: {type(error).__name__}: {error}"
        return text

    def finish(self) -> int:
        if self.events.trouble or self.log.trouble:
            trouble = self.events.trouble or self.log.trouble
            self.events.add(stage="check", event="disk", result="error", note=trouble)
        seconds = round(time.monotonic() - self.begin)
        self.events.add(stage="check", event="end", seconds=seconds, budget=self.args.budget)
        text = self.write_page()
        try:
            page.picture(self.args.out / "page.png", self.events.rows, self.found)
        except Exception as error:
            print(f"page.png: {type(error).__name__}: {error}", flush=True)
        print(f"\n{text}\n{page.summary(self.events.rows, self.found)}")
        if self.args.rehearse:
            missed = rehearsal.misses(self.events.rows)
            print(
                "\n".join(missed) or f"rehearsal: every planted fault is reported, in {seconds} s"
            )
            return int(bool(missed))
        return int(bool(page.wrong(self.events.rows)))


def failed_cases(path: Path) -> set[tuple[str, str]]:
    """(stage, case) of an earlier run that were not right: wrong, faulty, or not run."""
    rows = [r for r in read(path) if "case" in r]
    return {(r["stage"], r["case"]) for r in rows if r["result"] not in GOOD}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="results go here")
    parser.add_argument(
        "--budget", type=float, default=430.0, metavar="SECONDS", help="all in all (430)"
    )
    parser.add_argument("--objects", type=Path, metavar="FOLDER", help="made by `make gpu-objects`")
    parser.add_argument(
        "--only-failed", type=Path, metavar="EVENTS", help="events.jsonl of an earlier run"
    )
    parser.add_argument(
        "--variants", action="store_true", help="launch configurations side by side"
    )
    parser.add_argument("--ncu", action="store_true", help="hardware counters of four kernels")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with planted faults")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", choices=tuple(ENDS)[1:])
    args = parser.parse_args()
    only = ["variants"] * args.variants + ["counters"] * args.ncu
    every = ["smoke", "speed", "counters", "tests", "memcheck", "racecheck"]
    args.stages = args.stages or only or every
    if args.rehearse:
        args.stages = [s for s in args.stages if s not in ("memcheck", "racecheck")]
    return Check(args).run()


if __name__ == "__main__":
    sys.exit(main())
