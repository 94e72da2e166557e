"""Triton's interpreter, for a test suite: with the kernels' inline assembly, and quick enough.

conftest.py installs it where there is no GPU.

Assembly   The interpreter has none. Here each block is parsed and run on NumPy arrays, instruction
           by instruction as the manual of PTX defines them, so that the very strings that ship are
           what the tests run. LLVM's intrinsics for AMD likewise, by their names.
Rounding   The interpreter truncates float32 to bfloat16; compiled code rounds to nearest even, and
           so does this.
Speed      The interpreter prepares the language module anew at every call of a helper function,
           which would be half of the suite's time; once per kernel launch is enough.
Indices    Triton before 3.8 takes int() of an array of one element, which NumPy refuses from 2.4
           on. `mend_indices` alone will do for a script that runs kernels without the assembly.
"""

import functools
import re

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from twa_kernels.backends.triton import words

# Assembly -----------------------------------------------------------------------------------------


def _byte(word, k):
    return (word >> np.uint32(8 * k)) & np.uint32(255)


def _pick(low, high, index):
    """Byte `index` (array, 0 to 7) of the eight bytes of low and high."""
    both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    return ((both >> (8 * index).astype(np.uint64)) & np.uint64(255)).astype(np.uint32)


def prmt(a, b, selector):
    out = np.zeros_like(a)
    for k in range(4):
        nibble = (selector >> np.uint32(4 * k)) & np.uint32(15)
        byte = _pick(a, b, nibble & 7)
        sign = np.where(byte & 128, np.uint32(255), np.uint32(0))
        out |= np.where(nibble & 8, sign, byte).astype(np.uint32) << np.uint32(8 * k)
    return out


def v_perm(high, low, selector):
    out = np.zeros_like(low)
    for k in range(4):
        index = _byte(selector, k)
        assert (index < 8).all(), "the special selectors of v_perm_b32 are not used"
        out |= _pick(low, high, index) << np.uint32(8 * k)
    return out


def dp4a(a, b, c):
    total = c.view(np.int32).astype(np.int64)
    for k in range(4):
        total = total + _byte(a, k).astype(np.uint8).view(np.int8).astype(np.int64) * _byte(
            b, k
        ).astype(np.uint8).view(np.int8)
    assert (np.abs(total) < 2**31).all(), "an int32 sum overflowed"
    return total.astype(np.int32).view(np.uint32)


def dp2a(first_byte):
    """Two 16-bit numbers of a times bytes first_byte and first_byte + 1 of b, plus c."""

    def run(a, b, c):
        total = c.view(np.int32).astype(np.int64)
        for k in range(2):
            half = (
                ((a >> np.uint32(16 * k)) & np.uint32(0xFFFF))
                .astype(np.uint16)
                .view(np.int16)
                .astype(np.int64)
            )
            total = total + half * _byte(b, first_byte + k).astype(np.uint8).view(np.int8)
        assert (np.abs(total) < 2**31).all(), "an int32 sum overflowed"
        return total.astype(np.int32).view(np.uint32)

    return run


def round_to_int(v):
    """float32 -> int32, to nearest even; NaN gives 0, and what is too large the nearest."""
    v = np.nan_to_num(np.rint(v.view(np.float32).astype(np.float64)), nan=0.0)
    return np.clip(v, -(2.0**31), 2.0**31 - 1).astype(np.int32).view(np.uint32)


INSTRUCTIONS = {
    "cvt.rni.s32.f32": round_to_int,
    "mov.b32": lambda a: a,
    "popc.b32": lambda a: sum((a >> np.uint32(k)) & np.uint32(1) for k in range(32)),
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": prmt,
    "dp4a.s32.s32": dp4a,
    "dp2a.lo.s32.s32": dp2a(0),
    "dp2a.hi.s32.s32": dp2a(2),
}
#: LLVM's names of AMD's instructions
INTRINSICS = {"llvm.amdgcn.perm": v_perm, "llvm.amdgcn.sdot4": lambda a, b, c, clamp: dp4a(a, b, c)}


@functools.cache
def _parse(asm):
    """[(instruction, destination, sources)]"""
    lines = [
        line.strip()
        for line in re.split(r"[;\n]", asm.replace("{", "").replace("}", ""))
        if line.strip()
    ]
    parsed = []
    for line in lines:
        name, _, operands = line.partition(" ")
        if name != ".reg":
            to, *sources = [operand.strip() for operand in operands.split(",")]
            parsed.append((name, to, tuple(sources)))
    return parsed


