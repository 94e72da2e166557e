"""What results name beside their figures: the processor."""

from __future__ import annotations

import platform


def processor() -> str:
    """Name of the CPU."""
    try:
        with open("/proc/cpuinfo") as f:
            names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
