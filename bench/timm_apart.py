"""timm, from the folder apart from all else that it is installed to, see requirements-timm.txt."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "timm"


def is_here() -> bool:
    """Whether timm can be imported, after `prepare`."""
    return FOLDER.is_dir() or importlib.util.find_spec("timm") is not None


def prepare() -> None:
    """Makes timm importable in this process; transformers then no longer is.

    PyPI's torchvision is built for GPUs. Beside a PyTorch for CPUs its operators are missing; of
    each this declares the name.
    """
    if FOLDER.is_dir():
        sys.path.append(str(FOLDER))
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    text = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
    for name in re.findall(r'register_fake\("torchvision::(\w+)"\)', text):
        torch.library.define(f"torchvision::{name}", "() -> ()")
