"""What others that average weights during training do where it can go wrong, and what twa does:
in bfloat16, on FSDP2, when a run goes on from a checkpoint, and when a horizon is chosen after the
training.

    python bench/averaging_peers.py [--save]     --save writes bench/results/averaging_peers.md

It runs in seconds on a CPU. Peers: torch.optim.swa_utils.AveragedModel; timm's ModelEmaV3;
ema-pytorch (`pip install ema-pytorch`), whose PostHocEMA chooses the horizon afterwards, too. Peers
that are not installed are left out.

bfloat16   An EMA of decay .999 that starts at 1, of a bfloat16 weight that is 1.5 for 1000 updates:
           1.5 - .5 * .999^1000 = 1.31616.
FSDP2      Whether the average can be made of a model of `fully_shard`, and is right.
resume     Whether a run that goes on from state_dicts ends with the bits of one that never stopped.
horizon    After a training of 1000 steps an average is asked for that was not planned. Its distance
           from the exact one, which sums all 1000 steps in float64, is a root mean square over
           weights, as a share of that of one step. PostHocEMA has 20 checkpoints of two averages of
           all steps, and makes averages of the power family (sigma_rel). twa makes an EMA of a half
           life of 100 steps, here of the weights at every 50th, 7th and at each step: most of its
           distance is that of averages of fewer points, no error of coding.
bytes      beside the model while training, with weights in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import importlib.util
import io
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm_apart
import torch
import torch.distributed as dist
import twa
from common import publish
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from twa.io.tables import markdown_table

DECAY, UPDATES = 0.999, 1000
STEPS, EVERY, SIGMA = 1000, 50, 0.15


class Peer:
    """A way to average weights during training.

    Attributes:
        name: of it
        memory: beside the model, bytes a weight
    """

    name, memory = "", "4"

    def begin(self, model: nn.Module, decay: float = DECAY) -> Any:
        """The average of a model, before training."""
        raise NotImplementedError

    def update(self, average: Any, model: nn.Module) -> None:
        """After a step."""
        average.update(model)

    def weights(self, average: Any) -> list[Tensor]:
        """The average now."""
        return [p.detach() for p in average.module.parameters()]

    def horizon(self) -> str:
        """How far an average is that was asked for after the training."""
        return "no"


class SwaUtils(Peer):
    name = "swa_utils"

    def begin(self, model, decay=DECAY):
        made = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        made.update_parameters(model)  # the first one copies
        return made

    def update(self, average, model):
        average.update_parameters(model)


class Timm(Peer):
    name = "timm V3"

    def begin(self, model, decay=DECAY):
        from timm.utils import ModelEmaV3

        return ModelEmaV3(model, decay=decay)


class EmaPytorch(Peer):
    """Its EMA; of an average that was not planned its PostHocEMA."""

    name, memory = "ema-pytorch", "4 an average"

    def begin(self, model, decay=DECAY):
        from ema_pytorch import EMA

        options = {"beta": decay, "min_value": decay, "update_every": 1, "update_after_step": -1}
        made = EMA(model, include_online_model=False, **options)
        made.update()  # the first one copies
        return made

    def update(self, average, model):
        average.update()

    def weights(self, average):
        return [p.detach() for p in average.ema_model.parameters()]

    def horizon(self):
        from ema_pytorch import PostHocEMA
        from ema_pytorch.post_hoc_ema import sigma_rel_to_gamma

        gamma, exact = sigma_rel_to_gamma(SIGMA), None
        with tempfile.TemporaryDirectory() as folder:
            average, moves = None, []
            for t, model, before in training():
                if average is None:
                    average = PostHocEMA(
                        model,
                        sigma_rels=(0.05, 0.28),
                        update_every=1,
                        checkpoint_every_num_steps=EVERY,
                        checkpoint_folder=folder,
                    )
                average.update()
                now = flat(model.parameters())
                beta = (1 - 1 / (t + 1)) ** (1 + gamma)
                exact = now.clone() if exact is None else beta * exact + (1 - beta) * now
                moves.append((now - before).square().mean())
            found = average.synthesize_ema_model(sigma_rel=SIGMA)
        stored = 2 * 2 * STEPS // EVERY  # float16
        return f"{share(flat(found.ema_model.parameters()) - exact, moves)} ({stored} bytes)"


class Twa(Peer):
    name = "twa now"

    def begin(self, model, decay=DECAY):
        recorder = twa.Recorder(model, every=1)
        recorder.record(0)
        return recorder

    def update(self, average, model):
        average.step()

    def weights(self, average, decay=DECAY):
        half_life = math.log(0.5) / math.log(decay)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "average.safetensors"
            average.save(path, "ema", half_life=half_life, dtype=torch.float32)
            return list(load_file(path).values())

    def horizon(self):
        return "; ".join(self._horizon(every) for every in (EVERY, 7, 1))

    def _horizon(self, every: int) -> str:
        exact, recorder, moves = None, None, []
        decay = 0.5 ** (1 / 100)
        for _, model, before in training():
            recorder = recorder or twa.Recorder(model, every=every)
            recorder.step()
            now = flat(model.parameters())
            exact = now.clone() if exact is None else decay * exact + (1 - decay) * now
            moves.append((now - before).square().mean())
        recorder.apply("ema", half_life=100)
        stored = (4 / 8 + 1 / 64) * (len(recorder) - 1) + 2
        return f"{share(flat(recorder.model.parameters()) - exact, moves)} ({stored:.0f} bytes)"


def flat(tensors: Any) -> Tensor:
    """All of these as one float64 vector."""
    return torch.cat([t.detach().double().flatten() for t in tensors])


def share(error: Tensor, moves: list[Tensor]) -> str:
    """A root mean square as a share of that of a step."""
    return f"{(error.square().mean() / torch.stack(moves).mean()).sqrt().item():.2g}"


def training() -> Iterator[tuple[int, nn.Module, Tensor]]:
    """A small model, after each step of a noisy regression, and its weights before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
    teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for t in range(1, STEPS + 1):
        before, x = flat(model.parameters()), torch.randn(16, 16)
        with torch.no_grad():
            y = teacher(x) + 0.5 * torch.randn(16, 4)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield t, model, before


