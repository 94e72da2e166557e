"""Checkpoint formats: what is read is what was written, by way of blocks of columns too; what is
refused is named.
"""

import argparse
import pickle
import shutil
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
import twa
from safetensors.torch import load_file, save_file
from twa.io.candidates import UNIT, Candidates
from twa.io.dcp import METADATA
from twa.io.errors import CandidateError
from twa.io.mapped import Pieces, Stored, TensorInfo, covered
from twa.io.safetensors import SAFETENSORS_DTYPES, read_safetensors


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(4, 3, generator=generator),
        "a.bias": torch.randn(4, generator=generator).bfloat16(),
        "scale": torch.randn((), generator=generator),
        "none": torch.zeros(0, 5),
        "count": torch.tensor(seed),
        "mask": torch.tensor([True, False]),
    }


def same(found, expected):
    assert found.info.keys() == expected.keys()
    for key, t in expected.items():
        read = found.tensor(key)
        assert read.dtype == t.dtype and torch.equal(read, t.detach()), key
        assert found.info[key] == TensorInfo(tuple(t.shape), t.dtype)
    return found


# safetensors -------------------------------------------------------------------------------------


def test_safetensors_of_every_dtype_as_the_library_reads_them(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for k, dtype in enumerate(d for d in SAFETENSORS_DTYPES.values() if not d.is_complex):
        bytes_ = torch.randint(
            0,
            2 if dtype == torch.bool else 256,
            (3 * 5 * dtype.itemsize,),
            generator=generator,
            dtype=torch.uint8,
        )
        tensors[f"t{k}"] = bytes_.view(dtype).view(3, 5)
    tensors["scalar"], tensors["empty"] = torch.tensor(3.0), torch.zeros(0)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"made by": "a test"})
    read, library = (
        read_safetensors(tmp_path / "x.safetensors"),
        load_file(tmp_path / "x.safetensors"),
    )
    assert read.keys() == library.keys()
    for key, t in library.items():
        assert read[key].read().dtype == t.dtype and read[key].read().shape == t.shape
        assert (
            read[key].read().contiguous().view(-1).view(torch.uint8).tolist()
            == t.view(-1).view(torch.uint8).tolist()
        )


def test_unaligned_tensors_are_copied(tmp_path):
    path = tmp_path / "x.safetensors"
    header = (
        b'{"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"w":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}'
    )
    path.write_bytes(
        len(header).to_bytes(8, "little")
        + header
        + b"\1"
        + torch.tensor([1.5, -2.0]).numpy().tobytes()
    )
    assert Candidates(path)[0].tensor("w").tolist() == [1.5, -2.0]


# torch.save --------------------------------------------------------------------------------------


def odd_tensors():
    """Strided, expanded and offset views, shared storage, a parameter."""
    whole = torch.arange(60.0).view(5, 12)
    return {
        "t": whole[:4, :3].t(),
        "expanded": torch.arange(3.0).expand(4, 3),
        "offset": whole[2:, 5:],
        "every other": whole.view(-1)[1::2],
        "parameter": torch.nn.Parameter(whole[1].clone()),
        "whole": whole,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }


def test_views_and_shared_storage(tmp_path):
    torch.save(odd_tensors(), tmp_path / "x.pt")
    same(Candidates(tmp_path / "x.pt")[0], odd_tensors())


