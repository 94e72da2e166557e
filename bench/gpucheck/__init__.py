"""What bench/gpu_check.py is made of.

plan           the cases of each stage, what matters most first
events         one JSON line per result, appended and synced as it comes
children       processes with a limit, whose faults and hangs cost one case
machine        what is here, and the environment of the processes
build          the native module without CMake, from objects made beforehand if given
cases          operands, calls and byte formulas of every op
recorded       the same for record and replay
smoke          worker: every op against the CPU
speed          worker: percent of a device-to-device copy
variants       worker: launch configurations side by side
counters       what Nsight Compute counts of a kernel
sanitizer      what compute-sanitizer says
pytest_events  an event per test
page           the report
rehearsal      the whole check on a CPU, with planted faults
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
