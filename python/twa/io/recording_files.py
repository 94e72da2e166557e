"""The files of a recording: a run's snapshots as low-bit differences, as `twa.Recorder` has them.

A directory holds one, in these safetensors files:

    anchor_S.safetensors    the first snapshot, of step S, whole: "weights.KEY" of what is trained,
                            "state.KEY" of all else; what the recording is of, as metadata
    step_S.safetensors      a later one: "codes" and "scales" of its difference from the decoded one
                            before it; "state.KEY" of what else has changed since

Of a sharded model each rank writes its parts to rank_K_of_N/ in there. docs/format.md has it all.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twa_kernels.layout import BITS, num_tiles

from . import versions
from .atomic import replace
from .checks import are_sizes, first_line, is_shape, is_text, parse_json, shown
from .errors import CandidateError, NewerVersion, reading
from .mapped import MappedFile, Source, Stored, TensorInfo
from .safetensors import (
    DTYPE_NAMES,
    SAFETENSORS_DTYPES,
    header,
    raw_bytes,
    read_header,
    read_safetensors,
)
from .trail import Entry, Row, Trail
from .versions import RECORDING

ANCHOR, STEP = "anchor_{}.safetensors", "step_{}.safetensors"
#: names of files, and of the directories of ranks
ANCHORS, STEPS, RANKS = (
    re.compile(r"anchor_(\d{1,18})\.safetensors"),
    re.compile(r"step_(\d{1,18})\.safetensors"),
    re.compile(r"rank_(\d{1,6})_of_(\d{1,6})"),
)
MOST_STEP = 10**18
ATTEMPTS = 3  # to read what is being written
ALIGNMENT = 64  # of the data in a file
INFINITE = 0x7F80  # bits of bfloat16 from which on a number is Inf or NaN
WEIGHTS, STATE = "weights.", "state."


@dataclass(frozen=True)
class Contents:
    """What a recording is of: the metadata of its anchor.

    Attributes:
        run: a name that only the files of this recording have
        bits: of the codes
        trained: the recorded tensors, in the order of the codes
        names: key -> name of every other tensor of the model's state_dict
        aliases: other keys of tied tensors -> the key that stands for them
        rank: (number, of how many) of the rank that has written it
    """

    run: str
    bits: int
    trained: tuple[Entry, ...]
    names: Mapping[str, str]
    aliases: Mapping[str, str]
    rank: tuple[int, int] = (0, 1)

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "format": RECORDING,
            "run": self.run,
            "bits": self.bits,
            "trained": [
                [e.key, e.name, DTYPE_NAMES[e.dtype], *map(list, (e.shape, e.begin, e.sizes))]
                for e in self.trained
            ],
            "names": dict(self.names),
            "aliases": dict(self.aliases),
            "rank": list(self.rank),
        }

    @property
    def tiles(self) -> int:
        """Tiles of 128 weights in a row."""
        return sum(num_tiles(e.numel) for e in self.trained)


def parse_contents(value: object) -> Contents:
    """Contents from parsed JSON; ValueError says what is wrong."""
    found = value.get("format") if isinstance(value, dict) else value
    if text := versions.problem(found, RECORDING):
        raise ValueError(text)
    assert isinstance(value, dict)  # nothing else has a version
    fields = {"format", "run", "bits", "trained", "names", "aliases", "rank"}
    if odd := sorted(fields ^ value.keys()):
        raise ValueError(f"{odd[0]!r} is {'missing' if odd[0] in fields else 'unexpected'}")
    _want(is_text(value["run"]) and value["run"], "run", "a name", value["run"])
    bits = value["bits"]
    _want(type(bits) is int and bits in BITS, "bits", f"one of {BITS}", bits)
    trained = value["trained"]
    _want(isinstance(trained, list) and trained, "trained", "a list of tensors", trained)
    entries = tuple(map(_parse_entry, trained))
    for name in ("names", "aliases"):
        mapping = value[name]
        good = isinstance(mapping, dict) and all(map(is_text, [*mapping, *mapping.values()]))
        _want(good, name, "texts", mapping)
    keys = [*(e.key for e in entries), *value["names"], *value["aliases"]]
    _want(len(set(keys)) == len(keys), "trained", "each key once", keys)
    known = {*(e.key for e in entries), *value["names"]}
    _want(set(value["aliases"].values()) <= known, "aliases", "keys", value["aliases"])
    rank = value["rank"]
    good = are_sizes(rank) and len(rank) == 2 and rank[0] < rank[1] < 1 << 20
    _want(good, "rank", "a rank and how many there are", rank)
    return Contents(
        value["run"], bits, entries, value["names"], value["aliases"], (rank[0], rank[1])
    )


def _parse_entry(value: object) -> Entry:
    if not isinstance(value, list) or len(value) != 6:
        raise ValueError(f"trained: expected key, name, dtype and sizes, found {shown(value)}")
    key, name, dtype, shape, begin, sizes = value
    _want(is_text(key) and is_text(name), "trained", "texts", value)
    known = isinstance(dtype, str) and SAFETENSORS_DTYPES.get(dtype, torch.int8).is_floating_point
    _want(known, "trained", "a floating-point dtype", dtype)
    good = is_shape(shape) and is_shape(sizes) and are_sizes(begin)
    good = good and len(shape) == len(begin) == len(sizes)
    good = good and all(b + s <= n for b, s, n in zip(begin, sizes, shape, strict=True))
    _want(good, "trained", "a part of a tensor", value)
    return Entry(key, name, SAFETENSORS_DTYPES[dtype], tuple(shape), tuple(begin), tuple(sizes))


def _want(good: object, name: str, expected: str, found: object) -> None:
    """ValueError unless this is good."""
    if not good:
        raise ValueError(f"{name}: expected {expected}, found {shown(found)}")


# Files -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Anchor:
    """The snapshot that is whole in a file.

    Attributes:
        path: the file
        number: of the snapshot, counted from the first of the run
        step: of training
        weights: of each recorded tensor
        state: all else
    """

    path: Path
    number: int
    step: int
    weights: Sequence[Stored]
    state: Mapping[str, Stored]

    def columns(self, k: int, begin: int, end: int) -> Tensor:
        """Some weights of tensor k as they lie flat: float32, a copy."""
        flat = self.weights[k].read().reshape(-1)[begin:end]
        return flat.to(torch.float32, copy=True)

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """The file that it lies in."""
        return tuple(dict.fromkeys(t.file for t in self.weights))


@dataclass(frozen=True)
class Step:
    """A snapshot that is a difference in a file: a row of a trail.

    Attributes:
        path: the file
        number: of the snapshot, counted from the first of the run
        step: of training
        stored: its codes and scales
        state: what else has changed since the snapshot before it
    """

    path: Path
    number: int
    step: int
    stored: tuple[Stored, Stored]
    state: Mapping[str, Stored]

    def codes(self, first: int, last: int) -> Tensor:
        """Codes of some tiles."""
        return self.stored[0].read((slice(first, last), slice(None)))

    def scales(self, first: int, last: int) -> Tensor:
        """Their scales.

        Raises:
            CandidateError: one is not finite, or negative
        """
        found = self.stored[1].read((slice(first, last),))
        as_bits = found.view(torch.int16)
        if (as_bits < 0).any() or (as_bits >= INFINITE).any():
            raise CandidateError("scales: expected finite numbers of at least 0", self.path)
        return found

    def prefetch(self, first: int, last: int) -> None:
        """Asks the system to read these tiles soon."""
        self.stored[0].prefetch((slice(first, last), slice(None)))
        self.stored[1].prefetch((slice(first, last),))

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """The file that it lies in."""
        return (self.stored[0].file,)


def read_anchor(path: Path) -> tuple[Contents, Anchor]:
    """The anchor in a file.

    Raises:
        CandidateError: it is damaged, none, or of a newer version
    """
    metadata = _metadata(path)
    try:
        contents = parse_contents(metadata.get("contents"))
        number, step = _place(metadata, path)
    except ValueError as error:
        raise CandidateError(f"not the anchor of a recording: {first_line(error)}", path) from error
    tensors = read_safetensors(path)
    weights = []
    for e in contents.trained:
        stored = tensors.pop(WEIGHTS + e.key, None)
        found = "none" if stored is None else str(stored.info)
        fits = stored is not None and stored.info.shape == e.sizes
        if stored is None or not fits or not stored.info.dtype.is_floating_point:
            raise CandidateError(
                f"{shown(e.key)}: expected weights {list(e.sizes)}, found {found}", path
            )
        weights.append(stored)
    return contents, Anchor(path, number, step, weights, _state(tensors, contents, path))


def run_of(path: Path) -> object:
    """Of which run a file of a recording says it is.

    Raises:
        CandidateError: it is damaged, or none
    """
    return _metadata(path).get("run")


def read_step(path: Path, contents: Contents) -> Step:
    """The snapshot in a file of a recording.

    Raises:
        NewerVersion: a newer twa has written it
        CandidateError: it is damaged, or of another recording
    """
    metadata = _metadata(path)
    version = metadata.get("format", RECORDING)  # without: from before snapshots had one
    if text := versions.problem(version, RECORDING):
        kind = NewerVersion if versions.is_newer(version, RECORDING) else CandidateError
        raise kind(f"no snapshot that can be read: {text}", path)
    tensors = read_safetensors(path)
    tiles, bits = contents.tiles, contents.bits
    expected = {
        "codes": TensorInfo((tiles, 16 * bits), torch.uint8),
        "scales": TensorInfo((tiles,), torch.bfloat16),
    }
    try:
        number, step = _place(metadata, path)
        if metadata.get("run") != contents.run:
            raise ValueError("it is of another run")
        for name, info in expected.items():
            if name not in tensors or tensors[name].info != info:
                found = tensors[name].info if name in tensors else "none"
                raise ValueError(f"{name}: expected {info}, found {found}")
    except ValueError as error:
        raise CandidateError(f"no snapshot of this recording: {first_line(error)}", path) from error
    stored = (tensors.pop("codes"), tensors.pop("scales"))
    return Step(path, number, step, stored, _state(tensors, contents, path))


def _metadata(path: Path) -> dict[str, Any]:
    """What a file of a recording says of itself."""
    found, _ = read_header(path)
    metadata = found.get("__metadata__")
    text = metadata.get("twa") if isinstance(metadata, dict) else None
    try:
        value = parse_json(text.encode()) if isinstance(text, str) else None
    except (ValueError, RecursionError) as error:
        raise CandidateError(
            f"not a file of a recording: its metadata are no JSON ({first_line(error)})", path
        ) from error
    if not isinstance(value, dict):
        raise CandidateError("not a file of a recording: its metadata have no entry 'twa'", path)
    return value


def _place(metadata: Mapping[str, object], path: Path) -> tuple[int, int]:
    """Number and step of a snapshot; ValueError if they are none, or another file's."""
    number, step = metadata.get("number"), metadata.get("step")
    for name, value in (("number", number), ("step", step)):
        good = type(value) is int and 0 <= value < MOST_STEP
        _want(good, name, "a whole number of at least 0", value)
    assert isinstance(number, int) and isinstance(step, int)
    if (match := ANCHORS.fullmatch(path.name) or STEPS.fullmatch(path.name)) is not None:
        _want(int(match[1]) == step, "step", f"that of the file's name, {int(match[1])}", step)
    return number, step


