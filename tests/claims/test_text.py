"""Language models on text: splits, domains, files, saved datasets and models of transformers."""

import json
import sys
import types

import pytest
import torch
from claims import text
from claims.text import text_task
from twa.io.errors import TaskError
from twa.tasks import chars
from twa.tasks.batches import Pass
from twa.tasks.gpt import GPT

SPLITS = ("train", "heldout", "val", "test")
# characters: a window for each place of a cycle of blocks, at a context of 128
ENOUGH = 10 * 16 * 129


pytestmark = pytest.mark.usefixtures("one_thread")


def counting(length):
    """Text in which every 8 characters occur once: their number."""
    return "".join(f"{i:07d} " for i in range(-(-length // 8)))[:length]


def windows(batches):
    return [row.tobytes() for row in batches.data.numpy()]


def one_pass(batches, number, seed):
    return torch.cat([b for _, b in Pass(batches, number, seed, lambda k: True)])


# The model ---------------------------------------------------------------------------------------


def test_gpt_is_the_demo_s_model():
    model = GPT()
    assert sum(p.numel() for p in model.parameters()) == 360_288
    assert model.head.weight is model.embed.weight
    assert [name for name, _ in model.named_parameters()][:4] == [
        "position",
        "embed.weight",
        "blocks.0.norm1.weight",
        "blocks.0.norm1.bias",
    ]
    torch.manual_seed(3)
    ours = GPT().state_dict()
    torch.manual_seed(3)
    theirs = chars.model().state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_gpt_draws_in_a_fixed_order():
    """The embedding's default draws come first, then the positions, each block's layers, the head,
    and last the weights of two dimensions in turn.
    """
    torch.manual_seed(5)
    model = GPT(vocabulary=11, context=7, width=8, depth=1, heads=2)
    torch.manual_seed(5)
    torch.randn(11, 8)
    assert torch.equal(model.position, torch.randn(7, 8) * 0.02)
    for shape in ((8, 24), (8, 8), (8, 32), (32, 8)):
        torch.nn.Linear(*shape)
    torch.nn.Linear(8, 11, bias=False)
    assert torch.equal(model.embed.weight, torch.nn.init.normal_(torch.empty(11, 8), std=0.02))
    assert torch.equal(
        model.blocks[0].qkv.weight, torch.nn.init.normal_(torch.empty(24, 8), std=0.02)
    )
    assert torch.equal(
        model.blocks[0].proj.weight, torch.nn.init.normal_(torch.empty(8, 8), std=0.01)
    )


def test_gpt_is_causal_and_says_what_it_cannot_do():
    torch.manual_seed(0)
    model = GPT(context=16, width=8, depth=1)
    tokens = torch.randint(128, (2, 16))
    other = tokens.clone()
    other[:, 9:] = (other[:, 9:] + 1) % 128
    torch.testing.assert_close(model(tokens)[:, :9], model(other)[:, :9])
    with pytest.raises(ValueError, match="at most 16 tokens in a row, found 17"):
        model(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="multiple of 4 heads, found 30"):
        GPT(width=30)


# Domains -----------------------------------------------------------------------------------------


def test_source_is_the_data_of_chars():
    task = text_task(seed=2)
    for name in SPLITS:
        ours, theirs = getattr(task, name), getattr(chars, f"{name}_data")
        theirs = theirs(seed=2) if name in ("train", "heldout") else theirs()
        assert torch.equal(next(iter(ours)), next(iter(theirs)))
        assert torch.equal(ours.data, theirs.data)
    model, batch = task.model(), next(iter(task.train))
    ours, theirs = task.loss(model, batch).item(), chars.loss(model, batch).item()
    assert ours == theirs == pytest.approx(4.85, abs=0.3)  # ln 128, +- 0.05 by seed


def test_help_is_english_that_code_does_not_hold():
    lines = [line for line in text._domain("help").split(b"\n") if len(line) > 40]
    assert len(lines) > 4000
    some = lines[::80]
    assert sum(line in text._domain("code") for line in some) < 0.05 * len(some)
    # the reason for "code"; others are broken by quotes
    assert sum(line in text._domain("source") for line in some) > 0.1 * len(some)
    help_, code = text_task(domain="help"), text_task(domain="code")
    assert not set(windows(help_.test)) & set(windows(code.train))

    def share(batches, characters):
        wanted = torch.tensor(list(characters), dtype=torch.uint8)
        return torch.isin(batches.data[::10], wanted).double().mean().item()

    assert share(code.train, b"_()") > 1.5 * share(help_.train, b"_()")
    assert share(help_.train, b"aeiou") > 1.1 * share(code.train, b"aeiou")
    assert help_.fingerprint != code.fingerprint
    assert all(getattr(help_, name).data.max() < chars.VOCABULARY for name in SPLITS)
    task = text_task(domain="help", context=64, width=32, depth=1)
    assert torch.isfinite(task.loss(task.model(), next(iter(task.val))))


def test_help_does_not_repeat_itself_across_splits():
    whole = text._domain("help").decode()
    paragraphs = [" ".join(p.split()) for p in whole.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    train = b"".join(windows(text_task(domain="help").train))
    lines = [
        line
        for w in windows(text_task(domain="help").test)
        for line in w.split(b"\n")[1:-1]
        if len(line) > 40 and b"--" not in line
    ]
    assert sum(line in train for line in lines) < 0.05 * len(lines)


# Splits ------------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_cover_the_text(tmp_path):
    whole = counting(3 * ENOUGH + 5000)
    (tmp_path / "a.txt").write_text(whole)
    task = text_task(tmp_path / "a.txt")
    parts = {name: windows(getattr(task, name)) for name in SPLITS}
    together = [w for part in parts.values() for w in part]
    assert len(set(together)) == len(together) == len(whole) // 129
    assert set(together) == {whole[i : i + 129].encode() for i in range(0, len(whole) - 128, 129)}
    third = len(whole) // 3
    for part in parts.values():  # each has some of every third of the text
        places = torch.tensor([whole.index(w.decode()) for w in part])
        assert all(((places >= k * third) & (places < (k + 1) * third)).any() for k in range(3))
    assert len(parts["train"]) > 0.65 * len(together) and len(parts["test"]) >= 48


def test_heldout_windows_are_spread_and_of_the_held_out_data():
    full = text_task(domain="help")
    order = {w: i for i, w in enumerate(windows(full.heldout))}
    for count in (1, 2, 100, len(order)):
        few = text_task(domain="help", heldout_windows=count)
        places = [order[w] for w in windows(few.heldout)]
        assert len(places) == count and places == sorted(set(places))
        gaps = zip([0, *places], [*places, len(order)], strict=True)
        assert max(b - a for a, b in gaps) <= len(order) / count + 1
        assert windows(few.train) == windows(full.train) and windows(few.val) == windows(full.val)
        assert sum(len(b) for b in few.heldout) == count
    for count in (0, len(order) + 1):
        message = f"heldout_windows from 1 to the {len(order)} that there are, found {count}"
        with pytest.raises(TaskError, match=message):
            text_task(domain="help", heldout_windows=count)


def test_passes_repeat_by_seed():
    one, same, other = (text_task(domain="help", seed=seed) for seed in (1, 1, 2))
    for name in ("train", "heldout"):
        first = one_pass(getattr(one, name), 0, 9)
        assert torch.equal(first, one_pass(getattr(same, name), 0, 9))
        assert torch.equal(first, one_pass(getattr(one, name), 0, 9))
        assert not torch.equal(first, one_pass(getattr(other, name), 0, 9))
        assert not torch.equal(first, one_pass(getattr(one, name), 1, 9))
    for name in ("val", "test"):
        assert torch.equal(one_pass(getattr(one, name), 0, 9), getattr(other, name).data.long())
    small = text_task(domain="help", batch=5, context=32)
    assert next(iter(one.train)).shape == (16, 129) and next(iter(small.train)).shape == (5, 33)


# Files -------------------------------------------------------------------------------------------


def test_a_directory_is_read_in_the_order_of_its_names(tmp_path):
    whole = counting(ENOUGH)
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "c.md").write_text(whole[10_000:])
    (tmp_path / "a.txt").write_text(whole[:4000])
    (tmp_path / "b.py").write_text(whole[4000:10_000])
    (tmp_path / "b.bin").write_bytes(b"\xff" * 10_000)
    joined = "\n".join([whole[:4000], whole[4000:10_000], whole[10_000:]])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "one.txt").write_text(joined)
    expected = windows(text_task(tmp_path / "other" / "one.txt").train)
    (tmp_path / "other" / "one.txt").unlink()
    assert windows(text_task(tmp_path).train) == expected


def test_bytes_beyond_ascii_become_127(tmp_path):
    (tmp_path / "a.txt").write_bytes(("abcdefghi" * 4000 + "é" * 1000).encode())
    task = text_task(tmp_path / "a.txt")
    assert max(getattr(task, name).data.max() for name in SPLITS) == 127
    (tmp_path / "a.txt").write_bytes("привет мир".encode() * 3000)
    with pytest.raises(TaskError, match=r"95% of the bytes are not ASCII.*transformers:DIR"):
        text_task(tmp_path / "a.txt")


def test_too_little_text_says_how_much_is_needed(tmp_path):
    (tmp_path / "a.txt").write_text(counting(ENOUGH))
    assert len(text_task(tmp_path / "a.txt").test.data) == 16
    (tmp_path / "a.txt").write_text(counting(ENOUGH - 1))
    with pytest.raises(
        TaskError, match=r"at least 20,640 characters of text for a context of 128, found 20,639"
    ):
        text_task(tmp_path / "a.txt")
    assert len(text_task(tmp_path / "a.txt", context=64).test.data) >= 16
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(TaskError, match="found 0"):
        text_task(tmp_path / "a.txt")


def test_what_is_not_text_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"abc")
    for path, message in (
        (tmp_path / "none.txt", "no such file or directory"),
        (tmp_path / "a.bin", "ending in .txt"),
        (tmp_path, "found neither"),
    ):
        with pytest.raises(TaskError, match=message):
            text_task(path)
    for arguments, message in (
        (dict(domain="poems"), "source, code, help, found 'poems'"),
        (dict(batch=0), "batch of at least 1"),
        (dict(context=0), "context of at least 1"),
        (dict(model="gpt2"), "transformers:DIR, found 'gpt2'"),
        (dict(model="transformers:gpt2"), "directory with a config.json"),
    ):
        with pytest.raises(TaskError, match=message):
            text_task(**arguments)


# Saved datasets ----------------------------------------------------------------------------------


class Rows:
    """As much of datasets.Dataset as is used."""

    def __init__(self, **columns):
        self.columns, self.column_names = columns, list(columns)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        return (
            self.columns[key]
            if isinstance(key, str)
            else {name: column[key] for name, column in self.columns.items()}
        )


def test_saved_datasets(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if not installed
    with pytest.raises(TaskError, match="pip install datasets"):
        text_task(tmp_path)

    library = types.ModuleType("datasets")
    monkeypatch.setitem(sys.modules, "datasets", library)
    saved = {}
    library.load_from_disk = lambda path: saved[path]
    whole = counting(ENOUGH)
    lines = [whole[i : i + 1000] for i in range(0, len(whole), 1000)]
    (tmp_path / "plain.txt").write_text("\n".join(lines))
    expected = windows(text_task(tmp_path / "plain.txt").train)
    numbers = list(range(len(lines)))
    for data in (
        Rows(text=lines, title=lines),
        Rows(label=numbers, body=lines),
        dict(test=Rows(text=["no"]), train=Rows(text=lines)),
        dict(only=Rows(x=lines)),
    ):
        saved[str(tmp_path)] = data
        assert windows(text_task(tmp_path).train) == expected
    for data, message in (
        (Rows(a=lines, b=lines), "one column of strings, found a, b"),
        (Rows(a=numbers), "one column of strings, found a"),
        (
            dict(a=Rows(text=lines), b=Rows(text=lines)),
            "split train, or with one split, found a, b",
        ),
        (Rows(text=[]), "found 0"),
        (Rows(text=[None, "short"]), "found 6"),
    ):
        saved[str(tmp_path)] = data
        with pytest.raises(TaskError, match=message):
            text_task(tmp_path)


# Models of transformers --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory):
    """A directory with a GPT-2 of random weights and a tokenizer whose tokens are characters."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("gpt2")
    vocabulary = {"[UNK]": 0} | {chr(i): i for i in range(1, 128)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    each = tokenizers.Regex(r"[\s\S]")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(each, behavior="isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    size = {"vocab_size": 128, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**size, bos_token_id=None, eos_token_id=None)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_model_of_transformers(tiny_gpt2, tmp_path):
    (tmp_path / "a.txt").write_text(counting(ENOUGH) + "é")
    arguments = dict(path=tmp_path / "a.txt", context=64)
    task, ours = text_task(model=f"transformers:{tiny_gpt2}", **arguments), text_task(**arguments)
    # its tokens are the characters
    count = len(task.train.data) - 1
    assert torch.equal(task.train.data.long()[:count], ours.train.data.long()[:count])
    model, again = task.model(), task.model()
    # with the directory's weights
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    model.eval()
    batch = next(iter(task.val))
    loss = task.loss(model, batch)
    with torch.no_grad():
        logp = model(input_ids=batch[:, :-1]).logits.log_softmax(-1)
    torch.testing.assert_close(loss.detach(), -logp.gather(-1, batch[:, 1:, None]).mean())
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(TaskError, match="at most its 64 positions, found 128"):
        text_task(tmp_path / "a.txt", model=f"transformers:{tiny_gpt2}")
    with pytest.raises(TaskError, match="tokens of text for a context of 64, found 1,000"):
        (tmp_path / "b.txt").write_text(counting(1000))
        text_task(tmp_path / "b.txt", model=f"transformers:{tiny_gpt2}", context=64)
    # nothing was written there
    assert json.loads((tiny_gpt2 / "config.json").read_text())["n_positions"] == 64


def test_without_transformers(tiny_gpt2, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TaskError, match="pip install transformers"):
        text_task(model=f"transformers:{tiny_gpt2}", domain="help", context=64)
