"""`Store`: the state of an unfinished run on disk, to be continued by another process.

It is saved so that there is always a whole one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed.ranks import Ranks
from ..distributed.sharding import Sharding
from ..distributed.weights import parts_of
from ..export.weights import write_model
from ..io.atomic import write_torch
from ..io.candidates import Candidates
from ..io.checks import (
    fits,
    is_count,
    is_dict,
    is_file_name,
    is_number,
    is_tensor,
    is_text,
    optional,
    printable,
)
from ..io.errors import CandidateError, StateError
from ..io.torch_zip import read_values
from ..io.versions import RUN, problem

#: the state of a run that has done nothing yet
BEGUN = {"format": RUN, "begun": True}
#: what to do with a state of an earlier version
OLDER = "finish the run with the twa that began it, or start again with --overwrite"


def _is_run(facts: object) -> bool:
    """Whether these are facts of a run.

    The number of batches must be one: it is used before the facts are compared.
    """
    if not isinstance(facts, dict):
        return False
    texts = all(isinstance(k, str) and isinstance(v, str) for k, v in facts.items())
    return texts and bool(re.fullmatch("[0-9]{1,6}", facts.get("batches per step", "0")))


def _is_best_file(name: object) -> bool:
    """Whether this is "" or a name that `Store.save_best` gives; a state may name no other file."""
    if not isinstance(name, str):
        return False
    return not name or (fnmatch(name, Store.BEST) and is_file_name(name))


def _is_beta(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_vector(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float64 and value.dim() == 1


def _is_stride(value: object) -> bool:
    return is_count(value) and value != 0


def _is_values(value: object) -> bool:
    """Whether this is what `Evaluator.look` gives."""
    return isinstance(value, Tensor) and value.dtype == torch.float64 and value.dim() == 2


def _is_moments(value: object) -> bool:
    """Whether this is an optimizer's state of its parameters: tensors and numbers by name."""
    if not isinstance(value, dict) or not all(isinstance(of, dict) for of in value.values()):
        return False
    return all(is_tensor(m) or is_number(m) for of in value.values() for m in of.values())


_CURVES = {"curve": [is_number], "val_curve": [(is_count, is_number)]}
_RESULT = _CURVES | {
    "method": is_text,
    "candidates": is_count,
    "steps": is_count,
    "seconds": is_number,
    "memory": is_count,
    "val_loss": is_number,
    "test_loss": optional(is_number),
    "test_metric": optional(is_number),
    "looks": is_number,
    "note": is_text,
    "beta": optional(_is_beta),
    "coefficients": optional(is_dict),
    "gain": optional(is_number),
    "is_average": lambda value: isinstance(value, bool),
    "averaged_bn_loss": optional(is_number),
    "device_memory": is_count,
}
#: `Trainer.state_dict`, and the seconds and looks that it took
_TRAINER = _CURVES | {
    "values": [_is_values],
    "kept": optional(is_count),
    "best": is_tensor,
    "average": {
        "format": is_text,
        "eta": is_number,
        "steps": is_count,
        "coefficients": is_tensor,
    },
    "optimizer": {
        "state": _is_moments,
        "param_groups": lambda value: isinstance(value, list),
    },
    "schedule": is_dict,
    "buffers": is_dict,
    "position": {
        "step": is_count,
        "pass": is_count,
        "offset": is_count,
        "digest": optional(is_text),
    },
    "seconds": is_number,
    "looks": is_number,
}


def _is_under_way(value: object) -> bool:
    """Whether this is None or a trainer's state that agrees with itself.

    It has as many steps everywhere, and moments of the coefficients' shape.
    """
    if value is None:
        return True
    if not fits(value, _TRAINER) or not isinstance(value, dict):
        return False
    own = ("mix", "unit")  # what balanced coefficients are of
    kept = value["optimizer"]["state"].values()
    moments = [m for of in kept for name, m in of.items() if name not in own]
    shapes = (value["best"].shape, ())
    if not all(m.shape in shapes for m in moments if isinstance(m, Tensor)):
        return False
    if len(value["values"]) != len(value["val_curve"]):
        return False
    if value["kept"] is not None and not 0 <= value["kept"] < len(value["values"]):
        return False
    return value["position"]["step"] == value["average"]["steps"] == len(value["curve"])


#: what is in a state, beside its format
_STATE: dict[str, object] = {
    "run": _is_run,
    "best_file": _is_best_file,
    "best_digest": is_text,
    "results": [_RESULT],
    "losses": [(_is_vector, is_number, is_number)],
    "stride": _is_stride,
    "best": optional(is_count),
    "method": is_count,
    "under_way": _is_under_way,
}


