"""What the pickles of torch.save ask for, and what stands for it here.

Tensors are described, not made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .checks import are_sizes
from .unpickle import INERT, Made, Name, Refused, checked_key


@dataclass(frozen=True)
class Storage:
    """A storage as a pickle describes it.

    Attributes:
        dtype: of its elements
        key: name of its bytes in the file; "" for a type of storages
        count: number of elements
    """

    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True, eq=False)
class Described:
    """A tensor as a pickle describes it: nothing of it is checked but its dtype."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    negated: bool


@dataclass(frozen=True, eq=False)
class NotDense:
    """A sparse, quantised or nested tensor, or one of a subclass."""

    kind: str


# Functions that a pickle calls. It may call them with anything: they check what they use.


def _tensor(
    storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> Described:
    """A tensor without the fields that later versions of PyTorch have added."""
    return _tensor_v3(storage, offset, shape, strides, False, None, storage.dtype)


def _tensor_v2(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    hooks: object,
    metadata: dict[str, bool] | None = None,
) -> Described:
    """A tensor of the dtype of its storage."""
    return _tensor_v3(
        storage, offset, shape, strides, requires_grad, hooks, storage.dtype, metadata
    )


def _tensor_v3(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    hooks: object,
    dtype: torch.dtype,
    metadata: dict[str, bool] | None = None,
) -> Described:
    """A tensor of any dtype."""
    if type(storage) is not Storage or type(dtype) is not torch.dtype:
        raise ValueError("expected a tensor's storage and dtype")
    if type(requires_grad) is not bool:
        raise ValueError("expected a tensor's storage and dtype")
    negated = False
    if metadata:
        plain = type(metadata) is dict and dtype.is_floating_point
        if not plain or not metadata.items() <= {"neg": True, "conj": False}.items():
            raise ValueError("expected a plain tensor, or one that is negated when it is read")
        negated = "neg" in metadata
    if not (type(shape) is type(strides) is tuple and len(shape) == len(strides)):
        raise ValueError("expected a tensor's sizes and strides")
    if not are_sizes((offset, *shape)) or not are_sizes((*strides,)):
        raise ValueError("expected a tensor's sizes and strides")
    return Described(storage, dtype, offset, shape, strides, negated)


def _parameter(data: object, *_: object) -> object:
    """The tensor of a parameter."""
    if type(data) not in (Described, NotDense):
        raise ValueError("expected the tensor of a parameter")
    return data


def _of_type(rebuild: object, kind: object, arguments: tuple[object, ...], state: object) -> object:
    """A tensor with attributes of its own, which are left out."""
    if type(rebuild) is not Name or type(arguments) is not tuple:
        raise Refused("it makes a tensor of another class")
    if kind not in (_TENSOR, _PARAMETER):
        raise Refused("it makes a tensor of another class")
    return _parameter(rebuild.make(*arguments))


def ordered(pairs: Iterable[tuple[object, object]] = ()) -> dict[object, object]:
    """An OrderedDict, as a dict."""
    return {checked_key(key): value for key, value in pairs}


def _latin(text: str, encoding: str) -> bytes:
    """Bytes, as Python 3 writes them for Python 2."""
    if encoding != "latin1":
        raise ValueError("expected bytes as latin1")
    return text.encode("latin1")


def _new_parameter(*arguments: object) -> object:
    """The tensor that a parameter is made of."""
    if arguments and type(arguments[0]) is Described:
        return arguments[0]
    return Made(*arguments)


_TENSOR, _PARAMETER = Name(Made), Name(_new_parameter)
_FLOATS = ("float64", "float32", "float16", "bfloat16", "complex128", "complex64")
_SMALL = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
_UNSIGNED = ("uint64", "uint32", "uint16", "uint8", "bool")
_DENSE = (*_FLOATS, *_SMALL, *_UNSIGNED, "int64", "int32", "int16", "int8")
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}
_NOT_DENSE = {
    "_rebuild_sparse_tensor": "a sparse one",
    "_rebuild_qtensor": "a quantised one",
    "_rebuild_nested_tensor": "a nested one",
    "_rebuild_meta_tensor_no_storage": "one without data",
    "_rebuild_wrapper_subclass": "one of a subclass",
    "_rebuild_device_tensor_from_numpy": "one of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "one of another device",
}
NAMES: dict[str, object] = {
    "torch._utils._rebuild_tensor": Name(_tensor),
    "torch._utils._rebuild_tensor_v2": Name(_tensor_v2),
    "torch._utils._rebuild_tensor_v3": Name(_tensor_v3),
    "torch._utils._rebuild_parameter": Name(_parameter),
    "torch._utils._rebuild_parameter_with_state": Name(_parameter),
    "torch._tensor._rebuild_from_type_v2": Name(_of_type),
    "torch.Tensor": _TENSOR,
    "torch.nn.parameter.Parameter": _PARAMETER,
    "torch.Size": Name(tuple),
    "collections.OrderedDict": Name(ordered),
    "_codecs.encode": Name(_latin),
    "argparse.Namespace": INERT,  # timm and many scripts store their arguments
    "collections.Counter": INERT,  # of learning-rate schedulers
    "builtins.bytearray": INERT,
    "builtins.complex": INERT,
    "builtins.set": INERT,
    "torch.device": INERT,
    "torch.serialization._get_layout": INERT,
}
NAMES |= {
    f"torch._utils.{name}": Name(lambda *_, kind=kind: NotDense(kind))
    for name, kind in _NOT_DENSE.items()
}
NAMES |= {
    f"{module}.{name}": Storage(dtype, "", 0)
    for module in ("torch", "torch.cuda", "torch.storage")
    for name, dtype in _STORAGES.items()
}
# of quantised tensors
NAMES |= {
    f"torch.{name}": Storage(torch.uint8, "", 0)
    for name in ("QInt8Storage", "QUInt8Storage", "QInt32Storage")
}
NAMES |= {
    f"torch.{name}": INERT
    for name in (
        "per_tensor_affine",
        "per_tensor_symmetric",
        "per_channel_affine",
        "per_channel_symmetric",
    )
}
NAMES |= {f"torch.{name}": getattr(torch, name) for name in _DENSE if hasattr(torch, name)}


def parse_storage(id_: object) -> Storage:
    """The storage of a persistent id: ("storage", type, key, device, elements).

    Old files have a sixth item, which part of another storage it is; it must be None.
    """
    if type(id_) is not tuple or len(id_) not in (5, 6):
        raise ValueError("expected a storage")
    word, kind, key, _, count, *part = id_
    if word != "storage" or type(kind) is not Storage or part not in ([], [None]):
        raise ValueError("expected a storage")
    if type(key) not in (str, int) or not are_sizes((count,)):
        raise ValueError("expected the key and the size of a storage")
    return Storage(kind.dtype, str(key), count)
