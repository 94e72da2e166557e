"""Every kernel in every shipped configuration, compiled for an architecture that need not be
present: what tests, bench/static_cost.py and bench/triton_versions.py read.

No kernel is specialised on its sizes (n, segments, rows of a transform): Triton would compile 1,
multiples of 16 and other numbers apart, and what is counted for n = 64 would not hold for n = 72.
Where a size changes the code, a constant of the kernel says so (EVEN, FEW, ONE). So a compilation
here stands for all launches with its constants and dtypes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..reference import BITS, PROBES
from .config import ARCHITECTURES, configuration, isa, least_rows, warps_and_stages
from .gram import gram_kernel
from .orthonormalize import norms_kernel, products_kernel, transform_kernel, transformed_kernel
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
TYPES |= dict.fromkeys(("n", "padded", "num_segments"), "i32")
TYPES |= dict.fromkeys(("lr", "decay", "w1", "w2", "beta2", "root", "eps"), "fp32")
TYPES |= dict.fromkeys(("others", "piece_tensor", "piece_column", "piece_end"), "*i64") | dict.fromkeys(("parent", "item_piece", "extent"), "*i32")
TYPES |= dict.fromkeys(("transform", "probes"), "*fp64") | dict.fromkeys(("m", "r", "skip", "tensor", "begin", "end"), "i32")
FLOATS = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "fp64": tl.float64}


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
    small: bool = False  # codes of less than 2 GB, which AMD addresses otherwise

    @property
    def label(self) -> str:
        return f"{self.op} {self.bits} bits, {self.name}"


def variants(arch: str) -> Iterator[Variant]:
    """All that `ops.py` can launch with the shipped configurations; dtypes other than float32 at 4 bits only."""
    for v in _variants(arch):
        yield v
        if arch.startswith("gfx") and v.name in ("32 rows, fp32", "center fp32, out fp32, n even") and v.op != "gram":
            yield replace(v, name=f"{v.name}, under 2 GB", small=True)


def _variants(arch: str) -> Iterator[Variant]:
    how = isa(arch)

    def variant(op: str, bits: int, name: str, fn, config: dict, fuse: bool = True, types: dict | None = None, **constants) -> Variant:
        return Variant(op, bits, name, fn, tuple(constants.items()), config["warps"], fuse, tuple((types or {}).items()))

    for bits in BITS:
        config = configuration("project", bits, arch)
        for rows in (16, 32, 64, 128):
            dtypes = {64: tuple(FLOATS), 16: ("fp32", "bf16")}.get(rows) if bits == 4 else None
            for dtype in dtypes or ("fp32",):
                if least_rows(bits) <= rows <= config["rows"]:
                    constants = {"BITS": bits, "DTYPE": FLOATS[dtype], "ISA": how, "ROWS": rows, "TILES": config["tiles"], "STAGES": config["stages"]}
                    constants["FULL"] = 64 if rows == least_rows(bits) else 0  # what is left of n = 72
                    yield variant("project", bits, f"{rows} rows, {dtype}", project_kernel, config, **constants)
        config = configuration("reconstruct", bits, arch)
        shapes = [("fp32", "fp32", True, True, True), ("fp32", "fp32", True, False, True)]
        if bits == 4:
            shapes += [("fp32", "fp32", False, True, True), ("bf16", "bf16", True, True, True), ("fp16", "fp16", True, True, True)]
            shapes += [("bf16", "bf16", True, False, True)]
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
    yield from _orthonormalize(arch)


def _orthonormalize(arch: str) -> Iterator[Variant]:
    """The passes of block Gram-Schmidt, which know no bits. float32, float64: of the sums within a block."""
    config = configuration("orthonormalize", 4, arch)
    columns = {"COLUMNS": config["columns"]}

    def variant(name: str, fn, rows: int, types: dict | None = None, staged: dict | None = None, **constants) -> Variant:
        """staged: of a kernel whose loads are staged, as in warps_and_stages."""
        warps, stages = warps_and_stages(config, rows, **(staged or {}))
        constants |= {} if staged is None else {"STAGES": stages}
        types = {"partial": "*fp64"} | (types or {})
        return Variant("orthonormalize", 4, name, fn, tuple(constants.items()), warps, True, tuple(types.items()))

    def products(rows: int, dtype: str, fast: bool, what: str, one: bool = True, center: bool = True) -> Variant:
        """what: "differences", "made" (of rows in a workspace), "certificate" """
        same = what != "certificate"
        other = dtype if same or fast else "fp64"
        constants = {"DTYPE": FLOATS[dtype], "OTHER": FLOATS[other], "SAME": same, "DIFFERENCES": what == "differences", "HAS_CENTER": center}
        constants |= {"FLOAT32": fast, "ONE": one, "ROWS": rows, "OTHERS": rows if same else config["probes"]} | columns
        name = f"products of {what}, {rows} rows{'' if one else ' of many'}, {dtype}{'' if center else ', no center'}, {_sums(fast)}"
        return variant(name, products_kernel, rows, staged={"fast": fast}, **constants)

    def transformed(rows: int, dtype: str, fast: bool, out: str, in_place: bool = False) -> Variant:
        constants = {"DTYPE": FLOATS[dtype], "OUT": FLOATS[out or "fp32"], "STORE": bool(out), "IN_PLACE": in_place, "HAS_CENTER": True}
        constants |= {"FLOAT32": fast, "ROWS": rows, "PROBES": PROBES, "PADDED": config["probes"]} | columns
        name = f"transformed, {rows} rows, {dtype} to {out or 'products'}{' in place' if in_place else ''}, {_sums(fast)}"
        staged = {"fast": fast, "transformed": True, "in_place": in_place}
        return variant(name, transformed_kernel, rows, staged=staged, **constants)

    rows, many = config["rows"], config["many"]
    for fast in (False, True):
        for size in (16, 32, rows):
            yield products(size, "fp32", fast, "differences")
            yield transformed(size, "fp32", fast, "fp32")
        yield products(rows, "bf16", fast, "differences", center=False)
        yield products(many, "fp32", fast, "differences", one=False)
        yield products(many, "fp32", fast, "certificate", one=False, center=False)
        yield transformed(rows, "fp32", fast, "fp32", in_place=True)
        yield transformed(rows, "bf16", fast, "bf16")
        for dtype, out, differences in (("fp32", "fp32", True), ("fp32", "fp32" if fast else "fp64", False)):
            constants = {"DTYPE": FLOATS[dtype], "OUT": FLOATS[out], "DIFFERENCES": differences, "HAS_CENTER": differences, "FLOAT32": fast}
            constants |= {"MADE": config["made"], "ROWS": config["of"], "COLUMNS": config["wide"]}
            name = f"transform of {'differences' if differences else 'made'}, {dtype} to {out}, {_sums(fast)}"
            yield variant(name, transform_kernel, rows, {"to": f"*{out}"}, **constants)
    yield products(rows, "fp16", False, "differences")
    yield products(many, "fp64", False, "made", one=False, center=False)
    for size in (16, 32, rows):
        yield transformed(size, "fp32", False, "")
    yield transformed(rows, "fp16", False, "fp16")
    yield variant(f"norms, {rows} rows", norms_kernel, rows, DTYPE=tl.float32, ROWS=rows, COLUMNS=config["wide"])


def _sums(fast: bool) -> str:
    return "float32" if fast else "float64"


def specialised(variant: Variant) -> list[str]:
    """Sizes that Triton would compile several times, by their values; `padded` is always a multiple of 16."""
    types = TYPES | dict(variant.types)
    mine = [p for p in variant.fn.params if not p.is_constexpr and types[p.name] == "i32"]
    return [p.name for p in mine if not p.do_not_specialize and p.name != "padded"]


def _attributes(variant: Variant, signature: dict[str, str], arch: str) -> dict:
    """What Triton knows of the arguments at a launch: addresses and `padded` are multiples of 16,
    where the kernel lets it look. On AMD also that all tensors but the codes, and of small bases
    the codes too, have less than 2 GB."""
    known = {}
    for k, (parameter, kind) in enumerate(zip(variant.fn.params, signature.values(), strict=True)):
        pointer = kind.startswith("*")
        found = []
        if (pointer or kind == "i32") and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
            found.append(["tt.divisibility", 16])
        if pointer and arch.startswith("gfx") and (variant.small or parameter.name != "codes"):
            found.append(["tt.pointer_range", 32])
        if found:
            known[(k,)] = found
    return known


def compile_variant(variant: Variant, arch: str):
    """Triton's CompiledKernel, for NVIDIA ("sm_90") or AMD ("gfx942")."""
    constants = dict(variant.constants)
    types = TYPES | dict(variant.types)
    signature = {name: "constexpr" if name in constants else types[name] for name in variant.fn.arg_names}
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    source = ASTSource(variant.fn, signature, constants, _attributes(variant, signature, arch))
    return triton.compile(source, target=target, options={"num_warps": variant.warps, "enable_fp_fusion": variant.fuse})


__all__ = ["ARCHITECTURES", "Variant", "compile_variant", "specialised", "variants"]
