"""Bits and granularity: what a low-bit basis loses, and whether coefficients of their own for each
layer make up for it.

The candidates are the last 32 checkpoints of the first half of the usual run, as in the claim
`head`, and every trained average starts at the fixed average of them that is best on validation
data, which no quantiser changes. What they gain from there is what rounding of the basis can spoil.

    packed    this package's: Lloyd-Max levels of a Gaussian (8 bits: uniform ones), a scale for
              each 128 columns of a candidate
    min/max   the published one (the authors' code, branch journal): uniform levels from the least
              to the greatest of a candidate's tensor
    random    nothing is left of the candidates but the norm of each tensor's rows: what any
              subspace of as many dimensions gives
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
from torch import Tensor
from twa.merge.results import START, Result
from twa.merge.run import Merge
from twa.merge.settings import TwaMethod
from twa.subspace import Subspace, balanced

import twa_kernels as tk

from .job import Job
from .rows import Rows

TITLE = "Bits and granularity of the basis"
CLAIM = (
    "A basis of few bits loses little against float32, and coefficients per layer help most where"
    " it is quantised (Li et al., arXiv 2205.13104v4)."
)
METRIC = "accuracy"
PIVOT = True  # a column per setting
FIGURE = (9, 6.5)
PART = 0.5  # of the usual run
CANDIDATES = 32  # at most: the last ones
BITS = (32, 8, 4, 3, 2, 1)
RANDOM = 0  # bits of random rows
GRANULARITIES = ("model", "block", "tensor", "fine")
PUBLISHED = ("model", "block", "tensor")  # of the quantiser min/max


def run(job: Job) -> Rows:
    rows = Rows()
    for workload in job.workloads("gpt"):
        task = job.task(workload)
        usual = job.usual(workload, task)
        stop = usual.plan.nearest(PART)
        candidates = usual.candidates(until=stop, count=CANDIDATES)
        merge = job.merge(task, candidates, max(1, workload.twa_steps // 2))
        start = merge.start()
        label = {"task": workload.label, "stopped": stop}
        rows.append(job.row(label | {"setting": "start"}, start, merge))
        errors: dict[tuple[str, int], float] = {}
        for bits in (*BITS, RANDOM):
            for quantiser, granularity in grid(bits):
                result = train(merge, start, quantiser, granularity, bits, errors, job.seed)
                where = label | {"setting": setting(bits), "error": errors.get((quantiser, bits))}
                where |= at(granularity, bits, quantiser)
                name = f"TWA-t {named(granularity)}, {quantiser}"
                rows.append(job.row(where, result, merge, name, start=start.looks))
    return rows


def grid(bits: int) -> list[tuple[str, str]]:
    """(quantiser, granularity) of each trained average at so many bits."""
    if bits in (32, RANDOM):
        quantiser = "float32" if bits == 32 else "random"
        return [(quantiser, granularity) for granularity in GRANULARITIES]
    packed = [("packed", granularity) for granularity in GRANULARITIES]
    return packed + [("min/max", granularity) for granularity in PUBLISHED]


def setting(bits: int) -> str:
    return {32: "float32", 1: "1 bit", RANDOM: "random rows"}.get(bits, f"{bits} bits")


def named(granularity: str) -> str:
    return granularity if granularity == "fine" else f"per {granularity}"


def train(
    merge: Merge,
    start: Result,
    quantiser: str,
    granularity: str,
    bits: int,
    errors: dict[tuple[str, int], float],
    seed: int,
) -> Result:
    """A trained average.

    Args:
        start: the fixed average that it starts from
        errors: filled at the first basis of float32; its rows are the same for every granularity
    """

    def measure(subspace: Subspace) -> None:
        if not errors:
            errors.update(relative_errors(subspace.basis.rows))

    prepare = {
        "float32": measure,
        "packed": None,
        "min/max": partial(quantise, bits=bits),
        "random": partial(randomise, seed=seed),
    }[quantiser]
    method = TwaMethod("t", granularity, bits if quantiser == "packed" else 32)
    return merge.train(method, start=start.beta, start_name=start.method, prepare=prepare)


# Quantisers --------------------------------------------------------------------------------------


def minmax(rows: Tensor, bits: int) -> Tensor:
    """The published quantiser's result: each of the rows (n, numel) as codes of so many bits over
    [its minimum, its maximum], dequantised.

    1 bit: one of the two. A row of one value stays as it is.
    """
    if not rows.numel():
        return rows
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)  # (n, 1)
    step = (high - low) / (2**bits - 1)
    codes = torch.where(step > 0, (rows - low) / step, 0.0).round().to(torch.uint8)
    return low + codes * step


@torch.no_grad()
def quantise(subspace: Subspace, bits: int) -> None:
    """Replaces the rows of a dense basis by what `minmax` leaves of them."""
    for p in subspace.basis.rows:
        p.copy_(minmax(p, bits))
    balance_again(subspace)


def balance_again(subspace: Subspace) -> None:
    """Balances the rows as they are now."""
    rows = subspace.coordinates.rows
    subspace.coordinates = balanced(
        rows, subspace.basis, subspace.pieces, subspace.segments, subspace.sharding
    )


@torch.no_grad()
def randomise(subspace: Subspace, seed: int) -> None:
    """Replaces the rows of a dense basis by Gaussian ones, of the same norm in each tensor."""
    generator = torch.Generator().manual_seed(seed)
    for p in subspace.basis.rows:
        drawn = torch.randn(p.shape, generator=generator).to(p)
        norm = p.norm(dim=1, keepdim=True)
        p.copy_(drawn * (norm / drawn.norm(dim=1, keepdim=True).clamp(min=1e-12)))
    balance_again(subspace)


def relative_errors(tensors: list[Tensor]) -> dict[tuple[str, int], float]:
    """||P - dequantised P|| / ||P|| of all rows, from each tensor's (n, numel), per quantiser and
    bits.
    """
    rows = [row for p in tensors for row in p if row.any()]
    whole = sum(p.norm().item() ** 2 for p in tensors) ** 0.5

    def total(parts: list[float]) -> float:
        return sum(part**2 for part in parts) ** 0.5 / whole

    found = {("float32", 32): 0.0}
    for bits in BITS[1:]:
        packed = [row.norm().item() * tk.relative_error(row, bits) for row in rows]
        found["packed", bits] = total(packed)
        found["min/max", bits] = total([(minmax(p, bits) - p).norm().item() for p in tensors])
    return found


# What is shown -----------------------------------------------------------------------------------


def findings(rows: Rows) -> list[str]:
    """What each quantiser loses against float32, how large its error is, and what coefficients per
    tensor gain at each number of bits; all by task.
    """
    found = []
    for task in rows.of("task"):
        mine, start = rows.where(task=task), {"method": START}
        gains = ", ".join(
            f"{named(g)} {spread(paired(mine, start, at(g, 32)))}" for g in GRANULARITIES
        )
        found.append(
            f"{task}: in float32 TWA lowers the test loss of its start,"
            f" {mine.mean(**start):.4f}, by: {gains}"
        )
        gains = ", ".join(
            f"{named(g)} {spread(paired(mine, start, at(g, RANDOM, 'random')))}"
            for g in GRANULARITIES
        )
        found.append(f"{task}: by random rows in place of the candidates': {gains}")
        for quantiser, granularities in (("packed", GRANULARITIES), ("min/max", PUBLISHED)):
            for g in granularities:
                lost = ", ".join(
                    f"{setting(b)} {spread(paired(mine, at(g, b, quantiser), at(g, 32)), '+')}"
                    for b in BITS[1:]
                )
                found.append(f"{task}: {quantiser}, {named(g)}: test loss above float32's: {lost}")
        for quantiser in ("packed", "min/max"):
            one = mine.where(quantiser=quantiser)
            errors = ", ".join(f"{setting(b)} {one.mean('error', bits=b):.3f}" for b in BITS[1:])
            found.append(f"{task}: {quantiser}: relative error of the rows: {errors}")
        for quantiser in ("packed", "min/max"):
            found.append(f"{task}: {quantiser}: {_finer_gains(mine, quantiser)}")
    return found


def _finer_gains(rows: Rows, quantiser: str) -> str:
    """What coefficients per tensor gain over those per model, in float32 and at each number of
    bits.
    """
    full, texts = paired(rows, at("model", 32), at("tensor", 32)), []
    for b in BITS[1:]:
        gain = paired(rows, at("model", b, quantiser), at("tensor", b, quantiser))
        more = sum(g > f for g, f in zip(gain, full, strict=True))
        texts.append(f"{setting(b)} {spread(gain)} (more on {more} of {len(full)} seeds)")
    return f"per tensor below per model by: float32 {spread(full)}, {', '.join(texts)}"


def paired(rows: Rows, of: dict[str, object], than: dict[str, object]) -> list[float]:
    """How much higher the test loss of these is than that of those, seed by seed."""
    a, b = rows.by_seed(**of), rows.by_seed(**than)
    return [a[seed] - b[seed] for seed in rows.of("seed")]


def spread(values: list[float], sign: str = "") -> str:
    """Mean and sample standard deviation."""
    sd = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.4f}{sd}"


def at(granularity: str, bits: int, quantiser: str = "float32") -> dict[str, object]:
    """What the rows of a trained average are found by."""
    return {"granularity": granularity, "bits": bits, "quantiser": quantiser}


def picture(figure, rows: Rows) -> None:
    """Test loss against bits; packed solid, min/max dashed; crosses for random rows."""
    tasks = rows.of("task")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        mine = rows.where(task=task)
        axes.axhline(mine.mean(method=START), color="0.5", linestyle=":", label=START)
        for k, granularity in enumerate(GRANULARITIES):
            for quantiser, style in (("packed", "-"), ("min/max", "--")):
                one = mine.where(granularity=granularity, quantiser=(quantiser, "float32"))
                shown = [b for b in BITS if one.where(bits=b)]
                if len(shown) > 1:
                    x, y = [BITS.index(b) for b in shown], [one.mean(bits=b) for b in shown]
                    label = f"{named(granularity)}, {quantiser}"
                    axes.plot(x, y, style, marker="o", color=f"C{k}", label=label)
            random = mine.mean(**at(granularity, RANDOM, "random"))
            axes.plot(len(BITS), random, "x", color=f"C{k}")
        axes.set_xticks(range(len(BITS) + 1), [setting(b) for b in (*BITS, RANDOM)])
        axes.set_ylabel("test loss")
        axes.set_title(task)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
