"""Shared shapes and data. Sizes sit around the tile of 128 columns; values are never all zero."""

import os
import signal
import sys

# Read when torch is imported. Several test processes share the cores: a thread that waits for
# the others of its own process must not keep those of another from their turn.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import processes
import pytest
import ranks as pool
import torch

if not torch.cuda.is_available():  # GPU kernels then run in Triton's interpreter
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    import interpreter

    interpreter.install()

# as in a script's background; children would ignore Ctrl-C, too
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import twa_kernels as tk
import twa_kernels.capture
from twa_kernels import native, registry

BITS = (8, 4, 3, 2, 1)
#: tensors of one model: single elements, odd sizes, tile - 1, tile, tile + 1, a block of 64 tiles +
#: 1 and a 0-d tensor
SHAPES = [(1,), (127,), (128,), (129,), (151,), (9, 126), (64 * 128 + 1,), (), (33, 100)]
SEGMENTS = [0, 1, 1, 2, 0, 3, 3, 4, 2]


# First, so that of two processes neither is left with one of them at the end. The first uses all
# cores, the second mostly waits.
LONGEST = ("test_compile.py", "test_gpu_check.py", "test_resume.py")


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)
        )
    )


@pytest.fixture(autouse=True)
def same_numbers():
    """A test that fails does so again when it runs alone."""
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    """So does a fixture that several tests share, whichever of them is the first."""
    if fixturedef.scope == "function":
        return (yield)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return (yield)


@pytest.fixture(scope="module")
def ranks():
    """Processes of one gloo job, see `ranks.Ranks`."""
    made = pool.Ranks()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def one_thread():
    """For models so small that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_process_stays():
    """What a test started and did not wait for ends with it."""
    before = set(processes.RUNNING)
    yield
    processes.end(*processes.RUNNING - before)


def exhaustive(*values):
    """Parameters for `make test-all`: of a kind that others already are, and slow."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def tensors(shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def rows_of(n, shapes, seed=0, dtype=torch.float32):
    return [
        torch.stack(list(t))
        for t in zip(*(tensors(shapes, seed + 1 + i, dtype) for i in range(n)), strict=True)
    ]


@pytest.fixture(scope="session")
def basis_of():
    """basis_of(n, bits): a packed basis of SHAPES with several segments, built once."""
    made = {}

    def make(n, bits):
        if (n, bits) not in made:
            made[n, bits] = tk.pack(rows_of(n, SHAPES), bits, tensors(SHAPES), SEGMENTS)
        return made[n, bits]

    return make


class Gpu:
    """A backend for GPUs and the device to run it on: a GPU, or CPU tensors under Triton's
    interpreter.
    """

    def __init__(self, backend, device):
        self.backend, self.device = backend, device

    def put(self, value):
        """Tensors, bases, lists and tuples of them on the device; anything else as it is."""
        if isinstance(value, (torch.Tensor, tk.PackedBasis)):
            return value.to(self.device)
        return (
            type(value)(self.put(v) for v in value) if isinstance(value, (list, tuple)) else value
        )

    def needs(self, op):
        if not registry.has(op, self.backend):
            pytest.skip(f"backend {self.backend} does not implement {op}")
        return self


ON_GPU = torch.cuda.is_available()
if not ON_GPU:  # CUDA kernels then run compiled for the CPU
    import emulator

    emulator.install()
GPU_BACKENDS = [name for name in ("cuda", "triton") if registry.why_unusable(name) is None]


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.gpu] if ON_GPU else []) for name in GPU_BACKENDS]
)
def gpu(request, monkeypatch):
    """Each GPU backend that is usable.

    The interpreter is given NVIDIA's assembly, which tests/interpreter.py runs.
    """
    if not ON_GPU:
        from twa_kernels.backends.triton import launch

        monkeypatch.setattr(launch, "isa", lambda arch: "ptx")
    return Gpu(request.param, "cuda" if ON_GPU else "cpu")


@pytest.fixture
def capture(monkeypatch):
    """capture(): every call from then on is as under the capture of a CUDA graph, for a device of
    this type.
    """

    def begin(device_type="cuda" if ON_GPU else "cpu"):
        monkeypatch.setattr(
            twa_kernels.capture, "capturing", lambda device: device.type == device_type
        )

    return begin


def run_python(code, **environment):
    """Runs code in a fresh interpreter, returns its standard output; the test fails if it does."""
    done = processes.run([sys.executable, "-c", code], env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def has_isa(name):
    """Whether this machine and build have a tier of the CPU kernels."""
    return name == "portable" or (native._C is not None and name in native._C.cpu_isas())
