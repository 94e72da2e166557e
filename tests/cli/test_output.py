"""A command whose output nobody reads any more does its work, and says nothing of it."""

import os
import sys

import processes
import pytest


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    "command",
    [["twa_kernels"], ["twa", "plan", "--params", "1e6", "--candidates", "2"], ["twa", "--help"]],
    ids=["twa_kernels", "plan", "help"],
)
def test_unread_output(command, buffered):
    reading, writing = os.pipe()
    os.close(reading)
    buffering = {"PYTHONUNBUFFERED": "" if buffered else "1"}
    options = {"stdout": writing, "env": os.environ | buffering}
    done = processes.run([sys.executable, "-m", *command], **options)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
