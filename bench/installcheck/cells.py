"""The cells of the matrix: a name, and a function that tries it.

A cell returns what it found, or the line that refuses what cannot work; `Wrong` is a fault of the
project, `Absent` a lack of this machine.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .box import BUILD, ROOT, SMOKE, Absent, Box, Wrong

Cell = Callable[[Box], str]
COMPILER = ("c++", "g++", "as", "ld", "ar", "ranlib", "nm", "ccache")
MINIMUM = {
    "setuptools": "77.0.1",
    "setuptools-scm": "8.1.0",
    "pybind11": "2.13.0",
    "cmake": "3.24.0",
    "ninja": "1.10.0",
}


def pip(python: Path | str, *words: object) -> list[object]:
    """`pip install` by an environment's Python."""
    return [python, "-m", "pip", "install", *words]


def wheel_of(box: Box, python: str) -> Path:
    """The wheel for a Python: built once."""
    version = box.run(python, "-c", "import sys; print('%d%d' % sys.version_info[:2])").strip()
    folder = box.wheels
    found = [*folder.glob(f"*-cp{version}-*linux_*.whl")]
    if not found:
        source = box.source(f"wheel-{version}")
        box.uv("build", "-q", "--wheel", "-p", python, "-o", folder, source)
        found = [*folder.glob(f"*-cp{version}-*.whl")]
    return found[0]


# Pythons, PyTorch, NumPy


def stack(box: Box, python: str, torch: str, numpy: str) -> str:
    """A wheel beside one PyTorch and one NumPy; PyTorch stays as it is."""
    folder = box.folder / "venvs" / "stack"
    interpreter = folder / "bin/python"
    mark = folder / "is.txt"
    if not mark.is_file() or mark.read_text() != f"{python} {torch}":
        if mark.is_file() and not mark.read_text().endswith(f" {torch}"):
            shutil.rmtree(box.folder / "uv", ignore_errors=True)  # some GB for each PyTorch
        shutil.rmtree(folder, ignore_errors=True)
        box.uv("venv", "-q", "-p", python, folder)
        wanted = "torch" if torch == "newest" else f"torch=={torch}"
        box.uv("pip", "install", "-q", "-p", interpreter, wanted, "numpy")
        mark.write_text(f"{python} {torch}")
    wanted = "numpy==1.26.4" if numpy == "1.26" else "numpy>=2"
    box.uv("pip", "install", "-q", "-p", interpreter, wanted, "--only-binary", "numpy")
    code = "import torch; print(torch.__version__)"
    before = box.run(interpreter, "-W", "ignore", "-c", code).strip()
    arguments = ("--force-reinstall", "--no-deps", wheel_of(box, python))
    box.uv("pip", "install", "-q", "-p", interpreter, wheel_of(box, python))
    box.uv("pip", "install", "-q", "-p", interpreter, *arguments)
    said = box.smoke(interpreter, before)
    return f"torch {said['torch']}, numpy {said['numpy']}"


# Wheels


def wheel(box: Box, python: str) -> str:
    """Its files, tag and metadata."""
    file = wheel_of(box, python)
    names = zipfile.ZipFile(file).namelist()
    for name in ("twa/py.typed", "twa_kernels/py.typed", "licenses/LICENSE", "sboms/twa.cdx.json"):
        if not any(n.endswith(name) for n in names):
            raise Wrong(f"{name} is not in the wheel")
    odd = [
        n for n in names if n.split("/")[0] not in ("twa", "twa_kernels", names[-1].split("/")[0])
    ]
    if odd:
        raise Wrong(f"files outside the packages: {odd[:3]}")
    out = box.wheels / "repaired"
    box.run(box.tools / "bin/auditwheel", "repair", file, "-w", out, PATH=tools_path(box))
    box.run(box.tools / "bin/twine", "check", "--strict", file)
    python_tag = file.name.split("-")[2]
    repaired = next(out.glob(f"*-{python_tag}-*.whl"))
    tag = repaired.name.removesuffix(".whl").split("-")[-1]
    return f"{tag}, {file.stat().st_size / 1e6:.1f} MB"


