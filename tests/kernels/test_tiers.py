"""Every CPU kernel gives the same bits with every instruction set, and on 64-bit Arm as on x86-64.

tests/core/tiers.cpp runs them on fixed data and prints a digest for each case; the program is
compiled for this machine, and for Arm where a compiler and an emulator are installed.
"""

import os
import shutil
from pathlib import Path

import emulator
import processes
import pytest
from conftest import has_isa

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ISAS = ("portable", "avx2", "avxvnni", "avx512vl", "avx512", "neon")  # in order of preference


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


def test_the_machine_has_the_instruction_sets_that_it_reports(program):
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("needs /proc/cpuinfo")
    assert names(program) == [isa for isa in ISAS if has_isa(isa)]


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
