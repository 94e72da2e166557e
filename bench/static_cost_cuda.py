"""What the compiled CUDA kernels cost, read from the machine code in the native module; no GPU is
needed.

Per kernel: registers, bytes of stack (spills), and of project and reconstruct the instructions of
one tile (machine_code.py), all of them: decoding, products, the gradient's or the coefficients'
fixed point, scales, waiting, copies, center and store. Three measures:

    per weight   thread-instructions / (rows x 128), against the budget of the packed bytes alone:
                 7 / 3.7 / 2.8 / 1.8 / 0.9 on an H200
    issue        share of the instructions that an H200 can issue (7.2 a byte at 4.1 TB/s) while it
                 moves the tile's bytes: packed words, scales, float32 gradient or center and weight
    pipe         share of what the pipe for integers, logic, shifts and permutations can do
                 meanwhile: half as many (64 a cycle and multiprocessor, CUDA C++ programming guide,
                 "Throughput of native arithmetic instructions")

Below 1 in issue and pipe a kernel can run at the speed of memory; how far below is its slack.

Of pack and record, which code four tiles of a row at a time, a quarter of that: float32 weights,
whole tiles. What a block does once (tables, the center) is spread over what its warps do after it.
Their bytes per weight: 4 read, bits / 8 and 2 / 128 written; of pack 8 / 128 of squared norms
written and read; of record the weights again (not counted: they come from the cache), and 4 read
and written of the reference.

    python bench/static_cost_cuda.py           writes bench/results/cuda_static_cost.{md,json,png}
    python bench/static_cost_cuda.py --check   exit status 1 if a kernel has a stack frame or spends
                                               more than it may
    python bench/static_cost_cuda.py --architectures 100,120
                                               compiles into build/ for these, a file at a time
                                               (nvcc is needed), and checks stack frames and static
                                               shared memory of every kernel; what blocks ask for at
                                               launch is held to 99 KiB by the sources themselves
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import machine_code
from static_cost import BUDGET

# H200, A100 80 GB at the rate of a copy
PER_BYTE = {"sm_90": 132 * 128 * 1.755e9 / 4.1e12, "sm_80": 108 * 128 * 1.41e9 / 1.75e12}
#: rows from which a kernel must be within the budget per weight: what a tile costs once is spread
#: over them
ROWS = {("project", 1): 128, ("reconstruct", 1): 256}
#: operations of the pipe that takes a warp's instruction every other cycle
ALU = frozenset(
    [
        "PRMT",
        "LOP3",
        "SHF",
        "IADD3",
        "ISETP",
        "VIADD",
        "SEL",
        "LEA",
        "VIMNMX",
        "VIMNMX3",
        "IMNMX",
        "VIADDMNMX",
        "FSEL",
        "FMNMX",
        "FSETP",
        "PLOP3",
        "I2FP",
        "IABS",
        "POPC",
        "FLO",
        "SGXT",
        "BMSK",
        "R2P",
        "P2R",
        "MOV",
        "SHL",
    ]
)
#: of the pipe for multiplications: integers take it every other cycle, too
FMA = frozenset(["IMAD", "FFMA", "FMUL", "FADD", "IDP", "HADD2", "HFMA2"])
#: of the pipe for conversions and reductions of a warp
XU = frozenset(["F2I", "I2F", "F2F", "REDUX", "MUFU"])
OPS = (
    "pack",
    "unit_sums",
    "segment_sums",
    "look",
    "record",
    "replay",
    "project",
    "sum",
    "update",
    "reconstruct",
    "scale",
    "step",
)


#: static shared memory of a block, on any architecture
MOST_STATIC = 48 << 10


def mix(path: list[str]) -> dict[str, int]:
    """Instructions of a path by what they take: issue slots, pipes; and wavefronts of shared
    memory, 128 bytes each, without conflicts of banks.
    """
    names = [text.split(".")[0] for text in path]
    width = {"128": 4, "64": 2}

    def wavefronts(text: str) -> int:
        if text == "STS.64":  # reconstruct's sums, of half the lanes
            return 1
        return next((width[part] for part in text.split(".") if part in width), 1)

    return {
        "issue": len(path),
        "alu": sum(name in ALU for name in names),
        "fma": sum(name in FMA for name in names),
        "xu": sum(name in XU for name in names),
        "uniform": sum(name.startswith("U") and name != "UBLKCP" for name in names)
        + names.count("R2UR"),
        "shared": sum(
            wavefronts(text)
            for text, name in zip(path, names, strict=True)
            if name in ("LDS", "STS", "LDG", "STG")
        ),
    }


def tile_bytes(op: str, bits: int, rows: int) -> int:
    """Bytes that one tile moves: packed words and scales of its rows, and 128 columns of float32
    gradient, or of center and weight.
    """
    return rows * (16 * bits + 1) + (512 if op == "project" else 1024)


#: how often a warp takes four tiles for what its block does once; of pack with 72 rows
TIMES = {"pack": 9, "record": 4}


#: most that they may need of what an H200 can do while it moves their bytes
LIMIT = {"pack": 1.5, "record": 1.0}


def weight_bytes(op: str, bits: int) -> float:
    """Bytes that pack or record moves for a weight."""
    return 4 + bits / 8 + 2 / 128 + (2 * 8 / 128 if op == "pack" else 8)


def measure_quantiser(function: machine_code.Function, op: str, bits: int) -> dict:
    """What a tile of pack or record costs."""
    before, loop = machine_code.quantiser_path(function.code)
    available = 128 * weight_bytes(op, bits) * PER_BYTE.get(function.arch, PER_BYTE["sm_90"])

    def of_tile(before: int, loop: int) -> float:
        return (before / TIMES[op] + loop) / 4

    group = of_tile(len(before), len(loop))
    alu = of_tile(*(sum(text.split(".")[0] in ALU for text in path) for path in (before, loop)))
    row = {"group": group, "per_weight": group * 32 / 128}
    return row | {"share": 32 * group / available, "alu": 64 * alu / available}


def measure(function: machine_code.Function) -> dict | None:
    """A row of what a kernel costs; None for a kernel that is none of OPS."""
    name = rf"\d({'|'.join(OPS)})_kernel(ILi(\d)E)?(Li(\d+)E)?(Lb(\d)E)?"
    if not (found := re.search(name, function.name)):
        return None
    op, bits, units, many = found[1], int(found[3] or 0), int(found[5] or 0), found[7] == "1"
    row = {"op": op, "bits": bits, "rows": 16 * units, "many": many, "arch": function.arch}
    row |= {"registers": function.registers, "stack": function.stack}
    row["instructions"] = len(function.code)
    if op in TIMES:
        return row | measure_quantiser(function, op, bits)
    if op not in ("project", "reconstruct") or many:
        return row
    path = machine_code.usual_path(function.code)
    names, instructions = machine_code.counts(path), 32 * len(path)
    row |= {"path": len(path), "per_weight": instructions / (row["rows"] * 128)}
    row["mix"] = {"fp32": mix(path), "bf16": mix(machine_code.usual_path(function.code, True))}
    shapes = [text.split(".")[1] for text in path if text.startswith("IMMA")]
    row["products"] = sum({"16832": 512, "16816": 256}[shape] for shape in shapes)  # of one tile
    per_byte = PER_BYTE.get(function.arch, PER_BYTE["sm_90"])
    available = tile_bytes(op, bits, row["rows"]) * per_byte
    row["alu"] = 64 * sum(text.split(".")[0] in ALU for text in path) / available
    row["share"] = instructions / available
    row["shared_access"] = names.get("LDS", 0) + names.get("STS", 0)
    row["barriers"] = names.get("BAR", 0)
    row["copies"] = sum("UBLKCP" in text or "LDGSTS" in text for _, text in function.code)
    return row


def measure_all(library: Path) -> list[dict]:
    rows = [row for row in map(measure, machine_code.functions(library)) if row]
    return sorted(
        rows, key=lambda r: (r["arch"], OPS.index(r["op"]), -r["bits"], r["rows"], r["many"])
    )


def problems(row: dict) -> list[str]:
    """What is not as it should be."""
    op, bits, rows, found = row["op"], row["bits"], row["rows"], []
    if row["stack"]:
        found.append(f"{row['stack']} bytes of stack (spills)")
    if "path" in row and row["barriers"]:
        found.append(f"{row['barriers']} barriers of the block in the main loop")
    if "path" in row and not row["copies"]:
        found.append("no asynchronous copies")
    if row["arch"] == "sm_90" and "group" in row:  # pack: half of a copy's speed, or more
        limit = LIMIT[op]
        found += [
            f"{100 * row[key]:.0f} % of {name} at the speed of memory, limit {100 * limit:.0f} %"
            for key, name in (("share", "the instructions"), ("alu", "the integer and logic pipe"))
            if row[key] > limit
        ]
    if row["arch"] == "sm_90" and "path" in row:
        what = {"share": "instructions", "alu": "integer and logic pipe"}
        for key, name in what.items():
            if rows >= 64 and row[key] > 1:
                found.append(f"{100 * row[key]:.0f} % of the {name} that memory's speed leaves")
        # the budget has one digit
        if rows >= ROWS.get((op, bits), 64) and round(row["per_weight"], 1) > BUDGET[bits]:
            cost = row["per_weight"]
            found.append(f"{cost:.2f} instructions per weight, budget {BUDGET[bits]}")
    return [f"{row['arch']} {op} {bits} bits, {rows} rows: {problem}" for problem in found]


def compiled(architecture: str) -> list[Path]:
    """Objects of all kernels for an architecture, in build/; those of this tree are kept."""
    from gpucheck import ROOT, build

    folder = ROOT / "build" / f"objects-sm_{architecture}"
    folder.mkdir(parents=True, exist_ok=True)
    made, digest = folder / "digest", build.digest(architecture)
    if not made.exists() or made.read_text() != digest:
        for old in folder.glob("*"):
            old.unlink()
    objects = []
    for name, (command, source) in build.commands(architecture).items():
        if source.suffix == ".cu":
            objects.append(folder / name)
            if not objects[-1].exists():
                print(f"sm_{architecture}: {source.name}", file=sys.stderr)
                # this machine has other work
                one = [
                    w
                    for w in command
                    if not w.startswith(("--split-compile", "--threads", "-Xptxas"))
                ]
                part = folder / "part.o"
                subprocess.run(["nice", *one, str(source), "-o", str(part)], check=True)
                part.rename(objects[-1])
                made.write_text(digest)
    return objects


def check_architecture(architecture: str) -> list[str]:
    """What is wrong with kernels for an architecture that the module is not built for."""
    functions = [f for o in compiled(architecture) for f in machine_code.functions(o)]
    found = []
    for f in functions:
        row = measure(f)
        label = f"{row['op']} {row['bits']} bits, {row['rows']} rows" if row else f.name
        if f.stack:
            found.append(f"{f.arch} {label}: {f.stack} bytes of stack (spills)")
        if f.shared > MOST_STATIC:
            found.append(f"{f.arch} {label}: {f.shared} bytes of static shared memory")
    registers, stack = max(f.registers for f in functions), max(f.stack for f in functions)
    figures = f"{len(functions)} kernels, at most {registers} registers, {stack} bytes of stack"
    print(f"sm_{architecture}: {figures}")
    return found


def markdown(rows: list[dict]) -> list[str]:
    archs, stack = sorted({r["arch"] for r in rows}), max(r["stack"] for r in rows)
    return [
        "# Static cost of the CUDA kernels",
        "",
        "![instructions per weight](cuda_static_cost.png)",
        "",
        "Read from the machine code in the native module; no GPU took part. Instructions of a whole"
        " tile on its usual path: float32",
        "gradient, center and weight, aligned. *Issue* and *pipe*: shares of the instructions, and"
        " of those of the integer and logic pipe, that",
        "an H200 can do while it moves the tile's bytes; below 1, memory is the limit. Budget:"
        " instructions per weight while the packed bytes",
        "alone are moved.",
        "",
        *_tiles(rows),
        "",
        "`pack` and `record`, a tile of a row of float32 weights; *issue* and *pipe* of what an"
        " H200 can do while it moves their bytes (of `record`",
        "without the second read of the weights):",
        "",
        *_quantisers([r for r in rows if "group" in r]),
        "",
        f"{len(rows)} kernels ({', '.join(archs)}); largest stack frame {stack} bytes. The others,"
        f" on {archs[-1]}:",
        "",
        *_others([r for r in rows if r["arch"] == archs[-1] and not {"path", "group"} & r.keys()]),
        "",
    ]


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _tiles(rows: list[dict]) -> list[str]:
    """What a whole tile costs on sm_90, and beside it on sm_80."""
    head = ["op", "bits", "budget", "rows", "instructions", "per weight", "issue", "pipe"]
    head += ["sm_80, A100: issue", "pipe", "registers", "stack"]
    lines = [_line(head), "|" + "---|" * len(head)]
    by = {(r["arch"], r["op"], r["bits"], r["rows"], r["many"]): r for r in rows}
    for r in rows:
        if r["arch"] == "sm_90" and "path" in r:
            other = by.get(("sm_80", r["op"], r["bits"], r["rows"], False))
            cells = [r["op"], r["bits"], BUDGET[r["bits"]], r["rows"], r["path"]]
            cells += [f"{r[key]:.2f}" for key in ("per_weight", "share", "alu")]
            cells += [f"{other[key]:.2f}" if other else "" for key in ("share", "alu")]
            lines.append(_line([*cells, r["registers"], r["stack"]]))
    return lines


def _quantisers(rows: list[dict]) -> list[str]:
    """What a tile of pack and of record costs on sm_90, and beside it on sm_80."""
    head = ["op", "bits", "instructions", "per weight", "issue", "pipe"]
    head += ["sm_80, A100: issue", "pipe", "registers", "stack"]
    lines = [_line(head), "|" + "---|" * len(head)]
    by = {(r["arch"], r["op"], r["bits"]): r for r in rows}
    for r in rows:
        if r["arch"] == "sm_90":
            other = by.get(("sm_80", r["op"], r["bits"]))
            cells = [r["op"], r["bits"], f"{r['group']:.0f}", f"{r['per_weight']:.0f}"]
            cells += [f"{r[key]:.2f}" for key in ("share", "alu")]
            cells += [f"{other[key]:.2f}" if other else "" for key in ("share", "alu")]
            lines.append(_line([*cells, r["registers"], r["stack"]]))
    return lines


def _others(rows: list[dict]) -> list[str]:
    """A line for each kernel whose tile is not counted."""
    head = ["kernel", "bits", "rows", "registers", "stack", "instructions"]
    lines = [_line(head), "|" + "---|" * len(head)]
    for r in rows:
        size = f"more than {r['rows']}" if r["many"] else r["rows"] or ""
        if r["op"] == "replay":
            size = "coefficients of 1" if r["many"] else ""
        figures = r["registers"], r["stack"], r["instructions"]
        lines.append(_line([r["op"], r["bits"] or "", size, *figures]))
    return lines


def picture(path: Path, rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for k, (op, n) in enumerate(itertools.product(("project", "reconstruct"), (64, 128))):
        chosen = [
            r
            for r in rows
            if (r["arch"], r["op"], r["many"]) == ("sm_90", op, False) and r["rows"] <= n
        ]
        by = {r["bits"]: r for r in sorted(chosen, key=lambda r: r["rows"])}  # 8 bits: 48 rows
        at = [i + 0.2 * k - 0.3 for i in range(len(BUDGET))]
        costs = [by[b]["per_weight"] if b in by else 0.0 for b in BUDGET]
        shares = [max(by[b]["share"], by[b]["alu"]) if b in by else 0.0 for b in BUDGET]
        labels = (
            [f"{v:.1f}" if v else "" for v in costs],
            [f"{v:.2f}"[1:] if v else "" for v in shares],
        )
        style = {"color": f"C{k // 2}", "alpha": 0.55 if n == 64 else 1.0}
        for axis, values, texts in zip(axes, (costs, shares), labels, strict=True):
            bars = axis.bar(at, values, 0.18, label=f"{op}, {n} rows", **style)
            axis.bar_label(bars, texts, fontsize=6.5)
    for i, budget in enumerate(BUDGET.values()):
        label = None if i else "budget, packed bytes alone"
        axes[0].hlines(budget, i - 0.42, i + 0.42, color="0.2", linewidth=1.5, label=label)
    axes[1].axhline(1.0, color="0.2", linewidth=1.5, label="speed of memory")
    axes[0].set_ylabel("thread-instructions per packed weight")
    axes[1].set_ylabel("share of issue slots or integer pipe")
    for axis in axes:
        axis.set_xticks(range(len(BUDGET)), [f"{b} bit" + "s" * (b > 1) for b in BUDGET])
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_ylim(0, 1.35)
    axes[0].legend(frameon=False, fontsize=8)
    memory = [v[:1] for v in axes[1].get_legend_handles_labels()]
    axes[1].legend(*memory, frameon=False, fontsize=8, loc="upper right")
    title = "CUDA kernels on sm_90, from their machine code (lower is better)"
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, report problems")
    library = "object, archive or library with the kernels (default: the native module)"
    parser.add_argument("--library", type=Path, help=library)
    parser.add_argument("--architectures", help="compile for these and check them, such as 100,120")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.architectures:
        found = [p for a in args.architectures.split(",") for p in check_architecture(a)]
        print("\n".join(found) or "no stack")
        sys.exit(bool(found))
    if args.library is None:
        from twa_kernels import native

        if native._C is None or not native._C.with_cuda:
            sys.exit("the native module was built without CUDA: nothing to count")
        args.library = Path(native._C.__file__)
    rows = measure_all(args.library)
    if not args.check:
        args.output.mkdir(parents=True, exist_ok=True)
        text = "\n".join(markdown(rows))
        (args.output / "cuda_static_cost.md").write_text(text)
        (args.output / "cuda_static_cost.json").write_text(json.dumps(rows, indent=0) + "\n")
        picture(args.output / "cuda_static_cost.png", rows)
        print(text)
    found = [problem for row in rows for problem in problems(row)]
    fine = "no stack, no barrier in a main loop, within the budget"
    print("\n".join(found) or f"{len(rows)} kernels: {fine}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
