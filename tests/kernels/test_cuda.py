"""CUDA C++ kernels beyond the tests that every GPU backend shares.

The kernels run on the GPU, or compiled for the CPU (tests/emulator).
"""

import pytest
import torch
from conftest import BITS, ON_GPU, exhaustive, rows_of, tensors

import twa_kernels as tk
from twa_kernels import registry
from twa_kernels.backends import cuda, handles

DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    pytest.mark.skipif(cuda.why_unusable() is not None, reason=str(cuda.why_unusable()))
] + [pytest.mark.gpu] * ON_GPU


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


@pytest.mark.parametrize("n", [1, 16, 33, 64, 72, 128, 129, 300, *map(exhaustive, (31, 97, 200))])
@pytest.mark.parametrize("bits", BITS)
def test_any_number_of_rows(bits, n, copies, monkeypatch):
    """Each kernel that is built (groups of 32 rows, several blocks of rows).

    And rows that fill no group; threads in another order each time.
    """
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
        # Fixed point is relative to the coefficients, not to a sum of 300 terms that happens to be
        # small.
        size = torch.tensordot(x[:, l].double().abs(), row.double().abs(), 1)
        assert ((w.cpu() - exact).abs() <= 1e-6 * exact.abs().max() + 2.0**-24 * size).all()


def test_4096_rows():
    basis = tk.pack([torch.randn(4096, 130)], 1)
    g, x = torch.randn(130), torch.randn(4096, 1)
    truth = truth_of(basis, [g], [0])
    assert (
        (tk.project(put(basis), put(g), "cuda").cpu() - truth).abs() <= 1e-6 * truth.abs().max()
    ).all()
    exact = x[:, 0].double() @ tk.unpack(basis)[0].double()
    assert (
        (tk.reconstruct(put(basis), put(x), backend="cuda")[0].cpu() - exact).abs()
        <= 2e-6 * exact.abs().max()
    ).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_views_at_any_address(offset, dtype):
    """Gradients, centers and weights that begin in the middle of a buffer.

    As in flattened parameters.
    """
    basis = tk.pack(rows_of(5, SHAPES), 4, segments=SEGMENTS)
    center, grads, x = tensors(SHAPES, 9, dtype), tensors(SHAPES, 7, dtype), torch.randn(5, 3)

    def view(t):
        flat = torch.full((t.numel() + 2 * offset,), 7.0, dtype=t.dtype, device=DEVICE)
        inside = flat[offset : offset + t.numel()].view(t.shape)
        inside.copy_(t)
        return inside

    basis, center, grads, x = put(basis), put(center), put(grads), put(x)
    assert torch.equal(
        tk.project(basis, [view(g) for g in grads], "cuda"), tk.project(basis, grads, "cuda")
    )
    out = [view(torch.zeros_like(m)) for m in center]
    tk.reconstruct(basis, x, [view(m) for m in center], out=out, backend="cuda")
    for o, expected in zip(out, tk.reconstruct(basis, x, center, backend="cuda"), strict=True):
        assert torch.equal(o, expected)
        around = o.untyped_storage()
        flat = torch.empty(0, dtype=dtype, device=DEVICE).set_(around)
        assert (flat[:offset] == 7).all() and (
            flat[-offset:] == 7
        ).all()  # nothing beside the view was written


def test_codes_that_no_copy_can_start_from():
    basis = put(tk.pack([torch.randn(2, 300)], 4))
    codes = torch.empty(basis.codes.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:].view(
        basis.codes.shape
    )
    codes.copy_(basis.codes)
    moved = tk.PackedBasis(
        codes,
        basis.scales,
        basis.row_scale,
        basis.tile_segment,
        basis.divisor,
        basis.shapes,
        basis.bits,
    )
    with pytest.raises(
        ValueError, match="expected a multiple of 16, which asynchronous copies need"
    ):
        tk.project(moved, torch.randn(300, device=DEVICE), "cuda")


