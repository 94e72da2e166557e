"""What the compiled CUDA kernels cost, read from the machine code in the native module; no GPU is
needed.

Per kernel: registers, bytes of stack (spills), and of project and reconstruct the instructions of
one tile (machine_code.py), all of them: decoding, products, the gradient's or the coefficients'
fixed point, scales, waiting, copies, center and store. Two measures:

    per weight   thread-instructions / (rows x 128), against the budget of the packed bytes alone: 7
                 / 3.7 / 2.8 / 1.8 / 0.9 on an H200
    issue        share of the instructions that an H200 can issue (7.2 a byte at 4.1 TB/s) while it
                 moves the tile's bytes: packed words, scales, float32 gradient or center and weight
    pipe         share of what the pipe for integers, logic, shifts and permutations can do
                 meanwhile: half as many (64 a cycle and multiprocessor, CUDA C++ programming guide,
                 "Throughput of native arithmetic instructions") Below 1 in both a kernel can run at
                 the speed of memory; how far below is its slack.

    python bench/static_cost_cuda.py           writes bench/results/cuda_static_cost.{md,json,png}
    python bench/static_cost_cuda.py --check   exit status 1 if a kernel has a stack frame or spends
                                               more than it may
"""

from __future__ import annotations

import argparse
import json
import re
import sys
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
OPS = ("pack", "project", "sum", "update", "reconstruct", "scale", "step")


def tile_bytes(op: str, bits: int, rows: int) -> int:
    """That one tile moves: packed words and scales of its rows, and 128 columns of float32
    gradient, or of center and weight.
    """
    return rows * (16 * bits + 1) + (512 if op == "project" else 1024)


def measure(function: machine_code.Function) -> dict | None:
    found = re.search(
        r"\d(pack|project|sum|update|reconstruct|scale|step)_kernel(ILi(\d)E)?(Li(\d+)E)?(Lb(\d)E)?",
        function.name,
    )
    if not found:
        return None
    op, bits, units, many = found[1], int(found[3] or 0), int(found[5] or 0), found[7] == "1"
    row = {
        "op": op,
        "bits": bits,
        "rows": 16 * units,
        "many": many,
        "arch": function.arch,
        "registers": function.registers,
    }
    row |= {"stack": function.stack, "instructions": len(function.code)}
    if op in ("project", "reconstruct") and not many:
        path = machine_code.usual_path(function.code)
        names = machine_code.counts(path)
        thread_instructions = 32 * len(path)
        # of one tile
        products = sum(
            {"16832": 512, "16816": 256}[op.split(".")[1]] for op in path if op.startswith("IMMA")
        )
        row |= {
            "path": len(path),
            "per_weight": thread_instructions / (row["rows"] * 128),
            "products": products,
        }
        row["alu"] = 64 * sum(name in ALU for name in (op.split(".")[0] for op in path))
        row["alu"] /= tile_bytes(op, bits, row["rows"]) * PER_BYTE.get(
            function.arch, PER_BYTE["sm_90"]
        )
        row["share"] = thread_instructions / (
            tile_bytes(op, bits, row["rows"]) * PER_BYTE.get(function.arch, PER_BYTE["sm_90"])
        )
        row |= {
            "shared_access": names.get("LDS", 0) + names.get("STS", 0),
            "barriers": names.get("BAR", 0),
        }
        row["copies"] = sum("UBLKCP" in text or "LDGSTS" in text for _, text in function.code)
    return row


def measure_all(library: Path) -> list[dict]:
    rows = [row for row in map(measure, machine_code.functions(library)) if row]
    return sorted(
        rows, key=lambda r: (r["arch"], OPS.index(r["op"]), -r["bits"], r["rows"], r["many"])
    )


