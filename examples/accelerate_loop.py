"""Accelerate: mixed precision, accumulation, clipping, checkpoints, and any number of processes.

torchrun --nproc_per_node 2 examples/accelerate_loop.py
"""

import torch
import twa
from accelerate import Accelerator
from digits import evaluate, loaders, loss, make_model

torch.manual_seed(0)
accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
data, val, test = loaders()
model = make_model()
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
model, optimizer, train = accelerator.prepare(model, optimizer, data)

recorder = twa.Recorder(model, every=4)
recorder.attach(optimizer)
accelerator.register_for_checkpointing(recorder)

for epoch in range(8):
    for batch in train:
        with accelerator.accumulate(model):
            accelerator.backward(loss(model, batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    raw = evaluate(model, val)
    with recorder.averaged("ema", half_life=12):
        average = evaluate(model, val)
    accelerator.print(f"epoch {epoch:2}: loss {raw:.4f}, of the average {average:.4f}")
accelerator.save_state("accelerate-out/state")  # the recorder is in it

recorder.apply("lawa", last=48)
twa.update_bn(data, accelerator.unwrap_model(model))
accelerator.print(f"test loss of the average: {evaluate(model, test):.4f}")
