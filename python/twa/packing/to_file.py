"""`twa pack`: candidates straight into a packed basis on disk.

It is one stream, which can be interrupted and continued; or one on each of several ranks, which
write to the same file.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import twa_kernels as tk
from twa_kernels.layout import BITS, TILE
from twa_kernels.scaling import Scaling, lost_groups

from .. import averages
from ..basis.feed import Feed
from ..basis.file import DTYPES, LARGEST_SCALE, Writer, read_contents
from ..basis.segments import Granularity, segments_of
from ..distributed.ranks import Ranks, digest, facts, versions
from ..distributed.sharding import Sharding
from ..distributed.weights import load_untrained
from ..io.atomic import clear_unfinished, lock, write_json
from ..io.averaging import not_finite
from ..io.behind import Behind
from ..io.candidates import Block, Candidates
from ..io.checks import read_json
from ..io.errors import BasisError, TwaError
from ..io.key_map import match_model
from ..io.progress import PeakMemory
from ..io.safetensors import raw_bytes, read_safetensors
from ..io.versions import BASIS, problem
from ..modes import plain_weights
from .save import contents_of, untrained
from .shares import Groups, Run, all_runs, are_runs, joined, share_out

SAVE_SECONDS = 10.0  # between saved positions
MAX_POSITION = 1 << 30  # bytes


# Unfinished files --------------------------------------------------------------------------------


def unfinished_parts(path: Path) -> tuple[Path, Path, Path]:
    """The files beside a basis that is being packed.

    Returns:
        the position to continue from, written when the other two are on the disk; the scales as
        bfloat16, as long as not all of a segment is known, and sums; the basis so far
    """
    return (
        path.with_name(f"{path.name}.position.partial"),
        path.with_name(f"{path.name}.scales.partial"),
        path.with_name(f"{path.name}.partial"),
    )


def proof_of(path: Path) -> Path:
    """What rank 0 writes for a moment, for the others to see that they are in its folder."""
    return path.with_name(f"{path.name}.proof.partial")


def is_unfinished(path: Path) -> bool:
    """Whether an interrupted run can be continued there."""
    return all(p.is_file() for p in unfinished_parts(path))


def remove_parts(path: Path, but: Path | None = None) -> None:
    """Removes what an interrupted run has left beside `path`, but for the file `but`.

    The position goes first: nothing may be continued from half of the rest.
    """
    position = unfinished_parts(path)[0]
    clear_unfinished(path.parent, [glob.escape(position.name)])
    for part in (*unfinished_parts(path), proof_of(path)):
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
        memory: highest resident bytes, of the rank that took most
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
    file is the same whatever the interruptions, the memory and the number of ranks. Ranks make one
    together and call `run`. Each packs its share of the columns and writes it to its place in the
    one file, which all of them must see; nothing crosses the wire but norms.

    Args:
        path: where the basis goes
        model: its trainable parameters are in the subspace
        candidates: the n checkpoints
        bits: 8, 4, 3, 2 or 1
        granularity: see `Subspace.from_candidates`
        center: see `Subspace.from_candidates`
        device: where they are packed, a block at a time; the file has the same bits (with Triton
            but for the last ones of row_scale and divisor)
        ranks: those that share the work

    Raises:
        CandidateError: candidates and model do not fit
        TwaError: another argument is none of what it can be
        DistributedError: the ranks were given different things
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
        device: torch.device | str = "cpu",
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.path = Path(path)
        with self.ranks.fail_together("matching model and candidates"):
            self.feed = Feed(device)
            candidates, key_map = match_model(model, candidates)
            self.candidates = candidates
            self.weights = averages.of_center(center, len(candidates))
            numels = key_map.numels(candidates.info)
            segments = segments_of(list(key_map.trained), numels, granularity)
            if bits not in BITS:
                raise TwaError(
                    f"bits: expected one of {BITS}, found {bits!r}; the dense basis (32) is not"
                    " written: it is the candidates"
                )
            if self.ranks.world_size > 1:
                same = {"bits": str(bits), "granularity": digest(segments)}
                same["center"] = digest(self.weights.tolist())
                self.ranks.check_equal(versions() | facts(model, candidates) | same)
            self.sharding = Sharding(Ranks(), model, candidates, key_map)
            contents = contents_of(key_map, candidates, bits, segments, "row")
            # Its size depends on where rank 0 has the candidates.
            self.contents = self.ranks.broadcast_object(contents)
        self.sizes = [sum(c.info[key].dtype.itemsize for c in candidates) for key in self._keys]
        self.writer = Writer(self.path, self.contents)
        self.position, self.raw, _ = unfinished_parts(self.path)
        self.finished = False

    @property
    def _keys(self) -> list[str]:
        return list(self.contents.trained.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the candidates' trained tensors."""
        return self._bytes(all_runs(self.contents.numels))

    @property
    def unfinished(self) -> bool:
        """Whether an interrupted run can be continued."""
        return is_unfinished(self.path)

    def check_finished(self) -> None:
        """BasisError unless the file that is there is what this job would write, by its header."""
        theirs = read_safetensors(self.path, DTYPES)["center_weights"].read()
        ours, of = self._options(), dict[str, Any]()
        of |= {"contents": read_contents(self.path).as_json(), "center_weights": theirs.tolist()}
        for options in (of, ours):  # where the candidates lie does not matter any more
            options["contents"]["candidates"] = [c[1] for c in options["contents"]["candidates"]]
        if odd := _differences(of, ours):
            raise BasisError(
                f"of another run: {odd[0]} differs; pass --overwrite to replace it", self.path
            )

    def clear(self) -> None:
        """Removes what an interrupted run has left."""
        remove_parts(self.path)

    def run(self, resume: bool = False, progress: Callable[[int], None] | None = None) -> Report:
        """Packs all that is not packed yet.

        Args:
            resume: go on with what an interrupted run has left, if there is something; on any
                number of ranks
            progress: called with the bytes that all ranks have read since the last call

        Raises:
            CandidateError: a candidate holds NaN or Inf, or changes meanwhile
            OSError: the disk is full; what is saved stays, to be resumed
            BasisError: another process is packing to the same place, or what is left there is of
                another run
            DistributedError: another rank failed
        """
        memory, begun, ranks = PeakMemory(), time.perf_counter(), self.ranks
        with ranks.fail_together(f"packing {self.path}"):
            resumed = ranks.broadcast_object(resume and self.unfinished)
            todo = all_runs(self.contents.numels)
            if resumed:
                todo = ranks.broadcast_object(self._read_position() if ranks.is_rank_zero else [])
            width = -ranks.most(-self.sharding.block_columns)
            shares = share_out(todo, self.sizes, ranks.world_size, width)
            try:
                self._open(resumed)
                with self.raw_file:
                    if progress and resumed:
                        progress(self.nbytes - self._bytes(todo))
                    self.groups = Groups(self.contents)
                    with Behind() as self.behind:
                        self._stream(shares, width, progress)
                        self._sync()
                    self._finish()
            finally:
                self._close()
            read = torch.tensor([self.candidates.bytes_read], dtype=torch.int64, device="cpu")
            return Report(
                int(ranks.all_reduce_(read)),
                self.writer.size,
                time.perf_counter() - begun,
                ranks.most(memory.bytes()),
                resumed,
            )

    def _open(self, resumed: bool) -> None:
        """Makes the files ready, or goes on with them."""
        writer = self.writer
        if self.ranks.is_rank_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            writer.lock()
            if not resumed:  # no position may be there for a file that is started anew
                remove_parts(self.path, but=writer.partial)
            writer.open(keep=resumed)
            self.raw_file = open(self.raw, "r+b" if resumed else "w+b")  # noqa: SIM115 (run closes)
            if self.ranks.world_size > 1:
                writer.share()
        if self.ranks.world_size > 1:
            self._check_one_folder()
        if not self.ranks.is_rank_zero:
            writer.join()
            self.raw_file = open(self.raw, "r+b")  # noqa: SIM115 (run closes it)

    def _check_one_folder(self) -> None:
        """BasisError on a rank that does not see what rank 0 writes beside the file."""
        proof = proof_of(self.path)
        token = self.ranks.broadcast_object(secrets.token_bytes(16))
        try:
            if self.ranks.is_rank_zero:
                proof.write_bytes(token)
            self.ranks.barrier()
            found = b""
            with contextlib.suppress(OSError):
                found = proof.read_bytes()
            if found != token:
                raise BasisError(
                    "expected the folder that rank 0 writes to, found another: ranks write one"
                    " file, on a file system that all hosts share",
                    self.path.parent,
                )
            self.ranks.barrier()  # before it is removed
        finally:
            if self.ranks.is_rank_zero:
                proof.unlink(missing_ok=True)

    def _close(self) -> None:
        """Closes the basis; removes what nobody can continue."""
        if not self.writer.is_open:
            return
        self.finished = self.writer.finished
        if self.ranks.is_rank_zero and (self.finished or not self.position.exists()):
            remove_parts(self.path, but=self.writer.partial if self.finished else None)
        self.writer.close()

    # Columns -------------------------------------------------------------------------------------

    @torch.no_grad()
    def _stream(
        self, shares: list[list[Run]], width: int, progress: Callable[[int], None] | None
    ) -> None:
        """Packs this rank's share, block by block; all ranks do one, then look at each other.

        Args:
            shares: the blocks of each rank
            width: columns of a block, at most
            progress: as for `run`
        """
        numels, labels = [numel for numel in self.contents.numels if numel], width // TILE
        packer = tk.Packer(
            len(self.candidates),
            [(numel,) for numel in numels],
            self.contents.bits,
            self.groups.number % labels,  # no block has more groups than tiles
            self.feed.device,
            sink=self._keep,
            num_segments=labels,
        )
        mine, saved = shares[self.ranks.rank], time.perf_counter()
        within = [(begin, end) for _, begin, end in mine]
        stream = self.sharding.stream([k for k, *_ in mine], within=within)
        for done in range(max(map(len, shares))):
            if done < len(mine):
                self._pack(packer, *next(stream))
            if progress:
                progress(self._bytes([share[done] for share in shares if done < len(share)]))
            if self.ranks.most(int(time.perf_counter() - saved > SAVE_SECONDS)):
                self._save_position([run for share in shares for run in share[done + 1 :]])
                saved = time.perf_counter()

    def _pack(self, packer: tk.Packer, k: int, block: Block) -> None:
        """Packs a block of tensor k, and has it written with its center and its sums."""
        center = torch.empty(block.end - block.begin, dtype=torch.float32, device=self.feed.device)
        packer.seek(self.groups.tile(k, block.begin))
        packer.sum_sq.zero_(), packer.max_scale.zero_()
        try:
            self.sharding.pack(packer, k, self.feed.block(block), self.weights, center)
        except tk.NotFiniteError as error:
            self.clear()  # other files will make another basis
            raise not_finite(
                self.candidates, self.sharding.keys[k], self.sharding.read(k)
            ) from error
        first = self.contents.numels[:k]
        self.behind(self.writer.put, "center", center.cpu(), sum(first) + block.begin)
        groups = self.groups.of(k, block.begin, block.end)
        at = torch.tensor(groups, dtype=torch.int64, device="cpu") % packer.num_segments
        sums = torch.stack([packer.sum_sq.cpu()[:, at], packer.max_scale.cpu()[:, at].double()])
        self.behind(self._write_raw, self._sums_at(groups.start), sums.permute(2, 0, 1))

    def _keep(self, first: int, codes: Tensor, scales: Tensor) -> None:
        """Has tiles written, from tile `first` on, while the next ones are packed.

        Those before them are written: their memory is the next ones'.
        """
        self.behind.wait()
        self.behind(self._write, first, codes.cpu(), scales.cpu())

    def _write(self, first: int, codes: Tensor, scales: Tensor) -> None:
        self.writer.put("codes", codes, first * codes[0].numel() if len(codes) else 0)
        self._write_raw(first * scales.shape[1] * 2, scales)

    # What is kept until all is packed: scales (tiles, n) bfloat16, sums (groups, 2, n) float64 ----

    def _sums_at(self, group: int) -> int:
        """Where a group's sums are in that file."""
        n = len(self.candidates)
        return self.groups.offsets[-1] * n * 2 + group * n * 16

    def _write_raw(self, at: int, t: Tensor) -> None:
        self.raw_file.seek(at)
        self.raw_file.write(raw_bytes(t.contiguous()))

    def _read_raw(self, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of that file, finite and not negative; else BasisError."""
        t = torch.empty(shape, dtype=dtype, device="cpu")
        with open(self.raw, "rb") as f:  # anew: network file systems then show what others wrote
            f.seek(at)
            data = f.read(t.nbytes)
        if len(data) == t.nbytes and data:
            t = torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
        if len(data) != t.nbytes or not bool(((t >= 0) & torch.isfinite(t)).all()):
            raise BasisError(
                "not the scales of an unfinished basis of these candidates; pass --overwrite to"
                " start anew",
                self.raw,
            )
        return t

    # The finish ----------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Writes all but codes and center, and puts the file at its place."""
        ranks, shape = self.ranks, (len(self.candidates), len(self.contents.labels))
        ranks.barrier()
        sums = torch.zeros(2, *shape, dtype=torch.float64, device="cpu")
        if ranks.is_rank_zero:
            self._add_up(*sums)
        sum_sq, max_scale = ranks.broadcast_(sums, 0)
        scaling = Scaling.of(sum_sq, max_scale.float(), self.contents.normalize)
        self._write_scales(scaling)
        self.candidates.check()
        self.writer.sync()
        ranks.barrier()
        if ranks.is_rank_zero:
            small = {
                "row_scale": scaling.row_scale,
                "divisor": scaling.divisor,
                "center_weights": self.weights,
                "coefficients": torch.zeros(shape, dtype=torch.float32, device="cpu"),
            }
            with plain_weights(self.sharding.model):
                load_untrained(self.sharding, self.weights)
                small |= untrained(self.sharding.model, self.contents)
            for name, t in small.items():
                self.writer.put(name, t)
            self.writer.finish()
        ranks.barrier()

    def _add_up(self, sum_sq: Tensor, max_scale: Tensor) -> None:
        """Sums of all groups, in the order of the columns; both (n, L) float64."""
        n, count = len(self.candidates), len(self.groups.segment)
        step = max(1, self.candidates.block_bytes // (16 * n))
        for first in range(0, count, step):
            shape = (min(step, count - first), 2, n)
            sums = self._read_raw(self._sums_at(first), shape, torch.float64)
            self.groups.add_up(sums, first, sum_sq, max_scale)

    def _write_scales(self, scaling: Scaling) -> None:
        """Makes the scales of the basis from those that were kept: each rank some tiles.

        Args:
            scaling: how, now that all of every segment is known
        """
        n, lost, ranks = len(self.candidates), 0, self.ranks
        segment = self.groups.tile_segment
        begin, end = (len(segment) * r // ranks.world_size for r in (ranks.rank, ranks.rank + 1))
        step = max(1, self.candidates.block_bytes // (8 * n))
        for first in range(begin, end, step):
            tiles = segment[first : min(first + step, end)]
            raw = self._read_raw(first * n * 2, (len(tiles), n), torch.bfloat16)
            scales, zeros = scaling.apply(raw, tiles)
            if (scales.view(torch.uint8) > LARGEST_SCALE).any():
                raise BasisError(
                    "sums and scales do not fit; pass --overwrite to start anew", self.raw
                )
            self.writer.put("scales", scales, first * n)
            lost += int(zeros)
        lost = int(ranks.all_reduce_(torch.tensor([lost], dtype=torch.int64, device="cpu")))
        if lost and ranks.is_rank_zero:
            print(f"twa: warning: {lost_groups(lost, len(segment) * n)}", file=sys.stderr)

    def _bytes(self, runs: Sequence[Run]) -> int:
        """Bytes of these columns in all candidates."""
        return sum((end - begin) * self.sizes[k] for k, begin, end in runs)

    # Position of an interrupted run --------------------------------------------------------------

    def _sync(self) -> None:
        """Returns when all that this rank has packed is on the disk.

        Raises CandidateError if the candidates are not what they were: it would be wrong.
        """
        self.candidates.check()
        self.behind.wait()
        self.writer.sync()
        self.raw_file.flush()
        os.fsync(self.raw_file.fileno())

    def _save_position(self, todo: Sequence[Run]) -> None:
        """Writes what is left to pack, when all else is on the disk."""
        self._sync()
        self.ranks.barrier()
        if self.ranks.is_rank_zero:
            write_json(self.position, {"todo": joined(todo), "of": json.dumps(self._options())})
        self.ranks.barrier()

    def _options(self) -> dict[str, Any]:
        """What must be the same in a run that goes on."""
        return {"contents": self.contents.as_json(), "center_weights": self.weights.tolist()}

    def _read_position(self) -> list[Run]:
        """What an interrupted run has left to pack."""
        expected = "expected the position of an interrupted run"
        value: Any = read_json(self.position, expected, MAX_POSITION)  # of any type, caught below
        try:
            of, ours = json.loads(value["of"]), self._options()
            version = of["contents"].get("format")
            if text := problem(version, BASIS, "pass --overwrite to start anew"):
                raise BasisError(text, self.position)
            if odd := _differences(of, ours):
                raise BasisError(
                    f"of another run: {odd[0]} differs; pass --overwrite to start anew",
                    self.position,
                )
            if not are_runs(value["todo"], self.contents.numels):
                raise ValueError("todo: expected runs of columns")
            return [(k, begin, end) for k, begin, end in value["todo"]]
        except BasisError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise BasisError(
                f"not the position of an interrupted run ({type(error).__name__}: {error})",
                self.position,
            ) from error


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Names of what differs between the options of two runs."""
    flat = [json.loads(json.dumps(of["contents"] | of | {"contents": 0})) for of in (theirs, ours)]
    return [name for name in flat[1] if flat[0].get(name) != flat[1][name]]
