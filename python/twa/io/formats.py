"""Checkpoint formats: from a path to named tensors and where they lie.

Nothing of a file is run, and every size, offset and name in it is checked before it is used.
docs/formats.md lists what is read, docs/safety.md what is promised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from . import dcp
from .checks import is_file_name, read_json
from .errors import CandidateError, NoWeights
from .mapped import Source
from .safetensors import read_safetensors
from .torch_zip import read_torch

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
#: parts of the keys under which a checkpoint has the state of training, and no weights
TRAINING_STATE = ("optim", "sched", "scaler", "rng")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk.

    Attributes:
        kind: "safetensors", "torch", "huggingface" (a directory or index), "adapter" (PEFT), "dcp"
        tensors: where each tensor lies, by key
        files: all files that it is made of
        metadata: versions of the modules that were saved, as torch.save keeps them
        extra: what modules keep beside their tensors and is no tensor, by key
    """

    kind: str
    tensors: Mapping[str, Source]
    files: tuple[Path, ...]
    metadata: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    extra: Mapping[str, object] = field(default_factory=dict)


def open_checkpoint(path: Path, entry: str | None = None) -> Checkpoint:
    """The checkpoint at a path: a file, or a directory that is one.

    Args:
        path: file or directory
        entry: the key under which a torch or DCP checkpoint holds the weights, with dots between
            levels; None: a usual one, or the whole

    Raises:
        CandidateError: there is none, it is damaged, or what is in it is not supported
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) and not path.exists():
        raise CandidateError(
            "expected a path of this machine; remote locations are not read: copy or mount"
            " them first",
            path,
        )
    if path.is_dir():
        return _directory(path, entry)
    if not path.exists():
        raise CandidateError("no such file", path)
    if not path.is_file():
        raise CandidateError("expected a regular file", path)
    if fnmatch(path.name, INDEX):
        return _indexed(path, entry)
    kind = "safetensors" if path.suffix == ".safetensors" else "torch"
    return Checkpoint(kind, _one_file(path, entry), (path,))


def is_checkpoint_folder(folder: Path) -> bool:
    """Whether a directory is one checkpoint, rather than a place where several lie."""
    names = (*MODEL_FILES, *ADAPTER_FILES, dcp.METADATA, FSDP_FILE, f"{FSDP_FOLDER}/{dcp.METADATA}")
    return any((folder / name).is_file() for name in names) or bool(_indexes(folder))


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
    for name in MODEL_FILES:
        if (folder / name).is_file():
            found = open_checkpoint(folder / name, entry)
            return Checkpoint("huggingface", found.tensors, found.files)
    if (index := _index_of(folder)) is not None:
        return _indexed(index, entry)
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return Checkpoint("adapter", _one_file(folder / name, entry), (folder / name,))
    if (folder / dcp.METADATA).is_file():
        leaves, files = dcp.read(folder)
        return Checkpoint("dcp", _weights_of(leaves, folder, entry), files)
    if (folder / FSDP_FILE).is_file():
        return open_checkpoint(folder / FSDP_FILE, entry)
    if (folder / FSDP_FOLDER / dcp.METADATA).is_file():
        return _directory(folder / FSDP_FOLDER, entry)
    raise NoWeights(
        f"expected a directory with a Hugging Face checkpoint ({', '.join(MODEL_FILES)}),"
        " a PEFT adapter (adapter_model.safetensors) or a torch.distributed.checkpoint"
        f" ({dcp.METADATA}), or with checkpoints in it{_further_inside(folder)}",
        folder,
    )


def _further_inside(folder: Path) -> str:
    """A hint at checkpoints that lie one level deeper than in a directory; "" without them."""
    deeper = [p for p in folder.iterdir() if p.is_dir() and any(map(suffix_of, p.glob("*")))]
    names = ", ".join(sorted(p.name for p in deeper)[:4])
    return f"; there may be some in {names}: '{folder}/*' names those" if deeper else ""


def _one_file(path: Path, entry: str | None) -> dict[str, Source]:
    if path.suffix == ".safetensors":
        if entry is not None:
            raise CandidateError(
                f"entry {entry!r}: a safetensors file has no entries to choose from", path
            )
        return dict(read_safetensors(path))
    if path.suffix in SUFFIXES:
        return _weights_of(read_torch(path), path, entry)
    raise NoWeights(
        f"expected a file ending in {', '.join(SUFFIXES)}, or a directory with a sharded"
        " checkpoint's index",
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
        names = ", ".join(p.name for p in found[:4])
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
        for key, source in _one_file(path, entry).items():
            if key in tensors:
                raise CandidateError(f"tensor {key!r} is in {name} and in an earlier shard", index)
            tensors[key] = source
    for key, name in weight_map.items():
        if key not in tensors:
            raise CandidateError(f"tensor {key!r} should be in {name}, but no shard has it", index)
    return Checkpoint(_kind_of(index, paths[0]), tensors, (index, *paths))


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


def _weights_of(content: object, path: Path, entry: str | None) -> dict[str, Source]:
    """The tensors of a checkpoint.

    It is a state_dict, or a dict that holds one under the given key or else a usual one.
    """
    if entry is not None:
        inner: object = content
        for part in entry.split("."):
            inner = inner.get(part) if isinstance(inner, dict) else None
        if not (tensors := _tensors_in(inner)):
            raise _no_weights(
                f"expected weights under {entry!r}; there are some under:"
                f" {', '.join(entries(content)) or 'none'}",
                content,
                path,
            )
        return tensors
    if isinstance(content, dict):
        for key in NESTED_KEYS:
            if tensors := _tensors_in(content.get(key)):
                return tensors
    tensors = _tensors_in(content)
    if has_weights(tensors) or (tensors and not _holds_weights(content)):
        return tensors
    hint = ""
    if found := entries(content):
        hint = f"; there are some under: {', '.join(found)}: name one as entry"
    raise _no_weights(f"expected a dict of tensors (a state_dict), found none{hint}", content, path)


def _no_weights(problem: str, content: object, path: Path) -> CandidateError:
    """The error for a checkpoint that has no weights where they are looked for, or none at all."""
    return (CandidateError if _holds_weights(content) else NoWeights)(problem, path)


def has_weights(tensors: Mapping[str, Source]) -> bool:
    """Whether any tensor is one of floating-point numbers."""
    dtypes = (t.info.dtype for t in tensors.values())
    return any(dtype.is_floating_point or dtype.is_complex for dtype in dtypes)


def _holds_weights(content: object) -> bool:
    """Whether weights lie in any of a checkpoint's nested dicts but those of the training state."""
    seen: set[int] = set()

    def visit(inside: object, outermost: bool) -> bool:
        if not isinstance(inside, dict) or id(inside) in seen:
            return False
        seen.add(id(inside))
        if has_weights(_tensors_in(inside)):
            return True
        return any(
            visit(value, False)
            for key, value in inside.items()
            # the state_dict of an optimizer by itself has its tensors under "state"
            if not (outermost and key == "state")
            and not any(part in key.lower() for part in TRAINING_STATE)
        )

    return visit(content, True)


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
