"""Quantised checkpoints are refused by name, and buffers of integers are not taken for weights."""

import pytest
import torch
import twa
from safetensors.torch import save_file
from torch import nn
from twa.cli import main as cli
from twa.inspection import run as inspect
from twa.io.compare import check_not_quantised, quantised
from twa.io.errors import CandidateError
from twa.io.mapped import TensorInfo

F16, F32 = torch.float16, torch.float32
I8, U8, I16, I32, I64 = torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64
#: floats that outnumber everything else: no rule of numbers helps
EMBEDDING = {"embed.weight": (F16, (5000, 64)), "norm.weight": (F16, (64,))}

#: one layer as each program writes it: name -> (dtype, shape), the tensor to name first
QUANTISED = {
    "gptq": {
        "l.qweight": (I32, (8, 64)),
        "l.qzeros": (I32, (1, 8)),
        "l.scales": (F16, (1, 64)),
        "l.g_idx": (I32, (64,)),
        "l.bias": (F16, (64,)),
    },
    "awq": {
        "l.qweight": (I32, (64, 8)),
        "l.qzeros": (I32, (1, 8)),
        "l.scales": (F16, (1, 64)),
    },
    "bitsandbytes 8": {
        "l.weight": (I8, (64, 64)),
        "l.SCB": (F32, (64,)),
        "l.weight_format": (U8, ()),
    },
    "bitsandbytes nf4": {
        "l.weight": (U8, (2048, 1)),
        "l.weight.absmax": (F32, (64,)),
        "l.weight.quant_map": (F32, (16,)),
        "l.weight.quant_state.bitsandbytes__nf4": (U8, (90,)),
    },
    "bitsandbytes nf4 nested": {
        "l.weight": (U8, (2048, 1)),
        "l.weight.absmax": (U8, (64,)),
        "l.weight.nested_absmax": (F32, (1,)),
        "l.weight.nested_quant_map": (F32, (256,)),
    },
    "compressed-tensors int8": {
        "l.weight": (I8, (64, 64)),
        "l.weight_scale": (torch.bfloat16, (64, 1)),
    },
    "compressed-tensors packed": {
        "l.weight_packed": (I32, (64, 8)),
        "l.weight_scale": (F16, (64, 1)),
        "l.weight_shape": (I64, (2,)),
    },
    "torch": {"l.weight": (I8, (64, 64)), "l.scales": (F32, (64,)), "l.zeros": (F32, (64,))},
    "hqq": {"l.W_q": (U8, (32, 64)), "l.scale": (F16, (64, 1)), "l.zero": (F16, (64, 1))},
    "zeros only": {"l.codes": (U8, (32, 64)), "l.zero_point": (F16, (64, 1))},
    "eetq": {"l.weight": (I8, (64, 64)), "l.weight_scales": (F16, (64,))},
    "quanto": {"l.weight._data": (I8, (64, 64)), "l.weight._scale": (F16, (64, 1))},
    "torchao": {"l._weight_qdata": (I8, (64, 64)), "l._weight_scale": (F32, (64,))},
    "aqlm": {
        "l.codes": (I16, (8, 8, 2)),
        "l.codebooks": (F16, (2, 256, 1, 8)),
        "l.scales": (F16, (64, 1, 1, 1)),
    },
    "mxfp4": {"e.up_blocks": (U8, (4, 64, 2, 16)), "e.up_scales": (U8, (4, 64, 2))},
    "quip": {"l.Qidxs": (I64, (64, 8)), "l.SU": (F16, (64,))},
    "at the top": {"weight": (I8, (64, 64)), "scale": (F32, (64, 1))},
}

