"""How commands end when something beside the work fails: streams, signals, files that cannot be
read, outputs that cannot be, tasks that end the process.
"""

import errno
import io
import os
import pathlib
import shutil
import signal
import sys

import processes
import pytest
import torch
from safetensors.torch import load_file, save_file
from twa import demo
from twa.cli import advice
from twa.cli import main as cli

from twa_kernels.output import Stream

pytestmark = pytest.mark.usefixtures("one_thread")
PLAN = ["plan", "--params", "1e9", "--candidates", "4"]


class Broken(io.StringIO):
    """A stream that takes so many characters, then fails as often as it is written to."""

    encoding = "ascii"

    def __init__(self, room, number):
        super().__init__()
        self.room, self.number = room, number

    def write(self, text):
        if self.tell() + len(text) > self.room:
            raise OSError(self.number, os.strerror(self.number))
        text.encode("ascii")
        return super().write(text)


@pytest.fixture
def heap(tmp_path, monkeypatch):
    """Three checkpoints c0, c1, c2, in the current directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for k in range(3):
        save_file({"w": torch.randn(4, 5)}, f"c{k}.safetensors")
    return [f"c{k}.safetensors" for k in range(3)]


def merged(heap, out, *options):
    return ["merge", *heap, "--scheme", "uniform", "-o", str(out), *options]


def says(capsys, argv):
    """Exit status and what is on standard error, without bars of progress."""
    code = cli.main([str(a) for a in argv])
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return code, [line for line in lines if line.startswith("twa: error")]


# Streams -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 20])
@pytest.mark.parametrize("number, code", [(errno.EPIPE, 0), (errno.EIO, 0), (errno.ENOSPC, 2)])
def test_standard_output_fails(heap, tmp_path, monkeypatch, capsys, room, number, code):
    """The work is done all the same; exit status 2 if what was printed is lost."""
    monkeypatch.setattr(sys, "stdout", Broken(room, number))
    found, errors = says(capsys, merged(heap, tmp_path / "out"))
    assert found == code and isinstance(sys.stdout, Broken)
    assert errors == (
        ["twa: error: what it printed could not be written (No space left on device)"]
        if code
        else []
    )
    assert (tmp_path / "out" / "averaged.safetensors").exists()
    assert (tmp_path / "out" / "merge.json").exists()


def test_standard_error_fails(heap, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Broken(0, errno.ENOSPC))
    assert cli.main(merged(heap, tmp_path / "out")) == 0
    assert cli.main(["merge", "nothing", "--scheme", "uniform", "-o", "other"]) == 2


def test_characters_that_an_encoding_lacks():
    stream = Stream(Broken(1000, errno.EIO))
    assert stream.write("dé \udcff") == 4 and stream.write("n") == 1
    assert stream.getvalue() == "d\\xe9 \\udcffn" and stream.error is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_closed_descriptors_and_a_full_disk(heap, tmp_path):
    """To the end of the interpreter; no file of ours gets the number of standard error."""
    script = (
        "import os, sys; from twa.cli import main as cli; code = cli.main();"
        " assert os.path.samestat(os.fstat(2), os.stat(os.devnull)); sys.exit(code)"
    )
    command = [sys.executable, "-c", script, *merged(heap, tmp_path / "out")]
    done = processes.run(["sh", "-c", 'exec "$@" >/dev/full 2>&-', "sh", *command])
    assert done.returncode == 2, done
    assert (tmp_path / "out" / "averaged.safetensors").exists()


# Signals -----------------------------------------------------------------------------------------


def test_a_second_interruption_ends_the_process(monkeypatch, capsys):
    """After the line about the first, Ctrl-C does what it does to any program."""

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.plan, "run", interrupted)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert cli.main(PLAN) == 130 and signal.getsignal(signal.SIGINT) is before
        monkeypatch.setattr(sys, "argv", ["twa", *PLAN])
        assert cli.main() == 130 and signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.count("twa: stopped; ") == 2


def test_advice_outlives_a_second_interruption():
    """One that comes while the advice is looked up, and one after it."""
    looks = []

    def how_to_go_on():
        looks.append(None)
        if len(looks) == 1:
            raise KeyboardInterrupt
        return "go on"

    with pytest.raises(KeyboardInterrupt) as during, advice.advising(how_to_go_on):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt) as after:
        try:
            with advice.advising(how_to_go_on):
                raise KeyboardInterrupt
        finally:
            raise KeyboardInterrupt
    assert [advice.advice_of(found.value) for found in (during, after)] == ["go on", "go on"]


# Tasks -------------------------------------------------------------------------------------------

TASK = """
import sys, torch
from torch import nn