def tools_path(box: Box) -> str:
    """PATH with the tools of the matrix first."""
    return f"{box.tools / 'bin'}{os.pathsep}{box.environment['PATH']}"


def cuda_wheel(box: Box) -> str:
    """A wheel with the CUDA kernels, on this machine without them."""
    if not shutil.which("nvcc"):
        raise Absent("nvcc")
    source = box.source("cuda-wheel")
    out = box.wheels / "cuda"
    box.uv("build", "-q", "--wheel", "-p", box.python, "-o", out, source, TWA_CUDA="on")
    file = next(out.glob("*.whl"))
    text = zipfile.ZipFile(file).read(
        next(n for n in zipfile.ZipFile(file).namelist() if n.endswith("twa.cdx.json"))
    )
    if b"cudart" not in text:
        raise Wrong("the bill of materials lacks the CUDA runtime")
    python = box.venv("cuda-wheel")
    box.run(*pip(python, file))
    said = box.run(python, "-m", "twa_kernels")
    found = re.search(r"CUDA: (compiled for .*)", said)
    if not found:
        raise Wrong("the module has no CUDA kernels")
    return f"{found[1]}, {file.stat().st_size / 1e6:.1f} MB"


def demo(box: Box, python: str) -> str:
    """The wheel in an environment of its own runs `twa demo` to its end."""
    folder = box.folder / "venvs" / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    box.uv("venv", "-q", "-p", python, folder)
    box.uv(
        "pip", "install", "-q", "-p", folder / "bin/python", "torch==2.13.0", wheel_of(box, python)
    )
    said = box.smoke(folder / "bin/python")
    text = box.run(folder / "bin/twa", "demo", "-o", "demo", "--overwrite", cwd=box.folder / "tmp")
    box.run(folder / "bin/python", "-m", "twa_kernels", cwd=box.folder / "tmp")
    if "TWA" not in text:
        raise Wrong("no table at the end of the demo")
    return f"ran to its end, torch {said['torch']}"


# Ways to install


def plain(box: Box) -> str:
    """And once more in the same clone."""
    source, python = box.source("plain"), box.venv("plain")
    for words in ((), ("--force-reinstall", "--no-deps")):
        box.run(*pip(python, *words, source))
        said = box.smoke(python)
    if said["torch from"].startswith(str(python.parent.parent)):
        raise Wrong("PyTorch was installed although one was there")
    left = box.run("git", "status", "--short", cwd=source)
    if left:
        raise Wrong(f"it leaves files that git does not ignore: {left}")
    return f"version {said['twa']}"


def editable(box: Box) -> str:
    """And once more in the same clone."""
    source, python = box.source("editable"), box.venv("editable")
    for _ in range(2):
        box.run(*pip(python, "-e", source))
        said = box.smoke(python)
    if not said["twa from"].startswith(str(source)):
        raise Wrong(f"twa comes from {said['twa from']}")
    return f"version {said['twa']}"


def editable_own_tools(box: Box) -> str:
    """The build tools are in the environment; no network is needed then."""
    source, python = box.source("own-tools"), box.venv("own-tools", BUILD)
    path = f"{python.parent}{os.pathsep}{box.environment['PATH']}"
    box.run(*pip(python, "--no-build-isolation", "-e", source), PATH=path, PIP_NO_INDEX="1")
    return f"version {box.smoke(python)['twa']}"


def by_uv(box: Box) -> str:
    """uv in the place of pip; it does not see the base's PyTorch, so without dependencies."""
    python = box.venv("by-uv")
    box.uv("pip", "install", "-q", "--no-deps", "-p", python, box.source("by-uv"))
    return f"version {box.smoke(python)['twa']}"


def sdist(box: Box) -> str:
    """Made without a compiler; a wheel from it alone; the tests are in it."""
    source, out = box.source("sdist"), box.wheels / "sdist"
    shutil.rmtree(out, ignore_errors=True)
    builder = [box.tools / "bin/python", "-m", "build", "--sdist", "-o", out, source]
    box.run(*builder, PATH=bare_path(box, "git"))
    file = next(out.glob("*.tar.gz"))
    with tarfile.open(file) as archive:
        archive.extractall(out, filter="data")
    folder = out / file.name.removesuffix(".tar.gz")
    listed = box.run("git", "ls-files", cwd=source).split()
    if missing := [n for n in listed if not (folder / n).exists()]:
        raise Wrong(f"not in the sdist: {missing[:3]}")
    python = box.venv("sdist")
    box.run(*pip(python, file))
    said = box.smoke(python)
    if said["twa"] not in file.name:
        raise Wrong(f"{file.name} installs version {said['twa']}")
    return f"{file.stat().st_size / 1e6:.1f} MB"


