"""What a model's own loading makes of a checkpoint: which tensor of the model gets which values.

A file is given to `load_state_dict` as Lazy tensors. What it would copy into the model is taken
down, and nothing is copied. So hooks that rename or join tensors, old formats that modules
translate, and checks of shapes are the model's own, not rules of ours. Directories as
save_pretrained writes them go through transformers' from_pretrained where a plain load does not fit
or the model's class converts what is on disk.

Parts of names that wrappers around modules put there are none of the model's: they are left out or
put in as the model has them.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..dtensors import is_sharded
from .candidate import N_AVERAGED, WRAPPER_PARTS, without_wrappers
from .checks import first_line
from .errors import CandidateError
from .lazy import Lazy, lazy_tensor
from .mapped import Source
from .torch_zip import EXTRA_STATE

#: attribute under which a wrapper holds the module -> whether names in the state_dict have it
WRAPPERS = {
    "_orig_mod": True,  # torch.compile
    "module": True,  # DataParallel, DistributedDataParallel, AveragedModel
    "_fsdp_wrapped_module": False,  # FSDP
    "_checkpoint_wrapped_module": False,  # activation checkpointing
}
#: how load_state_dict's own error begins
REFUSAL = "Error(s) in loading state_dict"


@dataclass
class Loading:
    """What loading a file would do.

    Attributes:
        values: name in the model, see `named_tensors` -> what would be copied into it
        missing: names of the model's state_dict that the file has nothing for
        unexpected: keys of the file that the model has nothing for
        of_numbers: whether a file with other numbers may be loaded otherwise: code has looked at
            some, or has made values of its own
        derived: name of a buffer that is not saved -> what loading would make of it
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    of_numbers: bool = False
    derived: dict[str, Tensor] = field(default_factory=dict)


# Names -------------------------------------------------------------------------------------------


def wrapped_by(module: nn.Module) -> str | None:
    """The attribute under which a wrapper holds the module that it wraps; None if it is none.

    A module that has nothing but another, as `module`, counts as one: users write such, too.
    """
    for part in WRAPPER_PARTS:
        if part in module._modules:
            return part
    is_alone = list(module._modules) == ["module"] and not module._parameters
    return "module" if is_alone and module._buffers.keys() <= {N_AVERAGED} else None


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, by a name without the parts that wrappers add.

    A tied tensor is there under each of its names. Where two names would be the same, the second
    keeps its parts.
    """
    found: dict[str, Tensor] = {}

    def visit(module: nn.Module, name: str, path: str) -> None:
        for own, t in [*module._parameters.items(), *module._buffers.items()]:
            if t is not None:
                found[f"{path}{own}" if f"{name}{own}" in found else f"{name}{own}"] = t
        inner = wrapped_by(module)
        for part, child in module._modules.items():
            if child is not None:
                visit(child, name if part == inner else f"{name}{part}.", f"{path}{part}.")

    visit(model, "", "")
    return found


def load_key(model: nn.Module, key: str) -> tuple[str, str]:
    """The key under which the model's loading looks for what a file has under `key`.

    The file was saved with other wrappers than the model has, perhaps.

    Returns:
        that key; and the file's without the parts of wrappers that the model does not have
    """
    path, own = _path(model, key)
    return ".".join(part for part in path if WRAPPERS.get(part, True)), ".".join(own)


def _path(model: nn.Module, key: str) -> tuple[list[str], list[str]]:
    """The attributes that lead to what a file has under a key, those of wrappers too.

    Returns:
        these; and the parts of the key that are among them
    """
    path: list[str] = []
    own: list[str] = []
    at: nn.Module = model
    *outer, last = key.split(".")

    def enter(part: str) -> nn.Module:
        path.append(part)
        child = at._modules[part]
        assert child is not None
        return child

    for k, part in enumerate(outer):
        while at._modules.get(part) is None and (inner := wrapped_by(at)):
            at = enter(inner)
        if at._modules.get(part) is not None:
            at = enter(part)
            own.append(part)
        elif part not in WRAPPERS:  # for a hook of the model to make sense of
            rest = [*(p for p in outer[k:] if p not in WRAPPER_PARTS), last]
            return [*path, *rest], [*own, *rest]
    while not (last in at._parameters or last in at._buffers) and (inner := wrapped_by(at)):
        at = enter(inner)
    return [*path, last], [*own, last]


def load_metadata(
    model: nn.Module, metadata: Mapping[str, Mapping[str, object]]
) -> dict[str, Mapping[str, object]]:
    """Versions of saved modules under the names that the model's loading looks for."""
    return {
        ".".join(_path(model, f"{name}.x".lstrip("."))[0][:-1]): value
        for name, value in metadata.items()
    }


