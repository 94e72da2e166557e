"""FSDP2: each rank records its shards; averages and trained averages of the sharded model.

torchrun --nproc_per_node 2 examples/fsdp2.py
"""

import torch
import torch.distributed as dist
import twa
from digits import evaluate, loaders, loss, make_model
from torch.distributed.fsdp import fully_shard

dist.init_process_group()
torch.manual_seed(0)
train, val, test = loaders()
model = make_model()
for layer in model:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

recorder = twa.Recorder(model, every=4, path="fsdp2-out/twa")
recorder.attach(optimizer)

for _ in range(8):
    for k, batch in enumerate(train):
        if k % dist.get_world_size() == dist.get_rank():  # this rank's share
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
raw = evaluate(model, val)
with recorder.averaged("ema", half_life=12):
    average = evaluate(model, val)

outcome = twa.average(model, recorder, train, val, loss, test=test, steps=40)
outcome.save("fsdp2-out/", dcp=True)
if dist.get_rank() == 0:
    print(f"loss {raw:.4f}, of the average {average:.4f}")
    print(outcome)
dist.destroy_process_group()