# The fused step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("bits", "n"), [(4, 5), (1, 33), (8, 100), (2, 140)])
def test_fused_step_has_the_bits_of_the_separate_calls(bits, n, seed, monkeypatch):
    """Many segments, several groups of items in one of them.

    Threads, warps and blocks in another order each time.
    """
    monkeypatch.setenv("TWA_EMULATOR_SEED", str(seed))
    shapes = [(128 * 70,), (1,), (3000,), (129,), (128 * 16 * 66,) if n == 5 else (77,), (40, 40)]
    segments = [2, 0, 1, 2, 3, 1]
    basis, grads, center = (
        put(tk.pack(rows_of(n, shapes), bits, segments=segments)),
        put(tensors(shapes, 7)),
        put(tensors(shapes, 9)),
    )
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    x, state, out = (
        torch.randn(n, 4, device=DEVICE),
        {},
        [torch.full(s, torch.nan, device=DEVICE) for s in shapes],
    )
    for _ in range(2):
        c = tk.step(
            basis, grads, x, out, center, rule="adamw", options=options, state=state, backend="cuda"
        )
    assert torch.equal(c, tk.project(basis, grads, "cuda"))
    assert all(
        torch.equal(o, w)
        for o, w in zip(out, tk.reconstruct(basis, x, center, backend="cuda"), strict=True)
    )


def test_step_with_an_empty_segment():
    """Runs as separate kernels: its coefficients still decay."""
    shapes = [(300,), (0,), (200,)]
    basis = put(tk.pack([torch.randn(3, *s) for s in shapes], 4, segments=[0, 1, 2]))
    x, out = torch.ones(3, 3, device=DEVICE), [torch.empty(s, device=DEVICE) for s in shapes]
    c = tk.step(
        basis,
        put(tensors(shapes, 3)),
        x,
        out,
        rule="sgd",
        options={"lr": 0.5, "weight_decay": 0.1},
        state={},
        backend="cuda",
    )
    assert c[:, 1].tolist() == [0, 0, 0] and torch.allclose(x[:, 1].cpu(), torch.full((3,), 0.95))


@pytest.fixture
def variant():
    """set_variant, and afterwards the shipped one."""
    yield cuda.set_variant
    cuda.set_variant()


@pytest.mark.parametrize(
    "options", [{"fence": False}, {"ring_kib": 1}, {"ring_kib": 20}, {"step_blocks": 1}], ids=str
)
@pytest.mark.parametrize("bits", [8, 4, 1])
def test_variants_have_the_bits_of_what_is_shipped(bits, options, variant):
    shapes = [(128 * 20,), (200,)]
    basis = put(tk.pack(rows_of(72, shapes), bits, segments=[0, 1]))
    grads, center = put(tensors(shapes, 7)), put(tensors(shapes, 9))

    def results():
        x, out = torch.ones(72, 2, device=DEVICE), put(tensors(shapes, 1))
        sgd = {"rule": "sgd", "options": {"lr": 0.1}, "state": {}, "backend": "cuda"}
        c = tk.step(basis, grads, x, out, center, **sgd)
        return [c, x, *out, tk.project(basis, grads, "cuda"), *tk.reconstruct(basis, x, center)]

    shipped = results()
    variant(**options)
    assert all(torch.equal(a, b) for a, b in zip(results(), shipped, strict=True))


def test_a_variant_that_is_none(variant):
    with pytest.raises(ValueError, match="expected 1 <= ring_kib <= 32 and step_blocks >= 1"):
        variant(ring_kib=0)


