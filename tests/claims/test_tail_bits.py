"""The claims tail and bits: the published quantiser, and both from end to end on a model of a few
thousand weights.
"""

from dataclasses import replace

import pytest
import torch
from claims import bits, tail, text, workloads
from claims.job import Job
from claims.page import draw
from claims.rows import Rows, table
from claims.runs import Plan

KEYS = {"seed", "task", "setting", "method", "steps", "looks", "cost", "val", "test"}


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny():
    made = workloads.gpt("help", width=8, depth=1, context=8)
    return replace(
        made,
        usual=Plan(steps=80, every=4, lr=3e-3, schedule="cosine"),
        tail_rates=(3e-3, 1e-3),
        twa_steps=6,
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "EVAL_WINDOWS", 64)
        other = replace(tiny(), name="vgg", label="another", tail_rates=(2e-3,))
        patch.setitem(workloads.BUILT_IN, "gpt", tiny)
        patch.setitem(workloads.BUILT_IN, "vgg", lambda: other)
        yield Job(0, tmp_path_factory.mktemp("claims"))


def seeds(rows):
    """Those of seed 0 alone, and with a second seed."""
    return rows, Rows([*rows, *({**r, "seed": 1, "test": r["test"] + 0.01} for r in rows)])


def check_shown(module, rows):
    for some in seeds(rows):
        assert all(isinstance(found, str) and "nan" not in found for found in module.findings(some))
        assert table(some).count("\n") > 10
    assert draw(module, some).startswith(b"\x89PNG")


# The published quantiser -------------------------------------------------------------------------


def plain(row, count):
    """Nearest of 2^bits levels between the row's extremes."""
    low, high = min(row), max(row)
    levels = [low + (high - low) * k / (count - 1) for k in range(count)]
    return [min(levels, key=lambda level: abs(level - v)) for v in row]


@pytest.mark.parametrize("count", [1, 2, 129])
@pytest.mark.parametrize("width", [8, 4, 3, 2, 1])
def test_minmax_takes_the_nearest_level(width, count):
    rows = torch.randn(3, count, generator=torch.Generator().manual_seed(count))
    rows *= torch.tensor([[1.0], [1e-6], [1e3]])
    nearest = [plain(row, 2**width) for row in rows.double().tolist()]
    expected = torch.tensor(nearest, dtype=torch.float64)
    size = rows.abs().amax(1, keepdim=True).double()
    assert ((bits.minmax(rows, width).double() - expected).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize("width", [8, 1])
def test_minmax_leaves_constants(width):
    rows = torch.tensor([[0.0, 0.0, 0.0], [-2.5, -2.5, -2.5], [1e-45, 0.0, 0.0]])
    back = bits.minmax(rows, width)
    assert torch.equal(back[:2], rows[:2]) and torch.isfinite(back).all()
    assert bits.minmax(torch.empty(3, 0), width).shape == (3, 0)


def test_one_bit_is_minimum_or_maximum():
    row = torch.tensor([[-1.0, 0.9, 1.1, 3.0]])
    assert torch.equal(bits.minmax(row, 1), torch.tensor([[-1.0, -1.0, 3.0, 3.0]]))


def test_relative_errors():
    drawn = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    p = [drawn, torch.zeros(4, 5), torch.ones(4, 7)]
    found = bits.relative_errors(p)
    kinds = [(q, b) for q in ("packed", "min/max") for b in (8, 4, 3, 2, 1)]
    assert set(found) == {("float32", 32), *kinds}
    norm = torch.cat(p, 1).norm()
    for b in (8, 4, 3, 2, 1):
        error = torch.cat([bits.minmax(t, b) - t for t in p], 1).norm()
        assert found["min/max", b] == pytest.approx(float(error / norm), rel=1e-4)
        assert b == 8 or found["packed", b] < found["min/max", b]


# From end to end ---------------------------------------------------------------------------------


def test_tail(job, monkeypatch):
    monkeypatch.setattr(tail, "CHECKPOINTS", 4)
    rows = tail.run(job)
    tails = {
        "GPT, source text": ["constant 0.001", "constant 0.003", "cyclic 0.001", "cyclic 0.003"],
        "another": ["constant 0.002", "cyclic 0.002"],
    }
    assert rows.of("task") == list(tails) and all(r.keys() >= KEYS for r in rows)
    fixed = ["best single", "SWA", "EMA", "LAWA", "greedy soup"]
    trained = ["TWA-t fine, 4 bits", "TWA-t per tensor, 4 bits", "TWA-v per tensor, 4 bits"]
    for task, settings in tails.items():
        assert rows.where(task=task).of("setting") == ["usual run", *settings]
        for setting in settings:
            mine = rows.where(task=task, setting=setting)
            assert mine.of("method") == [*fixed, *trained, *tail.ANNEALING]
            equal = mine.where(method="annealing, same cost")[0]
            most = max(r["cost"] for r in mine if r["method"] in trained)
            assert equal["cost"] == equal["steps"] == round(most)
            assert mine.of("stopped") == [64]  # 4 checkpoints, 4 steps apart, after step 48
    check_shown(tail, rows)


def test_tail_goes_on_from_the_usual_run(job):
    """With the optimizer's state: a tail with the usual run's own rates would be the usual run."""
    workload = replace(tiny(), name="same", usual=Plan(steps=80, every=4, lr=1e-3))
    task = job.task(workload)
    usual = job.usual(workload, task)
    made = tail.tail_of(job, workload, task, usual, "constant", 1e-3)
    a, b = usual.candidates(after=48, until=64), made.candidates()
    assert made.steps == list(range(49, 65)) and len(b) == 16
    key = "embed.weight"
    assert torch.equal(a[-1].tensor(key), b[-1].tensor(key))
    assert not torch.equal(b[0].tensor(key), b[-1].tensor(key))


def test_bits(job, monkeypatch):
    monkeypatch.setattr(bits, "BITS", (32, 2, 1))
    rows = bits.run(job)
    assert all(r.keys() >= KEYS for r in rows)
    assert rows.of("setting") == ["start", "float32", "2 bits", "1 bit", "random rows"]
    assert len(rows) == 1 + 4 + 7 + 7 + 4
    start = rows.where(method=bits.START)[0]
    assert all(r["val"] <= start["val"] + 1e-5 and r["cost"] > start["cost"] for r in rows[1:])
    errors = {(r["quantiser"], r["bits"]): r["error"] for r in rows[1:]}
    assert 0 < errors["packed", 2] < errors["packed", 1] < errors["min/max", 1]
    assert errors["float32", 32] == 0 and errors["random", 0] is None
    check_shown(bits, rows)


def test_a_basis_that_prepare_has_altered_is_trained(job):
    """With rows of zero nothing can be gained: every look sees the center."""
    workload = tiny()
    task = job.task(workload)
    merge = job.merge(task, job.usual(workload, task).candidates(count=4), 5)

    def zero(subspace):
        for p in subspace.basis.rows:
            p.zero_()

    result = merge.train(bits.TwaMethod("t", "tensor", 32), prepare=zero)
    assert len({loss for _, loss in result.val_curve}) == 1
