"""Kill -9 and a full disk at every call by which a recorder changes a file: what was written is
there, and the run that goes on gets the bits of an undisturbed one.

tests/crash.py strikes; TWA_CRASH_POINTS=all takes every point.
"""

import shutil
import signal

import pytest
import torch
import twa
from conftest import exhaustive
from crash import FULL, KILL, PASS, READ_ONLY, points_of, start
from twa.io.errors import CandidateError

#: recordings, and how many points of each are struck at
JOBS = {
    "all": ({"steps": 6}, 8),
    "keep": ({"steps": 9, "keep": 4}, 8),
    "rewind": ({"steps": 6, "back": 3}, 8),
    "rewind to the first": ({"steps": 4, "back": 1}, 8),
    "rewind and keep": ({"steps": 6, "back": 4, "keep": 4}, 8),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with start(tmp_path_factory.mktemp("server")) as server:
        yield server


def files(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


def snapshots(folder):
    """step -> its tensors, each as bytes."""
    return {
        c.step: {key: c.tensor(key).numpy().tobytes() for key in c.info}
        for c in twa.Candidates(folder)
    }


class Job:
    """An undisturbed recording: its calls, its files, and every snapshot that there ever was."""

    def __init__(self, server, name, folder):
        self.server, (self.options, self.count) = server, JOBS[name]
        self.back = self.options.get("back")
        code, text = self.run(folder, mode=PASS)
        assert code == 0, text
        self.calls, self.expected = server.calls, files(folder)
        self.final, self.before = snapshots(folder), {}
        if self.back is not None:  # of before rewind()
            options = {k: v for k, v in self.options.items() if k != "keep"}
            whole = folder.with_name(f"{folder.name}-before")
            # killed before the first call of rewind(), which removes the last file
            point = next(
                k
                for k, (call, path, *_) in enumerate(self.calls, 1)
                if call == "unlink" and path.endswith(f"step_{options['steps']}.safetensors")
            )
            code, _ = self.run(whole, mode=KILL, point=point)
            assert code == -signal.SIGKILL
            self.before = snapshots(whole)

    def run(self, folder, **strike):
        return self.server(record={"folder": str(folder), **self.options}, below=folder, **strike)

    def check_finished(self, folder):
        """The files of the undisturbed recording, and nothing else.

        With keep= a killed run may drop old ones a snapshot later: those that both have are equal.
        """
        found, expected = files(folder), self.expected
        assert {p.name for p in folder.iterdir()} == {*found, "recording.lock"}
        if keep := self.options.get("keep"):
            mine = snapshots(folder)
            assert keep <= len(mine) <= keep + keep // 4
            assert all(mine[step] == self.final[step] for step in list(mine)[-keep:])
            found, expected = (
                {n: f[n] for n in found.keys() & expected} for f in (found, expected)
            )
            assert len(found) >= keep - 1
        assert found == expected

    def written(self, point):
        """Steps of the files that have their name before a call."""
        found = set()
        for call, path, *to in self.calls[: point - 1]:
            name = (to[0] if to else path).strip("/")
            if name.endswith(".safetensors") and not name.startswith("."):
                step = (name.split("_")[0], int(name.split("_")[1].split(".")[0]))
                found = found | {step} if call == "rename" else found - {step}
        anchor = max((s for kind, s in found if kind == "anchor"), default=None)
        return sorted({s for _, s in found if anchor is not None and s >= anchor})


@pytest.fixture(scope="module")
def jobs(server, tmp_path_factory):
    made = {}

    def job(name):
        if name not in made:
            made[name] = Job(server, name, tmp_path_factory.mktemp("undisturbed") / "run")
        return made[name]

    return job


@pytest.mark.parametrize(
    "name",
    ["all", "keep", "rewind", exhaustive("rewind to the first"), exhaustive("rewind and keep")],
)
def test_killed_at_a_call(jobs, tmp_path, name):
    """Before each call, and in the middle of each write."""
    job = jobs(name)
    for mode, point in points_of(job.calls, job.count):
        folder = tmp_path / f"{mode}-{point}"
        code, text = job.run(folder, mode=mode, point=point)
        assert code == -signal.SIGKILL, (point, text)
        if steps := job.written(point):
            found = snapshots(folder)
            assert list(found) == steps, (mode, point)
            for step, tensors in found.items():
                known = (job.final.get(step), job.before.get(step))
                assert tensors in known or None in known, (mode, point, step)
        else:
            with pytest.raises(CandidateError, match=r"expected|no such file"):
                twa.Candidates(folder)
        code, text = job.run(folder)
        assert code == 0, text
        job.check_finished(folder)
        shutil.rmtree(folder)


def test_killed_again_and_again(jobs, tmp_path):
    """Each run is killed a few calls on, which suffice to drop an old snapshot, until one ends."""
    job = jobs("keep")
    for _ in range(100):
        code, text = job.run(tmp_path / "run", mode=KILL, point=13)
        if code == 0:
            break
        assert code == -signal.SIGKILL, text
    job.check_finished(tmp_path / "run")


@pytest.mark.parametrize("mode", [FULL, READ_ONLY])
@pytest.mark.parametrize("name", ["all", "keep"])
def test_no_room_for_a_while(jobs, server, tmp_path, name, mode):
    """A warning; training goes on, and snapshots are taken again once there is room."""
    job = jobs(name)
    points = range(3, len(job.calls) // 2, 3 if mode == FULL else 7)
    room, steps = 8, 12
    for point in points:
        folder = tmp_path / f"{mode}-{point}"
        record = {"folder": str(folder), **job.options, "steps": steps, "room": room}
        code, text = server(record=record, below=folder, mode=mode, point=point)
        assert code == 0, text
        assert "is not recorded" in text or "old snapshots stay" in text, (point, text)
        said = [line.split()[1:] for line in text.splitlines() if line.startswith("step ")]
        assert [int(step) for step, _ in said] == list(range(1, steps + 1)), text
        taken = [int(step) for step, was in said if was == "True"]
        assert taken[-3:] == [10, 11, 12], text
        found = twa.Candidates(folder)
        assert [c.step for c in found] == taken[len(taken) - len(found) :]
        assert len(found) == len(taken) or len(found) >= job.options["keep"]
        first = {c.step: c.tensor("0.weight") for c in found}
        for step in (10, 11, 12):  # 8 bits of one step
            exact = true_weights(step)
            assert (first[step] - exact).abs().max() < 0.01, (point, step)
        shutil.rmtree(folder)


def true_weights(step):
    """What the server's model has after so many steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(9, 40), torch.nn.BatchNorm1d(40))
    for k in range(1, step + 1):
        g = torch.Generator().manual_seed(k)
        for t in (*model.parameters(), model[1].running_mean):
            t.data += 0.1 * torch.randn(t.shape, generator=g)
    return model[0].weight.detach()


def test_no_room_to_the_end(jobs, tmp_path):
    """What is written stays readable; close() says what is lost."""
    job = jobs("all")
    point = len(job.calls) // 2
    code, text = job.run(tmp_path / "run", mode=FULL, point=point)
    assert code == 0 and "snapshots could not be written (No space left on device)" in text, text
    found = snapshots(tmp_path / "run")
    assert list(found) == job.written(point) and len(found) >= 2
    assert all(tensors == job.final[step] for step, tensors in found.items())


def test_no_room_at_the_start(server, tmp_path):
    """The directory cannot be made: an error, as there is nothing to train yet."""
    for mode, said in ((FULL, "No space left"), (READ_ONLY, "Read-only")):
        folder = tmp_path / "run"
        record = {"folder": str(folder), "steps": 3}
        code, text = server(record=record, below=folder, mode=mode, point=1)
        assert code == 2 and said in text and "run" in text, text
        assert not folder.exists()
