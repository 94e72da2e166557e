"""A file means what the model's own loading makes of it.

The mean of n candidates is computed here in float64 from what load_state_dict, or from_pretrained,
makes of each of them. `fuzz_loading` composes many more.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import fuzz_loading
import pytest
import torch
import twa
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel
from twa.io.errors import CandidateError, TwaError
from twa.io.loading import named_tensors

N = 3


def born(make, k):
    """A model with random numbers, near those of the others."""
    torch.manual_seed(k)
    model = make()
    with torch.no_grad():
        for t in model.state_dict(keep_vars=True).values():
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                t.copy_(torch.rand(t.shape) + 0.1 * k)
    return model


def saved(folder, states, suffix=".pt"):
    for k, state in enumerate(states):
        path = folder / f"c{k}{suffix}"
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    return twa.Candidates(folder / f"c*{suffix}")


def averaged(make, candidates, **options):
    model = make()
    options = {"bits": 32} | options
    return model, twa.Subspace.from_candidates(model, candidates, **options)


def means(make, states):
    """float64 means of what load_state_dict makes of each state, by the plain model's names."""
    total = {}
    for state in states:
        model = make()
        model.load_state_dict(state)
        for name, t in named_tensors(model).items():
            if t.is_floating_point():
                total[name] = total.get(name, 0) + t.detach().double() / len(states)
    return total


def check(model, expected, rtol=1e-6):
    found = named_tensors(model)
    for name, mean in expected.items():
        torch.testing.assert_close(found[name].double(), mean, rtol=rtol, atol=1e-6)


# What a module's own loading translates ----------------------------------------------------------


def old_norm():
    return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 1))


def new_norm():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 1))


def pair(old, new):
    """Networks around a module as it was saved and as it is loaded."""
    return (
        lambda: nn.Sequential(old(), nn.Linear(4, 4)),
        lambda: nn.Sequential(new(), nn.Linear(4, 4)),
    )


class Row(nn.Module):
    """Takes a row for a matrix of equal rows."""

    def __init__(self, rows):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(rows, 5))

    def _load_from_state_dict(self, state, prefix, *rest):
        state[f"{prefix}w"] = state[f"{prefix}w"].expand(self.w.shape)
        super()._load_from_state_dict(state, prefix, *rest)


TRANSLATED = {
    "weight norm": (old_norm, new_norm),
    "renamed": pair(fuzz_loading.Renamed, fuzz_loading.Renaming),
    "joined": pair(fuzz_loading.Apart, fuzz_loading.Joining),
    "joined along 1": pair(fuzz_loading.Apart, lambda: fuzz_loading.Joining(1)),
    "stacked": pair(fuzz_loading.Apart, lambda: fuzz_loading.Joining(stacked=True)),
    "split": pair(fuzz_loading.Whole, fuzz_loading.Splitting),
    "split along 1": pair(lambda: fuzz_loading.Whole(1), lambda: fuzz_loading.Splitting(1)),
    "transposed": pair(fuzz_loading.Transposing, fuzz_loading.Transposing),
    "expanded": pair(lambda: Row(1), lambda: Row(4)),
    "computed": pair(fuzz_loading.Computing, fuzz_loading.Computing),
    "looked at": pair(fuzz_loading.Looking, fuzz_loading.Looking),
    "through NumPy": pair(fuzz_loading.Converting, fuzz_loading.Converting),
    "assigned": pair(lambda: fuzz_loading.Assigning(5), fuzz_loading.Assigning),
    "lazy": pair(lambda: nn.Conv1d(4, 4, 3), lambda: nn.LazyConv1d(4, 3)),
    "lazy norm": pair(lambda: nn.BatchNorm1d(4), nn.LazyBatchNorm1d),
}


