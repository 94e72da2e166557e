"""Builds the native module with CMake (the only build) and installs the two packages; metadata is
in pyproject.toml.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def require_compiler() -> None:
    """Exits with one line if there is no C++ compiler for CMake to find."""
    asked = os.environ.get("CXX", "")
    names = [asked.split()[0]] if asked else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, names)):
        looked = f"CXX={asked}" if asked else ", ".join(names)
        sys.exit(
            f"twa_kernels: no C++17 compiler found ({looked}):"
            " install one (Debian, Ubuntu: apt install g++), or set CXX to its path"
        )


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        # kept, so that a rebuild compiles only what changed
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        require_compiler()
        options = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTWA_CUDA={os.environ.get('TWA_CUDA', 'auto')}",
            f"-DTWA_SANITIZE={os.environ.get('TWA_SANITIZE', '')}",
        ]
        if architectures := os.environ.get("TWA_CUDA_ARCHITECTURES"):
            options.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        for step in (["-G", "Ninja", "-S", ROOT, "-B", build, *options], ["--build", build]):
            try:
                subprocess.run(["cmake", *step], check=True)
            except FileNotFoundError:
                sys.exit("twa_kernels: cmake is missing: pip install cmake ninja")
            except subprocess.CalledProcessError as error:  # its own words are above
                sys.exit(f"twa_kernels: cmake failed with status {error.returncode}, see above")


setup(ext_modules=[Extension("twa_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
