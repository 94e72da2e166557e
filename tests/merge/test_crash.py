"""Kill -9, Ctrl-C and a full disk at every call that changes a file, in `twa pack`, `twa average`
and `Subspace.save`: afterwards each output is the old one or the new one, whole, and the run that
goes on gives the bits of an undisturbed one.

tests/crash.py strikes. Long lists of points are sampled with a fixed seed; TWA_CRASH_POINTS=all
takes all of them (about 7 minutes).
"""

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import textwrap
import time

import pytest
import torch
from crash import FULL, INTERRUPT, KILL, PASS, READ_ONLY, STOP, TASK, points_of, start
from safetensors.torch import save_file
from twa.io import atomic as files
from twa.io.candidates import Candidates
from twa.tasks import contract as tasks

NAME = "b.safetensors"
PARTS = [f"{NAME}.position.partial", f"{NAME}.scales.partial", f"{NAME}.partial"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with start(tmp_path_factory.mktemp("server")) as server:
        yield server


def heap(folder, wide, models):
    """A task of this width and directories with three candidates each, as save_pretrained writes
    them.
    """
    folder.mkdir(parents=True)
    (folder / "task.py").write_text(textwrap.dedent(TASK.format(wide=wide)))
    torch.manual_seed(0)
    task = tasks.load_task(str(folder / "task.py"))
    for name in models:
        model = task.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1 / wide)
        for k in range(3):
            for batch in task.train:
                optimizer.zero_grad()
                task.loss(model, batch).backward()
                optimizer.step()
            (folder / name / f"c{k}").mkdir(parents=True)
            save_file(model.state_dict(), folder / name / f"c{k}" / "model.safetensors")
            (folder / name / f"c{k}" / "config.json").write_text(json.dumps({"model_type": name}))
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Of 36 001 weights: blocks end inside tensors."""
    return heap(tmp_path_factory.mktemp("heaps") / "wide", 3000, "a")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return heap(tmp_path_factory.mktemp("heaps") / "small", 30, "ab")


def contents(folder):
    """Output -> its bytes; of a directory those of each file, or of each tensor of a
    torch.distributed.checkpoint, which has random names inside. What is hidden is no output."""
    if (folder / ".metadata").exists():
        checkpoint = Candidates(folder)[0]
        return {key: checkpoint.tensor(key).numpy().tobytes() for key in checkpoint.info}
    return {
        p.name: contents(p) if p.is_dir() else p.read_bytes()
        for p in folder.iterdir()
        if not p.name.startswith(".")
    }


def names(folder):
    """All there is, hidden or not."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) if folder.exists() else []


class Job:
    """One way to write outputs into `folder`: how to run it, what is right afterwards."""

    def __init__(self, server):
        self.server, self.calls = server, []

    def whole(self, folder):
        """What must be the same bits of a finished run."""
        return contents(folder)

    def prepare(self, folder):
        """What is there before the run."""

    def check_kill(self, folder):
        """Each output there is, is a whole one."""

    def record(self, folder):
        """An undisturbed run: its calls and its result."""
        self.prepare(folder)
        code, text = self.run(folder, mode=PASS)
        assert code == 0, text
        self.calls, self.expected, self.names = self.server.calls, self.whole(folder), names(folder)
        return self

    def check_finished(self, folder):
        assert self.whole(folder) == self.expected and names(folder) == self.names


class Pack(Job):
    old = None

    def __init__(self, server, heap, *options):
        super().__init__(server)
        self.heap, self.options = heap, options

    def request(self, folder):
        return {"argv": self.argv(folder, *self.options)}

    def argv(self, folder, *options):
        return ["pack", self.heap / "task.py", self.heap / "a", "-o", folder / NAME, *options]

    def run(self, folder, **strike):
        return self.server(argv=self.argv(folder, *self.options), below=folder, **strike)

    def check_kill(self, folder):
        if (folder / NAME).exists() or self.old:
            assert (folder / NAME).read_bytes() in (self.old, self.expected[NAME])

    def go_on(self, folder):
        code, text = self.server(argv=self.argv(folder, "--resume"))
        if code and (folder / NAME).read_bytes() == self.old:
            # killed before there was anything to continue
            assert code == 2 and "of another run: bits differs; pass --overwrite" in text, text
            code, text = self.run(folder)
        assert code == 0, text
        assert names(folder) == [NAME]


class PackOver(Pack):
    """In the place of an older basis, of 2 bits."""

    def __init__(self, server, heap):
        super().__init__(server, heap, "--overwrite")

    def prepare(self, folder):
        if self.old is None:
            code, text = self.server(argv=self.argv(folder, "--bits", "2"))
            assert code == 0, text
            self.old = (folder / NAME).read_bytes()
        folder.mkdir(exist_ok=True)
        (folder / NAME).write_bytes(self.old)


