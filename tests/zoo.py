"""Odd models for test_zoo.py, and what their averages and gradients are in plain float64 arithmetic
on the candidates' own tensors.
"""

import warnings

import safetensors.torch
import torch
import twa
from bounds import assert_weighted
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune
from twa.io.order import age

import twa_kernels as tk

N = 4
CENTER = twa.averages.ema(N, 0.6)


def save_candidates(new_model, folder, count):
    """c0.safetensors, ...: a model's parameters, each with noise of its own."""
    for k in range(count):
        model = new_model()
        torch.manual_seed(k)
        noisy = {
            name: p.detach() + 0.1 * torch.randn_like(p) for name, p in model.named_parameters()
        }
        save_file(noisy, folder / f"c{k}.safetensors")
    return twa.Candidates(folder / "c*.safetensors")


# The animals. Each takes one input and returns a tensor. -----------------------------------------


class GPT(nn.Module):
    """Tied embedding and head, a causal mask of -inf as a buffer, one attention block."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(11, 8), nn.Parameter(torch.randn(5, 8))
        self.norm, self.qkv, self.out, self.mlp = (
            nn.LayerNorm(8),
            nn.Linear(8, 24),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
        )
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.full((5, 5), float("-inf")).triu(1))
        self.register_buffer("allowed", torch.ones(5, 5, dtype=torch.bool).tril())

    def forward(self, tokens):
        x = self.embed(tokens) + self.position
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out((q @ k.mT + self.mask).softmax(-1) @ v)
        return self.head(x + self.mlp(x).tanh())


class ResNet(nn.Module):
    """A stem and a residual block with a strided shortcut, channels last.

    Of 8 channels: of 4, oneDNN 3.12 writes beyond the gradient of the shortcut on CPUs with AVX2
    and without AVX-512.
    """

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(
            nn.Conv2d(8, 12, 3, 2, 1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, 1, 1),
            nn.BatchNorm2d(12),
        )
        self.downsample, self.fc = (
            nn.Sequential(nn.Conv2d(8, 12, 1, 2), nn.BatchNorm2d(12, affine=False)),
            nn.Linear(12, 3),
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        x = self.bn(self.stem(images)).relu()
        return self.fc((self.layer1(x) + self.downsample(x)).relu().mean((2, 3)))


class Frozen(nn.Module):
    """A frozen backbone with its BatchNorm, and a head."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = (
            nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).requires_grad_(False),
            nn.Linear(5, 2),
        )

    def forward(self, x):
        return self.head(self.backbone(x).tanh())


class Shared(nn.Module):
    """One module under two names, with its buffers; one Parameter in two modules; a transposed one;
    all used more than once.
    """

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.second, self.a, self.b = self.first, nn.Linear(6, 3), nn.Linear(6, 3)
        self.b.weight = self.a.weight
        self.transposed = nn.Parameter(torch.randn(3, 6).T)

    def forward(self, x):
        x = self.second(self.first(x).tanh())
        return self.a(x) + self.b(x).square() + x @ self.transposed


class Odd(nn.Module):
    """Scalars, empty tensors, one element, buffers of every kind, odd names, a parameter without a
    gradient, sparse gradients.
    """

    def __init__(self):
        super().__init__()
        self.scale, self.one = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(1))
        self.empty, self.flat, self.unused = (
            nn.Parameter(torch.zeros(0)),
            nn.Parameter(torch.zeros(0, 5)),
            nn.Parameter(torch.randn(3)),
        )
        self.list, self.sparse = nn.ParameterList([torch.randn(6)]), nn.Embedding(9, 6, sparse=True)
        self.dict = nn.ParameterDict(
            {name: torch.randn(6) for name in ("a/b", "ünï ☃", "0", 'q"\\', "x" * 500)}
        )
        for name, t in {
            "count": torch.tensor(3),
            "ids": torch.arange(6),
            "flag": torch.tensor(True),
            "none": torch.zeros(0, 2),
        }.items():
            self.register_buffer(name, t)
        self.register_buffer("shift", torch.randn(()))
        self.register_buffer("byte", torch.randint(0, 9, (6,), dtype=torch.uint8))

    def forward(self, x):
        total = sum(self.dict.values()) + self.list[0] + self.sparse(torch.tensor([1, 1, 4])).sum(0)
        return (x + total) * self.scale + self.one * self.shift + self.empty.sum() + self.flat.sum()


