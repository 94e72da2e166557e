"""The ops as torch.library entries: opcheck, gradcheck, torch.compile, backends, imports."""

import ast
from pathlib import Path

import pytest
import torch
from conftest import BITS, run_python

import twa_kernels as tk
from twa_kernels import native, registry
from twa_kernels.backends import cpu, cuda, reference

SHAPES = [(130,), (3, 5), (257,)]
ROOT = Path(__file__).parents[2]


def operands(bits=4, n=3, seed=0):
    torch.manual_seed(seed)
    return tk.pack([torch.randn(n, *s) for s in SHAPES], bits, segments=[0, 1, 0])


def pack_arguments(bits):
    n, numels = 3, [130, 15]
    rows = [torch.randn(s) for s in numels for _ in range(n)]
    return (
        rows,
        [torch.randn(s) for s in numels],
        numels,
        torch.tensor([0, 0, 1], dtype=torch.int32),
        bits,
        torch.zeros(3, n, 16 * bits, dtype=torch.uint8),
        torch.zeros(3, n, dtype=torch.bfloat16),
        torch.zeros(n, 2, dtype=torch.float64),
        torch.zeros(n, 2),
        "",
    )


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize(
    "op", ["pack", "unpack", "project", "reconstruct", "reconstruct_out", "gram"]
)
def test_opcheck(op, bits):
    basis = operands(bits)
    x, center = (
        torch.randn(3, 2, requires_grad=True),
        [torch.randn(s, requires_grad=True) for s in SHAPES],
    )
    arguments = {
        "pack": lambda: pack_arguments(bits),
        "unpack": lambda: (*basis.operands, ""),
        "gram": lambda: (*basis.operands, ""),
        "project": lambda: (*basis.operands, center, ""),
        "reconstruct": lambda: (*basis.operands, x, center, ""),
        "reconstruct_out": lambda: (
            *basis.operands,
            x.detach(),
            [c.detach() for c in center],
            [torch.empty(s) for s in SHAPES],
            "",
        ),
    }[op]()
    torch.library.opcheck(getattr(torch.ops.twa_kernels, op).default, arguments)


@pytest.mark.parametrize("form", ["gram", "again", "write"])
def test_opcheck_of_orthonormalize(form):
    torch.manual_seed(0)
    n, r, numels = 3, 2, [130, 15]
    rows = [torch.randn(m) for m in numels for _ in range(n)]
    transform = None if form == "gram" else torch.randn(r, n, dtype=torch.float64).tril()
    write = form == "write"
    probes, out = (
        (torch.randn(6, r, dtype=torch.float64), [torch.empty(m) for m in numels for _ in range(r)])
        if write
        else (None, [])
    )
    parent = torch.tensor([-1, 0, 0], dtype=torch.int32)
    arguments = (
        rows,
        [torch.randn(m) for m in numels],
        numels,
        parent,
        transform,
        probes,
        0,
        False,
        out,
        "",
    )
    torch.library.opcheck(torch.ops.twa_kernels.orthonormalize_pass.default, arguments)


@pytest.mark.parametrize("op", ["unpack", "project", "reconstruct", "gram"])
def test_opcheck_on_gpu_backends(op, gpu):
    gpu.needs(op)
    basis = gpu.put(operands(4))
    x = torch.randn(3, 2, device=gpu.device).requires_grad_()
    center = [torch.randn(s, device=gpu.device).requires_grad_() for s in SHAPES]
    between = {"unpack": (), "gram": (), "project": (center,), "reconstruct": (x, center)}[op]
    torch.library.opcheck(
        getattr(torch.ops.twa_kernels, op).default,
        (*basis.operands, *between, gpu.backend),
    )


def test_gpu_backends_compile_without_graph_break(gpu):
    gpu.needs("project").needs("reconstruct")
    basis = gpu.put(operands())

    def both(grads, x, center):
        return tk.reconstruct(
            basis, x - 0.1 * tk.project(basis, grads, gpu.backend), center, backend=gpu.backend
        )

    grads, center = ([torch.randn(s, device=gpu.device) for s in SHAPES] for _ in range(2))
    x = torch.randn(3, 2, device=gpu.device)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(grads, x, center), both(grads, x, center), rtol=0, atol=0)


def test_gpu_backends_are_differentiable(gpu):
    """project and reconstruct are each other's backward, on the same backend."""
    gpu.needs("project").needs("reconstruct")
    basis, x = gpu.put(operands()), torch.randn(3, 2, device=gpu.device).requires_grad_()
    weights = [torch.randn(s, device=gpu.device) for s in SHAPES]
    sum(
        (t * w).sum()
        for t, w in zip(tk.reconstruct(basis, x, backend=gpu.backend), weights, strict=True)
    ).backward()
    assert torch.equal(x.grad, tk.project(basis, weights, gpu.backend))


@pytest.mark.parametrize("bits", BITS)
def test_gradcheck_of_the_reference(bits):
    basis = operands(bits)
    grads = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in SHAPES]
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *g: reference.project(basis.view, g), grads)
    assert torch.autograd.gradcheck(
        lambda x, *c: reference.reconstruct(basis.view, x, c, None), (x, *grads)
    )


