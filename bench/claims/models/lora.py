"""Low-rank adapters, after Hu et al., arXiv:2106.09685, inside the claims' own transformers; for
models of transformers there is peft.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twa.io.errors import TwaError


class LoRALinear(nn.Linear):
    """y = x (W + B A)^T + b: (..., in) -> (..., out).

    W (out, in) and b are frozen, A (rank, in) and B (out, rank) trained. The layer's own weights
    keep their names; y is that of the layer as long as B is zero.

    A is drawn from the generator with standard deviation 1 / sqrt(in), so that A x has that of x.
    """

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        drawn = torch.randn(rank, base.in_features, generator=generator) * base.in_features**-0.5
        self.A = nn.Parameter(drawn.to(base.weight))
        self.B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.A), self.B)


def add_lora(model: nn.Module, rank: int, seed: int) -> nn.Module:
    """The same model, with adapters at every linear layer in model.blocks and all else frozen.

    Models made with equal seeds have equal A. TwaError if rank is below 1, or there are no such
    layers.
    """
    if rank < 1:
        raise TwaError(f"expected at least 1, found {rank}", "rank")
    layers = [
        (m, name, child)
        for m in getattr(model, "blocks", nn.Identity()).modules()
        for name, child in m.named_children()
        if type(child) is nn.Linear
    ]
    if not layers:
        raise TwaError("expected linear layers in model.blocks, found none", "model")
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for parent, name, child in layers:
        setattr(parent, name, LoRALinear(child, rank, generator))
    return model


@torch.no_grad()
def merged_lora(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of the model without adapters: W + B A in place of each W; every tied parameter once,
    under its first name.
    """
    found = {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            del found[f"{name}.A"], found[f"{name}.B"]
            found[f"{name}.weight"] = layer.weight + layer.B @ layer.A
    return found
