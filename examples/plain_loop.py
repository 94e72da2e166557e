"""A plain PyTorch loop: record it, look at the average on the way, train the average at the end.

python examples/plain_loop.py
"""

import torch
import twa
from digits import evaluate, loaders, loss, make_model

torch.manual_seed(0)
train, val, test = loaders()
model = make_model()
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

recorder = twa.Recorder(model, every=6)  # path="run/twa" keeps it in files
recorder.attach(optimizer)

for epoch in range(8):
    for batch in train:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    raw = evaluate(model, val)
    with recorder.averaged("ema", half_life=12):
        print(f"epoch {epoch:2}: loss {raw:.4f}, of the average {evaluate(model, val):.4f}")

outcome = twa.average(model, recorder, train, val, loss, test=test)
print(outcome)  # the model is at the winner
outcome.save("plain-loop-out/")
