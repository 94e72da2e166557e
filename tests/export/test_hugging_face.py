"""Directories as save_pretrained writes them, models and PEFT adapters: averaged, and the result
loaded by from_pretrained.
"""

import copy
import json
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
import twa
from safetensors.torch import load_file, save_file
from twa.cli import main as cli
from twa.distributed import weights
from twa.export import hugging_face, small_files
from twa.export.weights import write_export
from twa.io import peft as peft_io
from twa.io.checks import MAX_HEADER
from twa.io.errors import CandidateError

SHAPE = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def batches(seed, count=4):
    """Sequences that count up from a random token: (8, 16) each."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [(torch.randint(128, (8, 1), generator=generator) + torch.arange(16)) % 128]
        for _ in range(count)
    ]


def loss(model, batch):
    return model(input_ids=batch[0], labels=batch[0]).loss


@torch.no_grad()
def mean_loss(model):
    model.eval()
    return sum(loss(model, b).item() for b in batches(100)) / 4


def fit(model, seed, steps=6):
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _, batch in zip(range(steps), batches(seed, steps), strict=True):
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def transformers():
    os.environ["HF_HUB_OFFLINE"] = "1"
    return pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def peft(transformers):
    return pytest.importorskip("peft")


@pytest.fixture(scope="module")
def llamas(transformers, tmp_path_factory):
    """llamas(tied, sharded): base directory and pattern of 3 fine-tunes of it, made once."""
    made = {}

    def make(tied=False, sharded=False):
        if tied not in made:
            made[tied] = folder = tmp_path_factory.mktemp("llama")
            torch.manual_seed(0)
            base = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**SHAPE, tie_word_embeddings=tied)
            )
            base.save_pretrained(folder / "base")
            for k in range(3):
                model = fit(copy.deepcopy(base), k)
                model.save_pretrained(folder / "file" / f"tune_{k}")
                model.save_pretrained(folder / "shards" / f"tune_{k}", max_shard_size="100KB")
            assert (folder / "shards" / "tune_0" / "model.safetensors.index.json").exists()
        return made[tied] / "base", str(made[tied] / ("shards" if sharded else "file") / "tune_*")

    return make


#: LoRA on attention; DoRA on everything with embeddings and a whole layer; both train nothing else
ADAPTERS = {
    "lora": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1),
    "dora": dict(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "down_proj"]),
    "more": dict(
        r=2,
        target_modules=["q_proj", "embed_tokens"],
        modules_to_save=["lm_head"],
        bias="lora_only",
    ),
}


@pytest.fixture(scope="module")
def adapters(transformers, peft, llamas, tmp_path_factory):
    """adapters(kind): base directory and pattern of 3 adapters, made once."""
    base, made = llamas()[0], {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            for k in range(3):
                model = peft.get_peft_model(
                    transformers.LlamaForCausalLM.from_pretrained(base),
                    peft.LoraConfig(**ADAPTERS[kind]),
                )
                # dora: adapter_model.bin
                fit(model, k, steps=3).save_pretrained(
                    folder / f"adapter_{k}", safe_serialization=kind != "dora"
                )
            made[kind] = str(folder / "adapter_*")
        return base, made[kind]

    return make


def train(model, pattern, steps=10, **options):
    """TWA through the public API, by float32 rows unless told otherwise."""
    subspace = twa.Subspace.from_candidates(model, twa.Candidates(pattern), **{"bits": 4} | options)
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW, lr=0.1)
    model.train()
    for _, batch in zip(range(steps), batches(50, steps), strict=True):
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return subspace


# Models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True], ids=["file", "shards"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_average_of_models_loads(transformers, llamas, tmp_path, tied, sharded):
    base, pattern = llamas(tied, sharded)
    subspace = train(transformers.LlamaForCausalLM.from_pretrained(base), pattern)
    subspace.save(tmp_path)
    assert float(subspace.coefficients.detach().abs().max()) > 0.01
    loaded, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "averaged", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for name, t in subspace.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], t), name
    assert mean_loss(loaded) == mean_loss(subspace.model)  # the same weights, the same code
    assert {p.name for p in (tmp_path / "averaged").iterdir()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
    }
    assert (tmp_path / "averaged" / "model.safetensors").samefile(tmp_path / "averaged.safetensors")


TASK = """
import torch, transformers
{imports}

