"""What frameworks leave on the disk: read in the order of steps, each set of weights once; and
results load back where the checkpoints came from.

The frameworks write the checkpoints here themselves, but for what is not installed or needs GPUs:
DeepSpeed, torchtitan, and Lightning in shards are written by hand, by their sources.
"""

import json
import logging
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import processes
import pytest
import timm_apart
import torch
import torch.distributed.checkpoint as dcp
import twa
from safetensors.torch import load_file, save_file
from states import assert_same
from torch import nn
from twa.io.errors import CandidateError, CandidateWarning, NoWeights

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 12  # checkpoints: 10 comes before 2 where names are sorted as text


def read(paths, names, *said, **options):
    """The candidates at paths: these, in this order, with these notes or patterns of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CandidateWarning)
        candidates = twa.Candidates(paths, **options)
    assert [c.path.name for c in candidates] == names
    assert len(candidates.notes) == len(said), candidates.notes
    for pattern, note in zip(said, candidates.notes, strict=True):
        assert re.search(pattern, note), note
    return candidates


def check_average(candidates, states):
    """Their average is that of these state_dicts, to the bit."""
    beta = twa.averages.uniform(len(states))
    for key, found in candidates.average(beta).items():
        rows = [state[key] for state in states]
        expected = rows[-1]
        if expected.is_floating_point():
            exact = sum(b * row.double() for b, row in zip(beta, rows, strict=True))
            expected = exact.to(expected.dtype)
        assert torch.equal(found, expected), key


def save_between(model, candidates, out, **options):
    """Saves a point of the candidates' subspace; returns the model's state_dict there."""
    subspace = twa.Subspace.from_candidates(model, candidates)
    subspace.set_merge_weights(twa.averages.ema(len(candidates), 0.5))
    subspace.save(out, **options)
    return {key: t.clone() for key, t in model.state_dict().items()}


# transformers, PEFT, TRL -------------------------------------------------------------------------


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


def with_lora(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def tokens():
    g = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 32, (8,), generator=g).tolist()} for _ in range(8)]


#: of a Trainer that only saves
QUIET = {
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_strategy": "no",
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "max_steps": COUNT,
    "save_steps": 1,
}


def train(out, model, **options):
    """A run of transformers' Trainer."""
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(str(out), **QUIET | options)
    data = [row | {"labels": row["input_ids"]} for row in tokens()]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2])
    trainer.train()
    return trainer


STEPS = [f"checkpoint-{k}" for k in range(1, COUNT + 1)]


def states_in(out, names, file="model.safetensors"):
    return [load_file(out / name / file) for name in names]


def test_transformers_trainer(tmp_path):
    out = tmp_path / "run5"  # a number that is no step
    trainer = train(out, llama())
    (out / "runs" / "Nov28").mkdir(parents=True)
    (out / "runs" / "Nov28" / "events.out.tfevents.1").write_bytes(b"x")
    candidates = read(out, STEPS)
    states = states_in(out, STEPS)
    check_average(candidates, states)
    trainer.save_model()
    inside = rf"run5 is one checkpoint, and has 12 more inside .*'{out}/checkpoint-\*'"
    with pytest.warns(CandidateWarning, match=inside):
        twa.Candidates(out)
    read(out, ["run5"], inside)
    read(f"{out}/checkpoint-*", STEPS)
    same = r"the same weights count once: model\.safetensors is checkpoint-12"
    read(f"{out}/*", STEPS, r"^left out.*: runs, training_args\.bin$", "^left out.*config", same)
    read([out, f"{out}/checkpoint-*"], STEPS, "count once: run5 is checkpoint-12", inside)

    model = llama()
    twa.load_average(model, candidates, twa.averages.uniform(COUNT))
    assert_same(dict(model.state_dict()), candidates.average(twa.averages.uniform(COUNT)))
    weights = save_between(model, candidates, tmp_path / "average")
    loaded = type(model).from_pretrained(tmp_path / "average" / "averaged")
    assert_same(loaded.state_dict(), weights)
    # and the Trainer goes on from it, in the place of a checkpoint's own file
    shutil.copy(
        tmp_path / "average" / "averaged.safetensors", out / STEPS[-1] / "model.safetensors"
    )
    trainer.train(resume_from_checkpoint=True)
    assert_same(trainer.model.state_dict(), weights)


