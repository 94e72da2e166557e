"""Options, and the table that ends a benchmark run: median, GB/s, percent of measured bandwidth,
ratio to each peer.
"""

from __future__ import annotations

import json

import common
import torch

ROWS: list[dict] = []
BEFORE: dict[str, float] = {}


def pytest_addoption(parser) -> None:
    parser.addoption("--n", type=int, nargs="+", default=[64], help="rows")
    parser.addoption("--columns", type=float, nargs="+", default=[8e6], help="columns D")
    parser.addoption("--threads", type=int, default=torch.get_num_threads())
    parser.addoption(
        "--save",
        default="",
        help="name of a result under bench/results/ (NAME.json, NAME.md)",
    )


def pytest_configure(config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    torch.manual_seed(0)


def pytest_generate_tests(metafunc) -> None:
    if "n" in metafunc.fixturenames:
        metafunc.parametrize("n", metafunc.config.getoption("--n"))
    if "columns" in metafunc.fixturenames:
        metafunc.parametrize("columns", [int(c) for c in metafunc.config.getoption("--columns")])


def record(
    benchmark, op: str, what: str, n: int, columns: int, moved: int, bound: str | None = None
) -> None:
    """Adds a row to the final table.

    Args:
        moved: bytes by the op's formula
        bound: the bandwidth to compare with, "read" or "copy"
    """
    seconds = benchmark.stats.stats.median if benchmark.stats else float("nan")
    rate = moved / seconds / 1e9
    row = {"op": op, "what": what, "n": n, "D": columns, "ms": 1e3 * seconds}
    ROWS.append(row | {"GB/s": rate, "bound": bound})


def pytest_collection_finish(session) -> None:
    """The bandwidth before; the faster of before and after counts: a machine may be shared."""
    if session.items and not session.config.getoption("--benchmark-disable", False):
        BEFORE.update(common.bandwidth())
        common.bandwidth.cache_clear()


def pytest_terminal_summary(terminalreporter, config) -> None:
    if not ROWS:
        return
    after = common.bandwidth()
    rates = {name: max(rate, BEFORE.get(name, 0.0)) for name, rate in after.items()}
    for row in ROWS:
        row["percent"] = 100 * row["GB/s"] / rates[row["bound"]] if row["bound"] else None
    lines = [f"{k}: {v}" for k, v in common.hardware().items()]
    read, ahead, copy = (rates[name] for name in ("read", "prefetched read", "copy"))
    lines.append(
        f"measured bandwidth: read {read:.1f} GB/s (with software prefetch {ahead:.1f}), copy"
        f" {copy:.1f} GB/s (read + write)"
    )
    lines += [
        "",
        "| op | kernel | n | D | median ms | GB/s | of bandwidth | time / our 4 bits |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    ours = {(r["op"], r["n"], r["D"]): r["ms"] for r in ROWS if r["what"] == "4 bits"}
    for r in sorted(ROWS, key=lambda r: (r["op"], r["n"], r["D"])):
        fours = ours.get((r["op"], r["n"], r["D"]))
        ratio = f"{r['ms'] / fours:.2f}" if fours else ""
        percent = f"{r['percent']:.0f} % of {r['bound']}" if r["percent"] else ""
        lines.append(
            f"| {r['op']} | {r['what']} | {r['n']} | {r['D']:.0e} | {r['ms']:.2f} | {r['GB/s']:.1f}"
            f" | {percent} | {ratio} |"
        )
    terminalreporter.write_line("")
    for line in lines:
        terminalreporter.write_line(line)
    if name := config.getoption("--save"):
        common.RESULTS.mkdir(exist_ok=True)
        result = {"hardware": common.hardware(), "bandwidth": rates, "rows": ROWS}
        (common.RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        page = ["# CPU kernels", "", *lines[:6], "", *lines[6:], ""]
        (common.RESULTS / f"{name}.md").write_text("\n".join(page) + "\n")
