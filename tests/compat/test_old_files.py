"""Files that earlier versions have left are read, and mean what they meant; those of later ones are
refused by name. What is written is what the newest of them are: a change of a format takes a new
version and a new archive, see `old_files.py`.
"""

import importlib.util
import json
import re
import shutil
import tarfile
from pathlib import Path

import old_files
import pytest
import torch
import twa
from twa.io import versions

HERE = Path(__file__).parent
SOURCE = Path(twa.__file__).parent
VERSION = re.compile(r"twa-[a-z-]+-\d+")
MOST_BYTES = 30_000  # of an archive and its values
#: packages without which a file is neither read nor written
NEEDED = {"lightning.pt": "lightning", "trainer_state.json": "transformers"}
#: what is no longer read, and what is said of it
REFUSED = {
    (commit, "job"): rf"expected format 'twa-state-6', found 'twa-state-{number}': finish the run"
    " with the twa that began it, or start again with --overwrite"
    for commit, number in (("1b50e8d", 4), ("fe2829d", 5))
}
#: of these dicts the other keys are PyTorch's
OWN_KEYS = {"param_groups": {"format", "params", "state_names", "subspace"}, "schedule": set()}

pytestmark = pytest.mark.usefixtures("one_thread")


def top(member):
    """The name of what a member of an archive belongs to; "" for the archive's root."""
    return member.split("/")[1] if "/" in member else ""


def members(commit):
    """Files of an archive: path -> content."""
    with tarfile.open(HERE / f"{commit}.tar.xz") as archive:
        return {m.name: archive.extractfile(m).read() for m in archive if m.isfile()}


def values_of(commit):
    return json.loads((HERE / f"{commit}.json").read_text())


CONTENT = {commit: members(commit) for commit in old_files.ARCHIVES}
#: name -> the last archive that has it
NEWEST = {top(m): commit for commit in old_files.ARCHIVES for m in CONTENT[commit]}


def versions_of(name):
    """(path, version) for each version that stands in the newest files of a name."""
    return sorted(
        (path, found.decode())
        for path, content in CONTENT[NEWEST[name]].items()
        if top(path) == name
        for found in set(re.findall(VERSION.pattern.encode(), content))
    )


def reader_of(name):
    (reader,) = {
        reader for pattern, reader in old_files.READERS.items() if Path(name).match(pattern)
    }
    return reader


def skip_without(name):
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """commit -> the files of its archive."""
    folder = tmp_path_factory.mktemp("old")
    return {c: old_files.unpacked(HERE / f"{c}.tar.xz", folder / c) for c in old_files.ARCHIVES}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What the code writes today."""
    folder = tmp_path_factory.mktemp("new")
    for writer in old_files.WRITERS:
        callbacks = writer is old_files.write_callbacks
        if not callbacks or all(map(importlib.util.find_spec, NEEDED.values())):
            writer(folder)
    return folder


# What old files mean -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "commit, name",
    [(commit, name) for commit in old_files.ARCHIVES for name in values_of(commit)["values"]],
)
@pytest.mark.filterwarnings("ignore::twa.CandidateWarning")
def test_is_read(folders, commit, name):
    skip_without(name)
    read, path = reader_of(name), folders[commit] / name
    if (commit, name) in REFUSED:
        with pytest.raises(twa.TwaError, match=REFUSED[commit, name]):
            read(path)
        return
    found = read(path)
    for key, value in values_of(commit)["values"][name].items():
        assert_same(found[key], value, key)


def assert_same(found, expected, where):
    """Equal, and numbers within what the order of a sum may change."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}: {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for k, value in enumerate(expected):
            assert_same(found[k], value, f"{where}[{k}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), where
    else:
        assert found == expected, where


def test_archives():
    files = {p.name for p in HERE.iterdir() if p.suffix in (".json", ".xz")}
    assert files == {f"{c}{end}" for c in old_files.ARCHIVES for end in (".json", ".tar.xz")}
    for commit in old_files.ARCHIVES:
        sizes = [(HERE / name).stat().st_size for name in files if name.startswith(commit)]
        assert sum(sizes) < MOST_BYTES
        assert values_of(commit)["commit"] == commit
        names = {top(path) for path in CONTENT[commit]} - set(old_files.UNREAD)
        assert names == values_of(commit)["values"].keys()


# Newer ones --------------------------------------------------------------------------------------

NEWER = [
    (name, path, version)
    for name in sorted(NEWEST)
    if name not in old_files.UNREAD
    for path, version in versions_of(name)
]


def later(version):
    kind, _, number = version.rpartition("-")
    return f"{kind}-{int(number) + 1}"


def replaced(value, old, new):
    """A tree of plain values and tensors with another text in the place of one."""
    if isinstance(value, dict):
        return {k: replaced(v, old, new) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(replaced(v, old, new) for v in value)
    return new if isinstance(value, str) and value == old else value


def rewrite(path, old, new):
    """Puts another version into a file."""
    if path.suffix == ".pt":
        before = torch.load(path, weights_only=True)
        torch.save(replaced(before, old, new), path)
    else:
        path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))
    assert new.encode() in path.read_bytes()


