"""A fuzzer of numbers: odd models, files and options, each result beside a reference in float64.

    python tests/fuzz_results.py --count 2000 [--seed N] [--only NUMBER]

`drawn` has what a case is of, `exact` what the results should be. A case depends on its number
only; one that is refused with a TwaError counts as such.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
import twa
from bounds import gamma
from drawn import state_of
from exact import (
    F32,
    F64,
    SMALL,
    TINY,
    check_average,
    check_codes,
    common_divisor,
    mean_of,
    near,
    of_groups,
    rounded,
    rows_of,
    segments_of,
)
from fuzz_recordings import Recordings
from safetensors.torch import load_file
from torch import nn


class Checks(Recordings):
    """Everything that is checked of a case."""

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
            residual, bound = (
                (v - r @ q).norm(dim=1),
                2.0**-21 * self.lengths[:, l] + 2.0**-24 * c + 2.0**-22 * v.norm(dim=1) + SMALL,
            )
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
        if max(w.abs().max() for w in self.w if w.numel()) < 1e-30:
            return  # beta may be larger than the weights are small
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


def check(number, folder):
    """Checks a case; what the product refused, if it did."""
    case = Checks(number, folder)
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
