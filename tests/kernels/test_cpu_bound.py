"""The counted bound of the CPU kernels (bench/cpu_bound.py)."""

import json
import shutil
import sys

import cpu_bound
import cpu_ports
import cpu_tiers
import cpu_trace
import pytest
from conftest import BITS, has_isa, run_python
from cpu_classes import classify
from cpu_trace import Instruction

from twa_kernels import native

LISTING = """
kernels.o:     file format elf64-x86-64

0000000000001000 <void twa::(anonymous namespace)::block_avx2<4>(twa::BasisView const&, \
twa::TensorTable const&, twa::Block const&, double*)>:
    1000:\tvpmaddwd (%rdi),%ymm1,%ymm2
    1004:\tcmp    %rax,%rdx
    1007:\tjne    1000 <void twa::(anonymous namespace)::block_avx2<4>()>
    1009:\tvmovdqa 0x20(%rip),%ymm3        # 1031 <table>
    1011:\tcs nopw 0x0(%rax,%rax,1)
    101b:\tret

000000000000101c <twa::(anonymous namespace)::block_avx2<4>(twa::BasisView const&, float const*, \
twa::TensorTable const&, twa::TensorTable const&, twa::Block const&)::{lambda()#1}::operator()()>:
    101c:\tjmp    1000 <start>

0000000000001020 <twa::(anonymous namespace)::block_portable<1>(twa::BasisView const&, \
float const*, twa::TensorTable const&, twa::TensorTable const&, twa::Block const&)>:
    1020:\tret
"""


def test_parsing():
    code, functions = cpu_trace.parse(LISTING)
    assert list(code) == [0x1000, 0x1004, 0x1007, 0x1009, 0x1011, 0x101B, 0x101C, 0x1020]
    assert code[0x1000] == Instruction("vpmaddwd (%rdi),%ymm1,%ymm2", 4)
    assert code[0x1007].fused and not code[0x101C].fused
    assert code[0x1009].text == "vmovdqa 0x20(%rip),%ymm3"
    assert code[0x1011].text.startswith("nopw")
    # a lambda of a kernel is not the kernel
    found = {("project", "avx2", 4): 0x1000, ("reconstruct", "portable", 1): 0x1020}
    assert cpu_trace.kernels(functions) == found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vpmaddwd (%rdi),%ymm1,%ymm2", (["multiply", "load"], 256)),
        ("vpdpbusd 0x40(%rsp){1to16},%zmm1,%zmm2", (["dot", "load"], 512)),
        ("vmovdqu (%rax,%rbx,2),%xmm0", (["load"], 128)),
        ("vmovdqa %ymm0,0x20(%rsp)", (["vector store"], 256)),
        ("vmovdqa %ymm0,%ymm1", (["move"], 256)),
        ("vpxor %xmm0,%xmm0,%xmm0", (["move"], 128)),
        ("vpxor %xmm0,%xmm1,%xmm0", (["logic"], 128)),
        ("vmovd %xmm0,%eax", (["to scalar"], 128)),
        ("vpbroadcastd (%rax),%ymm0", (["broadcast load"], 256)),
        ("vextracti128 $0x1,%ymm0,%xmm1", (["take lane"], 256)),
        ("vpcmpltd %zmm1,%zmm0,%k1", (["compare to mask"], 512)),
        ("kmovw %eax,%k1", (["mask from scalar"], 0)),
        ("add $0x1,(%rax)", (["scalar", "load", "store"], 0)),
        ("cmp %rax,(%rbx)", (["scalar", "load"], 0)),
        ("lea 0x8(%rax,%rbx,4),%rcx", (["scalar"], 0)),
        ("nopw 0x0(%rax,%rax,1)", (["nothing"], 0)),
        ("movzbl (%rsi),%eax", (["load"], 0)),
        ("push %rbx", (["store"], 0)),
    ],
)
def test_classes(text, expected):
    assert classify(Instruction(text, 4)) == expected


