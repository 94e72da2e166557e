"""Other ways to project and reconstruct on a GPU, for bench/gpucheck/speed.py: what PyTorch and
public 4-bit kernels do with the same n and D.

A peer is make(op, n, D, device) -> (run, bytes of codes and scales): run(g) of project,
run(x, center, out) of reconstruct. g, center and the result are float32, converted inside. A peer
raises what keeps it from running; the table shows that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import Published
from torch import Tensor

SMALL_INDEX = 1 << 30  # weights that kernels with 32-bit indices can address with room to spare


def dense_bfloat16(op: str, n: int, columns: int, device: torch.device):
    p = torch.randn(n, columns, dtype=torch.bfloat16, device=device)
    if op == "project":
        return lambda g: (p @ g.bfloat16()).float(), 2 * n * columns
    return (
        lambda x, center, out: torch.add(center, (x.T.bfloat16() @ p)[0], out=out),
        2 * n * columns,
    )


def compiled(bits: int):
    """Peers that dequantise, then multiply, in the form that inductor can fuse into one kernel: a
    product with a vector as multiply and sum, which is what it makes of such a product itself.

    A group of 128 columns has a bfloat16 scale; byte b holds column b, and at 4 bits column 64 + b
    above.
    """

    def make(op: str, n: int, columns: int, device: torch.device):
        groups, fields = columns // 128, 8 // bits
        shape = (n, groups, 128 // fields)
        codes = torch.empty(shape, dtype=torch.uint8, device=device).random_(0, 256)
        scales = (torch.rand(n, groups, 1, device=device) + 0.5).bfloat16()

        def dequantise() -> list[Tensor]:  # fields of (n, groups, 128 // fields)
            found = [(codes >> (bits * f)) & (2**bits - 1) for f in range(fields)]
            return [(field.bfloat16() - 2 ** (bits - 1)) * scales for field in found]

        def project(g: Tensor) -> Tensor:
            parts = g.view(groups, fields, -1).bfloat16()
            products = (p * parts[None, :, f] for f, p in enumerate(dequantise()))
            return sum(p.sum((1, 2), dtype=torch.float32) for p in products)

        def reconstruct(x: Tensor, center: Tensor, out: Tensor) -> Tensor:
            w = x.bfloat16()[:, :, None]
            # (groups, 128 // fields)
            sums = [(w * p).sum(0, dtype=torch.float32) for p in dequantise()]
            return out.copy_(center + torch.stack(sums, 1).view(-1))

        chosen = project if op == "project" else reconstruct
        run = torch.compile(chosen, dynamic=False, fullgraph=True)
        return run, codes.numel() + 2 * scales.numel()

    return make


def published(op: str, n: int, columns: int, device: torch.device):
    with torch.device(device):
        peer = Published(n, columns)
    if op == "project":
        return peer.project, n * columns
    return lambda x, center, out: out.copy_(peer.reconstruct(x, center)), n * columns


def product(make: Callable, dtype: torch.dtype = torch.bfloat16):
    """A peer of a kernel for y = W v with W (outputs, inputs) stored by rows: reconstruct needs a
    transposed copy of the codes.
    """

    def peer(op: str, n: int, columns: int, device: torch.device):
        outputs, inputs = (n, columns) if op == "project" else (columns, n)
        run, nbytes = make(outputs, inputs, device)
        if op == "project":
            return lambda g: run(g.to(dtype)[None])[0].float(), nbytes
        return lambda x, center, out: torch.add(center, run(x.T.to(dtype))[0], out=out), nbytes

    return peer


def need(outputs: int, outputs_multiple: int, inputs: int, inputs_multiple: int) -> None:
    if outputs % outputs_multiple or inputs % inputs_multiple:
        raise ValueError(
            f"outputs % {outputs_multiple} and inputs % {inputs_multiple} must be 0, found"
            f" {outputs} and {inputs}"
        )


def torch_int4(outputs: int, inputs: int, device: torch.device):
    """Kernel torch.ops.aten._weight_int4pack_mm, the GPU twin of the CPU page's int4 product."""
    need(outputs, 8, inputs, 32)
    group, inner = next(g for g in (128, 64, 32) if inputs % g == 0), 8 if inputs % 128 == 0 else 2
    shape = (outputs // 8, inputs // (16 * inner), 32, inner // 2)
    codes = torch.empty(shape, dtype=torch.int32, device=device).random_(-(2**31), 2**31)
    scales = (torch.rand(inputs // group, outputs, 2, device=device) + 0.5).bfloat16()

    def run(v: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(v, codes, group, scales)

    return run, 4 * codes.numel() + 2 * scales.numel()


def bitsandbytes_nf4(outputs: int, inputs: int, device: torch.device):
    from bitsandbytes.functional import QuantState, gemv_4bit, get_4bit_type

    need(outputs, 1, inputs, 64)
    codes = torch.empty(outputs * inputs // 2, 1, dtype=torch.uint8, device=device).random_(0, 256)
    absmax = torch.rand(outputs * inputs // 64, device=device) + 0.5
    code, shape = get_4bit_type("nf4", device=device), torch.Size((outputs, inputs))
    state = QuantState(absmax, shape, code, 64, "nf4", torch.bfloat16)
    return lambda v: gemv_4bit(v, codes.t(), state=state), codes.numel() + 4 * absmax.numel()


def gemlite_int4(outputs: int, inputs: int, device: torch.device):
    from gemlite import DType, GemLiteLinear

    need(outputs, 128, inputs, 128)
    size = {"group_size": 128, "in_features": inputs, "out_features": outputs}
    layer = GemLiteLinear(4, input_dtype=DType.FP16, output_dtype=DType.FP16, **size)
    codes = torch.empty(outputs, inputs, dtype=torch.uint8, device=device).random_(0, 16)
    scales = torch.rand(outputs * inputs // 128, 1, dtype=torch.float16, device=device) + 0.5
    layer.pack(codes, scales, torch.full_like(scales, 7.5), None)
    return layer, outputs * inputs // 2 + 4 * scales.numel()


def marlin_int4(outputs: int, inputs: int, device: torch.device):
    import marlin

    need(outputs, 256, inputs, 128)
    codes = torch.empty(inputs // 16, outputs * 2, dtype=torch.int32, device=device)
    codes.random_(-(2**31), 2**31)
    scales = torch.rand(inputs // 128, outputs, dtype=torch.float16, device=device) + 0.5
    result = torch.empty(1, outputs, dtype=torch.float16, device=device)
    workspace = torch.zeros(outputs // 128 * 8, dtype=torch.int32, device=device)

    def run(v: Tensor) -> Tensor:
        marlin.mul(v, codes, result, scales, workspace)
        return result

    return run, 4 * codes.numel() + 2 * scales.numel()


@dataclass
class Peer:
    """A row of the table.

    Args:
        bits: shown; n and D are those of our basis of as many bits (16: of 4 bits)
        memory: bytes per weight at the peak
        module: to import; "" if PyTorch has it
        largest: n * D
    """

    name: str
    bits: int
    make: Callable
    memory: float
    module: str = ""
    largest: int = 1 << 62


NF4, TORCH_INT4 = product(bitsandbytes_nf4), product(torch_int4)
GEMLITE, MARLIN = product(gemlite_int4, torch.float16), product(marlin_int4, torch.float16)
PEERS = (
    Peer("torch bfloat16 matmul", 16, dense_bfloat16, 2),
    # room for the product not being fused
    Peer("dequantise and multiply, torch.compile", 4, compiled(4), 3),
    Peer("dequantise and multiply, torch.compile", 8, compiled(8), 4),
    Peer("published arithmetic", 4, published, 9),
    Peer("torch int4 (bfloat16)", 4, TORCH_INT4, 1, largest=SMALL_INDEX),
    Peer("bitsandbytes NF4 (bfloat16)", 4, NF4, 1, "bitsandbytes", SMALL_INDEX),
    Peer("GemLite 4 bits (float16)", 4, GEMLITE, 8, "gemlite", SMALL_INDEX),
    Peer("Marlin 4 bits (float16)", 4, MARLIN, 1, "marlin", SMALL_INDEX),
)
