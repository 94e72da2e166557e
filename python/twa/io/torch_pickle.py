"""What the pickles of torch.save ask for, and what stands for it here.

Tensors are described, not made. Anything else that is no plain value is a `Made`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .checks import are_sizes, is_shape, printable
from .errors import CandidateError
from .unpickle import Made, Name, Ordered, checked_key


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
    """A tensor that is not read: a sparse, quantised or nested one, or one of a subclass.

    Attributes:
        kind: what messages say after "expected dense tensors, found"
    """

    kind: str


# Functions that a pickle calls. It may call them with anything: they check what they use.


def _tensor(
    storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> Described | NotDense:
    """A tensor without the fields that later versions of PyTorch have added."""
    return _tensor_v2(storage, offset, shape, strides, False, None)


def _tensor_v2(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    hooks: object,
    metadata: dict[str, bool] | None = None,
) -> Described | NotDense:
    """A tensor of the dtype of its storage."""
    dtype: Any = getattr(storage, "dtype", storage)
    return _tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, metadata)


def _tensor_v3(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    hooks: object,
    dtype: torch.dtype,
    metadata: dict[str, bool] | None = None,
) -> Described | NotDense:
    """A tensor of any dtype."""
    for part in (storage, dtype):
        if isinstance(part, Made):
            return NotDense(f"one of {part.kind}")
    if type(storage) is not Storage or type(dtype) is not torch.dtype:
        raise ValueError("expected a tensor's storage and dtype")
    if type(requires_grad) is not bool:
        raise ValueError("expected a tensor's storage and dtype")
    negated = False
    if metadata:
        if not isinstance(metadata, dict):
            raise ValueError("expected a plain tensor, or one that is negated when it is read")
        if not dtype.is_floating_point or metadata not in _NEGATED:
            return NotDense("one that is conjugated or otherwise changed when it is read")
        negated = "neg" in metadata
    if not (type(shape) is type(strides) is tuple and len(shape) == len(strides)):
        raise ValueError("expected a tensor's sizes and strides")
    if not is_shape(shape) or not are_sizes((offset,)) or not are_sizes(strides):
        raise ValueError("expected a tensor's sizes and strides")
    return Described(storage, dtype, offset, shape, strides, negated)


#: what may be said of a tensor beside its storage
_NEGATED: tuple[dict[str, bool], ...] = (
    {},
    {"neg": True},
    {"conj": False},
    {"neg": True, "conj": False},
)


def _parameter(data: object, *_: object) -> object:
    """The tensor of a parameter."""
    if isinstance(data, Made):
        return NotDense(f"one of {data.kind}")
    if type(data) not in (Described, NotDense):
        raise ValueError("expected the tensor of a parameter")
    return data


def _of_type(rebuild: object, kind: object, arguments: tuple[object, ...], state: object) -> object:
    """A tensor with attributes of its own, which are left out; or one of another class."""
    if kind not in (_TENSOR, _PARAMETER):
        return _of_class(kind)
    if type(rebuild) is not Name or type(arguments) is not tuple:
        return NotDense("one that is made by a function of its own")
    return _parameter(rebuild.make(*arguments))


def _of_class(kind: object = None, *_: object) -> NotDense:
    """A tensor of another class."""
    if not isinstance(kind, Made):
        return NotDense("one of a subclass")
    return NotDense(f"a {kind.kind.rpartition('.')[2]} ({kind.kind}){hint_for(kind.kind)}")


def hint_for(kind: str) -> str:
    """What to do about a class whose objects stand in the place of tensors; "" if nothing known."""
    return next((f": {hint}" for part, hint in _HINTS.items() if part in kind), "")


#: part of a class's name -> what its objects are, and how weights are saved instead
_HINTS = {
    "DTensor": "one rank's shard of a tensor; save t.full_tensor() of each, or what"
    " torch.distributed.checkpoint.state_dict.get_model_state_dict gives with"
    " full_state_dict=True, or save with torch.distributed.checkpoint",
    "ShardedTensor": "one rank's shard of a tensor (FSDP); save with"
    " StateDictType.FULL_STATE_DICT, or with torch.distributed.checkpoint",
    "numpy": "save tensors instead, as torch.as_tensor(value) gives",
    "torchao.": "a quantised weight; save the weights before they are quantised",
    "bitsandbytes.": "a quantised weight; save the weights before they are quantised",
    "GGUF": "a quantised weight; save the weights before they are quantised",
    "ninitialized": "a lazy module's weight that was never made; run the model once, then save it",
    "FakeTensor": "a tensor without data",
}


def ordered(pairs: Iterable[tuple[object, object]] = ()) -> Ordered:
    """An OrderedDict, as a dict."""
    return Ordered((checked_key(key), value) for key, value in pairs)


def _latin(text: str, encoding: str) -> object:
    """Bytes, as Python 3 writes them for Python 2."""
    if encoding != "latin1":
        return Made("_codecs.encode", (text, encoding))
    return text.encode("latin1")


def _new_parameter(*arguments: object) -> object:
    """The tensor that a parameter is made of."""
    if arguments and type(arguments[0]) in (Described, NotDense):
        return arguments[0]
    return Made("torch.nn.parameter.Parameter", arguments)


def _new_tensor(*arguments: object) -> object:
    """Not a tensor that torch.save writes: that has a storage."""
    return Made("torch.Tensor", arguments)


def _size(sizes: object = ()) -> object:
    """A torch.Size, as a tuple."""
    return tuple(sizes) if isinstance(sizes, list | tuple) else Made("torch.Size")


# Python's own ways to make an object, whose class is an argument ---------------------------------


def _reconstructed(kind: object = None, base: object = None, state: object = None) -> object:
    """An object of protocol 0 or 1; a kind of dict has its content as state."""
    if not isinstance(kind, Made):
        return Made("copyreg._reconstructor")
    made = Made(kind.kind)
    if isinstance(base, Made) and base.kind == "builtins.dict" and type(state) is dict:
        made.items = state
    return made


def _new_object(kind: object = None, *arguments: object) -> object:
    """An object of a class."""
    return Made(kind.kind if isinstance(kind, Made) else "copyreg.__newobj__", arguments)


def _attribute(owner: object = None, name: object = None, *_: object) -> object:
    """What a class or module has under a name, such as a method."""
    if isinstance(owner, Made) and isinstance(name, str):
        return Made(printable(f"{owner.kind}.{name[:100]}"[:100]))
    return Made("builtins.getattr")


def _default_dict(*_: object) -> dict[object, object]:
    """A defaultdict, as a dict."""
    return {}


_TENSOR, _PARAMETER = Name(_new_tensor), Name(_new_parameter)
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
_ELSEWHERE = "one of another device (XLA and others): move it to the CPU before saving it"
_NOT_DENSE = {
    "_rebuild_sparse_tensor": "a sparse one",
    "_rebuild_qtensor": "a quantised one",
    "_rebuild_nested_tensor": "a nested one",
    "_rebuild_meta_tensor_no_storage": "one without data",
    "_rebuild_device_tensor_from_numpy": _ELSEWHERE,
    "_rebuild_device_tensor_from_cpu_tensor": _ELSEWHERE,
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
    "torch._utils._rebuild_wrapper_subclass": Name(_of_class),
    "torch.Size": Name(_size),
    "collections.OrderedDict": Name(ordered),
    "collections.defaultdict": Name(_default_dict),
    "_codecs.encode": Name(_latin),
    "builtins.getattr": Name(_attribute),
    "copyreg._reconstructor": Name(_reconstructed),
    "copyreg.__newobj__": Name(_new_object),
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
NAMES |= {f"torch.{name}": getattr(torch, name) for name in _DENSE if hasattr(torch, name)}


def parse_storage(id_: object) -> object:
    """The storage of a persistent id: ("storage", type, key, device, elements).

    Old files have a sixth item, which part of another storage it is; it must be None.
    """
    if type(id_) is not tuple or len(id_) not in (5, 6):
        raise ValueError("expected a storage")
    word, kind, key, _, count, *part = id_
    if word == "storage" and isinstance(kind, Made):
        return kind  # of elements that are not known here
    if word != "storage" or type(kind) is not Storage or part not in ([], [None]):
        raise ValueError("expected a storage")
    if type(key) not in (str, int) or not are_sizes((count,)):
        raise ValueError("expected the key and the size of a storage")
    return Storage(kind.dtype, str(key), count)


# What stands where weights should be -------------------------------------------------------------

#: objects that say something about weights and are none; they may stand among them
HARMLESS = {
    "argparse.Namespace",
    "collections.Counter",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.frozenset",
    "builtins.int",
    "builtins.set",
    "torch.device",
    "torch.serialization._get_layout",
}
#: functions that no data ask for
_RUN = {
    *(f"builtins.{name}" for name in ("eval", "exec", "execfile", "compile", "open", "__import__")),
    *(f"{module}.{name}" for module in ("os", "posix", "nt") for name in ("system", "popen")),
    *(f"subprocess.{name}" for name in ("Popen", "run", "call", "check_call", "check_output")),
    *("runpy.run_path", "runpy.run_module", "pty.spawn", "importlib.import_module"),
    *("webbrowser.open", "shutil.rmtree", "ctypes.CDLL", "pickle.loads", "builtins.apply"),
}


def runs(kind: str) -> bool:
    """Whether this is a function that data never ask for, as an attack does."""
    return kind in _RUN


def is_model(value: object) -> bool:
    """Whether this is a torch.nn.Module, pickled whole."""
    state = value.state if isinstance(value, Made) else None
    return isinstance(state, Mapping) and {"_parameters", "_modules"} <= state.keys()


@dataclass(frozen=True)
class Odd:
    """What stands in the place of a dense tensor, and cannot be read as one.

    Attributes:
        what: what messages say after "found"
        is_code: whether it is nothing that data need
        is_weights: whether it stands for weights, or may be an attack: a file with it is not passed
            over as one without weights
    """

    what: str
    is_code: bool = False
    is_weights: bool = False

    def error(self, where: object, key: str = "", hint: str = "") -> CandidateError:
        """The error for it, where it stands among weights.

        Args:
            where: the file
            key: under which it stands; "": it is all that there is
            hint: where there are weights
        """
        at = f" (at {printable(key)!r})" if key else ""
        if self.is_code:
            return CandidateError(
                f"refused: loading it would run code from the file: {self.what}{at}{hint}", where
            )
        return CandidateError(f"expected dense tensors, found {self.what}{at}{hint}", where)


def odd(value: object) -> Odd | None:
    """What stands in the place of a dense tensor; None if it may be left out."""
    if isinstance(value, NotDense):
        return Odd(value.kind, is_weights=True)
    if not isinstance(value, Made) or value.kind in HARMLESS:
        return None
    if runs(value.kind):
        return Odd(f"a call of {value.kind}", is_code=True, is_weights=True)
    if is_model(value):
        return Odd(
            f"a whole model ({value.kind}), pickled as one object: save its state_dict instead,"
            " as in torch.save(model.state_dict(), path)",
            is_weights=True,
        )
    return Odd(f"an object of {value.kind}{hint_for(value.kind)}")
