"""Classes of x86 instructions: those of a class cost the same on a processor (cpu_ports.py)."""

from __future__ import annotations

import re

from cpu_trace import Instruction

_VECTOR = [
    (r"v?pmuldq|v?pmuludq|v?pmadd(wd|ubsw)|v?pmul[lh]u?w|v?pmulhrsw", "multiply"),
    (r"v?pmulld", "multiply dwords"),
    (r"vpdp(busd|wssd)s?", "dot"),
    (r"v?ph(add|sub)s?[wd]|v?h(add|sub)p[sd]", "horizontal"),
    (r"v?psadbw", "sad"),
    (r"vp?blendm\w+", "blend"),
    (
        r"v?p(add|sub|abs|sign|avg|max|min|cmp(eq|gt|n?l[te]|neq|ge))u?s?[bwdq]|vpcmpn?l[te]u?[bwdq]",
        "add",
    ),
    (r"v?p(and|or|xor|andn)[dq]?|v?(and|or|xor|andn)p[sd]|vpternlog[dq]", "logic"),
    (r"vp?blend(w|d|ps|pd)|v?pblendw", "blend"),
    (r"v?p?blendv(b|ps|pd)", "blend by mask"),
    (r"v?ps(ll|ra|rl)v?[wdq]|vp(ro[lr]|shl|shr)d?v?[wdq]", "shift"),
    (r"v?(pshufb|palignr|ps[lr]ldq|insertps)", "shuffle"),
    (r"v?(punpck\w+|pshuf(d|[lh]w)|unpck[lh]p[sd]|shufp[sd])", "unpack"),
    (r"v?mov(lh|hl)ps|v?mov(s[hl]|d)dup|v?permilp[sd]", "unpack"),
    (r"v?pack[us]s\w+", "pack"),
    (r"v?pmov[sz]x\w+", "widen"),
    (r"vperm(d|q|ps|pd|b|w)|vshuf[if](32x4|64x2)|vpmov\w+", "lanes"),
    (r"vperm2[if]128", "swap lanes"),
    (r"vperm[it]2\w+", "two tables"),
    (r"vextract[if]\w+", "take lane"),
    (r"vinsert[if]\w+", "put lane"),
    (r"v?p?broadcast\w+", "broadcast"),
    (r"v?pextr[bwdq]", "element to scalar"),
    (r"v?pinsr[bwdq]", "element from scalar"),
    (r"v?(add|sub)[sp][sd]", "float add"),
    (r"v?mul[sp][sd]", "float multiply"),
    (r"v?(max|min|cmp\w*)[sp][sd]|v?u?comis[sd]", "float compare"),
    (r"vfn?m(add|sub)\d+[sp][sd]", "multiply-add"),
    (r"v?div[sp][sd]", "divide"),
    (r"v?sqrt[sp][sd]", "root"),
    (r"v?cvt(t?ps2dq|dq2ps)|v?roundp[sd]|vrndscalep[sd]", "convert"),
    (r"v?cvt(dq2pd|ps2pd|pd2psy?|t?pd2dqy?|ph2ps|ps2ph)", "convert wide"),
    (r"v?cvt(ss2sd|sd2ss)|v?rounds[sd]", "convert scalar"),
    (r"v?cvtu?si2s[sd][lq]?", "scalar to float"),
    (r"v?cvtt?s[sd]2u?siq?", "convert wide"),
]
_SCALAR = [
    (r"i?mul[bwlq]?|mulx", "scalar multiply"),
    (r"i?div[bwlq]?", "scalar divide"),
    (r"call", "call"),
    (r"ret", "return"),
    (r"j\w+", "branch"),
    (r"nop\w*|endbr64|sfence|vzeroupper", "nothing"),
    (
        r"(add|sub|adc|sbb|and|or|xor|cmp|test|neg|not|inc|dec|sh[lrx]+d?|sa[lrx]+|ro[lrx]+|bt|lea|andn)[bwlq]?"
        r"|cmov\w+|set\w+|c[lw]t[qld]|cqto|cltd|xchg|bswap|bs[rf]|[lt]zcnt|popcnt|b(zhi|extr|lsr)",
        "scalar",
    ),
]
_MOVE = re.compile(r"v?mov(dq[au](8|16|32|64)?|[au]p[sd]|s[sd]|nt\w+|[lh]p[sd]|[dq])|vlddqu")
_SCALAR_MOVE = re.compile(r"mov([sz][bwl][wlq]|abs|slq|[bwlq])?")


