"""Instructions that a CPU kernel executes, counted by following one call of it step by step.

A small program (cpu_bound.cpp) is linked with the compiled kernels, libtwa_core.a, which the native
module is linked with too, and run one instruction at a time (ptrace). That needs neither counters
of the processor nor an idle machine, takes any structure of loops as it is, and includes what a
tile costs beside its inner loop. It is simpler than to read loops and their numbers of rounds out
of the listing, and reaches AVX-512, which simulators such as valgrind do not.

A tier that this machine lacks is followed as far as its instructions are there. `vpdpbusd` of the
tier avxvnni is stepped over where the machine has none: no branch depends on its results. The
program always starts the portable kernel, and is sent to the tier's function instead.

x86-64 Linux with objdump and a C++ compiler.
"""

from __future__ import annotations

import collections
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_KERNEL = re.compile(r"(?:void )?twa::\(anonymous namespace\)::block_(\w+)<(\d)>\(([^{}]*)\)")
#: what tells the ops' kernels apart: types of their operands
_OPERANDS = {"float const*": "reconstruct", "double*": "project", "Job const&": "pack"}


@dataclass(frozen=True)
class Instruction:
    """A line of a listing.

    Args:
        text: mnemonic and operands, the destination last
        size: bytes
        fused: a branch that follows a comparison, with which it is one micro-operation
    """

    text: str
    size: int
    fused: bool = False


def built_library() -> Path:
    """libtwa_core.a of the native module built in this tree."""
    found = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / "libtwa_core.a"
    if not found.exists():
        raise FileNotFoundError(
            f"no {found}: build the native module there (`make build`), or name the library with"
            " --library"
        )
    return found


