"""`twa plan`: memory per rank, bytes and estimated time per step for every placement, from formulas
(docs/distributed.md).
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace

PLACEMENTS = ("replicate", "rows", "columns")
TILE = 128  # columns that share a scale, one byte
# two numbers that travel with the coefficients' gradient, to notice ranks that drift apart
STAMP_BYTES = 8
#: blocks that FSDP2 holds gathered at its peak, in backward: weights of the block in use, of the
#: next one and of the root module; gradients of the block in use, of the one whose gradients are
#: being sent, and of the root module. Counted in torch 2.13, the root as large as a block
GATHERED_BLOCKS = 6
#: part of a rank's free memory that `auto` is ready to fill
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Job:
    """What is to be averaged, and on what.

    params, candidates, segments, ranks   D, n, L, K
    bits               of the packed basis; 32: dense float32
    weight_bytes       per weight of the model, and per gradient: 4 float32, 2 bfloat16
    block_share        largest part of the model that FSDP gathers at a time
    link_gbps          gigabits per second that a rank can send, and receive at the same time
    memory_gbs         gigabytes per second that a rank reads from its memory
    latency_us         of one hop between ranks
    low_memory         gradients are projected and freed inside backward
    """

    params: float
    candidates: int
    bits: int
    segments: int
    ranks: int
    weight_bytes: int = 2
    block_share: float = 1 / 32
    link_gbps: float = 400.0
    memory_gbs: float = 3350.0
    latency_us: float = 10.0
    low_memory: bool = False

    def __post_init__(self) -> None:
        for name in (
            "params",
            "candidates",
            "segments",
            "ranks",
            "weight_bytes",
            "link_gbps",
            "memory_gbs",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number above 0, found {getattr(self, name)}")
        for name in ("candidates", "segments", "ranks"):
            if getattr(self, name) % 1:
                raise ValueError(f"{name}: expected a whole number, found {getattr(self, name)}")
        if not 0 < self.block_share <= 1:
            raise ValueError(
                f"block_share: expected a number above 0, at most 1, found {self.block_share}"
            )
        if not 0 <= self.latency_us < math.inf:
            raise ValueError(
                f"latency_us: expected a number of at least 0, found {self.latency_us}"
            )
        if self.bits not in (32, 8, 4, 3, 2, 1):
            raise ValueError(f"bits: expected one of 32, 8, 4, 3, 2, 1, found {self.bits}")


def obstacle(job: Job, placement: str) -> str:
    """Why this job cannot have this placement; "" if it can.

    ValueError for a placement that does not exist.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement: expected one of {PLACEMENTS}, found {placement!r}")
    if placement == "rows" and job.ranks > job.candidates:
        return f"takes at most one rank per candidate, {job.candidates}"
    if placement == "rows" and job.low_memory:
        return "sums whole gradients: not with low memory"
    return ""


def require(job: Job, placement: str) -> None:
    """ValueError if this job cannot have this placement."""
    if reason := obstacle(job, placement):
        raise ValueError(
            f"placement {placement!r}: {reason}; found {job.ranks}"
            f" ranks{', low_memory' if job.low_memory else ''}"
        )


def share(job: Job, placement: str) -> float:
    """Part of the model that a rank holds between steps."""
    require(job, placement)
    return 1 / job.ranks if placement == "columns" else 1.0


def row_bytes(job: Job) -> float:
    """One row of P, all columns: D (bits / 8 + 1 / 128), or 4 D dense."""
    return job.params * (4.0 if job.bits == 32 else job.bits / 8 + 1 / TILE)


def basis_bytes(job: Job, placement: str) -> float:
    """P of one rank: n rows of the whole model or of its shards; with rows, n // K rows: those of
    the first rank, which holds the center, too, and so at least as much as a rank that has one row
    more."""
    rows = job.candidates // job.ranks if placement == "rows" else job.candidates
    return rows * row_bytes(job) * share(job, placement)


