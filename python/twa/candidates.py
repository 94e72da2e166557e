"""Which files are candidates, and in which order: the part of `io` that scripts use by itself.

from twa.candidates import find_checkpoints
"""

from .io.candidates import Candidates
from .io.find import find_checkpoints

__all__ = ["Candidates", "find_checkpoints"]
