"""`twa pack` on several ranks (gloo): one file, byte by byte that of one process; a rank that fails
or dies; going on with another number of ranks.
"""

import shutil
import signal
import sys
import textwrap
from pathlib import Path

import processes
import pytest
import torch
import twa
from safetensors.torch import save_file
from test_pack_file import Model, Stop, heap, states
from twa.cli import main as cli
from twa.distributed.ranks import Ranks
from twa.io.candidates import UNIT, Candidates
from twa.packing import to_file
from twa.packing.shares import are_runs, joined, share_out
from twa.packing.to_file import PackToFile

NAME = "b.safetensors"
KINDS = [
    {},
    {"granularity": "model", "bits": 2},
    {"granularity": 128, "bits": 8},
    {"granularity": 12800, "center": "last"},  # segments end inside blocks
]


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    """Of 40 blocks and more."""
    return heap(tmp_path_factory.mktemp("heap"), n=4, wide=2500)


def pack(group, path, paths, options, resume=False, stop_after=None):
    """Packs in the smallest blocks. Returns what was read at a time, and what went wrong."""
    small, seen = Candidates(paths, block_bytes=1), []

    def progress(count):
        seen.append(count)
        if stop_after is not None and len(seen) > stop_after:
            raise Stop

    try:
        PackToFile(path, Model(2500), small, ranks=Ranks(group), **options).run(resume, progress)
    except Exception as error:  # for the test to look at
        return seen, f"{type(error).__name__}: {error}"
    return seen, ""


def pack_and_save(group, *arguments):
    to_file.SAVE_SECONDS, usual = 0.0, to_file.SAVE_SECONDS
    try:
        return pack(group, *arguments)
    finally:
        to_file.SAVE_SECONDS = usual


@pytest.mark.parametrize("options", KINDS)
def test_the_bytes_of_one_process(ranks, candidates, tmp_path, options):
    PackToFile(tmp_path / "one", Model(2500), candidates, **options).run()
    for size in (1, 2, 3):
        path = tmp_path / str(size) / NAME
        paths = [c.path for c in candidates]
        answers = ranks.run(size, pack, path, paths, options)
        total = PackToFile(path, Model(2500), candidates, **options).nbytes
        assert [(sum(read), error) for read, error in answers] == [(total, "")] * size
        assert path.read_bytes() == (tmp_path / "one").read_bytes(), size
        assert [p.name for p in path.parent.iterdir()] == [NAME]


@pytest.mark.parametrize("before, after", [(2, 2), (3, 2), (2, 1), (1, 3)])
def test_resume_on_any_number_of_ranks(ranks, candidates, tmp_path, before, after):
    paths, path = [c.path for c in candidates], tmp_path / NAME
    options = {"granularity": "model"}
    PackToFile(tmp_path / "one", Model(2500), candidates, **options).run()
    answers = ranks.run(before, pack_and_save, path, paths, options, False, 4)
    assert all("Stop" in error for _, error in answers), answers
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [NAME + end for end in (".partial", ".position.partial", ".scales.partial")] + [
        "one"
    ]
    answers = ranks.run(after, pack, path, paths, options, True)
    assert not any(error for _, error in answers), answers
    done, *rest = answers[0][0]
    assert 0 < done < sum(rest)  # what was done before is not done again
    assert path.read_bytes() == (tmp_path / "one").read_bytes()


def test_not_a_number_on_one_rank(ranks, candidates, tmp_path):
    """All stop at the same block, and name the file; nothing is left."""
    state = states(candidates[2].path)
    state["first.weight"][55, 3] = torch.inf  # in the third block of the second rank
    save_file(state, tmp_path / "bad.safetensors")
    paths = [candidates[0].path, tmp_path / "bad.safetensors"]
    answers = ranks.run(3, pack, tmp_path / "out" / NAME, paths, {})
    for read, error in answers:
        assert len(read) <= 3  # of 14
        assert "bad.safetensors: tensor 'first.weight' has 1 NaN or Inf" in error, error
    assert sum("while packing" in error for _, error in answers) == 2
    assert not list((tmp_path / "out").iterdir())