def test_second_derivative():
    """project and reconstruct are each other's backward, so backward of backward works."""
    basis = operands()
    x = torch.randn(3, 2, requires_grad=True)
    theta = tk.reconstruct(basis, x)
    (g,) = torch.autograd.grad(sum(t.square().sum() for t in theta), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    once = tk.reconstruct(basis, torch.ones(3, 2))
    torch.testing.assert_close(h, 2 * tk.project(basis, once), rtol=1e-4, atol=1e-4)


def test_compile_without_graph_break():
    basis = operands()
    grads, center, x = (
        [torch.randn(s) for s in SHAPES],
        [torch.randn(s) for s in SHAPES],
        torch.randn(3, 2),
    )

    def both(grads, x, center):
        return tk.project(basis, grads), tk.reconstruct(basis, x, center)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(grads, x, center), both(grads, x, center), rtol=0, atol=0)


def test_dispatch_never_falls_back(monkeypatch):
    assert registry.select("project", "cpu") is cpu.project
    assert registry.select("project", "cpu", "reference") is reference.project
    with pytest.raises(RuntimeError, match="no kernel for mps tensors yet"):
        registry.select("project", "mps")
    assert registry.default_backend("gram", "cuda") == "triton"
    with pytest.raises(RuntimeError, match="does not implement"):
        registry.select("project", "cuda", "cpp")
    monkeypatch.setenv("TWA_KERNELS_BACKEND", "reference")
    assert registry.select("project", "cpu") is reference.project
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_import_error", "no such file", raising=False)
    with pytest.raises(RuntimeError, match="the native module does not load: no such file"):
        registry.select("project", "cpu", "cpp")


def test_an_override_per_device(monkeypatch):
    """A backend for GPUs leaves the CPU's packing alone."""
    monkeypatch.setattr(registry, "why_unusable", lambda backend: None)
    monkeypatch.setenv("TWA_KERNELS_BACKEND", "cuda:triton")
    assert registry.select("project", "cuda") is registry.BACKENDS["triton"].kernel("project")
    assert registry.select("pack", "cpu") is cpu.pack
    monkeypatch.setenv("TWA_KERNELS_BACKEND", "cpu:reference, cuda:cuda")
    assert (
        registry.select("pack", "cpu") is reference.pack
        and registry.select("step", "cuda") is cuda.step
    )
    assert registry.select("pack", "cpu", "cpp") is cpu.pack  # the argument comes first
    monkeypatch.setenv("TWA_KERNELS_BACKEND", "triton")  # every device
    with (
        pytest.raises(RuntimeError, match="on CPU tensors only in Triton's interpreter"),
        monkeypatch.context() as m,
    ):
        m.delenv("TRITON_INTERPRET", raising=False)
        registry.select("pack", "cpu")
    for wrong in ("tritn", "gpu:triton", "cuda:", "cuda=triton"):
        monkeypatch.setenv("TWA_KERNELS_BACKEND", wrong)
        with pytest.raises(
            RuntimeError,
            match=r"TWA_KERNELS_BACKEND: expected a backend \(.*\) or device:backend pairs",
        ):
            registry.select("project", "cpu")


