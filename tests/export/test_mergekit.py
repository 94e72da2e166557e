"""mergekit.yaml: read as mergekit reads it, and by mergekit itself where it is installed
(`mergekit-yaml` on the path, or TWA_MERGEKIT=its path).
"""

import json
import os
import re
import shutil
from pathlib import Path

import processes
import pytest
import torch
import twa
from safetensors.torch import load_file, save_file
from twa.export.mergekit import mergekit_recipe

#: names that are parts of others, as in a model within a model
NAMES = {
    "norm.weight": "a",
    "model.norm.weight": "b",
    "vision.model.norm.weight": "a",
    "model.layers.1.w": "b",
    "model.layers.11.w": "a",
}
BETA = [[0.75, -1.5], [0.0, 2.25], [0.25, 1e-5 + 0.25]]


def coefficients(segment_of=NAMES, beta=BETA, center_weights=(0.5, 0.5, 0.0)):
    return {
        "segments": ["a", "b"],
        "segment_of": dict(segment_of),
        "beta": beta,
        "center_weights": list(center_weights),
    }


def parse(text):
    """[(path, [(filter or None, weight)])] and the other lines of a recipe: the little YAML that
    recipes are written in.
    """
    models, other = [], []
    for line in text.splitlines():
        if match := re.fullmatch(r"  - model: (?:\{model: \{path: )?(\".*\")(?:\}\})?", line):
            models.append((json.loads(match[1]), []))
        elif match := re.fullmatch(r"        - filter: (\".*\")", line):
            name = json.loads(match[1])
        elif match := re.fullmatch(r"          value: (\S+)", line):
            models[-1][1].append((name, match[1]))
        elif match := re.fullmatch(r"        - value: (\S+)|      weight: (\S+)", line):
            models[-1][1].append((None, match[1] or match[2]))
        elif not re.fullmatch(r"#.*|models:|    parameters:|      weight:", line):
            other.append(line)
    return models, other


def weights(text, name):
    """The weight of each model for a tensor: the first entry whose filter is part of its name, as
    mergekit.config.evaluate_setting has it.
    """
    return [
        next(float(value) for f, value in entries if f is None or f in name)
        for _, entries in parse(text)[0]
    ]


def test_every_tensor_gets_the_weights_of_its_segment():
    text = mergekit_recipe(coefficients(), ["/m/0", "/m/1", "/m/2"])
    for name, label in NAMES.items():
        assert weights(text, name) == [row["ab".index(label)] for row in BETA]
    assert weights(text, "elsewhere") == [0.5, 0.5, 0.0]
    models, other = parse(text)
    assert [path for path, _ in models] == ["/m/0", "/m/1", "/m/2"]
    assert other == [
        'base_model: "/m/2"',
        "merge_method: linear",
        "parameters:",
        "  normalize: false",
        "dtype: float32",
    ]


def test_numbers_are_floats_of_yaml_1_1():
    """PyYAML takes a number without a dot, or with an unsigned exponent, for a string."""
    beta = [[1e-5, -3e-300], [1.0, 2.5e22], [0.1 + 0.2, 0.0]]
    text = mergekit_recipe(coefficients(beta=beta), ["0", "1", "2"])
    for _, entries in parse(text)[0]:
        assert all(re.fullmatch(r"-?\d+\.\d+(e[-+]\d+)?", value) for _, value in entries)
    assert weights(text, "norm.weight") == [row[0] for row in beta] and weights(
        text, "model.norm.weight"
    ) == [row[1] for row in beta]


def test_aliases_and_untrained_tensors():
    c = coefficients({"embed.weight": "b"})
    text = mergekit_recipe(
        c,
        ["0", "1", "2"],
        aliases={"lm_head.weight": "embed.weight"},
        untrained=["frozen.embed.weight"],
        out_dtype="bfloat16",
    )
    assert (
        weights(text, "lm_head.weight") == weights(text, "embed.weight") == [row[1] for row in BETA]
    )
    assert weights(text, "frozen.embed.weight") == [0.5, 0.5, 0.0]
    assert text.endswith("dtype: float32\nout_dtype: bfloat16\n")
    assert (
        weights(mergekit_recipe(coefficients(center_weights=[0.0] * 3), ["0", "1", "2"]), "frozen")
        == [1 / 3] * 3
    )


def test_fixed_averages_need_no_filters():
    text = mergekit_recipe({"segments": ["model"], "beta": [[0.25], [0.75]]}, ["0", "1"])
    assert "filter" not in text and weights(text, "any") == [0.25, 0.75]


def test_a_source_that_comes_twice_is_one_model():
    text = mergekit_recipe(coefficients(), ["0", "1", "0"])
    assert len(parse(text)[0]) == 2 and weights(text, "model.norm.weight") == [
        BETA[0][1] + BETA[2][1],
        BETA[1][1],
    ]


