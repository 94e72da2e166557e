"""What must not stop a training that is recorded, and must not make the recording wrong: no memory,
no thread, a fork, an interruption, files that somebody removes.
"""

import os
import shutil
import threading
import warnings

import pytest
import torch
import twa
from torch import nn
from twa.io import atomic
from twa.io.errors import CandidateError, CandidateWarning, TwaError
from twa.recorder import store
from twa.recorder.recorder import _Pending
from twa.recorder.store import Snapshot

import twa_kernels as tk

pytestmark = pytest.mark.usefixtures("one_thread")


class Training:
    """A small model, its recorder, and steps of training."""

    def __init__(self, path, **options):
        torch.manual_seed(0)
        self.model, self.seen = nn.Sequential(nn.Linear(5, 40), nn.BatchNorm1d(40)), {}
        self.recorder = twa.Recorder(self.model, every=1, bits=8, path=path, **options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.recorder.attach(self.optimizer)

    def steps(self, count):
        """Takes so many; returns the warnings."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(count):
                self.optimizer.zero_grad()
                self.model(torch.randn(8, 5)).square().mean().backward()
                self.optimizer.step()
                self.seen[self.recorder.count] = self.model[0].weight.detach().clone()
        return [str(w.message) for w in said if w.category is CandidateWarning]

    def check(self, path, steps):
        """The recording has these steps, and the weights that there were."""
        found = {c.step: c.tensor("0.weight") for c in twa.Candidates(path)}
        assert list(found) == steps
        for step, weights in found.items():
            assert (weights - self.seen[step]).abs().max() < 0.01


def fail(*_, **__):
    raise MemoryError("no room for 12 bytes")


@pytest.mark.parametrize("what", ["kernel", "state"])
@pytest.mark.parametrize("before", [0, 3])
def test_no_memory_for_a_snapshot(tmp_path, monkeypatch, what, before):
    """Whatever fails: the recording ends with a warning, the training goes on."""
    training = Training(tmp_path)
    assert training.steps(before) == []
    with monkeypatch.context() as m:
        if what == "kernel":
            m.setattr(tk, "record", fail)
        else:
            m.setattr(type(training.recorder._watched), "state", fail)
        said = training.steps(3)
    at = before + 1 + (before == 0 and what == "kernel")  # the first snapshot needs no kernel
    text = f"recording ends before step {at}: MemoryError: no room for 12 bytes"
    assert said == [f"{text}; make another Recorder"]
    assert training.steps(2) == []
    training.recorder.close()
    if at > 1:
        training.check(tmp_path, list(range(1, at)))


def test_no_thread_to_write(tmp_path, monkeypatch):
    """Snapshots wait in memory, and flush() writes them itself."""
    training = Training(tmp_path)

    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    said = training.steps(4)
    assert len(said) == 2 and all("is not recorded: " in text for text in said), said
    assert "can't start new thread" in said[0]
    training.recorder.close()
    training.check(tmp_path, [1, 2])


def test_a_forked_process_does_not_record(tmp_path):
    """It trains on with warnings, and neither hangs nor writes."""
    training = Training(tmp_path)
    training.steps(3)
    training.recorder.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            said = training.steps(9)
            training.recorder.state_dict()
            training.recorder.close()
            with pytest.raises(TwaError, match="forked from"):
                training.recorder._store.cut(1)
            code = 0 if len(said) == 9 and all("forked from" in text for text in said) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert training.steps(2) == []
    training.recorder.close()
    training.check(tmp_path, [1, 2, 3, 4, 5])


@pytest.mark.parametrize("name", ["anchor_1", "step_2", "step_4"])
def test_a_file_is_removed_while_recording(tmp_path, name):
    """Recording waits, at the latest from flush() on, and goes on when the file is there again."""
    training, path = Training(tmp_path), tmp_path / f"{name}.safetensors"
    training.steps(4)
    training.recorder.flush()
    data = path.read_bytes()
    path.unlink()
    training.steps(2)
    with pytest.warns(CandidateWarning, match=rf"{name}.safetensors: is gone"):
        training.recorder.flush()
    assert len([text for text in training.steps(2) if "is gone, and later" in text]) == 2
    assert not (tmp_path / "step_7.safetensors").exists()
    # files in the middle are looked for by flush(): what is there is of use when they are back
    assert (tmp_path / "step_5.safetensors").exists() == (name == "step_2")
    path.write_bytes(data)
    training.recorder.flush()
    training.steps(1)
    training.recorder.close()
    steps = [c.step for c in twa.Candidates(tmp_path)]
    assert steps[:4] == [1, 2, 3, 4] and steps[-1] == 9
    training.check(tmp_path, steps)


def test_the_work_for_a_snapshot_does_not_grow(tmp_path, monkeypatch):
    """One step's file is looked for, and none is read: the directory of months is long."""
    training, looked_for = Training(tmp_path), []
    training.steps(3)
    training.recorder.flush()

    class Names:
        def format(self, step):
            looked_for.append(step)
            return f"step_{step}.safetensors"

    with monkeypatch.context() as m:
        m.setattr(store, "run_of", fail)
        m.setattr(store.os, "listdir", fail)
        m.setattr(store, "STEP", Names())
        assert training.steps(3) == []
        training.recorder._store._work.result()
        assert looked_for == [3, 4, 5]
    training.recorder.close()
    training.check(tmp_path, [1, 2, 3, 4, 5, 6])


def test_another_anchor_is_read(tmp_path):
    """One that another run has put in its place, while this one records."""
    training, other = Training(tmp_path / "mine"), Training(tmp_path / "other")
    other.steps(1)
    other.recorder.close()
    training.steps(3)
    training.recorder.flush()
    name = "anchor_1.safetensors"
    (tmp_path / "other" / name).replace(tmp_path / "mine" / name)
    training.steps(1)
    with pytest.warns(CandidateWarning, match="is of another run"):
        training.recorder.close()
    assert not (tmp_path / "mine" / "step_4.safetensors").exists()


def test_a_closed_recorder_looks_for_no_files(tmp_path):
    """They are those of the next one."""
    training = Training(tmp_path)
    training.steps(4)
    training.recorder.close()
    later = Training(tmp_path, resume=True)
    later.recorder.rewind(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training.recorder.apply("last")
    assert (training.model[0].weight - training.seen[2]).abs().max() < 0.01
    later.recorder.close()


def test_an_average_of_what_can_be_read(tmp_path):
    """Of the snapshots before a file that was removed, with a warning; none without the first."""
    training = Training(tmp_path)
    training.steps(4)
    training.recorder.flush()
    (tmp_path / "step_3.safetensors").unlink()
    with pytest.warns(CandidateWarning, match=r"step_4.* is left out: snapshot 2 is missing"):
        training.recorder.apply("last")
    assert (training.model[0].weight - training.seen[2]).abs().max() < 0.01
    (tmp_path / "anchor_1.safetensors").unlink()
    with pytest.raises(CandidateError, match="no anchor"):
        training.recorder.apply("last")


def test_another_recording_in_the_same_place(tmp_path):
    """The directory was removed, and another training records there: its files stay its own."""
    mine = Training(tmp_path / "run")
    mine.steps(1)
    mine.recorder.flush()
    shutil.rmtree(tmp_path / "run")
    other = Training(tmp_path / "run")
    other.steps(3)
    other.recorder.close()
    mine.steps(2)
    with pytest.warns(CandidateWarning, match="is of another run"):
        mine.recorder.close()
    other.check(tmp_path / "run", [1, 2, 3])


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_interrupted_while_a_snapshot_is_taken(tmp_path, monkeypatch, kind):
    """In memory all are counted from the last one, which is unknown: an error, no wrong average."""
    path = None if kind == "memory" else tmp_path
    training = Training(path)
    training.steps(3)
    original = tk.record

    def interrupted(*arguments):
        original(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(tk, "record", interrupted)
        training.steps(1)
    recorder = training.recorder
    if kind == "files":
        recorder.apply("last")
        assert (training.model[0].weight - training.seen[3]).abs().max() < 0.01
        recorder.rewind(3)
        training.steps(2)
        recorder.close()
        training.check(path, [1, 2, 3, 4, 5])
        return
    for use in (
        lambda: recorder.apply("last"),
        recorder.recording,
        recorder.state_dict,
        lambda: recorder.rewind(2),
    ):
        with pytest.raises(TwaError, match="taking the last one was interrupted"):
            use()
    recorder.rewind(None)
    training.steps(2)
    recorder.apply("last")
    assert (training.model[0].weight - training.seen[2]).abs().max() < 0.01


class Arriving:
    """An event of a GPU, after which a snapshot is in the CPU's memory."""

    def query(self):
        return False

    def synchronize(self):
        pass


def take_as_on_a_gpu(recorder, step, weights):
    """What `Recorder._take` does there."""
    with recorder._moving():
        codes, scales, bad = tk.record(weights, recorder._reference, recorder.bits)
        snapshot = Snapshot(step, codes, scales, recorder._watched.state())
        recorder._pending.append(_Pending(snapshot, bad, [Arriving()]))
    return True


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("kind", ["memory", "files"])
def test_a_snapshot_on_its_way_is_lost(tmp_path, monkeypatch, kind, error):
    """So are those after it, which are differences from it; no later one is recorded."""
    path = None if kind == "memory" else tmp_path
    training = Training(path)
    recorder, add = training.recorder, twa.Recorder._add
    monkeypatch.setattr(twa.Recorder, "_take", take_as_on_a_gpu)
    assert training.steps(5) == [] and len(recorder._pending) == 4

    def fails_at_3(recorder, pending, weights=None):
        if pending.snapshot.step == 3:
            raise error
        add(recorder, pending, weights)

    with monkeypatch.context() as m:
        m.setattr(twa.Recorder, "_add", fails_at_3)
        if error is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                recorder.flush()
            said = training.steps(1)
        else:
            with pytest.warns(CandidateWarning, match="recording ends before step 3: MemoryError"):
                recorder.flush()
            said = []
    if error is KeyboardInterrupt:
        assert len(said) == 1 and "has ended before step 3: it was interrupted" in said[0]
    assert training.steps(3) == [] and recorder.steps == [1, 2]
    if kind == "memory":
        with pytest.raises(TwaError, match="taking the last one was interrupted"):
            recorder.apply("last")
        return
    recorder.apply("last")
    assert (training.model[0].weight - training.seen[2]).abs().max() < 0.01
    recorder.rewind(2)
    assert training.steps(2) == []
    recorder.close()
    training.check(path, [1, 2, 3, 4])


def test_no_memory_for_the_first_snapshot(monkeypatch):
    """An error when it is used, not a crash."""
    training, original = Training(None), torch.Tensor.to

    def to(t, *arguments, copy=False):
        return fail() if arguments == (torch.float32,) else original(t, *arguments, copy=copy)

    with monkeypatch.context() as m:
        m.setattr(torch.Tensor, "to", to)
        assert "recording ends before step 1: MemoryError" in training.steps(1)[0]
    with pytest.raises(TwaError, match="taking the last one was interrupted"):
        training.recorder.apply("last")


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_a_notebook_is_interrupted(tmp_path, monkeypatch, kind):
    """Recording has ended, which the next snapshot says, once; another recorder goes on."""
    training = Training(None if kind == "memory" else tmp_path)
    training.steps(3)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(twa.Recorder, "_current", interrupted)
        training.steps(1)
    said = training.steps(3)
    assert len(said) == 1 and "has ended before step 4: it was interrupted" in said[0]
    training.recorder.apply("last")
    assert (training.model[0].weight - training.seen[3]).abs().max() < 0.01
    if kind == "memory":
        assert said[0].endswith("; make another Recorder")
        return
    assert said[0].endswith("; close() this one, and make another with resume=True")
    training.recorder.close()
    later = Training(tmp_path, resume=True)
    later.recorder.rewind(3)
    assert later.steps(2) == []
    later.recorder.close()
    later.seen = {**training.seen, **later.seen}
    later.check(tmp_path, [1, 2, 3, 4, 5])


def test_a_lock_of_another_user(tmp_path, monkeypatch):
    """A file that may only be read is locked as well: two users write one directory in turn."""
    real = open

    def another_users(path, mode="r", *arguments, **options):
        if str(path).endswith(".lock") and mode == "ab":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, mode, *arguments, **options)

    with atomic.only_run_in(tmp_path):
        monkeypatch.setattr("builtins.open", another_users)
        with pytest.raises(TwaError, match="another run"), atomic.only_run_in(tmp_path):
            pass
    (tmp_path / "recording.lock").touch()
    training = Training(tmp_path)
    with pytest.raises(TwaError, match="another process records there"):
        Training(tmp_path, resume=True)
    training.recorder.close()
