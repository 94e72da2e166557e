"""Which files are candidates, in which order, and each once."""

import argparse
import itertools
import json
import os
import random
import shutil
import tarfile
import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import twa
from safetensors.torch import save_file
from torch import nn
from twa.inspection import run as inspect
from twa.io.candidates import Candidates
from twa.io.errors import CandidateError, CandidateWarning, NoWeights
from twa.io.find import find_checkpoints
from twa.io.order import numeric_order, shortened


def state(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"a.weight": torch.randn(4, 3, generator=g), "a.bias": torch.randn(4, generator=g)}


def save(path, seed=0, wrap=None):
    """A state at a path, which is a file or, without a suffix, a Hugging Face directory."""
    if not path.suffix:
        path.mkdir(parents=True)
        path = path / "model.safetensors"
    if path.suffix == ".safetensors":
        save_file(state(seed), path)
    else:
        torch.save({wrap: state(seed), "epoch": seed} if wrap else state(seed), path)
    return path


def names(paths):
    return [path.name for path in paths]


def touch(folder, files):
    for name in files:
        (folder / name).write_bytes(b"")
    return [folder / name for name in files]


def mean_of(seeds, key="a.weight"):
    return sum(state(seed)[key].double() for seed in seeds) / len(seeds)


# Suffixes and directories ------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth.tar", ".pt.tar", ".ckpt.tar", ".bin.tar", ".tar"])
@pytest.mark.parametrize("wrap", [None, "state_dict"])
def test_files_called_tar(tmp_path, suffix, wrap):
    for seed in range(3):
        save(tmp_path / f"checkpoint-{seed}{suffix}", seed, wrap)
    for paths in (tmp_path, tmp_path / f"*{suffix}", sorted(tmp_path.iterdir())):
        candidates = Candidates(paths)
        assert candidates.names == ["checkpoint-0", "checkpoint-1", "checkpoint-2"]
        mean = candidates.weighted("a.weight", twa.averages.uniform(3))
        torch.testing.assert_close(mean.double(), mean_of(range(3)), rtol=1e-6, atol=1e-7)


def test_a_tar_archive_is_no_checkpoint(tmp_path):
    save(tmp_path / "c.pth.tar")
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(tmp_path / "c.pth.tar")
    assert Candidates(tmp_path).names == ["c"]
    with pytest.raises(NoWeights, match=r"data\.tar: .*a tar archive"):
        Candidates(tmp_path / "data.tar")


def sharded(folder, index, seed=0, suffix=".safetensors"):
    """A checkpoint in two shards; the index has this name."""
    folder.mkdir(exist_ok=True, parents=True)
    weight_map = {}
    for number, (key, t) in enumerate(state(seed).items()):
        weight_map[key] = f"{index.split('.')[0]}-{number}{suffix}"
        if suffix == ".safetensors":
            save_file({key: t}, folder / weight_map[key])
        else:
            torch.save({key: t}, folder / weight_map[key])
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "index",
    [
        "model.safetensors.index.json",
        "model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "consolidated.safetensors.index.json",
        "weights.index.json",
    ],
)
def test_an_index_of_any_name_makes_a_directory_one_checkpoint(tmp_path, index):
    for seed in range(2):
        sharded(tmp_path / f"step_{seed}", index, seed)
    for paths in (tmp_path, tmp_path / "*", sorted(tmp_path.glob(f"*/{index}"))):
        candidates = Candidates(paths)
        for seed, t in enumerate(candidates.tensors("a.weight")):
            assert torch.equal(t, state(seed)["a.weight"])
    assert Candidates(tmp_path).names == ["step_0", "step_1"]
    # what from_pretrained of transformers reads, and nothing else, is written back for it
    assert Candidates(tmp_path).kind == (
        "huggingface" if index.startswith("model.") else "safetensors"
    )


