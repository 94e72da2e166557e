"""RecorderCallback and train_average on two ranks of torchrun, in DistributedDataParallel."""

import pytest

pytest.importorskip("transformers")


import hashlib
import json
import sys
from pathlib import Path

import processes
import tiny_hf
import torch
from tiny_hf import AtStep, callback_of, files, trainer, weights_of
from torch.distributed.fsdp import FullyShardedDataParallel
from twa.distributed.ranks import DistributedError
from twa.integrations.transformers import FOLDER, train_average
from twa.io.errors import TwaError

HERE = Path(__file__).parent
OPTIONS = {
    "ddp_backend": "gloo",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 4,
}
RECORDER = {"every": 3, "evaluate": "uniform"}


def digest(trained):
    found = hashlib.sha256()
    for key, t in sorted(weights_of(trained).items()):
        found.update(key.encode() + t.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def losses(trained, key):
    return {row["step"]: row[key] for row in trained.state.log_history if key in row}


def on_a_rank(folder):
    """What one rank sees, as JSON."""
    torch.set_num_threads(1)
    found = {}
    plain = trainer(folder / "plain", **OPTIONS)
    plain.train()
    found["plain"] = digest(plain)

    recorded = trainer(folder / "recorded", RECORDER, **OPTIONS)
    recorded.train()
    found["recorded"], found["model"] = digest(recorded), type(recorded.model_wrapped).__name__
    found["steps"] = callback_of(recorded).recorder.common_steps()
    found["own"], found["average"] = (
        losses(recorded, "eval_loss"),
        losses(recorded, "eval_avg_loss"),
    )
    with callback_of(recorded).recorder.averaged("uniform"):
        found["at the average"] = recorded.evaluate()["eval_loss"]

    def strike(step):
        if step == 10:
            raise KeyboardInterrupt

    stopped = trainer(folder / "stopped", RECORDER, **OPTIONS)
    stopped.add_callback(AtStep(strike))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    going = trainer(folder / "stopped", RECORDER, **OPTIONS)
    going.train(resume_from_checkpoint=True)
    found["gone on"] = digest(going)
    callback_of(going).recorder.close()
    with pytest.raises((TwaError, DistributedError), match="holds the recording of another run"):
        trainer(folder / "stopped", RECORDER, **OPTIONS).train(
            resume_from_checkpoint=str(folder / "recorded" / "checkpoint-4")
        )

    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_avg_loss"}
    chosen = trainer(folder / "best", RECORDER, **OPTIONS | {"save_steps": 2}, **best)
    chosen.train()
    found["best"] = [digest(chosen), chosen.state.best_metric, chosen.evaluate()["eval_loss"]]

    settings = {"steps": 4, "methods": ["t:tensor:4"], "progress": False}
    outcome = train_average(chosen, folder / "recorded" / FOLDER, **settings)
    assert chosen.args.average_tokens_across_devices  # and not in train_average
    found["trained"] = [digest(chosen), outcome.winner.val_loss, chosen.evaluate()["eval_loss"]]

    wrapped = FullyShardedDataParallel(tiny_hf.model(), device_id=torch.device("cpu"))
    refused = callback_of(trainer(folder / "fsdp", RECORDER, **OPTIONS))
    args, state = refused.trainer.args, refused.trainer.state
    with pytest.raises(TwaError, match="expected fully_shard"):
        refused.on_train_begin(args, state, None, model=wrapped, optimizer=None)
    return found


def test_two_ranks(tmp_path):
    code = f"""
import json, os, sys
from pathlib import Path
sys.path[:0] = [{str(HERE)!r}]
import processes, test_transformers_ddp
found = test_transformers_ddp.on_a_rank(Path({str(tmp_path)!r}))
Path({str(tmp_path)!r}, f"rank_{{os.environ['RANK']}}.json").write_text(json.dumps(found))
processes.leave_job()
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = processes.run([*launch, str(script)], env=processes.environment())
    assert done.returncode == 0, done.stderr
    found, other = (json.loads((tmp_path / f"rank_{k}.json").read_text()) for k in range(2))
    assert found == other
    assert found["model"] == "DistributedDataParallel"
    assert found["plain"] == found["recorded"] == found["gone on"]
    assert found["steps"] == [3, 6, 9, 12]
    assert files(tmp_path / "stopped" / FOLDER) == files(tmp_path / "recorded" / FOLDER)
    assert found["average"].keys() == found["own"].keys()
    assert found["average"]["2"] == found["own"]["2"]
    assert found["average"]["12"] == pytest.approx(found["at the average"], rel=1e-6)
    assert found["average"]["12"] != found["own"]["12"]
    weights, metric, loss = found["best"]
    assert metric == min(found["average"].values()) == pytest.approx(loss, rel=1e-6)
    trained, metric, loss = found["trained"]
    assert trained != weights and metric == pytest.approx(loss, rel=1e-5)