def test_transformers_in_shards(tmp_path):
    model, states = llama(), []
    for step in range(1, COUNT + 1):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn_like(p))
        model.save_pretrained(tmp_path / f"checkpoint-{step}", max_shard_size="4KB")
        states.append({key: t.clone() for key, t in model.state_dict().items()})
    assert len(list((tmp_path / "checkpoint-3").glob("model-*.safetensors"))) > 2
    candidates = read(tmp_path, STEPS)
    check_average(candidates, states)
    weights = save_between(model, candidates, tmp_path / "average")
    loaded = type(model).from_pretrained(tmp_path / "average" / "averaged")
    assert_same(loaded.state_dict(), weights)


GONE = r"\d+ of {} checkpoints are not there, of steps {}: the Trainer had save_total_limit={}"


@pytest.mark.parametrize(
    ("options", "names", "gone"),
    [
        ({}, [11, 12], GONE.format(12, "1, 2, 3, 4, 5, 6, 7, 8, 9, 10", 2)),
        ({"save_steps": 5, "max_steps": 11}, [10, 11], GONE.format(3, "5", 2)),
        ({"save_strategy": "epoch"}, [8, 12], GONE.format(3, "4", 2)),
        ({"save_steps": 8}, [8, 12], None),
    ],
)
def test_checkpoints_that_save_total_limit_has_removed(tmp_path, options, names, gone):
    train(tmp_path, llama(), save_total_limit=2, **options)
    names = [f"checkpoint-{k}" for k in names]
    read(f"{tmp_path}/checkpoint-*", names, *[gone] * (gone is not None))
    if gone:
        with pytest.warns(CandidateWarning, match=gone):
            twa.Candidates(tmp_path)
    # a part of what is there, as files: the rest is not gone
    read(tmp_path / names[-1] / "model.safetensors", ["model.safetensors"], *[gone] * bool(gone))


def test_checkpoints_that_were_removed_by_hand_are_not_the_limits(tmp_path):
    train(tmp_path, llama(), max_steps=4)
    shutil.rmtree(tmp_path / "checkpoint-2")
    read(tmp_path, ["checkpoint-1", "checkpoint-3", "checkpoint-4"])


def test_the_best_model_at_the_end(tmp_path):
    """The output has a copy of the best checkpoint."""
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    trainer = train(tmp_path / "out", llama(), max_steps=4, learning_rate=1.0, **options)
    best = Path(trainer.state.best_model_checkpoint).name
    assert best != "checkpoint-4"
    trainer.save_model()
    read(
        [tmp_path / "out", f"{tmp_path}/out/checkpoint-*"],
        STEPS[:4],
        f"the same weights count once: out is {best}",
        "out is one checkpoint, and has 4 more inside",
    )


def check_adapters(out, model, tmp_path):
    """A Trainer's output of adapters: the checkpoints, and the last one's copy beside them."""
    peft = pytest.importorskip("peft")
    states = states_in(out, STEPS, "adapter_model.safetensors")
    candidates = read(f"{out}/checkpoint-*", STEPS)
    assert candidates.kind == "adapter"
    check_average(candidates, states)
    read(out, [out.name], "is one checkpoint, and has 12 more inside")
    read([out, f"{out}/checkpoint-*"], STEPS, f"{out.name} is checkpoint-12", "12 more inside")
    weights = save_between(with_lora(model), candidates, tmp_path / "average")
    loaded = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "average" / "averaged"))
    assert_same(loaded.state_dict(), weights)


def test_peft_with_the_trainer(tmp_path):
    model = with_lora(llama())
    train(tmp_path / "lora", model).save_model()
    check_adapters(tmp_path / "lora", llama(), tmp_path)


