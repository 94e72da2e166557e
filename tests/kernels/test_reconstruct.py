"""reconstruct against the float64 reference; adjointness with project; writing in place."""

import pytest
import torch
from conftest import BITS, SEGMENTS, SHAPES, exhaustive, rows_of, tensors

import twa_kernels as tk
from twa_kernels.backends import reference


def coefficients(basis, seed=3):
    return torch.randn(basis.n, basis.num_segments, generator=torch.Generator().manual_seed(seed))


def exact(basis, x, center=()):
    return reference.reconstruct(basis.view, x.double(), [c.double() for c in center], None)


@pytest.mark.parametrize("n", [1, 3, 5, 16, 33])
@pytest.mark.parametrize("bits", BITS)
def test_against_float64(bits, n, basis_of):
    basis = basis_of(n, bits)
    x = coefficients(basis)
    largest = max(t.abs().max() for t in exact(basis, x.abs()))
    for ours, truth, shape in zip(tk.reconstruct(basis, x), exact(basis, x), SHAPES, strict=True):
        assert ours.shape == shape and ours.dtype == torch.float32
        assert (ours.flatten() - truth).abs().max() <= 2**-21 * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_center_and_out(dtype, basis_of):
    basis = basis_of(5, 4)
    x, center = coefficients(basis), tensors(SHAPES, 11, dtype)
    wide = tk.reconstruct(basis, x, [c.float() for c in center])
    for ours, w in zip(tk.reconstruct(basis, x, center), wide, strict=True):
        assert torch.equal(ours, w.to(dtype))  # rounded once from float32
    out = [torch.empty(s, dtype=dtype) for s in SHAPES]
    assert tk.reconstruct(basis, x, [c.float() for c in center], out=out)[0] is out[0]
    assert all(torch.equal(o, w.to(dtype)) for o, w in zip(out, wide, strict=True))


@pytest.mark.parametrize("n", [1, 5, 33])
@pytest.mark.parametrize("bits", BITS)
def test_adjoint_of_project(bits, n, basis_of):
    basis, grads = basis_of(n, bits), tensors(SHAPES, 7)
    x = coefficients(basis)
    left = (x.double() * tk.project(basis, grads).double()).sum()
    theta = tk.reconstruct(basis, x)
    right = sum((t.double() * g.double()).sum() for t, g in zip(theta, grads, strict=True))
    size = (
        torch.cat([t.flatten() for t in theta]).double().norm()
        * torch.cat([g.flatten() for g in grads]).double().norm()
    )
    assert (left - right).abs() <= 1e-6 * size


def test_zero_coefficients_give_the_center(basis_of):
    center = tensors(SHAPES, 11)
    theta = tk.reconstruct(basis_of(5, 4), torch.zeros(5, 5), center)
    assert all(torch.equal(t, c) for t, c in zip(theta, center, strict=True))


@pytest.mark.parametrize("n", [256, 257, 512])
@pytest.mark.parametrize("bits", BITS)
def test_many_rows(bits, n):
    basis = tk.pack(rows_of(n, [(130,)]), bits)
    x = coefficients(basis)
    largest = exact(basis, x.abs())[0].abs().max()
    assert (tk.reconstruct(basis, x)[0] - exact(basis, x)[0]).abs().max() <= 2**-21 * largest


@pytest.mark.parametrize("n", [256, 257, 4096])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_largest_sums_do_not_overflow(n, sign):
    """All levels and all coefficients at their extremes.

    At the row counts where the kernels change their integers and end.
    """
    basis = tk.pack([torch.ones(n, 130)], 8, normalize="none")
    x = torch.full((n, 1), sign)
    assert (tk.reconstruct(basis, x)[0] - exact(basis, x)[0]).abs().max() <= 2**-21 * n


