"""`Job`: one seed of a claim, with what claims share: workloads, training runs, averages, and how
they become rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn
from twa.io.candidates import Candidates
from twa.merge import baselines
from twa.merge.results import START, Result
from twa.merge.run import Merge
from twa.merge.settings import Settings, TwaMethod
from twa.tasks.contract import Task

from .rows import Rows
from .runs import Plan, Run, measured, train
from .workloads import BUILT_IN, Workload, of_path

TRAINED_ON = "train on, then EMA"
BN_BATCHES = 20  # for the statistics of an average; the digits have 14
SCALES = {"quick": 0.2, "small": 1.0, "gpu": 1.0, "full": 1.0}


@dataclass
class Job:
    """One seed of a claim.

    Args:
        folder: of the suite; claims share the training runs in its runs-SCALE/
        scale: "quick", "small", "gpu" (a larger form of small), or "full" where data is given
        data: path to data of the user's; None: what every machine has
        options: what else was given on the command line: model, epochs, batch, finetunes
    """

    seed: int
    folder: Path
    scale: str = "small"
    data: Path | None = None
    device: str = "cpu"
    progress: bool = False
    options: dict[str, object] = field(default_factory=dict)

    # Workloads and training runs -----------------------------------------------------------------

    def workloads(self, *names: str) -> list[Workload]:
        """The built-in ones of these names (quick: the first), or the one that the data makes."""
        if self.data is not None:
            epochs, batch = (int(self.options.get(name) or 0) for name in ("epochs", "batch"))
            return [of_path(self.data, self.options.get("model"), epochs, batch)]
        wanted = names[:1] if self.scale == "quick" else names
        return [BUILT_IN[name]().scaled(SCALES[self.scale]) for name in wanted]

    def scaled(self, count: int, least: int = 1) -> int:
        """As many steps as `count` are at full scale."""
        return max(least, round(count * SCALES[self.scale]))

    def task(self, workload: Workload, **options: object) -> Task:
        return workload.task(self.seed, self.device, **options)

    def folder_of(self, workload: Workload) -> Path:
        """Where this seed's training runs of a workload are."""
        return self.folder / f"runs-{self.scale}" / workload.name / f"seed-{self.seed}"

    def run(
        self,
        workload: Workload,
        name: str,
        task: Task,
        plan: Plan,
        *,
        seed: int | None = None,
        **options: object,
    ) -> Run:
        """A training run, made once for all claims.

        Args:
            seed: of its own, instead of the job's
            options: see `train`
        """
        return train(
            task,
            plan,
            self.folder_of(workload) / name,
            self.seed if seed is None else seed,
            title=f"{workload.name} {name}",
            progress=self.progress,
            **options,
        )

    def usual(self, workload: Workload, task: Task) -> Run:
        """The workload's usual run, with states kept at every tenth of it."""
        plan = workload.usual
        keep = {plan.nearest(k / 10) for k in range(1, 10)}
        return self.run(workload, "usual", task, plan, keep=sorted(keep))

    # Rows ----------------------------------------------------------------------------------------

    def measure(
        self,
        where: dict,
        method: str,
        task: Task,
        model: nn.Module,
        steps: float,
        cost: float,
    ) -> dict:
        """A row for a model that is no average."""
        row = where | {"seed": self.seed, "method": method}
        row |= {"steps": steps, "looks": 0.0, "cost": cost}
        return row | measured(task, model)

    def anneal(
        self,
        where: dict,
        workload: Workload,
        task: Task,
        run: Run,
        step: int,
        steps: int,
        name: str = "annealing",
    ) -> dict:
        """What as many steps give without averaging: goes on from a state of the run, with the rate
        falling linearly from what it was to zero.
        """
        plan = run.falling(step, steps, steps)
        title = f"{run.folder.name}-anneal-{step}-{steps}"
        made = self.run(workload, title, task, plan, start=(run, step))
        return self.measure(where, name, task, made.load(task, made.last), steps, steps)

    def train_on(
        self, workload: Workload, task: Task, usual: Run, part: float, count: int, points: int
    ) -> Rows:
        """What the usual run gives with the EMA of its last checkpoints, from a part of it on.

        Its cost is that of the training alone.

        Args:
            count: of the checkpoints, at most
            points: of the whole run, evenly spread; those from the part on are measured
        """
        rows = Rows()
        for k in range(round(part * points), points + 1):
            stop = usual.plan.nearest(k / points)
            merge = self.merge(task, usual.candidates(until=stop, count=count), 1)
            at = {"line": workload.label, "stopped": stop, "setting": f"{k / points:.0%}"}
            rows.append(self.fixed(at, merge, "EMA", TRAINED_ON) | {"cost": 0.0})
        return rows

    def fixed(self, where: dict, merge: Merge, name: str, label: str = "") -> dict:
        """A row for one of the fixed averages, by its name in `twa.merge.baselines`."""
        result = baselines.measure(name, merge.evaluator, merge.candidates.names, lambda: None)
        result.test_loss, result.test_metric = merge.evaluator.test()
        return self.row(where, result, merge, label)

    def averages(
        self,
        where: dict,
        task: Task,
        candidates: Candidates,
        steps: int | None,
        methods: Sequence[TwaMethod | str],
        fixed: Sequence[str] | None = None,
        **settings,
    ) -> Rows:
        """The fixed and the trained averages of `twa average --compare`, as it makes them.

        Args:
            fixed: which of the fixed averages are in the table; None: all
        """
        merge = self.merge(task, candidates, steps, methods, compare=True, **settings)
        merge.run()
        return Rows(
            self.row(where, r, merge)
            for r in merge.results
            if fixed is None or r.is_trained or r.method in fixed
        )

    def merge(
        self,
        task: Task,
        candidates: Candidates,
        steps: int | None,
        methods: Sequence[TwaMethod | str] = (),
        **settings: object,
    ) -> Merge:
        """What makes averages one by one.

        Args:
            steps: of a trained one; None: as many as are worth it
        """
        methods = tuple(TwaMethod.parse(m) if isinstance(m, str) else m for m in methods)
        made = {"bn_batches": BN_BATCHES, "seed": self.seed, "sharding": "single"} | settings
        return Merge(task, candidates, Settings(methods, steps, **made), progress=self.progress)

    def row(
        self,
        where: dict,
        result: Result,
        merge: Merge,
        name: str = "",
        *,
        start: float | None = None,
    ) -> dict:
        """A row for an average.

        cost: its looks and steps, and the looks that chose where a trained one starts. Reading and
        packing the candidates is not counted (seconds are).

        Args:
            name: in place of the result's method
            start: looks that chose where a trained average starts; None: those of the start among
                the merge's results, if there is one
        """
        if start is None:
            chosen = [r.looks for r in merge.results if r.method == START and result.is_trained]
            start = sum(chosen)
        found = {
            "seed": self.seed,
            "method": name or result.method,
            "steps": result.steps,
            "looks": result.looks,
            "note": result.note,
            "cost": start + result.steps + result.looks,
            "val": result.val_loss,
            "test": result.test_loss,
            "seconds": result.seconds,
        }
        if result.test_metric is not None:
            found["metric"] = result.test_metric
        return where | found
