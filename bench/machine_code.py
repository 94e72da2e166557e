"""Machine code of the compiled CUDA kernels: what one tile of P costs, along the path that it
usually takes.

The cubins are taken out of the native module, so that it is the shipped code that is counted, and
disassembled with the tools that come with Triton. A kernel's main loop (one tile an iteration) is a
graph of instructions; its cost is the longest way through that graph which avoids what is rare: the
element-wise loads and stores of unaligned tensors and ragged ends, and 16-bit weights.
"""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

TOOLS = "backends/nvidia/bin"


def tool(name: str, *arguments: str, folder: str | None = None) -> str:
    import triton

    path = Path(triton.__file__).parent / TOOLS / name
    options = {"capture_output": True, "text": True, "check": True, "cwd": folder}
    return subprocess.run([path, *arguments], **options).stdout


@dataclass
class Function:
    """A compiled kernel.

    Args:
        name: mangled
        arch: such as sm_90
        code: (labels before it, instruction) of each
        stack: bytes: spills, and arrays in memory
        shared: bytes of static shared memory
    """

    name: str
    arch: str
    code: list[tuple[list[str], str]]
    registers: int
    stack: int
    shared: int


def functions(library: Path) -> list[Function]:
    """Every kernel of every architecture in an object, archive or shared library."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        tool("cuobjdump", "-xelf", "all", str(library.resolve()), folder=folder)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            arch = re.search(r"sm_\d+a?", cubin.name)[0]
            resources = tool("cuobjdump", "--dump-resource-usage", str(cubin))
            pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
            table = re.findall(pattern, resources)
            usage = {name: tuple(map(int, numbers)) for name, *numbers in table}
            for name, code in parse(tool("nvdisasm", "-c", str(cubin))).items():
                found.append(Function(name, arch, code, *usage[name]))
    return found


def parse(text: str) -> dict[str, list[tuple[list[str], str]]]:
    """{function: [(labels, instruction)]} of nvdisasm's output."""
    out: dict = {}
    code, labels = None, []
    for line in text.splitlines():
        if section := re.match(r"\s*\.section\s+(\S+?),", line):
            code = out.setdefault(section[1][6:], []) if section[1].startswith(".text.") else None
        elif code is not None and (label := re.match(r"(\.L_x_\d+):", line)):
            labels.append(label[1])
        elif code is not None and (
            instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line)
        ):
            code.append((labels, instruction[1]))
            labels = []
    return out


def successors(code: list[tuple[list[str], str]]) -> list[list[int]]:
    """Where control may go after each instruction; branches for diverged warps are left out."""
    at = {label: k for k, (labels, _) in enumerate(code) for label in labels}
    out = []
    for k, (_, text) in enumerate(code):
        predicate, op, rest = re.match(r"(@!?U?P\w+\s+)?(\S+)\s*(.*)", text).groups()
        after = [k + 1] if k + 1 < len(code) else []
        if op.startswith("BRA") and "DIV" not in op:
            target = re.search(r"\((\.L_x_\d+)\)", rest)
            conditional = predicate or re.match(r"!?U?P\d|UR\d", rest)
            after = (after if conditional else []) + ([at[target[1]]] if target else [])
        elif op in ("EXIT", "RET.REL.NODEC") and not predicate:
            after = []
        out.append(after)
    return out


def main_loop(code: list[tuple[list[str], str]], after: list[list[int]]) -> tuple[int, int]:
    """First and last instruction of the innermost loop that holds every multiplication of the
    matrix units.
    """
    products = [k for k, (_, text) in enumerate(code) if "IMMA" in text]
    ends = [k for k, (_, text) in enumerate(code) if text == "EXIT"]
    loops = [
        (last - first, first, last)
        for last, targets in enumerate(after)
        for first in targets
        if first <= last
    ]

    def holds(first: int, last: int) -> bool:
        whole = first <= products[0] and last >= products[-1]
        return whole and not any(first < end < last for end in ends)

    return min(loop for loop in loops if holds(*loop[1:]))[1:]


def usual_path(code: list[tuple[list[str], str]]) -> list[str]:
    """Operations of one iteration of the main loop, inner loops (waiting, issue of copies) gone
    through once.
    """
    after = successors(code)
    first, last = main_loop(code, after)
    ops = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for _, text in code[first : last + 1]]
    wide = any(re.match(r"LDG\S*\.128", op) for op in ops)

    def rare(op: str) -> bool:
        if re.match(r"(LDG|STG|LD|ST)\b", op) and not re.search(r"\.(U8|64|128)\b", op):
            return True  # 16 or 32 bits
        return bool(re.match(r"STG\S*\.64", op)) or (wide and bool(re.match(r"LDG\S*\.64", op)))

    length, step = {last - first: 1}, {}
    for k in range(last - first - 1, -1, -1):
        ways = [
            (length[target - first], target - first)
            for target in after[first + k]
            if target > first + k and target - first in length
        ]
        if ways and not rare(ops[k]):
            most, step[k] = max(ways)
            length[k] = most + 1
    path, k = [], 0
    while k != last - first:
        path.append(ops[k])
        k = step[k]
    return [*path, ops[k]]


def counts(path: list[str]) -> dict[str, int]:
    return dict(collections.Counter(op.split(".")[0] for op in path).most_common())
