"""`Lazy`: a tensor of a file that loading code may handle, and that is read only if it must be.

A model's own loading renames tensors, cuts, turns, stacks and casts them. On a Lazy all of that is
taken down instead of done. What was taken down says where in a file the values of a parameter lie,
for this file and for any other with the same tensors. Only code that asks for numbers gets them
read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .mapped import Held, Pieces, Source, TensorInfo, contiguous_strides, view_of

_aten = torch.ops.aten


@dataclass(eq=False)
class Base:
    """A tensor that Lazy tensors are views of: one of the file, or one made of such.

    Attributes:
        key: of the tensor in the file; "" if it is made of others
        parts: what it is made of: (where each begins in it, the part)
        source: where the values of the tensor lie in the file that is being loaded
        dtype: that code sees; the values in the file may have another float dtype
        real: the values in memory, once code has asked for them
        read: whether code has asked for any of them, here or in a tensor that this one is part of
        changed: whether code has written to them
    """

    key: str
    parts: tuple[tuple[tuple[int, ...], Lazy], ...]
    source: Source
    dtype: torch.dtype
    real: Tensor | None = None
    read: bool = False
    changed: bool = False

    def values(self) -> Tensor:
        """The values in memory, (numel,); the same memory at each call."""
        if self.real is None:
            self.note_read()
            whole = self.source.read()
            real = torch.empty(whole.shape, dtype=self.dtype, device="cpu")
            self.real = real.copy_(whole).view(-1)
        return self.real

    def note_read(self) -> None:
        """Takes down that code knows numbers of this tensor, and of those that it is made of."""
        self.read = True
        for _, part in self.parts:
            part.base.note_read()

    def located(self, tensors: Mapping[str, Source]) -> Source:
        """Where the values lie in a file of these tensors."""
        if self.key:
            return tensors[self.key]
        return _joined([(begin, located(part, tensors)) for begin, part in self.parts])


class Lazy(torch.Tensor):
    """A view of a `Base`: sizes, strides and offset are the tensor's own, of a contiguous base."""

    base: Base

    @staticmethod
    def __new__(
        cls,
        base: Base,
        sizes: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        offset: int = 0,
    ) -> Lazy:
        shape = base.source.info.shape
        sizes = shape if sizes is None else sizes
        strides = contiguous_strides(shape) if strides is None else strides
        made: Lazy = torch.Tensor._make_wrapper_subclass(
            cls, sizes, strides, offset, dtype=base.dtype, device=torch.device("cpu")
        )
        made.base = base
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Lazy({self.base.key!r}, {tuple(self.shape)}, {self.dtype})"

    @property
    def place(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Sizes, strides and offset."""
        return tuple(self.shape), self.stride(), int(self.storage_offset())

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        is_view = func.is_view or func is _aten._unsafe_view.default  # of a new clone, in reshape
        if is_view and isinstance(first, Lazy):
            return _view(func, first, args[1:], kwargs)
        if func is _aten.clone.default:
            return _copied(args[0], args[0].dtype)
        if func is _aten._to_copy.default and _keeps_kind(args[0].dtype, kwargs.get("dtype")):
            return _copied(args[0], kwargs.get("dtype") or args[0].dtype)
        if func in (_aten.cat.default, _aten.stack.default):
            parts, axis = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
            if all(isinstance(p, Lazy) and p.dtype == parts[0].dtype for p in parts):
                if func is _aten.stack.default:
                    parts = [p.unsqueeze(axis) for p in parts]
                return _cat(parts, axis)
        return _computed(func, args, kwargs)


def lazy_tensor(key: str, source: Source) -> Lazy:
    """The tensor of a file as loading code may handle it."""
    return Lazy(Base(key, (), source, source.info.dtype))


def _keeps_kind(before: torch.dtype, after: torch.dtype | None) -> bool:
    """Whether a cast need not be done: the values are read as the file has them, and cast once."""
    return after in (None, before) or (before.is_floating_point and after.is_floating_point)


def _view(func: Any, t: Lazy, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A view of a Lazy, found by the same view of a tensor without data."""
    count = t.base.source.info.numel
    plain = torch.empty(count, dtype=t.dtype, device="meta")
    found = func(plain.as_strided(*t.place), *args, **kwargs)

    def wrapped(v: Tensor) -> Lazy:
        return Lazy(t.base, v.shape, v.stride(), int(v.storage_offset()))

    if any(v.dtype != t.dtype for v in ([found] if isinstance(found, Tensor) else found)):
        return _computed(func, (t, *args), kwargs)  # bytes as another dtype
    return tree_map_only(torch.Tensor, wrapped, found)


def _copied(t: Lazy, dtype: torch.dtype) -> Lazy:
    """A copy with memory of its own, contiguous, of another float dtype perhaps."""
    return _made(((tuple(0 for _ in t.shape), t),), dtype)


def _cat(parts: Sequence[Lazy], axis: int) -> Lazy:
    """torch.cat."""
    parts = [p for p in parts if tuple(p.shape) != (0,)] or parts[:1]  # which cat leaves out
    axis, begin, placed = axis % max(1, parts[0].dim()), 0, []
    for p in parts:
        placed.append((tuple(begin if d == axis else 0 for d in range(p.dim())), p))
        begin += p.shape[axis]
    return _made(tuple(placed), parts[0].dtype)


def _made(parts: tuple[tuple[tuple[int, ...], Lazy], ...], dtype: torch.dtype) -> Lazy:
    """A tensor made of others."""
    source = _joined([(begin, located(part, None)) for begin, part in parts])
    return Lazy(Base("", parts, source, dtype))


def _joined(parts: Sequence[tuple[tuple[int, ...], Source]]) -> Source:
    """Where a tensor lies that is made of blocks: (where each begins in it, where it lies)."""
    if len(parts) == 1:
        return parts[0][1]
    shape = tuple(
        max(begin[d] + source.info.shape[d] for begin, source in parts)
        for d in range(len(parts[0][0]))
    )
    blocks: list[tuple[tuple[int, ...], Source]] = []
    for begin, source in parts:
        inner = source.blocks if isinstance(source, Pieces) else (((0,) * len(shape), source),)
        blocks += [
            (tuple(a + b for a, b in zip(begin, at, strict=True)), block) for at, block in inner
        ]
    dtype = parts[0][1].info.dtype
    for _, source in parts[1:]:
        dtype = torch.promote_types(dtype, source.info.dtype)
    return Pieces(TensorInfo(shape, dtype), tuple(blocks))


def _computed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operation gives that needs the numbers: plain tensors in memory."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | dict(kwargs)
    written = [
        given[a.name]
        for a in func._schema.arguments
        if a.alias_info is not None and a.alias_info.is_write and a.name in given
    ]
    changed = [t for t in written if isinstance(t, Lazy)]
    for t in changed:
        t.base.changed = True
    found = func(*tree_map_only(Lazy, _real, args), **tree_map_only(Lazy, _real, kwargs))
    return changed[0] if changed else found  # an operation in place gives its argument back


def _real(t: Lazy) -> Tensor:
    """The numbers of a Lazy, in the memory that all views of its base share."""
    return t.base.values().as_strided(*t.place)


# What was taken down -----------------------------------------------------------------------------


def located(t: Tensor, tensors: Mapping[str, Source] | None) -> Source:
    """Where the values of a tensor lie that loading code has handled.

    Args:
        t: a Lazy, or a tensor in memory, of which a copy is kept
        tensors: of a file with the same keys, shapes and dtypes; None: the file of the Lazy
    """
    if not isinstance(t, Lazy):
        return Held(t.detach().to("cpu", copy=True))
    base = t.base
    if base.changed:
        return Held(_real(t).clone())
    source = base.source if tensors is None else base.located(tensors)
    return view_of(source, *t.place)


@dataclass(frozen=True)
class Block:
    """A part of a model's tensor that is a part of a file's.

    Attributes:
        begin: where the part begins in the model's tensor
        sizes: of the part
        key: of the file's tensor
        strides, offset: of the part in the file's tensor, as that lies contiguous
    """

    begin: tuple[int, ...]
    sizes: tuple[int, ...]
    key: str
    strides: tuple[int, ...]
    offset: int


def blocks_of(t: Tensor) -> list[Block] | None:
    """The parts of a file that a tensor is made of; None if it is not made of such alone."""
    if not isinstance(t, Lazy) or t.base.changed:
        return None
    sizes, strides, offset = t.place
    if t.base.key:
        return [Block(tuple(0 for _ in sizes), sizes, t.base.key, strides, offset)]
    if sizes != t.base.source.info.shape or strides != contiguous_strides(sizes):
        return None  # a view of several parts
    found = []
    for begin, part in t.base.parts:
        inner = blocks_of(part)
        if inner is None:
            return None
        for block in inner:
            at = tuple(a + b for a, b in zip(begin, block.begin, strict=True))
            found.append(Block(at, block.sizes, block.key, block.strides, block.offset))
    return found
