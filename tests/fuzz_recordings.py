"""What `fuzz_results` checks of recordings: codes in files, decoded snapshots, averages of them."""

from __future__ import annotations

import json

import torch
import twa
from bounds import gamma
from drawn import Case, state_of
from exact import (
    F32,
    F64,
    TINY,
    check_average,
    check_codes,
    mean_of,
    near,
    rounded,
    tiles_of,
    unpacked,
    weights_of_steps,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn


class Recordings(Case):
    """A recorder of the model of a case."""

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
            tensors = zip(ends[:-1], now, strict=True)
            rows.append([flat[a:].flatten()[: t.numel()] for a, t in tensors])
            before, pairs = now, zip(now, rows[-1], strict=True)
            now = [(t.reshape(-1) + d).view(t.shape) for t, d in pairs]
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
