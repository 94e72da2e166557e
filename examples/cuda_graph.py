"""A CUDA graph: a whole training step of the coefficients, captured once and replayed.

python examples/cuda_graph.py
"""

import torch
import twa
from digits import evaluate, loaders, loss, make_model

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
loader, val, _ = loaders()
train = [[t.to(device) for t in batch] for batch in loader]
model = make_model().to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
recorder = twa.Recorder(model, every=6)
recorder.attach(optimizer)
for batch in train * 6:
    loss(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()

subspace = recorder.subspace(center=recorder.beta("ema", half_life=12))
optimizer = twa.SubspaceOptimizer(subspace, capturable=device == "cuda")
average = twa.IterateAverage(subspace)
inputs = [t.clone() for t in train[0]]  # a graph reads and writes the same memory every time


def step():
    optimizer.zero_grad()
    value = loss(model, inputs)
    value.backward()
    optimizer.step()
    return value.detach()


if device == "cuda":
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is made once is made before the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step()
else:
    print("no GPU: the same steps without a graph")

for batch in train * 4:
    for t, new in zip(inputs, batch, strict=True):
        t.copy_(new)
    graph.replay() if device == "cuda" else step()
    average.update()  # outside: its weight is another one at every step
average.apply()
twa.update_bn(train, model)
print(f"{average.steps} steps, loss of the average: {evaluate(model.cpu(), val):.4f}")
