"""What bench/gpu_check.py is made of.

events    one JSON line per result, appended and synced as it comes
children  processes with a limit, whose faults and hangs cost one case
build     the native module without CMake, from objects made beforehand where they are given
cases     operands, calls and byte formulas of every op
smoke     worker: every op against the CPU
speed     worker: percent of a device-to-device copy; variants; what a profiler counts
tests     the `gpu` tests on several processes
page      the report
rehearsal the whole check on a CPU, with planted faults
"""