def rewritten(path, target, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        for record in old.infolist():
            new.writestr(record.filename, change(record.filename, old.read(record)))
    return target


def test_an_archive_that_was_compressed_is_refused(tmp_path):
    torch.save(state(), tmp_path / "x.pt")
    with pytest.raises(CandidateError, match="compressed"):
        Candidates(
            rewritten(tmp_path / "x.pt", tmp_path / "y.pt", compression=zipfile.ZIP_DEFLATED)
        )


def test_an_archive_that_was_stored_again_unaligned(tmp_path):
    torch.save(odd_tensors(), tmp_path / "x.pt")
    same(Candidates(rewritten(tmp_path / "x.pt", tmp_path / "y.pt"))[0], odd_tensors())


def test_the_other_byte_order(tmp_path):
    torch.save({"w": torch.tensor([1.5, -2.0])}, tmp_path / "x.pt")

    def swap(name, data):
        return (
            b"big"
            if name.endswith("byteorder")
            else data[3::-1] + data[:3:-1]
            if "/data/" in name
            else data
        )

    with pytest.raises(CandidateError, match="other byte order"):
        Candidates(rewritten(tmp_path / "x.pt", tmp_path / "y.pt", swap))


def test_a_record_that_is_too_small_for_its_tensor(tmp_path):
    torch.save({"w": torch.zeros(100)}, tmp_path / "x.pt")
    cut = rewritten(
        tmp_path / "x.pt",
        tmp_path / "y.pt",
        lambda name, data: data[:200] if name.endswith("data/0") else data,
    )
    with pytest.raises(CandidateError, match="not a complete torch checkpoint"):
        Candidates(cut)


def test_sparse_tensors_are_refused(tmp_path):
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "x.pt")
    with pytest.raises(CandidateError, match="dense"):
        Candidates(tmp_path / "x.pt")


# Which entry -------------------------------------------------------------------------------------


def test_lightning(tmp_path):
    """Averaged weights are in state_dict, those of the run itself in current_model_state
    (Lightning's WeightAveraging).
    """
    checkpoint = {
        "epoch": 3,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": state(1),
        "current_model_state": state(2),
        "optimizer_states": [
            {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
        ],
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "x"}},
        "loops": {},
    }
    torch.save(checkpoint, tmp_path / "epoch=3.ckpt")
    same(Candidates(tmp_path / "*.ckpt")[0], state(1))
    same(Candidates(tmp_path / "*.ckpt", entry="current_model_state")[0], state(2))


def test_timm(tmp_path):
    """timm stores its arguments as an argparse.Namespace."""
    torch.save(
        {
            "arch": "vit",
            "state_dict": state(1),
            "state_dict_ema": state(2),
            "args": argparse.Namespace(lr=0.1),
        },
        tmp_path / "last.pth.tar.pth",
    )
    same(Candidates(tmp_path)[0], state(1))
    same(Candidates(tmp_path, entry="state_dict_ema")[0], state(2))
    with pytest.raises(
        CandidateError, match=r"'ema'; there are some under: state_dict, state_dict_ema$"
    ):
        Candidates(tmp_path, entry="ema")


def test_entries_inside_entries(tmp_path):
    torch.save({"run": {"student": state(1), "teacher": state(2)}}, tmp_path / "x.pt")
    with pytest.raises(CandidateError, match=r"run\.student, run\.teacher"):
        Candidates(tmp_path / "x.pt")
    same(Candidates(tmp_path / "x.pt", entry="run.teacher")[0], state(2))


def test_a_safetensors_file_has_prefixes_for_entries(tmp_path):
    save_file(state(), tmp_path / "x.safetensors")
    assert Candidates(tmp_path / "x.safetensors", entry="a").info.keys() == {"weight", "bias"}
    with pytest.raises(CandidateError, match=r"under 'ema'; there are some under: a$"):
        Candidates(tmp_path / "x.safetensors", entry="ema")


# Directories -------------------------------------------------------------------------------------


def test_a_folder_of_any_of_them(tmp_path):
    save_file(state(10), tmp_path / "step_10.safetensors")
    torch.save({"state_dict": state(9)}, tmp_path / "step_9.ckpt")
    (tmp_path / "step_11").mkdir()
    save_file(state(11), tmp_path / "step_11" / "model.safetensors")
    (tmp_path / "step_11" / "optimizer.pt").write_bytes(b"not for us")
    dcp.save({"model": state(12)}, checkpoint_id=tmp_path / "step_12", no_dist=True)
    (tmp_path / "log.txt").write_text("nothing")
    (tmp_path / ".hidden.pt").write_text("nothing")
    candidates = Candidates(tmp_path)
    assert [c.kind for c in candidates] == [
        "torch",
        "safetensors",
        "huggingface",
        "dcp",
    ] and candidates.kind == "mixed"
    for k, candidate in enumerate(candidates):
        same(candidate, state(9 + k))