def model():
    return {model}

def data(seed):
    generator = torch.Generator().manual_seed(seed)
    starts = [torch.randint(128, (8, 1), generator=generator) for _ in range(4)]
    return [[(start + torch.arange(16)) % 128] for start in starts]

def train_data():
    return data(50)

def val_data():
    return data(100)

def heldout_data():
    return data(60)

def loss(model, batch):
    return model(input_ids=batch[0], labels=batch[0]).loss
"""


def average(tmp_path, pattern, model, imports=""):
    (task := tmp_path / "task.py").write_text(TASK.format(model=model, imports=imports))
    return cli.main(
        ["average", str(task), pattern, "-o", str(tmp_path / "out"), "--steps", "8", "--lr", "0.1"]
    )


def reported_loss(printed):
    method, value = re.search(
        r"winner on the validation data: (.*), validation loss (\S+)", printed
    ).groups()
    assert "TWA" in method
    return float(value)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_command_writes_a_model(transformers, llamas, tmp_path, capsys, tied):
    base, pattern = llamas(tied, sharded=tied)
    assert (
        average(tmp_path, pattern, f"transformers.LlamaForCausalLM.from_pretrained({str(base)!r})")
        == 0
    )
    printed = capsys.readouterr().out
    # of the winner; mergekit has one weight for a tensor
    fine = json.loads((tmp_path / "out" / "coefficients.json").read_text()).get("chunk")
    assert (
        f"averaged.safetensors, averaged/, {'' if fine else 'mergekit.yaml, '}coefficients.json"
        in printed
    )
    assert (tmp_path / "out" / "mergekit.yaml").exists() != bool(fine)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "averaged")
    # printed with 6 decimals; float32 sums of a model
    assert mean_loss(loaded) == pytest.approx(reported_loss(printed), rel=1e-5)


# PEFT adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ADAPTERS)
def test_average_of_adapters_loads(transformers, peft, adapters, tmp_path, kind):
    base, pattern = adapters(kind)
    before = transformers.LlamaForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM.from_pretrained(base), peft.LoraConfig(**ADAPTERS[kind])
    )
    subspace = train(model, pattern, steps=4)
    assert all("default" in name or "lora" in name for name in subspace.key_map.trained)
    subspace.save(tmp_path)
    source = (
        load_file(Path(pattern).parent / "adapter_0" / "adapter_model.safetensors")
        if kind != "dora"
        else subspace.candidates.info
    )
    written = load_file(tmp_path / "averaged" / "adapter_model.safetensors")
    assert {k: tuple(t.shape) for k, t in written.items()} == {
        k: tuple(t.shape) for k, t in source.items()
    }
    fresh = transformers.LlamaForCausalLM.from_pretrained(base)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "averaged")
    for name, t in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], t), name
    assert mean_loss(loaded) == mean_loss(model) != mean_loss(before)
    assert not (tmp_path / "mergekit.yaml").exists()
    for name, t in model.unload().state_dict().items() if kind == "lora" else ():
        assert torch.equal(t, before.state_dict()[name]), name  # the base, bit for bit


def test_uniform_average_of_adapters_is_the_mean_of_their_factors(
    transformers, peft, adapters, tmp_path
):
    base, pattern = adapters("lora")
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM.from_pretrained(base), peft.LoraConfig(**ADAPTERS["lora"])
    )
    place = twa.Subspace.from_candidates(model, twa.Candidates(pattern), bits=32).sharding
    sources = [
        load_file(Path(pattern).parent / f"adapter_{k}" / "adapter_model.safetensors")
        for k in range(3)
    ]
    found = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, t in found.items():
        torch.testing.assert_close(
            t.double(), sum(s[name].double() for s in sources) / 3, rtol=1e-6, atol=1e-9
        )
    # out and in, as a run that is killed and continued does
    write_export(tmp_path / "w.safetensors", place)
    kept, read = (
        weights.snapshot(place),
        weights.parts_of(place, twa.Candidates(tmp_path / "w.safetensors")),
    )
    assert kept.keys() == read.keys() == found.keys() and all(
        torch.equal(kept[k], read[k]) and torch.equal(kept[k], found[k]) for k in kept
    )
    weights.restore(place, {k: t + 1 for k, t in kept.items()})
    assert all(torch.equal(weights.snapshot(place)[k], t + 1) for k, t in kept.items())


def test_command_writes_an_adapter(transformers, peft, adapters, tmp_path, capsys):
    base, pattern = adapters("lora")
    model = (
        f"peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained({str(base)!r}),"
        f" peft.LoraConfig(**{ADAPTERS['lora']!r}))"
    )
    assert average(tmp_path, pattern, model, "import peft") == 0
    printed = capsys.readouterr().out
    assert "averaged.safetensors, averaged/, coefficients.json" in printed
    loaded = peft.PeftModel.from_pretrained(
        transformers.LlamaForCausalLM.from_pretrained(base), tmp_path / "out" / "averaged"
    )
    assert mean_loss(loaded) == pytest.approx(reported_loss(printed), rel=1e-5)
    # a model that is none is refused before anything is written
    (tmp_path / "again").mkdir()
    assert (
        average(
            tmp_path / "again",
            pattern,
            f"transformers.LlamaForCausalLM.from_pretrained({str(base)!r})",
        )
        == 2
    )
    assert (
        "expected the model to be a peft.PeftModel, found LlamaForCausalLM"
        in capsys.readouterr().err
    )


def test_what_adapters_cannot_be_averaged(transformers, peft, adapters):
    base, pattern = adapters("lora")
    candidates, config = twa.Candidates(pattern), ADAPTERS["lora"]

    def model(**changes):
        return peft.get_peft_model(
            transformers.LlamaForCausalLM.from_pretrained(base), peft.LoraConfig(**config | changes)
        )

    with pytest.raises(
        CandidateError,
        match=r"adapter_config.json: lora_alpha: expected 16 as in the model, found 8",
    ):
        twa.Subspace.from_candidates(model(lora_alpha=16), candidates)
    with pytest.raises(CandidateError, match=r"tensor .*k_proj.* of the model is missing"):
        twa.Subspace.from_candidates(
            model(target_modules=["q_proj", "k_proj", "v_proj"]), candidates
        )
    open_base = model()
    open_base.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(
        CandidateError, match=r"tensor 'base_model.model.model.norm.weight' of the model is missing"
    ):
        twa.Subspace.from_candidates(open_base, candidates)
    frozen = peft.PeftModel.from_pretrained(
        transformers.LlamaForCausalLM.from_pretrained(base), Path(pattern).parent / "adapter_0"
    )
    with pytest.raises(ValueError, match="is_trainable=True"):
        twa.Subspace.from_candidates(frozen, candidates)
    statistics = model()
    statistics.base_model.model.extra = torch.nn.BatchNorm1d(3, affine=False)
    with pytest.raises(
        ValueError, match=r"base_model.model.extra.running_mean changes in training"
    ):
        twa.Subspace.from_candidates(statistics, candidates)


# Without transformers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            '{"r": 4, "lora_alpha": 16, "target_modules": ["b", "a"]}',
            r"adapter_1.adapter_config.json: lora_alpha: expected 8 as in .*, found 16",
        ),
        (
            '{"r": 4, "lora_alpha": 8, "target_modules": ["b"]}',
            r"target_modules: expected \['a', 'b'\]",
        ),
        (
            '{"r": 4, "lora_alpha": 8, "target_modules": ["b", "a"], "use_rslora": true}',
            r"use_rslora: expected False .* found True",
        ),
        (
            '{"r": 4, "lora_alpha": 8, "target_modules": ["b", "a"], "group_size": 32}',
            "group_size: expected 16",
        ),
        ("[1, 2]", "expected a JSON object, found list"),
        ('{"r": 4', "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ('{"r": 4, "r": 4}', "'r' occurs twice"),
        ('{"r": 4}' + " " * MAX_HEADER, "of at most 33554432 bytes"),
        (None, "expected the adapter's configuration"),
    ],
)
def test_adapter_configurations_must_agree(tmp_path, other, message):
    first = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["a", "b"],
        "use_rslora": False,
        "base_model_name_or_path": "here",
        "lora_dropout": 0.1,
    }
    first["group_size"] = 16  # another version's field, at its default
    second = (
        '{"r": 4, "lora_alpha": 8.0, "target_modules": ["b", "a"], "base_model_name_or_path":'
        ' "there", "lora_dropout": 0}'
    )
    for k, text in enumerate([json.dumps(first), second]):
        (folder := tmp_path / f"adapter_{k}").mkdir()
        save_file({"w": torch.full((3,), float(k))}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(text)
    candidates = twa.Candidates(str(tmp_path / "adapter_*"))
    peft_io.check_configs(
        candidates, {"r": 4, "lora_alpha": 8, "target_modules": "a|b"}, {"group_size": 16}
    )
    (
        (folder / "adapter_config.json").unlink()
        if other is None
        else (folder / "adapter_config.json").write_text(other)
    )
    with pytest.raises(CandidateError, match=message):
        peft_io.check_configs(candidates, first, {"group_size": 16})


def beside(tmp_path, source, **options):
    """What averaged/ holds of a directory but for the weights, and the one warning, or ""."""
    save_file({"w": torch.ones(2)}, tmp_path / "averaged.safetensors")
    out = tmp_path / "averaged"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        hugging_face.write_model_folder(out, source, tmp_path / "averaged.safetensors", **options)
    assert len(said) <= 1
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    return files - {"model.safetensors"}, str(said[0].message) if said else ""


def filled(folder, *names):
    """A directory of small files that hold their own names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


