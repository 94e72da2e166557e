"""The ops, one file each: schema, rules, fake, autograd and the public function."""

from . import (
    average,
    average_and_pack,
    gram,
    orthonormalize_pass,
    pack,
    project,
    reconstruct,
    step,
    unpack,
)

__all__ = [
    "average",
    "average_and_pack",
    "gram",
    "orthonormalize_pass",
    "pack",
    "project",
    "reconstruct",
    "step",
    "unpack",
]
