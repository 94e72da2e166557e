"""What instructions cost on processors: micro-operations, and the ports that can execute them.

Facts from Agner Fog's tables, uops.info and the makers' optimisation guides; Zen 4's were measured.
A lower bound: latencies, caches and mispredicted branches are left out, and a move between
registers takes no port.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cpu_classes import classify
from cpu_trace import Instruction


@dataclass(frozen=True)
class Core:
    """A processor's core.

    Args:
        width: micro-operations that it renames in a cycle
        ports: for each class of instruction its micro-operations, separated by spaces, each by the
            letters of the ports that can take it, with ":2" where it keeps one for two cycles;
            "-": a micro-operation that needs no port
        bits: of its vector units; wider operations are as many micro-operations as it takes
        ymm: ports of classes that are not simply that, or not the same, for 256-bit operations
        zmm: ports of 512-bit operations for those of 256; None: it has none
        zmm_cycles: that these keep a port
        tiers: of the kernels that it runs
    """

    name: str
    width: int
    ports: dict[str, str]
    bits: int = 256
    ymm: dict[str, str] = field(default_factory=dict)
    zmm: dict[str, str] | None = None
    zmm_cycles: int = 1
    tiers: tuple[str, ...] = ("portable", "avx2")


_ZEN = {
    # integer: ALUs abcd; loads and stores XYZS; vectors 0123
    "scalar": "abcd",
    "scalar multiply": "b",
    "scalar divide": "c:10 c",
    "branch": "ad",
    "fused branch": "",
    "call": "S ad",
    "return": "XY ad",
    "move": "-",
    "nothing": "-",
    "load": "XY",
    "store": "S",
    "vector store": "S 2",
    "multiply": "0",
    "multiply dwords": "0:2",
    "horizontal": "12 12 013",
    "sad": "0",
    "add": "013",
    "logic": "0123",
    "blend": "013",
    "blend by mask": "0",
    "shift": "2",
    "shuffle": "12",
    "unpack": "12",
    "pack": "12",
    "widen": "12",
    "lanes": "12 2",
    "swap lanes": "2",
    "take lane": "2",
    "put lane": "2",
    "broadcast": "12",
    "broadcast load": "XY",
    "to scalar": "2",
    "from scalar": "2",
    "element to scalar": "12 2",
    "element from scalar": "12 2",
    "float add": "23",
    "float multiply": "01",
    "float compare": "01",
    "multiply-add": "01",
    "divide": "3:3",
    "root": "3:5",
    "convert": "3",
    "convert wide": "12 3",
    "convert scalar": "3",
    "scalar to float": "2 3",
}
ZEN1 = Core(
    "Zen 1",
    6,
    # 128-bit units; two addresses a cycle for loads and stores together
    _ZEN | {"store": "XY", "vector store": "XY 2"},
    bits=128,
    ymm={
        "widen": "12 12",
        "lanes": "12 12 12",
        "swap lanes": "012 012 012 012 012 012 012 012",
        "take lane": "013",
        "put lane": "013 013",
        "broadcast": "12 12",
        "convert wide": "12 3 3",
    },
)
ZEN2 = Core("Zen 2", 6, _ZEN, ymm={"widen": "12 12"})
_ZEN3 = _ZEN | {
    "branch": "de",
    "call": "S de",
    "return": "XY de",
    "vector store": "S",  # stores and moves to scalar registers have ports of their own
    "to scalar": "E",
    "from scalar": "E",
    "element to scalar": "12 E",
    "element from scalar": "12 E",
    "scalar to float": "E 23",
    "multiply": "03",
    "multiply dwords": "03",
    "sad": "03",
    "add": "0123",
    "blend": "0123",
    "blend by mask": "01",
    "shift": "12",
    "lanes": "1 12",
    "swap lanes": "1",
    "take lane": "1",
    "put lane": "1",
    "convert": "23",
    "convert wide": "12 23",
    "convert scalar": "23",
    "divide": "1:3",
    "root": "1:5",
}
ZEN3 = Core("Zen 3", 6, _ZEN3, ymm={"widen": "12 12", "broadcast": "1"})
_ZEN4 = _ZEN3 | {
    "multiply": "01",
    "multiply dwords": "01",
    "dot": "01",
    "sad": "01",
    "unpack": "123",
    "lanes": "12",
    "swap lanes": "12",
    "take lane": "12",
    "put lane": "12",
    "two tables": "12",
    "mask": "12",
    "compare to mask": "01",
    "mask from scalar": "E",
    "mask to scalar": "E",
}
#: 512-bit operations are one micro-operation that keeps its port for two cycles
ZEN4 = Core(
    "Zen 4", 6, _ZEN4, zmm={}, zmm_cycles=2, tiers=("portable", "avx2", "avx512vl", "avx512")
)

_INTEL = {
    # vectors on 015, scalars on 0156; loads 23; store data 4, store addresses 237
    "scalar": "0156",
    "scalar multiply": "1",
    "scalar divide": "0 1 5 6 0156:6",
    "branch": "06",
    "fused branch": "",
    "call": "4 06",
    "return": "23 6",
    "move": "-",
    "nothing": "-",
    "load": "23",
    "store": "4",
    "vector store": "4",
    "multiply": "0",
    "multiply dwords": "0 0",
    "horizontal": "5 5 15",
    "sad": "0",
    "add": "15",
    "logic": "015",
    "blend": "015",
    "blend by mask": "5 5",
    "shift": "0",
    "shuffle": "5",
    "unpack": "5",
    "pack": "5",
    "widen": "5",
    "lanes": "5",
    "swap lanes": "5",
    "take lane": "5",
    "put lane": "5",
    "broadcast": "5",
    "broadcast load": "23",
    "to scalar": "0",
    "from scalar": "5",
    "element to scalar": "0 5",
    "element from scalar": "5 5",
    "float add": "1",
    "float multiply": "01",
    "float compare": "1",
    "multiply-add": "01",
    "divide": "0:7",
    "root": "0:7",
    "convert": "1",
    "convert wide": "1 5",
    "convert scalar": "1 5",
    "scalar to float": "1 5",
}
_MASKS = {  # and what comes with them
    "two tables": "5",
    "mask": "0",
    "compare to mask": "5",
    "mask from scalar": "5",
    "mask to scalar": "0",
}
HASWELL = Core("Haswell", 4, _INTEL)
_SKYLAKE = _INTEL | {
    "multiply": "01",
    "multiply dwords": "01 01",
    "horizontal": "5 5 015",
    "sad": "5",
    "add": "015",
    "blend by mask": "015 015",
    "shift": "01",
    "float add": "01",
    "float compare": "01",
    "convert": "01",
    "convert wide": "01 5",
    "convert scalar": "01 5",
    "scalar to float": "01 5",
    "divide": "0:4",
    "root": "0:4",
}
SKYLAKE = Core("Skylake", 4, _SKYLAKE)
#: 256-bit operations only
CASCADE_LAKE = Core(
    "Cascade Lake",
    4,
    _SKYLAKE | {"dot": "01", **_MASKS},
    tiers=("portable", "avx2", "avx512vl"),
)
_ICE_LAKE = _SKYLAKE | {
    "store": "49",
    "vector store": "49",
    "call": "49 06",
    "shuffle": "15",
    "unpack": "15",
    "horizontal": "15 15 015",
    "dot": "01",
    **_MASKS,
}
#: ports 0 and 1 do a 512-bit operation together, as port 0; servers multiply on 5, too
_ZMM = {"01": "05", "015": "05", "15": "5", "1": "0", "49": "49:2"}
ICE_LAKE = Core(
    "Ice Lake (server)", 5, _ICE_LAKE, zmm=_ZMM, tiers=("portable", "avx2", "avx512vl", "avx512")
)
GOLDEN_COVE = Core(
    "Golden Cove",  # Alder Lake's P core, Sapphire Rapids
    6,
    _ICE_LAKE | {"scalar": "0156B", "load": "23A", "broadcast load": "23A", "float add": "15"},
    zmm=_ZMM | {"23A": "23"},
    tiers=("portable", "avx2", "avxvnni", "avx512vl", "avx512"),
)
CORES = {
    "zen1": ZEN1,
    "zen2": ZEN2,
    "zen3": ZEN3,
    "zen4": ZEN4,
    "haswell": HASWELL,
    "skylake": SKYLAKE,
    "cascadelake": CASCADE_LAKE,
    "icelake": ICE_LAKE,
    "goldencove": GOLDEN_COVE,
}
#: names that llvm-mca (14) has for them; its tables of the first two Zens have 256-bit units and
#: say "any vector port" of many instructions
LLVM = {
    "zen1": "znver1",
    "zen2": "znver2",
    "zen3": "znver3",
    "haswell": "haswell",
    "skylake": "skylake",
    "cascadelake": "cascadelake",
    "icelake": "icelake-server",
    "goldencove": "alderlake",
}

#: as /proc/cpuinfo numbers them: {family: {first model: core}}
_AMD = {
    23: {0x00: "zen1", 0x30: "zen2"},
    25: {0x00: "zen3", 0x10: "zen4", 0x20: "zen3", 0x60: "zen4"},
}
_INTEL_MODELS = {
    "haswell": (60, 61, 63, 69, 70, 71, 79, 86),  # and Broadwell
    "skylake": (78, 85, 94, 142, 158, 165, 166),
    "icelake": (106, 108, 125, 126),
    "goldencove": (143, 151, 154, 183, 186, 191, 207),
}


def this_core(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Key in CORES of this machine's core; None if it is not there."""
    if not cpuinfo.exists():
        return None
    text = cpuinfo.read_text()
    fields = dict(re.findall(r"^(vendor_id|cpu family|model)\s*: (\S+)", text, re.M))
    family, model = int(fields.get("cpu family", 0)), int(fields.get("model", 0))
    if fields.get("vendor_id") == "AuthenticAMD":
        starts = [first for first in _AMD.get(family, {}) if first <= model]
        return _AMD[family][max(starts)] if starts else None
    if fields.get("vendor_id") == "GenuineIntel" and family == 6:
        found = next((core for core, models in _INTEL_MODELS.items() if model in models), None)
        return "cascadelake" if found == "skylake" and "avx512_vnni" in text else found
    return None