OF_THE_MODEL = (
    "config.json",
    "tokenizer.model",
    "merges.txt",
    "vocab.bpe",
    "qwen.tiktoken",
    "spiece.vocab",
    "preprocessor_config.json",
    "chat_template.jinja",
    "LICENSE",
    "additional_chat_templates/tool_use.jinja",
    "1_Pooling/config.json",
    "a/b/c/deep.json",
)
#: the candidate in files, its training, its page: nobody misses them in an average
OF_THE_CANDIDATE = (
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "consolidated.00.pth",
    "tf_model.h5",
    "flax_model.msgpack",
    "model.Q4.GGUF",
    "optimizer.bin",
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state_3.pth",
    "random_states_0.pkl",
    "training_args.bin",
    "training_args.json",
    "trainer_state.json",
    "predict_results.json",
    "latest",
    "events.out.tfevents.17.host",
    "README.md",
    "modeling_unused.py",
    "kernel.so",
    ".gitattributes",
    ".git/config",
    ".cache/huggingface/x.json",
    "runs/Nov28/events.out",
    "global_step100/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "global_step100/note.json",
    "checkpoint-500/config.json",
    "pytorch_model_fsdp_0/.metadata",
    "pytorch_model_fsdp_0/__0_0.distcp",
    "onnx/model.onnx",
)


