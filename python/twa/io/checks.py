"""Checks of what a file says, before anything is done with it: sizes, names, JSON.

Also a file's words as messages may show them.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeGuard

import torch
from torch import Tensor

from .errors import CandidateError, TwaError
from .foreign import foreign

#: elements of a tensor, before its size is multiplied out in fixed-width integers
MAX_ELEMENTS = 1 << 60
MAX_DIMENSIONS = 64
MAX_NAME = 1000  # characters of a tensor's name
MAX_LEVELS = 100  # of lists and dicts in JSON: whoever walks through more may run out of stack
#: bytes of a safetensors header or a JSON index: names of some 100,000 tensors
MAX_HEADER = 32 << 20


def are_sizes(value: object) -> TypeGuard[Sequence[int]]:
    """Whether a file's value can be the sizes, offsets or strides of a tensor.

    There are few enough of them to be multiplied in no time.
    """
    return (
        isinstance(value, list | tuple)
        and len(value) <= MAX_DIMENSIONS
        and all(type(v) is int and 0 <= v < MAX_ELEMENTS for v in value)
    )


def is_shape(value: object) -> TypeGuard[Sequence[int]]:
    """Whether a file's value can be the shape of a tensor, of no more than MAX_ELEMENTS."""
    return are_sizes(value) and math.prod(max(1, size) for size in value) <= MAX_ELEMENTS


def is_file_name(name: str) -> bool:
    """Whether this names a file in a directory, and nothing outside it, and can be printed.

    The file may be a link: Hugging Face's cache is made of links to ../../blobs, and what a link
    leads to is only read.
    """
    if not name.isprintable() or len(name.encode()) > 255 or name in ("", ".", ".."):
        return False
    return "/" not in name and "\\" not in name and Path(name).name == name


def check_name(name: str, where: Path) -> None:
    """CandidateError for a tensor's name that no message should quote."""
    if len(name) > MAX_NAME:
        raise CandidateError(
            f"expected names of at most {MAX_NAME} characters, found one of {len(name)}", where
        )
    if not is_unicode(name):
        raise CandidateError(f"expected names that are texts, found {name!r}", where)


def is_unicode(text: str) -> bool:
    """Whether a text can be written: it has no lone surrogates."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def shown(value: object) -> str:
    """A file's value for a message: printable, not long, and not looked into deeply."""
    return reprlib.repr(value)


def printable(text: str) -> str:
    """A file's text as a terminal can show it."""
    return text[:200] if is_shown(text[:200]) else ascii(text[:200])


