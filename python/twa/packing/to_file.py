"""`twa pack`: candidates straight into a packed basis on disk, in one stream that can be
interrupted.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import twa_kernels as tk
from twa_kernels.packed import Scaling, lost_groups
from twa_kernels.reference import BITS

from ..basis.file import LARGEST_SCALE, NAME, BasisError, Writer
from ..basis.segments import GRANULARITIES, layout_of, parse_granularity
from ..distributed.ranks import World
from ..distributed.sharding import Placement
from ..distributed.weights import load_untrained, not_finite
from ..io.atomic import clear_unfinished, lock, write_json
from ..io.candidates import Candidates
from ..io.formats import read_json
from ..io.memory import limit_memory, parse_bytes
from ..io.progress import PeakMemory
from ..subspace import choices
from ..tasks.contract import load_task
from .load import contents_of, find_basis, untrained

SAVE_SECONDS = 10.0  # between saved positions
MAX_POSITION = 1 << 30  # bytes: two numbers as text for each candidate and segment


# Unfinished files --------------------------------------------------------------------------------


def unfinished_parts(path: Path) -> tuple[Path, Path, Path]:
    """Beside a basis that is being packed: the position to continue from, which the others are on
    the disk before; the scales as bfloat16, before all of a segment is known; the basis so far."""
    return tuple(
        path.with_name(f"{path.name}{kind}.partial") for kind in (".position", ".scales", "")
    )


def is_unfinished(path: Path) -> bool:
    """Whether an interrupted run can be continued there."""
    return all(p.is_file() for p in unfinished_parts(path))


def remove_parts(path: Path, but: Path | None = None) -> None:
    """The position first: nothing may be continued from half of the rest."""
    position = unfinished_parts(path)[0]
    clear_unfinished(path.parent, [glob.escape(position.name)])
    for part in unfinished_parts(path):
        if part != but:
            part.unlink(missing_ok=True)


def remove_left_over(path: Path) -> None:
    """What a run has left that was killed when its basis was in place already, or before there was
    a position to continue from.
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
    """read: bytes of the candidates; written: of the file; seconds: of this process alone; memory:
    highest resident bytes.
    """

    read: int
    written: int
    seconds: float
    memory: int
    resumed: bool


