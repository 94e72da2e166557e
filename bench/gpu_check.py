"""Everything that needs a GPU, in one command: build, GPU tests, compute-sanitizer, percent of a copy. Under 8 minutes, without network or pip.

Run: python3 bench/gpu_check.py (`make gpu-check`) with a Python that has PyTorch for the GPU; Triton comes with that. Steps go on after one that
failed; each has its time limit, its log in build/gpu-check/ and a line in the table at the end. Exit status: 0, 1 if a step failed, 2 if there
is no PyTorch or no GPU. "not run" is no pass: the table says why.
TWA_COMMIT=... names the commit on the roofline page where the tree is a copy without git.
The native module is built in place by setup.py where cmake, ninja and pybind11 are there; else directly, with the sources and flags that
CMakeLists.txt names and the pybind11 headers that come with PyTorch, for this GPU's architecture.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS, RESULTS = ROOT / "build" / "gpu-check", ROOT / "bench" / "results"
TOTAL = 460  # seconds for all steps
ROOFLINE = 120  # of them kept for the last step
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
PROBE = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "gpu": torch.cuda.is_available()}
if found["gpu"]:
    p = torch.cuda.get_device_properties(0)
    found |= {"name": p.name, "architecture": f"{p.major}{p.minor}"}
print(json.dumps(found))
"""


class NotRun(Exception):
    """A step cannot run here; the message says why."""


class Failed(Exception):
    """A step failed; the message says how, for the table."""


def environment(**more: str) -> dict[str, str]:
    """The packages of this tree, and the compilers' folders."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), str(CUDA / "bin")])
    packages = os.pathsep.join([str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TWA_KERNELS_BACKEND")}
    return inherited | {"PATH": path, "PYTHONPATH": packages} | more


def which(tool: str) -> str | None:
    return shutil.which(tool, path=environment()["PATH"])


def find_nvcc() -> str | None:
    return os.environ.get("CUDACXX") or which("nvcc")


def run(log: str, command: list, limit: float, **more: str) -> tuple[int, str]:
    """Exit status and output, which also goes to the log; past the limit the command and what it started are ended."""
    LOGS.mkdir(parents=True, exist_ok=True)
    with open(LOGS / f"{log}.log", "ab") as out:
        out.write(f"$ {shlex.join(map(str, command))}\n".encode())
        out.flush()
        begin = out.tell()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment(**more), start_new_session=True)
        try:
            process.wait(max(1.0, limit))
        except subprocess.TimeoutExpired:
            raise Failed(f"ended after its limit of {limit:.0f} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return process.returncode, (LOGS / f"{log}.log").read_bytes()[begin:].decode(errors="replace")


# The direct build ------------------------------------------------------------------------------------------------


def cmake_flags(target: str) -> list[str]:
    """Compile options of a target in CMakeLists.txt."""
    text = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())
    if "COMPILE_OPTIONS" in text or "COMPILE_FLAGS" in text:
        raise Failed("CMakeLists.txt has options of single files, which the direct build does not know")
    found = [o for options in re.findall(rf"target_compile_options\({target} PRIVATE ([^)]*)\)", text) for o in options.split()]
    flags = re.sub(r"\$<\$<COMPILE_LANGUAGE:CUDA>:([^>]*)>", r"\1", " ".join(found)).split()
    if not flags or any("$" in flag for flag in flags):
        raise Failed(f"CMakeLists.txt: found no plain compile options of {target}: {flags}")
    return flags


def direct_build(output: Path, architecture: str, include: Path) -> None:
    """twa_kernels/_C without CMake. `architecture`: "90", or "" to build without CUDA; `include`: PyTorch's headers."""
    python = Path(sysconfig.get_path("include"))
    for header in (python / "Python.h", include / "pybind11" / "pybind11.h"):
        if not header.exists():
            raise Failed(f"{header} is missing: the headers of Python and pybind11 are needed")
    cxx, nvcc = os.environ.get("CXX", "g++"), find_nvcc()
    if which(cxx) is None:
        raise Failed(f"no C++ compiler: {cxx} is not on PATH")
    define = ["-DTWA_WITH_CUDA", f'-DTWA_CUDA_ARCHITECTURES="{architecture}"'] if architecture else []
    common = ["-O3", "-DNDEBUG", "-std=gnu++17"]
    host = [cxx, *common, "-fPIC", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}", "-c"]
    jobs = [[*host, *cmake_flags("twa_core"), source] for source in sorted(ROOT.glob("csrc/cpu/*.cpp"))]
    jobs += [[*host, *define, f"-I{include}", f"-I{python}", source] for source in sorted(ROOT.glob("csrc/*.cpp"))]
    if architecture:
        code = f"arch=compute_{architecture},code=[compute_{architecture},sm_{architecture}]"
        device = [nvcc, "-DNDEBUG", "-std=c++17", *cmake_flags("twa_cuda"), "-Xcompiler=-fPIC,-fvisibility=hidden", "-gencode", code]
        jobs += [
            [*device, "-DTWA_WITH_CUDA", f"-I{ROOT / 'csrc'}", "-c", source]
            for source in sorted(ROOT.glob("csrc/cuda/*.c*"))
            if source.suffix in (".cu", ".cpp")
        ]

    def compiled(job: list, objects: str) -> str:
        to = f"{objects}/{job[-1].parent.name}_{job[-1].name}.o"
        done = subprocess.run([*job, "-o", to], capture_output=True, text=True, check=False)
        print(shlex.join(map(str, job)), done.stdout, done.stderr, sep="\n", flush=True)
        if done.returncode:
            raise Failed(f"{job[-1].relative_to(ROOT)} does not compile")
        return to

    output.mkdir(parents=True, exist_ok=True)
    module = output / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    with tempfile.TemporaryDirectory() as objects, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(lambda job: compiled(job, objects), jobs))
        link = [nvcc, "-shared", "-cudart=static"] if architecture else [cxx, "-shared"]
        command = [*link, *made, "-o", module, "-lpthread", "-ldl"]
        print(shlex.join(map(str, command)), flush=True)
        if subprocess.run(command, check=False).returncode:
            raise Failed("the module does not link")
    print(f"built {module}")


