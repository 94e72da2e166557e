"""`KeyMap`: which tensor of the model is which tensor of the candidates, and what becomes of it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import loading
from .candidate import N_AVERAGED, Candidate, without_wrappers
from .candidates import Candidates
from .checks import first_line
from .compare import check_complex, check_extra, check_info, check_not_quantised
from .errors import CandidateError, TwaError
from .lazy import Block, blocks_of, located
from .loading import Content, Loading, load_key, name_of, named_tensors, state_names
from .mapped import Held, Source, TensorInfo, contiguous_strides, span
from .peft import adapter_names, is_adapter
from .recording import Recording


@dataclass(frozen=True)
class Written:
    """A tensor of an export that is no tensor of the model.

    Attributes:
        info: its shape and dtype
        parts: (name of the model's tensor, which part of it is which part of this one); none if it
            is what the model's state_dict has under the key
    """

    info: TensorInfo
    parts: tuple[tuple[str, Block], ...]


@dataclass(frozen=True)
class KeyMap:
    """What becomes of each tensor of the model.

    Names are those of `named_tensors`. A key is that of the one tensor in the candidate files that
    holds the values, else the name in the model's state_dict. With adapters, the base model's own
    tensors are in none of these: they stay as they are.

    Attributes:
        trained: parameters in the subspace: name -> key
        fixed: float tensors that are averaged but not trained, frozen parameters and float buffers:
            name -> key
        copied: integer, bool and complex buffers, taken from the last candidate or the one that has
            all the weight: name -> key
        aliases: other names of tied parameters and shared float buffers: name -> the name that
            stands for them
        names: every key -> name
        written: tensors of an export that are no tensor of the model, such as the experts that a
            model has packed into one, or what its own hook computes: key -> what it is made of
        checked: whether an export is known to load as what it is; else `check_export` looks
    """

    trained: dict[str, str]
    fixed: dict[str, str]
    copied: dict[str, str]
    aliases: dict[str, str]
    names: dict[str, str]
    written: dict[str, Written] = field(default_factory=dict)
    checked: bool = True

    def numels(self, info: Mapping[str, TensorInfo]) -> list[int]:
        """Number of weights of each trained tensor."""
        return [info[key].numel for key in self.trained.values()]

    def written_info(self, info: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Shape and dtype of each tensor of an export, by its key in the candidate files.

        Args:
            info: of the candidates
        """
        inside = {name for w in self.written.values() for name, _ in w.parts}
        inside |= {self.names[key] for key, w in self.written.items() if not w.parts}
        own = {key: i for key, i in info.items() if self.names[key] not in inside}
        return own | {key: w.info for key, w in self.written.items()}


def match_model(model: nn.Module, candidates: Candidates) -> tuple[Candidates, KeyMap]:
    """Matches the model's tensors with the candidates', as the model's own loading does.

    No weight of the model changes; lazy modules get their shapes.

    Returns:
        the candidates with the tensors as the model has them, and what becomes of each

    Raises:
        CandidateError: they do not fit
        TwaError: the model cannot be averaged, or is no PeftModel while the candidates are PEFT
            adapters
    """
    if isinstance(model, DistributedDataParallel):
        raise TwaError(
            "model: expected the model itself, found DistributedDataParallel around it; pass"
            " model.module"
        )
    for k, c in enumerate(candidates):
        if k == 0 or c.info != candidates[0].info:
            check_not_quantised(c.info, c.path)
    if candidates.recording is not None:
        key_map = _match_recorded(model, candidates, candidates.recording)
    elif is_adapter(candidates[0]):
        key_map = _match_adapters(model, candidates)
    else:
        candidates, key_map = _match_loaded(model, candidates)
    if not key_map.trained:
        hint = ""
        if is_adapter(candidates[0]):
            hint = " (peft: PeftModel.from_pretrained(..., is_trainable=True))"
        raise TwaError(
            f"the model has no trainable floating-point parameter: nothing to average{hint}"
        )
    _check_memory(key_map, named_tensors(model))
    return candidates, key_map


def _match_adapters(model: nn.Module, candidates: Candidates) -> KeyMap:
    """The map for PEFT adapters, whose keys peft knows."""
    state = model.state_dict(keep_vars=True)
    found = adapter_names(model, state, candidates) or {}
    by_state, tensors = state_names(model), named_tensors(model)
    keys = {key: by_state[name] for key, name in found.items()}
    if unexpected := sorted(candidates.info.keys() - keys.keys()):
        raise _unexpected(unexpected, candidates[0])
    groups: dict[str, list[str]] = {}
    aliases = aliases_of(tensors)
    for key, name in keys.items():
        groups.setdefault(aliases.get(name, name), []).extend([key] * (key in candidates.info))
    # The base model is not in the files, so it must be frozen.
    trainable = [name for name, t in tensors.items() if t.requires_grad and name not in aliases]
    missing = sorted([name for name in trainable if name not in groups])
    if missing := missing + sorted(name for name, found in groups.items() if not found):
        raise _missing(missing, candidates[0])
    for name, same in groups.items():
        expected = TensorInfo(tuple(tensors[name].shape), tensors[name].dtype)
        for key in same:
            check_info(candidates[0].path, key, expected, candidates.info[key], "in the model")
        for c in candidates:
            _check_tied({key: c.source(key) for key in same}, c.path)
    names = {key: keys[key] for key in candidates.info}
    return _sorted_out({n: same[0] for n, same in groups.items()}, tensors, names, candidates)


def _unexpected(keys: Sequence[str], candidate: Candidate, hint: str = "") -> CandidateError:
    """The error for tensors that the model does not have."""
    return CandidateError(
        f"tensor {keys[0]!r} is unexpected ({len(keys)} in all): the model does not have it{hint}",
        candidate.path,
    )


def _missing(names: Sequence[str], candidate: Candidate, hint: str = "") -> CandidateError:
    """The error for tensors that a file does not have."""
    return CandidateError(
        f"tensor {names[0]!r} of the model is missing ({len(names)} in all){hint}", candidate.path
    )


def aliases_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Other names of tied parameters and shared buffers -> the first name of each."""
    first: dict[int, str] = {}
    names = ((name, first.setdefault(id(t), name)) for name, t in tensors.items())
    return {name: stands for name, stands in names if name != stands}


def _check_tied(tied: Mapping[str, Source], path: Path) -> None:
    """CandidateError unless these tensors of a file are equal: one weight in the model."""
    (first, source), *others = tied.items()
    for key, other in others:
        if not torch.equal(source.read(), other.read()):
            raise CandidateError(
                f"{first!r} and {key!r} are one tied weight in the model but differ in the file",
                path,
            )


def _sorted_out(
    keys: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    names: dict[str, str],
    candidates: Candidates,
    written: dict[str, Written] | None = None,
) -> KeyMap:
    """The map, with each tensor where it belongs.

    Args:
        keys: name -> key of the tensors that the candidates hold, without aliases
        tensors: of the model
        names: every key -> name
        candidates: with the tensors as the model has them
        written: see `KeyMap`
    """
    aliases = {a: n for a, n in aliases_of(tensors).items() if tensors[a].is_floating_point()}
    key_map = KeyMap({}, {}, {}, aliases, names, written or {})
    for name, key in keys.items():
        t = tensors[name]
        if not t.is_floating_point():
            key_map.copied[name] = key
            if t.is_complex():
                check_complex(key, candidates, t.requires_grad)
        elif t.requires_grad:
            key_map.trained[name] = key
        else:
            key_map.fixed[name] = key
    return key_map


# Recordings --------------------------------------------------------------------------------------


def _match_recorded(model: nn.Module, candidates: Candidates, recording: Recording) -> KeyMap:
    """The map for a recording, which has the model's own tensors by their names.

    What it does not hold, such as many frozen parameters, stays as the model has it.
    """
    tensors, info = named_tensors(model), candidates.info
    aliases = aliases_of(tensors)
    names = {key: name for key, name in recording.names.items() if key in info}
    if unexpected := sorted(key for key, name in names.items() if name not in tensors):
        raise _unexpected(unexpected, candidates[0], ": it was recorded of another model")
    held = set(names.values())
    idle = [n for n, t in tensors.items() if t.requires_grad and n not in {*held, *aliases}]
    if idle:
        hint = ", and it is trainable: it was not when the recording began"
        raise _missing(idle, candidates[0], hint)
    for key, name in names.items():
        expected = TensorInfo(tuple(tensors[name].shape), tensors[name].dtype)
        check_info(candidates[0].path, key, expected, info[key], "in the model")
    keys = {aliases.get(name, name): key for key, name in names.items()}
    names |= {a: names[key] for a, key in recording.aliases.items() if a in info and key in names}
    written = {
        key: Written(TensorInfo(tuple(t.shape), t.dtype), ())
        for key, t in loading.made_by_hooks(model).items()
        if key in info
    }
    every = {key: names[key] for key in info}
    key_map = _sorted_out(keys, tensors, every, candidates, written)
    return replace(key_map, checked=not written)


# As the model's own loading has it ---------------------------------------------------------------


@dataclass
class _Read:
    """What the model's loading makes of one candidate.

    Attributes:
        candidate: the checkpoint
        keys: key that the loading looks for -> key in the file, without wrappers that the model
            does not have
        sources: where the tensors lie, by the keys that the loading looks for
        tied: keys in the file that are one weight in the model, in groups of several
        values: name in the model -> what would be copied there
        derived: name of a buffer that is not saved -> what would be copied there
        pretrained: whether that is what from_pretrained says, rather than load_state_dict
    """

    candidate: Candidate
    keys: dict[str, str] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    tied: list[list[str]] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    derived: dict[str, Tensor] = field(default_factory=dict)
    pretrained: bool = False

    def layout(self) -> object:
        """What must be the same in another file for its loading to be the same."""
        kinds = {key: (s.info.shape, s.info.dtype) for key, s in self.sources.items()}
        return kinds, self.candidate.metadata

    def source(self, name: str) -> Source:
        """Where the values of a tensor of the model lie."""
        return located(self.values[name], self.sources)

    def key_of(self, name: str) -> str | None:
        """The key of the tensor in the file that holds all of the values, in order; None: none."""
        blocks = blocks_of(self.values[name])
        if blocks is None or len(blocks) != 1 or blocks[0].offset:
            return None
        whole = self.sources[blocks[0].key].info
        is_whole = self.values[name].numel() == whole.numel
        if not is_whole or blocks[0].strides != contiguous_strides(blocks[0].sizes):
            return None
        return self.keys[blocks[0].key]


def _match_loaded(model: nn.Module, candidates: Candidates) -> tuple[Candidates, KeyMap]:
    """The candidates as the model's own loading has them, and the map."""
    reads = _read_each(model, candidates)
    tensors = named_tensors(model)  # after lazy modules have got their shapes
    aliases = aliases_of(tensors)
    names = _in_order(model, reads[0].values)
    for other in reads[1:]:
        if odd := sorted(reads[0].values.keys() ^ other.values.keys()):
            raise CandidateError(
                f"its loading gives {'no' if odd[0] in reads[0].values else 'a'} value for"
                f" {odd[0]!r} of the model, unlike that of {reads[0].candidate.path}",
                other.candidate.path,
            )
    idle = [n for n, t in tensors.items() if t.requires_grad and n not in {*names, *aliases}]
    if idle:
        raise _missing(
            idle, candidates[0], ", and it is trainable: freeze it (requires_grad_(False))"
        )
    _settle_derived(reads, tensors)
    keys = _keys(model, names, reads)
    written = _written(names, reads[0], keys)
    checked = written is not None and _loads_again(model, names, reads[0], keys, written)
    if written is None or not checked:
        keys, written = loading.own_keys(model, names), {}  # as the model itself would save them
        checked = _loads_again(model, names, reads[0], keys, written)
    parts = {name for w in written.values() for name, _ in w.parts}
    for key, t in loading.made_by_hooks(model).items():
        name = next((name for name, own in keys.items() if own == key), None)
        if name is not None and name not in parts and reads[0].key_of(name) != key:
            info = TensorInfo(tuple(t.shape), reads[0].source(name).info.dtype)
            written[key] = Written(info, ())
    every = {key: name for name, key in keys.items()}
    for tied in reads[0].tied:
        if name := next((every[key] for key in tied if key in every), None):
            every |= dict.fromkeys(tied, name)
    every = {key: every[key] for key in [*candidates[0].info, *every] if key in every}
    found = _translated(candidates, reads, every, tensors)
    return found, replace(_sorted_out(keys, tensors, every, found, written), checked=checked)


def _read_each(model: nn.Module, candidates: Candidates) -> list[_Read]:
    """What the model's loading makes of each candidate; files of one layout are loaded once."""
    check_extra(candidates)
    names: dict[int, list[str]] = {}  # of each tensor of the state_dict: several if it is tied
    for key, t in model.state_dict(keep_vars=True).items():
        if isinstance(t, Tensor):
            names.setdefault(id(t), []).append(key)
    known: list[tuple[object, _Read]] = []
    reads = []
    for candidate in candidates:
        read = _prepared(model, candidate, list(names.values()))
        layout = read.layout()
        like = next((r for other, r in known if other == layout), None)
        if like is None:
            if not _load(model, read).of_numbers:
                known.append((layout, read))
        else:
            read.values, read.derived = like.values, like.derived
            read.pretrained = like.pretrained
            if like.pretrained:
                read.sources = {key: candidate.source(key) for key in candidate.info}
                read.keys = {key: key for key in read.sources}
        reads.append(read)
    return reads


def _prepared(model: nn.Module, candidate: Candidate, state: Sequence[list[str]]) -> _Read:
    """A candidate's tensors by the keys that the model's loading looks for.

    Args:
        model: that is loaded
        candidate: the checkpoint
        state: keys of each tensor in the model's state_dict
    """
    read, known = _Read(candidate), {key for keys in state for key in keys}
    for key in candidate.info:
        if key == N_AVERAGED:  # of a wrapper, and no tensor of a model
            continue
        wanted, own = (key, key) if key in known else load_key(model, key)
        if wanted in read.keys:
            raise CandidateError(
                f"{read.keys[wanted]!r} and {key!r} are one tensor without the parts of names that"
                " wrappers add",
                candidate.path,
            )
        read.keys[wanted], read.sources[wanted] = own, candidate.source(key)
    for tied in state:  # files may hold a tied tensor once
        if there := [name for name in tied if name in read.keys]:
            first, source = read.keys[there[0]], read.sources[there[0]]
            if len(there) > 1:
                read.tied.append([read.keys[name] for name in there])
                _check_tied({read.keys[n]: read.sources[n] for n in there}, candidate.path)
            for name in tied:
                read.keys[name], read.sources[name] = first, source
    return read


def _load(model: nn.Module, read: _Read) -> Loading:
    """Fills in what the model's loading makes of a candidate; CandidateError if it refuses."""
    pretrained = loading.is_of_transformers(model)
    as_saved = pretrained and read.candidate.is_pretrained
    if as_saved and loading.converts(model):  # names and shapes may be alike, and numbers not
        return _load_pretrained(model, read)
    try:
        found = _loaded(model, read)
        _check_complete(model, read, found)
    except CandidateError as error:
        if not pretrained:
            raise
        try:
            return _load_pretrained(model, read)
        except CandidateError as second:
            raise (second if as_saved else error) from second
    read.values, read.derived = found.values, found.derived
    return found


def _load_pretrained(model: nn.Module, read: _Read) -> Loading:
    """Fills in what transformers' from_pretrained makes of a candidate.

    CandidateError if it refuses, or warns.
    """
    candidate = read.candidate
    sources = {key: candidate.source(key) for key in candidate.info}
    try:
        found = loading.load_pretrained(model, sources)
        _check_complete(model, read, found)
    except CandidateError as error:
        raise error if error.where else CandidateError(error.problem, candidate.path) from error
    except Exception as error:  # a class that its configuration alone does not make, for example
        what = f"{type(error).__name__}: {first_line(error)}"
        raise CandidateError(
            f"transformers' from_pretrained refuses it ({what})", candidate.path
        ) from error
    read.keys, read.sources, read.values = {key: key for key in sources}, sources, found.values
    read.pretrained = True
    return found


def _loaded(model: nn.Module, read: _Read) -> Loading:
    """What load_state_dict would do; CandidateError if it raises."""
    candidate = read.candidate
    try:
        return loading.load(model, Content(read.sources, candidate.extra, candidate.metadata))
    except CandidateError as error:
        raise CandidateError(error.problem, candidate.path) from error
    except Exception as error:
        for key, t in model.state_dict(keep_vars=True).items():
            if key in read.sources and isinstance(t, Tensor):
                _check_shape(read, key, t)
        raise CandidateError(loading.refused(error).problem, candidate.path) from error


def _check_shape(read: _Read, key: str, t: Tensor) -> None:
    """CandidateError if a tensor of the file has another shape than that of the model."""
    if not nn.parameter.is_lazy(t):
        expected = TensorInfo(tuple(t.shape), t.dtype)
        info = read.sources[key].info
        check_info(read.candidate.path, read.keys[key], expected, info, "in the model")


def _check_complete(model: nn.Module, read: _Read, found: Loading) -> None:
    """CandidateError if a loading lacks a tensor, or has one that the model does not have."""
    candidate, ignore = read.candidate, read.candidate.ignore
    made = named_tensors(model)  # buffers that are not saved, too
    unexpected = []
    for said in found.unexpected:  # after hooks of wrappers may have changed it
        key = said if said in read.sources else load_key(model, said)[0]
        source, buffer = read.sources.get(key), made.get(name_of(model, key))
        if source is None or buffer is None or not _holds(buffer, source):
            unexpected.append(read.keys.get(key, key))
    if unexpected:
        raise _unexpected(sorted(unexpected), candidate, _entry_hint(model, candidate))
    keys = {without_wrappers(key) for key in found.missing} - {N_AVERAGED}
    missing = [k for k in keys if not any(fnmatch.fnmatchcase(k, p) for p in ignore)]
    if missing:
        raise _missing(sorted(missing), candidate)


def _holds(buffer: Tensor, source: Source) -> bool:
    """Whether a buffer that the model makes itself is what a file holds."""
    if buffer.device.type == "meta" or tuple(buffer.shape) != source.info.shape:
        return False
    return torch.equal(buffer.cpu(), source.read().to(buffer.dtype))


def _entry_hint(model: nn.Module, candidate: Candidate) -> str:
    """More words for the error if the model's tensors are there behind a prefix."""
    wanted = model.state_dict(keep_vars=True).keys()
    first = next(iter(wanted), None)
    if first is not None:
        for key in candidate.info:
            prefix = key.removesuffix(f".{first}")
            if prefix != key and all(f"{prefix}.{name}" in candidate.info for name in wanted):
                return f"; all of its tensors are there under {prefix!r}: pass that as entry"
    return "; tensors that are not the model's can be left out with ignore"


def _in_order(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Names of tensors in the order of the model's state_dict."""
    place = {name: k for k, name in enumerate(dict.fromkeys(state_names(model).values()))}
    return sorted(names, key=lambda name: place.get(name, len(place)))


def _keys(model: nn.Module, names: Sequence[str], reads: Sequence[_Read]) -> dict[str, str]:
    """Name of each tensor -> the key that holds it in the first file that has one, or its own."""
    own, different = loading.own_keys(model, names), list({id(r.values): r for r in reads}.values())
    found = {}
    for name in names:
        keys = (read.key_of(name) for read in different)
        found[name] = next((key for key in keys if key is not None), own[name])
    return found


def _written(
    names: Sequence[str], read: _Read, keys: Mapping[str, str]
) -> dict[str, Written] | None:
    """What `KeyMap.written` says of tensors that are parts of others, from one candidate.

    None if two tensors would be exported under one key, or if parts of a tensor of the files would
    be left without values.
    """
    parts: dict[str, list[tuple[str, Block]]] = {}
    for name in names:
        blocks = blocks_of(read.values[name])
        if read.key_of(name) is None and blocks is not None:
            for block in blocks:
                parts.setdefault(block.key, []).append((name, block))
    found = {}
    for key, pairs in parts.items():
        info = read.sources[key].info
        if sum(TensorInfo(block.sizes, info.dtype).numel for _, block in pairs) != info.numel:
            return None
        if any(0 in block.strides for _, block in pairs):  # expanded
            return None
        found[read.keys[key]] = Written(info, tuple(pairs))
    inside = {name for pairs in parts.values() for name, _ in pairs}
    exported = [*found, *(keys[name] for name in names if name not in inside)]
    unique = len(set(exported)) == len(exported) and len(set(keys.values())) == len(names)
    return found if unique else None


def _settle_derived(reads: Sequence[_Read], tensors: Mapping[str, Tensor]) -> None:
    """Buffers that loading fills and nobody saves: the same for all files, they are set.

    CandidateError if they are not: none of them would be that of an average.
    """
    for name in reads[0].derived:
        first = located(reads[0].derived[name], reads[0].sources).read()
        for read in reads:
            value = read.derived.get(name)
            found = None if value is None else located(value, read.sources).read()
            if found is None or not torch.equal(first, found):
                raise CandidateError(
                    f"buffer {name!r} of the model is not saved, and its loading makes it of what"
                    " is in the file: an average would not have it; make it in forward, or save it",
                    read.candidate.path,
                )
        with torch.no_grad():
            tensors[name].copy_(first)


def _loads_again(
    model: nn.Module,
    names: Sequence[str],
    read: _Read,
    keys: Mapping[str, str],
    written: Mapping[str, Written],
) -> bool:
    """Whether the model's loading would surely make of an export what it is of.

    It may not, if what was dropped of the files has a say in it, or the versions of modules, which
    an export does not hold.

    Args:
        model: whose loading it is
        names: of the tensors
        read: the first candidate
        keys: name -> key
        written: what is exported as parts of tensors
    """
    wanted: dict[str, set[Block]] = {}
    infos = {key: w.info for key, w in written.items()}
    for w in written.values():
        for name, block in w.parts:
            wanted.setdefault(name, set()).add(block)
    infos |= {keys[name]: read.source(name).info for name in names if name not in wanted}
    looked_for = {key: key if read.pretrained else load_key(model, key)[0] for key in infos}
    sources: dict[str, Source] = {
        looked_for[key]: Held(torch.empty(info.shape, dtype=info.dtype, device="meta"))
        for key, info in infos.items()
    }
    try:
        if read.pretrained:
            found = loading.load_pretrained(model, sources)
        else:
            found = loading.load_lazily(model, Content(sources), tentative=True)
    except Exception:  # such as one for numbers, which are not there
        return False
    for name in names:
        value = found.values.get(name)
        blocks = None if value is None else blocks_of(value)
        if blocks is None:
            return False
        if name in wanted:
            if set(blocks) != wanted[name]:
                return False
        else:
            block, sizes = blocks[0], blocks[0].sizes
            whole = block.offset == 0 and block.strides == contiguous_strides(sizes)
            if not whole or [b.key for b in blocks] != [looked_for[keys[name]]]:
                return False
    return True


def _translated(
    candidates: Candidates,
    reads: Sequence[_Read],
    names: Mapping[str, str],
    tensors: Mapping[str, Tensor],
) -> Candidates:
    """The candidates with the tensors as the model has them, by these keys: key -> name."""
    made, same = [], True
    plain: set[int] = set()  # values, by id, that are the files' own tensors
    for read in reads:
        own = {key: read.candidate.source(key) for key in read.candidate.info}
        if id(read.values) in plain and names.keys() == own.keys():
            found = own
        else:
            found = _sources(read, names, tensors)
        if found == own:
            plain.add(id(read.values))
        same = same and found == own
        made.append(found)
    if not same:
        return candidates.translated(made)
    candidates.checked = True
    return candidates


def _sources(
    read: _Read, names: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, Source]:
    """Where the model's tensors lie in one candidate, by these keys: key -> name."""
    c, found = read.candidate, {}
    for key, name in names.items():
        source, t = read.source(name), tensors[name]
        if key in c.info and any(key in tied for tied in read.tied):
            source = c.source(key)  # which has the same values
        if t.is_floating_point() or t.is_complex():
            expected = TensorInfo(tuple(t.shape), t.dtype)
            check_info(c.path, key, expected, source.info, "in the model")
        found[key] = source
    return found


def _check_memory(key_map: KeyMap, state: Mapping[str, Tensor]) -> None:
    """TwaError if a trained parameter shares memory with another tensor.

    What is written to one would change the other.
    """
    spans = []  # (device, first byte, byte after the last, name)
    for name in [*key_map.trained, *key_map.fixed, *key_map.copied]:
        t = state[name]
        if type(t) in (Tensor, nn.Parameter) and t.device.type != "meta":
            begin, size = t.data_ptr(), span(t.shape, t.stride()) * t.element_size()
            if size:
                spans.append((str(t.device), begin, begin + size, name))
    last = ("", 0, 0, "")
    for this in sorted(spans):
        overlap = this[0] == last[0] and this[1] < last[2]
        if overlap and (this[3] in key_map.trained or last[3] in key_map.trained):
            raise TwaError(
                f"model: {last[3]!r} and {this[3]!r} share memory but are two tensors: expected one"
                " Parameter under both names (a tied weight), or a clone"
            )
        last = max(last, this, key=lambda s: (s[0], s[2]))
