"""The singular vectors that spectral normalisation keeps in buffers.

They must be those of the weights as they are, not averages of the candidates' own.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

from .dtensors import is_dtensor

ITERATIONS = 50  # of the power method; a training step does one


@torch.no_grad()
def refresh_spectral_norms(model: nn.Module) -> None:
    """Power iterations on every spectrally normalised weight, from the vectors in its buffers.

    A weighted sum of singular vectors, whose signs are arbitrary, is no singular vector: what the
    layer divides by could be anything. Weights may be normalised by torch.nn.utils.spectral_norm or
    by the parametrization. Sharded ones are left to the forward passes.
    """
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                _refresh_hook(module, hook)
        if isinstance(module, ParametrizationList) and not is_dtensor(next(module.parameters())):
            _refresh_parametrizations(module)


def _refresh_hook(module: nn.Module, hook: SpectralNorm) -> None:
    """Power iterations for torch.nn.utils.spectral_norm."""
    if is_dtensor(getattr(module, hook.name + "_orig")):
        return
    for _ in range(_calls(hook.n_power_iterations)):
        hook.compute_weight(module, do_power_iteration=True)


def _refresh_parametrizations(parametrized: ParametrizationList) -> None:
    """Power iterations for torch.nn.utils.parametrizations.spectral_norm."""
    norms = [m for m in parametrized if isinstance(m, _SpectralNorm) and hasattr(m, "_u")]
    modes = [m.training for m in norms]
    for m in norms:
        m.train()
    for _ in range(max((_calls(m.n_power_iterations) for m in norms), default=0)):
        parametrized()  # in training mode: another iteration
    for m, training in zip(norms, modes, strict=True):
        m.training = training


def _calls(iterations: int) -> int:
    """How many calls make ITERATIONS, with so many each."""
    return -(-ITERATIONS // iterations)
