"""Parameters of several layers in one tensor, so that one matrix product serves them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from experimance_controlnet.errors import BadWeightsError


def fuse_rows(layers: Sequence[nn.Linear]) -> torch.Tensor:
    """The layers' weights on top of each other, (sum of out_features, in_features).

    The layers' own parameters become views of it: who changes them in place changes it too, and
    the weights exist once. The storage never moves thereafter.
    """
    fused = torch.cat([layer.weight.detach() for layer in layers])
    first = 0
    for layer in layers:
        end = first + layer.out_features
        layer.weight.data = fused[first:end]
        first = end
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