def test_which_of_several_indexes(tmp_path):
    name = "diffusion_pytorch_model"
    folder = sharded(tmp_path / "unet", f"{name}.safetensors.index.json")
    sharded(folder, f"{name}.bin.index.json", suffix=".bin")
    sharded(folder, f"{name}.safetensors.index.fp16.json")
    assert Candidates(folder)[0].files[0].name == f"{name}.safetensors.index.json"
    sharded(folder, "other.safetensors.index.json")
    with pytest.raises(CandidateError, match=r"one index of shards, found 2 .*one of these files"):
        Candidates(folder)
    assert Candidates(folder / "other.safetensors.index.json").names
    save_file(state(3), folder / "model.safetensors")  # transformers' own comes first
    assert torch.equal(Candidates(folder)[0].tensor("a.bias"), state(3)["a.bias"])


def test_json_that_is_no_index(tmp_path):
    (tmp_path / "run").mkdir()
    save(tmp_path / "run" / "c.pt")
    for text in ("[]", "{}", "not JSON"):
        (tmp_path / "run" / "words.index.json").write_text(text)
        assert Candidates(tmp_path / "run").names == ["c"]
    # by its name it is one, and damaged
    (tmp_path / "run" / "big.safetensors.index.json").write_text("not JSON")
    with pytest.raises(CandidateError, match="weight_map"):
        Candidates(tmp_path / "run")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("whole", [True, False])
def test_what_accelerate_writes_of_fsdp(tmp_path, whole):
    """The optimizer's directory is no candidate."""
    for seed in range(2):
        folder = tmp_path / f"checkpoint-{seed + 9}"
        folder.mkdir()
        moments = {"state": {"a.weight": {"exp_avg": torch.ones(4, 3)}}}
        if whole:
            torch.save(state(seed), folder / "pytorch_model_fsdp.bin")
            torch.save(moments, folder / "optimizer.bin")
        else:
            dcp.save({"model": state(seed)}, checkpoint_id=folder / "pytorch_model_fsdp_0")
            dcp.save({"optimizer": moments}, checkpoint_id=folder / "optimizer_0")
        (folder / "random_states_0.pkl").write_bytes(b"x")
    for paths in (tmp_path, tmp_path / "checkpoint-*"):
        candidates = Candidates(paths)
        assert candidates.names == ["checkpoint-9", "checkpoint-10"] and not candidates.notes
        assert torch.equal(candidates[1].tensor("a.bias"), state(1)["a.bias"])
    candidates = Candidates(tmp_path / "checkpoint-9" / "*")
    assert len(candidates) == 1 and "optimizer" in candidates.notes[0]


# Files without weights ---------------------------------------------------------------------------


class Settings:
    """Stands for transformers.TrainingArguments: an object of a class that twa does not know."""

    def __init__(self):
        self.output_dir, self.seed, self.device = "out", 42, torch.device("cpu")


def without_weights(folder):
    """Files of training that checkpoints have beside them; returns their names."""
    model = nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    numpy_state = np.random.RandomState(0).get_state()
    files = {
        "training_args.bin": Settings(),
        "parser.bin": argparse.ArgumentParser,
        "optimizer.pt": optimizer.state_dict(),
        "optimizer.bin": optimizer.state_dict(),
        "optimizer_1.bin": torch.optim.SGD(model.parameters(), lr=0.1).state_dict(),
        "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": {
            "optimizer_state_dict": {"state": optimizer.state_dict()["state"]}
        },
        "scheduler.pt": scheduler.state_dict(),
        "scaler.pt": {"scale": 65536.0, "growth_factor": 2.0},
        "rng_state.pth": {"python": (3, (1, 2), None), "cpu": torch.get_rng_state()},
        "rng_state_0.pth": {"numpy": numpy_state, "cpu": torch.get_rng_state()},
        "losses.pt": [1.0, 2.0],
    }
    for name, content in files.items():
        torch.save(content, folder / name)
    return list(files)


#: what a pattern brings beside it
OTHERS = ("events.out.tfevents.1.host.2.0", "trainer_state.json", "train.log", "README.md", "zero")


