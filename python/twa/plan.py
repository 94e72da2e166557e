"""`twa plan`: memory per rank, bytes and estimated time per step for every placement, from formulas (docs/distributed.md)."""

from __future__ import annotations

from dataclasses import dataclass

PLACEMENTS = ("replicate", "rows", "columns")
TILE = 128  # columns that share a scale, one byte
STAMP_BYTES = 8  # two numbers that travel with the coefficients' gradient, to notice ranks that drift apart


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
        for name in ("params", "candidates", "segments", "ranks", "weight_bytes", "link_gbps", "memory_gbs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, found {getattr(self, name)}")
        if self.bits not in (32, 8, 4, 3, 2, 1):
            raise ValueError(f"bits: expected one of 32, 8, 4, 3, 2, 1, found {self.bits}")


def share(job: Job, placement: str) -> float:
    """Part of the model that a rank holds between steps."""
    return 1 / job.ranks if placement == "columns" else 1.0


def basis_bytes(job: Job, placement: str) -> float:
    """P of one rank: n D (bits / 8 + 1 / 128), of all rows and columns or of its part."""
    rows = -(-job.candidates // job.ranks) if placement == "rows" else job.candidates
    per_weight = 4.0 if job.bits == 32 else job.bits / 8 + 1 / TILE
    return rows * job.params * share(job, placement) * per_weight


def center_bytes(job: Job, placement: str) -> float:
    """The center, float32; with rows, on the first rank."""
    return 4 * job.params * share(job, placement)


def memory(job: Job, placement: str) -> dict[str, float]:
    """Bytes that a rank holds, without activations: the most loaded rank."""
    part = share(job, placement) * job.params
    gathered = 2 * job.block_share * job.params * job.weight_bytes if placement == "columns" else 0.0  # weights of one block, its gradients
    gradients = job.block_share * part if job.low_memory and placement != "rows" else part
    items = {
        "basis": basis_bytes(job, placement),
        "center": center_bytes(job, placement),
        "weights": part * job.weight_bytes,
        "gradients": gradients * job.weight_bytes,
        "gathered": gathered,
        "buffer": 4 * job.params if placement == "rows" else 0.0,
    }
    return items | {"total": sum(items.values())}


def payload(job: Job, placement: str) -> dict[str, float]:
    """Bytes of the messages of one step, as a program hands them to the collectives: "twa" ours, "model" what training with FSDP moves anyway
    (weights gathered for forward and again for backward, gradients reduce-scattered)."""
    twa = 4.0 * job.candidates * job.segments + STAMP_BYTES
    if placement == "rows":
        twa += 2 * 4 * job.params
    return {"twa": twa, "model": 3 * job.params * job.weight_bytes if placement == "columns" else 0.0}


def sent(job: Job, placement: str) -> dict[str, float]:
    """Bytes that each rank sends in a step, and receives, with ring algorithms: an all-reduce of m bytes sends 2 (K - 1) / K m, an all-gather to m
    bytes or a reduce-scatter from m bytes half of that."""
    ring = (job.ranks - 1) / job.ranks
    p = payload(job, placement)
    return {"twa": 2 * ring * p["twa"], "model": ring * p["model"]}


def seconds(job: Job, placement: str) -> dict[str, float]:
    """Estimated time of a step beyond forward and backward: "basis" reads P twice (projection, reconstruction) with gradient, center and weights
    beside it; "twa" and "model" are the messages, alone on the link."""
    part = share(job, placement) * job.params
    moved = 2 * basis_bytes(job, placement) + part * (2 * job.weight_bytes + 4) + (4 * 4 * job.params if placement == "rows" else 0.0)
    bandwidth = job.link_gbps * 1e9 / 8
    hops = 2 * (job.ranks - 1).bit_length()  # the small message as a tree
    return {
        "basis": moved / (job.memory_gbs * 1e9),
        "twa": sent(job, placement)["twa"] / bandwidth + hops * job.latency_us * 1e-6,
        "model": sent(job, placement)["model"] / bandwidth,
    }


def choose(job: Job, memory_bytes: float | None = None) -> str | None:
    """Replicate if it fits; else columns, if that fits; else rows, if that fits; None if nothing does. Without a limit: replicate."""
    for placement in ("replicate", "columns", "rows"):
        if placement == "rows" and job.ranks > job.candidates:
            continue
        if memory_bytes is None or memory(job, placement)["total"] <= memory_bytes:
            return placement
    return None
