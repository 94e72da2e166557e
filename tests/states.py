"""State dicts of tests: equal ones, and those that a recorder has."""

import torch


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, t in expected.items():
        assert found[key].dtype == t.dtype and found[key].shape == t.shape, key
        assert torch.equal(found[key], t), key


def snapshots(recorder):
    """key -> tensor of each snapshot."""
    return [{key: c.tensor(key) for key in c.info} for c in recorder.recording()]