@pytest.mark.parametrize("form", ["{}.pt", "checkpoint-{}"])
def test_what_lies_beside_checkpoints(tmp_path, form):
    for step in (900, 1000):
        save(tmp_path / form.format(step), step)
    beside = without_weights(tmp_path)
    touch(tmp_path, OTHERS)
    for folder in ("runs/Nov28", "logs"):
        (tmp_path / folder).mkdir(parents=True)
        touch(tmp_path / folder, OTHERS[:1])
    for paths, left_out in (
        (tmp_path, beside),
        (f"{tmp_path}/*", [*beside, *OTHERS, "runs", "logs"]),
    ):
        candidates = Candidates(paths)
        assert [c.path.name for c in candidates] == [form.format(900), form.format(1000)]
        mean = candidates.weighted("a.weight", twa.averages.uniform(2))
        torch.testing.assert_close(mean.double(), mean_of((900, 1000)), rtol=1e-6, atol=1e-7)
        note, *more = candidates.notes
        assert "no weights" in note and any(name in note for name in left_out)
        assert len(more) == (paths != tmp_path)  # files of other suffixes, which a pattern brings
        assert all("no checkpoint's suffix" in text for text in more)


@pytest.mark.parametrize("at", range(11))
def test_each_file_without_weights(tmp_path, at):
    """Left out where a directory brings it, an error where it is named."""
    name = without_weights(tmp_path)[at]
    for other in tmp_path.iterdir():
        if other.name != name:
            other.unlink()
    is_state = name.startswith("rng_state")  # which has a tensor, if of integers
    if not is_state:
        with pytest.raises(CandidateError, match=name):
            Candidates(tmp_path / name)
    with pytest.raises(CandidateError, match=f"nothing of what was found holds weights.*{name}"):
        Candidates(tmp_path)
    save(tmp_path / "step_1.pt")
    assert Candidates(tmp_path).names == ["step_1"] and name in Candidates(tmp_path).notes[0]
    advice = "is missing" if is_state else "put the pattern .* in quotes"
    with pytest.raises(CandidateError, match=f"{name}.*{advice}"):
        Candidates([tmp_path / "step_1.pt", tmp_path / name]).info  # noqa: B018


def test_a_named_file_of_integers(tmp_path):
    save_file({"codes": torch.arange(5)}, tmp_path / "codes.safetensors")
    assert Candidates(tmp_path / "codes.safetensors").names == ["codes"]
    save(tmp_path / "c.safetensors")
    assert Candidates(tmp_path).names == ["c"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".pth.tar"])
@pytest.mark.parametrize("keep", [0, 20, -200])
def test_a_damaged_file_is_not_left_out(tmp_path, suffix, keep):
    for step in range(2):
        path = save(tmp_path / f"step_{step}{suffix}", step)
    path.write_bytes(path.read_bytes()[:keep])
    for paths in (tmp_path, tmp_path / "*"):
        with pytest.raises(
            CandidateError, match=f"step_1{suffix}: not a (complete |safetensors)"
        ) as error:
            Candidates(paths)
        assert not isinstance(error.value, NoWeights)


def test_weights_in_an_unusual_place_are_not_left_out(tmp_path):
    """Also beside an optimizer with more entries than messages list, and beside a counter."""
    save(tmp_path / "step_0.pt")
    moments = {"state": {k: {"exp_avg": torch.ones(3)} for k in range(50)}}
    other = {"optimizer": moments, "step": torch.tensor(3), "net": {"inner": state(1)}}
    torch.save(other, tmp_path / "step_1.pt")
    with pytest.raises(CandidateError, match=r"step_1\.pt: expected a dict of tensors"):
        Candidates(tmp_path)
    torch.save({"object": Settings(), "weights": state(1)}, tmp_path / "step_1.pt")
    with pytest.raises(CandidateError, match=r"step_1\.pt"):
        Candidates(tmp_path)


