"""What Nsight Compute counts of a kernel: the command, and its table as numbers."""

from __future__ import annotations

import csv
import io

STALLS = (
    "long_scoreboard",
    "short_scoreboard",
    "barrier",
    "membar",
    "wait",
    "math_pipe_throttle",
    "lg_throttle",
    "mio_throttle",
    "not_selected",
    "no_instruction",
)
#: name on the page -> metric
METRICS = {
    "ms": "gpu__time_duration.sum",
    "dram % of peak": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram GB": "dram__bytes.sum",
    "L2 % of peak": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "L1 % of peak": "l1tex__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue slots %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "instructions": "smsp__inst_executed.sum",
    "integer pipe %": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "warps %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    **{
        f"stall {s}": f"smsp__average_warps_issue_stalled_{s}_per_issue_active.ratio"
        for s in STALLS
    },
}
TO_PAGE = {"ns": 1e-6, "nsecond": 1e-6, "byte": 1e-9}  # to ms and GB
OPS = "project|reconstruct|step|pack|unpack|gram|products|transform.*|orthonormalize.*"
OURS = f"regex:^({OPS})_kernel$"
SECTIONS = ("SpeedOfLight", "LaunchStats", "WarpStateStats", "Occupancy")


def command(ncu: str, sections: bool = False) -> list[str]:
    """Everything before the program: the kernels of the ops only, their clocks as they are.

    sections   ncu's own choice of metrics, where it does not know one of ours
    """
    asked = [w for s in SECTIONS for w in ("--section", s)] if sections else []
    return [
        ncu,
        *("--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"),
        *("--target-processes", "application-only", "-k", OURS, "--launch-count", "6"),
        *(asked or ("--metrics", ",".join(METRICS.values()))),
    ]


def table(lines: list[str]) -> dict[str, float]:
    """The longest launch in ncu's CSV, by the names of METRICS; {} where there is none."""
    rows = list(csv.reader(io.StringIO("\n".join(line for line in lines if line.startswith('"')))))
    if len(rows) < 3 or "Kernel Name" not in rows[0]:
        return {}
    header, units, *launches = rows
    found = []
    for launch in launches:
        values: dict[str, float] = {}
        for name, metric in METRICS.items():
            if metric not in header:
                continue
            at = header.index(metric)
            try:
                value = float(launch[at].replace(",", ""))
            except ValueError:
                continue
            values[name] = value * TO_PAGE.get(units[at], 1.0)
        found.append(values)
    return max(found, key=lambda v: v.get("ms", 0.0))


def brief(values: dict[str, float]) -> str:
    """One line: the rates, then the three reasons for which warps wait longest."""
    stalls = sorted((v for v in values.items() if v[0].startswith("stall ")), key=lambda v: -v[1])
    rates = [f"{k} {v:.3g}" for k, v in values.items() if not k.startswith("stall ")]
    return ", ".join(rates + [f"{k} {v:.2f}" for k, v in stalls[:3]])