def test_strided_out(basis_of):
    basis = basis_of(5, 4)
    x = coefficients(basis)
    out = [torch.zeros(*s, 2)[..., 0] for s in SHAPES]
    tk.reconstruct(basis, x, out=out)
    assert all(torch.equal(o, t) for o, t in zip(out, tk.reconstruct(basis, x), strict=True))


def test_nan_coefficient_shows_in_its_segment_only(basis_of):
    basis = basis_of(5, 4)
    x = coefficients(basis)
    x[2, 3] = float("nan")
    theta = tk.reconstruct(basis, x)
    assert theta[5].isnan().all() and theta[6].isnan().all()
    assert all(torch.isfinite(theta[k]).all() for k in (0, 1, 2, 3, 4, 7, 8))


def test_differentiable_in_x_and_center(basis_of):
    basis, weights = basis_of(5, 4), tensors(SHAPES, 13)
    x = coefficients(basis).requires_grad_()
    center = [c.requires_grad_() for c in tensors(SHAPES, 11)]
    sum(
        (w * t).sum() for w, t in zip(weights, tk.reconstruct(basis, x, center), strict=True)
    ).backward()
    assert torch.equal(x.grad, tk.project(basis, weights))
    assert all(torch.equal(c.grad, w) for c, w in zip(center, weights, strict=True))


def test_inside_functional_call():
    """Another trainer's way: the model as a function of x, no parameter written."""
    model = torch.nn.Linear(20, 7)
    names = [name for name, _ in model.named_parameters()]
    center = [p.detach().clone() for p in model.parameters()]
    basis = tk.pack([torch.randn(4, *c.shape) for c in center], 4, segments=[0, 0])
    x = torch.zeros(4, 1, requires_grad=True)
    data = torch.randn(3, 20)
    theta = dict(zip(names, tk.reconstruct(basis, x, center), strict=True))
    torch.func.functional_call(model, theta, (data,)).square().sum().backward()
    model(data).square().sum().backward()
    torch.testing.assert_close(x.grad, tk.project(basis, [p.grad for p in model.parameters()]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            dict(x=torch.zeros(5, 4)),
            ValueError,
            r"x: expected shape \(n, L\) = \(5, 5\), found \(5, 4\)",
        ),
        (dict(x=torch.zeros(5, 5, dtype=torch.float64)), TypeError, "x: expected torch.float32"),
        (dict(center=tensors(SHAPES[:-1])), ValueError, "center: expected 9 tensors.*found 8"),
        (dict(out=tensors(SHAPES, dtype=torch.float64)), TypeError, r"out\[0\].*float64"),
    ],
)
def test_bad_input(change, error, message, basis_of):
    with pytest.raises(error, match=message):
        tk.reconstruct(basis_of(5, 4), **(dict(x=torch.zeros(5, 5)) | change))


def test_outputs_that_share_memory_are_refused():
    basis = tk.pack([torch.randn(2, 10), torch.randn(2, 10)], 4)
    memory = torch.zeros(15)
    with pytest.raises(ValueError, match=r"out\[0\] and out\[1\] share memory"):
        tk.reconstruct(basis, torch.zeros(2, 2), out=[memory[:10], memory[5:]])


# GPU kernels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "n"), [(bits, n) for bits in BITS for n in (1, 17)] + [(4, 48)])
def test_gpu_against_float64(bits, n, basis_of, gpu):
    gpu.needs("reconstruct")
    basis = basis_of(n, bits)
    x, center = coefficients(basis), tensors(SHAPES, 11)
    largest = max(t.abs().max() for t in exact(basis, x.abs()))
    ours = tk.reconstruct(gpu.put(basis), gpu.put(x), gpu.put(center), backend=gpu.backend)
    for o, truth, c in zip(ours, exact(basis, x, center), center, strict=True):
        assert o.shape == c.shape and o.dtype == torch.float32
        assert ((o.cpu().flatten() - truth).abs() <= 2**-21 * largest + 2**-24 * truth.abs()).all()


