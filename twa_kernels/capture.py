"""What the capture of a CUDA graph allows: no waiting for the device."""

from __future__ import annotations

import torch


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records what is done on the device's current stream.

    It keeps addresses, not tensors.
    """
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def refuse_reading_back(op: str, device: torch.device) -> None:
    """Raises RuntimeError under the capture of a CUDA graph, for ops that wait for the device."""
    if capturing(device):
        raise RuntimeError(
            f"{op}: reads results back from the device, which a CUDA graph cannot capture"
        )


def refuse_capture(device: torch.device) -> None:
    """Raises RuntimeError under the capture of a CUDA graph, for an op's first call.

    What the op prepares then waits for the device, which a CUDA graph cannot record.
    """
    if capturing(device):
        raise RuntimeError(
            "the first call with this basis (and these options) waits for the device, which a CUDA"
            " graph cannot capture: make the same call once before the capture"
        )
