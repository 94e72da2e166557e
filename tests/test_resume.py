"""Runs that are killed and continued, alone and on several ranks: the same bits in the end; other ranks stop with a reason; no state is lost."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import torch
import twa
from safetensors.torch import save_file
from twa import cli
from twa.data import Stream
from twa.world import World

TASK = """
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(8, 30), nn.BatchNorm1d(30), nn.Tanh(), nn.Dropout(0.2), nn.Linear(30, 1))
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def data(seed, count, shuffle):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 8, generator=g)
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=10, shuffle=shuffle)  # order: torch's own generator

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
    """A folder with a task file and six candidates; Dropout, BatchNorm and a shuffled loader, so that random numbers matter."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "task.py").write_text(textwrap.dedent(TASK))
    task = twa.tasks.load_task(str(folder / "task.py"))
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
    fixed = ["-o", str(out), "--steps", str(STEPS), "--save-every", "1", "--twa", "t:tensor:4", "--twa", "v:tensor:4"]
    return ["average", str(job / "task.py"), *candidates, *fixed, *more]


def launch(size, *args):
    """`size` ranks of `twa`, as torchrun starts them; one list of arguments for all, or one each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    each = args * size if len(args) == 1 else args
    commands = [[sys.executable, "-m", "twa", *a] for a in each]
    return [
        subprocess.Popen(commands[r], env=common | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for r in range(size)
    ]


def wait(processes, seconds=120):
    """Exit status and error output of each."""
    ends = [p.communicate(timeout=seconds) for p in processes]
    return [(p.returncode, error) for p, (_, error) in zip(processes, ends, strict=True)]


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


def test_killed_ten_times_and_continued(job, undisturbed, tmp_path):
    """kill -9 of one rank at random points, until the tenth; every time the other rank stops with a reason, and the state is whole."""
    out, state = tmp_path / "out", tmp_path / "out" / "state.pt"
    choose = random.Random(0)
    for _ in range(10):
        processes = launch(2, arguments(job, out, "--resume"))
        before = state.stat().st_mtime_ns if state.exists() else None
        deadline = time.time() + 60
        while time.time() < deadline and (not state.exists() or state.stat().st_mtime_ns == before):  # it has begun
            assert all(p.poll() is None for p in processes), wait(processes)
            time.sleep(0.001)
        time.sleep(choose.uniform(0, 0.08))
        victim = choose.randrange(2)
        if processes[victim].poll() is not None:
            break  # finished
        processes[victim].send_signal(signal.SIGKILL)
        ends = wait(processes)
        assert ends[victim][0] == -signal.SIGKILL
        code, error = ends[1 - victim]
        if code == 0:
            break
        assert code == 1 and "another rank died or does not answer" in error, error
        assert "continue with the same command and --resume" in error
        assert torch.load(state, weights_only=True)["format"] == "twa-state-1"
    for code, error in wait(launch(2, arguments(job, out, "--resume"))):
        assert code == 0, error
    assert {p.name for p in out.iterdir()} == FILES
    assert result(out) == undisturbed


def test_alone_interrupted_and_continued(job, tmp_path, capsys, monkeypatch):
    """One process: Ctrl-C in the middle of each method; the same bits as without. The report's training curves are whole."""
    assert cli.main(arguments(job, tmp_path / "whole")) == 0
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
    assert result(out) == result(tmp_path / "whole")
    assert {p.name for p in out.iterdir()} == FILES
    drop = ("seconds", "peak MB")
    ours, theirs = (
        [{k: v for k, v in r.items() if k not in drop} for r in json.loads((o / "results.json").read_text())] for o in (out, tmp_path / "whole")
    )
    assert ours == theirs


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (3, 2)])
def test_continued_on_another_number_of_ranks(job, tmp_path, sizes):
    """The same batches make the same steps: the coefficients agree to rounding with those of one process from the start."""
    more = ["--batches-per-step", "6", "--resume"]
    assert cli.main(arguments(job, tmp_path / "whole", *more)) == 0
    out, state = tmp_path / "out", tmp_path / "out" / "state.pt"
    processes = launch(sizes[0], arguments(job, out, *more))
    while not state.exists() or not torch.load(state, weights_only=True)["under_way"]:
        assert all(p.poll() is None for p in processes), wait(processes)
        time.sleep(0.05)
    processes[-1].send_signal(signal.SIGKILL)
    wait(processes)
    done = torch.load(state, weights_only=True)["under_way"]
    assert done and 0 < done["position"]["step"] < STEPS
    for code, error in wait(launch(sizes[1], arguments(job, out, *more))):
        assert code == 0, error
    (x, beta, _), (expected, expected_beta, _) = result(out), result(tmp_path / "whole")
    torch.testing.assert_close(torch.tensor(x), torch.tensor(expected), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(beta), torch.tensor(expected_beta), rtol=0, atol=1e-4)


