"""What results name beside their figures: the processor."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name of the CPU; on x86 with family and model: names such as "AMD EPYC" hide the core."""
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    facts = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.M))
    name = facts.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= facts.keys():
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return name