def test_small_files_beside_the_weights(tmp_path):
    """Of any suffix, also in folders; none of other weights, of code, of the training run."""
    source = filled(tmp_path / "model", *OF_THE_MODEL, *OF_THE_CANDIDATE)
    (source / "empty").mkdir()
    files, said = beside(tmp_path, source)
    assert files == set(OF_THE_MODEL) and said == ""
    for name in OF_THE_MODEL:
        assert (tmp_path / "averaged" / name).read_text() == name


def test_small_files_that_lie_elsewhere(tmp_path):
    source = filled(tmp_path / "model", "config.json", "sub/config.json", "good/x.json")
    (tmp_path / "secret.json").write_text("elsewhere")
    (source / "vocab.json").symlink_to(tmp_path / "secret.json")
    (source / "sub" / "vocab.txt").symlink_to("../../secret.json")
    (source / "added_tokens.json").symlink_to("config.json")
    (source / "sub" / "up.json").symlink_to("../config.json")
    (source / "loop.json").symlink_to("loop.json")
    (source / "circle").symlink_to(".")
    (source / "outside").symlink_to(tmp_path)
    os.mkfifo(source / "pipe.json")
    with open(source / "huge.json", "wb") as f:
        f.truncate(small_files.SMALL_BYTES + 1)
    files, said = beside(tmp_path, source)
    assert files == {
        "config.json",
        "sub/config.json",
        "good/x.json",
        "added_tokens.json",
        "sub/up.json",
    }
    added = tmp_path / "averaged" / "added_tokens.json"
    assert added.read_text() == "config.json" and not added.is_symlink()
    where = "no regular file of this directory"
    for name in ("vocab.json", "sub/vocab.txt", "loop.json", "pipe.json"):
        assert f"{name} ({where})" in said
    assert "huge.json (larger than 67108864 bytes)" in said
    assert "circle (a link to a folder)" in said and "outside (a link to a folder)" in said


