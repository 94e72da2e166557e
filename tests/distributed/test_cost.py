"""`twa plan`: its formulas against values worked out by hand, against what the placements do, and
against a simulated ring.
"""

import math
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import twa
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from twa.cli.main import main
from twa.cli.plan import quantity
from twa.distributed import cost
from twa.distributed.cost import SHARDINGS, Job
from twa.distributed.rows import RowsSharding
from twa.distributed.traffic import Traffic

import twa_kernels as tk

#: 1e9 weights in bfloat16, 16 candidates at 4 bits (a row is 0.5078125 GB), 10 segments, 4 ranks
JOB = Job(
    params=1e9,
    candidates=16,
    bits=4,
    segments=10,
    ranks=4,
    weight_bytes=2,
)
#: n / K leaves a remainder: the first rank holds 2 of 7 rows, the others at most 3
UNEVEN = Job(
    params=1000,
    candidates=7,
    bits=32,
    segments=1,
    ranks=3,
    weight_bytes=4,
)

#: of JOB, beside the rows: 4 bytes a tile; 12 for each row and segment; with columns a quarter of
#: the tiles
SMALL, SHARE = 31.25e6 + 1920, 31.25e6 / 4 + 1920

MEMORY = [  # basis, center, weights, gradients, gathered, buffer
    (JOB, "replicate", (8.125e9 + SMALL, 4e9, 2e9, 2e9, 0, 0), 16.125e9 + SMALL),
    (
        JOB,
        "rows",
        (2.03125e9 + 31.25e6 + 480, 4e9, 2e9, 2e9, 0, 4e9),
        14.03125e9 + 31.25e6 + 480,
    ),
    (
        JOB,
        "columns",
        (2.03125e9 + SHARE, 1e9, 0.5e9, 0.5e9, 0.375e9, 0),
        4.40625e9 + SHARE,
    ),
    (
        replace(JOB, root_share=0.5),  # two blocks' weights and gradients, and the root's
        "columns",
        (2.03125e9 + SHARE, 1e9, 0.5e9, 0.5e9, 0.25e9 + 2e9, 0),
        6.28125e9 + SHARE,
    ),
    (
        replace(JOB, low_memory=True),
        "replicate",
        (8.125e9 + SMALL, 4e9, 2e9, 0.0625e9, 0, 0),
        14.1875e9 + SMALL,
    ),
    (
        replace(JOB, low_memory=True, block_share=0.5),
        "columns",
        (2.03125e9 + SHARE, 1e9, 0.5e9, 0.25e9, 6e9, 0),
        9.78125e9 + SHARE,
    ),
    (UNEVEN, "replicate", (28056, 4000, 4000, 4000, 0, 0), 40056),
    (UNEVEN, "rows", (8016, 4000, 4000, 4000, 0, 4000), 24016),
    (
        replace(UNEVEN, bits=1, ranks=2),
        "columns",
        (7 * 66.40625 + 15.625 + 84, 2000, 2000, 2000, 750, 0),
        7314.46875,
    ),
]


def test_storage_host(capsys):
    """Two blocks of 64 MiB on the device; a step reads the basis twice and the center once."""
    job = replace(JOB, storage="host")
    for sharding in SHARDINGS:
        found, on_device = cost.memory(job, sharding), cost.memory(JOB, sharding)
        basis, center = on_device["basis"], on_device["center"]
        assert (found["basis"], found["center"]) == (2**27, 0)
        rest = on_device["total"] - basis - center
        assert found["total"] == pytest.approx(rest + 2**27, rel=1e-12)
        assert cost.kept_on_host(job, sharding) == pytest.approx(basis + center + 2**27, rel=1e-12)
        assert cost.streamed(job, sharding) == pytest.approx(2 * basis + center, rel=1e-12)
        assert cost.building(job, sharding) == found["weights"]
    words = "--params 1e9 --candidates 16 --segments 10 --ranks 4 --storage host"
    options = words.split()
    assert main(["plan", *options]) == 0
    text = capsys.readouterr().out
    assert "columns 3.17 GB; with replicate the ranks of a host share them. A step copies" in text
    assert "replicate 20.3 GB, rows 8.13 GB, columns 5.08 GB." in text
    assert main(["plan", *options, "--bits", "32"]) == 2
    assert "expected packed bits" in capsys.readouterr().err


