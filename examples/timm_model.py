"""timm: its model, optimizer and schedule; the recorder in the place of ModelEmaV3.

python examples/timm_model.py
"""

import timm
import torch
import twa
from digits import evaluate, loaders
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

torch.manual_seed(0)
train, val, test = loaders()
model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05)
schedule = CosineLRScheduler(optimizer, t_initial=5, warmup_t=1)


def loss(model, batch):
    images = nn.functional.interpolate(batch[0].view(-1, 1, 8, 8), 16)
    return nn.functional.cross_entropy(model(images), batch[1])


recorder = twa.Recorder(model, every=4, path="timm-out/twa")
recorder.attach(optimizer)

for epoch in range(5):
    for batch in train:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    schedule.step(epoch + 1)
    raw = evaluate(model, val, loss)
    with recorder.averaged("ema", half_life=12):
        twa.update_bn(train, model, loss, max_batches=8)  # of the average alone
        print(f"epoch {epoch}: loss {raw:.4f}, of the average {evaluate(model, val, loss):.4f}")

recorder.apply("ema", half_life=12)
twa.update_bn(train, model, loss)
print(f"test loss of the average: {evaluate(model, test, loss):.4f}")
torch.save(model.state_dict(), "timm-out/averaged.pt")  # timm.create_model(checkpoint_path=...)