# Loading -----------------------------------------------------------------------------------------


class _Recorder(TorchFunctionMode):
    """Takes down what is copied into a model's tensors, and copies nothing there.

    Args:
        model: that is loaded

    Attributes:
        values: name of the tensor -> what was to be copied
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.values: dict[str, Tensor] = {}
        self.known: list[Tensor] = []  # alive, so that no other tensor has the id of one of them
        self._index()

    def _index(self) -> None:
        """Makes the table of the model's tensors anew: loading may have given it other ones."""
        self.names: dict[int, str] = {}
        self.memory: dict[tuple[object, ...], str] = {}
        self.storages: set[int] = set()
        for name, t in named_tensors(self.model).items():
            self.known.append(t)
            self.names.setdefault(id(t), name)
            if (place := _place(t)) is not None:
                self.memory.setdefault(place, name)
                self.storages.add(t.untyped_storage()._cdata)

    def _name(self, t: object) -> str | None:
        """The name of a tensor of the model, or of what shares all of its memory."""
        if not isinstance(t, Tensor):
            return None
        if id(t) in self.names:
            return self.names[id(t)]
        place = _place(t)
        return None if place is None else self.memory.get(place)

    def __torch_function__(
        self, func: Any, types: object, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        what = _called(func)
        if what == "copy_" and not isinstance(args[0], Lazy):
            if (name := self._name(args[0])) is None:
                self._index()
                name = self._name(args[0])
            if name is not None:
                value = args[1] if len(args) > 1 else kwargs["other"]
                if self._name(value) in self.values:  # which has not been copied there
                    raise NeedsNumbers(what)
                self.values[name] = value
                return args[0]
        if what in NUMBERS and isinstance(args[0], Lazy):
            raise NeedsNumbers(what)
        if what not in SAFE and not (args and _is_lazy(args[0])):
            given = [*args, *kwargs.values()]
            parts = [p for a in given for p in (a if isinstance(a, list | tuple) else (a,))]
            names = [name for name in map(self._name, parts) if name is not None]
            writes = (what.endswith("_") and not what.startswith("__")) or what in WRITES
            if any(name in self.values for name in names) or (names and writes):
                raise NeedsNumbers(what)
            own = (p for p in parts if isinstance(p, Tensor) and not isinstance(p, Lazy))
            if writes and any(_storage(p) in self.storages for p in own):
                raise NeedsNumbers(what)
        return func(*args, **kwargs)


class NeedsNumbers(Exception):
    """Loading does more with the model's tensors, or with the file's, than can be taken down."""


#: functions that give a tensor's memory away, or its numbers without an operation
NUMBERS = (
    *("untyped_storage", "storage", "_typed_storage", "data_ptr", "share_memory_"),
    *("numpy", "tolist", "__dlpack__", "__array__"),
)
#: what writes to a tensor without an underscore at the end of its name
WRITES = ("__setitem__", "set data", "__iadd__", "__imul__", "__isub__", "__itruediv__")
#: what says nothing of a tensor's numbers
SAFE = {
    *("get shape", "get dtype", "get device", "get layout", "get ndim", "get is_meta", "get grad"),
    *("get requires_grad", "get is_leaf", "get is_sparse", "get is_quantized", "get is_nested"),
    *("get is_cuda", "get is_cpu", "get is_mps", "get is_xla", "get names", "get grad_fn"),
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "__len__"),
    *("is_floating_point", "is_complex", "is_contiguous", "is_same_size", "get_device"),
    *("requires_grad_", "__hash__", "empty_like", "zeros_like", "ones_like", "new_empty"),
    *("new_zeros", "new_ones", "new_full", "new_tensor", "is_shared", "is_pinned"),
}


