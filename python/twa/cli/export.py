"""`twa export`: one of the candidates as a checkpoint of its own, by its name."""

from __future__ import annotations

import argparse

from .. import averages
from ..io.candidates import Candidates
from ..io.errors import TwaError
from ..io.order import shortened
from . import arguments
from .merge import add_output, write


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    p = commands.add_parser(
        "export", help="one of the candidates as a checkpoint of its own", description=__doc__
    )
    p.set_defaults(run=run)
    arguments.add_candidates(p)
    at = "the candidate: its name or path; last; or its index from 0 on, negative from the end"
    p.add_argument("--at", metavar="NAME", required=True, help=at)
    add_output(p)


def run(args: argparse.Namespace) -> None:
    """Writes the candidate."""
    candidates = arguments.open_candidates(args)
    arguments.announce(candidates)
    k = index_of(args.at, candidates)
    name = candidates.names[k]
    what = f"{name}, one of {len(candidates)} candidates"
    write(args, Candidates.of([candidates[k]]), averages.candidate(1, 0), f"at {name}", what)


def index_of(at: str, candidates: Candidates) -> int:
    """The index of a candidate by its name, by its path, by "last", or by the index itself.

    Raises:
        TwaError: there is none, or several have the name
    """
    stems, paths = [c.name for c in candidates], [str(c.path) for c in candidates]
    for known in (stems, paths):
        if known.count(at) == 1:
            return known.index(at)
    if at in stems:
        raise TwaError(f"{stems.count(at)} candidates have this name: give a path", f"--at {at}")
    n, names = len(candidates), shortened(candidates.names)
    if at == "last":
        return n - 1
    if at.removeprefix("-").isdecimal() and -n <= int(at) < n:
        return int(at) % n
    raise TwaError(f"expected one of {names}, last, or an index below {n}", f"--at {at}")