class Store:
    """The state of a run in a directory; see `docs/distributed.md`.

    state.pt has results, coefficients, optimizer and position in the data;
    state-best-K.safetensors the weights of the best trained average so far, result K. Rank 0 reads
    and writes; files appear whole.

    Args:
        folder: the directory
        resume: whether a state that is there is to be continued

    Attributes:
        path: of state.pt
        resumed: whether a saved state was taken over
        best: name of the file that holds the best weights, or ""
        best_digest: that file's fingerprint
        best_lost: whether it could not be written: no state may name it then
        saved: what the last saved state holds, for messages
    """

    NAME, BEST = "state.pt", "state-best-*.safetensors"

    def __init__(self, folder: Path, resume: bool) -> None:
        self.folder, self.path, self.resume = folder, folder / self.NAME, resume
        self.resumed = False
        self.best = self.best_digest = ""
        self.best_lost = False
        self.saved = ""

    def begin(self, replacing: bool) -> None:
        """Removes the state of an earlier run. Rank 0 calls it before a run that is no resumed one.

        Args:
            replacing: whether results of an earlier run are there, to be replaced: then a state in
                which nothing is done says so, until there is one of this run. A run that is killed
                meanwhile would else be taken for a finished one

        Raises:
            OSError: it cannot be written
        """
        if replacing:
            write_torch(self.path, BEGUN)
        self.remove(but=[self.path] if replacing else [])

    def save(self, state: dict[str, Any]) -> None:
        """Writes a state.

        One that cannot be written costs a warning, not the run: the one before it stays.
        """
        if self.best_lost:
            return
        names = {"format": RUN, "best_file": self.best, "best_digest": self.best_digest}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_torch(self.path, names | state)
        except OSError as error:
            print(
                f"twa: warning: {self.path}: the state could not be saved ({error.strerror});"
                f" {self.saved or 'none is there'}",
                file=sys.stderr,
            )
            return
        at = state["under_way"]
        step = f"step {at['position']['step']} of " if at else ""
        self.saved = f"the one of {step}method {state['method'] + 1} is intact"
        for other in self.folder.glob(self.BEST):
            if other.name != self.best:
                other.unlink(missing_ok=True)

    def save_best(self, sharding: Sharding, method: int) -> None:
        """Writes the model's weights, before the state that names them. All ranks call it.

        Args:
            sharding: of the model, which is at its best
            method: number for the file's name
        """
        name = self.BEST.replace("*", str(method))
        try:
            write_model(self.folder / name, sharding)
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
            if sharding.ranks.is_rank_zero:
                self.best_digest = Candidates(self.folder / name)[0].fingerprint()

    def read(self, ranks: Ranks) -> dict[str, Any] | None:
        """The saved state, on every rank; None if there is none, or none is to be continued.

        Raises:
            StateError: the file is not a whole state
        """
        if not self.resume:
            return None
        with ranks.fail_together("reading the saved state"):
            return ranks.broadcast_object(self._read() if ranks.is_rank_zero else None)

    def _read(self) -> dict[str, Any] | None:
        """The saved state, checked."""
        if not self.path.exists():
            return None
        if not self.path.is_file():
            raise StateError("not a saved state: expected a regular file", self.path)
        try:
            state = read_values(self.path)
        except (CandidateError, OSError) as error:
            raise StateError(f"not a saved state ({error})", self.path) from error
        found = state.get("format") if isinstance(state, dict) else state
        if text := problem(found, RUN, OLDER):
            raise StateError(f"not a state of this twa: {text}", self.path)
        assert isinstance(state, dict)  # nothing else has a version
        if state == BEGUN:
            return None
        if odd := [k for k, good in _STATE.items() if k not in state or not fits(state[k], good)]:
            raise StateError(
                f"not a whole state: {odd[0]!r} is missing or not what a run saves", self.path
            )
        if state["best"] is not None and not 0 <= state["best"] < len(state["results"]):
            raise StateError(
                f"not a whole state: the best of {len(state['results'])} results is"
                f" number {state['best']}",
                self.path,
            )
        return state

    def accept(self, state: dict[str, Any], facts: Mapping[str, str]) -> None:
        """Takes over a state that `read` gave.

        Raises:
            StateError: it is of another run than the one with these facts
        """
        for name in {**facts, **state["run"]}:
            ours, theirs = facts.get(name, "nothing"), state["run"].get(name, "nothing")
            if ours != theirs:
                what, found = printable(name), printable(theirs)
                raise StateError(
                    f"the state of another run: {what}: expected {ours}, found {found}", self.path
                )
        self.resumed, self.best, self.best_digest = True, state["best_file"], state["best_digest"]

    def load_best(self, sharding: Sharding) -> dict[str, Tensor]:
        """This rank's part of the best weights so far.

        Ranks get them from rank 0, whose disk they may not see.

        Raises:
            StateError: the file cannot be read, or is not the one that the state belongs to
        """
        with sharding.ranks.fail_together("reading the best weights so far"):
            exported = None
            if sharding.ranks.is_rank_zero:
                try:
                    exported = Candidates(self.folder / self.best)
                except CandidateError as error:
                    raise StateError(
                        f"the best weights so far cannot be read: {error}; start again with"
                        " --overwrite"
                    ) from error
                if exported[0].fingerprint() != self.best_digest:
                    raise StateError(
                        f"not the weights that {self.path} belongs to;"
                        " start again with --overwrite",
                        self.folder / self.best,
                    )
            return parts_of(sharding, exported)

    def remove(self, but: Sequence[Path] = ()) -> None:
        """Removes the state of a run that is finished, or cannot be continued; not these files."""
        for path in [self.path, *self.folder.glob(self.BEST)]:
            if path not in but:
                path.unlink(missing_ok=True)
