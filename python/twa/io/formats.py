"""Checkpoint formats: from a path to named tensors and where they lie.

Nothing of a file is run, and every size, offset and name in it is checked before it is used.
docs/formats.md lists what is read, docs/safety.md what is promised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from . import dcp, deepspeed
from .checks import is_file_name, printable, read_json
from .errors import CandidateError, NoWeights
from .foreign import foreign
from .mapped import Source
from .recording_files import is_recording, is_snapshot
from .safetensors import read_safetensors
from .torch_zip import Entries, read_torch

Value = TypeVar("Value")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
#: keys under which training scripts put the weights of a larger checkpoint
NESTED_KEYS = ("state_dict", "model_state_dict", "model")
#: what makes a directory one checkpoint, in the order in which from_pretrained looks for it: a
#: directory that was saved into twice may hold others, too, older ones and indexes without shards
MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
#: what accelerate writes of a model that FSDP has sharded: whole, or as a DCP directory
FSDP_FILE, FSDP_FOLDER = "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0"
#: names of the files that say which shard has which tensor, such as
#: diffusion_pytorch_model.safetensors.index.fp16.json
INDEX = "*.index*.json"
#: how those begin that transformers reads; other libraries have other names
TRANSFORMERS = ("model.safetensors.index", "pytorch_model.bin.index")
#: keys under which a checkpoint has the state of training, and no weights
TRAINING_STATE = re.compile(
    r"(?:^|[^a-z])(?:optim(?:izer|s?(?:$|_))|(?:lr_?)?sched(?:uler|s?(?:$|_))|(?:grad_?)?scaler|rng)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk.

    Attributes:
        kind: "safetensors", "torch", "huggingface" (a directory or index), "adapter" (PEFT), "dcp"
        tensors: where each tensor lies, by key
        files: all files that it is made of
        metadata: of a saved state_dict: name of each module -> what it stores beside its tensors,
            such as a version; {} if there is none
        extra: key -> what modules store that is no tensor (`_extra_state`): plain values with
            tensors in memory; an `unpickle.Made` for a value that holds an object of another class
        others: names that stood among the weights with plain values, which are left out
        numbers: plain numbers that stood at the top of the checkpoint, such as its epoch, by name
        nest: keys that lead to the weights, from the top of a checkpoint of dicts in dicts
        siblings: names of the entries beside them that have tensors of the same names, such as a
            moving average
    """

    kind: str
    tensors: Mapping[str, Source]
    files: tuple[Path, ...]
    metadata: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    extra: Mapping[str, object] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    numbers: Mapping[str, object] = field(default_factory=dict)
    nest: tuple[str, ...] = ()
    siblings: tuple[str, ...] = ()


class Weights(dict[str, Source]):
    """The tensors of a checkpoint, and what was beside them.

    Args:
        tensors: by key
        beside: a checkpoint without kind, tensors and files; None: there was nothing
    """

    def __init__(self, tensors: Mapping[str, Source], beside: Checkpoint | None = None) -> None:
        super().__init__(tensors)
        self.beside = beside or Checkpoint("", {}, ())

    def inside(self, content: object, *nest: str, siblings: tuple[str, ...] = ()) -> Weights:
        """These weights as those of a larger checkpoint, under keys that lead to them."""
        numbers = content.numbers if isinstance(content, Entries) else {}
        return Weights(self, replace(self.beside, numbers=numbers, nest=nest, siblings=siblings))

    def checkpoint(self, kind: str, files: tuple[Path, ...]) -> Checkpoint:
        """The checkpoint of this kind that they are of."""
        return replace(self.beside, kind=kind, tensors=self, files=files)


