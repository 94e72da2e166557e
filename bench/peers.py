"""Public 4-bit CPU kernels beside project and reconstruct: bitsandbytes' NF4 product and PyTorch's
int4 product (which torchao calls).

    python bench/peers.py [--n 64] [--columns 1e6] [--save]     --save writes bench/results/peers.md

Both are products with a vector, y = W v, of a matrix stored by rows, so they need a second,
transposed copy of the codes for reconstruct: twice our memory. Both take and return bfloat16; the
timings include converting g and x to it, and adding the center, into buffers made once. The
product's own result they allocate in every call: neither has an `out` on CPUs. Data are random.
bitsandbytes is optional: `pip install bitsandbytes`.

Kernels take turns, ROUNDS times; the table has the best of each kernel's medians, so that other
load on the machine hits no kernel alone. It must be idle all the same: threads that wait in OpenMP
make a busy core cost the peers far more than our kernels.

Bytes moved = codes + scales + g (project) or center + result (reconstruct)
= n * D * (1 / 2 + scale bytes / group) + 4 * D or 8 * D.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from functools import partial

import torch
from common import bandwidth, median_seconds, publish, random_basis
from torch import Tensor
from twa.io.tables import markdown_table

import twa_kernels as tk
from twa_kernels.native import empty_for_streaming

ROUNDS = 5


class TorchInt4:
    """`torch.ops.aten._weight_int4pack_mm_for_cpu`, torchao's int4 weight-only path on CPUs.

    One thread for each 64 rows, so project of n = 64 rows runs on one.
    """

    name, groups, rows = "torch int4 (bfloat16)", (128, 64, 32), 16
    scale_bytes = 4  # scale and zero point, bfloat16

    @classmethod
    def why_unusable(cls, n: int, columns: int) -> str | None:
        for size in (n, columns):
            if size % cls.rows or size % cls.groups[-1]:
                return (
                    f"{cls.name}: n and D must be multiples of {max(cls.rows, cls.groups[-1])},"
                    f" found {n} and {columns}"
                )
        return None

    @classmethod
    def create(cls, n: int, columns: int) -> TorchInt4 | None:
        """The peer, or None with the reason printed."""
        if reason := cls.why_unusable(n, columns):
            print(f"left out: {reason}")
            return None
        return cls(n, columns)

    def __init__(self, n: int, columns: int) -> None:
        self.by_rows, self.by_columns = self._operand(n, columns), self._operand(columns, n)
        self.g, self.theta = torch.empty(1, columns, dtype=torch.bfloat16), torch.empty(columns)
        self.nbytes = [
            n * columns // 2 + n * columns * self.scale_bytes // group
            for _, group, _ in (self.by_rows, self.by_columns)
        ]

    def _operand(self, outputs: int, inputs: int) -> tuple[Tensor, int, object]:
        """Codes (outputs, inputs / 2), the largest group that fits, scales.

        All bytes are codes, whatever order the kernel keeps them in.
        """
        group = next(size for size in self.groups if inputs % size == 0)
        codes = empty_for_streaming((outputs, inputs // 2), "cpu").random_(0, 256)
        return codes, group, self._scales(outputs, inputs, group)

    def _scales(self, outputs: int, inputs: int, group: int) -> object:
        return torch.rand(inputs // group, outputs, 2).add_(0.5).bfloat16()

    def _product(self, v: Tensor, operand: tuple[Tensor, int, object]) -> Tensor:
        codes, group, scales = operand
        return torch.ops.aten._weight_int4pack_mm_for_cpu(v, codes, group, scales)

    def project(self, g: Tensor) -> Tensor:
        return self._product(self.g.copy_(g), self.by_rows)[0].float()

    def reconstruct(self, x: Tensor, center: Tensor) -> Tensor:
        return torch.add(center, self._product(x.T.bfloat16(), self.by_columns)[0], out=self.theta)


class BitsAndBytes(TorchInt4):
    """`bitsandbytes.functional.gemv_4bit` on NF4 codes in its CPU order, the path of its Linear4bit
    in inference.

    AVX-512 BF16 only. One thread for each 32 rows at most.
    """

    name, groups, rows, scale_bytes = "bitsandbytes NF4 (bfloat16)", (128, 64), 32, 2

    @classmethod
    def why_unusable(cls, n: int, columns: int) -> str | None:
        if importlib.util.find_spec("bitsandbytes") is None:
            return f"{cls.name}: bitsandbytes is not installed"
        from bitsandbytes.functional import has_avx512bf16

        if not has_avx512bf16():
            return f"{cls.name}: its product needs AVX-512 BF16, which this processor lacks"
        return super().why_unusable(n, columns)

    def _scales(self, outputs: int, inputs: int, group: int) -> object:
        from bitsandbytes.functional import QuantState, get_4bit_type

        absmax = torch.rand(inputs // group, outputs).add_(0.5).bfloat16()
        code = get_4bit_type("nf4", device="cpu")
        return QuantState(absmax, torch.Size((outputs, inputs)), code, group, "nf4", torch.bfloat16)

    def _product(self, v: Tensor, operand: tuple[Tensor, int, object]) -> Tensor:
        from bitsandbytes.functional import gemv_4bit

        codes, _, state = operand
        return gemv_4bit(v, codes, state=state)


PEERS = (BitsAndBytes, TorchInt4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--columns", type=float, default=1e6)
    parser.add_argument("--save", action="store_true", help="write bench/results/peers.md")
    args = parser.parse_args()
    n, columns = args.n, int(args.columns)
    torch.manual_seed(0)
    basis, g, x = random_basis(n, columns, 4), torch.randn(columns), torch.randn(n, 1)
    center, out = torch.randn(columns), torch.empty(columns)

    def our_project():
        tk.project(basis, [g])

    def our_reconstruct():
        tk.reconstruct(basis, x, [center], [out])

    # name, project, reconstruct, bytes of codes and scales that each reads
    table = [("ours, 4 bits", our_project, our_reconstruct, [basis.nbytes] * 2)]
    for peer in filter(None, (make.create(n, columns) for make in PEERS)):
        runs = partial(peer.project, g), partial(peer.reconstruct, x, center)
        table.append((peer.name, *runs, peer.nbytes))
    best = [[math.inf, math.inf] for _ in table]
    for _ in range(ROUNDS):
        for seconds, (_, project, reconstruct, _) in zip(best, table, strict=True):
            for k, run in enumerate((project, reconstruct)):
                seconds[k] = min(seconds[k], median_seconds(run, seconds=0.5))
    rows = []
    for k, (op, vectors) in enumerate((("project", 4), ("reconstruct", 8))):
        for seconds, (name, _, _, stored) in zip(best, table, strict=True):
            rate = (stored[k] + vectors * columns) / seconds[k] / 1e9
            figures = f"{1e3 * seconds[k]:.2f}", f"{rate:.1f}", f"{seconds[k] / best[0][k]:.2f}"
            rows.append([op, *figures, name])
    read, copy = bandwidth()["read"], bandwidth()["copy"]
    lines = [
        f"# 4-bit kernels, n = {n}, D = {columns:.3g}",
        "",
        f"measured bandwidth: read {read:.1f} GB/s, copy {copy:.1f} GB/s (read + write)",
        "",
        markdown_table(["op", "median ms", "GB/s", "time / ours", "kernel"], rows),
    ]
    publish("peers", lines, args.save)


if __name__ == "__main__":
    main()
