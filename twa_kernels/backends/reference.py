"""The specification, in plain PyTorch: every other backend is tested against these functions.

`pack` follows csrc/packing.h step by step and gives the same bytes as every other backend.
`project` and `reconstruct` compute in float64 on the dequantised rows and are differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import LEVELS, MOST_WEIGHT, TILE, num_tiles, tile_offsets
from ..operands import BasisView, PackArgs, PassArgs, RecordArgs, ReplayArgs, StepArgs

#: first scale of a group = rms * share + largest * share: csrc/packing.h says why
RMS_SHARE = {
    4: 0.5 * 2.732589571 / 127,
    3: 0.75 * 2.151945705 / 127,
    2: 1.510417608 / 127,
    1: 0.7978845608 / 127,
}
MAX_SHARE = {4: 0.5 / 127, 3: 0.25 / 127, 2: 0.0, 1: 0.0}


# Codes <-> bytes ----------------------------------------------------------------------------------


def _plane_to_bytes(codes: Tensor, bits: int) -> Tensor:
    """(..., 128) codes of `bits`, a power of two -> (..., 16 * bits) bytes.

    Column c is field c // B of byte c % B, B = 16 * bits.
    """
    fields = codes.unflatten(-1, (8 // bits, 16 * bits))  # (..., field, byte)
    weights = 2 ** (bits * torch.arange(8 // bits, device=codes.device))
    return (fields.long() * weights[:, None]).sum(-2).to(torch.uint8)


def _plane_from_bytes(packed: Tensor, bits: int) -> Tensor:
    """(..., 16 * bits) bytes -> (..., 128) codes: the inverse of `_plane_to_bytes`."""
    shifts = bits * torch.arange(8 // bits, device=packed.device)
    fields = (packed.long().unsqueeze(-2) >> shifts[:, None]) & (2**bits - 1)  # (..., field, byte)
    return fields.flatten(-2)


def codes_to_bytes(codes: Tensor, bits: int) -> Tensor:
    """(..., 128) codes -> (..., 16 * bits) bytes. 3 bits: a 2-bit plane, then a 1-bit plane."""
    if bits == 3:
        return torch.cat([_plane_to_bytes(codes & 3, 2), _plane_to_bytes(codes >> 2, 1)], -1)
    return _plane_to_bytes(codes, bits)


def bytes_to_codes(packed: Tensor, bits: int) -> Tensor:
    """(..., 16 * bits) bytes -> (..., 128) codes, int64."""
    if bits == 3:
        return _plane_from_bytes(packed[..., :32], 2) | (
            _plane_from_bytes(packed[..., 32:], 1) << 2
        )
    return _plane_from_bytes(packed, bits)


# pack ---------------------------------------------------------------------------------------------


def _tree_sum(v: Tensor) -> Tensor:
    """Halving-tree float32 sum over the last axis (128): the order every backend uses."""
    h = TILE // 2
    while h:
        v = v[..., :h] + v[..., h:]
        h //= 2
    return v


def _round_scale(s: Tensor, up: bool) -> Tensor:
    """Positive float32 to 4 significant bits, to nearest even or up."""
    u = s.view(torch.int32)
    add = torch.full_like(u, 0xFFFFF) if up else 0x7FFFF + ((u >> 20) & 1)
    return ((u + add) & ~0xFFFFF).view(torch.float32)


def _encode(u: Tensor, s: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and levels (float32) of u / s."""
    inverse = torch.where(s > 0, 1.0 / s, torch.zeros_like(s))
    k = (u * inverse).clamp(-127, 127).round()
    levels = torch.tensor(LEVELS[bits], dtype=torch.float32, device=u.device)
    if bits == 8:
        return (k + 128).long(), k
    midpoints = (levels[:-1] + levels[1:]) / 2
    code = torch.bucketize(k, midpoints)  # number of midpoints below k
    return code, levels[code]


