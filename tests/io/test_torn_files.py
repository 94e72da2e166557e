"""Files that another process cuts short while they are mapped: an error that names the file, never
a signal, and nothing made of what was not there.
"""

import copy
import os
import shutil
import signal
import sys
import textwrap

import processes
import pytest
import torch
import torch.distributed.checkpoint as dcp
import twa
from safetensors.torch import save_file
from torch import nn
from twa.io.errors import CandidateError
from twa.packing.to_file import PackToFile

from twa_kernels import native

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform != "linux", reason="mappings are guarded on Linux only"),
    pytest.mark.skipif(native._C is None, reason="the native module is not built"),
]
PAGE = 4096
TASK = """
    import torch
    from torch import nn
    model = lambda: nn.Linear(300, 300)
    train_data = val_data = lambda: [torch.ones(2, 300)]
    loss = lambda model, x: model(x).square().mean()
"""
#: wait() is where the test looks in, once; `folder` is its directory
WAITS = """
    import os, signal, sys, threading, time
    from pathlib import Path
    import torch
    import twa
    folder = Path(sys.argv[1])
    def wait():
        if not (folder / "waiting").exists():
            (folder / "waiting").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)
"""
#: twa's command line, which waits when it has its first block
COMMAND = """
    from twa.cli.main import main
    from twa.io.candidates import Candidates
    from twa.packing import to_file
    to_file.SAVE_SECONDS = 0.0
    Candidates.__init__.__kwdefaults__["block_bytes"] = 1
    stream = Candidates.stream
    def held(self, *arguments, **options):
        for block in stream(self, *arguments, **options):
            if block.begin:
                wait()
            yield block
    Candidates.stream = held
    sys.exit(main(sys.argv[2:]))
"""


def state(k, width=300):
    torch.manual_seed(k)
    return nn.Linear(width, width).state_dict()


def child(folder, code, *arguments):
    """A process of this code, after WAITS."""
    source = textwrap.dedent(WAITS) + textwrap.dedent(code)
    command = [sys.executable, "-c", source, str(folder), *map(str, arguments)]
    return processes.Child(command, env=processes.environment(), cwd=folder)


def disturbed(folder, code, *arguments, act):
    """What a process of this code has done, of which act() was called while it waited."""
    (folder / "waiting").unlink(missing_ok=True)
    (folder / "go").unlink(missing_ok=True)
    started = child(folder, code, *arguments)
    processes.wait(started, until=(folder / "waiting").exists)
    if (folder / "waiting").exists():
        act()
    (folder / "go").touch()
    (done,) = processes.finish(started)
    return done


def save_in(folder, kind):
    """Three candidates of a format; a pattern of them, and the file of the last one."""
    (folder / "task.py").write_text(textwrap.dedent(TASK))
    for k in range(3):
        if kind == "dcp":
            dcp.save(state(k), checkpoint_id=folder / f"c{k}", no_dist=True)
        elif kind == "pt":
            torch.save(state(k), folder / f"c{k}.pt")
        else:
            save_file(state(k), folder / f"c{k}.safetensors")
    if kind == "dcp":
        (data,) = (folder / "c2").glob("*.distcp")
        return "c?", data
    suffix = "pt" if kind == "pt" else "safetensors"
    return f"c?.{suffix}", folder / f"c2.{suffix}"


# Candidates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, command",
    [("safetensors", "pack"), ("pt", "pack"), ("dcp", "pack"), ("safetensors", "merge")],
)
def test_candidates_while_they_are_read(tmp_path, kind, command):
    pattern, file = save_in(tmp_path, kind)
    size = file.stat().st_size
    options = (
        ["pack", "task.py", pattern]
        if command == "pack"
        else ["merge", pattern, "--scheme", "uniform", "--force"]
    )
    done = disturbed(
        tmp_path, COMMAND, *options, "-o", "out", act=lambda: os.truncate(file, 2 * PAGE)
    )
    assert done.returncode == 2, done
    said = f"{file.name}: became shorter while it was being read: expected {size} bytes as at"
    assert f"{said} first, found {2 * PAGE}" in done.stderr
    assert not (tmp_path / "out").is_file() and not list(tmp_path.glob("out/*"))


