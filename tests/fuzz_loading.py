"""Random small models, saved with some wrappers, hooks, formats and dtypes, and loaded with others.

What load_state_dict makes of one file, and twa of several equal ones, must be the same to the bit.

    python tests/fuzz_loading.py --count 2000 --seed 0

A number says all of a composition: `compose(number)` makes it again.
"""

import argparse
import multiprocessing
import os
import random
import tempfile
import time
import warnings
from collections import OrderedDict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import twa
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel
from twa import averages
from twa.distributed.ranks import Ranks
from twa.distributed.sharding import Sharding
from twa.distributed.weights import exported_tensors, load_merge
from twa.io.candidate import Candidate
from twa.io.candidates import Candidates
from twa.io.key_map import match_model

WIDTH = 4


# Modules whose files are not what the module is: (as saved, as loaded) ---------------------------


class Renaming(nn.Module):
    """Was saved with other names."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.register_load_state_dict_pre_hook(self.rename)

    @staticmethod
    def rename(module, state, prefix, *_):
        for own in ("weight", "bias"):
            if f"{prefix}fc.{own}" in state:
                state[f"{prefix}proj.{own}"] = state.pop(f"{prefix}fc.{own}")


class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)


class Joining(nn.Module):
    """Was saved as three matrices, and packs them into one."""

    def __init__(self, axis=0, stacked=False):
        super().__init__()
        shape = [WIDTH, WIDTH]
        shape[axis] *= 3
        self.qkv = nn.Parameter(torch.zeros([3, WIDTH, WIDTH] if stacked else shape))
        self.axis, self.stacked = axis, stacked

    def _load_from_state_dict(self, state, prefix, *rest):
        if f"{prefix}q" in state:
            parts = [state.pop(prefix + name) for name in "qkv"]
            whole = torch.stack(parts) if self.stacked else torch.cat(parts, self.axis)
            state[f"{prefix}qkv"] = whole
        super()._load_from_state_dict(state, prefix, *rest)


class Apart(nn.Module):
    def __init__(self):
        super().__init__()
        for name in "qkv":
            setattr(self, name, nn.Parameter(torch.zeros(WIDTH, WIDTH)))


class Splitting(nn.Module):
    """Was saved as one matrix, and has two."""

    def __init__(self, axis=0):
        super().__init__()
        self.axis = axis
        self.a, self.b = (nn.Parameter(torch.zeros(WIDTH, WIDTH)) for _ in range(2))

    def _load_from_state_dict(self, state, prefix, *rest):
        if f"{prefix}ab" in state:
            both = state.pop(f"{prefix}ab").chunk(2, self.axis)
            state[f"{prefix}a"], state[f"{prefix}b"] = both
        super()._load_from_state_dict(state, prefix, *rest)


class Whole(nn.Module):
    def __init__(self, axis=0):
        super().__init__()
        shape = [WIDTH, WIDTH]
        shape[axis] *= 2
        self.ab = nn.Parameter(torch.zeros(shape))


class Transposing(nn.Module):
    """Is saved as the transpose of what it is."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(WIDTH, WIDTH + 1))
        self.register_state_dict_post_hook(self.turn)
        self.register_load_state_dict_pre_hook(self.turn)

    @staticmethod
    def turn(module, state, prefix, *_):
        if f"{prefix}kernel" in state:
            state[f"{prefix}kernel"] = state[f"{prefix}kernel"].T


class Computing(nn.Module):
    """Halves what it loads, and doubles what it saves."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(WIDTH))
        self.register_state_dict_post_hook(lambda module, *hook: self.times(2.0, *hook))
        self.register_load_state_dict_pre_hook(lambda module, *hook: self.times(0.5, *hook))

    @staticmethod
    def times(factor, state, prefix, *_):
        if f"{prefix}gain" in state:
            state[f"{prefix}gain"] = state[f"{prefix}gain"] * factor


class Looking(nn.Module):
    """Looks at numbers before it loads them."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(WIDTH))

    def _load_from_state_dict(self, state, prefix, *rest):
        if float(state[f"{prefix}scale"].abs().max()) > 2.0:
            state[f"{prefix}scale"] = state[f"{prefix}scale"].clamp(-1.0, 1.0)
        super()._load_from_state_dict(state, prefix, *rest)


