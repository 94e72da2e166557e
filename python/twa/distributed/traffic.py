"""`Traffic`: bytes that a program hands to torch.distributed's collectives, whoever calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: which operand of a collective is the message: an all-gather's and a reduce-scatter's whole,
#: everything else's tensors
_WHOLE = {
    "_allgather_base_": 0,
    "_reduce_scatter_base_": 1,
    "allgather_into_tensor_coalesced_": 0,
    "reduce_scatter_tensor_coalesced_": 1,
}


class Traffic(TorchDispatchMode):
    """Counts between enter and exit.

    Every collective of torch.distributed and of FSDP2 is a torch op in the namespace c10d, with the
    tensors as its operands. An all-reduce of m bytes counts m, an all-gather to m bytes m, a
    reduce-scatter from m bytes m.

    Attributes:
        messages: (name, bytes) of each
        bytes: of all of them
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple[str, int]] = []

    @property
    def bytes(self) -> int:
        """Of all messages."""
        return sum(size for _, size in self.messages)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "c10d" and func._opname not in ("barrier",):
            operand = args[_WHOLE[func._opname]] if func._opname in _WHOLE else args
            tensors = [t for t in tree_leaves(operand) if isinstance(t, torch.Tensor)]
            self.messages.append((func._opname, sum(t.numel() * t.element_size() for t in tensors)))
        return func(*args, **(kwargs or {}))