class Export(Job):
    """Subspace.save(sharded=True, basis=True) over another model's."""

    def __init__(self, server, heap):
        super().__init__(server)
        self.heap, self.before = heap, None

    def request(self, folder, model="a"):
        return {"export": (folder, self.heap / model, self.heap / "task.py")}

    def run(self, folder, model="a", **strike):
        return self.server(below=folder, **self.request(folder, model), **strike)

    def prepare(self, folder):
        if self.before is None:
            self.before = folder.with_name("before")
            code, text = self.run(self.before, "b")
            assert code == 0, text
            self.old = contents(self.before)
        shutil.copytree(self.before, folder)

    def check_kill(self, folder):
        found = contents(folder)
        assert found.keys() == self.expected.keys()
        for name, value in found.items():
            assert value in (self.old[name], self.expected[name]), name

    def go_on(self, folder):
        code, text = self.run(folder)
        assert code == 0, text


class Merge(Job):
    def __init__(self, server, heap, *options):
        super().__init__(server)
        self.heap, self.options = heap, options

    def request(self, folder):
        return {"argv": self.argv(folder, *self.options)}

    def argv(self, folder, *options):
        fixed = [
            "--twa",
            "t:tensor:4",
            "--steps",
            "4",
            "--save-every",
            "2",
            "--lr",
            "0.5",
            *options,
        ]
        return ["average", self.heap / "task.py", self.heap / "a", "-o", folder, *fixed]

    def run(self, folder, **strike):
        return self.server(argv=self.argv(folder, *self.options), below=folder, **strike)

    def whole(self, folder):
        found = contents(folder)
        rows = json.loads(found.pop("results.json"))["rows"]
        found["results"] = [
            {key: v for key, v in row.items() if key not in ("seconds", "peak MB")} for row in rows
        ]
        assert found.pop("report.md").endswith(b"threads\n") and found["report.png"]
        return found

    def check_kill(self, folder):
        for name, value in contents(folder).items() if folder.exists() else ():
            if name in self.expected:
                assert value == self.expected[name]
            elif name == "state.pt":
                assert torch.load(folder / name, weights_only=True)["format"] == "twa-state-6"

    def go_on(self, folder):
        code, text = self.server(argv=self.argv(folder, "--resume"))
        assert code == 0, text


JOBS = {"pack": Pack, "pack over": PackOver, "export": Export, "average": Merge}


@pytest.fixture(scope="module")
def jobs(server, wide, small, tmp_path_factory):
    """Each job, recorded once."""
    made = {}

    def job(name):
        if name not in made:
            made[name] = JOBS[name](server, wide if name.startswith("pack") else small).record(
                tmp_path_factory.mktemp("undisturbed") / "out"
            )
        return made[name]

    return job


# Kill -9 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, count", [("pack", 12), ("pack over", 5), ("export", 8), ("average", 8)]
)
def test_killed_at_a_call(jobs, tmp_path, name, count):
    """Before each call, and in the middle of each write."""
    job = jobs(name)
    # a trained average is the best, so that its weights are part of the state
    if name == "average":
        assert any(call == "rename" and "state-best" in to[0] for call, _, *to in job.calls)
    for mode, point in points_of(job.calls, count):
        folder = tmp_path / f"{mode}-{point}"
        job.prepare(folder)
        code, text = job.run(folder, mode=mode, point=point)
        assert code == -signal.SIGKILL, (point, text)
        job.check_kill(folder)
        job.go_on(folder)
        job.check_finished(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["pack", "export"])
def test_killed_at_20_times(jobs, tmp_path, name):
    """From outside, at moments spread over the length of a run, the first at once."""
    job, killed = jobs(name), 0
    job.prepare(tmp_path / "timed")
    begun = time.perf_counter()
    assert job.run(tmp_path / "timed")[0] == 0
    seconds = time.perf_counter() - begun
    for k in range(20):
        folder = tmp_path / str(k)
        job.prepare(folder)
        code, text = job.run(folder, signal_after=(signal.SIGKILL, seconds * k / 20))
        assert code in (0, -signal.SIGKILL), text
        killed += code != 0
        job.check_kill(folder)
        job.go_on(folder)
        job.check_finished(folder)
    assert killed  # the first; how many more, depends on the machine