@pytest.mark.parametrize("kind", TRANSLATED)
@pytest.mark.parametrize("bits", [32, 8])
def test_modules_translate_what_they_load(tmp_path, kind, bits):
    old, new = TRANSLATED[kind]
    states = [born(old, k).state_dict() for k in range(N)]
    model, subspace = averaged(new, saved(tmp_path, states), bits=bits)
    check(model, means(new, states))
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in subspace.parameters} == trainable
    # What is exported loads as the candidates did, and is the model, also from a packed basis.
    folders = [tmp_path / "out"]
    subspace.save(tmp_path / "out", basis=bits < 32)
    if bits < 32:
        other = new()
        other.load_state_dict(states[0])
        twa.Subspace.load(tmp_path / "out", other).save(tmp_path / "again")
        folders.append(tmp_path / "again")
    for folder in folders:
        again = new()
        again.load_state_dict(load_file(folder / "averaged.safetensors"))
        check(again, {n: t.double() for n, t in named_tensors(model).items()}, rtol=0)
    if kind in ("joined", "stacked", "joined along 1", "split", "transposed"):  # as in the files
        exported = load_file(tmp_path / "out" / "averaged.safetensors")
        assert {k: t.shape for k, t in exported.items()} == {
            k: t.shape for k, t in states[0].items()
        }
        fresh = old()
        fresh.load_state_dict(exported)
        for key, t in fresh.state_dict().items():
            mean = sum(s[key].double() for s in states) / N
            torch.testing.assert_close(t.double(), mean, rtol=1e-6, atol=1e-6)


def test_files_are_loaded_one_by_one_where_numbers_decide(tmp_path):
    """Each file says in a number of its own, which is dropped, how it is to be loaded."""
    old, new = pair(fuzz_loading.Switched, fuzz_loading.Switching)
    states = [born(old, k).state_dict() | {"0.order": torch.tensor(k % 2)} for k in range(N)]
    model, _ = averaged(new, saved(tmp_path, states))
    check(model, means(new, states))


def test_joined_tensors_train(tmp_path):
    old, new = TRANSLATED["joined"]
    states = [born(old, k).state_dict() for k in range(N)]
    model, subspace = averaged(new, saved(tmp_path, states), bits=32)
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.05)
    model[0].qkv.square().sum().backward()
    optimizer.step()
    beta = dict(zip(subspace.key_map.trained, subspace.merge_weights().T.tolist(), strict=True))[
        "0.qkv"
    ]
    for begin, name in enumerate("qkv"):
        expected = sum(b * s[f"0.{name}"].double() for b, s in zip(beta, states, strict=True))
        found = model[0].qkv[begin * 4 : begin * 4 + 4]
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def batchnorms():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4))


@pytest.mark.parametrize("without", [range(N), [0], [1, 2]])
def test_files_without_counters_of_batchnorm(tmp_path, without):
    """From before PyTorch 0.4.1: all of them, or some of a heap."""
    states = []
    for k in range(N):
        state = born(batchnorms, k).state_dict()
        if k in without:
            state = {key: t for key, t in state.items() if "tracked" not in key}
        states.append(state)
    model, _ = averaged(batchnorms, saved(tmp_path, states))
    check(model, means(batchnorms, states))


def test_a_counter_that_a_new_file_lacks_is_missing(tmp_path):
    """Its _metadata say that it should be there: load_state_dict refuses it, too."""
    states = [born(batchnorms, k).state_dict() for k in range(N)]
    for state in states:
        del state["1.num_batches_tracked"]
    with pytest.raises(RuntimeError):
        batchnorms().load_state_dict(states[0])
    with pytest.raises(CandidateError, match=r"tensor '1\.num_batches_tracked'"):
        averaged(batchnorms, saved(tmp_path, states))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(2, 2), nn.Parameter(torch.zeros(()))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("table", torch.arange(3.0), persistent=False)


