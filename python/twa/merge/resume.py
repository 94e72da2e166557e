"""`Store`: the state of an unfinished run on disk, saved so that there is always a whole one, and
continued by another process.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from ..distributed.ranks import World
from ..distributed.sharding import Placement
from ..distributed.weights import parts_of, write_export
from ..io.atomic import write_torch
from ..io.candidates import CandidateError, Candidates
from ..io.mapped import is_file_name, printable
from ..io.torch_zip import read_values
from .settings import Result

FORMAT = "twa-state-1"


class StateError(ValueError):
    """The saved state cannot be continued; the message says why."""


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _is_curves(curve: object, val_curve: object) -> bool:
    """Losses of steps; and pairs of a step and a loss."""
    pairs = isinstance(val_curve, list) and all(
        isinstance(p, tuple) and len(p) == 2 and _is_count(p[0]) and _is_number(p[1])
        for p in val_curve
    )
    return isinstance(curve, list) and all(map(_is_number, curve)) and pairs


def _is_result(row: object) -> bool:
    return (
        isinstance(row, dict)
        and row.keys() == {f.name for f in fields(Result)}
        and isinstance(row["method"], str)
        and isinstance(row["note"], str)
        and all(_is_count(row[name]) for name in ("candidates", "steps", "memory", "evaluations"))
        and all(_is_number(row[name]) for name in ("seconds", "val_loss"))
        and all(
            row[name] is None or _is_number(row[name])
            for name in ("test_loss", "test_metric", "averaged_bn_loss")
        )
        and _is_curves(row["curve"], row["val_curve"])
        and (
            row["beta"] is None
            or (isinstance(row["beta"], Tensor) and row["beta"].is_floating_point())
        )
        and (row["coefficients"] is None or isinstance(row["coefficients"], dict))
        and isinstance(row["is_average"], bool)
    )


def _is_loss(pair: object) -> bool:
    """Merge weights, and the validation loss there."""
    weights, loss = pair if isinstance(pair, tuple) and len(pair) == 2 else (None, None)
    return (
        isinstance(weights, Tensor)
        and weights.dtype == torch.float64
        and weights.dim() == 1
        and _is_number(loss)
    )


def _is_under_way(value: object) -> bool:
    if value is None:
        return True
    names = {
        "curve",
        "val_curve",
        "best_loss",
        "best_x",
        "average",
        "seconds",
        "optimizer",
        "schedule",
        "buffers",
        "position",
    }
    if (
        not isinstance(value, dict)
        or value.keys() != names
        or not _is_curves(value["curve"], value["val_curve"])
    ):
        return False
    optimizer, position = value["optimizer"], value["position"]
    return (
        _is_number(value["best_loss"])
        and _is_number(value["seconds"])
        and isinstance(value["best_x"], Tensor)
        and isinstance(value["average"], Tensor)
        and isinstance(optimizer, dict)
        and optimizer.keys() == {"state", "param_groups", "coefficients", "subspace"}
        and isinstance(optimizer["subspace"], dict)
        and isinstance(optimizer["state"], dict)
        and all(
            isinstance(of, dict) and all(_is_moment(t, value["best_x"]) for t in of.values())
            for of in optimizer["state"].values()
        )
        and isinstance(position, dict)
        and position.keys() == {"step", "pass", "offset", "digest"}
        and all(_is_count(position[name]) for name in ("step", "pass", "offset"))
        and position["step"] == len(value["curve"])
    )


def _is_moment(value: object, x: Tensor) -> bool:
    """Of an optimizer's state: of the shape of the coefficients, or a number."""
    return (
        value is None
        or _is_number(value)
        or (isinstance(value, Tensor) and value.shape in (x.shape, ()))
    )


def _alike(found: object, expected: object) -> bool:
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and found.keys() == expected.keys()
            and all(_alike(found[k], v) for k, v in expected.items())
        )
    if isinstance(expected, list | tuple):
        return (
            type(found) is type(expected)
            and len(found) == len(expected)
            and all(map(_alike, found, expected))
        )
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and (found.shape, found.dtype) == (
            expected.shape,
            expected.dtype,
        )
    return type(found) is type(expected)


def _is_run(facts: object) -> bool:
    """Facts of the run; of the number of batches, since it is used before the facts are compared."""
    texts = isinstance(facts, dict) and all(
        isinstance(k, str) and isinstance(v, str) for k, v in facts.items()
    )
    return texts and bool(re.fullmatch("[0-9]{1,6}", facts.get("batches per step", "0")))


#: of what a state holds: whether it is what a run saves
_SOUND = {
    "run": _is_run,
    "best_file": (
        lambda name: (
            isinstance(name, str)
            and (not name or (fnmatch(name, Store.BEST) and is_file_name(name)))
        )
    ),
    "best_digest": lambda digest: isinstance(digest, str),
    "results": lambda rows: isinstance(rows, list) and all(map(_is_result, rows)),
    "losses": lambda pairs: isinstance(pairs, list) and all(map(_is_loss, pairs)),
    "best": lambda index: index is None or _is_count(index),
    "method": _is_count,
    "under_way": _is_under_way,
}