def test_with_an_entry(tmp_path):
    for step in range(2):
        content = {"model": state(step), "ema": state(step + 10)}
        torch.save(content, tmp_path / f"step_{step}.pt")
    without_weights(tmp_path)
    candidates = Candidates(tmp_path, entry="ema")
    assert candidates.names == ["step_0", "step_1"]
    assert torch.equal(candidates[1].tensor("a.bias"), state(11)["a.bias"])
    save(tmp_path / "step_2.pt", 2)  # has no average
    with pytest.raises(CandidateError, match=r"step_2\.pt: expected weights under 'ema'"):
        Candidates(tmp_path, entry="ema")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_with_others_inside(tmp_path):
    """As a Trainer's output: the final model beside its checkpoints."""
    out = tmp_path / "out"
    save(out, 99)
    for step in (500, 1000, 1500):
        save(out / f"checkpoint-{step}", step)
    (out / "checkpoint-500" / "global_step500").mkdir()
    dcp.save({"model": state()}, checkpoint_id=out / "pytorch_model_fsdp_0")
    candidates = Candidates(out)
    assert candidates.names == ["out"]
    assert candidates.notes == [
        f"{out} is one checkpoint, and has 3 more inside (checkpoint-500, checkpoint-1000,"
        f" checkpoint-1500): '{out}/checkpoint-*' names those"
    ]
    candidates = Candidates(f"{out}/checkpoint-*")
    assert candidates.names == ["checkpoint-500", "checkpoint-1000", "checkpoint-1500"]
    assert not candidates.notes and not Candidates(out / "checkpoint-500").notes


def test_checkpoints_one_level_deeper(tmp_path):
    """As litgpt writes them: the directory's error says how to name them."""
    for step, name in enumerate(("step-009", "step-010", "final")):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "lit_model.pth", step)
    with pytest.raises(CandidateError, match=f"in final, step-009, step-010: '{tmp_path}/\\*'"):
        Candidates(tmp_path)
    for pattern in ("*", "**", "**/*.pth"):
        candidates = Candidates(tmp_path / pattern)
        assert [c.path.parent.name for c in candidates] == ["step-009", "step-010", "final"]
        assert not candidates.notes


def test_inspect_leaves_out_the_same(tmp_path):
    for step in (9, 10):
        save(tmp_path / f"step_{step}.pt", step)
    save(tmp_path / "best.pt", 5)
    without_weights(tmp_path)
    result = inspect.inspect([str(tmp_path)])
    assert names(row.path for row in result.rows) == ["best.pt", "step_9.pt", "step_10.pt"]
    found = {f.kind: f.message for f in result.findings}
    assert "training_args.bin" in found["left-out"] and "best.pt" in found["order"]
    (tmp_path / "cut.pt").write_bytes((tmp_path / "step_9.pt").read_bytes()[:-100])
    result = inspect.inspect([str(tmp_path)])
    assert "unreadable" in [f.kind for f in result.findings] and len(result.rows) == 4


# Order -------------------------------------------------------------------------------------------