def run_assembly(asm, outputs, words):
    """`words`: uint32 arrays of one shape, the inputs in order. Returns the outputs."""
    registers = {f"${outputs + k}": word for k, word in enumerate(words)}

    def value(operand):
        if operand == "%lanemask_eq":
            return np.uint32(1) << (np.arange(len(words[0]), dtype=np.uint32) % np.uint32(32))
        if re.fullmatch(r"0x[0-9a-f]+|\d+", operand):
            return np.full_like(words[0], int(operand, 0))
        return registers[operand]  # KeyError: read before it was written

    with np.errstate(over="ignore"):
        for name, to, sources in _parse(asm):
            registers[to] = INSTRUCTIONS[name](*(value(s) for s in sources))
    return [registers[f"${k}"] for k in range(outputs)]


def _array(a):
    """NumPy array of a tensor, a constant or a number."""
    if isinstance(a, tl.tensor):
        return a.handle.data
    return np.array(a.value if isinstance(a, tl.constexpr) else a)


def _tensor(data, kind):
    shape = list(data.shape)
    return tl.tensor(
        interpreter.TensorHandle(data, kind), tl.block_type(kind, shape) if shape else kind
    )


def _inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack, _semantic=None):
    asm, constraints = (v.value if isinstance(v, tl.constexpr) else v for v in (asm, constraints))
    arrays = [_array(a) for a in args]
    shape = np.broadcast_shapes(*(a.shape for a in arrays))
    size = 4 // pack  # bytes of an element
    assert size in (1, 4) and is_pure
    words = []
    for array in arrays:
        bits = (
            array.astype({1: np.uint8, 4: np.int64}[size])
            if array.dtype.itemsize != size
            else array
        )
        bits = bits.astype(np.uint32) if size == 4 and bits.dtype.itemsize == 8 else bits
        words.append(np.ascontiguousarray(np.broadcast_to(bits, shape)).reshape(-1).view(np.uint32))
    results = run_assembly(asm, constraints.count("="), words)
    dtypes = dtype if isinstance(dtype, (tuple, tl.tuple)) else (dtype,)
    out = []
    for word, kind in zip(results, dtypes, strict=True):
        data = word.view({1: np.int8, 4: np.int32}[size]).reshape(shape)
        out.append(_tensor(data, kind))
    return out[0] if len(out) == 1 else tuple(out)


def _extern_elementwise(lib_name, lib_path, args, arg_type_symbol_dict, is_pure, _semantic=None):
    ((symbol, kind),) = arg_type_symbol_dict.values()
    assert (lib_name, lib_path, is_pure) == ("", "", True)
    shape = np.broadcast_shapes(*(_array(a).shape for a in args))
    words = [np.broadcast_to(_array(a).astype(np.int64).astype(np.uint32), shape) for a in args]
    with np.errstate(over="ignore"):
        data = INTRINSICS[symbol](*words).view(np.int32)
    return _tensor(data, kind)


# Rounding -----------------------------------------------------------------------------------------


def to_bfloat16(v):
    """float32 -> bits of bfloat16, to nearest even; NaN stays NaN."""
    bits = v.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(v), np.uint64(0x7FC0), rounded).astype(np.uint16)


# Speed --------------------------------------------------------------------------------------------


class _Nothing:
    def restore(self):
        pass


def mend_indices():
    """A tensor of one element is an index, whatever its shape. Call before the first kernel."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor


def install():
    mend_indices()
    convert = interpreter._convert_float

    def convert_rounded(data, from_type, to_type, mode):
        if from_type == tl.float32 and to_type == tl.bfloat16:
            return to_bfloat16(np.ascontiguousarray(data))
        return convert(data, from_type, to_type, mode)

    interpreter._convert_float = convert_rounded
    prepare, launch, prepared = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def prepare_once(fn):
        modules = frozenset(id(v) for v in fn.__globals__.values() if v is tl or v is tl.core)
        if modules in prepared:
            return _Nothing()
        prepared.add(modules)
        return prepare(fn)

    def launch_afresh(self, *args, **kwargs):
        prepared.clear()
        with np.errstate(
            invalid="ignore"
        ):  # NaN to an integer: any number will do, since the unit is NaN
            return launch(self, *args, **kwargs)

    interpreter._patch_lang = prepare_once
    interpreter.GridExecutor.__call__ = launch_afresh
    tl.inline_asm_elementwise = tl.core.inline_asm_elementwise = _inline_asm_elementwise
    tl.core.extern_elementwise = _extern_elementwise
    for name in ("amd_perm", "amd_dot4"):  # what Triton gives functions of its own only
        given = functools.partial(getattr(words, name).__wrapped__, _semantic=object())
        setattr(words, name, given)
