"""update_bn: kinds of batches, weights of ragged batches, models without BatchNorm."""

import pytest
import torch
from torch import nn
from twa import update_bn


def model():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))


def statistics(m):
    return m[1].running_mean.clone(), m[1].running_var.clone()


DATA = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1


def expected(m, batches):
    """Size-weighted averages of the batches' means and unbiased variances."""
    outputs = [m[0](b) for b in batches]
    sizes = torch.tensor([float(len(b)) for b in batches])
    share = (sizes / sizes.sum())[:, None]
    return (share * torch.stack([o.mean(0) for o in outputs])).sum(0), (
        share * torch.stack([o.var(0) for o in outputs])
    ).sum(0)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda b: b,
        lambda b: (b, torch.zeros(len(b))),
        lambda b: [b],
        lambda b: {"input": b, "labels": torch.zeros(len(b))},
    ],
)
def test_batches_of_every_kind_with_a_ragged_last(wrap):
    m = model()
    batches = list(DATA.split(16))  # 16, 16, 16, 2
    assert update_bn([wrap(b) for b in batches], m) == 4
    mean, variance = statistics(m)
    want_mean, want_variance = expected(m, batches)
    torch.testing.assert_close(mean, want_mean)
    torch.testing.assert_close(variance, want_variance)


def test_last_batch_of_one_sample_is_left_out():
    m = model()
    assert update_bn(DATA[:33].split(16), m) == 2
    torch.testing.assert_close(statistics(m)[0], expected(m, DATA[:32].split(16))[0])


def test_batches_of_one_image():
    images = torch.randn(5, 3, 8, 8)
    m, whole = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    assert update_bn(images.split(1), m) == 5
    update_bn([images], whole)
    torch.testing.assert_close(m.running_mean, whole.running_mean)
    assert update_bn(iter(images.split(1)), nn.BatchNorm2d(3), max_batches=2) == 2


def test_state_is_restored():
    m = model()
    m.eval()
    m[1].momentum = 0.3
    weight = m[1].weight.clone()
    update_bn([DATA], m)
    assert not m.training and not m[1].training and not m[2].training and m[1].momentum == 0.3
    assert torch.equal(m[1].weight, weight) and all(p.grad is None for p in m.parameters())


def test_no_batchnorm_reads_nothing():
    def fail():
        raise AssertionError("the loader was read")
        yield

    assert update_bn(fail(), nn.Linear(2, 2)) == 0
    assert update_bn(fail(), nn.BatchNorm1d(3, track_running_stats=False)) == 0


def test_own_forward_and_limit():
    m = model()
    assert update_bn(DATA.split(10), m, forward=lambda model, b: model(b), max_batches=3) == 3
    torch.testing.assert_close(statistics(m)[0], expected(m, DATA[:30].split(10))[0])


def test_empty_loader():
    for loader in ([], [DATA[:1]]):
        m = model()
        update_bn([DATA], m)
        mean, variance = statistics(m)
        with pytest.raises(ValueError, match="at least one batch"):
            update_bn(loader, m)
        assert torch.equal(statistics(m)[0], mean) and torch.equal(statistics(m)[1], variance)