def open_checkpoint(path: Path, entry: str | None = None) -> Checkpoint:
    """The checkpoint at a path: a file, or a directory that is one.

    Args:
        path: file or directory
        entry: the key under which a torch or DCP checkpoint holds the weights, with dots between
            levels, or a prefix of keys; None: a usual one, or the whole

    Raises:
        CandidateError: there is none, it is damaged, or what is in it is not supported
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) and not path.exists():
        raise CandidateError(
            "expected a path of this machine; remote locations are not read: copy or mount"
            " them first",
            path,
        )
    if (sliced := deepspeed.states_folder(path)) is not None and not _has_whole(path):
        return _of_deepspeed(path, sliced, entry)
    if path.is_dir():
        return _directory(path, entry)
    if not path.exists():
        raise CandidateError("no such file", path)
    if not path.is_file():
        raise CandidateError("expected a regular file", path)
    if fnmatch(path.name, INDEX):
        return _indexed(path, entry)
    kind = "safetensors" if path.suffix == ".safetensors" else "torch"
    return _one_file(path, entry).checkpoint(kind, (path,))


def is_unfinished(folder: Path) -> bool:
    """Whether a directory is a torch.distributed.checkpoint whose save has not ended."""
    return dcp.is_unfinished(folder) or dcp.is_unfinished(folder / FSDP_FOLDER)


def is_checkpoint_folder(folder: Path) -> bool:
    """Whether a directory is one checkpoint, rather than a place where several lie."""
    if _has_whole(folder) or deepspeed.states_folder(folder) is not None or is_unfinished(folder):
        return True
    return bool(_indexes(folder)) or is_recording(folder)


def _has_whole(folder: Path) -> bool:
    """Whether a directory has one of the files that make it a checkpoint."""
    names = (*MODEL_FILES, *ADAPTER_FILES, dcp.METADATA, FSDP_FILE, f"{FSDP_FOLDER}/{dcp.METADATA}")
    return any((folder / name).is_file() for name in names)


def suffix_of(path: Path) -> str:
    """The suffix of a checkpoint's file, such as .pt or .pth.tar; "" for any other file."""
    inner = Path(path.stem).suffix if path.suffix == ".tar" else ""
    if inner in SUFFIXES:
        return inner + path.suffix
    return path.suffix if path.suffix in SUFFIXES else ""


def stem_of(path: Path) -> str:
    """A checkpoint's name without the suffix of a checkpoint's file."""
    return path.name.removesuffix(suffix_of(path))


def _directory(folder: Path, entry: str | None) -> Checkpoint:
    if is_recording(folder):
        raise CandidateError("expected one checkpoint, found a recording of several", folder)
    adapters = [name for name in ADAPTER_FILES if (folder / name).is_file()]
    for name in MODEL_FILES:
        if (folder / name).is_file():
            if adapters:  # from_pretrained would load another model, and add the adapter
                raise CandidateError(
                    f"expected a model or an adapter, found both, {name} and {adapters[0]}: give"
                    " the file that is meant in the place of the directory",
                    folder,
                )
            found = open_checkpoint(folder / name, entry)
            return replace(found, kind="huggingface")
    if (index := _index_of(folder)) is not None:
        return _indexed(index, entry)
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return _one_file(folder / name, entry).checkpoint("adapter", (folder / name,))
    if (folder / dcp.METADATA).is_file():
        leaves, files = dcp.read(folder)
        return weights_of(leaves, folder, entry).checkpoint("dcp", files)
    if (folder / FSDP_FILE).is_file():
        return open_checkpoint(folder / FSDP_FILE, entry)
    if (folder / FSDP_FOLDER / dcp.METADATA).is_file():
        return _directory(folder / FSDP_FOLDER, entry)
    if is_unfinished(folder):
        raise NoWeights(
            f"not complete: torch.distributed.checkpoint writes {dcp.METADATA} last, and it is not"
            " there; wait for what async_save returned, or leave the directory out if its save was"
            " interrupted",
            folder,
        )
    raise NoWeights(
        f"expected a directory with a Hugging Face checkpoint ({', '.join(MODEL_FILES)}),"
        " a PEFT adapter (adapter_model.safetensors) or a torch.distributed.checkpoint"
        f" ({dcp.METADATA}), or with checkpoints in it{_further_inside(folder)}",
        folder,
    )