@pytest.mark.parametrize("name, last", [("pack", 40), ("average", 90)])
def test_killed_again_and_again(jobs, tmp_path, name, last):
    """Each run goes on where the one before was killed, until one is not."""
    job, kills, choose = jobs(name), 0, random.Random(0)
    for round in range(20):
        folder = tmp_path / str(round)
        code = None
        while code != 0:
            code, text = job.server(
                argv=job.argv(folder, "--resume"),
                below=folder,
                mode=KILL,
                point=choose.randint(1, last),
            )
            assert code in (0, -signal.SIGKILL), text
            kills += code != 0
            job.check_kill(folder)
        job.check_finished(folder)
        if kills >= 20:
            return
    raise AssertionError(kills)


def test_directories_where_paths_cannot_be_swapped(tmp_path, monkeypatch):
    """Killed between the two renames: the next run puts the older one back, or a newer one in its
    place.
    """

    class Killed(BaseException):
        pass

    def rename(source, target, original=os.rename):
        if source.name == ".averaged.tmp" and (tmp_path / ".averaged.old").exists():
            raise Killed
        original(source, target)

    def write(text):
        (tmp_path / ".averaged.tmp").mkdir(exist_ok=True)
        (tmp_path / ".averaged.tmp" / "a").write_text(text)
        files.replace_folder(tmp_path / ".averaged.tmp", tmp_path / "averaged")

    monkeypatch.setattr(files, "_swap", lambda a, b: False)
    write("old")
    for again, expected in (
        (lambda: files.clear_unfinished(tmp_path, ["averaged"]), "old"),
        (lambda: write("new"), "new"),
    ):
        with monkeypatch.context() as m, pytest.raises(Killed):
            m.setattr(os, "rename", rename)
            write("lost")
        assert names(tmp_path) == [
            ".averaged.old",
            ".averaged.old/a",
            ".averaged.tmp",
            ".averaged.tmp/a",
        ]
        again()
        assert (
            names(tmp_path) == ["averaged", "averaged/a"]
            and (tmp_path / "averaged" / "a").read_text() == expected
        )


def test_temporary_files_of_dead_processes(tmp_path):
    """Are removed by the next write to the same place; those of running processes and of other
    places are not.
    """
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = {owner: tmp_path / f".a.json.{owner}.tmp" for owner in (dead.pid, os.getppid(), "else")}
    other = tmp_path / f".b.json.{dead.pid}.tmp"
    for file in (*left.values(), other):
        file.write_text("half")
    files.write_json(tmp_path / "a.json", 3)
    assert names(tmp_path) == sorted(
        p.name for p in (left[os.getppid()], left["else"], other, tmp_path / "a.json")
    )


def test_two_writers_of_one_path(tmp_path, monkeypatch):
    """Two threads; or processes of the same number, in containers that share the directory: what
    is put there is whole.
    """
    path = tmp_path / "a"

    def first(temporary):
        temporary.write_text("first")
        files.write_text(path, "second")  # meanwhile
        assert path.read_text() == "second"

    files.replace(path, first)
    assert path.read_text() == "first" and names(tmp_path) == ["a"]


def test_what_others_left_of_a_path(tmp_path):
    """Temporary files are removed when nobody writes them, whatever the process's number."""
    path, dead = tmp_path / "a", 2**22 + 1  # more than Linux gives
    left = [tmp_path / f".a.{pid}-00.tmp" for pid in (dead, os.getpid())]
    in_use = [tmp_path / f".a.{pid}-01.tmp" for pid in (dead, os.getpid())]
    for file in (*left, *in_use):
        file.write_text("half")
    with contextlib.ExitStack() as stack:
        for file in in_use:  # as a process of another container does
            fcntl.flock(stack.enter_context(open(file)), fcntl.LOCK_EX)
        files.write_text(path, "whole")
    assert names(tmp_path) == sorted(["a", *(file.name for file in in_use)])


# What is on the disk when ------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(JOBS))
def test_the_order_on_the_disk(jobs, name):
    """What gets its name is synced before, and its directory after; a position or a state only
    after what it speaks of.
    """
    job, unsynced, renamed = jobs(name), set(), set()
    for call, path, *to in job.calls:
        if path == f"/{files.LOCK}":  # nothing is in it
            continue
        if call in ("write", "create", "truncate", "link"):
            unsynced |= {path, folder_of(path)} if call in ("create", "link") else {path}
        elif call == "sync":
            unsynced.discard(path)
            renamed = {p for p in renamed if folder_of(p) != path}
        elif call in ("rename", "swap"):
            # torch.distributed.checkpoint, in a directory that is not at its place yet
            if folder_of(path):
                unsynced = unsynced - {path} | {to[0], folder_of(path)}
                continue
            assert not any(p == path or p.startswith(path + "/") for p in unsynced), (
                call,
                path,
                unsynced,
            )
            if to[0].endswith((".position.partial", "state.pt")):
                # "": the folder, for the name of the temporary file
                assert unsynced <= {""} and not renamed, (to, unsynced, renamed)
            renamed.add(to[0])
    assert not renamed and sum(call == "rename" for call, *_ in job.calls) >= 2