def disassemble(path: Path) -> str:
    command = ["objdump", "-d", "-C", "-w", "--no-show-raw-insn", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(listing: str) -> tuple[dict[int, Instruction], dict[str, list[int]]]:
    """objdump's listing: {address: instruction}, {function: its addresses}.

    Addresses of an archive's members overlap: only functions are meant then.
    """
    lines, functions, addresses = [], {}, []
    for line in listing.splitlines():
        if start := re.match(r"([0-9a-f]+) <(.*)>:$", line):
            addresses = functions[start[2]] = []
        elif found := re.match(r"\s*([0-9a-f]+):\t(.*?)\s*(#.*)?$", line):
            text = re.sub(r"^(?:(?:cs|ds|es|data16|bnd|notrack|\{evex\}|\{vex\}) )+", "", found[2])
            addresses.append(int(found[1], 16))
            lines.append((int(found[1], 16), text))
    code, before = {}, ""
    for k, (address, text) in enumerate(lines):
        after = lines[k + 1][0] if k + 1 < len(lines) else address + 1
        fused = bool(re.match(r"j(?!mp)", text) and re.match(r"(cmp|test)[bwlq]?\s", before))
        code[address], before = Instruction(text, after - address, fused), text
    return code, functions


def kernels(functions: dict[str, list[int]]) -> dict[tuple[str, str, int], int]:
    """{(op, tier, bits): address} of the kernels of a block of tiles."""
    found = {}
    for name, addresses in functions.items():
        if match := _KERNEL.fullmatch(name):
            for operand, op in _OPERANDS.items():
                if operand in match[3]:
                    found[op, match[1], int(match[2])] = addresses[0]
    return found


class Program:
    """The kernels of a library, linked so that they can be followed.

    Attributes:
        code: {address: instruction} of the whole program
        kernels: {(op, tier, bits): address}
    """

    def __init__(self, library: Path, folder: Path) -> None:
        self.path = folder / "cpu_bound"
        compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
        source = Path(__file__).with_name("cpu_bound.cpp")
        options = ["-std=c++17", "-O1", "-no-pie", "-o", str(self.path)]
        subprocess.run(
            [compiler, *options, str(source), str(library), "-lpthread", "-ldl"], check=True
        )
        self.code, functions = parse(disassemble(self.path))
        self.kernels = kernels(functions)

    def executed(self, op: str, tier: str, bits: int, n: int, tiles: int) -> list[int]:
        """Addresses that the kernel of a block executes, in order; what lies outside the program
        (the C library) is address 0.
        """
        process = _Stopped([str(self.path), op, str(bits), str(n), str(tiles)])
        try:
            process.run_to(self.kernels[op, "portable", bits])
            process.step()
            process.run_to(self.kernels[op, "portable", bits])  # what is made once is there now
            back = process.word(process.get("rsp"))
            stack = process.get("rsp")
            process.set("rip", self.kernels[op, tier, bits])
            path = []
            while (at := process.get("rip")) != back or process.get("rsp") <= stack:
                here = self.code.get(at)
                path.append(at if here else 0)
                if process.step() == signal.SIGILL:
                    if not (here and here.text.startswith("vpdpbusd")):
                        raise RuntimeError(
                            f"{op}, tier {tier}, {bits} bits: this machine does not execute"
                            f" `{here.text if here else hex(at)}`; count that tier on one that does"
                        )
                    process.set("rip", at + here.size)
            return path
        finally:
            process.kill()

    def cost(self, op: str, tier: str, bits: int) -> Cost:
        """What a tile costs, as a function of rows: from what one or two more tiles add."""
        rows, tiles = ((8, 16), (2, 4)) if op == "pack" else ((16, 32), (1, 2))
        paths = {(n, k): self.executed(op, tier, bits, n, k) for n in rows for k in tiles}
        counts = {key: collections.Counter(path) for key, path in paths.items()}
        more, step = tiles[1] - tiles[0], rows[1] - rows[0]
        few, many = (
            {
                at: (counts[n, tiles[1]][at] - counts[n, tiles[0]][at]) / more
                for at in counts[n, tiles[1]]
            }
            for n in rows
        )
        row = {at: (count - few.get(at, 0)) / step for at, count in many.items()}
        fixed = {at: few.get(at, 0) - rows[0] * count for at, count in row.items()}
        last, before = paths[rows[1], tiles[1]], paths[rows[1], tiles[0]]
        return Cost(self.code, fixed, row, last[len(before) :], rows[1] * more)


@dataclass
class Cost:
    """What a tile executes.

    Args:
        fixed: executions of each address whatever n is
        row: executions of each address for a row, in the mean of 16 (pack: of 8)
        path: addresses in the order of execution, the last of a call
        path_rows: how many rows of tiles these are
    """

    code: dict[int, Instruction]
    fixed: dict[int, float]
    row: dict[int, float]
    path: list[int]
    path_rows: int

    def tile(self, n: int) -> dict[Instruction | None, float]:
        """Executions of each instruction in a tile of n rows; None: of the C library."""
        out: dict[Instruction | None, float] = collections.defaultdict(float)
        for at, count in self.row.items():
            out[self.code.get(at)] += self.fixed[at] + count * n
        return {what: count for what, count in out.items() if count}


_TRACEME, _PEEK, _PEEKUSER, _POKE, _POKEUSER, _CONTINUE, _STEP = 0, 1, 3, 4, 6, 7, 9
_REGISTER = {"rip": 16 * 8, "rsp": 19 * 8}  # in the kernel's struct user of x86-64


class _Stopped:
    """A program under ptrace, stopped where it is not run."""

    def __init__(self, command: list[str]) -> None:
        self._ptrace = ctypes.CDLL(None, use_errno=True).ptrace
        self._ptrace.argtypes, self._ptrace.restype = [ctypes.c_long] * 4, ctypes.c_long
        environment = os.environ | {"TWA_KERNELS_ISA": "portable", "LD_BIND_NOW": "1"}
        self.pid = os.fork()
        if self.pid == 0:
            try:
                if self._ptrace(_TRACEME, 0, 0, 0) == 0:
                    os.execve(command[0], command, environment)
            finally:
                os._exit(127)
        _, status = os.waitpid(self.pid, 0)
        if not os.WIFSTOPPED(status):
            raise PermissionError(f"ptrace is not permitted here: {command[0]} did not stop")

    def _wait(self) -> int:
        """The signal that stopped it."""
        _, status = os.waitpid(self.pid, 0)
        if not os.WIFSTOPPED(status):
            raise RuntimeError(f"the program ended: wait status {status}")
        return os.WSTOPSIG(status)

    def word(self, address: int) -> int:
        return self._ptrace(_PEEK, self.pid, address, 0) & (2**64 - 1)

    def get(self, register: str) -> int:
        return self._ptrace(_PEEKUSER, self.pid, _REGISTER[register], 0)

    def set(self, register: str, value: int) -> None:
        self._ptrace(_POKEUSER, self.pid, _REGISTER[register], value)

    def run_to(self, address: int) -> None:
        kept = self.word(address)
        trap = (kept & ~0xFF) | 0xCC
        self._ptrace(_POKE, self.pid, address, trap - (trap >> 63 << 64))
        self._ptrace(_CONTINUE, self.pid, 0, 0)
        if self._wait() != signal.SIGTRAP or self.get("rip") != address + 1:
            raise RuntimeError(f"ptrace: the program did not come to {address:#x}")
        self._ptrace(_POKE, self.pid, address, kept - (kept >> 63 << 64))
        self.set("rip", address)

    def step(self) -> int:
        self._ptrace(_STEP, self.pid, 0, 0)
        return self._wait()

    def kill(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