class Store:
    """state.pt (results, coefficients, optimizer, position in the data) and
    state-best-K.safetensors (weights of the best trained average so far, by method K) in a
    directory; see `docs/distributed.md`. The first rank reads and writes; files appear whole."""

    NAME, BEST = "state.pt", "state-best-*.safetensors"

    def __init__(self, folder: Path, resume: bool) -> None:
        self.folder, self.path, self.resume = folder, folder / self.NAME, resume
        self.resumed = False
        self.best = self.best_digest = ""  # file that holds the best weights, and its fingerprint
        self.best_lost = False  # it could not be written: no state may name it
        self.saved = ""  # what the last saved state holds, for messages

    def save(self, state: dict) -> None:
        """A state that cannot be written costs a warning, not the run: the one before it stays."""
        if self.best_lost:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_torch(
                self.path,
                {"format": FORMAT, "best_file": self.best, "best_digest": self.best_digest} | state,
            )
        except OSError as error:
            print(
                f"twa: warning: {self.path}: the state could not be saved ({error.strerror});"
                f" {self.saved or 'none is there'}",
                file=sys.stderr,
            )
            return
        at = state["under_way"]
        self.saved = (
            f"the one of {'step ' + str(at['position']['step']) + ' of ' if at else ''}method"
            f" {state['method'] + 1} is intact"
        )
        for other in self.folder.glob(self.BEST):
            if other.name != self.best:
                other.unlink(missing_ok=True)

    def save_best(self, placement: Placement, method: int) -> None:
        """The model's weights, before the state that names them. All ranks call it."""
        name = self.BEST.replace("*", str(method))
        try:
            write_export(self.folder / name, placement)
        except OSError as error:
            self.best_lost = True
            print(
                f"twa: warning: {self.folder / name}: the best weights so far could not be saved"
                f" ({error.strerror}), and so no state from here on;"
                f" {self.saved or 'none is there'}",
                file=sys.stderr,
            )
        else:
            self.best, self.best_lost = name, False
            if placement.world.is_writer:
                self.best_digest = Candidates(self.folder / name)[0].fingerprint()

    def read(self, world: World) -> dict | None:
        """The saved state, on every rank; None if there is none or it is not asked for."""
        if not self.resume:
            return None
        with world.together("reading the saved state"):
            return world.share(self._read() if world.is_writer else None)

    def _read(self) -> dict | None:
        if not self.path.exists():
            return None
        if not self.path.is_file():
            raise StateError(f"{self.path}: not a saved state: expected a regular file")
        try:
            state = read_values(self.path)
        except (CandidateError, OSError) as error:
            raise StateError(f"{self.path}: not a saved state ({error})") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise StateError(
                f"{self.path}: expected a state of format {FORMAT!r}, found {type(state).__name__}"
            )
        if odd := [
            name for name, sound in _SOUND.items() if name not in state or not sound(state[name])
        ]:
            raise StateError(
                f"{self.path}: not a whole state: {odd[0]!r} is missing or not what a run saves"
            )
        if state["best"] is not None and not 0 <= state["best"] < len(state["results"]):
            raise StateError(
                f"{self.path}: not a whole state: the best of {len(state['results'])} results is"
                f" number {state['best']}"
            )
        return state

    def accept(self, state: dict, facts: Mapping[str, str]) -> None:
        """StateError if the state is of another run than the one with these facts."""
        for name in {**facts, **state["run"]}:
            ours, theirs = facts.get(name, "nothing"), state["run"].get(name, "nothing")
            if ours != theirs:
                what, found = printable(name), printable(theirs)
                raise StateError(
                    f"{self.path}: the state of another run: {what}: expected {ours}, found {found}"
                )
        self.resumed, self.best, self.best_digest = True, state["best_file"], state["best_digest"]

    def check_like(self, found: Mapping[str, object], expected: Mapping[str, object]) -> None:
        """StateError unless these parts of the state have the keys, shapes and types that a run
        would save now.
        """
        if odd := [name for name, value in expected.items() if not _alike(found[name], value)]:
            raise StateError(
                f"{self.path}: not a state of this run: {odd[0]!r} has other names, shapes or types"
                " than expected"
            )

    def load_best(self, placement: Placement) -> dict[str, Tensor]:
        """This rank's part of the best weights so far.

        Ranks that do not see the first one's disk get them from it.
        """
        with placement.world.together("reading the best weights so far"):
            exported = None
            if placement.world.is_writer:
                try:
                    exported = Candidates(self.folder / self.best)
                except CandidateError as error:
                    raise StateError(
                        f"the best weights so far cannot be read: {error}; start again with"
                        " --overwrite"
                    ) from error
                if exported[0].fingerprint() != self.best_digest:
                    raise StateError(
                        f"{self.folder / self.best}: not the weights that {self.path} belongs to;"
                        " start again with --overwrite"
                    )
            return parts_of(placement, exported)

    def remove(self, unless_resumed: bool = False) -> None:
        """The run is finished, or cannot be continued. unless_resumed: not if another run has begun
        it.
        """
        if not (unless_resumed and self.resumed):
            for path in [self.path, *self.folder.glob(self.BEST)]:
                path.unlink(missing_ok=True)
