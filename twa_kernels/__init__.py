"""Low-bit subspace kernels.

They pack checkpoints into a few bits, project gradients into their span and weights out of it.

basis = twa_kernels.pack(rows, bits=4, center=center)     # rows[k]: (n, *shape_k)
c = twa_kernels.project(basis, grads)                     # (n, L)
theta = twa_kernels.reconstruct(basis, x, center)         # one per parameter; differentiable in x
"""

from . import native, reference
from .api import average, pack, project, reconstruct, step, unpack
from .columns import StreamError
from .ops import NotFiniteError
from .orthonormalize import Orthonormal, orthonormalize
from .packed import PackedBasis, Packer
from .reference import relative_error

__all__ = [
    "NotFiniteError",
    "Orthonormal",
    "PackedBasis",
    "Packer",
    "StreamError",
    "average",
    "native",
    "orthonormalize",
    "pack",
    "project",
    "reconstruct",
    "reference",
    "relative_error",
    "step",
    "unpack",
]
__version__ = "0.1.0"
