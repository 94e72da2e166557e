"""Fine-tuning soup: fine-tunes of one pretrained model, averaged instead of keeping the best.

Li et al. (arXiv 2205.13104v4) train merge weights of the fine-tunes of "Model soups" (Wortsman et
al., arXiv 2203.05482) on held-out data (TWA-v) and report greedy soup's accuracy or more for up to
4 times less compute: greedy soup of n fine-tunes takes 2 n - 1 passes over the validation data,
TWA-v some passes of training over as much held-out data.

Beside it: the best fine-tune, uniform soup, and learned soup, whose merge weights are a softmax.
EMA and LAWA are left out, as fine-tunes have no order.

A trained average is trained as `twa average` does it, from the start that it chooses, for as many
steps as are worth it; or from the best of the fixed averages, and then its cost includes that
choice. With a quarter of greedy soup's cost, that of choosing the start included, it trains on
held-out data only, and the last coefficients are kept without a look at validation data. Learned
soups start at the uniform one, and take the published number of passes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twa import averages
from twa.distributed.weights import load_merge
from twa.io.candidates import Candidates
from twa.io.errors import TwaError
from twa.merge.evaluate import mean_over
from twa.merge.run import Merge
from twa.merge.settings import TwaMethod
from twa.tasks.batches import mix
from twa.tasks.contract import Task

from .images import clip_task
from .job import Job
from .rows import Rows, number
from .runs import Plan, Run
from .workloads import Workload

TITLE = "Fine-tuning soup: fine-tunes of one model, averaged"
CLAIM = (
    "Merge weights trained on held-out data (TWA-v) are as good as greedy soup or better, for up to"
    " 4 times less compute."
)
METRIC = "accuracy"
FINETUNES, STEPS = 16, (120, 200)  # from .. to
#: rates are from a workload's / SPREAD to its * SPREAD: higher ones leave the basin, lower ones
#: learn too little to be of use
SPREAD = 10**0.25
FIXED = ("best single", "uniform", "greedy soup")
TRAINED = ("v:model:4", "v:tensor:4", "v:fine:4")
LEARNED = {"learned soup": "v:model:4:simplex", "learned soup by layer": "v:tensor:4:simplex"}
#: Published: AdamW for 5 epochs, 0.05 for the logits (learned.py of "Model soups"; its temperature
#: of the outputs is left out). Logits are sqrt(n) y here, and 0.05 for y, four times as much, did a
#: little better.
LEARNED_LR = 0.05
EPOCHS = 5  # of a trained average, over the held-out data
SHORT = 1 / 4  # of greedy soup's cost
BUDGETS = ("by default", "from the best", "a quarter")
PAIRS = 4  # of fine-tunes whose mean is compared with them
PICTURE_BATCH = 16  # held-out digits: 12 batches
PATCH = 2  # pixels
#: beside the public fine-tunes: which of ImageNet's training images they have not seen
UNSEEN = "imagenet_98_idxs.npy"


@dataclass(frozen=True)
class Soup:
    """Fine-tunes of one model, the data that they are averaged on, and the steps of a trained
    average at full length.
    """

    label: str
    task: Task
    candidates: Candidates
    steps: int


def run(job: Job) -> Rows:
    if (job.data is None) != (job.options.get("finetunes") is None):
        raise TwaError(
            "expected --finetunes DIR with --data IMAGES, the pictures that these classify, or"
            " neither",
            "soup",
        )
    rows = Rows()
    for make in (gpt, vit) if job.data is None else (clip,):
        rows += rows_of(job, make(job))
    return rows


# Fine-tunes --------------------------------------------------------------------------------------


def gpt(job: Job) -> Soup:
    """The usual run on source text, fine-tuned to English."""
    (workload,) = job.workloads("gpt")
    usual, task = job.usual(workload, job.task(workload)), job.task(workload, domain="help")
    found = finetunes(job, workload, task, usual, 3e-3)
    return Soup("GPT, source text to English", task, found, EPOCHS * batches(task))


def vit(job: Job) -> Soup:
    """A model pretrained without labels, fine-tuned to name the digits.

    Pretraining hides half of an image's patches, and the class token restores all of it. Then, as
    in "Model soups", a head alone is trained, which all fine-tunes start with: from a head of zeros
    each would find its own, and their mean would be worse than they are. Labelled images are not
    augmented: some hundred steps are then enough.
    """
    (workload,) = job.workloads("vit")
    plan = replace(workload.usual, every=workload.usual.steps)
    restored = job.run(workload, "restored", restoring(job.task(workload)), plan)
    task, averaged_on = job.task(workload, augment=False), job.task(workload, batch=PICTURE_BATCH)
    weights = restored.state(restored.last)["model"]
    body = {k: v for k, v in weights.items() if not k.startswith("head.")}
    model = task.model()
    model.load_state_dict(body, strict=False)
    nn.init.zeros_(model.head.weight)
    model.requires_grad_(False).head.requires_grad_(True)
    steps = job.scaled(200)
    plan = Plan(steps, steps, lr=1e-2, schedule="cosine")
    headed = job.run(workload, "head", task, plan, model=model)
    found = finetunes(job, workload, task, headed, 2e-3)
    return Soup("ViT, restoring to digits", averaged_on, found, EPOCHS * batches(averaged_on))


def restoring(task: Task) -> Task:
    """Mean squared error per pixel of what the head makes of an image with half of its patches
    hidden.
    """

    def model() -> nn.Module:
        made, (images, _) = task.model(), next(iter(task.val))
        made.head = nn.Linear(made.head.in_features, images[0].numel(), device=images.device)
        return made

    def loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        images = batch[0]  # (b, c, h, w)
        b, _, h, w = images.shape
        shown = (torch.rand(b, 1, h // PATCH, w // PATCH) < 0.5).float().to(images.device)
        restored = model(images * F.interpolate(shown, scale_factor=PATCH))
        return F.mse_loss(restored, images.flatten(1))

    return replace(task, model=model, loss=loss, metric=None)


def finetunes(job: Job, workload: Workload, task: Task, pretrained: Run, lr: float) -> Candidates:
    """Fine-tunes of the end of a run: of random lengths, rates, schedules and weight decays, and
    with an order of the data each.
    """
    g = random.Random(mix(job.seed, 3))
    paths: list[Path] = []
    for k in range(FINETUNES):
        steps = job.scaled(g.randint(*STEPS))
        rate, schedule = lr * SPREAD ** g.uniform(-1, 1), g.choice(("linear", "cosine"))
        plan = Plan(steps, steps, rate, schedule, weight_decay=g.uniform(0, 0.1))
        name, seed = f"{pretrained.folder.name}-finetune-{k:02d}", mix(job.seed, 4, k)
        start = {"start": (pretrained, pretrained.last), "optimizer_state": False}
        made = job.run(workload, name, task, plan, seed=seed, **start)
        paths.append(made.path(made.last))
    return Candidates(paths)


def clip(job: Job) -> Soup:
    """Fine-tunes that are there: nothing is trained but averages."""
    folder, unseen = Path(str(job.options["finetunes"])), None
    if (folder / UNSEEN).exists():
        unseen = folder / UNSEEN
    batch = int(job.options.get("batch") or 128)
    epochs = int(job.options.get("epochs") or EPOCHS)
    task, files = clip_task(folder, job.data, seed=job.seed, batch=batch, heldout_file=unseen)
    steps = epochs * len(task.heldout)
    if job.device != "cpu":
        task = task.on(torch.device(job.device))
    return Soup(f"CLIP, {job.data.name}", task, Candidates(files), steps)


def batches(task: Task) -> int:
    """How many the held-out data have."""
    return sum(1 for _ in task.heldout)


# Averages ----------------------------------------------------------------------------------------


def rows_of(job: Job, soup: Soup) -> Rows:
    """A row for every fixed average, and for every trained one at every budget."""
    task, n = soup.task, len(soup.candidates)
    if n < 2:
        raise TwaError(f"expected at least 2 fine-tunes, found {n}", "soup")
    where = {"task": soup.label, "setting": f"{n} fine-tunes"}
    merge = job.merge(task, soup.candidates, soup.steps)
    merge.baselines()
    fixed = {r.method: r for r in merge.results if r.method in FIXED}
    rows = Rows(job.row(where, r, merge) for r in fixed.values())
    rows[0] |= {"mean of two": mean_of_two(merge), "members": fixed["greedy soup"].candidates}

    best = min(fixed.values(), key=lambda r: r.val_loss)
    chosen, greedy = merge.start(), fixed["greedy soup"].looks
    # of the best fixed average; greedy soup has seen every fine-tune
    choosing = greedy + fixed["uniform"].looks
    short = max(1, round(SHORT * greedy - chosen.looks))
    uniform = averages.uniform(n)
    steps = soup.steps if job.options.get("epochs") else None  # as many as are worth it
    budgets = {
        "by default": (steps, chosen.beta, "start", "best", chosen.looks),
        "from the best": (steps, best.beta, best.method, "best", choosing),
        "a quarter": (short, chosen.beta, "start", "last", chosen.looks),
    }
    learned = {
        "by default": (soup.steps, uniform, "uniform", "best", 0.0),
        "a quarter": (max(1, round(SHORT * greedy)), uniform, "uniform", "last", 0.0),
    }
    todo = [(text, b, of, "", None) for b, of in budgets.items() for text in TRAINED]
    for b, of in learned.items():
        todo += [(text, b, of, name, LEARNED_LR) for name, text in LEARNED.items()]
    for text, budget, (steps, start, start_name, keep, before), name, rate in todo:
        merge.settings = replace(merge.settings, steps=steps, lr=rate)
        method, own = TwaMethod.parse(text), {"start": start, "start_name": start_name}
        result = merge.train(method, keep=keep, coarsen=False, **own)
        name = name or method.name
        row = job.row(where, result, merge, f"{name}, {budget}", start=before)
        row |= {"average": name, "budget": budget}
        if keep == "last":  # it has looked at the validation data, and done nothing about it
            row |= {"looks": 0.0, "cost": before + result.steps}
        rows.append(row)
    return rows


def mean_of_two(merge: Merge) -> float:
    """Validation loss of the mean of two fine-tunes, less the mean of their losses, over some
    pairs: below zero in one basin that is convex.
    """
    n, task = len(merge.candidates), merge.task

    def loss(*members: int) -> float:
        beta = sum(averages.candidate(n, k) for k in members) / len(members)
        load_merge(merge.sharding, beta)
        return mean_over(merge.model, task.loss, task.val)

    pairs = [(k, k + 1) for k in range(0, n - 1, 2)][:PAIRS]
    return sum(loss(i, j) - (loss(i) + loss(j)) / 2 for i, j in pairs) / len(pairs)


# What is shown -----------------------------------------------------------------------------------


def findings(rows: Rows) -> list[str]:
    """TWA-v per model, as `twa average` has it, against each other average; all of TWA-v against
    greedy soup at each budget; whether the claim holds at a quarter of greedy soup's cost; all by
    task.
    """
    found, names = [], [TwaMethod.parse(text).name for text in TRAINED]
    for task in rows.of("task"):
        mine = rows.where(task=task)
        greedy, cost = mine.mean(method="greedy soup"), mine.mean("cost", method="greedy soup")
        two, members = mine.mean("mean of two"), mine.mean("members")
        found.append(
            f"{task}: the mean of two fine-tunes has a validation loss {abs(two):.4f}"
            f" {'above' if two > 0 else 'below'} the mean of theirs;"
            f" members of greedy soup: {number(members)}"
        )
        ours = {"average": names[0], "budget": BUDGETS[0]}
        others = {name: {"method": name} for name in FIXED}
        others |= {name: {"average": name, "budget": BUDGETS[0]} for name in LEARNED}
        text = "; ".join(f"{name}: {mine.against(ours, theirs)}" for name, theirs in others.items())
        found.append(
            f"{task}: test loss of {names[0]}, {BUDGETS[0]} ({share(mine, ours, cost)} of greedy"
            f" soup's cost), against {text}"
        )
        for budget in BUDGETS:
            parts = [{"average": name, "budget": budget} for name in names]
            text = "; ".join(
                f"{p['average']} ({share(mine, p, cost)} of the cost):"
                f" {mine.against(p, {'method': 'greedy soup'})}"
                for p in parts
            )
            found.append(f"{task}: TWA-v {budget} against greedy soup: {text}")
        short = mine.where(budget="a quarter")
        reached = [name for name in (*names, *LEARNED) if short.mean(average=name) <= greedy]
        found.append(
            f"{task}: at a quarter of greedy soup's cost greedy soup's test loss {greedy:.4f} is"
            f" reached by {', '.join(reached) or 'none'}"
        )
    return found


def share(rows: Rows, wanted: dict, cost: float) -> str:
    """Cost of these rows, as a part of another."""
    return f"{rows.mean('cost', **wanted) / cost:.0%}"


def picture(figure, rows: Rows) -> None:
    """Test loss against cost. Colours are averages; a trained one has a point for each budget."""
    tasks = rows.of("task")
    fixed = dict(zip(FIXED, ("s", "o", "D"), strict=True))
    markers = dict(zip(BUDGETS, ("o", "^", "v"), strict=True))
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        mine = rows.where(task=task)
        for method, marker in fixed.items():
            one = mine.where(method=method)
            style = {"marker": marker, "color": "0.3", "label": method}
            axes.scatter(one.mean("cost"), one.mean(), **style)
        greedy = mine.where(method="greedy soup")
        axes.axhline(greedy.mean(), color="0.7", linestyle=":")
        axes.axvline(SHORT * greedy.mean("cost"), color="0.8", linestyle=":")
        for k, name in enumerate(mine.of("average")):
            for budget in mine.where(average=name).of("budget"):
                one = mine.where(average=name, budget=budget)
                label = name if budget == BUDGETS[0] else None
                style = {"marker": markers[budget], "color": f"C{k}", "label": label}
                axes.scatter(one.mean("cost"), one.mean(), **style)
        axes.set_xscale("log")
        axes.set_xlabel(
            "cost in training steps (triangles: down a quarter of greedy soup's, up from the best)"
        )
        axes.set_ylabel("test loss")
        axes.set_title(task)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