OTHERWISE = {
    "[1] for a number": lambda s: s.update(scale=s["scale"].reshape(1)),
    "uint8 for bool": lambda s: s.update(mask=s["mask"].to(torch.uint8)),
    "a counter that was averaged": lambda s: s.update(count=torch.tensor(3.0)),
    "a buffer that the model makes": lambda s: s.update(table=torch.arange(3.0)),
    "half precision": lambda s: s.update({"linear.weight": s["linear.weight"].half()}),
}


@pytest.mark.parametrize("kind", OTHERWISE)
@pytest.mark.parametrize("every", [True, False])
def test_tensors_that_are_saved_otherwise(tmp_path, kind, every):
    states = [dict(born(Scale, k).state_dict()) for k in range(N)]
    for state in states if every else states[1:]:
        OTHERWISE[kind](state)
    model, subspace = averaged(Scale, saved(tmp_path, states))
    plain = [{k: t for k, t in state.items() if k != "table"} for state in states]
    check(model, means(Scale, plain))
    if kind == "a counter that was averaged":
        assert int(model.count) == 3
    subspace.save(tmp_path / "out")
    Scale().load_state_dict(load_file(tmp_path / "out" / "averaged.safetensors"))


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, nn.DataParallel])
def test_a_buffer_that_the_model_makes_inside_a_wrapper(tmp_path, wrap):
    states = []
    for k in range(N):
        inner = born(Scale, k).state_dict() | {"table": torch.arange(3.0)}
        states.append({f"0.{key}": t for key, t in inner.items()})
    model, _ = averaged(lambda: nn.Sequential(wrap(Scale())), saved(tmp_path, states))
    plain = [{k: t for k, t in state.items() if k != "0.table"} for state in states]
    check(model, means(lambda: nn.Sequential(Scale()), plain))


def test_a_buffer_that_the_model_makes_otherwise_is_refused(tmp_path):
    states = [dict(born(Scale, k).state_dict()) | {"table": torch.ones(3)} for k in range(N)]
    with pytest.raises(CandidateError, match=r"'table' is unexpected .* left out with ignore"):
        averaged(Scale, saved(tmp_path, states))
    candidates = twa.Candidates(tmp_path / "c*.pt", ignore=["tab*"])
    model, _ = averaged(Scale, candidates)
    assert model.table.tolist() == [0, 1, 2]


# Wrappers ----------------------------------------------------------------------------------------


class Net(nn.Module):
    """A network with a part that may be wrapped."""

    def __init__(self, wrap=lambda m: m):
        super().__init__()
        self.model = wrap(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
        self.head = nn.Linear(2, 1)

    def forward(self, x):
        return self.head(self.model(x))


def compiled(module):
    return torch.compile(module, backend="eager")


WRAPPERS = {
    "none": lambda m: m,
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "checkpointed": checkpoint_wrapper,
    "several": lambda m: compiled(nn.DataParallel(checkpoint_wrapper(m))),
    "own": fuzz_loading.OwnWrapper,
}
PARTS = ("", "_orig_mod.", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("part", [*PARTS, "_orig_mod.module._checkpoint_wrapped_module."])
def test_wrappers_inside(tmp_path, wrapper, part):
    plain = [born(Net, k).state_dict() for k in range(N)]
    states = [{k.replace("model.", f"model.{part}"): t for k, t in s.items()} for s in plain]
    model, subspace = averaged(lambda: Net(WRAPPERS[wrapper]), saved(tmp_path, states))
    check(model, means(Net, plain))
    assert {id(p) for p in subspace.parameters} == {id(p) for p in model.parameters()}
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.1)
    before = [p.clone() for p in model.parameters()]
    model.model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before[0], next(iter(model.parameters())))
    subspace.save(tmp_path / "out")
    exported = load_file(tmp_path / "out" / "averaged.safetensors")
    # with the wrapper that file and model have in common, or with none
    assert exported.keys() in (
        plain[0].keys(),
        {k.replace("model.", "model.module.") for k in plain[0]},
    )
    if wrapper not in ("DataParallel", "several", "own"):
        assert exported.keys() == plain[0].keys()


