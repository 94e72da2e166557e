"""Beyond the paper: what Li et al. (arXiv 2205.13104v4) leave to future work, tried at small scale.

LoRA                  adapters averaged, as factors and multiplied into the weights
bfloat16, int8        a run whose weights have few bits, averaged
unlabelled            merge weights trained on images without labels
warm start            what a trained average starts from
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import schemes
from ..average import EMA_DECAYS, LAWA_LENGTHS, Average
from ..candidates import Candidates
from ..data import mix
from ..files import write_safetensors
from ..measure import mean_over, measure_test
from ..methods import Result, TwaMethod
from ..tasks import Task
from .job import Job
from .models.lora import add_lora, merged_lora
from .rows import Rows
from .runs import FORWARD, Plan, measured, round_to_grid
from .workloads import Workload

TITLE = "Beyond the paper: LoRA, weights of few bits, no labels, warm starts"
CLAIM = "Left to future work: TWA where others average today (adapters, low precision), without labels, and from better starts."
METRIC = "accuracy"
FIGURE = (17, 9)
DEFAULT = TwaMethod("t", "fine", 4)
CANDIDATES = 32  # of a run, at most: the last ones

RANK, LORA_RATES, LORA_STEPS, LORA_ORDERS = 4, (2e-3, 5e-3, 1e-2), (80, 240), 2
LORA_METHODS = ("v:model:4", "v:fine:4", "t:fine:4")
SOUPS = ("best single", "uniform", "greedy soup")

STORED: dict[str, dict[str, object]] = {"float32 weights": {}, "bfloat16 weights": {"dtype": "bfloat16"}, "int8 weights": {"grid": 8}}

RATES, ORDERS, EPOCHS = (3e-4, 1e-3, 3e-3, 6e-3), 2, 10
STARTS = ("last", "uniform", "EMA", "LAWA", "greedy soup")
PANELS = {"LoRA": ("LoRA", "LoRA, merged"), "weights of few bits": tuple(STORED), "no labels": ("unlabelled",), "warm start": ("warm start",)}


def run(job: Job) -> Rows:
    (workload,) = job.workloads("gpt")
    if job.data is not None:
        return Rows(stored(job, workload) + warm_start(job, workload))
    (images,) = job.workloads("vit")
    return Rows(lora(job, workload) + stored(job, workload) + unlabelled(job, images) + warm_start(job, workload))


# LoRA -----------------------------------------------------------------------------------------------------------------


def lora(job: Job, workload: Workload) -> Rows:
    """Trained on code, then fine-tuned on the interpreter's help at several rates, lengths and orders of the data, all from the same A. The best of
    them is also trained on for as long as the averages are."""
    task = job.task(workload, domain="help")
    usual = job.usual(workload, job.task(workload))
    pretrained = usual.load(task, usual.last)
    where = {"task": f"{workload.name.upper()}, help", "setting": "LoRA"}
    rows = Rows([job.measure(where, "pretrained", task, pretrained, 0, 0)])

    def adapted() -> nn.Module:
        return add_lora(copy.deepcopy(pretrained), RANK, job.seed)

    runs, folder = [], job.folder / "runs" / workload.name / f"seed-{job.seed}" / "lora-merged"
    folder.mkdir(exist_ok=True)
    orders = [workload.task(mix(job.seed, order), job.device, domain="help") for order in range(LORA_ORDERS)]
    options = list(itertools.product(orders, map(job.scaled, LORA_STEPS), LORA_RATES))
    for k, (data, steps, lr) in enumerate(options):
        runs.append(job.run(workload, f"lora-{k}", data, Plan(steps, steps, lr, "linear", warmup=steps // 20), model=adapted()))
        model = adapted()
        model.load_state_dict(runs[k].state(runs[k].last)["model"])
        write_safetensors(folder / f"lora-{k}.safetensors", merged_lora(model))
    task = replace(task, model=adapted)
    average = job.average(task, Candidates([r.path(r.last) for r in runs]), workload.twa_steps, LORA_METHODS)
    average.run()
    rows += [job.row(where, task, r, average) for r in average.results if r.method in SOUPS or r.coefficients is not None]

    single = next(r for r in average.results if r.method == "best single")
    best = runs[k := int(single.beta.argmax())]
    plan = Plan(workload.twa_steps, workload.twa_steps, best.plan.lr, "linear")
    longer = job.run(workload, f"lora-{k}-longer", options[k][0], plan, start=(best, best.last), model=adapted())
    cost = rows.mean("cost", method="best single") + plan.steps
    rows.append(job.measure(where, "best single, trained on", task, longer.load(task, longer.last), plan.steps, cost))
    merged = Candidates([folder / f"lora-{k}.safetensors" for k in range(len(runs))])
    return rows + job.averages(
        where | {"setting": "LoRA, merged"}, job.task(workload, domain="help"), merged, workload.twa_steps, LORA_METHODS, SOUPS
    )


# Weights of few bits --------------------------------------------------------------------------------------------------


def stored(job: Job, workload: Workload) -> Rows:
    """Half of the usual run at a constant rate, with weights in float32, bfloat16 or on a grid of 8 bits after every step. Averages of bfloat16 files
    are in bfloat16, as `twa average` exports them; those of the grid are in float32, or rounded to it again."""
    task, rows = job.task(workload), Rows()
    for setting, options in STORED.items():
        plan = replace(workload.usual, steps=half_of(workload.usual), schedule="constant", **options)
        trained = job.run(workload, "constant-" + setting.split()[0], of_dtype(task, getattr(torch, plan.dtype)), plan)
        average = job.average(task, trained.candidates(count=CANDIDATES), workload.twa_steps)
        n, where = len(average.candidates), {"task": workload.label, "setting": setting}
        options = {
            "last": [(schemes.candidate(n, -1), "")],
            "uniform": [(schemes.uniform(n), "")],
            "EMA": [(schemes.ema(n, d), f"decay {d}") for d in EMA_DECAYS],
            "LAWA": [(schemes.lawa(n, k), f"last {k}") for k in lengths(n)],
        }
        for name, betas in options.items():
            rows += stored_rows(job, where, task, chosen(average, name, betas), average, plan.grid)
        rows += stored_rows(job, where, task, average.train(DEFAULT), average, plan.grid)
    return rows


def stored_rows(job: Job, where: dict, task: Task, result: Result, average: Average, grid: int) -> list[dict]:
    """The result that the model is at; and the same rounded, if it is an average of weights on a grid."""
    row = job.row(where, task, result, average)
    if not grid or result.method == "last":
        return [row]
    round_to_grid(average.model, grid)
    average._settle()
    return [row, row | {"method": f"{result.method}, rounded to int{grid}"} | measured(task, average.model)]


def half_of(plan: Plan) -> int:
    """Steps, with a checkpoint after the last."""
    return max(1, plan.steps // 2 // plan.every) * plan.every


def of_dtype(task: Task, dtype: torch.dtype) -> Task:
    """The same for a model of this dtype: so are floats in its batches."""

    def cast(batch: object) -> object:
        if isinstance(batch, Tensor):
            return batch.to(dtype) if batch.is_floating_point() else batch
        return type(batch)(map(cast, batch)) if isinstance(batch, list | tuple) else batch

    return replace(task, loss=lambda model, batch: task.loss(model, cast(batch)))


# Without labels -------------------------------------------------------------------------------------------------------


def by_labels(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Cross-entropy in nats; batch: images, labels, the experts' mean prediction (b, classes)."""
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def by_entropy(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean entropy of the predictions in nats."""
    log_p = model(batch[0]).float().log_softmax(1)  # (b, classes)
    return -(log_p.exp() * log_p).sum(1).mean()


def by_experts(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """KL divergence of the predictions from the experts' in nats."""
    return F.kl_div(model(batch[0]).float().log_softmax(1), batch[2], reduction="batchmean")


OBJECTIVES = {"labels": by_labels, "entropy": by_entropy, "experts": by_experts}
UNLABELLED = {"model": ("v:model:4", 1), "fine": ("v:fine:4", 1), "fine, 10 times the steps": ("v:fine:4", 10)}


def unlabelled(job: Job, workload: Workload) -> Rows:
    """Fine-tunes from the middle of the usual run, with merge weights from the uniform soup on. An objective trains them on the held-out images and
    chooses between looks on the validation images; only cross-entropy sees labels of the three. Best single and greedy soup are chosen by labels.

    val, test   of the rows: cross-entropy, whatever the objective
    entropy     mean of the predictions' on test images, in nats; share: of those images, that the most frequent predicted class has
    """
    task = job.task(workload)
    usual = job.usual(workload, task)
    middle, epoch = round(usual.plan.steps / 2 / usual.plan.every) * usual.plan.every, usual.plan.every
    runs = []
    for k, (order, lr) in enumerate(itertools.product(range(ORDERS), RATES)):
        plan = replace(usual.plan, steps=EPOCHS * epoch, every=EPOCHS * epoch, lr=lr, schedule="linear", warmup=epoch)
        data = workload.task(mix(job.seed, order), job.device)
        runs.append(job.run(workload, f"unlabelled-{k}", data, plan, start=(usual, middle), optimizer_state=False))
    where, rows = {"task": workload.label, "setting": "unlabelled"}, Rows()
    candidates = Candidates([r.path(r.last) for r in runs])

    average = job.average(task, candidates, workload.twa_steps)
    average.baselines()
    for result in [r for r in average.results if r.method in SOUPS]:
        average._load(result.beta)
        name = result.method if result.method == "uniform" else f"{result.method} (by labels)"
        rows.append(job.row(where, task, result, average, name) | confidence(average.model, task))

    experts = [r.load(task, r.last).eval() for r in runs]
    data = {name: with_experts(getattr(task, name), experts) for name in ("heldout", "val")}
    seen = sum(len(labels) for batches in data.values() for _, labels, _ in batches)
    batch = len(next(iter(task.train))[1])
    for (label, (method, factor)), (name, loss) in itertools.product(UNLABELLED.items(), OBJECTIVES.items()):
        average = job.average(replace(task, loss=loss, test=None, metric=None, **data), candidates, factor * workload.twa_steps)
        result = average.train(TwaMethod.parse(method), start=schemes.uniform(len(candidates)), start_name="uniform")
        row = job.row(where, task, result, average, f"TWA-v {label}, {name}") | measured(task, average.model) | confidence(average.model, task)
        row["cost"] += FORWARD * len(experts) * seen / batch if name == "experts" else 0
        rows.append(row | {"objective": result.val_loss, "objective at start": result.val_curve[0][1]})
    return rows


@torch.no_grad()
def with_experts(batches: Iterable, experts: list[nn.Module]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Images, labels and the models' mean prediction."""
    return [(images, labels, torch.stack([m(images).softmax(1) for m in experts]).mean(0)) for images, labels in batches]


@torch.no_grad()
def confidence(model: nn.Module, task: Task) -> dict[str, float]:
    """Of the predictions on test data: their mean entropy in nats, and how much of the data the most frequent class gets."""
    entropy = mean_over(model, by_entropy, task.test)
    model.eval()
    classes = torch.cat([model(images).argmax(1) for images, _ in task.test])
    return {"entropy": entropy, "share": classes.bincount().max().item() / len(classes)}


# Warm start -----------------------------------------------------------------------------------------------------------


def warm_start(job: Job, workload: Workload) -> Rows:
    """The same training from different fixed averages of the first half of the usual run."""
    task = job.task(workload)
    candidates = job.usual(workload, task).candidates(until=half_of(workload.usual), count=CANDIDATES)
    average = job.average(task, candidates, workload.twa_steps)
    average.baselines()
    n = len(candidates)
    for name, decay in (("WSM, 1-sqrt", "sqrt"), ("WSM, cosine", "cosine")):
        chosen(average, name, [(schemes.wsm(n, k, decay), f"last {k}") for k in lengths(n)])
    where, rows = {"task": workload.label, "setting": "warm start"}, Rows()
    for start in [r for r in average.results if r.method in STARTS or r.method.startswith("WSM")]:
        result = average.train(DEFAULT, start=start.beta, start_name=f"{start.method} {start.note}")
        name = "LAWA (WSM, linear)" if start.method == "LAWA" else start.method
        rows += [job.row(where, task, start, average, name), job.row(where, task, result, average, f"TWA from {name}")]
    return rows


def chosen(average: Average, name: str, options: Sequence[tuple[Tensor, str]]) -> Result:
    """The fixed average, (merge weights, note), with the lowest validation loss, added to the results; the model is at it."""
    losses = []
    for beta, _ in options:
        average._load(beta)
        losses.append(average._validation_loss())
    loss, (beta, note) = min(zip(losses, options, strict=True), key=lambda pair: pair[0])
    if len(options) > 1:
        average._load(beta)
    result = Result(name, int((beta != 0).sum()), 0, 0.0, 0, loss, note=note, beta=beta, evaluations=len(options))
    measure_test(result, average.model, average.task)
    average.results.append(result)
    return result


def lengths(n: int) -> list[int]:
    """Of what LAWA and WSM take from n candidates."""
    return [k for k in LAWA_LENGTHS if k < n] or [1]


# What comes of it -----------------------------------------------------------------------------------------------------


def findings(rows: Rows) -> list[str]:
    found = []
    for task in rows.of("task"):
        mine = rows.where(task=task)
        for setting in mine.of("setting"):
            part = mine.where(setting=setting)
            if setting.startswith("LoRA"):
                found.append(f"{setting}: {_lora(part)}")
            elif setting in STORED:
                found.append(f"{task}, {setting}: {_stored(part, mine)}")
            elif setting == "unlabelled":
                found += [f"{task}, {setting}: {text}" for text in _unlabelled(part)]
            else:
                found.append(f"{task}, {setting}: {_warm(part)}")
    if not any(setting in ("LoRA", "unlabelled") for setting in rows.of("setting")):
        found.append("LoRA and unlabelled: left out, they need the built-in data (run without --data)")
    return found


def _best(rows: Rows, names: Iterable[str]) -> str:
    """Of these methods the one with the lowest mean test loss."""
    return min((n for n in names if rows.where(method=n)), key=lambda n: rows.mean(method=n))


def _trained(rows: Rows) -> list[str]:
    return [m for m in rows.of("method") if m.startswith("TWA")]


def _listed(rows: Rows, names: Iterable[str]) -> str:
    return ", ".join(f"{name} {rows.mean(method=name):.4f}" for name in names if rows.where(method=name))


def _against(rows: Rows, ours: str, theirs: str) -> str:
    return f"{ours} against {theirs}: {rows.against({'method': ours}, {'method': theirs})}"


def _lora(rows: Rows) -> str:
    twa, fixed = _best(rows, _trained(rows)), _best(rows, SOUPS)
    longer = "best single, trained on"
    text = f"test loss of {_listed(rows, ('pretrained', *SOUPS, longer, twa))}; {_against(rows, twa, fixed)}"
    return f"{text}; {_against(rows, twa, longer)}" if rows.where(method=longer) else text


def _stored(rows: Rows, all_rows: Rows) -> str:
    (twa, *rounded), fixed = _trained(rows), _best(rows, ("uniform", "EMA", "LAWA"))
    text = f"test loss of {_listed(rows, ('last', fixed, twa))}; {_against(rows, twa, fixed)}"
    if rounded:
        best = _best(rows, [m for m in rows.of("method") if "rounded" in m])
        text += f"; rounded to the grid again, the best is {_listed(rows, [best])}; {_against(rows, best, 'last')}"
    whole = all_rows.where(setting="float32 weights")
    if not whole or rows[0]["setting"] == "float32 weights":
        return text
    lost = ", ".join(f"{rows.mean(method=m) - whole.mean(method=m):+.4f} {m}" for m in ("last", fixed, twa))
    return f"{text}; against float32 weights, same method: {lost}"


def _unlabelled(rows: Rows) -> list[str]:
    found = [f"test loss of {_listed(rows, [m for m in rows.of('method') if not m.startswith('TWA')])}"]
    for label in UNLABELLED:
        found.append("; ".join(_against(rows, f"TWA-v {label}, {name}", "uniform") for name in OBJECTIVES))
    *_, longest = UNLABELLED
    before, after = ([rows.mean(key, method=m) for key in ("entropy", "share", "metric")] for m in ("uniform", f"TWA-v {longest}, entropy"))
    said = "entropy of the predictions {:.3f} nats, after {} {:.3f}; share of the most frequent class {:.1%} and {:.1%}, accuracy {:.1%} and {:.1%}"
    found.append(said.format(before[0], f"TWA-v {longest}, entropy", after[0], before[1], after[1], before[2], after[2]))
    return found


def _warm(rows: Rows) -> str:
    def apart(names: list[str]) -> tuple[str, str, str]:
        first, *_, last = sorted(names, key=lambda m: rows.mean(method=m))
        low, high = rows.mean(method=first), rows.mean(method=last)
        return first, last, f"{high - low:.4f} apart, from {low:.4f} ({first}) to {high:.4f} ({last})"

    trained = _trained(rows)
    best, worst, after = apart(trained)
    *_, before = apart([m.removeprefix("TWA from ") for m in trained])
    return f"starts are {before}; after TWA {after}; {_against(rows, best, worst)}; {_against(rows, best, 'TWA from LAWA (WSM, linear)')}"


def picture(figure, rows: Rows) -> None:
    """Test loss of every method; a panel for each part."""
    panels = {title: settings for title, settings in PANELS.items() if rows.where(setting=settings)}
    for axes, (title, settings) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        groups = [(s, m) for s in settings for m in rows.where(setting=s).of("method")]
        means = [rows.mean(setting=s, method=m) for s, m in groups]
        colours = ["tab:blue" if m.startswith("TWA") else "0.7" for _, m in groups]
        axes.barh(range(len(groups)), means, xerr=[rows.spread(setting=s, method=m) for s, m in groups], color=colours, ecolor="0.3")
        axes.set_yticks(range(len(groups)), [m if len(settings) == 1 else f"{m} · {s.split()[-1 if ',' in s else 0]}" for s, m in groups], fontsize=7)
        low, high = min(means), max(means)
        axes.set_xlim(max(0.0, low - 0.2 * (high - low) - 1e-3), high + 0.1 * (high - low) + 1e-3)  # differences are small: bars do not start at 0
        axes.invert_yaxis()
        axes.set_xlabel("test loss")
        axes.set_title(title)
