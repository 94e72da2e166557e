"""Files that are something else than their names say, told by their first bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

HEAD = 512  # bytes that are looked at
_LFS = (
    "a Git LFS pointer, which stands for a file that was not downloaded: run 'git lfs pull' in the"
    " repository"
)
_PAGE = "a web page, perhaps of an error, saved in the place of the file: download it again"
_PACKED = "compressed with {}: unpack it first"
#: first bytes -> what the file is, and what to do
_BEGINS = {
    b"version https://git-lfs": _LFS,
    b"version https://hawser": _LFS,
    b"\x1f\x8b": _PACKED.format("gzip"),
    b"BZh": _PACKED.format("bzip2"),
    b"\xfd7zXZ\0": _PACKED.format("xz"),
    b"(\xb5/\xfd": _PACKED.format("zstd"),
    b"7z\xbc\xaf\x27\x1c": _PACKED.format("7-Zip"),
    b"GGUF": "a GGUF file (llama.cpp), mostly of quantised weights: use the model's own files",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras writes: save the weights from PyTorch",
    b"\x93NUMPY": "a NumPy array: save tensors with torch.save or safetensors",
    b"model_checkpoint_path:": "a list of TensorFlow checkpoints: save the weights from PyTorch",
    b"<?xml": _PAGE,
    b"<!doctype": _PAGE,
    b"<html": _PAGE,
    b"<head": _PAGE,
}
_JSON = "JSON text, perhaps of an error, saved in the place of the file: download it again"


def foreign(path: Path, *, json: bool = False) -> str:
    """What a file is that could not be read as what it seemed to be, and what to do.

    Args:
        path: the file
        json: whether it was to be JSON

    Returns:
        a sentence without an end, or "" if it is nothing known
    """
    try:
        with open(path, "rb") as f:
            head = f.read(HEAD)
    except OSError:
        return ""
    if not head:
        return "this is an empty file"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:64]
    for begin, what in _BEGINS.items():
        if head.startswith(begin) or (what == _PAGE and text.lower().startswith(begin)):
            return f"this is {what}"
    if text.startswith((b'{"', b"{\n")) and not json:
        return f"this is {_JSON}"
    if _is_tar(head):
        return "this is a tar archive: unpack it, and give the checkpoint that is in it"
    if head[:1] == b"\x08" and head[2:3] == b"\x12" and b"pytorch" in head[:64]:
        return "this is an ONNX model: save the weights from PyTorch"
    if 0x81 <= head[0] <= 0x8F and 0xA1 <= head[1:2].ljust(1, b"\0")[0] <= 0xBF:
        return "this is a msgpack file, as Flax writes: save the weights from PyTorch"
    return ""


def is_tar(path: Path) -> bool:
    """Whether a file is a tar archive, rather than a checkpoint that is called .tar."""
    with open(path, "rb") as f:
        return _is_tar(f.read(HEAD))


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def foreign_archive(names: Sequence[str]) -> str:
    """What a zip archive is that torch.save did not write, by the names in it; "" if unknown."""
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside or "bytecode.pkl" in inside:
        return (
            "this is a TorchScript program (torch.jit.save): save the state_dict of the module,"
            " as in torch.save(torch.jit.load(path).state_dict(), new_path)"
        )
    if ".data/extern_modules" in inside:
        return "this is a package of programs (torch.package): save the state_dict of the module"
    if "models/model.json" in inside or "archive_format" in inside:
        return "this is a program of torch.export: save the state_dict of the module"
    if "serialized_exported_program.json" in {*inside, *names}:
        return "this is a program of torch.export: save the state_dict of the module"
    if names and all(name.endswith(".npy") for name in names):
        return "this is an archive of NumPy arrays: save tensors with torch.save or safetensors"
    if "model.weights.h5" in names:
        return "this is a Keras model: save the weights from PyTorch"
    return ""
