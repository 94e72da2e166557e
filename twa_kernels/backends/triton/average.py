"""average: plain PyTorch, as on every GPU."""

from ..average import average as average
