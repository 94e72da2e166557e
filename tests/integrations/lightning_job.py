"""A job of Lightning on two ranks: recorded, stopped, continued; DDP, then FSDP2.

Run with a directory, to which each rank writes what it has found.
"""

import sys
from pathlib import Path

import lightning as L
import processes
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from twa.distributed.ranks import DistributedError
from twa.integrations.lightning import RecorderCallback, train_average
from twa.io.errors import TwaError

SCHEME = {"evaluate": "lawa", "last": 12}


def samples():
    g = torch.Generator().manual_seed(5)
    x = torch.randn(64, 6, generator=g)
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())


def make_net():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 13), nn.Tanh(), nn.Linear(13, 2))  # 13: uneven shards


class Module(L.LightningModule):
    def __init__(self, sharded):
        super().__init__()
        self.net, self.sharded = make_net(), sharded

    def configure_model(self):
        if self.sharded:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
            self.sharded = False  # the hook is called once more by every fit

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)
        self.log("val_rank", float(self.global_rank))  # each rank has its own
        if self.trainer.is_global_zero:
            self.log("val_zero", 2.0, rank_zero_only=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


def fit(folder, sharded, epochs, ckpt_path=None, **options):
    """Trains for some epochs of four steps; returns trainer, module and callback."""
    sharding = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    strategy = ModelParallelStrategy(**sharding) if sharded else DDPStrategy()
    callbacks = [ModelCheckpoint(folder / "c", filename="{step}", save_top_k=-1)]
    recorder = RecorderCallback(every=3, **SCHEME, **options) if options else None
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        default_root_dir=folder,
        max_epochs=epochs,
        callbacks=[recorder, *callbacks] if recorder else callbacks,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    module, data = Module(sharded), samples()
    loaders = DataLoader(data, 8), DataLoader(data, 16)
    trainer.fit(module, *loaders, ckpt_path=ckpt_path)
    return trainer, module, recorder


def weights(module):
    """The whole weights, on every rank."""
    parameters = dict(module.net.named_parameters())
    return {
        name: p.full_tensor().detach().clone() if hasattr(p, "full_tensor") else p.detach().clone()
        for name, p in parameters.items()
    }


def error_of(call):
    try:
        call()
    except (TwaError, DistributedError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def job(folder, sharded):
    """What a rank finds of one strategy."""
    trainer, module, recorder = fit(folder / "whole", sharded, 6, path="auto")
    found = {"trained": weights(module), "metrics": dict(trainer.callback_metrics)}
    found["steps"] = recorder.recorder.steps
    recorder.recorder.apply("lawa", last=12)
    found["average"] = weights(module)
    _, module, _ = fit(folder / "without", sharded, 6)
    found["without"] = weights(module)
    fit(folder / "stopped", sharded, 5, path="auto")
    checkpoint = folder / "stopped" / "c" / "step=16.ckpt"  # of 20 steps
    trainer, module, recorder = fit(folder / "stopped", sharded, 6, checkpoint, path="auto")
    found["continued"] = weights(module)
    found["best"] = recorder.load_best(trainer)
    if trainer.is_global_zero:
        trainer.checkpoint_callback.best_model_path = str(folder / "gone.ckpt")
    found["gone"] = error_of(lambda: recorder.load_best(trainer))
    _, _, recorder = fit(folder / "elsewhere", sharded, 6, checkpoint, path="auto")
    found["elsewhere"] = recorder.recorder.steps
    taken = folder / "whole" / "twa"
    found["taken"] = error_of(lambda: fit(folder / "again", sharded, 1, path=taken))
    if sharded:
        found["refused"] = error_of(lambda: fit(folder / "memory", sharded, 1, path=None))
    else:
        options = {"steps": 3, "progress": False, "methods": ["t:tensor:4"]}
        outcome = train_average(trainer, module, recorder.recorder, **options)
        found["winner"] = outcome.winner.val_loss
        trainer.save_checkpoint(folder / "averaged.ckpt", weights_only=True)
        found["averaged"] = weights(module)
    return found, trainer.global_rank


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for kind in ("ddp", "fsdp2"):
        found, rank = job(folder / kind, kind == "fsdp2")
        torch.save(found, folder / f"{kind}_{rank}.pt")
    torch.distributed.barrier()  # rank 1 ends with rank 0, which has started it
    processes.leave_job()
