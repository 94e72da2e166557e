"""The tests once for each setting of a table: instruction sets, threads, load, order, and more.

    python bench/suite.py [--only NAME ...] [--resume | --again] [--part PART] [--save]
    python bench/suite.py --list           the settings

A setting's result is kept in build/suite/NAME.json as it comes, its output in NAME.txt beside it:
a run can be cut into pieces. --save writes bench/results/suite.md and .json from all that are kept.

--only     only these settings
--resume   leaves out settings with a kept result in which no test failed
--again    of a kept result only the tests that failed; the page says which passed then
--part     which tests: "all"; "numbers", without what depends on no CPU (APART below); "kernels",
           those of the CPU kernels and of what is next to them. Each setting has its own.
--tests    files or folders of tests in place of all
--kept     a folder in place of build/suite

Exit status 1 if a test failed, or a run broke off. Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT, PAGE = ROOT / "build" / "suite", ROOT / "bench" / "results" / "suite"

#: of PyTorch's own sums: its loops, MKL's and oneDNN's matrix products
LOWEST = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
#: what depends on no CPU, or is for GPUs: compiled, interpreted and emulated kernels, documents,
#: damaged files, texts
APART = (
    *("tests/test_build.py", "tests/test_docs.py", "tests/test_rooms.py", "tests/claims"),
    *("tests/cli", "tests/distributed", "tests/export", "tests/inspection", "tests/integrations"),
    *("tests/io", "tests/merge/test_crash.py", "tests/merge/test_resume.py", "tests/recorder"),
    *(
        f"tests/kernels/test_{name}.py"
        for name in (
            *("compile", "cpu_bound", "cuda", "cuda_host", "gpu_check", "gpu_model"),
            *("machine_code", "offsets", "orthonormalize_cuda", "tiers", "tune", "words"),
        )
    ),
)
NO_GPU = "not triton and not cuda"
#: what an instruction set of the kernels decides; orthonormalize, tiers and others try all of them
#: whichever is set
KERNELS = (
    *("tests/merge/test_zoo.py", "tests/test_averages.py", "tests/test_gradient_contract.py"),
    *("tests/test_optimizer.py", "tests/test_subspace.py"),
    *(
        f"tests/kernels/test_{name}.py"
        for name in ("gram", "native", "project", "reconstruct", "recorded", "step")
    ),
)
PARTS = {"all": [], "numbers": [*(f"--ignore={name}" for name in APART), "-k", NO_GPU]}
PARTS["kernels"] = [*KERNELS, "-k", NO_GPU]


@dataclass
class Setting:
    """Where the tests run, and which.

    Attributes:
        environment: variables; one for instruction sets or threads that is not here is not set
        arguments: of pytest
        part: of the tests, a name of PARTS
        loops: processes beside it that use a core each
        cores: on how many cores it runs; 0: on all
    """

    environment: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    part: str = "numbers"
    loops: int = 0
    cores: int = 0


def settings(isas: list[str]) -> dict[str, Setting]:
    """name -> setting, for a machine with these instruction sets."""
    one, two = {"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "2"}
    found = {
        "as it is": Setting(part="all"),
        "lowest": Setting({"TWA_KERNELS_ISA": "portable"} | one | LOWEST, part="all"),
        "avx2 shuffled": Setting(
            {"TWA_KERNELS_ISA": "avx2"} | two | AVX2, ("-p", "shuffle", "--shuffle", "1"), "all"
        ),
        "busy": Setting(part="all", loops=2),
        "one core": Setting(cores=1),
        "shuffled": Setting(arguments=("-p", "shuffle", "--shuffle", "2")),
        # no locale, a narrow terminal, no home, temporary files in memory
        "bare": Setting(
            {"LC_ALL": "C", "COLUMNS": "40", "HOME": "/nonexistent", "TMPDIR": "/dev/shm"}
        ),
        "lowest torch, 2 threads": Setting(two | LOWEST),
        "avx2 torch, 1 thread": Setting(one | AVX2),
    }
    if "avx2" not in isas:
        del found["avx2 shuffled"]
    for isa in isas:
        for threads in ("1", "2"):
            environment = {"TWA_KERNELS_ISA": isa, "OMP_NUM_THREADS": threads}
            found[f"{isa}, {threads} thread{'s' * (threads != '1')}"] = Setting(
                environment, part="kernels"
            )
    return found


def instruction_sets() -> list[str]:
    """Those that this machine and build have: any of them can be asked for."""
    from twa_kernels import native

    return list(native._C.cpu_isas()) if native._C else []


@contextlib.contextmanager
def busy(loops: int) -> Iterator[list[subprocess.Popen]]:
    """So many processes that use a core each; they end with this one."""
    code = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(loops)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def command_of(setting: Setting, tests: list[str], report: Path) -> list[str]:
    """pytest's, with its results as XML in `report`."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    command += ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "--tb=short"]
    command += [f"--junitxml={report}", *setting.arguments]
    return command + (tests or PARTS[setting.part])


