"""`twa plan`: prints memory per rank and bytes per step of every sharding, and a choice."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import replace

import torch

from ..basis.segments import GRANULARITIES, parse_granularity
from ..distributed.cost import (
    SHARDINGS,
    STORAGE,
    Job,
    best_weights,
    building,
    choose,
    host_memory,
    kept_on_host,
    memory,
    obstacle,
    payload,
    ring,
    streamed,
    whole_model_limit,
)
from ..distributed.simulate import Simulation, simulate
from ..io.candidates import BLOCK_BYTES
from ..io.errors import TwaError
from ..io.tables import markdown_table
from ..tasks.contract import BUILT_IN, load_task
from ..tasks.gpt import GPT

DTYPES = {2: torch.bfloat16, 4: torch.float32}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    p = commands.add_parser("plan", help="memory and bytes of each sharding", description=__doc__)
    p.set_defaults(run=run)
    of = p.add_mutually_exclusive_group(required=True)
    of.add_argument("--params", type=float, help="trained weights of the model, such as 7e9")
    model = "counts what ranks hold and send for this model, without weights, beside the formulas:"
    model += f" a task file, {' or '.join(BUILT_IN)}, or gpt:WIDTHxBLOCKS, such as gpt:8192x86"
    of.add_argument("--simulate", metavar="MODEL", help=model)
    add = p.add_argument
    add("--candidates", type=int, required=True, help="number of candidates")
    bits = "of the packed basis: 8, 4, 3, 2, 1, or 32 for dense float32 (default: %(default)s)"
    add("--bits", type=int, default=4, help=bits)
    add("--ranks", type=int, default=8, help="processes, one per GPU (default: %(default)s)")
    segments = "sets of coefficients: about one per tensor of a large model (default: %(default)s)"
    add("--segments", type=int, default=200, help=segments)
    fine = f"with --simulate, in the place of --segments: {GRANULARITIES} (default: %(default)s)"
    add("--granularity", default="fine", help=fine)
    blocks = "of the model, which FSDP gathers one by one; --simulate knows (default: %(default)s)"
    add("--blocks", type=int, default=round(1 / Job.block_share), help=blocks)
    width = "per weight and per gradient: 2 bfloat16, 4 float32 (default: %(default)s)"
    add("--weight-bytes", type=int, default=Job.weight_bytes, help=width)
    low = "as in twa average: gradients are projected and freed inside backward"
    add("--low-memory", action="store_true", help=low)
    where = "of basis and center, as in twa average: device (default), or host"
    add("--storage", choices=STORAGE, default="device", help=where)
    limit = "gigabytes that a rank may fill: marks what fits"
    add("--device-memory", metavar="GB", type=float, help=limit)


def run(args: argparse.Namespace) -> None:
    """Prints the table and the choice.

    Raises:
        TwaError: the numbers make no job
    """
    simulated = _simulated(args) if args.simulate else None
    job = _job(args) if simulated is None else simulated.job
    limit = None if args.device_memory is None else args.device_memory * 1e9
    if limit is not None and not 0 < limit < math.inf:
        raise TwaError(f"expected gigabytes above 0, found {args.device_memory}", "--device-memory")
    header = ["sharding", "memory", "basis", "center", "weights", "gradients", "buffers"]
    header += ["our bytes", "sent", "FSDP bytes", "fits" if limit else "note"]
    ranks = f"{job.ranks} rank{'s' if job.ranks > 1 else ''}"
    print(
        f"{quantity(job.params)} weights, {job.candidates} candidates, {_bits(job)},"
        f" {job.segments} segments, {ranks}"
    )
    print(
        "Memory of a rank and its parts; of a step: bytes of our messages, what each rank sends of"
        " them, bytes that FSDP moves anyway"
    )
    print()
    print(markdown_table(header, _rows(job, simulated, limit)))
    print()
    if simulated is not None:
        print(_how_simulated(job))
    print(_on_host(job) if job.storage == "host" else _host(job))
    print(_building(job))
    print(_choice(job, limit))
    print(_assumptions(job))


def _job(args: argparse.Namespace) -> Job:
    """The job that the options describe."""
    fields = ("params", "candidates", "bits", "segments", "ranks", "weight_bytes", "low_memory")
    if args.blocks < 1:
        raise TwaError(f"expected a number above 0, found {args.blocks}", "--blocks")
    chosen = {name: getattr(args, name) for name in fields}
    return Job(**chosen, storage=args.storage, block_share=1 / args.blocks)


def _simulated(args: argparse.Namespace) -> Simulation:
    """What is counted for the model that the options name."""
    if args.storage == "host":
        raise TwaError("expected no --simulate, which counts a basis on the device", "--storage")
    numbers = (args.candidates, args.bits, parse_granularity(args.granularity), args.ranks)
    Job(1, args.candidates, args.bits, 1, args.ranks)  # which checks them
    found = re.fullmatch(r"gpt:(\d{1,6})x(\d{1,4})", args.simulate)
    if found is None:
        make = load_task(args.simulate).model
    else:
        width, depth = int(found[1]), int(found[2])
        shape = {"vocabulary": 128_000, "context": 8192, "width": width, "heads": 1}
        if args.weight_bytes not in DTYPES or not width or not depth:
            found_bytes = f"{args.weight_bytes}, width {width}, {depth} blocks"
            raise TwaError(f"expected --weight-bytes 2 or 4 and sizes above 0, found {found_bytes}")
        dtype = DTYPES[args.weight_bytes]
        make = lambda: GPT(**shape, depth=depth).to(dtype)  # noqa: E731
    return simulate(make, *numbers, low_memory=args.low_memory)


def _rows(job: Job, simulated: Simulation | None, limit: float | None) -> list[list[str]]:
    """The table: a row for each sharding, and two more for what was counted."""
    rows = []
    for sharding in SHARDINGS:
        if reason := obstacle(job, sharding):
            rows.append([sharding, *["-"] * 9, reason])
            continue
        formulas = _bytes(job, memory(job, sharding), payload(job, sharding))
        fits = "" if limit is None else _fits(formulas[0], limit)
        rows.append([sharding, *(quantity(b, "B") for b in formulas), fits])
        if simulated is not None and sharding in simulated.counted:
            counted = _bytes(job, simulated.memory(sharding), simulated.payload(sharding))
            pairs = zip(formulas, counted, strict=True)
            apart = [f"{100 * (f / c - 1):+.1f} %" if c else "" for f, c in pairs]
            fits = "" if limit is None else _fits(counted[0], limit)
            rows.append(["simulated", *(quantity(b, "B") for b in counted), fits])
            rows.append(["formulas are off by", *apart, ""])
        elif simulated is not None:
            rows.append(["simulated", *["-"] * 9, "the task shards its model"])
    return rows


def _bytes(job: Job, m: dict[str, float], p: dict[str, float]) -> list[float]:
    """The numbers of a row of the table."""
    parts = [m["total"], m["basis"], m["center"], m["weights"], m["gradients"]]
    return [*parts, m["gathered"] + m["buffer"], p["twa"], ring(job, p)["twa"], p["model"]]


def _how_simulated(job: Job) -> str:
    """What a simulation is."""
    ranks = f"ranks 0 and {job.ranks - 1}" if job.ranks > 1 else "one rank"
    return (
        f"Simulated: {ranks} made this model on the meta device, sharded it, and took a step whose"
        " messages go nowhere; the memory is of the one that holds more."
    )


def _fits(total: float, limit: float) -> str:
    """Whether so many bytes fit, and what is left or too much."""
    if total <= limit:
        return f"yes, {quantity(limit - total, 'B')} left"
    return f"no, {quantity(total - limit, 'B')} too much"


def quantity(value: float, unit: str = "") -> str:
    """A number in three digits with a decimal prefix, such as 7.11 GB or 51.2 kB."""
    for prefix, factor in {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}.items():
        if value >= 0.9995 * factor:
            digits = f"{value / factor:.3g}" if value < 999.5 * factor else f"{value / factor:.0f}"
            return f"{digits} {prefix}{unit}".strip()
    return f"0 {unit}".strip()


def _bits(job: Job) -> str:
    """The basis's bits in words."""
    return "float32" if job.bits == 32 else f"{job.bits} bit{'s' if job.bits > 1 else ''}"