def folder_of(path):
    return os.path.dirname(path).rstrip("/")


# A full disk -------------------------------------------------------------------------------------


def sample(calls, count, kinds):
    """Numbers of calls of these kinds, the first and the last among them."""
    points = [k for k, (call, *_) in enumerate(calls, 1) if call in kinds]
    chosen = {points[0], points[-1], *random.Random(1).sample(points, min(count, len(points)))}
    return points if os.environ.get("TWA_CRASH_POINTS") == "all" else sorted(chosen)


@pytest.mark.parametrize(
    "name, count", [("pack", 5), ("pack over", 3), ("export", 6), ("average", 3)]
)
def test_no_space_from_a_call_on(jobs, tmp_path, name, count):
    """A clear error, and what was there before still is; with space again, the same bits."""
    job = jobs(name)
    for point in sample(job.calls, count, ("write", "create", "link", "sync", "rename", "swap")):
        folder = tmp_path / str(point)
        job.prepare(folder)
        code, text = job.run(folder, mode=FULL, point=point)
        call, path, *_ = job.calls[point - 1]
        if (call, os.path.basename(path)) == ("sync", os.path.basename(path)) and code == 0:
            # only one call fails, and none after it takes space; or a directory that cannot be
            # synced, as on some file systems
            pass
        else:
            assert code == 2 and "No space left on device" in text and "Traceback" not in text, (
                point,
                call,
                path,
                code,
                text,
            )
            assert str(folder) in text
        job.check_kill(folder)
        if name == "pack" and names(folder)[:1] != [NAME]:
            assert names(folder) in ([], sorted(PARTS)), names(folder)
            assert ("--resume" in text) == bool(names(folder))
        job.go_on(folder)
        job.check_finished(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("share", [0.3, 0.8, 0.99])
def test_a_small_file_system(jobs, tmp_path, share):
    """A tmpfs too small for the basis and its scales: full among the codes, or at the finish."""
    job, folder = jobs("pack"), tmp_path / "disk"
    folder.mkdir()
    size = len(job.expected[NAME])
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(size * share)}", "tmpfs", folder]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"mounting a tmpfs: {error}")
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted: {done.stderr.strip()}")
    try:
        code, text = job.run(folder, no_check=True)
        assert (
            code == 2
            and "could not be written (No space left on device)" in text
            and "Traceback" not in text
        ), text
        assert (
            names(folder) == sorted(PARTS) and "continue with the same command and --resume" in text
        )
        subprocess.run(["mount", "-o", f"remount,size={3 * size}", folder], check=True)
        job.go_on(folder)
        job.check_finished(folder)
    finally:
        subprocess.run(["umount", folder], check=True)


# Ctrl-C ------------------------------------------------------------------------------------------


def follow(job, folder, text):
    """Does what the last line says, which is all there is besides warnings and bars of progress."""
    line = text.rstrip("\n").splitlines()[-1]
    assert line.startswith("twa: stopped; ") and "Traceback" not in text, text
    if "continue with the same command and --resume" in line:
        assert ("in place of --overwrite" in line) == ("--overwrite" in job.options)
        code, text = job.server(argv=job.argv(folder, "--resume"))
        assert code == 0 and "nothing to resume" not in text, text
    elif "start again with the same command" in line:
        code, text = job.run(folder)
        assert code == 0, text
    else:
        assert "is finished" in line or "the result is in" in line, line
        code, text = job.server(argv=job.argv(folder, "--resume"))
        assert code == 0 and "nothing to resume" in text, text


@pytest.mark.parametrize("name, count", [("pack", 5), ("pack over", 3), ("average", 3)])
def test_interrupted_at_a_call(jobs, tmp_path, name, count):
    job = jobs(name)
    for point in sample(job.calls, count, {call for call, *_ in job.calls}):
        folder = tmp_path / str(point)
        job.prepare(folder)
        code, text = job.run(folder, mode=INTERRUPT, point=point)
        assert code == 130, (point, job.calls[point - 1], text)
        job.check_kill(folder)
        follow(job, folder, text)
        job.check_finished(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["pack", "average"])
