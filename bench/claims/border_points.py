"""The points of the claim `border`: training runs, and where they are stopped.

Around one base point one factor varies at a time. Runs are of the small character transformer, for
up to four passes over some windows of the standard library's source.

Batches: all runs see as many samples, at rates that go with the square root of the batch, and their
candidates are as many samples apart. Trained averages and annealing have the run's batch. Their
steps go with 1 / the square root, so that rate times steps is the same: with as many samples, 8
steps would be left at 512. All costs count samples, in batches of 32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from twa.io.candidates import Candidates
from twa.merge.settings import TwaMethod
from twa.tasks.chars import Batches
from twa.tasks.contract import Task

from .job import Job
from .runs import Plan, Run
from .text import text_task
from .workloads import Workload, gpt

N = 16  # candidates
SPACING, STEPS, WARMUP = 16, 128, 100  # of gradient steps, at a batch of 32
BATCH, WIDTH, CONTEXT, LR = 32, 64, 32, 3e-3
WINDOWS = 32768  # to train on
SIZES = {16: 2, 64: 2, 96: 3}  # width and depth
BASE = 128  # where the base point is, in spacings; the length of the run with a schedule

TRAINED, LEFT_OF = "how long it has trained", "what is left of its schedule"
APART, BATCH_OF, SIZE_OF = "spacing of the candidates", "batch", "size of the model"
#: stops in spacings, parts of the schedule, parts of the spacing, samples, widths
FACTORS = {
    TRAINED: (16, 32, 64, 128, 256),
    LEFT_OF: (1 / 2, 1 / 4, 1 / 16),
    APART: (1 / 4, 1, 4, 8),
    BATCH_OF: (32, 128, 512),
    SIZE_OF: tuple(SIZES),
}
QUICK = {TRAINED: (32, 128), LEFT_OF: (), APART: (1, 4), BATCH_OF: (32,), SIZE_OF: (16, 64)}
METHOD, COARSE = TwaMethod.parse("t:fine:4"), TwaMethod.parse("t:tensor:4")


@dataclass(frozen=True)
class Point:
    """Where a run is stopped, and what is done there.

    Args:
        run: whose state at `stop` is kept
        spacing: gradient steps between candidates
        steps: of a trained average
        unit: what a step costs, in steps of a batch of 32
        fine: a run with the last checkpoints before `stop`, where `run` has too few
        combine: whether annealing and a trained average are combined, too
        methods: trained averages
    """

    workload: Workload
    task: Task
    run: Run
    stop: int
    spacing: int
    steps: int
    unit: float = 1.0
    fine: Run | None = None
    combine: bool = False
    methods: tuple[TwaMethod, ...] = (METHOD,)

    @property
    def key(self) -> str:
        """Its name among the points: one that is in two tables is the same point."""
        return f"{self.workload.name} {self.run.folder.name} {self.stop} {self.spacing}"

    @property
    def place(self) -> tuple[Workload, Task, Run, int]:
        """What `Job.anneal` goes on from."""
        return self.workload, self.task, self.run, self.stop

    @property
    def usual(self) -> Point:
        """The same with candidates as far apart as the base point's."""
        if self.run.plan.schedule != "constant":
            return self
        return replace(self, spacing=self.run.plan.every, fine=None)

    def candidates(self, after: Sequence[Run] = (), count: int = N) -> Candidates:
        """The last ones up to the stop, and of runs that go on from there."""
        source, steps = self.fine or self.run, {self.stop - k * self.spacing for k in range(N)}
        found = [source.path(s) for s in source.steps if s in steps]
        found += [run.path(s) for run in after for s in run.steps]
        return Candidates(found[-count:])


def model_of(width: int, batch: int) -> Workload:
    """The small transformer of a width, on some windows of the standard library's source."""
    size = {"width": width, "depth": SIZES[width], "context": CONTEXT}

    def make(seed: int) -> Task:
        task = text_task(domain="code", batch=batch, seed=seed, **size)
        train = Batches(task.train.data, batch, limit=WINDOWS, shuffle=True, seed=seed)
        return replace(task, train=train)

    return replace(gpt(), name=f"border-{width}-{batch}", make=make)