def archive(box: Box) -> str:
    """What `git archive` gives, without .git: the version names the commit."""
    source, folder = box.source("archive"), box.folder / "sources" / "archived"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    box.run("git", "tag", "v0.1.7", cwd=source)
    box.run("git", "archive", "HEAD", "-o", folder / "a.tar", cwd=source)
    box.run("tar", "xf", "a.tar", cwd=folder)
    python = box.venv("archive")
    box.run(*pip(python, folder))
    version = box.smoke(python)["twa"]
    if not version.startswith("0.1.7"):
        raise Wrong(f"version {version}")
    return f"version {version} of tag v0.1.7"


def no_git(box: Box) -> str:
    """A clone on a machine without git: version 0.0, also where git was there before."""
    source, python = box.source("no-git"), box.venv("no-git")
    path = bare_path(box, *COMPILER)
    box.run(*pip(python, "--no-deps", source))
    box.run(*pip(python, "--force-reinstall", "--no-deps", source), PATH=path)
    version = box.smoke(python)["twa"]
    if version != "0.0":
        raise Wrong(f"version {version}, of an earlier build")
    return f"version {version}"


def tagged(box: Box, name: str, tag: str, extra: str = "") -> Path:
    """A clone at a tag, with a module more if `extra` names it."""
    source = box.source(name)
    if extra:
        (source / extra).write_text("")
        box.run("git", "add", extra, cwd=source)
        author = ("-c", "user.name=x", "-c", "user.email=x@x")
        box.run("git", *author, "commit", "-qm", "one more", cwd=source)
    box.run("git", "tag", tag, cwd=source)
    return source


def upgrade(box: Box) -> str:
    """From a release to the next, which has a module less; and uninstalled: nothing stays."""
    python = box.venv("upgrade", ["setuptools>=77,<82"])  # else PyTorch's need of it brings it
    folder = python.parents[1]

    def files() -> set[Path]:
        return {
            p for p in folder.rglob("*") if "__pycache__" not in p.parts and "pip" not in str(p)
        }

    before = files()
    if not before:
        raise Wrong(f"no files in {folder}")
    box.run(*pip(python, tagged(box, "older", "v0.1.0", "twa_kernels/gone.py")))
    first = box.smoke(python)["twa"]
    if not [*folder.rglob("twa_kernels/gone.py")]:
        raise Wrong("the module of the older release is not installed")
    box.run(*pip(python, tagged(box, "newer", "v0.2.0")))
    second = box.smoke(python)["twa"]
    if [*folder.rglob("gone.py")] or (first, second) != ("0.1.0", "0.2.0"):
        raise Wrong(
            f"after the upgrade from {first} to {second} a module of the older one is there"
        )
    box.run(python, "-m", "pip", "uninstall", "-y", "trainable-weight-averaging")
    if left := files() - before:
        raise Wrong(f"left behind: {sorted(left)[:3]}")
    return f"{first} to {second}; uninstall leaves nothing"


def side_by_side(box: Box) -> str:
    """Two versions in folders of their own."""
    python = box.venv("side-by-side")
    found = []
    for tag in ("v0.1.0", "v0.2.0"):
        target = box.folder / "tmp" / tag
        shutil.rmtree(target, ignore_errors=True)
        box.run(*pip(python, "--no-deps", "--target", target, tagged(box, tag, tag)))
        code = "import twa, twa_kernels as k; print(twa.__version__, k.__version__)"
        found.append(box.run(python, "-c", code, cwd=target, PYTHONPATH=str(target)).strip())
    if found != ["0.1.0 0.1.0", "0.2.0 0.2.0"]:
        raise Wrong(f"versions {found}")
    return "each says its version"