def _choice(job: Job, limit: float | None) -> str:
    """One line on which sharding to take, and why."""
    sharding = choose(job, limit)
    total = {p: memory(job, p)["total"] for p in SHARDINGS if not obstacle(job, p)}
    needs = {p: f"needs {quantity(b, 'B')}" for p, b in total.items()}
    if sharding is None:
        assert limit is not None  # without a limit replicate fits
        return _no_choice(job, total, limit)
    if job.ranks == 1:
        return "Choice: single, since one rank has nothing to send."
    message = f"a sum of {quantity(payload(job, sharding)['twa'], 'B')}"
    if sharding == "replicate":
        fits = "fits" if limit else "needs to fit (--device-memory says whether it does)"
        return (
            f"Choice: replicate, since {message} is all it sends, and it {fits};"
            f" {_auto(job, limit)}."
        )
    why = f"Choice: {sharding}, since replicate {needs['replicate']} and does not fit"
    if sharding == "columns":
        return f"{why}; {message} is all it sends beyond FSDP's own; {_auto(job, limit)}."
    return f"{why}, nor does columns, which {needs['columns']}; {_auto(job, limit)}."


def _no_choice(job: Job, total: dict[str, float], limit: float) -> str:
    """The same where no sharding fits: what would. `total` has the bytes of those possible."""
    least = min(total, key=lambda name: total[name])
    enough = "no number of ranks up to 65536"
    for ranks in (2**k for k in range(17) if 2**k > job.ranks):
        if memory(replace(job, ranks=ranks), "columns")["total"] <= limit:
            enough = f"{ranks} ranks"
            break
    return (
        f"Choice: none. {least} needs least, {quantity(total[least], 'B')} of"
        f" {quantity(limit, 'B')}; columns fits on {enough}; fewer bits or candidates need less."
    )


