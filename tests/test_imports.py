"""What `import twa` brings, changes and needs; and that results are the same wherever it runs: under
PyTorch's global settings, in forked and spawned processes, in threads and notebooks.

Every check runs in a child process of its own: this one has imported and set much already.
"""

import ast
import hashlib
import json
import os
import sys
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for root in ("python/twa", "twa_kernels") for path in (ROOT / root).rglob("*.py")
)


def child(code, *options, cwd=None, env=None, without=()):
    """Standard output of code in a fresh interpreter, which imports what this file may."""
    variables = processes.environment() | (env or {})
    for name in without:
        variables.pop(name, None)
    done = processes.run([sys.executable, *options, "-c", code], env=variables, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The whole path, in small ------------------------------------------------------------------------

SHAPES = ((40, 9), (129,), (), (3, 128))
N = 5


class Inputs:
    """Everything that the path works on, made before a setting is in force."""

    def __init__(self, folder):
        import torch
        from safetensors.torch import save_file
        from torch import nn

        torch.set_num_threads(1)
        draw = torch.Generator().manual_seed(0)
        self.folder = Path(folder)
        self.rows = [torch.randn(N, *s, generator=draw) for s in SHAPES]
        self.center = [r.mean(0) for r in self.rows]
        self.grads = [torch.randn(s, generator=draw) for s in SHAPES]
        self.x = torch.randn(N, len(SHAPES), generator=draw)
        self.last = [r[-1].clone() for r in self.rows]
        torch.manual_seed(0)
        layers = nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 3)
        self.models = [nn.Sequential(*layers)]
        self.models += [self.copy() for _ in range(12)]
        (self.folder / "run").mkdir()
        for step in range(1, 7):
            state = {
                key: t + 0.1 * torch.randn(t.shape, generator=draw) if t.is_floating_point() else t
                for key, t in layers_state(self.models[0]).items()
            }
            save_file(state, self.folder / "run" / f"step_{step}.safetensors")
        inputs = torch.randn(4, 16, 6, generator=draw)
        self.batches = [(x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long()) for x in inputs]
        self.gradients = [
            [torch.randn(p.shape, generator=draw) for p in self.models[0].parameters()]
            for _ in range(4)
        ]

    def copy(self):
        import copy

        return copy.deepcopy(self.models[0])

    def model(self):
        """A model of the same weights, one after the other."""
        return self.models.pop()

    def moved(self, model, optimizer, after=lambda: None):
        """The model after some steps, along gradients that were drawn beforehand."""
        for gradients in self.gradients:
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.grad = g.clone()
            optimizer.step()
            after()
        return layers_state(model)


def layers_state(model):
    return {key: t.detach().clone() for key, t in model.state_dict().items()}


def loss(model, batch):
    from torch.nn import functional

    return functional.cross_entropy(model(batch[0]), batch[1])


def kernels(inputs, backend):
    """Every op of twa_kernels: (name, result)."""
    import torch
    import twa_kernels as tk

    for bits in (8, 4, 1):
        basis = tk.pack(inputs.rows, bits, inputs.center, report=True, backend=backend)
        yield f"pack {bits}", [basis.codes, basis.scales, basis.row_scale, basis.tile_segment]
        yield f"error {bits}", basis.relative_error
        yield f"unpack {bits}", tk.unpack(basis, backend=backend)
        yield f"project {bits}", tk.project(basis, inputs.grads, backend=backend)
        yield (
            f"reconstruct {bits}",
            tk.reconstruct(basis, inputs.x, inputs.center, backend=backend),
        )
        for rule, options in (("adamw", {"lr": 0.1}), ("sgd", {"lr": 0.1, "momentum": 0.9})):
            x, state = inputs.x.clone(), {}
            out = [torch.empty_like(c) for c in inputs.center]
            for _ in range(2):
                settings = {"rule": rule, "options": options, "state": state, "backend": backend}
                c = tk.step(basis, inputs.grads, x, out, inputs.center, **settings)
            yield f"step {rule} {bits}", [c, x, *out, *state.values()]
        reference = [c.clone() for c in inputs.center]
        snapshot = tk.record(inputs.last, reference, bits, backend=backend)
        yield f"record {bits}", [*snapshot, *reference]
        replayed = [c.clone() for c in inputs.center]
        yield (
            f"replay {bits}",
            tk.replay(
                replayed, [snapshot[0]], [snapshot[1]], [0.5], bits=bits, backend=backend
            ),
        )
    yield "average", tk.average(list(inputs.rows[0]), [0.1, 0.2, 0.3, 0.15, 0.25], backend=backend)
    yield "gram", tk.ops.gram.OP(*basis.operands, backend)
    for form in ("explicit", "implicit", "packed"):
        for accuracy in ("high", "fast"):
            options = {"center": inputs.center, "form": form, "accuracy": accuracy}
            o = tk.orthonormalize(inputs.rows, backend=backend, **options)
            yield f"orthonormalize {form} {accuracy}", [o.R, o.transform]


