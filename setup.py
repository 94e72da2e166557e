"""Builds the native module with CMake (the only build) and installs the two packages; metadata is
in pyproject.toml.

A wheel is built in a folder of its own, so that nothing of an earlier build gets into it.
`pip install --no-build-isolation -e .` keeps its folder: then only what changed is compiled.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SCRATCH = tempfile.TemporaryDirectory(prefix="twa-build-")
CMAKE = f"cmake-{sys.implementation.cache_tag}"  # the folder of a build
#: what CMake keeps of the environment from one run to the next
ENVIRONMENT = (
    "CXX",
    "CXXFLAGS",
    "CPPFLAGS",
    "LDFLAGS",
    "CUDACXX",
    "CUDAFLAGS",
    "CMAKE_PREFIX_PATH",
)


if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"twa_kernels: setuptools {setuptools.__version__} is too old: pip install 'setuptools>=77'"
    )
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402


def fail(message: str) -> None:
    """Ends with one line."""
    sys.exit(f"twa_kernels: {message}")


def require_package(name: str) -> None:
    """Of the build, which pip brings by itself, but not with --no-build-isolation."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        fail(f"{name} is missing in {sys.prefix}: pip install {name}")


def require_tools() -> None:
    """Programs, and a C++ compiler for CMake to find."""
    require_package("pybind11")
    for name in ("cmake", "ninja"):
        if shutil.which(name) is None:
            fail(f"{name} is not on PATH: pip install {name}")
    asked = os.environ.get("CXX", "")
    names = [asked.split()[0]] if asked else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, names)):
        looked = f"CXX={asked}" if asked else ", ".join(names)
        fail(
            f"no C++17 compiler found ({looked}):"
            " install one (Debian, Ubuntu: apt install g++), or set CXX to its path"
        )


def empty_unless_same(folder: Path, settings: list[str]) -> None:
    """Empties a build folder that was made with other settings: CMake would keep the old ones."""
    environment = [f"{name}={os.environ.get(name)}" for name in ENVIRONMENT]
    found = [f"{name}: {shutil.which(name)}" for name in ("cmake", "c++", "nvcc")]
    text = "\n".join([*settings, *environment, *found])
    file = folder / "settings.txt"
    if not file.is_file() or file.read_text() != text:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        file.write_text(text)


class CMakeBuild(build_ext):
    """`build_ext` by CMake."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles the module to where setuptools wants it."""
        require_tools()
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        output.mkdir(parents=True, exist_ok=True)
        editable = self.inplace or self.editable_mode
        base = ROOT / "build" if editable else Path(SCRATCH.name)
        build = base / CMAKE
        options = [
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTWA_CUDA={os.environ.get('TWA_CUDA') or 'auto'}",
            f"-DTWA_SANITIZE={os.environ.get('TWA_SANITIZE', '')}",
        ]
        if architectures := os.environ.get("TWA_CUDA_ARCHITECTURES"):
            options.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        empty_unless_same(build, options)
        options.append(f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}")  # another at each build
        for step in (["-G", "Ninja", "-S", ROOT, "-B", build, *options], ["--build", build]):
            try:
                subprocess.run(["cmake", *step], check=True)
            except subprocess.CalledProcessError as error:  # its own words are above
                fail(f"cmake failed with status {error.returncode}, see above")


class Wheel(bdist_wheel):
    """`bdist_wheel` with a bill of materials: what others wrote, and the module contains."""

    def write_wheelfile(self, wheelfile_base: str, *args: str, **named: str) -> None:
        """Also writes sboms/twa.cdx.json (PEP 770, CycloneDX 1.6)."""
        require_package("pybind11")
        super().write_wheelfile(wheelfile_base, *args, **named)
        name, version = self.distribution.get_name(), self.distribution.get_version()
        parts = [library("pybind11", metadata.version("pybind11"), {"id": "BSD-3-Clause"})]
        cuda = Path(SCRATCH.name, CMAKE, "cuda_version.txt")
        if cuda.is_file():  # the CUDA runtime, linked statically
            parts.append(library("cudart", cuda.read_text().strip(), {"name": "NVIDIA CUDA EULA"}))
        content = {
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "version": 1,
            "metadata": {"component": library(name, version, {"id": "Apache-2.0"})},
            "components": parts,
        }
        folder = Path(wheelfile_base, "sboms")
        folder.mkdir(exist_ok=True)
        (folder / "twa.cdx.json").write_text(json.dumps(content, indent=1) + "\n")


def library(name: str, version: str, license: dict[str, str]) -> dict:
    """A component of the bill of materials."""
    fields = {"type": "library", "name": name, "version": version}
    return fields | {"licenses": [{"license": license}]}


if not os.access(ROOT, os.W_OK):
    fail(f"{ROOT} cannot be written to, and a build writes its version there: copy it elsewhere")
if (ROOT / ".git").exists():  # what an earlier build kept is of another commit
    shutil.rmtree(ROOT / "trainable_weight_averaging.egg-info", ignore_errors=True)
require_package("setuptools-scm")  # without it setuptools calls any version 0.0.0
setup(
    ext_modules=[Extension("twa_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
    options={"build": {"build_base": SCRATCH.name}},
)
