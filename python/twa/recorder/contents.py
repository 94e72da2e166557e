"""What of a model is recorded, and what this rank records of it."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..distributed.ranks import Ranks, digest
from ..distributed.sharding import Shard, shard_of
from ..dtensors import is_dtensor, is_sharded, local, reshard
from ..io import loading
from ..io.candidate import plain_keys, without_wrappers
from ..io.checks import MAX_NAME, shown
from ..io.errors import TwaError
from ..io.key_map import aliases_of
from ..io.loading import named_tensors, state_names
from ..io.recording_files import WEIGHTS, Contents
from ..io.safetensors import SAFETENSORS_DTYPES
from ..io.trail import Entry

#: (name, parameter) -> the tensor to record in the parameter's place, such as a float32 master
Weights = Callable[[str, nn.Parameter], Tensor]


@dataclass(frozen=True)
class Copied:
    """A part of a tensor that one rank records, and others have, too.

    Attributes:
        name: of the tensor in the model
        dtype: of it
        begin: where the part begins in the tensor
        sizes: of the part
        owner: the rank that records it
    """

    name: str
    dtype: torch.dtype
    begin: tuple[int, ...]
    sizes: tuple[int, ...]
    owner: int


@dataclass(frozen=True)
class Watched:
    """The tensors of a model that are recorded.

    Attributes:
        model: that has them
        ranks: that share it
        contents: of the recording; `trained` are this rank's parts
        trained: names of all recorded parameters, on whichever rank
        copied: what an average has to be sent to other ranks for
        sharded: whether the model was, by FSDP2 or as DTensors
    """

    model: nn.Module
    ranks: Ranks
    contents: Contents
    trained: frozenset[str]
    copied: tuple[Copied, ...]
    sharded: bool

    @classmethod
    def of(cls, model: nn.Module, bits: int, ranks: Ranks) -> Watched:
        """What is to be recorded of a model.

        Trainable parameters are coded. Buffers are kept as they are, and so are frozen parameters,
        once, unless they are more than the trained ones, or sharded.

        Raises:
            TwaError: it has no trainable floating-point parameter, or one without a shape, or of a
                dtype that cannot be recorded; or ranks hold it in a way that is not supported
        """
        tensors = named_tensors(model)
        _check_ranks(model, tensors, ranks)
        aliases = aliases_of(tensors)
        of_state = {without_wrappers(key): name for key, name in state_names(model).items()}
        saved = {*of_state.values()}
        made = loading.made_by_hooks(model)
        saved |= {loading.name_of(model, key) for key in made}
        plain = {k: p for p, k in plain_keys({k: k for k in (*of_state, *made)}).items()}
        own = loading.own_keys(model, tensors)
        keys = {name: plain.get(key, key) for name, key in own.items()}
        trained = [n for n, t in tensors.items() if t.requires_grad and n not in aliases]
        for name in trained:
            _check(name, tensors[name])
        if not trained:
            raise TwaError("the model has no trainable parameter: nothing to record")
        count = sum(tensors[name].numel() for name in trained)
        others = [n for n in tensors if n in saved and n not in aliases and n not in trained]
        frozen = [n for n in others if isinstance(tensors[n], nn.Parameter)]
        if sum(tensors[name].numel() for name in frozen) > count:
            others = [name for name in others if name not in frozen]
        kept = [n for n in others if not is_dtensor(tensors[n]) and _is_known(tensors[n])]
        held = {*trained, *kept}
        run, sharded = ranks.broadcast_object(uuid.uuid4().hex), is_sharded(model)
        for key in (*keys.values(), *plain.values()):
            _check_key(key)
        contents = Contents(
            run,
            bits,
            tuple(_entries({n: tensors[n] for n in trained}, keys, ranks)),
            {keys[name]: name for name in kept} if ranks.is_rank_zero else {},
            {
                plain[key]: keys[name]
                for key, name in of_state.items()
                if name in held and plain[key] != keys[name] and ranks.is_rank_zero
            },
            (ranks.rank, ranks.world_size) if sharded else (0, 1),
        )
        copied = _copied({n: tensors[n] for n in (*trained, *kept)}, ranks)
        return cls(model, ranks, contents, frozenset(trained), copied, sharded)

    @property
    def records(self) -> bool:
        """Whether this rank has something to record."""
        return bool(self.contents.trained)

    def parameters(self) -> list[Tensor]:
        """This rank's recorded parameters, as they are now; tensors to read or write.

        Raises:
            TwaError: the model is not the one that it was
        """
        reshard(self.model)
        if self.ranks.world_size > 1 and is_sharded(self.model) != self.sharded:
            raise TwaError(
                "the model was sharded after the recorder was made, which belongs after fully_shard"
                " or accelerator.prepare"
            )
        tensors = named_tensors(self.model)
        aliases = aliases_of(tensors)
        found = []
        for e in self.contents.trained:
            t = tensors.get(e.name)
            if t is None or tuple(local(t).shape) != e.sizes:
                shape = "none" if t is None else str(list(local(t).shape))
                raise TwaError(
                    f"{e.name!r}: expected {list(e.sizes)} as at the first snapshot, found {shape}"
                )
            found.append(t)
        for name, t in tensors.items():
            if t.requires_grad and name not in self.trained and name not in aliases:
                raise TwaError(f"{name!r} is trainable, and was not when the recorder was made")
        return found

    def state(self, frozen: bool = False) -> dict[str, Tensor]:
        """All else that is kept, by key: copies in the CPU's memory.

        Those of a GPU's tensors are filled when its current stream has come so far.

        Args:
            frozen: whether frozen parameters are among them
        """
        tensors, names = named_tensors(self.model), self.contents.names
        found = {key: tensors[name] for key, name in names.items() if name in tensors}
        return {
            key: _on_cpu(t.detach().contiguous())
            for key, t in found.items()
            if frozen or not isinstance(t, nn.Parameter)
        }


def _on_cpu(t: Tensor) -> Tensor:
    """A copy in the CPU's memory; nothing waits for one of a GPU's tensor."""
    if not t.is_cuda:
        return t.to("cpu", copy=True)
    return torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True).copy_(
        t, non_blocking=True
    )


def _check_ranks(model: nn.Module, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """TwaError unless all ranks have this model, whole or as DTensors."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(
        isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules()
    ):
        raise TwaError("the model is wrapped in FullyShardedDataParallel: expected fully_shard")
    if ranks.world_size > 1:
        found = [(n, tuple(t.shape), str(t.dtype), t.requires_grad) for n, t in tensors.items()]
        ranks.check_equal({"model": digest(found)})


