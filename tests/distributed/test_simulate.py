"""`twa plan --simulate`: what it counts for a rank is what that rank of a real job holds and sends;
formulas agree with it on models of any size.
"""

import pytest
import torch
import torch.distributed as dist
import twa
from conftest import exhaustive, run_python
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from twa.cli.main import main
from twa.distributed.choose import shard_model
from twa.distributed.simulate import simulate
from twa.distributed.traffic import Traffic
from twa.dtensors import local
from twa.io.errors import TwaError
from twa.tasks.gpt import GPT

N = 5
TOKENS = torch.arange(16).view(1, 16)


def gpt():
    """Sizes that no number of ranks divides, a tied weight, and of each kind a small tensor."""
    return GPT(vocabulary=203, context=17, width=20, depth=3, heads=2)


def tensor_parallel(mesh):
    model = gpt()
    for block in model.blocks:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh, plan)
    return model


@pytest.fixture(scope="module")
def heap(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heap")
    for k in range(N):
        torch.manual_seed(k)
        state = gpt().state_dict()
        state.pop("head.weight")
        save_file(state, folder / f"c{k}.safetensors")
    return folder


def real(group, heap, sharding, bits, granularity):
    """What a rank of a real job holds and sends."""
    if sharding == "tensor":
        model, sharding = tensor_parallel(DeviceMesh.from_group(group, "cpu")), "columns"
    else:
        model = gpt()
        if sharding == "columns":
            shard_model(model, group)
    with Traffic() as plain:
        model(TOKENS).sum().backward()
    model.zero_grad()
    s = twa.Subspace.from_candidates(
        model,
        twa.Candidates(f"{heap}/c*"),
        bits=bits,
        granularity=granularity,
        sharding=sharding,
        group=group,
    )
    model(TOKENS).sum().backward()
    with Traffic() as traffic:
        s.project_gradients()
        s.write_weights()
    held = {
        "basis": s.basis.nbytes + s.basis.divisor.nbytes,
        "center": sum(c.nbytes for c in s.center or []),
        "weights": sum(local(p).nbytes for p in model.parameters()),
        "gradients": sum(local(p.grad).nbytes for p in model.parameters()),
    }
    return held, traffic.bytes, plain.bytes


def counted(heap, size, sharding, bits, granularity):
    def make():
        if sharding != "tensor":
            return gpt()
        return tensor_parallel(init_device_mesh("cpu", (size,)))

    found = simulate(make, N, bits, granularity, size).counted
    assert ("replicate" in found) == (sharding != "tensor")
    return found["columns" if sharding == "tensor" else sharding]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "sharding, bits, granularity",
    [
        ("replicate", 4, 128),
        ("replicate", 32, "block"),
        ("rows", 4, "tensor"),
        ("columns", 1, "tensor"),
        ("columns", 32, "model"),
        ("tensor", 4, "tensor"),
    ],
)
def test_counts_are_those_of_real_ranks(ranks, heap, size, sharding, bits, granularity):
    results = ranks.run(size, real, heap, sharding, bits, granularity)
    simulated = counted(heap, size, sharding, bits, granularity)
    assert [c.rank for c in simulated] == [0, size - 1]
    for c in simulated:
        held, ours, model = results[c.rank]
        assert {kind: c.memory[kind] for kind in held} == held
        assert c.payload["twa"] == ours
        if sharding != "tensor":  # whose layers send activations
            assert c.payload["model"] == model
    most = max(sum(held.values()) for held, _, _ in results)
    gathered = simulated[0].memory["gathered"] + simulated[0].memory["buffer"]
    largest = max(c.memory["total"] for c in simulated)
    assert largest == most + gathered or sharding == "rows"


def test_low_memory_holds_a_block_of_gradients():
    found = simulate(gpt, N, 4, "tensor", 4, low_memory=True)
    embedding, block = 203 * 20, sum(p.numel() for p in gpt().blocks[0].parameters())
    replicate, columns = (found.memory(s)["gradients"] / 4 for s in ("replicate", "columns"))
    assert replicate == embedding and columns == block / 4
    assert "rows" not in found.counted


