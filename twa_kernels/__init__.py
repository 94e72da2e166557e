"""Low-bit subspace kernels.

They pack checkpoints into a few bits, project gradients into their span and weights out of it.

basis = twa_kernels.pack(rows, bits=4, center=center)     # rows[k]: (n, *shape_k)
c = twa_kernels.project(basis, grads)                     # (n, L)
theta = twa_kernels.reconstruct(basis, x, center)         # one per parameter; differentiable in x
"""

from . import layout, registry
from .backends import reference
from .backends.reference import relative_error
from .basis import PackedBasis
from .ops.average import average
from .ops.pack import NotFiniteError
from .ops.project import project
from .ops.reconstruct import reconstruct
from .ops.record import record
from .ops.replay import replay
from .ops.step import step
from .ops.unpack import unpack
from .orthonormalize import Orthonormal, StreamError, orthonormalize
from .packer import Packer, pack
from .registry import BackendError
from .version import __version__

__all__ = [
    "BackendError",
    "NotFiniteError",
    "Orthonormal",
    "PackedBasis",
    "Packer",
    "StreamError",
    "__version__",
    "average",
    "layout",
    "orthonormalize",
    "pack",
    "project",
    "reconstruct",
    "record",
    "reference",
    "registry",
    "relative_error",
    "replay",
    "step",
    "unpack",
]
