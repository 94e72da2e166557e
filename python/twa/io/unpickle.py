"""Pickles of plain data, without running anything.

A pickle is a program for a small stack machine; this is one that knows only the instructions that
Python and torch.save write, and only the functions that it is given: a pickle can do no more to it
than a text can to any parser. Whatever else a pickle names or makes is represented by a `Made`,
which remembers the name: a checkpoint holds more than weights, and most of it need not be
understood.

torch.load(weights_only=True) restricts names too, but it calls PyTorch's own functions and hashes
whatever is a key: a file of 300 bytes keeps it busy for ever (tuples inside tuples, 2^40 in all, as
a key) or takes all memory (bytearray(10**11)).
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable, Mapping

import torch

from .checks import printable

MAX_PICKLE = 256 << 20  # bytes: some million tensors
MAX_INT = 1024  # bytes or digits of a number that is more than an object
MAX_KEY = 8  # items of a tuple that is a key
MAX_PART = 1 << 20  # what a number in it is below: of larger ones many tuples have one hash
MAX_NAMED = 1000  # characters of the name of a function or class
MAX_MEMO = 1 << 32  # indices
#: what a known function may be given more of than this counts against the size of the pickle
FREE_ARGUMENTS = 64


class Refused(ValueError):
    """The pickle asks for something that is not data; the message names it."""


class Name:
    """A function or class that a pickle may call by name: what stands for it here."""

    def __init__(self, make: Callable[..., object]) -> None:
        self.make = make


class Made:
    """Stands for a class or function that is not looked into, or for what it makes.

    Args:
        kind: its name, "module.name"
        arguments: what it was made from

    Attributes:
        state: its attributes, as stored
        items: keys and values, if it is a kind of dict
    """

    __slots__ = ("arguments", "items", "kind", "state")

    def __init__(self, kind: str, arguments: tuple[object, ...] = ()) -> None:
        self.kind, self.arguments = kind, arguments
        self.state: object = None
        self.items: dict[object, object] | None = None

    def __repr__(self) -> str:
        return f"an object of {self.kind}"

    def get(self, name: str) -> object:
        """An attribute, as stored."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class Ordered(dict[object, object]):
    """An OrderedDict; its attributes, such as _metadata, are in `state`, as stored."""

    state: object = None


INERT = object()  # a name that stands for a Made of its own name
Instruction = Callable[["Machine"], None]
KEYS = (str, int, float, bool, bytes, type(None), torch.dtype, Made)  # of dicts; and tuples of them


def full_name(module: str, name: str) -> str:
    """ "module.name", with modules as Python 3 calls them."""
    return f"{_PYTHON2.get(module, module)}.{name}"


_PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def unpickle(
    data: bytes,
    names: Mapping[str, object],
    storage: Callable[[object], object] | None = None,
    instructions: Mapping[int, Instruction] | None = None,
    unknown: Callable[[str], object] | None = None,
) -> object:
    """The value that a pickle describes.

    Args:
        data: the pickle; what follows its end is not looked at
        names: "module.name" -> a Name, a value, or INERT
        storage: called with persistent ids
        instructions: in place of OPS
        unknown: makes of any other name what stands for it; None: there are to be none

    Raises:
        Refused: the pickle asks for any other name, or calls a value
        ValueError: the pickle is damaged; or KeyError, IndexError, ...
    """
    machine, known = Machine(data, names, storage, unknown), instructions or OPS
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
        unknown: Callable[[str], object] | None,
    ) -> None:
        self.data, self.names, self.storage, self.unknown = data, names, storage, unknown
        self.at, self.left = 0, 4 * len(data)  # items that known functions may yet be given
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

    def line(self) -> bytes:
        """The rest of a line."""
        end = self.data.index(b"\n", self.at)
        begin, self.at = self.at, end + 1
        return self.data[begin:end]

    def index(self, index: int) -> int:
        """An index of the memo, which is small."""
        if not 0 <= index < MAX_MEMO:
            raise ValueError("expected an index of the memo")
        return index

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
        if len(module) + len(name) > MAX_NAMED:
            raise ValueError(f"a function or class with a name of {len(name)} characters")
        full = full_name(module, name)
        found = self.names.get(full)
        if found is INERT:
            found = Made(full)
        elif full not in self.names:
            shown = printable(full[:100])
            if self.unknown is None:
                raise Refused(f"it asks for {shown}")
            found = self.unknown(shown)
        self.stack.append(found)

    def global_(self) -> None:
        """Looks up a module and a name that are two lines."""
        self.look_up(self.line().decode(), self.line().decode())

    def stack_global(self) -> None:
        """Looks up a module and a name that are on the stack."""
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("expected the name of a function or class")
        self.look_up(module, name)

    def call(self) -> None:
        """Calls what stands for a function or class."""
        arguments = self.stack.pop()
        self.made_of(self.stack.pop(), arguments)

    def call_with_keywords(self) -> None:
        """The same, with arguments by name, which no known function takes."""
        keywords, arguments, name = self.stack.pop(), self.stack.pop(), self.stack.pop()
        if keywords and type(name) is not Made:
            raise Refused("it calls a known function with arguments by name")
        self.made_of(name, arguments)

    def call_since_mark(self) -> None:
        """Calls the first item since the mark with the others."""
        name, *arguments = self.since_mark()
        self.made_of(name, tuple(arguments))

    def call_global(self) -> None:
        """Calls the function of two lines with what was pushed since the mark."""
        arguments = tuple(self.since_mark())
        self.global_()
        self.made_of(self.stack.pop(), arguments)

    def made_of(self, name: object, arguments: object) -> None:
        """Pushes what a function or class makes of arguments."""
        if type(arguments) is not tuple:
            raise ValueError("expected arguments")
        if type(name) is Made:
            self.stack.append(Made(name.kind, arguments))
            return
        if type(name) is not Name:
            raise Refused(f"it calls a {type(name).__name__}")
        # The same long list or text may be given again and again.
        for given in (arguments, *arguments):
            if isinstance(given, list | tuple | dict | str | bytes) and len(given) > FREE_ARGUMENTS:
                self.left -= len(given)
        if self.left < 0:
            raise ValueError("its calls are given more than it has")
        self.stack.append(name.make(*arguments))

    def build(self) -> None:
        """Gives the object on the stack its state."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Made | Ordered):
            target.state = state
        elif type(target) is not dict:
            raise ValueError(f"attributes of a {type(target).__name__}")

    def persistent(self) -> None:
        """Replaces a persistent id by the storage that it names."""
        if self.storage is None:
            raise ValueError("a storage where none is expected")
        self.stack.append(self.storage(self.stack.pop()))

    def add(self, items: list[object]) -> None:
        """Puts items at the end of the list on the stack; those of other objects are left out."""
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is not Made:
            raise ValueError(f"items of a {type(target).__name__}")

    def set_items(self, items: list[object]) -> None:
        """Puts keys and values, in turn, into the dict on the stack."""
        target = self.stack[-1]
        if type(target) is Made:
            target.items = {} if target.items is None else target.items
            target = target.items
        if not isinstance(target, dict):
            raise ValueError(f"items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value

    def pop(self) -> None:
        """Takes the last value away, or the last mark."""
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def tuple_of(self, count: int) -> None:
        """Replaces the last items by a tuple of them."""
        if len(self.stack) < count:
            raise ValueError(f"expected {count} items for a tuple")
        self.stack[-count:] = [tuple(self.stack[-count:])]


def checked_key(key: object) -> object:
    """The key of a dict, or what stands for it if it may not be hashed in no time.

    Tuples in tuples may take for ever, and large numbers, or tuples of them, may all have one hash.
    """
    if type(key) is tuple:
        good = len(key) <= MAX_KEY and all(map(_is_part, key))
    else:
        good = type(key) in KEYS and not (type(key) is int and abs(key) >> 64)
    return key if good else Made(f"builtins.{type(key).__name__}", (key,))


def _is_part(value: object) -> bool:
    """Whether this may stand in a tuple that is a key."""
    if type(value) is int:
        return abs(value) < MAX_PART
    return type(value) in KEYS and type(value) is not float


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


def _pop_mark(m: Machine) -> None:
    """Takes away what was pushed since the last mark."""
    m.since_mark()


def _dict_since_mark(m: Machine) -> None:
    """Pushes a dict of the keys and values since the last mark."""
    items = m.since_mark()
    m.stack.append({})
    m.set_items(items)


def _frame(m: Machine) -> None:
    """Passes over a length that is of no use here."""
    m.take(8)


def _protocol(m: Machine) -> None:
    """ValueError for a protocol that is newer than this machine."""
    if m.number(1) > 5:
        raise ValueError("a pickle of an unknown protocol")


def _text(size: int) -> Instruction:
    """The instruction that pushes a text, whose length is a number of `size` bytes."""
    return _push(lambda m: m.take(m.number(size)).decode("utf-8", "surrogatepass"))


def bytes_of_length(size: int) -> Instruction:
    """The instruction that pushes bytes, whose length is a number of `size` bytes."""
    return _push(lambda m: m.take(m.number(size)))


def _python2(data: bytes) -> str | bytes:
    """A string of Python 2: a text where it can be one."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def _quoted(m: Machine) -> str | bytes:
    """A string of Python 2 in quotes, with escapes."""
    text = m.line().strip()
    if len(text) < 2 or text[0] != text[-1] or text[:1] not in (b"'", b'"'):
        raise ValueError("expected a text in quotes")
    return _python2(codecs.escape_decode(text[1:-1])[0])


