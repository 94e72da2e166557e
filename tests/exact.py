"""Results by definition: plain PyTorch in float64, of what docs/ and docstrings say.

It calls neither twa nor twa_kernels: codes are unpacked as docs/format.md says. Tolerances are
bounds on rounding, see `bounds`.
"""

from __future__ import annotations

import itertools
import math

import torch
from bounds import gamma

F64, F32 = torch.float64, torch.float32
LEVELS = {  # docs/format.md: the negative ones mirrored
    8: torch.arange(-128, 128),
    4: torch.tensor([6, 18, 31, 44, 58, 75, 96, 127]),
    3: torch.tensor([14, 45, 79, 127]),
    2: torch.tensor([38, 127]),
    1: torch.tensor([127]),
}
ERROR = {8: 0.0068, 4: 0.094, 3: 0.184, 2: 0.339, 1: 0.601}  # on Gaussian rows
TINY = 2.0**-149  # the smallest float32
SMALL = 2.0**-126  # the smallest of full precision: beside it scales and coefficients are coarse


def unpacked(codes, bits):
    """(..., 16 * bits) bytes as levels (..., 128): the bit map of docs/format.md."""
    half = LEVELS[bits]
    levels = (half if bits == 8 else torch.cat([-half.flip(0), half])).double()

    def fields(bytes_, width):
        parts = [(bytes_.long() >> s) & (2**width - 1) for s in range(0, 8, width)]
        return torch.cat(parts, -1)

    if bits == 3:
        return levels[fields(codes[..., :32], 2) | fields(codes[..., 32:], 1) << 2]
    return levels[fields(codes, bits)]


