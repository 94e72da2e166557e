"""The singular vectors that spectral normalisation keeps in buffers: of the weights as they are,
not averages of the candidates' own.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

ITERATIONS = 50  # of the power method; a training step does one


@torch.no_grad()
def refresh_spectral_norms(model: nn.Module) -> None:
    """Power iterations on every spectrally normalised weight, torch.nn.utils.spectral_norm or the
    parametrization, from the vectors in its buffers. A weighted sum of singular vectors, whose
    signs are arbitrary, is no singular vector: what the layer divides by could be anything. Sharded
    weights are left to the forward passes."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm) and not isinstance(
                getattr(module, hook.name + "_orig"), DTensor
            ):
                for _ in range(-(-ITERATIONS // hook.n_power_iterations)):
                    hook.compute_weight(module, do_power_iteration=True)
        if isinstance(module, ParametrizationList) and not isinstance(
            next(module.parameters()), DTensor
        ):
            norms = [m for m in module if isinstance(m, _SpectralNorm) and hasattr(m, "_u")]
            modes = [m.training for m in norms]
            for m in norms:
                m.train()
            for _ in range(max((-(-ITERATIONS // m.n_power_iterations) for m in norms), default=0)):
                module()  # in training mode: another iteration
            for m, training in zip(norms, modes, strict=True):
                m.training = training
