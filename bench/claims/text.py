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
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twa.tasks import chars
from twa.tasks.contract import Task, TaskError
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

    path             a text file, a directory of them (.txt, .md, .py; searched to the bottom, in
                     the order of their names), or a dataset of the library `datasets`, as
                     save_to_disk writes it (its "text" column, or its only column of strings; of
                     several splits "train"). Read as bytes, those beyond ASCII as 127. None:
                     `domain`, one of source, code, help.
    model            None: GPT(context=context, width=width, depth=depth) over 128 characters, newly
                     initialised at each call. "transformers:DIR": the causal language model and the
                     tokenizer in DIR, as save_pretrained writes them, with their weights.
    seed             of the order of training and held-out batches, new in each pass; validation and
                     test data come in the order of the text
    heldout_windows  so many windows of the held-out data, spread evenly; None: all
    batch            windows per batch of training and held-out data

    TaskError (a ValueError) if there is no such text or model, too little text for one window of
    each block, or a library is missing.
    """
    for name, value in (("batch", batch), ("context", context)):
        if value < 1:
            raise TaskError(f"text_task: expected {name} of at least 1, found {value}")
    if path is None and domain not in DOMAINS:
        raise TaskError(f"text_task: expected a domain of {', '.join(DOMAINS)}, found {domain!r}")
    name = f"text:{domain if path is None else path}"
    text = _domain(domain) if path is None else _read(Path(path))
    exactly_chars = (
        path is None and domain == "source" and model is None and context == chars.CONTEXT
    )
    if exactly_chars:
        text = chars.whole_cycles(text)
    if model is None:
        if (share := _beyond_ascii(text)) > BEYOND_ASCII:
            raise TaskError(
                f"{name}: {share:.0%} of the bytes are not ASCII, which the character model cannot"
                f" tell apart; use {TRANSFORMERS}DIR"
            )
        make: Callable[[], nn.Module] = functools.partial(
            GPT, chars.VOCABULARY, context, width, depth
        )
        tokens, loss, unit = chars.characters(text), chars.loss, "characters"
    else:
        if not model.startswith(TRANSFORMERS):
            raise TaskError(f"{name}: expected a model None or {TRANSFORMERS}DIR, found {model!r}")
        make, tokens = _pretrained(Path(model.removeprefix(TRANSFORMERS)), text, context)
        loss, unit = token_loss, "tokens"

    cycle, held = (
        (CYCLE, HELD) if path is not None or domain == "help" else (chars.CYCLE, chars.HELD)
    )
    if len(tokens) < (needed := cycle * chars.BLOCK_WINDOWS * (context + 1)):
        raise TaskError(
            f"{name}: expected at least {needed:,} {unit} of text for a context of {context}, found"
            f" {len(tokens):,}"
        )
    splits = chars.cut(tokens, context, cycle, held)

    heldout = splits["heldout"]
    if heldout_windows is not None:
        if not 1 <= heldout_windows <= len(heldout):
            raise TaskError(
                f"{name}: expected heldout_windows from 1 to the {len(heldout)} that there are,"
                f" found {heldout_windows}"
            )
        # the middle of each part
        heldout = heldout[
            (2 * torch.arange(heldout_windows) + 1) * len(heldout) // (2 * heldout_windows)
        ]
    val_limit, test_limit = (
        (chars.VAL_WINDOWS, chars.TEST_WINDOWS) if exactly_chars else (EVAL_WINDOWS, EVAL_WINDOWS)
    )
    return Task(
        name=name,
        model=make,
        loss=loss,
        train=chars.Batches(splits["train"], batch, shuffle=True, seed=seed),
        heldout=chars.Batches(heldout, batch, shuffle=True, seed=seed),
        val=chars.Batches(splits["val"], chars.EVAL_BATCH, limit=val_limit),
        test=chars.Batches(splits["test"], chars.EVAL_BATCH, limit=test_limit),
        metric=None,
        metric_name="metric",
        fingerprint=(
            f"{name} {hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]} context {context}"
            f" held-out {len(heldout)}"
        ),
    )


def token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token of a causal language model of transformers; batch (b,
    context + 1) int64.
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


def _beyond_ascii(text: bytes) -> float:
    return len(text.translate(None, bytes(range(128)))) / max(len(text), 1)


def _read(path: Path) -> bytes:
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise TaskError(f"text {str(path)!r}: expected a file ending in {', '.join(SUFFIXES)}")
        return path.read_bytes()
    if not path.is_dir():
        raise TaskError(
            f"text {str(path)!r}: expected a text file or a directory; there is no such file or"
            " directory"
        )
    if any((path / name).is_file() for name in SAVED):
        return _read_dataset(path)
    found = sorted(
        (p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()),
        key=lambda p: p.relative_to(path).as_posix(),
    )
    if not found:
        raise TaskError(
            f"text {str(path)!r}: expected files ending in {', '.join(SUFFIXES)} or a saved"
            " dataset, found neither"
        )
    return b"\n".join(p.read_bytes() for p in found)


def _read_dataset(path: Path) -> bytes:
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise TaskError(
            f"text {str(path)!r}: a saved dataset is read with the library datasets (`pip install"
            f" datasets`): {error}"
        ) from error
    data = load_from_disk(str(path))
    if isinstance(data, dict):  # a DatasetDict
        if "train" not in data and len(data) != 1:
            raise TaskError(
                f"text {str(path)!r}: expected a dataset with a split train, or with one split,"
                f" found {', '.join(data) or 'none'}"
            )
        data = data["train"] if "train" in data else next(iter(data.values()))
    if not len(data):
        return b""
    column = "text"
    if column not in data.column_names:
        strings = [name for name in data.column_names if isinstance(data[0][name], str)]
        if len(strings) != 1:
            raise TaskError(
                f"text {str(path)!r}: expected a column text, or one column of strings, found"
                f" {', '.join(data.column_names)}"
            )
        column = strings[0]
    return "\n".join(text or "" for text in data[column]).encode()  # a row may be None


# Models of transformers --------------------------------------------------------------------------


def _pretrained(folder: Path, text: bytes, context: int) -> tuple[Callable[[], nn.Module], Tensor]:
    """(what loads the model, the text's tokens (length,) int32).

    Only files in the folder are read.
    """
    if not (folder / "config.json").is_file():
        raise TaskError(
            f"model {str(folder)!r}: expected a directory with a config.json, as save_pretrained"
            " writes it"
        )
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise TaskError(
            f"model {str(folder)!r}: it is loaded with the library transformers (`pip install"
            f" transformers`): {error}"
        ) from error
    limit = getattr(
        AutoConfig.from_pretrained(folder, local_files_only=True), "max_position_embeddings", None
    )
    if limit is not None and context > limit:
        raise TaskError(
            f"model {str(folder)!r}: expected a context of at most its {limit} positions, found"
            f" {context}"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # verbose: it would warn of the length
    tokens = tokenizer(text.decode(errors="replace"), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).float()

    return load, torch.tensor(tokens, dtype=torch.int32)
