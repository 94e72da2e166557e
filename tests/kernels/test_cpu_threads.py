"""The model of threads (bench/scaling.py)."""

import pytest
import scaling


def test_the_slower_of_arithmetic_and_memory():
    work, moved, one, shared = 8.0, 100.0, 20.0, 50.0
    times = [scaling.predicted(work, moved, t, one, shared) for t in (1, 2, 4, 8, 64)]
    # 1, 2: arithmetic, and a core's bandwidth is no limit; from 4 on: all cores' bandwidth
    assert times == pytest.approx([8.0, 4.0, 2.0, 2.0, 2.0])
    assert scaling.threads_needed(work, moved, one, shared) == 4
    # little arithmetic: two and a half cores' bandwidth is all cores'
    assert scaling.predicted(1.0, moved, 2, one, shared) == pytest.approx(2.5)
    assert scaling.threads_needed(1.0, moved, one, shared) == 3


def test_more_threads_never_take_longer():
    for work in (0.1, 1.0, 10.0):
        times = [scaling.predicted(work, 10.0, t, 2.0, 30.0) for t in scaling.THREADS]
        assert times == sorted(times, reverse=True)
        needed = scaling.threads_needed(work, 10.0, 2.0, 30.0)
        assert scaling.predicted(work, 10.0, needed, 2.0, 30.0) == pytest.approx(10.0 / 30.0)
        assert scaling.predicted(work, 10.0, needed - 1, 2.0, 30.0) > 10.0 / 30.0