def center_bytes(job: Job, placement: str) -> float:
    """The center, float32; with rows, on the first rank."""
    return 4 * job.params * share(job, placement)


def memory(job: Job, placement: str) -> dict[str, float]:
    """Bytes that a rank holds while training, without activations: the most loaded rank.

    "gathered": whole weights and gradients that FSDP holds for some blocks at a time; "buffer": the
    float32 vector that the sums of rows go through."""
    part = share(job, placement) * job.params
    block = job.block_share * job.params * job.weight_bytes
    items = {
        "basis": basis_bytes(job, placement),
        "center": center_bytes(job, placement),
        "weights": part * job.weight_bytes,
        "gradients": part * job.weight_bytes * (job.block_share if job.low_memory else 1.0),
        "gathered": GATHERED_BLOCKS * block if placement == "columns" else 0.0,
        "buffer": 4 * job.params if placement == "rows" else 0.0,
    }
    return items | {"total": sum(items.values())}


def payload(job: Job, placement: str) -> dict[str, float]:
    """Bytes of the messages of one step, as a program hands them to the collectives:

    "twa" ours, all of them sums: c and the stamp, with rows also the gradient and x^T P in float32.
    "model" what training with FSDP moves anyway: weights gathered for forward and again for
    backward (there without the root module's), gradients reduce-scattered."""
    require(job, placement)
    twa = 4.0 * job.candidates * job.segments + STAMP_BYTES
    if placement == "rows":
        twa += 2 * 4 * job.params
    return {
        "twa": twa,
        "model": 3.0 * job.params * job.weight_bytes if placement == "columns" else 0.0,
    }


def sent(job: Job, placement: str) -> dict[str, float]:
    """Bytes that each rank sends in a step, and receives, with ring algorithms: an all-reduce of m
    bytes sends 2 (K - 1) / K m, an all-gather to m bytes or a reduce-scatter from m bytes half of
    that."""
    ring = (job.ranks - 1) / job.ranks
    p = payload(job, placement)
    return {"twa": 2 * ring * p["twa"], "model": ring * p["model"]}


