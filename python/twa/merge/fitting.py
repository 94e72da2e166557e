"""A method as candidates, shards and data can have it, and a note where that is another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..basis.contents import rows_of
from ..basis.segments import segments_of
from ..batchnorm import batch_size
from ..coordinates import trained_count
from ..distributed.sharding import Sharding
from ..tasks.batches import generators_kept
from .settings import TwaMethod

#: granularities, finest first, that TWA-v falls back to
COARSER = ("fine", "tensor", "block", "model")


def fitted(
    method: TwaMethod, sharding: Sharding, heldout: Iterable | None
) -> tuple[TwaMethod, str]:
    """The method that can be trained in the place of this one.

    Args:
        method: as it was asked for
        sharding: of the model and the candidates
        heldout: what TWA-v trains on; None: no matter how many samples that are

    Returns:
        the method, and what the note says of it: "", or "; ..."
    """
    method, own = for_recording(method, sharding)
    method, few = _for_samples(method, sharding, heldout)
    return method, own + few


def for_recording(method: TwaMethod, sharding: Sharding) -> tuple[TwaMethod, str]:
    """Of a recording, its own rows: differences of so many bits."""
    recording = sharding.candidates.recording
    if recording is None or method.bits == 32 or method.basis != "deltas":
        return method, ""
    if sharding.name == "rows":
        return method, ""
    return replace(method, basis="differences", bits=recording.bits), "; its own rows"


def samples_needed(coefficients: int) -> int:
    """Held-out samples from which on so many coefficients of TWA-v do not overfit.

    16 c^0.4 runs through what docs/claims.md has measured: 64 for 32, 256 for 896, 1024 for 28,352.
    """
    return round(16 * coefficients**0.4)


def _for_samples(
    method: TwaMethod, sharding: Sharding, heldout: Iterable | None
) -> tuple[TwaMethod, str]:
    """TWA-v with as many coefficients as its held-out samples bear."""
    if method.kind != "v" or heldout is None:
        return method, ""
    names = list(sharding.key_map.trained)
    numels = sharding.key_map.numels(sharding.candidates.info)
    n = len(sharding.candidates)

    def needed(granularity: str | int) -> int:
        segments = len(segments_of(names, numels, granularity).labels)
        rows, balanced = rows_of(method.basis, n), method.can_be_balanced
        return samples_needed(trained_count(method.constraint, n, rows, balanced) * segments)

    asked = needed(method.granularity)
    samples = count_samples(heldout, asked)
    if samples >= asked:
        return method, ""
    coarser = [g for g in COARSER if needed(g) < asked]
    fits = next((g for g in coarser if needed(g) <= samples), "model")
    what = method.granularity if isinstance(method.granularity, str) else "such"
    why = f"; {samples:,} held-out samples are too few for {what} coefficients ({asked:,})"
    if method.granularity == "model":
        return method, why.replace("such", "model")
    return replace(method, granularity=fits), why


def count_samples(data: Iterable, enough: int) -> int:
    """Samples in all batches, or in as many as have enough.

    A batch whose size does not show counts as one.
    """
    samples = 0
    with generators_kept(data):
        for batch in data:
            samples += batch_size(batch) or 1
            if samples >= enough:
                break
    return samples