def test_gpu_dtypes_of_center_and_out(basis_of, gpu):
    """Several dtypes in one call, center and out different."""
    gpu.needs("reconstruct")
    basis, kinds = gpu.put(basis_of(5, 4)), [torch.float32, torch.bfloat16, torch.float16]
    x = gpu.put(coefficients(basis_of(5, 4)))
    center = gpu.put([t.to(kinds[k % 3]) for k, t in enumerate(tensors(SHAPES, 11))])
    wide = tk.reconstruct(basis, x, [c.float() for c in center], backend=gpu.backend)
    out = [
        torch.full(s, torch.nan, dtype=kinds[k // 3], device=gpu.device)
        for k, s in enumerate(SHAPES)
    ]
    tk.reconstruct(basis, x, center, out=out, backend=gpu.backend)
    for o, w in zip(out, wide, strict=True):
        assert torch.equal(o, w.to(o.dtype))  # rounded once from float32


@pytest.mark.parametrize(
    ("bits", "n"),
    [(8, 260), (8, 520), (3, 260), (1, 260), exhaustive(3, 520), exhaustive(1, 520)],
)
def test_gpu_many_rows(bits, n, gpu):
    """More rows than one run of integer sums holds.

    No worse than products that are rounded to float32 and added exactly.
    """
    gpu.needs("reconstruct")
    generator = torch.Generator().manual_seed(n)
    basis = tk.pack([torch.randn(n, 120, generator=generator)], bits, normalize="none")
    x = torch.randn(n, 1, generator=generator)
    truth = exact(basis, x)[0]
    # n roundings that are independent.
    products = 2.0**-24 * x.norm() * tk.unpack(basis)[0].norm(dim=0).max()
    ours = tk.reconstruct(gpu.put(basis), gpu.put(x), backend=gpu.backend)[0].cpu()
    assert (ours - truth).abs().max() <= products + 2**-23 * truth.abs().max()


@pytest.mark.parametrize(("bits", "n"), [(8, 130), (1, 255)])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_gpu_largest_sums_do_not_overflow(bits, n, sign, gpu):
    """Levels, coefficients and scales at their ends, all of one sign.

    The emulated products refuse to overflow.
    """
    gpu.needs("reconstruct")
    basis = gpu.put(tk.pack([sign * torch.ones(n, 200)], bits, normalize="none"))
    x = torch.ones(n, 1, device=gpu.device)
    (theta,) = tk.reconstruct(basis, x, backend=gpu.backend)
    torch.testing.assert_close(theta.cpu(), torch.full((200,), sign * n), rtol=2e-2, atol=0)
    truth = exact(gpu.__class__("", "cpu").put(basis), x.cpu())[0]
    assert (theta.cpu() - truth).abs().max() <= 1e-6 * n


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gpu_nan_coefficient_shows_in_its_segment_only(value, basis_of, gpu):
    gpu.needs("reconstruct")
    basis, x = gpu.put(basis_of(5, 4)), coefficients(basis_of(5, 4))
    x[2, 3] = value
    theta = tk.reconstruct(basis, gpu.put(x), backend=gpu.backend)
    assert [bool(t.isnan().all()) for t in theta] == [s == 3 for s in SEGMENTS]
    assert [bool(t.isnan().any()) for t in theta] == [s == 3 for s in SEGMENTS]


def test_gpu_strided_out_and_zero_coefficients(basis_of, gpu):
    gpu.needs("reconstruct")
    center = gpu.put(tensors(SHAPES, 11))
    out = [
        torch.full(s[::-1], torch.nan, device=gpu.device).t()
        if len(s) == 2
        else torch.full(s, torch.nan, device=gpu.device)
        for s in SHAPES
    ]
    tk.reconstruct(
        gpu.put(basis_of(5, 4)),
        torch.zeros(5, 5, device=gpu.device),
        center,
        out=out,
        backend=gpu.backend,
    )
    assert all(torch.equal(o, c) for o, c in zip(out, center, strict=True))
