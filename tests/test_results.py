"""The first cases of `fuzz_results`, and that it sees what is wrong.

Many: python tests/fuzz_results.py --count 2000.
"""

import contextlib
import os
import warnings

import fuzz_results
import pytest
import torch
from conftest import exhaustive
from twa import coordinates
from twa.io import averaging
from twa.io.errors import TwaError

import twa_kernels as tk


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """Cases choose a backend and threads."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("TWA_KERNELS_BACKEND", os.environ.get("TWA_KERNELS_BACKEND", ""))
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("number", [*range(12), *map(exhaustive, range(12, 200))])
def test_results(number, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused = fuzz_results.check(number, tmp_path)
    assert all("overflow" in text or "no trainable" in text for text in refused), refused


def slightly(function, factor=1 + 1e-5):
    def changed(*args, **options):
        return function(*args, **options) * factor

    return changed


def test_slightly_wrong_results_are_seen(monkeypatch, tmp_path):
    shares, sum_of = coordinates.Deltas.shares, averaging.sum_of
    for place, name, wrong, part in (
        (averaging, "sum_of", lambda *a: (sum_of(*a)[0] * (1 + 1e-5), True), "fixed"),
        (coordinates.Deltas, "shares", slightly(shares), "trains"),
        (tk, "project", slightly(tk.project, 1.001), "trains"),
    ):
        seen = 0
        with monkeypatch.context() as patched, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patched.setattr(place, name, wrong)
            for number in range(4):
                folder = tmp_path / f"{name}{number}"
                folder.mkdir()
                try:
                    with contextlib.suppress(TwaError):  # as some cases are refused
                        getattr(fuzz_results.Checks(number, folder), part)()
                except AssertionError:
                    seen += 1
        assert seen, name
