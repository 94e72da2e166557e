"""bench/suite.py: a run of the tests for each setting, and what is kept of it."""

import json

import pytest
import suite

TESTS = """
import os

import pytest


def test_environment():
    assert os.environ["ATEN_CPU_CAPABILITY"] == "avx2" and os.environ["OMP_NUM_THREADS"] == "1"
    assert "TWA_KERNELS_ISA" not in os.environ


def test_one_core():
    assert len(os.sched_getaffinity(0)) == 1 and "ATEN_CPU_CAPABILITY" not in os.environ


@pytest.mark.skip(reason="why not")
def test_skipped():
    pass
"""
ORDER = """
from pathlib import Path

import pytest


@pytest.mark.parametrize("k", range(30))
def test_order(k):
    with open(Path(__file__).with_name("order.txt"), "a") as file:
        print(k, file=file)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(text of tests, *options): exit status of suite.py for them."""
    monkeypatch.setenv("TWA_KERNELS_ISA", "portable")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setenv("PYTHONPATH", str(suite.ROOT / "bench"))
    monkeypatch.setattr(suite, "ROOT", tmp_path)

    def run(text, *options):
        (tmp_path / "test_these.py").write_text(text)
        where = ["--kept", str(tmp_path / "kept"), "--tests", str(tmp_path / "test_these.py")]
        return suite.main([*where, *options])

    return run


def test_a_failure_stops_nothing_and_is_named(run, tmp_path, capfd):
    names = ["avx2 torch, 1 thread", "one core"]
    assert run(TESTS, "--only", *names) == 1
    kept = {n: json.loads((tmp_path / "kept" / f"{n}.json").read_text()) for n in names}
    first, second = kept.values()
    assert [len(first[what]) for what in ("failed", "skipped")] == [1, 1] and first["passed"] == 1
    assert first["failed"][0].endswith("test_these.py::test_one_core")
    assert second["failed"][0].endswith("test_these.py::test_environment") and second["cores"] == 1
    assert second["passed"] == 1 and second["status"] == 1
    said = capfd.readouterr().out
    assert "[2/2] one core: 1 passed, 1 failed, 1 skipped" in said
    page = "\n".join(suite.page(list(kept.values())))
    assert "\n- one core: `" in page and "\n| one core " in page
    assert "\n- why not\n" in page


def test_what_is_kept_is_not_run_again(run, tmp_path, capfd):
    mend = "import pathlib\n\ndef test():\n    assert pathlib.Path(__file__ + 'x').exists()\n"
    assert run(mend, "--only", "one core") == 1
    (tmp_path / "test_these.pyx").touch()
    assert run(mend, "--only", "one core", "--resume") == 0
    assert "one core: 1 passed" in capfd.readouterr().out
    assert run("def test(): assert False\n", "--only", "one core", "--resume") == 0
    assert "one core: kept" in capfd.readouterr().out


def test_what_failed_runs_again(run, tmp_path, capfd):
    mend = "import pathlib\n\ndef test():\n    assert pathlib.Path(__file__ + 'x').exists()\n"
    mend += "\ndef test_right():\n    pass\n\ndef test_wrong():\n    assert False\n"
    assert run(mend, "--only", "one core") == 1
    (tmp_path / "test_these.pyx").touch()
    assert run(mend, "--only", "one core", "--again") == 1
    result = json.loads((tmp_path / "kept" / "one core.json").read_text())
    names = [[name.split("::")[1] for name in result[what]] for what in ("again", "failed")]
    assert result["passed"] == 2 and names == [["test"], ["test_wrong"]]
    assert "passed when run again at a later commit\n\n- one core: `" in capfd.readouterr().out


def test_a_run_that_breaks_off_is_a_failure(run, capfd):
    assert run("import no_such_module\n", "--only", "one core") == 1
    assert run("# no tests\n", "--only", "one core") == 1
    assert "the run: exit status 5" in capfd.readouterr().out


def test_an_order_of_a_seed(run, tmp_path):
    orders = []
    for _ in range(2):
        assert run(ORDER, "--only", "shuffled") == 0
        found = (tmp_path / "order.txt").read_text().split()
        orders.append(found)
        (tmp_path / "order.txt").unlink()
    assert orders[0] == orders[1] != sorted(orders[0], key=int)
    assert len(set(orders[0])) == 30


def test_other_work_beside_it_ends_with_it(run):
    with suite.busy(2) as loops:
        assert all(loop.poll() is None for loop in loops)
    assert all(loop.returncode for loop in loops)


def test_unknown_settings_are_refused(run, capfd):
    with pytest.raises(SystemExit):
        run("", "--only", "no such")
    assert "found no such" in capfd.readouterr().err


def test_each_instruction_set_has_its_settings():
    table = suite.settings(["portable", "avx2"])
    assert table["avx2, 2 threads"].environment == {
        "TWA_KERNELS_ISA": "avx2",
        "OMP_NUM_THREADS": "2",
    }
    assert "avx2 shuffled" in table and "avx2 shuffled" not in suite.settings(["neon"])
    assert all((suite.ROOT / path).exists() for path in suite.APART + suite.KERNELS)