def stale(box: Box) -> str:
    """A module that was deleted since the last build is not in the next wheel."""
    source = box.source("stale")
    out = box.wheels / "stale"
    (source / "twa_kernels" / "gone.py").write_text("")
    box.uv("build", "-q", "--wheel", "-p", box.python, "-o", out, source)
    if "twa_kernels/gone.py" not in zipfile.ZipFile(next(out.glob("*.whl"))).namelist():
        raise Wrong("the module is not in the first wheel")
    (source / "twa_kernels" / "gone.py").unlink()
    shutil.rmtree(out)
    box.uv("build", "-q", "--wheel", "-p", box.python, "-o", out, source)
    if "twa_kernels/gone.py" in zipfile.ZipFile(next(out.glob("*.whl"))).namelist():
        raise Wrong("the deleted module is in the wheel")
    return ""


def hidden(box: Box) -> str:
    """Python started in a clone, with the packages installed elsewhere: sources come first."""
    source, python = box.source("hidden"), box.venv("hidden")
    box.run(*pip(python, source))
    said = box.run(python, "-m", "twa_kernels", cwd=source)
    found = [line.strip() for line in said.splitlines() if "sources that are not built" in line]
    if not found:
        raise Wrong("no word of the sources that hide the installed packages")
    return re.sub(r"^.*?not usable: ", "", found[0]).replace(str(source), "CLONE").split(" (")[0]


# Tools


def bare_path(box: Box, *names: str) -> str:
    """PATH that has these programs and the shell's, and no other."""
    folder = box.folder / "tmp" / ("path-" + "-".join(names or ("none",)))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("sh", "env", "uname", "ls", "cat", "rm", "mkdir", *names):
        if (found := shutil.which(name)) is not None:
            (folder / name).symlink_to(found)
    return str(folder)


def without(box: Box, tool: str) -> str:
    """--no-build-isolation in an environment that lacks one tool."""
    packages = [p for p in BUILD if not re.match(rf"{tool}[<>=]", p)]
    packages += ["setuptools==65.5.0"] * (tool == "setuptools")  # as venv of Python 3.11 brings it
    python = box.venv(f"without-{tool}", packages)
    path = os.pathsep.join([str(python.parent), bare_path(box, *COMPILER, "git")])
    command = pip(python, "--no-build-isolation", box.source(f"without-{tool}"))
    words = "is too old" if tool == "setuptools" else f"twa_kernels: {tool} is"
    return box.refused(words, *command, PATH=path)


def without_make(box: Box) -> str:
    """No make, no cmake, no ninja on PATH: pip brings what it needs."""
    python = box.venv("without-make")
    path = bare_path(box, *COMPILER, "git")
    box.run(*pip(python, box.source("without-make")), PATH=path)
    box.smoke(python)
    return ""


def without_compiler(box: Box) -> str:
    """No C++ compiler."""
    python = box.venv("without-compiler")
    command = pip(python, box.source("without-compiler"))
    return box.refused("twa_kernels: no C++17 compiler", *command, PATH=bare_path(box, "git"))


def old_cmake(box: Box) -> str:
    """CMake 3.22, as in Ubuntu 22.04, without isolation."""
    packages = [p for p in BUILD if not p.startswith("cmake")]
    python = box.venv("old-cmake", [*packages, "cmake==3.22.6"])
    path = f"{python.parent}{os.pathsep}{box.environment['PATH']}"
    command = pip(python, "--no-build-isolation", box.source("old-cmake"))
    return box.refused("3.24 or higher is required", *command, PATH=path)


def build_ranges(box: Box, end: str) -> str:
    """The lowest or the newest versions that pyproject.toml admits."""
    wanted = sorted(re.match(r"[\w-]+", requirement)[0] for requirement in BUILD)
    if wanted != sorted(MINIMUM):
        raise Wrong(f"pyproject.toml requires {wanted}; this check knows {sorted(MINIMUM)}")
    file = box.folder / "tmp" / "constraints.txt"
    lines = [f"{k}=={v}" for k, v in MINIMUM.items()] if end == "lowest" else []
    file.write_text("\n".join(lines))
    out = box.wheels / end
    shutil.rmtree(out, ignore_errors=True)
    command = ["build", "--wheel", "-p", box.python, "-o", out, "--build-constraints", file]
    box.uv(*command, box.source(f"build-{end}"))
    python = box.venv(f"build-{end}")
    box.run(*pip(python, next(out.glob("*.whl"))))
    box.smoke(python)
    return ", ".join(lines) or "what PyPI has"


