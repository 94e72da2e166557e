"""Lightning: one callback; the average's losses beside the module's own; then a trained average.

python examples/lightning_module.py
"""

import lightning as L
import torch
from digits import loaders, loss, make_model
from lightning.pytorch.callbacks import ModelCheckpoint
from twa.integrations.lightning import RecorderCallback, train_average


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = make_model()

    def training_step(self, batch, batch_idx):
        return loss(self.model, batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", loss(self.model, batch), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


L.seed_everything(0)
train, val, test = loaders()
module = Digits()
recording = RecorderCallback(every=6, path=None, evaluate="ema", half_life=12)
best = ModelCheckpoint("lightning-out", monitor="avg_val_loss")
trainer = L.Trainer(
    max_epochs=8,
    gradient_clip_val=1.0,
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    callbacks=[recording, best],
)
trainer.fit(module, train, val)
print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})

outcome = train_average(trainer, module, recording.recorder, train=train, val=val)
print(outcome)
trainer.save_checkpoint("lightning-out/averaged.ckpt")  # with the winner's weights