def test_an_instruction_without_an_entry_is_named():
    with pytest.raises(ValueError, match="vfancy"):
        classify(Instruction("vfancy %ymm0,%ymm1", 4))
    dot = Instruction("vpdpbusd %ymm0,%ymm1,%ymm2", 5)
    with pytest.raises(ValueError, match=r"Zen 2: no entry for `dot`.*vpdpbusd"):
        cpu_ports.bound(cpu_ports.ZEN2, [(dot, 1)])
    with pytest.raises(ValueError, match="512-bit"):
        cpu_ports.bound(cpu_ports.ZEN2, [(Instruction("vpaddd %zmm0,%zmm1,%zmm2", 6), 1)])


def test_ports_share_what_several_can_take():
    # 3 on port 0 alone and 3 on either: 3 cycles; 5 and 3: port 0 is full; 2 and 6: both share
    for alone, either, cycles in [(3, 3, 3), (5, 3, 5), (2, 6, 4)]:
        assert cpu_ports.port_bound({"0": alone, "01": either})[0] == cycles
    # no two of three groups are short of ports, all three are
    load = {"01": 3, "12": 3, "02": 3}
    assert cpu_ports.port_bound(load) == (3, "012")
    assert cpu_ports.port_bound({"0": 4, "12": 2}) == (4, "0")


