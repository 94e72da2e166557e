"""`twa merge`: a fixed average of checkpoints, streamed: without a task, a model, or gradients."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .. import averages
from ..export.average import FILES, write_fixed, write_merge
from ..export.bundle import WEIGHTS
from ..export.hugging_face import FOLDER
from ..io import versions
from ..io.atomic import clear_unfinished, only_run_in
from ..io.averaging import FixedAverage
from ..io.candidates import Candidates
from ..io.checks import is_text, read_json
from ..io.errors import TwaError
from ..io.progress import progress_bar
from . import arguments
from .output import check_file, check_is_directory, check_not_read, check_output, writing

DTYPES = ("float32", "bfloat16", "float16")
BATCHNORM = (
    "averaged BatchNorm statistics are not those of the averaged weights: run"
    " twa.update_bn(loader, model)"
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    p = commands.add_parser(
        "merge", help="a fixed average of checkpoints, without a task", description=__doc__
    )
    p.set_defaults(run=run)
    arguments.add_candidates(p)
    scheme = f"{averages.SCHEMES}; or a file of weights, such as weights.json or merge.json"
    p.add_argument("--scheme", metavar="SCHEME", required=True, help=scheme)
    force = "write it although a look at samples finds candidates unrelated, or not finite"
    p.add_argument("--force", action="store_true", help=force)
    add_output(p)


def add_output(p: argparse.ArgumentParser) -> None:
    """Adds where the average goes, and in which dtype."""
    add = p.add_argument
    output = (
        f"directory for the result; if it ends in .safetensors, the file that is {WEIGHTS} there"
    )
    add("-o", "--output", metavar="OUT", type=Path, required=True, help=output)
    dtype = "of all floating-point tensors (default: as in the files)"
    add("--dtype", choices=DTYPES, help=dtype)
    overwrite = "replace what is in a directory that is not empty, or a file that is there"
    add("--overwrite", action="store_true", help=overwrite)


def run(args: argparse.Namespace) -> None:
    """Averages the candidates by a scheme."""
    candidates = arguments.open_candidates(args)
    arguments.announce(candidates)
    beta = weights_of(args.scheme, candidates)
    what = f"the average of {int(beta.count_nonzero())} of {len(candidates)} candidates"
    write(args, candidates, beta, args.scheme, what)


def weights_of(scheme: str, candidates: Candidates) -> Tensor:
    """The merge weights (n,) of a scheme by its name, or of a JSON file."""
    if not scheme.endswith(".json"):
        return averages.of_scheme(scheme, len(candidates))
    value = read_json(Path(scheme), "expected weights as JSON")
    try:
        if isinstance(value, dict) and isinstance(value.get("format"), str):
            value = recorded_weights(value, candidates)
        return averages.of_weights(value, candidates.names)
    except TwaError as error:
        raise TwaError(error.problem, scheme) from error


def recorded_weights(value: Mapping[str, object], candidates: Candidates) -> object:
    """The merge weights that merge.json or coefficients.json hold, by name of their candidates.

    They are those of one weight a candidate; `averages.of_weights` checks them.

    Args:
        value: what the file holds
        candidates: those to be averaged

    Raises:
        TwaError: it is neither, of a newer version, or has weights for each segment; or it does not
            tell its candidates apart by the names of their files
    """
    version = value["format"]
    kind = str(version).rpartition("-")[0]
    expected = versions.COEFFICIENTS if kind == "twa-coefficients" else versions.MERGE
    if text := versions.problem(version, expected):
        raise TwaError(text)
    if expected == versions.MERGE:
        names, weights = value.get("names"), value.get("weights")
        if not isinstance(names, list) or not isinstance(weights, list):
            raise TwaError("expected lists 'names' and 'weights'")
        if not all(map(is_text, names)) or not len(set(names)) == len(names) == len(weights):
            raise TwaError("expected different 'names' and as many 'weights'")
        return dict(zip(names, weights, strict=True))
    beta = value.get("beta")
    if not isinstance(beta, list) or not all(isinstance(row, list) for row in beta):
        raise TwaError("expected 'beta', a list of weights for each candidate")
    if any(len(row) != 1 for row in beta):
        raise TwaError("expected one weight a candidate, found weights of segments")
    paths = value.get("candidates")
    if not isinstance(paths, list) or not all(map(is_text, paths)) or len(paths) != len(beta):
        raise TwaError("expected 'candidates', a path for each weight")
    files = Counter(c.path.name for c in candidates)
    name_of = {}  # by path, and by file name where that tells them apart
    for c, name in zip(candidates, candidates.names, strict=True):
        name_of[str(c.path)] = name
        if files[c.path.name] == 1:
            name_of[c.path.name] = name
    names = [name_of.get(path) or name_of.get(Path(path).name, path) for path in paths]
    if len(set(names)) != len(names):
        raise TwaError("expected candidates whose files have different names")
    return {name: row[0] for name, row in zip(names, beta, strict=True)}


def write(
    args: argparse.Namespace, candidates: Candidates, beta: Tensor, scheme: str, what: str
) -> None:
    """Writes a fixed average where the options say, and prints a line.

    Args:
        args: with the options of `add_output`
        candidates: the n candidates
        beta: merge weights (n,)
        scheme: what they are, for merge.json
        what: what is written, for the line

    Raises:
        OutputError: the output is there, cannot be written, or is one of the candidates
        CandidateError: the candidates do not fit each other, or their average would be nonsense
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise TwaError(f"twa {args.command} runs as one process: start it without torchrun")
    is_file = args.output.suffix == ".safetensors"
    if not is_file:
        check_is_directory(args.output)
    with contextlib.nullcontext() if is_file else only_run_in(args.output):
        _write(args, candidates, beta, scheme, what, is_file)


def _write(
    args: argparse.Namespace,
    candidates: Candidates,
    beta: Tensor,
    scheme: str,
    what: str,
    is_file: bool,
) -> None:
    """`write`, of one process at a time."""
    out = args.output
    (check_file if is_file else check_output)(out, args.overwrite)
    check_not_read(candidates, [out] if is_file else [out / WEIGHTS, out / FOLDER])
    fixed = FixedAverage(candidates, beta, getattr(torch, args.dtype) if args.dtype else None)
    if len(fixed.used) > 1:  # one alone is written as it is
        arguments.check_candidates(Candidates.of(fixed.used), args.force)
        if has_statistics(fixed):
            print(f"twa: {BATCHNORM}", file=sys.stderr)
    begin = time.perf_counter()
    with (
        writing(out),
        progress_bar("reading candidates", fixed.nbytes, unit="B", unit_scale=True) as bar,
    ):
        if is_file:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_fixed(out, fixed, bar.update)
        else:
            out.mkdir(parents=True, exist_ok=True)
            clear_unfinished(out, FILES)
            written = write_merge(out, fixed, scheme, bar.update)
    seconds, read = time.perf_counter() - begin, fixed.nbytes / 1e9
    where = str(out) if is_file else f"{out}/: {', '.join(written)}"
    print(
        f"written to {where}; {what}, {read:.2f} GB read in {seconds:.1f} s"
        f" ({read / seconds:.2f} GB/s)"
    )


def has_statistics(fixed: FixedAverage) -> bool:
    """Whether an average has running statistics, as BatchNorm keeps them."""
    names = {key.rpartition(".")[2] for key in fixed.info}
    return {"running_mean", "running_var"} <= names