@pytest.mark.parametrize("name, path, version", NEWER)
def test_a_newer_version_is_refused(folders, tmp_path, name, path, version):
    skip_without(name)
    folder = shutil.copytree(folders[NEWEST[name]], tmp_path / "newer")
    rewrite(folder / path, version, later(version))
    with pytest.raises(twa.TwaError) as caught:
        reader_of(name)(folder / name)
    said = f"expected format {version!r}, found {later(version)!r}: a newer twa than"
    assert f"{said} {twa.__version__} has written it" in str(caught.value)


@pytest.mark.parametrize("name", sorted(set(NEWEST) - set(old_files.UNREAD)))
def test_every_kind_has_a_version(name):
    assert versions_of(name)


def test_a_newer_snapshot_is_not_moved_aside(folders, tmp_path):
    """A damaged one is, by a recorder that goes on."""
    name = "recording_closed"
    folder = shutil.copytree(folders[NEWEST[name]] / name, tmp_path / "run")
    rewrite(folder / "step_6.safetensors", versions.RECORDING, later(versions.RECORDING))
    before = {p.name for p in folder.iterdir()}
    with pytest.raises(twa.TwaError, match="a newer twa than"):
        twa.Recorder(old_files.Net(), every=2, path=folder, resume=True)
    assert {p.name for p in folder.iterdir()} == before


def test_weights_of_segments_are_no_scheme(folders):
    path = folders[NEWEST["coefficients_deltas.json"]] / "coefficients_deltas.json"
    with pytest.raises(twa.TwaError, match="expected one weight a candidate, found weights of seg"):
        old_files.read_weights(path)


# What is written ---------------------------------------------------------------------------------


def test_versions_stand_in_one_file():
    found = {
        (path.name, version)
        for path in SOURCE.rglob("*.py")
        for version in re.findall(r"\"(twa-[a-z-]+-\d+)\"", path.read_text())
    }
    assert {name for name, _ in found} == {"versions.py"}
    assert {version for _, version in found} >= set(versions.CURRENT)


def test_there_is_a_file_of_every_version():
    found = {version for name in NEWEST for _, version in versions_of(name)}
    assert found == set(versions.CURRENT)


@pytest.mark.parametrize("name", sorted(NEWEST))
def test_is_written_as_the_newest_file(folders, written, name):
    skip_without(name)
    assert structure(written / name) == structure(folders[NEWEST[name]] / name)


def test_all_that_is_written_is_in_an_archive(written):
    names = {p.name for p in written.iterdir()}
    missing = {name for name, package in NEEDED.items() if not importlib.util.find_spec(package)}
    assert names - missing <= set(NEWEST) and set(NEWEST) - names <= {*NEEDED, "recording_trainer"}


def structure(path):
    """Names, types and versions in a file, or in the files of a directory."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix != ".tmp")
        return {str(p.relative_to(path)): structure(p) for p in files}
    if path.suffix == ".pt":
        return form(torch.load(path, weights_only=True))
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header.pop("__metadata__", {})
        tensors = {key: (t["dtype"], len(t["shape"])) for key, t in header.items()}
        return tensors, sorted(metadata), form(json.loads(metadata.get("twa", "null")))
    if path.name == "trainer_state.json":
        return form(json.loads(path.read_text())["stateful_callbacks"]["twa_recordings"])
    return form(json.loads(path.read_text())) if path.suffix == ".json" else path.name


def form(value, key=""):
    """A value's structure: of lists the kinds of items, of texts those that are versions."""
    if isinstance(value, dict):
        known = OWN_KEYS.get(key, value.keys())
        return {k: form(v, k) for k, v in value.items() if k in known}
    if isinstance(value, list | tuple):
        return type(value).__name__, sorted({repr(form(v, key)) for v in value})
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.dim()
    return value if isinstance(value, str) and VERSION.fullmatch(value) else type(value).__name__
