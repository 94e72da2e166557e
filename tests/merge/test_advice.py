"""The line of advice says what the run's own figures say."""

import pytest
import torch
from twa.merge.advice import advice
from twa.merge.results import START, Result


def row(method, val, gain=None, trained=True):
    result = Result(method, 3, 10 * trained, 1.0, 0, val, gain=gain)
    result.beta = torch.ones(3) / 3
    result.coefficients = {} if trained else None
    return result


@pytest.mark.parametrize(
    "pace, gain, val, said",
    [
        (1e-4, 3e-4, 1.0, "gain about 0.03, 100 of ordinary training 0.01: more steps"),
        (5e-4, 3e-4, 1.0, "the run still learns. Train on, or, if you have the optimizer's state"),
        (0.0, 3e-4, 1.0, "training on would gain nothing that shows"),
        (None, 3e-4, 1.0, "what is left to gain is in more steps"),
        (None, -1e-5, 1.0, "would gain nothing that shows; what is left to gain is in more cand"),
        (1e-4, 3e-4, 2.5, "nothing better than its start"),
    ],
)
def test_what_the_next_steps_are_worth(pace, gain, val, said):
    rows = [row(START, 2.0, pace, trained=False), row("TWA-t", val, gain), row("TWA-v", 3.0, 1.0)]
    assert said in advice(rows)
    assert "TWA-v" not in advice(rows)  # the best one counts


def test_without_a_trained_average_there_is_none():
    assert advice([row(START, 2.0, trained=False)]) == ""