#: names, oldest first
ORDERS = [
    ["step_1.pt", "step_2.pt", "step_9.pt", "step_10.pt", "step_11.pt"],
    ["1.pt", "2.pt", "10.pt"],
    ["epoch=1-step=100.ckpt", "epoch=9-step=900.ckpt", "epoch=10-step=1000.ckpt"],
    # a step that begins anew in every epoch; the number first that changes faster
    ["epoch_2_step_90.pt", "epoch_3_step_5.pt", "epoch_10_step_1.pt"],
    ["step-90-epoch-2.pt", "step-5-epoch-3.pt", "step-1-epoch-10.pt"],
    # NeMo: a metric first
    [
        f"gpt--val_loss={v}-step={s}.ckpt"
        for v, s in (("2.30", 4000), ("2.13", 5000), ("2.5", 9000))
    ],
    [
        "megatron--val_loss=3.10-step=100-consumed_samples=25600.0.ckpt",
        "megatron--val_loss=2.50-step=900-consumed_samples=230400.0.ckpt",
        "megatron--val_loss=2.90-step=1000-consumed_samples=256000.0.ckpt",
        "megatron--val_loss=2.90-step=1000-consumed_samples=256000.0-last.ckpt",
    ],
    ["acc-0.91-epoch-2.pt", "acc-0.85-epoch-9.pt", "acc-0.99-epoch-10.pt"],
    [
        "val_loss_epoch=0.9-epoch=2.pt",
        "val_loss_epoch=0.1-epoch=3.pt",
        "val_loss_epoch=0.5-epoch=12.pt",
    ],
    ["best_acc_epoch_2.pt", "best_acc_epoch_10.pt"],
    ["model_0.93_200.pt", "model_0.91_1000.pt"],
    ["loss=9-200.pt", "loss=8-1000.pt"],
    ["bleu-31-4000.pt", "bleu-29-8000.pt"],
    ["ckpt_0.95_iter_5.pt", "ckpt_0.91_iter_40.pt"],
    ["weights.05-0.34.pt", "weights.40-0.21.pt", "weights.100-0.29.pt"],
    # Lightning's versions
    ["epoch=3-step=100.ckpt", "epoch=3-step=100-v1.ckpt", "epoch=3-step=100-v2.ckpt"],
    [f"epoch=3-step=100-v{k}.ckpt" for k in (2, 9, 10)] + ["epoch=4-step=200.ckpt"],
    ["epoch=3-val_loss=0.52.ckpt", "epoch=3-val_loss=0.41-v1.ckpt", "epoch=4-val_loss=0.6.ckpt"],
    # the newest
    ["epoch=8-step=800.ckpt", "epoch=10-step=1000.ckpt", "last.ckpt", "last-v1.ckpt"],
    ["checkpoint_9.pt", "checkpoint_10.pt", "checkpoint_last.pt"],
    ["model_0004999.pth", "model_0009999.pth", "model_final.pth"],
    ["ep8-ba800-rank0.pt", "ep10-ba1000-rank0.pt", "latest-rank0.pt"],
    ["checkpoint_2_900.pt", "checkpoint_2_1000.pt", "checkpoint_10_8000.pt"],  # fairseq
    # other labels
    ["iter_0000900.pt", "iter_0001000.pt"],
    ["global_step900.pt", "global_step1000.pt"],
    ["Iteration-9-a.pt", "iteration-10-b.pt"],
    ["b_update=9.pt", "a_update=10.pt"],
    ["zz_ckpt9.pt", "aa_ckpt10.pt"],
    ["step900.pt", "step1k.pt", "step1.5k.pt", "step2000.pt", "step1M.pt"],
    ["step1000-tokens4B.pt", "step2000-tokens8B.pt", "step10000-tokens41B.pt"],
    ["tokens_500M.pt", "tokens_2B.pt", "tokens_1T.pt"],
    ["epoch=0.25.pt", "epoch=0.5.pt", "epoch=1.5.pt"],
    # no labels: numbers, as they come
    ["a.pt", "b2.pt", "b10.pt", "c1.pt"],
    ["run-2026.01.30.pt", "run-2026.02.05.pt", "run-2026.11.01.pt"],
    ["model-v2.pt", "model-v10.pt"],
]


@pytest.mark.parametrize("right", ORDERS, ids=lambda right: right[0])
def test_order_of_a_pattern_and_of_a_directory(tmp_path, right):
    touch(tmp_path, right)
    assert names(find_checkpoints([tmp_path / "*"])) == right
    assert names(find_checkpoints([tmp_path])) == right
    # of directories as of files
    for name in right:
        (tmp_path / "d" / name.rsplit(".", 1)[0]).mkdir(parents=True)
        save_file(state(), tmp_path / "d" / name.rsplit(".", 1)[0] / "model.safetensors")
    assert names(find_checkpoints([tmp_path / "d"])) == [name.rsplit(".", 1)[0] for name in right]


