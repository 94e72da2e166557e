"""The CUDA kernels on a CPU, for machines without a GPU.

csrc/cuda is compiled against emulator.h instead of device.h's instructions. Built by `cmake --build
build/cmake-* --target _emulated`, in the build folder of the native module, or in
TWA_EMULATOR_BUILD (`make sanitize`).
"""

import fcntl
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = Path(
    os.environ.get("TWA_EMULATOR_BUILD", ROOT / "build" / f"cmake-{sys.implementation.cache_tag}")
)


def configure(folder: Path, options: dict[str, str]) -> None:
    """Makes a build folder of CMakeLists.txt, if there is none."""
    if not (folder / "build.ninja").exists():
        run(["-G", "Ninja", "-S", ROOT, "-B", folder, *(f"-D{k}={v}" for k, v in options.items())])


def build(target: str, folder: Path = BUILD) -> None:
    """Builds a target of CMakeLists.txt."""
    with open(folder / ".building", "w") as lock:  # test processes that run side by side build once
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(["--build", folder, "--target", target])


def run(arguments: list) -> None:
    """This Python's cmake, without the sanitizers that may be loaded into this process."""
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    done = subprocess.run(["cmake", *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(
            f"cmake {' '.join(map(str, arguments))}:\n{done.stdout[-4000:]}{done.stderr[-2000:]}"
        )


def load():
    """The module `_emulated`, built first if a source is newer."""
    build("_emulated")
    (library,) = (BUILD / "emulator").glob("_emulated.*")
    specification = importlib.util.spec_from_file_location("_emulated", library)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def install() -> None:
    """Backend "cuda" runs on CPU tensors in this process."""
    from twa_kernels import registry
    from twa_kernels.backends import cuda

    cuda.module = load()
    backend = registry.BACKENDS["cuda"]
    registry.BACKENDS["cuda"] = replace(backend, devices=("cuda", "cpu"))
