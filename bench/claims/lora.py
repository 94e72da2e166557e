"""Fine-tunes by LoRA (Hu et al., arXiv 2106.09685), averaged as factors and as full weights.

A part of the claim `beyond`.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

from torch import nn
from twa.io.candidates import Candidates
from twa.io.safetensors import write_safetensors
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
    """Rows of adapters to a model that was trained on code, fine-tuned on the interpreter's help.

    They differ in rate, length and order of the data, and start from the same A. The best of them
    is also trained on for as long as the averages are.
    """
    task = job.task(workload, domain="help")
    usual = job.usual(workload, job.task(workload))
    pretrained = usual.load(task, usual.last)
    where = {"task": f"{workload.name.upper()}, help", "setting": "LoRA"}
    rows = Rows([job.measure(where, "pretrained", task, pretrained, 0, 0)])

    def adapted() -> nn.Module:
        return add_lora(copy.deepcopy(pretrained), RANK, job.seed)

    runs, folder = [], job.folder_of(workload) / "lora-merged"
    folder.mkdir(exist_ok=True)
    seeds = [mix(job.seed, order) for order in range(ORDERS)]
    orders = [workload.task(seed, job.device, domain="help") for seed in seeds]
    options = list(itertools.product(orders, map(job.scaled, STEPS), RATES))
    for k, (data, steps, lr) in enumerate(options):
        plan = Plan(steps, steps, lr, "linear", warmup=steps // 20)
        runs.append(job.run(workload, f"lora-{k}", data, plan, model=adapted()))
        model = adapted()
        model.load_state_dict(runs[k].state(runs[k].last)["model"])
        write_safetensors(folder / f"lora-{k}.safetensors", merged_lora(model))
    task = replace(task, model=adapted)
    adapters = Candidates([r.path(r.last) for r in runs])
    merge = job.merge(task, adapters, workload.twa_steps, METHODS, compare=True)
    merge.run()
    shown = [r for r in merge.results if r.method in SOUPS or r.is_trained]
    rows += [job.row(where, r, merge) for r in shown]

    single = next(r for r in merge.results if r.method == "best single")
    k = int(single.beta.argmax())
    best, data = runs[k], options[k][0]
    plan = Plan(workload.twa_steps, workload.twa_steps, best.plan.lr, "linear")
    start = (best, best.last)
    longer = job.run(workload, f"lora-{k}-longer", data, plan, start=start, model=adapted())
    cost = rows.mean("cost", method="best single") + plan.steps
    model, name = longer.load(task, longer.last), "best single, trained on"
    rows.append(job.measure(where, name, task, model, plan.steps, cost))

    merged = Candidates([folder / f"lora-{k}.safetensors" for k in range(len(runs))])
    where, whole = where | {"setting": "LoRA, merged"}, job.task(workload, domain="help")
    return rows + job.averages(where, whole, merged, workload.twa_steps, METHODS, SOUPS)
