"""What needs no GPU and runs nothing on one: index maps and decoders, machine code, the C++ API."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulator
import processes
import pytest
from conftest import BITS, run_python

from twa_kernels import native

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))  # static_cost_cuda imports machine_code


def program(target, path):
    folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
    if not folder.exists():
        pytest.skip("the native module was not built by CMake in this tree")
    emulator.build(target, folder)
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run([folder / path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_index_maps_and_decoders():
    assert int(program("test_lanes", "emulator/test_lanes").split()[0]) > 400_000


def test_cpp_example():
    shown = program("twa_example", "twa_example")
    errors = [float(line.split()[-1]) for line in shown.splitlines() if "differs" in line]
    assert len(errors) >= 2 and max(errors) < 0.02, shown  # 8 bits


@pytest.fixture(scope="module")
def cost(tmp_path_factory):
    if not native._C.with_cuda:
        pytest.skip("the native module was built without CUDA (no nvcc)")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no disassembler: it comes with triton")
    folder = tmp_path_factory.mktemp("cost")
    command = [sys.executable, str(ROOT / "bench/static_cost_cuda.py"), "--output", str(folder)]
    done = processes.run(command)
    assert (folder / "cuda_static_cost.png").stat().st_size > 10_000, (
        done.stdout[-2000:] + done.stderr[-2000:]
    )
    assert "| project | 4 |" in (folder / "cuda_static_cost.md").read_text()
    return json.loads((folder / "cuda_static_cost.json").read_text())


def test_static_cost_of_the_shipped_kernels(cost):
    import static_cost_cuda

    assert [problem for row in cost for problem in static_cost_cuda.problems(row)] == []
    built = {(r["arch"], r["op"], r["bits"]) for r in cost}
    for arch in native._C.cuda_architectures.replace("-real", "").split():
        for op in ("pack", "project", "reconstruct", "step"):
            assert {bits for a, o, bits in built if (a, o) == (f"sm_{arch}", op)} == set(BITS)
    quantisers = {(r["op"], r["bits"]) for r in cost if "group" in r}
    assert quantisers == {(op, bits) for op in ("pack", "record") for bits in BITS}
    for row in cost:
        if "path" in row:  # the matrix units contract every column of every row, and nothing more
            halves = [("reconstruct", 8), ("project", 1)]  # 32 rows at a time
            half = (row["op"], row["bits"]) in halves and row["rows"] % 32 == 16
            padded = row["rows"] + 16 * half
            times = 2 if row["bits"] == 4 else 1  # 4 bits: lower and upper levels
            assert row["products"] == padded * 128 * times


@pytest.mark.exhaustive
def test_blackwell_compiles_without_stack_frames():
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    command = [sys.executable, str(ROOT / "bench/static_cost_cuda.py")]
    done = processes.run([*command, "--architectures", "100,120"])
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "sm_100" in done.stdout and "sm_120" in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"barriers": 1}, "1 barriers of the block in the main loop"),
        ({"copies": 0}, "no asynchronous copies"),
        ({"share": 1.2}, "120 % of the instructions"),
        ({"alu": 1.2}, "120 % of the integer and logic pipe"),
        ({"per_weight": 3.9}, "3.90 instructions per weight, budget 3.7"),
    ],
)
def test_a_problem_is_reported(change, message):
    import static_cost_cuda

    row = {
        "op": "project",
        "bits": 4,
        "rows": 64,
        "many": False,
        "arch": "sm_90",
        "stack": 0,
        "path": 600,
        "barriers": 0,
        "copies": 3,
        "share": 0.6,
        "alu": 0.6,
    }
    row["per_weight"] = 2.4
    assert static_cost_cuda.problems(row) == []
    (found,) = static_cost_cuda.problems(row | change)
    assert message in found


def test_a_quantiser_past_its_limit_is_reported():
    import static_cost_cuda

    row = {"op": "pack", "bits": 4, "rows": 0, "arch": "sm_90", "stack": 0}
    row |= {"group": 150, "per_weight": 37.5, "share": 1.2, "alu": 0.9}
    assert static_cost_cuda.problems(row) == []
    (found,) = static_cost_cuda.problems(row | {"share": 1.7})
    assert "170 % of the instructions at the speed of memory, limit 150 %" in found


def test_the_way_of_a_quantiser():
    """Four tiles at a time, not the longer way one by one, nor that of a division's rare case."""
    import machine_code

    text = """
        .section .text.k,
        /*0000*/ S2R R0 ;
    .L_x_1:
        /*0010*/ @P0 BRA `(.L_x_2) ;
        /*0020*/ LDG.E R1 ;
        /*0030*/ @P1 BRA `(.L_x_3) ;
        /*0040*/ CALL.REL.NOINC `($__slow) ;
    .L_x_3:
        /*0050*/ SHFL.IDX R2 ;
        /*0060*/ STG.E R2 ;
        /*0070*/ STG.E R2 ;
        /*0080*/ BRA `(.L_x_4) ;
    .L_x_2:
        /*0090*/ FADD R3 ;
        /*00a0*/ FADD R3 ;
        /*00b0*/ FADD R3 ;
        /*00c0*/ FADD R3 ;
        /*00d0*/ FADD R3 ;
        /*00e0*/ FADD R3 ;
        /*00f0*/ STG.E R3 ;
    .L_x_4:
        /*0100*/ @P2 BRA `(.L_x_1) ;
        /*0110*/ EXIT ;
    """
    before, loop = machine_code.quantiser_path(
        machine_code.parse(text.replace("    .L", ".L"))["k"]
    )
    assert before == ["S2R"]
    assert loop == ["BRA", "LDG.E", "BRA", "SHFL.IDX", "STG.E", "STG.E", "BRA", "BRA"]


def test_the_native_module_names_its_architectures():
    """`python -m twa_kernels` says what was built."""
    shown = run_python(
        "import runpy, sys; sys.argv = ['twa_kernels']; "
        "runpy.run_module('twa_kernels', run_name='__main__')"
    )
    assert not native._C.with_cuda or "sm_" in shown