SUBSPACES = {
    "deltas": {"bits": 4},
    "dense": {"bits": 32},
    "differences": {"bits": 4, "basis": "differences"},
    "orthonormal": {"bits": 8, "basis": "orthonormal"},
    "simplex": {"bits": 4, "constraint": "simplex"},
    "model": {"bits": 2, "granularity": "model"},
    "host": {"bits": 4, "storage": "host"},
}


def subspaces(inputs, run):
    import torch
    import twa

    for name, options in SUBSPACES.items():
        rule = torch.optim.SGD if name == "model" else torch.optim.AdamW
        model = inputs.model()
        subspace = twa.Subspace.from_candidates(model, twa.Candidates(run), **options)
        yield f"{name}: start", layers_state(model)
        yield f"{name}: rate", [subspace.unit_step(), twa.learning_rate(subspace)]
        optimizer = twa.SubspaceOptimizer(subspace, rule, lr=0.05)
        average = twa.IterateAverage(subspace)
        yield f"{name}: trained", inputs.moved(model, optimizer, average.update)
        yield f"{name}: coefficients", [subspace.x(), subspace.merge_weights(), average.coefficients]
        average.apply()
        twa.update_bn(inputs.batches, model)
        yield f"{name}: average", layers_state(model)
        subspace.save(inputs.folder / name, basis=name != "dense")
        if name == "deltas":
            yield f"{name}: states", [subspace.state_dict(), optimizer.state_dict()]
            subspace.load_state_dict(subspace.state_dict())
            optimizer.load_state_dict(optimizer.state_dict())
            loaded = twa.Subspace.load(inputs.folder / name, model)
            yield f"{name}: loaded", [layers_state(model), loaded.x()]


def recordings(inputs):
    import torch
    import twa

    model, folder = inputs.model(), inputs.folder / "recording"
    recorder = twa.Recorder(model, every=1, path=folder)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    recorder.attach(optimizer)
    yield "recorder: trained", inputs.moved(model, optimizer)
    recorder.flush()
    for scheme, options in {"uniform": {}, "ema": {"half_life": 2}, "lawa": {"last": 3}}.items():
        with recorder.averaged(scheme, **options):
            yield f"recorder: {scheme}", layers_state(model)
    recorder.save(inputs.folder / "saved.safetensors", "uniform")
    recorder.close()
    twa.load_average(model, twa.Candidates(folder), twa.averages.ema(4, 0.5))
    yield "recorder: loaded average", layers_state(model)


def jobs(inputs, run):
    import twa
    from twa.cli.main import main

    outcome = twa.average(
        inputs.model(),
        run,
        inputs.batches[:2],
        inputs.batches[2:],
        loss,
        steps=3,
        lr=0.05,
        compare=True,
        progress=False,
    )
    yield "average: table", [(r.method, r.val_loss) for r in outcome.results]
    yield "average: state", dict(outcome.state)
    outcome.save(inputs.folder / "outcome")
    for scheme in ("ema:0.5", "lawa:3", "wsm:4:sqrt"):
        merged = inputs.folder / f"{scheme.replace(':', '_')}.safetensors"
        assert main(["merge", str(run), "--scheme", scheme, "-o", str(merged)]) == 0
        yield f"merge: {scheme}", merged.read_bytes()