def test_triton_without_its_package_or_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        RuntimeError, match="on CPU tensors only in Triton's interpreter: set TRITON_INTERPRET=1"
    ):
        registry.select("project", "cpu", "triton")
    with pytest.raises(RuntimeError, match="no GPU that PyTorch can use"):
        registry.select("project", "cuda", "triton")
    monkeypatch.setattr(registry, "_has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        registry.select("project", "cuda", "triton")


def test_gpus_prefer_the_cuda_module(monkeypatch):
    monkeypatch.setattr(registry, "why_unusable", lambda backend: None)
    assert {op: registry.default_backend(op, "cuda") for op in tk.ops.__all__} == {
        **dict.fromkeys(("pack", "project", "reconstruct", "step", "orthonormalize_pass"), "cuda"),
        **dict.fromkeys(("record", "replay", "average"), "cuda"),
        **dict.fromkeys(("unpack", "gram"), "triton"),
        "average_and_pack": "",  # runs as average, then pack
    }
    monkeypatch.setattr(
        registry, "why_unusable", lambda backend: "absent" if backend == "cuda" else None
    )
    assert {registry.default_backend(op, "cuda") for op in tk.ops.__all__} == {"triton", ""}


def test_a_forked_child_has_threads_of_its_own():
    """PyTorch's threads, which the parent shares, do not survive a fork."""
    code = """
import os, torch, twa_kernels as tk
torch.set_num_threads(2)
basis, grads = tk.pack([torch.randn(4, 300_000)]), [torch.randn(300_000)]
expected = tk.project(basis, grads)
child = os.fork()
if not child:
    os._exit(0 if torch.equal(tk.project(basis, grads), expected) else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(status, torch.equal(tk.project(basis, grads), expected))
"""
    assert run_python(code).strip() == "0 True"


def test_lazily_negated_gradients():
    basis, grads = operands(), [torch.randn(s) for s in SHAPES]
    assert torch.equal(
        tk.project(basis, [torch._neg_view(g) for g in grads]),
        tk.project(basis, [-g for g in grads]),
    )


def packed(segment, segments=2):
    """Operands of a basis (tiles all of one segment) and of a pack of the same sizes."""
    numels, tiles, n, bits = [300, 70], 4, 3, 4
    of_tiles = torch.full((tiles,), segment, dtype=torch.int32)
    codes = torch.zeros(tiles, n, 16 * bits, dtype=torch.uint8)
    row_scale = torch.ones(n, segments)
    basis = [codes, codes[..., 0].contiguous(), row_scale, of_tiles, numels, bits]
    rows = [torch.ones(numel) for numel in numels for _ in range(n)]
    target = [codes, torch.zeros(tiles, n, dtype=torch.bfloat16), row_scale.double(), row_scale]
    return basis, [rows, [], numels, of_tiles, bits, *target]


def calls_of(basis, pack, device="cpu", backend=""):
    """Each op with these operands, on a device."""

    def put(value):
        if isinstance(value, list):
            return [put(v) for v in value]
        return value.to(device) if isinstance(value, torch.Tensor) else value

    basis, pack, run = put(basis), put(pack), torch.ops.twa_kernels
    grads, x = put([torch.ones(300), torch.ones(70)]), torch.zeros_like(basis[2])
    options = [0.0, 0.1, 0.0, 0.0, 0.0, 0.0]
    return {
        "project": lambda: run.project(*basis, grads, backend),
        "reconstruct": lambda: run.reconstruct(*basis, x, [], backend),
        "unpack": lambda: run.unpack(*basis, backend),
        "gram": lambda: run.gram(*basis, backend),
        "step": lambda: run.step(*basis, grads, [], grads, x, [], "sgd", options, 1, backend),
        "pack": lambda: run.pack(*pack, backend),
    }


@pytest.mark.parametrize("segment", [2, -1, 10**9, -(10**9)])
def test_segments_that_are_none(segment, gpu):
    """They would be read and written out of bounds."""
    for call in calls_of(*packed(segment), backend="cpp").values():
        with pytest.raises(ValueError, match=r"kernel refused its arguments: .*segments"):
            call()
    for op, call in calls_of(*packed(segment), gpu.device, gpu.backend).items():
        if registry.has(op, gpu.backend):
            with pytest.raises(ValueError, match="tile_segment: expected indices from 0 to 1"):
                call()


def test_operands_without_rows_or_columns():
    """Sizes of 0 would be divided by, and dimensions that are not there looked up."""
    for call in calls_of(*packed(0, segments=0)).values():
        with pytest.raises(ValueError, match=r"(row_scale|sum_sq): expected a matrix of 1 to 4096"):
            call()
    _, pack = packed(0)
    pack[7] = pack[7].reshape(-1)
    with pytest.raises(ValueError, match=r"sum_sq: .*found shape \(6,\)"):
        torch.ops.twa_kernels.pack(*pack, "")
    rows, parent = [torch.ones(200)] * 3, torch.tensor([-1, 0, 0], dtype=torch.int32)
    for transform in (torch.zeros(0, 3), torch.zeros(()), torch.zeros(5000, 3)):
        with pytest.raises(ValueError, match="transform: expected a matrix of 1 to 4096 rows"):
            torch.ops.twa_kernels.orthonormalize_pass(
                rows, [], [200], parent, transform.double(), None, 0, False, [], ""
            )
    with pytest.raises(ValueError, match=r"parent: expected shape \(n,\)"):
        torch.ops.twa_kernels.orthonormalize_pass(
            rows[:1], [], [200], parent[0], None, None, 0, False, [], ""
        )


def test_unknown_instruction_set_is_an_error():
    code = """
import torch, twa_kernels as tk
try:
    tk.pack([torch.randn(2, 3)])
except RuntimeError as error:
    print(error)
"""
    expected = f"expected one of: {', '.join(native._C.cpu_isas())}\n"
    assert run_python(code, TWA_KERNELS_ISA="altivec").endswith(expected)


def test_diagnostics():
    text = run_python("import runpy; runpy.run_module('twa_kernels', run_name='__main__')")
    for word in ("backends:", "cpp", "reference", "instruction set", "project"):
        assert word in text


@pytest.mark.skipif(
    not (native._C and native._C.with_cuda), reason="the native module was built without CUDA"
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_says_so():
    # In this process the kernels run emulated.
    code = "from twa_kernels import registry; print(registry.why_unusable('cuda'))"
    assert run_python(code).strip() == "no CUDA device on this machine"


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def test_imports_point_one_way():
    """twa -> twa_kernels -> _C -> csrc."""
    for path in (ROOT / "twa_kernels").rglob("*.py"):
        assert not [name for name in imports_of(path) if name.split(".")[0] == "twa"], path
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and path.parent.name != "bindings":
            text = path.read_text()
            assert "pybind11" not in text and "Python.h" not in text and "torch/" not in text, path