def _called(func: Any) -> str:
    """The name of what is called; "get shape" or "set data" for an attribute of a tensor."""
    name: str = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return f"{name[2:5]} {getattr(getattr(func, '__self__', None), '__name__', '')}"
    return name


def _storage(t: Tensor) -> int | None:
    """The memory of a tensor, as a number; None where it has none to tell by."""
    if type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided:
        return None
    return t.untyped_storage()._cdata


def _place(t: Tensor) -> tuple[object, ...] | None:
    """Which numbers of which memory a tensor is."""
    if (storage := _storage(t)) is None:
        return None
    return storage, t.storage_offset(), tuple(t.shape), t.stride()


@dataclass(frozen=True)
class Content:
    """What of a file a model's loading is given.

    Attributes:
        tensors: by the keys that the model's loading looks for
        extra: what modules that have `set_extra_state` are given, by the keys of the file
        metadata: versions of the modules that were saved, as torch.save keeps them; {}: unknown
    """

    tensors: Mapping[str, Source]
    extra: Mapping[str, object] = field(default_factory=dict)
    metadata: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def state_dict(
        self, model: nn.Module, make: Callable[[str, Source], Tensor]
    ) -> OrderedDict[str, object]:
        """The state_dict for a model, with each tensor as `make(key, source)` gives it."""
        state: OrderedDict[str, object] = OrderedDict(
            (key, make(key, source)) for key, source in self.tensors.items()
        )
        state.update((load_key(model, key)[0], value) for key, value in self.extra.items())
        versions = load_metadata(model, self.metadata)
        state._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
        return state


def load(model: nn.Module, content: Content, *, tentative: bool = False) -> Loading:
    """What `model.load_state_dict` would do with a file. No weight of the model changes.

    Lazy modules get their shapes, and `set_extra_state` is called.

    Args:
        model: that the file is of
        content: of the file
        tentative: whether tensors that code puts into the model itself are taken out again

    Raises:
        CandidateError: loading needs numbers, and the model is sharded
        Exception: whatever load_state_dict raises
    """
    try:
        return load_lazily(model, content, tentative=tentative)
    except Exception as error:
        if str(error).startswith(REFUSAL) and not isinstance(error.__context__, NeedsNumbers):
            raise
    held = _held(model)
    found = _load_really(model, content)
    if tentative:
        _hold(held)
    return found


@torch.no_grad()
def load_lazily(model: nn.Module, content: Content, *, tentative: bool = False) -> Loading:
    """What `load` says, with code that gets Lazy tensors.

    Args:
        model, content, tentative: as for `load`

    Raises:
        NeedsNumbers: code does what cannot be taken down
        Exception: whatever load_state_dict raises
    """
    state = content.state_dict(model, lazy_tensor)
    given = list(state.values())
    before, held = list(named_tensors(model).values()), _held(model)
    swapping = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(False)
    recorder = _Recorder(model)
    try:
        with warnings.catch_warnings(), recorder:
            warnings.simplefilter("ignore")
            result = model.load_state_dict(state, **_not_strict(model))
    except BaseException:
        _hold(held)
        raise
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapping)
    values = recorder.values
    if tentative:
        _hold(held)
    else:
        _take_new(model, before, values)
    return _said(model, values, result, _looked(given, values))