def test_a_position_is_not_saved_of_bytes_that_were_gone(tmp_path, monkeypatch):
    """The file comes back as it was, and --resume gives the bits of an undisturbed run."""
    monkeypatch.chdir(tmp_path)
    pattern, file = save_in(tmp_path, "safetensors")
    arguments = ["pack", "task.py", pattern, "-o", "out.safetensors"]
    shutil.copy(file, tmp_path / "whole")
    done = disturbed(tmp_path, COMMAND, *arguments, act=lambda: os.truncate(file, 2 * PAGE))
    assert done.returncode == 2 and "became shorter" in done.stderr, done
    assert (tmp_path / "out.safetensors.position.partial").exists()  # of the block before
    shutil.copy(tmp_path / "whole", file)
    done = disturbed(tmp_path, COMMAND, *arguments, "--resume", act=lambda: None)
    assert done.returncode == 0 and "continued" in done.stdout, done
    candidates = twa.Candidates(pattern)
    PackToFile(tmp_path / "other.safetensors", nn.Linear(300, 300), candidates).run()
    found, expected = (tmp_path / f"{name}.safetensors" for name in ("out", "other"))
    assert found.read_bytes() == expected.read_bytes()


def test_a_file_cut_inside_its_last_page(tmp_path):
    """No fault there: the system itself makes the rest of a page zeros."""
    pattern, file = save_in(tmp_path, "safetensors")
    size = file.stat().st_size
    done = disturbed(
        tmp_path,
        COMMAND,
        *["pack", "task.py", pattern, "-o", "out"],
        act=lambda: os.truncate(file, size - 100),
    )
    assert done.returncode == 2 and f"found {size - 100}" in done.stderr, done


def test_a_subspace_of_candidates(tmp_path):
    pattern, file = save_in(tmp_path, "safetensors")
    code = """
    model = torch.nn.Linear(300, 300)
    candidates = twa.Candidates(folder / sys.argv[2])
    wait()
    try:
        twa.Subspace.from_candidates(model, candidates)
    except twa.CandidateError as error:
        print(error)
    """
    done = disturbed(tmp_path, code, pattern, act=lambda: os.truncate(file, PAGE))
    assert done.returncode == 0 and "c2.safetensors: " in done.stdout, done


def test_a_recording_while_it_is_replayed(tmp_path):
    model = nn.Linear(300, 300)
    recorder = twa.Recorder(model, every=1, path=tmp_path / "run")
    for _ in range(6):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.01 * torch.randn_like(p)
        recorder.step()
    recorder.close()
    files = sorted(tmp_path.glob("run/step_*.safetensors"))
    assert len(files) == 5
    code = """
    candidates = twa.Candidates(folder / "run")
    beta = twa.averages.uniform(len(candidates))
    candidates.average(beta)
    for c in candidates:
        c.release()
    wait()
    for read in (
        lambda: candidates.average(beta),
        lambda: candidates[5].tensor("weight"),
        lambda: candidates.recording.average("weight", beta),
    ):
        try:
            read()
        except twa.CandidateError as error:
            print(error)
    """
    done = disturbed(tmp_path, code, act=lambda: os.truncate(files[2], PAGE))
    assert done.returncode == 0, done
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all(f"{files[2].name}: became shorter" in line for line in lines)


def test_a_file_that_was_torn_does_not_spoil_others(tmp_path):
    """In a process that goes on, such as a notebook's."""
    pattern, file = save_in(tmp_path, "safetensors")
    candidates = twa.Candidates(tmp_path / pattern)
    rows = candidates.tensors("weight")
    os.truncate(file, PAGE)
    assert not rows[2][100:].any() and rows[1][100:].all()
    with pytest.raises(CandidateError, match=r"c2\.safetensors: became shorter"):
        candidates.weighted("weight", twa.averages.uniform(3))
    others = twa.Candidates([tmp_path / "c0.safetensors", tmp_path / "c1.safetensors"])
    expected = (state(0)["weight"].double() + state(1)["weight"].double()) / 2
    found = others.average(twa.averages.uniform(2))["weight"]
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-8)


# A packed basis ----------------------------------------------------------------------------------