@pytest.mark.parametrize("right", ORDERS, ids=lambda right: right[0])
def test_lists_in_the_order_of_a_shell(tmp_path, right):
    """Byte order, without regard to case, and without regard to punctuation."""
    orders = (
        sorted(right),
        sorted(right, key=str.lower),
        sorted(right, key=lambda name: "".join(c for c in name.lower() if c.isalnum())),
    )
    for order in orders:
        assert names(find_checkpoints([tmp_path / name for name in order])) == right


@pytest.mark.parametrize(
    "printed",
    [  # by LC_ALL=en_US.UTF-8 bash -c 'echo *', with glibc 2.36
        ["step_10.pt", "step_11.pt", "step_1.pt", "step_2.pt", "step_9.pt"],
        ["epoch=10-step=1000.ckpt", "epoch=1-step=100.ckpt", "epoch=9-step=900.ckpt"],
        ["run/checkpoint_10_10000.pt", "run/checkpoint_1_1000.pt", "run/checkpoint_2_2000.pt"],
        ["run1/Step_10.pt", "run1/step_9.pt", "run2/step_10.pt", "run2/step_1.pt"],
    ],
)
def test_orders_of_a_locale(printed):
    def key(path):
        return [int(part) for part in "".join(c if c.isdigit() else " " for c in path).split()]

    assert list(map(str, find_checkpoints(printed))) == sorted(printed, key=key)


def test_a_list_of_another_order_keeps_it(tmp_path):
    right = [f"step_{k}.pt" for k in range(1, 13)]
    rng = random.Random(0)
    kept = 0
    for _ in range(50):
        mine = rng.sample(right, 6)
        keys = ["".join(c for c in name if c.isalnum()) for name in mine]
        if mine != sorted(mine) and keys != sorted(keys):
            assert names(find_checkpoints([tmp_path / name for name in mine])) == mine
            kept += 1
    assert kept > 40


def test_directories_are_groups(tmp_path):
    for run, step in itertools.product((1, 2, 10), (5, 30)):
        (tmp_path / f"run{run}").mkdir(exist_ok=True)
        touch(tmp_path / f"run{run}", [f"step_{step}.pt"])
    right = [(run, step) for run in ("run1", "run2", "run10") for step in ("step_5", "step_30")]
    for pattern in (tmp_path / "run*", tmp_path / "run*/step_*.pt", tmp_path / "**/*.pt"):
        assert [(p.parent.name, p.stem) for p in find_checkpoints([pattern])] == right


def test_numeric_order_is_of_any_text():
    assert sorted(["x10y2", "x9", "x10y10"], key=numeric_order) == ["x9", "x10y2", "x10y10"]


@pytest.mark.parametrize(
    ("files", "doubt"),
    [
        (["epoch=1.pt", "epoch=2.pt", "best.pt"], r"no epoch or step is in the name of best\.pt"),
        (["step_1.pt", "step_2.pt", "swa.pt", "best.pt"], r"name of best\.pt, swa\.pt"),
        (["1.pt", "2.pt", "best.pt"], r"no number is in the name of best\.pt"),
        (["epoch_1.pt", "step_200.pt"], "some names have an epoch, others a step alone"),
        (["acc_0.91.pt", "acc_0.85.pt"], "metrics and no steps"),
        (["epoch=1.pt", "epoch=2.pt", "last.pt"], None),
        (["1.pt", "2.pt", "final.pt"], None),
        (["a.pt", "b.pt", "c.pt"], None),
        (["best.pt"], None),
        (["epoch_1_step_5.pt", "epoch_2_step_9.pt"], None),
    ],
)
def test_doubts(tmp_path, files, doubt):
    for seed, name in enumerate(files):
        save(tmp_path / name, seed)
    if doubt is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not Candidates(tmp_path).notes
        return
    with pytest.warns(CandidateWarning, match=doubt):
        candidates = Candidates(tmp_path)
    (note,) = candidates.notes
    assert note.endswith("list the files oldest first if the order is another")