def test_interrupted_from_outside(jobs, tmp_path, name):
    """To the end of the interpreter."""
    job = jobs(name)
    folder = tmp_path / "out"
    code, _ = job.run(folder, mode=STOP, point=len(job.calls) // 2)
    assert code == "stopped"
    os.kill(job.server.pid, signal.SIGINT)
    code, text = job.server.go_on(job.server.pid)
    assert code == 130, text
    follow(job, folder, text)
    job.check_finished(folder)


# Others at work ----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_two_at_once(jobs, tmp_path, share):
    """The second to pack to a place is sent away, whatever it is asked, and the first is not
    disturbed.
    """
    job, folder = jobs("pack"), tmp_path / "out"
    code, _ = job.run(folder, mode=STOP, point=int(len(job.calls) * share))
    first = job.server.pid
    assert code == "stopped"
    for options in ([], ["--resume"], ["--overwrite"], ["--overwrite", "--bits", "2"]):
        code, text = job.server(argv=job.argv(folder, *options), name="second")
        assert code == 2, (options, text)
        assert "another process is writing it" in text or (
            not options and "of an unfinished run" in text
        ), text
    code, text = job.server.go_on(first)
    assert code == 0, text
    job.check_finished(folder)


@pytest.mark.parametrize("name, share", [("pack", 0.5), ("average", 0.2), ("average", 0.7)])
def test_the_output_directory_disappears(jobs, tmp_path, name, share):
    job, folder = jobs(name), tmp_path / "out"
    code, _ = job.run(folder, mode=STOP, point=int(len(job.calls) * share))
    assert code == "stopped"
    shutil.rmtree(folder)
    code, text = job.server.go_on(job.server.pid)
    if name == "average" and code == 0:  # a later state makes it anew
        return job.check_finished(folder)
    assert (
        code == 2
        and "could not be written (No such file or directory)" in text
        and "Traceback" not in text
    ), text
    job.go_on(folder)
    job.check_finished(folder)


@pytest.mark.parametrize("name", ["pack", "export", "average"])
def test_an_output_directory_that_cannot_be_written(jobs, tmp_path, name):
    job, folder = jobs(name), tmp_path / "out"
    job.prepare(folder)
    before = names(folder)
    code, text = job.server(below=tmp_path, mode=READ_ONLY, **job.request(folder))
    assert (
        code == 2
        and "Read-only file system" in text
        and "Traceback" not in text
        and str(folder) in text
    ), text
    assert names(folder) == before


# Not the same run --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pack", "average"])
def test_candidates_that_changed(server, tmp_path, name):
    job = JOBS[name](server, heap(tmp_path / "heap", 3000 if name == "pack" else 30, "a")).record(
        tmp_path / "whole"
    )
    folder, saved = (
        tmp_path / "out",
        max(
            k
            for k, c in enumerate(job.calls)
            if c[-1].endswith((".position.partial", "state.pt")) and c[0] == "rename"
        ),
    )
    assert job.run(folder, mode=KILL, point=saved + 3)[0] == -signal.SIGKILL
    file = tmp_path / "heap" / "a" / "c1" / "model.safetensors"
    kept = [name for name in names(folder) if name != files.LOCK]
    original, before = file.read_bytes(), {p: (folder / p).read_bytes() for p in kept}
    file.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    code, text = server(argv=job.argv(folder, "--resume"))
    assert code == 2 and "of another run: candidate" in text, text
    assert before.items() <= {p: (folder / p).read_bytes() for p in names(folder)}.items()
    file.write_bytes(original)
    job.go_on(folder)
    job.check_finished(folder)


@pytest.mark.parametrize(
    "part, change",
    [(PARTS[2], "shorter"), (PARTS[2], "header"), (PARTS[1], "empty"), (PARTS[0], "empty")],
)
def test_left_over_parts_of_something_else(jobs, tmp_path, part, change):
    job = jobs("pack")
    last = max(k for k, (call, *_) in enumerate(job.calls, 1) if call == "rename") - 2
    assert job.run(tmp_path, mode=KILL, point=last)[0] == -signal.SIGKILL
    data = (tmp_path / part).read_bytes()
    (tmp_path / part).write_bytes(
        {"shorter": data[:-4096], "header": data[:2000] + b"?" + data[2001:], "empty": b""}[change]
    )
    code, text = job.server(argv=job.argv(tmp_path, "--resume"))
    assert code == 2 and part in text and "Traceback" not in text, text
    assert not (tmp_path / NAME).exists()
    code, text = job.server(argv=job.argv(tmp_path, "--overwrite"))
    assert code == 0, text
    job.check_finished(tmp_path)