def pack_others(group, path, paths, wrong):
    mine = paths if group.rank() else paths[::-1]
    options = {"bits": 2} if wrong == "bits" and group.rank() else {}
    return pack(group, path, mine if wrong == "candidates" else paths, options)


@pytest.mark.parametrize("wrong, text", [("candidates", "candidate 0"), ("bits", "bits")])
def test_ranks_that_were_given_different_things(ranks, candidates, tmp_path, wrong, text):
    paths = [c.path for c in candidates]
    for _, error in ranks.run(2, pack_others, tmp_path / NAME, paths, wrong):
        assert error.startswith("DistributedError") and text in error, error
    assert not list(tmp_path.iterdir())


def pack_apart(group, path, paths, resume):
    return pack_and_save(group, path / str(group.rank()) / NAME, paths, {}, resume)


@pytest.mark.parametrize("resume", [False, True])
def test_ranks_that_see_different_folders(ranks, candidates, tmp_path, resume):
    """A folder of its own on each host, with what an earlier run has left there."""
    paths = [c.path for c in candidates]
    answers = ranks.run(1, pack_and_save, tmp_path / "0" / NAME, paths, {}, False, 30)
    assert "Stop" in answers[0][1]
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    before = {p.name: p.read_bytes() for p in (tmp_path / "1").iterdir()}
    for _, error in ranks.run(2, pack_apart, tmp_path, paths, resume):
        assert "expected the folder that rank 0 writes to" in error, error
    assert {p.name: p.read_bytes() for p in (tmp_path / "1").iterdir()} == before
    assert not list(tmp_path.rglob("*proof*"))


def test_another_process_at_work(ranks, candidates, tmp_path):
    paths, path = [c.path for c in candidates], tmp_path / NAME
    job = PackToFile(path, Model(2500), candidates)
    job.writer.lock()
    job.writer.open()
    for share in (False, True):  # by a process alone, and by ranks
        for _, error in ranks.run(2, pack, path, paths, {}):
            assert "another process is writing it" in error
        if not share:
            job.writer.share()
    job.writer.close()
    assert not any(error for _, error in ranks.run(2, pack, path, paths, {}))


def test_damaged_sums(candidates, tmp_path, monkeypatch):
    monkeypatch.setattr(to_file, "SAVE_SECONDS", 0.0)
    path, paths = tmp_path / NAME, [c.path for c in candidates]
    assert "Stop" in pack(None, path, paths, {}, False, 5)[1]
    raw = tmp_path / f"{NAME}.scales.partial"
    job = PackToFile(path, Model(2500), candidates)
    job.groups = to_file.Groups(job.contents)
    data, at = raw.read_bytes(), job._sums_at(1)
    for number in (float("nan"), -1.0):
        raw.write_bytes(
            data[:at] + torch.tensor(number).double().numpy().tobytes() + data[at + 8 :]
        )
        _, error = pack(None, path, paths, {}, True)
        assert "not the scales of an unfinished basis" in error and "scales.partial" in error


# The command, under torchrun's environment -------------------------------------------------------

TASK = """
    import sys
    sys.path.append({folder!r})
    from test_pack_file import Model
    def model():
        return Model(2500)
    train_data = val_data = lambda: [1]
    loss = None.__class__
"""
#: `python -c` of this is `twa`: a position after every block of the smallest size; a rank may die
STRUCK = """
    import os, signal, sys
    from twa.cli import main as cli
    from twa.io import candidates
    from twa.packing import to_file

    candidates.BLOCK_BYTES = 1
    candidates.Candidates.__init__.__kwdefaults__["block_bytes"] = 1
    to_file.SAVE_SECONDS, pack, count = 0.0, to_file.PackToFile._pack, 0

    def struck(self, *args):
        global count
        count += 1
        if count == {at} and self.ranks.rank == {rank}:
            os.kill(os.getpid(), signal.SIGKILL)
        pack(self, *args)

    to_file.PackToFile._pack = struck
    code = cli.main(sys.argv[1:])
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
"""


