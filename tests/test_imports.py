"""What `import twa` brings, changes and needs; and that results are the same wherever it runs:
under PyTorch's global settings, in forked and spawned processes, in threads and notebooks.

What they look at is a child process of its own: this one has imported and set much already.
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
        basis = tk.pack(inputs.rows, bits, inputs.center, backend=backend)
        yield f"pack {bits}", [basis.codes, basis.scales, basis.row_scale, basis.tile_segment]
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
            tk.replay(replayed, [snapshot[0]], [snapshot[1]], [0.5], bits=bits, backend=backend),
        )
    yield "average", tk.average(list(inputs.rows[0]), [0.1, 0.2, 0.3, 0.15, 0.25], backend=backend)
    yield "gram", tk.ops.gram.OP(*basis.operands, backend)
    for form in ("explicit", "implicit"):
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
        yield (
            f"{name}: coefficients",
            [subspace.x(), subspace.merge_weights(), average.coefficients],
        )
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


#: of a kind that others are already
ALIKE = {"meta context", "no grad"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.exhaustive] if n in ALIKE else []) for n in SETTINGS],
)
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


COMMANDS = """
import contextlib, io
from twa.cli.main import main
for arguments in (["--version"], ["--help"], ["merge", "--help"], ["average", "--help"]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(arguments)
"""


@pytest.mark.parametrize("then", ["import twa", COMMANDS], ids=["import", "commands"])
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


def test_no_warning():
    code = "import twa, twa_kernels, twa.cli.main; print('imported')"
    assert child(code, "-W", "error", "-X", "dev").split() == ["imported"]


@pytest.mark.filterwarnings("error")
def test_sources_compile_without_warnings():
    assert len(SOURCES) > 150
    for path in SOURCES:
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


def test_an_import_changes_nothing():
    code = (
        f"{STATE}\nimport twa, twa_kernels, twa.cli.main\nafter = state()\n"
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
    """Nor does it leave anything there."""
    tmp_path.chmod(0o555)
    missing = str(tmp_path / "missing")
    gone = dict.fromkeys(("TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), missing)
    code = "import twa, twa_kernels, twa.cli.main; print('imported')"
    assert child(code, cwd=tmp_path, env=gone, without=("HOME", "USER")).split() == ["imported"]
    assert list(tmp_path.iterdir()) == []


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


# Processes, threads, notebooks --------------------------------------------------------------------


def products(_=None):
    """A hash of what several threads compute."""
    import torch

    import twa_kernels as tk

    torch.set_num_threads(2)
    draw = torch.Generator().manual_seed(0)
    rows, g = torch.randn(4, 300_000, generator=draw), torch.randn(300_000, generator=draw)
    basis = tk.pack([rows])
    c = tk.project(basis, [g])
    return digest([basis.codes, c, tk.reconstruct(basis, c)])


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_child_processes(method):
    """Of a parent that has used the kernels with several threads; and it goes on using them."""
    code = f"""
import multiprocessing
import test_imports as t
before = t.products()
context = multiprocessing.get_context({method!r})
context.set_forkserver_preload(["twa"])
with context.Pool(2) as pool:
    found = pool.map(t.products, range(4), 1)
print(len({{before, t.products(), *found}}), len(found))
"""
    assert child(code, env={"OMP_NUM_THREADS": "2"}).split() == ["1", "4"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_that_is_first_to_load_the_kernels():
    """The parent has used PyTorch's threads only, which do not survive the fork."""
    code = """
import os, torch
torch.set_num_threads(2)
torch.ones(4_000_000).mul(2)
rows, g = torch.ones(4, 300_000), torch.ones(300_000)
child = os.fork()
import twa_kernels as tk
c = tk.project(tk.pack([rows]), [g])
if not child:
    os._exit(int(c.shape != (4, 1)))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert child(code, env={"OMP_NUM_THREADS": "2"}).split() == ["0"]


def test_threads():
    """The first import is a thread's, and four use the kernels at once."""
    code = """
from concurrent.futures import ThreadPoolExecutor
import test_imports as t
with ThreadPoolExecutor(1) as pool:
    first = pool.submit(t.products).result()
with ThreadPoolExecutor(4) as pool:
    found = list(pool.map(t.products, range(8)))
print(len({first, t.products(), *found}))
"""
    assert child(code, env={"OMP_NUM_THREADS": "2"}).split() == ["1"]


def test_in_a_notebook(tmp_path, plain_results):
    """Bars are text on the error stream; nothing minds the event loop that runs there."""
    for name in ("ipykernel", "nbclient", "nbformat"):
        pytest.importorskip(name)
    cells = (
        f"import test_imports as t, twa\ninputs = t.Inputs({str(tmp_path)!r})\n"
        "run = inputs.folder / 'run'",
        "outcome = twa.average(inputs.model(), run, inputs.batches[:2], inputs.batches[2:], t.loss,"
        " steps=3, lr=0.05, compare=True)\nprint(outcome)",
        "import asyncio\nloop = asyncio.get_running_loop()\n"
        "async def job():\n    return {n: t.digest(v) for n, v in t.jobs(inputs, run)}\n"
        "found = await job()\nassert loop is asyncio.get_running_loop()",
        "import json\nprint(json.dumps(found))",
    )
    code = f"""
import json, nbclient, nbformat
book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in {cells!r}])
nbclient.NotebookClient(book, timeout=None, kernel_name="python3").execute()
print(json.dumps([
    {{name: "".join(o["text"] for o in cell["outputs"] if o.get("name") == name)
      for name in ("stdout", "stderr")}}
    for cell in book.cells
]))
"""
    _, average, _, found = json.loads(child(code).splitlines()[-1])
    assert "uniform" in average["stdout"] and "100%" in average["stderr"]
    assert json.loads(found["stdout"]).items() <= plain_results.items()


# Environment variables, and the rule for tensors --------------------------------------------------


def of_values(name, values, first):
    """What comes of a variable's values on use; the import has seen the first one."""
    code = f"""
import os, torch, twa, twa_kernels as tk
for value in {values!r}:
    os.environ[{name!r}] = value
    try:
        tk.pack([torch.ones(2, 3)])
        print("packed")
    except RuntimeError as error:
        print(error)
"""
    return child(code, env={name: first}).splitlines()


def test_backends_by_a_variable():
    plain, odd = ["", " ", ",", "cpp ", "cpu:cpp, ,"], ["CPP", ":", "cpu:", "toaster:cpp", "fast"]
    said = of_values("TWA_KERNELS_BACKEND", plain + odd, "fast")
    assert said[: len(plain)] == ["packed"] * len(plain)
    for value, line in zip(odd, said[len(plain) :], strict=True):
        assert line.startswith("TWA_KERNELS_BACKEND: expected a backend (cpp,")
        assert line.endswith(f"found {value!r}")


@pytest.mark.parametrize("value", ["", " ", "AVX2"])
def test_instruction_sets_by_a_variable(value):
    (said,) = of_values("TWA_KERNELS_ISA", [value], value)
    wrong = f"TWA_KERNELS_ISA={value!r} asks for"
    assert said == "packed" if not value else wrong in said and "expected one of: portable" in said


def test_the_command_line_says_what_is_wrong_with_a_variable(tmp_path):
    name = "TWA_KERNELS_BACKEND"
    Inputs(tmp_path)
    command = ["merge", str(tmp_path / "run"), "--scheme", "uniform", "-o", str(tmp_path / "out")]
    done = processes.run(
        [sys.executable, "-m", "twa", *command],
        env=processes.environment() | {name: "fast"},
    )
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and said.startswith("twa: error: ") and name in said
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_the_report_says_what_is_wrong_with_a_variable():
    done = processes.run(
        [sys.executable, "-m", "twa_kernels"],
        env=processes.environment() | {"TWA_KERNELS_BACKEND": "fast"},
    )
    assert done.returncode == 0 and done.stdout.rstrip().endswith("found 'fast'"), done.stderr


#: functions of torch that make tensors on the default device, where none is named
MAKERS = [
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "empty_permuted",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "logspace",
    "normal",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "range",
    "scalar_tensor",
    "tensor",
    "tril_indices",
    "triu_indices",
    "vander",
    "zeros",
]
#: of these, those whose dtype is not the default one
OF_INTEGERS = {"arange", "as_tensor", "asarray", "randint", "randperm"}
#: models are built where, and of what, PyTorch's defaults say
BUILD_MODELS = {"python/twa/tasks/gpt.py"}


def unnamed(source):
    """Calls that make a tensor and leave its device, or its dtype, to PyTorch's defaults."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("torch."):
            continue
        maker = ast.unparse(node.func).removeprefix("torch.")
        if maker in MAKERS:
            given = {keyword.arg for keyword in node.keywords}
            wanted = {"device"} if maker in OF_INTEGERS else {"device", "dtype"}
            if None not in given and not wanted <= given:
                yield f"line {node.lineno}: {ast.unparse(node)}"


def test_tensors_name_their_device_and_dtype():
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        if name not in BUILD_MODELS:
            assert list(unnamed(path.read_text())) == [], name
    assert len(
        list(unnamed("torch.zeros(3, device=d), torch.arange(3), torch.arange(3, device=d)"))
    )
    assert list(unnamed("x.zeros(3), torch.zeros(3, dtype=t, device=d)")) == []
