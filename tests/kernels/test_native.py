"""How the native module sees tensors: by DLPack's C functions, or by their Python methods."""

import types
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import twa_kernels as tk
from twa_kernels import native
from twa_kernels.backends import handles
from twa_kernels.backends.tensors import Recent

pytestmark = pytest.mark.skipif(native._C is None, reason="the native module is not built")
CPU = torch.device("cpu")


class Other(torch.Tensor):
    """A tensor of another type than torch's own, which is asked by its methods."""


def as_other(t):
    return t.as_subclass(Other)


def several():
    base = torch.randn(6, 10)
    return [
        base,
        base[1],  # contiguous, with an offset
        base[:, 1],  # with gaps
        base.T,
        base[:1].T,  # one column: contiguous, whatever its strides
        torch.randn(7).bfloat16(),
        torch.randn(3, 2).half(),
        torch.empty(0),
        torch.tensor(2.0),
        torch.nn.Parameter(torch.randn(5)),
    ]


def test_both_ways_of_asking_agree():
    tensors = several()
    others = [as_other(t.detach()) for t in tensors]
    ours, theirs = native._C.Tensors(tensors), native._C.Tensors(others)
    odd = [k for k, t in enumerate(tensors) if not t.is_contiguous()]
    assert odd == [2, 3] and ours.odd == theirs.odd == odd
    assert ours.key == theirs.key and len(ours) == len(tensors)
    sizes = tuple(t.numel() for t in tensors)
    assert native.are_usual(tensors, sizes, CPU)
    assert not native.are_usual(tensors, (*sizes[:-1], 6), CPU)
    assert not native.are_usual(others, sizes, CPU)  # Python looks at these
    basis = tk.pack([torch.randn(2, t.numel()) for t in tensors], 4)
    assert basis.takes(tensors) and basis.takes(others)


def test_the_key_tells_addresses_and_dtypes_apart():
    t = torch.randn(8)
    keys = {native._C.Tensors([v]).key for v in (t, t[1:], t[:4].view(torch.float32), t.clone())}
    assert len(keys) == 3  # t and its first half begin together
    half = torch.zeros(8, dtype=torch.bfloat16)
    assert native._C.Tensors([half]).key != native._C.Tensors([half.view(torch.float16)]).key


def test_what_is_not_usual():
    sparse = torch.eye(4).to_sparse()
    for t in (sparse, torch.zeros(16, dtype=torch.float64), torch.zeros(16, device="meta")):
        assert not native.are_usual([t], (16,), CPU)
    assert not native.are_usual([torch.zeros(3)], (3, 3), CPU)
    assert not native.are_usual([torch.zeros(3)], (3,), torch.device("cuda", 0))
    assert not native.are_usual([torch.empty(0)], (3,), CPU)
    assert native.are_usual([torch.empty(0)], (3,), CPU, absent=True)
    with pytest.raises(TypeError, match="expected float32, bfloat16 or float16 tensors"):
        native._C.Tensors([torch.zeros(3, dtype=torch.int64)])


def test_a_basis_says_what_kernels_take():
    basis = tk.pack([torch.randn(2, 5), torch.randn(2, 3)], 4)
    assert basis.takes([torch.zeros(5), torch.zeros(3)])
    assert basis.takes([torch.zeros(5).half(), torch.empty(0)])
    assert not basis.takes([torch.zeros(5), torch.zeros(3, dtype=torch.float64)])
    assert not basis.takes([torch.zeros(5)])


def test_an_ops_tensors_are_looked_at_once():
    tensors = [torch.zeros(3), torch.zeros(5).half()]
    listed = native.Listed(tensors)
    assert listed == tensors and listed.found is listed.found
    assert native.made_of(listed, native._C) is listed.found
    assert native.made_of(tensors, native._C) is not listed.found
    other = types.SimpleNamespace(Tensors=lambda given: (given, "of another module"))
    assert native.made_of(listed, other)[1] == "of another module"
    assert native.are_usual(listed, (3, 5), CPU) and not native.are_usual(listed, (3, 6), CPU)
    assert native.first_shared(listed) is None
    assert native.first_shared(native.Listed([tensors[0], tensors[0][1:]])) == (0, 1)
    for odd in (as_other(torch.zeros(3)), torch.zeros(3, dtype=torch.int64)):
        assert native.Listed([torch.zeros(3), odd]).found is None
    alive = weakref.ref(tensors[0])
    del tensors, listed
    assert alive() is None  # no cycle, which Python would not see


@pytest.mark.parametrize("built", [True, False])
def test_shared_memory_is_found(built, monkeypatch):
    if not built:
        monkeypatch.setattr(native, "_C", None)
    base = torch.zeros(20)
    assert native.first_shared([base[:10], torch.empty(0), base[10:]]) is None
    assert sorted(native.first_shared([base[:10], torch.zeros(4), base[9:]])) == [0, 2]


def test_recent_tables_are_few_by_their_tensors():
    """Not by their number: a loop over single tensors has as many tables as tensors."""
    recent, made = Recent(most=10), []

    def table(key, size):
        def make():
            made.append(key)
            return torch.zeros(size)

        return recent.get(key, size, make)

    for _ in range(2):
        for key in range(8):
            table(key, 1)
    assert made == list(range(8))
    table("many", 9)  # the oldest ones go
    table(7, 1)
    table(0, 1)
    assert made == [*range(8), "many", 0]
    table("more than there is room for", 100)
    table("more than there is room for", 100)
    assert made[-1] != made[-2]


def test_an_absent_tensor_is_a_gradient_or_refused():
    basis, empty = tk.pack([torch.randn(2, 300)], 4), native._C.Tensors([torch.empty(0)])
    whole, x = native._C.Tensors([torch.zeros(300)]), torch.zeros(2, 1)
    handle = handles.basis_handle(basis.view, native._C)
    native._C.project(basis=handle, grads=empty, c=x, threads=1)
    for center, out in ((empty, whole), (None, empty)):
        with pytest.raises(ValueError, match="expected 300 elements, found 0"):
            native._C.reconstruct(basis=handle, x=x, center=center, out=out, threads=1)


def test_a_lazily_negated_x_is_refused_before_anything_changes():
    basis, out, state = tk.pack([torch.randn(2, 300)], 4), torch.ones(300), {}
    x = torch._neg_view(torch.ones(2, 1))
    with pytest.raises(ValueError, match="x: expected a tensor to update in place"):
        tk.step(basis, torch.ones(300), x, out, rule="sgd", options={}, state=state)
    assert (out == 1).all() and not state


def test_fake_tensors_are_not_asked_for_addresses(recwarn):
    operands = tk.pack([torch.randn(2, 300)], 4).operands
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in operands]
        c = torch.ops.twa_kernels.project(*fake, [torch.empty(300)], "")
    assert c.shape == (2, 1) and not [w for w in recwarn if "data pointer" in str(w.message)]