# Streams, graphs, devices -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cuda", "cpp", "reference"])
def test_steps_counted_on_the_device(backend):
    """options["capturable"]: the same update.

    The number of steps is in a tensor that the host does not read.
    """
    if ON_GPU and backend == "cpp":
        pytest.skip("C++ runs on the CPU")
    basis, grads = put(tk.pack(rows_of(5, SHAPES), 4, segments=SEGMENTS)), put(tensors(SHAPES, 7))
    results = []
    for capturable in (False, True):
        x, state, out = (
            torch.zeros(5, 3, device=DEVICE),
            {},
            [torch.empty(s, device=DEVICE) for s in SHAPES],
        )
        options = {"lr": 0.1, "betas": (0.9, 0.99), "capturable": capturable}
        for k in range(3):
            tk.step(
                basis, grads, x, out, rule="adamw", options=options, state=state, backend=backend
            )
            assert int(state["step"]) == k + 1 and (
                state["step"].device.type == DEVICE or not capturable
            )
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


def test_a_basis_made_in_inference_mode():
    with torch.inference_mode():
        basis, g = put(tk.pack([torch.randn(3, 300)], 4)), torch.randn(300, device=DEVICE)
        assert torch.equal(tk.project(basis, g, "cuda"), tk.project(basis, g, "cuda"))


