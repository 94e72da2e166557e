"""The machine of a check: the environment of its programs, and what is there."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from . import ROOT, build


def environment(rehearse: bool) -> dict[str, str]:
    """The packages of this tree, the compilers' folders, nothing that changes which kernel runs."""
    packages = [ROOT, ROOT / "python", ROOT / "bench", os.environ.get("PYTHONPATH")]
    mine = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TWA_KERNELS_BACKEND")
    }
    mine |= {
        "PATH": build.search_path(),
        "PYTHONPATH": os.pathsep.join(str(p) for p in packages if p),
    }
    # Dozens of processes at once, none with much to do on the CPU.
    mine |= {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    mine |= {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    if rehearse:  # no git, no nvcc, no ncu: only this Python
        mine["PATH"] = str(Path(sys.executable).parent)
        mine |= {"GPUCHECK_REHEARSED": "1", "GPUCHECK_PLANTED": "1"}
    return mine


PROBE = """
import json, platform, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
         "gpu": torch.cuda.is_available(), "python": platform.python_version()}
if found["gpu"]:
    p = torch.cuda.get_device_properties(0)
    found |= {"name": p.name, "architecture": f"{p.major}{p.minor}", "cache": p.L2_cache_size,
              "multiprocessors": p.multi_processor_count, "memory": p.total_memory,
              "uuid": "GPU-" + str(getattr(p, "uuid", ""))}
print(json.dumps(found))
"""
SMI = "driver_version,clocks.max.sm,clocks.max.mem,clocks.sm,power.limit,temperature.gpu"


def probe(env: dict, rehearse: bool) -> dict:
    if importlib.util.find_spec("torch") is None:
        refuse(f"{sys.executable} (Python {sys.version.split()[0]}) has no torch")
    command = [sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    except subprocess.TimeoutExpired:
        refuse("torch found no GPU within 120 s: the driver does not answer")
    if done.returncode:
        last = (done.stderr.splitlines() or ["no message"])[-1]
        refuse(f"torch of {sys.executable} cannot be used: {last}")
    found = json.loads(done.stdout.splitlines()[-1])
    if rehearse:
        found |= {
            "name": "no GPU: a rehearsal on CPU tensors",
            "architecture": "",
            "multiprocessors": 0,
        }
    elif not found["gpu"]:
        cuda, hip = found["cuda"], found["hip"]
        made = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPUs only"
        smi = (
            "nvidia-smi is there"
            if shutil.which("nvidia-smi", path=env["PATH"])
            else "no nvidia-smi"
        )
        refuse(
            "needs a GPU that PyTorch can use: torch.cuda.is_available() is False"
            f" (torch {found['torch']}, built for {made}; {smi})"
        )
    for module in ("triton", "numpy", "pytest", "xdist"):
        spec = importlib.util.find_spec(module)
        found[module] = version(module) if spec else "missing"
    tools = ("nvcc", "g++", "git", "compute-sanitizer", "ncu", "nvidia-smi")
    missing = [tool for tool in tools if shutil.which(tool, path=env["PATH"]) is None]
    uuid = found.pop("uuid", "")
    found["missing tools"] = ", ".join(missing) or "none"
    if "nvidia-smi" not in missing:
        query = [
            "nvidia-smi",
            f"--query-gpu={SMI}",
            "--format=csv,noheader",
            "-i",
            uuid,
        ]
        try:
            done = subprocess.run(
                query, capture_output=True, text=True, env=env, timeout=15, check=False
            )
            values = [v.strip() for v in done.stdout.splitlines()[0].split(",")]
            found |= dict(zip(SMI.split(","), values, strict=True))
        except (OSError, subprocess.TimeoutExpired, IndexError, ValueError) as error:
            found["nvidia-smi"] = f"no answer: {type(error).__name__}"
    return found


def version(module: str) -> str:
    from importlib import metadata

    try:
        return metadata.version({"xdist": "pytest-xdist"}.get(module, module))
    except metadata.PackageNotFoundError:
        return "unknown version"


def commit(path: str | None = None) -> str:
    """The commit of this tree; "unknown" where it is a copy without git, or no git is on PATH."""
    git = shutil.which("git", path=path)
    if git is None:
        return "unknown"
    command = [git, "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return done.stdout.strip() or "unknown"


def refuse(reason: str) -> None:
    print(f"gpu_check: {reason}", file=sys.stderr)
    raise SystemExit(2)