def points(job: Job) -> Iterator[tuple[str, str, float, Point]]:
    """(factor, setting, x, point) of all columns of the tables, in their order."""
    few = QUICK if job.scale == "quick" else FACTORS
    unit, workload = job.scaled(SPACING), model_of(WIDTH, BATCH)
    stop, stops, task = unit * BASE, [unit * k for k in few[TRAINED]], job.task(workload)
    apart = [max(1, round(part * unit)) for part in few[APART]]
    begin = stop - N * max((k for k in apart if k < unit), default=0)
    plan = Plan(max(stops), unit, LR, warmup=job.scaled(WARMUP))
    main = job.run(workload, "constant", task, plan, keep=sorted({*stops, stop, begin}))
    at = Point(workload, task, main, stop, unit, job.scaled(STEPS))
    base = replace(at, combine=True, methods=(METHOD, COARSE))

    for k in stops:
        point = base if k == stop else replace(at, stop=k, combine=True)
        yield TRAINED, f"{k} steps", float(k), point
    if left := few[LEFT_OF]:
        falling = replace(plan, steps=stop, schedule="cosine", every=max(1, unit // 4))
        ends = {part: falling.nearest(1 - part) for part in left}
        cosine = job.run(workload, "cosine", task, falling, keep=sorted(ends.values()))
        for part, end in ends.items():
            point = replace(at, run=cosine, stop=end, combine=True)
            yield LEFT_OF, f"{short(part)} left", part, point
    for k in apart:
        fine = None
        if k < unit:
            end = replace(plan, steps=stop - begin, every=1, warmup=0)
            fine = job.run(workload, "constant-fine", task, end, start=(main, begin))
        point = base if k == unit else replace(at, spacing=k, fine=fine)
        yield APART, f"{k} apart", float(k), point
    for batch in few[BATCH_OF]:
        point = base if batch == BATCH else of_batch(job, at, batch)
        yield BATCH_OF, f"batch {batch}", float(batch), point
    for width in few[SIZE_OF]:
        point = base if width == WIDTH else of_size(job, at, width)
        weights = sum(p.numel() for p in point.task.model().parameters())
        yield SIZE_OF, f"{short(weights)} weights", float(weights), point


def of_batch(job: Job, at: Point, batch: int) -> Point:
    """The base point with larger batches, and fewer steps at a higher rate."""
    times = batch / BATCH
    workload, unit = model_of(WIDTH, batch), max(1, round(at.spacing / times))
    task, warmup = job.task(workload), round(at.run.plan.warmup / times)
    plan = Plan(at.stop // at.spacing * unit, unit, LR * math.sqrt(times), warmup=warmup)
    run, steps = with_end(job, workload, task, plan), max(1, round(at.steps / math.sqrt(times)))
    return Point(workload, task, run, plan.steps, unit, steps, times)


def of_size(job: Job, at: Point, width: int) -> Point:
    """The base point with a model of another width."""
    workload = model_of(width, BATCH)
    task = job.task(workload)
    run = with_end(job, workload, task, replace(at.run.plan, steps=at.stop))
    return replace(at, workload=workload, task=task, run=run)


def with_end(job: Job, workload: Workload, task: Task, plan: Plan) -> Run:
    """The end of a run at a constant rate, which alone leaves candidates."""
    length = N * plan.every
    before = replace(plan, steps=plan.steps - length, every=plan.steps - length)
    start = job.run(workload, "constant", task, before)
    end = replace(plan, steps=length, warmup=0)
    return job.run(workload, "constant-end", task, end, start=(start, start.last))


def short(x: float) -> str:
    """A number in a label: 1/16, 4096, 112k."""
    if x < 1:
        return "3/4" if x == 3 / 4 else f"1/{1 / x:.0f}"
    return f"{x / 1000:.0f}k" if x > 5000 else f"{x:g}"