def test_what_cannot_be_simulated():
    with pytest.raises(TwaError, match=r"model: it cannot be made without weights \(NotImpl"):
        simulate(lambda: nn.Linear(3, 4).to("cpu"), N, 4, "tensor", 2)
    with pytest.raises(TwaError, match="expected trainable floating-point parameters"):
        simulate(nn.Identity, N, 4, "tensor", 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(TwaError, match="a process by itself"):
            simulate(gpt, N, 4, "tensor", 2)
    finally:
        dist.destroy_process_group()
    simulate(gpt, N, 4, "tensor", 2)
    assert not dist.is_initialized()


# The command -------------------------------------------------------------------------------------


def table(capsys, *options):
    """Rows of the table, without its header, and the other lines."""
    assert main(["plan", *map(str, options)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return rows[2:], [line for line in lines if line[:1] != "|"]


@pytest.mark.parametrize("shape, ranks", [("64x6", 8), ("2048x8", 512), exhaustive("8192x86", 512)])
def test_formulas_are_within_two_percent(capsys, shape, ranks):
    """From a small model to 7e10 weights, of which no more than names and shapes is ever held."""
    rows, lines = table(capsys, "--simulate", f"gpt:{shape}", "--candidates", 64, "--ranks", ranks)
    names = [row[0] for row in rows]
    assert names.count("simulated") == names.count("formulas are off by") >= 2
    for row in rows:
        if row[0] == "formulas are off by":
            figures = [float(cell.removesuffix(" %")) for cell in row[1:] if cell]
            assert len(figures) >= 7 and all(abs(f) <= 2 for f in figures), row
    assert any(line.startswith(f"Simulated: ranks 0 and {ranks - 1} ") for line in lines)
    if ranks == 512:  # and memory is not that of the model, in a process that has done nothing else
        options = ["plan", "--simulate", f"gpt:{shape}", "--candidates", "64", "--ranks", "512"]
        most = "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss"
        code = f"import resource\nfrom twa.cli.main import main\nmain({options})\nprint({most})"
        assert int(run_python(code).split()[-1]) < 3e6


def test_a_task(capsys, tmp_path):
    """A task's own model, which may be sharded already."""
    (tmp_path / "task.py").write_text(
        "from torch import nn\n"
        "from torch.distributed.device_mesh import init_device_mesh\n"
        "from torch.distributed.fsdp import fully_shard\n"
        "def model():\n"
        "    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))\n"
        "    mesh = init_device_mesh('cpu', (2, 4), mesh_dim_names=('copies', 'shards'))\n"
        "    return fully_shard(model, mesh=mesh)\n"
        "train_data = val_data = lambda: [1]\n"
        "loss = print\n"
    )
    options = ("--simulate", tmp_path / "task.py", "--candidates", 8, "--ranks", 8)
    rows, _ = table(capsys, *options, "--granularity", "tensor")
    found = {row[0]: row for row in rows[-3:]}
    # two copies of four shards: weights are twice what the formula for eight shards says
    assert found["columns"][4] == "4.16 kB" and found["simulated"][4] == "8.32 kB"
    assert found["formulas are off by"][4] == "-50.0 %"
    assert rows[1][0] == "simulated" and rows[1][-1] == "the task shards its model"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--simulate", "gpt:0x4"], "sizes above 0, found 2, width 0, 4 blocks"),
        (["--simulate", "gpt:64x4", "--weight-bytes", "3"], "--weight-bytes 2 or 4"),
        (["--simulate", "gpt:64x4", "--granularity", "100"], "granularity '100'"),
        (["--simulate", "gpt:64x4", "--bits", "5"], "bits: expected one of"),
        (["--simulate", "nothing.py"], "nothing.py"),
        (["--params", "7e9", "--blocks", "0"], "--blocks: expected a number above 0, found 0"),
    ],
)
def test_bad_options(capsys, options, message):
    assert main(["plan", "--candidates", "8", *options]) == 2
    assert message in capsys.readouterr().err
