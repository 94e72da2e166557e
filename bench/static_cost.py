"""What the compiled Triton kernels cost, read from their machine code; no GPU is needed.

Every kernel in every shipped configuration is compiled for sm_80, sm_90 and gfx942 and disassembled (nvdisasm and cuobjdump come with
Triton; AMD's code is text already). Per kernel: registers, bytes of spills, shared memory, how wide the packed loads are, and how many
instructions the main loop issues per packed weight, thread by thread: instructions of the loop x threads / weights of an iteration.

The budget is what an H200 can issue at full bandwidth: 132 multiprocessors x 128 lanes x 1.755 GHz over 4.8 TB/s is 6.2 instructions a byte,
7.3 at the 4.1 TB/s that a kernel can hope for; a weight is bits / 8 + 1 / 128 bytes.

    python bench/static_cost.py            writes bench/results/triton_static_cost.{md,json,png}
    python bench/static_cost.py --check    exit status 1 if a kernel spills, loads packed words narrower than 16 bytes, or is over 1.5 x the budget
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
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}  # bytes of shared memory that a block may have
LIMIT = 1.5  # of the budget, at 8 and 4 bits
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
        text, usage = _tool("nvdisasm", "-c", str(path)), _tool("cuobjdump", "--dump-resource-usage", str(path))
    lines, label = [], ""
    for line in text.splitlines():
        if found := re.match(r"(\.L_x_\d+):", line):
            label = found[1]
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            lines.append((label, re.sub(r"^@!?U?P\w+\s+", "", found[1].strip())))
            label = ""
    numbers = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK")}
    return lines, {"registers": numbers["REG"], "spills": numbers["STACK"], "shared": kernel.metadata.shared}


def gcn(kernel) -> tuple[list[tuple[str, str]], dict[str, int]]:
    text, lines, label = kernel.asm["amdgcn"], [], ""
    for line in text.split(".section")[0].splitlines():
        if found := re.match(r"(\.LBB\w+):", line):
            label = found[1]
        elif found := re.match(r"\t([a-z]\w+.*?)\s*(;.*)?$", line):
            lines.append((label, found[1]))
            label = ""
    numbers = {name: int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")}
    spills = max(4 * numbers["vgpr_spill_count"], numbers["private_segment_fixed_size"])
    return lines, {"registers": numbers["vgpr_count"], "spills": spills, "shared": kernel.metadata.shared}


def main_loop(lines: list[tuple[str, str]]) -> list[str]:
    """The longest innermost stretch that a branch goes back over; the whole kernel where there is none."""
    at = {label: k for k, (label, _) in enumerate(lines) if label}
    spans = []
    for k, (_, instruction) in enumerate(lines):
        found = re.search(r"(?:BRA|s_c?branch\w*)\b.*?(\.L\w+)", instruction)
        if found and at.get(found[1], k) < k:  # not the branch to itself that ends a kernel
            spans.append((k + 1 - at[found[1]], at[found[1]], k + 1))
    spans = [(size, a, b) for size, a, b in spans if not any(a <= c and d <= b and other < size for other, c, d in spans)]
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


def measure(variant, arch: str) -> dict:
    from twa_kernels._triton.aot import compile_variant

    kernel = compile_variant(variant, arch)
    lines, row = (gcn if arch.startswith("gfx") else sass)(kernel)
    c = dict(variant.constants)
    loop, threads = main_loop(lines), variant.warps * (64 if arch.startswith("gfx") else 32)
    row |= {"op": variant.op, "bits": variant.bits, "variant": variant.name, "arch": arch, "loop": len(loop)}
    weights = weights_of(variant)
    if weights:
        row["per_weight"] = len(loop) * threads / weights
    if variant.op in ("project", "reconstruct") and "n" not in c:  # a single row is loaded once for all rows in flight
        # Only the packed words are loaded 16 bytes at a time, so these loads must add up to all of them.
        wide = sum(bool(re.match(r"LDG\S*\.128|LDGSTS\S*\.128|(global|buffer)_load_dwordx4", i)) for i in loop)
        row["wide"] = wide * 16 * threads / (weights * variant.bits / 8)
    names = [re.split(r"[.\s]", i)[0] for i in loop]
    row["matrix"] = sum(name in ("IMMA", "IGMMA", "DMMA") or name.startswith(("v_mfma", "v_dot4")) for name in names)
    row["shared_access"] = sum(name in ("LDS", "STS", "LDSM", "STSM") or name.startswith("ds_") for name in names)
    row["barriers"] = sum(name in ("BAR", "s_barrier") for name in names)
    return row


def problems(row: dict) -> list[str]:
    """What is not as it should be."""
    label = f"{row['arch']} {row['op']} {row['bits']} bits, {row['variant']}"
    found = []
    if row["spills"]:
        found.append(f"{label}: {row['spills']} bytes of spills")
    if row["shared"] > SHARED[row["arch"]]:
        found.append(f"{label}: {row['shared']} bytes of shared memory, {row['arch']} has {SHARED[row['arch']]}")
    if row["arch"].startswith("sm_") and row.get("wide", 1.0) != 1.0:
        found.append(f"{label}: {100 * row['wide']:.0f} % of the packed bytes are loaded 16 bytes at a time")
    if row["arch"] == "sm_90" and is_main(row) and row["per_weight"] > LIMIT * BUDGET[row["bits"]] and row["bits"] in (8, 4):
        found.append(f"{label}: {row['per_weight']:.2f} instructions per weight, budget {BUDGET[row['bits']]}")
    return found


def is_main(row: dict) -> bool:
    """The configuration of n = 64 (project) and of n that is a multiple of the rows in flight (reconstruct), float32."""
    return (row["op"], row["variant"]) in (("project", "64 rows, fp32"), ("reconstruct", "center fp32, out fp32, n even"))


def _job(job: tuple[str, int]) -> dict:
    from twa_kernels._triton.aot import variants

    arch, index = job
    return measure(list(variants(arch))[index], arch)


def chosen(arch: str, brief: bool) -> list[int]:
    """Variants to compile: all; brief: for sm_90 all but two of three of orthonormalize, of other architectures the main ones and the first of each
    op and width."""
    from twa_kernels._triton.aot import variants

    found, seen = [], set()
    for index, v in enumerate(variants(arch)):
        first, main = (v.op, v.bits) not in seen, is_main({"op": v.op, "variant": v.name})
        if not brief or first or main or (arch == "sm_90" and (v.op != "orthonormalize" or index % 3 == 0)):
            found.append(index)
        seen.add((v.op, v.bits))
    return found


def measure_all(architectures: tuple[str, ...], workers: int, brief: bool = False, progress: bool = True) -> list[dict]:
    jobs = [(arch, index) for arch in architectures for index in chosen(arch, brief)]
    rows = []
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        for k, row in enumerate(pool.map(_job, jobs), 1):
            rows.append(row)
            if progress:
                print(f"{k}/{len(jobs)}  {row['arch']} {row['op']} {row['bits']} bits, {row['variant']}", file=sys.stderr)
    return rows


def markdown(rows: list[dict]) -> list[str]:
    import torch
    import triton

    lines = ["# Static cost of the Triton kernels", "", "![instructions per weight](triton_static_cost.png)", ""]
    lines += [
        "Thread-instructions per packed weight in the main loop, read from the machine code; no GPU took part. Budget: an H200 at full bandwidth."
    ]
    lines += [
        "",
        "| op | bits | budget | sm_90 | of the budget | sm_80 | gfx942 | registers | shared | barriers | packed loads of 16 bytes |",
        "|" + "---|" * 11,
    ]
    by = {(r["op"], r["bits"], r["variant"], r["arch"]): r for r in rows}
    for r in rows:
        many = (r["op"], r["variant"]) == ("project", "128 rows, fp32")  # what n >= 128 gets at 2 bits and 1
        if r["arch"] == "sm_90" and (is_main(r) or many):
            found = [by.get((r["op"], r["bits"], r["variant"], arch)) for arch in ("sm_80", "gfx942")]
            others = [f"{other['per_weight']:.2f}" if other else "" for other in found]
            share = f"{r['per_weight'] / BUDGET[r['bits']]:.2f}"
            cells = [
                r["op"] + ", 128 rows" * many,
                r["bits"],
                BUDGET[r["bits"]],
                f"{r['per_weight']:.2f}",
                share,
                *others,
                r["registers"],
                r["shared"],
                r["barriers"],
            ]
            lines.append("| " + " | ".join(map(str, [*cells, f"{100 * r['wide']:.0f} %"])) + " |")
    worst = max(r["spills"] for r in rows)
    lines += [
        "",
        f"{len(rows)} kernels compiled ({', '.join(sorted({r['arch'] for r in rows}))}), largest spill {worst} bytes. All of them, on sm_90:",
        "",
    ]
    lines += ["| kernel | registers | spills | shared | loop | per weight | matrix | shared accesses | barriers |", "|" + "---|" * 9]
    for r in rows:
        if r["arch"] == "sm_90":
            per = f"{r['per_weight']:.2f}" if "per_weight" in r else ""
            cells = [f"{r['op']} {r['bits']} bits, {r['variant']}", r["registers"], r["spills"], r["shared"], r["loop"], per]
            lines.append("| " + " | ".join(map(str, [*cells, r["matrix"], r["shared_access"], r["barriers"]])) + " |")
    return [*lines, "", f"triton {triton.__version__}, torch {torch.__version__}", ""]


def picture(path: Path, rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bits = list(BUDGET)
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for k, op in enumerate(("project", "reconstruct")):
        values = [next(r["per_weight"] for r in rows if r["arch"] == "sm_90" and r["op"] == op and r["bits"] == b and is_main(r)) for b in bits]
        bars = axis.bar([i + 0.4 * k - 0.2 for i in range(len(bits))], values, 0.36, label=op, color=f"C{k}")
        axis.bar_label(bars, [f"{v:.1f}" for v in values], label_type="center", color="white")
    for i, b in enumerate(bits):
        style = {"color": "0.2", "linewidth": 1.5}
        axis.hlines(BUDGET[b], i - 0.42, i + 0.42, label="budget at full bandwidth" if not i else None, **style)
        axis.hlines(LIMIT * BUDGET[b], i - 0.42, i + 0.42, linestyle=":", label="1.5 x the budget" if not i else None, **style)
    axis.set_xticks(range(len(bits)), [f"{b} bit" + "s" * (b > 1) for b in bits])
    axis.set_ylabel("thread-instructions per packed weight")
    axis.set_title("Main loops of the Triton kernels on sm_90 (lower is better)", fontsize=11)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, report problems")
    parser.add_argument("--architectures", default="sm_80,sm_90,gfx942")
    parser.add_argument("--brief", action="store_true", help="all variants for sm_90 only")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # the compiler is wanted here, in the workers too
    rows = measure_all(tuple(args.architectures.split(",")), args.workers, args.brief)
    if not args.check:
        args.output.mkdir(parents=True, exist_ok=True)
        text = "\n".join(markdown(rows))
        (args.output / "triton_static_cost.md").write_text(text)
        (args.output / "triton_static_cost.json").write_text(json.dumps(rows, indent=0) + "\n")
        picture(args.output / "triton_static_cost.png", rows)
        print(text)
    found = [problem for row in rows for problem in problems(row)]
    print("\n".join(found) or f"{len(rows)} kernels: no spills, packed loads of 16 bytes, within {LIMIT} x the budget at 8 and 4 bits")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
