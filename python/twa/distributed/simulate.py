"""What ranks hold and send, counted on the objects that training makes, without any weights.

One process stands for one rank after another. torch.distributed's fake process group says which
rank it is, and sends nothing; tensors are on the meta device, or fake. So a model of any size is
sharded by the same code as in training, on any number of ranks, in the memory of its names and
shapes. cost.py has the formulas for the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import twa_kernels as tk

from ..basis.dense import DenseBasis
from ..basis.pieces import Pieces
from ..basis.segments import Granularity, Segments, segments_of
from ..basis.sources import Source
from ..dtensors import is_dtensor, is_sharded, local
from ..io.candidates import BLOCK_BYTES, Candidates
from ..io.errors import TwaError
from ..io.key_map import KeyMap, aliases_of
from ..io.loading import named_tensors
from ..io.mapped import TensorInfo
from . import cost
from .choose import choose_sharding
from .ranks import Ranks
from .rows import RowsSharding
from .sharding import KeptBasis, Sharding
from .traffic import Traffic

META = torch.device("meta")


@dataclass(frozen=True)
class Counted:
    """What a rank holds while training, without activations, and hands to collectives in a step.

    Attributes:
        rank: its number
        memory: bytes by kind, as `cost.memory` names them
        payload: bytes by kind, as `cost.payload` names them
    """

    rank: int
    memory: dict[str, float]
    payload: dict[str, float]


@dataclass(frozen=True)
class Simulation:
    """What was counted, and the job that the formulas take for it.

    Attributes:
        job: with the model's weights, segments and blocks
        counted: sharding -> the first rank and the last
    """

    job: cost.Job
    counted: dict[str, list[Counted]]

    def memory(self, sharding: str) -> dict[str, float]:
        """Bytes of the rank that holds most, by kind."""
        return max((c.memory for c in self.counted[sharding]), key=lambda m: m["total"])

    def payload(self, sharding: str) -> dict[str, float]:
        """Bytes of a step's messages, by kind."""
        return self.counted[sharding][0].payload


def simulate(
    make: Callable[[], nn.Module],
    candidates: int,
    bits: int,
    granularity: Granularity,
    ranks: int,
    low_memory: bool = False,
) -> Simulation:
    """Counts for every sharding that is possible.

    Args:
        make: makes the model; it is called on the meta device, and may shard the model itself
        candidates: how many, n
        bits: of the basis; 32: dense
        granularity: as for `Subspace.from_candidates`
        ranks: how many, K
        low_memory: whether gradients are projected and freed inside backward

    Raises:
        TwaError: the model cannot be made without weights, this process has ranks already, or a
            number is out of range
    """
    counted: dict[str, list[Counted]] = {}
    segments: dict[str, Segments] = {}
    job = units = None
    for rank in sorted({0, ranks - 1}, reverse=True):  # rank 0's shards can be cut anywhere
        with one_of(ranks, rank) as world:
            model = _on_meta(make)
            names = ("columns",) if is_sharded(model) else ("replicate", "rows", "columns")
            job = job or _job_of(model, candidates, bits, ranks, low_memory)
            for name in (s for s in names if not cost.obstacle(job, s)):
                place = place_of(name, model, candidates, bits, world)
                if name not in segments:
                    numels = [t.numel() for t in place.tensors]
                    segments[name] = segments_of(place.keys, numels, granularity)
                found = count(place, segments[name], bits, low_memory)
                if name == "columns":  # the last one, as tensors are fake ones after it
                    units = units or units_of(model)
                    found = units.added_to(found)
                counted.setdefault(name, []).insert(0, found)
    assert job is not None and units is not None  # there is a rank 0, and columns is possible
    whole, labels = job.params * job.weight_bytes, segments["columns"].labels
    block, root = max(units.blocks, default=1.0) / whole, units.root / whole
    job = replace(job, segments=len(labels), block_share=block, root_share=root)
    return Simulation(job, counted)


