"""Beyond the paper: adapters, and the claim on tiny workloads."""

import copy
import io
from dataclasses import replace

import matplotlib
import pytest
import torch
from claims import beyond, lora, unlabelled, workloads
from claims.job import Job
from claims.models.lora import LoRALinear, add_lora, merged_lora
from claims.rows import Rows
from claims.runs import Plan
from claims.text import text_task
from stand_ins import digits, little_digits, little_text
from torch import nn
from twa.tasks.gpt import GPT

SETTINGS = ("LoRA", "LoRA, merged", *beyond.STORED, "unlabelled", "warm start")


pytestmark = pytest.mark.usefixtures("one_thread")


# Adapters ----------------------------------------------------------------------------------------


def tiny():
    torch.manual_seed(0)
    return GPT(context=8, width=16, depth=2, heads=2)


TOKENS = torch.arange(24).view(3, 8)


def test_new_adapters_leave_the_outputs_unchanged():
    plain = tiny()
    adapted = add_lora(copy.deepcopy(plain), 3, seed=1)
    assert torch.equal(adapted(TOKENS), plain(TOKENS))
    assert adapted.head.weight is adapted.embed.weight
    assert len([m for m in adapted.modules() if isinstance(m, LoRALinear)]) == 2 * 4


def test_only_adapters_are_trained():
    adapted = add_lora(tiny(), 3, seed=1)
    frozen = {name: p.clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    assert frozen.keys() == {name for name, _ in tiny().named_parameters()}  # under their own names
    assert all(
        name.endswith((".A", ".B")) for name, p in adapted.named_parameters() if p.requires_grad
    )
    optimizer = Plan(3, 3, 0.1).make_optimizer(adapted)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(TOKENS).square().mean().backward()
        optimizer.step()
    after = dict(adapted.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in frozen.items())
    assert all(after[name].any() for name in after if name.endswith(".B"))


def test_the_seed_draws_the_same_adapters():
    a, b, c = (dict(add_lora(tiny(), 3, seed).named_parameters()) for seed in (1, 1, 2))
    name = "blocks.1.down.A"
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])
    assert not torch.equal(a["blocks.0.down.A"], a[name])


def test_merged_equals_unmerged():
    adapted = add_lora(tiny(), 3, seed=1)
    for name, p in adapted.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(p, std=0.1)
    plain = tiny()
    missing, unexpected = plain.load_state_dict(merged_lora(adapted), strict=False)
    assert missing == ["head.weight"] and not unexpected  # tied to embed.weight
    torch.testing.assert_close(plain(TOKENS), adapted(TOKENS), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain(TOKENS), tiny()(TOKENS), atol=1e-2)


@pytest.mark.parametrize(("model", "rank"), [(tiny, 0), (lambda: nn.Linear(2, 2), 1)])
def test_bad_adapters(model, rank):
    with pytest.raises(ValueError, match="expected"):
        add_lora(model(), rank, 0)


# The claim ---------------------------------------------------------------------------------------


def small_gpt():
    made = workloads.gpt(width=16, depth=1, context=16)
    plan = Plan(steps=16, every=2, lr=1e-2, schedule="cosine", warmup=2)
    return replace(made, make=lambda **o: few(made.make(**o)), usual=plan, twa_steps=4)


def few(task):
    """The same with two validation and test batches."""
    return replace(
        task,
        val=task.val.__class__(task.val.data, 8, limit=16),
        test=task.test.__class__(task.test.data, 8, limit=16),
    )


def small_vit():
    plan = Plan(steps=10, every=1, lr=3e-3, schedule="cosine", warmup=2)
    return digits("vit", plan, twa_steps=3)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        little_text(patch)
        little_digits(patch)
        patch.setattr("claims.job.BUILT_IN", {"gpt": small_gpt, "vit": small_vit})
        for module, name, value in (
            (lora, "STEPS", (2, 4)),
            (lora, "RATES", (1e-2,)),
            (unlabelled, "RATES", (1e-3,)),
            (unlabelled, "EPOCHS", 1),
        ):
            patch.setattr(module, name, value)
        long = ("v:fine:4", 2, ("labels", "entropy"))
        patch.setitem(unlabelled.UNLABELLED, unlabelled.LONG, long)
        yield Rows(beyond.run(Job(0, tmp_path_factory.mktemp("suite"))))


def test_rows(rows):
    assert tuple(rows.of("setting")) == SETTINGS
    for setting in SETTINGS:
        methods = rows.where(setting=setting).of("method")
        assert len(methods) == len(rows.where(setting=setting))
        assert any(m.startswith("TWA") for m in methods)
    for row in rows:
        assert row["seed"] == 0 and row["cost"] >= 0
        assert all(0 < row[key] < 20 for key in ("val", "test"))


