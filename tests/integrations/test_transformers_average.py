"""A second phase in transformers' Trainer: train_average, and twa's optimizer as the Trainer's."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")


import datasets
import torch
import twa
from tiny_hf import callback_of, data, model, trainer, weights_of
from torch.nn.functional import cross_entropy
from torch.utils.data import IterableDataset
from transformers import default_data_collator
from twa.integrations.transformers import FOLDER, train_average
from twa.io.errors import TwaError

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {"steps": 6, "methods": ["t:tensor:4"], "progress": False}


def doubled(outputs, labels, num_items_in_batch=None):
    """A loss of one's own."""
    logits = outputs["logits"][..., :-1, :]
    return 2.0 * cross_entropy(logits.flatten(0, 1), labels[..., 1:].flatten())


def per_label(outputs, labels, num_items_in_batch=None):
    """A loss of one's own that divides by what it is given."""
    logits = outputs["logits"][..., :-1, :].flatten(0, 1)
    return cross_entropy(logits, labels[..., 1:].flatten(), reduction="sum") / num_items_in_batch


KINDS = {
    "plain": {},
    "smoothed": {"label_smoothing_factor": 0.2},
    "bfloat16": {"bf16": True},
    "own loss": {"more": {"compute_loss_func": doubled}},
    "per label": {"more": {"compute_loss_func": per_label}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_train_average(tmp_path, kind):
    """What it measures is what the trainer does; the trainer's model is at the best, and the
    trainer goes on as before."""
    trained = trainer(tmp_path, {"every": 2, "path": None}, **KINDS[kind])
    trained.train()
    own, random = trained.evaluate()["eval_loss"], torch.get_rng_state()
    outcome = train_average(trained, callback_of(trained).recorder, compare=True, **QUICK)
    assert torch.equal(torch.get_rng_state(), random)
    losses = {r.method.split(",")[0].split(" per ")[0]: r.val_loss for r in outcome.results}
    assert losses["TWA-t"] == min(losses.values()) == outcome.winner.val_loss
    last = callback_of(trained).recorder.recording()[-1]
    assert losses["last"] == pytest.approx(own, rel=1e-2)  # of its decoded weights
    assert trained.evaluate()["eval_loss"] == pytest.approx(outcome.winner.val_loss, rel=1e-5)
    for key, t in outcome.state.items():
        assert torch.equal(weights_of(trained)[key], t), key
        assert not torch.equal(last.tensor(key), t), key
    outcome.save(tmp_path / "out")
    trained.save_model(tmp_path / "model")
    again = type(trained.model).from_pretrained(tmp_path / "model")
    for key, t in again.state_dict().items():
        assert torch.equal(weights_of(trained)[key], t), key


def test_the_loss_is_the_trainers_own(tmp_path):
    """With twice the loss everything is twice as high."""
    source, found = tmp_path / FOLDER, []
    trainer(tmp_path, {"every": 3}).train()
    for own in (None, doubled, per_label):
        again = trainer(tmp_path, more={"compute_loss_func": own})
        found.append(train_average(again, source, lr=1e-6, **QUICK).results)
    for one, other, same in zip(*found, strict=True):
        assert other.val_loss == pytest.approx(2 * one.val_loss, rel=1e-4), one.method
        assert same.val_loss == pytest.approx(one.val_loss, rel=1e-4), one.method


def test_batches_with_other_numbers_of_labels(tmp_path):
    """Each is averaged by its own, as the trainer does in its evaluation."""
    rows = data(16, 2)
    for k, row in enumerate(rows):
        row["labels"] = row["labels"].masked_fill(torch.arange(12) < k % 11, -100)
    more = {"compute_loss_func": per_label, "eval_dataset": rows}
    trained = trainer(tmp_path, {"every": 2, "path": None}, more=more)
    trained.train()
    outcome = train_average(trained, callback_of(trained).recorder, **QUICK)
    assert trained.evaluate()["eval_loss"] == pytest.approx(outcome.winner.val_loss, rel=1e-5)


def test_sources(tmp_path):
    """A recording, checkpoints, and candidates; of a trainer that has not trained, too."""
    trained = trainer(tmp_path, {"every": 3}, save_strategy="steps", save_steps=3)
    trained.train()
    files = str(tmp_path / "checkpoint-*")
    for source in (tmp_path / FOLDER, files, twa.Candidates(files)):
        fresh = trainer(tmp_path / "fresh", net=model(1))
        outcome = train_average(fresh, source, **QUICK)
        assert outcome.results[-1].candidates == 4
        assert fresh.evaluate()["eval_loss"] == pytest.approx(outcome.winner.val_loss, rel=1e-5)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data(32, 1))


def test_data_of_other_kinds(tmp_path):
    """A dataset with columns that the model has no use for, one without indices, a collator of
    one's own."""
    trained = trainer(tmp_path, {"every": 3})
    trained.train()

    def rows(count, seed):
        return datasets.Dataset.from_list(
            [{k: t.tolist() for k, t in row.items()} | {"text": "a"} for row in data(count, seed)]
        )

    seen = []

    def collate(rows):
        seen.append({key for row in rows for key in row})
        return default_data_collator(rows)

    expected = train_average(trained, tmp_path / FOLDER, **QUICK).winner.val_loss
    for train, validation in ((rows(64, 1), rows(16, 2)), (Stream(), data(16, 2))):
        more = {"train_dataset": train, "eval_dataset": validation, "data_collator": collate}
        again = trainer(tmp_path / "again", more=more)
        found = train_average(again, tmp_path / FOLDER, **QUICK).winner.val_loss
        assert found == pytest.approx(expected, rel=1e-2)
    assert {frozenset(keys) for keys in seen} == {frozenset({"input_ids", "labels"})}


def test_the_order_of_training_data(tmp_path):
    """It is another at each pass, and the same in each run."""
    trainer(tmp_path, {"every": 3}).train()
    orders = []
    for _ in range(2):
        seen = []

        def collate(rows, seen=seen):
            seen.append(tuple(int(row["input_ids"][0] * 64 + row["input_ids"][1]) for row in rows))
            return default_data_collator(rows)

        torch.manual_seed(len(orders))  # of no influence
        again = trainer(tmp_path / "again", more={"data_collator": collate})
        train_average(again, tmp_path / FOLDER, **QUICK | {"steps": 32})
        orders.append([batch for batch in seen if len(batch) == 4])
    assert orders[0] == orders[1]
    passes = [orders[0][-32:-16], orders[0][-16:]]
    assert passes[0] != passes[1]
    assert sorted(sum(passes[0], ())) == sorted(sum(passes[1], ()))


def test_what_is_missing(tmp_path):
    trainer(tmp_path, {"every": 3}).train()
    for more, message in (
        ({"train_dataset": None}, "train_dataset: expected one in the trainer, found None"),
        ({"eval_dataset": None}, "eval_dataset: expected a dataset, found None"),
        (
            {"eval_dataset": {"a": data(16, 2), "b": data(16, 3)}},
            "eval_dataset: expected one of 'a', 'b', found None",
        ),
    ):
        made = trainer(tmp_path / "again", more=more)
        with pytest.raises(TwaError, match=message):
            train_average(made, tmp_path / FOLDER, **QUICK)
    outcome = train_average(made, tmp_path / FOLDER, eval_dataset="b", **QUICK)
    found = made.evaluate()
    assert found["eval_b_loss"] == pytest.approx(outcome.winner.val_loss, rel=1e-5)
    outcome = train_average(made, tmp_path / FOLDER, eval_dataset=data(16, 3), **QUICK)
    assert found["eval_b_loss"] == pytest.approx(outcome.winner.val_loss, rel=1e-5)


# twa's optimizer as the Trainer's ----------------------------------------------------------------


@pytest.mark.parametrize("low_memory", [False, True])
def test_the_optimizer(tmp_path, low_memory):
    """In a second Trainer: accumulated and clipped gradients, and the Trainer's model.zero_grad(),
    are those of a loop of one's own. With low_memory the Trainer's clipping has no effect."""
    trainer(tmp_path, {"every": 3}).train()
    candidates = twa.Candidates(tmp_path / FOLDER)

    def phase():
        net = model(attention_dropout=0.0)
        subspace = twa.Subspace.from_candidates(net, candidates, basis="differences", bits=4)
        optimizer = twa.SubspaceOptimizer(
            subspace, torch.optim.AdamW, low_memory=low_memory, lr=0.02
        )
        return net, subspace, optimizer

    net, subspace, optimizer = phase()
    second = trainer(
        tmp_path / "second",
        net=net,
        more={"optimizers": (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))},
        max_steps=5,
        gradient_accumulation_steps=2,
        max_grad_norm=0.05,
        train_sampling_strategy="sequential",
        logging_steps=1,
    )
    second.train()
    norms = [row["grad_norm"] for row in second.state.log_history if "grad_norm" in row]
    net, expected, optimizer = phase()
    rows = data(64, 1)
    for step in range(5):
        for k in (2 * step, 2 * step + 1):
            batch = default_data_collator(rows[4 * k : 4 * k + 4])
            (net(**batch).loss / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), torch.inf if low_memory else 0.05)
        assert norms[step] == pytest.approx(norm.item(), rel=1e-4)
        assert norm == 0 if low_memory else norm > 0.05
        optimizer.step()
        optimizer.zero_grad()
    assert torch.allclose(subspace.coefficients, expected.coefficients, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(expected.coefficients, phase()[1].coefficients, atol=1e-3)