class Switching(nn.Module):
    """Loads as a number beside it says, and drops the number."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(WIDTH)) for _ in range(2))

    def _load_from_state_dict(self, state, prefix, *rest):
        if f"{prefix}order" in state and int(state.pop(f"{prefix}order")):
            a, b = (state.pop(prefix + name) for name in "ab")
            state[f"{prefix}a"], state[f"{prefix}b"] = b, a
        super()._load_from_state_dict(state, prefix, *rest)


class Switched(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(WIDTH)) for _ in range(2))
        self.register_buffer("order", torch.tensor(0))


class Converting(nn.Module):
    """Loads through NumPy."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(WIDTH))

    def _load_from_state_dict(self, state, prefix, *rest):
        array = state[f"{prefix}scale"].float().numpy()
        state[f"{prefix}scale"] = torch.from_numpy(array.copy())
        super()._load_from_state_dict(state, prefix, *rest)


class Assigning(nn.Module):
    """Takes a buffer of any size as it comes."""

    def __init__(self, size=0):
        super().__init__()
        self.register_buffer("table", torch.zeros(size))

    def _load_from_state_dict(self, state, prefix, *rest):
        self.table = state[f"{prefix}table"].clone()
        super()._load_from_state_dict(state, prefix, *rest)


class Extra(nn.Module):
    """Keeps something beside its tensors."""

    def __init__(self):
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.zeros(WIDTH)), torch.zeros(2)

    def get_extra_state(self):
        return self.shift

    def set_extra_state(self, state):
        self.shift = state.clone()