#: buffers that models have beside their weights
LEGITIMATE = {
    "swin v2": {
        "attn.relative_position_index": (I64, (2401, 49)),
        "attn.logit_scale": (F32, (4, 1, 1)),
        "attn.layer_scale_1": (F32, (4,)),
    },
    "beit in int32": {"attn.relative_position_index": (I32, (1025, 197))},
    "levit": {
        "attn.attention_biases": (F32, (4, 196)),
        "attn.attention_bias_idxs": (I64, (196, 196)),
    },
    "bert": {
        "embeddings.position_ids": (I64, (1, 512)),
        "embeddings.token_type_ids": (I64, (1, 512)),
        "embeddings.scale": (F32, ()),
    },
    "gpt2": {"h.0.attn.bias": (U8, (1, 1, 1024, 1024)), "h.0.attn.scale": (F32, ())},
    "gpt-neox": {"l.attention.bias": (torch.bool, (1, 1, 64, 64))},
    "masks": {
        "a.mask": (U8, (512, 512)),
        "a.causal": (I32, (512, 512)),
        "a.tril": (U8, (512, 512)),
        "a.allowed": (torch.bool, (512, 512)),
        "a.scale": (F32, ()),
    },
    "tables": {
        "hashed.hash_table": (I64, (4, 30000)),
        "hashed.lookup": (I32, (4, 30000)),
        "hashed.bucket_offsets": (I64, (4, 2)),
    },
    "batchnorm": {"bn.num_batches_tracked": (I64, ()), "bn.running_mean": (F32, (4,))},
    "observers": {
        "fake.scale": (F32, (64,)),
        "fake.zero_point": (I32, (64,)),
        "fake.fake_quant_enabled": (U8, (1,)),
    },
    "vector quantisation": {
        "quantizer.codebook": (F32, (16, 4)),
        "quantizer.usage_count": (I64, (16, 2)),
    },
    "a template's faces": {"body.faces": (I64, (20, 3)), "body.vertices": (F32, (40, 3))},
}


def info(layer):
    return {key: TensorInfo(shape, dtype) for key, (dtype, shape) in layer.items()}


@pytest.mark.parametrize("layer", QUANTISED.values(), ids=QUANTISED)
def test_quantised_weights_are_known_by_what_stands_beside_them(layer):
    found = info(EMBEDDING | layer)
    with pytest.raises(CandidateError, match=r"run/c0.*tensor '.*dequantise") as error:
        check_not_quantised(found, "run/c0")
    named = next(iter(layer))
    assert f"tensor {named!r} ({found[named]})" in str(error.value)


@pytest.mark.parametrize("dtype", [I8, U8, I16, I32, I64], ids=str)
def test_more_integers_than_floats_are_quantised_weights(dtype):
    floats = {"l.bias": (F32, (100,))}
    assert quantised(info(floats | {"l.codes": (dtype, (101,))}))
    assert not quantised(info(floats | {"l.codes": (dtype, (100,))}))


@pytest.mark.parametrize("layer", LEGITIMATE.values(), ids=LEGITIMATE)
@pytest.mark.parametrize("more", [{}, EMBEDDING], ids=["alone", "in a model"])
def test_buffers_of_integers_are_no_weights(layer, more):
    check_not_quantised(info(more | {"head.weight": (F32, (64, 2))} | layer))


class Layer(nn.Module):
    """A layer of a few bits, beside more floats than it has integers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(8, 4, dtype=torch.int8))
        self.register_buffer("SCB", torch.ones(8))
        self.head = nn.Linear(8, 40)

    def forward(self, x):
        return self.head(x @ (self.weight.float() * self.SCB[:, None]).T)


TASK = """
import torch
from test_quantised import Layer
def model(): return Layer()
def train_data(): return [torch.ones(2, 4)]
def val_data(): return [torch.ones(2, 4)] * 2
def loss(model, batch): return model(batch).square().mean()
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    for k in range(2):
        save_file(Layer().state_dict(), tmp_path / f"c{k}.safetensors")
    return tmp_path


@pytest.mark.parametrize("command", ["average", "pack"])
def test_commands_refuse(files, capsys, command):
    task, out = str(files / "task.py"), str(files / "out")
    assert cli.main([command, task, str(files / "c*.safetensors"), "-o", out]) == 2
    said = capsys.readouterr().err
    assert "c0.safetensors: tensor 'weight' (int8 [8, 4]) stands beside 'SCB'" in said
    assert "dequantise" in said


def test_subspace_and_inspection_say_the_same(files):
    candidates = twa.Candidates(files / "c*.safetensors")
    with pytest.raises(CandidateError, match="stands beside 'SCB'"):
        twa.Subspace.from_candidates(Layer(), candidates)
    findings = inspect.inspect([str(files / "c*.safetensors")]).findings
    (found,) = [f for f in findings if f.kind == "integers"]
    assert found.severity == "error" and "stands beside 'SCB'" in found.message