def _state(tensors: Mapping[str, Stored], contents: Contents, path: Path) -> dict[str, Stored]:
    """The tensors of a file that are not recorded, by key."""
    found = {}
    for name, stored in tensors.items():
        key = name.removeprefix(STATE)
        if key == name or key not in contents.names:
            raise CandidateError(f"tensor {name!r} is unexpected", path)
        found[key] = stored
    return found


def write_snapshot(
    folder: Path, contents: Contents, number: int, step: int, tensors: Mapping[str, Tensor]
) -> None:
    """Writes a file of a recording; it appears whole or not at all.

    Args:
        folder: where it goes
        contents: of the recording
        number, step: of the snapshot
        tensors: on the CPU: "codes" and "scales"; or, of an anchor, "weights.KEY" of each recorded
            tensor; and "state.KEY"
    """
    anchor = "codes" not in tensors
    name = (ANCHOR if anchor else STEP).format(step)
    metadata = metadata_of(contents, number, step, anchor)
    # the widest first, so that all are aligned
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    info = {key: TensorInfo(tuple(t.shape), t.dtype) for key, t in ordered}
    first, _, _ = header(info, metadata, ALIGNMENT)

    def write(path: Path) -> None:
        with open(path, "wb") as f:
            f.write(first)
            for _, t in ordered:
                f.write(raw_bytes(t))

    replace(folder / name, write)