def _of_deepspeed(path: Path, sliced: Path, entry: str | None) -> Checkpoint:
    """What DeepSpeed has written: the whole module if that is asked for, and there.

    Args:
        path: as it was given
        sliced: the directory with DeepSpeed's files
        entry: as for `open_checkpoint`

    Raises:
        NoWeights: it is not read, and lies beside the same model's own weights
        CandidateError: it is not read
    """
    whole = deepspeed.whole_module(sliced)
    if entry is not None and whole is not None:
        return _one_file(whole, entry).checkpoint("torch", (whole,))
    kind = NoWeights if _has_whole(sliced.parent) else CandidateError
    raise kind(deepspeed.refusal(sliced), path)


def _further_inside(folder: Path) -> str:
    """A hint at checkpoints that lie one level deeper than in a directory; "" without them."""
    deeper = [
        p
        for p in folder.iterdir()
        if p.is_dir()
        and any(is_checkpoint_folder(q) if q.is_dir() else suffix_of(q) for q in p.glob("*"))
    ]
    names = ", ".join(printable(p.name) for p in sorted(deeper)[:4])
    return f"; there may be some in {names}: '{folder}/*' names those" if deeper else ""


def _one_file(path: Path, entry: str | None) -> Weights:
    if path.suffix == ".safetensors":
        if is_snapshot(path):
            raise CandidateError(
                f"one file of a recording: give its directory, {path.parent}; `twa export --at`"
                " makes a file of one snapshot",
                path,
            )
        tensors = Weights(read_safetensors(path))
        return tensors if entry is None else _under(tensors, path, entry)
    if path.suffix in SUFFIXES:
        return weights_of(read_torch(path), path, entry)
    what = f"; {found}" if (found := foreign(path)) else ""
    raise NoWeights(
        f"expected a file ending in {', '.join(SUFFIXES)}, or a directory with a sharded"
        f" checkpoint's index{what}",
        path,
    )


# Hugging Face shards -----------------------------------------------------------------------------


def _indexes(folder: Path) -> list[Path]:
    """The indexes of shards in a directory, of any name: JSON with a weight_map.

    One whose name says that it is of weights counts even if it is damaged: opening it says so.
    """

    def is_index(path: Path) -> bool:
        if not path.is_file() or path.name.startswith("."):
            return False
        if suffix_of(Path(path.name.partition(".index")[0])):
            return True
        try:
            content = read_json(path)
        except CandidateError:
            return False
        return isinstance(content, dict) and "weight_map" in content

    return sorted(filter(is_index, folder.glob(INDEX)))


def _index_of(folder: Path) -> Path | None:
    """The index of a directory that has one of another name than Hugging Face's own.

    Of several, one without a variant such as fp16 in its name is taken, and safetensors.

    Raises:
        CandidateError: there are several that it could be
    """
    found = _indexes(folder)
    found = [p for p in found if p.name.endswith(".index.json")] or found
    found = [p for p in found if ".safetensors." in p.name] or found
    if len(found) > 1:
        names = ", ".join(printable(p.name) for p in found[:4])
        raise CandidateError(
            f"expected one index of shards, found {len(found)} ({names}): give one of these files"
            " in the place of the directory",
            folder,
        )
    return found[0] if found else None