def model():
    return nn.Linear(5, 4)

def train_data():
    return [torch.ones(2, 5)] * 4

def val_data():
    return train_data()

def loss(model, batch):
    {0}
    return model(batch).square().mean()
"""


@pytest.fixture
def average(heap, tmp_path):
    """average(line): a run whose loss has this line, of three checkpoints."""
    for k, name in enumerate(heap):
        save_file({"weight": torch.ones(4, 5) + 0.1 * k, "bias": torch.ones(4) * k}, name)

    def argv(line):
        (tmp_path / "task.py").write_text(TASK.format(line))
        options = ["--twa", "t:tensor:4", "--steps", "3", "--lr", "0.1", "--save-every", "1"]
        return ["average", "task.py", *heap, "-o", "out", *options]

    return argv


@pytest.mark.parametrize("line", ["sys.exit()", "sys.exit(0)"])
def test_a_task_that_ends_the_process(average, capsys, line):
    """Is no success, although it says so."""
    code, errors = says(capsys, average(line))
    text = "twa: error: task: expected functions that return, found sys.exit()"
    assert code == 2 and errors == [f"{text}: the run is not finished"]
    with pytest.raises(SystemExit, match="3"):
        cli.main([*average("sys.exit(3)"), "--overwrite"])


def test_a_fault_of_the_task_says_how_to_go_on(average, capsys):
    """Such as a worker of a DataLoader that was killed: the traceback, and how to continue."""
    late = "loss.calls = getattr(loss, 'calls', 0) + 1; assert loss.calls < 30, 'worker killed'"
    with pytest.raises(AssertionError, match="worker killed"):
        cli.main(average(late))
    assert "twa: continue with the same command and --resume" in capsys.readouterr().err


# Results of another run -------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing handles it."""


def test_killed_before_the_first_state_of_a_run_that_replaces_a_result(
    average, monkeypatch, capsys
):
    """The old result is there, and --resume does not take it for that of the new run."""
    argv = average("pass")
    assert cli.main(argv) == 0
    old = load_file("out/averaged.safetensors")
    assert cli.main([*argv, "--resume"]) == 0
    assert "there is nothing to resume" in capsys.readouterr().out
    argv[argv.index("c2.safetensors")] = "c0.safetensors"  # other candidates
    argv.remove("c0.safetensors")

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr("twa.cli.average.Merge", killed)
        cli.main([*argv, "--overwrite"])
    assert old["bias"].equal(load_file("out/averaged.safetensors")["bias"])
    code, errors = says(capsys, argv)
    assert code == 2 and "holds the state of an unfinished run" in errors[0]
    assert cli.main([*argv, "--resume"]) == 0
    assert "there is nothing to resume" not in capsys.readouterr().out
    assert not old["bias"].equal(load_file("out/averaged.safetensors")["bias"])
    assert not os.path.exists("out/state.pt")


def test_other_forms_of_an_earlier_result(average, heap, tmp_path):
    """Of candidates that were Hugging Face's, in a directory that gets another result."""
    argv = average("pass")
    for k, name in enumerate(heap):
        os.mkdir(f"hf{k}")
        shutil.copyfile(name, f"hf{k}/model.safetensors")
        with open(f"hf{k}/config.json", "w") as f:
            f.write('{"model_type": "a"}')
    pretrained = [f"hf{heap.index(a)}" if a in heap else a for a in argv]
    assert cli.main([*pretrained, "--dcp"]) == 0
    more = {"averaged", "averaged_dcp", "mergekit.yaml"}
    assert more <= set(os.listdir("out"))
    mixed = [a if a != "c0.safetensors" else "out/averaged" for a in argv]
    assert cli.main([*mixed, "--overwrite"]) == 2  # a candidate is no output
    assert more <= set(os.listdir("out"))
    assert cli.main([*argv, "--overwrite"]) == 0
    assert not more & set(os.listdir("out"))


