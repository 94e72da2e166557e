"""Language models on text that is on the machine already: nothing is downloaded.

Built in are two domains that Python brings, over one vocabulary, so that a model trained on one can
be fine-tuned on the other:

    source   the standard library's source, exactly as in the task `chars` when context is 128
    code     the same without pydoc_data, whose modules hold the text of "help": to train on before
             fine-tuning on "help", and not see its test data
    help     the interpreter's help on the language, some 370,000 characters of English. Topics
             repeat each other, so a fifth of their text is left out: of paragraphs that are equal
             but for white space one is kept, else a third of the test data's lines would be in the
             training data

The text is cut into windows of context + 1 tokens and into blocks of 16 windows; of every 10 blocks
in a row (20 of "source" and "code") one each goes to held-out, validation and test data and the
others to training, so that each split covers all of the text and no two share a character.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twa.io.errors import TaskError
from twa.tasks import chars
from twa.tasks.contract import Task
from twa.tasks.gpt import GPT

DOMAINS = ("source", "code", "help")
SUFFIXES = (".txt", ".md", ".py")
# one of them is in what save_to_disk writes
SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")
CYCLE, HELD = 10, {"heldout": 3, "val": 6, "test": 9}  # blocks; the other 7 are training data
EVAL_WINDOWS = 512  # at most so many to validate and to test on
BEYOND_ASCII = 0.2  # of the bytes; with more, a model over ASCII would mostly learn to repeat 127
TRANSFORMERS = "transformers:"


def text_task(
    path: str | Path | None = None,
    *,
    domain: str = "source",
    model: str | None = None,
    seed: int = 0,
    heldout_windows: int | None = None,
    batch: int = 16,
    context: int = 128,
    width: int = 96,
    depth: int = 3,
) -> Task:
    """Next-token prediction; the loss is cross-entropy in nats per character (per token with a
    tokenizer). Batches are (b, context + 1) int64.

    Args:
        path: a text file, a directory of them (.txt, .md, .py; searched to the bottom, in the order
            of their names), or a dataset of the library `datasets`, as save_to_disk writes it (its
            "text" column, or its only column of strings; of several splits "train"). Read as bytes,
            those beyond ASCII as 127. None: `domain`, one of source, code, help
        model: None: GPT(context=context, width=width, depth=depth) over 128 characters, newly
            initialised at each call. "transformers:DIR": the causal language model and the
            tokenizer in DIR, as save_pretrained writes them, with their weights
        seed: of the order of training and held-out batches, new in each pass; validation and test
            data come in the order of the text
        heldout_windows: so many windows of the held-out data, spread evenly; None: all
        batch: windows per batch of training and held-out data

    Raises:
        TaskError: there is no such text or model, too little text for one window of each block, or
            a library is missing
    """
    for name, value in (("batch", batch), ("context", context)):
        if value < 1:
            raise TaskError(f"expected {name} of at least 1, found {value}", "text_task")
    if path is None and domain not in DOMAINS:
        raise TaskError(f"expected a domain of {', '.join(DOMAINS)}, found {domain!r}", "text_task")
    name = f"text:{domain if path is None else path}"
    text = _domain(domain) if path is None else _read(Path(path))
    is_own_source = path is None and domain == "source" and model is None
    exactly_chars = is_own_source and context == chars.CONTEXT
    if exactly_chars:
        text = chars.whole_cycles(text)
    made = _parts(text, name, model, context, width, depth)
    cycle, held = chars.CYCLE, chars.HELD
    if path is not None or domain == "help":
        cycle, held = CYCLE, HELD
    if len(made.tokens) < (needed := cycle * chars.BLOCK_WINDOWS * (context + 1)):
        raise TaskError(
            f"expected at least {needed:,} {made.unit} of text for a context of {context}, found"
            f" {len(made.tokens):,}",
            name,
        )
    splits = chars.cut(made.tokens, context, cycle, held)
    heldout = splits["heldout"]
    if heldout_windows is not None:
        heldout = _spread(heldout, heldout_windows, name)
    digest = hashlib.sha256(made.tokens.numpy().tobytes()).hexdigest()[:16]
    val_limit = test_limit = EVAL_WINDOWS
    if exactly_chars:
        val_limit, test_limit = chars.VAL_WINDOWS, chars.TEST_WINDOWS
    return Task(
        name=name,
        model=made.model,
        loss=made.loss,
        train=chars.Batches(splits["train"], batch, shuffle=True, seed=seed),
        heldout=chars.Batches(heldout, batch, shuffle=True, seed=seed),
        val=chars.Batches(splits["val"], chars.EVAL_BATCH, limit=val_limit),
        test=chars.Batches(splits["test"], chars.EVAL_BATCH, limit=test_limit),
        metric=None,
        metric_name="metric",
        fingerprint=f"{name} {digest} context {context} held-out {len(heldout)}",
    )


@dataclass(frozen=True)
class _Parts:
    """What a model and a text make of each other: tokens (length,), and the loss per unit."""

    model: Callable[[], nn.Module]
    tokens: Tensor
    loss: Callable[[nn.Module, Tensor], Tensor]
    unit: str


def _parts(
    text: bytes, name: str, model: str | None, context: int, width: int, depth: int
) -> _Parts:
    if model is None:
        _check_ascii(text, name)
        make = functools.partial(GPT, chars.VOCABULARY, context, width, depth)
        return _Parts(make, chars.characters(text), chars.loss, "characters")
    if not model.startswith(TRANSFORMERS):
        raise TaskError(f"expected a model None or {TRANSFORMERS}DIR, found {model!r}", name)
    make, tokens = _pretrained(Path(model.removeprefix(TRANSFORMERS)), text, context)
    return _Parts(make, tokens, token_loss, "tokens")


def _spread(windows: Tensor, count: int, name: str) -> Tensor:
    """So many of the windows: the middle of each of as many parts."""
    if not 1 <= count <= len(windows):
        raise TaskError(
            f"expected heldout_windows from 1 to the {len(windows)} that there are, found {count}",
            name,
        )
    return windows[(2 * torch.arange(count) + 1) * len(windows) // (2 * count)]


def token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token of a causal language model of transformers; batch
    (b, context + 1) int64.
    """
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits  # (b, context, vocabulary)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