def test_tables_of_many_tensors():
    """More than the arguments of one kernel hold."""
    many = [
        torch.empty(
            k % 3, dtype=(torch.float32, torch.bfloat16, torch.float16)[k % 3], device=DEVICE
        )
        for k in range(700)
    ]
    device = torch.device(DEVICE, 0) if ON_GPU else torch.device("cpu")
    table = cuda.tensor_table(handles.read(many, cuda.module), device).tolist()
    number = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
    assert table == [[t.data_ptr() if t.numel() else 0, number[t.dtype]] for t in many]


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: streams and CUDA graphs")
@pytest.mark.parametrize(
    ("backend", "rule"), [("cuda", "sgd"), ("cuda", "adamw"), ("triton", "sgd")]
)
@pytest.mark.parametrize("own_stream", [True, False])
def test_other_stream_and_graph_replay(backend, rule, own_stream):
    """Replay of a graph, on a stream of its own or the one that PyTorch captures on.

    Gradients made inside the graph; other tables made before it is replayed.
    """
    basis, center = put(tk.pack(rows_of(9, SHAPES), 4, segments=SEGMENTS)), put(tensors(SHAPES, 9))
    fixed = put(tensors(SHAPES, 7))
    options = {"lr": 0.1, "capturable": True} if rule == "adamw" else {"lr": 0.1, "momentum": 0.9}

    def run(x, out, state):
        grads = [2.0 * g for g in fixed]
        return tk.step(
            basis, grads, x, out, center, rule=rule, options=options, state=state, backend=backend
        )

    def fresh():
        return torch.zeros(9, 3, device=DEVICE), [torch.empty(s, device=DEVICE) for s in SHAPES], {}

    expected, theirs = fresh(), []
    for _ in range(5):
        c = run(*expected)
        theirs.append(expected[0].clone())
    stream = torch.cuda.Stream()
    ours = fresh()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(*ours)
        assert torch.equal(ours[0], theirs[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **({"stream": stream} if own_stream else {})):
        captured = run(*ours)
    for _ in range(100):  # evicts every table of the caches
        tk.project(basis, [torch.randn(s, device=DEVICE) for s in SHAPES], backend)
    for k in range(1, 4):
        graph.replay()
        assert torch.equal(captured, c)
        torch.testing.assert_close(ours[0], theirs[k], rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: streams and CUDA graphs")
def test_what_a_graph_would_repeat_is_refused():
    basis, grads = put(tk.pack(rows_of(3, SHAPES), 4)), put(tensors(SHAPES, 7))
    x, state, out = (
        torch.zeros(3, len(SHAPES), device=DEVICE),
        {},
        [torch.empty(s, device=DEVICE) for s in SHAPES],
    )
    tk.step(basis, grads, x, out, rule="adamw", options={"lr": 0.1}, state=state, backend="cuda")
    with (
        pytest.raises(RuntimeError, match="needs options\\['capturable'\\]=True"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        tk.step(
            basis, grads, x, out, rule="adamw", options={"lr": 0.1}, state=state, backend="cuda"
        )


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_captured_step_that_a_graph_would_repeat_wrongly_is_refused(backend, capture):
    if registry.why_unusable(backend):
        pytest.skip(str(registry.why_unusable(backend)))
    basis, grads = put(tk.pack(rows_of(3, SHAPES), 4)), put(tensors(SHAPES, 7))
    x, out = (
        torch.zeros(3, len(SHAPES), device=DEVICE),
        [torch.empty(s, device=DEVICE) for s in SHAPES],
    )

    def step(rule, state, **options):
        tk.step(
            basis,
            grads,
            x,
            out,
            rule=rule,
            options={"lr": 0.1} | options,
            state=state,
            backend=backend,
        )

    adamw: dict = {}
    step("adamw", adamw)
    capture()
    before = x.clone()
    with pytest.raises(RuntimeError, match="needs options\\['capturable'\\]=True"):
        step("adamw", adamw)
    with pytest.raises(
        RuntimeError, match="cannot capture the first step of an optimizer with momentum"
    ):
        step("sgd", {}, momentum=0.9)
    if backend == "triton":
        with pytest.raises(RuntimeError, match="cannot read the number of steps back"):
            step("adamw", {}, capturable=True)
    assert torch.equal(x, before)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: streams and CUDA graphs")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", ["project", "reconstruct", "step"])
def test_a_first_call_in_a_real_graph_says_what_to_do(op, backend):
    """Before anything that a capture does not allow: the device is as it was."""
    shapes = [(700,), (1000,)]
    basis, g, x = (
        put(tk.pack(rows_of(3, shapes), 2)),
        put(tensors(shapes, 7)),
        torch.ones(3, 2, device=DEVICE),
    )
    tk.project(put(tk.pack(rows_of(3, shapes), 4)), g, backend)  # the kernel is loaded
    out, sgd = (
        [torch.empty(s, device=DEVICE) for s in shapes],
        {"rule": "sgd", "options": {"lr": 0.1}, "state": {}},
    )
    calls = {
        "project": lambda: tk.project(basis, g, backend),
        "reconstruct": lambda: tk.reconstruct(basis, x, out=out, backend=backend),
        "step": lambda: tk.step(basis, g, x, out, backend=backend, **sgd),
    }
    with (
        pytest.raises(RuntimeError, match="make the same call once"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        calls[op]()
    expected = tk.project(basis.to("cpu"), [t.cpu() for t in g])
    torch.testing.assert_close(tk.project(basis, g, backend).cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_first_call_under_capture_says_what_to_do(backend, capture):
    if registry.why_unusable(backend):
        pytest.skip(str(registry.why_unusable(backend)))
    basis, grads = put(tk.pack(rows_of(3, SHAPES), 4)), put(tensors(SHAPES, 7))
    capture()
    with pytest.raises(RuntimeError, match="make the same call once before the capture"):
        tk.project(basis, grads, backend)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_what_reads_back_is_refused_under_capture(backend, capture):
    if registry.why_unusable(backend):
        pytest.skip(str(registry.why_unusable(backend)))
    rows = torch.randn(3, 300, device=DEVICE)
    basis, parent = (
        put(tk.pack([torch.randn(3, 300)], 4)),
        torch.tensor([-1, 0, 1], dtype=torch.int32, device=DEVICE),
    )
    capture()
    with pytest.raises(RuntimeError, match="pack: reads results back"):
        tk.pack([rows], 4, backend=backend)
    with pytest.raises(RuntimeError, match="gram: reads results back"):
        basis.gram(backend="triton" if backend == "triton" else "reference")
    with pytest.raises(RuntimeError, match="orthonormalize_pass: reads results back"):
        torch.ops.twa_kernels.orthonormalize_pass(
            list(rows), [], [300], parent, None, None, 0, False, [], backend
        )


# pack: sums over tiles, and the ways of its quantiser ---------------------------------------------


@pytest.mark.parametrize("n", [1, 33, 130])
@pytest.mark.parametrize("width", [1, 3, 8, 64, 100, 10_000])
def test_squared_norms_have_the_bits_of_the_cpu(width, n):
    """Segments of `width` tiles, which units of 64 do not end with; one that comes again and again,
    tensors of one segment, and parts of a tensor.
    """
    shapes = [(128 * 150 + 5,), (77,), (128 * 64,), (0,), (128 * 3,)]
    tiles = [-(-shape[0] // 128) for shape in shapes]
    segments = [t // width % 300 for t in range(sum(tiles))]
    rows, center = rows_of(n, shapes), tensors(shapes, 5)
    expected = tk.pack(rows, 4, center, segments)
    found = tk.pack(put(rows), 4, put(center), segments, backend="cuda")
    same_bits(found, expected)
    packer = tk.Packer(n, shapes, 4, segments, DEVICE, "cuda")
    for row, c in zip(put(rows), put(center), strict=True):
        for begin in range(0, row.shape[1], 8192):
            at = slice(begin, begin + 8192)
            packer.add_columns(row[:, at], begin, c[at])
        packer.end_tensor()
    same_bits(packer.finish(), expected)


def same_bits(found, expected):
    for name in ("codes", "scales", "row_scale", "divisor"):
        a, b = getattr(found, name).cpu(), getattr(expected, name)
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


@pytest.mark.filterwarnings("ignore:.* groups are zero in the packed basis")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
def test_four_tiles_at_a_time_and_one_by_one(bits, dtype):
    """Four usual groups of a row go together; with a zero, extreme or ragged one among them they
    go one by one.
    """
    rows = torch.randn(9, 128 * 41 + 30).to(dtype)
    center = torch.randn(128 * 41 + 30)
    rows[3, 128 * 5 : 128 * 6] = 0.0
    center[128 * 5 : 128 * 6] = 0.0
    rows[5, 128 * 9 : 128 * 10], center[128 * 9 : 128 * 10] = 2.0**-14, 0.0
    if dtype != torch.float16:
        rows[4, 128 * 12 : 128 * 13] *= 2.0**110
        rows[4, 128 * 16 : 128 * 17] *= 2.0**-110
        center[128 * 12 : 128 * 17] = 0.0
    basis = tk.pack(put([rows]), bits, put([center]), backend="cuda")
    same_bits(basis, tk.pack([rows], bits, [center]))
    for shift in (1, 3):  # rows that begin anywhere
        cut, c = rows[:, shift:], center[shift:]
        same_bits(tk.pack([put(cut)], bits, [put(c)], backend="cuda"), tk.pack([cut], bits, [c]))


def test_a_refused_part_adds_nothing():
    packer = tk.Packer(3, [(20000,)], device=DEVICE, backend="cuda")
    bad = torch.ones(3, 20000)
    bad[1, -1] = torch.nan
    with pytest.raises(tk.NotFiniteError, match="row 1 of tensor 0 at column 19999"):
        packer.add(put(bad))
    assert not packer.sum_sq.any() and not packer.max_scale.any()
    packer.add(put(torch.ones(3, 20000)))
    same_bits(packer.finish(), tk.pack([torch.ones(3, 20000)]))


def test_pack_waits_twice(monkeypatch):
    """For the segments, before they are used; and for how many groups are not finite."""
    read = []
    for name in ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "nonzero"):
        real = getattr(torch.Tensor, name)

        def count(self, *args, real=real, name=name, **kwargs):
            read.append(name)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, count)
    packer = tk.Packer(5, [(3000,)], segments=[0] * 12 + [1] * 12, device=DEVICE, backend="cuda")
    rows = put(torch.randn(5, 3000))
    read.clear()
    packer.add(rows)
    assert read == ["tolist", "item"]
