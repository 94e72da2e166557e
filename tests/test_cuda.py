"""CUDA C++ kernels beyond the tests that every GPU backend shares: the kernels run on the GPU, or compiled for the CPU (tests/emulator)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import emulator
import processes
import pytest
import torch
from conftest import BITS, ON_GPU, rows_of, run_python, tensors

import twa_kernels as tk
from twa_kernels import cuda, native

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.skipif(cuda.why_unusable() is not None, reason=str(cuda.why_unusable()))] + [pytest.mark.gpu] * ON_GPU
sys.path.insert(0, str(ROOT / "bench"))  # static_cost_cuda imports machine_code


def put(value):
    return [put(v) for v in value] if isinstance(value, list) else value.to(DEVICE)


def truth_of(basis, grads, segments):
    rows = tk.unpack(basis)
    c = torch.zeros(basis.n, basis.num_segments, dtype=torch.float64)
    for row, g, l in zip(rows, grads, segments, strict=True):
        c[:, l] += row.reshape(len(row), -1).double() @ g.double().flatten()
    return c


SHAPES, SEGMENTS = [(1000,), (257,), (128 * 70,), (5,)], [0, 1, 0, 2]


@pytest.fixture(params=["bulk", "16 bytes a lane"])
def copies(request, monkeypatch):
    """How packed rows reach shared memory: as from sm_90 on, and as before."""
    if ON_GPU and request.param != "bulk":
        pytest.skip("this GPU copies in bulk; the other way is for GPUs before sm_90")
    monkeypatch.setenv("TWA_EMULATOR_BULK", "1" if request.param == "bulk" else "0")


@pytest.mark.parametrize("n", [1, 16, 31, 33, 64, 72, 97, 128, 129, 200, 300])
@pytest.mark.parametrize("bits", BITS)
def test_any_number_of_rows(bits, n, copies, monkeypatch):
    """Each kernel that is built (groups of 32 rows, several blocks of rows), and rows that fill no group; threads in another order each time."""
    monkeypatch.setenv("TWA_EMULATOR_SEED", str(n))
    torch.manual_seed(n)
    basis = tk.pack(rows_of(n, SHAPES), bits, segments=SEGMENTS)
    grads, center, x = tensors(SHAPES, 7), tensors(SHAPES, 9), torch.randn(n, 3)
    c = tk.project(put(basis), put(grads), "cuda").cpu()
    truth = truth_of(basis, grads, SEGMENTS)
    assert ((c - truth).abs() <= 1e-6 * truth.abs().max()).all()
    weights = tk.reconstruct(put(basis), put(x), put(center), backend="cuda")
    for w, middle, row, l in zip(weights, center, tk.unpack(basis), SEGMENTS, strict=True):
        exact = middle.double() + torch.tensordot(x[:, l].double(), row.double(), 1)
        # Fixed point is relative to the coefficients, not to a sum of 300 terms that happens to be small.
        size = torch.tensordot(x[:, l].double().abs(), row.double().abs(), 1)
        assert ((w.cpu() - exact).abs() <= 1e-6 * exact.abs().max() + 2.0**-24 * size).all()


def test_4096_rows():
    basis = tk.pack([torch.randn(4096, 130)], 1)
    g, x = torch.randn(130), torch.randn(4096, 1)
    truth = truth_of(basis, [g], [0])
    assert ((tk.project(put(basis), put(g), "cuda").cpu() - truth).abs() <= 1e-6 * truth.abs().max()).all()
    exact = x[:, 0].double() @ tk.unpack(basis)[0].double()
    assert ((tk.reconstruct(put(basis), put(x), backend="cuda")[0].cpu() - exact).abs() <= 2e-6 * exact.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_views_at_any_address(offset, dtype):
    """Gradients, centers and weights that begin in the middle of a buffer, as in flattened parameters."""
    basis = tk.pack(rows_of(5, SHAPES), 4, segments=SEGMENTS)
    center, grads, x = tensors(SHAPES, 9, dtype), tensors(SHAPES, 7, dtype), torch.randn(5, 3)

    def view(t):
        flat = torch.full((t.numel() + 2 * offset,), 7.0, dtype=t.dtype)
        inside = flat[offset : offset + t.numel()].view(t.shape)
        inside.copy_(t)
        return inside

    if ON_GPU:
        pytest.skip("put() would copy the views: the emulator tests them")
    assert torch.equal(tk.project(basis, [view(g) for g in grads], "cuda"), tk.project(basis, grads, "cuda"))
    out = [view(torch.zeros_like(m)) for m in center]
    tk.reconstruct(basis, x, [view(m) for m in center], out=out, backend="cuda")
    for o, expected in zip(out, tk.reconstruct(basis, x, center, backend="cuda"), strict=True):
        assert torch.equal(o, expected)
        around = o.untyped_storage()
        flat = torch.empty(0, dtype=dtype).set_(around)
        assert (flat[:offset] == 7).all() and (flat[-offset:] == 7).all()  # nothing beside the view was written


def test_codes_that_no_copy_can_start_from():
    basis = put(tk.pack([torch.randn(2, 300)], 4))
    codes = torch.empty(basis.codes.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:].view(basis.codes.shape)
    codes.copy_(basis.codes)
    moved = tk.PackedBasis(codes, basis.scales, basis.row_scale, basis.tile_segment, basis.divisor, basis.shapes, basis.bits)
    with pytest.raises(ValueError, match="expected a multiple of 16, which asynchronous copies need"):
        tk.project(moved, torch.randn(300, device=DEVICE), "cuda")


# The fused step ----------------------------------------------------------------------------------------------------


def work_of(numels, segments, bits=4):
    tile_segment = torch.cat([torch.full((-(-numel // 128),), l, dtype=torch.int32) for numel, l in zip(numels, segments, strict=True)])
    return cuda.work_items(tile_segment.to(DEVICE), numels, max(segments) + 1, bits), tile_segment


@pytest.mark.parametrize("bits", BITS)
def test_work_items_cover_every_tile_once(bits):
    numels, segments = [128 * 200 + 1, 5, 128 * 64, 0, 700], [1, 0, 1, 2, 2]
    work, tile_segment = work_of(numels, segments, bits)
    tensor, tile, tiles, segment, group, group_begin, segment_groups, numel, tile_begin = (a.cpu() for a in work.arrays)
    most = {8: 16, 4: 16, 3: 32, 2: 32, 1: 64}[bits]
    assert tiles.min() >= 1 and tiles.max() == most and numel.tolist() == numels and (segment.diff() >= 0).all()
    covered = torch.cat([torch.arange(first, first + count) for first, count in zip(tile, tiles, strict=True)])
    assert sorted(covered.tolist()) == list(range(len(tile_segment)))
    for k in range(work.items):
        assert (tile_segment[tile[k] : tile[k] + tiles[k]] == segment[k]).all()
        assert tile_begin[tensor[k]] <= tile[k] < tile_begin[tensor[k]] + -(-numels[tensor[k]] // 128)
        assert group_begin[group[k]] <= k < group_begin[group[k] + 1] and segment_groups[segment[k]] <= group[k] < segment_groups[segment[k] + 1]
    assert group_begin.diff().max() <= 64 and len(segment_groups) == 4


@pytest.mark.parametrize("window", [1, 3, 7, 1000])
def test_order_of_a_steps_tasks(window):
    work, _ = work_of([128 * 100, 50, 128 * 40, 900], [0, 1, 2, 1])
    tasks = torch.frombuffer(bytearray(work.host.tasks(window)), dtype=torch.int32).tolist()
    segment = work.arrays[3].tolist()
    assert sorted(tasks) == sorted([*range(work.items), *(-1 - k for k in range(work.items))])
    for l in set(segment):
        items = [k for k, s in enumerate(segment) if s == l]
        last, first = max(tasks.index(k) for k in items), min(tasks.index(-1 - k) for k in items)
        assert last < first  # what a reconstruction waits for was handed out before it
        assert first - last > window or all(t < 0 for t in tasks[first:])  # few blocks wait for it, as long as there is other work
        assert [tasks.index(-1 - k) for k in reversed(items)] == sorted(tasks.index(-1 - k) for k in items)  # backwards


def test_no_tasks_where_a_segment_is_empty():
    work, _ = work_of([300, 0, 200], [0, 1, 2])
    assert work.host.tasks(3) == b""


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("bits", "n"), [(4, 5), (1, 33), (8, 100), (2, 140)])
def test_fused_step_has_the_bits_of_the_separate_calls(bits, n, seed, monkeypatch):
    """Many segments, several groups of items in one of them; threads, warps and blocks in another order each time."""
    monkeypatch.setenv("TWA_EMULATOR_SEED", str(seed))
    shapes = [(128 * 70,), (1,), (3000,), (129,), (128 * 16 * 66,) if n == 5 else (77,), (40, 40)]
    segments = [2, 0, 1, 2, 3, 1]
    basis, grads, center = put(tk.pack(rows_of(n, shapes), bits, segments=segments)), put(tensors(shapes, 7)), put(tensors(shapes, 9))
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    x, state, out = torch.randn(n, 4, device=DEVICE), {}, [torch.full(s, torch.nan, device=DEVICE) for s in shapes]
    for _ in range(2):
        c = tk.step(basis, grads, x, out, center, rule="adamw", options=options, state=state, backend="cuda")
    assert torch.equal(c, tk.project(basis, grads, "cuda"))
    assert all(torch.equal(o, w) for o, w in zip(out, tk.reconstruct(basis, x, center, backend="cuda"), strict=True))


def test_step_with_an_empty_segment():
    """Runs as separate kernels: its coefficients still decay."""
    shapes = [(300,), (0,), (200,)]
    basis = put(tk.pack([torch.randn(3, *s) for s in shapes], 4, segments=[0, 1, 2]))
    x, out = torch.ones(3, 3, device=DEVICE), [torch.empty(s, device=DEVICE) for s in shapes]
    c = tk.step(basis, put(tensors(shapes, 3)), x, out, rule="sgd", options={"lr": 0.5, "weight_decay": 0.1}, state={}, backend="cuda")
    assert c[:, 1].tolist() == [0, 0, 0] and torch.allclose(x[:, 1].cpu(), torch.full((3,), 0.95))


# Streams, graphs, devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cuda", "cpp", "reference"])
def test_steps_counted_on_the_device(backend):
    """options["capturable"]: the same update, with the number of steps in a tensor that the host does not read."""
    if ON_GPU and backend == "cpp":
        pytest.skip("C++ runs on the CPU")
    basis, grads = put(tk.pack(rows_of(5, SHAPES), 4, segments=SEGMENTS)), put(tensors(SHAPES, 7))
    results = []
    for capturable in (False, True):
        x, state, out = torch.zeros(5, 3, device=DEVICE), {}, [torch.empty(s, device=DEVICE) for s in SHAPES]
        options = {"lr": 0.1, "betas": (0.9, 0.99), "capturable": capturable}
        for k in range(3):
            tk.step(basis, grads, x, out, rule="adamw", options=options, state=state, backend=backend)
            assert int(state["step"]) == k + 1 and (state["step"].device.type == DEVICE or not capturable)
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


def test_a_basis_made_in_inference_mode():
    with torch.inference_mode():
        basis, g = put(tk.pack([torch.randn(3, 300)], 4)), torch.randn(300, device=DEVICE)
        assert torch.equal(tk.project(basis, g, "cuda"), tk.project(basis, g, "cuda"))


def test_tables_of_many_tensors():
    """More than the arguments of one kernel hold."""
    many = [torch.empty(k % 3, dtype=(torch.float32, torch.bfloat16, torch.float16)[k % 3], device=DEVICE) for k in range(700)]
    table = cuda.tensor_table(many, torch.device(DEVICE, 0) if ON_GPU else torch.device("cpu")).tolist()
    assert table == [[t.data_ptr() if t.numel() else 0, native.DTYPES[t.dtype]] for t in many]


def test_a_device_without_machine_code(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    cuda._no_code_for_device.cache_clear()

    class Built:
        with_cuda, cuda_architectures = True, "80 90"
        cuda_device_count = staticmethod(lambda: 1)

    monkeypatch.setattr(cuda, "module", Built)
    expected = "compiled for sm_80, sm_90, the device is sm_75: build with TWA_CUDA_ARCHITECTURES=75"
    assert cuda.why_unusable() == expected
    for capability, built, usable in [((8, 6), "80 90", True), ((12, 0), "80 90", True), ((12, 0), "80-real 90-real", False), ((8, 0), "90", False)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        Built.cuda_architectures = built
        cuda._no_code_for_device.cache_clear()
        assert (cuda.why_unusable() is None) == usable
    cuda._no_code_for_device.cache_clear()


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: streams and CUDA graphs")
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("own_stream", [True, False])
def test_other_stream_and_graph_replay(rule, own_stream):
    """On a stream of its own or the one that PyTorch captures on; gradients made inside the graph; other tables made before it is replayed."""
    basis, center = put(tk.pack(rows_of(9, SHAPES), 4, segments=SEGMENTS)), put(tensors(SHAPES, 9))
    fixed = put(tensors(SHAPES, 7))
    options = {"lr": 0.1, "capturable": True} if rule == "adamw" else {"lr": 0.1, "momentum": 0.9}

    def run(x, out, state):
        grads = [2.0 * g for g in fixed]
        return tk.step(basis, grads, x, out, center, rule=rule, options=options, state=state, backend="cuda")

    def fresh():
        return torch.zeros(9, 3, device=DEVICE), [torch.empty(s, device=DEVICE) for s in SHAPES], {}

    expected, theirs = fresh(), []
    for _ in range(5):
        c = run(*expected)
        theirs.append(expected[0].clone())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    ours = fresh()
    with torch.cuda.stream(stream):
        run(*ours)
        assert torch.equal(ours[0], theirs[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **({"stream": stream} if own_stream else {})):
        captured = run(*ours)
    for k in range(100):  # evicts every table of the cache
        cuda.tensor_table([torch.empty(1 + k, device=DEVICE)], torch.device("cuda", torch.cuda.current_device()))
    for k in range(1, 4):
        graph.replay()
        assert torch.equal(captured, c)
        torch.testing.assert_close(ours[0], theirs[k], rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: streams and CUDA graphs")
def test_what_a_graph_would_repeat_is_refused():
    basis, grads = put(tk.pack(rows_of(3, SHAPES), 4)), put(tensors(SHAPES, 7))
    x, state, out = torch.zeros(3, len(SHAPES), device=DEVICE), {}, [torch.empty(s, device=DEVICE) for s in SHAPES]
    tk.step(basis, grads, x, out, rule="adamw", options={"lr": 0.1}, state=state, backend="cuda")
    with pytest.raises(RuntimeError, match="needs options\\['capturable'\\]=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        tk.step(basis, grads, x, out, rule="adamw", options={"lr": 0.1}, state=state, backend="cuda")


def launch_on(device, module):
    """project, reconstruct, step, pack and orthonormalize_pass on tensors whose outputs are filled with 7; the error and the outputs."""
    n, tiles = 3, 2
    codes, scales = torch.zeros(tiles, n, 64, dtype=torch.uint8), torch.full((tiles, n), 0x38, dtype=torch.uint8)
    row_scale, segment, c, x = torch.ones(n, 1), torch.zeros(tiles, dtype=torch.int32), torch.full((n, 1), 7.0), torch.zeros(n, 1)
    out, g = torch.full((256,), 7.0), torch.ones(256)
    basis = module.Basis(codes.data_ptr(), scales.data_ptr(), row_scale.data_ptr(), segment.data_ptr(), n, tiles, 1, 4)
    tables = [torch.tensor([t.data_ptr(), 0]) for t in (g, out)]
    grad, weights, sgd = tables[0].data_ptr(), tables[1].data_ptr(), [0.0, 0.1, 0.0, 0.0, 0.0, 0.0]
    arrays = [torch.zeros(2, dtype=torch.int64) for _ in range(9)]
    work = module.Work([a.data_ptr() for a in arrays], 1, 1)
    space = [torch.zeros(64, dtype=torch.float64) for _ in range(7)]
    at = [s.data_ptr() for s in space]
    calls = {
        "project": lambda: module.project_cuda(basis, grad, work, at[0], at[1], c.data_ptr(), device, 0),
        "reconstruct": lambda: module.reconstruct_cuda(basis, x.data_ptr(), 0, weights, work, at[0], device, 0),
        "step": lambda: module.step_cuda(basis, grad, False, sgd, 1, x.data_ptr(), 0, 0, 0, weights, work, at, 4, c.data_ptr(), device, 0),
        "pack": lambda: module.pack_cuda(at[0], 0, at[1], at[2], at[3], 1, tiles, n, 4, False, codes.data_ptr(), at[4], at[4], at[4], device, 0),
        "orthonormalize_pass": lambda: module.orthonormalize_pass_cuda(
            grad, 0, weights, at[1], at[2], 1, 8, 1, at[3], at[4], 1, at[5], 0, at[0], at[6], c.data_ptr(), c.data_ptr(), device, 0
        ),
    }
    return calls, (out, c, codes), (tables, arrays, space, g)  # the last are pointed to


@pytest.mark.parametrize("op", ["project", "reconstruct", "step", "pack", "orthonormalize_pass"])
def test_launch_without_a_device_or_on_a_wrong_one(op):
    module, device = (native._C, 0) if not ON_GPU and native._C.with_cuda else (cuda.module, 99)
    calls, (out, c, codes), _ = launch_on(device, module)
    name = "cudaErrorInvalidDevice" if device == 99 or not native._C.with_cuda else "cudaError(NoDevice|InsufficientDriver)"
    with pytest.raises(RuntimeError, match=rf"{op}: CUDA error {name} on device {device} \(.+\); nothing was computed"):
        calls[op]()
    assert (out == 7).all() and (c == 7).all() and (codes == 0).all()


@pytest.mark.parametrize("op", ["project", "reconstruct", "step", "pack", "orthonormalize_pass"])
def test_wrong_device_number(op):
    calls, (out, c, codes), _ = launch_on(99, cuda.module)
    with pytest.raises(RuntimeError, match=f"{op}: CUDA error cudaErrorInvalidDevice on device 99"):
        calls[op]()
    assert (out == 7).all() and (c == 7).all() and (codes == 0).all()


# Without running: index maps, machine code, the C++ API ------------------------------------------------------------


def program(target, path):
    folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
    if not folder.exists():
        pytest.skip("the native module was not built by CMake in this tree")
    emulator.build(target, folder)
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run([folder / path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_index_maps_and_decoders():
    assert int(program("test_lanes", "emulator/test_lanes").split()[0]) > 400_000


def test_cpp_example():
    shown = program("twa_example", "twa_example")
    errors = [float(line.split()[-1]) for line in shown.splitlines() if "differs" in line]
    assert len(errors) >= 2 and max(errors) < 0.02, shown  # 8 bits


@pytest.fixture(scope="module")
def cost(tmp_path_factory):
    if not native._C.with_cuda:
        pytest.skip("the native module was built without CUDA (no nvcc)")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no disassembler: it comes with triton")
    folder = tmp_path_factory.mktemp("cost")
    command = [sys.executable, str(ROOT / "bench/static_cost_cuda.py"), "--output", str(folder)]
    done = processes.run(command)
    assert (folder / "cuda_static_cost.png").stat().st_size > 10_000, done.stdout[-2000:] + done.stderr[-2000:]
    assert "| project | 4 |" in (folder / "cuda_static_cost.md").read_text()
    return json.loads((folder / "cuda_static_cost.json").read_text())


def test_static_cost_of_the_shipped_kernels(cost):
    import static_cost_cuda

    assert [problem for row in cost for problem in static_cost_cuda.problems(row)] == []
    built = {(r["arch"], r["op"], r["bits"]) for r in cost}
    for arch in native._C.cuda_architectures.replace("-real", "").split():
        for op in ("pack", "project", "reconstruct", "step"):
            assert {bits for a, o, bits in built if (a, o) == (f"sm_{arch}", op)} == set(BITS)
    for row in cost:
        if "path" in row:  # the matrix units contract every column of every row, and nothing more
            padded = row["rows"] + 16 * (row["op"] == "reconstruct" and row["bits"] == 8 and row["rows"] % 32 == 16)
            assert row["products"] == padded * 128 * (2 if row["bits"] == 4 else 1)  # 4 bits: lower and upper levels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"barriers": 1}, "1 barriers of the block in the main loop"),
        ({"copies": 0}, "no asynchronous copies"),
        ({"share": 1.2}, "120 % of the instructions"),
        ({"alu": 1.2}, "120 % of the integer and logic pipe"),
        ({"per_weight": 3.9}, "3.90 instructions per weight, budget 3.7"),
    ],
)
def test_a_problem_is_reported(change, message):
    import static_cost_cuda

    row = {
        "op": "project",
        "bits": 4,
        "rows": 64,
        "many": False,
        "arch": "sm_90",
        "stack": 0,
        "path": 600,
        "barriers": 0,
        "copies": 3,
        "share": 0.6,
        "alu": 0.6,
    }
    row["per_weight"] = 2.4
    assert static_cost_cuda.problems(row) == []
    (found,) = static_cost_cuda.problems(row | change)
    assert message in found


def test_the_native_module_names_its_architectures():
    """`python -m twa_kernels` says what was built."""
    shown = run_python("import runpy, sys; sys.argv = ['twa_kernels']; runpy.run_module('twa_kernels', run_name='__main__')")
    assert not native._C.with_cuda or "sm_" in shown
