"""A fuzzer of numbers: odd models, files and options, each result beside a reference in float64.

    python tests/fuzz_results.py --count 2000 [--seed N] [--only NUMBER]

The reference is made of the definitions in docs/ and docstrings, in plain PyTorch. It calls
neither twa nor twa_kernels: codes are unpacked as docs/format.md says. Tolerances are bounds on
rounding (`bounds`). A case depends on its number only; one that is refused with a TwaError counts
as such.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import random
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
import twa
from bounds import gamma
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

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


# Models and candidates ---------------------------------------------------------------------------


class Odd(nn.Module):
    """Parts of every kind, as the case draws them."""

    def __init__(self, r):
        super().__init__()
        kinds = r.sample(list(PARTS), r.randint(1, 5))
        for kind in ["linear", *kinds] if r.random() < 0.9 else kinds:
            setattr(self, kind, PARTS[kind](r))
        if hasattr(self, "linear") and r.random() < 0.3:
            self.again = self.linear  # a shared module
        if hasattr(self, "embedding"):
            self.head = nn.Linear(*self.embedding.weight.shape[::-1], bias=False)
            self.head.weight = self.embedding.weight

    def forward(self, x):
        return x


class Loose(nn.Module):
    """Parameters and buffers without a layer."""

    def __init__(self, parameters=(), buffers=()):
        super().__init__()
        for k, t in enumerate(parameters):
            self.register_parameter(f"p{k}", nn.Parameter(t))
        for k, t in enumerate(buffers):
            self.register_buffer(f"b{k}", t)


def size(r):
    return r.choice([1, 2, 3, 7, 16, 31, 127, 128, 129])


def conv(r):
    made = nn.Conv2d(r.randint(1, 5), size(r) % 40 + 1, r.randint(1, 3))
    return made.to(memory_format=torch.channels_last) if r.random() < 0.5 else made


def frozen(r):
    made = nn.Linear(size(r), 3)
    made.weight.requires_grad_(False)
    return made


PARTS = {
    "linear": lambda r: nn.Linear(size(r), size(r)),
    "conv": conv,
    "embedding": lambda r: nn.Embedding(size(r), r.randint(1, 9)),
    "norm": lambda r: nn.BatchNorm1d(size(r)),
    "layernorm": lambda r: nn.LayerNorm(size(r)),
    "weightnorm": lambda r: weight_norm(nn.Linear(size(r), size(r) % 20 + 1)),
    "frozen": frozen,
    "odd": lambda r: Loose(
        [torch.randn(()), torch.zeros(0, 3), torch.randn(5, 40).t(), torch.randn(9, 130)[1:, ::2]]
    ),
    "tiny": lambda r: Loose([torch.randn(r.randint(1, 3)) for _ in range(r.randint(10, 60))]),
    "huge": lambda r: Loose([torch.randn(r.randint(64, 90), 131)]),
    "wide": lambda r: Loose([torch.randn(7, 33, dtype=F64)], [torch.randn(4, dtype=F64)]),
    "buffers": lambda r: Loose(
        (),
        [
            torch.randn(5),
            torch.tensor([True, False]),
            torch.tensor(2**24 + 1),
            torch.tensor([3, 200], dtype=torch.uint8),
            torch.zeros(3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf),
        ],
    ),
}
WRAPPERS = {
    "plain": lambda m: m,
    "data parallel": nn.DataParallel,
    "compiled": torch.compile,
    "average": torch.optim.swa_utils.AveragedModel,
}


def state_of(model):
    """Tensors of a plain model by key, tied ones under each of their names."""
    return model.state_dict(keep_vars=True)


def moved(r, t, distance, g):
    """A float tensor some way from another, within its dtype."""
    d = torch.randn(t.shape, generator=g, dtype=F64) * distance
    kind = r.random()
    if kind < 0.1:
        d = d * 0.0
    elif kind < 0.2 and t.dim():
        d[1:] = 0.0
    elif kind < 0.25:
        d *= 1e-3
    most = torch.finfo(t.dtype).max
    return (t.double() + d).clamp(-most, most).to(t.dtype)


def states_of(r, model, n, dtype, g, same):
    """n state_dicts: moved copies of a model's, some of them alike; `same`: in all tensors."""
    scale = r.choice([1.0] * 8 + [1e-30, 1e30, 1e-36, 1e-41, 6e4])
    distance = r.choice([0.02, 0.02, 1.0, 1e-4])
    first = {k: t.detach().clone() for k, t in state_of(model).items()}
    for k, t in first.items():
        if t.is_floating_point():
            to = t.dtype if dtype is None or t.dtype == F64 else dtype
            most = torch.finfo(to).max / 2
            first[k] = (t.double() * scale).clamp(-most, most).to(to)
            first[k][torch.isinf(t)] = -torch.inf
    made = [first]
    ties = {}
    for key, t in state_of(model).items():
        ties.setdefault((t.data_ptr(), t.shape) if t.numel() else key, key)
    for i in range(1, n):
        like, one = r.choice(made), {}
        if same and r.random() < 0.1:
            made.append({k: t.clone() for k, t in like.items()})
            continue
        for key, t in first.items():
            own = state_of(model)[key]
            tie = ties[(own.data_ptr(), own.shape) if own.numel() else key]
            if tie != key:
                one[key] = one[tie]
            elif t.is_floating_point() and t.isfinite().all():
                one[key] = moved(r, like[key], distance * scale, g)
            else:
                one[key] = t if t.is_floating_point() else t + t.new_tensor(i % 3)
        if same or not any(all(torch.equal(one[k], m[k]) for k in one) for m in made):
            made.append(one)  # a file that is the same as another is left out
    return made


