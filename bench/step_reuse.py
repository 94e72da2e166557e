"""How much of a fused step's second read of P finds its codes in the second-level cache: a model,
not a measurement.

The step kernel's own order of tasks (csrc/work.cpp) is played through a cache that forgets
what was used longest ago, item by item: codes and scales as they are projected, gradients, and the
centers and weights that reconstruct moves. Concurrency is modelled by the order alone, whose window
is the number of blocks that an H200 runs at once. What counts as available of its 60 MB (two
halves, other data) is not known: two sizes are shown.

    python bench/step_reuse.py        writes bench/results/step_reuse.md
"""

from __future__ import annotations

import collections
import sys

import torch
from common import RESULTS

from twa_kernels import native

WINDOW = 3 * 132  # blocks of the step kernel on an H200
CACHES = (50e6, 30e6)


def clip() -> list[int]:
    """Sizes of a CLIP-like model's tensors: 12 layers of width 768 and 12 of width 512, and
    embeddings; 1.25e8 weights.
    """
    sizes = []
    for width in (768, 512):
        sizes += [3 * 32 * 32 * 768 if width == 768 else 77 * 512, width, 50 * width]
        for _ in range(12):
            sizes += [3 * width * width, 3 * width, width * width, width, width, width]
            sizes += [4 * width * width, 4 * width, 4 * width * width, width, width, width]
    return sizes


def reuse(
    sizes: list[int], segments: list[int], n: int, bits: int, cache: float
) -> tuple[float, float]:
    """(packed bytes, share of them that the second read finds in the cache)."""
    tiles_of = [-(-size // 128) for size in sizes]
    tile_segment = torch.repeat_interleave(
        torch.tensor(segments, dtype=torch.int32), torch.tensor(tiles_of)
    )
    host = native._C.HostWork(
        numel=sizes, tile_segment=tile_segment, segments=max(segments) + 1, bits=bits
    )
    tiles = torch.frombuffer(bytearray(host.arrays["item_tiles"]), dtype=torch.int32).tolist()
    kept: collections.OrderedDict = collections.OrderedDict()
    used = hit = total = 0.0

    def touch(key: object, nbytes: float) -> None:
        nonlocal used
        used += nbytes - kept.pop(key, 0.0)
        kept[key] = nbytes
        while used > cache:
            used -= kept.popitem(last=False)[1]

    for task in torch.frombuffer(bytearray(host.tasks(WINDOW)), dtype=torch.int32).tolist():
        item = task if task >= 0 else -1 - task
        nbytes = tiles[item] * n * (16 * bits + 1)
        if task >= 0:
            touch(item, nbytes)
            touch(("gradient", item), tiles[item] * 512)
        else:
            total += nbytes
            hit += nbytes * (item in kept)
            used -= kept.pop(item, 0.0)  # read as what is needed no more
            touch(("weights", item), tiles[item] * 1024)
    return total, hit / total


def main() -> None:
    if native._C is None or not native._C.with_cuda:
        sys.exit("the order of tasks is in the CUDA part of the native module, which was not built")
    sizes = clip()
    every = list(range(len(sizes)))
    # embeddings, then layers, of either half
    layers = [(k // 147) * 13 + (0 if k % 147 < 3 else 1 + (k % 147 - 3) // 12) for k in every]
    lines = [
        "# Second read of P in a fused step: share that the cache still has",
        "",
        " ".join(__doc__.split("\n\n")[1].split()),
        "",
    ]
    lines += [
        "| n | bits | packed | coefficients | 50 MB | 30 MB |"
        " bytes of P that memory moves, of two reads (50 MB) |",
        "|--:|--:|--:|---|--:|--:|--:|",
    ]
    for n, bits in ((16, 4), (72, 4), (72, 2), (72, 1), (72, 8)):
        for name, segments in (("per tensor", every), ("per layer", layers)):
            results = [reuse(sizes, segments, n, bits, cache) for cache in CACHES]
            shares = " | ".join(f"{100 * share:.0f} %" for _, share in results)
            lines.append(
                f"| {n} | {bits} | {results[0][0] / 1e9:.2f} GB | {name} | {shares} |"
                f" {100 * (1 - results[0][1] / 2):.0f} % |"
            )
    lines.append("")
    (RESULTS / "step_reuse.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
