"""Weights that lie in the host's memory and are on the device only while they are used.

The libraries' own offloading waits for the device at each layer. Here nothing waits: copies from
pinned memory are queued like kernels, and the allocator reuses a layer's memory in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory, laid out alike; pinned where the tensor is on CUDA or pinned."""
    pin = tensor.is_cuda or tensor.is_pinned()
    copy = torch.empty_like(tensor, device="cpu", pin_memory=pin)
    return copy.copy_(tensor)


def stream_weights(module: nn.Module, device: torch.device) -> None:
    """Park the weights of a module and bring each layer's to the device while it is evaluated.

    The weights in the host's memory are the valid ones: who changes a parameter in place between
    two evaluations changes them. Buffers, all small, go to the device for good. If there is too
    little memory for it, nothing has been parked.
    """
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
    parked = [
        (layer, [(weight, _pinned(weight.data, device)) for weight in weights])
        for layer in module.modules()
        if (weights := list(layer.parameters(recurse=False)))
    ]
    for layer, pairs in parked:
        _Visits(layer, pairs, device)


class _Visits:
    """One layer's parameters, on the device during its ``forward``."""

    def __init__(
        self,
        layer: nn.Module,
        parked: Sequence[tuple[nn.Parameter, torch.Tensor]],
        device: torch.device,
    ) -> None:
        """``parked``: each parameter and its weight in the host's memory."""
        self._device = device
        self._parked = parked
        self._leave()
        layer.register_forward_pre_hook(self._arrive)
        # also after an error, or a merge would write into a copy that nobody keeps
        layer.register_forward_hook(self._leave, always_call=True)

    def _arrive(self, *_: Any) -> None:
        for parameter, weight in self._parked:
            parameter.data = weight.to(self._device, non_blocking=True, copy=True)

    def _leave(self, *_: Any) -> None:
        for parameter, weight in self._parked:
            parameter.data = weight


def _pinned(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return weight
    return to_host(weight) if weight.is_cuda else weight.pin_memory()