def test_an_order_of_ones_own_is_in_no_doubt(tmp_path):
    mine = ["step_2.pt", "best.pt", "step_1.pt"]
    paths = [save(tmp_path / name, seed) for seed, name in enumerate(mine)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Candidates(paths).names == ["step_2", "best", "step_1"]


def test_shortened_names_are_whole_and_cannot_harm():
    long = "x" * 300
    assert shortened([long, "modèle\u00a0final.pt"]) == f"{long}, modèle\u00a0final.pt"
    assert shortened(["a\x1b[2J"]) == "'a\\x1b[2J'"


def test_shortened():
    assert shortened(range(12)) == ", ".join(map(str, range(12)))
    assert shortened([f"step_{k}00" for k in range(1, 49)]) == "step_100, step_200, ..., step_4800"


# The same twice ----------------------------------------------------------------------------------


def copy(kept, other):
    if kept.is_dir():
        shutil.copytree(kept, other)
    else:
        shutil.copy(kept, other)


def hard_links(kept, other):
    """A directory of hard links, as `cp -al` makes it."""
    shutil.copytree(kept, other, copy_function=os.link)


def saved_again(kept, other):
    """The same weights in a file of other bytes."""
    if kept.suffix == ".ckpt":
        torch.save({"state_dict": state(2), "callbacks": {"best": 3}}, other)
    elif kept.is_dir():
        other.mkdir()
        torch.save(state(2), other / "pytorch_model.bin")
    else:
        save_file(state(2), other, {"format": "pt", "made": "later"})


@pytest.mark.parametrize(
    "again",
    [lambda kept, other: os.symlink(kept.name, other), os.link, copy, saved_again],
    ids=["symbolic link", "hard link", "copy", "saved again"],
)
@pytest.mark.parametrize(
    ("form", "other"),
    [
        ("epoch={}-step={}00.ckpt", "last.ckpt"),
        ("epoch={}-step={}00.ckpt", "best.ckpt"),
        ("epoch={}-step={}00.ckpt", "epoch=2-step=200-v1.ckpt"),
        ("step_{}.safetensors", "final.safetensors"),
        ("step_{}.safetensors", "a_copy.safetensors"),
        ("checkpoint-{}", "checkpoint-best"),
    ],
)
def test_the_same_weights_count_once(tmp_path, form, other, again):
    if again is os.link and form == "checkpoint-{}":
        again = hard_links
    files = [form.replace("{}", str(k)) for k in range(4)]
    for seed, name in enumerate(files):
        save(tmp_path / name, seed, "state_dict" if name.endswith(".ckpt") else None)
    again(tmp_path / files[2], tmp_path / other)
    with pytest.warns(
        CandidateWarning, match=f"the same weights count once: {other} is {files[2]}"
    ):
        candidates = Candidates(tmp_path)
    assert [c.path.name for c in candidates] == files and len(candidates.notes) == 1
    mean = candidates.weighted("a.weight", twa.averages.uniform(4))
    torch.testing.assert_close(mean.double(), mean_of(range(4)), rtol=1e-6, atol=1e-7)


def test_a_path_given_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in range(2):
        save(tmp_path / f"step_{k}.pt", k)
    for paths in (
        ["step_0.pt", "step_1.pt", "step_1.pt"],
        [tmp_path, "step_0.pt"],
        ["*.pt", "./step_1.pt", f"{tmp_path}/../{tmp_path.name}/step_0.pt"],
    ):
        with pytest.warns(CandidateWarning, match="the same weights count once"):
            assert Candidates(paths).names == ["step_0", "step_1"]


def test_a_directory_and_what_is_in_it(tmp_path):
    folder = sharded(tmp_path / "c", "model.safetensors.index.json")
    with pytest.warns(CandidateWarning):
        assert len(Candidates([folder, folder / "model.safetensors.index.json"])) == 1
    sharded(tmp_path / "other", "model.safetensors.index.json", 1)
    shutil.copytree(folder, tmp_path / "copy-3")
    (tmp_path / "copy-3" / "config.json").write_text("{}")
    (tmp_path / "other").rename(tmp_path / "other-4")
    with pytest.warns(CandidateWarning, match="c is copy-3"):
        assert Candidates(tmp_path).names == ["copy-3", "other-4"]


def test_candidates_that_are_nearly_the_same_all_count(tmp_path):
    """One number differs, at each of many places; nothing else."""
    base = {f"frozen.{k}": torch.randn(300) for k in range(100)} | {"head": torch.zeros(1000)}
    torch.manual_seed(0)
    for k in range(6):
        other = {key: t.clone() for key, t in base.items()}
        key = ("head", "frozen.3", "frozen.77")[k % 3]
        other[key][(k * 97) % len(other[key])] += 1.0
        save_file(other, tmp_path / f"step_{k}.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Candidates(tmp_path)) == 6


def test_the_same_file_has_several_sets_of_weights(tmp_path):
    """They are compared under the entry that is read."""
    for k in range(2):
        torch.save({"model": state(0), "ema": state(k)}, tmp_path / f"step_{k}.pt")
    assert len(Candidates(tmp_path, entry="ema")) == 2
    with pytest.warns(CandidateWarning, match=r"step_1\.pt is step_0\.pt"):
        assert len(Candidates(tmp_path, entry="model")) == 1


def test_inspect_finds_duplicates(tmp_path):
    for k in range(3):
        save(tmp_path / f"step_{k}.pt", k)
    os.symlink("step_1.pt", tmp_path / "last.pt")
    result = inspect.inspect([str(tmp_path)])
    assert len(result.rows) == 4
    (found,) = [f for f in result.findings if f.kind == "duplicates"]
    assert found.message == "step_1, last are the same, every tensor"


@pytest.mark.parametrize(
    "names",
    [
        ["step1e3.pt", "step2e3.pt", "step1e4.pt"],
        ["step_5e4.pt", "step_1e+5.pt", "step_2e5.pt"],
    ],
)
def test_scientific_numbers(tmp_path, names):
    touch(tmp_path, names)
    assert [p.name for p in find_checkpoints([tmp_path])] == names


def test_a_list_in_its_own_order_says_so(tmp_path):
    candidates = Candidates([save(tmp_path / f"step_{k}.pt", k) for k in (9, 1, 2)])
    assert candidates.names == ["step_9", "step_1", "step_2"]
    assert candidates.notes == ["the order is that of the list, and not of the steps in the names"]


@pytest.mark.parametrize("key", ["upscaler", "optimized_model", "scheduled_ema", "changer"])
def test_weights_under_a_key_like_those_of_training_are_an_error(tmp_path, key):
    save(tmp_path / "step_1.pt")
    torch.save({key: {"a.weight": torch.ones(2)}, "epoch": 2}, tmp_path / "step_2.pt")
    with pytest.raises(CandidateError, match=f"step_2.pt: .*{key}: name one as entry"):
        Candidates(tmp_path)


@pytest.mark.parametrize("content", [[{"a": torch.ones(2)}, 3], ({"a": torch.ones(2)},)])
def test_lists_of_weights_are_an_error(tmp_path, content):
    save(tmp_path / "step_1.pt")
    torch.save(content, tmp_path / "step_2.pt")
    with pytest.raises(CandidateError, match=f"step_2.pt: .*found a {type(content).__name__}"):
        Candidates(tmp_path)


def test_a_model_and_an_adapter_in_one_directory(tmp_path):
    (tmp_path / "both").mkdir()
    for name in ("model.safetensors", "adapter_model.safetensors"):
        save(tmp_path / "both" / name)
    with pytest.raises(CandidateError, match="expected a model or an adapter, found both"):
        Candidates(tmp_path / "both")
