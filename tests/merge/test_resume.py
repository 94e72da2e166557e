"""Runs that are killed and continued, alone and on several ranks: the same bits in the end; other
ranks stop with a reason; no state is lost.
"""

import errno
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy
import processes
import pytest
import torch
import twa
from safetensors.torch import save_file
from twa.cli import average
from twa.cli import main as cli
from twa.distributed.ranks import Ranks
from twa.io.atomic import LOCK
from twa.merge import resume as state
from twa.merge import run
from twa.merge.evaluate import Evaluator
from twa.tasks.batches import EveryOther, Stream, sampled, scattered, shared_out
from twa.tasks.contract import load_task

TASK = """
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    class Net(nn.Sequential):
        def __init__(self):
            first = nn.Linear(8, 30), nn.BatchNorm1d(30), nn.Tanh(), nn.Dropout(0.2)
            super().__init__(*first, nn.Linear(30, 1))
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def data(seed, count, shuffle):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 8, generator=g)
        y = x.sum(1, keepdim=True).sin()
        # The order is drawn from torch's own generator.
        return DataLoader(TensorDataset(x, y), batch_size=10, shuffle=shuffle)

    def model():
        return Net()

    def train_data(seed=0):
        return data(1, 130, True)  # 13 batches: no number of ranks divides them

    def val_data():
        return data(2, 50, False)

    def loss(model, batch):
        if model.training:
            model.calls += 1
        return nn.functional.mse_loss(model(batch[0]), batch[1])
"""
STEPS = 40
FILES = {"averaged.safetensors", "coefficients.json", "report.md", "report.png", "results.json"}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A folder with a task file and six candidates; Dropout, BatchNorm and a shuffled loader, so
    that random numbers matter.
    """
    folder = tmp_path_factory.mktemp("job")
    (folder / "task.py").write_text(textwrap.dedent(TASK))
    task = load_task(str(folder / "task.py"))
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for k in range(6):
        for batch in task.train:
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
        save_file(model.state_dict(), folder / f"c{k}.safetensors")
    return folder


def arguments(job, out, *more):
    candidates = [str(job / f"c{k}.safetensors") for k in range(6)]
    fixed = [
        "-o",
        str(out),
        "--steps",
        str(STEPS),
        "--save-every",
        "1",
        "--patience",
        "0",
        "--twa",
        "t:tensor:4",
        "--twa",
        "v:tensor:4",
    ]
    return ["average", str(job / "task.py"), *candidates, *fixed, *more]


#: `python -c` of this is `twa`, with something that happens to a rank at one of its steps
STRUCK = """
    import datetime, os, signal, sys
    import torch
    import torch.distributed as dist
    import twa
    from twa.cli import main as cli

    step, count = twa.SubspaceOptimizer.step, 0

    def struck(self, *args):
        global count
        count += 1
        if count == {at}:
            {what}
        return step(self, *args)

    twa.SubspaceOptimizer.step = struck
    sys.exit(cli.main(sys.argv[1:]))