def predicted(
    rows: list[dict], op: str, bits: int, n: int, per_byte: float = PER_BYTE["sm_90"]
) -> float | None:
    """Percent of a copy that project or reconstruct should reach: 93 where memory is the limit, as
    streaming kernels do, less where issue slots or the integer pipe would be more than 0.9 full.
    None where no whole tile was counted.

    per_byte   thread-instructions that the GPU can issue while it copies a byte: an H200's
    """
    built = {
        r["rows"]: r
        for r in rows
        if (r["arch"], r["op"], r["bits"], r["many"]) == ("sm_90", op, bits, False) and "path" in r
    }
    if not built or (op == "reconstruct" and n > max(built)):
        return None
    blocks = -(-n // max(built))
    fit = built[min(rows for rows in built if rows >= -(-n // blocks))]
    bytes_moved = n * (16 * bits + 1) + (512 if op == "project" else 1024)
    full = blocks * max(fit["share"], fit["alu"]) * tile_bytes(op, bits, fit["rows"]) / bytes_moved
    return 100 * min(0.93, 0.9 / (full * PER_BYTE["sm_90"] / per_byte))


def problems(row: dict) -> list[str]:
    label = f"{row['arch']} {row['op']} {row['bits']} bits, {row['rows']} rows"
    found = []
    if row["stack"]:
        found.append(f"{label}: {row['stack']} bytes of stack (spills)")
    if "path" in row and row["barriers"]:
        found.append(f"{label}: {row['barriers']} barriers of the block in the main loop")
    if "path" in row and not row["copies"]:
        found.append(f"{label}: no asynchronous copies")
    if row["arch"] == "sm_90" and "path" in row and row["rows"] >= 64 and row["share"] > 1:
        found.append(
            f"{label}: {100 * row['share']:.0f} % of the instructions that memory's speed leaves"
        )
    if row["arch"] == "sm_90" and "path" in row and row["rows"] >= 64 and row["alu"] > 1:
        found.append(
            f"{label}: {100 * row['alu']:.0f} % of the integer and logic pipe that memory's speed"
            " leaves"
        )
    enough = "path" in row and row["rows"] >= ROWS.get((row["op"], row["bits"]), 64)
    # the budget has one digit
    if row["arch"] == "sm_90" and enough and round(row["per_weight"], 1) > BUDGET[row["bits"]]:
        found.append(
            f"{label}: {row['per_weight']:.2f} instructions per weight, budget"
            f" {BUDGET[row['bits']]}"
        )
    return found


def markdown(rows: list[dict]) -> list[str]:
    lines = [
        "# Static cost of the CUDA kernels",
        "",
        "![instructions per weight](cuda_static_cost.png)",
        "",
    ]
    lines += [
        "Read from the machine code in the native module; no GPU took part. Instructions of a whole"
        " tile on its usual path: float32"
    ]
    lines += [
        "gradient, center and weight, aligned. *Issue* and *pipe*: shares of the instructions, and"
        " of those of the integer and logic pipe, that"
    ]
    lines += [
        "an H200 can do while it moves the tile's bytes; below 1, memory is the limit. Budget:"
        " instructions per weight while the packed bytes"
    ]
    lines += ["alone are moved.", ""]
    lines += [
        "| op | bits | budget | rows | instructions | per weight | issue | pipe | sm_80, A100:"
        " issue | pipe | registers | stack |"
    ]
    lines += ["|" + "---|" * 12]
    by = {(r["arch"], r["op"], r["bits"], r["rows"], r["many"]): r for r in rows}
    for r in rows:
        if r["arch"] == "sm_90" and "path" in r:
            other = by.get(("sm_80", r["op"], r["bits"], r["rows"], False))
            cells = [
                r["op"],
                r["bits"],
                BUDGET[r["bits"]],
                r["rows"],
                r["path"],
                f"{r['per_weight']:.2f}",
                f"{r['share']:.2f}",
            ]
            cells += [
                f"{r['alu']:.2f}",
                *([f"{other[key]:.2f}" for key in ("share", "alu")] if other else ["", ""]),
                r["registers"],
                r["stack"],
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    archs = sorted({r["arch"] for r in rows})
    stack = max(r["stack"] for r in rows)
    lines += [
        "",
        (
            f"{len(rows)} kernels ({', '.join(archs)}); largest stack frame {stack} bytes. The"
            f" others, on {archs[-1]}:"
        ),
        "",
    ]
    lines += ["| kernel | bits | rows | registers | stack | instructions |", "|" + "---|" * 6]
    for r in rows:
        if r["arch"] == archs[-1] and "path" not in r:
            size = f"more than {r['rows']}" if r["many"] else r["rows"] or ""
            lines.append(
                f"| {r['op']} | {r['bits'] or ''} | {size} | {r['registers']} | {r['stack']} |"
                f" {r['instructions']} |"
            )
    return [*lines, ""]


def picture(path: Path, rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bits = list(BUDGET)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for k, (op, n) in enumerate(
        [("project", 64), ("project", 128), ("reconstruct", 64), ("reconstruct", 128)]
    ):
        chosen = {
            r["bits"]: r
            for r in rows
            if (r["arch"], r["op"], r["rows"], r["many"]) == ("sm_90", op, n, False)
        }
        at = [i + 0.2 * k - 0.3 for i in range(len(bits))]
        for axis, key in zip(axes, ("per_weight", "most"), strict=True):
            values = [
                (
                    (
                        chosen[b][key]
                        if key == "per_weight"
                        else max(chosen[b]["share"], chosen[b]["alu"])
                    )
                    if b in chosen
                    else 0.0
                )
                for b in bits
            ]
            shade = {"color": f"C{k // 2}", "alpha": 0.55 if n == 64 else 1.0}
            bars = axis.bar(at, values, 0.18, label=f"{op}, {n} rows", **shade)
            axis.bar_label(
                bars,
                [
                    f"{v:.1f}" if v and key == "per_weight" else f"{v:.2f}"[1:] if v else ""
                    for v in values
                ],
                fontsize=6.5,
            )
    for i, b in enumerate(bits):
        axes[0].hlines(
            BUDGET[b],
            i - 0.42,
            i + 0.42,
            color="0.2",
            linewidth=1.5,
            label=None if i else "budget, packed bytes alone",
        )
    axes[1].axhline(1.0, color="0.2", linewidth=1.5, label="speed of memory")
    axes[0].set_ylabel("thread-instructions per packed weight")
    axes[1].set_ylabel("share of issue slots or integer pipe")
    for axis in axes:
        axis.set_xticks(range(len(bits)), [f"{b} bit" + "s" * (b > 1) for b in bits])
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_ylim(0, 1.35)
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].legend(
        *(v[:1] for v in axes[1].get_legend_handles_labels()),
        frameon=False,
        fontsize=8,
        loc="upper right",
    )
    figure.suptitle("CUDA kernels on sm_90, from their machine code (lower is better)", fontsize=11)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, report problems")
    parser.add_argument(
        "--library",
        type=Path,
        help="object, archive or library with the kernels (default: the native module)",
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
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
    print(
        "\n".join(found)
        or f"{len(rows)} kernels: no stack, no barrier in a main loop, within the budget"
    )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
