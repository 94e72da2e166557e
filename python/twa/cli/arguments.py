"""Values of options: what a text must be and what it becomes; and options of several commands."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

from ..basis.segments import parse_granularity
from ..io.errors import TwaError
from ..io.memory import parse_bytes

Value = TypeVar("Value")


def parsed(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """A parser of the library's as argparse wants one."""

    def read(text: str) -> Value:
        try:
            return parse(text)
        except TwaError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


amount_of_memory = parsed(parse_bytes)
granularity = parsed(parse_granularity)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return value


def not_negative_float(text: str) -> float:
    """A finite number of at least 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, found {text}")
    return value


def positive_int(text: str) -> int:
    """A whole number above 0."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return int(text)


def not_negative_int(text: str) -> int:
    """A whole number of at least 0."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, found {text}")
    return int(text)


def center(text: str) -> str | int:
    """A center: "mean", "last", "zero", or a candidate's index."""
    return int(text) if text.lstrip("-").isdecimal() else text


CANDIDATES = "checkpoint files, glob patterns or directories, oldest first"
ENTRY = "key, or prefix of keys, under which checkpoints hold the weights, such as state_dict_ema"
IGNORE = "leave out tensors whose names match, such as 'loss.*'; may be repeated"
DEVICE = "where the model runs (default: where the task puts it)"


def add_candidates(p: argparse.ArgumentParser) -> None:
    """Adds CANDIDATES, --entry and --ignore, which several commands take."""
    p.add_argument("candidates", metavar="CANDIDATES", nargs="+", help=CANDIDATES)
    p.add_argument("--entry", metavar="KEY", help=ENTRY)
    p.add_argument("--ignore", metavar="PATTERN", action="append", default=[], help=IGNORE)
