"""`twa pack`: candidates straight into a packed basis on disk.

It is one stream, which can be interrupted and continued.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import twa_kernels as tk
from twa_kernels.layout import BITS
from twa_kernels.scaling import Scaling, lost_groups

from .. import averages
from ..basis.feed import Feed
from ..basis.file import LARGEST_SCALE, Writer
from ..basis.segments import Granularity, segments_of
from ..distributed.ranks import Ranks
from ..distributed.sharding import Sharding
from ..distributed.weights import load_untrained
from ..io.atomic import clear_unfinished, lock, write_json
from ..io.averaging import not_finite
from ..io.behind import Behind
from ..io.candidates import Candidates
from ..io.checks import read_json
from ..io.errors import BasisError, TwaError
from ..io.key_map import match_model
from ..io.progress import PeakMemory
from ..io.safetensors import raw_bytes
from ..modes import plain_weights
from .save import contents_of, untrained

SAVE_SECONDS = 10.0  # between saved positions
MAX_POSITION = 1 << 30  # bytes: two numbers as text for each candidate and segment


# Unfinished files --------------------------------------------------------------------------------


def unfinished_parts(path: Path) -> tuple[Path, Path, Path]:
    """The files beside a basis that is being packed.

    Returns:
        the position to continue from, written when the other two are on the disk; the scales as
        bfloat16, as long as not all of a segment is known; the basis so far
    """
    return (
        path.with_name(f"{path.name}.position.partial"),
        path.with_name(f"{path.name}.scales.partial"),
        path.with_name(f"{path.name}.partial"),
    )


def is_unfinished(path: Path) -> bool:
    """Whether an interrupted run can be continued there."""
    return all(p.is_file() for p in unfinished_parts(path))


def remove_parts(path: Path, but: Path | None = None) -> None:
    """Removes what an interrupted run has left beside `path`, but for the file `but`.

    The position goes first: nothing may be continued from half of the rest.
    """
    position = unfinished_parts(path)[0]
    clear_unfinished(path.parent, [glob.escape(position.name)])
    for part in unfinished_parts(path):
        if part != but:
            part.unlink(missing_ok=True)


def remove_left_over(path: Path) -> None:
    """Removes what a killed run has left, if there is nothing to continue.

    Its basis was in place already, or there was no position to continue from yet.
    """
    partial = unfinished_parts(path)[-1]
    if not partial.exists():
        remove_parts(path)
        return
    with open(partial, "r+b") as f:
        if lock(f) and not is_unfinished(path):  # no other process is at work
            remove_parts(path)


# From candidates, in one stream ------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What a run took.

    Attributes:
        read: bytes of the candidates
        written: bytes of the file
        seconds: of this process alone
        memory: highest resident bytes
        resumed: whether it went on with what another had begun
    """

    read: int
    written: int
    seconds: float
    memory: int
    resumed: bool


