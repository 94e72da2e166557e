"""How fast the CPU kernels can be at most on each processor, from their machine code: instructions
and micro-operations for a weight, cycles at least, and what takes them.

    python bench/cpu_bound.py [--ops project] [--tiers avx2] [--bits 4] [--cores zen2] [--mca]
                              [--library FILE] [--save]

--save writes cpu_bound.md and .json to bench/results/; --mca adds what llvm-mca, where it is
installed, makes of the same instructions in the order of execution, with its own tables and with
latencies. Needs the native module built in this tree, objdump and a C++ compiler.

Instructions are counted by following a call of each kernel, step by step (cpu_trace.py), for two
numbers of rows and of tiles: a tile costs a fixed part, which matters at few rows, and a part for
each row. Gradients, centers and results are float32. Then (cpu_ports.py)

    cycles = max(micro-operations / width of the front end,
                 largest over sets of ports of (work that only they can do / number of them))

is a lower bound: latencies, caches, mispredicted branches and memory come on top.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from cpu_ports import CORES, LLVM, Core, bound
from cpu_trace import Cost, Program, built_library

RESULTS = Path(__file__).parent / "results"
BITS = (8, 4, 3, 2, 1)
TIERS = ("portable", "avx2", "avxvnni", "avx512vl", "avx512")
COLUMNS = 128  # of a tile
ROWS = (64, 16)


def figures(cost: Cost, core: Core, bits: int, n: int) -> dict:
    """Of a tile of n rows on a core, for a weight."""
    found = bound(core, cost.tile(n).items())
    cycles = found.cycles / (n * COLUMNS)
    return {
        "micro-operations": found.micro_operations / (n * COLUMNS),
        "cycles": cycles,
        "limit": found.limit,
        "Gweights/s per GHz": 1 / cycles,
        "GB/s of codes per GHz": bits / 8 / cycles,
    }


def mca(cost: Cost, core: str) -> float | None:
    """llvm-mca's cycles for a weight; None where it is missing, or does not know an instruction.

    Of a tile of 32 rows (pack: 16). Branches are left out.
    """
    if shutil.which("llvm-mca") is None or core not in LLVM:
        return None
    texts = (cost.code[at].text for at in cost.path if at)
    left_out = ("j", "call", "ret", "nop", "rep")
    lines = "\n".join(text for text in texts if not text.startswith(left_out))
    command = ["llvm-mca", f"-mcpu={LLVM[core]}", "-iterations=1", "-instruction-info=0"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True)
    if done.returncode:
        return None
    total = next(line for line in done.stdout.splitlines() if line.startswith("Total Cycles:"))
    return int(total.split()[-1]) / (cost.path_rows * COLUMNS)


def count(
    program: Program,
    ops: list[str],
    tiers: list[str],
    bits: list[int],
    cores: list[str],
    with_mca: bool = False,
    numbers: tuple[int, ...] = ROWS,
) -> list[dict]:
    """One row for each kernel, number of rows and core that runs its tier."""
    rows = []
    for op, tier, b in [(op, tier, b) for op in ops for tier in tiers for b in bits]:
        runs = [core for core in cores if tier in CORES[core].tiers]
        if (op, tier, b) not in program.kernels or not runs:
            continue
        try:
            cost = program.cost(op, tier, b)
        except RuntimeError as error:  # not this machine's
            print(error)
            continue
        for n in numbers:
            size = n * COLUMNS
            instructions = sum(cost.tile(n).values()) / size
            fixed = sum(cost.fixed.values())
            row = {"op": op, "tier": tier, "bits": b, "n": n}
            row |= {"instructions": instructions, "fixed": fixed}
            for core in runs:
                rows.append(row | {"core": core} | figures(cost, CORES[core], b, n))
                if with_mca and n == numbers[0] and (cycles := mca(cost, core)):
                    same = figures(cost, CORES[core], b, cost.path_rows)["cycles"]
                    rows[-1] |= {"mca": cycles, "mca, of the bound": cycles / same}
    return rows


def markdown(rows: list[dict], cores: list[str]) -> list[str]:
    from twa.io.tables import markdown_table

    lines = ["# What the CPU kernels' machine code allows", ""]
    lines += [
        "`python bench/cpu_bound.py --mca --save`. For each core: cycles for a weight at least,",
        "what takes them (f: the front end; else the letters of ports in bench/cpu_ports.py), and",
        "GB/s of packed codes for each GHz. Instructions: for a weight, and those of a tile",
        "whatever n is.",
        "",
    ]
    by_key = {(r["op"], r["tier"], r["bits"], r["n"], r["core"]): r for r in rows}
    for op, n in dict.fromkeys((r["op"], r["n"]) for r in rows):
        here = [r for r in rows if (r["op"], r["n"]) == (op, n)]
        table = []
        for tier, bits in dict.fromkeys((r["tier"], r["bits"]) for r in here):
            found = [by_key.get((op, tier, bits, n, core)) for core in cores]
            first = next(filter(None, found))
            table.append(
                [tier, str(bits), f"{first['instructions']:.2f}", f"{first['fixed']:.0f}"]
                + [_cell(r) for r in found]
            )
        header = ["tier", "bits", "instr.", "of a tile", *(CORES[c].name for c in cores)]
        lines += [f"## {op}, n = {n}", "", markdown_table(header, table), ""]
    if any("mca" in r for r in rows):
        lines += [
            "## llvm-mca's cycles for a weight, and their ratio to the bound",
            "",
            "Of a tile of 32 rows without its branches, with latencies and its own tables. Those",
            "of Zen 1 and 2 count a 256-bit operation as one, and let most take any port.",
            "",
        ]
        table = []
        for op, tier, bits in dict.fromkeys((r["op"], r["tier"], r["bits"]) for r in rows):
            found = [by_key.get((op, tier, bits, ROWS[0], core)) for core in cores]
            cells = [
                f"{r['mca']:.3f}, {r['mca, of the bound']:.1f}" if r and "mca" in r else ""
                for r in found
            ]
            table.append([op, tier, str(bits), *cells])
        lines += [
            markdown_table(["op", "tier", "bits", *(CORES[c].name for c in cores)], table),
            "",
        ]
    return lines


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    limit = "f" if row["limit"] == "front end" else row["limit"].removeprefix("ports ")
    return f"{row['cycles']:.3f} {limit}, {row['GB/s of codes per GHz']:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", type=Path, help="libtwa_core.a or an object of the kernels")
    ops = ("project", "reconstruct", "pack")
    parser.add_argument("--ops", nargs="+", choices=ops, default=["project", "reconstruct"])
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=list(TIERS))
    parser.add_argument("--bits", nargs="+", type=int, choices=BITS, default=list(BITS))
    parser.add_argument("--cores", nargs="+", choices=list(CORES), default=list(CORES))
    parser.add_argument("--mca", action="store_true", help="llvm-mca's cycles, too")
    parser.add_argument("--save", action="store_true", help="write bench/results/cpu_bound.*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = Program(args.library or built_library(), Path(folder))
        rows = count(program, args.ops, args.tiers, args.bits, args.cores, args.mca)
    if not rows:
        raise SystemExit("nothing to count: the library has no such kernel")
    lines = markdown(rows, args.cores)
    from common import publish

    publish("cpu_bound", lines, args.save)
    if args.save:
        (RESULTS / "cpu_bound.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