@pytest.mark.parametrize(
    "names", [(), ("config.json",), ("tokenizer_config.json",), ("modules.json",)]
)
def test_code_that_the_configuration_names_is_missed(tmp_path, names):
    source = filled(tmp_path / "model", "modeling_own.py", "config.json", "pooling/own.py")
    for name in ("config.json", *names):
        (source / name).write_text("{}")
    for name in names:
        text = '{"auto_map": {"AutoModel": "modeling_own.Own"}, "time_step_limit": [0.0, Infinity]}'
        if name == "modules.json":
            text = '[{"type": "sentence_transformers.models.Dense"}, {"type": "own.Pooling"}]'
        (source / name).write_text(text)
    files, said = beside(tmp_path, source)
    assert files == {"config.json", *names}
    assert ("modeling_own.py (code" in said) == ("pooling/own.py (code" in said) == bool(names)


def test_modules_that_are_not_averaged_are_missed(tmp_path):
    """sentence-transformers' Dense layers, another adapter beside the one that is averaged."""
    source = filled(
        tmp_path / "model",
        *("config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
        *("3_Dense/pytorch_model.bin", "other/adapter_model.safetensors"),
    )
    files, said = beside(tmp_path, source)
    assert files == {"config.json", "2_Dense/config.json"}
    for name in (
        "2_Dense/model.safetensors",
        "3_Dense/pytorch_model.bin",
        "other/adapter_model.safetensors",
    ):
        assert f"{name} (weights that are not averaged)" in said
    assert str(source) in said


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MAX_FILES", 5, "more than 5 files)"),
        ("MAX_BYTES", 40, "more than 40 bytes in all)"),
        ("MAX_ENTRIES", 6, "some of it: more than 6 files and folders)"),
        ("MAX_DEPTH", 2, "deep/a/b (more than 2 folders deep)"),
    ],
)
def test_a_huge_directory_costs_no_more_than_the_limits(
    tmp_path, monkeypatch, limit, value, message
):
    monkeypatch.setattr(small_files, limit, value)
    names = [f"{k:02}.json" for k in range(40)]
    source = filled(tmp_path / "model", *names, "deep/a/b/c.json")
    files, said = beside(tmp_path, source)
    assert message in said and len(said) < 2000
    assert "deep/a/b/c.json" not in files
    if limit == "MAX_DEPTH":
        assert files == set(names)
    else:
        assert len(files) == {"MAX_FILES": 5, "MAX_BYTES": 5, "MAX_ENTRIES": len(files)}[limit] < 7


def test_an_output_in_the_directory_itself_is_no_part_of_it(tmp_path):
    source = filled(tmp_path / "model", "config.json", "out/averaged/old.json", "out/report.md")
    save_file({"w": torch.ones(2)}, source / "out" / "averaged.safetensors")
    for _ in range(2):
        hugging_face.write_model_folder(
            source / "out" / "averaged", source, source / "out" / "averaged.safetensors"
        )
        found = {p.name for p in (source / "out" / "averaged").rglob("*")}
        assert found == {"config.json", "model.safetensors"}


CONFIGS = {
    "own": '{"z": 1, "dtype": "float32", "a": [1e-05, 1.0], "k": "\u00fc"}',
    "old": '{"torch_dtype": "float32", "dtype": null, "limit": [0.0, Infinity]}',
    "parts": '{"text_config": {"dtype": "float16", "deep": {"torch_dtype": "float32"}},'
    ' "dtype": "bfloat16", "quantization_config": {"dtype": "int8"}}',
}


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS)
def test_configuration_has_the_dtype_of_the_weights(tmp_path, text):
    (source := tmp_path / "model").mkdir()
    (source / "config.json").write_text(text)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"dtype": "float32"}')

    def changed(pairs):
        return {k: "bfloat16" if k in ("dtype", "torch_dtype") else v for k, v in pairs}

    beside(tmp_path, source, dtype="bfloat16")
    written = (tmp_path / "averaged" / "config.json").read_text(encoding="utf-8")
    expected = json.loads(text, object_pairs_hook=changed)
    if "quantization_config" in expected:
        expected["quantization_config"] = {"dtype": "int8"}
    assert json.loads(written) == expected and list(json.loads(written)) == list(expected)
    assert written == json.dumps(expected, indent=2, ensure_ascii=False) + "\n"
    pooling = (tmp_path / "averaged" / "1_Pooling" / "config.json").read_text()
    assert pooling == '{"dtype": "float32"}'


