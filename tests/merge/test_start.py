"""Where TWA starts: what is chosen, on how many batches, and that averages to compare with change
nothing.
"""

import math

import pytest
import torch
import twa
from safetensors.torch import save_file
from torch import nn
from twa.merge.results import START
from twa.merge.resume import Store
from twa.merge.run import Merge
from twa.merge.settings import Settings, TwaMethod
from twa.merge.start import first_stride, options
from twa.tasks.batches import scattered
from twa.tasks.contract import Task

pytestmark = pytest.mark.usefixtures("one_thread")

N = 48
NAMES = ["last", *(f"EMA decay {d}" for d in (0.5, 0.75, 0.875, 0.9375)), "uniform"]


class Weights(nn.Module):
    """Of candidate k number k is one, the others are zero: merged, they are the merge weights."""

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(N))

    @property
    def horizon(self):
        """About as many candidates as are averaged, as its logarithm."""
        return -self.beta.detach().double().square().sum().log()


def horizons():
    return [float(-beta.square().sum().log()) for _, beta in options(N)]


@pytest.fixture
def candidates(tmp_path):
    for k, row in enumerate(torch.eye(N)):
        save_file({"beta": row}, tmp_path / f"c{k}.safetensors")
    return twa.Candidates(tmp_path / "c*.safetensors")


def merge_of(candidates, loss, val, settings=None, **options):
    """A job whose every look is noted: (horizon, batch)."""
    seen = []

    def noted(model, batch):
        if not torch.is_grad_enabled():
            seen.append((round(float(model.horizon), 3), int(batch[0])))
        return loss(model, batch)

    train = [torch.zeros(4, 2)]
    task = Task("t", Weights, noted, train, val, None, None, None, "")
    settings = settings or Settings(methods=())
    return Merge(task, candidates, settings, progress=False, **options), seen


def batches(count, noise=0.0, size=4):
    """Batch k holds its number and what it adds to each loss."""
    g = torch.Generator().manual_seed(0)
    return [
        torch.tensor([[k, float(noise * torch.randn((), generator=g))]]).expand(size, 2).flatten()
        for k in range(count)
    ]


def falls_and_rises(target):
    """A loss whose least is at a horizon; batches differ, all averages alike on each."""
    return lambda model, batch: (model.horizon - target).square() + 1 + batch[1]


# What there is to choose from --------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, decays",
    [(2, 0), (3, 0), (4, 1), (7, 1), (8, 2), (15, 2), (16, 3), (31, 3), (32, 4), (500, 4)],
)
def test_options_have_longer_and_longer_horizons(n, decays):
    found = options(n)
    assert [name for name, _ in found] == [*NAMES[: decays + 1], "uniform"]
    sizes = [float(1 / beta.square().sum()) for _, beta in found]
    ages = [float(beta.flip(0) @ torch.arange(n).double()) for _, beta in found]
    assert sizes == sorted(set(sizes)) and ages == sorted(set(ages))


def sample(stride):
    """Which of 64 batches a sample has."""
    return [k for k in range(64) if scattered(k, stride) % stride == 0]


@pytest.mark.parametrize(
    "count, stride", [(0, 1), (1, 1), (6, 1), (7, 2), (8, 2), (12, 2), (13, 4), (1000, 256)]
)
def test_the_first_sample(count, stride):
    assert first_stride(count, 1) == stride


def test_the_first_sample_has_a_batch_for_each_rank():
    assert [first_stride(1000, size) for size in (1, 4, 5, 8, 9, 1000)] == [
        256,
        256,
        128,
        128,
        64,
        1,
    ]


# The walk ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", range(6))
def test_the_least_loss_is_found(candidates, target):
    """With what all averages have in common however noisy: on the first sample, that is."""
    val = batches(64, noise=10.0)
    merge, seen = merge_of(candidates, falls_and_rises(horizons()[target]), val)
    outcome = merge.run()
    (row,) = outcome.results
    _, beta = options(N)[target]
    assert row.method == START and torch.equal(row.beta, beta)
    looks = {0: 4, 1: 4, 2: 3, 3: 3, 4: 4, 5: 4}[target]
    assert row.note == f"{NAMES[target]}; of {looks} averages, on 4 of 64 validation batches"
    assert len(seen) == 4 * looks + 64 and {k for _, k in seen[: 4 * looks]} == set(sample(16))
    expected = 1 + sum(float(b[1]) for b in val) / 64
    assert row.val_loss == pytest.approx(expected, abs=1e-5)
    assert row.looks == pytest.approx(len(seen) * 8 / 4 / 3)
    assert merge.evaluator.stride == 16 and (row.candidates, row.steps) == ((beta != 0).sum(), 0)
    torch.testing.assert_close(merge.model.beta.double(), beta)  # the model is there