def test_pack_resume_of_a_finished_file(average, capsys):
    """The file of the same run, wherever the candidates lie now, is finished; another is not."""
    heap = [a for a in average("pass") if a.startswith("c")]
    pack = ["pack", "task.py", *heap, "-o", "b.safetensors"]
    assert cli.main(pack) == 0
    os.mkdir("moved")
    for name in heap:
        os.rename(name, f"moved/{name}")
    moved = [f"moved/{a}" if a in heap else a for a in pack]
    assert cli.main([*moved, "--resume"]) == 0
    code, errors = says(capsys, [*moved, "--center", "last", "--resume"])
    assert code == 2 and "of another run: center_weights differs" in errors[0]


# Files that cannot be read -----------------------------------------------------------------------


@pytest.fixture
def unreadable(monkeypatch):
    """unreadable(name): opening such a file is refused, as that of another user."""
    real = io.open

    def refuse(name):
        def opened(path, *arguments, **options):
            if os.path.basename(str(path)) == name:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *arguments, **options)

        monkeypatch.setattr("builtins.open", opened)
        monkeypatch.setattr(io, "open", opened)
        if sys.version_info < (3, 11):  # which keeps an `open` of its own
            monkeypatch.setattr(pathlib._NormalAccessor, "open", staticmethod(opened))

    return refuse


def test_a_candidate_that_may_not_be_read(heap, average, unreadable, capsys):
    argv = average("pass")
    unreadable("c1.safetensors")
    for command in (argv, merged(heap, "out"), ["export", *heap, "--at", "c1", "-o", "x"]):
        code, errors = says(capsys, command)
        assert code == 2 and errors == [
            "twa: error: c1.safetensors: cannot be read (Permission denied)"
        ]
    assert cli.main(["inspect", *heap]) == 0
    assert "cannot be read (Permission denied)" in capsys.readouterr().out


def test_a_task_that_may_not_be_read(average, unreadable, capsys):
    argv = average("pass")
    unreadable("task.py")
    code, errors = says(capsys, argv)
    assert code == 2 and errors == [
        "twa: error: task 'task.py': cannot be read (Permission denied)"
    ]


def test_paths_that_cannot_be(heap, average, capsys):
    """Names that are too long, links to nothing and to themselves: one line, before the work."""
    long, average = "x" * 300, average("pass")
    code, errors = says(capsys, merged([long], "out"))
    assert code == 2 and "cannot be read (File name too long)" in errors[0]
    os.symlink("nowhere", "dangling")
    os.symlink("loop", "loop")
    for out, said in [
        (long, "the output directory cannot be written (File name too long)"),
        ("dangling", "expected a directory for the output, found a link to nothing"),
        ("loop", "expected a directory for the output, found a link to nothing"),
        ("dangling/x", "the output directory cannot be written (File exists)"),
        ("loop/x", "the output directory cannot be written (Too many levels of symbolic links)"),
        (f"{heap[0]}/x", "the output directory cannot be written (Not a directory)"),
    ]:
        for argv in (merged(heap, out), [out if a == "out" else a for a in average]):
            assert says(capsys, argv) == (2, [f"twa: error: {out}: {said}"])
    for argv in (
        merged(heap, f"{long}.safetensors"),
        ["pack", "task.py", *heap, "-o", f"{long}.safetensors"],
    ):
        code, errors = says(capsys, argv)
        assert code == 2 and "the output cannot be written (File name too long)" in errors[0]
    code, errors = says(capsys, ["inspect", *heap, "-o", long])
    assert code == 2 and "could not be written (File name too long)" in errors[0]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_names_that_are_no_text(average, capsys):
    """Names that are not UTF-8 are refused before the work, of candidates and of outputs."""
    folder = os.fsdecode(b"n\xff")
    os.mkdir(folder)
    argv = average("pass")
    candidates = [a for a in argv if a.startswith("c")]
    shutil.copy(candidates[0], folder)
    odd = [f"{folder}/{a}" if a == candidates[0] else a for a in argv]
    code, errors = says(capsys, odd)
    assert code == 2 and "expected paths that can be shown as they are" in errors[0]
    code, errors = says(capsys, [f"{folder}/out" if a == "out" else a for a in argv])
    assert code == 2 and "expected a name that can be shown as it is" in errors[0]


def test_a_demo_without_room(tmp_path, monkeypatch, capsys):
    """One line that names the file."""

    def replace(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(demo, "EVERY", 1)
    monkeypatch.setattr("os.replace", replace)
    code, errors = says(capsys, ["demo", "-o", tmp_path / "out"])
    assert code == 2 and len(errors) == 1
    assert "could not be written (No space left on device)" in errors[0]
    assert "demo_step_1.safetensors" in errors[0]