def is_shown(text: str) -> bool:
    """Whether a terminal shows a text as it is: nothing in it turns a line, moves the cursor or the
    direction of writing, or is no character at all.
    """
    return text.isprintable() or not any(
        unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\u200c\u200d"
        for c in text
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, as a terminal can show it."""
    return printable((str(error).splitlines() or [""])[0])


def read_json(path: Path, expected: str = "expected JSON", limit: int = MAX_HEADER) -> object:
    """The value of a JSON file of at most `limit` bytes.

    Args:
        path: the file
        expected: how messages begin
        limit: bytes

    Raises:
        CandidateError: the file is missing, too large or no JSON
    """
    if not path.is_file():
        raise CandidateError(f"{expected}, in a regular file", path)
    if path.stat().st_size > limit:
        raise CandidateError(
            f"{expected}, of at most {limit} bytes, found {path.stat().st_size}", path
        )
    try:
        return parse_json(bytes_of_file(path, limit))
    except (ValueError, RecursionError, OSError) as error:
        if what := foreign(path, json=True):
            raise CandidateError(f"{expected}; {what}", path) from error
        raise CandidateError(
            f"{expected} ({type(error).__name__}: {first_line(error)})", path
        ) from error


def bytes_of_file(path: Path, limit: int) -> bytes:
    """All bytes of a file; ValueError for more than `limit`, whatever its size is said to be."""
    with open(path, "rb") as f:
        data = f.read(limit + 1)  # not all of what may have no end, as files of the system
    if len(data) > limit:
        raise ValueError(f"expected at most {limit} bytes, found more")
    return data


def check_levels(value: object) -> None:
    """ValueError for more than MAX_LEVELS of lists and dicts in each other."""
    inside = [value]
    for _ in range(MAX_LEVELS):
        items = (c.values() if isinstance(c, dict) else c for c in inside if _is_nest(c))
        inside = [value for of in items for value in of if _is_nest(value)]
        if not inside:
            return
    raise ValueError(f"more than {MAX_LEVELS} levels")


def _is_nest(value: object) -> TypeGuard[dict[str, object] | list[object]]:
    return isinstance(value, dict | list)


def parse_json(text: bytes) -> object:
    """JSON as Python values.

    Raises:
        ValueError: it is no JSON; also for a name that occurs twice, for NaN and -0, for text that
            is no UTF-8, and for more than MAX_LEVELS levels
    """

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(items)
        if len(found) != len(items):
            counts = Counter(key for key, _ in items)
            twice = next(key for key, count in counts.items() if count > 1)
            raise ValueError(f"{twice!r} occurs twice")
        for key, value in found.items():
            (key + value if isinstance(value, str) else key).encode()  # lone surrogates
            if len(key) > MAX_NAME:
                raise ValueError(f"a name of {len(key)} characters")
        return found

    def refuse(text: str) -> NoReturn:
        raise ValueError(f"found {text}")

    def whole(text: str) -> int:
        if text == "-0":  # as the library does
            refuse(text)
        return int(text)

    value = json.loads(
        text.decode("utf-8"), object_pairs_hook=pairs, parse_constant=refuse, parse_int=whole
    )
    check_levels(value)
    return value


def is_inside(file: Path, folder: Path) -> bool:
    """Whether this is a regular file of the folder, or of a folder in it.

    It is none if it is a link that leads out of the folder, unless to the blobs of the folder's own
    Hugging Face cache.
    """
    real, own = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    blobs = own.parent.parent / "blobs" if own.parent.name == "snapshots" else own
    return real.is_file() and (real.is_relative_to(own) or real.parent == blobs)


# Values of a file that were plain Python ---------------------------------------------------------


def is_number(value: object) -> bool:
    """Whether this is an int or a float, and no bool."""
    return type(value) in (int, float)


def is_count(value: object) -> bool:
    """Whether this is a whole number of at least 0 that a float64 can hold."""
    return type(value) is int and 0 <= value < 1 << 53


def check_whole(value: object, least: int, where: str) -> None:
    """TwaError unless this is a whole number of at least so much."""
    if type(value) is not int or value < least:
        raise TwaError(f"expected a whole number of at least {least}, found {value!r}", where)


def is_text(value: object) -> bool:
    """Whether this is a str."""
    return isinstance(value, str)


def is_dict(value: object) -> bool:
    """Whether this is a dict."""
    return isinstance(value, dict)


def is_tensor(value: object) -> bool:
    """Whether this is a tensor."""
    return isinstance(value, Tensor)


def optional(good: Callable[[object], bool]) -> Callable[[object], bool]:
    """A check that takes None, or what `good` takes."""
    return lambda value: value is None or good(value)


def fits(value: object, schema: object) -> bool:
    """Whether a value is built as a schema says.

    In a schema a dict stands for a dict with these keys, a list for any number of items like its
    one, a tuple for these items. Anything else is a function that says whether a value is good.
    """
    if isinstance(schema, dict):
        if not isinstance(value, dict) or value.keys() != schema.keys():
            return False
        return all(fits(value[key], inner) for key, inner in schema.items())
    if isinstance(schema, list):
        return isinstance(value, list) and all(fits(v, schema[0]) for v in value)
    if isinstance(schema, tuple):
        if not isinstance(value, tuple) or len(value) != len(schema):
            return False
        return all(map(fits, value, schema))
    return bool(schema(value)) if callable(schema) else False


def alike(found: object, expected: object) -> bool:
    """Whether a value has the keys, lengths, types, shapes and dtypes of another."""
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor):
            return False
        return (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if isinstance(expected, dict):
        if not isinstance(found, dict) or found.keys() != expected.keys():
            return False
        return all(alike(found[key], value) for key, value in expected.items())
    if isinstance(expected, list | tuple):
        if type(found) is not type(expected) or len(found) != len(expected):
            return False
        return all(map(alike, found, expected))
    return type(found) is type(expected)


def equal_values(a: object, b: object) -> bool:
    """Whether two trees of plain values and tensors are equal."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        same = isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype
        return same and torch.equal(a, b)  # type: ignore[arg-type]
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal_values(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal_values, a, b))
    return type(a) is type(b) and a == b
