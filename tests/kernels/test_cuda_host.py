"""The host side of the CUDA C++ kernels, on any machine.

Work items, launches, what a graph's capture asks for.
"""

import weakref

import pytest
import torch
from conftest import BITS, ON_GPU, rows_of, tensors

import twa_kernels as tk
from twa_kernels import native
from twa_kernels.backends import cuda, handles
from twa_kernels.backends.tensors import Recent
from twa_kernels.capture import capturing
from twa_kernels.operands import BasisView

emulated = pytest.mark.skipif(
    ON_GPU, reason="runs the emulated module, which a session on a GPU does not load"
)
pytestmark = pytest.mark.skipif(
    cuda.module is None or not cuda.module.with_cuda, reason="built without CUDA"
)
SHAPES, SEGMENTS = [(1000,), (257,), (128 * 70,), (5,)], [0, 1, 0, 2]
OPS = ("project", "reconstruct", "step", "pack", "record", "replay", "orthonormalize_pass")


# Work items and the order of a step's tasks -------------------------------------------------------


def work_of(numels, segments, bits=4):
    tile_segment = torch.cat(
        [
            torch.full((-(-numel // 128),), l, dtype=torch.int32)
            for numel, l in zip(numels, segments, strict=True)
        ]
    )
    n, tiles = 2, len(tile_segment)
    view = BasisView(
        torch.zeros(tiles, n, 16 * bits, dtype=torch.uint8),
        torch.zeros(tiles, n, dtype=torch.uint8),
        torch.ones(n, max(segments) + 1),
        tile_segment,
        tuple(numels),
        bits,
    )
    return cuda.work_items(view), tile_segment


@pytest.mark.parametrize("bits", BITS)
def test_work_items_cover_every_tile_once(bits):
    numels, segments = [128 * 200 + 1, 5, 128 * 64, 0, 700], [1, 0, 1, 2, 2]
    work, tile_segment = work_of(numels, segments, bits)
    tensor, tile, tiles, segment, group, group_begin, segment_groups, numel, tile_begin = (
        a.cpu() for a in work.arrays.values()
    )
    most = {8: 16, 4: 16, 3: 32, 2: 32, 1: 64}[bits]
    assert (
        tiles.min() >= 1
        and tiles.max() == most
        and numel.tolist() == numels
        and (segment.diff() >= 0).all()
    )
    covered = torch.cat(
        [torch.arange(first, first + count) for first, count in zip(tile, tiles, strict=True)]
    )
    assert sorted(covered.tolist()) == list(range(len(tile_segment)))
    for k in range(work.items):
        assert (tile_segment[tile[k] : tile[k] + tiles[k]] == segment[k]).all()
        assert (
            tile_begin[tensor[k]] <= tile[k] < tile_begin[tensor[k]] + -(-numels[tensor[k]] // 128)
        )
        assert (
            group_begin[group[k]] <= k < group_begin[group[k] + 1]
            and segment_groups[segment[k]] <= group[k] < segment_groups[segment[k] + 1]
        )
    assert group_begin.diff().max() <= 64 and len(segment_groups) == 4


@pytest.mark.parametrize("window", [1, 3, 7, 1000])
def test_order_of_a_steps_tasks(window):
    work, _ = work_of([128 * 100, 50, 128 * 40, 900], [0, 1, 2, 1])
    tasks = torch.frombuffer(bytearray(work.host.tasks(window)), dtype=torch.int32).tolist()
    segment = work.arrays["item_segment"].tolist()
    assert sorted(tasks) == sorted([*range(work.items), *(-1 - k for k in range(work.items))])
    for l in set(segment):
        items = [k for k, s in enumerate(segment) if s == l]
        last, first = max(tasks.index(k) for k in items), min(tasks.index(-1 - k) for k in items)
        assert last < first  # what a reconstruction waits for was handed out before it
        # Few blocks wait for it, as long as there is other work.
        assert first - last > window or all(t < 0 for t in tasks[first:])
        backwards = [tasks.index(-1 - k) for k in reversed(items)]
        assert backwards == sorted(backwards)


def test_no_tasks_where_a_segment_is_empty():
    work, _ = work_of([300, 0, 200], [0, 1, 2])
    assert work.host.tasks(3) == b""


# Devices ------------------------------------------------------------------------------------------


def test_a_device_without_machine_code(monkeypatch):
    devices = [(7, 5)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda k: devices[k])
    cuda._no_code_for_device.cache_clear()

    class Built:
        with_cuda, cuda_architectures = True, "80 90"
        cuda_device_count = staticmethod(lambda: 1)

    monkeypatch.setattr(cuda, "module", Built)
    expected = (
        "compiled for sm_80, sm_90, the device is sm_75: build with TWA_CUDA_ARCHITECTURES=75"
    )
    assert cuda.why_unusable() == expected
    for capability, built, usable in [
        ((8, 6), "80 90", True),
        ((12, 0), "80 90", True),
        ((12, 0), "80-real 90-real", False),
        ((8, 0), "90", False),
    ]:
        devices[:] = [capability]
        Built.cuda_architectures = built
        cuda._no_code_for_device.cache_clear()
        assert (cuda.why_unusable() is None) == usable
    for devices[:], usable in [
        ([(7, 5), (9, 0)], True),
        ([(7, 5), (6, 1)], False),
    ]:  # whichever is the current one
        cuda._no_code_for_device.cache_clear()
        assert (cuda.why_unusable() is None) == usable
    assert "the devices are sm_61, sm_75" in cuda.why_unusable()
    cuda._no_code_for_device.cache_clear()


def launch_on(device, module, window=4):
    """The launches of all ops (OPS) on tensors whose outputs are filled with 7; and the outputs."""
    n, tiles, f64 = 3, 2, torch.float64
    codes = torch.zeros(tiles, n, 64, dtype=torch.uint8)
    scales = torch.full((tiles, n), 0x38, dtype=torch.uint8)
    row_scale, segment = torch.ones(n, 1), torch.zeros(tiles, dtype=torch.int32)
    c, x, out, g = (
        torch.full((n, 1), 7.0),
        torch.zeros(n, 1),
        torch.full((256,), 7.0),
        torch.ones(256),
    )
    basis = module.Basis(
        codes=codes, scales=scales, row_scale=row_scale, tile_segment=segment, numel=[256], bits=4
    )
    grad, weights = (torch.tensor([[t.data_ptr(), 0]]) for t in (g, out))
    arrays = {
        "item_tensor": torch.zeros(1, dtype=torch.int32),
        "item_tile": torch.zeros(1, dtype=torch.int64),
        "item_tiles": torch.full((1,), 2, dtype=torch.int32),
        "item_segment": torch.zeros(1, dtype=torch.int32),
        "item_group": torch.zeros(1, dtype=torch.int32),
        "group_begin": torch.tensor([0, 1], dtype=torch.int32),
        "segment_groups": torch.tensor([0, 1], dtype=torch.int32),
        "numel": torch.tensor([256]),
        "tile_begin": torch.zeros(1, dtype=torch.int64),
    }
    work = module.Work(**arrays)
    partial, sums, x_rows = torch.zeros(1, n), torch.zeros(1, n, dtype=f64), torch.zeros(1, n)
    space = module.StepWorkspace(
        basis=basis,
        work=work,
        partial=partial,
        sums=sums,
        x_rows=x_rows,
        counters=torch.zeros(module.step_counters(1, 1), dtype=torch.int32),
        tasks=torch.tensor([0, -1], dtype=torch.int32),
        window=window,
        steps_before=None,
        corrections=torch.zeros(2),
    )
    update = module.Update(
        rule="sgd",
        maximize=False,
        lr=0.1,
        weight_decay=0.0,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
        beta1=0.0,
        beta2=0.0,
        eps=0.0,
        step=1,
    )
    rows = torch.tensor([[g.data_ptr(), 0]] * n)
    table = module.DeviceRows(rows=rows, center=None, numel=arrays["numel"], n=n)
    where = {"device": device, "stream": 0}
    parts, stride, room = module.orthonormalize_plan(n, 0, 8, False, False)
    partials, workspace = torch.zeros(parts, stride, dtype=f64), torch.zeros(room, dtype=f64)
    gram = torch.full((n, n), 7.0, dtype=f64)
    half = torch.zeros(tiles, n, dtype=torch.bfloat16)
    calls = {
        "project": lambda: module.project_cuda(
            basis=basis, grads=grad, work=work, partial=partial, sums=sums, c=c, **where
        ),
        "reconstruct": lambda: module.reconstruct_cuda(
            basis=basis, x=x, center=None, out=weights, work=work, x_rows=x_rows, **where
        ),
        "step": lambda: module.step_cuda(
            basis=basis,
            grads=grad,
            update=update,
            x=x,
            first=None,
            second=None,
            center=None,
            out=weights,
            work=work,
            workspace=space,
            c=c,
            **where,
        ),
        "pack": lambda: module.pack_cuda(
            rows=table,
            tile_begin=arrays["tile_begin"],
            unit_begin=arrays["tile_begin"],
            units=1,
            tile_segment=torch.zeros(tiles, dtype=torch.int32),
            bits=4,
            codes=codes,
            scales=half,
            sum_sq=torch.zeros(n, 1, dtype=f64),
            max_scale=torch.zeros(n, 1),
            squares=torch.zeros(tiles, n, dtype=f64),
            pieces=torch.zeros(1, module.unit_tiles + 1, dtype=torch.int32),
            bad=torch.zeros((), dtype=torch.int32),
            **where,
        ),
        "record": lambda: module.record_cuda(
            weights=grad,
            reference=weights,
            numel=arrays["numel"],
            tile_begin=arrays["tile_begin"],
            bits=4,
            codes=codes[:, 0].contiguous(),
            scales=half[:, 0].contiguous(),
            bad=torch.zeros((), dtype=torch.int32),
            **where,
        ),
        "replay": lambda: module.replay_cuda(
            out=weights,
            numel=arrays["numel"],
            tile_begin=arrays["tile_begin"],
            tiles=tiles,
            bits=4,
            rows=torch.zeros(1, 3, dtype=torch.int64),
            ones=False,
            **where,
        ),
        "orthonormalize_pass": lambda: module.orthonormalize_pass_cuda(
            rows=table,
            parent=torch.tensor([-1, 0, 1], dtype=torch.int32),
            transform=None,
            probes=None,
            first=0,
            out=None,
            chunk_begin=arrays["tile_begin"],
            chunks=8,
            partials=partials,
            space=workspace,
            gram=gram,
            norms=torch.zeros(n, dtype=f64),
            **where,
        ),
    }
    kept = (grad, weights, arrays, partial, sums, x_rows, rows, g, scales, row_scale, segment, x)
    return calls, (out, c, codes), kept


@emulated
def test_a_swapped_or_short_operand_is_refused():
    """By its dtype or its size, before a kernel runs; and operands have names."""
    calls, _, (grad, _, _, partial, sums, *_) = launch_on(0, cuda.module)
    calls["project"]()
    basis = tk.pack([torch.randn(3, 256)], 4)
    handle = handles.basis_handle(basis.view, cuda.module)
    given = {
        "basis": handle,
        "grads": grad,
        "work": cuda.work_items(basis.view).native,
        "partial": partial,
        "sums": sums,
        "c": torch.zeros(3, 1),
        "device": 0,
        "stream": 0,
    }
    cuda.module.project_cuda(**given)
    for change, error in [
        ({"partial": sums}, "partial: expected float32, found torch.float64"),
        ({"c": torch.zeros(2)}, "c: expected 3 numbers, found 2"),
        ({"c": torch.zeros(3, 2)[:, :1]}, "c: expected a contiguous tensor"),
        ({"grads": torch.zeros(3, 2, dtype=torch.int64)}, "grads: expected 2 numbers, found 6"),
    ]:
        with pytest.raises((TypeError, ValueError), match=error):
            cuda.module.project_cuda(**given | change)
    with pytest.raises(TypeError):
        cuda.module.project_cuda(*given.values())


on_a_gpu_too = pytest.mark.gpu if ON_GPU else lambda test: test


@on_a_gpu_too
@pytest.mark.parametrize("op", OPS)
def test_launch_without_a_device_or_on_a_wrong_one(op):
    module, device = (native._C, 0) if not ON_GPU and native._C.with_cuda else (cuda.module, 99)
    calls, (out, c, codes), _ = launch_on(device, module)
    name = (
        "cudaErrorInvalidDevice"
        if device == 99 or not native._C.with_cuda
        else "cudaError(NoDevice|InsufficientDriver)"
    )
    with pytest.raises(
        RuntimeError,
        match=rf"{op}: CUDA error {name} on device {device} \(.+\); nothing was computed",
    ):
        calls[op]()
    assert (out == 7).all() and (c == 7).all() and (codes == 0).all()


@on_a_gpu_too
@pytest.mark.parametrize("op", OPS)
def test_wrong_device_number(op):
    calls, (out, c, codes), _ = launch_on(99, cuda.module)
    with pytest.raises(RuntimeError, match=f"{op}: CUDA error cudaErrorInvalidDevice on device 99"):
        calls[op]()
    assert (out == 7).all() and (c == 7).all() and (codes == 0).all()


# Graph capture ------------------------------------------------------------------------------------


@pytest.fixture
def tables_at_launch(monkeypatch):
    """[(op, how many different tables were alive when it was launched)], of the emulated module."""
    made, seen, module = {}, [], cuda.module  # address -> the latest table there
    names = ("grads", "center", "out")
    monkeypatch.setattr(cuda, "_tables", Recent())

    class Watched:
        def __getattr__(self, name):
            call = getattr(module, name)
            if name == "write_table":

                def write(**given):
                    made[given["to"].data_ptr()] = weakref.ref(given["to"])
                    return call(**given)

                return write
            if name not in ("project_cuda", "reconstruct_cuda", "step_cuda"):
                return call

            def launch(**given):
                passed = {given[k].data_ptr() for k in names if given.get(k) is not None}
                assert all(made[at]() is not None for at in passed), (
                    f"{name}: a table that nobody holds is passed"
                )
                seen.append((name, len(passed)))
                return call(**given)

            return launch

    monkeypatch.setattr(cuda, "module", Watched())
    return seen


@emulated
def test_tables_of_a_captured_launch_are_alive_and_distinct(capture, tables_at_launch):
    """A graph gets tables of its own.

    Memory of one that is dropped before the launch goes to the next: they would be one table.
    """
    basis, grads, center = (
        tk.pack(rows_of(5, SHAPES), 4, segments=SEGMENTS),
        tensors(SHAPES, 7),
        tensors(SHAPES, 9),
    )
    x = torch.randn(5, 3)
    options = {"lr": 0.1, "capturable": True}

    def run():
        own, state, out = x.clone(), {}, [torch.empty(s) for s in SHAPES]
        c = tk.project(basis, grads, "cuda")
        weights = tk.reconstruct(basis, own, center, backend="cuda")
        tk.step(
            basis,
            grads,
            own,
            out,
            center,
            rule="adamw",
            options=options,
            state=state,
            backend="cuda",
        )
        return [c, own, *weights, *out]

    expected = run()
    tables_at_launch.clear()
    capture("cpu")
    for ours, other in zip(run(), expected, strict=True):
        assert torch.equal(ours, other)
    assert tables_at_launch == [("project_cuda", 1), ("reconstruct_cuda", 2), ("step_cuda", 3)]


def test_capture_is_asked_of_the_devices_own_stream(monkeypatch):
    """Not of the current device's: the basis may be on another one."""
    current = [0]

    class OnDevice:
        def __init__(self, device):
            self.index = torch.device(device).index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_):
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "device", OnDevice)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 1)
    assert capturing(torch.device("cuda", 1)) and not capturing(torch.device("cuda", 0))
    assert not capturing(torch.device("cpu"))


@emulated
def test_a_kernel_that_fits_on_no_multiprocessor_is_an_error(monkeypatch):
    """Not a launch of no blocks that succeeds and writes nothing."""
    basis, grads = tk.pack(rows_of(7, SHAPES), 4, segments=SEGMENTS), tensors(SHAPES, 7)
    out = [torch.full(s, 7.0) for s in SHAPES]
    monkeypatch.setenv("TWA_EMULATOR_RESIDENT", "0")
    cuda._window.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="step: CUDA error cudaErrorLaunchOutOfResources"):
            tk.step(
                basis,
                grads,
                torch.zeros(7, 3),
                out,
                rule="sgd",
                options={"lr": 0.1},
                state={},
                backend="cuda",
            )
    finally:
        cuda._window.cache_clear()
    assert all((o == 7).all() for o in out)
    calls, (out, c, _), _ = launch_on(0, cuda.module, window=0)
    with pytest.raises(RuntimeError, match="step: CUDA error cudaErrorInvalidValue"):
        calls["step"]()
    assert (out == 7).all() and (c == 7).all()
