"""project and reconstruct on every tier that this machine has, in one table: time, percent of the
measured bandwidth and of the counted bound, and the peers.

    python bench/cpu_tiers.py [--n 64] [--columns 8e6] [--threads 2] [--rounds 7] [--save]

--save writes bench/results/cpu_tiers.md and .json. One process a tier (TWA_KERNELS_ISA); they take
turns, and so do reading, copying, PyTorch's float32 product and the 4-bit peers, so that other load
on the machine hits all alike. Of all turns the fastest counts.

Bytes as in benchmark_project.py and benchmark_reconstruct.py. Bandwidth: of a plain loop (project)
and of memcpy (reconstruct). Bound: cycles at least by instructions and ports (cpu_bound.py, for the
core that this is), at the clock measured in the same turns; left out where the core is not in its
table or the instructions cannot be followed. What is far below both bounds waits for latencies.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import common
import cpu_bound
import torch
from cpu_ports import CORES, this_core
from cpu_trace import Program, built_library
from twa.io.tables import markdown_table

from twa_kernels import native

BOUNDS = {"project": "read", "reconstruct": "copy"}


def peers(op: str, n: int, columns: int) -> dict[str, common.Run]:
    from peers import PEERS

    p, x, g = torch.randn(n, columns), torch.randn(n), torch.randn(columns)
    found: dict[str, common.Run] = {}
    if op == "project":
        found["torch float32"] = (lambda: torch.mv(p, g), 4 * (n + 1) * columns)
    else:
        found["torch float32"] = (lambda: torch.addmv(g, p.T, x), 4 * (n + 2) * columns)
    for make in PEERS:
        if (peer := make.create(n, columns)) is None:
            continue
        if op == "project":
            found[peer.name] = (lambda peer=peer: peer.project(g), peer.nbytes[0] + 4 * columns)
        else:
            run = lambda peer=peer: peer.reconstruct(x[:, None], g)  # noqa: E731
            found[peer.name] = (run, peer.nbytes[1] + 8 * columns)
    return found


def serve(connection: Connection, n: int, columns: int, threads: int) -> None:
    """A process of one tier: first the tier's name, then answers.

    Asked ("make", op, bits) for {name: bytes}; bits 0: peers; op "memory": bandwidth.
    Asked ("time", name, seconds) for the fastest of the runs of about these seconds.
    Asked ("clock",) for cycles a second.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    connection.send(native._C.cpu_isa() if native._C else None)
    runs: dict[str, common.Run] = {}
    while True:
        match connection.recv():
            case "make", op, bits:
                runs.clear()  # before the next takes memory
                if op == "memory":
                    runs |= common.memory_runs()
                elif not bits:
                    runs |= peers(op, n, columns)
                else:
                    runs["ours"] = common.kernel_runs(n, columns, bits)[op]
                connection.send({name: moved for name, (_, moved) in runs.items()})
            case "time", name, seconds:
                connection.send(min(common.run_times(runs[name][0], 1, seconds)))
            case ("clock",):
                connection.send(native._C.clock_rate())
            case None:
                return


class Tier:
    """A child process. `name`: of its tier; None if this machine lacks the one asked for."""

    def __init__(self, isa: str, *options: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, *options), daemon=True)
        os.environ["TWA_KERNELS_ISA"] = isa
        try:
            self._process.start()
        finally:
            del os.environ["TWA_KERNELS_ISA"]
        other.close()
        self.name = self._connection.recv()
        if self.name is None:
            self.end()

    def ask(self, *question: object):
        self._connection.send(question)
        return self._connection.recv()

    def end(self) -> None:
        self._connection.send(None)
        self._process.join()


