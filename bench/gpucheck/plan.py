"""What the check runs: the cases of each stage, what matters most first.

A case is op, backend, bits, n, dtype (of gradients, centers, weights and pack's input), and what
sets it apart; its values, joined, are its name.
"""

from __future__ import annotations

OPS = ("project", "reconstruct", "step", "pack", "unpack", "gram")
MAIN = OPS[:3]
TRAJECTORY = ("record", "replay")
EVERY = (*OPS[:4], *TRAJECTORY, "orthonormalize", *OPS[4:])
BACKENDS = ("cuda", "triton")
BITS = (4, 8, 1, 2, 3)
MODES = ("fast", "high")
#: plain PyTorch beside record: recorded.PEERS
RECORD_PEERS = ("torch, unquantised", "torch, a copy of the weights")
#: public ways to do the same: gpu_peers.PEERS by name and bits
PEERS = (
    ("torch bfloat16 matmul", 16),
    ("torch int4 (bfloat16)", 4),
    ("published arithmetic", 4),
    ("dequantise and multiply, torch.compile", 4),
    ("dequantise and multiply, torch.compile", 8),
)


def backends(op: str) -> tuple[str, ...]:
    return ("triton",) if op in ("unpack", "gram") else BACKENDS


def packed(op: str, backend: str, bits: int, n: int = 72, dtype: str = "fp32", **more) -> dict:
    return {"op": op, "backend": backend, "bits": bits, "n": n, "dtype": dtype, **more}


def gram_schmidt(backend: str, n: int, mode: str, dtype: str = "fp32") -> dict:
    return {"op": "orthonormalize", "backend": backend, "n": n, "dtype": dtype, "accuracy": mode}


def recorded(backend: str, bits: int, brief: bool = False) -> list[dict]:
    """record of one row, replay of n rows: with coefficients of 1, and of an average."""
    found = [packed("record", backend, bits, 1), packed("replay", backend, bits, 5)]
    if brief:
        return found
    found.append(packed("record", backend, bits, 1, memory="unaligned"))
    found += [packed("record", backend, bits, 1, dtype) for dtype in ("bf16", "fp16")]
    found.append(packed("replay", backend, bits, 5, memory="unaligned"))
    return found + [packed("replay", backend, bits, n, average="average") for n in (1, 72)]


def smoke(rehearse: bool) -> list[list[dict]]:
    """Groups that run side by side, each in a process."""
    if rehearse:
        return [
            [
                c
                for op in OPS
                if backend in backends(op)
                for b in BITS
                for c in _of_bits(op, backend, b, (5,))
            ]
            + [c for b in BITS for c in recorded(backend, b, True)]
            + [gram_schmidt(backend, 18, mode) for mode in MODES]
            for backend in BACKENDS
        ]
    sizes = [
        (72, "fp32"),
        (18, "fp32"),
        (18, "bf16"),
        (64, "bf16"),
        (130, "fp32"),
        (72, "fp16"),
        (1, "fp32"),
    ]
    rows = [[gram_schmidt("triton", n, m, dtype) for m in MODES] for n, dtype in sizes]
    # Triton compiles its kernels first: a process for each width, step after those it is made of.
    order = ("project", "reconstruct", "pack", "unpack", "gram", "step")
    rows += [_of_bits(op, "triton", bits) for op in order for bits in BITS]
    rows += [recorded("triton", bits) for bits in BITS]
    rows.append([c for bits in BITS for c in recorded("cuda", bits)])
    for op in OPS:
        if "cuda" in backends(op):
            rows.append([c for bits in BITS for c in _of_bits(op, "cuda", bits)])
    return [*rows, [gram_schmidt("cuda", n, m, dtype) for n, dtype in sizes for m in MODES]]


def _of_bits(
    op: str, backend: str, bits: int, sizes: tuple[int, ...] = (72, 16, 130, 1, 5)
) -> list[dict]:
    found = [packed(op, backend, bits, n) for n in sizes]
    if op in ("unpack", "gram"):
        return found
    found.insert(1, packed(op, backend, bits, sizes[0], memory="unaligned"))
    if len(sizes) > 1:
        found[2:2] = [packed(op, backend, bits, sizes[0], dtype) for dtype in ("bf16", "fp16")]
    return found


def speed(rehearse: bool) -> list[dict]:
    """One after the other, the GPU to themselves; a copy first and last."""
    copies = [packed("copy", "torch", 8, n) for n in (1, 2)]

    def row(op: str, bits: int, n: int = 72, dtype: str = "fp32") -> list[dict]:
        return [packed(op, b, bits, n, dtype) for b in backends(op)]

    if rehearse:
        recorded_too = [*row("record", 4, 1), *row("replay", 4, 5)]
        return [copies[0], *(c for op in OPS for c in row(op, 4, 5)), *recorded_too, copies[1]]
    found = [copies[0], *(c for op in OPS for c in row(op, 4))]
    found += [*row("record", 4, 1), *row("replay", 4)]
    found += [gram_schmidt(b, n, m) for n in (72, 64) for m in MODES for b in BACKENDS]
    found += [c for bits in (8, 1, 2, 3) for op in MAIN for c in row(op, bits)]
    found += [c for bits in (4, 1) for op in MAIN for c in row(op, bits, dtype="bf16")]
    found += [c for n in (16, 256) for op in MAIN for c in row(op, 4, n)]
    found += [c for bits in (8, 1) for c in row("pack", bits)]
    found += [c for bits in (8, 1) for c in row("record", bits, 1)] + row("record", 4, 1, "bf16")
    found += [c for bits in (8, 3, 2, 1) for c in row("replay", bits)]
    found += [packed("replay", b, 4, average="average") for b in BACKENDS]
    found += [packed("record", p, 16, 1, dtype) for p in RECORD_PEERS for dtype in ("fp32", "bf16")]
    peers = [packed(op, name, bits) for name, bits in PEERS for op in ("project", "reconstruct")]
    return [*found, copies[1], *peers]


def sanitized(tool: str) -> list[list[dict]]:
    """Small ones of all bits, a group for each (op, backend).

    racecheck: shared memory, which Triton's compiler guards itself.
    """
    groups = []
    for backend in BACKENDS if tool == "memcheck" else ("cuda",):
        for op in OPS:
            if backend in backends(op):
                of = [packed(op, backend, bits, 5) for bits in BITS]
                groups.append([*of, packed(op, backend, 4, 130)])
        groups.append([c for bits in BITS for c in recorded(backend, bits, True)])
        groups.append([gram_schmidt(backend, n, "high") for n in (18, 72)])
    return groups


def counted() -> list[dict]:
    """What --ncu looks at."""
    return [packed(op, "cuda", 4) for op in ("project", "reconstruct", "step", "pack")]


def variants() -> list[dict]:
    """What --variants compares: backends with more than one way to launch an op."""
    ways = [(op, "cuda") for op in ("step", "project", "reconstruct")]
    ways += [(op, "triton") for op in ("project", "reconstruct", "pack")]
    return [packed(op, backend, bits) for bits in BITS for op, backend in ways]
