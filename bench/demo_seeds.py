"""The demo's claim over several seeds: test loss of every method, and who beats whom.

Run: python bench/demo_seeds.py [--seeds 0 1 2]. Writes bench/results/demo_seeds.json and .md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from common import RESULTS, hardware
from twa import demo
from twa.io.tables import markdown_table
from twa.merge.results import START
from twa.merge.settings import TwaMethod

METHODS = ("t:fine:4", "t:tensor:4", "v:tensor:4")
TRAINED = ("TWA-t fine, 4 bits", "TWA-v per tensor, 4 bits")
ANNEALING = "annealing (no average)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    methods = tuple(map(TwaMethod.parse, METHODS))
    losses: dict[str, list[float]] = {}
    fixed: set[str] = set()
    seconds, shares = [], []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            outcome = demo.run(Path(folder), seed, methods=methods)
            seconds.append(time.perf_counter() - start)
        rows = {r.method: r for r in outcome.results}
        ours = rows[TRAINED[0]]
        shares.append((rows[START].looks + ours.looks) / ours.steps)
        for r in [r for r in outcome.results if r.method]:  # the demo's table leaves some out
            losses.setdefault(r.method, []).append(r.test_loss)
            if r.is_average and not r.is_trained:
                fixed.add(r.method)
    header = ["method", *(f"seed {s}" for s in args.seeds), "mean"]
    rows = [
        [name, *(f"{v:.4f}" for v in values), f"{sum(values) / len(values):.4f}"]
        for name, values in losses.items()
    ]
    table = markdown_table([*header, ""], [[*row, ""] for row in rows])
    checks = [below(losses, trained, fixed) for trained in TRAINED]
    pairs = zip(losses[TRAINED[0]], losses[ANNEALING], strict=True)
    above = ", ".join(f"{ours - theirs:+.4f}" for ours, theirs in pairs)
    checks.append(f"{TRAINED[0]}, less annealing of as many steps: {above} (target 0.008)")
    parts = ", ".join(f"{share:.0%}" for share in shares)
    checks.append(f"{TRAINED[0]}: its start and its looks, of its steps: {parts} (target 30 %)")
    checks.append(f"seconds per demo: {', '.join(f'{s:.0f}' for s in seconds)} (target 180)")
    machine = hardware()
    described = ", ".join(f"{key} {value}" for key, value in machine.items())
    lines = ["# Test loss of the demo (nats per character)", "", table, ""]
    text = "\n".join([*lines, *(f"- {c}" for c in checks), "", described, ""])
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "demo_seeds.md").write_text(text)
    found = {"hardware": machine, "seeds": args.seeds, "test_loss": losses, "seconds": seconds}
    (RESULTS / "demo_seeds.json").write_text(json.dumps(found, indent=1) + "\n")


def below(losses: dict[str, list[float]], trained: str, fixed: set[str]) -> str:
    """Whether a trained average is below the best fixed one on every seed."""
    best = [min(values) for values in zip(*(losses[name] for name in fixed), strict=True)]
    margin = [b - own for b, own in zip(best, losses[trained], strict=True)]
    said = "yes" if min(margin) > 0 else "NO"
    by = f"by {min(margin):.4f} to {max(margin):.4f}"
    return f"{trained}: below the best fixed average on every seed: {said} ({by})"


if __name__ == "__main__":
    main()
