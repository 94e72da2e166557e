"""What a build says where something is missing, and what an installation says it is.

`make install-check` tries whole installations; here is what takes seconds.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import twa

import twa_kernels
from twa_kernels import native, version

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()


def refused(folder, **environment):
    """Last line of a build of the native module in a folder, which must fail."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(
        ROOT / "twa_kernels", folder / "twa_kernels", ignore=shutil.ignore_patterns("*.so")
    )
    shutil.copytree(ROOT / "python", folder / "python")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "lib")]
    done = processes.run(command, cwd=folder, env=os.environ | environment)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def path_with(folder, *programs):
    """PATH of a folder with these programs alone."""
    folder.mkdir()
    for program in programs:
        (folder / program).symlink_to(shutil.which(program) or sys.executable)
    return str(folder)


def test_without_a_compiler_the_build_says_so(tmp_path):
    path = path_with(tmp_path / "bin", "cmake", "ninja")
    line = refused(tmp_path / "first", PATH=path, CXX="/no/such/compiler")
    assert line.startswith("twa_kernels: no C++17 compiler found (CXX=/no/such/compiler):")
    line = refused(tmp_path / "second", PATH=path, CXX="")
    assert line.startswith("twa_kernels: no C++17 compiler found (c++, g++, clang++):")


@pytest.mark.parametrize("missing", ["cmake", "ninja"])
def test_without_a_tool_the_build_names_it(missing, tmp_path):
    programs = {"cmake", "ninja", "g++"} - {missing}
    line = refused(tmp_path / "sources", PATH=path_with(tmp_path / "bin", *programs))
    assert line == f"twa_kernels: {missing} is not on PATH: pip install {missing}"


def test_build_requirements_have_both_ends():
    requires = re.findall(r'^    "([^"]+)",', PROJECT.split("[project]")[0], re.MULTILINE)
    assert len(requires) == 5
    for requirement in requires:
        assert re.fullmatch(r"[\w-]+>=[\d.]+,<\d+", requirement)


def test_every_package_is_installed():
    listed = set(re.search(r"^packages = (\[.*\])", PROJECT, re.MULTILINE)[1][2:-2].split('", "'))
    found = set()
    for package, folder in (("twa", "python/twa"), ("twa_kernels", "twa_kernels")):
        for file in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *file.parent.relative_to(ROOT / folder).parts]))
    assert found == listed


def test_one_version():
    assert twa.__version__ == twa_kernels.__version__ == version.__version__
    report = processes.run([sys.executable, "-m", "twa_kernels"]).stdout
    said = processes.run([sys.executable, "-m", "twa", "--version"]).stdout
    assert report.startswith(f"twa_kernels {version.described()} ")
    assert said == f"twa {version.described()}\n"


@pytest.mark.parametrize(
    ("commit", "sources", "said"),
    [
        (None, None, "1.2.3"),
        ("0123456789ab", None, "1.2.3 (built from commit 012345678)"),
        ("0123456789ab", "012345678", "1.2.3 (built from commit 012345678)"),
        ("0123456789ab", "aaa", "1.2.3 (built from commit 012345678, sources at aaa)"),
        ("0123456", "012345678", "1.2.3 (built from commit 0123456)"),
        ("01234", "01234-dirty", "1.2.3 (built from commit 01234, sources at 01234-dirty)"),
        (None, "aaa", "1.2.3 (sources at aaa)"),
    ],
)
def test_a_version_names_its_commit(commit, sources, said, monkeypatch):
    monkeypatch.setattr(version, "__version__", "1.2.3")
    monkeypatch.setattr(version, "commit", commit)
    monkeypatch.setattr(version, "checked_out", lambda: sources)
    assert version.described() == said


def test_the_commit_of_a_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(version, "__file__", str(tmp_path / "twa_kernels" / "version.py"))
    assert version.checked_out() is None
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", str(tmp_path)]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert head.stdout.startswith(version.checked_out())
    subprocess.run([*git, "tag", "v9"], check=True)
    assert head.stdout.startswith(version.checked_out())
    monkeypatch.setenv("PATH", "")
    assert version.checked_out() is None


def test_sources_that_hide_an_installation(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_import_error", "why", raising=False)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "twa_kernels" / "native.py"))
    assert native.why_unusable() == "the native module does not load: why"
    (tmp_path / "setup.py").touch()
    (tmp_path / "twa_kernels").mkdir()
    built = tmp_path / "twa_kernels" / "_C.of_another_python.so"
    built.touch()
    assert native.why_unusable() == "the native module does not load: why"
    built.unlink()
    assert native.why_unusable().startswith(f"{tmp_path} holds sources that are not built: run")


def test_no_module_reaches_for_the_network():
    """But the ranks of a job, which talk to each other."""
    network = re.compile(
        r"^\s*(?:from|import) (urllib|http|socket|ssl|ftplib|requests|httpx|huggingface_hub)\b",
        re.MULTILINE,
    )
    found = {
        str(path.relative_to(ROOT))
        for folder in ("python/twa", "twa_kernels")
        for path in (ROOT / folder).rglob("*.py")
        if network.search(path.read_text())
    }
    assert found == {"python/twa/distributed/note.py"}


def test_the_page_has_the_matrix():
    """docs/install.md shows bench/results/install.json."""
    command = [sys.executable, "bench/install_check.py", "--page"]
    done = processes.run(command, cwd=ROOT)
    assert done.returncode == 0
    text = (ROOT / "docs" / "install.md").read_text()
    cells = json.loads((ROOT / "bench" / "results" / "install.json").read_text())["cells"]
    assert len(cells) > 60 and done.stdout.strip() in text
    assert not [name for name, row in cells.items() if row["result"] == "wrong"]