def metadata_of(contents: Contents, number: int, step: int, anchor: bool) -> dict[str, str]:
    """The metadata of a file of a recording."""
    value: dict[str, object] = {"run": contents.run, "number": number, "step": step}
    if anchor:
        value["contents"] = contents.as_json()
    else:  # a recording may go on under a newer twa than it was begun with
        value["format"] = RECORDING
    return {"twa": json.dumps(value)}


def is_recording(folder: Path) -> bool:
    """Whether a directory is a recording: many checkpoints in one."""
    return any(
        ANCHORS.fullmatch(p.name)
        for rank in ("", "rank_*_of_*/")
        for p in folder.glob(f"{rank}anchor_*.safetensors")
    )


def folders_of(folder: Path) -> list[Path]:
    """The directories that hold the files of a recording: itself, or one for each rank."""
    found = [p for p in folder.iterdir() if RANKS.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.split("_")[1])) or [folder]


def others_in(folder: Path, ranks: int) -> str:
    """What a directory has of a recording of another number of ranks: a file's name, or ""."""
    for path in sorted(folder.glob("rank_*_of_*/anchor_*.safetensors")):
        match = RANKS.fullmatch(path.parent.name)
        if match and int(match[2]) != ranks:
            return f"{path.parent.name}/{path.name}"
    found = [p.name for p in folder.glob("anchor_*.safetensors") if ANCHORS.fullmatch(p.name)]
    return found[0] if found and ranks > 1 else ""


