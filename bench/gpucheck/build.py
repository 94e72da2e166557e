"""The native module without CMake, for machines that have little: `python -m gpucheck.build`.

    --objects-to FOLDER   compile for --architecture and keep the objects (on a machine with nvcc)
    --objects FOLDER      take them where their sources are this tree's; compile what is missing
    --module FOLDER       link the module into FOLDER

Flags are those of CMakeLists.txt. The binding is always compiled here: it depends on this Python.
The module appears in its place when it is complete.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from . import ROOT

CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


class Failed(Exception):
    """The build cannot go on; the message says why."""


def search_path() -> str:
    """PATH with this Python's own folder and CUDA's."""
    return os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", ""), str(CUDA / "bin")]
    )


def find_nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc", path=search_path())


def cmake_flags(target: str) -> list[str]:
    """Compile options of a target in CMakeLists.txt."""
    text = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())
    if "COMPILE_OPTIONS" in text or "COMPILE_FLAGS" in text:
        raise Failed(
            "CMakeLists.txt has options of single files, which the direct build does not know"
        )
    pattern = rf"target_compile_options\({target} PRIVATE ([^)]*)\)"
    found = [o for options in re.findall(pattern, text) for o in options.split()]
    flags = re.sub(r"\$<\$<COMPILE_LANGUAGE:CUDA>:([^>]*)>", r"\1", " ".join(found)).split()
    if not flags or any("$" in flag for flag in flags):
        raise Failed(f"CMakeLists.txt: found no plain compile options of {target}: {flags}")
    return flags


def commands(architecture: str) -> dict[str, tuple[list[str], Path]]:
    """Object -> how to compile it, without -o; the CUDA kernels first, since they take longest."""
    cxx = os.environ.get("CXX", "g++")
    host = [
        cxx,
        "-O3",
        "-DNDEBUG",
        "-std=gnu++17",
        "-fPIC",
        "-fvisibility=hidden",
        f"-I{ROOT / 'csrc'}",
        "-c",
    ]
    jobs = {}
    if architecture:
        code = f"arch=compute_{architecture},code=[compute_{architecture},sm_{architecture}]"
        device = [
            find_nvcc() or "nvcc",
            "-DNDEBUG",
            "-std=c++17",
            *cmake_flags("twa_cuda"),
            "-lineinfo",
        ]
        device += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-gencode", code]
        device += ["-DTWA_WITH_CUDA", f"-I{ROOT / 'csrc'}", "-c"]
        sources = [s for s in ROOT.glob("csrc/cuda/*.c*") if s.suffix in (".cu", ".cpp")]
        for source in sorted(sources, key=lambda s: (s.name != "step.cu", s.name)):
            jobs[f"cuda_{source.name}.o"] = (device, source)
    for source in sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]):
        jobs[f"cpu_{source.name}.o"] = ([*host, *cmake_flags("twa_core")], source)
    return jobs


def digest(architecture: str) -> str:
    """Of every source and flag that an object depends on."""
    h = hashlib.sha256()
    folders = ("csrc/*.h", "csrc/*.cpp", "csrc/cpu/*", "csrc/cuda/*")
    for path in sorted(p for folder in folders for p in ROOT.glob(folder)):
        h.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    for name, (command, _) in commands(architecture).items():
        flags = [word for word in command[1:] if not word.startswith("-I")]
        h.update(f"{name}\0{flags}\0".encode())
    return h.hexdigest()


def compile_into(folder: Path, jobs: dict[str, tuple[list[str], Path]]) -> None:
    """Each job's object in the folder, all cores at work; Failed where one does not compile."""
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(name: str, command: list[str], source: Path) -> None:
        begin = time.monotonic()
        words = [*command, str(source), "-o", str(folder / name)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except OSError as error:
            raise Failed(f"no compiler: {words[0]}: {error.strerror}") from None
        print(shlex.join(words), done.stdout, done.stderr, sep="\n", flush=True)
        if done.returncode:
            raise Failed(f"{source.relative_to(ROOT)} does not compile")
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for job in [pool.submit(compiled, name, *how) for name, how in jobs.items()]:
            job.result()


def make_objects(folder: Path, architecture: str) -> None:
    """Objects for a machine that should not spend its time compiling; kept if up to date."""
    if find_nvcc() is None:
        raise Failed("no nvcc: put it on PATH or set CUDACXX")
    if usable_objects(folder, architecture):
        print(f"{folder}: up to date")
        return
    shutil.rmtree(folder, ignore_errors=True)
    made = {"architecture": architecture, "digest": digest(architecture)}
    compile_into(folder, commands(architecture))
    if made["digest"] != digest(architecture):
        raise Failed("sources changed while they were compiled: once more")
    (folder / "objects.json").write_text(json.dumps(made) + "\n")
    size = sum(p.stat().st_size for p in folder.iterdir())
    print(f"{folder}: objects for sm_{architecture}, {size / 1e6:.1f} MB")


def usable_objects(folder: Path | None, architecture: str) -> dict[str, Path]:
    """Object -> file, if the folder's were made from this tree for this architecture."""
    record = folder / "objects.json" if folder else None
    if record is None or not record.is_file():
        return {}
    made = json.loads(record.read_text())
    if (made.get("architecture"), made.get("digest")) != (architecture, digest(architecture)):
        print(
            f"{folder}: of other sources, flags or architecture: not used",
            flush=True,
        )
        return {}
    names = commands(architecture)
    return {name: folder / name for name in names if (folder / name).is_file()}


def link(folder: Path, architecture: str, objects: Path | None) -> None:
    """twa_kernels/_C into the folder; architecture "": without CUDA."""
    torch = importlib.util.find_spec("torch")
    include = Path(torch.origin).parent / "include"
    if spec := importlib.util.find_spec("pybind11"):
        include = Path(spec.origin).parent / "include"
    python = Path(sysconfig.get_path("include"))
    for header in (python / "Python.h", include / "pybind11" / "pybind11.h"):
        if not header.exists():
            raise Failed(f"{header} is missing: the headers of Python and pybind11 are needed")
    have = usable_objects(objects, architecture)
    jobs = {name: how for name, how in commands(architecture).items() if name not in have}
    define = (
        ["-DTWA_WITH_CUDA", f'-DTWA_CUDA_ARCHITECTURES="{architecture}"'] if architecture else []
    )
    cxx = os.environ.get("CXX", "g++")
    binding = [
        cxx,
        "-O2",
        "-DNDEBUG",
        "-std=gnu++17",
        "-fPIC",
        "-fvisibility=hidden",
        f"-I{ROOT / 'csrc'}",
    ]
    for name in ("module", "cpu", "cuda") if architecture else ("module", "cpu"):
        jobs[f"bindings_{name}.o"] = (
            [*binding, *define, f"-I{include}", f"-I{python}", "-c"],
            ROOT / f"csrc/bindings/{name}.cpp",
        )
    module = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    with tempfile.TemporaryDirectory() as scratch:
        compile_into(Path(scratch), jobs)
        made = [str(have.get(name) or Path(scratch) / name) for name in [*have, *jobs]]
        linker = (
            [find_nvcc() or "nvcc", "-shared", "-cudart=static"]
            if architecture
            else [cxx, "-shared"]
        )
        whole = Path(scratch) / module.name
        command = [*linker, *made, "-o", str(whole), "-lpthread", "-ldl"]
        print(shlex.join(command), flush=True)
        if subprocess.run(command, check=False).returncode:
            raise Failed("the module does not link")
        beside = module.with_suffix(".new")
        shutil.copyfile(whole, beside)
        beside.chmod(0o755)
        beside.replace(module)
    print(f"built {module.name}, {len(have)} objects made beforehand, {len(jobs)} here")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", default="", help='such as 90; "": without CUDA')
    parser.add_argument("--objects-to", type=Path, metavar="FOLDER")
    parser.add_argument("--objects", type=Path, metavar="FOLDER")
    parser.add_argument("--module", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    try:
        if args.objects_to:
            make_objects(args.objects_to, args.architecture)
        if args.module:
            link(args.module, args.architecture, args.objects)
    except Failed as reason:
        print(reason)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
