"""`Store`: the state of an unfinished run on disk, saved so that there is always a whole one, and continued by another process."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .candidates import CandidateError, Candidates
from .files import write_torch
from .placement import Placement
from .weights import parts_of, write_export
from .world import World

FORMAT = "twa-state-1"


class StateError(ValueError):
    """The saved state cannot be continued; the message says why."""


class Store:
    """state.pt (results, coefficients, optimizer, position in the data) and state-best-K.safetensors (weights of the best trained average so far, by
    method K) in a directory; see `docs/distributed.md`. The first rank reads and writes; files appear whole."""

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
            write_torch(self.path, {"format": FORMAT, "best_file": self.best, "best_digest": self.best_digest} | state)
        except OSError as error:
            print(f"twa: warning: {self.path}: the state could not be saved ({error.strerror}); {self.saved or 'none is there'}", file=sys.stderr)
            return
        at = state["under_way"]
        self.saved = f"the one of {'step ' + str(at['position']['step']) + ' of ' if at else ''}method {state['method'] + 1} is intact"
        for other in self.folder.glob(self.BEST):
            if other.name != self.best:
                other.unlink()

    def save_best(self, placement: Placement, method: int) -> None:
        """The model's weights, before the state that names them. All ranks call it."""
        name = self.BEST.replace("*", str(method))
        try:
            write_export(self.folder / name, placement)
        except OSError as error:
            self.best_lost = True
            print(
                f"twa: warning: {self.folder / name}: the best weights so far could not be saved ({error.strerror}), and so no state from here on; "
                f"{self.saved or 'none is there'}",
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
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
            raise StateError(f"{self.path}: not a saved state ({type(error).__name__})") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise StateError(f"{self.path}: expected a state of format {FORMAT!r}, found {type(state).__name__}")
        return state

    def accept(self, state: dict, facts: Mapping[str, str]) -> None:
        """StateError if the state is of another run than the one with these facts."""
        for name in {**facts, **state["run"]}:
            ours, theirs = facts.get(name, "nothing"), state["run"].get(name, "nothing")
            if ours != theirs:
                raise StateError(f"{self.path}: the state of another run: {name}: expected {ours}, found {theirs}")
        self.resumed, self.best, self.best_digest = True, state["best_file"], state["best_digest"]

    def load_best(self, placement: Placement) -> dict[str, Tensor]:
        """This rank's part of the best weights so far. Ranks that do not see the first one's disk get them from it."""
        with placement.world.together("reading the best weights so far"):
            exported = None
            if placement.world.is_writer:
                try:
                    exported = Candidates(self.folder / self.best)
                except CandidateError as error:
                    raise StateError(f"the best weights so far cannot be read: {error}; start again with --overwrite") from error
                if exported[0].fingerprint() != self.best_digest:
                    raise StateError(f"{self.folder / self.best}: not the weights that {self.path} belongs to; start again with --overwrite")
            return parts_of(placement, exported)

    def remove(self, unless_resumed: bool = False) -> None:
        """The run is finished, or cannot be continued. unless_resumed: not if another run has begun it."""
        if not (unless_resumed and self.resumed):
            for path in [self.path, *self.folder.glob(self.BEST)]:
                path.unlink(missing_ok=True)