def test_a_sample_grows_until_it_tells_two_apart(candidates):
    """The longer the horizon, the lower the loss, by a little; batches disagree about how much.
    No batch is read twice for the same average.
    """
    g = torch.Generator().manual_seed(1)
    slopes = -0.2 + 0.5 * torch.randn(64, generator=g)

    def loss(model, batch):
        return 9 + slopes[int(batch[0])] * model.horizon

    merge, seen = merge_of(candidates, loss, batches(64))
    row = merge.start()
    used = 64 // merge.evaluator.stride
    assert 4 < used < 64 and f"on {used} of 64" in row.note
    looks = seen[:-64]
    assert len(set(looks)) == len(looks)
    first, second = (round(horizons()[k], 3) for k in (2, 3))
    for horizon in (first, second):
        mine = [k for h, k in looks if h == horizon]
        assert mine[:4] == sample(16) and sorted(mine) == sample(64 // used)
    # as far as the sample shows, which is not all of the data
    apart = slopes[sample(64 // used)].double()
    assert abs(apart.mean()) > 2 * apart.std() / math.sqrt(used)
    apart = slopes[sample(2 * 64 // used)].double()
    assert abs(apart.mean()) <= 2 * apart.std() / math.sqrt(used // 2)


def test_averages_that_are_alike_need_no_more_batches(candidates):
    """Their difference is not told from none, but it is small beside the loss."""
    noise = torch.randn(64, generator=torch.Generator().manual_seed(2))
    for size, used in ((1e-4, 4), (1.0, 64)):
        merge, _ = merge_of(
            candidates,
            lambda m, b, s=size: 1 + s * noise[int(b[0])] * m.horizon,
            batches(64),
        )
        row = merge.start()
        assert (f"on {used} of 64" in row.note) == (used == 4), row.note


def test_a_sample_that_is_all_of_the_data_is_not_read_again(candidates):
    merge, seen = merge_of(candidates, falls_and_rises(horizons()[2]), batches(5))
    row = merge.start()
    assert len(seen) == 3 * 5 and "of 3 averages, on 5 of 5" in row.note
    assert row.val_loss == merge.evaluator.loss()
    assert row.looks == pytest.approx(15 * 8 / 4 / 3)


def test_losses_that_are_not_finite_lose(candidates):
    """All with a horizon above that of EMA decay 0.5 are NaN; then all but the last candidate."""
    for most, chosen in ((1, "EMA decay 0.5"), (0, "last")):
        limit = horizons()[most] + 1e-3
        merge, _ = merge_of(
            candidates,
            lambda m, b, limit=limit: 5 - m.horizon + (0 if m.horizon < limit else math.nan),
            batches(64),
        )
        assert merge.start().note.startswith(f"{chosen}; of 4 averages, on 4 of 64")


def test_one_candidate_is_no_choice(candidates, tmp_path):
    alone = twa.Candidates(tmp_path / "c0.safetensors")
    settings = Settings(compare=True)
    merge, seen = merge_of(alone, falls_and_rises(0.0), batches(64), settings)
    outcome = merge.run()
    (row,) = outcome.results
    assert (row.method, row.note, len(seen)) == ("last", "c0", 64) and row is outcome.winner
    assert outcome.cost == {"start": row.looks, "steps": 0, "looks": 0, "comparison": 0}


def test_two_candidates(candidates, tmp_path):
    two = twa.Candidates(tmp_path / "c[01].safetensors")
    merge, _ = merge_of(two, lambda m, b: m.horizon + 2, batches(8))
    assert merge.start().note == "last; of 2 averages, on 4 of 8 validation batches"


# In the whole job --------------------------------------------------------------------------------


class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Dropout(0.2), nn.Linear(12, 1))


def data(seed, count):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, 5, generator=g)
    return [(a, a.sum(1, keepdim=True).sin()) for a in x]


def mse(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with ten checkpoints."""
    folder, model = tmp_path_factory.mktemp("run"), Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for k in range(10):
        for batch in data(k, 4):
            optimizer.zero_grad()
            mse(model, batch).backward()
            optimizer.step()
        save_file(model.state_dict(), folder / f"c{k}.safetensors")
    return folder


def job(folder, **options):
    task = Task("t", Net, mse, data(1, 9), data(2, 16), data(3, 6), None, None, "")
    methods = (TwaMethod("t", "tensor", 4), TwaMethod("v", "model", 4))
    settings = Settings(methods, steps=8, bn_batches=5, batches_per_step=2, patience=0, **options)
    return task, twa.Candidates(folder), settings


def facts(row):
    """What must be the same bits."""
    kept = ("method", "note", "val_loss", "looks", "steps", "curve", "val_curve", "coefficients")
    return {name: getattr(row, name) for name in kept} | {"beta": row.beta.tolist()}


def test_averages_to_compare_with_change_nothing(run):
    plain = Merge(*job(run), progress=False).run()
    compared = Merge(*job(run, compare=True), progress=False).run()
    names = [r.method for r in compared.results]
    assert names[:6] == ["last", "best single", "uniform", "EMA", "LAWA", "greedy soup"]
    assert names[6:] == [r.method for r in plain.results] and names[6] == START
    for ours, theirs in zip(plain.results, compared.results[6:], strict=True):
        assert facts(ours) == facts(theirs)
    # "5" BatchNorm batches and 16 of validation data; a step has two batches
    look, average = 16 / 3 / 2, (16 + 5) / 3 / 2
    looks = {r.method: r.looks for r in compared.results}
    assert looks["last"] == pytest.approx(look)
    assert looks["best single"] == pytest.approx(10 * look)
    assert looks["uniform"] == pytest.approx(2 * average)  # chosen, and as it is exported
    assert looks["EMA"] == pytest.approx(6 * average)
    for outcome in (plain, compared):
        *fixed, start, t, v = outcome.results
        expected = {"start": start.looks, "steps": 16, "looks": t.looks + v.looks}
        assert outcome.cost == expected | {"comparison": sum(r.looks for r in fixed)}
        line = f"start {start.looks:.1f}, steps 16, looks {t.looks + v.looks:.1f}"
        assert f"counts a third): {line}" in str(outcome)
        assert (", comparison " in str(outcome)) == bool(fixed)
    assert plain.cost["start"] < compared.cost["comparison"] / 3


def test_training_starts_at_the_start(run):
    merge = Merge(*job(run), progress=False)
    seen = []
    merge.train(
        merge.settings.methods[0], on_look=lambda step: seen.append((step, merge.results[:]))
    )
    (step, rows), *_ = seen
    assert step == 0 and [r.method for r in rows] == [START]
    found = merge.results[1]
    assert found.note == "from start" and merge.start() is rows[0]
    # float32 rounding of the weights, and BatchNorm on all of its batches
    assert found.val_curve[0][1] == pytest.approx(rows[0].val_loss, rel=1e-3)


def test_a_continued_run_has_the_stride_of_the_start(candidates, tmp_path):
    found = []
    for resume in (False, True):
        store = Store(tmp_path / "out", resume)
        merge, seen = merge_of(candidates, falls_and_rises(2.0), batches(64), store=store)
        found.append((facts(merge.run().results[0]), merge.evaluator.stride))
    assert found[0] == found[1] and found[0][1] == 16 and not seen


def start_on_a_rank(group, folder):
    task, candidates, settings = job(folder)
    merge = Merge(task, candidates, settings, progress=False, group=group)
    assert merge.ranks.world_size > 1
    row = merge.start()
    return row.note, row.val_loss, row.looks, merge.evaluator.stride


def test_ranks_choose_the_same(run, ranks):
    alone = Merge(*job(run), progress=False)
    row = alone.start()
    for size in (2, 3):
        for note, loss, looks, stride in ranks.run(size, start_on_a_rank, str(run)):
            assert (note, stride) == (row.note, alone.evaluator.stride)
            assert loss == pytest.approx(row.val_loss, rel=1e-6)
            assert looks == pytest.approx(row.looks)
