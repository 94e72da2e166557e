"""Trainable weight averaging: the best weighted average of a heap of checkpoints, found by gradient
descent.

subspace = twa.Subspace.from_candidates(model, twa.Candidates("run/*.safetensors"))
optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW, lr=0.01)
for batch in loader:
    loss(model, batch).backward(); optimizer.step(); optimizer.zero_grad()
twa.update_bn(loader, model); subspace.save("out/")
"""

from . import averages as schemes
from .batchnorm import update_bn
from .distributed.ranks import DistributedError
from .io.candidates import CandidateError, Candidates
from .iterate_average import IterateAverage
from .optimizer import SubspaceOptimizer
from .presets import conference_method
from .subspace import Subspace

__all__ = [
    "CandidateError",
    "Candidates",
    "DistributedError",
    "IterateAverage",
    "Subspace",
    "SubspaceOptimizer",
    "conference_method",
    "schemes",
    "update_bn",
]
__version__ = "0.1.0"
