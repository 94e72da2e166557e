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
from twa.cli import demo
from twa.merge.report import markdown_table

FIXED = ("last", "best single", "uniform", "EMA", "LAWA", "greedy soup")
TRAINED = ("TWA-t fine, 4 bits", "TWA-v per model, 4 bits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    losses: dict[str, list[float]] = {}
    seconds = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            outcome, _, _ = demo.run(Path(folder), seed)
            seconds.append(time.perf_counter() - start)
        for r in outcome.results:
            losses.setdefault(r.method, []).append(r.test_loss)
    header = ["method", *(f"seed {s}" for s in args.seeds), "mean"]
    rows = [
        [name, *(f"{v:.4f}" for v in values), f"{sum(values) / len(values):.4f}"]
        for name, values in losses.items()
    ]
    table = markdown_table([*header, ""], [[*row, ""] for row in rows])
    checks = []
    for trained in TRAINED:
        margin = [
            min(losses[f][k] for f in FIXED) - losses[trained][k] for k in range(len(args.seeds))
        ]
        checks.append(
            f"{trained}: below the best fixed average on every seed:"
            f" {'yes' if min(margin) > 0 else 'NO'} (by {min(margin):.4f} to {max(margin):.4f})"
        )
    gaps = [
        abs(a - b)
        for name in losses
        if "4 bits" in name and name.replace("4 bits", "float32") in losses
        for a, b in zip(losses[name], losses[name.replace("4 bits", "float32")], strict=True)
    ]
    checks.append(f"largest difference between 4 bits and float32: {max(gaps):.4f} (target 0.005)")
    checks.append(f"seconds per demo: {', '.join(f'{s:.0f}' for s in seconds)} (target 180)")
    machine = hardware()
    described = ", ".join(f"{key} {value}" for key, value in machine.items())
    text = "\n".join(
        [
            "# Test loss of the demo (nats per character)",
            "",
            table,
            "",
            *(f"- {c}" for c in checks),
            "",
            described,
            "",
        ]
    )
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "demo_seeds.md").write_text(text)
    (RESULTS / "demo_seeds.json").write_text(
        json.dumps(
            {"hardware": machine, "seeds": args.seeds, "test_loss": losses, "seconds": seconds},
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