STEPS = """
    model = torch.nn.Linear(300, 300)
    subspace = twa.Subspace.load(folder / "basis.safetensors", model)
    options = {"lr": 0.01, "low_memory": sys.argv[2] == "low_memory"}
    rule = torch.optim.RMSprop if sys.argv[2] == "parts" else torch.optim.AdamW
    optimizer = twa.SubspaceOptimizer(subspace, rule, **options)
    x = torch.randn(8, 300, generator=torch.Generator().manual_seed(0))
    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    step()
    before = subspace.coefficients.detach().clone()
    weights = model.weight.detach().clone()
    wait()
    def error(call):
        try:
            call()
        except twa.BasisError as found:
            return str(found)
        return "none"
    print(error(step))
    same = torch.equal(before, subspace.coefficients) and torch.equal(weights, model.weight)
    print(same)
    print(error(optimizer.state_dict))
    print(error(lambda: subspace.save(folder / "out", basis=True)))
    print(sorted(p.name for p in folder.glob("out/*")))
"""


@pytest.mark.parametrize("how", ["fused", "parts", "low_memory"])
def test_a_basis_while_it_is_trained_on(tmp_path, how):
    pattern, _ = save_in(tmp_path, "safetensors")
    basis = tmp_path / "basis.safetensors"
    PackToFile(basis, nn.Linear(300, 300), twa.Candidates(tmp_path / pattern)).run()
    done = disturbed(tmp_path, STEPS, how, act=lambda: os.truncate(basis, 3 * PAGE))
    assert done.returncode == 0, done
    step, same, of_state, of_save, written = done.stdout.splitlines()
    for text in (step, of_state, of_save):
        assert text.startswith(f"{basis}: became shorter while it was being read: expected ")
    assert same == str(how != "fused")  # which has updated by the time that it can be known
    assert written == "[]"


@pytest.mark.parametrize("act", ["pack --overwrite", "removed"])
def test_a_basis_that_is_replaced(tmp_path, act):
    """A new file in its place, as `twa pack` writes it: the old one is used to the end."""
    pattern, _ = save_in(tmp_path, "safetensors")
    basis = tmp_path / "basis.safetensors"
    PackToFile(basis, nn.Linear(300, 300), twa.Candidates(tmp_path / pattern)).run()

    def replace():
        if act == "removed":
            basis.unlink()
            return
        code = "from twa.cli.main import main; sys.exit(main(sys.argv[2:]))"
        arguments = ["pack", "task.py", pattern, "--bits", "1", "--overwrite", "-o", basis]
        (done,) = processes.finish(child(tmp_path, code, *arguments))
        assert done.returncode == 0, done

    done = disturbed(tmp_path, STEPS, "fused", act=replace)
    assert done.returncode == 0, done
    step, same, of_state, of_save, written = done.stdout.splitlines()
    assert (step, same, of_state, of_save) == ("none", "False", "none", "none")
    assert "averaged.safetensors" in written


def test_a_copy_of_a_subspace_does_not_need_its_file(tmp_path):
    pattern, _ = save_in(tmp_path, "safetensors")
    basis = tmp_path / "basis.safetensors"
    PackToFile(basis, nn.Linear(300, 300), twa.Candidates(tmp_path / pattern)).run()
    made = copy.deepcopy(twa.Subspace.load(basis, nn.Linear(300, 300)))
    basis.unlink()
    made.model(torch.ones(2, 300)).square().mean().backward()
    assert bool(made.project_gradients().any())
    made.write_weights()


ROWS = """
    import torch.distributed as dist
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=0, world_size=1)
    model = torch.nn.Linear(300, 300)
    subspace = twa.Subspace.load(folder / "basis.safetensors", model, sharding="rows")
    wait()
    model(torch.ones(8, 300)).square().mean().backward()
    for call in (subspace.project_gradients, subspace.write_weights):
        try:
            call()
        except twa.BasisError as found:
            print(found)
    sys.stdout.flush()
    os._exit(0)  # see processes.leave_job
"""


def test_a_basis_whose_rows_are_on_ranks(tmp_path):
    pattern, _ = save_in(tmp_path, "safetensors")
    basis = tmp_path / "basis.safetensors"
    PackToFile(basis, nn.Linear(300, 300), twa.Candidates(tmp_path / pattern)).run()
    done = disturbed(tmp_path, ROWS, act=lambda: os.truncate(basis, 3 * PAGE))
    assert done.returncode == 0, done
    assert done.stdout.count("became shorter while it was being read") == 2, done