def test_data_of_the_user_s(tmp_path, monkeypatch):
    """Only what needs no data of its own; what is built in is not touched."""
    little_text(monkeypatch)
    monkeypatch.setattr("claims.job.BUILT_IN", {})
    monkeypatch.setattr("claims.job.of_path", lambda *_: small_gpt())
    monkeypatch.setattr(beyond, "STORED", {"int8 weights": {"grid": 8}})
    found = Rows(beyond.run(Job(0, tmp_path, "full", data=tmp_path)))
    assert found.of("setting") == ["int8 weights", "warm start"]
    assert "left out" in beyond.findings(found)[-1]
    methods = found.of("method")
    pairs = [(m, f"{m}, rounded to int8") for m in methods if f"{m}, rounded to int8" in methods]
    assert [m for m, _ in pairs] == ["uniform", "EMA", "LAWA", "TWA-t fine, 4 bits"]
    stored = found.where(setting="int8 weights")
    assert all(0 < abs(stored.mean(method=a) - stored.mean(method=b)) < 0.1 for a, b in pairs)


def test_what_is_chosen_on_validation_data_is_never_worse_there(rows):
    mine = rows.where(setting="float32 weights")
    fixed = min(r["val"] for r in mine if not r["method"].startswith("TWA"))
    assert all(r["val"] <= fixed for r in mine if r["method"].startswith("TWA"))
    warm = rows.where(setting="warm start")
    starts = [m for m in warm.of("method") if not m.startswith("TWA")]
    assert len(starts) == 6
    for m in starts:
        assert warm.mean("val", method=f"TWA from {m}") <= warm.mean("val", method=m)


def test_single_candidates_are_the_same_as_factors_and_merged(rows):
    single = rows.where(method="best single", setting=("LoRA", "LoRA, merged")).values("test")
    assert single[0] == pytest.approx(single[1], rel=1e-4)


def test_the_unlabelled_choose_by_what_they_train_on(rows):
    mine = rows.where(setting="unlabelled")
    assert len(mine) == 3 + 2 * 3 + 2
    for row in mine:
        assert 0 < row["entropy"] < 2.4 and 0.1 <= row["share"] <= 1 and 0 <= row["metric"] <= 1
        if "objective" in row:
            assert row["objective"] <= row["objective at start"]
    more = {r["method"]: r["cost"] - r["steps"] - r["looks"] for r in mine}
    assert more["TWA-v model, experts"] > 0.1
    assert more["TWA-v model, entropy"] == more["TWA-v model, labels"] == pytest.approx(0)


def test_objectives_have_their_minimum_where_they_should():
    model, images = nn.Flatten(), torch.randn(5, 7)
    target = images.softmax(1)
    assert float(unlabelled.by_experts(model, (images, None, target))) == pytest.approx(0, abs=1e-6)

    def entropy(images):
        return float(unlabelled.by_entropy(model, (images, None, None)))

    assert entropy(100 * images) < entropy(images)
    assert entropy(torch.zeros(5, 7)) == pytest.approx(torch.tensor(7.0).log().item())


def test_batches_in_bfloat16():
    seen = []
    task = text_task(domain="help", context=16, width=16, depth=1)
    task = replace(task, loss=lambda model, batch: seen.append(batch))
    batch = (torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    beyond.of_dtype(task, torch.bfloat16).loss(None, batch)
    assert [t.dtype for t in seen[0]] == [torch.bfloat16, torch.int64]


def test_findings(rows):
    found = "\n".join(beyond.findings(rows))
    assert all(setting in found for setting in SETTINGS)
    assert "left out" not in found and "nan" not in found
    mine = rows.where(setting="warm start")
    assert f"{min(r['test'] for r in mine if r['method'].startswith('TWA')):.4f}" in found
    without = beyond.findings(rows.where(setting=("float32 weights", "int8 weights", "warm start")))
    assert "left out" in without[-1]


@pytest.mark.parametrize("settings", [SETTINGS, ("int8 weights", "warm start")])
def test_picture(rows, settings):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=beyond.FIGURE, layout="constrained")
    beyond.picture(figure, rows.where(setting=settings))
    assert len(figure.axes) == len([s for s in beyond.PANELS.values() if set(s) & set(settings)])
    assert sum(len(axes.patches) for axes in figure.axes) == len(rows.where(setting=settings))
    figure.savefig(io.BytesIO(), format="png")
    plt.close(figure)
