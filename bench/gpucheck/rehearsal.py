"""The check without a GPU: stand-ins for its backends, and faults planted on purpose.

`gpu_check.py --rehearse` runs every stage on CPU tensors of a few tiles, C++ in the place of CUDA
and the reference in the place of Triton, and plants what can go wrong on a GPU. It passes if each
fault is in the page, by its name, and everything else was found right.
"""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor

from .children import kind
from .events import GOOD

#: (stage, op, backend, bits) -> what goes wrong there
PLANTED = {
    ("smoke", "project", "triton", 4): "hang",
    ("smoke", "step", "cuda", 1): "abort",
    ("smoke", "reconstruct", "cuda", 4): "wrong",
    ("smoke", "gram", "triton", 8): "raise",
    ("speed", "unpack", "triton", 4): "hang",
    ("speed", "pack", "cuda", 4): "abort",
}
#: what a case's event then says
EXPECTED = {"hang": "hang", "abort": "fault", "wrong": "wrong", "raise": "error"}
#: stages that raise, or whose disk is full
BROKEN_STAGE, FULL_DISK = "counters", "tests"

#: how long a worker may say nothing; a test may take. Ample for stand-ins on a busy machine.
SILENCE, TEST_SECONDS = 20.0, 10

_spoil = False


def plant(stage: str, case: dict) -> None:
    """In a worker, before a case: does what is planted there."""
    global _spoil
    _spoil = False
    if os.environ.get("GPUCHECK_PLANTED") != "1":
        return
    fault = PLANTED.get((stage, case.get("op"), case.get("backend"), case.get("bits")))
    if fault == "hang":
        time.sleep(3600)
    elif fault == "abort":
        os.abort()
    elif fault == "raise":
        raise RuntimeError("planted: this case raises")
    _spoil = fault == "wrong"


def spoiled(results: list[Tensor]) -> list[Tensor]:
    """The results, one number of which is off where `plant` said so."""
    if _spoil:
        results[0] = results[0].clone()
        results[0].view(-1)[0] += torch.ones((), dtype=results[0].dtype) * 100
    return results


def misses(events: list[dict]) -> list[str]:
    """What a rehearsal should have reported and did not, or reported without a reason."""
    found = []
    cases = [e for e in events if "case" in e]
    for (stage, op, backend, bits), fault in PLANTED.items():
        of = [e for e in cases if (e["stage"], *kind(e)) == (stage, op, backend, bits)]
        if not of or of[0]["result"] != EXPECTED[fault]:
            said = of[0]["result"] if of else "nothing"
            found.append(f"{stage} {op} {backend} {bits} bits: planted a {fault}, it says {said}")
    blamed = {kind[1:] for kind in PLANTED}
    for e in cases:
        bad = e["result"] not in GOOD
        if bad and e["stage"] in ("smoke", "speed") and kind(e) not in blamed:
            found.append(
                f"{e['stage']} {e['case']}: {e['result']} though nothing was planted: {e['note']}"
            )
    planted = {
        "test_passes": "right",
        "test_fails": "wrong",
        "test_dies": "fault",
        "test_hangs": "hang",
    }
    tests = {e["case"].split("::")[-1]: e["result"] for e in cases if e["stage"] == "tests"}
    found += [
        f"tests {name}: expected {result}, it says {tests.get(name, 'nothing')}"
        for name, result in planted.items()
        if tests.get(name) != result
    ]
    stages = {e["stage"]: e for e in events if e.get("event") == "stage"}
    if stages.get(BROKEN_STAGE, {}).get("result") != "error":
        found.append(
            f"{BROKEN_STAGE}: planted a stage that raises, it says {stages.get(BROKEN_STAGE)}"
        )
    if not any(e.get("event") == "disk" for e in events):
        found.append("planted a full disk, nothing says so")
    if not any(e.get("event") == "probe" and e.get("commit") == "unknown" for e in events):
        found.append("planted a machine without git, the probe does not say so")
    return found