@pytest.mark.parametrize(
    "text",
    ['{"dtype":"bfloat16" , "x": 1}', '{"x":1}', "[]", "{", "", "[" * 100_000, '"dtype"'],
)
def test_configuration_without_another_dtype_stays_to_the_byte(tmp_path, text):
    (source := tmp_path / "model").mkdir()
    (source / "config.json").write_text(text)
    beside(tmp_path, source, dtype="bfloat16")
    assert (tmp_path / "averaged" / "config.json").read_text() == text


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float32, None], ids=str)
def test_dtype_is_that_of_the_first_candidate(tmp_path, first):
    """The files' common one; a model of two dtypes has none to name."""
    net = torch.nn.Linear(3, 2)
    for k, dtype in enumerate((first or torch.bfloat16, torch.float16)):
        state = {name: t.detach().to(dtype) for name, t in net.state_dict().items()}
        if first is None:
            state["bias"] = state["bias"].float()
        (tmp_path / f"m{k}").mkdir()
        save_file(state, tmp_path / f"m{k}" / "model.safetensors")
        (tmp_path / f"m{k}" / "config.json").write_text('{"dtype": "float16"}')
    twa.Subspace.from_candidates(net, twa.Candidates(str(tmp_path / "m*"))).save(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "averaged" / "config.json").read_text())["dtype"]
    found = {t.dtype for t in load_file(tmp_path / "out/averaged/model.safetensors").values()}
    if first is None:
        assert written == "float16" and len(found) == 2
    else:
        assert written == str(first).removeprefix("torch.") and found == {first}


def pair(tmp_path, name, first, second):
    """Two candidates that hold these texts under a name; warnings when their average is saved."""
    net = torch.nn.Linear(3, 2)
    for k, text in enumerate((first, second)):
        folder = filled(tmp_path / f"m{k}", "config.json", name)
        (folder / "config.json").write_text("{}")
        torch.nn.init.constant_(net.bias, k)
        save_file(net.state_dict(), folder / "model.safetensors")
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(text)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        subspace = twa.Subspace.from_candidates(net, twa.Candidates(str(tmp_path / "m*")))
        subspace.save(tmp_path / "out")
    return [str(w.message) for w in said]


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("config.json", '{"rope_theta": 1e4}', '{"rope_theta": 1e6}'),
        ("config.json", '{"text_config": {"heads": 4}}', '{"text_config": {"heads": 8}}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0}}}', '{"model": {"vocab": {"b": 0}}}'),
        ("vocab.txt", "a\nb", "b\na"),
        ("vocab.json", '{"a": 0, "b": 1}', '{"a": 1, "b": 0}'),
        ("qwen.tiktoken", "a", "b"),
        ("tokenizer.model", "a", "b"),
        ("1_Pooling/config.json", '{"mode": "mean"}', '{"mode": "cls"}'),
    ],
)
def test_candidates_that_mean_different_things(tmp_path, name, first, second):
    (said,) = pair(tmp_path, name, first, second)
    assert f"{name} (of {tmp_path / 'm0'} and {tmp_path / 'm1'})" in said
    assert (tmp_path / "out" / "averaged" / name).read_text() == second


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        (
            "config.json",
            '{"a": 1, "transformers_version": "4", "_name_or_path": "x", "dtype": "float32"}',
            '{"transformers_version": "5", "torch_dtype": "float32", "a": 1.0}',
        ),
        ("config.json", '{"limit": [0.0, Infinity]}', '{"limit":[0.0,Infinity]}'),
        ("config.json", '{"text": {"dtype": "float32"}}', '{"text": {"dtype": "float32"} }'),
        ("tokenizer.json", '{"v": 1, "padding": {"l": 3}}', '{"v": 1, "padding": null}'),
        ("tokenizer.json", None, '{"v": 1}'),
        ("generation_config.json", '{"top_k": 1}', '{"top_k": 2}'),
        ("chat_template.jinja", "a", "b"),
    ],
)
def test_candidates_that_mean_the_same(tmp_path, name, first, second):
    assert pair(tmp_path, name, first, second) == []


