"""TWA-v gets as many coefficients as its held-out samples bear."""

import pytest
import torch
import twa
from torch import nn
from twa.distributed.choose import choose_sharding
from twa.distributed.ranks import Ranks
from twa.io.key_map import match_model
from twa.merge.fitting import count_samples, fitted, samples_needed
from twa.merge.settings import TwaMethod


@pytest.fixture(scope="module")
def sharding():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(40, 40) for _ in range(8)))
    states = [{k: torch.randn_like(t) for k, t in net.state_dict().items()} for _ in range(8)]
    candidates, key_map = match_model(net, twa.Candidates.of_states(states))
    return choose_sharding("single", net, candidates, key_map, 4, Ranks())


def test_the_rule_runs_through_what_was_measured():
    for coefficients, samples in ((32, 64), (896, 256), (28_352, 1024)):
        assert samples_needed(coefficients) == pytest.approx(samples, rel=0.1)


@pytest.mark.parametrize(
    "text, samples, granularity, said",
    [
        ("v:fine:4", 5000, "fine", ""),
        ("v:fine:4", 200, "tensor", "200 held-out samples are too few for fine coefficients ("),
        ("v:fine:4", 110, "block", "too few for fine"),
        ("v:fine:4", 40, "model", "too few for fine"),
        ("v:128:4", 40, "model", "too few for such"),
        ("v:model:4", 37, "model", ""),
        ("v:model:4", 5, "model", "too few for model"),
        ("t:fine:4", 5, "fine", ""),
        ("v:fine:4", None, "fine", ""),
    ],
)
def test_granularity_follows_the_samples(sharding, text, samples, granularity, said):
    heldout = None if samples is None else [torch.zeros(1, 3)] * samples
    method, note = fitted(TwaMethod.parse(text), sharding, heldout)
    assert method.granularity == granularity
    assert said in note if said else not note


def test_samples_of_batches():
    batches = [torch.zeros(4, 2), (torch.zeros(3, 2), torch.zeros(3)), torch.zeros(9)]
    assert count_samples(batches, 1000) == 16
    assert count_samples(batches, 5) == 7  # no more are read than it takes
    assert count_samples(["a text", object()], 1000) == 2