def _indexed(index: Path, entry: str | None) -> Checkpoint:
    expected = "expected JSON with a 'weight_map' from tensor names to shard files"
    content = read_json(index, expected)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CandidateError(expected, index)
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise CandidateError(expected, index)
    tensors: dict[str, Source] = {}
    metadata: dict[str, Mapping[str, object]] = {}
    extra: dict[str, object] = {}
    others: list[str] = []
    paths = []
    for name in sorted(set(weight_map.values())):
        if not is_file_name(name):
            raise CandidateError(
                f"shard {name[:200]!r} is not the name of a file beside the index", index
            )
        path = index.parent / name
        if not path.is_file():
            raise CandidateError(f"no such file, but {index.name} names it", path)
        paths.append(path)
        found = _one_file(path, entry)
        for key, source in found.items():
            if key in tensors:
                raise CandidateError(f"tensor {key!r} is in {name} and in an earlier shard", index)
            tensors[key] = source
        metadata.update(found.beside.metadata)
        extra.update(found.beside.extra)
        others += found.beside.others
    for key, name in weight_map.items():
        if key not in tensors:
            raise CandidateError(f"tensor {key!r} should be in {name}, but no shard has it", index)
    kind = _kind_of(index, paths[0])
    return Checkpoint(kind, tensors, (index, *paths), metadata, extra, tuple(others))


def _kind_of(index: Path, shard: Path) -> str:
    """The format of a sharded checkpoint: "huggingface" if the index is one of transformers'."""
    if index.name.startswith(TRANSFORMERS):
        return "huggingface"
    return "safetensors" if shard.suffix == ".safetensors" else "torch"


# Which of a checkpoint's entries are the weights -------------------------------------------------


def _tensors_in(content: object) -> dict[str, Source]:
    """What of a dict is no dict itself; nothing of anything else."""
    if not isinstance(content, dict):
        return {}
    return {k: v for k, v in content.items() if not isinstance(v, dict)}


def weights_of(content: object, path: Path, entry: str | None) -> Weights:
    """The tensors of a checkpoint.

    It is a state_dict, or a dict that holds one under the given key or else a usual one.

    Raises:
        NoWeights: there are none in it, wherever one looks
        CandidateError: they are elsewhere, or not to be read
    """
    try:
        return _usual(content, path) if entry is None else _under(content, path, entry)
    except CandidateError as error:
        if _holds_weights(content):
            raise
        raise NoWeights(error.problem, error.where) from error


def _under(content: object, path: Path, entry: str) -> Weights:
    """The tensors under a key: of dicts as far as there are such, then as a prefix of keys."""
    parts = entry.split(".")
    for outer in ((), *((key,) for key in NESTED_KEYS)):
        inner: object = _get(content, outer[0]) if outer else content
        for k, part in enumerate(parts):
            if not isinstance(inner, dict) or part not in inner:
                if found := _with_prefix(inner, ".".join(parts[k:])):
                    return found.inside(content, *outer, *parts)
                break
            _check_object(inner, part, path)
            inner = inner[part]
        else:
            if isinstance(inner, dict) and (tensors := _weights_in(inner, path)):
                return tensors.inside(content, *outer, *parts)
        _check_object(inner, parts[0], path)
    names = entries(content) or prefixes(content)[:20]
    raise CandidateError(
        f"expected weights under {entry!r}; there are some under: {', '.join(names) or 'none'}",
        path,
    )


def _get(content: object, key: str) -> object:
    """What a dict has under a key; None if it is none, or has nothing there."""
    return content.get(key) if isinstance(content, dict) else None


def _with_prefix(content: object, prefix: str) -> Weights | None:
    """The tensors of a dict whose keys have a prefix, without it; None if there are none."""
    start = f"{prefix}."

    def without(values: Mapping[str, Value]) -> dict[str, Value]:
        return {k.removeprefix(start): v for k, v in values.items() if k.startswith(start)}

    tensors = without(_tensors_in(content))
    if not tensors:
        return None
    if not isinstance(content, Entries):
        return Weights(tensors)
    own = {} if prefix not in content.metadata else {"": content.metadata[prefix]}
    metadata = without(content.metadata) | own
    return Weights(tensors, Checkpoint("", {}, (), metadata, without(content.extra)))


def prefixes(content: object) -> list[str]:
    """First parts of the keys of tensors in a dict, or in one under a usual key: for messages."""
    for inside in (content, *(_get(content, key) for key in NESTED_KEYS)):
        found = {key.partition(".")[0] for key in _tensors_in(inside) if "." in key}
        if found:
            return [name if name.isprintable() else repr(name) for name in sorted(found)]
    return []


