"""A Llama of a few thousand weights with dropout, its data, and Trainers of it; on the CPU."""

import os
import re

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from twa.integrations.transformers import RecorderCallback

VOCABULARY = 32


def model(seed=0, **config):
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
        "attention_dropout": 0.1,
    } | config
    return LlamaForCausalLM(LlamaConfig(**config))


def data(count, seed):
    """Sequences that count up, by 1 to 3."""
    g = torch.Generator().manual_seed(seed)
    first = torch.randint(0, VOCABULARY, (count, 1), generator=g)
    rows = (first + torch.arange(12) * torch.randint(1, 4, (count, 1), generator=g)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder, **options):
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "logging_steps": 4,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
        }
        | options
    )


def trainer(folder, recorder=None, *, net=None, callbacks=None, kind=Trainer, more=None, **options):
    """A Trainer that trains 12 steps.

    Args:
        recorder: options of its RecorderCallback; None: without
        more: other options of the Trainer
        options: of its TrainingArguments
    """
    made = kind(
        **{
            "model": model() if net is None else net,
            "args": arguments(folder, **options),
            "train_dataset": data(64, 1),
            "eval_dataset": data(16, 2),
            "callbacks": callbacks,
        }
        | (more or {})
    )
    if recorder is not None:
        made.add_callback(RecorderCallback(made, **recorder))
    return made


def callback_of(trained):
    (found,) = [c for c in trained.callback_handler.callbacks if isinstance(c, RecorderCallback)]
    return found


def weights_of(trained):
    return {key: t.detach().clone() for key, t in trained.model.state_dict().items()}


class AtStep(TrainerCallback):
    """Calls act(step) at the end of each step."""

    def __init__(self, act):
        self.act = act

    def on_step_end(self, args, state, control, **kwargs):
        self.act(state.global_step)


def files(folder):
    """The bytes of a recording's files, without the random name of the run."""
    found = {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}
    return {name: _without_run(content) for name, content in found.items()}


def _without_run(content):
    end = 8 + int.from_bytes(content[:8], "little")  # of the header
    name = rb'(run\\": \\")[0-9a-f]{32}'
    header, count = re.subn(name, rb"\1", content[8:end])
    assert count >= 1, header
    return header + content[end:]
