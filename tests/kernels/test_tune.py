"""python -m twa_kernels.tune, as far as it goes without a GPU."""

import sys

import processes
import pytest
import torch
from conftest import ON_GPU

from twa_kernels import tune
from twa_kernels.backends.triton import config


@pytest.mark.parametrize("op", sorted(tune.CANDIDATES))
def test_measures_and_leaves_the_shipped_numbers_alone(op, capsys):
    before = dict(config.OVERRIDES)
    line = tune.tune(op, 4, 3, 300, "cuda" if ON_GPU else "cpu", 0.0, 2)
    assert before == config.OVERRIDES
    out = capsys.readouterr().out
    assert out.count("GB/s") == 3 and "shipped" in out  # the shipped one and two candidates
    assert not line or eval("{" + line + "}")  # what it prints fits into the table


def test_a_configuration_that_fails_is_reported(monkeypatch, capsys):
    def fails_with_two_warps(run, device, budget):
        if config.OVERRIDES and any(c.get("warps") == 2 for c in config.OVERRIDES.values()):
            raise RuntimeError("out of resources: shared memory")
        return 1.0

    monkeypatch.setattr(tune, "seconds", fails_with_two_warps)
    assert tune.tune("reconstruct", 4, 3, 300, "cuda" if ON_GPU else "cpu", 0.0, 3) == ""
    assert "out of resources" in capsys.readouterr().out


def test_shipped_numbers_that_fail_lose(monkeypatch, capsys):
    def fails_as_shipped(run, device, budget):
        if not any(config.OVERRIDES.values()):
            raise RuntimeError("out of resources: shared memory")
        return 1.0

    monkeypatch.setattr(tune, "seconds", fails_as_shipped)
    monkeypatch.setattr(config, "OVERRIDES", {})
    assert "project" in tune.tune("project", 4, 3, 300, "cuda" if ON_GPU else "cpu", 0.0, 2)
    assert "did not run" in capsys.readouterr().out
    monkeypatch.setattr(tune, "seconds", lambda *_: 1 / 0)
    assert tune.tune("project", 4, 3, 300, "cuda" if ON_GPU else "cpu", 0.0, 2) == ""
    assert "no configuration runs here" in capsys.readouterr().out


@pytest.mark.skipif(ON_GPU, reason="this machine has a GPU")
def test_without_a_gpu_says_so():
    environment = {"PATH": "/usr/bin", "TRITON_INTERPRET": "0"}
    done = processes.run([sys.executable, "-m", "twa_kernels.tune"], env=environment)
    assert done.returncode == 1 and "expected a GPU to measure on, found none" in done.stderr


def test_every_configuration_covers_16_bytes_a_thread():
    for arch in config.ARCHITECTURES:
        for bits in config.BITS:
            c = config.configuration("reconstruct", bits, arch)
            lanes = 64 if arch.startswith("gfx") else 32
            row_of_a_plane = 16 * (1 if bits == 3 else bits)
            assert c["tiles"] * row_of_a_plane == 16 * lanes * c["warps"]
            assert torch.tensor(c["rows"]) % 4 == 0 and 64 % c["rows"] == 0


@pytest.mark.parametrize(
    ("n", "rows"), [(1, 16), (16, 16), (17, 32), (64, 64), (72, 32), (120, 64), (256, 64)]
)
def test_rows_per_program(n, rows):
    assert config.rows_per_program(n, 64) == rows


@pytest.mark.parametrize(
    ("n", "most", "least", "expected"),
    [
        (1, 64, 16, (16, 0, 1)),
        (64, 64, 16, (64, 0, 1)),
        (72, 64, 16, (32, 16, 2)),
        (72, 80, 16, (64, 16, 1)),
        (72, 128, 32, (64, 32, 1)),
        (130, 160, 16, (128, 16, 1)),
        (1000, 64, 16, (64, 0, 16)),
    ],
)
def test_row_parts(n, most, least, expected):
    assert config.row_parts(n, most, least) == expected


def test_row_parts_cover_every_row():
    for n in range(1, 300):
        for most, least in ((64, 16), (128, 16), (64, 32), (32, 16), (192, 32)):
            rows, more, programs = config.row_parts(n, most, least)
            assert least <= rows + more <= most and (more == 0 or least <= more < rows)
            assert n <= (rows + more) * programs < n + rows + more
