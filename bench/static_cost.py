"""What the compiled Triton kernels cost, read from their machine code; no GPU is needed.

Every kernel in every shipped configuration is compiled for sm_80, sm_90 and gfx942 and disassembled
(nvdisasm and cuobjdump come with Triton; AMD's code is text already). Per kernel: registers, bytes
of spills, shared memory, how wide the packed loads are, and how many instructions the main loop
issues per packed weight, thread by thread: instructions of the loop x threads / weights of an
iteration.

The budget is what an H200 can issue at full bandwidth: 132 multiprocessors x 128 lanes x 1.755 GHz
over 4.8 TB/s is 6.2 instructions a byte, 7.3 at the 4.1 TB/s that a kernel can hope for; a weight
is bits / 8 + 1 / 128 bytes.

Versions of Triton differ much in what they make of a kernel: the tables have the oldest that is
supported and the newest (triton_versions.py installs them into build/).

    python bench/static_cost.py            writes bench/results/triton_static_cost.{md,json,png}
    python bench/static_cost.py --check    exit status 1 if a kernel spills, loads packed words
                                           narrower than 16 bytes, or is over 1.5 x the budget; with
                                           the Triton of this environment only, as with --brief
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

BUDGET = {8: 7.0, 4: 3.7, 3: 2.8, 2: 1.8, 1: 0.9}  # instructions per weight, H200 at full bandwidth
# bytes of shared memory that a block may have
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
LIMIT = 1.5  # of the budget, at 8 and 4 bits
BRIEF_BITS = (8, 4, 1)  # the widest code, the usual one, and the one that unrolls the most
TOOLS = "backends/nvidia/bin"


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / TOOLS / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def sass(kernel) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """[(label or "", instruction)] of a compiled kernel, and its registers, stack and shared bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        text, usage = (
            _tool("nvdisasm", "-c", str(path)),
            _tool("cuobjdump", "--dump-resource-usage", str(path)),
        )
    lines, label = [], ""
    for line in text.splitlines():
        if found := re.match(r"(\.L_x_\d+):", line):
            label = found[1]
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            lines.append((label, re.sub(r"^@!?U?P\w+\s+", "", found[1].strip())))
            label = ""
    numbers = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK")}
    return lines, {
        "registers": numbers["REG"],
        "spills": numbers["STACK"],
        "shared": kernel.metadata.shared,
    }


def gcn(kernel) -> tuple[list[tuple[str, str]], dict[str, int]]:
    text, lines, label = kernel.asm["amdgcn"], [], ""
    for line in text.split(".section")[0].splitlines():
        if found := re.match(r"(\.LBB\w+):", line):
            label = found[1]
        elif found := re.match(r"\t([a-z]\w+.*?)\s*(;.*)?$", line):
            lines.append((label, found[1]))
            label = ""
    numbers = {
        name: int(re.search(rf"\.{name}:\s*(\d+)", text)[1])
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    }
    spills = max(4 * numbers["vgpr_spill_count"], numbers["private_segment_fixed_size"])
    return lines, {
        "registers": numbers["vgpr_count"],
        "spills": spills,
        "shared": kernel.metadata.shared,
    }