@pytest.mark.parametrize("lora", [False, True])
def test_trl_sft(tmp_path, lora):
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"t{k}": k for k in range(30)} | {"<pad>": 30, "<eos>": 31}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    trainer = trl.SFTTrainer(
        llama(),
        args=trl.SFTConfig(str(tmp_path / "sft"), bf16=False, **QUIET),
        train_dataset=datasets.Dataset.from_list(tokens()),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None,
    )
    trainer.train()
    trainer.save_model()
    if lora:
        check_adapters(tmp_path / "sft", llama(), tmp_path)
        return
    candidates = read(f"{tmp_path}/sft/checkpoint-*", STEPS)
    check_average(candidates, states_in(tmp_path / "sft", STEPS))
    weights = save_between(llama(), candidates, tmp_path / "average")
    folder = tmp_path / "average" / "averaged"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert_same(loaded.state_dict(), weights)
    assert transformers.AutoTokenizer.from_pretrained(folder).vocab_size == 32


# Lightning ---------------------------------------------------------------------------------------


def regression():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def lightning_module():
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, rate=0.05):
            super().__init__()
            self.save_hyperparameters()
            self.net = regression()

        def training_step(self, batch, _):
            return (self.net(batch[0]) - batch[1]).square().mean()

        def validation_step(self, batch, _):
            self.log("val", self.training_step(batch, 0))

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.rate)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)]

    return Module


