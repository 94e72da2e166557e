"""Values of options: what a text must be and what it becomes; and options of several commands."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from typing import TypeVar

from ..basis.segments import parse_granularity
from ..inspection.samples import sample_findings
from ..io.candidates import Candidates
from ..io.errors import CandidateError, CandidateWarning, TwaError
from ..io.memory import parse_bytes
from ..io.order import shortened

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


def open_candidates(args: argparse.Namespace) -> Candidates:
    """The candidates that the arguments name. `announce` says what there is to say of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CandidateWarning)
        return Candidates(args.candidates, entry=args.entry, ignore=args.ignore)


def announce(candidates: Candidates) -> None:
    """Prints the candidates in the order in which they are used, and notes on them."""
    count = f"{len(candidates)} candidates, oldest first" if len(candidates) > 1 else "1 candidate"
    print(f"{count}: {shortened(candidates.names)}", flush=True)
    for note in candidates.notes:
        print(f"twa: {note}", file=sys.stderr, flush=True)


def check_candidates(candidates: Candidates, force: bool) -> None:
    """Looks at samples of the weights, and prints warnings.

    Raises:
        CandidateError: an average of the candidates is surely nonsense, and not forced
    """
    findings = sample_findings(candidates)
    errors = [f for f in findings if f.severity == "error"]
    for finding in findings:
        if force or finding.severity != "error":
            print(f"twa: {finding}", file=sys.stderr)
    if errors and not force:
        more = f" ({len(errors) - 1} more: see `twa inspect`)" if len(errors) > 1 else ""
        first = str(errors[0]).removeprefix("error: ")
        raise CandidateError(f"{first}{more} To average them nevertheless, pass --force.")