@pytest.mark.parametrize("job, sharding, parts, total", MEMORY)
def test_memory(job, sharding, parts, total):
    names = ("basis", "center", "weights", "gradients", "gathered", "buffer")
    assert cost.memory(job, sharding) == pytest.approx(
        dict(zip(names, parts, strict=True)) | {"total": total}, rel=1e-12
    )


SMALL = 1e9 / 32 + 12 * 16 * 10  # segments of JOB's tiles; scale and divisor of each row's segments


@pytest.mark.parametrize(
    "job, sharding, expected",
    [  # P and the center once; of each rank weights, gradients and what is gathered or summed
        (JOB, "replicate", 8.125e9 + SMALL + 4e9 + 4 * 4e9),
        (JOB, "rows", 8.125e9 + SMALL + 4e9 + 4 * 8e9),
        (JOB, "columns", 8.125e9 + SMALL + 4e9 + 4 * 1.375e9),
        (UNEVEN, "replicate", 3 * 40056),  # dense, and not shared
    ],
)
def test_memory_of_a_host(job, sharding, expected):
    assert cost.host_memory(job, sharding) == pytest.approx(expected, rel=1e-12)


def test_ranks_that_share_hold_a_share():
    ours, alone = (cost.memory(replace(JOB, sharers=s), "replicate") for s in (4, 1))
    shared = {"basis": alone["basis"] / 4, "center": alone["center"] / 4}
    saved = 0.75 * (alone["basis"] + alone["center"])
    assert ours == alone | shared | {"total": alone["total"] - saved}
    assert 4 * ours["total"] == cost.host_memory(JOB, "replicate")
    for job, sharding in [(JOB, "columns"), (JOB, "rows"), (replace(JOB, bits=32), "replicate")]:
        assert cost.memory(replace(job, sharers=4), sharding) == cost.memory(job, sharding)


@pytest.mark.parametrize(
    "job, sharding, expected",
    [  # basis, center, weights; 2 bytes of a scale; a block and half of one
        (JOB, "replicate", 8.125e9 + SMALL + 4e9 + 2e9 + 16e9 * 2 / 128),
        (JOB, "rows", 2.03125e9 + 31.25e6 + 480 + 4e9 + 2e9 + 4e9 * 2 / 128),
        (JOB, "columns", 2.03125e9 + SHARE + 1e9 + 0.5e9 + 4e9 * 2 / 128),
        (UNEVEN, "replicate", 28056 + 4000 + 4000),
    ],
)
def test_memory_while_the_basis_is_built(job, sharding, expected):
    assert cost.building(job, sharding) == pytest.approx(expected + 96 * 2**20, rel=1e-12)


STEP = [  # payload and sent (ours, FSDP's)
    (JOB, "replicate", (648, 0), (972, 0)),
    (JOB, "rows", (8e9 + 648, 0), (12e9 + 972, 0)),
    (JOB, "columns", (648, 6e9), (972, 4.5e9)),
    (UNEVEN, "replicate", (36, 0), (48, 0)),
    (UNEVEN, "rows", (8036, 0), (8036 * 4 / 3, 0)),
    (replace(UNEVEN, ranks=1), "replicate", (36, 0), (0, 0)),
    (replace(UNEVEN, ranks=8, block_share=0.5), "columns", (36, 12000), (63, 10500)),
]