# The bound ---------------------------------------------------------------------------------------


def micro_operations(core: Core, instruction: Instruction | None) -> tuple[int, list]:
    """(micro-operations that the front end delivers, [(ports, cycles)]) of an instruction.

    None, one of the C library: a scalar one. A load or store rides on the operation that uses it.
    """
    classes, bits = (["scalar"], 0) if instruction is None else classify(instruction)
    ports: list[tuple[str, float]] = []
    front = 0
    for name in classes:
        spec = core.ymm.get(name) if bits == 256 else None
        times = -(-bits // core.bits) if spec is None and bits <= 256 and bits > core.bits else 1
        if spec is None:
            if name not in core.ports:
                raise ValueError(
                    f"{core.name}: no entry for `{name}`, the class of"
                    f" `{instruction.text if instruction else ''}`: add it to bench/cpu_ports.py"
                )
            spec = core.ports[name]
        parts = spec.split() * times
        rides = len(classes) > 1 and name in ("load", "store", "vector store")
        if not rides:  # in the same micro-operation as what uses it
            front += times if name == "vector store" else len(parts)
        for part in parts:
            where, _, cycles = part.partition(":")
            if bits == 512:
                if core.zmm is None:
                    raise ValueError(f"{core.name} has no 512-bit operations: `{instruction.text}`")
                where, _, longer = core.zmm.get(where, where).partition(":")
                cycles = longer or cycles or core.zmm_cycles
            if where != "-":
                ports.append((where, float(cycles or 1)))
    return front, ports


@dataclass(frozen=True)
class Bound:
    """Cycles at least, and what takes them: "front end", or ports."""

    micro_operations: float
    cycles: float
    limit: str


def port_bound(load: dict[str, float]) -> tuple[float, str]:
    """The least cycles in which ports can do {ports that can take it: cycles of work}.

    For each set of ports, what only they can do, shared out evenly: the largest of these. It
    suffices to look at unions of the sets that occur.
    """
    groups = sorted(load)
    best = (0.0, "")
    unions = {frozenset()}
    for group in groups:
        unions |= {union | frozenset(group) for union in unions}
    for ports in unions - {frozenset()}:
        work = sum(cycles for group, cycles in load.items() if ports >= set(group))
        best = max(best, (work / len(ports), "".join(sorted(ports))))
    return best


def bound(core: Core, executed: Iterable[tuple[Instruction | None, float]]) -> Bound:
    """Of (instruction, times)."""
    total, load = 0.0, dict[str, float]()
    for instruction, times in executed:
        front, ports = micro_operations(core, instruction)
        total += front * times
        for where, cycles in ports:
            load[where] = load.get(where, 0.0) + cycles * times
    cycles, limit = port_bound(load)
    if total / core.width >= cycles:
        return Bound(total, total / core.width, "front end")
    return Bound(total, cycles, f"ports {limit}")
