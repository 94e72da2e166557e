"""The learning rate of the coefficients: the result against 1/4 to 4 times the rule's.

Heaps are those of bench/claims (head and tail stage, soups) and the demo's; coefficients fine on
training data, per tensor on held-out data for the soups. Every run takes its full number of steps
and keeps the last average. Run: python bench/rate_sensitivity.py [--seeds 2] [--output twa-claims].
Training runs are found in, or go to, the claims' output directory.
Writes bench/results/rate_sensitivity.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import twa
from claims import soup, tail
from claims.head import CANDIDATES, PARTS
from claims.job import Job
from common import RESULTS, hardware
from matplotlib import colormaps
from matplotlib.figure import Figure
from twa import demo
from twa.io.tables import markdown_table
from twa.merge.run import Merge
from twa.merge.settings import Settings, TwaMethod
from twa.rate import learning_rate
from twa.tasks.contract import Task, load_task

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
TARGET = 0.002  # from half the rate to twice the rate


def heaps(seed: int, folder: Path) -> Iterator[tuple[str, Task, twa.Candidates, int, str]]:
    """(name, task, candidates, steps, method) of each heap."""
    job = Job(seed, folder)
    for workload in job.workloads("gpt", "resnet"):
        task = job.task(workload)
        usual = job.usual(workload, task)
        for part in PARTS:
            found = usual.candidates(until=usual.plan.nearest(part), count=CANDIDATES)
            name = f"{workload.label}, stopped at {part:.0%}"
            yield name, task, found, workload.twa_steps, "t:fine:4"
    for workload in job.workloads("gpt", "vgg"):
        task = job.task(workload)
        usual = job.usual(workload, task)
        for schedule, rate in tail.settings(workload.tail_rates):
            made = tail.tail_of(job, workload, task, usual, schedule, rate)
            name = f"{workload.label}, {schedule} {rate:g}"
            yield name, task, made.candidates(), workload.twa_steps, "t:fine:4"
    for make in (soup.gpt, soup.vit):
        s = make(job)
        yield f"soup: {s.label}", s.task, s.candidates, s.steps, "v:tensor:4"
    with tempfile.TemporaryDirectory() as temporary:
        torch.manual_seed(seed)
        task = load_task("chars", seed)
        demo.train(task, Path(temporary), progress=False)
        found = twa.Candidates(Path(temporary) / "*.safetensors")
        yield "demo", task, found, demo.TWA_STEPS, "t:fine:4"


def losses(task: Task, candidates: twa.Candidates, steps: int, text: str, seed: int) -> dict:
    """Validation and test loss by factor of the rate, and the rate."""
    method = TwaMethod.parse(text)
    merge = Merge(
        task, candidates, Settings((), steps, seed=seed, sharding="single", bn_batches=20), False
    )
    start = merge.start()
    rate = learning_rate(merge._subspace(method, start.beta), step=merge.step_length)
    found = {
        "start": start.val_loss,
        "start test": start.test_loss,
        "rate": rate,
        "val": [],
        "test": [],
    }
    for factor in FACTORS:
        merge.settings = replace(merge.settings, lr=rate * factor)
        result = merge.train(method, keep="last", coarsen=False)
        found["val"].append(result.val_loss)
        found["test"].append(result.test_loss)
    return found


def of_seed(seed: int, folder: Path) -> dict[str, dict]:
    torch.set_num_threads(1)
    found = {}
    for name, task, candidates, steps, method in heaps(seed, folder):
        found[name] = losses(task, candidates, steps, method, seed)
        print(seed, name, [round(v, 4) for v in found[name]["val"]], flush=True)
    return found


def table(found: dict[str, dict[str, dict]]) -> str:
    header = ["heap", "seed", "rate", "start", *(f"x {f:g}" for f in FACTORS), "1/2 to 2"]
    rows = []
    for seed, of in found.items():
        for name, r in of.items():
            middle = r["val"][1:4]
            worst = max(middle) - r["val"][2]
            cells = [f"{r['rate']:.4f}", f"{r['start']:.4f}", *(f"{v:.4f}" for v in r["val"])]
            rows.append([name, seed, *cells, f"{worst:+.4f}"])
    return markdown_table(header, rows)


def picture(found: dict[str, dict[str, dict]]) -> Figure:
    """Loss, less that at the rule's rate, against the factor."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    for axes in panels:
        axes.set_prop_cycle(color=colormaps["tab20"].colors)
    for of in found.values():
        for name, r in of.items():
            is_digits = "digits" in name
            axes = panels[int(is_digits)]
            lost = [v - r["val"][2] for v in r["val"]]
            axes.plot(FACTORS, lost, marker="o", markersize=3, label=name)
    for axes, title in zip(panels, ("text", "digits (200 images: noise of .005)"), strict=True):
        axes.axhspan(-TARGET, TARGET, color="0.92")
        axes.axvspan(0.5, 2, color="0.95", zorder=0)
        axes.set_xscale("log", base=2)
        axes.set_title(title)
        axes.set_xlabel("rate, in those of twa.learning_rate")
        axes.legend(fontsize=7)
    panels[0].set_ylim(-0.01, 0.03)
    panels[0].set_ylabel("validation loss, less that at the rule's rate")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2])
    parser.add_argument("--output", type=Path, default=Path("twa-claims"))
    parser.add_argument("--show", action="store_true", help="write table and picture again")
    args = parser.parse_args()
    path = RESULTS / "rate_sensitivity.json"
    if args.show:
        saved = json.loads(path.read_text())
    else:
        with ProcessPoolExecutor(min(2, len(args.seeds))) as pool:
            made = pool.map(of_seed, args.seeds, [args.output] * len(args.seeds))
            saved = {
                "hardware": hardware(),
                "losses": dict(zip(map(str, args.seeds), made, strict=True)),
            }
        path.write_text(json.dumps(saved, indent=1) + "\n")
    found, machine = saved["losses"], saved["hardware"]
    flat = [
        max(r["val"][1:4]) - r["val"][2] <= TARGET for of in found.values() for r in of.values()
    ]
    text = "\n".join(
        [
            "# Validation loss against the rate, in those of the rule",
            "",
            table(found),
            "",
            f"At most {TARGET} worse at half and twice the rate: {sum(flat)} of {len(flat)} heaps.",
            "",
            "![validation loss against rate](rate_sensitivity.png)",
            "",
            ", ".join(f"{key} {value}" for key, value in machine.items()),
            "",
        ]
    )
    print(text)
    (RESULTS / "rate_sensitivity.md").write_text(text)
    picture(found).savefig(RESULTS / "rate_sensitivity.png", dpi=100)


if __name__ == "__main__":
    main()