def fit(folder, *checkpoints, epochs=COUNT):
    """A run of Lightning's Trainer with two steps in an epoch, and its class of module."""
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = lightning_module()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, generator=g)
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[
            lightning.pytorch.callbacks.ModelCheckpoint(folder, **options)
            for options in checkpoints
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few workers
        trainer.fit(module(), loader, loader)
    return module


def by_step(folder):
    """Names of checkpoint files in order of the steps inside, and what they hold; each once."""
    found = {}
    for path in sorted(folder.glob("*.ckpt"), key=lambda p: (p.name.startswith("last"), p.name)):
        content = torch.load(path, weights_only=False)
        found.setdefault(content["global_step"], (path.name, content))
    ordered = [found[step] for step in sorted(found)]
    return [name for name, _ in ordered], [content for _, content in ordered]


EPOCHS = [f"epoch={k}-step={2 * k + 2}.ckpt" for k in range(COUNT)]
BY_STEP = "the order is that of the steps in the files, and not of their names"


@pytest.mark.parametrize(
    ("options", "right", "said"),
    [
        ({"save_top_k": -1}, EPOCHS, []),
        ({"save_top_k": -1, "save_last": True}, EPOCHS, [f"last.ckpt is {EPOCHS[-1]}"]),
        ({"save_top_k": -1, "save_last": "link"}, EPOCHS, [f"last.ckpt is {EPOCHS[-1]}"]),
        ({"save_top_k": -1, "save_weights_only": True}, EPOCHS, []),
        ({"save_top_k": -1, "filename": "{val:.4f}-{epoch}"}, None, []),
        ({"save_top_k": 3, "monitor": "val", "save_last": True}, None, ["last.ckpt is epoch="]),
        ({"save_top_k": -1, "filename": "best-{val:.1f}"}, None, [BY_STEP]),
        (
            {"save_top_k": -1, "filename": "{val:.4f}", "auto_insert_metric_name": False},
            None,
            [BY_STEP],
        ),
        (
            {"save_top_k": -1, "monitor": "val", "filename": "model"},
            None,
            [],
        ),  # model-v1, ..., model-v11
        (
            {"save_top_k": 3, "monitor": "val", "mode": "max", "save_last": True},
            EPOCHS[:3],
            [f"last.ckpt is {EPOCHS[2]}"],
        ),
    ],
    ids=str,
)
def test_lightning(tmp_path, options, right, said):
    """Where names have no steps, those in the files count."""
    module = fit(tmp_path / "run", options)
    names, contents = by_step(tmp_path / "run")
    assert len(names) >= 3 and (right is None or names == right)
    said = [f"count once: {text}" if " is epoch" in text else text for text in said]
    for paths in (tmp_path / "run", f"{tmp_path}/run/*.ckpt"):
        candidates = read(paths, names, *said)
    assert sorted(names) != names or len(names) < 10 or "val" in options.get("filename", "")
    check_average(candidates, [content["state_dict"] for content in contents])
    weights = save_between(module(), candidates, tmp_path / "average")
    averaged = load_file(tmp_path / "average" / "averaged.safetensors")
    assert_same(averaged, weights)
    # as a checkpoint of Lightning's own
    torch.save(contents[-1] | {"state_dict": averaged}, tmp_path / "average" / "averaged.ckpt")
    if not options.get("save_weights_only"):
        loaded = module.load_from_checkpoint(
            tmp_path / "average" / "averaged.ckpt", weights_only=False
        )
        assert_same(loaded.state_dict(), weights)


def test_lightning_with_two_kinds_of_checkpoints(tmp_path):
    """One of each epoch, and the best one, which is saved at the same steps."""
    fit(
        tmp_path,
        {"save_top_k": -1, "filename": "{epoch}"},
        {"monitor": "val", "filename": "best"},
    )
    right = [f"epoch={k}.ckpt" for k in range(COUNT)]
    read(tmp_path, right, r"the same weights count once: best\.ckpt is epoch=11\.ckpt")
    (tmp_path / "epoch=11.ckpt").unlink()
    shutil.copy(tmp_path / "epoch=4.ckpt", tmp_path / "last.ckpt")  # of an older run
    (tmp_path / "epoch=4.ckpt").unlink()
    right = [name.replace("epoch=4", "last").replace("epoch=11", "best") for name in right]
    read(tmp_path, right, BY_STEP)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_lightning_in_shards(tmp_path, key):
    """Directories, as its FSDP and its ModelParallel strategy write them, on GPUs."""
    states = []
    for epoch in range(COUNT):
        torch.manual_seed(epoch)
        states.append(nn.Linear(3, 2).state_dict())
        folder = tmp_path / f"epoch={epoch}-step={epoch * 2}.ckpt"
        content = {key: states[-1], "optimizer_0": {"state": {"weight": torch.ones(3)}}}
        dcp.save(content, checkpoint_id=folder, no_dist=True)
        torch.save({"epoch": epoch, "global_step": epoch * 2}, folder / "meta.pt")
    candidates = read(tmp_path, [f"epoch={k}-step={2 * k}.ckpt" for k in range(COUNT)])
    check_average(candidates, states)
    weights = save_between(nn.Linear(3, 2), candidates, tmp_path / "average", dcp=True)
    loaded = {key: nn.Linear(3, 2).state_dict()}
    dcp.load(loaded, checkpoint_id=tmp_path / "average" / "averaged_dcp", no_dist=True)
    assert_same(loaded[key], weights)


# timm --------------------------------------------------------------------------------------------

TIMM_RUN = """
import argparse, pathlib, sys
import timm_apart, torch

timm_apart.prepare()
from timm.models import load_checkpoint
from timm.utils import CheckpointSaver, ModelEmaV3

def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)
    )

def step():
    x = torch.randn(8, 3)
    (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    ema.update(model)

if sys.argv[1] == "load":
    model = network()
    load_checkpoint(model, sys.argv[2])
    torch.save(model.state_dict(), sys.argv[3])
    sys.exit()
for folder, history in ((sys.argv[1], 20), (sys.argv[2], 5)):
    pathlib.Path(folder).mkdir()
    model = network()
    optimizer, ema = torch.optim.AdamW(model.parameters(), lr=0.1), ModelEmaV3(model, decay=0.9)
    arguments = argparse.Namespace(model="mlp", lr=0.1)
    saver = CheckpointSaver(model, optimizer, arguments, ema, checkpoint_dir=folder,
        recovery_dir=folder, decreasing=True, max_history=history)
    for epoch in range(12):
        step()
        if history == 5:
            saver.save_recovery(epoch, 5)
        step()
        saver.save_checkpoint(epoch, metric=abs(epoch - 7))
"""


def run_timm(*arguments):
    if not timm_apart.is_here():
        pytest.skip("timm is not installed")
    path = os.pathsep.join([*processes.FOLDERS, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", TIMM_RUN, *map(str, arguments)]
    done = processes.run(command, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


def test_timm(tmp_path):
    run_timm(tmp_path / "all", tmp_path / "few")
    all_, names = tmp_path / "all", [f"checkpoint-{k}.pth.tar" for k in range(COUNT)]
    same = r"model_best\.pth\.tar is checkpoint-7\.pth\.tar"
    last = r"last\.pth\.tar is checkpoint-11\.pth\.tar"
    ema = r"checkpoint-\d\.pth\.tar, .*'state_dict' is read; 'state_dict_ema' beside it"
    candidates = read(all_, names, f"once: .*({same}, {last}|{last}, {same})", ema)
    read(f"{all_}/checkpoint-*", names, ema)
    contents = [torch.load(all_ / name, weights_only=False) for name in names]
    check_average(candidates, [content["state_dict"] for content in contents])
    averages = read(all_, names, f"once: .*{same}", entry="state_dict_ema")
    check_average(averages, [content["state_dict_ema"] for content in contents])
    # the best five, and two in the middle of epochs: by the epochs in the files
    kept = [f"checkpoint-{k}.pth.tar" for k in (5, 6, 7, 8, 9)]
    kept += ["recovery-10-5.pth.tar", "recovery-11-5.pth.tar", "last.pth.tar"]
    read(tmp_path / "few", kept, f"once: {same}", "order is that of the epochs in the files", ema)

    weights = save_between(regression(), candidates, tmp_path / "average")
    run_timm("load", tmp_path / "average" / "averaged.safetensors", tmp_path / "loaded.pt")
    assert_same(torch.load(tmp_path / "loaded.pt"), weights)


# torchtitan --------------------------------------------------------------------------------------


class Holds:
    """An entry of a torch.distributed.checkpoint, as torchtitan's components are."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def decoder():
    torch.manual_seed(0)
    model = nn.Module()
    model.tok_embeddings = nn.Embedding(8, 4)
    model.layers = nn.ModuleDict({"0": nn.Linear(4, 4)})
    model.output = nn.Linear(4, 8, bias=False)
    return model


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("nested", [False, True])
def test_torchtitan(tmp_path, nested):
    """step-N of a model's tensors at the top, beside dicts; older ones have them under "model"."""

    def with_weights(state):
        return {"model": state} if nested else state

    model = decoder()
    optimizer, states = torch.optim.AdamW(model.parameters(), lr=0.1), []
    parameter_names = {p: name for name, p in model.named_parameters()}
    for step in range(1, COUNT + 1):
        hidden = model.layers["0"](model.tok_embeddings(torch.arange(8)))
        model.output(hidden).square().mean().backward()
        optimizer.step()
        moments = {
            f"state.{parameter_names[p]}.{key}": value
            for p, state in optimizer.state.items()
            for key, value in state.items()
        }
        content = {
            "optimizer": Holds(moments | {"param_groups.output.weight.lr": 0.1}),
            "lr_scheduler": Holds({"last_epoch": step}),
            "dataloader": Holds({"dp_rank_0": b"state", "world_size": 1}),
            "train_state": Holds({"step": torch.tensor(step, dtype=torch.int32)}),
        }
        states.append({key: t.clone() for key, t in model.state_dict().items()})
        content |= with_weights(states[-1])
        dcp.save(content, checkpoint_id=tmp_path / "checkpoint" / f"step-{step * 10}", no_dist=True)
    names = [f"step-{step * 10}" for step in range(1, COUNT + 1)]
    for paths in (tmp_path / "checkpoint", f"{tmp_path}/checkpoint/step-*"):
        candidates = read(paths, names)
    check_average(candidates, states)
    weights = save_between(decoder(), candidates, tmp_path / "average", dcp=True)
    loaded = with_weights({key: torch.zeros_like(t) for key, t in weights.items()})
    dcp.load(loaded, checkpoint_id=tmp_path / "average" / "averaged_dcp", no_dist=True)
    assert_same(loaded["model"] if nested else loaded, weights)
    # and it is one more candidate of its kind
    both = twa.Candidates([tmp_path / "checkpoint" / "step-120", tmp_path / "average/averaged_dcp"])
    check_average(both, [states[-1], weights])
    # the last step may be the model alone, in another dtype, and one before it half written
    exported = {key: t.bfloat16() for key, t in states[-1].items()}
    last, half = (tmp_path / "checkpoint" / f"step-{step}" for step in (120, 110))
    shutil.rmtree(last)
    dcp.save(with_weights(exported), checkpoint_id=last, no_dist=True)
    (half / ".metadata").unlink()
    names.remove("step-110")
    for paths in (tmp_path / "checkpoint", f"{tmp_path}/checkpoint/step-*"):
        candidates = read(paths, names, "as its save has not ended .*: step-110")
    check_average(candidates, [*states[:10], exported])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("part", ["_orig_mod.", "_checkpoint_wrapped_module."])
def test_torchtitan_of_wrapped_layers(tmp_path, part):
    """Names with the parts that torch.compile and activation checkpointing add, as older ones."""
    states = [{key: t + k for key, t in decoder().state_dict().items()} for k in range(3)]
    for k, state in enumerate(states):
        wrapped = {key.replace("layers.0.", f"layers.0.{part}"): t for key, t in state.items()}
        moments = {f"state.{key}.exp_avg": t for key, t in wrapped.items()}
        content = wrapped | {"optimizer": Holds(moments)}
        dcp.save(content, checkpoint_id=tmp_path / f"step-{k + 8}", no_dist=True)
    candidates = read(tmp_path, ["step-8", "step-9", "step-10"])
    model = decoder()
    twa.load_average(model, candidates, twa.averages.candidate(3, 2))
    assert_same(model.state_dict(), states[2])
    weights = save_between(model, candidates, tmp_path / "average")
    assert_same(load_file(tmp_path / "average" / "averaged.safetensors"), weights)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchtitan_saved_for_hugging_face(tmp_path):
    """What its last step is with last_save_in_hf: safetensors, with the shards that they are of."""
    from torch.distributed.checkpoint._consolidate_hf_safetensors import (
        consolidate_safetensors_files,
    )

    states = [{key: t + k for key, t in decoder().state_dict().items()} for k in range(2)]
    for k, state in enumerate(states):
        folder = tmp_path / f"run-{k}" / "step-100"
        where = {key: 1 + n % 2 for n, key in enumerate(state)}
        writer = dcp.HuggingFaceStorageWriter(
            path=str(folder / "sharded"), save_distributed=True, fqn_to_index_mapping=where
        )
        dcp.save(state, storage_writer=writer, no_dist=True)
        consolidate_safetensors_files(str(folder / "sharded"), str(folder), where)
    candidates = read(f"{tmp_path}/run-*/step-100", ["step-100", "step-100"])
    check_average(candidates, states)


# DeepSpeed ---------------------------------------------------------------------------------------


def save_deepspeed(root, tag, stage, ranks=2, parallel=1):
    """A checkpoint as DeepSpeed's engine writes it; stage 0 is without ZeRO."""
    folder = root / tag
    folder.mkdir(parents=True)
    model = decoder()
    with torch.no_grad():
        model.output.weight.fill_(float(tag[-1]) if tag[-1].isdigit() else 1.0)
    module = {key: t.to(torch.bfloat16) for key, t in model.state_dict().items()}
    states = {
        "module": {key: torch.empty(0) for key in module} if stage == 3 else module,
        "buffer_names": [],
        "optimizer": None if stage else torch.optim.AdamW(model.parameters()).state_dict(),
        "param_shapes": [{key: t.shape for key, t in module.items()}],
        "global_steps": 7,
        "sparse_tensor_module_names": set(),
        "ds_version": "0.17.0",
    }
    for rank in range(ranks if stage == 3 else parallel):
        names = (f"mp_rank_{rank:02d}", f"zero_pp_rank_{rank}_mp_rank_00")
        torch.save(states, folder / f"{names[stage == 3]}_model_states.pt")
    for rank in range(ranks if stage else 0):
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        slices = {"zero_stage": stage, "partition_count": ranks, key: [torch.ones(30)]}
        name = f"{'' if stage == 3 else 'bf16_'}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": slices, "ds_version": "0.17.0"}, folder / name)
    (root / "latest").write_text(tag)
    (root / "zero_to_fp32.py").write_text("raise SystemExit('this is never run')\n")
    return module


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("by_trainer", [False, True])
def test_deepspeed_is_refused_with_its_command(tmp_path, stage, by_trainer):
    """In directories of its own, and in a Trainer's checkpoints."""
    for step in (8, 9):
        root = tmp_path / f"checkpoint-{step}" if by_trainer else tmp_path
        save_deepspeed(root, f"global_step{step}", stage)
        torch.save({"cpu": torch.get_rng_state()}, root / "rng_state_0.pth")
    first = tmp_path / "checkpoint-8" if by_trainer else tmp_path
    tag = "" if by_trainer else " -t global_step8"
    command = re.escape(f"`python {first / 'zero_to_fp32.py'} {first} OUT{tag}`")
    inside = first / "global_step8"
    file = next(inside.glob("*_model_states.pt"))
    for paths in (tmp_path, f"{tmp_path}/*", first, inside, f"{inside}/*", file):
        with pytest.raises(CandidateError, match=f"a checkpoint of DeepSpeed.*{command}") as error:
            twa.Candidates(paths)
        assert not isinstance(error.value, NoWeights)
        assert ("entry 'module'" in str(error.value)) == (stage < 3)
    if stage == 3:
        with pytest.raises(CandidateError, match="a checkpoint of DeepSpeed"):
            twa.Candidates(file, entry="module")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_whole_module_of_deepspeed_is_read_where_it_is_asked_for(tmp_path, stage):
    states = [save_deepspeed(tmp_path, f"global_step{k}", stage) for k in (8, 9)]
    for paths in (
        tmp_path,
        f"{tmp_path}/global_step*",
        f"{tmp_path}/global_step*/mp_rank_00_model_states.pt",
    ):
        candidates = twa.Candidates(paths, entry="module")
        assert len(candidates) == 2
        check_average(candidates, states)
    with pytest.raises(CandidateError, match="entry 'module'") as error:
        twa.Candidates(tmp_path)
    assert ("zero_to_fp32" in str(error.value)) == (stage > 0)


def test_other_layouts_of_deepspeed(tmp_path):
    """With tensor parallelism no file has the whole module; a script that is not there is named by
    its package; weights beside it are read instead.
    """
    save_deepspeed(tmp_path / "tp", "global_step3", 1, parallel=2)
    with pytest.raises(CandidateError, match="a checkpoint of DeepSpeed") as error:
        twa.Candidates(tmp_path / "tp", entry="module")
    assert "entry 'module'" not in str(error.value)
    # Accelerate, Lightning
    save_deepspeed(tmp_path / "checkpoints" / "checkpoint_0", "pytorch_model", 2)
    (tmp_path / "checkpoints" / "checkpoint_0" / "zero_to_fp32.py").unlink()
    command = "python -m deepspeed.utils.zero_to_fp32 .*checkpoint_0 OUT`"
    with pytest.raises(CandidateError, match=command):
        twa.Candidates(tmp_path / "checkpoints")
    # a Trainer that gathers the weights, too
    module = save_deepspeed(tmp_path / "out" / "checkpoint-9", "global_step9", 2)
    save_file(module, tmp_path / "out" / "checkpoint-9" / "model.safetensors")
    read(tmp_path / "out", ["checkpoint-9"])
    read(
        f"{tmp_path}/out/checkpoint-9/*",
        ["model.safetensors"],
        "left out, since no weights are in it: global_step9",
        "left out, as no checkpoint's suffix is known for it: ",
    )


# Plain loops -------------------------------------------------------------------------------------


def network_states(count=COUNT):
    model = regression()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(count):
        x = torch.randn(8, 3)
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        state = {key: t.clone() for key, t in model.state_dict().items()}
        yield step, state, optimizer.state_dict()


@pytest.mark.parametrize("form", ["ckpt_{}.pt", "{:.3f}.pt", "save-{}.pt"])
@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_plain_loops(tmp_path, form, key):
    """Named by the step, by a loss that falls, or by a letter that means nothing."""
    states, names = [], []
    for step, state, optimizer in network_states():
        letter = "ahbicjdkelfm"[step]
        value = {"c": step, "{": 1 / (1 + step), "s": letter}[form[0]]
        name = form.format(value)
        content = {key: state, "optimizer": optimizer, "step": step, "loss": 1 / (1 + step)}
        torch.save(content, tmp_path / name)
        states.append(state)
        names.append(name)
    said = [] if form[0] == "c" else [BY_STEP]
    candidates = read(tmp_path, names, *said)
    check_average(candidates, states)
    model = regression()
    weights = save_between(model, candidates, tmp_path / "average")
    assert_same(load_file(tmp_path / "average" / "averaged.safetensors"), weights)


def test_states_in_memory(tmp_path):
    kept = [state for _, state, _ in network_states()]
    candidates = twa.Candidates.of_states(kept)
    assert candidates.names == [f"state_{k}" for k in range(COUNT)]
    check_average(candidates, kept)
    model = regression()
    beta = twa.averages.lawa(COUNT, 3)
    twa.load_average(model, candidates, beta)
    assert_same(dict(model.state_dict()), candidates.average(beta))
    weights = save_between(model, candidates, tmp_path, basis=True)
    assert_same(load_file(tmp_path / "averaged.safetensors"), weights)
    again = twa.Subspace.load(tmp_path / "basis.safetensors", regression(), candidates)
    again.write_weights()
    assert_same(dict(again.model.state_dict()), weights)
    others = twa.Candidates.of_states([*kept[:-1], regression().state_dict()])
    with pytest.raises(twa.BasisError, match="candidate 11"):
        twa.Subspace.load(tmp_path / "basis.safetensors", regression(), others)
    # larger dicts, as checkpoints are
    larger = [{"model": s, "ema": kept[0], "step": k} for k, s in enumerate(kept)]
    names = [f"step_{k}" for k in range(COUNT)]
    candidates = twa.Candidates.of_states(larger, names=names)
    assert candidates.names == names
    check_average(candidates, kept)
    one = twa.Candidates.of_states(larger[:1], entry="ema", ignore=["1.*"])
    assert set(one.info) == {key for key in kept[0] if not key.startswith("1.")}


class Doubled(nn.Linear):
    """A module that stores something beside its tensors."""

    def get_extra_state(self):
        return {"factor": 2}

    def set_extra_state(self, state):
        assert state == {"factor": 2}


def test_states_with_wrappers_and_extra_state():
    model = nn.Sequential(Doubled(3, 2), nn.BatchNorm1d(2))
    kept = []
    for k in range(3):
        nn.init.constant_(model[0].weight, k)
        state = nn.DataParallel(model).state_dict()
        kept.append(type(state)((key, _copy(v)) for key, v in state.items()))
    candidates = twa.Candidates.of_states(kept)
    assert "0.weight" in candidates.info
    twa.load_average(model, candidates, twa.averages.uniform(3))
    assert torch.equal(model[0].weight, torch.ones(2, 3))


def _copy(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def test_states_that_go_on_changing_are_refused():
    model = regression()
    with pytest.raises(twa.TwaError, match="state_0 and state_2 are the same memory"):
        twa.Candidates.of_states(
            [model.state_dict(), regression().state_dict(), model.state_dict()]
        )
    candidates = twa.Candidates.of_states([regression().state_dict(), model.state_dict()])
    beta = twa.averages.uniform(2)
    candidates.average(beta)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(CandidateError, match=r"state_1: tensor '0\.weight': changed since"):
        candidates.average(beta)


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([], "expected at least one state_dict"),
        ([{}], "state_0: expected a dict of tensors"),
        ([{"epoch": 3}], "state_0: expected a dict of tensors"),
        ([3], "state_0: expected a state_dict, found int"),
        ({"w": torch.ones(2)}, "expected a list of dicts, found one dict"),
        ([{"w": torch.eye(2).to_sparse()}], "state_0: tensor 'w': expected a dense one"),
        ([{"w": torch.ones(2, device="meta")}], "expected a dense one, found .* on meta"),
        ([{"net": {"w": torch.ones(2)}}], "some under: net: name one as entry"),
    ],
)
def test_states_that_are_none(states, message):
    with pytest.raises(twa.TwaError, match=message):
        twa.Candidates.of_states(states)


def test_dicts_in_the_place_of_paths():
    state = {"w": torch.ones(2)}
    for given in (state, [state]):
        with pytest.raises(twa.TwaError, match=r"found a dict: Candidates\.of_states takes those"):
            twa.Candidates(given)
    with pytest.raises(twa.TwaError, match="names: expected 1, found 2"):
        twa.Candidates.of_states([state], names=["a", "b"])
    assert json.dumps(twa.Candidates.of_states([state]).fingerprints())
