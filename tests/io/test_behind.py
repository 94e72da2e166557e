"""Behind: calls on a thread of its own."""

import threading

import pytest
from twa.io.behind import Behind


def test_calls_are_made_in_order_on_one_other_thread():
    made = []
    with Behind() as behind:
        for k in range(20):
            behind(lambda k=k: made.append((k, threading.get_ident())))
        behind.wait()
        assert [k for k, _ in made] == list(range(20))
        behind(made.clear)
    assert not made


def test_the_caller_goes_on_meanwhile():
    may_end = threading.Event()
    with Behind() as behind:
        behind(may_end.wait, 60)
        may_end.set()  # not reached if the call were made here
        behind.wait()


def fail():
    raise OSError("disk full")


def test_an_error_is_raised_by_wait_and_once():
    with Behind() as behind:
        behind(fail)
        with pytest.raises(OSError, match="disk full"):
            behind.wait()
        behind.wait()


def test_an_error_is_raised_by_leaving():
    with pytest.raises(OSError, match="disk full"), Behind() as behind:
        behind(fail)


def test_an_error_of_the_caller_comes_first():
    with pytest.raises(KeyError), Behind() as behind:
        behind(fail)
        raise KeyError
