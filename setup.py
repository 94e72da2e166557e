"""Builds the native module with CMake (the only build) and installs the two packages; metadata is
in pyproject.toml.
"""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        # kept, so that a rebuild compiles only what changed
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        options = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPYTHON_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTWA_CUDA={os.environ.get('TWA_CUDA', 'auto')}",
            f"-DTWA_SANITIZE={os.environ.get('TWA_SANITIZE', '')}",
        ]
        if architectures := os.environ.get("TWA_CUDA_ARCHITECTURES"):
            options.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *options], check=True)
        subprocess.run(["cmake", "--build", build], check=True)


setup(ext_modules=[Extension("twa_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
