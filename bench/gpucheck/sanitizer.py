"""compute-sanitizer: its options, as far as the one here knows them, and what its lines say."""

from __future__ import annotations

import re
import subprocess

BAD = re.compile(
    r"^=+ +(Error:(?!.*terminate)|Invalid|Misaligned|Malloc/Free|.*hazard|.*exception|"
    r"Internal|.*overflow of tracked)"
)
COUNT = re.compile(r"SUMMARY: (\d+)")


def options(program: str, tool: str) -> list[str]:
    """All reports, our kernels only where PyTorch's own would be looked at for long."""
    wanted = [["--print-limit", "0"], ["--launch-timeout", "0"]]
    if tool == "racecheck":
        # 32 barriers a block, more than it counts by itself.
        wanted += [["--num-cuda-barriers", "64"], ["--kernel-name", "kernel_substring=twa"]]
    else:
        wanted += [["--report-api-errors", "no"], ["--padding", "64"]]
    try:
        done = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    known = done.stdout + done.stderr
    return [word for option in wanted if option[0] in known for word in option]


def verdict(tool: str, group: list[dict], lines: list[str]) -> dict:
    """Fields of a run's event: "right", "wrong", or "not run" where it came to no end."""
    fields = {"of": f"{group[0]['op']} {group[0]['backend']}"}
    said = [line for line in lines if line.startswith("=")]
    if any("not supported" in line for line in said):
        return fields | {"result": "not run", "note": f"{tool}: Device not supported"}
    bad = [line.strip("= ")[:160] for line in said if BAD.match(line) and "SUMMARY" not in line]
    counts = [int(found[1]) for line in said if (found := COUNT.search(line))]
    if bad or any(counts):
        return fields | {"result": "wrong", "note": f"{tool}: {'; '.join(bad[:3]) or said[-1]}"}
    if not counts:
        return fields | {"result": "not run", "note": f"{tool} gave no summary"}
    return fields | {"result": "right", "note": ""}