def command(folder, paths, *options, at=0, rank=0):
    (folder / "task.py").write_text(textwrap.dedent(TASK.format(folder=str(Path(__file__).parent))))
    arguments = ["pack", folder / "task.py", *paths, "-o", folder / "out" / NAME, *options]
    struck = textwrap.dedent(STRUCK).format(at=at, rank=rank)
    return [sys.executable, "-c", struck, *map(str, arguments)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("at", [1, 6])
def test_a_rank_is_killed(candidates, tmp_path, rank, at):
    """The others stop with a reason; --resume goes on where they were, to the same bytes."""
    paths = [c.path for c in candidates]
    PackToFile(tmp_path / "one", Model(2500), candidates).run()
    done = processes.finish(*processes.start_job(*[command(tmp_path, paths, at=at, rank=rank)] * 3))
    codes = [-signal.SIGKILL if r == rank else 1 for r in range(3)]
    assert [d.returncode for d in done] == codes, [d.stderr for d in done]
    for r, d in enumerate(done):
        if r != rank:
            assert "another rank died or does not answer" in d.stderr, d.stderr
            assert ("--resume" in d.stderr) == (at > 1), d.stderr
    done = processes.finish(
        *processes.start_job(*[command(tmp_path, paths, "--resume", "--max-memory", "9GB")] * 2)
    )
    assert [d.returncode for d in done] == [0, 0], [d.stderr for d in done]
    said = "continued and finished" if at > 1 else "packed 4 candidates"
    assert said in done[0].stdout and not done[1].stdout, done
    assert (tmp_path / "out" / NAME).read_bytes() == (tmp_path / "one").read_bytes()
    assert [p.name for p in (tmp_path / "out").iterdir()] == [NAME]
    (again,) = [processes.finish(*processes.start_job(*[command(tmp_path, paths, "--resume")] * 2))]
    assert "nothing to resume" in again[0].stdout and not again[1].stdout
    assert [d.returncode for d in again] == [0, 0]


def test_memory_is_divided_among_the_ranks_of_a_host(candidates, tmp_path):
    paths = [c.path for c in candidates]
    done = processes.finish(
        *processes.start_job(*[command(tmp_path, paths, "--max-memory", "0.2GB")] * 2)
    )
    assert [d.returncode for d in done] == [2, 2], [d.stderr for d in done]
    assert "--max-memory: 0.10 GB are not enough" in done[0].stderr


def test_an_unfinished_file_needs_a_word(candidates, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(to_file, "SAVE_SECONDS", 0.0)
    (tmp_path / "out").mkdir()
    paths = [c.path for c in candidates]
    assert "Stop" in pack(None, tmp_path / "out" / NAME, paths, {}, False, 3)[1]
    arguments = command(tmp_path, paths)[3:]
    assert cli.main(arguments) == 2
    assert "of an unfinished run; pass --resume" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume"]) == 0
    assert "continued and finished" in capsys.readouterr().out
    twa.Subspace.load(tmp_path / "out" / NAME, Model(2500))


# Shares ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks_", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("seed", range(5))
def test_shares(ranks_, seed):
    """Each column once, in order; blocks that begin at multiples of UNIT; about as much each."""
    random = torch.Generator().manual_seed(seed)
    numels = (torch.rand(9, generator=random).pow(3) * 60 * UNIT).long().tolist()
    sizes = [(2, 4, 8)[k % 3] * 5 for k in range(9)]
    runs = joined([(k, 0, numel) for k, numel in enumerate(numels) if numel])
    for width in (UNIT, 4 * UNIT):
        shares = share_out(runs, sizes, ranks_, width)
        blocks = [block for share in shares for block in share]
        assert blocks == sorted(blocks) and joined(blocks) == runs and len(shares) == ranks_
        assert all(e - b <= width and b % UNIT == 0 for _, b, e in blocks)
        each = [sum((e - b) * sizes[k] for k, b, e in share) for share in shares]
        assert max(each) - sum(each) / ranks_ <= 2 * UNIT * 40
        kept = [list(run) for run in joined([b for share in shares for b in share[1:]])]
        assert are_runs(kept, numels)
    assert not are_runs([[0, 0, numels[0] + 1]], numels)