@pytest.mark.parametrize("job, sharding, payload, sent", STEP)
def test_step(job, sharding, payload, sent):
    assert tuple(cost.payload(job, sharding).values()) == pytest.approx(payload, rel=1e-12)
    assert tuple(cost.sent(job, sharding).values()) == pytest.approx(sent, rel=1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ring(ranks):
    """A simulated ring: in each hop every rank sends one of K chunks to the next; first sums, then
    copies. Counts what a rank sends.
    """
    chunks = torch.randn(ranks, ranks, dtype=torch.float64)  # (rank, chunk)
    total, sent = chunks.sum(0), 0
    for hop in range(2 * (ranks - 1)):
        before = chunks.clone()
        for rank in range(ranks):
            chunk, to = (
                (
                    (rank - hop) % ranks
                    if hop < ranks - 1
                    else (rank + 1 - (hop - ranks + 1)) % ranks
                ),
                (rank + 1) % ranks,
            )
            chunks[to, chunk] = before[rank, chunk] + (before[to, chunk] if hop < ranks - 1 else 0)
        sent += 1
    torch.testing.assert_close(chunks, total.expand(ranks, ranks))
    job = replace(JOB, ranks=ranks)
    assert cost.sent(job, "replicate")["twa"] == pytest.approx(
        sent / ranks * cost.payload(job, "replicate")["twa"]
    )
    # the first half is a reduce-scatter, the second an all-gather
    assert cost.sent(job, "columns")["model"] == pytest.approx(
        sent / 2 / ranks * cost.payload(job, "columns")["model"]
    )


@pytest.mark.parametrize("bits", [32, 8, 1])
@pytest.mark.parametrize("candidates, ranks", [(1, 1), (7, 3), (8, 8), (30, 8), (64, 5)])
def test_rows_counts_the_most_loaded_rank(bits, candidates, ranks):
    job = Job(params=1000, candidates=candidates, bits=bits, segments=1, ranks=ranks)
    loads, row = [], 8 + 1000 * (4 if bits == 32 else bits / 8 + 1 / 128)
    tiles = 0 if bits == 32 else 4000 / 128
    row += 4 * (bits != 32)
    for rank in range(ranks):
        place = SimpleNamespace(ranks=SimpleNamespace(rank=rank, world_size=ranks))
        mine = RowsSharding.local_rows(place, candidates)
        loads.append((mine.stop - mine.start) * row + tiles + 4000 * (rank == 0))
    held = cost.memory(job, "rows")
    # with one row more than rank 0, a dense one, it is the divisor of a row that is more
    assert held["basis"] + held["center"] == pytest.approx(max(loads), abs=8)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_basis_bytes_are_those_of_a_packed_basis(bits):
    basis = tk.pack([torch.randn(6, 1280, generator=torch.Generator().manual_seed(0))], bits)
    job = Job(params=1280, candidates=6, bits=bits, segments=1, ranks=1)
    assert basis.nbytes + basis.divisor.nbytes == cost.basis_bytes(job, "replicate")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def group():
    """A process group of this process alone; messages have the sizes of any number of ranks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_payload_is_what_a_step_hands_to_collectives(group, tmp_path, sharding):
    for k in range(3):
        torch.manual_seed(k)
        save_file(Net().state_dict(), tmp_path / f"{k}.safetensors")
    model = Net()
    if sharding == "columns":
        for part in (*model.blocks, model):
            fully_shard(part, mesh=DeviceMesh.from_group(group, "cpu"))
    subspace = twa.Subspace.from_candidates(
        model, twa.Candidates(tmp_path / "*.safetensors"), sharding=sharding, group=group
    )
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.1)
    model(torch.ones(4, 8)).square().sum().backward()
    with Traffic() as traffic:
        optimizer.step()
    job = Job(params=3 * 72 + 18, candidates=3, bits=4, segments=8, ranks=1, weight_bytes=4)
    assert traffic.bytes == cost.payload(job, sharding)["twa"]


class Blocks(torch.nn.Module):
    """Blocks, and a root module with weights of its own."""

    def __init__(self, count, width, head):
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.Linear(width, width, bias=False) for _ in range(count)
        )
        self.head = torch.nn.Linear(width, head, bias=False)

    def forward(self, x):
        for block in self.blocks:
            x = block(x).relu()
        return self.head(x)


class Alive(TorchDispatchMode):
    """`peak`: the largest number of tensors of `nbytes` bytes at a time, views of the same memory
    counted once.
    """

    def __init__(self, nbytes):
        super().__init__()
        self.nbytes, self.peak, self.storages = nbytes, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and not isinstance(t, DTensor):
                self.storages[t.untyped_storage()._cdata] = weakref.ref(t.untyped_storage())
        alive = [storage for ref in self.storages.values() if (storage := ref()) is not None]
        self.peak = max(self.peak, sum(storage.nbytes() == self.nbytes for storage in alive))
        return out


@pytest.fixture
def eight_ranks():
    """The first of eight ranks whose messages go nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("head", [32, 64, 8])
def test_what_fsdp_moves_and_gathers(eight_ranks, head):
    count, width = 15, 32
    model = Blocks(count, width, head)
    for part in (*model.blocks, model):
        fully_shard(part)
    block, root = 4 * width**2, 4 * width * head
    D = (count * block + root) // 4
    with Traffic() as traffic, Alive(block) as alive, Alive(root) as roots:
        model(torch.ones(1, width)).sum().backward()
    job = Job(
        params=D,
        candidates=3,
        bits=4,
        segments=8,
        ranks=8,
        weight_bytes=4,
        block_share=block / 4 / D,
        root_share=root / 4 / D,
    )
    # the root module's weights stay gathered from forward to backward
    assert traffic.bytes == pytest.approx(cost.payload(job, "columns")["model"])
    held = alive.peak * block + (roots.peak * root if root != block else 0)
    assert held == pytest.approx(cost.memory(job, "columns")["gathered"])


# Properties --------------------------------------------------------------------------------------

EVERYTHING = {"memory", "payload", "sent"}
GROWS = {  # what grows when this number does; the rest stays as it is
    "params": {"replicate": {"memory"}, "rows": EVERYTHING, "columns": EVERYTHING},
    "candidates": dict.fromkeys(SHARDINGS, EVERYTHING),
    "segments": dict.fromkeys(SHARDINGS, EVERYTHING),
    "weight_bytes": {"replicate": {"memory"}, "rows": {"memory"}, "columns": EVERYTHING},
}


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("name", GROWS)
def test_more_costs_more(name, sharding):
    for function in EVERYTHING:
        small, large = (
            getattr(cost, function)(job, sharding)
            for job in (JOB, replace(JOB, **{name: 2 * getattr(JOB, name)}))
        )
        assert all(large[key] >= value for key, value in small.items())
        assert (large != small) == (function in GROWS[name][sharding])


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_fewer_bits_cost_less_memory_but_no_fewer_messages(sharding):
    jobs = [replace(JOB, bits=bits) for bits in (32, 8, 4, 3, 2, 1)]
    values = [cost.memory(j, sharding)["total"] for j in jobs]
    assert values == sorted(values, reverse=True) and len(set(values)) == 6
    assert len({cost.payload(j, sharding)["twa"] for j in jobs}) == 1


def test_more_ranks():
    """Columns and rows need less of the basis; nobody sends more than twice a message."""
    jobs = [replace(JOB, ranks=ranks) for ranks in (1, 2, 4, 8, 16)]
    for sharding, whole in (("rows", 31.25e6), ("columns", 1920)):  # which every rank has
        bases = [cost.memory(j, sharding)["basis"] - whole for j in jobs]
        assert bases == pytest.approx([bases[0] / j.ranks for j in jobs], rel=1e-6)
    assert len({cost.memory(j, "replicate")["total"] for j in jobs}) == 1
    for sharding in SHARDINGS:
        sent = [cost.sent(j, sharding)["twa"] for j in jobs]
        assert (
            sent == sorted(sent)
            and sent[0] == 0
            and sent[-1] < 2 * cost.payload(JOB, sharding)["twa"]
        )


def test_order_of_shardings():
    """Columns holds least and rows sends most; replicate and columns send the same."""
    for ranks in (2, 4, 16):
        job = replace(JOB, ranks=ranks)
        total = {p: cost.memory(job, p)["total"] for p in SHARDINGS}
        assert total["columns"] < min(total["rows"], total["replicate"])
        assert (
            cost.payload(job, "columns")["twa"]
            == cost.payload(job, "replicate")["twa"]
            < cost.payload(job, "rows")["twa"]
        )


def test_choice():
    total = {p: cost.memory(JOB, p)["total"] for p in SHARDINGS}
    assert cost.choose(JOB) == cost.choose(JOB, total["replicate"]) == "replicate"
    assert (
        cost.choose(JOB, total["replicate"] - 1) == cost.choose(JOB, total["columns"]) == "columns"
    )
    assert cost.choose(JOB, total["columns"] - 1) is None
    # FSDP gathers everything at once: 20.06 GB; rows 16.06 GB, replicate 16.13 GB
    whole = replace(JOB, block_share=1.0, ranks=2)
    assert [cost.choose(whole, limit) for limit in (16.2e9, 16.1e9, 16e9)] == [
        "replicate",
        "rows",
        None,
    ]


# Input and output --------------------------------------------------------------------------------

BAD = [
    ("params", 0, "params: expected a number above 0, found 0"),
    ("params", math.nan, "params: expected a number above 0, found nan"),
    ("params", math.inf, "found inf"),
    ("candidates", -3, "candidates: expected a number above 0, found -3"),
    ("candidates", 2.5, "candidates: expected a whole number, found 2.5"),
    ("segments", 0, "segments"),
    ("ranks", 0, "ranks"),
    ("bits", 5, "bits: expected one of 32, 8, 4, 3, 2, 1, found 5"),
    ("weight_bytes", -2, "weight_bytes"),
    ("block_share", 0.0, "block_share: expected a number above 0, at most 1, found 0.0"),
    ("block_share", 1.5, "block_share"),
]


@pytest.mark.parametrize("name, value, message", BAD)
def test_bad_job(name, value, message):
    with pytest.raises(ValueError, match=message):
        replace(JOB, **{name: value})


def test_rows_takes_one_rank_per_candidate_and_whole_gradients():
    for job, message in (
        (replace(JOB, ranks=17), "one rank per candidate, 16; found 17 ranks"),
        (replace(JOB, low_memory=True), "low_memory"),
    ):
        for function in (
            cost.basis_bytes,
            cost.center_bytes,
            cost.memory,
            cost.payload,
            cost.sent,
        ):
            with pytest.raises(ValueError, match=f"sharding 'rows': .*{message}"):
                function(job, "rows")
        assert cost.choose(job, 1.0) is None
    with pytest.raises(ValueError, match=r"expected one of .*, found 'row'"):
        cost.memory(JOB, "row")


def run(capsys, *options):
    """The output of `twa plan`: its lines, and the cells of the table by sharding and header."""
    assert main(["plan", *map(str, options)]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    assert len(table) == 5 and len(set(table[0])) == len(table[0])
    return lines, {row[0]: dict(zip(table[0], row, strict=True)) for row in table[2:]}


def test_prints_what_the_formulas_say(capsys):
    options = ["--params", 7e9, "--candidates", 64, "--ranks", 16, "--segments", 300]
    lines, rows = run(capsys, *options, "--bits", 3, "--weight-bytes", 4, "--device-memory", 80)
    job = Job(7e9, 64, 3, 300, 16, 4)
    assert list(rows) == list(SHARDINGS)
    for sharding, row in rows.items():
        held = cost.memory(job, sharding)
        expected = {"memory": held["total"]} | {
            name: held[name] for name in ("basis", "center", "weights", "gradients")
        }
        expected |= {
            "buffers": held["gathered"] + held["buffer"],
            "our bytes": cost.payload(job, sharding)["twa"],
        }
        expected |= {
            "sent": cost.sent(job, sharding)["twa"],
            "FSDP bytes": cost.payload(job, sharding)["model"],
        }
        assert {name: row[name] for name in expected} == {
            name: quantity(value, "B") for name, value in expected.items()
        }
        assert row["fits"].startswith("yes" if held["total"] <= 80e9 else "no")
    # by hand: 7e9 * (3 / 8 + 1 / 128) * 64 / 16 + 28e9 / 16 * 3 + 6 / 32 * 28e9 = 10.72 + 5.25 +
    # 5.25 GB
    assert rows["columns"]["memory"] == "21.2 GB" and rows["columns"]["fits"] == "yes, 58.8 GB left"
    assert (
        rows["rows"]["our bytes"] == "56 GB"
        and rows["replicate"]["our bytes"] == "76.8 kB"
        and rows["columns"]["FSDP bytes"] == "84 GB"
    )
    assert "Choice: columns, since replicate needs 256 GB and does not fit" in lines[-2]
    # 7e9 * (64 * (3 / 8 + 3 / 128) + 4 / 128) + 28e9 * 2 + 0.1e9; of 16 ranks' rows or columns
    assert "replicate 235 GB, rows 67.5 GB, columns 14.8 GB" in lines[-3]
    held = [f"{s} {quantity(cost.host_memory(job, s), 'B')}" for s in SHARDINGS]
    assert f"on its CPUs holds: {', '.join(held)};" in lines[-4]
    assert all(word in lines[-1] for word in ("ring", "blocks of 1/32", "docs/distributed.md"))


def test_defaults(capsys):
    lines, rows = run(capsys, "--params", "7e9", "--candidates", 64)
    assert lines[0] == "7 G weights, 64 candidates, 4 bits, 200 segments, 8 ranks"
    assert (
        rows["replicate"]["memory"]
        == quantity(cost.memory(Job(7e9, 64, 4, 200, 8), "replicate")["total"], "B")
        == "284 GB"
    )
    assert (
        rows["replicate"]["note"] == ""
        and "Choice: replicate" in lines[-2]
        and "--device-memory" in lines[-2]
    )


@pytest.mark.parametrize(
    "options, note",
    [
        (["--ranks", 65], "takes at most one rank per candidate, 64"),
        (["--low-memory"], "sums whole gradients: not with low memory"),
    ],
)
def test_rows_that_cannot_be(capsys, options, note):
    _, rows = run(capsys, "--params", 7e9, "--candidates", 64, *options)
    cells = list(rows["rows"].values())
    assert cells[1:-1] == ["-"] * 9 and cells[-1] == note
    assert "-" not in rows["columns"].values()


def test_choice_is_explained(capsys):
    def choice(*options):
        return run(capsys, "--params", 7e9, "--candidates", 64, *options)[0][-2]

    # beside the weights: 7e9 * (64 * 0.5078125 + 4 / 128 + 4 + 2) = 269.7 GB, with rows
    # 7e9 * (8 * 0.5078125 + 4 / 128 + 4 + 2 + 4) = 98.6 GB; `auto` fills 0.8 of what 14 GB of
    # weights leave
    assert choice("--device-memory", 352).startswith("Choice: replicate") and choice(
        "--device-memory", 352
    ).endswith("else replicate.")
    assert choice("--device-memory", 351).startswith("Choice: replicate") and choice(
        "--device-memory", 351
    ).endswith("else rows.")
    assert choice("--device-memory", 138).endswith("else rows.") and choice(
        "--device-memory", 136
    ).endswith("else an error.")
    assert choice("--device-memory", 80).startswith(
        "Choice: columns"
    ) and "columns for a model sharded" in choice("--device-memory", 80)
    assert choice("--device-memory", 80, "--ranks", 65).endswith(
        "else an error."
    ) and choice().endswith("replicate if that fits, else rows.")
    assert "single" in choice("--ranks", 1)
    assert "none" in choice("--device-memory", 30) and "columns fits on 16 ranks" in choice(
        "--device-memory", 30
    )
    assert "no number of ranks" in choice("--device-memory", 2)


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--params", "-1", "params: expected a number above 0, found -1.0"),
        ("--bits", "7", "bits: expected one of 32, 8, 4, 3, 2, 1, found 7"),
        ("--device-memory", "0", "--device-memory: expected gigabytes above 0, found 0.0"),
        ("--device-memory", "nan", "--device-memory: expected gigabytes above 0, found nan"),
    ],
)
def test_bad_options(capsys, option, value, message):
    assert main(["plan", "--params", "7e9", "--candidates", "64", f"{option}={value}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (0, "B", "0 B"),
        (999, "B", "999 B"),
        (51208, "B", "51.2 kB"),
        (999.4e6, "B", "999 MB"),
        (999.6e6, "B", "1 GB"),
        (2.5e15, "B", "2500 TB"),
        (7e9, "", "7 G"),
    ],
)
def test_quantity(value, unit, text):
    assert quantity(value, unit) == text
