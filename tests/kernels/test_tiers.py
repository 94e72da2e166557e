"""Every CPU kernel gives the same bits with every instruction set, and on 64-bit Arm as on x86-64.

tests/core/tiers.cpp runs them on fixed data and prints a digest for each case; the program is
compiled for this machine, and for Arm where a compiler and an emulator are installed.
"""

import os
import platform
import re
import shutil
from pathlib import Path

import emulator
import processes
import pytest

from twa_kernels import native

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = {  # of /proc/cpuinfo; in order of preference
    "portable": (),
    "avx2": ("avx2", "f16c", "fma"),
    "avxvnni": ("avx2", "avx_vnni"),
    "avx512vl": ("avx512vl", "avx512_vnni"),
    "avx512": ("avx512vl", "avx512_vnni", "avx512bw", "avx512dq", "avx512vbmi"),
    "neon": ("asimddp",),
}


def run(command, isa=""):
    return processes.run([*map(str, command)], env=os.environ | {"TWA_KERNELS_ISA": isa})


def names(command):
    return run([*command, "--isas"]).stdout.split()


def lines(command, isa):
    """A line for each case."""
    done = run(command, isa)
    assert done.returncode == 0, [s for s in done.stdout.splitlines() if "WRONG" in s][:20]
    first, *rest = done.stdout.splitlines()
    assert first == f"instruction set {isa}"
    assert len(rest) > 2000 and len({line.split()[-1] for line in rest}) > 2000
    return rest


def assert_same(found, expected):
    assert [line for line in found if line not in set(expected)][:20] == []
    assert found == expected


@pytest.fixture(scope="module")
def program():
    emulator.build("twa_tiers")
    return [emulator.BUILD / "tests" / "core" / "twa_tiers"]


@pytest.fixture(scope="module")
def portable(program):
    return lines(program, "portable")


@pytest.fixture(scope="module")
def arm_program():
    """The program for 64-bit Arm: a path."""
    missing = [tool for tool in (COMPILER, EMULATOR) if not shutil.which(tool)]
    if missing:
        say = pytest.fail if os.environ.get("TWA_REQUIRE_ARM") else pytest.skip
        say(
            f"{' and '.join(missing)} not found; "
            "Debian and Ubuntu have them in g++-aarch64-linux-gnu and qemu-user"
        )
    folder = Path(emulator.ROOT, "build", "arm")
    options = dict(
        CMAKE_SYSTEM_NAME="Linux",
        CMAKE_SYSTEM_PROCESSOR="aarch64",
        CMAKE_CXX_COMPILER=COMPILER,
        CMAKE_EXE_LINKER_FLAGS="-static",  # the emulator then needs no libraries
        TWA_PYTHON="off",
        TWA_CUDA="off",
    )
    emulator.configure(folder, options)
    emulator.build("twa_tiers", folder)
    return folder / "tests" / "core" / "twa_tiers"


def test_tiers_without_avx512_have_no_instruction_of_it(program):
    """Machines with AVX-VNNI and no AVX-512 are rare here: what is not run is read."""
    if not shutil.which("objdump"):
        pytest.skip("needs objdump")
    code = processes.run(["objdump", "-d", "-C", program[0]]).stdout
    functions = re.findall(r"^\w+ <(.*)>:\n((?:.+\n)+)", code, re.M)
    wanted = r"block_avx(2|vnni)<|block_look_up|_avx2\b"
    found = [(name, text) for name, text in functions if re.search(wanted, name)]
    if not found:
        pytest.skip("not a processor of this kind, or its compiler knows no AVX-VNNI")
    assert sum("vpdpbusd" in text for _, text in found) in (0, 10)  # 5 bit widths, 2 ops
    for name, text in found:
        assert not re.search(r"^\s*\w+:\t62 |%zmm|%k[0-7]", text, re.M), name


def test_the_machine_has_the_instruction_sets_that_it_reports(program):
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("needs /proc/cpuinfo")
    flags = Path("/proc/cpuinfo").read_text().split()
    of_machine = [isa for isa, needed in FLAGS.items() if set(needed) <= set(flags)]
    found = names(program)  # a compiler may know fewer
    assert found == [isa for isa in of_machine if isa in found]
    assert found == native._C.cpu_isas()
    if platform.machine() == "x86_64" and "avx2" in found:
        assert set(of_machine) - set(found) <= {"avxvnni"}


def test_every_instruction_set_gives_the_same_bits(program, portable):
    for isa in names(program):
        assert_same(lines(program, isa), portable)


@pytest.mark.parametrize("isa", ["portable", "neon"])
def test_arm_gives_the_same_bits(isa, arm_program, portable):
    assert_same(lines([EMULATOR, "-cpu", "neoverse-n1", arm_program], isa), portable)


@pytest.mark.parametrize(
    "cpu, expected",
    [
        ("cortex-a57", ["portable"]),
        ("neoverse-n1", ["portable", "neon"]),
        ("max", ["portable", "neon"]),
    ],
)
def test_arm_without_dot_products_is_portable(cpu, expected, arm_program):
    command = [EMULATOR, "-cpu", cpu, arm_program]
    assert names(command) == expected
    if "neon" not in expected:
        done = run(command, "neon")
        assert (done.returncode, done.stdout) == (
            2,
            "this machine lacks the instruction set asked for\n",
        )
