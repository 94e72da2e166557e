"""Every kernel in every shipped configuration, compiled for an architecture that need not be present: what tests and bench/static_cost.py read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..reference import BITS
from .config import ARCHITECTURES, configuration, isa, least_rows
from .gram import gram_kernel
from .pack import pack_kernel
from .project import project_kernel, sum_kernel
from .reconstruct import reconstruct_kernel
from .step import update_kernel
from .unpack import unpack_kernel

#: argument -> type; every other argument that is not a constant is a pointer of the type after the star
TYPES = {
    "codes": "*u8",
    "scales": "*u8",
    "row_scale": "*fp32",
    "item_tensor": "*i32",
    "item_tiles": "*i32",
    "item_segment": "*i32",
    "segment_begin": "*i32",
    "tables": "*i32",
    "squares": "*fp64",
} | dict.fromkeys(("rows", "center", "grads", "out", "numel", "tile_begin", "item_tile"), "*i64")
TYPES |= dict.fromkeys(("partial", "c", "x", "x_rows", "first", "second"), "*fp32")
TYPES |= dict.fromkeys(("n", "padded", "num_segments"), "i32") | dict.fromkeys(("lr", "decay", "w1", "w2", "beta2", "root", "eps"), "fp32")
FLOATS = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}


@dataclass(frozen=True)
class Variant:
    """One kernel with one set of constants."""

    op: str
    bits: int
    name: str  # what sets it apart from the op's other variants
    fn: object
    constants: tuple[tuple[str, object], ...]
    warps: int
    fuse: bool
    types: tuple[tuple[str, str], ...] = ()  # where they differ from TYPES

    @property
    def label(self) -> str:
        return f"{self.op} {self.bits} bits, {self.name}"


def variants(arch: str) -> Iterator[Variant]:
    """All that `ops.py` can launch with the shipped configurations; dtypes other than float32, and n = 1, at 4 bits only."""
    for v in _variants(arch):
        yield v
        if v.bits == 4 and v.name in ("16 rows, fp32", "center fp32, out fp32, n any", "fp32", "16 rows"):
            yield replace(v, name=f"{v.name}, n = 1", constants=(*v.constants, ("n", 1)))  # Triton compiles an argument of 1 as a constant


def _variants(arch: str) -> Iterator[Variant]:

    def variant(op: str, bits: int, name: str, fn, config: dict, fuse: bool = True, types: dict | None = None, **constants) -> Variant:
        return Variant(op, bits, name, fn, tuple(constants.items()), config["warps"], fuse, tuple((types or {}).items()))

    how = isa(arch)
    for bits in BITS:
        config = configuration("project", bits, arch)
        for rows in (16, 32, 64, 128):
            for dtype in FLOATS if bits == 4 and rows == 64 else ("fp32",):
                if least_rows(bits) <= rows <= config["rows"]:
                    constants = {"BITS": bits, "DTYPE": FLOATS[dtype], "ISA": how, "ROWS": rows, "TILES": config["tiles"], "STAGES": config["stages"]}
                    yield variant("project", bits, f"{rows} rows, {dtype}", project_kernel, config, **constants)
        config = configuration("reconstruct", bits, arch)
        shapes = [("fp32", "fp32", True, True, True), ("fp32", "fp32", True, False, True)]
        if bits == 4:
            shapes += [("fp32", "fp32", False, True, True), ("bf16", "bf16", True, True, True), ("fp16", "fp16", True, True, True)]
        if bits == 1:
            shapes += [("fp32", "fp32", True, True, False), ("fp32", "fp32", True, False, False)]
        for center, out, has_center, even, few in shapes:
            name = f"center {center if has_center else 'none'}, out {out}, n {'even' if even else 'any'}{'' if few else ' > 255'}"
            constants = {"BITS": bits, "CENTER": FLOATS[center], "OUT": FLOATS[out], "HAS_CENTER": has_center, "ISA": how}
            constants |= {"TILES": config["tiles"], "ROWS": config["rows"], "EVEN": even, "FEW": few}
            yield variant("reconstruct", bits, name, reconstruct_kernel, config, types={"codes": "*i32"}, **constants)
        config = configuration("pack", bits, arch)
        for dtype, absmax in [("fp32", False), *([("bf16", False), ("fp16", False), ("fp32", True)] if bits == 4 else [])]:
            constants = {"BITS": bits, "DTYPE": FLOATS[dtype], "CENTER": tl.float32, "HAS_CENTER": True, "ABSMAX": absmax, "TILES": config["tiles"]}
            name = f"{dtype}{', absmax' if absmax else ''}"
            yield variant("pack", bits, name, pack_kernel, config, False, {"scales": "*bf16"}, **constants)
        config = configuration("unpack", bits, arch)
        yield variant("unpack", bits, "fp32", unpack_kernel, config, False, BITS=bits, TILES=config["tiles"])
        config = configuration("gram", bits, arch)
        for rows in (16, config["rows"]):
            yield variant("gram", bits, f"{rows} rows", gram_kernel, config, BITS=bits, ROWS=rows)
    config = configuration("sum", 4, arch)
    size = {"ITEMS": config["items"], "ROWS": config["rows"]}
    yield variant("sum", 4, "second stage of project", sum_kernel, config, False, **size)
    for adamw, momentum, fresh in ((True, False, False), (False, True, False), (False, False, True)):
        constants = {"ADAMW": adamw, "MAXIMIZE": False, "MOMENTUM": momentum, "NESTEROV": momentum, "FRESH": fresh} | size
        yield variant("step", 4, "adamw" if adamw else f"sgd{', momentum' if momentum else ''}", update_kernel, config, False, **constants)


def compile_variant(variant: Variant, arch: str):
    """Triton's CompiledKernel, for NVIDIA ("sm_90") or AMD ("gfx942"). Sizes and addresses are taken as multiples of 16, as tensors' are."""
    constants = dict(variant.constants)
    types = TYPES | dict(variant.types)
    signature = {name: "constexpr" if name in constants else types[name] for name in variant.fn.arg_names}
    divisible = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t.startswith("*") or t == "i32"}
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    source = ASTSource(variant.fn, signature, constants, divisible)
    return triton.compile(source, target=target, options={"num_warps": variant.warps, "enable_fp_fusion": variant.fuse})


__all__ = ["ARCHITECTURES", "Variant", "compile_variant", "variants"]
