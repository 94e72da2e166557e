"""Lists of tensors on their way to a kernel."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import capture

T = TypeVar("T")


def odd_ones(tensors: Sequence[Tensor]) -> list[int]:
    """Those whose numbers do not lie in memory as they are, one after the other."""
    return [k for k, t in enumerate(tensors) if not t.is_contiguous()]


def readable(tensors: Sequence[Tensor], odd: Sequence[int]) -> list[Tensor]:
    """The tensors, with copies in the place of the odd ones."""
    made = list(tensors)
    for k in odd:
        made[k] = made[k].contiguous()
    return made


@contextlib.contextmanager
def writable(out: Sequence[Tensor], odd: Sequence[int]) -> Iterator[list[Tensor]]:
    """The tensors, with others in the place of the odd ones, copied into these at the end."""
    made = list(out)
    for k in odd:
        made[k] = torch.empty(out[k].shape, dtype=out[k].dtype, device=out[k].device)
    yield made
    for k in odd:
        out[k].copy_(made[k])


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Context in which `device` is the current one; none for CPU tensors.

    Those are here where a GPU's kernels run interpreted or emulated.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def current_stream(device: torch.device) -> int:
    """Handle of the device's current stream; 0 for CPU tensors."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


#: tile_segment -> {key: what `kept` built}
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def kept(tile_segment: Tensor, key: tuple[object, ...], build: Callable[[], T]) -> T:
    """build() once per basis and key, kept as long as tile_segment lives and is not written to.

    The first item of the key names what is built: a key stands for one type.
    """
    of_basis: dict[tuple[object, ...], T] = _kept.setdefault(tile_segment, {})
    key = (*key, None if tile_segment.is_inference() else tile_segment._version)
    if key not in of_basis:
        capture.refuse_capture(tile_segment.device)
        of_basis[key] = build()
    return of_basis[key]


class Recent:
    """Tables of tensors, the most recently used ones, of at most so many tensors in all.

    Training loops pass the same tensors again and again: all together, or one at a time.
    """

    def __init__(self, most: int = 1 << 16) -> None:
        self._most, self._size = most, 0
        self._tables: OrderedDict[Hashable, tuple[Tensor, int]] = OrderedDict()
        self._lock = threading.RLock()  # a finaliser may call an op meanwhile

    def get(self, key: Hashable, size: int, make: Callable[[], Tensor]) -> Tensor:
        """The table of this key, made if it is not there. size: its tensors."""
        with self._lock:
            if key not in self._tables:
                self._tables[key] = make(), size
                self._size += size
            self._tables.move_to_end(key)
            while self._size > self._most and len(self._tables) > 1:
                self._size -= self._tables.popitem(last=False)[1][1]
            return self._tables[key][0]