def moved(job: Job, placement: str) -> float:
    """Bytes that a rank reads from and writes to its memory to project its gradient and to write
    its weights: P twice, gradient, center, weights. With rows also the float32 vector, filled and
    read in both directions; the rank with most: the first, or one with a row more."""
    basis, center = 2 * basis_bytes(job, placement), center_bytes(job, placement)
    beside = 2 * share(job, placement) * job.params * job.weight_bytes
    if placement != "rows":
        return basis + center + beside
    most = 2 * -(-job.candidates // job.ranks) * row_bytes(job)
    return max(basis + center, most) + beside + 2 * 2 * 4 * job.params


def seconds(job: Job, placement: str) -> dict[str, float]:
    """Estimated time of a step beyond forward and backward:

    "basis" moves P and what is beside it; "twa" and "model" are the messages, alone on the link. K
    - 1 hops for each half of a ring, of which FSDP has three for every block; the small message
    goes up and down a tree."""
    bandwidth, hop = job.link_gbps * 1e9 / 8, job.latency_us * 1e-6
    bytes_, ring = sent(job, placement), job.ranks - 1
    small = 2 * ring.bit_length()  # ceil(log2 K)
    return {
        "basis": moved(job, placement) / (job.memory_gbs * 1e9),
        "twa": (
            bytes_["twa"] / bandwidth + (small + (2 * 2 * ring if placement == "rows" else 0)) * hop
        ),
        "model": (
            bytes_["model"] / bandwidth
            + (3 * ring / job.block_share * hop if placement == "columns" else 0.0)
        ),
    }


def choose(job: Job, memory_bytes: float | None = None) -> str | None:
    """Replicate if it fits; else columns, if that fits; else rows, if that fits; None if nothing
    does. Without a limit: replicate.
    """
    for placement in ("replicate", "columns", "rows"):
        if not obstacle(job, placement) and (
            memory_bytes is None or memory(job, placement)["total"] <= memory_bytes
        ):
            return placement
    return None


def automatic(job: Job, free: float) -> str | None:
    """What placement="auto" takes for a model that is whole on every rank, with its weights in
    memory and `free` bytes beside them: replicate if the rest fits, else rows if that fits, else
    None."""
    for placement in ("replicate", "rows"):
        if (
            not obstacle(job, placement)
            and memory(job, placement)["total"] - job.params * job.weight_bytes
            <= MEMORY_SHARE * free
        ):
            return placement
    return None


# The command -------------------------------------------------------------------------------------


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Options of `twa plan`."""
    p.add_argument(
        "--params", type=float, required=True, help="trained weights of the model, such as 7e9"
    )
    p.add_argument("--candidates", type=int, required=True, help="number of candidates")
    p.add_argument(
        "--bits",
        type=int,
        default=4,
        help="of the packed basis: 8, 4, 3, 2, 1, or 32 for dense float32 (default: %(default)s)",
    )
    p.add_argument(
        "--ranks", type=int, default=8, help="processes, one per GPU (default: %(default)s)"
    )
    p.add_argument(
        "--segments",
        type=int,
        default=200,
        help="sets of coefficients: about one per tensor of a large model (default: %(default)s)",
    )
    p.add_argument(
        "--weight-bytes",
        type=int,
        default=Job.weight_bytes,
        help="per weight and per gradient: 2 bfloat16, 4 float32 (default: %(default)s)",
    )
    p.add_argument(
        "--link-gbps",
        type=float,
        default=Job.link_gbps,
        help="gigabits per second that a rank can send (default: %(default)s)",
    )
    p.add_argument(
        "--memory-gbs",
        type=float,
        default=Job.memory_gbs,
        help="gigabytes per second of the memory that P is read from (default: %(default)s)",
    )
    p.add_argument(
        "--latency-us",
        type=float,
        default=Job.latency_us,
        help="microseconds of one hop between ranks (default: %(default)s)",
    )
    p.add_argument(
        "--low-memory",
        action="store_true",
        help="as in twa average: gradients are projected and freed inside backward",
    )
    p.add_argument(
        "--device-memory",
        metavar="GB",
        type=float,
        help="gigabytes that a rank may fill: marks what fits",
    )


def run_plan(args: argparse.Namespace) -> None:
    """Prints memory per rank, bytes and estimated time per step of every placement.

    ValueError for numbers that make no job.
    """
    from ..merge.report import markdown_table

    fields = (
        "params",
        "candidates",
        "bits",
        "segments",
        "ranks",
        "weight_bytes",
        "link_gbps",
        "memory_gbs",
        "latency_us",
        "low_memory",
    )
    job = Job(**{name: getattr(args, name) for name in fields})
    if args.device_memory is not None and not 0 < args.device_memory < math.inf:
        raise ValueError(f"device_memory: expected gigabytes above 0, found {args.device_memory}")
    limit = None if args.device_memory is None else args.device_memory * 1e9
    memory_, bytes_ = (
        ["memory", "basis", "center", "weights", "gradients", "buffers"],
        [
            "our bytes",
            "sent",
            "FSDP bytes",
        ],
    )
    header = [
        "placement",
        *memory_,
        *bytes_,
        "P time",
        "our time",
        "FSDP time",
        "fits" if limit else "note",
    ]
    ranks = f"{job.ranks} rank{'s' if job.ranks > 1 else ''}"
    print(
        f"{quantity(job.params, '')} weights, {job.candidates} candidates, {_bits(job)},"
        f" {job.segments} segments, {ranks}"
    )
    print(
        "Memory of a rank and its parts; of a step: bytes of our messages, what each rank sends of"
        " them, bytes that FSDP moves anyway; times"
    )
    print()
    print(markdown_table(header, [_cells(job, placement, limit) for placement in PLACEMENTS]))
    print()
    print(_choice(job, limit))
    print(_assumptions(job))


def _cells(job: Job, placement: str, limit: float | None) -> list[str]:
    """One row of the table."""
    if reason := obstacle(job, placement):
        return [placement, *["-"] * 12, reason]
    m, p, t = memory(job, placement), payload(job, placement), seconds(job, placement)
    parts = [
        m["total"],
        m["basis"],
        m["center"],
        m["weights"],
        m["gradients"],
        m["gathered"] + m["buffer"],
    ]
    bytes_ = [*parts, p["twa"], sent(job, placement)["twa"], p["model"]]
    cells = [quantity(b, "B") for b in bytes_] + [
        quantity(t[name], "s") for name in ("basis", "twa", "model")
    ]
    return [placement, *cells, "" if limit is None else _fits(m["total"], limit)]


def _fits(total: float, limit: float) -> str:
    return (
        f"yes, {quantity(limit - total, 'B')} left"
        if total <= limit
        else f"no, {quantity(total - limit, 'B')} too much"
    )


def quantity(value: float, unit: str) -> str:
    """Three digits with a decimal prefix: 7.11 GB, 51.2 kB, 60 us."""
    prefixes = (
        {"": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
        if unit == "s"
        else {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}
    )
    for prefix, factor in prefixes.items():
        if value >= 0.9995 * factor:
            digits = f"{value / factor:.3g}" if value < 999.5 * factor else f"{value / factor:.0f}"
            return f"{digits} {prefix}{unit}".strip()
    return f"0 {unit}".strip()


def _bits(job: Job) -> str:
    return "float32" if job.bits == 32 else f"{job.bits} bit{'s' if job.bits > 1 else ''}"


def _choice(job: Job, limit: float | None) -> str:
    """One line: which placement, and why."""
    placement = choose(job, limit)
    total = {p: memory(job, p)["total"] for p in PLACEMENTS if not obstacle(job, p)}
    needs = {p: f"needs {quantity(b, 'B')}" for p, b in total.items()}
    if placement is None:
        least = min(total, key=total.get)
        more = (2**k for k in range(17) if 2**k > job.ranks)
        enough = next(
            (k for k in more if memory(replace(job, ranks=k), "columns")["total"] <= limit), None
        )
        then = (
            f"columns fits on {enough} ranks"
            if enough
            else "columns fits on no number of ranks up to 65536"
        )
        return (
            f"Choice: none. {least} needs least, {quantity(total[least], 'B')} of"
            f" {quantity(limit, 'B')}; {then}; fewer bits or candidates need less."
        )
    if job.ranks == 1:
        return "Choice: single, since one rank has nothing to send."
    message = f"a sum of {quantity(payload(job, placement)['twa'], 'B')}"
    if placement == "replicate":
        fits = "fits" if limit else "needs to fit (--device-memory says whether it does)"
        return (
            f"Choice: replicate, since {message} is all it sends, and it {fits};"
            f" {_auto(job, limit)}."
        )
    why = f"Choice: {placement}, since replicate {needs['replicate']} and does not fit"
    if placement == "columns":
        return f"{why}; {message} is all it sends beyond FSDP's own; {_auto(job, limit)}."
    return f"{why}, nor does columns, which {needs['columns']}; {_auto(job, limit)}."


def _auto(job: Job, limit: float | None) -> str:
    """What placement="auto" takes."""
    if limit is None:
        other = "replicate if that fits, else rows"
    else:
        other = automatic(job, limit - job.params * job.weight_bytes) or "an error"
    return f"`auto`: columns for a model sharded by fully_shard, else {other}"


def _assumptions(job: Job) -> str:
    return (
        "Assumed: ring collectives (a sum of m bytes: each of K ranks sends 2 (K - 1) / K m),"
        f" {job.link_gbps:g} Gbit/s per rank, {job.latency_us:g} us per hop, {job.memory_gbs:g}"
        f" GB/s of memory, nothing overlapped, FSDP in blocks of 1/{1 / job.block_share:g} of the"
        " model, no activations; see docs/distributed.md."
    )
