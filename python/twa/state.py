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
    """state.pt (results, coefficients, optimizer, position in the data) and state-best.safetensors (weights of the best trained average so far) in a
    directory; see `docs/distributed.md`. The first rank reads and writes; files appear whole."""

    NAME, BEST = "state.pt", "state-best.safetensors"

    def __init__(self, folder: Path, resume: bool) -> None:
        self.path, self.best, self.resume = folder / self.NAME, folder / self.BEST, resume
        self.resumed = False
        self.saved: str = ""  # what the last saved state holds, for messages

    def save(self, state: dict) -> None:
        """A state that cannot be written costs a warning, not the run: the one before it stays."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_torch(self.path, {"format": FORMAT} | state)
        except OSError as error:
            print(f"twa: warning: {self.path}: the state could not be saved ({error.strerror}); {self.saved or 'none is there'}", file=sys.stderr)
        else:
            at = state["under_way"]
            self.saved = f"the one of {'step ' + str(at['position']['step']) + ' of ' if at else ''}method {state['method'] + 1} is intact"

    def save_best(self, placement: Placement) -> None:
        """All ranks call it."""
        try:
            write_export(self.best, placement)
        except OSError as error:
            print(f"twa: warning: {self.best}: the best weights so far could not be saved ({error.strerror})", file=sys.stderr)

    def load(self, world: World, facts: Mapping[str, str]) -> dict | None:
        """The saved state on every rank; None if there is none or it is not asked for. StateError if it is of another run."""
        if not self.resume:
            return None
        with world.together("reading the saved state"):
            state = world.share(self._read() if world.is_writer else None)
            if state is None:
                return None
            for name in {**facts, **state["run"]}:
                ours, theirs = facts.get(name, "nothing"), state["run"].get(name, "nothing")
                if ours != theirs:
                    hint = f"; pass --batches-per-step {theirs}" if name == "batches per step" else ""
                    raise StateError(f"{self.path}: the state of another run: {name}: expected {ours}, found {theirs}{hint}")
        self.resumed = True
        return state

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

    def load_best(self, placement: Placement) -> dict[str, Tensor]:
        """This rank's part of the best weights so far. Ranks that do not see the first one's disk get them from it."""
        with placement.world.together("reading the best weights so far"):
            exported = None
            if placement.world.is_writer:
                try:
                    exported = Candidates(self.best)
                except CandidateError as error:
                    raise StateError(f"the best weights so far cannot be read: {error}; start again with --overwrite") from error
            return parts_of(placement, exported)

    def remove(self, unless_resumed: bool = False) -> None:
        """The run is finished, or cannot be continued. unless_resumed: not if another run has begun it."""
        if not (unless_resumed and self.resumed):
            self.path.unlink(missing_ok=True)
            self.best.unlink(missing_ok=True)