def stacked(wrap):
    return lambda: nn.Sequential(wrap(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 2))


def old_style(name):
    def wrap(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return getattr(nn.utils, name)(module)

    return wrap


class Recurrent(nn.LSTM):
    def __init__(self):
        super().__init__(6, 4)

    def forward(self, x):
        return super().forward(x)[0]


ZOO = {
    "gpt": (GPT, torch.arange(10).view(2, 5)),
    "resnet": (ResNet, torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))),
    "weight_norm": stacked(parametrizations.weight_norm),
    "weight_norm_old": stacked(old_style("weight_norm")),
    "spectral_norm": stacked(parametrizations.spectral_norm),
    "spectral_norm_old": stacked(old_style("spectral_norm")),
    "orthogonal": stacked(parametrizations.orthogonal),
    "pruned": stacked(lambda m: prune.l1_unstructured(m, "weight", 0.5)),
    "frozen": Frozen,
    "shared": Shared,
    "odd": Odd,
    "recurrent": Recurrent,
}
VECTORS = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


def animal(name):
    found = ZOO[name]
    return found if isinstance(found, tuple) else (found, VECTORS)


def born(make, seed):
    """A model of its own: parameters away from their constant first values, statistics and integers
    too.
    """
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
        for name, b in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                b.uniform_(0.5, 1.5)
            # frames and masks: the same in candidates that may be averaged
            elif name.endswith((".base", "weight_mask")):
                b.copy_(torch.eye(6) if name.endswith("base") else torch.ones(6, 6).tril())
            elif not b.is_floating_point() and b.dtype != torch.bool:
                b.add_(seed)
    return model


def save(model, path):
    """A .pt file with all keys, or a .safetensors file with one key for what is shared."""
    (
        torch.save(model.state_dict(), path)
        if path.suffix == ".pt"
        else safetensors.torch.save_model(model, path)
    )


def each(paths):
    """Candidates of which all count, also those that are the same."""
    return twa.Candidates.of([twa.Candidates(path)[0] for path in sorted(paths, key=age)])


def loss_of(output):
    return (output - 0.3).square().mean()


def flat(rows):
    return rows.reshape(len(rows), rows[0].numel())


