"""Machine code of the compiled CUDA kernels: what one tile of P costs, along the path that it
usually takes.

The cubins are taken out of the native module, so that it is the shipped code that is counted, and
disassembled with the tools that come with Triton. A kernel's main loop (one tile an iteration) is a
graph of instructions; its cost is the longest way through that graph which avoids what is rare: the
element-wise loads and stores of unaligned tensors and ragged ends, and tensors of the other dtype.
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


def usual_path(code: list[tuple[list[str], str]], halves: bool = False) -> list[str]:
    """Operations of one iteration of the main loop, inner loops (waiting, issue of copies) gone
    through once.

    Args:
        halves: with gradients, centers and weights of 16 bits instead of 32
    """
    after = successors(code)
    first, last = main_loop(code, after)
    ops = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for _, text in code[first : last + 1]]
    wide = any(re.match(r"LDG\S*\.128", op) for op in ops)

    def rare(op: str) -> bool:
        if re.match(r"(LDG|STG|LD|ST)\b", op) and not re.search(r"\.(U8|64|128)\b", op):
            return True  # an element, of 16 or 32 bits
        if halves:
            return bool(re.match(r"(LDG|STG)\S*\.128", op))
        if re.match(r"HADD2|F2F", op):  # conversions
            return True
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


def quantiser_path(code: list[tuple[list[str], str]]) -> tuple[list[str], list[str]]:
    """Operations of pack and record on four whole tiles of float32 weights, as a warp takes them.

    That is the way with most shuffles and stores, and of these the longest: where tiles are taken
    one by one there are fewer. Slow paths of divisions and roots, and 16-bit weights, are avoided.

    Returns:
        what comes before the loop over rows; one iteration of it (of record: all, and nothing)
    """
    after = successors(code)
    ops = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for _, text in code]
    rare = {k for k, (_, t) in enumerate(code) if re.search(r"CALL\S* `\(\$|LDG\S*U16", t)}
    reached, todo = set(), [0]
    while todo:
        if (k := todo.pop()) not in reached:
            reached.add(k)
            todo += after[k]
    marks = [k for k in reached if ops[k] == "SHFL.IDX"]  # of four tiles at a time
    edges = [(last - first, first, last) for last in reached for first in after[last]]
    around = [e for e in edges if e[0] >= 0 and e[1] <= min(marks) and e[2] >= max(marks)]
    if around:
        _, first, last = min(around)
        return _longest(ops, after, rare, 0, {first})[:-1], _longest(
            ops, after, rare, first, {last}
        )
    return _longest(ops, after, rare, 0, {k for k in reached if not after[k]}), []


def _longest(
    ops: list[str], after: list[list[int]], rare: set[int], first: int, ends: set[int]
) -> list[str]:
    """The way with most shuffles, stores, operations, in this order, that goes forward only."""
    best: dict[int, tuple[int, int, int, int]] = {}  # these numbers from here on; next
    for k in range(max(ends), first - 1, -1):
        if k in rare:
            continue
        ways = [(*best[t][:3], t) for t in after[k] if t > k and t in best and k not in ends]
        if ways or k in ends:
            shuffles, stores, length, step = max(ways, default=(0, 0, 0, -1))
            shuffles, stores = shuffles + (ops[k] == "SHFL.IDX"), stores + ops[k].startswith("STG")
            best[k] = (shuffles, stores, length + 1, step)
    path, k = [], first
    while k >= 0:
        path.append(ops[k])
        k = best[k][3]
    return path


def counts(path: list[str]) -> dict[str, int]:
    return dict(collections.Counter(op.split(".")[0] for op in path).most_common())
