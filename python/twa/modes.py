"""Modules that keep something made of their weights while they are in evaluation mode.

LeViT and EfficientFormer keep attention biases, DoRA the norms of weights; loralib merges its
factors into the weight, RepVGG its branches. All drop or undo that in `train()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


def with_own_train(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that have a `train()` of their own."""
    return [m for m in model.modules() if type(m).train is not nn.Module.train]


@contextlib.contextmanager
def plain_weights(model: nn.Module, own: list[nn.Module] | None = None) -> Iterator[None]:
    """A context in which the model's weights are those that files hold, to be read or written.

    Modules that are in evaluation mode and have a `train()` of their own go into training mode, so
    that what they merged is undone with the weights that it was made of. Afterwards they go back,
    and so make anew what they keep. Every module's `training` is then as it was. Contexts may be
    nested: the outermost counts. A model without such modules is left alone.

    Args:
        model: whose weights are read or written
        own: what `with_own_train` gives; None: it is asked
    """
    own = with_own_train(model) if own is None else own
    if all(m.training for m in own):
        yield
        return
    with modes_kept(model, own):
        for m in own:
            if not m.training:
                m.train()
        yield


@contextlib.contextmanager
def modes_kept(model: nn.Module, own: list[nn.Module] | None = None) -> Iterator[None]:
    """A context after which every module of a model is in the mode that it was in.

    Modules that have a `train()` of their own make anew what they keep in evaluation mode.

    Args:
        model: of the modules
        own: what `with_own_train` gives; None: it is asked
    """
    own = with_own_train(model) if own is None else own
    modes = {m: m.training for m in model.modules()}
    try:
        yield
    finally:
        # Outer modules come first: each has the last word about itself, whatever they said.
        for m in own:
            m.train() if modes[m] else m.eval()  # some take no argument
        for m, training in modes.items():
            m.training = training