# Steps -----------------------------------------------------------------------------------------------------------
# Each takes what PROBE found and its time limit, and returns what it has to say.


def build(found: dict, limit: float) -> str:
    end = time.monotonic() + limit
    architecture = found["architecture"] if find_nvcc() and not found["hip"] else ""
    missing = [tool for tool in ("cmake", "ninja") if which(tool) is None]
    missing += [module for module in ("pybind11", "setuptools") if importlib.util.find_spec(module) is None]
    if missing:
        include = Path(importlib.util.find_spec("torch").origin).parent / "include"
        direct = [sys.executable, __file__, "--direct-build", ROOT / "twa_kernels", "--architecture", architecture, "--include", include]
        code, text = run("build", direct, limit)
        how = f"directly ({', '.join(missing)} missing)"
    else:
        more = {"TWA_CUDA": "on" if architecture else "off"} | ({"TWA_CUDA_ARCHITECTURES": architecture} if architecture else {})
        code, text = run("build", [sys.executable, "setup.py", "build_ext", "--inplace"], limit, **more)
        how = "by CMake"
    if code:
        raise Failed(f"building {how}: {last_line(text)}")
    code, text = run("build", [sys.executable, "-m", "twa_kernels"], end - time.monotonic())
    print(text, end="")
    if code:
        raise Failed(f"twa_kernels cannot be imported: {last_line(text)}")
    if architecture and f"compiled for sm_{architecture}" not in text:
        raise Failed(f"the module that was imported has no code for sm_{architecture}")
    return f"built {how}, " + (f"sm_{architecture}" if architecture else "without CUDA C++: " + ("ROCm" if found["hip"] else "no nvcc"))


