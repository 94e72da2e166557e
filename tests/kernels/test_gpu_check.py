"""bench/gpu_check.py as far as it goes without a GPU: the rehearsal with its planted faults, and
its parts.
"""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import processes
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from gpucheck import build, counters, events, page, plan, rehearsal, sanitizer  # noqa: E402
from gpucheck.children import Log, Supervisor, label  # noqa: E402

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
EVERY = [c for group in plan.smoke(False) for c in group] + plan.speed(False) + plan.variants()


def run(*command, **environment):
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return processes.run([sys.executable, *command], cwd=ROOT, env=env)


@no_gpu
def test_stops_with_a_clear_message_without_a_gpu(tmp_path):
    done = run("bench/gpu_check.py", "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and torch.__version__ in done.stderr
    assert (
        "torch.cuda.is_available() is False" in done.stderr and len(done.stderr.splitlines()) == 1
    )


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    out = tmp_path_factory.mktemp("rehearsal")
    done = run("bench/gpu_check.py", "--rehearse", "--out", str(out), "--budget", "1e6")  # no limit
    return done, out, events.read(out / "events.jsonl")


def test_every_planted_fault_is_reported_and_costs_only_itself(rehearsed):
    done, _, rows = rehearsed
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert rehearsal.misses(rows) == []
    assert done.stdout.splitlines()[-1].startswith("rehearsal: every planted fault is reported")
    # One event per case, whatever happened; the full disk lost none.
    named = [(r["stage"], r["case"]) for r in rows if "case" in r]
    planned = [("smoke", label(c)) for group in plan.smoke(True) for c in group]
    planned += [("speed", label(c)) for c in plan.speed(True)]
    assert len(named) == len(set(named)) and set(planned) <= set(named)
    # What was dropped was dropped for a fault of its own kind.
    for r in rows:
        if r.get("result") == "dropped":
            assert (r["op"], r["backend"], r["bits"]) in {kind[1:] for kind in rehearsal.PLANTED}


def test_the_page_says_what_is_wrong_and_why(rehearsed):
    done, out, _ = rehearsed
    text = (out / "page.md").read_text()
    assert text in done.stdout
    wrong = text[text.index("## Wrong") : text.index("## Not run")]
    for line in (
        "project triton 4 5 fp32: hang",
        "step cuda 1 5 fp32: fault: signal SIGABRT",
        "relative error",
        "this stage raises",
    ):
        assert line in wrong
    assert (
        "test_dies: fault" in wrong
        and "test_hangs: hang" in wrong
        and "No space left on device" in wrong
    )
    assert "hang in smoke: no word for" in text[text.index("## Not run") :]
    assert "missing tools: nvcc, g++, git" in text and (out / "page.png").stat().st_size > 5000


def test_misses_finds_what_is_not_reported(rehearsed):
    *_, rows = rehearsed
    for stage, op in (("smoke", "project"), ("speed", "pack"), ("tests", None), ("counters", None)):
        fewer = [r for r in rows if r["stage"] != stage or r.get("op") != op]
        assert rehearsal.misses(fewer), (stage, op)
    other = [
        r | {"result": "wrong"} if r.get("op") == "step" and r.get("bits") == 8 else r for r in rows
    ]
    assert any("though nothing was planted" in m for m in rehearsal.misses(other))


def test_a_second_round_takes_what_was_not_right(rehearsed):
    """--only-failed: wrong, faulty, dropped and not run; not what was right."""
    _, out, rows = rehearsed
    specification = importlib.util.spec_from_file_location("gpu_check", ROOT / "bench/gpu_check.py")
    gpu_check = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(gpu_check)
    failed = gpu_check.failed_cases(out / "events.jsonl")
    assert ("smoke", "project triton 4 5 fp32") in failed and (
        "smoke",
        "project triton 4 5 fp32 unaligned",
    ) in failed
    assert failed == {
        (r["stage"], r["case"]) for r in rows if "case" in r and r["result"] not in events.GOOD
    }
    assert ("smoke", "project triton 8 5 fp32") not in failed


# Parts -------------------------------------------------------------------------------------------


def test_events_survive_a_full_disk_and_a_cut_line(tmp_path, capsys):
    log = events.Events(tmp_path / "events.jsonl")
    log.add(stage="a", case="1", result="right")
    path, log.path = log.path, Path("/dev/full")
    log.add(stage="a", case="2", result="right")
    assert "No space left on device" in capsys.readouterr().out and log.unsaved == 1
    with open(path, "a") as file:
        file.write('{"stage": "half a li')
    log.path = path
    log.add(stage="a", case="3", result="wrong")
    assert [r["case"] for r in events.read(path)] == ["1", "2", "3"] and log.unsaved == 0
    assert [r["case"] for r in log.of("a")] == ["1", "2", "3"]


def test_a_worker_that_never_starts_is_not_tried_for_ever(tmp_path):
    log = events.Events(tmp_path / "events.jsonl")
    workers = Supervisor(
        log, Log(tmp_path / "log.txt"), os.environ | {"PYTHONPATH": str(ROOT / "bench")}
    )
    cases = [plan.packed("project", "cuda", bits) for bits in (4, 8)]
    workers.run("smoke", "no_such_worker", cases, time.monotonic() + 1e6, 1e6)
    assert [r["result"] for r in log.of("smoke")] == ["not run", "not run"]
    errors = [r["note"] for r in log.rows if r["result"] == "error"]
    assert len(errors) == 2 and all(
        "No module named gpucheck.no_such_worker" in note for note in errors
    )


def test_no_time_left_is_said_for_each_case(tmp_path):
    log = events.Events(tmp_path / "events.jsonl")
    Supervisor(log, Log(tmp_path / "log.txt"), dict(os.environ)).run(
        "smoke", "smoke", plan.counted(), time.monotonic(), 9
    )
    assert {(r["result"], r["note"]) for r in log.of("smoke")} == {("not run", "no time was left")}


def test_cases_have_names_of_their_own():
    sanitized = [c for g in plan.sanitized("memcheck") for c in g]
    for cases in (
        [c for g in plan.smoke(False) for c in g],
        plan.speed(False),
        sanitized,
        plan.variants(),
    ):
        assert len({label(c) for c in cases}) == len(cases)
    found = {(c["op"], c["backend"], c.get("bits")) for c in EVERY}
    for op in ("project", "reconstruct", "step", "pack"):
        assert {(op, b, bits) for b in ("cuda", "triton") for bits in (8, 4, 3, 2, 1)} <= found


def test_direct_build_knows_the_flags_of_cmake():
    """The build for machines without CMake takes its flags from CMakeLists.txt; those that fix bits
    must be among them.
    """
    assert "-ffp-contract=off" in build.cmake_flags(
        "twa_core"
    ) and "-fmad=false" in build.cmake_flags("twa_cuda")


def test_objects_are_used_for_the_sources_they_were_made_from(tmp_path, monkeypatch, capsys):
    made = {"architecture": "90", "digest": build.digest("90")}
    names = build.commands("90")
    assert next(iter(names)) == "cuda_step.cu.o" and "cpu_pack.cpp.o" in names
    for name in [n for n in names if n != "cpu_pack.cpp.o"]:
        (tmp_path / name).touch()
    (tmp_path / "objects.json").write_text(json.dumps(made))
    assert set(build.usable_objects(tmp_path, "90")) == set(names) - {"cpu_pack.cpp.o"}
    assert build.usable_objects(tmp_path, "80") == {} == build.usable_objects(None, "90")
    monkeypatch.setattr(build, "cmake_flags", lambda target: ["-O0"])
    assert build.usable_objects(tmp_path, "90") == {} and "not used" in capsys.readouterr().out


CSV = (
    '"ID","Kernel Name","gpu__time_duration.sum",'
    '"dram__throughput.avg.pct_of_peak_sustained_elapsed","dram__bytes.sum"\n'
    '"","","ns","%","byte"\n'
    '"0","sum_kernel","4,100","3.5","1,500,000"\n'
    '"1","project_kernel","512,300","91.25","1,480,000,000"\n'
)


def test_counters_of_the_longest_launch():
    values = counters.table(["==PROF== Connected", *CSV.splitlines()])
    assert values == {
        "ms": pytest.approx(0.5123),
        "dram % of peak": 91.25,
        "dram GB": pytest.approx(1.48),
    }
    assert counters.table(["==ERROR== LibraryNotLoaded"]) == {}
    assert "dram % of peak 91.2" in counters.brief(values)


MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at twa::project_kernel<4, 5>(twa::ProjectArguments)+0x1230
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize(
    ("tool", "lines", "result", "note"),
    [
        ("memcheck", MEMCHECK, "wrong", "Invalid __global__ read of size 16 bytes"),
        ("memcheck", "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors", "right", ""),
        ("memcheck", "========= ERROR SUMMARY: 7 errors", "wrong", "7 errors"),
        (
            "racecheck",
            (
                "========= Error: Race reported between Write access\n========= RACECHECK SUMMARY:"
                " 1 hazard displayed"
            ),
            "wrong",
            "Race",
        ),
        (
            "racecheck",
            "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
            "right",
            "",
        ),
        (
            "racecheck",
            "========= Warning: Detected overflow of tracked cuda::barrier structures",
            "wrong",
            "overflow of tracked",
        ),
        (
            "memcheck",
            "========= Error: Target application terminated before first instrumented API call",
            "not run",
            "no summary",
        ),
        ("memcheck", "========= Device not supported", "not run", "not supported"),
        ("memcheck", "Traceback", "not run", "no summary"),
    ],
)
def test_what_a_sanitizer_says(tool, lines, result, note):
    found = sanitizer.verdict(tool, plan.sanitized(tool)[0], lines.splitlines())
    assert found["result"] == result and note in found["note"] and found["of"] == "project cuda"


def test_a_sanitizers_options_are_those_that_it_knows(tmp_path):
    program = tmp_path / "compute-sanitizer"
    program.write_text("#!/bin/sh\necho '--print-limit --num-cuda-barriers --report-api-errors'\n")
    program.chmod(0o755)
    assert sanitizer.options(str(program), "racecheck") == [
        "--print-limit",
        "0",
        "--num-cuda-barriers",
        "64",
    ]
    assert sanitizer.options(str(program), "memcheck") == [
        "--print-limit",
        "0",
        "--report-api-errors",
        "no",
    ]
    assert sanitizer.options(str(tmp_path / "none"), "memcheck") == []


def measured(op, backend, ms, nbytes, bits=4, n=72):
    case = plan.packed(op, backend, bits, n)
    more = {
        "result": "measured",
        "note": "",
        "ms": ms,
        "bytes": nbytes,
        "host_us": 9.0,
        "D": 1000,
        "at": 1,
    }
    return {"stage": "speed", "case": label(case)} | case | more


def test_gaps_are_shares_of_the_copy_below_what_is_expected():
    rows = [measured("copy", "torch", 1.0, 3e9, 8, 1), measured("copy", "torch", 1.1, 3e9, 8, 2)]
    rows += [
        measured("project", "cuda", 0.48, 1.44e9),
        measured("step", "cuda", 1.0, 1.5e9),
        measured("gram", "triton", 1.0, 0.9e9),
    ]
    rows += [measured("project", "published arithmetic", 9.0, 1e9)]
    h100 = {"multiprocessors": 132, "name": "a GPU"}
    assert page.copy_rate(rows) == pytest.approx(3e12)
    # 30 %, 50 %; project has 100 %
    assert [g["of"]["op"] for g in page.gaps(rows, h100)] == ["gram", "step"]
    assert 90 < page.predicted(rows[2], h100, 3e12) < 100
    # Less time per byte, fewer instructions: what an H200 can hope for is no more than an H100 can.
    one_bit = measured("project", "cuda", 1.0, 1e9, bits=1)
    assert page.predicted(one_bit, h100, 4.3e12) < page.predicted(one_bit, h100, 3.0e12)
    text = page.page(
        [*rows, {"stage": "check", "event": "end", "seconds": 3, "budget": 400.0}], h100
    )
    assert "gram triton 4 72 fp32: 30 % of a copy, expected 90 %" in text


def test_a_log_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("gpucheck.children.LOG_BYTES", 100)
    log = Log(tmp_path / "log.txt")
    for _ in range(50):
        log.write("child", "a line that is not short")
    assert (tmp_path / "log.txt").stat().st_size <= 100


def test_benchmarks_name_no_commit_where_there_is_no_git(monkeypatch):
    import common

    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert common.commit() == common.hardware()["commit"] == "unknown"