def counted(report: Path) -> dict:
    """Numbers of tests and names of those that failed, from pytest's XML."""
    found: dict = {"passed": 0, "failed": [], "skipped": []}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        results = {child.tag: child.get("message", "") for child in case}
        if "failure" in results or "error" in results:
            found["failed"].append(name)
        elif "skipped" in results:
            found["skipped"].append(f"{name}: {results['skipped']}")
        else:
            found["passed"] += 1
    return found


def run(name: str, setting: Setting, tests: list[str], kept: Path) -> dict:
    """Runs the tests; what they print goes to the terminal and to a file."""
    report = kept / f"{name}.xml"
    report.unlink(missing_ok=True)
    chosen = {"TWA_KERNELS_ISA", "OMP_NUM_THREADS", *LOWEST}
    env = {k: v for k, v in os.environ.items() if k not in chosen}
    path = os.pathsep.join([str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])
    env |= {"PYTHONPATH": path} | setting.environment
    cores = sorted(os.sched_getaffinity(0))[: setting.cores or None]
    begin = time.monotonic()
    with busy(setting.loops), open(kept / f"{name}.txt", "w") as text:
        child = subprocess.Popen(
            command_of(setting, tests, report),
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        while piece := os.read(child.stdout.fileno(), 1 << 16).decode(errors="replace"):
            for file in (sys.stdout, text):
                file.write(piece)
                file.flush()
        status = child.wait()
    result = {"setting": name, "seconds": round(time.monotonic() - begin), "status": status}
    result |= {"part": "given" if tests else setting.part, "environment": setting.environment}
    result |= {
        "again": [],
        "loops": setting.loops,
        "cores": len(cores),
        "arguments": setting.arguments,
    }
    broken = {"passed": 0, "failed": [f"the run: exit status {status}"], "skipped": []}
    result |= counted(report) if report.exists() else broken
    if status not in (0, 1) and not result["failed"]:
        result |= {"failed": broken["failed"]}
    return result


def run_again(kept: dict, setting: Setting, folder: Path) -> dict:
    """A kept result after its failed tests have run again: those that pass are named apart."""
    if not kept["failed"]:
        return kept
    second = run(f"{kept['setting']} again", setting, kept["failed"], folder)
    ended = second["status"] in (0, 1) and {*second["failed"]} <= {*kept["failed"]}
    mended = [name for name in kept["failed"] if ended and name not in second["failed"]]
    kept["failed"] = [name for name in kept["failed"] if name not in mended]
    return kept | {"passed": kept["passed"] + len(mended), "again": kept["again"] + mended}


def facts_of_the_machine() -> dict:
    """Its processor, the tree's commit, and versions."""
    import common
    from gpucheck.machine import version

    versions = {name: version(name) for name in ("numpy", "pytest", "triton")}
    hardware = common.hardware()
    return {"processor": hardware["processor"], "commit": hardware["commit"]} | {
        "versions": {k: hardware[k] for k in ("python", "torch")} | versions
    }


def kept_results(folder: Path, names: list[str]) -> list[dict]:
    paths = [folder / f"{name}.json" for name in names]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def page(results: list[dict], left: Sequence[str] = ()) -> list[str]:
    """The page's lines; `left`: settings without a result."""
    from twa.io.tables import markdown_table

    rows = []
    for r in results:
        words = [f"{k}={v}" for k, v in r["environment"].items()]
        words += [" ".join(r["arguments"])] if r["arguments"] else []
        words += [f"{r['loops']} busy loops beside it"] if r["loops"] else []
        numbers = (r["passed"], len(r["failed"]), len(r["skipped"]), r["seconds"])
        row = [r["setting"], r["part"], *map(str, numbers), str(r["cores"]), r["commit"]]
        rows.append([*row, ", ".join(words)])
    header = ["setting", "tests", "passed", "failed", "skipped", "seconds", "cores", "commit"]
    failed = [f"- {r['setting']}: `{name}`" for r in results for name in r["failed"]]
    again = [f"- {r['setting']}: `{name}`" for r in results for name in r["again"]]
    skipped = sorted({reason(why) for r in results for why in r["skipped"]})
    machines = {f"{r['processor']}; {versions_of(r)}" for r in results}
    return [
        "# The tests in many settings",
        "",
        "`python bench/suite.py --save`, which says what the parts are. Seconds are of a machine",
        "with other work, whose amount differed: they say nothing of speed.",
        "",
        markdown_table([*header, "what is set"], rows),
        "",
        f"Not run: {', '.join(left) or 'none'}.",
        "",
        *[f"{r['setting']}: {r['note']}\n" for r in results if r.get("note")],
        "## Failed",
        "",
        *(failed or ["None."]),
        "",
        "## Failed at first, and passed when run again at a later commit",
        "",
        *(again or ["None."]),
        "",
        "## Why tests were skipped",
        "",
        *([f"- {why}" for why in skipped] or ["None."]),
        "",
        *sorted(machines),
        "",
    ]


def reason(skipped: str) -> str:
    """Why a test was skipped, of "name: why"; a name may end in parameters with colons."""
    _, found, why = skipped.rpartition("]: ")
    return why if found else skipped.partition(": ")[2]


def versions_of(result: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in result["versions"].items())


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these settings")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="not those with a good result")
    how.add_argument("--again", action="store_true", help="what failed in a kept result")
    parser.add_argument("--save", action="store_true", help="write bench/results/suite.*")
    parser.add_argument("--note", default="", help="about these runs, for the page")
    parser.add_argument("--list", action="store_true", help="print the settings, and end")
    parser.add_argument("--tests", nargs="+", default=[], metavar="PATH")
    parser.add_argument("--kept", type=Path, default=KEPT, metavar="FOLDER", help="of results")
    parser.add_argument("--part", choices=PARTS, help="in place of each setting's own")
    args = parser.parse_args(words)
    table = settings(instruction_sets())
    if args.list:
        print(*table, sep="\n")
        return 0
    if unknown := set(args.only or []) - set(table):
        parser.error(f"expected settings of: {'; '.join(table)}; found {'; '.join(unknown)}")
    args.kept.mkdir(parents=True, exist_ok=True)
    wanted, facts = args.only or list(table), facts_of_the_machine()
    for k, name in enumerate(wanted, 1):
        print(title := f"[{k}/{len(wanted)}] {name}", flush=True)
        if args.resume and any(not r["failed"] for r in kept_results(args.kept, [name])):
            print(f"{title}: kept", flush=True)
            continue
        setting = table[name]
        setting.part = args.part or setting.part
        if args.again:
            (before,) = kept_results(args.kept, [name]) or parser.error(f"{name}: nothing is kept")
            result = run_again(before, setting, args.kept)
        else:
            result = run(name, setting, args.tests, args.kept) | facts
        result["note"] = args.note or result.get("note", "")
        (args.kept / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        numbers = [f"{len(result[what])} {what}" for what in ("failed", "skipped")]
        said = ", ".join([f"{result['passed']} passed", *numbers, f"{result['seconds']} s"])
        print(f"{title}: {said}", *result["failed"], sep="\n  ", flush=True)
    results = kept_results(args.kept, list(table))
    done = {r["setting"] for r in results}
    lines = page(results, [name for name in table if name not in done])
    print("\n".join(lines))
    if args.save:
        PAGE.with_suffix(".md").write_text("\n".join(lines))
        PAGE.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    return int(any(r["failed"] for r in kept_results(args.kept, wanted)))


if __name__ == "__main__":
    sys.exit(main())