def test_an_adapter(tmp_path):
    save_file(
        {"base_model.model.q.lora_A.weight": torch.ones(2, 3)},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    assert Candidates(tmp_path)[0].kind == "adapter" and Candidates(tmp_path).kind == "adapter"


@pytest.mark.parametrize(
    "path", ["s3://bucket/run/a.safetensors", "https://example.org/a.pt", "hf://a/b"]
)
def test_remote_paths_are_refused(path):
    with pytest.raises(CandidateError, match="remote locations are not read"):
        Candidates(path)


# torch.distributed.checkpoint --------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    dcp.save(
        {"model": state(3), "optim": {"step": torch.tensor(4.0)}, "epoch": 7},
        checkpoint_id=tmp_path / "c",
        no_dist=True,
    )
    return tmp_path / "c"


def test_dcp(saved):
    same(Candidates(saved)[0], state(3))
    assert Candidates(saved, entry="optim")[0].info.keys() == {"step"}


def test_dcp_without_nesting(tmp_path):
    dcp.save(state(1), checkpoint_id=tmp_path / "c", no_dist=True)
    same(Candidates(tmp_path / "c")[0], state(1))


def test_dcp_files_missing_or_cut(saved):
    file = next(saved.glob("*.distcp"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-500])
    with pytest.raises(CandidateError, match=r"\.distcp: not complete"):
        Candidates(saved)
    file.unlink()
    with pytest.raises(CandidateError, match="no such file"):
        Candidates(saved)


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_dcp_metadata_runs_nothing(saved, capsys):
    (saved / METADATA).write_bytes(pickle.dumps({"state_dict_metadata": Evil()}))
    with pytest.raises(CandidateError, match=r"refused: it asks for builtins\.print"):
        Candidates(saved)
    assert "run" not in capsys.readouterr().out


def test_dcp_paths_stay_inside(saved):
    file = next(saved.glob("*.distcp"))
    shutil.move(file, saved.parent / "outside.distcp")
    metadata = pickle.loads((saved / METADATA).read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = "../outside.distcp"
    (saved / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CandidateError, match="name of a file in the directory"):
        Candidates(saved)


@pytest.mark.parametrize(
    "blocks, whole",
    [
        ([((0, 0), (2, 3)), ((2, 0), (2, 3))], True),
        ([((0, 0), (4, 1)), ((0, 1), (4, 2))], True),
        ([((0, 0), (2, 3)), ((1, 0), (2, 3))], False),  # overlap, and a row missing
        ([((0, 0), (2, 3))], False),
        ([((0, 0), (2, 3)), ((2, 0), (3, 3))], False),  # outside
        ([((0,), (4,))], False),
        ([((0, 0), (4, 3)), ((0, 0), (4, 3))], False),
        ([((0, 0), (4, 3)), ((1, 1), (0, 0))], True),
    ],
)
def test_blocks_must_cover_a_tensor_once(blocks, whole):
    assert covered((4, 3), blocks) == whole


def test_pieces_give_any_part(tmp_path):
    whole = torch.arange(4 * 6.0).view(4, 6)
    cuts = [((r, c), (2, 3)) for r in (0, 2) for c in (0, 3)]
    save_file(
        {f"{r},{c}": whole[r : r + 2, c : c + 3].contiguous() for (r, c), _ in cuts},
        tmp_path / "x.safetensors",
    )
    read = read_safetensors(tmp_path / "x.safetensors")
    pieces = Pieces(
        TensorInfo((4, 6), torch.float32), tuple(((r, c), read[f"{r},{c}"]) for (r, c), _ in cuts)
    )
    assert torch.equal(pieces.read(), whole)
    for rows in (slice(0, 4), slice(1, 3), slice(3, 4), slice(2, 2)):
        for columns in (slice(0, 6), slice(2, 4), slice(4, 6)):
            assert torch.equal(pieces.read((rows, columns)), whole[rows, columns])


# Blocks of columns -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        None,
        (slice(1, 4), slice(0, 7), slice(0, 3000)),
        (slice(0, 1), slice(2, 5), slice(100, 2900)),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_stream(tmp_path, part, suffix):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        {
            "w": torch.randn(5, 7, 3000, generator=generator),
            "b": torch.randn(9, generator=generator),
            "e": torch.zeros(0),
        }
        for _ in range(3)
    ]
    for k, t in enumerate(tensors):
        if suffix == "pt":
            torch.save(
                t | {"w": t["w"].transpose(0, 2).contiguous().transpose(0, 2)},
                tmp_path / f"c{k}.pt",
            )
        else:
            save_file(t, tmp_path / f"c{k}.safetensors")
    candidates = Candidates(tmp_path, block_bytes=1)  # the smallest blocks there are
    seen = {k: [[] for _ in range(3)] for k in range(3)}
    for block in candidates.stream([("w", part), ("b", None), ("e", None)]):
        assert block.begin % UNIT == 0 and all(
            len(row) == block.end - block.begin for row in block.rows
        )
        for rows, row in zip(seen[block.index], block.rows, strict=True):
            rows.append(row.clone())
    for i, t in enumerate(tensors):
        assert torch.equal(torch.cat(seen[0][i]), t["w"][part or ...].reshape(-1))
        assert torch.equal(torch.cat(seen[1][i]), t["b"]) and torch.cat(seen[2][i]).shape == (0,)
    later = [
        (b.index, b.begin)
        for b in candidates.stream(
            [("w", None), ("b", None)], columns=UNIT, within=[(5 * UNIT, 8 * UNIT), (0, 5)]
        )
    ]
    assert later == [(0, first * UNIT) for first in (5, 6, 7)] + [(1, 0)]