def _auto(job: Job, limit: float | None) -> str:
    """What sharding="auto" takes, in words."""
    if limit is None:
        other = "replicate if that fits, else rows"
    else:
        free = limit - job.params * job.weight_bytes
        other = choose(job, whole_model_limit(job, free), may_shard=False) or "an error"
    return f"`auto`: columns for a model sharded by fully_shard, else {other}"


def _on_host(job: Job) -> str:
    """What a rank keeps in host memory, and what a step copies from there, in words."""
    possible = [s for s in SHARDINGS if not obstacle(job, s)]
    kept = [f"{s} {quantity(kept_on_host(job, s), 'B')}" for s in possible]
    copied = [f"{s} {quantity(streamed(job, s), 'B')}" for s in possible]
    return (
        f"Basis and center are in host memory, of a rank: {', '.join(kept)}; with replicate the"
        " ranks of a host share them. A step copies from there, behind compute, 2 basis + center:"
        f" {', '.join(copied)}."
    )


def _building(job: Job) -> str:
    """What the device of a rank holds while the basis is built, in words."""
    peaks = [f"{s} {quantity(building(job, s), 'B')}" for s in SHARDINGS if not obstacle(job, s)]
    if job.storage == "host":
        return (
            f"The basis is built on the CPU; a rank's device holds its weights: {', '.join(peaks)}."
        )
    best = max(best_weights(job, s) for s in SHARDINGS if not obstacle(job, s))
    return (
        f"While the basis is built, a rank's device holds at most: {', '.join(peaks)}; candidates"
        f" go there in blocks of {quantity(BLOCK_BYTES, 'B')}. From its second trained average on"
        f" `twa average` keeps the best weights so far in CPU memory, too: {quantity(best, 'B')} a"
        " rank, or its shards."
    )


def _host(job: Job) -> str:
    """What one host holds that has all ranks on its CPUs, in words."""
    held = [f"{s} {quantity(host_memory(job, s), 'B')}" for s in SHARDINGS if not obstacle(job, s)]
    return (
        f"One host with all ranks on its CPUs holds: {', '.join(held)}; with replicate the ranks of"
        " a host share a packed basis and its center."
    )


def _assumptions(job: Job) -> str:
    """What the figures assume."""
    return (
        "Assumed: ring collectives (a sum of m bytes: each of K ranks sends 2 (K - 1) / K m), FSDP"
        f" in blocks of 1/{1 / job.block_share:.3g} of the model, no activations; see"
        " docs/distributed.md."
    )
