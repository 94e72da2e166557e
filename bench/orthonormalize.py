"""Block Gram-Schmidt beside its peers: loss of orthogonality, error of the directions, time, and
what it does with dependent rows.

    python bench/orthonormalize.py [--save] [--quick] [--rows 64] [--columns 1e6]

Peers, from their definitions: torch.linalg.qr (Householder, LAPACK), the published row loop
(classical Gram-Schmidt), CholeskyQR2 in float32 and with float64 Gram matrices, TSQR (Householder
QR of blocks of columns, then of their triangles). All in one run; bytes are 2 n D 4 read + n D 4
written.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from functools import partial

import torch
from common import RESULTS, bandwidth, median_seconds, publish
from torch import Tensor

import twa_kernels as tk
from twa_kernels import native

F64 = torch.float64
CONDITIONS = (1e1, 1e3, 1e5, 1e7)
SIZES = [(16, 200_000), (16, 1_000_000), (64, 200_000), (64, 1_000_000)]
SIZES += [(512, 200_000), (64, 20_000_000)]  # n, D of the table of sizes


# Peers -------------------------------------------------------------------------------------------


def householder(W: Tensor, Q: Tensor) -> Tensor:
    return torch.linalg.qr(W.T).Q.T  # W.T is column-major, which LAPACK wants


def published(W: Tensor, Q: Tensor) -> Tensor:
    """Row by row: minus the projections on the rows before, all at once."""
    Q.copy_(W)
    for i in range(len(Q)):
        if i:
            Q[i] -= Q[:i].T @ (Q[:i] @ Q[i])
        Q[i] /= Q[i].norm()
    return Q


def cholesky_qr2(W: Tensor, Q: Tensor, accumulate: torch.dtype = torch.float32) -> Tensor:
    x = W
    for _ in range(2):
        gram = x @ x.T
        if accumulate != torch.float32:
            gram = sum(b.double() @ b.double().T for b in x.split(1 << 14, 1))
        factor, identity = torch.linalg.cholesky(gram), torch.eye(len(x), dtype=gram.dtype)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False).to(x.dtype)
        x = torch.mm(inverse, x, out=Q) if x is W else inverse @ x
    return x


def cholesky_qr2_double(W: Tensor, Q: Tensor) -> Tensor:
    return cholesky_qr2(W, Q, F64)


def tsqr(W: Tensor, Q: Tensor) -> Tensor:
    size = max(1 << 14, len(W))
    blocks = [torch.linalg.qr(b.T) for b in W.split(size, 1)]
    top = torch.linalg.qr(torch.cat([b.R for b in blocks])).Q.split([len(b.R) for b in blocks])
    at = 0
    for block, t in zip(blocks, top, strict=True):
        columns = len(block.Q)
        to = Q[:, at : at + columns]
        if Q.is_contiguous() and len(W) == columns:
            torch.mm(t.T, block.Q.T, out=to)
        else:
            to.copy_((block.Q @ t).T)
        at += columns
    return Q


def high(W: Tensor, Q: Tensor) -> Tensor:
    return tk.orthonormalize(W, out=Q).Q


def fast(W: Tensor, Q: Tensor) -> Tensor:
    return tk.orthonormalize(W, out=Q, accuracy="fast").Q


METHODS = {
    "ours, fast": fast,
    "ours, high": high,
    "torch.linalg.qr": householder,
    "published loop": published,
    "TSQR": tsqr,
    "CholeskyQR2": cholesky_qr2,
    "CholeskyQR2, float64 Gram": cholesky_qr2_double,
}


# Data --------------------------------------------------------------------------------------------


def conditioned(n: int, columns: int, condition: float) -> Tensor:
    """Rows (n, columns) with singular values from 1 to 1 / condition, evenly in the logarithm."""
    g = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=F64)).Q
    v = torch.linalg.qr(torch.randn(columns, n, generator=g, dtype=F64)).Q.T
    return (u * torch.logspace(0, -math.log10(condition), n, dtype=F64) @ v).float()


def walk(n: int, columns: int, step: float = 1e-3) -> Tensor:
    """A random walk with momentum around weights of size 0.05: a stand-in for a trajectory, at any
    size.
    """
    g = torch.Generator().manual_seed(0)
    w, v = torch.randn(columns, generator=g) * 0.05, torch.zeros(columns)
    size, rows = 0.05 * step * torch.rand(columns, generator=g), torch.empty(n, columns)
    for i in range(n):
        v = 0.9 * v + size * torch.randn(columns, generator=g)
        w = w + v
        rows[i] = w
    return rows


def recorded(n: int, optimizer: str, every: int = 4) -> Tensor:
    """Weights of a character transformer of about a million parameters on the standard library's
    source, every few steps of a real run.
    """
    from twa.tasks import chars
    from twa.tasks.batches import forever
    from twa.tasks.gpt import GPT

    torch.manual_seed(0)
    model = GPT(width=160)
    parameters, rows = list(model.parameters()), []
    if optimizer == "SGD":
        trainer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    else:
        trainer = torch.optim.AdamW(parameters, lr=1e-3)
    for step, batch in zip(range(60 + n * every), forever(chars.train_data()), strict=False):
        if step >= 60 and step % every == 0:
            rows.append(torch.nn.utils.parameters_to_vector(parameters).detach().clone())
        trainer.zero_grad()
        chars.loss(model, batch).backward()
        trainer.step()
    return torch.stack(rows)


# Figures -----------------------------------------------------------------------------------------


def gram64(Q: Tensor) -> Tensor:
    return sum(b.double() @ b.double().T for b in Q.split(1 << 16, 1))


def loss(Q: Tensor) -> float:
    identity = torch.eye(len(Q), dtype=F64, device=Q.device)
    return float(torch.linalg.matrix_norm(gram64(Q) - identity, 2))


def exact(W: Tensor) -> Tensor:
    """Gram-Schmidt in float64: Householder's QR of the float64 differences, signs made positive,
    twice.
    """
    d = W.double()
    d[1:] -= d[:-1].clone()
    for _ in range(2):
        q, r = torch.linalg.qr(d.T)
        d = (q * r.diagonal().sign()).T
    return d


def directions(Q: Tensor, reference: Tensor) -> float:
    """Largest distance of a row from the exact one, whose sign it may choose."""
    q = Q.double()
    sign = (q * reference).sum(1).sign()
    return float((q * sign[:, None] - reference).norm(dim=1).max())


def number(v: float) -> str:
    return "NaN" if math.isnan(v) else f"{v:.1e}"


def attempt(method, W: Tensor, reference: Tensor | None) -> tuple[str, str]:
    try:
        Q = method(W, torch.empty_like(W))
    except torch.linalg.LinAlgError:
        return "fails", "fails"
    if len(Q) < len(W):
        return number(loss(Q)), f"rank {len(Q)}"
    return number(loss(Q)), number(directions(Q, reference)) if reference is not None else ""


def accuracy_table(cases: dict[str, Tensor], methods: dict) -> list[str]:
    lines = [
        f"| loss of orthogonality / error of the directions | {' | '.join(cases)} |",
        "|---" * (len(cases) + 1) + "|",
    ]
    references = {name: exact(W) for name, W in cases.items()}
    for name, method in methods.items():
        cells = [" / ".join(attempt(method, W, references[case])) for case, W in cases.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def floor_seconds(n: int, columns: int) -> float:
    """2 reads and 1 write of n * columns float32 at the speed of a copy."""
    return 12 * n * columns / bandwidth()["copy"] / 1e9


def time_table(W: Tensor) -> tuple[list[str], dict[str, float]]:
    n, columns = W.shape
    Q = torch.empty_like(W).zero_()
    seconds = {}
    for name, method in METHODS.items():
        try:
            seconds[name] = median_seconds(partial(method, W, Q), 5 if "ours" in name else 3)
        except torch.linalg.LinAlgError:
            seconds[name] = math.nan
        print(f"{name} {seconds[name] * 1e3:.1f} ms", flush=True)
    floor = floor_seconds(n, columns)
    lines = [
        "| method | ms | torch.linalg.qr / it | published loop / it | floor / it |"
        " arithmetic bound / it | with the certificate |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, s in seconds.items():
        ratios = " | ".join(
            f"{seconds[base] / s:.1f}" for base in ("torch.linalg.qr", "published loop")
        )
        bounds = arithmetic_seconds(n, columns, name == "ours, fast") if "ours" in name else ()
        cells = " | ".join(f"{100 * share / s:.0f} %" for share in (floor, *bounds))
        cells += " | " * (2 - len(bounds))
        lines.append(f"| {name} | {s * 1e3:.1f} | {ratios} | {cells} |")
    lines += [
        "",
        "Floor: 2 reads and 1 write of n D float32 at the measured copy bandwidth of"
        f" {bandwidth()['copy']:.1f} GB/s: {floor * 1e3:.1f} ms.",
        "Arithmetic bound: n^2 D multiply-adds (half for the Gram matrix, half for the triangular"
        " factor), and 12 n D in float32 for the certificate, at the rate of multiply-adds on"
        f" registers in this run, {registers(True) / 1e9:.0f} and {registers(False) / 1e9:.0f}"
        " billion a second in float32 and float64; PyTorch's products of matrices:"
        f" {products(torch.float32) / 1e9:.0f} and {products(F64) / 1e9:.0f}.",
    ]
    return lines, seconds


def arithmetic_seconds(n: int, columns: int, fast: bool) -> tuple[float, float]:
    """n^2 D multiply-adds at the speed of registers; with those of the certificate."""
    bound = n * n * columns / registers(fast)
    return bound, bound + 12 * n * columns / registers(True)


@functools.cache
def registers(fast: bool) -> float:
    """Multiply-adds a second on registers alone, in float32 (fast) or float64."""
    turns, threads = 10**6, torch.get_num_threads()
    made = native._C.multiply_adds(turns, fast, threads)
    run = partial(native._C.multiply_adds, turns, fast, threads)
    return made / median_seconds(run, seconds=0.3)


def products(dtype: torch.dtype) -> float:
    """Multiply-adds a second in a product of two matrices that fit into the cache."""
    a, b = torch.randn(2, 1024, 1024).to(dtype)
    return 1024**3 / median_seconds(lambda: a @ b)


def scaling_table(sizes: list[tuple[int, int]]) -> list[str]:
    lines = [
        "| n x D | fast ms | high ms | fast, of the floor | high, of the floor |"
        " of the arithmetic bound | torch.linalg.qr ms | qr / fast | qr / high |",
        "|---|" + "--:|" * 8,
    ]
    for n, columns in sizes:
        W = walk(n, columns)
        Q = torch.empty_like(W).zero_()
        f, h = (median_seconds(partial(method, W, Q), 3) for method in (fast, high))
        q = math.nan
        if n * columns <= 6.5e7:
            q = median_seconds(partial(householder, W, Q), 1, 0.1)
        floor = floor_seconds(n, columns)
        bounds = [arithmetic_seconds(n, columns, mode)[0] for mode in (True, False)]
        lines.append(
            f"| {n} x {columns:.0e} | {f * 1e3:.1f} | {h * 1e3:.1f} | {100 * floor / f:.0f} % |"
            f" {100 * floor / h:.0f} % | {100 * bounds[0] / f:.0f}, {100 * bounds[1] / h:.0f} % |"
            f" {q * 1e3:.0f} | {q / f:.1f} | {q / h:.1f} |"
        )
        print(lines[-1], flush=True)
    return lines


def kinds_table(n: int, columns: int) -> list[str]:
    """What our two modes do with trajectories of other kinds."""
    W = walk(n, columns)
    ema = W.clone()
    for i in range(1, n):
        ema[i] = 0.9 * ema[i - 1] + 0.1 * W[i]
    kinds = {
        "as recorded": W,
        "shuffled": W[torch.randperm(n, generator=torch.Generator().manual_seed(1))],
        "mean subtracted": W - W.mean(0),
        "bfloat16": W.bfloat16(),
        "exponential moving average": ema,
    }
    lines = [
        "| trajectory | mode | loss | directions | reads | condition of rows, of differences |"
        " certificate |",
        "|---" * 7 + "|",
    ]
    for name, V in kinds.items():
        reference = exact(V.float())
        for mode in ("high", "fast"):
            o = tk.orthonormalize(V, accuracy=mode)
            lines.append(
                f"| {name} | {mode} | {number(loss(o.Q))} | {number(directions(o.Q, reference))} |"
                f" {o.report.reads} | {o.report.condition_before:.0e},"
                f" {o.report.condition_after:.0e} | {o.report.certificate:.0e} |"
            )
            print(lines[-1], flush=True)
    return lines


def dependent_table(n: int, columns: int) -> list[str]:
    W = walk(n, columns)
    planted = {
        3: "copy of 1",
        7: "zero",
        11: "mean of 2 and 5, rounded",
        13: "twice 12",
        20: "0 - 6 + 9, rounded",
    }
    W[3], W[7], W[11] = W[1], 0, 0.5 * W[2] + 0.5 * W[5]
    W[13], W[20] = 2 * W[12], W[0] - W[6] + W[9]
    named = ", ".join(f"row {i} ({what})" for i, what in planted.items())
    lines = [f"Planted among {n} rows: {named}.", ""]
    lines += ["| method | result |", "|---|---|"]
    for name, method in METHODS.items():
        if name.startswith("ours"):
            o = tk.orthonormalize(W, accuracy=name.split()[-1])
            found = ", ".join(f"{i} ({d:.0e})" for i, d in o.dropped)
            lines.append(f"| {name} | rank {o.rank}, loss {number(loss(o.Q))}; dropped: {found} |")
            continue
        try:
            Q = method(W, torch.empty_like(W))
            lost = loss(Q) if Q.isfinite().all() else math.nan
            lines.append(f"| {name} | {n} rows, loss {number(lost)}; nothing named |")
        except torch.linalg.LinAlgError:
            lines.append(f"| {name} | fails |")
    return lines


def gpu_tables(n: int, sizes: list[int]) -> list[str]:
    """A table for each size, or why there is none."""
    lines = []
    for columns in sizes:
        if 8 * n * columns < torch.cuda.mem_get_info()[0]:
            lines += gpu_table(n, columns)
        else:
            lines.append(f"{n} x {columns:.0e}: not run, the device has no memory for W and Q")
        lines.append("")
        torch.cuda.empty_cache()
    return lines


def gpu_table(n: int, columns: int) -> list[str]:
    """Every usable GPU backend beside torch.linalg.qr (cuSOLVER) and the floor at the speed of a
    device-to-device copy.
    """
    W = torch.randn(columns, device="cuda").mul_(0.05).repeat(n, 1)
    for i in range(1, n):  # a walk
        W[i] = W[i - 1] + 5e-5 * torch.randn(columns, device="cuda")
    Q = torch.empty_like(W)
    copy = milliseconds(lambda: Q.copy_(W))
    lines = [
        f"{n} x {columns:.0e}; floor (2 reads, 1 write at copy speed,"
        f" {8 * n * columns / copy / 1e9:.2f} TB/s): {1.5 * copy:.2f} ms",
        "",
        "| method | ms | of the floor | loss of orthogonality |",
        "|---|--:|--:|--:|",
    ]
    runs = {}
    for backend in ("cuda", "triton"):
        built = tk.registry.has("orthonormalize_pass", backend)
        if built and tk.registry.why_unusable(backend) is None:
            for mode in ("fast", "high"):
                ours = partial(tk.orthonormalize, W, out=Q, accuracy=mode, backend=backend)
                runs[f"{backend}, {mode}"] = lambda ours=ours: ours().Q
    runs["torch.linalg.qr"] = partial(householder, W, Q)
    for name, run in runs.items():
        try:
            ms = milliseconds(run, 1 if name.startswith("torch") else 5)
            cells = f"{ms:.2f} | {150 * copy / ms:.0f} % | {number(loss(run()))}"
        except RuntimeError as error:  # cuSOLVER's sizes end before ours, and so may the memory
            cells = f"{type(error).__name__}: {str(error).splitlines()[0][:60]} | |"
        lines.append(f"| {name} | {cells} |")
        print(lines[-1], flush=True)
    return lines


def milliseconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median of runs on the GPU, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def picture(seconds: dict[str, float], losses: dict[str, list[float]], cases: list[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for name, values in losses.items():
        width = 2.5 if name.startswith("ours") else 1.2
        left.plot(cases, [v if v == v else None for v in values], marker="o", label=name, lw=width)
    left.set_yscale("log")
    left.set_ylabel("loss of orthogonality, 2-norm of Q Q^T - I")
    left.legend(fontsize=7)
    left.tick_params(axis="x", labelsize=8)
    names = list(seconds)[::-1]
    colours = ["tab:blue" if k.startswith("ours") else "0.7" for k in names]
    right.barh(names, [seconds[k] * 1e3 for k in names], color=colours)
    right.set_xlabel("ms")
    right.tick_params(axis="y", labelsize=8)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "orthonormalize.png", dpi=110)


def losses_of(table: list[str]) -> dict[str, list[float]]:
    """Losses of orthogonality by method, from the lines of `accuracy_table`."""
    losses = {}
    for row in table[2:]:
        name, *cells = [c.strip() for c in row.strip("|").split("|")]
        losses[name] = [
            math.nan if c.startswith(("fails", "NaN")) else float(c.split("/")[0]) for c in cells
        ]
    return losses


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--rows", type=int, default=64)
    p.add_argument("--columns", type=float, default=1e6)
    save = "write bench/results/orthonormalize.md and .png"
    p.add_argument("--save", action="store_true", help=save)
    p.add_argument("--quick", action="store_true", help="one case of each table")
    gpu = "on a GPU: each backend, torch.linalg.qr, the floor"
    p.add_argument("--gpu", action="store_true", help=gpu)
    a = p.parse_args()
    if a.gpu:
        name = torch.cuda.get_device_name()
        tables = gpu_tables(a.rows, [10**6, 10**7, 10**8])
        page = "orthonormalize_" + "_".join(name.lower().split())
        publish(page, [f"# Orthonormal bases on {name}", "", *tables], save=True)
        return
    n, columns = a.rows, int(a.columns)
    if a.quick:
        cases = {"condition 1e5": conditioned(n, columns, 1e5)}
    else:
        cases = {f"condition {c:.0e}": conditioned(n, columns, c) for c in CONDITIONS}
        cases |= {f"{o} run": recorded(n, o) for o in ("SGD", "AdamW")}
    table = accuracy_table(cases, METHODS)
    lines = [f"# Orthonormal bases of {n} rows x {columns:.0e} columns", "", "## Accuracy", ""]
    runs = "Runs: weights of a character transformer of 0.97 million parameters, every 4 steps."
    lines += [*table, "", runs, "", "## Time", ""]
    times, seconds = time_table(walk(n, columns))
    lines += times
    if not a.quick:
        lines += ["", "## Sizes", "", *scaling_table(SIZES)]
        kinds = f"## Kinds of trajectories (random walk with momentum, {n} x {columns:.0e})"
        lines += ["", kinds, "", *kinds_table(n, columns)]
        lines += ["", "## Dependent rows", "", *dependent_table(n, columns)]
        if a.save:
            shown = [c.replace("condition ", "") for c in cases]
            picture(seconds, losses_of(table), shown)
    publish("orthonormalize", lines, a.save)


if __name__ == "__main__":
    main()
