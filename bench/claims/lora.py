"""Fine-tunes by LoRA (Hu et al., arXiv 2106.09685), averaged as factors and as full weights.

A part of the recipe `beyond`.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

from torch import nn
from twa.io.atomic import write_safetensors
from twa.io.candidates import Candidates
from twa.tasks.batches import mix

from .job import Job
from .models.lora import add_lora, merged_lora
from .rows import Rows
from .runs import Plan
from .workloads import Workload

RANK, RATES, STEPS, ORDERS = 4, (2e-3, 5e-3, 1e-2), (80, 240), 2
METHODS = ("v:model:4", "v:fine:4", "t:fine:4")
SOUPS = ("best single", "uniform", "greedy soup")


def lora(job: Job, workload: Workload) -> Rows:
    """Trained on code, then fine-tuned on the interpreter's help at several rates, lengths and
    orders of the data, all from the same A. The best of them is also trained on for as long as the
    averages are."""
    task = job.task(workload, domain="help")
    usual = job.usual(workload, job.task(workload))
    pretrained = usual.load(task, usual.last)
    where = {"task": f"{workload.name.upper()}, help", "setting": "LoRA"}
    rows = Rows([job.measure(where, "pretrained", task, pretrained, 0, 0)])

    def adapted() -> nn.Module:
        return add_lora(copy.deepcopy(pretrained), RANK, job.seed)

    runs, folder = (
        [],
        job.folder / f"runs-{job.scale}" / workload.name / f"seed-{job.seed}" / "lora-merged",
    )
    folder.mkdir(exist_ok=True)
    orders = [
        workload.task(mix(job.seed, order), job.device, domain="help") for order in range(ORDERS)
    ]
    options = list(itertools.product(orders, map(job.scaled, STEPS), RATES))
    for k, (data, steps, lr) in enumerate(options):
        runs.append(
            job.run(
                workload,
                f"lora-{k}",
                data,
                Plan(steps, steps, lr, "linear", warmup=steps // 20),
                model=adapted(),
            )
        )
        model = adapted()
        model.load_state_dict(runs[k].state(runs[k].last)["model"])
        write_safetensors(folder / f"lora-{k}.safetensors", merged_lora(model))
    task = replace(task, model=adapted)
    average = job.average(
        task, Candidates([r.path(r.last) for r in runs]), workload.twa_steps, METHODS
    )
    average.run()
    rows += [
        job.row(where, task, r, average)
        for r in average.results
        if r.method in SOUPS or r.coefficients is not None
    ]

    single = next(r for r in average.results if r.method == "best single")
    best = runs[k := int(single.beta.argmax())]
    plan = Plan(workload.twa_steps, workload.twa_steps, best.plan.lr, "linear")
    longer = job.run(
        workload, f"lora-{k}-longer", options[k][0], plan, start=(best, best.last), model=adapted()
    )
    cost = rows.mean("cost", method="best single") + plan.steps
    rows.append(
        job.measure(
            where, "best single, trained on", task, longer.load(task, longer.last), plan.steps, cost
        )
    )
    merged = Candidates([folder / f"lora-{k}.safetensors" for k in range(len(runs))])
    where, whole = where | {"setting": "LoRA, merged"}, job.task(workload, domain="help")
    return rows + job.averages(where, whole, merged, workload.twa_steps, METHODS, SOUPS)