def digest(value):
    """A hash of the bits of tensors, of all that holds them, and of numbers and bytes."""
    import torch

    h = hashlib.sha256()

    def add(v):
        if isinstance(v, torch.Tensor):
            v = v.detach()
            h.update(f"{v.dtype} {tuple(v.shape)} {v.device}".encode())
            h.update(v.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(v, dict):
            for key, item in v.items():
                h.update(repr(key).encode())
                add(item)
        elif isinstance(v, (list, tuple)):
            for item in v:
                add(item)
        elif isinstance(v, bytes):
            h.update(v)
        else:
            assert v is None or isinstance(v, (bool, int, float, str)), type(v)
            h.update(repr(v).encode())

    add(value)
    return h.hexdigest()


def whole_path(inputs):
    """Hash of each result, by name."""
    run = inputs.folder / "run"
    found = {}
    for backend in ("cpp", "reference"):
        found |= {f"{backend}: {name}": digest(v) for name, v in kernels(inputs, backend)}
    for part in (subspaces(inputs, run), recordings(inputs), jobs(inputs, run)):
        found |= {name: digest(v) for name, v in part}
    return found


SETTINGS = {
    "none": "",
    "meta device": "torch.set_default_device('meta')",
    "meta context": "stack.enter_context(torch.device('meta'))",
    "float64": "torch.set_default_dtype(torch.float64)",
    "bfloat16": "torch.set_default_dtype(torch.bfloat16)",
    "inference": "stack.enter_context(torch.inference_mode())",
    "no grad": "torch.set_grad_enabled(False)",
    "deterministic": "torch.use_deterministic_algorithms(True)",
}


def results(setting, folder):
    """The results of the whole path under a setting, in a child."""
    code = f"""
import contextlib, json, sys, torch
import test_imports as t
inputs = t.Inputs({str(folder)!r})
with contextlib.ExitStack() as stack:
    {setting or "pass"}
    found = t.whole_path(inputs)
print(json.dumps(found))
"""
    return json.loads(child(code).splitlines()[-1])


@pytest.fixture(scope="module")
def plain_results(tmp_path_factory):
    return results("", tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "none"])
def test_settings_change_no_bit(plain_results, tmp_path, name):
    assert results(SETTINGS[name], tmp_path) == plain_results


# What an import brings, changes and needs ---------------------------------------------------------

#: what `import twa` may bring beside its own modules, where PyTorch has not brought it already
BRINGS = {"resource", "safetensors", "secrets", "shlex", "statistics"}
#: what these bring themselves
THROUGH_THEM = {"_decimal", "_statistics", "decimal", "fractions", "hmac"}
OWN = {"twa", "twa_kernels"}
#: what the command line may bring, beside
COMMAND_LINE = {"argparse", "faulthandler", "gettext", "traceback"}


def brought(first, then):
    """Top-level names of the modules that one import adds to another."""
    code = f"import sys, {first}; before = set(sys.modules)\n{then}\n" + (
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    return set(child(code).splitlines()[-1].split())


def test_kernels_bring_nothing_but_themselves():
    assert brought("torch", "import twa_kernels") == {"twa_kernels"}


def test_what_twa_brings():
    found = brought("torch", "import twa")
    assert found >= OWN and found <= OWN | BRINGS | THROUGH_THEM


HEAVY = (
    "matplotlib",
    "pandas",
    "scipy",
    "sklearn",
    "transformers",
    "triton",
    "lightning",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.elastic",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
)


@pytest.mark.parametrize(
    "then",
    [
        "import twa",
        *(
            f"import contextlib, io, twa.cli.main\n"
            f"with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
            f"    twa.cli.main.main({arguments!r})"
            for arguments in (["--version"], ["--help"], ["merge", "--help"], ["average", "-h"])
        ),
    ],
    ids=["import", "version", "help", "merge", "average"],
)
def test_nothing_heavy(then):
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        f"{then}\nprint(*sorted(set(sys.modules) - before))"
    )
    found = set(child(code).splitlines()[-1].split())
    assert "twa" in found
    assert not [m for m in found if m.startswith(HEAVY)]
    allowed = OWN | BRINGS | THROUGH_THEM | COMMAND_LINE
    assert {m.split(".")[0] for m in found} <= allowed