def test_a_tokenizer_that_the_last_candidate_lacks(tmp_path):
    (said,) = pair(tmp_path, "tokenizer.json", "{}", None)
    assert f"tokenizer.json (of {tmp_path / 'm0'}, not of {tmp_path / 'm1'})" in said


def test_no_recipe_where_mergekit_reads_other_files(tmp_path):
    """It takes an index that is there first, however old."""
    net = torch.nn.Linear(3, 2)
    for k in range(2):
        folder = filled(tmp_path / f"m{k}", "pytorch_model.bin.index.json")
        save_file(net.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    for old in (False, True):
        if old:
            filled(tmp_path / "m0", "model.safetensors.index.json")
        subspace = twa.Subspace.from_candidates(net, twa.Candidates(str(tmp_path / "m?")))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            subspace.save(tmp_path / f"out{old}")
        assert (tmp_path / f"out{old}" / "mergekit.yaml").exists() != old
        assert any("mergekit.yaml is not written" in str(w.message) for w in said) == old


def test_links_of_the_hugging_face_cache(tmp_path):
    blobs, source = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    source.mkdir(parents=True)
    (blobs / "1f").write_text("{}")
    (source / "config.json").symlink_to("../../blobs/1f")
    save_file({"w": torch.ones(2)}, tmp_path / "averaged.safetensors")
    hugging_face.write_model_folder(
        tmp_path / "averaged", source, tmp_path / "averaged.safetensors"
    )
    assert (tmp_path / "averaged" / "config.json").read_text() == "{}"


def test_folder_appears_whole(tmp_path, monkeypatch):
    (source := tmp_path / "model").mkdir()
    (source / "config.json").write_text("new")
    (old := tmp_path / "averaged").mkdir()
    (old / "config.json").write_text("old")
    save_file({"w": torch.ones(2)}, weights := tmp_path / "averaged.safetensors")

    def no_links(*_):
        raise OSError("no hard links here")

    with monkeypatch.context() as patch:
        patch.setattr(hugging_face.shutil, "copyfile", no_links)
        with pytest.raises(OSError, match="no hard links"):
            hugging_face.write_model_folder(old, source, weights)
    assert (old / "config.json").read_text() == "old" and {p.name for p in tmp_path.iterdir()} == {
        "model",
        "averaged",
        "averaged.safetensors",
    }
    monkeypatch.setattr(hugging_face.os, "link", no_links)
    hugging_face.write_model_folder(old, source, weights)
    assert (old / "config.json").read_text() == "new"
    assert torch.equal(load_file(old / "model.safetensors")["w"], torch.ones(2)) and not (
        old / "model.safetensors"
    ).samefile(weights)


def test_files_that_are_no_directory_of_a_model_give_no_folder(tmp_path):
    net = torch.nn.Linear(3, 2)
    for k in range(2):
        (tmp_path / f"m{k}").mkdir()
        state = {key: t + k for key, t in net.state_dict().items()}
        save_file(state, tmp_path / f"m{k}" / "model.safetensors")
        save_file(state, tmp_path / f"m{k}.safetensors")
    for number, paths in enumerate(
        ([tmp_path / "m0", tmp_path / "m1"], str(tmp_path / "m*.safetensors"))
    ):
        twa.Subspace.from_candidates(net, twa.Candidates(paths)).save(
            out := tmp_path / f"out{number}"
        )
        assert {p.name for p in out.iterdir()} == {"averaged.safetensors", "coefficients.json"}
    for k in range(2):
        (tmp_path / f"m{k}" / "config.json").write_text("{}")
    twa.Subspace.from_candidates(
        net, twa.Candidates(str(tmp_path / "m?" / "model.safetensors"))
    ).save(out := tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {
        "averaged.safetensors",
        "coefficients.json",
        "averaged",
        "mergekit.yaml",
    }
