"""From the host to the device."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device. On CUDA nobody waits for it: a plain copy would wait for everything
    that the device still has to do.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def copied_to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Always a copy, laid out alike. From pinned memory nobody waits for it: the tensor must not
    be written until :func:`wait_for` has returned.
    """
    return tensor.to(device, non_blocking=True, copy=True)


def wait_for(device: torch.device) -> None:
    """Until the device has done what this thread has queued."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