class PackToFile:
    """Packs candidates straight into a file, whose size is not limited by memory.

    Interrupted, it goes on where it was (resume=True), with the bits of an undisturbed run: the
    file is the same whatever the interruptions and the memory.

    Args:
        path: where the basis goes
        model: its trainable parameters are in the subspace
        candidates: the n checkpoints
        bits: 8, 4, 3, 2 or 1
        granularity: see `Subspace.from_candidates`
        center: see `Subspace.from_candidates`
        normalize: "row" or "none"
        device: where they are packed, a block at a time; the file has the same bits (with Triton
            but for the last ones of row_scale and divisor)

    Raises:
        CandidateError: candidates and model do not fit
        TwaError: another argument is none of what it can be
    """

    def __init__(
        self,
        path: str | Path,
        model: nn.Module,
        candidates: Candidates,
        *,
        bits: int = 4,
        granularity: Granularity = "tensor",
        center: str | int | Tensor = "mean",
        normalize: str = "row",
        device: torch.device | str = "cpu",
    ) -> None:
        self.feed = Feed(device)
        candidates, key_map = match_model(model, candidates)
        self.path, self.candidates = Path(path), candidates
        self.weights = averages.of_center(center, len(candidates))
        numels = key_map.numels(candidates.info)
        segments = segments_of(list(key_map.trained), numels, granularity)
        if bits not in BITS:
            raise TwaError(
                f"bits: expected one of {BITS}, found {bits!r}; the dense basis (32) is not"
                " written: it is the candidates"
            )
        self.sharding = Sharding(Ranks(), model, candidates, key_map)
        self.contents = contents_of(key_map, candidates, bits, segments, normalize)
        self.writer = Writer(self.path, self.contents)
        self.position, self.raw, _ = unfinished_parts(self.path)
        self.finished = False

    @property
    def unfinished(self) -> bool:
        """Whether an interrupted run can be continued."""
        return is_unfinished(self.path)

    def clear(self) -> None:
        """Removes what an interrupted run has left."""
        remove_parts(self.path)

    def run(self, resume: bool = False, progress: Callable[[int], None] | None = None) -> Report:
        """Packs all that is not packed yet.

        Args:
            resume: go on with what an interrupted run has left, if there is something
            progress: called with the bytes read since the last call

        Raises:
            CandidateError: a candidate holds NaN or Inf, or changes meanwhile
            OSError: the disk is full; what is saved stays, to be resumed
            BasisError: another process is packing to the same place, or what is left there is of
                another run
        """
        memory, begun, resumed = PeakMemory(), time.perf_counter(), resume and self.unfinished
        c, writer = self.contents, self.writer
        packer = tk.Packer(
            len(self.candidates),
            c.shapes,
            c.bits,
            c.tensor_segments.of_tiles(c.numels),
            self.feed.device,
            sink=self._keep,
            num_segments=len(c.labels),
        )
        begin = self._read_position(packer) if resumed else (0, 0)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        writer.lock()
        try:
            if not resumed:  # no position may be there for a file that is started anew
                remove_parts(self.path, but=writer.partial)
            writer.open(keep=resumed)
            with open(self.raw, "r+b" if resumed else "w+b") as self.raw_file:
                if progress and resumed:
                    progress(self._bytes_before(*begin))
                with Behind() as self.behind:
                    self._stream(packer, begin, progress)
                with plain_weights(self.sharding.model):
                    load_untrained(self.sharding, self.weights)
                    self._finish(packer)
        finally:
            self.finished = writer.finished
            if self.finished or not self.position.exists():  # nothing to continue
                remove_parts(self.path, but=writer.partial if self.finished else None)
            writer.close()
        return Report(
            self.candidates.bytes_read,
            writer.size,
            time.perf_counter() - begun,
            memory.bytes(),
            resumed,
        )

    def _keep(self, first: int, codes: Tensor, scales: Tensor) -> None:
        """Has tiles written, from tile `first` on, while the next ones are packed.

        Those before them are written: their memory is the next ones'.
        """
        self.behind.wait()
        self.behind(self._write, first, codes.cpu(), scales.cpu())

    def _write(self, first: int, codes: Tensor, scales: Tensor) -> None:
        self.writer.put("codes", codes, first * codes[0].numel() if len(codes) else 0)
        self.raw_file.seek(first * scales.shape[1] * 2)
        self.raw_file.write(raw_bytes(scales))

    @torch.no_grad()
    def _stream(
        self, packer: tk.Packer, begin: tuple[int, int], progress: Callable[[int], None] | None
    ) -> None:
        """Packs the candidates from (tensor, column) `begin` on."""
        numels, saved = self.contents.numels, time.perf_counter()
        starts = [0, *itertools.accumulate(numels)]
        if begin[0] < len(numels) and begin[1] and begin[1] == numels[begin[0]]:
            raise BasisError("expected a position inside a tensor, found its end", self.position)
        for k, block in self.sharding.stream(range(len(numels)), begin=begin):
            try:
                center = torch.empty(block.end - block.begin, device=self.feed.device)
                self.sharding.pack(packer, k, self.feed.block(block), self.weights, center)
                self.behind(self.writer.put, "center", center.cpu(), starts[k] + block.begin)
            except tk.NotFiniteError as error:
                self.clear()  # other files will make another basis
                raise not_finite(
                    self.candidates, self.sharding.keys[k], self.sharding.read(k)
                ) from error
            at = (k, block.end)
            if block.end == numels[k]:
                packer.end_tensor()
                at = (k + 1, 0)
            if progress:
                progress(sum(r.nbytes for r in block.rows))
            if time.perf_counter() - saved > SAVE_SECONDS:
                self._save_position(packer, at)
                saved = time.perf_counter()

    def _finish(self, packer: tk.Packer) -> None:
        """Writes all but codes and center, and puts the file at its place."""
        sums = packer.sum_sq.cpu(), packer.max_scale.cpu()
        scaling = Scaling.of(*sums, self.contents.normalize)
        self._write_scales(scaling, packer.tile_segment.cpu())
        small = {
            "row_scale": scaling.row_scale,
            "divisor": scaling.divisor,
            "center_weights": self.weights,
            "coefficients": torch.zeros(packer.sum_sq.shape),
        }
        for name, t in (small | untrained(self.sharding.model, self.contents)).items():
            self.writer.put(name, t)
        self.candidates.check()
        self.writer.finish()

    def _write_scales(self, scaling: Scaling, segment: Tensor) -> None:
        """Makes the scales of the basis from those that were kept while it was packed.

        Args:
            scaling: how, now that all of every segment is known
            segment: of each tile
        """
        n, lost = len(self.candidates), 0
        step = max(1, self.candidates.block_bytes // (8 * n))
        self.raw_file.flush()
        for first in range(0, len(segment), step):
            tiles = segment[first : first + step]
            self.raw_file.seek(first * n * 2)
            data = self.raw_file.read(len(tiles) * n * 2)
            whole = len(data) == len(tiles) * n * 2
            if whole:
                raw = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(-1, n)
                scales, zeros = scaling.apply(raw, tiles)
            if not whole or (scales.view(torch.uint8) > LARGEST_SCALE).any():
                raise BasisError(
                    "not the scales of an unfinished basis of these candidates; pass"
                    " --overwrite to start anew",
                    self.raw,
                )
            self.writer.put("scales", scales, first * n)
            lost += int(zeros)
        if lost:
            print(f"twa: warning: {lost_groups(lost, len(segment) * n)}", file=sys.stderr)

    def _bytes_before(self, index: int, column: int) -> int:
        """Bytes of all candidates before a column of a tensor."""
        keys = list(self.contents.trained.values())
        whole = sum(c.info[key].nbytes for c in self.candidates for key in keys[:index])
        if index >= len(keys):
            return whole
        return whole + sum(c.info[keys[index]].dtype.itemsize for c in self.candidates) * column

    # Position of an interrupted run --------------------------------------------------------------

    def _save_position(self, packer: tk.Packer, at: tuple[int, int]) -> None:
        """Writes (tensor, column) to go on from, when the parts before it are on the disk.

        Raises CandidateError if the candidates are not what they were: the parts would be wrong.
        """
        self.candidates.check()
        self.behind.wait()
        self.writer.sync()
        self.raw_file.flush()
        os.fsync(self.raw_file.fileno())
        sums = {"sum_sq": packer.sum_sq.tolist(), "max_scale": packer.max_scale.tolist()}
        place = {"tensor": at[0], "column": at[1]}
        write_json(self.position, {**place, **sums, "of": json.dumps(self._options())})

    def _options(self) -> dict[str, Any]:
        """What must be the same in a run that goes on."""
        return {"contents": self.contents.as_json(), "center_weights": self.weights.tolist()}

    def _read_position(self, packer: tk.Packer) -> tuple[int, int]:
        """The (tensor, column) to go on from; the packer is as it was there."""
        expected = "expected the position of an interrupted run"
        value: Any = read_json(self.position, expected, MAX_POSITION)  # of any type, caught below
        try:
            of, ours = json.loads(value["of"]), json.loads(json.dumps(self._options()))
            for theirs, mine in ((of["contents"], ours["contents"]), (of, ours)):
                if odd := [name for name in mine if mine[name] != theirs.get(name)]:
                    raise BasisError(
                        f"of another run: {odd[0]} differs; pass --overwrite to start anew",
                        self.position,
                    )
            sum_sq = torch.tensor(value["sum_sq"], dtype=torch.float64)
            max_scale = torch.tensor(value["max_scale"], dtype=torch.float32)
            packer.resume(value["tensor"], value["column"], sum_sq, max_scale)
            return value["tensor"], value["column"]
        except BasisError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise BasisError(
                f"not the position of an interrupted run ({type(error).__name__}: {error})",
                self.position,
            ) from error