def tiles_of(numels):
    return list(itertools.accumulate((-(-m // 128) for m in numels), initial=0))


def rows_of(basis, segments):
    """P, one (rows, numel) float64 matrix per tensor."""
    if basis.bits == 32:
        return [p.double() for p in basis.rows]
    numels = [math.prod(shape) for shape in basis.shapes]
    ends, found = tiles_of(numels), []
    scales = basis.scales.float().double()
    values = unpacked(basis.codes, basis.bits) * scales[..., None]  # (tiles, rows, 128)
    for k, m in enumerate(numels):
        p = values[ends[k] : ends[k + 1]].transpose(0, 1).flatten(1)[:, :m]
        found.append(p * basis.row_scale.double()[:, segments[k].repeat_interleave(128)[:m]])
    return found


def segments_of(names, numels, granularity):
    """The segment of each column of each tensor, (numel,) each; and how many there are."""
    if granularity == "fine":  # few weights: 128 at least
        granularity = 128
        while sum(-(-m // granularity) for m in numels) > max(4096, len(numels)):
            granularity *= 2
    if granularity == "model":
        return [torch.zeros(m, dtype=torch.int64) for m in numels], 1
    if granularity == "tensor":
        return [torch.full((m,), k) for k, m in enumerate(numels)], len(numels)
    found, first = [], 0
    for m in numels:
        found.append(first + torch.arange(m) // granularity)
        first += -(-m // granularity)
    return found, first


def rounded(exact, dtype):
    """How far a number of this size may be from its rounding to a dtype; beyond it, anything."""
    if dtype == F64:
        return torch.zeros_like(exact)
    info = torch.finfo(dtype)
    bound = info.eps / 2 * exact.abs() + info.smallest_normal * info.eps / 2
    return torch.where(exact.abs() * 1.01 < info.max, bound, torch.inf)


def near(what, found, exact, bound):
    """AssertionError unless |found - exact| <= bound, each number."""
    found, bound = found.detach().double(), torch.as_tensor(bound, dtype=F64)
    assert found.shape == exact.shape, f"{what}: shape {tuple(found.shape)}, {tuple(exact.shape)}"
    bound = bound.expand_as(exact)
    same = (found == exact) | (found.isnan() & exact.isnan())
    off = torch.where(same, 0.0, (found - exact).abs() - bound)
    off = torch.where(bound.isinf(), 0.0, off)
    if not bool((off <= 0).all()):
        at = int(torch.where(off.isnan(), torch.inf, off).flatten().argmax())
        pair = found.flatten()[at].item(), exact.flatten()[at].item()
        raise AssertionError(
            f"{what}: found {pair[0]!r}, expected {pair[1]!r} within"
            f" {bound.flatten()[at].item():.3g} at {at} of {exact.numel()}"
        )


def mean_of(rows, weights):
    """sum_i weights[i] rows[i] in float64, and a bound on its error in float64, in any order."""
    total, size = torch.zeros_like(rows[0]), torch.zeros_like(rows[0])
    for w, row in zip(weights.tolist(), rows, strict=True):
        if w:
            total, size = total + w * row, size + abs(w) * row.abs()
    return total, gamma(len(rows) + 2, F64) * size


def check_average(what, key, found, states, beta, dtype):
    """One tensor of a fixed average against its definition."""
    used = [i for i, w in enumerate(beta.tolist()) if w]
    last = used[0] if len(used) == 1 else len(states) - 1
    if not states[0][key].is_floating_point():
        near(f"{what} {key}", found, states[last][key].double(), 0.0)
        return
    rows = [s[key].double() for s in states]
    exact, bound = mean_of(rows, beta)
    same = torch.stack([rows[i] == rows[used[0]] for i in used]).all(0)
    exact, bound = torch.where(same, rows[used[0]], exact), torch.where(same, 0.0, bound)
    bound = bound + torch.where(same, 0.0, rounded(exact, F32 if dtype != F64 else F64))
    bound = 1.01 * (bound + rounded(exact, dtype))
    near(
        f"{what} {key}", found, exact, torch.where(bound.isinf(), bound.nan_to_num(0, 0, 0), bound)
    )


def common_divisor(v, segments, count, normalize):
    """divisor (n, L) of distances v, one (n, numel) each: docs/format.md, and `Packer.finish`."""
    n = len(v[0])
    squares = torch.zeros(n, count, dtype=F64)
    for d, at in zip(v, segments, strict=True):
        squares.index_add_(1, at, d.square())
    if normalize == "none":
        return (squares > 0).double()
    norms = squares.sum(1).sqrt()
    known = norms[norms > 0].sort().values
    common = known[(len(known) - 1) // 4] if len(known) else 1.0
    return torch.where(squares > 0, (norms / common)[:, None], 0.0)


def check_codes(p, v, segments, count, bits):
    """Decoded rows p beside v, both undivided: errors of each group of 128."""
    largest = torch.zeros(len(v[0]), max(count, 1), dtype=F64)
    for d, at in zip(v, segments, strict=True):
        largest.scatter_reduce_(1, at.expand(len(d), -1), d.abs(), "amax")
    for k, (a, b) in enumerate(zip(p, v, strict=True)):
        for t in range(0, b.shape[1], 128):
            d, off = b[:, t : t + 128], (a - b)[:, t : t + 128]
            m, lost = d.abs().amax(1), largest[:, segments[k][t]] * 2.0**-16 + 128 * SMALL
            if bits == 8:
                bad = off.abs().amax(1) > 0.502 * 1.125 * m / 127 + lost
            else:
                bad = off.norm(dim=1) > 1.01 * d.norm(dim=1) + lost * 128**0.5
            assert not bad.any(), f"tensor {k}, group {t // 128}: rows {bad.nonzero().tolist()}"
        fourth = (b**4).mean(1) / b.square().mean(1).square()
        gaussian = (fourth > 2.7) & (fourth < 3.3) & (b.shape[1] > 4000)
        gaussian &= largest[:, segments[k].amax() if len(segments[k]) else 0] < b.norm(dim=1)
        gaussian &= b.norm(dim=1) > 1e-30
        error = (a - b).norm(dim=1) / b.norm(dim=1)
        assert not (gaussian & (error > 1.1 * ERROR[bits])).any(), (k, error[gaussian])


def weights_of_steps(scheme, steps, horizon):
    """Merge weights of an average whose horizon is in steps."""
    n, found = len(steps), torch.zeros(len(steps), dtype=F64)
    if scheme == "ema":
        for i in range(n):
            decay = 0.5 ** ((steps[i] - steps[i - 1]) / horizon) if i else 0.0
            found *= decay
            found[i] = 1 - decay
    elif scheme == "last":
        found[-1] = 1.0
    else:
        used = [i for i in range(n) if scheme == "uniform" or steps[i] > steps[-1] - horizon]
        found[used] = 1 / len(used)
    return found


def of_groups(d):
    """The largest size in each group of 128 columns, for each of these."""
    pad = torch.nn.functional.pad(d.abs(), (0, -d.shape[1] % 128)).unflatten(1, (-1, 128))
    return pad.amax(2, keepdim=True).expand_as(pad).flatten(1)[:, : d.shape[1]]
