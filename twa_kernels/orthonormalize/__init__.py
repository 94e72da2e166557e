"""Block Gram-Schmidt on the rows of W: an orthonormal basis in two reads."""

from .columns import StreamError
from .job import Orthonormal, Report, orthonormalize

__all__ = ["Orthonormal", "Report", "StreamError", "orthonormalize"]