def test_a_rank_that_hangs_stops_the_others(job, tmp_path):
    out = tmp_path / "out"
    processes = launch(2, arguments(job, out, "--timeout", "5"))
    while not (out / "state.pt").exists():
        assert all(p.poll() is None for p in processes), wait(processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGSTOP)
    stopped = time.time()
    _, error = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 1 and "another rank died or does not answer" in error, error
    assert time.time() - stopped < 30
    processes[1].kill()
    wait(processes[1:])


def test_ranks_with_other_files_or_tasks_are_refused(job, tmp_path):
    other = tmp_path / "task.py"
    other.write_text((job / "task.py").read_text().replace("0.2", "0.3"))
    ours, theirs = arguments(job, tmp_path / "out"), arguments(job, tmp_path / "out")
    theirs[1] = str(other)
    for code, error in wait(launch(2, ours, theirs)):
        assert code == 1 and "the ranks do not have the same task: rank 0 has task.py" in error, error


def test_disk_full_keeps_the_state_before(job, tmp_path):
    """Writes fail in the middle of a file (a limit on its size, which the system enforces as it does a full disk): the run goes on, the last state
    that fitted stays, and the run can be continued."""
    assert cli.main(arguments(job, tmp_path / "whole")) == 0
    out = tmp_path / "out"
    code = f"""
    import resource, sys
    from twa import cli, state
    save, count = state.Store.save, 0
    def limited(self, value):
        global count
        count += 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000 if count >= 20 else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        save(self, value)
    state.Store.save = limited
    sys.exit(cli.main({arguments(job, out)!r}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "the state could not be saved" in done.stderr and "is intact" in done.stderr
    assert "twa: error" in done.stderr and "could not be written" in done.stderr
    assert {p.name for p in out.iterdir()} <= FILES - {"report.png"} | {"state.pt", "state-best.safetensors"}  # whole ones, that were small enough
    saved = torch.load(out / "state.pt", weights_only=True)
    assert saved["under_way"]["position"]["step"] > 5
    assert cli.main(arguments(job, out, "--resume")) == 0
    assert result(out) == result(tmp_path / "whole")


def test_data_that_do_not_come_again_are_noticed(job):
    calls = 0

    class Loose:
        def __iter__(self):
            nonlocal calls
            calls += 1
            return iter([torch.full((3,), calls * 10.0 + k) for k in range(5)])

    stream = Stream(Loose(), World(), 2, seed=0)
    for _ in range(4):
        stream.next_step()
    position = stream.position()
    assert position["pass"] == 1 and position["offset"] == 5
    with pytest.raises(ValueError, match="do not come in the same order again: batch 6 differs"):
        Stream(Loose(), World(), 2, seed=0).seek(position)


def test_a_state_of_something_else_is_refused(job, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for content in (b"", b"PK\x03\x04 not a state", b"x" * 100):
        (out / "state.pt").write_bytes(content)
        assert cli.main(arguments(job, out, "--resume")) == 2
        assert "not a saved state" in capsys.readouterr().err
    torch.save({"format": "other"}, out / "state.pt")
    assert cli.main(arguments(job, out, "--resume")) == 2
    assert "expected a state of format 'twa-state-1'" in capsys.readouterr().err
    torch.save(os.system, out / "state.pt")
    assert cli.main(arguments(job, out, "--resume")) == 2
    assert "not a saved state" in capsys.readouterr().err