def test_every_block_checkpointed_and_one_basis_for_both(tmp_path):
    """Names do not depend on wrappers: a basis packed for one loads into the other."""

    def make(wrap=lambda m: m):
        return nn.Sequential(*(wrap(nn.Linear(3, 3)) for _ in range(3)))

    candidates = saved(tmp_path, [born(make, k).state_dict() for k in range(N)])
    wrapped, subspace = averaged(lambda: make(checkpoint_wrapper), candidates, bits=4)
    subspace.save(tmp_path / "out", basis=True)
    plain = make()
    other = twa.Subspace.load(tmp_path / "out", plain, candidates)
    assert other.segments.labels == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "2.weight",
        "2.bias",
    ]
    for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("inner", [lambda m: m, compiled])
def test_files_of_averaged_models(tmp_path, inner):
    """torch.optim.swa_utils.AveragedModel: `module.` before every key but its own counter."""
    plain = [born(Net, k) for k in range(N)]
    states = [AveragedModel(inner(m)).state_dict() for m in plain]
    assert "n_averaged" in states[0]
    candidates = saved(tmp_path, states)
    model, subspace = averaged(Net, candidates)
    check(model, means(Net, [m.state_dict() for m in plain]))
    subspace.save(tmp_path / "out")
    Net().load_state_dict(load_file(tmp_path / "out" / "averaged.safetensors"))
    # and into a model that is one itself
    model, subspace = averaged(lambda: AveragedModel(Net()), candidates)
    check(model.module, means(Net, [m.state_dict() for m in plain]))
    subspace.save(tmp_path / "of one")
    Net().load_state_dict(load_file(tmp_path / "of one" / "averaged.safetensors"))


def test_two_names_for_one_tensor_are_refused(tmp_path):
    state = born(Net, 0).state_dict()
    state["model._orig_mod.0.bias"] = state["model.0.bias"] + 1
    with pytest.raises(CandidateError, match=r"'model\.(_orig_mod\.)?0\.bias'"):
        averaged(Net, saved(tmp_path, [state]))


# Beside the tensors ------------------------------------------------------------------------------


class Shifted(nn.Module):
    """Keeps something that its forward uses, as TransformerEngine's scales."""

    def __init__(self, plain=False):
        super().__init__()
        self.linear, self.shift, self.plain = nn.Linear(2, 1), 0.0, plain

    def get_extra_state(self):
        return {"shift": self.shift, "of": [1, "x"]} if self.plain else torch.tensor(self.shift)

    def set_extra_state(self, state):
        self.shift = float(state["shift"] if self.plain else state)


def shifted(plain, shifts):
    states = []
    for k, shift in enumerate(shifts):
        model = born(lambda: nn.Sequential(Shifted(plain), nn.Linear(1, 1)), k)
        model[0].shift = shift
        states.append(model.state_dict())
    return states


@pytest.mark.parametrize("plain", [False, True])
def test_extra_state_travels(tmp_path, plain):
    candidates = saved(tmp_path, shifted(plain, [5.0] * N))
    model, subspace = averaged(lambda: nn.Sequential(Shifted(plain), nn.Linear(1, 1)), candidates)
    assert model[0].shift == 5.0
    if plain:  # which no safetensors file can hold
        with pytest.warns(UserWarning, match="'0._extra_state'"):
            subspace.save(tmp_path / "out")
    else:
        subspace.save(tmp_path / "out")
        exported = load_file(tmp_path / "out" / "averaged.safetensors")
        again = nn.Sequential(Shifted(plain), nn.Linear(1, 1))
        again.load_state_dict(exported)
        assert again[0].shift == 5.0