def is_snapshot(path: Path) -> bool:
    """Whether a file is one of a recording, by its name and its metadata."""
    if not (ANCHORS.fullmatch(path.name) or STEPS.fullmatch(path.name)):
        return False
    metadata = read_header(path)[0].get("__metadata__")
    text = metadata.get("twa") if isinstance(metadata, dict) else None
    return isinstance(text, str) and '"number"' in text and '"run"' in text


@dataclass(frozen=True)
class Log:
    """The files of one directory, as far as they can be read.

    Attributes:
        folder: the directory
        contents: what they are of
        anchor: the first snapshot
        steps: the others, in order
        left: files that count no more, since the anchor was moved
        beyond: files that cannot be read, since one of them, or one before them, is damaged
        notes: what cannot be read, a sentence each
    """

    folder: Path
    contents: Contents
    anchor: Anchor
    steps: list[Step]
    left: list[Path]
    beyond: list[Path]
    notes: list[str]

    def trail(self) -> Trail:
        """Its snapshots."""
        at = [self.anchor.step, *(s.step for s in self.steps)]
        c = self.contents
        rows: list[Row] = list(self.steps)
        return Trail(c.bits, c.trained, at, self.anchor, 0, rows)

    def states(self) -> list[Mapping[str, Source]]:
        """What else there was at each snapshot, by key."""
        found: list[Mapping[str, Source]] = [dict(self.anchor.state)]
        for step in self.steps:
            found.append({**found[-1], **step.state})
        return found


def read_log(folder: Path) -> Log:
    """The recording in one directory, which may be written meanwhile.

    Raises:
        CandidateError: it has no anchor that can be read, a newer twa has written in it, or the
            system refuses to read a file
    """
    with reading(folder):  # nothing is known of what is in there, and nothing left out
        for _ in range(ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):  # the anchor was moved meanwhile
                return _read_log(folder)
        return _read_log(folder)


def _read_log(folder: Path) -> Log:
    anchors = _numbered(folder, ANCHORS)
    if not anchors:
        raise CandidateError("expected a recording, found no anchor_*.safetensors", folder)
    contents, anchor = read_anchor(anchors[-1])
    steps: list[Step] = []
    left, expected = anchors[:-1], anchor.number + 1
    beyond: list[Path] = []
    problem = ""
    for path in _numbered(folder, STEPS):
        if problem:
            beyond.append(path)
            continue
        try:
            step = read_step(path, contents)
        except NewerVersion:  # no damage, after which files would be moved aside
            raise
        except CandidateError as error:
            problem = error.problem
            beyond.append(path)
            continue
        if step.number < expected:  # from before the anchor was moved
            left.append(path)
        elif step.number > expected:
            problem = f"snapshot {expected} is missing"
            beyond.append(path)
        else:
            steps.append(step)
            expected += 1
    if beyond and _numbered(folder, ANCHORS) != anchors:
        raise FileNotFoundError(errno.ENOENT, "the anchor was moved meanwhile", str(folder))
    notes = [f"{beyond[0]} and what comes after it is left out: {problem}"] if beyond else []
    return Log(folder, contents, anchor, steps, left, beyond, notes)


def _numbered(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files of such names, in the order of their steps."""
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := pattern.fullmatch(p.name))]
    return [path for _, path in sorted(found)]
