"""How packed scales become e4m3 and a factor per row, once all of a segment is packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .native import _C

NORMALIZE = ("row", "none")
CHUNK = 1 << 14  # tiles that PyTorch's operators take at a time


@dataclass(frozen=True)
class Scaling:
    """How scales of 4 significant bits (bfloat16) become e4m3 and a factor per row and segment.

    It is known once all of a segment is packed.

    exponent   (L, n) int16: of the power of two that brings a segment's largest scale into
               [128, 256), inside e4m3's range
    row_scale  (n, L) float32, as in PackedBasis
    divisor    (n, L) float64, as in PackedBasis
    """

    exponent: Tensor
    row_scale: Tensor
    divisor: Tensor

    @classmethod
    def of(
        cls, sum_sq: Tensor, max_scale: Tensor, normalize: str, divisor: Tensor | None = None
    ) -> Scaling:
        """Scaling from a packer's sums; normalize and divisor as in `Packer.finish`.

        It is made on the CPU, wherever the sums are, and moved to their device: the same bits.
        """
        device, sum_sq, max_scale = sum_sq.device, sum_sq.cpu(), max_scale.cpu()
        divisor = None if divisor is None else divisor.cpu()
        if normalize not in NORMALIZE:
            raise ValueError(f"normalize: expected one of {NORMALIZE}, found {normalize!r}")
        if divisor is None:
            divisor = row_divisor(sum_sq, normalize)
        elif divisor.shape != sum_sq.shape:
            raise ValueError(
                f"divisor: expected shape {tuple(sum_sq.shape)}, found {tuple(divisor.shape)}"
            )
        exponent = torch.frexp(max_scale).exponent - 8
        power = torch.exp2(exponent.double())
        unit = torch.where(max_scale > 0, power, torch.zeros_like(divisor))  # (n, L)
        row_scale = torch.where(divisor > 0, unit / divisor, 0.0).float()
        exponent = exponent.to(torch.int16).T.contiguous()
        return cls(exponent.to(device), row_scale.to(device), divisor.to(device))

    def apply(
        self, scales: Tensor, tile_segment: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scales (tiles, n) bfloat16 as the bits of e4m3, uint8; and how many became zero, ().

        They are written to `out`, if it is given. On a GPU nothing waits for it.
        """
        codes = (
            torch.empty(scales.shape, dtype=torch.uint8, device=scales.device)
            if out is None
            else out
        )
        if _C is not None and scales.device.type == "cpu":
            lost = _C.finish_scales(
                scales=scales,
                tile_segment=tile_segment,
                exponent=self.exponent.int(),
                out=codes,
                threads=torch.get_num_threads(),
            )
            return codes, torch.tensor(lost, dtype=torch.int64, device="cpu")
        zeros = []
        for first in range(0, len(scales), CHUNK):
            at = slice(first, first + CHUNK)
            codes[at] = _e4m3(scales[at], self.exponent[tile_segment[at].long()])
            zeros.append(((scales[at] > 0) & (codes[at] == 0)).sum())
        none = torch.zeros((), dtype=torch.int64, device="cpu")
        return codes, torch.stack(zeros).sum() if zeros else none


def lost_groups(lost: int, total: int) -> str:
    """The warning about groups whose scale is too small for e4m3."""
    return (
        f"{lost} of {total} groups are zero in the packed basis (a group: 128 weights of one row): "
        "they differ from the center by less than 2^-17 of what the same row does elsewhere in the "
        "segment, so hardly anything is lost; finer segments keep them"
    )


def _e4m3(scales: Tensor, exponent: Tensor) -> Tensor:
    """Bits of scales * 2^-exponent as e4m3, rounded to nearest even.

    Scales are bfloat16 of 4 significant bits, not negative, below 2^(exponent + 8). A normal number
    keeps its three mantissa bits; only the exponent's bias changes.
    """
    bits = scales.view(torch.int16) >> 4  # biased exponent, then the mantissa bits that are in use
    code = bits - (exponent + 120) * 8
    small = (code < 8) | (bits == 0)  # below e4m3's normal range, or zero
    if small.device.type != "cpu" or small.any():  # a GPU need not wait for the answer
        power = ((1023 + 9 - exponent.long()) << 52).view(torch.float64)  # 512 * 2^-exponent
        code = torch.where(small, (scales.double() * power).round().to(torch.int16), code)
    return code.to(torch.uint8)


def row_divisor(sum_sq: Tensor, normalize: str) -> Tensor:
    """What each row part is divided by, (n, L) float64, from its squared norm sum_sq (n, L).

    0 for parts that are zero.
    """
    if normalize == "none":
        return (sum_sq > 0).double()
    norms = sum_sq.sum(1, keepdim=True).sqrt()  # (n, 1)
    # Lower quartile of the norms that are not zero: far-off rows do not set the scale, a
    # near-duplicate of the center neither.
    ordered = torch.where(norms > 0, norms, torch.inf).sort(0).values
    common = ordered.gather(0, ((norms > 0).sum(0, keepdim=True) - 1).clamp(min=0) // 4)  # (1, 1)
    return torch.where(sum_sq > 0, (norms / common).expand_as(sum_sq), 0.0)