"""


def struck(at, what):
    return [sys.executable, "-c", textwrap.dedent(STRUCK).format(at=at, what=what)]


def launch(size, *args, programs=None):
    """`size` ranks of `twa`, as torchrun starts them; one list of arguments for all, or one each.
    programs: rank -> what to run in twa's place.
    """
    each = args * size if len(args) == 1 else args
    starts = [(programs or {}).get(r, [sys.executable, "-m", "twa"]) for r in range(size)]
    return processes.start_job(*([*starts[r], *each[r]] for r in range(size)))


def wait(ranks):
    """Exit status and error output of each."""
    return [(done.returncode, done.stderr) for done in processes.finish(*ranks)]


def changed(file):
    """When it last was, or None."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def result(out):
    """What must be the same bits."""
    coefficients = json.loads((out / "coefficients.json").read_text())
    return coefficients["x"], coefficients["beta"], (out / "averaged.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    for code, error in wait(launch(2, arguments(job, out))):
        assert code == 0, error
    assert {p.name for p in out.iterdir()} == FILES
    return result(out)


@pytest.fixture(scope="module")
def alone(job, tmp_path_factory):
    """The output folder of one process that nothing disturbs."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert cli.main(arguments(job, out)) == 0
    return out


def test_killed_again_and_again_and_continued(job, undisturbed, tmp_path):
    """kill -9 of one rank at random points, twice (TWA_KILLS: as often as that); every time
    the other rank stops with a reason, and the state is whole."""
    out, state = tmp_path / "out", tmp_path / "out" / "state.pt"
    choose = random.Random(0)
    for _ in range(int(os.environ.get("TWA_KILLS", "2"))):
        before = changed(state)
        ranks = launch(2, arguments(job, out, "--resume"))
        # it has begun
        processes.wait(*ranks, until=lambda before=before: changed(state) != before, every=0.001)
        time.sleep(choose.uniform(0, 0.08))
        victim = choose.randrange(2)
        ranks[victim].send_signal(signal.SIGKILL)
        ends = wait(ranks)
        code, error = ends[1 - victim]
        if code == 0:
            break  # finished before it was killed
        assert ends[victim][0] == -signal.SIGKILL
        assert code == 1 and "another rank died or does not answer" in error, error
        assert "continue with the same command and --resume" in error
        assert torch.load(state, weights_only=True)["format"] == "twa-state-6"
    for code, error in wait(launch(2, arguments(job, out, "--resume"))):
        assert code == 0, error
    assert {p.name for p in out.iterdir()} == FILES
    assert result(out) == undisturbed


def test_alone_interrupted_and_continued(job, alone, tmp_path, capsys, monkeypatch):
    """One process:

    Ctrl-C in the middle of each method; the same bits as without. The report's training curves are
    whole.
    """
    out = tmp_path / "out"
    steps = 0
    original = twa.SubspaceOptimizer.step

    def step(self, *args):
        nonlocal steps
        steps += 1
        if steps in (STEPS // 3, STEPS + 17):
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(twa.SubspaceOptimizer, "step", step)
    assert cli.main(arguments(job, out, "--resume")) == 130
    assert "continue with the same command and --resume" in capsys.readouterr().err
    assert cli.main(arguments(job, out)) == 2
    assert "pass --resume to continue it, or --overwrite" in capsys.readouterr().err
    assert cli.main(arguments(job, out, "--resume")) == 130
    assert cli.main(arguments(job, out, "--resume", "--steps", "41")) == 2
    assert "the state of another run: steps: expected 41, found 40" in capsys.readouterr().err
    (out / ".state.pt.123.tmp").write_bytes(b"half")  # of a process that was killed while it wrote
    (out / ".averaged_dcp.tmp").mkdir()
    assert cli.main(arguments(job, out, "--resume")) == 0
    assert result(out) == result(alone)
    assert {p.name for p in out.iterdir()} == FILES
    assert rows(out) == rows(alone)


def rows(out):
    """The table, without what differs from run to run."""
    drop = ("seconds", "peak MB")
    table = json.loads((out / "results.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if k not in drop} for row in table]


def test_comparisons_interrupted_and_continued(job, tmp_path, monkeypatch):
    """What is known by then is not measured again, and counts in a row's looks all the same."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    measured, calls, stop_at = Evaluator.loss, 0, 0

    def loss(self):
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        return measured(self)

    monkeypatch.setattr(Evaluator, "loss", loss)
    monkeypatch.setattr(run, "SAVE_SECONDS", -1.0)
    assert cli.main(arguments(job, whole, "--compare")) == 0
    most, calls, stop_at = calls, 0, 17  # in EMA: 1 uniform, 6 singles, their exports before
    assert cli.main(arguments(job, out, "--compare", "--resume")) == 130
    saved = torch.load(out / "state.pt", weights_only=True)
    assert len(saved["losses"]) > 8 and "start" not in [r["method"] for r in saved["results"]]
    assert cli.main(arguments(job, out, "--resume")) == 2  # without --compare it is another run
    calls, stop_at = 0, 0
    assert cli.main(arguments(job, out, "--compare", "--resume")) == 0
    assert calls < most - 8
    assert result(out) == result(whole) and rows(out) == rows(whole)


def test_differences_interrupted_and_continued(job, tmp_path, monkeypatch):
    """The basis is made anew, with the same bits."""
    whole, out, steps = tmp_path / "whole", tmp_path / "out", 0
    original = twa.SubspaceOptimizer.step

    def step(self, *args):
        nonlocal steps
        steps += 1
        if steps == STEPS // 2:
            raise KeyboardInterrupt
        return original(self, *args)

    def run(folder):
        given = arguments(job, folder, "--resume")
        return cli.main([a + ":differences" if a.endswith(":4") else a for a in given])

    assert run(whole) == 0
    monkeypatch.setattr(twa.SubspaceOptimizer, "step", step)
    assert run(out) == 130
    assert run(out) == 0
    assert result(out) == result(whole)
    assert json.loads((out / "coefficients.json").read_text())["basis"] == "differences"


IN_SIXES = ["--batches-per-step", "6", "--resume"]


@pytest.fixture(scope="module")
def struck_on_two_ranks(job, tmp_path_factory):
    """The output folder of two ranks, one of which is killed in the middle of a method."""
    out = tmp_path_factory.mktemp("struck") / "out"
    dies = struck(STEPS // 2, "os.kill(os.getpid(), signal.SIGKILL)")
    ends = wait(launch(2, arguments(job, out, *IN_SIXES), programs={1: dies}))
    assert ends[-1][0] == -signal.SIGKILL
    done = torch.load(out / "state.pt", weights_only=True)["under_way"]
    assert done and 0 < done["position"]["step"] < STEPS
    return out


@pytest.fixture(scope="module")
def in_sixes(job, tmp_path_factory):
    """What one process makes of the same batches, from the start."""
    out = tmp_path_factory.mktemp("in-sixes") / "out"
    assert cli.main(arguments(job, out, *IN_SIXES)) == 0
    return result(out)


@pytest.mark.parametrize("size", [1, 3])
def test_continued_on_another_number_of_ranks(job, struck_on_two_ranks, in_sixes, tmp_path, size):
    """The same batches make the same steps: the coefficients agree to rounding with those of one
    process from the start.
    """
    out = shutil.copytree(struck_on_two_ranks, tmp_path / "out")
    for code, error in wait(launch(size, arguments(job, out, *IN_SIXES))):
        assert code == 0, error
    (x, beta, _), (expected, expected_beta, _) = result(out), in_sixes
    torch.testing.assert_close(torch.tensor(x), torch.tensor(expected), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(beta), torch.tensor(expected_beta), rtol=0, atol=1e-4)


def test_a_rank_that_hangs_stops_the_others(job, tmp_path):
    """The time limit is the one asked for, and short only when the other rank has stopped: a busy
    machine is slow too.
    """
    group = "dist.distributed_c10d._get_default_group()._get_backend(torch.device('cpu'))"
    limit = (
        f"assert {group}.options._timeout.total_seconds() == 1234;"
        f" {group}._set_default_timeout(datetime.timedelta(seconds=1))"
    )
    programs = {0: struck(5, limit), 1: struck(5, "os.kill(os.getpid(), signal.SIGSTOP)")}
    ranks = launch(2, arguments(job, tmp_path / "out", "--timeout", "1234"), programs=programs)
    processes.wait(*ranks, until=lambda: False)
    ((code, error),) = wait(ranks[:1])
    assert code == 1 and "another rank died or does not answer" in error, error
    assert ranks[1].poll() is None


FAILURES = {
    "memory": (1, "raise MemoryError('no room for 7 GB')", "MemoryError: no room for 7 GB"),
    # it holds the store, and its group is kept by FSDP until it ends
    "of rank 0": (0, "raise OSError(5, 'no cable')", "OSError: [Errno 5] no cable"),
    "exit": (1, "sys.exit(3)", "SystemExit: 3"),
    "interrupt": (0, "raise KeyboardInterrupt", "KeyboardInterrupt"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_rank_that_fails_is_quoted(job, undisturbed, tmp_path, kind):
    """At one of its steps, for a reason that is its own: the other says it, and the state is whole.
    The first stays until it is read, which takes a while on a busy machine.
    """
    rank, what, said = FAILURES[kind]
    out = tmp_path / "out"
    patient = f"from twa.distributed import note; note.STAY = 1e6; {what}"
    ranks = launch(2, arguments(job, out), programs={rank: struck(12, patient)})
    ends = wait(ranks)
    code, error = ends[1 - rank]
    assert code == 1 and f"twa: error: rank {rank} failed at step 12: {said}\n" in error, error
    assert "continue with the same command and --resume" in error
    assert ends[rank][0] == {"exit": 3, "interrupt": 130}.get(kind, 1)
    saved = torch.load(out / "state.pt", weights_only=True)
    assert saved["under_way"]["position"]["step"] == 11
    if kind == "memory":
        for code, error in wait(launch(2, arguments(job, out, "--resume"))):
            assert code == 0, error
        assert result(out) == undisturbed


def test_torchrun_restarts_a_job_that_has_lost_a_rank(job, undisturbed, tmp_path):
    """It goes on from the state. Rank 0, which holds the lock, raises at first, and then kills
    itself; what it raised is said once.
    """
    raised, killed, out = tmp_path / "raised", tmp_path / "killed", tmp_path / "out"
    program = tmp_path / "struck.py"
    program.write_text(struck(STEPS // 2, "strike()")[-1])
    (tmp_path / "strike.py").write_text(
        textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from twa.distributed import note

        def strike():
            note.STAY = 1e6  # the machine may be busy
            raised, killed = Path({str(raised)!r}), Path({str(killed)!r})
            if os.environ["RANK"] == "0" and not raised.exists():
                raised.touch()
                raise MemoryError
            if os.environ["RANK"] == "0" and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    program.write_text("from strike import strike\n" + program.read_text())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", "--max-restarts", "3", program]
    new_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = processes.run(
        [*command, *arguments(job, out, "--resume")], env=processes.environment() | new_store
    )
    assert done.returncode == 0, done.stderr
    assert raised.exists() and killed.exists() and result(out) == undisturbed
    assert done.stderr.count("twa: error: rank 0 failed at step 20: MemoryError") == 1, done.stderr
    assert {p.name for p in out.iterdir()} == FILES


def test_one_run_a_directory(job, alone, tmp_path, capsys):
    """A second is refused, before it touches anything. After a kill none is, though a process that
    the first has forked, as a DataLoader does, is still there."""
    out, child = tmp_path / "out", tmp_path / "child"
    what = (
        "child = os.fork(); child or os.setpgid(0, 0);"
        f" child and open({str(child)!r}, 'w').write(str(child)); signal.pause()"
    )
    first = processes.Child([*struck(12, what), *arguments(job, out)], env=processes.environment())
    processes.wait(first, until=lambda: child.exists() and child.read_text())
    files = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert {"state.pt", LOCK} <= files.keys()
    for how in ("--resume", "--overwrite"):
        assert cli.main(arguments(job, out, how)) == 2
        assert f"{out}: another run is at work in this directory" in capsys.readouterr().err
    assert files == {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    first.kill()
    first.wait()
    os.kill(int(child.read_text()), 0)
    assert cli.main(arguments(job, out, "--resume")) == 0
    os.kill(int(child.read_text()), signal.SIGKILL)
    assert result(out) == result(alone) and {p.name for p in out.iterdir()} == FILES


def test_without_locks_a_run_goes_on(job, alone, tmp_path, monkeypatch):
    """As on some file systems of networks. A killed run's lock is nothing that must not be lost."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / LOCK).touch()
    assert cli.main(arguments(job, tmp_path)) == 0
    assert result(tmp_path) == result(alone)


def test_ranks_with_other_files_or_tasks_are_refused(job, tmp_path):
    other = tmp_path / "task.py"
    other.write_text((job / "task.py").read_text().replace("0.2", "0.3"))
    ours, theirs = arguments(job, tmp_path / "out"), arguments(job, tmp_path / "out")
    theirs[1] = str(other)
    (code, error), (other_code, silence) = wait(launch(2, ours, theirs))
    assert code == other_code == 1 and not silence  # one rank says it
    assert "the ranks do not have the same task: rank 0 has task.py" in error, error


def test_disk_full_keeps_the_state_before(job, alone, tmp_path):
    """Writes fail in the middle of a file (a limit on its size, which the system enforces as it
    does a full disk): the run goes on, the last state that fitted stays, and the run can be
    continued."""
    out = tmp_path / "out"
    code = f"""
    import resource, sys
    from twa.cli import main as cli
    from twa.merge import resume as state
    save, count = state.Store.save, 0
    def limited(self, value):
        global count
        count += 1
        most = 3000 if count >= 20 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        save(self, value)
    state.Store.save = limited
    sys.exit(cli.main({arguments(job, out)!r}))
    """
    # Its output goes through pipes: the limit would hold for files of output too.
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "the state could not be saved" in done.stderr and "is intact" in done.stderr
    assert "twa: error" in done.stderr and "could not be written" in done.stderr
    # the last may be newer than the state
    small = {"state.pt", "state-best-2.safetensors", "state-best-3.safetensors"}
    # whole ones, that were small enough
    assert {p.name for p in out.iterdir()} <= FILES - {"report.png"} | small
    saved = torch.load(out / "state.pt", weights_only=True)
    assert saved["under_way"]["position"]["step"] > 5
    assert cli.main(arguments(job, out, "--resume")) == 0
    assert result(out) == result(alone)


def test_best_weights_that_could_not_be_saved(job, tmp_path, monkeypatch, capsys):
    """The second trained average is the best, its weights do not fit on the disk, and the run is
    killed: what is continued must not take the weights of the first for those of the second."""
    losses = itertools.count(-1.0, -1e-4)
    # each look finds something better
    monkeypatch.setattr(Evaluator, "loss", lambda self: next(losses))
    assert cli.main(arguments(job, tmp_path / "whole")) == 0
    out, writes = tmp_path / "out", 0
    original, finish = state.write_model, average.finish

    def full(path, sharding):
        nonlocal writes
        writes += 1
        if writes == 2:
            raise OSError(28, "No space left on device", str(path))
        original(path, sharding)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(state, "write_model", full)
    monkeypatch.setattr(average, "finish", killed)
    assert cli.main(arguments(job, out)) == 130
    error = capsys.readouterr().err
    assert (
        writes == 2
        and "the best weights so far could not be saved (No space left on device)" in error
        and "is intact" in error
    )
    monkeypatch.setattr(state, "write_model", original)
    monkeypatch.setattr(average, "finish", finish)
    assert cli.main(arguments(job, out, "--resume")) == 0
    assert result(out) == result(tmp_path / "whole")


def test_a_finished_run_has_nothing_to_resume(job, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(arguments(job, out, "--resume")) == 0
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert cli.main(arguments(job, out, "--resume")) == 0
    assert "there is nothing to resume" in capsys.readouterr().out and before == {
        p.name: p.stat().st_mtime_ns for p in out.iterdir()
    }


class Rank:
    """Ranks seen from one of them, without any others."""

    def __init__(self, rank, size):
        self.rank, self.world_size, self.counts = rank, size, True


class Noisy(torch.utils.data.Dataset):
    """Items drawn from every generator that everyone shares."""

    def __len__(self):
        return 22

    def __getitem__(self, k):
        return torch.tensor(
            [k, random.random(), numpy.random.random(), float(torch.rand(()))],
            dtype=torch.float64,
        )


def collate(items):
    return torch.stack(items) + torch.rand(())


class Lazy(torch.utils.data.Sampler):
    """Draws each index when it is asked for, from a generator of Python's own."""

    def __iter__(self):
        return (random.randrange(22) for _ in range(22))

    def __len__(self):
        return 22


class Epochs:
    """Data with an order of their own, which set_epoch chooses."""

    def __init__(self):
        self.epoch = None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = numpy.random.default_rng(self.epoch).permutation(11)
        return iter([torch.tensor([float(k), self.epoch]) for k in order])


def loaders():
    data = Noisy()
    replaced = torch.utils.data.RandomSampler(
        data, replacement=True, num_samples=22, generator=torch.Generator().manual_seed(2)
    )
    return {
        "shuffle": torch.utils.data.DataLoader(
            data, batch_size=2, shuffle=True, collate_fn=collate
        ),
        "own generator": torch.utils.data.DataLoader(
            data,
            batch_size=2,
            shuffle=True,
            generator=torch.Generator().manual_seed(1),
            collate_fn=collate,
        ),
        "sampler": torch.utils.data.DataLoader(
            data, batch_size=2, sampler=replaced, collate_fn=collate
        ),
        "workers": torch.utils.data.DataLoader(
            data, batch_size=2, shuffle=True, num_workers=2, collate_fn=collate
        ),
        "lazy sampler": torch.utils.data.DataLoader(
            data, batch_size=2, sampler=Lazy(), collate_fn=collate
        ),
        "set_epoch": Epochs(),
        "list": list(torch.arange(22.0).view(11, 2)),
        "other": EveryOther(
            torch.utils.data.DataLoader(data, batch_size=1, shuffle=True, collate_fn=collate), 1
        ),
    }


@pytest.mark.parametrize("kind", loaders())
def test_steps_see_the_same_batches_on_any_number_of_ranks(kind):
    """11 batches a pass, 5 a step: bit by bit the same, with all their random numbers, on 1, 2, 3
    and 7 ranks, and after a seek.
    """

    def steps(size, start=None, count=6):
        found = [{} for _ in range(count)]
        for rank in range(size):
            stream = Stream(loaders()[kind], Rank(rank, size), 5, seed=9)
            if start is not None:
                stream.seek(start)
            for step in range(count):
                torch.rand(rank + 1)  # others draw as well
                for g, batch, weight in stream.next_step():
                    if weight:
                        assert weight == size / 5 and g not in found[step]
                        found[step][g] = batch
        return found, stream.position()

    alone, _ = steps(1)
    assert [sorted(step) for step in alone] == [list(range(5 * k, 5 * k + 5)) for k in range(6)]
    # the next pass has another order
    assert kind == "list" or not torch.equal(alone[0][0], alone[2][11])
    for size in (2, 3, 7):
        for ours, theirs in zip(steps(size)[0], alone, strict=True):
            assert sorted(ours) == sorted(theirs) and all(
                torch.equal(ours[g], theirs[g]) for g in ours
            )
    _, middle = steps(1, count=3)
    for size in (1, 3):
        for ours, theirs in zip(steps(size, middle, 3)[0], alone[3:], strict=True):
            assert all(torch.equal(ours[g], theirs[g]) for g in theirs)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_evaluation_is_shared_out(count):
    """Every batch counts once; every rank has as many."""
    data = [torch.tensor([float(k)]) for k in range(count)]
    for size in (1, 2, 3, 5):
        each = [list(shared_out(data, Rank(rank, size))) for rank in range(size)]
        assert sorted(float(batch) for mine in each for batch, counts in mine if counts) == [
            float(k) for k in range(count)
        ]
        assert len({len(mine) for mine in each}) == 1
        assert len(list(shared_out(data, Rank(0, size), limit=2))) == -(-min(2, count) // size)


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_a_sample_is_dealt_in_turn(count):
    """Every `stride`-th batch; nothing else of a dataset is loaded."""
    loaded = []

    class Items(torch.utils.data.Dataset):
        def __len__(self):
            return count

        def __getitem__(self, k):
            loaded.append(k)
            return torch.tensor(k)

    data = torch.utils.data.DataLoader(Items(), batch_size=1)
    for stride, offset in ((1, 0), (2, 0), (2, 1), (4, 3)):
        wanted = [k for k in range(count) if scattered(k, stride) % stride == offset]
        for size in (1, 2, 3):
            each = []
            for rank in range(size):
                loaded.clear()
                given = sampled(data, Rank(rank, size), stride=stride, offset=offset)
                each.append([(int(batch), counts) for _, batch, counts in given])
                assert set(loaded) <= {0, *wanted[rank::size]}
                mine = [k for k, counts in each[-1] if counts]
                assert mine == wanted[rank::size]
            assert {len(mine) for mine in each} == {-(-len(wanted) // size)}


def test_what_ranks_must_have_in_common(job, tmp_path):
    """Data that each rank draws for itself, data that are shared out already."""
    other = tmp_path / "task.py"
    other.write_text(
        (job / "task.py")
        .read_text()
        .replace("torch.randn(8)", "")
        .replace("def data(seed,", "import os\ndef data(seed,")
    )
    other.write_text(
        other.read_text().replace(
            "manual_seed(seed)", "manual_seed(seed + int.from_bytes(os.urandom(2), 'little'))"
        )
    )
    changed = arguments(job, tmp_path / "out")
    changed[1] = str(other)
    (code, error), _ = wait(launch(2, changed))
    assert (
        code == 1 and "the ranks do not have the same first batch of the training data" in error
    ), error
    sampler = "torch.utils.data.DistributedSampler(range(130), num_replicas=2, rank=0)"
    other.write_text((job / "task.py").read_text().replace("shuffle=shuffle", f"sampler={sampler}"))
    with pytest.raises(twa.TaskError, match="shares its data out over ranks"):
        load_task(str(other))


def test_errors_of_the_task_are_named(job, tmp_path, capsys):
    broken = tmp_path / "task.py"
    for text, message in [
        (
            (
                "return nn.functional.mse_loss",
                "raise ValueError('too short')\n    return nn.functional.mse_loss",
            ),
            "loss(): too short",
        ),
        (("import torch\n", "import torch\nfrom .base import x\n"), "ImportError"),
        (("import torch\n", "import torch\nx = = 1\n"), "SyntaxError"),
    ]:
        broken.write_text((job / "task.py").read_text().replace(*text, 1))
        args = arguments(job, tmp_path / "out")
        args[1] = str(broken)
        assert cli.main(args) == 2
        error = capsys.readouterr().err
        assert (
            message in error.splitlines()[-1]
            and error.splitlines()[-1].startswith("twa: error: ")
            and "task.py" in error
        )
    for option in (["--lr", "nan"], ["--lr", "inf"], ["--overwrite", "--resume"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments(job, tmp_path / "out", *option))
    if not torch.cuda.is_available():
        assert cli.main(arguments(job, tmp_path / "out", "--device", "cuda")) == 2
        assert "no CUDA device is available" in capsys.readouterr().err


def test_data_that_do_not_come_again_are_noticed():
    calls = 0

    class Loose:
        def __iter__(self):
            nonlocal calls
            calls += 1
            return iter([torch.full((3,), calls * 10.0 + k) for k in range(5)])

    stream = Stream(Loose(), Ranks(), 2, seed=0)
    for _ in range(4):
        stream.next_step()
    position = stream.position()
    assert position["pass"] == 1 and position["offset"] == 5
    with pytest.raises(ValueError, match="do not come in the same order again: batch 6 differs"):
        Stream(Loose(), Ranks(), 2, seed=0).seek(position)


def test_a_state_of_something_else_is_refused(job, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for content in (b"", b"PK\x03\x04 not a state", b"x" * 100):
        (out / "state.pt").write_bytes(content)
        assert cli.main(arguments(job, out, "--resume")) == 2
        assert "not a saved state" in capsys.readouterr().err
    torch.save({"format": "other"}, out / "state.pt")
    assert cli.main(arguments(job, out, "--resume")) == 2
    assert "expected format 'twa-state-6', found 'other'" in capsys.readouterr().err
    torch.save(os.system, out / "state.pt")
    assert cli.main(arguments(job, out, "--resume")) == 2
    assert "not a saved state" in capsys.readouterr().err
