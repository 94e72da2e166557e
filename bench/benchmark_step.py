"""step: project, AdamW update and reconstruct in one call, against the three calls, with 64 and 256
segments of equal size.

A segment of at most 1 MiB of codes is read from memory once (at 4 bits with 256 segments of this
size, not with 64).

Bytes moved are counted as for the three calls, so that fusing shows as a higher rate:
2 * n * D * (bits / 8 + 1 / 128) + 4 * D (gradient) + 8 * D (center and result).
"""

import pytest
import torch
from common import random_basis
from conftest import record

import twa_kernels as tk


def many_segments(n: int, columns: int, bits: int, segments: int) -> tk.PackedBasis:
    one = random_basis(n, columns, bits, tensors=segments)
    tiles = len(one.tile_segment) // segments
    segment = torch.arange(segments, dtype=torch.int32).repeat_interleave(tiles)
    scale = torch.rand(n, segments) + 0.5
    divisor = torch.ones(n, segments, dtype=torch.float64)
    return tk.PackedBasis(one.codes, one.scales, scale, segment, divisor, one.shapes, bits)


@pytest.mark.benchmark(group="step")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("segments", [64, 256])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_step(benchmark, bits, segments, fused, n, columns):
    basis = many_segments(n, columns, bits, segments)
    grads, center = [torch.randn(s) for s in basis.shapes], [torch.randn(s) for s in basis.shapes]
    out, x = [torch.empty(s) for s in basis.shapes], torch.zeros(n, basis.num_segments)
    options, state, parameter = {"lr": 1e-3}, {}, torch.nn.Parameter(x.clone())
    optimizer = torch.optim.AdamW([parameter], **options)

    def three_calls():
        parameter.grad = tk.project(basis, grads)
        optimizer.step()
        tk.reconstruct(basis, parameter.detach(), center, out)

    def one_call():
        tk.step(basis, grads, x, out, center, rule="adamw", options=options, state=state)

    benchmark(one_call if fused else three_calls)
    moved = int(2 * n * columns * (bits / 8 + 1 / 128)) + 12 * columns
    what = f"{bits} bits, {segments} segments" + ("" if fused else ", three calls")
    record(benchmark, "step", what, n, columns, moved, "read")
