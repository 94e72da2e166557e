"""Trainable weight averaging: the best weighted average of many checkpoints, by gradient descent.

    subspace = twa.Subspace.from_candidates(model, twa.Candidates("run/*.safetensors"))
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW)
    for batch in loader:
        loss(model, batch).backward(); optimizer.step(); optimizer.zero_grad()
    twa.update_bn(loader, model); subspace.save("out/")

docs/architecture.md has the rooms of this package and who may import whom.
"""

from . import averages
from .batchnorm import update_bn
from .distributed.load import load_average
from .distributed.ranks import DistributedError
from .io.candidates import Candidates
from .io.errors import (
    BasisError,
    CandidateError,
    CandidateWarning,
    OutputError,
    StateError,
    TaskError,
    TwaError,
)
from .iterate_average import IterateAverage
from .merge.average import average
from .merge.outcome import Outcome
from .optimizer import SubspaceOptimizer
from .presets import conference_method
from .rate import learning_rate
from .recorder.recorder import Recorder
from .subspace import Subspace
from .version import __version__

__all__ = [
    "BasisError",
    "CandidateError",
    "CandidateWarning",
    "Candidates",
    "DistributedError",
    "IterateAverage",
    "Outcome",
    "OutputError",
    "Recorder",
    "StateError",
    "Subspace",
    "SubspaceOptimizer",
    "TaskError",
    "TwaError",
    "__version__",
    "average",
    "averages",
    "conference_method",
    "learning_rate",
    "load_average",
    "update_bn",
]
