"""`twa average` on two hosts, namespaces of a network; bench/faults.py has more that goes wrong."""

import faults
import hosts
import pytest

if why := hosts.why_not():
    pytest.skip(why, allow_module_level=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a task, candidates, and the results of runs on one host."""
    folder = tmp_path_factory.mktemp("faults")
    faults.prepare(folder)
    return folder, faults.Expected(folder)


def measured(base, name, sharding="replicate"):
    folder, expected = base
    (fault,) = (f for f in faults.FAULTS if f.name == name)
    return faults.measure(folder, fault, sharding, expected)


def test_two_hosts_have_the_bits_of_one(base):
    row = measured(base, "nothing, 2 hosts")
    assert row["state"] == "finished" and row["result"] == "the same bits", row


def test_a_host_is_killed_and_the_other_goes_on(base):
    """That of the meeting point, with rank 0, its store and its lock.

    torchrun on the other host loses its store at the same moment, and may end rank 1 before it has
    said anything.
    """
    row = measured(base, "the host of the meeting point is killed")
    said = row["said"].partition("rank 1: ")[2]
    assert said == "nothing" or said.startswith("lost a rank"), row
    assert row["state"] in ("whole, step 10", "whole, step 11"), row  # it may be at its save
    assert row["result"].endswith("(on 1 of 2 ranks)"), row
    assert float(row["result"].split()[2]) < 1e-4, row
