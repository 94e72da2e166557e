"""record and replay: operands, calls, bytes, for correctness and for speed.

A case's n is the number of rows that replay adds; record writes one. "memory": "unaligned" begins
weights, reference and out one element into a buffer, codes a byte. Coefficients are ones, with
"average" those of an average of snapshots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import twa_kernels as tk

from .cases import DEVICE, DTYPES, backend_of, bytes_of, tensor_sizes, wait
from .plan import RECORD_PEERS

OPS = ("record", "replay")
PEERS = RECORD_PEERS  # plain PyTorch without codes; and what a snapshot in memory costs
PEER_BYTES = {PEERS[0]: "D * (e + 12)", PEERS[1]: "2 * e * D"}


@dataclass
class Recorded:
    """Operands of both ops for one model; two sets of weights, so that no difference is small."""

    bits: int
    weights: list[list[Tensor]]
    reference: list[Tensor]  # float32; of replay: out
    codes: list[Tensor]  # rows of (tiles, 16 * bits)
    scales: list[Tensor]  # rows of (tiles,)
    coefficients: list[float]

    @property
    def columns(self) -> int:
        return sum(r.numel() for r in self.reference)

    def numbers(self) -> dict[str, int]:
        """Names of the byte formulas."""
        tiles = tk.layout.total_tiles(tuple(r.numel() for r in self.reference))
        element = self.weights[0][0].element_size() if self.weights else 4
        numbers = {"n": len(self.codes), "D": self.columns, "tiles": tiles, "bits": self.bits}
        return numbers | {"e": element}

    def copy(self, device: torch.device | str, unaligned: bool = False) -> Recorded:
        """On `device`, in memory of its own."""

        def put(t: Tensor) -> Tensor:
            if not unaligned:
                return t.to(device, copy=True)
            # what lies beside a tensor is 7
            flat = torch.full((t.numel() + 2,), 7, dtype=t.dtype, device=device)
            flat[1:-1].copy_(t.reshape(-1))
            return flat[1:-1].view(t.shape)

        return Recorded(
            self.bits,
            [[put(w) for w in weights] for weights in self.weights],
            [put(r) for r in self.reference],
            [put(c) for c in self.codes],
            [put(s) for s in self.scales],
            self.coefficients,
        )

    def untouched(self) -> bool:
        """Whether what lies beside each unaligned tensor is still 7."""
        for t in self.reference:
            whole = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
            if not (whole[0] == 7 and whole[-1] == 7):
                return False
        return True


def make(case: dict, tiles: int, device: torch.device | str) -> Recorded:
    """Random operands: snapshots one step apart; codes uniform, scales of steps."""
    bits, n, dtype = case["bits"], case["n"], DTYPES[case["dtype"]]
    numels = tensor_sizes(tiles)
    tiles = tk.layout.total_tiles(tuple(numels))
    start = [torch.randn(numel, device=device) for numel in numels]
    if case["op"] == "record":
        steps = ([0.01 * torch.randn_like(w) for w in start] for _ in range(2))
        weights = [[(w + d).to(dtype) for w, d in zip(start, s, strict=True)] for s in steps]
        return Recorded(bits, weights, start, [], [], [])
    codes = [
        torch.empty(tiles, 16 * bits, dtype=torch.uint8, device=device).random_(0, 256)
        for _ in range(n)
    ]
    scales = [
        (torch.empty(tiles, device=device).random_(8, 16) * 2.0**-17).bfloat16() for _ in range(n)
    ]
    average = [(n - r) / n for r in range(n)]
    return Recorded(bits, [], start, codes, scales, average if case.get("average") else [1.0] * n)


def call(case: dict, of: Recorded, backend: str, k: int = 0) -> list[Tensor]:
    """The k-th call; returns what it wrote."""
    if case["op"] == "record":
        codes, scales, bad = tk.record(of.weights[k % 2], of.reference, of.bits, backend)
        return [codes, scales, bad, *of.reference]
    tk.replay(of.reference, of.codes, of.scales, of.coefficients, of.bits, backend)
    return of.reference


def smoke(case: dict, truth: str, launched: Callable[[], None]) -> dict:
    """Twice the bits of the CPU; a bad weight changes nothing."""
    torch.manual_seed(case["n"] + case["bits"])
    of = make(case, 90, "cpu")
    expected = call(case, of.copy("cpu"), truth)
    unaligned = case.get("memory") == "unaligned"
    for _ in range(2):
        mine = of.copy(DEVICE, unaligned)
        found = call(case, mine, backend_of(case))
        launched()
        wait()
        if not all(torch.equal(f.cpu(), e) for f, e in zip(found, expected, strict=True)):
            return {"result": "wrong", "note": "bits differ from the CPU's"}
        if unaligned and not mine.untouched():
            return {"result": "wrong", "note": "wrote beside an output"}
    if case["op"] == "record":
        mine = of.copy(DEVICE, unaligned)
        mine.weights[0][3][-1] = math.nan
        bad = call(case, mine, backend_of(case))[2]
        wait()
        same = zip(mine.reference, of.reference, strict=True)
        if not (bad == 1 and all(torch.equal(r.cpu(), e) for r, e in same)):
            return {"result": "wrong", "note": "a weight that is NaN was recorded"}
    return {"error": 0.0}


def peer(name: str, of: Recorded) -> Callable[[int], None]:
    """The k-th call of a peer of record."""
    targets = [torch.empty_like(w) for w in of.weights[0]]

    def unquantised(k: int) -> None:
        for w, r in zip(of.weights[k % 2], of.reference, strict=True):
            d = w - r
            r += d

    def copied(k: int) -> None:
        torch._foreach_copy_(targets, of.weights[k % 2])

    return {PEERS[0]: unquantised, PEERS[1]: copied}[name]


def speed(case: dict, timer: Callable[..., dict], most_bytes: float) -> dict:
    """Milliseconds and bytes of a case, of our backends or a peer, on about `most_bytes`."""
    op, n, bits = case["op"], case["n"], case["bits"]
    element = DTYPES[case["dtype"]].itemsize
    of_tile = {"record": 128 * (3 * element + 8), "replay": n * (16 * bits + 2) + 512}[op]
    of = make(case, max(40, int(most_bytes / of_tile)), DEVICE)
    found = {"D": of.columns}
    if case["backend"] in PEERS:
        found["bytes"] = eval(PEER_BYTES[case["backend"]], of.numbers())
        return found | timer(peer(case["backend"], of))
    found["bytes"] = bytes_of(op, of.numbers())
    return found | timer(lambda k: call(case, of, backend_of(case), k))
