"""The measurements of bench/results, made again one after another, and what made each of them.

    python bench/measure.py NAME ...      runs these, or "all"
    python bench/measure.py               the list: commit, machine, whether it is of this code
    python bench/measure.py --stale       runs those that are not of this code, quick ones first

A result is of this code while twa_kernels/, python/, csrc/ are as they were at its commit. Each run
is noted in bench/results/measured.json, with a digest of the files that it wrote: a page that was
changed by hand fails tests/test_figures.py. Logs: build/measure/NAME.log.

Most of them time something: leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from claims import CLAIMS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
NOTES, LOGS = RESULTS / "measured.json", ROOT / "build" / "measure"
PRODUCT = ("twa_kernels", "python", "csrc")  # what a figure depends on, beside its own script
DEMO = "twa-demo/checkpoints"  # of `make demo`


@dataclass(frozen=True)
class Measurement:
    """A command, and the files that it writes.

    Args:
        command: what follows `python`
        files: patterns in bench/results
        minutes: that it takes on two cores, about; 0: a page of another machine, kept as it is
        needs: what there must be first
    """

    command: str
    files: tuple[str, ...]
    minutes: float
    needs: str = ""


def _bench(script: str, *files: str, minutes: float = 1, needs: str = "") -> Measurement:
    return Measurement(f"bench/{script}", files, minutes, needs)


LONG_CLAIMS = ("border", "paper", "pretrained")
MEASUREMENTS = {
    "cpu": Measurement(
        '-m pytest -o python_files="benchmark_*.py" -p no:cacheprovider bench --benchmark-only'
        " --benchmark-disable-gc --save cpu",
        ("cpu.md", "cpu.json"),
        8,
    ),
    "cpu_tiers": _bench("cpu_tiers.py --save", "cpu_tiers.*", minutes=6),
    "cpu_intel_xeon": Measurement("as cpu", ("cpu_intel_xeon.*",), 0),
    "cpu_amd_epyc_tiers": Measurement("as cpu_tiers", ("cpu_amd_epyc_tiers.*",), 0),
    "cpu_scaling": _bench("scaling.py", "cpu_scaling.*", minutes=10),
    "cpu_bound": _bench("cpu_bound.py --mca --save", "cpu_bound.*", minutes=3, needs="llvm-mca"),
    "peers": _bench("peers.py --columns 8e6 --save", "peers.md", needs="bitsandbytes"),
    "host_cost": _bench("host_cost.py --save", "host_cost.md", needs="Triton 3.9"),
    "orthonormalize": _bench("orthonormalize.py --save", "orthonormalize.*", minutes=4),
    "orthonormalize_stream": _bench(
        "orthonormalize_stream.py --save",
        "orthonormalize_stream.md",
        minutes=2,
        needs="11 GB of disk",
    ),
    "pack_stream": _bench(
        "pack_stream.py --save", "pack_stream.md", minutes=10, needs="17 GB of disk"
    ),
    "low_memory": _bench("low_memory.py --save", "low_memory.md"),
    "quantisation_error": _bench("quantisation_error.py", "quantisation_error.md", needs=DEMO),
    "step_share": _bench("step_share.py", "step_share.md", needs=DEMO),
    "step_reuse": _bench("step_reuse.py", "step_reuse.md", minutes=2, needs="the CUDA kernels"),
    "demo_seeds": _bench("demo_seeds.py", "demo_seeds.*", minutes=6),
    "recording_fidelity": _bench("recording.py fidelity", "recording_fidelity.md", minutes=10),
    "recording_twa": _bench("recording.py twa", "recording_twa.md", minutes=10),
    "recording_cost": _bench("recording.py cost", "recording_cost.md", minutes=5),
    "trainer_overhead": _bench("trainer_overhead.py --save", "trainer_overhead.md", minutes=3),
    "averaging_peers": _bench(
        "averaging_peers.py --save", "averaging_peers.md", minutes=3, needs="ema-pytorch, timm"
    ),
    "rate_sensitivity": _bench("rate_sensitivity.py", "rate_sensitivity.*", minutes=25),
    "distributed": _bench("distributed.py --save", "distributed.md", minutes=12),
    "faults": _bench("faults.py --save", "faults.md", minutes=45, needs="root, for its networks"),
    "billion": _bench(
        "billion.py --folder build/billion --save", "billion.md", minutes=30, needs="24 GB of disk"
    ),
    "cuda_static_cost": _bench(
        "static_cost_cuda.py", "cuda_static_cost.*", minutes=2, needs="the CUDA kernels"
    ),
    "triton_static_cost": _bench("static_cost.py", "triton_static_cost.*", minutes=15),
    "triton_versions": _bench("triton_versions.py", "triton_versions.md", minutes=20),
    "gpu_model": _bench(
        "gpu_model.py --architectures 100,120",
        "gpu_model.*",
        minutes=5,
        needs="nvcc, the CUDA kernels",
    ),
    "gpu_model_published": _bench("gpu_model_published.py", "gpu_model_published.md"),
    "suite": _bench("suite.py --save", "suite.*", minutes=240),
    "install": _bench("install_check.py --save", "install.json", minutes=60, needs="30 GB of disk"),
} | {
    f"claims/{name}": Measurement(
        f"bench/claims {name} -o build/measure/claims",
        (f"claims/{name}.*",),
        60 if name in LONG_CLAIMS else 20,
        "see docs/claims.md",
    )
    for name in CLAIMS
}


# What made a result ------------------------------------------------------------------------------


def files_of(measurement: Measurement) -> list[Path]:
    return sorted(path for pattern in measurement.files for path in RESULTS.glob(pattern))


def digest(paths: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def notes() -> dict[str, dict]:
    """{name: {"commit", "machine", "command", "seconds", "digest"}}"""
    return json.loads(NOTES.read_text()) if NOTES.exists() else {}


def note(name: str, found: dict) -> None:
    """Keeps what made the files of a measurement as they are now."""
    files = files_of(MEASUREMENTS[name])
    if not files:
        raise SystemExit(f"measure: {name}: expected {MEASUREMENTS[name].files} in {RESULTS}")
    every = notes() | {name: found | {"digest": digest(files)}}
    NOTES.write_text(json.dumps(dict(sorted(every.items())), indent=1) + "\n")


def git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


def is_of_this_code(commit: str) -> bool:
    """Whether the packages are as they were at a commit; uncommitted changes count, too."""
    return git("diff", "--quiet", commit, "--", *PRODUCT).returncode == 0


def here() -> tuple[str, str]:
    """This commit and this machine.

    Raises:
        SystemExit: the packages have changes that are not committed
    """
    from common import hardware

    if not is_of_this_code("HEAD"):
        raise SystemExit(f"measure: commit the changes in {', '.join(PRODUCT)} first")
    facts = hardware()
    return facts["commit"], f"{facts['processor']}, {os.cpu_count()} cores, torch {facts['torch']}"


# The command -------------------------------------------------------------------------------------


def run(name: str) -> bool:
    """Runs one and notes it; whether it ended well."""
    commit, machine = here()
    command, begin = MEASUREMENTS[name].command, time.monotonic()
    log = LOGS / f"{name.replace('/', '_')}.log"
    LOGS.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        python = f'"{sys.executable}" {command}'
        done = subprocess.run(python, shell=True, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    seconds = round(time.monotonic() - begin)
    if done.returncode:
        print(f"{name}: status {done.returncode} after {seconds} s: {log}", flush=True)
        return False
    if name.startswith("claims/"):
        publish_claim(name.removeprefix("claims/"))
    facts = {"commit": commit, "machine": machine, "command": f"python {command}"}
    note(name, facts | {"seconds": seconds})
    print(f"{name}: {seconds} s", flush=True)
    return True


def publish_claim(name: str) -> None:
    """A claim's page beside the others, and its tables in docs/claims.md."""
    made = LOGS / "claims" / f"{name}.json"
    (RESULTS / "claims" / made.name).write_bytes(made.read_bytes())
    subprocess.run([sys.executable, "bench/claims", "page"], cwd=ROOT, check=True)