def _said(model: nn.Module, values: dict[str, Tensor], result: object, of_numbers: bool) -> Loading:
    """What a load has said and done.

    Args:
        model: that was loaded
        values: what was copied into it
        result: of load_state_dict
        of_numbers: see `Loading`
    """
    own = state_names(model)
    missing = getattr(result, "missing_keys", None)
    if missing is None:  # a model's own load_state_dict, which does not say
        missing = [key for key, name in own.items() if name not in values]
    elif any(name not in values and key not in missing for key, name in own.items()):
        raise NeedsNumbers("a tensor that is loaded in another way")
    saved = _saved(model)
    derived = {name: t for name, t in values.items() if name not in saved}
    for name in derived:
        del values[name]
    unexpected = list(getattr(result, "unexpected_keys", ()))
    return Loading(values, list(missing), unexpected, of_numbers, derived)


@torch.no_grad()
def _load_really(model: nn.Module, content: Content) -> Loading:
    """What `load` says, by loading all of the file; the model's numbers are put back."""
    if is_sharded(model):
        raise CandidateError(
            "the model's own loading computes with numbers, which is not supported for a sharded"
            " model: give the model before it is sharded"
        )
    state = content.state_dict(model, lambda key, source: source.read().clone())
    before = [(t, t.detach().clone()) for t in named_tensors(model).values() if not _is_lazy(t)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = model.load_state_dict(state, **_not_strict(model))
        numbers = {name: t.detach().clone() for name, t in named_tensors(model).items()}
    finally:
        for t, old in before:
            if t.shape == old.shape and t.dtype == old.dtype:
                t.copy_(old)
            else:
                t.data = old
    saved = _saved(model)
    was = {id(t): old for t, old in before}
    tensors_now = named_tensors(model)
    values: dict[str, Tensor] = {}
    for name, t in numbers.items():
        old_value = was.get(id(tensors_now[name]))
        if name in saved or old_value is None or not torch.equal(t, old_value):
            values[name] = t
    for key in getattr(result, "missing_keys", ()):
        values.pop(name_of(model, key), None)
    return _said(model, values, result, True)


def _saved(model: nn.Module) -> set[str]:
    """Names of the tensors that the model's state_dict has, as they are or as hooks make them."""
    return {*state_names(model).values(), *(name_of(model, key) for key in made_by_hooks(model))}


def _is_lazy(t: object) -> bool:
    """Whether this is a parameter that has no shape yet."""
    return isinstance(t, Tensor) and nn.parameter.is_lazy(t)


def _looked(given: Iterable[object], values: Mapping[str, Tensor]) -> bool:
    """What `Loading.of_numbers` says.

    Args:
        given: what loading was given
        values: what it made of that
    """
    own = any(not isinstance(t, Lazy) for t in values.values())
    return own or any(isinstance(t, Lazy) and t.base.read for t in given)


def _not_strict(model: nn.Module) -> dict[str, bool]:
    """The argument that has load_state_dict say what is wrong instead of raising, if it has one."""
    return {"strict": False} if "strict" in signature(model.load_state_dict).parameters else {}


def _held(model: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The tables of tensors of each module, and what is in them."""
    tables = [t for m in model.modules() for t in (m._parameters, m._buffers)]
    return [(table, dict(table)) for table in tables]


def _hold(held: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Puts into the tables of a model's modules what was in them."""
    for table, content in held:
        table.clear()
        table.update(content)


def _take_new(model: nn.Module, before: list[Tensor], values: dict[str, Tensor]) -> None:
    """Adds the tensors that loading has put into the model itself.

    Those that are Lazy become tensors of their own.
    """
    old = {id(t) for t in before}  # which are alive, so that no new one has the id of one of them
    for name, t in named_tensors(model).items():
        if id(t) in old or name in values:
            continue
        values[name] = t
        if isinstance(t, Lazy):
            _replace(model, t)


def _replace(model: nn.Module, t: Lazy) -> None:
    """Puts a tensor in memory where a module holds a Lazy."""
    new = torch.empty(t.shape, dtype=t.dtype, device="cpu")
    for module in model.modules():
        for own, p in module._parameters.items():
            if p is t:
                module._parameters[own] = nn.Parameter(new, requires_grad=t.requires_grad)
        for own, b in module._buffers.items():
            if b is t:
                module._buffers[own] = new


# transformers ------------------------------------------------------------------------------------


def is_of_transformers(model: nn.Module) -> bool:
    """Whether transformers knows how to load this model."""
    transformers = sys.modules.get("transformers")  # whoever made such a model has imported it
    kind = getattr(transformers, "PreTrainedModel", None)
    return isinstance(kind, type) and isinstance(model, kind)


def converts(model: nn.Module) -> bool:
    """Whether transformers changes tensors of this model's class when it saves and loads them."""
    core = sys.modules.get("transformers.core_model_loading")
    mapping = sys.modules.get("transformers.conversion_mapping")
    if core is None or mapping is None:  # an older version, which does not
        return False
    found = mapping.get_model_conversion_mapping(model)
    return any(isinstance(entry, core.WeightConverter) for entry in found or ())


@torch.no_grad()
def load_pretrained(model: nn.Module, tensors: Mapping[str, Source]) -> Loading:
    """What from_pretrained would make of a directory's tensors.

    It loads them into a model without memory of the same class and configuration.

    Args:
        model: a PreTrainedModel
        tensors: of the directory, by their own keys

    Raises:
        CandidateError: from_pretrained refuses them
    """
    state = {key: lazy_tensor(key, source) for key, source in tensors.items()}
    config = copy.deepcopy(model.config)
    with _quiet():
        made, report = type(model).from_pretrained(  # type: ignore[attr-defined]
            None, config=config, state_dict=state, output_loading_info=True
        )
    for word in ("mismatched_keys", "error_msgs", "conversion_errors"):
        if problems := report.get(word):
            first = sorted(map(str, problems))[0]
            raise CandidateError(f"transformers' from_pretrained refuses it: {word}: {first}")
    loaded = made.state_dict(keep_vars=True)
    names = state_names(model)
    values: dict[str, Tensor] = {
        names[key]: t for key, t in loaded.items() if isinstance(t, Lazy) and key in names
    }
    missing, unexpected = (sorted(report[f"{kind}_keys"]) for kind in ("missing", "unexpected"))
    return Loading(values, missing, unexpected, _looked(state.values(), values))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A context without transformers' reports and bars."""
    log = sys.modules["transformers"].logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def state_names(model: nn.Module) -> dict[str, str]:
    """Key in the model's state_dict -> name of the tensor, see `named_tensors`.

    Keys whose values are made by a hook are left out.
    """
    by_id: dict[int, str] = {}
    for name, t in named_tensors(model).items():
        by_id.setdefault(id(t), name)
    state = model.state_dict(keep_vars=True)
    return {key: by_id[id(t)] for key, t in state.items() if id(t) in by_id}


def made_by_hooks(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of the model's state_dict that are none of its own, but made when it is saved.

    They are there under keys without the parts that no module of a user has.
    """
    own = state_names(model)
    state = model.state_dict()
    return {
        without_wrappers(key): t
        for key, t in state.items()
        if key not in own and isinstance(t, Tensor) and key.rpartition(".")[2] != EXTRA_STATE
    }


def own_keys(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Name of each tensor -> its key in the model's state_dict, without parts of wrappers.

    It is the name itself for what the state_dict does not have.
    """
    keys = {name: key for key, name in reversed(state_names(model).items())}
    for key in made_by_hooks(model):
        keys.setdefault(name_of(model, key), key)
    return {name: without_wrappers(keys.get(name, name)) for name in names}


def name_of(model: nn.Module, key: str) -> str:
    """The name of the tensor that a key of the state_dict would be, see `named_tensors`."""
    at, name = model, []
    for part in _path(model, key)[0]:
        if part != wrapped_by(at):
            name.append(part)
        child = at._modules.get(part)
        at = at if child is None else child
    return ".".join(name)


def refused(error: Exception) -> CandidateError:
    """The error for a file that a model's loading refuses."""
    return CandidateError(f"the model's load_state_dict refuses it ({first_line(error)})")