def per_weight(rows: list[dict], op: str, bits: int, n: int) -> float | None:
    """Instructions of the main loops per packed weight of a basis of n rows, rows of padding
    included; None: not among the (compiled) variants.
    """
    from twa_kernels._triton.config import configuration, least_rows, row_blocks

    by = {(r["op"], r["bits"], r["variant"]): r.get("per_weight") for r in rows}
    config = configuration(op, bits, rows[0]["arch"])
    if op == "project":
        launches = [
            (size, blocks, f"{size} rows, fp32")
            for size, _, blocks in row_blocks(n, config["rows"], least_rows(bits))
        ]
    else:
        size = config["rows"]
        launches = [
            (size, -(-n // size), f"center fp32, out fp32, n {'any' if n % size else 'even'}")
        ]
    costs = [(size * blocks, by.get((op, bits, name))) for size, blocks, name in launches]
    if any(cost is None for _, cost in costs):
        return None
    return sum(handled * cost for handled, cost in costs) / n


def main_loop(lines: list[tuple[str, str]]) -> list[str]:
    """The longest innermost stretch that a branch goes back over; the whole kernel where there is
    none.
    """
    at = {label: k for k, (label, _) in enumerate(lines) if label}
    spans = []
    for k, (_, instruction) in enumerate(lines):
        found = re.search(r"(?:BRA|s_c?branch\w*)\b.*?(\.L\w+)", instruction)
        if found and at.get(found[1], k) < k:  # not the branch to itself that ends a kernel
            spans.append((k + 1 - at[found[1]], at[found[1]], k + 1))
    spans = [
        (size, a, b)
        for size, a, b in spans
        if not any(a <= c and d <= b and other < size for other, c, d in spans)
    ]
    _, begin, end = max(spans, default=(0, 0, len(lines)))
    return [instruction for _, instruction in lines[begin:end]]


def weights_of(variant) -> int:
    """Packed weights that a program's main loop handles per iteration (pack, unpack: in all)."""
    c = dict(variant.constants)
    if variant.op == "gram":
        return 2 * c["ROWS"] * 128
    if variant.op in ("project", "reconstruct"):
        return c["ROWS"] * c["TILES"] * 128
    return c.get("TILES", 0) * 128


#: operations that Triton looks through, from an operand of a product to what was loaded
THROUGH = re.compile(
    r"arith\.|math\.|ttg?\.(fp_to_fp|trans|broadcast|expand_dims|reshape|bitcast|convert_layout)$"
)


def behind_products(ttir: str) -> list[str]:
    """What float64 products are made of that versions of Triton before 3.9 do not compile: operands
    that were 16 bits wide ("16 bits"); for AMD, operands that are themselves float64 products, not
    transposed ("product"), and products that may be TF32 ("tf32")."""
    made, found, left, seen = {}, set(), [], set()
    for line in ttir.splitlines():
        if match := re.match(r'\s*(%\w+)(?::\d+)? = "?([\w.]+)"?(.*)', line):
            name, operation, rest = match.groups()
            made[name] = (operation, rest)
            if operation == "tt.dot" and "xf64>" in rest:
                left += [(operand, False) for operand in re.findall(r"%\w+", rest)[:2]]
                found |= {"tf32"} if "tf32" in rest else set()
    while left:
        name, transposed = left.pop()
        if (name, transposed) in seen or name not in made:
            continue
        seen.add((name, transposed))
        operation, rest = made[name]
        through = bool(THROUGH.match(operation))
        if operation == "tt.dot" and "xf64>" in rest and not transposed:
            found.add("product")
        if (through or operation == "tt.load") and re.search(
            r"\b(bf16|f16)\b", re.sub(r"\d+x", "", rest)
        ):
            found.add("16 bits")
        if through:
            operands = re.findall(r"%\w+", rest.split(" : ")[0])
            left += [(operand, transposed or operation == "tt.trans") for operand in operands]
    return sorted(found)


def measure(variant, arch: str) -> dict:
    import triton

    from twa_kernels._triton.aot import compile_variant, specialised

    kernel = compile_variant(variant, arch)
    lines, row = (gcn if arch.startswith("gfx") else sass)(kernel)
    loop, threads = main_loop(lines), variant.warps * (64 if arch.startswith("gfx") else 32)
    row |= {
        "op": variant.op,
        "bits": variant.bits,
        "variant": variant.name,
        "arch": arch,
        "triton": triton.__version__,
        "loop": len(loop),
    }
    row["specialised"] = specialised(variant)
    weights = weights_of(variant)
    if weights:
        row["per_weight"] = len(loop) * threads / weights
    if variant.op in ("project", "reconstruct"):
        # Only the packed words are loaded 16 bytes at a time, so these loads must add up to all of
        # them.
        wide = sum(
            bool(re.match(r"LDG\S*\.128|LDGSTS\S*\.128|(global|buffer)_load_dwordx4", i))
            for i in loop
        )
        row["wide"] = wide * 16 * threads / (weights * variant.bits / 8)
    if variant.op == "orthonormalize":
        row["behind"] = behind_products(kernel.asm["ttir"])
    names = [re.split(r"[.\s]", i)[0] for i in loop]
    row["matrix"] = sum(
        name in ("IMMA", "IGMMA", "DMMA") or name.startswith(("v_mfma", "v_dot4")) for name in names
    )
    row["shared_access"] = sum(
        name in ("LDS", "STS", "LDSM", "STSM") or name.startswith("ds_") for name in names
    )
    row["barriers"] = sum(name in ("BAR", "s_barrier") for name in names)
    return row


def problems(row: dict) -> list[str]:
    """What is not as it should be."""
    label = f"{row['arch']} {row['op']} {row['bits']} bits, {row['variant']}"
    found = []
    if row["spills"]:
        found.append(f"{label}: {row['spills']} bytes of spills")
    for name in row.get("specialised", []):
        found.append(
            f"{label}: specialised on {name}, so that this row stands for some of its values only"
        )
    for what in row.get("behind", []):
        found.append(
            f"{label}: float64 products with '{what}' behind them, which Triton before 3.9 does not"
            " compile"
        )
    if row["shared"] > SHARED[row["arch"]]:
        found.append(
            f"{label}: {row['shared']} bytes of shared memory, {row['arch']} has"
            f" {SHARED[row['arch']]}"
        )
    if row["arch"].startswith("sm_") and row.get("wide", 1.0) != 1.0:
        found.append(
            f"{label}: {100 * row['wide']:.0f} % of the packed bytes are loaded 16 bytes at a time"
        )
    if (
        row["arch"] == "sm_90"
        and is_main(row)
        and row["per_weight"] > LIMIT * BUDGET[row["bits"]]
        and row["bits"] in (8, 4)
    ):
        found.append(
            f"{label}: {row['per_weight']:.2f} instructions per weight, budget"
            f" {BUDGET[row['bits']]}"
        )
    return found


def is_main(row: dict) -> bool:
    """The configuration of 64 rows (project) and of n that is a multiple of the rows in flight
    (reconstruct), float32.
    """
    return (row["op"], row["variant"]) in (
        ("project", "64 rows, fp32"),
        ("reconstruct", "center fp32, out fp32, n even"),
    )


def _job(job: tuple[str, int]) -> dict:
    from twa_kernels._triton.aot import variants

    arch, index = job
    return measure(list(variants(arch))[index], arch)


def chosen(arch: str, brief: bool) -> list[int]:
    """Variants to compile: all; brief: for sm_90 what the tables and the tests read and two of
    three of the rest, of other architectures the first of each op at the widths in BRIEF_BITS."""
    from twa_kernels._triton.aot import variants

    found, seen = [], set()
    for index, v in enumerate(variants(arch)):
        first, main = (v.op, v.bits) not in seen, is_main({"op": v.op, "variant": v.name})
        seen.add((v.op, v.bits))
        narrow = v.op == "orthonormalize" and "bf16" in v.name and "float64" in v.name
        table = v.bits in (8, 4) and v.op in ("project", "reconstruct")
        mine = (
            (first or main or narrow or table or index % 3 == 0)
            if arch == "sm_90"
            else (first and v.bits in BRIEF_BITS)
        )
        if not brief or mine:
            found.append(index)
    return found


def measure_all(
    architectures: tuple[str, ...], workers: int, brief: bool = False, progress: bool = True
) -> list[dict]:
    jobs = [(arch, index) for arch in architectures for index in chosen(arch, brief)]
    rows = []
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        for k, row in enumerate(pool.map(_job, jobs), 1):
            rows.append(row)
            if progress:
                print(
                    f"{k}/{len(jobs)}  {row['arch']} {row['op']} {row['bits']} bits,"
                    f" {row['variant']}",
                    file=sys.stderr,
                )
    return rows


SIZES = (64, 72)  # n of the tables: a multiple of 16 and of every block, and one that is not


def _versions(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(r["triton"] for r in rows))


def _of(rows: list[dict], version: str, arch: str) -> list[dict]:
    return [r for r in rows if (r["triton"], r["arch"]) == (version, arch)]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def markdown(rows: list[dict]) -> list[str]:
    import torch

    versions, architectures = (
        _versions(rows),
        [a for a in ("sm_90", "sm_80", "gfx942") if any(r["arch"] == a for r in rows)],
    )
    lines = [
        "# Static cost of the Triton kernels",
        "",
        "![instructions per weight](triton_static_cost.png)",
        "",
    ]
    lines += [
        "Thread-instructions of the main loops per packed weight, float32, read from the machine"
        " code; no GPU took part. No kernel is"
    ]
    lines += [
        "specialised on n; what n = 72 costs more than n = 64 is rows of padding and smaller"
        " blocks. Budget: an H200 at full bandwidth."
    ]
    head = [
        f"{arch}, n = {n}, triton {v}" for arch in architectures for n in SIZES for v in versions
    ]
    lines += [
        "",
        "| op | bits | budget | " + " | ".join(head) + " |",
        "|" + "---|" * (3 + len(head)),
    ]
    for op in ("project", "reconstruct"):
        for bits, budget in BUDGET.items():
            cells = [_of(rows, v, arch) for arch in architectures for n in SIZES for v in versions]
            sizes = [n for arch in architectures for n in SIZES for v in versions]
            costs = [
                _cell(per_weight(mine, op, bits, n) if mine else None)
                for mine, n in zip(cells, sizes, strict=True)
            ]
            lines.append("| " + " | ".join([op, str(bits), str(budget), *costs]) + " |")
    lines += [
        "",
        "| triton | architecture | kernels | with spills | largest spill, bytes | most registers |",
        "|" + "---|" * 6,
    ]
    for v in versions:
        for arch in architectures:
            if mine := _of(rows, v, arch):
                spills = [r["spills"] for r in mine]
                cells = [
                    v,
                    arch,
                    len(mine),
                    sum(map(bool, spills)),
                    max(spills),
                    max(r["registers"] for r in mine),
                ]
                lines.append("| " + " | ".join(map(str, cells)) + " |")
    for v in versions:
        lines += ["", f"All of them, on sm_90, triton {v}:", ""]
        lines += [
            "| kernel | registers | spills | shared | loop | per weight | 16-byte loads | matrix |"
            " shared accesses | barriers |"
        ]
        lines += ["|" + "---|" * 10]
        for r in _of(rows, v, "sm_90"):
            wide = f"{100 * r['wide']:.0f} %" if "wide" in r else ""
            cells = [
                f"{r['op']} {r['bits']} bits, {r['variant']}",
                r["registers"],
                r["spills"],
                r["shared"],
                r["loop"],
            ]
            cells += [
                _cell(r.get("per_weight")),
                wide,
                r["matrix"],
                r["shared_access"],
                r["barriers"],
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, "", f"triton {', '.join(versions)}; torch {torch.__version__}", ""]


def picture(path: Path, rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bits, versions, n = list(BUDGET), _versions(rows), SIZES[-1]
    series = [(op, v) for op in ("project", "reconstruct") for v in versions]
    width = 0.84 / len(series)
    figure, axis = plt.subplots(figsize=(9, 4.8), layout="constrained")
    for k, (op, v) in enumerate(series):
        values = [per_weight(_of(rows, v, "sm_90"), op, b, n) for b in bits]
        at = [i + (k - (len(series) - 1) / 2) * width for i in range(len(bits))]
        shade = {
            "color": f"C{series[k][0] == 'reconstruct':d}",
            "alpha": 1.0 if v == versions[-1] else 0.65,
        }
        bars = axis.bar(at, values, 0.9 * width, label=f"{op}, triton {v}", **shade)
        axis.bar_label(
            bars,
            [f"{value:.1f}" for value in values],
            label_type="center",
            color="white",
            fontsize=9,
        )
    for i, b in enumerate(bits):
        style = {"color": "0.2", "linewidth": 1.5}
        axis.hlines(
            BUDGET[b],
            i - 0.44,
            i + 0.44,
            label="budget at full bandwidth" if not i else None,
            **style,
        )
        axis.hlines(
            LIMIT * BUDGET[b],
            i - 0.44,
            i + 0.44,
            linestyle=":",
            label="1.5 x the budget" if not i else None,
            **style,
        )
    axis.set_xticks(range(len(bits)), [f"{b} bit" + "s" * (b > 1) for b in bits])
    axis.set_ylabel("thread-instructions per packed weight")
    axis.set_title(
        f"Main loops of the Triton kernels on sm_90, n = {n} (lower is better)", fontsize=11
    )
    axis.legend(frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, report problems")
    parser.add_argument("--architectures", default="sm_80,sm_90,gfx942")
    parser.add_argument("--versions", default="3.6.0,3.9.0", help="of Triton")
    parser.add_argument("--brief", action="store_true", help="fewer variants, for tests")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # the compiler is wanted here, in the workers too
    architectures = tuple(args.architectures.split(","))
    if args.brief or args.check:
        rows = measure_all(architectures, args.workers, args.brief)
    else:
        import triton_versions

        rows = triton_versions.measure_all(
            tuple(args.versions.split(",")), architectures, args.workers
        )
        if failed := [r for r in rows if "failed" in r]:
            sys.exit("\n".join(triton_versions.problems(failed)))
    if not args.check:
        args.output.mkdir(parents=True, exist_ok=True)
        text = "\n".join(markdown(rows))
        (args.output / "triton_static_cost.md").write_text(text)
        (args.output / "triton_static_cost.json").write_text(json.dumps(rows, indent=0) + "\n")
        picture(args.output / "triton_static_cost.png", rows)
        print(text)
    found = [problem for row in rows for problem in problems(row)]
    print(
        "\n".join(found)
        or f"{len(rows)} kernels: no spills, packed loads of 16 bytes, within {LIMIT} x the budget at 8 and 4 bits"
    )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
