"""LoRA adapters of a pretrained transformer, averaged as factors and merged into full weights.

The model, the data and the ways to average are those of the claim `pretrained`; fine-tunes train
adapters (Hu et al., arXiv 2106.09685) at the attention, and the head. All adapters of a seed begin
with the same factors.

Factors of a product do not average as the product does: so the adapters are averaged as they are,
and once more merged into the weights of a model each.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from twa.io.errors import TwaError

from . import pretrained
from .finetunes import Bench, Finetunes, Kind
from .job import Job
from .pretrained import BEST_ON, rows_of
from .rows import Rows

TITLE = "LoRA adapters of a pretrained transformer, averaged"
CLAIM = (
    "Future work in the paper: a trained average of LoRA adapters is better than the best of them;"
    " merged into the weights first, more so."
)
METRIC = pretrained.METRIC
PIVOT = ACCURACIES = True  # as in pretrained
FIGURE = (14, 7)
RANK, LAYERS, RATES = 8, ("query", "value"), (5e-4, 2e-3)
METHODS = ("v:fine:4", "t:fine:4")

findings, picture = pretrained.findings, pretrained.picture


def run(job: Job) -> Rows:
    made = Bench.of(job)
    layers = {name.rpartition(".")[2] for name, _ in made.headed.named_modules()}
    if missing := {*LAYERS} - layers:
        given = job.options.get("model")
        raise TwaError(f"expected layers as BERT has them, found no {min(missing)}", given)
    kind = Kind("lora", f"{made.name}, LoRA adapters", adapted, made.scale.adapters, RATES)
    adapters = made.finetunes(kind)
    rows = rows_of(made, adapters, METHODS, {}, (BEST_ON,))
    rows += rows_of(made, merged(made, adapters), METHODS, {}, ())
    return rows


def adapted(model: nn.Module) -> nn.Module:
    """The model with adapters at its attention, and its head, to be trained."""
    try:
        import peft
    except ImportError as error:
        raise TwaError(f"needs peft: pip install 'peft>=0.17' ({error})", "LoRA") from error
    options = {"target_modules": list(LAYERS), "modules_to_save": ["classifier"]}
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, task_type="SEQ_CLS", **options)
    return peft.get_peft_model(model, config)


def merged(made: Bench, adapters: Finetunes) -> Finetunes:
    """The adapters merged into the weights of a model each."""
    root, folders = adapters.folders[0].parent.with_name("lora-merged"), []
    for run, task in adapters.runs:
        model = run.load(task, run.last).merge_and_unload()
        folders.append(made.written(root / run.folder.name, model))
    label = f"{made.name}, adapters merged"
    kind = replace(adapters.kind, make=lambda model: model, label=label)
    return Finetunes(kind, made.task(kind), folders, [])
