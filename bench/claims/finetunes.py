"""Fine-tunes of a pretrained transformer, as a team has them left over from its search.

What the claims `pretrained` and `adapters` have in common. A head alone is trained first, which all
fine-tunes of a seed start with, as in "Model soups" (Wortsman et al., arXiv 2203.05482): from heads
of their own, their mean would be worse than they are. Then rate, schedule, weight decay, length,
word dropout and the order of the data are drawn at random.
"""

from __future__ import annotations

import copy
import hashlib
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from twa.io.errors import TwaError
from twa.tasks.batches import mix
from twa.tasks.contract import Task

from . import glosses
from .glosses import Sizes, Splits
from .job import Job
from .runs import Plan, Run
from .workloads import Workload

HEAD_RATE = 1e-2
DROPS, DECAYS, EPOCHS = (0.0, 0.1, 0.2), (0.0, 0.1), (2, 3.5)  # decays and epochs: from .. to


@dataclass(frozen=True)
class Scale:
    """How much of everything there is.

    Args:
        steps: of a trained average: an epoch of the training data
        finetunes, adapters: how many, of full weights and by LoRA
    """

    sizes: Sizes
    batch: int
    finetunes: int
    adapters: int
    steps: int


#: "gpu" and "full" are some 11,000 steps, and 10 ms each for an H100, by kernel launches: with
#: scores and packing some 2 to 3 minutes, by this estimate
SCALES = {
    "quick": Scale(Sizes(320, 128, 128, 500, 200), 32, 3, 2, 5),
    "small": Scale(Sizes(2048, 1024, 1024, 10_000, 1000), 32, 12, 5, 64),
    "gpu": Scale(Sizes(20_000, 4096, 4096, 20_000, 8000), 128, 16, 8, 156),
}


@dataclass(frozen=True)
class Kind:
    """Full weights, or adapters, and what makes a model of them.

    Args:
        make: of the pretrained model with its head
    """

    name: str
    label: str
    make: Callable[[nn.Module], nn.Module]
    count: int
    rates: tuple[float, float]


def scale_of(job: Job) -> Scale:
    """That of the job; user's own data are cut in like shares."""
    if job.data is None:
        return SCALES[job.scale]
    n, batch = len(glosses.read_texts(job.data).texts), int(job.options.get("batch") or 32)
    held, test = min(4096, n // 10), min(20_000, n // 5)
    train = min(40_000, n - 2 * held - test)
    if held < batch or train < batch:
        raise TwaError(f"expected at least {10 * batch} texts, found {n}", f"--data {job.data}")
    sizes, epoch = Sizes(train, held, held, test, 0), train // batch
    return replace(SCALES["gpu"], sizes=sizes, batch=batch, steps=epoch)


def digest_of(model: nn.Module) -> str:
    """Of its weights, so that another model's runs are not taken for its own."""
    content = hashlib.sha256()
    for t in model.state_dict().values():
        content.update(t.contiguous().view(-1).view(torch.uint8).numpy())
    return content.hexdigest()[:8]


@dataclass
class Finetunes:
    """Fine-tunes, as the folders that save_pretrained wrote, and what they came of.

    Args:
        task: with the model that they fit
        runs: and the plans and data of each; none of merged adapters
    """

    kind: Kind
    task: Task
    folders: list[Path]
    runs: list[tuple[Run, Task]]


@dataclass
class Bench:
    """What one seed trains and measures.

    Attributes:
        headed: the pretrained model with the head that all fine-tunes start with
    """

    job: Job
    splits: Splits
    scale: Scale
    headed: nn.Module
    workload: Workload
    name: str

    @classmethod
    def of(cls, job: Job) -> Bench:
        if job.options.get("finetunes"):
            raise TwaError("expected it with the claim soup only", "--finetunes")
        scale, given = scale_of(job), job.options.get("model")
        data, folder = glosses.read_texts(job.data), glosses.model_folder(given)
        splits = glosses.splits(data, folder, scale.sizes, scale.batch, job.seed)
        epoch = scale.sizes.train // scale.batch
        plan = Plan(epoch, epoch, HEAD_RATE, "cosine")
        name = "MiniLM" if given is None else folder.name
        of = "pretrained" if given is None else f"pretrained-{digest_of(splits.model())}"
        workload = Workload(of, name, splits.task, plan, (), scale.steps)
        task = job.task(workload)
        model = task.model().requires_grad_(False)
        if not hasattr(model, "classifier"):
            raise TwaError("expected a model with a classifier, as BERT's", f"--model {given}")
        model.classifier.requires_grad_(True)
        headed = job.run(workload, "head", task, plan, model=model)
        return cls(job, splits, scale, headed.load(task, headed.last), workload, name)

    # Fine-tunes ----------------------------------------------------------------------------------

    def model(self, kind: Kind) -> nn.Module:
        """The model with its head, as fine-tunes of this kind begin."""
        fresh = copy.deepcopy(self.headed)
        torch.manual_seed(mix(self.job.seed, 6))  # of the adapters: all begin with the same
        return kind.make(fresh)

    def task(self, kind: Kind, seed: int | None = None, **options: object) -> Task:
        task = self.splits.task(self.job.seed if seed is None else seed, **options)
        task = replace(task, model=lambda: self.model(kind))
        return task if self.job.device == "cpu" else task.on(torch.device(self.job.device))

    def seed(self, k: int) -> int:
        """Of fine-tune number k."""
        return mix(self.job.seed, 4, k)

    def finetunes(self, kind: Kind) -> Finetunes:
        """As many as the scale says; what differs is drawn at random."""
        g = random.Random(mix(self.job.seed, 3))
        epoch = self.scale.sizes.train // self.scale.batch
        root, found = self.job.folder_of(self.workload) / f"{kind.name}-pretrained", []
        runs = []
        for k in range(kind.count):
            steps = round(epoch * g.uniform(*EPOCHS))
            low, high = kind.rates
            lr = low * (high / low) ** g.random()
            schedule, decay = g.choice(("linear", "cosine")), g.uniform(*DECAYS)
            plan = Plan(steps, steps, lr, schedule, weight_decay=decay, warmup=steps // 10)
            seed = self.seed(k)
            task = self.task(kind, seed, drop=g.choice(DROPS))
            made = self.job.run(
                self.workload, f"{kind.name}-{k:02d}", task, plan, seed=seed, model=task.model()
            )
            runs.append((made, task))
            found.append(self.written(root / f"finetune-{k:02d}", made.load(task, made.last)))
        return Finetunes(kind, self.task(kind), found, runs)

    def written(self, folder: Path, model: nn.Module) -> Path:
        """The folder, with the model as save_pretrained writes it."""
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        return folder