@pytest.mark.parametrize(
    ("vendor", "family", "model", "flags", "core"),
    [
        ("AuthenticAMD", 23, 0x08, "avx2", "zen1"),
        ("AuthenticAMD", 23, 0x31, "avx2", "zen2"),
        ("AuthenticAMD", 25, 0x01, "avx2", "zen3"),
        ("AuthenticAMD", 25, 0x11, "avx2", "zen4"),
        ("AuthenticAMD", 26, 0x02, "avx2", None),
        ("GenuineIntel", 6, 85, "avx512vl", "skylake"),
        ("GenuineIntel", 6, 85, "avx512vl avx512_vnni", "cascadelake"),
        ("GenuineIntel", 6, 106, "avx512_vnni", "icelake"),
        ("GenuineIntel", 6, 1, "", None),
    ],
)
def test_which_core_this_is(vendor, family, model, flags, core, tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text(
        f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\n"
        f"model name\t: a processor\nflags\t\t: {flags}\n"
    )
    assert cpu_ports.this_core(info) == core
    assert cpu_ports.this_core(tmp_path / "absent") is None


def test_bounds_by_hand():
    def per(text, times):
        return Instruction(text, 4), times

    loop = [
        per("vpmaddwd (%rdi),%ymm1,%ymm2", 8),
        per("vpaddd %ymm0,%ymm2,%ymm0", 8),
        per("cmp %rax,%rdi", 1),
        (Instruction("jne 10", 2, fused=True), 1),
    ]
    zen2 = cpu_ports.bound(cpu_ports.ZEN2, loop)  # one product a cycle; a load rides along
    assert (zen2.micro_operations, zen2.cycles, zen2.limit) == (17, 8, "ports 0")
    zen1 = cpu_ports.bound(cpu_ports.ZEN1, loop)  # two halves of each
    assert (zen1.micro_operations, zen1.cycles, zen1.limit) == (33, 16, "ports 0")
    skylake = cpu_ports.bound(cpu_ports.SKYLAKE, loop)  # products on 01, sums on 015
    assert (skylake.cycles, skylake.limit) == (16 / 3, "ports 015")
    few = cpu_ports.bound(cpu_ports.SKYLAKE, [per("mov %rax,%rbx", 8)])
    assert (few.cycles, few.limit) == (2, "front end")
    wide = cpu_ports.bound(cpu_ports.ZEN4, [per("vpdpbusd %zmm0,%zmm1,%zmm2", 8)])
    assert (wide.micro_operations, wide.cycles) == (8, 8)


@pytest.fixture(scope="module")
def library():
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")
    if not has_isa("avx2"):
        pytest.skip("counts instructions of x86-64 with AVX2, which this build or machine lacks")
    try:
        return cpu_trace.built_library()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_kernels_of_the_build_are_found_and_have_classes(library):
    code, functions = cpu_trace.parse(cpu_trace.disassemble(library))
    found = cpu_trace.kernels(functions)
    tiers = {tier for _, tier, _ in found}
    assert {"portable", "avx2", "avx512"} <= tiers <= set(cpu_bound.TIERS)
    for op, lowest in [("project", tiers), ("reconstruct", tiers), ("pack", {"portable", "avx2"})]:
        assert set(found) >= {(op, tier, bits) for tier in lowest for bits in BITS}
    # Addresses of an archive's members overlap, so `code` has some of its instructions only. Other
    # compilers may take a few that nobody has met, in places that are never counted.
    unknown = set()
    for instruction in code.values():
        try:
            classify(instruction)
        except ValueError:
            unknown.add(instruction.text)
    assert len(unknown) < len(code) / 1000, unknown


def test_counts_of_a_tile(library):
    """Products of a tile of n rows: 3 limbs of 128 columns a row, 64 products an instruction."""
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    isa = next(isa for isa in ("avx512", "avx2", "portable") if has_isa(isa))
    code = f"""
import collections, json, pathlib, tempfile
import cpu_trace
from cpu_ports import CORES, bound
with tempfile.TemporaryDirectory() as folder:
    program = cpu_trace.Program(pathlib.Path({str(library)!r}), pathlib.Path(folder))
    try:
        out = {{}}
        for op in ("project", "reconstruct"):
            cost = program.cost(op, {isa!r}, 8)
            two, one = (program.executed(op, {isa!r}, 8, 48, k) for k in (2, 1))
            by_text = collections.Counter()
            for instruction, times in cost.tile(48).items():
                by_text[instruction.text.split()[0] if instruction else ""] += times
            cycles = [bound(CORES["goldencove"], cost.tile(n).items()).cycles for n in (16, 64)]
            out[op] = {{"tile": sum(cost.tile(48).values()), "counted": len(two) - len(one),
                       "products": by_text["vpdpbusd"], "cycles": cycles}}
        print(json.dumps(out))
    except PermissionError as error:
        print(json.dumps(str(error)))
"""
    found = json.loads(run_python(f"import sys; sys.path[:0] = {sys.path!r}\n" + code))
    if isinstance(found, str):
        pytest.skip(found)
    for op in ("project", "reconstruct"):
        # the fixed part and the part of a row give other numbers of rows, too
        assert found[op]["tile"] == pytest.approx(found[op]["counted"], rel=0.02)
        few, many = found[op]["cycles"]
        assert few < many < 4 * few
        if isa == "avx512":
            assert found[op]["products"] == 48 * 3 * 128 / 64


def test_table_of_tiers():
    assert 0 < native._C.clock_rate() < float("inf")
    n, columns = 64, 1000
    rows = [
        {"op": "memory", "bits": 0, "what": "read", "seconds": 1.0, "bytes": 20e9},
        {"op": "memory", "bits": 0, "what": "copy", "seconds": 1.0, "bytes": 16e9},
        {"op": "project", "bits": 4, "what": "avx2", "seconds": 0.5, "bytes": 5e9},
        {"op": "project", "bits": 0, "what": "torch float32", "seconds": 2.0, "bytes": 20e9},
        {"op": "reconstruct", "bits": 4, "what": "avx2", "seconds": 0.5, "bytes": 4e9},
        {"op": "reconstruct", "bits": 0, "what": "torch float32", "seconds": 1.0, "bytes": 16e9},
    ]
    bound = {("project", 4, "avx2"): 0.2}  # cycles for a weight, on two threads of 32 kHz
    found = cpu_tiers.finish(rows, bound, 32e3, n, columns, 2)
    assert found[2]["bandwidth"] == found[4]["bandwidth"] == 50
    assert (found[2]["torch float32"], found[4]["torch float32"]) == (4, 2)
    assert found[2]["counted bound"] == pytest.approx(100 * 0.2 * n * columns / 64e3 / 0.5)
    assert "counted bound" not in found[4]
    text = "\n".join(cpu_tiers.markdown(found, {"core": "Zen 2"}, n, columns))
    assert "50 % of read" in text and "40 %" in text and "read 20.0 GB/s" in text
