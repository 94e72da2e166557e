"""The host side of the CUDA C++ kernels, on any machine.

Work items, launches, what a graph's capture asks for.
"""

import weakref

import pytest
import torch
from conftest import BITS, ON_GPU, rows_of, tensors

import twa_kernels as tk
from twa_kernels import cuda, native

emulated = pytest.mark.skipif(
    ON_GPU, reason="runs the emulated module, which a session on a GPU does not load"
)
pytestmark = pytest.mark.skipif(
    cuda.module is None or not cuda.module.with_cuda, reason="built without CUDA"
)
SHAPES, SEGMENTS = [(1000,), (257,), (128 * 70,), (5,)], [0, 1, 0, 2]


# Work items and the order of a step's tasks -------------------------------------------------------


def work_of(numels, segments, bits=4):
    tile_segment = torch.cat(
        [
            torch.full((-(-numel // 128),), l, dtype=torch.int32)
            for numel, l in zip(numels, segments, strict=True)
        ]
    )
    return cuda.work_items(tile_segment, numels, max(segments) + 1, bits), tile_segment


@pytest.mark.parametrize("bits", BITS)
def test_work_items_cover_every_tile_once(bits):
    numels, segments = [128 * 200 + 1, 5, 128 * 64, 0, 700], [1, 0, 1, 2, 2]
    work, tile_segment = work_of(numels, segments, bits)
    tensor, tile, tiles, segment, group, group_begin, segment_groups, numel, tile_begin = (
        a.cpu() for a in work.arrays
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
    segment = work.arrays[3].tolist()
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
    """The launches of all ops on tensors whose outputs are filled with 7.

    project, reconstruct, step, pack and orthonormalize_pass; and the outputs.
    """
    n, tiles = 3, 2
    codes, scales = (
        torch.zeros(tiles, n, 64, dtype=torch.uint8),
        torch.full((tiles, n), 0x38, dtype=torch.uint8),
    )
    row_scale, segment, c, x = (
        torch.ones(n, 1),
        torch.zeros(tiles, dtype=torch.int32),
        torch.full((n, 1), 7.0),
        torch.zeros(n, 1),
    )
    out, g = torch.full((256,), 7.0), torch.ones(256)
    basis = module.Basis(
        codes.data_ptr(),
        scales.data_ptr(),
        row_scale.data_ptr(),
        segment.data_ptr(),
        n,
        tiles,
        1,
        4,
    )
    tables = [torch.tensor([t.data_ptr(), 0]) for t in (g, out)]
    grad, weights, sgd = tables[0].data_ptr(), tables[1].data_ptr(), [0.0, 0.1, 0.0, 0.0, 0.0, 0.0]
    arrays = [torch.zeros(2, dtype=torch.int64) for _ in range(9)]
    work = module.Work([a.data_ptr() for a in arrays], 1, 1)
    space = [torch.zeros(64, dtype=torch.float64) for _ in range(7)]
    at = [s.data_ptr() for s in space]
    calls = {
        "project": lambda: module.project_cuda(
            basis, grad, work, at[0], at[1], c.data_ptr(), device, 0
        ),
        "reconstruct": lambda: module.reconstruct_cuda(
            basis, x.data_ptr(), 0, weights, work, at[0], device, 0
        ),
        "step": lambda: module.step_cuda(
            basis,
            grad,
            False,
            sgd,
            1,
            x.data_ptr(),
            0,
            0,
            0,
            weights,
            work,
            at,
            window,
            c.data_ptr(),
            device,
            0,
        ),
        "pack": lambda: module.pack_cuda(
            at[0],
            0,
            at[1],
            at[2],
            at[3],
            1,
            tiles,
            n,
            4,
            codes.data_ptr(),
            at[4],
            at[4],
            at[4],
            device,
            0,
        ),
        "orthonormalize_pass": lambda: module.orthonormalize_pass_cuda(
            grad,
            0,
            weights,
            at[1],
            at[2],
            1,
            8,
            1,
            at[3],
            at[4],
            1,
            at[5],
            0,
            at[0],
            at[6],
            c.data_ptr(),
            c.data_ptr(),
            device,
            0,
        ),
    }
    return calls, (out, c, codes), (tables, arrays, space, g)  # the last are pointed to


on_a_gpu_too = pytest.mark.gpu if ON_GPU else lambda test: test


@on_a_gpu_too
@pytest.mark.parametrize("op", ["project", "reconstruct", "step", "pack", "orthonormalize_pass"])
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
@pytest.mark.parametrize("op", ["project", "reconstruct", "step", "pack", "orthonormalize_pass"])
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
    where = {
        "project_cuda": (1,),
        "reconstruct_cuda": (2, 3),
        "step_cuda": (1, 8, 9),
    }  # arguments that are tables
    cuda._tensor_table.cache_clear()

    class Watched:
        def __getattr__(self, name):
            call = getattr(module, name)
            if name not in where:
                return call

            def launch(*arguments):
                passed = {arguments[k] for k in where[name]}
                assert all(made[at]() is not None for at in passed), (
                    f"{name}: a table that nobody holds is passed"
                )
                seen.append((name, len(passed)))
                return call(*arguments)

            return launch

    write = cuda._write_table

    def write_and_watch(entries, device):
        table = write(entries, device)
        made[table.data_ptr()] = weakref.ref(table)
        return table

    monkeypatch.setattr(cuda, "_write_table", write_and_watch)
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
    assert native.capturing(torch.device("cuda", 1)) and not native.capturing(
        torch.device("cuda", 0)
    )
    assert not native.capturing(torch.device("cpu"))


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