@pytest.mark.parametrize("options", [(), ("-X", "dev")], ids=["plain", "dev"])
def test_no_warning(options):
    code = "import twa, twa_kernels, twa.cli.main; print('imported')"
    assert child(code, "-W", "error", *options).split() == ["imported"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sources_compile_without_warnings(path):
    compile(path.read_text(), str(path), "exec")


STATE = """
import atexit, faulthandler, gc, locale, logging, os, random, resource, signal, sys, threading
import warnings
import numpy, torch

def handlers():
    lines = open("/proc/self/status").read().splitlines() if os.path.exists("/proc/self") else []
    return {line for line in lines if line.startswith(("Sig", "Shd"))} | {
        (s, str(signal.getsignal(s))) for s in signal.valid_signals()
    }

def files():
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
        except OSError:  # that of the listing
            pass
    return found

def count(path):
    return len(os.listdir(path)) if os.path.exists(path) else 0

def state():
    made = {
        "threads": [t.name for t in threading.enumerate()],
        "tasks": count("/proc/self/task"),
        "children": [
            open(f"/proc/self/task/{t}/children").read() for t in os.listdir("/proc/self/task")
            if os.path.exists(f"/proc/self/task/{t}/children")
        ] if os.path.exists("/proc/self/task") else [],
        "environment": dict(os.environ),
        "signals": handlers(),
        "files": files() if os.path.exists("/proc/self/fd") else (),
        "filters": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "log": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable,
                logging.lastResort, logging.raiseExceptions),
        "path": list(sys.path), "finders": list(sys.meta_path), "hooks": list(sys.path_hooks),
        "excepthook": (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.displayhook),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "cwd": os.getcwd(),
        "limits": [resource.getrlimit(getattr(resource, n)) for n in dir(resource)
                   if n.startswith("RLIMIT_")],
        "python": (gc.get_threshold(), gc.isenabled(), sys.getrecursionlimit(),
                   sys.getswitchinterval(), faulthandler.is_enabled(), atexit._ncallbacks(),
                   locale.setlocale(locale.LC_ALL), sys.gettrace(), sys.getprofile()),
        "random": (random.getstate(), str(numpy.random.get_state()), numpy.geterr(),
                   str(numpy.get_printoptions())),
        "torch": (
            torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype(),
            torch.get_default_device(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            torch.get_rng_state().tolist(), torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.get_float32_matmul_precision(), torch.is_anomaly_enabled(),
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic,
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32,
            torch.backends.mkldnn.enabled, torch.is_warn_always_enabled(),
            torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"),
            torch.cuda.is_initialized(), torch.distributed.is_initialized(),
            str(torch._tensor_str.PRINT_OPTS), torch.multiprocessing.get_sharing_strategy(),
            torch.multiprocessing.get_start_method(allow_none=True),
        ),
    }
    return made

before = state()
"""


@pytest.mark.parametrize("module", ["twa_kernels", "twa", "twa.cli.main"])
def test_an_import_changes_nothing(module):
    code = (
        f"{STATE}\nimport {module}\nafter = state()\n"
        "print({k: (v, after[k]) for k, v in before.items() if v != after[k]} or 'the same')"
    )
    assert child(code).strip() == "the same"


def test_the_state_that_is_compared_is_seen_to_change():
    """Each kind of change, so that the test above can fail."""
    changes = """
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    os.environ["SOMETHING"] = "1"
    signal.signal(signal.SIGUSR1, print)
    file = open(os.devnull)
    warnings.filterwarnings("ignore", "something")
    logging.basicConfig()
    sys.path.append("somewhere")
    sys.excepthook = print
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1] // 2))
    gc.disable()
    random.random()
    torch.rand(1)
    """
    lines = "\n".join(line.strip() for line in changes.splitlines())
    code = (
        f"{STATE}{lines}\nafter = state()\n"
        "print(*sorted(k for k, v in before.items() if v != after[k]), flush=True)"
    )
    expected = "environment excepthook filters log path python random signals threads torch"
    assert set(child(code).split()) >= set(expected.split())


def test_an_import_needs_no_home_and_no_place_to_write(tmp_path):
    """Nor a file to be made: in a directory that is read only, or gone."""
    tmp_path.chmod(0o555)
    missing = str(tmp_path / "missing")
    gone = {name: missing for name in ("TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
    code = "import twa, twa_kernels, twa.cli.main; print('imported')"
    assert child(code, cwd=tmp_path, env=gone, without=("HOME", "USER")).split() == ["imported"]
    assert list(tmp_path.iterdir()) == []
    code = f"import os; os.mkdir({missing!r}); os.chdir({missing!r}); os.rmdir({missing!r})\n{code}"
    tmp_path.chmod(0o755)
    assert child(code).split() == ["imported"]


def test_memory_that_may_not_be_written_brings_no_warning(tmp_path):
    """A file larger than memory is mapped so; -W error makes the first warning an error."""
    code = f"""
import errno, mmap, torch
from safetensors.torch import save_file
from twa.io import mapped
save_file({{"w": torch.arange(6.0)}}, {str(tmp_path / "a.safetensors")!r})

class Full(mapped.GuardedMap):
    def __new__(cls, fileno, length, access):
        if access == mmap.ACCESS_COPY:
            raise OSError(errno.ENOMEM, "no memory")
        return super().__new__(cls, fileno, length, access)

mapped.GuardedMap = Full
from twa import Candidates
(candidate,) = Candidates({str(tmp_path / "a.safetensors")!r})
print(candidate.columns("w", 0, 6).sum().item())
"""
    assert child(code, "-W", "error").split() == ["15.0"]
