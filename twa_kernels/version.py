"""The version of both packages, and the commit that they are of, where it is known."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

__version__, commit = "0.0", None
try:  # written when it is built or packed: from the last tag and the commits since
    _built = import_module("twa_kernels._version")
    __version__ = _built.version
    commit = _built.commit and _built.commit.lstrip("g")
except ImportError:  # sources alone
    pass


def checked_out() -> str | None:
    """Commit of the sources where they lie in a clone, as `git describe` says it; else None."""
    root = Path(__file__).parents[1]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    command = [git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=9", "--exclude=*"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=own)
    return done.stdout.strip() or None


def is_at(sources: str, built: str | None) -> bool:
    """Whether two names of commits, each cut off somewhere, are of one."""
    if built is None or "-" in sources:  # -dirty
        return False
    return sources.startswith(built) or built.startswith(sources)


def described() -> str:
    """The version with the commit: of the build, and of the sources if they are in a clone."""
    parts = []
    if commit is not None:
        parts.append(f"built from commit {commit[:9]}")
    sources = checked_out()
    if sources is not None and not is_at(sources, commit):
        parts.append(f"sources at {sources}")
    return f"{__version__} ({', '.join(parts)})" if parts else __version__