def lines() -> list[str]:
    """The list, as the rows of docs/status.md: name, command, commit, machine."""
    found = ["| result | made by | at commit | on |", "|---|---|---|---|"]
    for name, facts in notes().items():
        page = next((p for p in files_of(MEASUREMENTS[name]) if p.suffix == ".md"), None)
        shown = f"[{name}](../{page.relative_to(ROOT)})" if page else name
        command = facts["command"].replace(" -o build/measure/claims", "")
        found.append(f"| {shown} | `{command}` | {facts['commit']} | {facts['machine']} |")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", metavar="NAME", nargs="*", choices=[*MEASUREMENTS, "all", []])
    parser.add_argument("--stale", action="store_true", help="those that are not of this code")
    args = parser.parse_args()
    current = {name for name, facts in notes().items() if is_of_this_code(facts["commit"])}
    ours = [name for name, made in MEASUREMENTS.items() if made.minutes]
    names = ours if "all" in args.names else args.names
    if args.stale:
        names = [name for name in ours if name not in current]
        names.sort(key=lambda name: MEASUREMENTS[name].minutes)
    if not names:
        for name, facts in notes().items():
            of = "of this code" if name in current else "of other code"
            print(f"{name:24} {facts['commit']:10} {of:14} {facts['machine']}")
        return 0
    minutes = sum(MEASUREMENTS[name].minutes for name in names)
    print(f"{len(names)} measurements, some {minutes:.0f} minutes", flush=True)
    failed = [name for name in names if not run(name)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
