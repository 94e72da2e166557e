"""State dicts of tests: equal ones, whole ones, and those that a recorder has."""

import torch
from torch.distributed.tensor import DTensor


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, t in expected.items():
        assert found[key].dtype == t.dtype and found[key].shape == t.shape, key
        assert torch.equal(found[key], t), key


def whole(model):
    """A copy of a model's state_dict, gathered from all ranks."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in model.state_dict().items()
    }


def snapshots(recorder):
    """key -> tensor of each snapshot."""
    return [{key: c.tensor(key) for key in c.info} for c in recorder.recording()]