def test_a_basis_that_is_written_over(tmp_path):
    """As large as before, and so without a fault."""
    pattern, _ = save_in(tmp_path, "safetensors")
    basis = tmp_path / "basis.safetensors"
    PackToFile(basis, nn.Linear(300, 300), twa.Candidates(tmp_path / pattern)).run()

    def write_over():
        with open(basis, "r+b") as f:
            f.seek(basis.stat().st_size // 2)
            f.write(bytes(1000))

    done = disturbed(tmp_path, STEPS, "parts", act=write_over)
    assert done.returncode == 0, done
    step, same, *_ = done.stdout.splitlines()
    assert "changed while it was being read" in step and same == "True"


# The handler -------------------------------------------------------------------------------------

MAPS = """
    import faulthandler, mmap
    from twa_kernels.guard import GuardedMap, torn_maps
    pages = 64
    def mapped(name, kind=GuardedMap):
        path = folder / name
        path.write_bytes(os.urandom(4096 * pages))
        with open(path, "rb") as f:
            return kind(f.fileno(), 0, access=mmap.ACCESS_READ)
    def cut(name, to=1):
        os.truncate(folder / name, to * 4096)
"""


def of_maps(folder, code):
    started = child(folder, MAPS + code)
    (done,) = processes.finish(started)
    return done


def test_what_is_there_stays_and_the_rest_is_zeros(tmp_path):
    done = of_maps(
        tmp_path,
        """
    m, whole = mapped("a"), mapped("b")
    before = m[:]
    cut("a", 3)
    assert m[3 * 4096 :] == bytes((pages - 3) * 4096)
    assert m[: 3 * 4096] == before[: 3 * 4096]
    assert m.torn and not whole.torn and torn_maps() == 1
    del m
    again = mapped("a")  # the same number as before
    assert not again.torn and torn_maps() == 1
    print("done")
    """,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done


FAULT = 'other = mapped("b", mmap.mmap); cut("b"); print(other[-1])'


@pytest.mark.parametrize(
    "before, after, strike",
    [
        ("", "", FAULT),
        ("faulthandler.enable()", "", FAULT),
        ("", "faulthandler.enable()", FAULT),
        # a later mapping puts our handler in front again, and each then leads to the other
        ("", 'faulthandler.enable(); c = mapped("c")', FAULT),
        ("faulthandler.enable()", "", "os.kill(os.getpid(), signal.SIGBUS); time.sleep(60)"),
        ("", "del m", FAULT),
    ],
)
def test_a_fault_elsewhere_still_ends_the_process(tmp_path, before, after, strike):
    setup = 'm = mapped("a"); cut("a"); assert m[-1] == 0 and m.torn'
    done = of_maps(tmp_path, "\n".join(f"    {line}" for line in (before, setup, after, strike)))
    assert done.returncode == -signal.SIGBUS, done
    assert done.stderr.count("Fatal Python error: Bus error") == int(
        "faulthandler" in before + after
    )


def test_a_handler_that_comes_later_is_passed_by(tmp_path):
    """With faulthandler in front of ours, the next mapping puts ours in front of it."""
    done = of_maps(
        tmp_path,
        """
    m = mapped("a")
    faulthandler.enable()
    n = mapped("b")
    cut("a"), cut("b")
    assert m[-1] == n[-1] == 0 and m.torn and n.torn
    print("done")
    """,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", ""), done


def test_threads_and_forks(tmp_path):
    done = of_maps(
        tmp_path,
        """
    from twa_kernels import native
    m, later = mapped("a"), mapped("c")
    t = torch.frombuffer(m, dtype=torch.uint8)
    cut("a")
    def read():  # without the interpreter's lock, in threads of its own
        native._C.read_bytes(t.data_ptr(), t.nbytes, 4)
    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert m.torn and torn_maps() == 1
    cut("c")
    if (pid := os.fork()) == 0:
        os._exit(0 if later[-1] == 0 and later.torn and torn_maps() == 2 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert not later.torn and torn_maps() == 1
    print("done")
    """,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done


def test_many_mappings_come_and_go(tmp_path):
    """More than the table has places for; numbers are used again."""
    done = of_maps(
        tmp_path,
        """
    from twa_kernels import native
    kept = mapped("kept")
    with open(folder / "kept", "rb") as f:
        for _ in range(70_000):
            last = GuardedMap(f.fileno(), 0)
    assert last._number in (1, 2)
    assert native._C.guard(memoryview(kept)[1:]) == -1  # no begin of a page
    native._C.unguard(-1), native._C.unguard(1 << 20), native._C.unguard(5)
    cut("kept")
    assert kept[-1] == last[-1] == 0 and kept.torn and last.torn
    print("done")
    """,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done