def _job_of(model: nn.Module, candidates: int, bits: int, ranks: int, low_memory: bool) -> cost.Job:
    """What the formulas take, but for segments and blocks."""
    trained = [t for _, t in _own_tensors(model) if _is_trained(t)]
    if not trained:
        raise TwaError("expected trainable floating-point parameters, found none", "model")
    return cost.Job(
        params=sum(t.numel() for t in trained),
        candidates=candidates,
        bits=bits,
        segments=1,
        ranks=ranks,
        weight_bytes=trained[0].element_size(),
        low_memory=low_memory,
    )


@contextlib.contextmanager
def one_of(ranks: int, rank: int) -> Iterator[Ranks]:
    """A context in which this process is one of so many ranks, and messages go nowhere."""
    try:
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        raise TwaError(f"this PyTorch ({torch.__version__}) has no fake process group") from error
    if dist.is_initialized():
        raise TwaError("expected a process by itself, found a rank of several (torchrun?)")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    _forget_layouts()
    try:
        yield Ranks.find()
    finally:
        dist.destroy_process_group()
        _forget_layouts()


def _forget_layouts() -> None:
    """Empties what DTensor keeps of its operations: by mesh, and two ranks' meshes are equal."""
    from torch.distributed.tensor import debug

    for name in ("_clear_sharding_prop_cache", "_clear_fast_path_sharding_prop_cache"):
        if clear := getattr(debug, name, None):
            clear()


def _check_layouts(tensors: Sequence[Tensor]) -> None:
    """Raises TwaError if a tensor is where it would be on another rank; see `_forget_layouts`."""
    for t in filter(is_dtensor, tensors):
        mesh = t.device_mesh
        here = (mesh.mesh == dist.get_rank()).nonzero().flatten().tolist()
        if here != list(mesh.get_coordinate() or ()):
            raise TwaError(
                f"this PyTorch ({torch.__version__}) takes one rank's shards for another's"
            )


def _on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """The model without weights."""
    try:
        with META:
            return make()
    except TwaError:
        raise
    except Exception as error:
        raise TwaError(
            f"it cannot be made without weights ({type(error).__name__}: {error}): expected one"
            " that is made of its configuration alone on torch.device('meta')",
            "model",
        ) from error


def _own_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer once, by name."""
    tensors = named_tensors(model)
    aliases = aliases_of(tensors)
    return [(name, t) for name, t in tensors.items() if name not in aliases]


def _is_trained(t: Tensor) -> bool:
    return t.requires_grad and t.is_floating_point()


class _Unread(Candidates):
    """Candidates that are nowhere: their number, shapes and dtypes."""

    at_hand = False

    def __init__(self, n: int, info: dict[str, TensorInfo]) -> None:
        nowhere = Path("simulation")
        self._hold(
            [Source(nowhere / str(k), "", "none", info, nowhere) for k in range(n)], BLOCK_BYTES
        )


def place_of(name: str, model: nn.Module, n: int, bits: int, ranks: Ranks) -> Sharding:
    """The sharding that a job with n candidates has; with "columns" the model is sharded."""
    own = _own_tensors(model)
    names = {key: key for key, _ in own}
    trained = {key: key for key, t in own if _is_trained(t)}
    info = {key: TensorInfo(tuple(t.shape), t.dtype) for key, t in own}
    key_map = KeyMap(trained, {}, {}, aliases_of(named_tensors(model)), names)
    candidates = _Unread(n, info)
    place = choose_sharding(name, model, candidates, key_map, bits, ranks, may_shard=True)
    _check_layouts(place.tensors)
    return place


def basis_of(place: Sharding, segments: Segments, bits: int) -> tuple[KeptBasis, Pieces]:
    """This rank's rows and columns of P, on the meta device, and the columns as P has them."""
    rows, cut = place.local_rows(len(place.candidates)), place.cut(segments, dense=bits == 32)
    n, shapes = rows.stop - rows.start, cut.pieces.shapes
    divisor = torch.empty(n, len(segments.labels), dtype=torch.float64, device=META)
    if bits == 32:
        dense = [
            torch.empty(n, shape.numel(), dtype=torch.float32, device=META) for shape in shapes
        ]
        return DenseBasis(dense, cut.firsts, divisor, shapes, segments.chunk), cut.pieces
    tiles = sum(count for _, count in cut.runs)
    basis = tk.PackedBasis(
        codes=torch.empty(tiles, n, 16 * bits, dtype=torch.uint8, device=META),
        scales=torch.empty(tiles, n, dtype=torch.float8_e4m3fn, device=META),
        row_scale=torch.empty(divisor.shape, dtype=torch.float32, device=META),
        tile_segment=torch.empty(tiles, dtype=torch.int32, device=META),
        divisor=divisor,
        shapes=shapes,
        bits=bits,
    )
    return basis, cut.pieces