def compiler(box: Box, name: str) -> str:
    """One C++ compiler."""
    found = shutil.which(name)
    if found is None:
        raise Absent(name)
    python = box.venv("compiler")
    box.run(*pip(python, box.source("compiler")), CXX=found)
    box.smoke(python)
    said = box.run(python, "-m", "twa_kernels")
    tier = re.search(r"instruction set: (\w+)", said)
    return f"tier {tier[1] if tier else 'none'}"


def nvcc_comes_later(box: Box) -> str:
    """Built without nvcc; then it is there; then for other GPUs: each build sees it."""
    if not shutil.which("nvcc"):
        raise Absent("nvcc")
    source, python = box.source("nvcc"), box.venv("nvcc", BUILD)
    command = pip(python, "--no-build-isolation", "-e", source)
    own = str(python.parent)
    bare = os.pathsep.join([own, bare_path(box, *COMPILER, "git")])
    box.run(*command, PATH=bare, TWA_CUDA="auto")
    if "CUDA: not compiled" not in box.run(python, "-m", "twa_kernels"):
        raise Wrong("CUDA kernels without nvcc")
    path = os.pathsep.join([own, box.environment["PATH"]])
    for architectures in ("90", "80"):
        settings = {"TWA_CUDA": "auto", "TWA_CUDA_ARCHITECTURES": architectures}
        box.run(*command, PATH=path, **settings)
        if f"compiled for sm_{architectures}\n" not in box.run(python, "-m", "twa_kernels"):
            raise Wrong(f"no CUDA kernels for sm_{architectures}, though nvcc is there")
    return "sm_90, then sm_80"


def cuda_option(box: Box, value: str, words: str) -> str:
    """TWA_CUDA with a value that cannot be had."""
    python = box.venv("cuda-option")
    path = bare_path(box, *COMPILER, "git")
    command = pip(python, box.source("cuda-option"))
    return box.refused(words, *command, PATH=path, TWA_CUDA=value)


# Places


def odd_path(box: Box) -> str:
    """Spaces and Unicode in the paths of the clone and of the environment."""
    python = box.venv("mit Lücke und 空白")
    box.run(*pip(python, "-e", box.source("mit Lücke und 空白 'quote'")))
    box.smoke(python)
    return ""


def no_home(box: Box) -> str:
    """HOME is not set, neither when it is built nor when it runs."""
    python = box.venv("no-home")
    box.run(*pip(python, box.source("no-home")), HOME=None)
    box.run(python, "-m", "twa_kernels", HOME=None)
    return ""


def no_network(box: Box) -> str:
    """Once it is installed: a machine without any network, but its own loopback."""
    python = box.venv("no-network")
    box.run(*pip(python, box.source("no-network")))
    folder = box.folder / "tmp" / "no-network"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if box.ended("unshare", "-rn", "true").returncode:
        raise Absent("unshare -n")
    box.run("unshare", "-rn", python, "-I", SMOKE, cwd=folder)
    return ""


def read_only(box: Box) -> str:
    """A clone that cannot be written to."""
    source, python = box.source("read-only"), box.venv("read-only")
    if os.geteuid() == 0:  # root may write wherever the file system lets it
        mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && shift 0 && exec "$@"'
        command = ["unshare", "-m", "sh", "-c", mount, source, *pip(python, source)]
    else:
        box.run("chmod", "-R", "a-w", source)
        command = pip(python, source)
    try:
        return box.refused("cannot be written to", *command)
    finally:
        box.run("chmod", "-R", "u+w", source)


def old_python(box: Box) -> str:
    """Python 3.9."""
    for found in (shutil.which("python3.9"), *pyenv("3.9")):
        if found and box.ended(found, "--version").returncode == 0:
            source = box.source("old-python")
            command = pip(found, "--no-deps", source)
            return box.refused("requires a different Python", *command)
    raise Absent("python3.9")


