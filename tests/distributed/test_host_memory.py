"""One packed basis in memory for all ranks of a host: the bits of one process, one memory, nothing
written after it is built, and each tensor once to each other host.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import processes
import pytest
import torch
import torch.distributed as dist
import twa
from safetensors.torch import save_file
from torch import nn
from twa.distributed import choose, cost, host, sharding
from twa.distributed.host import HostMemory
from twa.distributed.ranks import Ranks

PROT_READ = 1


def new_model(width=60):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(40, width), nn.Tanh(), nn.Linear(width, width // 2), nn.Linear(width // 2, 1)
    )


def write_heap(folder, width=60):
    model = new_model(width)
    for k in range(5):
        state = {key: t + 0.1 * torch.randn_like(t) for key, t in model.state_dict().items()}
        save_file(state, folder / f"c{k}.safetensors")
    return folder


@pytest.fixture(scope="module")
def heap(tmp_path_factory):
    return write_heap(tmp_path_factory.mktemp("heap"))


def subspace_of(group, heap, width=60, **options):
    return twa.Subspace.from_candidates(
        new_model(width), twa.Candidates(f"{heap}/c*.safetensors"), group=group, **options
    )


def bits_of(subspace):
    """All that a basis is made of, as private copies."""
    b = subspace.basis
    return [t.clone() for t in (b.codes, b.scales.view(torch.uint8), b.row_scale, b.divisor)] + [
        t.clone() for t in subspace.center
    ]


def mapping_of(t):
    """(begin, end, permissions and file) of the mapping that a tensor lies in."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, _, device, inode, *name = line.split(maxsplit=5)
        begin, end = (int(place, 16) for place in span.split("-"))
        if begin <= t.data_ptr() < end:
            return begin, end, (permissions, device, inode, *name)


def packed(group, heap, options, hosts="", broken=()):
    """The basis of this rank, its mapping, and the bytes that others sent to this rank."""
    rank, received = dist.get_rank(group), []
    exchange, open_memory = Ranks.exchange, host._open

    def counted(ranks, sends, receives):
        received.extend(t.nbytes for t, _ in receives)
        return exchange(ranks, sends, receives)

    def opened(offer, size):
        return None if rank in broken else open_memory(offer, size)

    key = hosts[rank] if hosts else host.host_key()
    with (
        mock.patch.object(Ranks, "exchange", counted),
        mock.patch.object(host, "_open", opened),
        mock.patch.object(sharding, "host_key", lambda: key),
    ):
        subspace = subspace_of(group, heap, sharding="replicate", **options)
    basis = subspace.basis
    places = [mapping_of(t) for t in (basis.codes, basis.scales, *subspace.center)]
    shared = all("memfd:twa" in str(place) for place in places)
    assert shared or not any("memfd:twa" in str(place) for place in places)
    of_tensor = []  # bytes as they cross: scales as bfloat16, twice what they are in the basis
    for k, center in enumerate(subspace.center):
        codes, scales = basis.select(k)[0].operands[:2]
        of_tensor.append(codes.nbytes + 2 * scales.nbytes + center.nbytes)
    owner = subspace.sharding.owner
    return bits_of(subspace), places[0][2] if shared else None, received, of_tensor, owner


