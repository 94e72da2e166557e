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
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

BUDGET = {8: 7.0, 4: 3.7, 3: 2.8, 2: 1.8, 1: 0.9}  # instructions per weight, H200 at full bandwidth
# bytes of shared memory that a block may have
SHARED = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
LIMIT = 1.5  # of the budget, at 8 and 4 bits
BRIEF_BITS = (4,)  # of architectures other than sm_90
TOOLS = "backends/nvidia/bin"


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / TOOLS / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def sass(kernel) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(label or "", instruction) of each, of a compiled kernel; registers, stack, shared bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        text = _tool("nvdisasm", "-c", str(path))
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
    lines, label = [], ""
    for line in text.splitlines():
        if found := re.match(r"(\.L_x_\d+):", line):
            label = found[1]
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            lines.append((label, re.sub(r"^@!?U?P\w+\s+", "", found[1].strip())))
            label = ""
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return lines, {"registers": registers, "spills": stack, "shared": kernel.metadata.shared}


def gcn(kernel) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """The same of a kernel for AMD."""
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
    found = {"registers": numbers["vgpr_count"], "spills": spills}
    return lines, found | {"shared": kernel.metadata.shared}


def launch_of(op: str, bits: int, n: int, arch: str) -> tuple[int, int, str]:
    """Rows that a program of project or reconstruct takes at a time, how often for n of them, and
    the variant's name; float32.
    """
    from twa_kernels.backends.triton.config import configuration, least_rows, row_parts

    size = configuration(op, bits, arch)["rows"]
    if op == "reconstruct":
        return size, -(-n // size), f"center fp32, out fp32, n {'any' if n % size else 'even'}"
    rows, more, programs = row_parts(n, size, least_rows(bits))
    return rows + more, programs, f"{rows}{f' + {more}' if more else ''} rows, fp32"


def per_weight(rows: list[dict], op: str, bits: int, n: int) -> float | None:
    """Instructions of the main loops per packed weight of a basis of n rows, rows of padding
    included; None: not among the (compiled) variants.
    """
    by = {(r["op"], r["bits"], r["variant"]): r.get("per_weight") for r in rows}
    size, times, name = launch_of(op, bits, n, rows[0]["arch"])
    cost = by.get((op, bits, name))
    return None if cost is None else size * times * cost / n


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

    def is_innermost(size: int, a: int, b: int) -> bool:
        return not any(a <= c and d <= b and other < size for other, c, d in spans)

    innermost = [span for span in spans if is_innermost(*span)]
    _, begin, end = max(innermost, default=(0, 0, len(lines)))
    return [instruction for _, instruction in lines[begin:end]]


def weights_of(variant) -> int:
    """Packed weights that a program's main loop handles per iteration (pack, record, unpack: in
    all).
    """
    c = dict(variant.constants)
    if variant.op == "gram":
        return 2 * c["ROWS"] * 128
    if variant.op in ("project", "reconstruct", "replay"):
        return (c["ROWS"] + c.get("MORE", 0)) * c["TILES"] * 128
    return c.get("TILES", 0) * 128


#: operations that Triton looks through, from an operand of a product to what was loaded
THROUGH = re.compile(
    r"arith\.|math\.|ttg?\.(fp_to_fp|trans|broadcast|expand_dims|reshape|bitcast|convert_layout)$"
)


def behind_products(ttir: str) -> list[str]:
    """What float64 products are made of that versions of Triton before 3.9 do not compile.

    "16 bits": operands that were 16 bits wide. For AMD, "product": operands that are themselves
    float64 products, not transposed; "tf32": products that may be TF32.
    """
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
        types = re.sub(r"\d+x", "", rest)
        if (through or operation == "tt.load") and re.search(r"\b(bf16|f16)\b", types):
            found.add("16 bits")
        if through:
            operands = re.findall(r"%\w+", rest.split(" : ")[0])
            left += [(operand, transposed or operation == "tt.trans") for operand in operands]
    return sorted(found)


def measure(variant, arch: str) -> dict:
    """A row: what a variant costs on an architecture."""
    import triton

    from twa_kernels.backends.triton.aot import compile_variant, specialised
    from twa_kernels.backends.triton.words import in_order

    kernel = compile_variant(variant, arch)
    lines, row = (gcn if arch.startswith("gfx") else sass)(kernel)
    # record: beside its work, the one loop is the search for a tensor
    loop = [text for _, text in lines] if variant.op == "record" else main_loop(lines)
    threads = variant.warps * (64 if arch.startswith("gfx") else 32)
    row |= {"op": variant.op, "bits": variant.bits, "variant": variant.name, "arch": arch}
    row |= {"triton": triton.__version__, "loop": len(loop), "specialised": specialised(variant)}
    weights = weights_of(variant)
    if weights:
        row["per_weight"] = len(loop) * threads / weights
    if variant.op in ("project", "reconstruct"):
        # only packed words are loaded 16 bytes at a time: these loads must add up to all of them
        wide_load = re.compile(r"LDG\S*\.128|LDGSTS\S*\.128|(global|buffer)_load_dwordx4")
        wide = sum(bool(wide_load.match(i)) for i in loop)
        row["wide"] = wide * 16 * threads / (weights * variant.bits / 8)
    if variant.op == "orthonormalize":
        row["behind"] = behind_products(kernel.asm["ttir"])
    if variant.op == "project" and arch.startswith("sm_"):
        row["in_order"] = in_order(kernel.asm["ttgir"])
    if arch.startswith("gfx"):
        row["assembly"] = kernel.asm["amdgcn"].count("#ASMSTART")
    names = [re.split(r"[.\s]", i)[0] for i in loop]
    matrix, shared = ("IMMA", "IGMMA", "DMMA"), ("LDS", "STS", "LDSM", "STSM")
    row["matrix"] = sum(n in matrix or n.startswith(("v_mfma", "v_dot4")) for n in names)
    row["shared_access"] = sum(n in shared or n.startswith("ds_") for n in names)
    row["barriers"] = sum(n in ("BAR", "s_barrier") for n in names)
    return row


def problems(row: dict) -> list[str]:
    """What is not as it should be."""
    arch, bits, found = row["arch"], row["bits"], []
    if row["spills"]:
        found.append(f"{row['spills']} bytes of spills")
    found += [
        f"specialised on {name}, so that this row stands for some of its values only"
        for name in row.get("specialised", [])
    ]
    found += [
        f"float64 products with '{what}' behind them, which Triton before 3.9 does not compile"
        for what in row.get("behind", [])
    ]
    if not row.get("in_order", True):
        found.append("bytes in an order that the kernel does not know")
    if row.get("assembly"):
        found.append("assembly, around which AMD's compiler inserts no wait states")
    if row["shared"] > SHARED[arch]:
        found.append(f"{row['shared']} bytes of shared memory, {arch} has {SHARED[arch]}")
    if arch.startswith("sm_") and row.get("wide", 1.0) != 1.0:
        share = f"{100 * row['wide']:.0f} %"
        found.append(f"{share} of the packed bytes are loaded 16 bytes at a time")
    if arch == "sm_90" and is_main(row) and bits in (8, 4):
        cost, budget = row["per_weight"], BUDGET[bits]
        if cost > LIMIT * budget:
            found.append(f"{cost:.2f} instructions per weight, budget {budget}")
    return [f"{arch} {row['op']} {bits} bits, {row['variant']}: {problem}" for problem in found]


def is_main(row: dict) -> bool:
    """Whether it is the float32 configuration of 64 rows (project), or of n that is a multiple of
    the rows in flight (reconstruct).
    """
    return (row["op"], row["variant"]) in (
        ("project", "64 rows, fp32"),
        ("reconstruct", "center fp32, out fp32, n even"),
    )


def is_narrow(row: dict) -> bool:
    """Whether it is of Gram-Schmidt with float64 sums of 16-bit rows."""
    name = row["variant"]
    return row["op"] == "orthonormalize" and "bf16" in name and "float64" in name


def form_of(variant: str) -> str:
    """Which pass of Gram-Schmidt a variant is: "products", "transformed", ..."""
    return variant.split()[0].strip(",")


def _job(job: tuple[str, int]) -> dict:
    from twa_kernels.backends.triton.aot import variants

    arch, index = job
    return measure(list(variants(arch))[index], arch)


def chosen(arch: str, brief: bool) -> list[int]:
    """Variants to compile: all of them.

    Brief: for sm_90 the first of each kind of kernel and what the tests read; of other
    architectures the first of each op at the widths in BRIEF_BITS.
    """
    from twa_kernels.backends.triton.aot import variants

    found, seen = [], set()
    for index, v in enumerate(variants(arch)):
        kind = (v.op, v.bits)
        mine = kind not in seen and v.bits in BRIEF_BITS
        if arch == "sm_90":
            if v.op == "orthonormalize":  # its last word is the accuracy
                kind += (form_of(v.name), v.name.split()[-1])
            row = {"op": v.op, "variant": v.name}
            table = v.op in ("project", "reconstruct") and v.name in (
                launch_of(v.op, v.bits, n, arch)[2] for n in SIZES
            )
            mine = kind not in seen or is_main(row) or is_narrow(row) or table
        seen.add(kind)
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
                label = f"{row['arch']} {row['op']} {row['bits']} bits, {row['variant']}"
                print(f"{k}/{len(jobs)}  {label}", file=sys.stderr)
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

    versions = _versions(rows)
    lines = [
        "# Static cost of the Triton kernels",
        "",
        "![instructions per weight](triton_static_cost.png)",
        "",
        "Thread-instructions of the main loops per packed weight, float32, read from the machine"
        " code; no GPU took part. No kernel is",
        "specialised on n; what n = 72 costs more than n = 64 is rows of padding and smaller"
        " blocks. Budget: an H200 at full bandwidth.",
        "",
    ]
    lines += [*_costs(rows), "", *_spills(rows)]
    for v in versions:
        lines += ["", f"All of them, on sm_90, triton {v}:", "", *_kernels(_of(rows, v, "sm_90"))]
    return [*lines, "", f"triton {', '.join(versions)}; torch {torch.__version__}", ""]


def _architectures(rows: list[dict]) -> list[str]:
    order = ("sm_90", "sm_80", "sm_100", "sm_120", "gfx942")
    return [a for a in order if any(r["arch"] == a for r in rows)]


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _costs(rows: list[dict]) -> list[str]:
    """Instructions per weight beside the budget."""
    cases = list(itertools.product(_architectures(rows), SIZES, _versions(rows)))
    head = ["op", "bits", "budget", *(f"{arch}, n = {n}, triton {v}" for arch, n, v in cases)]
    lines = [_line(head), "|" + "---|" * len(head)]
    for op, (bits, budget) in itertools.product(("project", "reconstruct"), BUDGET.items()):
        found = ((_of(rows, v, arch), n) for arch, n, v in cases)
        costs = [_cell(per_weight(mine, op, bits, n) if mine else None) for mine, n in found]
        lines.append(_line([op, bits, budget, *costs]))
    return lines


def _spills(rows: list[dict]) -> list[str]:
    """Spills and registers of all kernels of a version and architecture."""
    head = ["triton", "architecture", "kernels", "with spills", "largest spill, bytes"]
    lines = [_line([*head, "most registers"]), "|" + "---|" * 6]
    for v, arch in itertools.product(_versions(rows), _architectures(rows)):
        if mine := _of(rows, v, arch):
            spills = [r["spills"] for r in mine]
            most = max(r["registers"] for r in mine)
            lines.append(_line([v, arch, len(mine), sum(map(bool, spills)), max(spills), most]))
    return lines


def _kernels(rows: list[dict]) -> list[str]:
    """A line for each kernel."""
    head = ["kernel", "registers", "spills", "shared", "loop", "per weight", "16-byte loads"]
    lines = [_line([*head, "matrix", "shared accesses", "barriers"]), "|" + "---|" * 10]
    for r in rows:
        cells = [f"{r['op']} {r['bits']} bits, {r['variant']}"]
        cells += [r[key] for key in ("registers", "spills", "shared", "loop")]
        wide = f"{100 * r['wide']:.0f} %" if "wide" in r else ""
        cells += [_cell(r.get("per_weight")), wide]
        lines.append(_line([*cells, r["matrix"], r["shared_access"], r["barriers"]]))
    return lines


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
        alpha = 1.0 if v == versions[-1] else 0.65
        style = {"color": f"C{op == 'reconstruct':d}", "alpha": alpha}
        bars = axis.bar(at, values, 0.9 * width, label=f"{op}, triton {v}", **style)
        text = {"label_type": "center", "color": "white", "fontsize": 9}
        axis.bar_label(bars, [f"{value:.1f}" for value in values], **text)
    for i, b in enumerate(bits):
        style = {"color": "0.2", "linewidth": 1.5}
        label = None if i else "budget at full bandwidth"
        axis.hlines(BUDGET[b], i - 0.44, i + 0.44, label=label, **style)
        label = None if i else "1.5 x the budget"
        axis.hlines(LIMIT * BUDGET[b], i - 0.44, i + 0.44, linestyle=":", label=label, **style)
    axis.set_xticks(range(len(bits)), [f"{b} bit" + "s" * (b > 1) for b in bits])
    axis.set_ylabel("thread-instructions per packed weight")
    title = f"Main loops of the Triton kernels on sm_90, n = {n} (lower is better)"
    axis.set_title(title, fontsize=11)
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

        versions = tuple(args.versions.split(","))
        rows = triton_versions.measure_all(versions, architectures, args.workers)
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
    fine = f"no spills, packed loads of 16 bytes, within {LIMIT} x the budget at 8 and 4 bits"
    print("\n".join(found) or f"{len(rows)} kernels: {fine}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