def _signed(data: bytes) -> object:
    """A number; one that would take long to print is an object."""
    if len(data) > MAX_INT:
        return Made("builtins.int")
    return int.from_bytes(data, "little", signed=True)


def _decimal(m: Machine) -> object:
    """A number in digits, as a line."""
    text = m.line().removesuffix(b"L")
    if text in (b"00", b"01"):
        return text == b"01"
    return Made("builtins.int") if len(text) > MAX_INT else int(text)


_STOP = ord(".")
#: names and meanings as in Python's pickletools
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
        b"\x8a": _push(lambda m: _signed(m.take(m.number(1)))),
        b"\x8b": _push(lambda m: _signed(m.take(m.number(4)))),
        b"I": _push(_decimal),
        b"L": _push(_decimal),
        b"G": _push(lambda m: struct.unpack(">d", m.take(8))[0]),
        b"F": _push(lambda m: float(m.line())),
        b"V": _push(lambda m: m.line().decode("raw-unicode-escape")),
        b"S": _push(_quoted),
        b"U": _push(lambda m: _python2(m.take(m.number(1)))),
        b"T": _push(lambda m: _python2(m.take(m.number(4)))),
        b"X": _text(4),
        b"\x8c": _text(1),
        b"\x8d": _text(8),
        b"B": bytes_of_length(4),
        b"C": bytes_of_length(1),
        b"\x8e": bytes_of_length(8),
        b"\x96": _push(lambda m: Made("builtins.bytearray", (m.take(m.number(8)),))),
        b"}": _push(lambda m: {}),
        b"]": _push(lambda m: []),
        b"\x8f": _push(lambda m: Made("builtins.set")),
        b"l": _push(lambda m: m.since_mark()),
        b"d": _dict_since_mark,
        b")": _push(lambda m: ()),
        b"t": _push(lambda m: tuple(m.since_mark())),
        b"\x91": _push(lambda m: Made("builtins.frozenset", tuple(m.since_mark()))),
        b"\x85": lambda m: m.tuple_of(1),
        b"\x86": lambda m: m.tuple_of(2),
        b"\x87": lambda m: m.tuple_of(3),
        b"a": lambda m: m.add([m.stack.pop()]),
        b"e": lambda m: m.add(m.since_mark()),
        b"\x90": lambda m: m.add(m.since_mark()),
        b"s": lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
        b"u": lambda m: m.set_items(m.since_mark()),
        b"0": Machine.pop,
        b"1": _pop_mark,
        b"2": _push(lambda m: m.stack[-1]),
        b"g": _push(lambda m: m.memo[m.index(int(m.line()))]),
        b"p": _remember(lambda m: m.index(int(m.line()))),
        b"h": _push(lambda m: m.memo[m.number(1)]),
        b"j": _push(lambda m: m.memo[m.number(4)]),
        b"q": _remember(lambda m: m.number(1)),
        b"r": _remember(lambda m: m.number(4)),
        b"\x94": _remember(lambda m: len(m.memo)),
        b"c": Machine.global_,
        b"\x93": Machine.stack_global,
        b"R": Machine.call,
        b"\x81": Machine.call,
        b"\x92": Machine.call_with_keywords,
        b"o": Machine.call_since_mark,
        b"i": Machine.call_global,
        b"b": Machine.build,
        b"Q": Machine.persistent,
    }.items()
}
