"""A command whose output nobody reads any more ends without a word; other errors are not hidden."""

import os
import sys

import processes
import pytest

from twa_kernels.output import UNREAD, printing


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
    assert done.stderr == ""
    unnoticed = command[-1] == "--help" and not buffered  # argparse passes over that error itself
    assert done.returncode == (0 if unnoticed else UNREAD)


def test_an_error_of_another_pipe_is_not_hidden():
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError), printing():
        os.write(writing, b"x")
    os.close(writing)


def test_inspect_writes_its_files_though_nobody_reads(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "twa", "inspect", str(tmp_path), "-o", str(tmp_path / "out")]
    done = processes.run(command, stdout=writing)
    os.close(writing)
    assert done.returncode == UNREAD
    assert (tmp_path / "out" / "inspect.md").exists()
