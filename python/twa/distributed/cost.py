"""What a sharding costs: memory of a rank, bytes of a step.

docs/distributed.md has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..io.candidates import BLOCK_BYTES
from ..io.errors import TwaError

SHARDINGS = ("replicate", "rows", "columns")
#: where basis and center are kept
STORAGE = ("device", "host")
#: columns that share a scale, one byte
TILE = 128
#: of two numbers that travel with the coefficients' gradient, to notice ranks that drift apart
STAMP_BYTES = 8
#: blocks that FSDP2 holds gathered at its peak, in backward, beside the root module: the one in use
#: and the next one; and gradients of the one in use and of the one whose gradients are being sent,
#: and of the root module. Counted in torch 2.13
GATHERED_BLOCKS = 2
#: what storage "host" has on the device, and pinned in host memory: two blocks
STREAMED_BYTES = 2.0 * BLOCK_BYTES
#: part of a rank's free memory that `auto` is ready to fill
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Job:
    """What is to be averaged, and on what.

    Attributes:
        params: trained weights of the model, D
        candidates: n
        bits: of the packed basis; 32: dense float32
        segments: sets of coefficients, L
        ranks: K
        weight_bytes: per weight of the model, and per gradient: 4 for float32, 2 for bfloat16
        block_share: largest part of the model that FSDP gathers at a time, but for the root module
        root_share: part of the model that is in no block but in the root module; None: as much as a
            block
        low_memory: whether gradients are projected and freed inside backward
        storage: where basis and center are kept: "device"; or "host", from where blocks of them
            are copied to the device as they are needed
        sharers: ranks that hold one packed basis and one center between them, in the CPU memory of
            their host; with `replicate` only

    Raises:
        TwaError: a number is out of range
    """

    params: float
    candidates: int
    bits: int
    segments: int
    ranks: int
    weight_bytes: int = 2
    block_share: float = 1 / 32
    root_share: float | None = None
    low_memory: bool = False
    storage: str = "device"
    sharers: int = 1

    def __post_init__(self) -> None:
        for name in ("params", "candidates", "segments", "ranks", "weight_bytes"):
            if not 0 < getattr(self, name) < math.inf:
                raise TwaError(f"expected a number above 0, found {getattr(self, name)}", name)
        for name in ("candidates", "segments", "ranks"):
            if getattr(self, name) % 1:
                raise TwaError(f"expected a whole number, found {getattr(self, name)}", name)
        if not 0 < self.block_share <= 1:
            found = self.block_share
            raise TwaError(f"expected a number above 0, at most 1, found {found}", "block_share")
        if self.bits not in (32, 8, 4, 3, 2, 1):
            raise TwaError(f"expected one of 32, 8, 4, 3, 2, 1, found {self.bits}", "bits")
        check_storage(self.storage, [self.bits])


def check_storage(storage: str, bits: Iterable[int]) -> None:
    """Raises TwaError unless a basis of each of these bits can be kept there."""
    if storage not in STORAGE:
        raise TwaError(f"expected one of {STORAGE}, found {storage!r}", "storage")
    if storage == "host" and 32 in bits:
        raise TwaError("expected packed bits, found 32, which is never streamed", "storage 'host'")


def obstacle(job: Job, sharding: str) -> str:
    """Why this job cannot have this sharding; "" if it can.

    Raises:
        TwaError: there is no such sharding
    """
    if sharding not in SHARDINGS:
        raise TwaError(f"sharding: expected one of {SHARDINGS}, found {sharding!r}")
    if sharding == "rows" and job.ranks > job.candidates:
        return f"takes at most one rank per candidate, {job.candidates}"
    if sharding == "rows" and job.low_memory:
        return "sums whole gradients: not with low memory"
    return ""


def require(job: Job, sharding: str) -> None:
    """Raises TwaError if this job cannot have this sharding."""
    if reason := obstacle(job, sharding):
        low = ", low_memory" if job.low_memory else ""
        raise TwaError(f"sharding {sharding!r}: {reason}; found {job.ranks} ranks{low}")


def share(job: Job, sharding: str) -> float:
    """Part of the model that a rank holds between steps."""
    require(job, sharding)
    return 1 / job.ranks if sharding == "columns" else 1.0


def row_bytes(job: Job) -> float:
    """Bytes of one row of P, all columns: D (bits / 8 + 1 / 128), or 4 D dense."""
    return job.params * (4.0 if job.bits == 32 else job.bits / 8 + 1 / TILE)


def _rows(job: Job, sharding: str) -> int:
    """Rows of P that a rank holds.

    With `rows` they are n // K, those of rank 0: it holds the center, too, and so about as much as
    a rank that has one row more.
    """
    return job.candidates // job.ranks if sharding == "rows" else job.candidates


def basis_bytes(job: Job, sharding: str) -> float:
    """Bytes of one rank's P: its rows, for the whole model or for its shards.

    Beside the rows there are 8 bytes for each row and segment (divisor), and of a packed basis 4
    more (scale), and 4 for each tile (its segment).
    """
    rows, part = _rows(job, sharding), share(job, sharding)
    small = 8.0 * rows * job.segments
    if job.bits != 32:
        small += 4.0 * rows * job.segments + 4.0 * job.params * part / TILE
    return rows * row_bytes(job) * part + small


def center_bytes(job: Job, sharding: str) -> float:
    """Bytes of the center, float32; with `rows` it is on rank 0."""
    return 4 * job.params * share(job, sharding)


def memory(job: Job, sharding: str) -> dict[str, float]:
    """Bytes that the most loaded rank holds while training, without activations, by kind.

    They are on the rank's device: with storage "host" the blocks of basis and center, too.
    Of what it shares with others it holds its share.
    "gathered" is whole weights and gradients that FSDP holds for some blocks at a time; "buffer" is
    the float32 vector that the sums of `rows` go through.
    """
    part = share(job, sharding) * job.params
    root = job.block_share if job.root_share is None else job.root_share
    gathered = 2 * (GATHERED_BLOCKS * job.block_share + root) * job.params * job.weight_bytes
    on_host = job.storage == "host"
    sharers = job.sharers if sharding == "replicate" and job.bits != 32 else 1
    items = {
        "basis": STREAMED_BYTES if on_host else basis_bytes(job, sharding) / sharers,
        "center": 0.0 if on_host else center_bytes(job, sharding) / sharers,
        "weights": part * job.weight_bytes,
        "gradients": part * job.weight_bytes * (job.block_share if job.low_memory else 1.0),
        "gathered": gathered if sharding == "columns" else 0.0,
        "buffer": 4 * job.params if sharding == "rows" else 0.0,
    }
    return items | {"total": sum(items.values())}


def best_weights(job: Job, sharding: str) -> float:
    """Bytes of the best weights so far, which `twa average` keeps in a rank's CPU memory."""
    return share(job, sharding) * job.params * job.weight_bytes