@pytest.mark.parametrize("plain", [False, True])
def test_extra_state_that_differs_is_refused(tmp_path, plain):
    candidates = saved(tmp_path, shifted(plain, [5.0, 5.0, 6.0]))
    with pytest.raises(CandidateError, match=r"c2\.pt: '0\._extra_state', the extra state"):
        averaged(lambda: nn.Sequential(Shifted(plain), nn.Linear(1, 1)), candidates)


def test_a_basis_says_that_it_has_no_extra_state(tmp_path):
    candidates = saved(tmp_path, shifted(False, [5.0] * N))

    def make():
        return nn.Sequential(Shifted(), nn.Linear(1, 1))

    _, subspace = averaged(make, candidates, bits=8)
    subspace.save(tmp_path / "out", basis=True)
    with pytest.warns(UserWarning, match="'0._extra_state' .*pass candidates"):
        twa.Subspace.load(tmp_path / "out", make())
    model = make()
    twa.Subspace.load(tmp_path / "out", model, candidates)
    assert model[0].shift == 5.0


class Forgetful(nn.Module):
    """Its state_dict is not what it has loaded."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_state_dict_post_hook(self.change)

    @staticmethod
    def change(module, state, prefix, *_):
        state[f"{prefix}weight"] = state[f"{prefix}weight"] + 1.0


def test_a_state_dict_that_did_not_take_the_weights_is_refused(tmp_path):
    states = [{"weight": torch.randn(3)} for _ in range(N)]
    with pytest.raises(TwaError, match=r"its state_dict\(\) has another value of 'weight'"):
        averaged(Forgetful, saved(tmp_path, states))


def test_a_trainable_parameter_that_no_file_holds_is_refused(tmp_path):
    class Dropping(nn.Module):
        """Hides a parameter when it is saved and loaded."""

        def __init__(self):
            super().__init__()
            self.linear, self.secret = nn.Linear(2, 2), nn.Parameter(torch.zeros(1))
            self.register_state_dict_post_hook(lambda m, state, *_: state.__delitem__("secret"))

        def _load_from_state_dict(self, state, prefix, metadata, strict, missing, *rest):
            super()._load_from_state_dict(state, prefix, metadata, strict, missing, *rest)
            missing.remove(f"{prefix}secret")

    states = [nn.Sequential(nn.Linear(2, 2)).state_dict() for _ in range(N)]
    states = [{k.replace("0.", "linear."): t for k, t in s.items()} for s in states]
    model = Dropping()
    with pytest.raises(CandidateError, match=r"'secret' .*freeze it"):
        twa.Subspace.from_candidates(model, saved(tmp_path, states))


class Own(nn.Module):
    """Has a load_state_dict of its own, which returns nothing and knows no `strict`."""

    def __init__(self):
        super().__init__()
        self.net = Net()
        self.net.head.requires_grad_(False)

    def load_state_dict(self, state):
        state = {key: t for key, t in state.items() if not key.startswith("unused")}
        self.net.load_state_dict(state, strict=False)


def test_a_load_state_dict_of_the_models_own(tmp_path):
    plain = [born(Net, k).state_dict() for k in range(N)]
    states = [s | {"unused.weight": torch.zeros(1)} for s in plain]
    model, _ = averaged(Own, saved(tmp_path, states))
    check(model.net, means(Net, plain))
    without = [{k: t for k, t in s.items() if not k.startswith("head")} for s in states]
    with pytest.raises(CandidateError, match=r"'net\.head\.bias' of the model is missing"):
        averaged(Own, saved(tmp_path, without))


def after(hook):
    """A network whose first layer does something of its own after it is loaded."""

    class After(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.frozen = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
            self.frozen.requires_grad_(False)
            self.register_buffer("made", torch.zeros(4))
            self.register_buffer("kept", torch.zeros(4), persistent=False)
            self.register_load_state_dict_post_hook(self.then)

        @staticmethod
        def then(module, keys):
            hook(module)

    return lambda: nn.Sequential(After(), nn.Linear(4, 4))


def no_grad(action):
    return torch.no_grad()(action)


AFTER = {
    "abs": no_grad(lambda m: m.w.neg_().abs_()),
    "data": lambda m: setattr(m.w, "data", m.w.data * 2),
    "new parameter": lambda m: setattr(m, "w", nn.Parameter(m.w.detach() * 3)),
    "norm": no_grad(lambda m: m.w.copy_(m.w / m.w.norm())),
    "buffer": no_grad(lambda m: m.made.copy_(m.w * 2)),
    "slice": no_grad(lambda m: m.w.__setitem__(slice(2), m.w[2:])),
    "foreach": no_grad(lambda m: torch._foreach_mul_([m.w, m.frozen], 2.0)),
}


@pytest.mark.parametrize("kind", AFTER)
@pytest.mark.filterwarnings("ignore::twa.CandidateWarning")
def test_what_is_done_with_weights_after_they_are_loaded(tmp_path, kind):
    make = after(AFTER[kind])
    states = [born(make, k).state_dict() for k in range(N)]
    model, subspace = averaged(make, saved(tmp_path, states))
    expected = means(make, states)
    expected.pop("0.kept")
    check(model, expected)
    assert {id(p) for p in subspace.parameters} == {id(p) for p in model.parameters()} - {
        id(model[0].frozen)
    }


def test_a_buffer_that_nobody_saves_is_set_or_refused(tmp_path):
    make = after(no_grad(lambda m: m.kept.fill_(7.0)))
    candidates = saved(tmp_path, [born(make, k).state_dict() for k in range(N)])
    model, subspace = averaged(make, candidates)
    assert model[0].kept.eq(7.0).all()
    subspace.save(tmp_path / "out")
    make().load_state_dict(load_file(tmp_path / "out" / "averaged.safetensors"))
    make = after(no_grad(lambda m: m.kept.copy_(m.w)))
    with pytest.raises(CandidateError, match=r"c1\.pt: buffer '0\.kept' of the model is not saved"):
        averaged(make, candidates)


class Versioned(nn.Module):
    """Was saved as the transpose, once."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3))

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if (metadata.get("version") or 1) < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"].T
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Flipping(nn.Module):
    """Changes a tensor each time it is loaded."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3))
        self.register_load_state_dict_pre_hook(
            lambda module, state, prefix, *_: state.update(
                {f"{prefix}weight": state[f"{prefix}weight"].flip(0)}
            )
        )


@pytest.mark.parametrize("kind", [Versioned, Flipping])
def test_an_export_that_loads_as_another_model_is_named(tmp_path, kind):
    """The versions of modules, which files of torch.save have, and what is no translation."""
    states = [born(kind, k).state_dict() for k in range(N)]
    model, subspace = averaged(kind, saved(tmp_path, states))
    check(model, means(kind, states))
    with pytest.warns(twa.CandidateWarning, match="loaded again, 'weight' .* is another tensor"):
        subspace.save(tmp_path / "out")


def test_ways_to_load_that_are_not_copying(tmp_path):
    class Assigned(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def load_state_dict(self, state, strict=True):
            for name, p in self.named_parameters():
                if name.startswith("a"):
                    p.data = state[name]
                else:
                    p.data[:] = state[name]

    states = [born(Assigned, k).state_dict() for k in range(N)]
    model, _ = averaged(Assigned, saved(tmp_path, states))
    for name, p in model.named_parameters():
        mean = sum(s[name].double() for s in states) / N
        torch.testing.assert_close(p.double(), mean, rtol=1e-6, atol=1e-6)


def test_lazy_modules_and_a_basis(tmp_path):
    old, new = TRANSLATED["lazy"]
    states = [born(old, k).state_dict() for k in range(N)]
    _, subspace = averaged(new, saved(tmp_path, states), bits=8)
    subspace.save(tmp_path / "out", basis=True)
    with pytest.raises(twa.BasisError, match="no shape yet: run a batch"):
        twa.Subspace.load(tmp_path / "out", new())


# Which of a file's tensors -----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_prefix_of_keys_is_an_entry(tmp_path, suffix):
    """ema-pytorch's ema_model.* beside online_model.*, a detector's backbone.*."""
    plain = [born(Net, k).state_dict() for k in range(N)]
    states = [
        {f"online_model.{n}": t + 1 for n, t in s.items()}
        | {f"ema_model.{n}": t.clone() for n, t in s.items()}
        | {"initted": torch.tensor(True)}
        for s in plain
    ]
    saved(tmp_path, states, suffix)
    model, _ = averaged(Net, twa.Candidates(tmp_path / f"c*{suffix}", entry="ema_model"))
    check(model, means(Net, plain))
    with pytest.raises(CandidateError, match=r"under 'shadow'.*ema_model, online_model"):
        twa.Candidates(tmp_path / f"c*{suffix}", entry="shadow")


def test_prefixes_of_lightning(tmp_path):
    plain = [born(Net, k).state_dict() for k in range(N)]
    states = [
        {"state_dict": {f"net.{n}": t for n, t in s.items()} | {"loss.weight": torch.ones(2)}}
        for s in plain
    ]
    candidates = saved(tmp_path, states)
    with pytest.raises(CandidateError, match="all of its tensors are there under 'net': pass that"):
        averaged(Net, candidates)
    for entry in ("net", "state_dict.net"):
        model, _ = averaged(Net, twa.Candidates(tmp_path / "c*.pt", entry=entry))
        check(model, means(Net, plain))


def test_ignored_tensors(tmp_path):
    plain = [born(Net, k).state_dict() for k in range(N)]
    states = [s | {"loss.weight": torch.ones(2), "loss.bias": torch.ones(1)} for s in plain]
    saved(tmp_path, states)
    model, subspace = averaged(Net, twa.Candidates(tmp_path / "c*.pt", ignore=["loss.*"]))
    check(model, means(Net, plain))
    subspace.save(tmp_path / "out")
    assert load_file(tmp_path / "out" / "averaged.safetensors").keys() == plain[0].keys()
    candidates = twa.Candidates(tmp_path / "c*.pt", ignore=["loss.*", "head.*"])
    with pytest.raises(CandidateError, match=r"'head\.weight' .*freeze it"):
        averaged(Net, candidates)
    model = Net()
    model.head.requires_grad_(False)
    kept = model.head.weight.clone()
    twa.Subspace.from_candidates(model, candidates)
    assert torch.equal(model.head.weight, kept)
    with pytest.raises(CandidateError, match="found all ignored"):
        twa.Candidates(tmp_path / "c*.pt", ignore=["*"])


# transformers ------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")
SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def config(kind, **options):
    return getattr(transformers, f"{kind}Config")(**SMALL | options)


GPT2 = dict(n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
EXPERTS = dict(num_key_value_heads=2, num_experts_per_tok=2)
MODELS = {
    "packed experts": (
        "MixtralForCausalLM",
        None,
        config("Mixtral", num_local_experts=4, **EXPERTS),
    ),
    "other experts": (
        "Qwen3MoeForCausalLM",
        None,
        config("Qwen3Moe", num_experts=4, moe_intermediate_size=16, head_dim=8, **EXPERTS),
    ),
    "tied": (
        "LlamaForCausalLM",
        None,
        config("Llama", tie_word_embeddings=True, num_key_value_heads=2),
    ),
    "base into head": ("GPT2LMHeadModel", "GPT2Model", config("GPT2", **GPT2)),
    "head into base": ("GPT2Model", "GPT2LMHeadModel", config("GPT2", **GPT2)),
}


@pytest.fixture
def quiet():
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(level)


@pytest.mark.parametrize("kind", MODELS)
def test_directories_mean_what_from_pretrained_makes_of_them(tmp_path, quiet, kind):
    name, saved_as, of = MODELS[kind]
    loaded, made = getattr(transformers, name), getattr(transformers, saved_as or name)
    total = {}
    for k in range(N):
        born(lambda: made(of), k).save_pretrained(tmp_path / f"c{k}")
        for key, t in loaded.from_pretrained(tmp_path / f"c{k}").state_dict().items():
            if t.is_floating_point():
                total[key] = total.get(key, 0) + t.double() / N
    model, subspace = averaged(lambda: loaded(of), twa.Candidates(tmp_path / "c*"))
    for key, mean in total.items():
        torch.testing.assert_close(model.state_dict()[key].double(), mean, rtol=1e-6, atol=1e-6)
    assert {id(p) for p in subspace.parameters} == {id(p) for p in model.parameters()}
    subspace.save(tmp_path / "out")
    exported = load_file(tmp_path / "out" / "averaged.safetensors")
    first = load_file(tmp_path / "c0" / "model.safetensors")
    assert {k: t.shape for k, t in exported.items()} == {k: t.shape for k, t in first.items()}
    again = loaded.from_pretrained(tmp_path / "out" / "averaged").state_dict()
    for key, t in model.state_dict().items():
        assert torch.equal(t, again[key]), key


def test_old_names_and_buffers_of_bert(tmp_path, quiet):
    """LayerNorm.gamma and position_ids, as files of 2019 have them."""
    of = config("Bert", max_position_embeddings=16)
    total = {}
    for k in range(N):
        folder = tmp_path / f"c{k}"
        folder.mkdir()
        of.save_pretrained(folder)
        state = born(lambda: transformers.BertModel(of), k).state_dict()
        for key, t in state.items():
            total[key] = total.get(key, 0) + t.double() / N
        old = {
            key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): t
            for key, t in state.items()
        }
        old["embeddings.position_ids"] = torch.arange(16)[None]
        save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    model, subspace = averaged(lambda: transformers.BertModel(of), twa.Candidates(tmp_path / "c*"))
    check(model, total)
    subspace.save(tmp_path / "out")
    again = transformers.BertModel.from_pretrained(tmp_path / "out" / "averaged").state_dict()
    for key, mean in total.items():
        torch.testing.assert_close(again[key].double(), mean, rtol=1e-6, atol=1e-6)


def test_what_from_pretrained_warns_of_is_refused_by_name(tmp_path, quiet):
    of = config("Bert", max_position_embeddings=16)
    for k in range(2):
        born(lambda: transformers.BertModel(of), k).save_pretrained(tmp_path / f"base{k}")
        head = born(lambda: transformers.BertForSequenceClassification(of), k)
        head.save_pretrained(tmp_path / f"head{k}")
    with pytest.raises(CandidateError, match=r"'classifier\.bias' of the model is missing"):
        averaged(
            lambda: transformers.BertForSequenceClassification(of),
            twa.Candidates(tmp_path / "base*"),
        )
    with pytest.raises(CandidateError, match=r"'classifier\.bias' is unexpected"):
        averaged(lambda: transformers.BertModel(of), twa.Candidates(tmp_path / "head*"))
    candidates = twa.Candidates(tmp_path / "head*", ignore=["classifier.*"])
    averaged(lambda: transformers.BertModel(of), candidates)


# Compositions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", range(0, 200, 25))
def test_compositions(tmp_path, start):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        taken = sum(fuzz_loading.check(k, tmp_path) for k in range(start, start + 25))
    assert taken >= 20  # most are taken by load_state_dict, too


@pytest.mark.exhaustive
def test_many_compositions():
    script = Path(fuzz_loading.__file__)
    environment = os.environ | {"PYTHONPATH": str(script.parent)}
    command = [sys.executable, str(script), "--count", "2000", "--seed", "1000"]
    subprocess.run(command, check=True, env=environment)