def _usual(content: object, path: Path) -> Weights:
    """The tensors under a usual key, or of the whole."""
    hint = ""
    if found := entries(content):
        hint = f"; there are some under: {', '.join(found)}: name one as entry"
    if isinstance(content, dict):
        for key in NESTED_KEYS:
            _check_object(content, key, path, hint)
            inside = content.get(key)
            if tensors := _weights_in(inside, path, "" if _tensors_in(inside) else hint):
                return tensors.inside(content, key, siblings=_siblings(content, key))
    tensors = _weights_in(content, path, hint)
    if tensors and (has_weights(tensors) or not _holds_weights(content)):
        return tensors.inside(content)
    raise CandidateError(f"expected a dict of tensors (a state_dict), found none{hint}", path)


def _siblings(content: Mapping[str, object], key: str) -> tuple[str, ...]:
    """Names of the entries with tensors of the same names as those under a key."""

    def names(value: object) -> set[str]:
        return {name.removeprefix("module.") for name in _tensors_in(value)}

    own, has_all = names(content[key]), dict[int, bool]()  # of each dict, which may be many entries
    for value in content.values():
        if id(value) not in has_all:
            has_all[id(value)] = own <= names(value)
    return tuple(
        k for k, value in content.items() if k != key and k.isprintable() and has_all[id(value)]
    )


def has_weights(tensors: Mapping[str, Source]) -> bool:
    """Whether any tensor is one of floating-point numbers."""
    dtypes = (t.info.dtype for t in tensors.values())
    return any(dtype.is_floating_point or dtype.is_complex for dtype in dtypes)


def _holds_weights(content: object) -> bool:
    """Whether weights lie in any of a checkpoint's nested dicts but those of the training state.

    Tensors that are not read count, too.
    """
    seen: set[int] = set()

    def visit(inside: object, outermost: bool) -> bool:
        if not isinstance(inside, dict) or id(inside) in seen:
            return False
        seen.add(id(inside))
        if has_weights(_tensors_in(inside)):
            return True
        if isinstance(inside, Entries):
            odd = [o for key, o in inside.odd.items() if not TRAINING_STATE.search(key)]
            if any(o.is_weights or inside.has_floats for o in odd):
                return True
        return any(
            visit(value, False)
            for key, value in inside.items()
            # the state_dict of an optimizer by itself has its tensors under "state"
            if not (outermost and key == "state") and not TRAINING_STATE.search(key)
        )

    return visit(content, True)


def _weights_in(content: object, path: Path, hint: str = "") -> Weights | None:
    """The tensors of a dict; None if there are none.

    CandidateError if something stands among them, or in their place, that is not understood.
    """
    for key in content.odd if isinstance(content, Entries) else ():
        _check_object(content, key, path, hint)
    tensors = _tensors_in(content)
    if not isinstance(content, Entries) or not tensors:
        return Weights(tensors) if tensors else None
    others = tuple(content.others)
    return Weights(tensors, Checkpoint("", {}, (), content.metadata, content.extra, others))


def _check_object(content: object, key: str, path: Path, hint: str = "") -> None:
    """CandidateError if what stands under a key is not understood."""
    if isinstance(content, Entries) and (found := content.odd.get(key)):
        raise found.error(path, key, hint)


def entries(content: object) -> list[str]:
    """Names of the nested dicts that hold tensors, for messages, with dots between levels.

    They are the first 20, each dict once.
    """
    found: list[str] = []
    seen: set[int] = set()

    def visit(inside: dict[str, object], prefix: str) -> None:
        for key, value in inside.items():
            if isinstance(value, dict) and id(value) not in seen and len(found) < 20:
                seen.add(id(value))
                found.extend([prefix + key] * bool(_tensors_in(value)))
                visit(value, f"{prefix}{key}.")

    visit(content if isinstance(content, dict) else {}, "")
    return [name if name.isprintable() else repr(name) for name in found]
