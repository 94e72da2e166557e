"""Closed-form schemes against torch.optim.swa_utils and direct averaging, and as points of the
subspace.
"""

from math import nan

import pytest
import torch
import twa
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from twa import averages


@pytest.fixture
def run(tmp_path):
    """7 candidates of a small model: (model factory, states, Candidates)."""

    def make():
        return torch.nn.Sequential(
            torch.nn.Linear(5, 130), torch.nn.ReLU(), torch.nn.Linear(130, 3)
        )

    states = []
    for k in range(7):
        torch.manual_seed(k)
        states.append(make().state_dict())
        save_file(states[-1], tmp_path / f"step_{k}.safetensors")
    return make, states, twa.Candidates(tmp_path / "step_*.safetensors")


def averaged(states, beta):
    return {
        key: sum(b * s[key].double() for b, s in zip(beta.tolist(), states, strict=True))
        for key in states[0]
    }


def swa_utils(make, states, multi_avg_fn):
    source = make()
    average = AveragedModel(source, multi_avg_fn=multi_avg_fn)
    for state in states:
        source.load_state_dict(state)
        average.update_parameters(source)
    return average.module.state_dict()


def close(ours, theirs):
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key].double(), value.double(), rtol=1e-5, atol=1e-6)


def test_uniform_is_swa(run):
    make, states, _ = run
    close(averaged(states, averages.uniform(7)), swa_utils(make, states, get_swa_multi_avg_fn()))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_ema(run, decay):
    make, states, _ = run
    close(
        averaged(states, averages.ema(7, decay)),
        swa_utils(make, states, get_ema_multi_avg_fn(decay)),
    )


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(
    "beta",
    [
        averages.uniform(7),
        averages.ema(7, 0.7),
        averages.lawa(7, 3),
        averages.candidate(7, 0),
        averages.candidate(7, -1),
    ],
    ids=["uniform", "ema", "lawa", "first", "last"],
)
@pytest.mark.parametrize("center", ["mean", "last", 2])
def test_every_scheme_is_a_point_of_the_subspace(run, beta, bits, center):
    make, states, candidates = run
    model = make()
    subspace = twa.Subspace.from_candidates(model, candidates, bits=bits, center=center)
    subspace.set_merge_weights(beta)
    scale = max(s.abs().max() for s in states[0].values())
    for key, value in averaged(states, beta).items():
        assert (model.state_dict()[key].double() - value).abs().max() <= (
            1e-6 if bits == 32 else 0.02
        ) * scale
    torch.testing.assert_close(
        subspace.merge_weights(), beta[:, None].expand(-1, 4), rtol=1e-5, atol=1e-6
    )


def test_sums_are_one():
    for beta in (
        averages.uniform(9),
        averages.ema(9, 0.95),
        averages.lawa(9, 9),
        averages.candidate(9, 4),
    ):
        assert float(beta.sum()) == pytest.approx(1.0, abs=1e-12)


def test_wsm_of_a_linear_decay_is_the_plain_mean_of_the_last():
    for n, k in ((7, 1), (7, 4), (9, 9)):
        torch.testing.assert_close(averages.wsm(n, k), averages.lawa(n, k), rtol=0, atol=1e-15)