def test_some_rows_only(tmp_path):
    for k in range(5):
        save_file({"w": torch.full((3,), float(k))}, tmp_path / f"c{k}.safetensors")
    candidates = Candidates(tmp_path)
    assert [
        row[0].item()
        for block in candidates.stream([("w", None)], rows=[4, 1])
        for row in block.rows
    ] == [4.0, 1.0]
    before = candidates.bytes_read
    assert candidates.weighted("w", torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])).tolist() == [2.0] * 3
    assert candidates.bytes_read - before == 2 * 12


def test_a_file_that_changes_meanwhile(tmp_path):
    for k in range(2):
        save_file({"w": torch.full((10_000,), float(k))}, tmp_path / f"c{k}.safetensors")
    candidates = Candidates(tmp_path, block_bytes=1)
    with pytest.raises(CandidateError, match=r"c1\.safetensors: became shorter while it was"):
        for k, _ in enumerate(candidates.stream([("w", None)] * 5)):
            if k == 3:
                with open(tmp_path / "c1.safetensors", "r+b") as f:
                    f.truncate(5000)


def test_a_file_that_is_replaced_meanwhile(tmp_path):
    """As a training run does that writes whole files: the old one is read to its end."""
    save_file({"w": torch.zeros(30_000)}, tmp_path / "c.safetensors")
    candidates = Candidates(tmp_path, block_bytes=1)
    for k, block in enumerate(candidates.stream([("w", None)])):
        if k == 0:
            save_file({"w": torch.ones(7)}, tmp_path / "new.safetensors")
            (tmp_path / "new.safetensors").rename(tmp_path / "c.safetensors")
        assert not block.rows[0].any()
    (tmp_path / "c.safetensors").unlink()
    assert not candidates[0].tensor("w").any()


def test_mapped_at_the_first_use_notices_another_file(tmp_path):
    save_file({"w": torch.zeros(10)}, tmp_path / "c.safetensors")
    candidate = Candidates(tmp_path)[0]
    save_file({"w": torch.zeros(10), "v": torch.ones(2)}, tmp_path / "c.safetensors")
    with pytest.raises(CandidateError, match="changed since its header was read"):
        candidate.tensor("w")


def test_stored_reads_parts(tmp_path):
    save_file({"w": torch.arange(12.0).view(3, 4)}, tmp_path / "c.safetensors")
    stored = read_safetensors(tmp_path / "c.safetensors")["w"]
    assert isinstance(stored, Stored) and stored.read((slice(1, 3), slice(0, 2))).tolist() == [
        [4.0, 5.0],
        [8.0, 9.0],
    ]
    assert twa.Candidates(tmp_path)[0].columns("w", 3, 9).tolist() == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
