"""The packed basis on disk: the same bits as in memory, whatever the memory and the interruptions;
mapped; every field checked.
"""

import json
import os
import struct

import pytest
import torch
import twa
from safetensors.torch import save_file
from torch import nn
from twa.basis import file as basis_file
from twa.basis.file import read_basis
from twa.coordinates import BASES
from twa.distributed.weights import load_merge
from twa.io.candidates import Candidates
from twa.io.errors import BasisError, CandidateError
from twa.io.memory import limit_memory, parse_bytes, resident
from twa.packing import to_file as pack
from twa.packing.to_file import PackToFile

BITS = (8, 4, 3, 2, 1)


class Model(nn.Module):
    """Sizes around blocks of 8192 columns; a frozen parameter, a tied one, a float and an integer
    buffer, one without elements.
    """

    def __init__(self, wide=200):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(wide, 130)
        self.norm = nn.BatchNorm1d(130)
        self.head = nn.Linear(130, 7, bias=False)
        self.tied = nn.Linear(130, 7, bias=False)
        self.tied.weight = self.head.weight
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.nothing = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x):
        return (
            self.head(self.norm(torch.tanh(self.first(x))))
            + self.tied(torch.ones(130))
            + self.frozen.sum()
        )


def heap(folder, n=5, wide=200, dtype=torch.float32):
    folder.mkdir(exist_ok=True)
    for k in range(n):
        generator = torch.Generator().manual_seed(k)
        state = {
            key: (
                (v + (k + 1) * 0.1 * torch.randn(v.shape, generator=generator)).to(dtype)
                if v.is_floating_point()
                else v + k
            )
            for key, v in Model(wide).state_dict().items()
            if key != "tied.weight"
        }
        save_file(state, folder / f"c{k}.safetensors")
    return Candidates(folder)


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    return heap(tmp_path_factory.mktemp("heap"))


def equal(a, b):
    """Two subspaces with the same bits everywhere."""
    assert torch.equal(a.basis.codes, b.basis.codes) and torch.equal(
        a.basis.scales.view(torch.uint8), b.basis.scales.view(torch.uint8)
    )
    for name in ("row_scale", "divisor", "tile_segment"):
        assert torch.equal(getattr(a.basis, name), getattr(b.basis, name)), name
    assert (
        a.basis.shapes == b.basis.shapes
        and a.segments.labels == b.segments.labels
        and a.segments == b.segments
        and a.key_map == b.key_map
    )
    assert torch.equal(a.coordinates.center_weights, b.coordinates.center_weights) and torch.equal(
        a.coefficients, b.coefficients
    )
    if a.coordinates.basis != "orthonormal":
        assert torch.equal(a.coordinates.rows.divisor, b.coordinates.rows.divisor)
    assert all(torch.equal(x, y) for x, y in zip(a.center, b.center, strict=True))
    mine, theirs = a.model.state_dict(), b.model.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    return b


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "model", "center": "last"},
        {"center": "zero"},
    ],
)
def test_a_file_has_the_bits_of_memory(candidates, tmp_path, bits, options):
    expected = twa.Subspace.from_candidates(Model(), candidates, bits=bits, **options)
    small = Candidates([c.path for c in candidates], block_bytes=1)
    report = PackToFile(tmp_path / "b.safetensors", Model(), small, bits=bits, **options).run()
    assert report.written == (tmp_path / "b.safetensors").stat().st_size and sorted(
        p.name for p in tmp_path.iterdir()
    ) == ["b.safetensors"]
    equal(expected, twa.Subspace.load(tmp_path / "b.safetensors", Model(), candidates))
    equal(expected, twa.Subspace.load(tmp_path / "b.safetensors", Model()))


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("constraint", ["none", "simplex"])
def test_a_subspace_and_its_coefficients(candidates, tmp_path, basis, constraint):
    """A constraint comes back with the file, on every basis, and so does a step under it."""
    subspace = twa.Subspace.from_candidates(Model(), candidates, basis=basis, constraint=constraint)
    with torch.no_grad():
        subspace.coefficients.copy_(
            torch.randn(subspace.coefficients.shape, generator=torch.Generator().manual_seed(0))
        )
    subspace.write_weights()
    subspace.save(tmp_path, basis=True)
    loaded = equal(subspace, twa.Subspace.load(tmp_path, Model()))
    assert (
        torch.equal(loaded.merge_weights(), subspace.merge_weights())
        and loaded.identity() == subspace.identity()
    )
    assert (loaded.coordinates.basis, loaded.coordinates.constraint) == (basis, constraint)
    ours, theirs = subspace.coordinates.rows, loaded.coordinates.rows
    if basis == "orthonormal":
        assert torch.equal(theirs.R, ours.R) and theirs.dropped == ours.dropped
    equal(train(subspace), train(loaded))
    if constraint == "simplex":
        beta = loaded.merge_weights()
        assert float(beta.min()) > 0 and torch.allclose(beta.sum(0), torch.ones(1).double())