@pytest.mark.parametrize("decay", averages.DECAYS)
@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_wsm_is_a_run_whose_rate_decays(decay, k):
    """Updates that do not depend on where the run is, scaled by the decay: the run's end is the
    merge.
    """
    n, m, f = 7, 7 - k, averages.DECAYS[decay]
    theta = torch.randn(n, 11, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    end = theta[m].clone()
    for j in range(m + 1, n):
        end += f(torch.tensor((j - m) / k, dtype=torch.float64)) * (theta[j] - theta[j - 1])
    beta = averages.wsm(n, k, decay)
    torch.testing.assert_close(beta @ theta, end)
    assert (
        (beta >= 0).all()
        and not beta[:m].any()
        and float(beta.sum()) == pytest.approx(1.0, abs=1e-12)
    )


def test_greedy_soup():
    """Quadratic loss around 2.0: members 2.1 and 1.8 help each other, 5.0 does not."""
    w = torch.tensor([5.0, 2.1, 1.8], dtype=torch.float64)
    tried = []

    def loss(beta):
        tried.append(beta)
        return float(((beta * w).sum() - 2.0) ** 2)

    beta = averages.greedy_soup([loss(averages.candidate(3, k)) for k in range(3)], loss)
    assert beta.tolist() == [0.0, 0.5, 0.5]
    assert len(tried) == 3 + 2


@pytest.mark.parametrize("losses", [[nan, 1.0, 0.5], [1.0, nan, 0.5], [0.5, 1.0, nan]])
def test_greedy_soup_leaves_out_what_has_no_loss(losses):
    def evaluate(beta):
        return nan if beta[losses.index(nan)] else 0.1

    beta = averages.greedy_soup(losses, evaluate)
    assert beta.tolist() == [0.0 if loss is nan else 0.5 for loss in losses]


@pytest.mark.parametrize(
    "call",
    [
        lambda: averages.lawa(3, 4),
        lambda: averages.lawa(3, 0),
        lambda: averages.ema(3, 1.0),
        lambda: averages.candidate(3, 3),
        lambda: averages.wsm(3, 4),
        lambda: averages.wsm(3, 0),
        lambda: averages.wsm(3, 2, "exponential"),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError, match="expected"):
        call()


@pytest.mark.parametrize(
    ("text", "beta"),
    [
        ("uniform", averages.uniform(7)),
        ("last", averages.candidate(7, -1)),
        ("ema:0.9", averages.ema(7, 0.9)),
        ("lawa:4", averages.lawa(7, 4)),
        ("wsm:5", averages.wsm(7, 5)),
        ("wsm:5:linear", averages.wsm(7, 5)),
        ("wsm:5:sqrt", averages.wsm(7, 5, "sqrt")),
        ("wsm:5:cosine", averages.wsm(7, 5, "cosine")),
    ],
)
def test_schemes_by_name(text, beta):
    assert torch.equal(averages.of_scheme(text, 7), beta)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean", "expected uniform, last, ema:DECAY, .*linear, sqrt, cosine.*found 'mean'"),
        ("", "expected uniform"),
        ("uniform:2", "expected uniform"),
        ("ema", "expected uniform"),
        ("ema:much", "expected uniform"),
        ("lawa:2.5", "expected uniform"),
        ("wsm:2:sqrt:3", "expected uniform"),
        ("ema:1", "scheme ema:1: decay: expected 0 <= decay < 1"),
        ("ema:nan", "decay: expected 0 <= decay < 1"),
        ("lawa:8", "scheme lawa:8: k: expected 1 to 7, found 8"),
        ("wsm:3:exp", "decay: expected one of linear, sqrt, cosine, found 'exp'"),
    ],
)
def test_bad_schemes_say_what_is_possible(text, message):
    with pytest.raises(twa.TwaError, match=message):
        averages.of_scheme(text, 7)


def test_weights_of_json():
    names = ["a", "b", "c"]
    assert averages.of_weights([0.5, 0, 0.5], names).tolist() == [0.5, 0.0, 0.5]
    assert averages.of_weights({"c": 2, "a": -1}, names).tolist() == [-1.0, 0.0, 2.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.5, 0.5], "expected 3 merge weights, one for each candidate, found float64 .2."),
        ([0.5, 0.25, 0.25001], "sum to 1, found a sum of 1.00001"),
        ({}, "found a sum of 0"),
        ({"d": 1.0}, "expected names of candidates .a, b, c., found 'd'"),
        ({"a": "1"}, "finite numbers"),
        ([1.0, 0.0, True], "finite numbers"),
        ([10**400, 0, 0], "finite numbers"),
        ([float("nan"), 0, 0], "finite numbers"),
        ("uniform", "expected a list"),
        (None, "expected a list"),
    ],
)
def test_bad_weights_of_json(value, message):
    with pytest.raises(twa.TwaError, match=message):
        averages.of_weights(value, ["a", "b", "c"])
