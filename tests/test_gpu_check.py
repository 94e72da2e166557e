"""make gpu-check and its roofline table, as far as they go without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def run(*command, **environment):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=os.environ | environment, timeout=300)


@no_gpu
@pytest.mark.parametrize("script", ["bench/gpu_check.py", "bench/roofline.py"])
def test_stops_with_a_clear_message_without_a_gpu(script):
    done = run(script, PYTHONPATH=str(ROOT))
    assert done.returncode == 2 and not done.stdout
    assert "torch.cuda.is_available() is False" in done.stderr and torch.__version__ in done.stderr and len(done.stderr.splitlines()) == 1


def test_roofline_rehearsal(tmp_path):
    """Every part of the page on CPU tensors: kernels checked against the reference before they are timed, peers, JSON and table."""
    done = run("bench/roofline.py", "--rehearse", "--bits", "8", "--ops", "project", "unpack", "--output", str(tmp_path), PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    page = " ".join((tmp_path / "roofline_rehearsal.md").read_text().split())
    for kernel in ("| project | cpp", "| project | triton", "| unpack | triton", "torch bfloat16 matmul", "published arithmetic"):
        assert kernel in page
    assert "WRONG" not in page and (tmp_path / "roofline_rehearsal.json").stat().st_size > 1000


def test_direct_build_knows_the_flags_of_cmake():
    """The build for machines without CMake takes its flags from CMakeLists.txt; those that fix bits must be among them."""
    code = "import sys; sys.path.insert(0, 'bench'); import gpu_check; print(gpu_check.cmake_flags('twa_core'), gpu_check.cmake_flags('twa_cuda'))"
    out = run("-c", code).stdout
    assert "-ffp-contract=off" in out and "-fmad=false" in out
