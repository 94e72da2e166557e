"""Tests for the rehearsal: one of each fate. Their name keeps them out of the suite."""

import os
import time


def test_passes():
    pass


def test_fails():
    raise AssertionError("planted: this test fails")


def test_dies():
    os.abort()


def test_hangs():
    time.sleep(3600)
