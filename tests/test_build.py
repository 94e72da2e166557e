"""What a build says where something is missing."""

import os
import sys
from pathlib import Path

import processes

ROOT = Path(__file__).parents[1]


def test_without_a_compiler_the_build_says_so(tmp_path):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
    done = processes.run(command, cwd=ROOT, env=os.environ | {"CXX": "/no/such/compiler"})
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("twa_kernels: no C++17 compiler found (CXX=/no/such/compiler):")
    assert "Traceback" not in done.stderr