# Rows ---------------------------------------------------------------------------------------------


def in_bfloat16(peer: Peer) -> str:
    """The average of a bfloat16 weight, see above."""
    model = nn.Linear(128, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    average = peer.begin(model)
    nn.init.constant_(model.weight, 1.5)
    for _ in range(UPDATES):
        peer.update(average, model)
    return f"{peer.weights(average)[0].float().mean():.5g}"


def on_fsdp2(peer: Peer) -> str:
    """Whether it works for a sharded model."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    fully_shard(model)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            average = peer.begin(model)
            for _ in range(2):
                peer.update(average, model)
            found = peer.weights(average)
    except SystemExit:
        return "ends the process"
    except Exception as error:
        return f"fails: {str(error).split('.')[0].splitlines()[0]}"
    whole = [p.full_tensor() for p in model.parameters()]
    near = all(torch.allclose(a, b, atol=0.01) for a, b in zip(found, whole, strict=True))
    return "yes" if near else "wrong"


def goes_on(peer: Peer) -> str:
    """Whether a run that is stopped and goes on ends as one that was not."""

    def step(model: nn.Module, k: int) -> None:
        with torch.no_grad():
            g = torch.Generator().manual_seed(k)
            for p in model.parameters():
                p += 0.1 * torch.randn(p.shape, generator=g)

    def run(model: nn.Module, average: Any, begin: int, end: int) -> None:
        for k in range(begin, end):
            step(model, k)
            peer.update(average, model)

    first = nn.Linear(8, 8)
    second = copy.deepcopy(first)
    average = peer.begin(first, 0.9)
    run(first, average, 0, 5)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "average": average.state_dict()}, file)
    run(first, average, 5, 10)
    resumed = peer.begin(second, 0.9)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second.load_state_dict(state["model"])
    resumed.load_state_dict(state["average"])
    run(second, resumed, 5, 10)
    pairs = zip(peer.weights(average), peer.weights(resumed), strict=True)
    return "same bits" if all(torch.equal(a, b) for a, b in pairs) else "other bits"


ROWS: tuple[tuple[str, Callable[[Peer], str]], ...] = (
    (f"bfloat16 EMA .999, {UPDATES} updates (exact: 1.3162)", in_bfloat16),
    ("FSDP2", on_fsdp2),
    ("goes on from a state_dict", goes_on),
    ("a horizon chosen afterwards: off by, in steps (stored)", lambda peer: peer.horizon()),
    ("bytes a weight beside the model", lambda peer: peer.memory),
)

#: what twa has, and the test that fails if it has not
TESTED = (
    ("average during training", "yes", "recorder/test_recorder.py::test_averages"),
    (
        "... in transformers' Trainer, TRL, PEFT",
        "yes",
        "integrations/test_transformers.py::test_the_average_is_evaluated",
    ),
    (
        "... in Lightning",
        "yes",
        "integrations/test_lightning.py::test_average_beside_the_weights_as_they_are",
    ),
    (
        "the best by the average",
        "yes",
        "integrations/test_transformers.py::test_the_best_average_is_chosen",
    ),
    ("... in Accelerate", "yes", "integrations/test_accelerate.py"),
    ("... in timm's loop", "yes", "integrations/test_timm.py"),
    ("... in Fabric", "yes", "integrations/test_plain_loops.py::test_fabric"),
    ("... of compiled models", "yes", "integrations/test_plain_loops.py::test_compiled_models"),
    ("horizon after training", "any", "recorder/test_recorder.py::test_averages"),
    ("trained by gradient", "yes", "recorder/test_recorder.py::test_a_subspace_of_its_own_codes"),
    ("half precision", "float32 masters, float32 sums", "recorder/test_recorder.py::test_masters"),
    ("FSDP2", "yes", "integrations/test_fsdp2_recorder.py::test_train_average_and_go_on"),
    ("... through Accelerate", "yes", "integrations/test_accelerate.py::test_two_ranks"),
    ("resume", "same codes", "integrations/test_accelerate.py::test_save_state_and_load_state"),
    ("... through DCP", "same codes", "integrations/test_fsdp2_recorder.py"),
    (
        "evaluation before the first snapshot",
        "of the model, with a warning",
        "integrations/test_plain_loops.py::test_no_average_before_the_first_snapshot",
    ),
    (
        "weights after an evaluation that fails",
        "the same bits",
        "integrations/test_plain_loops.py::test_a_checkpoint_while_an_average_is_in_the_model",
    ),
)


def peers() -> list[Peer]:
    """Those that are installed."""
    found: list[Peer] = [SwaUtils()]
    if timm_apart.is_here():
        timm_apart.prepare()
        found.append(Timm())
    if importlib.util.find_spec("ema_pytorch"):
        found.append(EmaPytorch())
    return [*found, Twa()]


def versions() -> str:
    """Of the peers."""
    found = []
    for name in ("torch", "timm", "ema-pytorch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help="write bench/results/...md")
    args = parser.parse_args()
    every = peers()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rows = [[name, *(run(peer) for peer in every), ""] for name, run in ROWS]
    dist.destroy_process_group()
    lines = [
        "# Averages during training: twa and others",
        "",
        markdown_table(["run here", *(peer.name for peer in every), ""], rows),
        "",
        markdown_table(
            ["", "twa now", "test"],
            [[what, how, test and f"tests/{test}"] for what, how, test in TESTED],
        ),
        "",
        versions(),
    ]
    root = Path(__file__).parents[1] / "tests"
    for _, _, test in TESTED:
        path, _, name = test.partition("::")
        assert not test or f"def {name}" in (root / path).read_text(), test
    publish("averaging_peers", lines, args.save)


if __name__ == "__main__":
    main()