def test_names_and_paths_are_quoted():
    name = 'a"b\\c: #é\U0001f600'
    text = mergekit_recipe(coefficients({name: "a"}), ["/m/x+y", '/m/"', "/m/y@z"])
    assert (
        '{model: {path: "/m/x+y"}}' in text
        and '{model: {path: "/m/y@z"}}' in text
        and '- model: "/m/\\""' in text
    )
    assert '- filter: "a\\"b\\\\c: #\\u00e9\\U0001f600"' in text


def test_wrong_numbers():
    with pytest.raises(ValueError, match=r"expected beta of shape \(2, 2\)"):
        mergekit_recipe(coefficients(), ["0", "1"])
    with pytest.raises(ValueError, match="finite"):
        mergekit_recipe(
            coefficients(beta=[[0.0, 1.0], [0.0, 1.0], [float("nan"), 1.0]]), ["0", "1", "2"]
        )


# With model directories --------------------------------------------------------------------------

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}


def llama_shapes(tied):
    layer = {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64),
    }
    layer |= {
        "mlp.gate_proj": (96, 64),
        "mlp.up_proj": (96, 64),
        "mlp.down_proj": (64, 96),
        "input_layernorm": (64,),
        "post_attention_layernorm": (64,),
    }
    shapes = {"model.embed_tokens.weight": (128, 64)} | (
        {} if tied else {"lm_head.weight": (128, 64)}
    )
    shapes |= {
        f"model.layers.{k}.{name}.weight": shape for k in range(2) for name, shape in layer.items()
    }
    return shapes | {"model.norm.weight": (64,)}


def module_of(shapes, tied):
    """A module with parameters of these names; the last norm is frozen."""
    root = torch.nn.Module()
    for name, shape in shapes.items():
        at = root
        for part in name.split(".")[:-1]:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at._modules[part]
        at.weight = torch.nn.Parameter(
            torch.zeros(shape), requires_grad=name != "model.norm.weight"
        )
    if tied:
        root.add_module("lm_head", torch.nn.Module())
        root.lm_head.weight = root.model.embed_tokens.weight
    return root


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def merged(request, tmp_path):
    """Three Llama directories, a saved average of them, its folder, the exact merge in float64."""
    shapes, generator = llama_shapes(request.param), torch.Generator().manual_seed(0)
    for k in range(3):
        (folder := tmp_path / f"model+{k}").mkdir()  # a plus is a LoRA to mergekit
        save_file(
            {n: torch.randn(s, generator=generator) for n, s in shapes.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        (folder / "config.json").write_text(
            json.dumps(CONFIG | {"tie_word_embeddings": request.param})
        )
    model = module_of(shapes, request.param)
    subspace = twa.Subspace.from_candidates(
        model,
        twa.Candidates(sorted(tmp_path.glob("model+*"))),
        bits=32,
        center=torch.tensor([0.5, 0.5, 0.0]),
    )
    beta = torch.randn(3, len(subspace.segments.labels), generator=generator, dtype=torch.float64)
    beta[1, ::3] = 0.0  # exact zeros
    subspace.set_merge_weights(
        beta + (1 - beta.sum(0)) * torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
    )
    subspace.save(tmp_path / "out")
    chosen = json.loads((tmp_path / "out" / "coefficients.json").read_text())
    exact = {}
    for name in shapes:
        weight = (
            [0.5, 0.5, 0.0]
            if name == "model.norm.weight"
            else [
                row[chosen["segments"].index(chosen["segment_of"][name])] for row in chosen["beta"]
            ]
        )
        exact[name] = sum(
            w * load_file(tmp_path / f"model+{k}" / "model.safetensors")[name].double()
            for k, w in enumerate(weight)
        )
    return tmp_path / "out", exact


def relative_error(found, exact):
    assert set(found) == set(exact)
    return max(float((found[n].double() - e).norm() / e.norm()) for n, e in exact.items())


def test_recipe_of_a_saved_subspace(merged):
    out, exact = merged
    text = (out / "mergekit.yaml").read_text()
    sources = [load_file(Path(path) / "model.safetensors") for path, _ in parse(text)[0]]
    found = {
        name: sum(w * s[name].double() for w, s in zip(weights(text, name), sources, strict=True))
        for name in exact
    }
    assert relative_error(found, exact) < 1e-15  # the same numbers, read back
    # of dense float32 rows
    assert relative_error(load_file(out / "averaged.safetensors"), exact) < 1e-6
    assert parse(text)[1][-2:] == ["dtype: float32", "out_dtype: float32"]


def test_mergekit_makes_the_same_model(merged):
    tool = os.environ.get("TWA_MERGEKIT") or shutil.which("mergekit-yaml")
    if tool is None:
        pytest.skip("mergekit-yaml is not installed (pip install mergekit; TWA_MERGEKIT=its path)")
    out, exact = merged
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    offline.pop("PYTHONPATH", None)  # mergekit lives in an environment of its own
    done = processes.run([tool, out / "mergekit.yaml", out / "merged"], env=offline)
    assert done.returncode == 0, done.stderr
    found = {
        name: t
        for file in (out / "merged").glob("*.safetensors")
        for name, t in load_file(file).items()
    }
    error = relative_error(found, exact)
    print(f"mergekit's merge against float64: relative error {error:.2e}")
    assert error < 1e-6
