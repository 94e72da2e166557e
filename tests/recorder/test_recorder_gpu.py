"""The recorder on a GPU: the codes are those of a CPU, and nothing waits for them."""

import pytest
import torch
import twa
from torch import nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def run(device, path, steps=60):
    """A run on the CPU whose weights are copied to where they are recorded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 70), nn.BatchNorm1d(70), nn.ReLU(), nn.Linear(70, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    watched = nn.Sequential(nn.Linear(50, 70), nn.BatchNorm1d(70), nn.ReLU(), nn.Linear(70, 3))
    watched = watched.to(device)
    recorder = twa.Recorder(watched, every=5, bits=3, path=path)
    for _ in range(steps):
        model(torch.randn(32, 50)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        watched.load_state_dict(model.state_dict())
        recorder.step()
    return watched, recorder


def tensors_of(recorder):
    return [{key: c.tensor(key).clone() for key in c.info} for c in recorder.recording()]


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_as_on_a_cpu(kind, tmp_path):
    paths = [tmp_path / "cpu", tmp_path / "gpu"] if kind == "files" else [None, None]
    _, expected = run("cpu", paths[0])
    model, found = run("cuda", paths[1])
    assert found.steps == expected.steps
    for a, b in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in b)
    beta = found.beta("ema", half_life=15)
    average = found.recording().average(beta)
    with found.averaged("ema", half_life=15):
        for key, t in model.state_dict().items():
            assert torch.allclose(t.cpu().double(), average[key].double(), rtol=1e-5, atol=1e-6)


def test_a_bad_snapshot_is_left_out_later():
    model, recorder = run("cuda", None, steps=20)
    weight = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight[3, 4] = torch.nan
    assert recorder.record(21)  # nobody has looked yet
    with pytest.warns(twa.CandidateWarning, match=r"'0.weight' has 1 NaN or Inf"):
        assert recorder.steps == [5, 10, 15, 20]
    with torch.no_grad():
        model[0].weight.copy_(weight)
    recorder.record(22)
    assert recorder.steps == [5, 10, 15, 20, 22]