# Text --------------------------------------------------------------------------------------------


@functools.cache
def _domain(domain: str) -> bytes:
    if domain == "help":
        from pydoc_data.topics import topics

        first: dict[str, str] = {}
        for name in sorted(topics):
            for paragraph in topics[name].split("\n\n"):
                first.setdefault(" ".join(paragraph.split()), paragraph)
        return "\n\n".join(first.values()).encode()
    return b"".join(
        p.read_bytes() for p in chars.files() if domain == "source" or p.parent.name != "pydoc_data"
    )


def _check_ascii(text: bytes, name: str) -> None:
    """TaskError if too many bytes are none of ASCII."""
    share = len(text.translate(None, bytes(range(128)))) / max(len(text), 1)
    if share > BEYOND_ASCII:
        raise TaskError(
            f"{share:.0%} of the bytes are not ASCII, which the character model cannot tell apart;"
            f" use {TRANSFORMERS}DIR",
            name,
        )


def _read(path: Path) -> bytes:
    """The text of a file, of all files in a directory, or of a saved dataset."""
    where = f"text {str(path)!r}"
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise TaskError(f"expected a file ending in {', '.join(SUFFIXES)}", where)
        return path.read_bytes()
    if not path.is_dir():
        raise TaskError(
            "expected a text file or a directory; there is no such file or directory", where
        )
    if any((path / name).is_file() for name in SAVED):
        return _read_dataset(path)
    found = [p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()]
    found.sort(key=lambda p: p.relative_to(path).as_posix())
    if not found:
        raise TaskError(
            f"expected files ending in {', '.join(SUFFIXES)} or a saved dataset, found neither",
            where,
        )
    return b"\n".join(p.read_bytes() for p in found)


def _read_dataset(path: Path) -> bytes:
    """The rows of a saved dataset's column of text, a line each."""
    where = f"text {str(path)!r}"
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise TaskError(
            f"a saved dataset is read with the library datasets (`pip install datasets`): {error}",
            where,
        ) from error
    data = load_from_disk(str(path))
    if isinstance(data, dict):  # a DatasetDict
        if "train" not in data and len(data) != 1:
            raise TaskError(
                "expected a dataset with a split train, or with one split, found"
                f" {', '.join(data) or 'none'}",
                where,
            )
        data = data["train"] if "train" in data else next(iter(data.values()))
    if not len(data):
        return b""
    column = "text"
    if column not in data.column_names:
        strings = [name for name in data.column_names if isinstance(data[0][name], str)]
        if len(strings) != 1:
            raise TaskError(
                "expected a column text, or one column of strings, found"
                f" {', '.join(data.column_names)}",
                where,
            )
        column = strings[0]
    return "\n".join(text or "" for text in data[column]).encode()  # a row may be None


# Models of transformers --------------------------------------------------------------------------


def _pretrained(folder: Path, text: bytes, context: int) -> tuple[Callable[[], nn.Module], Tensor]:
    """What loads the model, and the text's tokens (length,) int32.

    Only files in the folder are read.
    """
    where = f"model {str(folder)!r}"
    if not (folder / "config.json").is_file():
        raise TaskError(
            "expected a directory with a config.json, as save_pretrained writes it", where
        )
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise TaskError(
            f"it is loaded with the library transformers (`pip install transformers`): {error}",
            where,
        ) from error
    local = {"local_files_only": True}
    config = AutoConfig.from_pretrained(folder, **local)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and context > limit:
        raise TaskError(
            f"expected a context of at most its {limit} positions, found {context}", where
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    # verbose: it would warn of the length
    encoded = tokenizer(text.decode(errors="replace"), add_special_tokens=False, verbose=False)

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, **local).float()

    return load, torch.tensor(encoded["input_ids"], dtype=torch.int32)