def host_memory(job: Job, sharding: str) -> float:
    """Bytes that all ranks hold while training, if they are on the CPUs of one host."""
    m = memory(job, sharding)
    copies = job.ranks if sharding == "replicate" and job.bits == 32 else 1
    once = basis_bytes(replace(job, ranks=1), "replicate") + 4 * job.params
    return copies * once + job.ranks * (m["total"] - m["basis"] - m["center"])


def kept_on_host(job: Job, sharding: str) -> float:
    """Bytes that the most loaded rank keeps in host memory with storage "host": basis and center.

    And the blocks that are on their way, pinned. With `replicate` ranks of a host share the former.
    """
    return basis_bytes(job, sharding) + center_bytes(job, sharding) + STREAMED_BYTES


def streamed(job: Job, sharding: str) -> float:
    """Bytes that a rank copies from host to device in a step with storage "host".

    They are the basis to project, and basis and center to reconstruct.
    """
    return 2 * basis_bytes(job, sharding) + center_bytes(job, sharding)


def building(job: Job, sharding: str) -> float:
    """Bytes that the most loaded rank's device holds while the basis is built there, at most.

    They are of the basis, whose scales take two bytes more until it is finished, the center, the
    weights, and a block of candidates with what is made of it. With storage "host" it is built on
    the CPU: weights only.
    """
    if job.storage == "host":
        return memory(job, sharding)["weights"]
    rows = _rows(job, sharding) * share(job, sharding)
    scales = 0.0 if job.bits == 32 else rows * job.params * 2 / TILE
    m = memory(job, sharding)
    return m["basis"] + scales + m["center"] + m["weights"] + 1.5 * BLOCK_BYTES


def payload(job: Job, sharding: str) -> dict[str, float]:
    """Bytes of the messages of one step, as a program hands them to the collectives, by kind.

    "twa" is ours, all of it sums: c and the stamp; with `rows` also the gradient and x^T P, in
    float32. "model" is what training with FSDP moves anyway: weights gathered for forward and
    again for backward (there without the root module's, if its share is known), gradients
    reduce-scattered.
    """
    require(job, sharding)
    twa = 4.0 * job.candidates * job.segments + STAMP_BYTES
    if sharding == "rows":
        twa += 2 * 4 * job.params
    model = 3.0 - (job.root_share or 0.0)
    return {
        "twa": twa,
        "model": model * job.params * job.weight_bytes if sharding == "columns" else 0.0,
    }


def sent(job: Job, sharding: str) -> dict[str, float]:
    """Bytes that each rank sends in a step, and receives, with ring algorithms; as in `payload`.

    An all-reduce of m bytes sends 2 (K - 1) / K m, an all-gather to m bytes or a reduce-scatter
    from m bytes half of that.
    """
    return ring(job, payload(job, sharding))


def ring(job: Job, messages: dict[str, float]) -> dict[str, float]:
    """What each rank sends of messages as `payload` gives them."""
    part = (job.ranks - 1) / job.ranks
    return {"twa": 2 * part * messages["twa"], "model": part * messages["model"]}


def choose(job: Job, memory_bytes: float | None = None, *, may_shard: bool = True) -> str | None:
    """The first of replicate, columns and rows that a rank has memory for; None if there is none.

    Args:
        job: what is averaged, and on what
        memory_bytes: of a rank, for all of `memory`; None: without a limit
        may_shard: whether the model can be sharded; else columns is left out
    """
    for sharding in ("replicate", "columns", "rows") if may_shard else ("replicate", "rows"):
        if obstacle(job, sharding):
            continue
        if memory_bytes is None or memory(job, sharding)["total"] <= memory_bytes:
            return sharding
    return None


def whole_model_limit(job: Job, free: float) -> float:
    """The `memory_bytes` of a rank that holds the whole model and has `free` bytes beside it."""
    return job.params * job.weight_bytes + MEMORY_SHARE * free
