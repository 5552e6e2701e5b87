"""Parameters of several layers in one tensor, so that one matrix product serves them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from experimance_controlnet.errors import BadWeightsError


def fuse_rows(layers: Sequence[nn.Linear], device: torch.device) -> torch.Tensor:
    """The layers' weights on top of each other on the device, (sum of out_features, in_features).

    The layers' own parameters become views of it: who changes them in place changes it too, and
    the weights exist once. The storage never moves thereafter. Weights that are still in the host's
    memory (see ``checkpoint.py``) leave no gaps in the device's.
    """
    rows, columns = sum(layer.out_features for layer in layers), layers[0].in_features
    fused = torch.empty((rows, columns), dtype=layers[0].weight.dtype, device=device)
    first = 0
    for layer in layers:
        own = fused[first : first + layer.out_features]
        layer.weight.data = own.copy_(layer.weight.detach(), non_blocking=True)
        first += layer.out_features
    return fused


def require(condition: bool, what: str) -> None:
    """Refuse a model that the network would compute wrongly.

    Raises:
        BadWeightsError: it is not built as SDXL is.
    """
    if not condition:
        raise BadWeightsError(f"The model is not built as SDXL is: {what}.")


def to_channels_last(module: nn.Module) -> None:
    """Lay the module's convolution weights out as the activations are; a no-op where they are."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