def take_turns(tiers: list[Tier], rounds: int, seconds: float) -> tuple[list[dict], float]:
    """Rows of op, bits, tier or peer, seconds and bytes; and the clock."""
    best: dict[tuple[str, int, str], float] = {}
    moved: dict[tuple[str, int, str], int] = {}
    rates = []
    helper = tiers[-1]
    work = [("memory", 0)] + [(op, bits) for op in BOUNDS for bits in (*cpu_bound.BITS, 0)]
    for op, bits in work:
        asked = [helper] if bits == 0 else tiers
        runs = []
        for tier in asked:
            for name, size in tier.ask("make", op, bits).items():
                key = (op, bits, tier.name if name == "ours" else name)
                runs.append((tier, name, key))
                moved[key] = size
        for tier, name, _ in runs:
            tier.ask("time", name, 0.0)  # touches everything once
        for _ in range(rounds):
            for tier, name, key in runs:
                best[key] = min(best.get(key, float("inf")), tier.ask("time", name, seconds))
            rates.append(helper.ask("clock"))
        for key in (key for _, _, key in runs):
            print(
                f"{key[0]:12} {key[1] or '':>2} {key[2]:28} {1e3 * best[key]:9.2f} ms", flush=True
            )
    rows = [
        {"op": op, "bits": bits, "what": what, "seconds": best[key], "bytes": moved[key]}
        for key in best
        for op, bits, what in [key]
    ]
    return rows, sorted(rates)[len(rates) // 2]


def counted(tiers: list[str], n: int, core: str | None) -> dict[tuple[str, int, str], float]:
    """Cycles for a weight at least of (op, bits, tier), by cpu_bound.py; {} where it cannot."""
    if core is None:
        print("no counted bound: this core is not in bench/cpu_ports.py")
        return {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            program = Program(built_library(), Path(folder))
            ops = list(BOUNDS)
            rows = cpu_bound.count(program, ops, tiers, list(cpu_bound.BITS), [core], numbers=(n,))
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        print(f"no counted bound: {error}")
        return {}
    return {(r["op"], r["bits"], r["tier"]): r["cycles"] for r in rows}


def finish(
    rows: list[dict], bound: dict, clock: float, n: int, columns: int, threads: int
) -> list[dict]:
    """Rows with rates, percents and ratios."""
    memory = {r["what"]: r["bytes"] / r["seconds"] / 1e9 for r in rows if r["op"] == "memory"}
    float32 = {r["op"]: r["seconds"] for r in rows if r["what"] == "torch float32"}
    out = []
    for r in rows:
        r |= {"ms": 1e3 * r["seconds"], "GB/s": r["bytes"] / r["seconds"] / 1e9}
        if r["op"] in BOUNDS:
            r["bandwidth"] = 100 * r["GB/s"] / memory[BOUNDS[r["op"]]]
            r["torch float32"] = float32[r["op"]] / r["seconds"]
            if cycles := bound.get((r["op"], r["bits"], r["what"])):
                least = cycles * n * columns / (clock * threads)
                r["counted bound"] = 100 * least / r["seconds"]
        out.append(r)
    return out


def markdown(rows: list[dict], facts: dict[str, str], n: int, columns: int) -> list[str]:
    memory = {r["what"]: r["GB/s"] for r in rows if r["op"] == "memory"}
    table = []
    for r in rows:
        if r["op"] in BOUNDS:
            limit = f"{r['counted bound']:.0f} %" if "counted bound" in r else ""
            percent = f"{r['bandwidth']:.0f} % of {BOUNDS[r['op']]}"
            figures = f"{r['ms']:.2f}", f"{r['GB/s']:.1f}", percent, limit
            speed = f"{r['torch float32']:.1f}"
            table.append([r["op"], str(r["bits"] or ""), r["what"], *figures, speed])
    header = ["op", "bits", "tier or peer", "ms", "GB/s", "of bandwidth", "of counted bound"]
    rates = ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in memory.items())
    return [
        f"# CPU kernels by tier, n = {n}, D = {columns:.3g}",
        "",
        "`python bench/cpu_tiers.py`. The last column: how many times as fast as PyTorch's float32",
        "product.",
        "",
        *[f"{key}: {value}" for key, value in facts.items()],
        "",
        f"measured bandwidth: {rates}",
        "",
        markdown_table([*header, "speed of float32"], table),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--columns", type=float, default=8e6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.15, help="of a turn")
    parser.add_argument("--save", action="store_true", help="write bench/results/cpu_tiers.*")
    args = parser.parse_args()
    options = args.n, int(args.columns), args.threads
    tiers = [tier for isa in cpu_bound.TIERS if (tier := Tier(isa, *options)).name == isa]
    if not tiers:
        raise SystemExit("the native module is not built")
    rows, clock = take_turns(tiers, args.rounds, args.seconds)
    core = this_core()
    bound = counted([tier.name for tier in tiers], args.n, core)
    for tier in tiers:
        tier.end()
    rows = finish(rows, bound, clock, *options)
    facts = common.hardware() | {
        "isa": ", ".join(tier.name for tier in tiers),
        "threads": str(args.threads),
        "clock": f"{clock / 1e9:.2f} GHz, measured",
        "core": CORES[core].name if core else "not known",
    }
    lines = markdown(rows, facts, *options[:2])
    print("\n".join(lines))
    if args.save:
        common.RESULTS.mkdir(exist_ok=True)
        (common.RESULTS / "cpu_tiers.md").write_text("\n".join(lines))
        found = {"facts": facts, "n": args.n, "D": options[1], "rows": rows}
        (common.RESULTS / "cpu_tiers.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