OPTIONS = [
    {},
    {"bits": 8, "granularity": 128},
    {"bits": 1, "basis": "differences"},
    {"bits": 3, "basis": "orthonormal"},
    {"balance": True, "center": "last"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_memory_with_the_bits_of_one_process(ranks, heap, options):
    expected = bits_of(subspace_of(None, heap, sharding="single", **options))
    found = ranks.run(4, packed, heap, options)
    for bits, *_ in found:
        assert all(torch.equal(a, b) for a, b in zip(bits, expected, strict=True))
    assert found[0][1] is not None and len({place for _, place, *_ in found}) == 1
    assert not any(received for _, _, received, *_ in found)


#: which host each rank is on, ranks that cannot open the memory, and how many memories there are
HOSTS = [
    ("aaab", (), 1),
    ("abaa", (), 1),
    ("aabb", (), 2),
    ("abba", (), 2),
    ("abcd", (), 0),
    ("aaaa", (2,), 0),
    ("aabb", (3,), 1),
    ("aabb", (0, 2), 0),
]


@pytest.mark.parametrize("hosts, broken, memories", HOSTS)
def test_hosts(ranks, heap, hosts, broken, memories):
    expected = bits_of(subspace_of(None, heap, sharding="single"))
    found = ranks.run(4, packed, heap, {}, hosts, broken)
    places = [place for _, place, *_ in found]
    assert len({place for place in places if place}) == memories
    for bits, *_ in found:
        assert all(torch.equal(a, b) for a, b in zip(bits, expected, strict=True))
    if not memories:
        return
    odd = {hosts[rank] for rank in broken}
    home = [f"{h}{r}" if h in odd else h for r, h in enumerate(hosts)]
    for a, b in itertools.combinations(range(4), 2):
        assert (places[a] == places[b] and places[a] is not None) == (home[a] == home[b])
    _, _, _, of_tensor, owner = found[0]
    for name in set(home):
        received = sum(sum(f[2]) for f, h in zip(found, home, strict=True) if h == name)
        foreign = [k for k, o in enumerate(owner) if home[o] != name]
        assert received == sum(of_tensor[k] for k in foreign), "not once each"


def train_on_read_only_memory(group, heap, options, low_memory):
    """A write to the basis or the center would end this process."""
    subspace = subspace_of(group, heap, sharding="replicate", **options)
    begin, end, (permissions, *_) = mapping_of(subspace.basis.codes)
    assert permissions == "rw-s"
    before = bits_of(subspace)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), PROT_READ) == 0
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.AdamW, lr=0.1, low_memory=low_memory)
    for _ in range(3):
        subspace.model(torch.ones(2, 40)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    subspace.set_merge_weights(twa.averages.ema(5, 0.5))
    subspace.load_state_dict(subspace.state_dict())
    subspace.unit_step()
    assert subspace.find_moved() is None
    subspace.save(heap / "saved", basis=True)
    assert all(torch.equal(a, b) for a, b in zip(before, bits_of(subspace), strict=True))


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_writes_to_it(ranks, heap, options, low_memory):
    ranks.run(2, train_on_read_only_memory, heap, options, low_memory)


def bytes_of_it(group, heap, width):
    """Bytes that the memory takes in the system, those of what is in it, and this."""
    kept, open_memory = [], host._open

    def opened(offer, size):
        kept.append(os.open(f"/proc/{offer[0]}/fd/{offer[1]}", os.O_RDONLY))
        return open_memory(offer, size)

    with mock.patch.object(host, "_open", opened):
        subspace = subspace_of(group, heap, width, sharding="replicate")
    dist.barrier(group)
    found = os.fstat(kept[0]).st_blocks * 512
    os.close(kept[0])
    basis = subspace.basis
    tensors = [basis.codes, basis.scales, *subspace.center]
    assert basis.codes.data_ptr() % host.HUGE == 0
    return found, sum(t.nbytes for t in tensors), bits_of(subspace)


def test_scales_as_they_were_packed_are_given_back(ranks, tmp_path):
    """And codes of several huge pages, on which the system may put them, are what they were."""
    write_heap(tmp_path, 1700)
    expected = bits_of(subspace_of(None, tmp_path, 1700, sharding="single"))
    assert expected[0].nbytes > host.HUGE
    pages = 4 * os.sysconf("SC_PAGE_SIZE")  # codes, scales, center and the token begin on pages
    for taken, needed, bits in ranks.run(3, bytes_of_it, tmp_path, 1700):
        assert 2 * expected[1].nbytes > pages and needed <= taken <= needed + pages
        assert all(torch.equal(a, b) for a, b in zip(bits, expected, strict=True))


def mismatched(group):
    """What others offer is looked at: another file, a token of another memory, no such process."""
    offer = host._make(1000)
    process, descriptor, token = offer
    try:
        assert host._open(offer, 1000) is not None
        assert host._open((process, descriptor, bytes(16)), 1000) is None
        assert host._open(offer, 999) is None
        assert host._open((1 << 30, descriptor, token), 1000) is None
        with pytest.raises(OSError):
            os.ftruncate(descriptor, 10)  # under the feet of those who map it
    finally:
        os.close(descriptor)
    assert host._open(offer, 1000) is None
    with mock.patch.object(os, "memfd_create", side_effect=OSError("none here")):
        memory = HostMemory(Ranks.find(group), 1000, "here")
    assert not memory.is_shared and memory.allocate is None
    assert HostMemory(Ranks.find(group), 1000, "").homes == [[0], [1]]


def test_memories_that_do_not_open(ranks):
    ranks.run(2, mismatched)


def test_the_key_of_a_host():
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert host.host_key().split()[0] == boot and len(host.host_key().split()) == 3
    with mock.patch.object(os, "readlink", side_effect=OSError("no /proc")):
        assert host.host_key() == ""


# Network namespaces ------------------------------------------------------------------------------


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def namespaces():
    """Two network namespaces, joined by a cable: their names, the first one's address."""
    if not shutil.which("ip") or os.geteuid():
        pytest.skip("network namespaces need `ip` and root")
    names = [f"twa-host-{os.getpid()}-{k}" for k in range(2)]
    ends = [f"tw{os.getpid() % 100000}{side}" for side in "ab"]
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for k, (name, end) in enumerate(zip(names, ends, strict=True)):
                ip("link", "set", end, "netns", name, "name", "eth0")
                ip("-n", name, "addr", "add", f"10.199.7.{k + 1}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
        yield names, "10.199.7.1"


RANK = """
import sys, torch, torch.distributed as dist
import processes, test_host_memory as t
from twa.distributed.ranks import Ranks
dist.init_process_group("gloo")
bits, place, received, _, _ = t.packed(dist.group.WORLD, sys.argv[1], {})
torch.save(bits, f"{sys.argv[1]}/bits-{dist.get_rank()}.pt")
print(place, sum(received))
dist.barrier()
processes.leave_job()
"""


def test_network_namespaces_are_hosts(namespaces, heap):
    names, address = namespaces
    where = [names[0], names[0], names[1]]
    path = f"{Path(__file__).parent}{os.pathsep}{processes.environment()['PYTHONPATH']}"
    env = processes.environment() | {
        "PYTHONPATH": path,
        "MASTER_ADDR": address,
        "MASTER_PORT": "29511",
        "WORLD_SIZE": "3",
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    children = [
        processes.Child(
            ["ip", "netns", "exec", name, sys.executable, "-c", RANK, str(heap)],
            env=env | {"RANK": str(rank)},
        )
        for rank, name in enumerate(where)
    ]
    done = processes.finish(*children)
    assert not any(d.returncode for d in done), "\n".join(d.stderr for d in done)
    places = [d.stdout.rsplit(maxsplit=1)[0] for d in done]
    assert places[0] == places[1] != "None" and places[2] == "None"
    expected = bits_of(subspace_of(None, heap, sharding="single"))
    for rank in range(3):
        found = torch.load(heap / f"bits-{rank}.pt")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    received = sum(int(d.stdout.split()[-1]) for d in done)
    codes, scales, _, _, *center = expected
    whole = codes.nbytes + 2 * scales.nbytes + sum(c.nbytes for c in center)
    assert received == whole, "not each tensor once to the other host"


def chosen(group, heap, local_ranks):
    """What "auto" is where half of the basis and the center fits beside the model."""
    numel = sum(p.numel() for p in new_model().parameters())
    job = cost.Job(numel, 5, 4, 1, 2, weight_bytes=4)
    alone = cost.memory(job, "replicate")["total"]
    half = cost.memory(dataclasses.replace(job, sharers=2), "replicate")["total"]
    free = int(((alone + half) / 2 - 4 * numel) / cost.MEMORY_SHARE)
    with (
        mock.patch.object(choose, "free_memory", lambda device: free),
        mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": str(local_ranks)}),
    ):
        try:
            return subspace_of(group, heap, sharding="auto").sharding.name
        except twa.TwaError as error:
            return str(error)


def test_auto_counts_a_share_of_the_hosts_basis(ranks, heap):
    assert ranks.run(2, chosen, heap, 2) == ["replicate"] * 2
    for said in ranks.run(2, chosen, heap, 1):
        assert "fit into no rank's memory" in said
