"""A CUDA graph of what a function does; on a machine without a GPU, what stands for one there.

The stand-in runs the function once, and notes PyTorch's ops and the launches of the emulated
kernels with the memory that they had. A replay does both again on that memory, and nothing of what
Python did in between: a number that went through the host stays what it was.
"""

import contextlib

import torch
from conftest import ON_GPU
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import twa_kernels.capture
from twa_kernels.backends import cuda

aten = torch.ops.aten
READS_BACK = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)


class Noted(TorchDispatchMode):
    """PyTorch's ops and the launches since it was entered, in order; both are carried out."""

    def __init__(self):
        super().__init__()
        self.done = []  # of each: what does it again
        self.held = []  # a graph's memory is its own: nobody else is given it

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op in READS_BACK:
            raise RuntimeError(f"{op}: a CUDA graph cannot capture what the host reads back")
        made = op(*args, **kwargs)
        if op.namespace != "twa_kernels":  # whose launches are noted
            before = [t for t in tree_leaves(made) if isinstance(t, torch.Tensor)]

            def again():
                after = [t for t in tree_leaves(op(*args, **kwargs)) if isinstance(t, torch.Tensor)]
                for old, new in zip(before, after, strict=True):
                    if old.data_ptr() != new.data_ptr():  # no view, and not in place
                        old.copy_(new)

            self.done.append(again)
        self.held.append((args, kwargs, made))
        return made

    def launch(self, call, given):
        """Carries a launch out and notes it."""
        call(**given)
        self.done.append(lambda: call(**given))

    def replay(self):
        with torch.no_grad():
            for again in self.done:
                again()


class Watched:
    """The emulated module, whose launches are noted, and what is made for them is held."""

    def __init__(self, module, noted):
        self._module, self._noted = module, noted

    def __getattr__(self, name):
        call = getattr(self._module, name)
        if name.endswith("_cuda") or name.startswith("write_"):
            return lambda **given: self._launch(call, given)
        if name not in ("Basis", "StepWorkspace", "Tensors", "Update"):
            return call
        return lambda *given, **named: self._make(call, given, named)

    def _launch(self, call, given):
        self._noted.held.append(given)
        self._noted.launch(call, given)

    def _make(self, call, given, named):
        made = call(*given, **named)
        self._noted.held.append((given, named, made))
        return made


@contextlib.contextmanager
def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def captured(function):
    """replay() of what the function does, after its first time.

    Returns:
        replay, and what the function returned: tensors that every replay writes
    """
    if ON_GPU:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()
        graph.replay()
        return graph.replay, result
    noted = Noted()
    with (
        replaced(twa_kernels.capture, "capturing", lambda device: True),
        replaced(cuda, "module", Watched(cuda.module, noted)),
        noted,
    ):
        result = function()
    return noted.replay, result
