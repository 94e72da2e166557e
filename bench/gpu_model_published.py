"""gpu_model.py's formulas on kernels of others, whose source and speed are public.

Instructions were counted in the machine code that nvcc 13 makes of their sources, as
static_cost_cuda.py counts ours. Two numbers of the model were chosen on the cases marked so, which
are all but one: the latency of a plain load, 0.45 us, and the begin of a block. That they can be
chosen for all of them at once is what this shows.

    python bench/gpu_model_published.py        writes bench/results/gpu_model_published.md
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path

import gpu_model
from gpu_model import BEGIN, GPUS, INSTRUCTIONS, WAIT, Gpu

LATENCY = 0.45e-6  # of plain loads; asynchronous copies: as in gpu_model
OUTPUT = gpu_model.RESULTS / "gpu_model_published.md"
COPY = "github.com/yencal/gpu-bandwidth-benchmark, plots"
TRANSPOSE = "github.com/yencal/gpu-matrix-transpose, table"
REDUCE = "yencal.github.io, 2025-12-13"
GEMV = "github.com/ml-explore/mlx/pull/3180, qmv.cu"


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel that somebody measured.

    Args:
        published: GB/s
        mix: instructions of a warp, all, and by pipe: (issue, alu, fma, xu, shared wavefronts)
        warps: of a block, or as many times as a warp does the counted instructions
        nbytes: of a block
        blocks: on a multiprocessor at once; count: in all
        on_their_way: bytes of a multiprocessor, where a loop's loads wait for each other
        waits: loads that wait for another before the first
        chosen: the model's latency was chosen with it
        why: what explains a miss
    """

    name: str
    source: str
    gpu: Gpu
    published: float
    mix: tuple[float, float, float, float, float]
    warps: float
    nbytes: float
    blocks: int
    count: int
    on_their_way: float = 0.0
    waits: int = 0
    chosen: bool = True
    why: str = ""


def predict(case: Case) -> float:
    """GB/s."""
    gpu, cycle = case.gpu, 1 / case.gpu.clock
    of = dict(zip(("issue", "alu", "fma", "xu"), case.mix, strict=False)) | {"uniform": 0.0}
    each = {key: case.warps * of[key] / rate * cycle for key, rate in INSTRUCTIONS.items()}
    each |= {"memory": case.nbytes / (gpu.copy / gpu.multiprocessors), "matrix": 0.0}
    each["shared"] = case.warps * case.mix[4] * cycle
    each["latency"] = case.nbytes * LATENCY / case.on_their_way if case.on_their_way else 0.0
    service = gpu_model.together(each)
    start = BEGIN + LATENCY + case.waits * WAIT
    total = case.count * service / gpu.multiprocessors
    total /= gpu_model.busy(service, start, case.blocks)
    waves = case.count / (gpu.multiprocessors * case.blocks)
    last = math.ceil(waves) - waves if waves < 4 else 0.5  # of a wave: blocks are alike
    total += last * (service * case.blocks + start) + (start if waves <= 1 else 0.0)
    return case.count * case.nbytes / total / 1e9


