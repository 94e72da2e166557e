"""The figures that README.md and docs/ quote, and the results that they are from.

    python bench/quotes.py             writes them into the pages, after a measurement
    python bench/quotes.py --check     names those that differ, and figures from nowhere

A quote is a line or a sentence of a page with {} in the place of each figure. tests/test_figures.py
makes the check, so that no page says what no result says.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
#: pages on which every figure is a quote, but for versions and what follows from a format
WHOLE = ("README.md", "docs/benchmarks.md")
KNOWN = ("3.10", "3.13", "2.13", "0.508", "6 GB")
FIGURE = re.compile(r"\d+(?:\.\d+)?e?-?\d* (?:%|ms|s|[GM]B(?:/s)?|times)(?!\w)|\b\d+\.\d{2,}\b")


@dataclass(frozen=True)
class Quote:
    page: str
    text: str
    values: tuple[str, ...]

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """The text, however it is wrapped, with a group for each figure."""
        pieces = [r"\s+".join(map(re.escape, p.split(" "))) for p in self.text.split("{}")]
        return re.compile(r"([^|\n]+?)".join(pieces))

    def found(self, page: str) -> re.Match[str]:
        """Where a page's text has it.

        Raises:
            LookupError: not in one place
        """
        matches = list(self.pattern.finditer(page))
        if len(matches) != 1:
            raise LookupError(
                f"{self.page}: expected once, found {len(matches)} times: {self.text}"
            )
        return matches[0]


# Results -----------------------------------------------------------------------------------------


def tables(name: str) -> list[list[dict[str, str]]]:
    """Tables of a page of results: their lines, as {column: cell}."""
    found: list[list[dict[str, str]]] = []
    header: list[str] = []
    for line in [*(RESULTS / f"{name}.md").read_text().splitlines(), ""]:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = [f"{c} {k}" if c and c in cells[:k] else c for k, c in enumerate(cells)]
            found.append([])
        elif not set(cells[0]) <= set(":-") or not cells[0]:
            found[-1].append(dict(zip(header, cells, strict=False)))
    return found


def line(name: str, nth: int = 0, **where: str) -> dict[str, str]:
    """The line of a result's table that has these cells; _ in a name stands for a space."""
    wanted = {column.replace("_", " "): cell for column, cell in where.items()}
    found = [row for row in tables(name)[nth] if wanted.items() <= row.items()]
    if len(found) != 1:
        raise LookupError(f"{name}.md: expected one line with {wanted}, found {len(found)}")
    return found[0]


def said(name: str, pattern: str) -> tuple[str, ...]:
    """Groups of a pattern in a page of results."""
    if (match := re.search(pattern, (RESULTS / f"{name}.md").read_text(), re.S)) is None:
        raise LookupError(f"{name}.md: no {pattern}")
    return match.groups()