def written(r, states, folder, kind):
    """Candidates of these state_dicts, in files of some format."""
    prefix = r.choice(["", "", "module.", "_orig_mod."])
    states = [{prefix + k: t for k, t in s.items()} for s in states]
    if kind == "states":
        return twa.Candidates.of_states(states)
    paths = []
    for i, s in enumerate(states):
        path = folder / f"step_{i:03d}"
        paths.append(path if kind == "sharded" else path.with_suffix(f".{kind}"))
        plain = {k: t.contiguous().clone() for k, t in s.items()}
        if kind == "pt":
            torch.save({"state_dict": s, "epoch": i}, paths[-1])
        elif kind == "safetensors":
            save_file(plain, paths[-1])
        else:
            path.mkdir()
            shards = [dict(list(plain.items())[k::2]) for k in range(2)]
            names = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
            for shard, name in zip(shards, names, strict=True):
                save_file(shard, path / name)
            of = {k: name for shard, name in zip(shards, names, strict=True) for k in shard}
            index = {"metadata": {}, "weight_map": of}
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return twa.Candidates(paths)


# The reference -----------------------------------------------------------------------------------


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


# A case ------------------------------------------------------------------------------------------


class Case:
    """What a number draws: a model, candidates of it, and what is done with them."""

    def __init__(self, number, folder):
        self.r, self.folder = random.Random(number), folder
        self.g = torch.Generator().manual_seed(number)
        torch.manual_seed(number)
        r = self.r
        torch.set_num_threads(r.choice([1] * 9 + [2]))
        os.environ["TWA_KERNELS_BACKEND"] = "reference" if r.random() < 0.2 else ""
        self.plain = Odd(r)
        for part in self.plain.children():
            if (dtype := r.choice([None, None, torch.bfloat16, torch.float16, F64])) is not None:
                part.to(dtype)
        n = r.choice([1, 2, 2, 3, 4, 5, 7, 12, 33, 65, 70])
        file_dtype = r.choice([None, None, None, torch.bfloat16, torch.float16, F32])
        kind = r.choice(["states", "pt", "safetensors", "sharded"])  # files are not read twice
        self.states = states_of(r, self.plain, n, file_dtype, self.g, kind == "states")
        self.candidates = written(r, self.states, folder, kind)
        self.model = WRAPPERS[r.choice(["plain", *WRAPPERS])](self.plain)
        if isinstance(self.model, torch.optim.swa_utils.AveragedModel):
            self.plain = self.model.module  # a copy
        self.n, named = len(self.states), self.plain.named_parameters()
        self.trained = {k: p for k, p in named if p.requires_grad}

    def beta(self):
        """Some fixed average: its weights, by twa's name and by definition."""
        r, n = self.r, self.n
        kind, k = r.choice(["uniform", "ema", "lawa", "one", "any"]), r.randint(1, n)
        weights, decay = torch.zeros(n, dtype=F64), r.choice([0.0, 0.5, 0.99])
        if kind == "uniform":
            return twa.averages.uniform(n), weights + 1 / n
        if kind == "ema":
            for i in range(n):
                weights *= decay if i else 0.0
                weights[i] += 1 - decay if i else 1.0
            return twa.averages.ema(n, decay), weights
        if kind == "lawa":
            weights[n - k :] = 1 / k
            return twa.averages.lawa(n, k), weights
        if kind == "one":
            weights[k - 1] = 1.0
        else:
            weights = torch.randn(n, generator=self.g, dtype=F64)
            weights += (1 - weights.sum()) / n
        return weights, weights

    def fixed(self):
        """`Candidates.average` and `load_average`."""
        given, beta = self.beta()
        near("averages", given, beta, gamma(4 * self.n + 8, F64))
        found = self.candidates.average(given)
        assert found.keys() == self.states[0].keys(), found.keys() ^ self.states[0].keys()
        for key, t in found.items():
            assert t.dtype == self.states[-1][key].dtype
            check_average("average", key, t, self.states, beta, t.dtype)
        twa.load_average(self.model, self.candidates, given)
        self.check_state("load_average", beta, self.plain.state_dict())

    def check_state(self, what, beta, state, but=()):
        for key, t in state.items():
            if key not in but:
                stored = self.states[0][key].dtype
                narrow = t.dtype if t.dtype != F64 else torch.promote_types(stored, F32)
                check_average(what, key, t, self.states, beta, narrow)

    def subspace(self):
        """Options, and the subspace that they make."""
        r, n = self.r, self.n
        self.bits = r.choice([1, 2, 3, 4, 8, 32, 32])
        self.granularity = r.choice(["model", "tensor", "fine", 256])
        self.basis = r.choice(["deltas", "deltas", "differences", "orthonormal"])
        self.basis = "deltas" if n == 1 else self.basis
        if self.basis == "orthonormal":
            self.granularity = r.choice(["model", "tensor"])
        self.constraint = r.choice(["none", "none", "simplex"])
        self.normalize = r.choice(["row", "row", "none"])
        kind = r.choice(["mean", "last", 0, "lawa"])
        center = twa.averages.lawa(n, r.randint(1, n)) if kind == "lawa" else kind
        self.center = torch.zeros(n, dtype=F64)
        if kind == "mean":
            self.center += 1 / n
        elif kind == "lawa":
            self.center = center
        else:
            self.center[0 if kind == 0 else -1] = 1.0
        plain = self.constraint == "none" and self.basis != "orthonormal"
        self.balance = plain and r.random() < 0.3
        return dict(
            bits=self.bits,
            granularity=self.granularity,
            basis=self.basis,
            constraint=self.constraint,
            normalize=self.normalize,
            center=center,
            balance=self.balance,
        )

    def trains(self):
        """`Subspace`: its start, rows, merge weights, gradients, steps, files."""
        options = self.subspace()
        s = twa.Subspace.from_candidates(self.model, self.candidates, **options)
        self.check_start(s)
        self.check_rows(s)
        for _ in range(2):
            with torch.no_grad():
                y = torch.randn(s.coefficients.shape, generator=self.g) * self.r.choice([0.1, 1])
                s.coefficients.copy_(y)
            s.write_weights()
            self.check_weights(s)
            self.check_merge_weights(s)
            self.check_gradient(s)
        self.check_set(s)
        self.check_steps(s, options)

    def check_start(self, s):
        names = [next(k for k, q in self.trained.items() if q is p) for p in s.parameters]
        assert sorted(names) == sorted(self.trained), names
        self.names = names
        self.w = [
            torch.stack([c[k].reshape(-1) for c in self.states]).float().double() for k in names
        ]
        numels = [w.shape[1] for w in self.w]
        self.segments, self.count = segments_of(names, numels, self.granularity)
        for k, (w, c) in enumerate(zip(self.w, s.center, strict=True)):
            exact, bound = mean_of(list(w), self.center)
            near(f"center {names[k]}", c.reshape(-1), exact, 1.01 * (bound + rounded(exact, F32)))
        others = {k for k, t in state_of(self.plain).items() if any(t is p for p in s.parameters)}
        self.check_state("start", self.center, self.plain.state_dict(), others)

    def check_rows(self, s):
        basis, center = s.kept, [c.double().reshape(1, -1) for c in s.center]
        tiles = [at[::128] for at in self.segments]
        self.p, self.c = rows_of(basis, tiles), center
        self.most = max(p.abs().max() for p in self.p if p.numel())
        self.v = [(w.float() - c.float()).double() for w, c in zip(self.w, center, strict=True)]
        if self.basis == "differences":
            self.v = [w.diff(dim=0) for w in self.w]
        if self.basis == "orthonormal":
            return self.check_orthonormal(s)
        flushed = self.v
        if self.bits != 32:
            flushed = [d * (of_groups(d) >= SMALL) for d in self.v]
        self.divisor = s.coordinates.rows.divisor
        undivided = [p * self.divisor[:, at] for p, at in zip(self.p, self.segments, strict=True)]
        if self.basis == "deltas":
            exact = common_divisor(flushed, self.segments, self.count, self.normalize)
            near("divisor", self.divisor, exact, gamma(64) * exact)
            if self.bits != 32:
                check_codes(undivided, flushed, self.segments, self.count, self.bits)
        if self.bits == 32:
            for name, p, v, w in zip(self.names, undivided, self.v, self.w, strict=True):
                size = v.abs() + (w.abs().amax(0) if self.basis == "differences" else 0.0)
                near(f"rows {name}", p, v, gamma(8) * size + 4 * TINY)

    def check_orthonormal(self, s):
        rows, self.lengths = s.coordinates.rows, torch.zeros(self.n, self.count, dtype=F64)
        for k, at in enumerate(self.segments):
            self.lengths.index_add_(1, at, self.w[k].square())
        self.lengths.sqrt_()
        for l in range(self.count):
            at = [a == l for a in self.segments]
            q = torch.cat([p[:, m] for p, m in zip(self.p, at, strict=True)], 1)
            v = torch.cat([d[:, m] for d, m in zip(self.v, at, strict=True)], 1)
            q, r = q / rows.scale[l], rows.R[l]
            rank = int((rows.R[l] != 0).any(0).sum())
            if self.bits != 32 or not rank or v.norm() < 1e-30:
                continue
            eye = torch.eye(len(q), dtype=F64) * (torch.arange(len(q)) < rank)
            near("orthonormal", q @ q.T, eye, 2e-6)
            c = torch.cat([c[:, m] for c, m in zip(self.c, at, strict=True)], 1).norm()
            residual, bound = (v - r @ q).norm(dim=1), 2.0**-21 * self.lengths[:, l] + 2.0**-24 * c + SMALL
            near("span", residual, torch.zeros_like(residual), bound)

    def x(self, s):
        return s.x().double()

    def theta(self, s, k):
        """The exact weights of tensor k, and a bound on those in float32."""
        x, p, c = self.x(s)[:, self.segments[k]], self.p[k], self.c[k][0]
        size = c.abs() + (x.abs() * p.abs()).sum(0)
        if self.bits != 32:  # kernels round to 24 bits of the largest in a group
            size = c.abs() + len(x) * (x.abs() * of_groups(p)).amax(0)
        bound = gamma(len(x) + 6) * size + (1 + x.abs().sum(0)) * SMALL
        return c + (x * p).sum(0), bound if self.most * x.abs().sum() < 1e36 else bound + torch.inf

    def check_weights(self, s):
        for k, (name, t) in enumerate(zip(self.names, s.parameters, strict=True)):
            exact, bound = self.theta(s, k)
            bound = bound + rounded(exact, t.dtype)
            near(f"weights {name}", t.detach().reshape(-1), exact, 1.01 * bound)

    def shares(self, s):
        """Shares (n, L) by definition, of the rows' coefficients."""
        x = self.x(s)
        if self.basis == "orthonormal":
            return torch.einsum(
                "lri,rl->il", s.coordinates.rows.transform, x * s.coordinates.rows.scale
            )
        y = torch.where(self.divisor > 0, x / self.divisor, 0.0)
        if self.basis == "deltas":
            return y
        found = torch.zeros(self.n, y.shape[1], dtype=F64)
        found[1:] += y
        found[:-1] -= y
        return found

    def check_merge_weights(self, s):
        share, beta = self.shares(s), s.merge_weights()
        exact = share + self.center[:, None] * (1 - share.sum(0))
        if self.constraint == "simplex":
            exact = (s.coefficients.double() * math.sqrt(self.n)).softmax(0)
        near("merge weights", beta, exact, 1e-12 * (1 + share.abs().sum(0)))
        if self.bits == 32:
            self.check_theta(s, beta, "sum of candidates", 16 + 2 * self.n)

    def check_theta(self, s, beta, what, count):
        """The weights beside sum_i beta_i w_i, which they are without quantisation."""
        x = self.x(s)
        for k, at in enumerate(self.segments):
            b, w, c = beta[:, at], self.w[k], self.c[k].abs()
            exact, _ = self.theta(s, k)
            parts = (x[:, at].abs() * self.p[k].abs()).sum(0)
            if self.basis == "orthonormal":
                t, scale = s.coordinates.rows.transform[at].abs(), s.coordinates.rows.scale[at]
                made = torch.einsum("cri,ic->rc", t, self.v[k].abs() + c) * scale
                parts = (x[:, at].abs() * made).sum(0)
            elif self.basis == "differences":
                y = torch.where(self.divisor > 0, x / self.divisor, 0.0).abs()[:, at]
                parts = parts + y.sum(0) * w.abs().amax(0)
            size = (b.abs() * (w.abs() + c)).sum(0) + c[0] + parts
            bound = gamma(count) * size + 4 * TINY * (99 + b.abs().sum(0))
            if self.basis == "orthonormal":  # what dropped rows miss
                bound += 2.0**-21 * (b.abs() * self.lengths[:, at]).sum(0)
            near(f"{what} {self.names[k]}", (b * w).sum(0), exact, bound)

    def check_gradient(self, s):
        grads, r = [], self.r
        for p in s.parameters:
            g = torch.randn(p.shape, generator=self.g).to(p.dtype)
            if p.dim() > 1 and r.random() < 0.3:
                g = g.transpose(0, 1).contiguous().transpose(0, 1)
            elif p.dim() and p.numel() and r.random() < 0.1:
                g = g[:1].expand(p.shape)
            p.grad = None if r.random() < 0.1 else g
            grads.append(
                torch.zeros(p.numel(), dtype=F64) if p.grad is None else g.double().reshape(-1)
            )
        if all(p.grad is None for p in s.parameters):
            s.parameters[0].grad = torch.zeros_like(s.parameters[0])
        c, size = torch.zeros(len(self.x(s)), self.count, dtype=F64), None
        size = torch.zeros_like(c)
        for p, g, at in zip(self.p, grads, self.segments, strict=True):
            g = g.float().double()
            c.index_add_(1, at, p * g)
            size.index_add_(1, at, p.abs() * of_groups(g[None]))
        columns = max(map(len, grads)) if self.granularity != "model" else sum(map(len, grads))
        bound = gamma(columns + 8) * size + columns * TINY
        found = s.project_gradients()
        if self.constraint == "none" and not self.balance:
            near("gradient", found, c, bound)
        elif self.constraint == "simplex" and self.basis == "deltas":
            beta = s.merge_weights()
            g, b = c * self.divisor, bound * self.divisor
            exact = math.sqrt(self.n) * beta * (g - (beta * g).sum(0))
            bound = math.sqrt(self.n) * beta * (b + (beta * b).sum(0)) + gamma(2) * exact.abs()
            size = math.sqrt(self.n) * beta * (g.abs() + (beta * g.abs()).sum(0))
            near("gradient", found, exact, bound + 1e-12 * size + TINY)
        elif self.balance:
            dy, y = torch.randn(found.shape, generator=self.g), s.coefficients.detach().clone()
            with torch.no_grad():
                s.coefficients.copy_(dy)
                x = self.x(s)
                s.coefficients.copy_(y)
            left, right = (x * c).sum(), (dy.double() * found.double()).sum()
            total = (x.abs() * (bound + gamma(4) * c.abs())).sum()
            total += gamma(4) * (dy.double() * found.double()).abs().sum()
            near("adjoint", left, right, total)

    def check_set(self, s):
        beta = torch.rand(self.n, self.count, generator=self.g, dtype=F64) + 0.01
        beta /= beta.sum(0)
        s.set_merge_weights(beta)
        self.check_weights(s)
        if self.bits == 32 and not (
            self.basis == "orthonormal" and any(s.coordinates.rows.dropped)
        ):
            self.check_theta(s, beta, "set merge weights", 64 + 8 * self.n)

    def check_steps(self, s, options):
        """Steps beside PyTorch's optimizer in float64; a run that was resumed; files."""
        rule, inner = self.r.choice(
            [
                (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
                (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
                (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
                (torch.optim.Adam, {"lr": 0.01}),
            ]
        )
        low = self.r.random() < 0.4
        self.plain.zero_grad()
        optimizer = twa.SubspaceOptimizer(s, rule, low_memory=low, **inner)
        average = twa.IterateAverage(s, eta := self.r.choice([0.0, 2.0]))
        exact = nn.Parameter(s.coefficients.detach().double())
        reference, mean = rule([exact], foreach=False, **inner), torch.zeros_like(exact)
        most = torch.zeros_like(exact)
        grads = [torch.randn(p.shape, generator=self.g).to(p.dtype) for p in s.parameters]

        def step(optimizer, s):
            sum((p * g).sum().double() for p, g in zip(s.parameters, grads, strict=True)).backward()
            expected = None if not low else s.coefficients.grad.clone()
            optimizer.step()
            taken = s.coefficients.grad
            optimizer.zero_grad()
            return expected, taken

        for t in range(1, 4):
            if t == 3:
                kept = copy.deepcopy(optimizer.state_dict())
            before = s.coefficients.detach().clone()
            expected, taken = step(optimizer, s)
            exact.grad = (expected if low else taken).double()
            most = torch.maximum(most, exact.grad.abs())
            reference.step()
            state = reference.state[exact]
            assert most.isfinite().all()
            moved_by = most + exact.abs().detach()
            if "exp_avg_sq" in state:
                moved_by = most / (state["exp_avg_sq"].sqrt() / 0.001**0.5 + 1e-8)
            bound = gamma(64) * (before.double().abs() + 2 * inner["lr"] * 4 * moved_by) + TINY
            if most.amax() < 1e18:  # whose square is finite
                near("step", s.coefficients, exact.detach(), bound)
            with torch.no_grad():
                exact.copy_(s.coefficients)
            self.check_weights(s)
            average.update()
            mean = mean + (1 + eta) / (t + eta) * (exact.detach() - mean)
            near("iterates", average.coefficients, mean, gamma(8 * t) * 3 * exact.abs().max())
        after = s.coefficients.detach().clone(), [p.detach().clone() for p in s.parameters]
        if low:
            optimizer.close()
        again = twa.Subspace.from_candidates(self.model, self.candidates, **options)
        other = twa.SubspaceOptimizer(again, rule, low_memory=low, **inner)
        other.load_state_dict(kept)
        step(other, again)
        self.same("resumed", again, after)
        if low:
            other.close()
        again.save(self.folder / "out", basis=self.bits != 32)
        found = json.loads((self.folder / "out/coefficients.json").read_text())
        assert found["beta"] == again.merge_weights().tolist()
        exported = load_file(self.folder / "out/averaged.safetensors")
        for key, t in self.plain.state_dict().items():
            kept_as = t.to(self.states[0][key].dtype)
            near(f"exported {key}", exported[key], kept_as.double(), 0.0)
        if self.bits != 32:
            loaded = twa.Subspace.load(self.folder / "out", self.model)
            self.same("loaded", loaded, after)
            self.check_weights(loaded)

    def same(self, what, s, after):
        assert torch.allclose(s.coefficients, after[0], 0, 0, True), f"{what}: coefficients"
        for name, p, q in zip(self.names, s.parameters, after[1], strict=True):
            assert torch.allclose(p, q, 0, 0, equal_nan=True), f"{what}: {name}"


    # Recordings ----------------------------------------------------------------------------------

    def records(self):
        """`Recorder`: its files by docs/format.md, and averages of what they hold."""
        r, bits, names = self.r, self.r.choice([1, 2, 3, 4, 8]), list(self.trained)
        path, count = self.folder / "run", min(self.n, 9)
        recorder = twa.Recorder(self.plain, every=1, bits=bits, path=path)
        steps = sorted(r.sample(range(1, 99), count))
        self.plain.load_state_dict(self.states[0])
        live = [self.set_live(k, steps[k], recorder) for k in range(count)]
        recorder.flush()
        if recorder.steps != steps:  # NaN or Inf, or weights that are no float32
            return recorder.close()
        with safe_open(path / f"anchor_{steps[0]}.safetensors", "pt") as f:
            keys = [e[0] for e in json.loads(f.metadata()["twa"])["contents"]["trained"]]
            now = [f.get_tensor(f"weights.{key}").float() for key in keys]
        assert sorted(keys) == sorted(names), keys
        ends, decoded, rows = tiles_of([t.numel() for t in now]), [now], []
        for k, step in enumerate(steps[1:], 1):
            found = load_file(path / f"step_{step}.safetensors")
            scales = found["scales"].double()[:, None]
            flat = (unpacked(found["codes"], bits) * scales).float()
            rows.append(
                [flat[a:b].flatten()[: t.numel()] for a, b, t in zip(ends, ends[1:], now)]
            )
            before, now = now, [
                (t.reshape(-1) + d).view(t.shape) for t, d in zip(now, rows[-1], strict=True)
            ]
            decoded.append(now)
            wanted = [
                (w.float() - t).double().reshape(1, -1)
                for w, t in zip((live[k][key] for key in keys), before, strict=True)
            ]
            if all(w.abs().amax() < 1e30 for w in wanted if w.numel()):
                given = [d.double()[None] for d in rows[-1]]
                whole = [torch.zeros(w.numel(), dtype=torch.int64) for w in wanted]
                check_codes(given, wanted, whole, 1, bits)
        candidates = twa.Candidates(path)
        for k, at in enumerate(decoded):
            for key, t in zip(keys, at, strict=True):
                found = candidates[k].tensor(key)
                assert torch.equal(found, t.to(found.dtype)), f"snapshot {k} {key}"
        horizon = r.randint(1, 60)
        scheme = r.choice(["ema", "lawa", "uniform", "last"])
        beta = weights_of_steps(scheme, steps, horizon)
        options = {"ema": {"half_life": horizon}, "lawa": {"last": horizon}}.get(scheme, {})
        near("weights of steps", recorder.beta(scheme, **options), beta, gamma(99, F64))
        recorder.apply(scheme, **options)
        recorder.save(self.folder / "recorded.safetensors", scheme, **options)
        saved, state = load_file(self.folder / "recorded.safetensors"), self.plain.state_dict()
        loaded = candidates.average(beta)
        for i, key in enumerate(keys):
            exact, _ = mean_of([at[i].double() for at in decoded], beta)
            size = decoded[0][i].double().abs()
            size += sum((d[i].double().abs().view(size.shape) for d in rows), 0 * size)
            bound = gamma(len(rows) + 4) * size + rounded(exact, F32) + 99 * TINY
            for found in (state[key], saved[key], loaded[key]):
                close = 1.01 * (bound + rounded(exact, found.dtype))
                near(f"{scheme} of {key}", found, exact, close)
        for key, t in state_of(self.plain).items():
            if not isinstance(t, nn.Parameter):  # frozen ones are kept once
                check_average(scheme, key, saved[key], live, beta, saved[key].dtype)
        recorder.close()

    def set_live(self, k, step, recorder):
        """Moves the model to a state, and records it; a copy of what it then is."""
        self.plain.load_state_dict(self.states[k])
        recorder.record(step)
        return {key: t.clone() for key, t in self.plain.state_dict().items()}


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


def check(number, folder):
    """Checks a case; what the product refused, if it did."""
    case = Case(number, folder)
    refused = Counter()
    for part in (case.fixed, case.trains, case.records):
        try:
            part()
        except twa.TwaError as error:
            refused[f"{part.__name__}: {str(error)[:1000]}"] += 1
    return refused


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    begun, refused, bad = time.perf_counter(), Counter(), 0
    for number in args.only or range(args.seed, args.seed + args.count):
        with tempfile.TemporaryDirectory() as folder:
            try:
                refused += check(number, Path(folder))
            except Exception as error:
                if args.only:
                    raise
                bad += 1
                print(f"case {number}: {type(error).__name__}: {error}"[:300], flush=True)
    for text, count in refused.most_common(20):
        print(f"refused {count}: {text}")
    print(f"{args.count} cases in {time.perf_counter() - begun:.1f} s: {bad} wrong")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