def train(subspace, steps=4):
    optimizer = twa.SubspaceOptimizer(subspace, torch.optim.SGD, lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        subspace.model(torch.randn(9, 200, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return subspace


def test_training_and_export_without_the_candidates(candidates, tmp_path):
    expected = train(twa.Subspace.from_candidates(Model(), candidates))
    expected.save(tmp_path / "a", basis=True)
    PackToFile(tmp_path / "b.safetensors", Model(), candidates).run()
    loaded = train(twa.Subspace.load(tmp_path / "b.safetensors", Model()))
    equal(expected, loaded)
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a" / "averaged.safetensors").read_bytes() == (
        tmp_path / "b" / "averaged.safetensors"
    ).read_bytes()
    assert json.loads((tmp_path / "a" / "coefficients.json").read_text()) == json.loads(
        (tmp_path / "b" / "coefficients.json").read_text()
    )
    with pytest.raises(CandidateError, match="loaded without its candidates"):
        load_merge(loaded.sharding, twa.averages.uniform(5))


def test_bfloat16_and_mixed_candidates(tmp_path):
    heap(tmp_path / "run", 3, dtype=torch.bfloat16)
    save_file(
        {
            k: v.double() if v.is_floating_point() else v
            for k, v in states(tmp_path / "run" / "c1.safetensors").items()
        },
        tmp_path / "run" / "c1.safetensors",
    )
    expected = twa.Subspace.from_candidates(Model(), Candidates(tmp_path / "run"))
    PackToFile(
        tmp_path / "b.safetensors", Model(), Candidates(tmp_path / "run", block_bytes=1)
    ).run()
    equal(expected, twa.Subspace.load(tmp_path / "b.safetensors", Model()))


def states(path):
    return {
        key: t.clone()
        for key, t in ((key, Candidates(path)[0].tensor(key)) for key in Candidates(path).info)
    }


# Interruptions -----------------------------------------------------------------------------------


class Stop(Exception):
    pass


def interrupted(candidates, path, after):
    """Stops after so many blocks, as if killed: nothing is tidied up."""
    small = Candidates([c.path for c in candidates], block_bytes=1)
    job, seen = PackToFile(path, Model(), small), []

    def progress(count):
        seen.append(count)
        if len(seen) > after:
            raise Stop

    with pytest.raises(Stop):
        job.run(progress=progress)
    return job


@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_resume_gives_the_bits_of_an_undisturbed_run(candidates, tmp_path, monkeypatch, after):
    monkeypatch.setattr(pack, "SAVE_SECONDS", 0.0)
    PackToFile(tmp_path / "whole.safetensors", Model(), candidates).run()
    path = tmp_path / "b.safetensors"
    assert interrupted(candidates, path, after).unfinished == (after > 0) and not path.exists()
    read = []
    report = PackToFile(path, Model(), candidates).run(resume=True, progress=read.append)
    assert (
        report.resumed == (after > 0)
        and path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    )
    total = sum(
        c.info[key].nbytes
        for c in candidates
        for key in PackToFile(path, Model(), candidates).contents.trained.values()
    )
    assert sum(read) == total  # what was done before counts, too
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.safetensors", "whole.safetensors"]


def test_resume_refuses_another_run(candidates, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "SAVE_SECONDS", 0.0)
    path = tmp_path / "b.safetensors"
    interrupted(candidates, path, 2)
    with pytest.raises(BasisError, match="of another run: bits differs"):
        PackToFile(path, Model(), candidates, bits=2).run(resume=True)
    with pytest.raises(BasisError, match="of another run: candidates differs"):
        PackToFile(path, Model(), Candidates([c.path for c in candidates][::-1])).run(resume=True)
    with pytest.raises(BasisError, match="center_weights differs"):
        PackToFile(path, Model(), candidates, center="last").run(resume=True)
    position = json.loads((tmp_path / "b.safetensors.position.partial").read_text())
    for change in (
        {"todo": "x"},
        {"todo": [[99, 0, 1]]},
        {"todo": [[0, 5, 26000]]},
        {"todo": [[0, 0, 5]]},
        {"todo": [[0, 0, 26001]]},
        {"todo": [[0, 8192, 8192]]},
        {"todo": [[0, 8192, 26000], [0, 0, 8192]]},
        {"todo": [[0, 0, 16384], [0, 8192, 26000]]},
        {"todo": [[0, 0, 8192.0]]},
        {"todo": [[0, 0]]},
        {"of": "3"},
        {"of": "[" * 100_000},
    ):
        (tmp_path / "b.safetensors.position.partial").write_text(json.dumps(position | change))
        with pytest.raises(BasisError, match="not the position of an interrupted run"):
            PackToFile(path, Model(), candidates).run(resume=True)
    of = position["of"].replace("twa-basis-1", "twa-basis-2")
    (tmp_path / "b.safetensors.position.partial").write_text(json.dumps(position | {"of": of}))
    with pytest.raises(BasisError, match="found 'twa-basis-2': a newer twa than"):
        PackToFile(path, Model(), candidates).run(resume=True)


def test_not_a_number_in_a_candidate(candidates, tmp_path):
    state = states(candidates[2].path)
    state["first.weight"][100, 3] = torch.nan
    paths = [c.path for c in candidates]
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(
        CandidateError,
        match=r"bad\.safetensors: tensor 'first.weight' has 1 NaN or Inf.*\[100, 3\]",
    ):
        PackToFile(
            tmp_path / "b.safetensors",
            Model(),
            Candidates([*paths, tmp_path / "bad.safetensors"], block_bytes=1),
        ).run()
    assert not list(tmp_path.glob("b.*"))


# What does not fit -------------------------------------------------------------------------------


@pytest.fixture
def packed(candidates, tmp_path):
    PackToFile(tmp_path / "b.safetensors", Model(), candidates).run()
    return tmp_path / "b.safetensors"


def test_other_candidates(packed, candidates):
    with pytest.raises(
        BasisError,
        match=r"candidate 0: expected the one that the basis was packed from .*, found c4 ",
    ):
        twa.Subspace.load(packed, Model(), Candidates([c.path for c in candidates][::-1]))
    with pytest.raises(BasisError, match=r"candidate 4: expected .* found none"):
        twa.Subspace.load(packed, Model(), Candidates([c.path for c in candidates][:4]))


def test_another_model(packed):
    frozen = Model()
    frozen.first.bias.requires_grad_(False)
    for model, message in (
        (
            Model(wide=201),
            (
                r"tensor 'first.weight': expected shape \[130, 201\] as in the model, found \[130,"
                r" 200\]"
            ),
        ),
        (frozen, "'first.bias' is in the basis but no trainable parameter of the model"),
        (nn.Linear(3, 3), "'bias' is trainable in the model but not in the basis"),
    ):
        with pytest.raises(BasisError, match=message):
            twa.Subspace.load(packed, model)


def test_a_dense_basis_is_not_written(candidates, tmp_path):
    with pytest.raises(ValueError, match="bits=32 is not packed"):
        twa.Subspace.from_candidates(Model(), candidates, bits=32).save(tmp_path, basis=True)


# Damaged files -----------------------------------------------------------------------------------


def parts(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["twa"]), data[8 + length :]


def write(path, header, twa_metadata, data):
    text = json.dumps(
        header
        | {
            "__metadata__": {
                "twa": twa_metadata if isinstance(twa_metadata, str) else json.dumps(twa_metadata)
            }
        }
    ).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 5}, "bits"),
        ({"bits": 4.0}, "bits"),
        ({"bits": 8}, "tensor 'codes': expected"),
        ({"rows": 4}, "rows"),
        ({"candidates": []}, "candidates"),
        ({"candidates": [["a"]] * 5}, "candidates"),
        ({"segments": [0]}, "segments"),
        ({"segments": [0, 1, 2, 3, 4, 77]}, "segments"),
        ({"segments": [0, 1, 2, 3, 4, -1]}, "segments"),
        ({"labels": []}, "labels"),
        ({"trained": []}, "trained"),
        ({"trained": [["a", "no such key"]]}, "keys"),
        ({"trained": {"a": "b"}}, "pairs"),
        ({"info": {"first.weight": [[-1], "F32"]}}, "info"),
        ({"info": {"first.weight": [[1 << 62, 1 << 62], "F32"]}}, "info"),
        ({"info": {"first.weight": [[3], "F99"]}}, "info"),
        ({"dropped": [[[0, 0.5]]]}, "dropped"),
        ({"normalize": "other"}, "normalize"),
        ({"format": "twa-basis-2"}, "expected format 'twa-basis-1', found 'twa-basis-2'"),
        ({"more": 1}, "'more' is unexpected"),
        ("[" * 50_000, "not a packed basis"),
        ("3", "expected format"),
    ],
)
def test_damaged_metadata(packed, change, message):
    header, metadata, data = parts(packed)
    write(packed, header, change if isinstance(change, str) else metadata | change, data)
    with pytest.raises(BasisError, match=message):
        read_basis(packed)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"basis": "deltas"}, "rows: expected one per candidate or difference"),
        ({"rows": 5}, "rows: expected one per candidate or difference"),
        ({"rows": 3}, "rows: expected one per candidate or difference"),
        ({"rows": 4.0}, "rows: expected one per candidate or difference"),
        ({"rows": 0, "candidates": [["a", "b"]]}, "rows: expected one per candidate or diff"),
        ({"rows": 1, "candidates": [["a", "b"]]}, "rows: expected one per candidate or diff"),
        ({"rows": 5, "candidates": [["a", "b"]] * 6}, "tensor 'codes': expected"),
        ({"basis": "orthonormal"}, "dropped: expected candidates and distances"),
        ({"dropped": [[]] * 5}, "dropped: expected candidates and distances"),
        ({"constraint": "simplex"}, "tensor 'coefficients': expected"),
        ({"chunk": 128}, "chunk: expected 0, or a multiple of 128 that makes"),
        ({"basis": "sums"}, r"basis: expected one of \('deltas', 'differences', 'orthonormal'\)"),
    ],
)
def test_damaged_metadata_of_differences(candidates, tmp_path, change, message):
    twa.Subspace.from_candidates(Model(), candidates, basis="differences").save(
        tmp_path, basis=True
    )
    path = tmp_path / basis_file.NAME
    header, metadata, data = parts(path)
    write(path, header, metadata | change, data)
    with pytest.raises(BasisError, match=message):
        read_basis(path)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("scales", b"\x7f", "scales.*e4m3 numbers"),
        ("scales", b"\x80", "scales.*e4m3 numbers"),
        ("row_scale", struct.pack("<f", float("nan")), "row_scale.*finite"),
        ("divisor", struct.pack("<d", -1.0), "divisor.*at least 0"),
        ("center", struct.pack("<f", float("inf")), "center.*finite"),
        ("center_weights", struct.pack("<d", float("inf")), "center_weights.*finite"),
        ("coefficients", struct.pack("<f", float("nan")), "coefficients.*finite"),
    ],
)
def test_numbers_out_of_range(packed, name, value, message):
    header, _, data = parts(packed)
    begin = len(packed.read_bytes()) - len(data) + header[name]["data_offsets"][0]
    with open(packed, "r+b") as f:
        f.seek(begin)
        f.write(value)
    with pytest.raises(BasisError, match=message):
        read_basis(packed)


