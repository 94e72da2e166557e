"""RecorderCallback in TRL's trainers, with LoRA: what they measure on their own stays theirs, and
adapters are what is recorded.
"""

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")


import copy
import os
from itertools import pairwise

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import datasets
import tiny_hf
import torch
import twa
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny_hf import callback_of, weights_of
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from twa import averages
from twa.integrations.transformers import FOLDER, RecorderCallback, train_average

pytestmark = pytest.mark.usefixtures("one_thread")

LETTERS = "abcdefgh"
TRL_COUNTS = ("_metrics", "_total_train_tokens")
OPTIONS = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "no",
    "logging_steps": 3,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


def tokenizer():
    vocabulary = {word: k for k, word in enumerate(["<pad>", "<eos>", "<unk>", *LETTERS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def letters(count, g):
    return " ".join(LETTERS[k] for k in torch.randint(0, 8, (count,), generator=g).tolist())


def sft_data(count, seed):
    g = torch.Generator().manual_seed(seed)
    rows = [{"prompt": letters(2, g), "completion": " " + letters(4, g)} for _ in range(count)]
    return datasets.Dataset.from_list(rows)


def dpo_data(count, seed):
    g = torch.Generator().manual_seed(seed)
    rows = [
        {"prompt": letters(2, g), "chosen": " " + letters(4, g), "rejected": " " + letters(3, g)}
        for _ in range(count)
    ]
    return datasets.Dataset.from_list(rows)


KINDS = {"sft": (SFTTrainer, SFTConfig, sft_data), "dpo": (DPOTrainer, DPOConfig, dpo_data)}


def trainer(folder, recorder=None, kind="sft", **options):
    made, config, data = KINDS[kind]
    trained = made(
        model=tiny_hf.model(vocab_size=11, pad_token_id=0, eos_token_id=1),
        args=config(output_dir=str(folder), **OPTIONS | options),
        train_dataset=data(32, 1),
        eval_dataset=data(16, 2),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1),
    )
    if recorder is not None:
        trained.add_callback(RecorderCallback(trained, **recorder))
    return trained


def history(trained):
    """What was logged of the model itself, and of the average; without times."""
    own, average = [], []
    for row in trained.state.log_history:
        kept = {k: v for k, v in row.items() if not k.endswith(("runtime", "per_second"))}
        (average if any("_avg_" in key for key in kept) else own).append(kept)
    return own, average


@pytest.mark.parametrize("kind", KINDS)
def test_what_trl_measures(tmp_path, kind):
    """It is logged as without the callback; that of the average has names of its own, and is what
    the trainer measures of a model there. The weights have the same bits."""
    plain = trainer(tmp_path / "plain", kind=kind)
    plain.train()
    recorder = {"every": 3, "evaluate": "uniform"}
    recorded = trainer(tmp_path / "recorded", recorder, kind=kind)
    recorded.train()
    for key, t in weights_of(plain).items():
        assert torch.equal(weights_of(recorded)[key], t), key
    own, average = history(recorded)
    assert own == history(plain)[0]
    assert [row["step"] for row in average] == [2, 4, 6, 8]
    names = {key for row in own for key in row if key.startswith("eval_")}
    assert len(names) > 3
    of_average = {key: f"eval_avg_{key.removeprefix('eval_')}" for key in names}
    for row in average:
        assert row.keys() - {"step", "epoch"} == {*of_average.values()}
    with callback_of(recorded).recorder.averaged("uniform"):
        plain.model.load_state_dict(weights_of(recorded))
    expected = plain.evaluate()
    for key in names - {"eval_num_tokens"}:
        assert average[-1][of_average[key]] == pytest.approx(expected[key], rel=1e-5), key


def test_averages_of_adapters(tmp_path):
    """They differ from those of the Trainer's files by a part of a step; the base is not copied."""
    trained = trainer(tmp_path, {"every": 2}, save_strategy="steps", save_steps=2)
    trained.train()
    recorder, steps = callback_of(trained).recorder, [2, 4, 6, 8]
    folders = [tmp_path / f"checkpoint-{step}" for step in steps]
    whole = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    beta = averages.of_steps(steps, "ema", half_life=3)
    exact = twa.Candidates(folders).average(beta)
    found = twa.Candidates(tmp_path / FOLDER).average(beta)
    found = {key.replace(".default", ""): t for key, t in found.items()}  # PEFT does so in files
    assert found.keys() == exact.keys() == whole[0].keys()
    for key in found:
        length = sum((a[key] - b[key]).norm() for a, b in pairwise(whole)) / 3
        assert (found[key] - exact[key]).norm() < 0.2 * length, key

    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.clone.default:
                self.count += args[0].numel()
            return function(*args, **(kwargs or {}))

    adapter = sum(p.numel() for p in trained.model.parameters() if p.requires_grad)
    base = sum(p.numel() for p in trained.model.parameters()) - adapter
    with Copies() as copies, recorder.averaged("uniform"):
        pass
    assert adapter <= copies.count < base


def test_the_best_adapter(tmp_path):
    """The trainer ends at the best average, and saves it as an adapter."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "avg_loss"}
    recorder = {"every": 1, "evaluate": "uniform"}
    options = dict(save_strategy="steps", save_steps=2, greater_is_better=True)
    trained = trainer(tmp_path, recorder, **options, **best)
    trained.train()
    assert trained.state.best_global_step > 1
    assert trained.evaluate()["eval_loss"] == trained.state.best_metric
    trained.save_model(tmp_path / "best")
    base = tiny_hf.model(vocab_size=11, pad_token_id=0, eos_token_id=1)
    again = PeftModel.from_pretrained(base, tmp_path / "best")
    expected = weights_of(trained)
    for key, t in again.state_dict().items():
        assert torch.equal(t, expected[key]), key


@pytest.mark.parametrize("kind", KINDS)
def test_train_average(tmp_path, kind):
    """It has the trainer's loss, collator and adapters; what the trainer has counted stays."""
    trained = trainer(tmp_path, {"every": 2}, kind=kind, logging_steps=5)
    trained.train()
    counts = {name: getattr(trained, name) for name in TRL_COUNTS}
    before = copy.deepcopy(counts)
    assert before["_metrics"]["train"] and before["_total_train_tokens"]
    source = callback_of(trained).recorder
    options = {"steps": 6, "methods": ["t:tensor:4"], "progress": False}
    outcome = train_average(trained, source, **options)
    assert {name: getattr(trained, name) for name in TRL_COUNTS} == before
    assert trained._metrics is counts["_metrics"]
    assert {"TWA-t", "start"} == {r.method.split(" per ")[0] for r in outcome.results}
    assert trained.evaluate()["eval_loss"] == pytest.approx(outcome.winner.val_loss, rel=1e-5)
    trained.save_model(tmp_path / "best")
    base = tiny_hf.model(vocab_size=11, pad_token_id=0, eos_token_id=1)
    again = PeftModel.from_pretrained(base, tmp_path / "best")
    for key, t in again.state_dict().items():
        assert torch.equal(t, weights_of(trained)[key]), key
