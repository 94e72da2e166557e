"""Whether an installed twa works: run in an empty folder, with `python -I smoke.py`.

It imports nothing of this repository but what is installed, and prints one line.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch


def require(holds: bool, what: str) -> None:
    """Ends with a line if something does not hold."""
    if not holds:
        sys.exit(f"smoke: {what}")


def kernels() -> None:
    """The native module is there, and gives the reference's bits or sums."""
    import twa_kernels as tk

    require(tk.registry.default_backend("project", "cpu") == "cpp", "no native module")
    torch.manual_seed(0)
    shapes = [(33, 100), (129,), ()]
    center, gradient = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    rows = [torch.randn(5, *shape) for shape in shapes]
    for bits in (8, 4, 3, 2, 1):
        basis = tk.pack(rows, bits, center)
        x = tk.project(basis, gradient, backend="reference")
        weights = tk.reconstruct(basis, x, center, backend="reference")
        pairs = [(tk.project(basis, gradient), x)]
        pairs += zip(tk.reconstruct(basis, x, center), weights, strict=True)
        for found, wanted in pairs:
            error = ((found - wanted).abs().max() / wanted.abs().max()).item()
            require(error < 1e-4, f"off by {error} at {bits} bits")


def trainer() -> None:
    """Files are read, averaged and trained; the output is read again."""
    import twa

    torch.manual_seed(0)
    model = torch.nn.Linear(8, 3)
    for k in range(4):
        state = {
            name: p.detach() + 0.1 * torch.randn_like(p) for name, p in model.named_parameters()
        }
        torch.save(state, f"step_{k}.pt")
    subspace = twa.Subspace.from_candidates(model, twa.Candidates("step_*.pt"))
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.1)
    inputs = torch.randn(64, 8)
    target = inputs @ torch.randn(8, 3)
    losses = []
    for _ in range(10):
        loss = torch.nn.functional.mse_loss(model(inputs), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    require(losses[-1] < losses[0], f"the loss does not fall: {losses}")
    subspace.save("out")
    require(Path("out/averaged.safetensors").is_file(), "no out/averaged.safetensors")


def commands() -> None:
    """The commands run, and agree on the version with what is installed."""
    from importlib.metadata import version

    import twa

    import twa_kernels

    said = version("trainable-weight-averaging")
    require(twa.__version__ == twa_kernels.__version__ == said, "versions differ")
    folder = Path(sys.executable).parent
    for command in (
        [folder / "twa", "--version"],
        [sys.executable, "-I", "-m", "twa_kernels"],
        [folder / "twa", "merge", "--scheme", "uniform", "-o", "merged", "step_*.pt"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        require(done.returncode == 0, f"{command}: {done.stdout[-500:]} {done.stderr[-500:]}")
        if "merge" not in command:
            require(said in done.stdout, f"{command} does not say {said}: {done.stdout[:200]}")


kernels()
trainer()
commands()
import numpy  # noqa: E402
import twa  # noqa: E402

print(
    json.dumps(
        {
            "torch": torch.__version__,
            "torch from": torch.__file__,
            "numpy": numpy.__version__,
            "twa": twa.__version__,
            "twa from": twa.__file__,
        }
    )
)