class Reference:
    """theta(x) = c + sum_i x[i] P[i] in float64 from the candidates' models:

    P[i] = (w_i - c) / divisor, or the packed basis's own rows.
    """

    def __init__(self, make, states, subspace, lr=0.05):
        self.model, names = make().double(), list(subspace.key_map.trained)
        for m in self.model.modules():
            if isinstance(m, nn.Embedding):
                m.sparse = False  # a sparse gradient finds no way back to x
        self.segments, self.names, self.w = (
            subspace.segments.first,
            names,
            {name: torch.stack([s[name].double() for s in states]) for name in names},
        )
        self.center = {
            name: torch.tensordot(subspace.coordinates.center_weights, w, 1)
            for name, w in self.w.items()
        }
        self.bits, self.divisor = subspace.basis.bits, subspace.coordinates.divisor
        divisor = torch.where(
            subspace.coordinates.divisor > 0, subspace.coordinates.divisor, torch.inf
        )
        exact = [
            flat(self.w[n] - self.center[n]) / divisor[:, [l]]
            for n, l in zip(names, self.segments, strict=True)
        ]
        self.rows = (
            exact
            if subspace.basis.bits == 32
            else [flat(r.double()) for r in tk.unpack(subspace.basis)]
        )
        error = (torch.cat(self.rows, 1) - torch.cat(exact, 1)).norm() / torch.cat(
            exact, 1
        ).norm().clamp(min=1e-30)
        assert error <= (0.2 if subspace.basis.bits == 4 else 0)
        self.x = torch.zeros(subspace.coefficients.shape, dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.SGD([self.x], lr=lr, momentum=0.9)

    def theta(self, x):
        parts = zip(self.names, self.segments, self.rows, strict=True)
        return {
            name: self.center[name] + (x[:, l] @ rows).view_as(self.center[name])
            for name, l, rows in parts
        }

    def slack(self, x):
        """tensor -> how far float32 arithmetic may be from theta(x): a sum of n products in any
        order, each product rounded, its row too (the center's rounding, its own, its divisor's and
        theirs together), and the center and the result. The packed sum is exact but for
        coefficients of 24 bits."""
        slack, shares = {}, x.abs() / torch.where(self.divisor > 0, self.divisor, torch.inf)
        for name, l, rows in zip(self.names, self.segments, self.rows, strict=True):
            center, terms = (
                self.center[name].abs(),
                (x[:, l].abs() @ rows.abs()).view_as(self.center[name]),
            )
            sums = (
                (len(x) + 4) * terms
                if self.bits == 32
                else 8 * terms.amax()
                if terms.numel()
                else terms
            )
            slack[name] = 2.0**-24 * (sums + terms + (2 + shares[:, l].sum()) * center)
        return slack

    def step(self, state, inputs):
        """Gradient of the coefficients and one optimizer step, with the buffers and the frozen
        weights of `state`.
        """
        self.model.load_state_dict(state)
        self.optimizer.zero_grad()
        inputs = inputs.double() if inputs.is_floating_point() else inputs
        loss_of(functional_call(self.model, self.theta(self.x), (inputs,))).backward()
        self.optimizer.step()
        return self.x.grad.clone()


def near(found, expected, tolerance):
    """Within a share of the largest number expected."""
    assert torch.isfinite(found).all()
    assert (found.double() - expected).abs().max() <= tolerance * max(
        expected.abs().max().item(), 1e-6
    ), (found, expected)


def walk(
    folder, make, inputs, models, bits, granularity, suffix, low_memory, center=CENTER, lr=0.05
):
    """From candidates on disk to an exported model, every stage against the reference."""
    states = [m.state_dict() for m in models]
    for k, m in enumerate(models):
        save(m, folder / f"c{k}{suffix}")
    candidates, model = each(folder.glob(f"c*{suffix}")), born(make, 99).train()
    subspace = twa.Subspace.from_candidates(
        model, candidates, bits=bits, granularity=granularity, center=center
    )
    key_map, state = subspace.key_map, model.state_dict()
    for name in key_map.fixed:
        if not name.endswith(("_u", "_v")):
            rows = [s[name].double() for s in states]
            if all(torch.equal(rows[0], r) for r in rows):
                assert torch.equal(state[name].double(), rows[0])
            else:
                assert_weighted(state[name], center, rows)
    assert all(torch.equal(state[name], states[-1][name]) for name in key_map.copied)
    assert {id(p) for p in subspace.parameters} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    reference = Reference(make, states, subspace, lr)
    optimizer = twa.SubspaceOptimizer(
        subspace, torch.optim.SGD, lr=lr, momentum=0.9, low_memory=low_memory
    )
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    for _ in range(3):
        expected = reference.step(model.state_dict(), inputs)
        loss_of(model(inputs)).backward()
        optimizer.step()
        near(subspace.coefficients.grad, expected, 1e-4)
        optimizer.zero_grad()
    near(subspace.coefficients.detach(), reference.x.detach(), 1e-4)
    beta, parameters = subspace.merge_weights(), dict(model.named_parameters())
    slack = reference.slack(subspace.x().double())
    for k, (name, l) in enumerate(zip(reference.names, subspace.segments.first, strict=True)):
        exact = (
            torch.tensordot(beta[:, l], reference.w[name], 1)
            if bits == 32
            else reference.theta(subspace.x().double())[name]
        )
        assert ((parameters[name].detach() - exact).abs() <= slack[name]).all(), name
        assert subspace.parameters[k] is parameters[name]
    assert all(torch.equal(parameters[name], p) for name, p in frozen.items())

    subspace.save(folder / "out")
    path, fresh = folder / "out" / "averaged.safetensors", born(make, 98)
    assert {k: (tuple(t.shape), t.dtype) for k, t in load_file(path).items()} == {
        k: (i.shape, i.dtype) for k, i in candidates.info.items()
    }
    missing, unexpected = fresh.load_state_dict(load_file(path), strict=False)
    absent = (
        set()
        if suffix == ".pt"
        else {
            k for k in fresh.state_dict().keys() - candidates.info.keys() if "num_batches" not in k
        }
    )
    assert not unexpected and set(missing) == absent
    assert torch.equal(fresh.eval()(inputs), model.eval()(inputs))
    return subspace