def metadata(box: Box) -> str:
    """pyproject.toml is valid."""
    box.run(box.tools / "bin/validate-pyproject", ROOT / "pyproject.toml")
    return ""


def requirements(box: Box, file: str, python: str) -> str:
    """What `make` installs can be had from PyPI together, PyTorch's own requirements included."""
    said = box.uv("pip", "compile", "--python", python, box.folder / "clone" / file)
    return ", ".join(re.findall(r"^(?:torch|triton)==\S+", said, re.MULTILINE))


def pyenv(version: str) -> list[str]:
    """Interpreters that pyenv has of a version."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    return [str(p) for p in sorted(root.glob(f"versions/{version}.*/bin/python"))]


def pythons() -> dict[str, str]:
    """Version -> interpreter, of those that the project supports and this machine has."""
    found = {}
    for version in ("3.10", "3.11", "3.12", "3.13"):
        for path in (*pyenv(version), shutil.which(f"python{version}")):
            if path is not None:
                found[version] = path
                break
    return found


def cells(torches: list[str]) -> Iterator[tuple[str, str, Cell]]:
    """(group, name, function), in the order in which they run."""
    own = "this Python, PyTorch 2.13"
    yield "metadata", "pyproject.toml", metadata
    for version, path in pythons().items():
        for file in ("requirements.txt", *["requirements-stack.txt"] * (version == "3.12")):
            name = f"{file}, Python {version}"
            yield "metadata", name, lambda b, p=path, f=file: requirements(b, f, p)
    for name, function in {
        "pip install .": plain,
        "pip install -e .": editable,
        "pip install --no-build-isolation -e ., no network": editable_own_tools,
        "uv pip install .": by_uv,
        "sdist alone": sdist,
        "git archive": archive,
        "no git": no_git,
        "upgrade, then uninstall": upgrade,
        "two versions side by side": side_by_side,
        "a module deleted between two wheels": stale,
        "Python started in a clone that is not built": hidden,
    }.items():
        yield "ways", name, function
    yield "tools", "without make, cmake and ninja", without_make
    for tool in ("ninja", "cmake", "pybind11", "setuptools-scm", "setuptools"):
        name = f"without {tool}" if tool != "setuptools" else "with setuptools 65"
        yield "tools", f"--no-build-isolation {name}", lambda b, t=tool: without(b, t)
    yield "tools", "CMake 3.22", old_cmake
    yield "tools", "without a C++ compiler", without_compiler
    for end in ("lowest", "newest"):
        yield "tools", f"{end} build requirements", lambda b, e=end: build_ranges(b, e)
    for name in ("g++-11", "g++-12", "g++-13", "g++-14", "clang++-14", "clang++-19"):
        yield "tools", name, lambda b, n=name: compiler(b, n)
    yield "tools", "TWA_CUDA=on without nvcc", lambda b: cuda_option(b, "ON", "no nvcc was found")
    yield "tools", "TWA_CUDA=bogus", lambda b: cuda_option(b, "bogus", "expected auto, on or off")
    yield "tools", "nvcc comes after the first build", nvcc_comes_later
    yield "places", "spaces, quotes and Unicode in paths", odd_path
    yield "places", "HOME is not set", no_home
    yield "places", "no network when it runs", no_network
    yield "places", "read-only clone", read_only
    yield "places", "Python 3.9", old_python
    for version, path in pythons().items():
        yield "wheels", f"Python {version}", lambda b, p=path: wheel(b, p)
    yield "wheels", f"with CUDA, {own}", cuda_wheel
    for torch in torches:
        for version, path in pythons().items():
            for numpy in ("2", "1.26"):
                if numpy == "1.26" and version == "3.13":
                    continue  # NumPy has no wheel of 1.26 for it
                name = f"Python {version}, torch {torch}, numpy {numpy}"
                yield "stack", name, lambda b, p=path, t=torch, n=numpy: stack(b, p, t, n)
    for version, path in pythons().items():
        yield "demo", f"Python {version}", lambda b, p=path: demo(b, p)