def _of(table: list[tuple[str, str]], op: str) -> str | None:
    return next((name for pattern, name in table if re.fullmatch(pattern, op)), None)


def classify(instruction: Instruction) -> tuple[list[str], int]:
    """Classes whose ports an instruction takes, and the bits of its vectors (0: scalar).

    Raises:
        ValueError: it is in no class
    """
    op, _, rest = instruction.text.partition(" ")
    operands = re.findall(r"(?:[^,(]|\([^)]*\))+", re.sub(r"\{[^}]*\}|<.*>", "", rest).strip())
    operands = [operand.strip() for operand in operands]
    bits = 512 if "%zmm" in rest else 256 if "%ymm" in rest else 128 if "%xmm" in rest else 0
    memory = ["(" in operand for operand in operands] or [False]
    compares = re.match(r"(cmp|test|v?u?comis)", op)
    store, load = memory[-1] and not compares, any(memory[:-1]) or (memory[-1] and bool(compares))
    mask = "%k" in re.sub(r"\{[^}]*\}", "", rest)
    if op.startswith("prefetch"):
        return ["load"], 0
    if op in ("push", "pushq"):
        return ["store"], 0
    if op in ("pop", "popq", "leave", "leaveq"):
        return ["load"], 0
    if op.startswith("rep"):  # stepped through word by word
        return ["load", "store"] if "movs" in rest else ["store"], 0
    if op.startswith(("nop", "lea")):
        load = store = False
    if op.startswith("k") and mask:
        to_scalar = op.startswith("kmov") and not operands[-1].startswith("%k") and not store
        from_scalar = op.startswith("kmov") and not operands[0].startswith("%k") and not load
        name = "mask to scalar" if to_scalar else "mask from scalar" if from_scalar else "mask"
        return [name], 0
    if re.fullmatch(r"vp?maskmov\w+", op):
        return ["vector store"] if store else ["blend", "load"], bits
    if bits:
        if _MOVE.fullmatch(op):
            wide = ["%" in o and not re.match(r"%[xyz]mm", o) for o in operands]
            if load or store:
                merges = load and op.endswith(("hps", "hpd", "lps", "lpd"))
                first = ["load"] if load else ["vector store"]
                return first + ["unpack"] * merges, bits
            if any(wide):
                return ["to scalar" if wide[-1] else "from scalar"], 128
            return ["unpack" if op.endswith(("ss", "sd")) else "move"], bits
        name = _of(_VECTOR, op)
        same = len(operands) >= 2 and operands[0] == operands[1]
        if same and re.fullmatch(r"v?p?xor(ps|pd|d|q)?", op):
            name = "move"
        if (name == "add" and mask) or op.startswith("vptest"):
            name = "compare to mask"
        if name == "broadcast" and load:
            return ["broadcast load"], bits
        if name == "broadcast" and not re.match(r"%[xyz]mm", operands[0]):
            return ["from scalar", "broadcast"], bits
        if name == "put lane" and load:
            name = "logic"  # a blend with what was loaded
        if name == "take lane" and store:
            return ["vector store"], 128
    elif _SCALAR_MOVE.fullmatch(op):
        return (["load"] if load else ["store"] if store else ["move"]), 0
    else:
        name = _of(_SCALAR, op)
        if instruction.fused:
            name = "fused branch"
    if name is None:
        raise ValueError(
            f"no entry for the instruction `{instruction.text}`: add its class to"
            " bench/cpu_classes.py"
        )
    changes = store and not compares and name != "call"  # reads, changes and writes memory
    return (
        [name]
        + ["load"] * (load or (changes and not bits))
        + ["vector store" if bits else "store"] * changes
    ), bits
