"""Pickles of plain data, without running anything.

A pickle is a program for a small stack machine; this is one that knows only the instructions that
Python and torch.save write for data, and only the functions that it is given: a pickle can do no
more to it than a text can to any parser.

torch.load(weights_only=True) restricts names too, but it calls PyTorch's own functions and hashes
whatever is a key: a file of 300 bytes keeps it busy for ever (tuples inside tuples, 2^40 in all, as
a key) or takes all memory (bytearray(10**11)).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

import torch

MAX_PICKLE = 256 << 20  # bytes: some million tensors


class Refused(ValueError):
    """The pickle asks for something that is not data; the message names it."""


class Name:
    """A function or class that a pickle may call by name: what stands for it here."""

    def __init__(self, make: Callable[..., object]) -> None:
        self.make = make


class Made:
    """Stands for an object of a class that is not looked into: what it was made from."""

    __slots__ = ("arguments", "state")

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.state: object = None

    def __repr__(self) -> str:
        return "an object"

    def get(self, name: str) -> object:
        """An attribute, as stored."""
        return self.state.get(name) if isinstance(self.state, dict) else None


INERT = Name(Made)
Instruction = Callable[["Machine"], None]
KEYS = (str, int, float, bool, bytes, type(None), torch.dtype, Made)  # of dicts; and tuples of them


def unpickle(
    data: bytes,
    names: Mapping[str, object],
    storage: Callable[[object], object] | None = None,
    instructions: Mapping[int, Instruction] | None = None,
) -> object:
    """The value that a pickle describes.

    Args:
        data: the pickle; what follows its end is not looked at
        names: "module.name" -> a Name, or a value
        storage: called with persistent ids
        instructions: in place of OPS

    Raises:
        Refused: the pickle asks for any other name
        ValueError: the pickle is damaged; or KeyError, IndexError, ...
    """
    machine, known = Machine(data, names, storage), instructions or OPS
    while True:
        op = data[machine.at]
        machine.at += 1
        if op == _STOP:
            return machine.stack.pop()
        run = known.get(op)
        if run is None:
            raise ValueError(f"unexpected instruction {bytes([op])!r} at byte {machine.at - 1}")
        run(machine)


class Machine:
    """The stack machine, with an instruction as a method where it is more than a push."""

    def __init__(
        self,
        data: bytes,
        names: Mapping[str, object],
        storage: Callable[[object], object] | None,
    ) -> None:
        self.data, self.names, self.storage, self.at = data, names, storage, 0
        self.stack: list[object] = []
        self.outer: list[list[object]] = []  # stacks below a mark
        self.memo: dict[int, object] = {}

    def take(self, count: int) -> bytes:
        """The next bytes of the pickle."""
        begin, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise EOFError("the pickle is cut off")
        return self.data[begin : self.at]

    def number(self, count: int) -> int:
        """The next bytes as a number without sign."""
        return int.from_bytes(self.take(count), "little")

    def line(self) -> str:
        """The rest of a line of at most 256 bytes."""
        text = self.data[self.at : self.at + 256]
        self.at += text.index(b"\n") + 1
        return text[: text.index(b"\n")].decode()

    def mark(self) -> None:
        """Begins a stack on top of the one so far."""
        self.outer.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[object]:
        """What was pushed since the last mark, which is taken away."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def look_up(self, module: str, name: str) -> None:
        """Pushes what a name stands for."""
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full not in self.names:
            raise Refused(f"it asks for {full[:100] if full.isprintable() else ascii(full[:100])}")
        self.stack.append(self.names[full])

    def global_(self) -> None:
        """Looks up a module and a name that are two lines."""
        self.look_up(self.line(), self.line())

    def stack_global(self) -> None:
        """Looks up a module and a name that are on the stack."""
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("expected the name of a function or class")
        self.look_up(module, name)

    def call(self) -> None:
        """Calls what stands for a function or class."""
        arguments, name = self.stack.pop(), self.stack.pop()
        if type(name) is not Name:
            raise Refused(f"it calls a {type(name).__name__}")
        if type(arguments) is not tuple:
            raise ValueError("expected arguments")
        self.stack.append(name.make(*arguments))

    def build(self) -> None:
        """Gives the object on the stack its state."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Made:
            target.state = state
        # attributes of an OrderedDict, such as _metadata, are left out
        elif type(target) is not dict:
            raise ValueError(f"attributes of a {type(target).__name__}")

    def persistent(self) -> None:
        """Replaces a persistent id by the storage that it names."""
        if self.storage is None:
            raise ValueError("a storage where none is expected")
        self.stack.append(self.storage(self.stack.pop()))

    def add(self, items: list[object]) -> None:
        """Puts items at the end of the list on the stack."""
        target = self.stack[-1]
        if type(target) is not list:
            raise ValueError(f"items of a {type(target).__name__}")
        target.extend(items)

    def set_items(self, items: list[object]) -> None:
        """Puts keys and values, in turn, into the dict on the stack."""
        target = self.stack[-1]
        if type(target) is not dict:
            raise ValueError(f"items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value

    def tuple_of(self, count: int) -> None:
        """Replaces the last items by a tuple of them."""
        if len(self.stack) < count:
            raise ValueError(f"expected {count} items for a tuple")
        self.stack[-count:] = [tuple(self.stack[-count:])]


def checked_key(key: object) -> object:
    """The key of a dict, if it is one that is hashed in no time; else ValueError.

    Tuples in tuples may take for ever, and large numbers may all have one hash.
    """
    for part in key if type(key) is tuple else (key,):
        if type(part) not in KEYS or (type(part) is int and abs(part) >> 60):
            raise ValueError(f"expected a plain key of a dict, found a {type(part).__name__}")
    return key


def _push(value: Callable[[Machine], object]) -> Instruction:
    """The instruction that pushes this value."""

    def run(m: Machine) -> None:
        found = value(m)  # which may change what m.stack is
        m.stack.append(found)

    return run


def _remember(index: Callable[[Machine], int]) -> Instruction:
    """The instruction that puts the last value into the memo."""

    def run(m: Machine) -> None:
        m.memo[index(m)] = m.stack[-1]

    return run


def _frame(m: Machine) -> None:
    """Passes over a length that is of no use here."""
    m.take(8)


def _protocol(m: Machine) -> None:
    """ValueError for a protocol that is newer than this machine."""
    if m.number(1) > 5:
        raise ValueError("a pickle of an unknown protocol")


def _text(size: int) -> Instruction:
    """The instruction that pushes a text, whose length is a number of `size` bytes."""
    return _push(lambda m: m.take(m.number(size)).decode("utf-8"))


def bytes_of_length(size: int) -> Instruction:
    """The instruction that pushes bytes, whose length is a number of `size` bytes."""
    return _push(lambda m: m.take(m.number(size)))


_STOP = ord(".")
#: names and meanings as in Python's pickletools; sets are lists here
OPS: dict[int, Instruction] = {
    code[0]: run
    for code, run in {
        b"\x80": _protocol,
        b"\x95": _frame,
        b"(": Machine.mark,
        b"N": _push(lambda m: None),
        b"\x88": _push(lambda m: True),
        b"\x89": _push(lambda m: False),
        b"J": _push(lambda m: int.from_bytes(m.take(4), "little", signed=True)),
        b"K": _push(lambda m: m.number(1)),
        b"M": _push(lambda m: m.number(2)),
        b"\x8a": _push(lambda m: int.from_bytes(m.take(m.number(1)), "little", signed=True)),
        b"G": _push(lambda m: struct.unpack(">d", m.take(8))[0]),
        b"X": _text(4),
        b"\x8c": _text(1),
        b"\x8d": _text(8),
        b"B": bytes_of_length(4),
        b"C": bytes_of_length(1),
        b"\x8e": bytes_of_length(8),
        b"}": _push(lambda m: {}),
        b"]": _push(lambda m: []),
        b"\x8f": _push(lambda m: []),
        b")": _push(lambda m: ()),
        b"t": _push(lambda m: tuple(m.since_mark())),
        b"\x91": _push(lambda m: m.since_mark()),
        b"\x85": lambda m: m.tuple_of(1),
        b"\x86": lambda m: m.tuple_of(2),
        b"\x87": lambda m: m.tuple_of(3),
        b"a": lambda m: m.add([m.stack.pop()]),
        b"e": lambda m: m.add(m.since_mark()),
        b"\x90": lambda m: m.add(m.since_mark()),
        b"s": lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
        b"u": lambda m: m.set_items(m.since_mark()),
        b"h": _push(lambda m: m.memo[m.number(1)]),
        b"j": _push(lambda m: m.memo[m.number(4)]),
        b"q": _remember(lambda m: m.number(1)),
        b"r": _remember(lambda m: m.number(4)),
        b"\x94": _remember(lambda m: len(m.memo)),
        b"c": Machine.global_,
        b"\x93": Machine.stack_global,
        b"R": Machine.call,
        b"\x81": Machine.call,
        b"b": Machine.build,
        b"Q": Machine.persistent,
    }.items()
}