def gpu_tests(found: dict, limit: float) -> str:
    if importlib.util.find_spec("pytest") is None:
        raise Failed("pytest is not installed for this Python: no test was run")
    # Only files with GPU tests: others may need packages of the trainer that this Python lacks.
    files = [path for path in sorted(ROOT.glob("tests/test_*.py")) if re.search(r"\bgpu\b", path.read_text())]
    if not files:
        raise Failed("no file in tests/ has a GPU test")
    code, text = run("tests", [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider", *files], limit)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", last_line(text))}
    said = ", ".join(f"{counts.get(word, 0)} {word}" for word in ("passed", "failed", "skipped"))
    if code or not counts.get("passed"):
        raise Failed(f"{said}: {last_line(text)}" if counts.get("passed") or code not in (0, 5) else f"no test ran: {last_line(text)}")
    return said


def sanitizer(tool: str) -> Callable[[dict, float], str]:
    def step(found: dict, limit: float) -> str:
        program = which("compute-sanitizer")
        if program is None:
            raise NotRun("compute-sanitizer: not found on PATH or in " + str(CUDA / "bin"))
        if limit < 40:
            raise NotRun("no time was left")
        options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only", "--report-api-errors", "no"]
        # Without PyTorch's cache each tensor is an allocation of its own, past whose end an access is found.
        command = [program, *options, sys.executable, __file__, "--sanitized-run", "--seconds", f"{limit - 25:.0f}"]
        code, text = run(tool, command, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if "Device not supported" in text:
            raise NotRun("compute-sanitizer says: Device not supported")
        summary = [line for line in text.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
        calls = re.findall(r"^\d+ of \d+ calls", text, re.MULTILINE)
        if code == 9 and summary:
            raise Failed(summary[-1].strip("= "))
        if code or not summary or not calls:
            raise Failed(f"the program under {tool} failed: {last_line(re.sub('^=.*', '', text, flags=re.MULTILINE))}")
        return f"{calls[-1]}, {summary[-1].strip('= ')}"

    return step


def sanitized_run(seconds: float) -> None:
    """One call of every op on every usable GPU backend, at every bit width, on a small basis; none starts later than `seconds`."""
    import torch
    from roofline import OPS, backends, call, make_case

    import twa_kernels as tk

    end, device = time.monotonic() + seconds, torch.device("cuda", 0)
    cases = [(bits, op, backend) for bits in (4, 8, 3, 2, 1) for op in OPS for backend in backends(op, device)]
    calls = 0
    for bits, op, backend in cases:
        if time.monotonic() > end:
            break
        print(f"{op}, {bits} bits, {backend}", flush=True)
        call(op, make_case(18, 40, bits, "cpu", dense=op == "pack").copy(device), backend)
        torch.cuda.synchronize()
        calls += 1
    rows = torch.randn(70, 5000, device=device)
    for n, backend in ((18, "cuda"), (70, "cuda"), (18, "triton"), (70, "triton")):
        cases.append((backend, n))
        if time.monotonic() > end or backend not in backends("orthonormalize_pass", device):
            continue
        print(f"orthonormalize, {n} rows, {backend}", flush=True)
        for accuracy in ("fast", "high"):
            tk.orthonormalize(rows[:n], accuracy=accuracy, backend=backend)
        torch.cuda.synchronize()
        calls += 1
    print(f"{calls} of {len(cases)} calls")
    if not calls:
        raise SystemExit("no op was called: no GPU backend is usable, or there was no time")


def roofline(found: dict, limit: float) -> str:
    if limit < 60:
        raise NotRun("no time was left")
    command = [sys.executable, ROOT / "bench" / "roofline.py", "--seconds", f"{limit - 40:.0f}"]  # what it had no time for, it lists
    command += ["--commit", os.environ["TWA_COMMIT"]] if "TWA_COMMIT" in os.environ else []
    begin = time.time()
    try:
        code, text = run("roofline", command, limit)
    finally:  # the page is written after each basis, so an ended run leaves one too
        pages = [page for page in RESULTS.glob("roofline_*.md") if page.stat().st_mtime >= begin]
        for page in pages:
            print(page.read_text())
    if code:
        raise Failed(f"exit status {code}: {last_line(text)}")
    return f"table above and in {', '.join(str(page.relative_to(ROOT)) for page in pages)}"


def gram_schmidt(found: dict, limit: float) -> str:
    if limit < 30:
        raise NotRun("no time was left")
    code, text = run("orthonormalize", [sys.executable, ROOT / "bench" / "orthonormalize.py", "--gpu"], limit)
    print(text)
    if code:
        raise Failed(f"exit status {code}: {last_line(text)}")
    return "table above and in bench/results/"


STEPS = (
    ("build", build, 120),
    ("tests", gpu_tests, 150),
    ("memcheck", sanitizer("memcheck"), 90),
    ("racecheck", sanitizer("racecheck"), 60),
    ("orthonorm", gram_schmidt, 60),
    ("roofline", roofline, 200),
)


def last_line(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["no output"])[-1][:160]


def tail(log: Path, lines: int = 25) -> list[str]:
    return [f"  | {line[:200]}" for line in log.read_text(errors="replace").splitlines()[-lines:]] if log.exists() else []


def probe() -> dict:
    """What PyTorch finds here. Exits with status 2 where the checks cannot run."""
    python = f"{sys.executable} (Python {sys.version.split()[0]})"
    if importlib.util.find_spec("torch") is None:
        refuse(f"needs PyTorch for a GPU: {python} has no torch")
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    if done.returncode:
        refuse(f"torch of {python} cannot be used: {last_line(done.stderr)}")
    found = json.loads(last_line(done.stdout))
    if not found["gpu"]:
        kind = f"CUDA {found['cuda']}" if found["cuda"] else f"ROCm {found['hip']}" if found["hip"] else "CPUs only"
        smi = "nvidia-smi is there" if which("nvidia-smi") else "there is no nvidia-smi"
        refuse(f"needs a GPU that PyTorch can use: torch.cuda.is_available() is False (torch {found['torch']}, built for {kind}; {smi})")
    return found


def refuse(reason: str) -> None:
    print(f"gpu-check: {reason}", file=sys.stderr)
    raise SystemExit(2)


def outcomes(found: dict) -> Iterator[tuple[str, str, float, str]]:
    """(step, result, seconds, what it said), one step after the other; a step's log has its name."""
    end = time.monotonic() + TOTAL
    for name, step, limit in STEPS:
        left = end - time.monotonic() - (0 if step is roofline else ROOFLINE)
        print(f"\n== {name}", flush=True)
        start = time.monotonic()
        try:
            result, said = "passed", step(found, min(limit, left))
        except NotRun as reason:
            result, said = "not run", str(reason)
        except Failed as reason:
            result, said = "FAILED", str(reason)
            print(*tail(LOGS / f"{name}.log"), sep="\n")
        seconds = time.monotonic() - start
        print(f"{result} after {seconds:.0f} s: {said}", flush=True)
        yield name, result, seconds, said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--direct-build", type=Path, metavar="FOLDER", help="only build the native module there, without CMake")
    parser.add_argument("--architecture", default="", help="with --direct-build: such as 90; without it no CUDA")
    parser.add_argument("--include", type=Path, help="with --direct-build: folder that holds pybind11/")
    parser.add_argument("--sanitized-run", action="store_true", help="only call every op once")
    parser.add_argument("--seconds", type=float, default=math.inf, help="with --sanitized-run: start no call later than this")
    args = parser.parse_args()
    if args.direct_build:
        try:
            direct_build(args.direct_build, args.architecture, args.include)
        except Failed as reason:
            print(reason)
            return 1
        return 0
    if args.sanitized_run:
        sanitized_run(args.seconds)
        return 0
    found = probe()
    shutil.rmtree(LOGS, ignore_errors=True)
    print(f"{found['name']}, torch {found['torch']}, {sys.executable}; logs in {LOGS.relative_to(ROOT)}/")
    results = list(outcomes(found))
    print(f"\n{'step':9}  {'result':8}  {'seconds':>7}")
    for name, result, seconds, said in results:
        print(f"{name:9}  {result:8}  {seconds:7.0f}  {said}")
    return int(any(result == "FAILED" for _, result, _, _ in results))


if __name__ == "__main__":
    sys.exit(main())
