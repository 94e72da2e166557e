"""How an op is registered with torch.library.

Each op has a file of its own here: its schema, its rules, its fake and its autograd, and the public
function with its docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..native import Listed
from ..operands import BasisView

#: what a schema begins with where the op has a packed basis
BASIS = "Tensor codes, Tensor scales, Tensor row_scale, Tensor tile_segment, int[] numels, int bits"
LIBRARY = torch.library.Library("twa_kernels", "DEF")

Flat = tuple[Any, ...]


def with_basis(*flat: Any) -> Flat:
    """The first operands of a schema that begins with BASIS as one view; the others as they are.

    Lists of the model's tensors are looked at once: see `Listed`.
    """
    codes, scales, row_scale, tile_segment, numels, bits, *others = flat
    listed = (Listed(o) if isinstance(o, list) and _are_tensors(o) else o for o in others)
    return BasisView(codes, scales, row_scale, tile_segment, tuple(numels), bits), *listed


def _are_tensors(operand: list[Any]) -> bool:
    return bool(operand) and isinstance(operand[0], Tensor)


def as_they_are(*flat: Any) -> Flat:
    """The operands of a schema that needs no view."""
    return flat


def define(
    name: str,
    schema: str,
    run: Callable[..., object],
    fake: Callable[..., object],
    views: Callable[..., Flat] = with_basis,
) -> torch._ops.OpOverload:
    """Makes torch.ops.twa_kernels.<name>.

    Args:
        name: of the op.
        schema: its operands and results, as torch.library writes them.
        run: for real tensors on any device; it takes what `views` makes of the operands.
        fake: the same for fake tensors: the checks, and tensors like the results.
        views: from the schema's flat operands to those of `run` and `fake`.

    Returns:
        The op, to be called: its one overload, which need not be looked for at every call.
    """
    LIBRARY.define(f"{name}{schema}")
    torch.library.impl(LIBRARY, name, "CompositeExplicitAutograd")(lambda *flat: run(*views(*flat)))
    torch.library.register_fake(
        f"twa_kernels::{name}", lambda *flat: fake(*views(*flat)), lib=LIBRARY
    )
    return getattr(torch.ops.twa_kernels, name).default


class Context(Protocol):
    """What autograd hands from the setup of project and reconstruct to their backward."""

    saved_tensors: tuple[Tensor, ...]
    numels: Sequence[int]
    bits: int
    backend: str
    like: list[tuple[torch.Size, torch.dtype]]

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keeps tensors for the backward."""
