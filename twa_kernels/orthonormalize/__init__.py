"""Block Gram-Schmidt on the rows of W: an orthonormal basis in two reads."""

from .columns import PACK_COLUMNS, StreamError
from .job import Orthonormal, Report, orthonormalize

__all__ = ["PACK_COLUMNS", "Orthonormal", "Report", "StreamError", "orthonormalize"]