def copies() -> list[Case]:
    """Of 1 to 16 bytes a thread, 2^30 bytes; and 2^26 of 16, which take 36 to 48 us."""
    found = []
    h200, a100 = GPUS["H200"], dataclasses.replace(GPUS["A100"], copy=1.4e12)
    speeds = [
        (GPUS["H100"], "H100", (684, 1190, 2025, 2737, 3052)),
        (h200, "H200", (722, 1275, 2220, 3465, 4110)),
        (a100, "A100 40 GB", (475, 833, 1326, 1384, 1393)),
    ]
    for gpu, name, published in speeds:
        for size, speed in zip((1, 2, 4, 8, 16), published, strict=True):
            mix = (34.0 if size > 1 else 30.0, 11.0, 6.0, 0.0, 2.0 * max(1, size // 4))
            count = (1 << 30) // (1024 * size)
            title = f"copy, {size} bytes a thread, {name}"
            found.append(Case(title, COPY, gpu, speed, mix, 32, 2048 * size, 2, count))
    for gpu, name, speed in ((GPUS["H100"], "H100", 2810.0), (h200, "H200", 3715.0)):
        mix, count = (34.0, 11.0, 6.0, 0.0, 8.0), (1 << 26) // (1024 * 16)
        title = f"copy of 64 MiB, 16 bytes a thread, {name}"
        found.append(
            Case(title, COPY, gpu, speed, mix, 32, 32768, 2, count, why="the launch itself")
        )
    return found


def others() -> list[Case]:
    """With arithmetic, shared memory, or few blocks."""
    narrow = dataclasses.replace(GPUS["H100"], copy=2.8e12)  # copies in the same table
    both = "load, barrier and conflicts one after the other"
    found = [
        Case(
            f"transpose, {name}, H100",
            *(TRANSPOSE, narrow, speed, mix, warps, 8192, blocks, 1 << 20),
            why=why,
        )
        for name, speed, mix, warps, blocks, why in (
            ("conflicts of 32 banks", 996.1, (40.0, 10.0, 8.0, 0.0, 35.0), 32, 2, both),
            ("padded", 1693.4, (40.0, 10.0, 10.0, 0.0, 4.0), 32, 2, ""),
            ("two elements a thread", 2385.1, (38.0, 10.0, 8.0, 0.0, 8.0), 16, 4, ""),
        )
    ]
    for size, speed in ((4, 2300.0), (8, 3050.0), (16, 3150.0)):
        times = (1 << 32) // size // 32 // (1024 * 16)  # of a warp's loop
        mix = (6.0 * times, 2.0 * times, 3.0 * times, 0.0, times * size / 4)
        nbytes = 16 * times * 32 * size
        title = f"sum, {size} bytes a load, H100"
        found.append(
            Case(title, REDUCE, GPUS["H100"], speed, mix, 16, nbytes, 4, 1024, 64 * 32 * size)
        )
    for dtype, speed, n, size, blocks, mix in (
        ("fp32", 1389.7, 16384, 4, 6, (60.5, 26.0, 30.0, 0.0, 12.0)),
        ("fp32", 1272.7, 8192, 4, 6, (60.5, 26.0, 30.0, 0.0, 12.0)),
        ("fp16", 1039.1, 8192, 2, 8, (78.0, 26.0, 38.0, 8.0, 8.0)),
    ):
        per = 1 + 2 * size / 64  # bytes a weight, with scales and biases
        title = f"int8 times vector, {n} x {n}, {dtype}, A100 80 GB"
        found.append(
            Case(
                *(title, GEMV, GPUS["A100"], speed, mix, 8 * n / 256, 8 * n * per, blocks),
                *(n // 8, 8 * blocks * 256 * per),
            )
        )
    stages = 5376 * 21504 / 8192 / 132
    exl3 = (219 * stages, 110 * stages, 71 * stages, 0.0, 27 * stages)
    found.append(
        Case(
            "EXL3, 6 bits times a few vectors, H200",
            "github.com/turboderp-org/exllamav3/issues/242",
            *(GPUS["H200"], 1372.0, exl3, 16, 6144 * stages, 1, 132, 2.5 * 6144),
            waits=3,
            chosen=False,
            why="which of its shapes ran is not known",
        )
    )
    return found


def main() -> None:
    cases = copies() + others()
    lines = [
        "# The model on kernels that others measured",
        "",
        "GB/s that the formulas of `gpu_model.py` say (`python bench/gpu_model_published.py`), and"
        " what their authors measured. *Chosen*: the model's latency was chosen with it.",
        "",
        "| kernel | published | model | miss | chosen | source | why |",
        "|---|--:|--:|--:|---|---|---|",
    ]
    misses = []
    for case in cases:
        found = predict(case)
        misses.append(found / case.published - 1)
        cells = [case.name, f"{case.published:.0f}", f"{found:.0f}", f"{100 * misses[-1]:+.0f} %"]
        cells += ["yes" if case.chosen else "no", case.source, case.why]
        lines.append("| " + " | ".join(cells) + " |")
    near = sum(abs(miss) <= 0.10 for miss in misses)
    mean = statistics.mean(map(abs, misses))
    lines += ["", f"Within 10 %: {near} of {len(cases)}; mean {100 * mean:.1f} %.", ""]
    Path(OUTPUT).write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
