"""Lazy tensors: what loading code does to them is taken down, and is what it would be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from bounds import gamma
from torch import nn
from twa.io.lazy import Lazy, blocks_of, lazy_tensor, located
from twa.io.mapped import Held

SHAPE = (4, 6, 8)
#: taken down without reading
MOVES = {
    "detach": lambda x: x.detach().data,
    "parameter": lambda x: nn.Parameter(x),
    "transpose": lambda x: x.transpose(0, 2),
    "permute": lambda x: x.permute(2, 0, 1).contiguous(),
    "select": lambda x: x[1],
    "slice": lambda x: x[1:3, ::2],
    "none": lambda x: x[None, ..., 2],
    "reshape": lambda x: x.reshape(24, 8),
    "flatten": lambda x: x.transpose(0, 1).flatten(),
    "unflatten": lambda x: x.unflatten(1, (2, 3)),
    "expand": lambda x: x[:1].expand(SHAPE),
    "split": lambda x: torch.split(x, 2)[1],
    "chunk": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "unbind": lambda x: x.unbind(1)[2],
    "iterate": lambda x: torch.stack([row.T for row in x], 1),
    "cat": lambda x: torch.cat([x, x[:2]], 0).transpose(1, 2),
    "cat of cats": lambda x: torch.cat([torch.cat([x, x], 2), x.clone()[:, :, :3]], 2),
    "half": lambda x: x.half().float(),
    "to": lambda x: x.to("cpu", torch.float64),
    "clone": lambda x: x.clone().view(-1)[7:31],
}
#: which need the numbers
COMPUTED = {
    "times": lambda x: x * 2,
    "matmul": lambda x: x @ x.mT,
    "zeros": lambda x: torch.zeros_like(x),
    "new": lambda x: torch.empty_like(x).copy_(x),
    "index": lambda x: x[torch.tensor([0, 2])],
    "mask": lambda x: x[x > 0],
    "interpolate": lambda x: F.interpolate(x, size=16),
    "pad": lambda x: F.pad(x, (0, 2)),
    "mixed cat": lambda x: torch.cat([x, torch.zeros(1, 6, 8)]),
    "bytes": lambda x: x.view(torch.int32),
    "integers": lambda x: x.to(torch.int64),
    "in place": lambda x: x.mul_(2),
    "in place, of a view": lambda x: (x[0].add_(1), x)[1],
    "item": lambda x: torch.tensor(x[0, 0, 0].item()),
    "deepcopy": lambda x: copy.deepcopy(x),
    "truth": lambda x: torch.tensor([bool((x > 0).any()), torch.equal(x, x.clone())]),
}


def files():
    torch.manual_seed(0)
    return [torch.randn(SHAPE) for _ in range(2)]


@pytest.mark.parametrize("name", MOVES)
def test_what_is_only_moved_is_not_read(name):
    """And lies in another file where it lies in this one."""
    first, second = files()
    x = lazy_tensor("x", Held(first))
    made = MOVES[name](x)
    assert isinstance(made, Lazy) and not made.base.read and not x.base.read
    for file in (first, second):
        expected = MOVES[name](file)
        source = located(made, {"x": Held(file)})
        assert made.shape == expected.shape and made.dtype == expected.dtype
        found = source.read().to(expected.dtype)
        # the file's own numbers, cast once at the end
        tolerance = gamma(1, torch.float16) if name == "half" else 0.0
        torch.testing.assert_close(found, expected.detach(), rtol=tolerance, atol=0)
        assert source.info.shape == expected.shape
        if expected.dim():  # a part of it
            part = (slice(1, 3), *(slice(0, size) for size in expected.shape[1:]))
            torch.testing.assert_close(
                source.read(part).to(expected.dtype), expected.detach()[1:3], rtol=tolerance, atol=0
            )


@pytest.mark.parametrize("name", COMPUTED)
def test_what_needs_numbers_has_those_of_the_file(name):
    first, _ = files()
    kept = first.clone()
    made = COMPUTED[name](lazy_tensor("x", Held(first)))
    expected = COMPUTED[name](kept.clone())
    assert torch.equal(located(made, {"x": Held(first)}).read(), expected)
    assert torch.equal(first, kept)  # nothing is written to the file


def test_views_see_what_is_written_to_their_base():
    first, _ = files()
    x = lazy_tensor("x", Held(first))
    view = x[1].T
    x[1].fill_(3.0)
    assert torch.equal(located(view, None).read(), torch.full((8, 6), 3.0))
    assert blocks_of(view) is None


def test_it_is_copied_into_plain_tensors():
    first, _ = files()
    target = torch.zeros(SHAPE, dtype=torch.float64)
    target[1:].copy_(lazy_tensor("x", Held(first))[1:])
    assert torch.equal(target[1:], first[1:].double()) and not target[0].any()
    assert repr(lazy_tensor("x", Held(first))) == "Lazy('x', (4, 6, 8), torch.float32)"


def test_blocks_of_what_is_joined():
    first, second = files()
    a, b = (lazy_tensor(key, Held(t)) for key, t in zip("ab", (first, second), strict=True))
    blocks = blocks_of(torch.cat([torch.stack([a, b]), b[None]]))
    assert [(block.begin, block.key) for block in blocks] == [
        ((0, 0, 0, 0), "a"),
        ((1, 0, 0, 0), "b"),
        ((2, 0, 0, 0), "b"),
    ]