@functools.cache
def loaded(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def kernel(op: str, what: str) -> dict:
    """A line of cpu.json, which has each once: 64 rows of 8 M columns, and records of one row."""
    found = [r for r in loaded("cpu")["rows"] if (r["op"], r["what"]) == (op, what)]
    if len(found) != 1:
        raise LookupError(f"cpu.json: expected one line {op}, {what}, found {len(found)}")
    return found[0]


def both(what: str) -> tuple[str, str, str, str]:
    """Milliseconds and percent of bandwidth of project and of reconstruct."""
    found = [kernel(op, what) for op in ("project", "reconstruct")]
    ms = [f"{r['ms']:.1f}" for r in found]
    percent = [f"{r['percent']:.0f}" if r["percent"] else "" for r in found]
    return ms[0], percent[0], ms[1], percent[1]


def times(what: str) -> tuple[str, str]:
    """How many times as long as our 4 bits `what` takes: project, reconstruct."""
    ratios = [kernel(op, what)["ms"] / kernel(op, "4 bits")["ms"] for op in BOTH]
    return tuple(f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}" for ratio in ratios)


BOTH = ("project", "reconstruct")


# Pages -------------------------------------------------------------------------------------------


def readme() -> Iterator[tuple[str, tuple]]:
    labels = {
        "| last checkpoint | {} | {} | {} |": "last",
        "| SWA: the mean of all | {} | {} | {} |": "SWA",
        "chosen on validation | {} | {} | {} |": "EMA",
        "| greedy soup: the mean of those that help on validation | {} | {} | {} |": "greedy soup",
        "| **TWA-t** (on training data), fine segments, 4 bits | {} | {} | {} |": (
            "TWA-t fine, 4 bits"
        ),
        "| TWA-t, a segment per tensor, 4 bits | {} | {} | {} |": "TWA-t per tensor, 4 bits",
        "| annealing: the last checkpoint trained on, rate to zero | {} | {} | {} |": (
            "annealing (no average)"
        ),
    }
    for text, method in labels.items():
        row = line("demo_seeds", method=method)
        yield text, tuple(row[f"seed {seed}"] for seed in range(3))
    yield "{}; `bench/demo_seeds.py`", (processor("demo_seeds"),)
    for bits in (4, 2, 1):
        label = f"{bits} bit" + "s" * (bits > 1)
        yield f"| {label} | {{}} ms | {{}} % | {{}} ms | {{}} % |", both(f"{bits} bits")
    dense = "| torch float32 dense: reads much, writes little | {} ms | {} % | {} ms | {} % |"
    yield dense, both("torch float32 dense")
    int4 = "| torch int4 (bfloat16) | {} ms | {} % | {} ms | {} % |"
    yield int4, both("torch int4 (bfloat16)")
    published = both("published arithmetic")
    yield "| published arithmetic: uint8, broadcast, sum | {} ms | | {} ms |", published[::2]
    yield "2 threads of {}, one run", (machine_of_kernels(),)
    yield "A Xeon that reads {} GB/s: {} and {} % at 4 bits.", xeon()
    loss, points = said(
        "claims/pretrained",
        r"glosses: TWA-v fine, 4 bits less the best of these three -(\S+) .*?accuracy \+(\S+) ±",
    )
    gained = (f"{float(loss):.3f}", points)
    yield "loss {} below the best fixed average, accuracy {} points above it", gained
    text = cases("head", "GPT, source text") + cases("tail", "GPT, source text")
    yield "in nearly every case, by {} to {} nats", span(below(text, FINE, FIXED))


def processor(name: str) -> str:
    """That a result was measured on."""
    notes = json.loads((RESULTS / "measured.json").read_text())
    return notes[name]["machine"].rsplit(", ", 2)[0]  # before cores and PyTorch


def machine_of_kernels() -> str:
    hardware = loaded("cpu")["hardware"]
    return f"an {hardware['processor']}, {hardware['isa'].upper()}"


def xeon() -> tuple[str, str, str]:
    """What another machine reads, and what project and reconstruct reach of it at 4 bits."""
    (read,) = said("cpu_intel_xeon", r"read (\S+) GB/s")
    rows = [line("cpu_intel_xeon", op=op, kernel="4 bits") for op in BOTH]
    return read, *(row["of bandwidth"].split()[0] for row in rows)


def step_share() -> str:
    row = line("step_share", granularity="tensor")
    return row["share"].removesuffix(" %")


def benchmarks() -> Iterator[tuple[str, tuple]]:
    yield from kernels_on_a_cpu()
    yield from tiers()
    yield from quantiser()
    yield from gram_schmidt()
    yield from memory_and_ranks()
    yield from instructions()


def kernels_on_a_cpu() -> Iterator[tuple[str, tuple]]:
    yield "Unless it says otherwise: 2 threads of {}, torch", (machine_of_kernels(),)
    for bits in (8, 4, 3, 2, 1):
        label = f"{bits} bit" + "s" * (bits > 1)
        yield f"| {label} | {{}} ms | {{}} % | {{}} ms | {{}} % |\n", both(f"{bits} bits")
    many = ("4 bits, 400 tensors", "torch float32 dense", "torch bfloat16 dense")
    for what in (*many, "torch int4 (bfloat16)"):
        yield f"| {what} | {{}} ms | {{}} % | {{}} ms | {{}} % |\n", both(what)
    for what in ("4 bits, unpack then matmul", "published arithmetic"):
        yield f"| {what} | {{}} ms | | {{}} ms | |\n", both(what)[::2]
    peers = [line("peers", op=op, kernel="bitsandbytes NF4 (bfloat16)") for op in BOTH]
    ratios = tuple(row["time / ours"] for row in peers)
    yield "bitsandbytes NF4 takes {} and {} times as long as our 4 bits", ratios
    rate = loaded("cpu")["bandwidth"]
    three = tuple(f"{rate[name]:.1f}" for name in ("read", "prefetched read", "copy"))
    yield "read {} GB/s by a plain loop, {} with software prefetch; copy {} GB/s by memcpy", three
    dense = times("torch float32 dense")
    yield "a float32 product takes {} and {} times as long as our 4 bits", dense
    yield "the published arithmetic {} and {} times as long", times("published arithmetic")
    (slow,) = said("cpu_tiers", r"bandwidth: read (\S+) GB/s")
    yield "gave {} to {} GB/s within the hour", (slow, f"{rate['read']:.1f}")
    yield "an Intel Xeon that reads {} GB/s project reached {} % and reconstruct {} %", xeon()
    whole, alone = kernel("pack", "4 bits"), kernel("pack", "4 bits, kernel alone")
    packed = (f"{whole['ms']:.0f}", f"{alone['ms']:.0f}", f"{alone['percent']:.0f}")
    yield "at 4 bits takes {} ms. {} ms of it is the kernel, at {} % of the read", packed
    record = kernel("record", "4 bits")
    plain = kernel("record", "torch, unquantised")
    yield (
        (
            "`record` of {} M float32 weights at 4 bits takes {} ms, {} % of the copy bandwidth;"
            " the same without quantisation in PyTorch takes {} ms"
        ),
        (
            f"{record['D'] / 1e6:.0f}",
            f"{record['ms']:.0f}",
            f"{record['percent']:.0f}",
            f"{plain['ms']:.0f}",
        ),
    )
    yield "the optimizer's step is [{} % of the training step]", (step_share(),)


def tiers() -> Iterator[tuple[str, tuple]]:
    labels = {
        "AVX-512": "avx512",
        "AVX-512VL (256 bits)": "avx512vl",
        "AVX2 with VNNI": "avxvnni",
        "AVX2": "avx2",
        "portable": "portable",
    }
    here = {row["tier or peer"] for row in tables("cpu_tiers")[0]}  # as many as a machine has
    for label, tier in labels.items():
        if tier not in here:
            continue
        rows = [line("cpu_tiers", op=op, bits="4", tier_or_peer=tier) for op in BOTH]
        cells = [cell for r in rows for cell in (r["ms"], r["of bandwidth"].split()[0])]
        yield f"| {label} | {{}} ms | {{}} % | {{}} ms | {{}} % |\n", tuple(cells)


def quantiser() -> Iterator[tuple[str, tuple]]:
    labels = {"Gaussian": "Gaussian", "deltas of the demo's checkpoints": "checkpoint deltas"}
    for label, data in labels.items():
        ours = line("quantisation_error", data=data, quantiser="packed (ours)")
        theirs = line("quantisation_error", data=data, quantiser="published min/max")
        bits = [f"{b} bits" for b in (8, 4, 3, 2, 1)]
        cells = [f"{float(row[b]):.2g}" for b in bits for row in (ours, theirs)]
        yield f"| {label} |" + " {} ({}) |" * 5, tuple(cells)


def gram_schmidt() -> Iterator[tuple[str, tuple]]:
    rows = {
        "| **ours**, high | {} | {} | {} ms |": "ours, high",
        "| **ours**, fast | {} | {} | {} ms |": "ours, fast",
        "| torch.linalg.qr | {} | {} | {} ms |": "torch.linalg.qr",
        "| TSQR | {} | {} | {} ms |": "TSQR",
        "| published row loop | {} | {} | {} ms |": "published loop",
        "| CholeskyQR2, float64 Gram matrices | {} | {} | {} ms |": "CholeskyQR2, float64 Gram",
    }
    accuracy = "loss of orthogonality / error of the directions"
    for text, method in rows.items():
        of = {accuracy.replace(" ", "_"): method}
        loss, error = line("orthonormalize", 0, **of)["SGD run"].split(" / ")
        ms = float(line("orthonormalize", 1, method=method)["ms"])
        yield text, (short(loss), short(error), f"{ms:.0f}")
    bounds = [
        line("orthonormalize", 1, method=f"ours, {how}")["with the certificate"].split()[0]
        for how in ("high", "fast")
    ]
    yield "would take {} % (high) and {} % (fast) of the time", tuple(bounds)
    floor = line("orthonormalize", 1, method="ours, fast")["floor / it"].split()[0]
    yield 'would take {} % of the time of "fast"', (floor,)
    reads, peak = said("orthonormalize_stream", r", (\d) reads of.*peak memory (\d+) MB")
    yield "[{} reads, {} MB of memory]", (reads, peak)


def short(number: str) -> str:
    """1.4e-07 as 1.4e-7, and 4.4e+01 as 44."""
    value = float(number)
    return f"{value:.1e}".replace("e-0", "e-") if value < 0.01 else f"{value:.2g}"


def memory_and_ranks() -> Iterator[tuple[str, tuple]]:
    beyond = [float(row["peak beyond packed GB"]) for row in tables("pack_stream")[0]]
    yield "| {} to {} GB beyond the packed bytes", (f"{min(beyond):.1f}", f"{max(beyond):.1f}")
    saved = said("low_memory", r"default: \d+ MB, (\d+) %.*1 MB: \d+ MB, (\d+) %")
    yield "saves {} % of the gradients with glibc's default allocator, {} % with", saved
    for label, sharding in {
        "replicate": "replicate",
        "columns": "columns",
        "rows, the published scheme": "rows",
    }.items():
        wire = line("distributed", 0, sharding=sharding, ranks="2")
        speed = line("distributed", 2, sharding=sharding, ranks="2")
        cells = (wire["our messages, counted"], wire["formula"], speed["of one process"])
        yield f"| {label} | 2 | {{}} bytes | {{}} | {{}} |\n", cells
    sizes = said("billion", r"\((\d+) GB: not all.*may hold (\d+) GB")
    yield "12 checkpoints, {} GB of them; each job may hold {} GB", sizes
    jobs = {
        "| `twa pack`, 4 bits, fine segments | {} | {} GB | {} GB |": "twa pack",
        "| `twa average`, 20 steps | {} | {} GB | {} GB |": "twa average",
        "| `twa average --basis`, 20 steps | {} | {} GB and mapped pages | {} GB |": (
            "twa average --basis"
        ),
        "| the same on 2 ranks, `columns` | {} | {} GB for both | {} GB |": (
            "twa average --basis, two ranks, columns"
        ),
    }
    for text, job in jobs.items():
        row = line("billion", job=job)
        held = (f"{float(row[key]):.1f}" for key in ("without libraries", "planned"))
        yield text, (row["time"], *held)


def instructions() -> Iterator[tuple[str, tuple]]:
    every = ("8", "4", "3", "2", "1")

    def cuda(op: str, bits: str, rows: str) -> dict[str, str]:
        if op == "project" and bits == "8":  # at most 48 rows at a time
            rows = {"64": "32", "128": "48"}[rows]
        return line("cuda_static_cost", op=op, bits=bits, rows=rows)

    budget = tuple(cuda("project", bits, "64")["budget"] for bits in every)
    yield "| budget of an H200, packed bytes alone |" + " {} |" * 5, budget
    for op in BOTH:
        cells = [
            f"{float(cuda(op, bits, rows)['per weight']):.1f}"
            for bits in every
            for rows in ("64", "128")
        ]
        yield f"| CUDA C++, {op}, 64 rows (128) |" + " {} ({}) |" * 5, tuple(cells)
    many = [row for row in tables("cuda_static_cost")[0] if row["op"] in BOTH]
    many = [row for row in many if int(row["rows"]) >= 64]

    def most(keys: tuple[str, ...], bits: tuple[str, ...]) -> str:
        shares = [float(row[key]) for row in many if row["bits"] in bits for key in keys]
        return f"{100 * max(shares):.0f}"

    one = (most(("issue",), ("1",)), most(("pipe",), ("1",)))
    yield "at 1 bit at most {} % of the instructions that can be issued meanwhile, and {} %", one
    yield "at 2 bits and more at most {} % of either", (most(("issue", "pipe"), every[:-1]),)
    for op, label in (("project", "project, 72 rows"), ("reconstruct", "reconstruct")):
        rows = [line("triton_static_cost", 0, op=op, bits=bits) for bits in every]
        cells = tuple(f"{float(row['sm_90, n = 72, triton 3.6.0']):.1f}" for row in rows)
        yield f"| Triton, {label} |" + " {} |" * 5, cells


# Claims ------------------------------------------------------------------------------------------

FINE, FIXED = "TWA-t fine, 4 bits", ("SWA", "EMA", "LAWA", "greedy soup", "uniform", "best single")


@functools.cache
def cases(claim: str, task: str, setting: str = "") -> list[dict[str, float]]:
    """{method: test loss} of each setting and seed of a task, or of one setting."""
    found: dict[tuple, dict[str, float]] = {}
    for row in loaded(f"claims/{claim}")["rows"]:
        if row.get("task") == task and setting in ("", row["setting"]) and "test" in row:
            found.setdefault((row["setting"], row["seed"]), {})[row["method"]] = row["test"]
    return list(found.values())


def below(found: list[dict[str, float]], ours: str, theirs: tuple[str, ...]) -> list[float]:
    """How far a method is below the best of others, in each case that has it."""
    have = [case for case in found if ours in case]
    return [min(case[name] for name in theirs if name in case) - case[ours] for case in have]


def span(values: list[float]) -> tuple[str, str]:
    return f"{min(values):.3f}", f"{max(values):.3f}"


def demo() -> list[dict[str, float]]:
    losses = loaded("demo_seeds")["test_loss"]
    return [dict(zip(losses, case, strict=True)) for case in zip(*losses.values(), strict=True)]


def demo_page() -> Iterator[tuple[str, tuple]]:
    yield "The optimizer's step is [{} % of the training step]", (step_share(),)


def index() -> Iterator[tuple[str, tuple]]:
    text, soup = "GPT, source text", "GPT, source text to English"
    head, tail = cases("head", text), cases("tail", text)
    tuned = cases("pretrained", "MiniLM, fine-tunes", "glosses")
    of = cases("soup", soup)
    rows = {
        "| one run, text: [head](../bench/results/claims/head.md) |": (head, FINE, "SWA"),
        "| one run, text: [tail](../bench/results/claims/tail.md) |": (tail, FINE, "SWA"),
        "[the demo](../bench/results/demo_seeds.md) |": (demo(), FINE, "SWA"),
        "[pretrained](../bench/results/claims/pretrained.md) |": (
            tuned,
            "TWA-v fine, 4 bits",
            "uniform",
        ),
        "[paper](../bench/results/claims/paper.md) |": (
            cases("paper", "GPT, English"),
            FINE,
            "SWA",
        ),
        "[soup](../bench/results/claims/soup.md), TWA-v per model |": (
            of,
            "TWA-v per model, 4 bits, by default",
            "uniform",
        ),
        "the same, TWA-v per tensor |": (of, "TWA-v per tensor, 4 bits, by default", "uniform"),
        "fine segments, on too few samples |": (of, "TWA-v fine, 4 bits, by default", "uniform"),
    }
    for start, (found, ours, mean) in rows.items():
        swa, best = below(found, ours, (mean,)), below(found, ours, FIXED)
        yield start + " {} | {} to {} | {} to {} |", (str(len(swa)), *span(swa), *span(best))
    every = [
        gain
        for found in (head, tail, demo(), cases("paper", "GPT, English"))
        for gain in below(found, FINE, FIXED)
    ]
    won = (str(sum(gain > 0 for gain in every)), str(len(every)))
    yield "below every fixed average of them in {} of {} cases", won
    against = {
        "| the demo, the same steps |": (demo(), "annealing (no average)"),
        "| [head](../bench/results/claims/head.md): a run stopped early, the same steps |": (
            head,
            "annealing",
        ),
        "| [tail](../bench/results/claims/tail.md), the same steps |": (tail, "annealing"),
        "| head, the same cost |": (head, "annealing, same cost"),
        "| tail, the same cost |": (tail, "annealing, same cost"),
    }
    for start, (found, theirs) in against.items():
        ours = "TWA-t fine, as many steps as annealing"
        if theirs != "annealing" or not any(ours in case for case in found):
            ours = FINE
        gains = below(found, ours, (theirs,))
        mean = sum(gains) / len(gains)
        side = f"{abs(mean):.4f} {'lower' if mean > 0 else 'higher'}"
        yield start + " {} of {} | {} |", (str(sum(g > 0 for g in gains)), str(len(gains)), side)


def quotes() -> list[Quote]:
    pages = {
        "README.md": readme,
        "docs/benchmarks.md": benchmarks,
        "docs/index.md": index,
        "docs/commands/demo.md": demo_page,
    }
    return [
        Quote(page, text, tuple(values)) for page, made in pages.items() for text, values in made()
    ]


# The command -------------------------------------------------------------------------------------


def found(wrong: list[str]) -> Iterator[tuple[Quote, re.Match[str]]]:
    """Each quote and where its page has it; what is not in one place is added to `wrong`."""
    for quote in quotes():
        try:
            yield quote, quote.found((ROOT / quote.page).read_text())
        except LookupError as error:
            wrong.append(str(error))


def differences() -> list[str]:
    """What the pages say and the results do not."""
    wrong: list[str] = []
    known: dict[str, list[tuple[int, int]]] = {}
    for quote, match in found(wrong):
        known.setdefault(quote.page, []).append(match.span())
        if match.groups() != quote.values:
            one = f"{match.groups()}, the results {quote.values}"
            wrong.append(f"{quote.page}: {quote.text!r}: the page says {one}")
    for page in WHOLE:
        text = (ROOT / page).read_text()
        for match in FIGURE.finditer(text):
            is_quoted = any(a <= match.start() < b for a, b in known.get(page, ()))
            if not (is_quoted or match.group() in KNOWN or in_code(text, match.start())):
                wrong.append(f"{page}: {match.group()!r} is in no quote of bench/quotes.py")
    return wrong


def in_code(text: str, at: int) -> bool:
    """Whether a place is in a block of code."""
    return text.count("```", 0, at) % 2 == 1


def write() -> list[str]:
    """Writes the figures into the pages; what could not be."""
    wrong: list[str] = []
    for quote, match in found(wrong):
        text = match.string
        for k in reversed(range(len(quote.values))):
            start, end = match.span(k + 1)
            text = text[:start] + quote.values[k] + text[end:]
        (ROOT / quote.page).write_text(text)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    wrong = differences() if args.check else write()
    print("\n".join(wrong) or "every figure is a result's")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