class Mixed(nn.Module):
    """Tensors of many kinds."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.scalar = nn.Parameter(torch.zeros(()))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.narrow = nn.Parameter(torch.zeros(5, dtype=dtype))
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.register_buffer("mean", torch.zeros(3, dtype=dtype))
        self.register_buffer("index", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("mask", torch.zeros(4, dtype=torch.bool))
        self.register_buffer("made", torch.arange(3.0), persistent=False)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.outside = nn.Embedding(6, WIDTH), nn.Linear(WIDTH, 6, bias=False)
        self.outside.weight = self.inside.weight


def linear():
    return nn.Linear(WIDTH, WIDTH)


def modules(rng):
    """Makers of (the module as it was saved, as it is loaded)."""
    axis, dtype = rng.randrange(2), rng.choice([torch.float32, torch.bfloat16, torch.float64])

    def same(make):
        return make, make

    return rng.choice(
        [
            same(linear),
            same(lambda: nn.Conv1d(WIDTH, WIDTH, 3)),
            same(lambda: nn.BatchNorm1d(WIDTH)),
            same(lambda: nn.LayerNorm(WIDTH)),
            same(lambda: nn.MultiheadAttention(WIDTH, 2)),
            same(lambda: nn.GRU(WIDTH, WIDTH)),
            same(Transposing),
            same(Computing),
            same(Looking),
            same(Converting),
            same(Extra),
            same(Tied),
            same(lambda: Mixed(dtype)),
            (lambda: Assigning(5), Assigning),
            (Renamed, Renaming),
            (Switched, Switching),
            (Apart, lambda: Joining(axis)),
            (Apart, lambda: Joining(stacked=True)),
            (lambda: Whole(axis), lambda: Splitting(axis)),
            (linear, lambda: nn.LazyLinear(WIDTH)),
            (
                lambda: nn.utils.weight_norm(linear()),
                lambda: nn.utils.parametrizations.weight_norm(linear()),
            ),
            same(lambda: nn.utils.parametrizations.weight_norm(linear())),
        ]
    )


# Compositions ------------------------------------------------------------------------------------


class OwnWrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs)


class Group(nn.Module):
    """Named children, as the modules of a network have."""

    def __init__(self, children):
        super().__init__()
        for name, child in children:
            self.add_module(name, child)


WRAPPERS = (
    lambda m: torch.compile(m, backend="eager"),
    nn.DataParallel,
    checkpoint_wrapper,
    OwnWrapper,
)
NAMES = ("body", "head", "layers", "encoder", "fc", "block", "norm", "net", "proj")


def tree(rng, depth=0):
    """The modules of a network, as nested lists of (name, makers or another list)."""
    children = []
    for name in rng.sample(NAMES, rng.randint(1, 3)):
        deeper = depth < 2 and rng.random() < 0.35
        children.append((name, tree(rng, depth + 1) if deeper else modules(rng)))
    return children


def build(children, which):
    """The network as it was saved (which = 0) or as it is loaded (1)."""
    return Group(
        [
            (name, build(child, which) if isinstance(child, list) else child[which]())
            for name, child in children
        ]
    )


def fill(model, rng):
    """Random numbers everywhere."""
    g = torch.Generator().manual_seed(rng.getrandbits(40))
    for t in model.state_dict(keep_vars=True).values():
        with torch.no_grad():
            if t.is_floating_point():
                t.copy_(torch.randn(t.shape, generator=g) * 1.5)
            else:
                t.copy_(torch.randint(0, 2, t.shape, generator=g))


def wrap_some(model, rng, share):
    """Puts wrappers around some of the modules inside, and around the model itself."""
    for module in list(model.modules()):
        if isinstance(module, Group):
            for name, child in list(module.named_children()):
                if rng.random() < share:
                    setattr(module, name, rng.choice(WRAPPERS)(child))
    return rng.choice(WRAPPERS)(model) if rng.random() < share else model


def changed(state, rng):
    """The state_dict as other versions of PyTorch or another precision would have written it."""
    if rng.random() < 0.3:
        for key in [key for key in state if key.endswith("num_batches_tracked")]:
            del state[key]
        state._metadata = {}
    if rng.random() < 0.3:
        dtype = rng.choice([torch.float16, torch.bfloat16, torch.float64])
        for key, t in state.items():
            if t.is_floating_point():
                state[key] = t.to(dtype)
    if rng.random() < 0.3:
        for key, t in state.items():
            if t.dim() == 0 and t.is_floating_point():
                state[key] = t.reshape(1)
    return state


def compose(number):
    """(network as loaded, function that wraps it, the state that is saved, its file's layout)"""
    rng = random.Random(number)
    children = tree(rng)
    children.append(("last", (linear, linear)))  # something to train
    saved, loaded = build(children, 0), build(children, 1)
    fill(saved, rng)
    share = rng.choice([0.0, 0.2, 0.5])
    outer = wrap_some(saved, rng, share)
    if rng.random() < 0.15 and not any(hasattr(m, "weight_g") for m in saved.modules()):
        outer = AveragedModel(outer)  # which copies, as old weight_norm cannot be copied
    plain = changed(outer.state_dict(), rng)
    return children, loaded, plain, rng


def save(state, path, rng):
    """Writes the state; returns the entry under which it is."""
    if path.suffix == ".safetensors":
        save_file({key: t.contiguous().clone() for key, t in state.items()}, path)
        return None
    kind = rng.choice(["plain", "state_dict", "nested", "prefix"])
    if kind == "plain":
        torch.save(state, path)
    elif kind == "state_dict":
        torch.save({"state_dict": state, "epoch": 3}, path)
    elif kind == "nested":
        torch.save({"ema": {"shadow": state}, "optimizer": {}}, path)
        return "ema.shadow"
    else:
        flat = type(state)((f"ema_model.{key}", t) for key, t in state.items())
        flat._metadata = {
            f"ema_model.{name}".removesuffix("."): version
            for name, version in getattr(state, "_metadata", {}).items()
        }
        flat["online_model.weight"] = torch.zeros(3)
        torch.save(flat, path)
        return "ema_model"
    return None


def unwrapped(state, model):
    """The state under the names of a model without wrappers, as its own load_state_dict wants it.

    Written for the wrappers above, and for nothing else: by trying.
    """
    wanted = {name for name, _ in model.named_modules()}

    def plain(key):
        found, parts = [], key.split(".")
        for part in parts:
            here = ".".join([*found, part])
            if part in ("_orig_mod", "_checkpoint_wrapped_module", "module") and here not in wanted:
                continue
            found.append(part)
        return ".".join(found)

    out = OrderedDict((plain(k), t) for k, t in state.items() if k != "n_averaged")
    out._metadata = OrderedDict(
        (plain(k) if k else "", v) for k, v in getattr(state, "_metadata", {}).items()
    )
    return out


def check(number, folder):
    """AssertionError if twa makes something else of a composition than load_state_dict.

    Returns:
        whether load_state_dict takes it at all
    """
    children, model, state, rng = compose(number)
    reference = build(children, 1)
    try:
        reference.load_state_dict(unwrapped(state, reference))
    except RuntimeError:
        return False
    suffix = rng.choice([".pt", ".safetensors", ".ckpt"])
    if any(not isinstance(t, torch.Tensor) for t in state.values()):
        suffix = ".pt"
    n, choice = rng.choice([1, 2, 4]), rng.getrandbits(30)
    if suffix == ".safetensors":  # which keeps no versions
        reference = build(children, 1)
        plain = unwrapped(state, reference)
        del plain._metadata
        try:
            reference.load_state_dict(plain)
        except RuntimeError:
            return False
    for k in range(n):
        entry = save(state, folder / f"c{k}{suffix}", random.Random(choice))
    wrapped = wrap_some(model, rng, rng.choice([0.0, 0.2, 0.5]))
    try:
        paths = [folder / f"c{k}{suffix}" for k in range(n)]
        candidates = Candidates.of([Candidate(path, entry) for path in paths])
        matched, key_map = match_model(wrapped, candidates)
        sharding = Sharding(Ranks(), wrapped, matched, key_map)
        load_merge(sharding, averages.uniform(n))
        if rng.random() < 0.1:
            twa.Subspace.from_candidates(wrapped, candidates, bits=32)
        exported = dict(exported_tensors(sharding))
    finally:
        for k in range(n):
            (folder / f"c{k}{suffix}").unlink(missing_ok=True)
    found, expected = objects(wrapped), objects(reference)
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    for name, t in expected.items():
        if t.dtype == torch.float64 and t.requires_grad:
            torch.testing.assert_close(found[name], t, rtol=1e-6, atol=1e-6)
        else:
            assert same(found[name], t), f"composition {number}: {name}"
    again = build(children, 1)  # what is exported loads again
    again.load_state_dict(unwrapped(exported, again), strict=False)
    for name, t in objects(again).items():
        assert same(t, found[name]), f"composition {number}: {name}, exported and loaded"
    return True


def objects(model):
    """Every tensor and extra state by its place, without wrappers: by walking over the modules."""
    found = {}

    def visit(module, path):
        for part in ("_orig_mod", "_checkpoint_wrapped_module"):
            if part in module._modules:
                return visit(module._modules[part], path)
        if isinstance(module, nn.DataParallel | OwnWrapper):
            return visit(module.module, path)
        for name, t in [*module._parameters.items(), *module._buffers.items()]:
            if t is not None:
                found[f"{path}{name}"] = t
        if isinstance(module, Extra):
            found[f"{path}shift"] = module.shift
        for name, child in module._modules.items():
            visit(child, f"{path}{name}.")
        return None

    visit(model, "")
    return found


def same(a, b):
    """Whether two tensors have the same bits."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.numel():
        return True
    a, b = (t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def run(numbers):
    """Checks compositions: (how many load_state_dict takes, what went wrong by number)."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    taken, bad = 0, {}
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            try:
                taken += check(number, Path(folder))
            except Exception as error:
                bad[number] = f"{type(error).__name__}: {error}"[:300]
    return taken, bad


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    begun = time.perf_counter()
    numbers = range(args.seed, args.seed + args.count)
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(run, [numbers[k :: args.jobs] for k in range(args.jobs)]))
    seconds = time.perf_counter() - begun
    taken = sum(count for count, _ in found)
    bad = {number: what for _, some in found for number, what in some.items()}
    for number, what in sorted(bad.items()):
        print(f"composition {number}: {what}")
    print(
        f"{args.count} compositions in {seconds:.1f} s: load_state_dict takes {taken};"
        f" {len(bad)} differ"
    )
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
