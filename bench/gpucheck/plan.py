"""What the check runs: the cases of each stage, what matters most first.

A case is op, backend, bits, n, dtype (of gradients, centers, weights and pack's input), and what
sets it apart; its values, joined, are its name.
"""

from __future__ import annotations

OPS = ("project", "reconstruct", "step", "pack", "unpack", "gram")
MAIN = OPS[:3]
BACKENDS = ("cuda", "triton")
BITS = (4, 8, 1, 2, 3)
MODES = ("fast", "high")
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
            + [gram_schmidt(backend, 18, mode) for mode in MODES]
            for backend in BACKENDS
        ]
    groups = []
    for op in OPS:
        for backend in backends(op):
            # Triton compiles each of its kernels first: several processes.
            for bits in ((4,), (8, 3), (1, 2)) if backend == "triton" else (BITS,):
                groups.append([c for b in bits for c in _of_bits(op, backend, b)])
    sizes = [
        (72, "fp32"),
        (18, "fp32"),
        (18, "bf16"),
        (64, "bf16"),
        (130, "fp32"),
        (72, "fp16"),
        (1, "fp32"),
    ]
    groups += [
        [gram_schmidt(b, n, m, dtype) for n, dtype in sizes for m in MODES] for b in BACKENDS
    ]
    return groups


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
        return [copies[0], *(c for op in OPS for c in row(op, 4, 5)), copies[1]]
    found = [copies[0], *(c for op in OPS for c in row(op, 4))]
    found += [gram_schmidt(b, n, m) for n in (72, 64) for m in MODES for b in BACKENDS]
    found += [c for bits in (8, 1, 2, 3) for op in MAIN for c in row(op, bits)]
    found += [c for bits in (4, 1) for op in MAIN for c in row(op, bits, dtype="bf16")]
    found += [c for n in (16, 256) for op in MAIN for c in row(op, 4, n)]
    found += [c for bits in (8, 1) for c in row("pack", bits)]
    found += [packed(op, name, bits) for name, bits in PEERS for op in ("project", "reconstruct")]
    return [*found, copies[1]]


def sanitized(tool: str) -> list[dict]:
    """Small ones, all bits. racecheck: shared memory, which Triton's compiler guards itself."""
    mine = BACKENDS if tool == "memcheck" else ("cuda",)
    found = [
        packed(op, backend, bits, n)
        for backend in mine
        for n, every in ((5, BITS), (130, (4,)))
        for bits in every
        for op in OPS
        if backend in backends(op)
    ]
    return found + [gram_schmidt(b, n, "high") for b in mine for n in (18, 72)]


def counted() -> list[dict]:
    """What --ncu looks at."""
    return [packed(op, "cuda", 4) for op in ("project", "reconstruct", "step", "pack")]


def variants() -> list[dict]:
    """What --variants compares: backends with more than one way to launch an op."""
    ways = [("project", "triton"), ("reconstruct", "triton"), ("pack", "triton"), ("step", "cuda")]
    return [packed(op, backend, bits) for bits in BITS for op, backend in ways]