def _check(name: str, t: Tensor) -> None:
    """TwaError unless a parameter can be recorded."""
    if nn.parameter.is_lazy(t):
        raise TwaError(f"{name!r} has no shape yet: run a batch through the model first")
    if t.is_meta:
        raise TwaError(f"{name!r} is on the meta device, without numbers: load the model first")
    if hasattr(t, "ds_id"):
        raise TwaError(
            f"{name!r} is sharded by DeepSpeed's ZeRO-3, which is not supported: use FSDP2"
            " (fully_shard), or ZeRO-2"
        )
    known = t.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if not known or local(t).layout != torch.strided:
        found = f"{t.dtype}, {local(t).layout}"
        raise TwaError(f"{name!r}: expected a dense floating-point parameter, found {found}")


def _check_key(key: str) -> None:
    """TwaError for a name that no file can hold."""
    if len(key) > MAX_NAME - len(WEIGHTS) or (not key.isascii() and any(map(_is_half, key))):
        raise TwaError(f"{shown(key)}: no name of a tensor in a file, of {len(key)} characters")


def _is_half(letter: str) -> bool:
    """Whether this is half of a surrogate pair, which UTF-8 does not have."""
    return "\ud800" <= letter <= "\udfff"


def _is_known(t: Tensor) -> bool:
    """Whether a file can hold this tensor."""
    dense = t.layout == torch.strided and t.device.type != "meta" and not nn.parameter.is_lazy(t)
    return dense and t.dtype in SAFETENSORS_DTYPES.values()


def _entries(tensors: dict[str, Tensor], keys: dict[str, str], ranks: Ranks) -> list[Entry]:
    """This rank's part of each of these tensors; those that another rank records are left out."""
    found = []
    for name, t in tensors.items():
        shard = _shard(name, t, ranks)
        if shard.counts:
            begin, sizes = _place(shard)
            found.append(Entry(keys[name], name, t.dtype, tuple(t.shape), begin, sizes))
    return found


def _shard(name: str, t: Tensor, ranks: Ranks) -> Shard:
    """What this rank holds of a tensor."""
    return Shard(t.shape, None, 1.0, True) if ranks.world_size == 1 else shard_of(name, t, ranks)


def _place(shard: Shard) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where a shard begins in its tensor, and its sizes."""
    sizes = tuple(shard.shape)
    return (tuple(s.start for s in shard.part) if shard.part else (0,) * len(sizes)), sizes


def part_of(name: str, t: Tensor, ranks: Ranks) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where this rank's part of a tensor begins in it, and the part's sizes."""
    return _place(_shard(name, t, ranks))


def _copied(tensors: dict[str, Tensor], ranks: Ranks) -> tuple[Copied, ...]:
    """Parts of these tensors that a rank has, and another records. Ranks call it together."""
    if ranks.world_size == 1:
        return ()
    shards = {name: _shard(name, t, ranks) for name, t in tensors.items()}
    idle = {name for name, shard in shards.items() if not shard.counts}
    wanted = set[str]().union(*ranks.all_gather_object(idle))
    mine = {n: (_place(s), s.counts) for n, s in shards.items() if n in wanted}
    everyone = ranks.all_gather_object(mine) if wanted else []
    found: dict[tuple[str, tuple[int, ...]], Copied] = {}
    for rank, theirs in enumerate(everyone):
        for name, ((begin, sizes), counts) in theirs.items():
            if counts and torch.Size(sizes).numel():
                found[name, begin] = Copied(name, tensors[name].dtype, begin, sizes, rank)
    return tuple(found.values())


def rounded(e: Entry, w: Tensor) -> Tensor:
    """A tensor of the first snapshot, as it is kept: in 16 bits, vectors in 32."""
    if w.element_size() == 2:
        return w
    return w.float() if len(e.shape) < 2 else w.to(torch.bfloat16)


def master_of(p: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> Tensor | None:
    """The float32 master of a parameter in half precision, if an optimizer's state has one."""
    if p.element_size() != 2:
        return None
    for optimizer in optimizers:
        for key, value in optimizer.state.get(p, {}).items():
            named = isinstance(key, str) and ("master" in key or "fp32" in key)
            fits = isinstance(value, Tensor) and value.shape == p.shape
            if named and fits and value.dtype == torch.float32:
                return value
    return None
