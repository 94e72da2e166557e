"""Every kernel in every shipped configuration, compiled ahead of time.

For an architecture that need not be present: what tests, bench/static_cost.py and
bench/triton_versions.py read.

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
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from ...layout import BITS
from ...operands import PROBES
from .config import ARCHITECTURES, configuration, isa, least_rows, warps_and_stages
from .gram import gram_kernel
from .orthonormalize import norms_kernel, products_kernel, transform_kernel, transformed_kernel
from .pack import pack_kernel
from .project import GROUPS, group_kernel, project_kernel, sum_kernel
from .reconstruct import reconstruct_kernel
from .record import look_kernel, record_kernel
from .replay import replay_kernel
from .step import update_kernel
from .unpack import unpack_kernel


def _parts(bits: int) -> list[tuple[int, int]]:
    """(rows, more) that a program of project may take."""
    powers = [size for size in (16, 32, 64, 128) if size >= least_rows(bits)]
    pairs = [(rows, more) for rows in powers for more in (0, *powers) if more < rows]
    return sorted(pairs, key=lambda pair: (sum(pair), pair))


#: argument -> type; every other argument that is not a constant is a pointer of the type after the
#: star
TYPES = {
    **dict.fromkeys(("codes", "scales"), "*u8"),
    **dict.fromkeys(("item_tensor", "item_tiles", "item_segment", "segment_begin"), "*i32"),
    **dict.fromkeys(("tables", "parent", "item_piece", "extent", "bad"), "*i32"),
    **dict.fromkeys(("rows", "others", "center", "grads", "out"), "*i64"),
    **dict.fromkeys(("weights", "reference", "item_begin"), "*i64"),
    **dict.fromkeys(("numel", "tile_begin", "item_tile"), "*i64"),
    **dict.fromkeys(("piece_tensor", "piece_column", "piece_end"), "*i64"),
    **dict.fromkeys(("row_scale", "partial", "c", "x", "x_rows", "first", "second"), "*fp32"),
    **dict.fromkeys(("squares", "transform", "probes", "groups"), "*fp64"),
    **dict.fromkeys(("n", "padded", "num_segments", "count"), "i32"),
    **dict.fromkeys(("m", "r", "skip", "tensor", "begin", "end"), "i32"),
    **dict.fromkeys(("lr", "decay", "w1", "w2", "beta2", "root", "eps"), "fp32"),
}
#: rows at a time that `row_parts` chooses for project
PARTS = {bits: _parts(bits) for bits in BITS}
FLOATS = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "fp64": tl.float64}


@dataclass(frozen=True)
class Variant:
    """One kernel with one set of constants."""

    op: str
    bits: int
    name: str  # what sets it apart from the op's other variants
    fn: JITFunction
    constants: tuple[tuple[str, object], ...]
    warps: int
    fuse: bool
    types: tuple[tuple[str, str], ...] = ()  # where they differ from TYPES
    small: bool = False  # codes of less than 2 GB, which AMD addresses otherwise

    @property
    def label(self) -> str:
        """Op, bits and name, for tables."""
        return f"{self.op} {self.bits} bits, {self.name}"


def variants(arch: str) -> Iterator[Variant]:
    """All that can be launched with the shipped configurations.

    Dtypes other than float32 at 4 bits only.
    """
    for v in _variants(arch):
        yield v
        amd = arch.startswith("gfx") and v.op != "gram"
        if amd and v.name in ("32 rows, fp32", "center fp32, out fp32, n even"):
            yield replace(v, name=f"{v.name}, under 2 GB", small=True)


def _variants(arch: str) -> Iterator[Variant]:
    how = isa(arch)

    def variant(
        op: str,
        bits: int,
        name: str,
        fn: JITFunction,
        config: dict[str, int],
        constants: dict[str, object],
        fuse: bool = True,
        types: dict[str, str] | None = None,
    ) -> Variant:
        listed = tuple((types or {}).items())
        return Variant(op, bits, name, fn, tuple(constants.items()), config["warps"], fuse, listed)

    for bits in BITS:
        config = configuration("project", bits, arch)
        for rows, more in PARTS[bits]:
            if rows + more > config["rows"]:
                continue
            dtypes = tuple(FLOATS) if (bits, rows, more) == (4, 64, 0) else ("fp32",)
            for dtype in dtypes:
                constants = dict(BITS=bits, DTYPE=FLOATS[dtype], ISA=how, ROWS=rows, MORE=more)
                constants |= dict(TILES=config["tiles"], STAGES=config["stages"])
                name = f"{rows}{f' + {more}' if more else ''} rows, {dtype}"
                yield variant("project", bits, name, project_kernel, config, constants)
        config = configuration("reconstruct", bits, arch)
        # Dtypes of center and weights, whether there is a center, EVEN, FEW.
        shapes = [("fp32", "fp32", True, True, True), ("fp32", "fp32", True, False, True)]
        if bits == 4:
            shapes += [("fp32", "fp32", False, True, True)]
            shapes += [("bf16", "bf16", True, True, True), ("fp16", "fp16", True, True, True)]
            shapes += [("bf16", "bf16", True, False, True)]
        if bits == 1:
            shapes += [("fp32", "fp32", True, True, False), ("fp32", "fp32", True, False, False)]
        for center, out, has_center, even, few in shapes:
            name = f"center {center if has_center else 'none'}, out {out}"
            name += f", n {'even' if even else 'any'}{'' if few else ' > 255'}"
            constants = dict(BITS=bits, CENTER=FLOATS[center], OUT=FLOATS[out], ISA=how)
            constants |= dict(HAS_CENTER=has_center, EVEN=even, FEW=few)
            constants |= dict(TILES=config["tiles"], ROWS=config["rows"])
            types = {"codes": "*i32"}
            yield variant(
                "reconstruct", bits, name, reconstruct_kernel, config, constants, types=types
            )
        config = configuration("pack", bits, arch)
        for dtype in ("fp32", "bf16", "fp16") if bits == 4 else ("fp32",):
            constants = dict(BITS=bits, DTYPE=FLOATS[dtype], CENTER=tl.float32, HAS_CENTER=True)
            constants |= dict(TILES=config["tiles"])
            types = {"scales": "*bf16"}
            yield variant("pack", bits, dtype, pack_kernel, config, constants, False, types)
        config = configuration("record", bits, arch)
        for dtype in ("fp32", "bf16", "fp16") if bits == 4 else ("fp32",):
            constants = dict(BITS=bits, DTYPE=FLOATS[dtype], TILES=config["tiles"])
            types = {"scales": "*bf16"}
            yield variant("record", bits, dtype, record_kernel, config, constants, False, types)
        config = configuration("replay", bits, arch)
        constants = dict(BITS=bits, ISA=how, TILES=config["tiles"], ROWS=config["rows"])
        yield variant("replay", bits, "fp32", replay_kernel, config, constants, False)
        config = configuration("unpack", bits, arch)
        constants = dict(BITS=bits, TILES=config["tiles"])
        yield variant("unpack", bits, "fp32", unpack_kernel, config, constants, False)
        config = configuration("gram", bits, arch)
        for rows in (16, config["rows"]):
            constants = dict(BITS=bits, ROWS=rows)
            yield variant("gram", bits, f"{rows} rows", gram_kernel, config, constants)
    config = configuration("look", 4, arch)
    for dtype in ("fp32", "bf16", "fp16"):
        constants = dict(DTYPE=FLOATS[dtype], TILES=config["tiles"])
        yield variant("record", 4, f"look at {dtype}", look_kernel, config, constants)
    config = configuration("sum", 4, arch)
    size: dict[str, object] = dict(ITEMS=config["items"], ROWS=config["rows"])
    yield variant("sum", 4, "second stage of project", sum_kernel, config, size, False)
    of_groups = {"partial": "*fp64"}
    yield variant("sum", 4, "of groups", sum_kernel, config, size, False, of_groups)
    grouped = size | dict(GROUPS=GROUPS)
    yield variant("sum", 4, "in groups", group_kernel, config, grouped, False)
    for adamw, momentum, fresh in (
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ):
        constants = dict(ADAMW=adamw, MAXIMIZE=False, MOMENTUM=momentum, NESTEROV=momentum)
        constants |= dict(FRESH=fresh) | size
        name = "adamw" if adamw else "sgd, momentum" if momentum else "sgd"
        yield variant("step", 4, name, update_kernel, config, constants, False)
    yield from _orthonormalize(arch)


def _orthonormalize(arch: str) -> Iterator[Variant]:
    """The passes of block Gram-Schmidt, which know no bits.

    float32, float64 in a name: of the sums within a block.
    """
    config = configuration("orthonormalize", 4, arch)

    def variant(
        name: str,
        fn: JITFunction,
        rows: int,
        constants: dict[str, object],
        types: dict[str, str] | None = None,
        staged: dict[str, bool] | None = None,
    ) -> Variant:
        """Variant of one kernel. staged: its loads are, with these kinds of warps_and_stages."""
        warps, stages = warps_and_stages(config, rows, **(staged or {}))
        if staged is not None:
            constants = constants | {"STAGES": stages}
        listed = tuple(({"partial": "*fp64"} | (types or {})).items())
        return Variant("orthonormalize", 4, name, fn, tuple(constants.items()), warps, True, listed)

    def products(
        rows: int, dtype: str, fast: bool, what: str, one: bool = True, center: bool = True
    ) -> Variant:
        """Variant of products_kernel.

        what: "differences", "made" (of rows in a workspace), "certificate"
        """
        same = what != "certificate"
        other = dtype if same or fast else "fp64"
        constants: dict[str, object] = dict(DTYPE=FLOATS[dtype], OTHER=FLOATS[other], SAME=same)
        constants |= dict(DIFFERENCES=what == "differences", HAS_CENTER=center, FLOAT32=fast)
        constants |= dict(ONE=one, ROWS=rows, OTHERS=rows if same else config["probes"])
        constants |= dict(COLUMNS=config["columns"])
        name = f"products of {what}, {rows} rows{'' if one else ' of many'}, {dtype}"
        name += f"{'' if center else ', no center'}, {_sums(fast)}"
        return variant(name, products_kernel, rows, constants, staged={"fast": fast})

    def transformed(rows: int, dtype: str, fast: bool, out: str, in_place: bool = False) -> Variant:
        constants: dict[str, object] = dict(DTYPE=FLOATS[dtype], OUT=FLOATS[out or "fp32"])
        constants |= dict(STORE=bool(out), IN_PLACE=in_place, HAS_CENTER=True, FLOAT32=fast)
        constants |= dict(ROWS=rows, PROBES=PROBES, PADDED=config["probes"])
        constants |= dict(COLUMNS=config["columns"])
        name = f"transformed, {rows} rows, {dtype} to {out or 'products'}"
        name += f"{' in place' if in_place else ''}, {_sums(fast)}"
        staged = {"fast": fast, "transformed": True, "in_place": in_place}
        return variant(name, transformed_kernel, rows, constants, staged=staged)

    def transform(out: str, differences: bool, fast: bool) -> Variant:
        constants: dict[str, object] = dict(DTYPE=FLOATS["fp32"], OUT=FLOATS[out], FLOAT32=fast)
        constants |= dict(DIFFERENCES=differences, HAS_CENTER=differences)
        constants |= dict(MADE=config["made"], ROWS=config["of"], COLUMNS=config["wide"])
        what = "differences" if differences else "made"
        name = f"transform of {what}, fp32 to {out}, {_sums(fast)}"
        return variant(name, transform_kernel, rows, constants, {"to": f"*{out}"})

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
        yield transform("fp32", True, fast)
        yield transform("fp32" if fast else "fp64", False, fast)
    yield products(rows, "fp16", False, "differences")
    yield products(many, "fp64", False, "made", one=False, center=False)
    for size in (16, 32, rows):
        yield transformed(size, "fp32", False, "")
    yield transformed(rows, "fp16", False, "fp16")
    last: dict[str, object] = dict(DTYPE=tl.float32, ROWS=rows, COLUMNS=config["wide"])
    yield variant(f"norms, {rows} rows", norms_kernel, rows, last)


def _sums(fast: bool) -> str:
    return "float32" if fast else "float64"


def specialised(variant: Variant) -> list[str]:
    """Sizes that Triton would compile several times, by their values.

    `padded` is none of them: it is always a multiple of 16.
    """
    types = TYPES | dict(variant.types)
    mine = [p for p in variant.fn.params if not p.is_constexpr and types[p.name] == "i32"]
    return [p.name for p in mine if not p.do_not_specialize and p.name != "padded"]


def _attributes(
    variant: Variant, signature: dict[str, str], arch: str
) -> dict[tuple[int], list[list[str | int]]]:
    """What Triton knows of the arguments at a launch.

    Addresses and `padded` are multiples of 16, where the kernel lets it look. On AMD also that all
    tensors but the codes, and of small bases the codes too, have less than 2 GB.
    """
    known: dict[tuple[int], list[list[str | int]]] = {}
    for k, (parameter, kind) in enumerate(zip(variant.fn.params, signature.values(), strict=True)):
        pointer = kind.startswith("*")
        unseen = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        found: list[list[str | int]] = []
        if (pointer or kind == "i32") and not unseen:
            found.append(["tt.divisibility", 16])
        if pointer and arch.startswith("gfx") and (variant.small or parameter.name != "codes"):
            found.append(["tt.pointer_range", 32])
        if found:
            known[(k,)] = found
    return known


def compile_variant(variant: Variant, arch: str) -> CompiledKernel:
    """The variant compiled for NVIDIA ("sm_90") or AMD ("gfx942")."""
    constants = dict(variant.constants)
    types = TYPES | dict(variant.types)
    signature = {
        name: "constexpr" if name in constants else types[name] for name in variant.fn.arg_names
    }
    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64)
    else:
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    source = ASTSource(variant.fn, signature, constants, _attributes(variant, signature, arch))
    options = {"num_warps": variant.warps, "enable_fp_fusion": variant.fuse}
    return triton.compile(source, target=target, options=options)


__all__ = ["ARCHITECTURES", "Variant", "compile_variant", "specialised", "variants"]