def test_codes_are_mapped_at_an_aligned_address(packed):
    subspace = twa.Subspace.load(packed, Model())
    assert subspace.basis.codes.data_ptr() % 4096 == 0
    before = packed.read_bytes()
    subspace.basis.codes.fill_(0)  # private to this process
    assert packed.read_bytes() == before


def test_files_that_are_no_basis(candidates, tmp_path):
    with pytest.raises(BasisError, match="no such file"):
        twa.Subspace.load(tmp_path, Model())
    with pytest.raises(BasisError, match="no entry 'twa'"):
        twa.Subspace.load(candidates[0].path, Model())
    (tmp_path / basis_file.NAME).write_bytes(os.urandom(100))
    with pytest.raises(BasisError, match="not a complete safetensors file"):
        twa.Subspace.load(tmp_path, Model())


def test_a_full_disk_is_noticed_before_the_work(candidates, tmp_path, monkeypatch):
    monkeypatch.setattr(
        basis_file.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})()
    )
    with pytest.raises(OSError, match=r"the disk has 0\.00 GB left"):
        PackToFile(tmp_path / "b.safetensors", Model(), candidates).run()
    assert not list(tmp_path.iterdir())


def test_a_bound_on_memory(candidates):
    few = Candidates([c.path for c in candidates])
    limit_memory(few, resident() + (600 << 20))
    assert few.block_bytes == candidates.block_bytes  # enough for the usual blocks
    limit_memory(few, resident() + (100 << 20))
    assert 8192 * 4 * len(few) <= few.block_bytes < candidates.block_bytes
    with pytest.raises(
        ValueError, match=r"--max-memory: 0\.10 GB are not enough: \d\.\d\d GB are in use"
    ):
        limit_memory(few, 100 << 20)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("2GB", 2e9),
        ("500 MB", 5e8),
        ("1.5G", 1.5e9),
        ("3GiB", 3 * 2**30),
        ("1000", 1000),
        ("2tb", 2e12),
    ],
)
def test_amounts_of_memory(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2XB", "nan", "inf", "1e99GB"])
def test_no_amounts_of_memory(text):
    with pytest.raises(twa.TwaError, match="amount of memory"):
        parse_bytes(text)