def count(place: Sharding, segments: Segments, bits: int, low_memory: bool = False) -> Counted:
    """What this rank holds and sends, but for what FSDP gathers."""
    basis, pieces = basis_of(place, segments, bits)
    center = place.local_center(
        [torch.empty(s.shape, dtype=torch.float32, device=META) for s in place.shards]
    )
    grads = [torch.empty_like(local(t), device=META) for t in place.tensors]
    held = {
        "basis": basis.nbytes + basis.divisor.nbytes,
        "center": _bytes(center or []),
        "weights": _bytes([local(t) for _, t in _own_tensors(place.model)]),
        "gradients": _largest(place, grads) if low_memory else _bytes(grads),
        "gathered": 0,
        "buffer": place._flat()[0].nbytes if isinstance(place, RowsSharding) else 0,
    }
    memory = {kind: float(value) for kind, value in held.items()}
    sent = _messages(place, basis, pieces, segments, center, grads)
    payload = {"twa": float(sent), "model": 0.0}
    return Counted(place.ranks.rank, memory | {"total": sum(memory.values())}, payload)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


@dataclass(frozen=True)
class Units:
    """Bytes of what FSDP gathers at a time, as it hands them to the all-gather.

    Attributes:
        root: of the root module
        blocks: of each of the others
    """

    root: int
    blocks: tuple[int, ...]

    def added_to(self, counted: Counted) -> Counted:
        """The same with what is gathered: of two blocks and the root, weights and gradients."""
        gathered = 2.0 * (sum(sorted(self.blocks)[-2:]) + self.root)
        memory = counted.memory | {"gathered": gathered}
        memory["total"] += gathered
        # gathered for forward and for backward, where the root still is; and reduce-scattered
        moved = 3.0 * (sum(self.blocks) + self.root) - self.root
        return replace(counted, memory=memory, payload=counted.payload | {"model": moved})


def units_of(model: nn.Module) -> Units:
    """What FSDP gathers of a model, whose tensors are fake ones after it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    root, blocks = 0, []
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        for unit in _fsdp_modules(model):
            with Traffic() as traffic:
                unit.unshard()
                unit.reshard()
            if unit is model:
                root = traffic.bytes
            else:
                blocks.append(traffic.bytes)
    return Units(root, tuple(blocks))


def _fsdp_modules(model: nn.Module) -> list[Any]:
    """Those that gather weights by themselves, the outermost first."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _largest(place: Sharding, grads: Sequence[Tensor]) -> int:
    """Bytes of the gradients that are there at a time with low_memory.

    They are of one tensor, or of all that FSDP gathers at a time.
    """
    left = {id(t): g.nbytes for t, g in zip(place.tensors, grads, strict=True)}
    sizes = []
    for unit in reversed(_fsdp_modules(place.model)):  # inner ones first
        sizes.append(sum(left.pop(id(p), 0) for p in unit.parameters()))
    return max([*sizes, *left.values()])


@torch.no_grad()
def _messages(
    place: Sharding,
    basis: KeptBasis,
    pieces: Pieces,
    segments: Segments,
    center: list[Tensor] | None,
    grads: Sequence[Tensor],
) -> int:
    """Bytes that a step hands to collectives: projection, and weights written."""
    x = torch.zeros(len(place.candidates), len(segments.labels), dtype=torch.float32, device=META)
    with Traffic() as traffic:
        place.coefficient_gradient(basis, pieces, grads, x)
        place.write(basis, pieces, x, center)
    return traffic.bytes
