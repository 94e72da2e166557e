"""What a case of `fuzz_results` is of: an odd model, candidates of it in files, and options."""

from __future__ import annotations

import json
import os
import random

import torch
import twa
from exact import F32, F64
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


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