class PackToFile:
    """Packs candidates straight into a file, whose size is not limited by memory.

    Interrupted, it goes on where it was (resume=True), with the bits of an undisturbed run: the
    file is the same whatever the interruptions and the memory."""

    def __init__(
        self,
        path: str | Path,
        model: nn.Module,
        candidates: Candidates,
        *,
        bits: int = 4,
        granularity: object = "tensor",
        center: str | int | Tensor = "mean",
        normalize: str = "row",
    ) -> None:
        self.path, self.candidates = Path(path), candidates
        layout = layout_of(model, candidates)
        self.weights, segments = choices(layout, candidates, granularity, center)
        if bits not in BITS:
            raise ValueError(
                f"bits: expected one of {BITS}, found {bits!r}; the dense basis (32) is not"
                " written: it is the candidates"
            )
        self.place = Placement(World(), model, candidates, layout)
        self.contents = contents_of(layout, candidates, bits, segments, normalize)
        self.writer = Writer(self.path, self.contents)
        self.position, self.raw, _ = unfinished_parts(self.path)
        self.finished = False

    @property
    def unfinished(self) -> bool:
        return is_unfinished(self.path)

    def clear(self) -> None:
        """Removes what an interrupted run has left."""
        remove_parts(self.path)

    def run(self, resume: bool = False, progress: Callable[[int], None] | None = None) -> Report:
        """progress: called with the bytes read since the last call.

        Raises OSError if the disk is full (what is saved stays, to be resumed), BasisError if
        another process is packing to the same place."""
        memory, begun, resumed = PeakMemory(), time.perf_counter(), resume and self.unfinished
        c, writer = self.contents, self.writer
        packer = tk.Packer(
            len(self.candidates),
            c.shapes,
            c.bits,
            c.parts.of_tiles(c.numels),
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
                self._stream(packer, begin, progress)
                load_untrained(self.place, self.weights)
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
        self.writer.put("codes", codes, first * codes[0].numel() if len(codes) else 0)
        self.raw_file.seek(first * scales.shape[1] * 2)
        self.raw_file.write(memoryview(scales.reshape(-1).view(torch.uint8).numpy()))

    @torch.no_grad()
    def _stream(
        self, packer: tk.Packer, begin: tuple[int, int], progress: Callable[[int], None] | None
    ) -> None:
        numels, saved = self.contents.numels, time.perf_counter()
        starts = [sum(numels[:k]) for k in range(len(numels))]
        if begin[0] < len(numels) and begin[1] and begin[1] == numels[begin[0]]:
            raise BasisError(f"{self.position}: expected a position inside a tensor, found its end")
        for k, block in self.place.stream(range(len(numels)), begin=begin):
            try:
                center = torch.empty(block.end - block.begin)
                self.place.pack(packer, k, block, self.weights, center)
                self.writer.put("center", center, starts[k] + block.begin)
            except tk.NotFiniteError as error:
                self.clear()  # other files will make another basis
                raise not_finite(self.candidates, self.place.keys[k], self.place.read(k)) from error
            at = (k, block.end)
            if block.end == numels[k]:
                packer.end_tensor()
                at = (k + 1, 0)
            if progress:
                progress(sum(r.numel() * r.element_size() for r in block.rows))
            if time.perf_counter() - saved > SAVE_SECONDS:
                self._save_position(packer, at)
                saved = time.perf_counter()

    def _finish(self, packer: tk.Packer) -> None:
        n, writer, segment = len(self.candidates), self.writer, packer.tile_segment
        scaling, lost = Scaling.of(packer.sum_sq, packer.max_scale, self.contents.normalize), 0
        step = max(1, self.candidates.block_bytes // (8 * n))
        self.raw_file.flush()
        for first in range(0, len(segment), step):
            at = slice(first, min(first + step, len(segment)))
            self.raw_file.seek(first * n * 2)
            data = self.raw_file.read((at.stop - first) * n * 2)
            whole = len(data) == (at.stop - first) * n * 2
            if whole:
                scales, zeros = scaling.apply(
                    torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(-1, n), segment[at]
                )
            if not whole or (scales.view(torch.uint8) > LARGEST_SCALE).any():
                raise BasisError(
                    f"{self.raw}: not the scales of an unfinished basis of these candidates; pass"
                    " --overwrite to start anew"
                )
            writer.put("scales", scales, first * n)
            lost += zeros
        if lost:
            print(f"twa: warning: {lost_groups(lost, len(segment) * n)}", file=sys.stderr)
        small = {
            "row_scale": scaling.row_scale,
            "divisor": scaling.divisor,
            "center_weights": self.weights,
        }
        small["coefficients"] = torch.zeros(packer.sum_sq.shape)
        for name, t in (small | untrained(self.place.model, self.contents)).items():
            writer.put(name, t)
        self.candidates.check()
        writer.finish()

    def _bytes_before(self, index: int, column: int) -> int:
        keys = list(self.contents.trained.values())
        whole = sum(c.info[key].nbytes for c in self.candidates for key in keys[:index])
        return whole + (
            sum(c.info[keys[index]].dtype.itemsize for c in self.candidates) * column
            if index < len(keys)
            else 0
        )

    # Position of an interrupted run --------------------------------------------------------------

    def _save_position(self, packer: tk.Packer, at: tuple[int, int]) -> None:
        """After the parts before it are on the disk."""
        self.writer.sync()
        self.raw_file.flush()
        os.fsync(self.raw_file.fileno())
        sums = {"sum_sq": packer.sum_sq.tolist(), "max_scale": packer.max_scale.tolist()}
        options = {"contents": self.contents.as_json(), "center_weights": self.weights.tolist()}
        write_json(
            self.position, {"tensor": at[0], "column": at[1], **sums, "of": json.dumps(options)}
        )

    def _read_position(self, packer: tk.Packer) -> tuple[int, int]:
        value = read_json(
            self.position, "expected the position of an interrupted run", MAX_POSITION
        )
        try:
            of, ours = (
                json.loads(value["of"]),
                json.loads(
                    json.dumps(
                        {
                            "contents": self.contents.as_json(),
                            "center_weights": self.weights.tolist(),
                        }
                    )
                ),
            )
            for theirs, mine in ((of["contents"], ours["contents"]), (of, ours)):
                if odd := [name for name in mine if mine[name] != theirs.get(name)]:
                    raise BasisError(
                        f"{self.position}: of another run: {odd[0]} differs; pass --overwrite to"
                        " start anew"
                    )
            sums = (
                torch.tensor(value["sum_sq"], dtype=torch.float64),
                torch.tensor(value["max_scale"], dtype=torch.float32),
            )
            packer.resume(value["tensor"], value["column"], *sums)
            return value["tensor"], value["column"]
        except BasisError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise BasisError(
                f"{self.position}: not the position of an interrupted run ({type(error).__name__}:"
                f" {error})"
            ) from error


# Command line ------------------------------------------------------------------------------------


def _granularity(text: str) -> str | int:
    try:
        return parse_granularity(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "task",
        metavar="TASK",
        help="a built-in task, or a Python file that defines the model (as for twa average)",
    )
    parser.add_argument(
        "candidates",
        metavar="CANDIDATES",
        nargs="+",
        help="checkpoint files, glob patterns or directories, oldest first",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        required=True,
        help=f"the packed basis (in a directory: {NAME})",
    )
    parser.add_argument("--bits", type=int, choices=BITS, default=4, help="(default: %(default)s)")
    parser.add_argument(
        "--granularity",
        type=_granularity,
        default="tensor",
        help=f"of the coefficients: {GRANULARITIES} (default: %(default)s)",
        metavar="KIND",
    )
    parser.add_argument(
        "--center",
        metavar="CENTER",
        default="mean",
        help="mean, last, zero, or a candidate's index (default: %(default)s)",
    )
    parser.add_argument(
        "--normalize",
        choices=tk.packed.NORMALIZE,
        default="row",
        help="see Subspace.from_candidates (default: %(default)s)",
    )
    parser.add_argument(
        "--entry",
        help="key under which torch and DCP checkpoints hold the weights, such as state_dict_ema",
    )
    parser.add_argument(
        "--max-memory",
        metavar="SIZE",
        type=parse_bytes,
        help="most that the process may hold in memory, such as 2GB",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a file that is there, or an unfinished one",
    )
    existing.add_argument(
        "--resume", action="store_true", help="go on with an unfinished file, if there is one"
    )


def run_pack(args: argparse.Namespace) -> None:
    """Packs candidates into a file that Subspace.load maps: every later run starts at once, without
    the candidates.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("twa pack runs as one process: start it without torchrun")
    path = find_basis(args.output)
    if path.exists() and args.resume and not is_unfinished(path):
        remove_left_over(path)
        print(f"{path} is finished: there is nothing to resume (--overwrite packs it again)")
        return
    if path.exists() and not args.overwrite and not args.resume:
        raise BasisError(f"{path}: exists; pass --overwrite to replace it")
    candidates = Candidates(args.candidates, entry=args.entry)
    center = int(args.center) if args.center.lstrip("-").isdecimal() else args.center
    model = load_task(args.task).model()
    job = PackToFile(
        path,
        model,
        candidates,
        bits=args.bits,
        granularity=args.granularity,
        center=center,
        normalize=args.normalize,
    )
    if job.unfinished and not args.resume and not args.overwrite:
        raise BasisError(
            f"{job.position}: of an unfinished run; pass --resume to continue it, or --overwrite to"
            " start anew"
        )
    args.how_to_go_on = lambda: _how_to_go_on(job, args.overwrite)
    if args.max_memory:
        limit_memory(candidates, args.max_memory)
    total = sum(c.info[key].nbytes for c in candidates for key in job.contents.trained.values())
    with tqdm(
        total=total,
        desc=f"packing {len(candidates)} candidates",
        unit="B",
        unit_scale=True,
        mininterval=0.5,
        file=sys.stderr,
    ) as bar:
        try:
            report = job.run(args.resume, bar.update)
        except OSError as error:
            raise BasisError(
                f"{path}: could not be written ({error.strerror});"
                f" {_how_to_go_on(job, args.overwrite)}"
            ) from error
    done = "continued and finished" if report.resumed else "packed"
    weights, rate = sum(job.contents.numels), report.read / 1e9 / report.seconds
    print(
        f"{done} {len(candidates)} candidates of {weights:,} weights: {report.read / 1e9:.2f} GB"
        f" read in {report.seconds:.1f} s ({rate:.2f} GB/s), {report.written / 1e9:.2f} GB written"
        f" to {path}, highest memory {report.memory / 1e9:.2f} GB"
    )
    print(f"load it with twa.Subspace.load({str(path)!r}, model)")


def _how_to_go_on(job: PackToFile, overwrite: bool) -> str:
    if job.unfinished:
        return (
            "continue with the same command and"
            f" --resume{' in place of --overwrite' if overwrite else ''} ({job.position})"
        )
    return (
        f"{job.path} is finished"
        if job.finished
        else "nothing of it is kept: start again with the same command"
    )