def quantise(v: Tensor, valid: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises groups of 128 columns; csrc/packing.h lists the steps.

    v (..., 128) float32, zero past `valid` (...,) columns -> codes (..., 128) int64,
    scales (...,) float32 of 4 significant bits, squared norms (...,) float64.
    """
    m = v.abs().amax(-1, keepdim=True)
    zero = m < 2.0**-126
    e = torch.where(zero, torch.zeros_like(m, dtype=torch.int32), (m.view(torch.int32) >> 23) - 126)
    half = torch.div(e, 2, rounding_mode="trunc")
    down, down2 = torch.exp2(-half.float()), torch.exp2(-(e - half).float())
    u = torch.where(zero, torch.zeros_like(v), v * down * down2)
    sum_sq = _tree_sum(u * u)
    if bits == 8:
        s = _round_scale(m * down * down2 / 127.0, up=True)
    else:
        rms_share, max_share = (
            torch.tensor(share[bits], dtype=torch.float32, device=v.device)
            for share in (RMS_SHARE, MAX_SHARE)
        )
        rms = torch.sqrt(sum_sq / valid[..., None].float())
        s = rms * rms_share + (m * down * down2) * max_share
        real = torch.arange(TILE, device=v.device) < valid[..., None]
        _, lev = _encode(u, s, bits)
        s = _tree_sum(u * lev) / (lev * lev * real).sum(-1, keepdim=True)
        s = _round_scale(s, up=False)
    s = torch.where(zero, torch.zeros_like(s), s)
    codes, _ = _encode(u, s, bits)
    scale = s * torch.exp2(half.float()) * torch.exp2((e - half).float())
    scale = torch.where(scale < 2.0**-126, torch.zeros_like(scale), scale)
    return codes, scale[..., 0], torch.ldexp(sum_sq.double(), 2 * e)[..., 0]


def _pad_columns(flat: Tensor) -> Tensor:
    """(..., numel) -> (..., tiles, 128), zero past the end."""
    tiles = num_tiles(flat.shape[-1])
    padded = torch.nn.functional.pad(flat, (0, tiles * TILE - flat.shape[-1]))
    return padded.unflatten(-1, (tiles, TILE))


def pack(args: PackArgs) -> tuple[int, int, int] | None:
    """Packs rows - center; returns (row, tensor, column) of a NaN or Inf, None if there is none."""
    n, bits = args.n, args.bits
    offsets = tile_offsets(args.numels)
    for k, numel in enumerate(args.numels):
        if numel == 0:
            continue
        rows = args.rows[k * n : (k + 1) * n]
        v = torch.stack([r.reshape(-1).float() for r in rows])  # (n, numel)
        if args.center:
            v = v - args.center[k].reshape(-1).float()
        if not torch.isfinite(v).all():
            row, column = torch.nonzero(~torch.isfinite(v))[0].tolist()
            return row, k, column
        v = _pad_columns(v).transpose(0, 1).contiguous()  # (tiles, n, 128)
        valid = (numel - TILE * torch.arange(len(v), device=v.device)).clamp(max=TILE)  # (tiles,)
        valid = valid[:, None].expand(-1, n)
        code, scale, squares = quantise(v, valid, bits)
        at = slice(offsets[k], offsets[k + 1])
        args.codes[at] = codes_to_bytes(code, bits)
        args.scales[at] = scale.to(torch.bfloat16)
        segment = args.tile_segment[at].long()
        args.sum_sq.index_add_(1, segment, squares.T)
        args.max_scale.scatter_reduce_(1, segment.expand(n, -1), scale.T, "amax")
    return None


# record, replay -----------------------------------------------------------------------------------


def record(args: RecordArgs) -> None:
    """Codes weights - reference and adds the decoded difference to the reference.

    A weight that is not finite: `bad` is 1, and nothing else is written.
    """
    flat = [w.reshape(-1).float() for w in args.weights]
    args.bad.fill_(not all((w.abs() < MOST_WEIGHT).all() for w in flat))
    if args.bad:
        return
    offsets = tile_offsets(args.numels)
    for k, w in enumerate(flat):
        if w.numel() == 0:
            continue
        v = _pad_columns(w - args.reference[k].reshape(-1))  # (tiles, 128)
        valid = (w.numel() - TILE * torch.arange(len(v), device=v.device)).clamp(max=TILE)
        code, scale, _ = quantise(v, valid, args.bits)
        at = slice(offsets[k], offsets[k + 1])
        args.codes[at] = codes_to_bytes(code, args.bits)
        args.scales[at] = scale.to(torch.bfloat16)
    rows = ReplayArgs(args.reference, [args.codes], [args.scales], [1.0], args.bits)
    replay(rows)


def replay(args: ReplayArgs) -> None:
    """out += sum_r coefficients[r] * rows[r], row after row, each step rounded to float32."""
    offsets = tile_offsets(args.numels)
    for coefficient, codes, scales in zip(args.coefficients, args.codes, args.scales, strict=True):
        c = torch.tensor(coefficient, dtype=torch.float32, device="cpu")
        if c == 0.0:
            continue
        levels = torch.tensor(LEVELS[args.bits], dtype=torch.float32, device=codes.device)
        d = levels[bytes_to_codes(codes, args.bits)] * (c * scales.float())[:, None]
        for k, o in enumerate(args.out):
            o.view(-1).add_(d[offsets[k] : offsets[k + 1]].flatten()[: o.numel()])


# unpack, project, reconstruct ---------------------------------------------------------------------


def dequantise(basis: BasisView) -> Tensor:
    """value = row_scale * scale * level in float64: (num_tiles, n, 128)."""
    levels = torch.tensor(LEVELS[basis.bits], dtype=torch.float64, device=basis.device)
    scale = basis.scales.view(torch.float8_e4m3fn).float().double()  # (num_tiles, n)
    scale = scale * basis.row_scale.double()[:, basis.tile_segment.long()].T
    return levels[bytes_to_codes(basis.codes, basis.bits)] * scale[..., None]


def _split(columns: Tensor, numels: Sequence[int]) -> list[Tensor]:
    """(..., num_tiles, 128) -> one (..., numel) tensor per tensor of the model."""
    offsets = tile_offsets(numels)
    return [
        columns[..., a:b, :].flatten(-2)[..., :numel]
        for a, b, numel in zip(offsets, offsets[1:], numels, strict=False)
    ]


def average(rows: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    """out = sum_i weights[i] * rows[i], summed in float64 in order.

    Rows of weight 0 do not count.
    """
    total = torch.zeros(out.shape, dtype=torch.float64, device=out.device)
    for w, row in zip(weights, rows, strict=True):
        if w != 0.0:
            total += w * row.double().reshape(out.shape)
    out.copy_(total)


def unpack(basis: BasisView) -> list[Tensor]:
    """Dequantised rows: one (n, numel) float32 tensor per tensor of the model."""
    dense = dequantise(basis)  # (num_tiles, n, 128)
    return [t.float().contiguous() for t in _split(dense.transpose(0, 1), basis.numels)]


def project(basis: BasisView, grads: Sequence[Tensor]) -> Tensor:
    """c[i, l] = sum over columns j of segment l of P[i, j] g[j]; float64 inside.

    An empty gradient counts as zero.
    """
    p = dequantise(basis)  # (num_tiles, n, 128)
    flat = [
        g.reshape(-1) if g.numel() == numel else basis.codes.new_zeros(numel, dtype=torch.float32)
        for g, numel in zip(grads, basis.numels, strict=True)
    ]
    g = torch.cat([_pad_columns(f.double()) for f in flat])  # (num_tiles, 128)
    per_tile = (p @ g[:, :, None])[..., 0]  # (num_tiles, n)
    c = per_tile.new_zeros(basis.row_scale.shape)
    c = c.index_add(1, basis.tile_segment.long(), per_tile.T)
    return c if any(f.dtype == torch.float64 for f in flat) else c.float()


def reconstruct(
    basis: BasisView, x: Tensor, center: Sequence[Tensor], out: Sequence[Tensor] | None
) -> list[Tensor]:
    """out[j] = center[j] + sum_i x[i, l] P[i, j]; float64 inside.

    Rounded to float32 and then to the dtype of `out` (of the center without `out`; float32 without
    both).
    """
    p = dequantise(basis)
    weights = x.double()[:, basis.tile_segment.long()].T  # (num_tiles, n)
    flat = _split((weights[:, None, :] @ p)[:, 0], basis.numels)
    if center:
        flat = [c.reshape(-1).double() + f for c, f in zip(center, flat, strict=True)]
    if out is not None:
        for o, f in zip(out, flat, strict=True):
            o.copy_(f.float().to(o.dtype).view_as(o))
        return list(out)
    dtypes = [c.dtype for c in center] if center else [x.dtype] * len(flat)
    return [f if d == torch.float64 else f.float().to(d) for f, d in zip(flat, dtypes, strict=True)]


def step(
    basis: BasisView,
    grads: Sequence[Tensor],
    args: StepArgs,
    center: Sequence[Tensor],
    out: Sequence[Tensor],
) -> Tensor:
    """project, the update of torch.optim.SGD ("sgd") or AdamW ("adamw"), and reconstruct.

    x, its state and `out` are written in place. Returns c.
    """
    c = project(basis, grads).float()
    x, first, second = args.x, args.first, args.second
    g = -c if args.maximize else c
    if args.rule == "adamw" and first is not None and second is not None:
        x.mul_(1 - args.lr * args.weight_decay)
        first.lerp_(g, 1 - args.beta1)
        second.mul_(args.beta2).addcmul_(g, g, value=1 - args.beta2)
        root = (second.sqrt() / math.sqrt(1 - args.beta2**args.count)).add_(args.eps)
        x.addcdiv_(first, root, value=-args.lr / (1 - args.beta1**args.count))
    else:
        g = g + args.weight_decay * x
        if first is not None:
            new = args.momentum * first + (1 - args.dampening) * g
            first.copy_(g if args.count == 1 else new)
            g = g + args.momentum * first if args.nesterov else first
        x.sub_(args.lr * g)
    reconstruct(basis, x, center, out)
    return c


def gram(basis: BasisView) -> Tensor:
    """G[l, i, k] = sum over columns j of segment l of P[i, j] P[k, j]: (L, n, n) float64."""
    p = dequantise(basis)  # (num_tiles, n, 128)
    offsets = tile_offsets(basis.numels)
    for k, numel in enumerate(basis.numels):
        if numel % TILE:
            p[offsets[k + 1] - 1, :, numel % TILE :] = 0  # padding
    g = p.new_zeros(basis.num_segments, basis.n, basis.n)
    return g.index_add(0, basis.tile_segment.long(), p @ p.mT)


def orthonormalize_pass(args: PassArgs) -> tuple[Tensor, Tensor]:
    """One read of the rows for block Gram-Schmidt, in float64 throughout, `fast` or not.

    V = rows minus parents (or minus the center); V = transform @ V; rounded into `out`. Returns

    - V V^T, its rows from `first` on and lower triangle; with `out` instead V V^T probes^T;
    - the rows' squared norms.

    `out` comes with a transform and probes.
    """
    n, m, parents = args.n, args.rank, args.parent.tolist()
    gram = torch.zeros(args.gram_shape, dtype=torch.float64, device=args.device)
    norms = torch.zeros(n, dtype=torch.float64, device=args.device)
    for k in range(len(args.numels)):
        rows = args.rows[k * n : (k + 1) * n]
        w = torch.stack([r.reshape(-1).double() for r in rows])  # (n, numel)
        c = args.center[k].reshape(-1).double() if args.center else torch.zeros_like(w[0])
        norms += w.square().sum(1)
        v = torch.stack([w[i] - (w[p] if p >= 0 else c) for i, p in enumerate(parents)])
        if args.transform is not None:
            v = args.transform @ v
        if args.out and args.probes is not None:
            targets = args.out[k * m : (k + 1) * m]
            v = v.float().to(targets[0].dtype) if m else v
            for o, q in list(zip(targets, v, strict=True))[args.first :]:
                o.copy_(q.view_as(o))
            v = v.double()
            gram = gram + v @ (v.T @ args.probes.T)
        else:
            gram = gram + (v @ v.T).tril()
    if not args.out:
        gram[: args.first] = 0
    return gram, norms


def relative_error(v: Tensor, bits: int) -> float:
    """The quantiser's error on this data: ||v - dequantised v|| / ||v||, v packed alone.

    Args:
        v: tensor of any shape and floating dtype on the CPU, taken as one row; not all zero.
        bits: 8, 4, 3, 2 or 1.

    Returns:
        The relative error, before row_scale, without a unit.

    Raises:
        KeyError: `bits` is another number.
        ZeroDivisionError: v is zero.
    """
    groups = _pad_columns(v.float().reshape(1, -1))[0]
    valid = (v.numel() - TILE * torch.arange(len(groups), device="cpu")).clamp(max=TILE)
    codes, scale, _ = quantise(groups, valid, bits)
    levels = torch.tensor(LEVELS[bits], dtype=torch.float64, device="cpu")[codes]
    real = torch.arange(TILE, device="cpu") < valid[:, None]
    errors = (groups.double() - scale.double()[:, None] * levels) * real
    return math.sqrt(errors.square().sum().item() / groups.double().square().sum().item())
