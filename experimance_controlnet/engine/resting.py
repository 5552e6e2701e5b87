"""What models, ControlNets and LoRAs are while they are not in service: tensors by name, and a
frame that says what to build around them. Built anew, they are evaluated to the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from experimance_controlnet.engine.weights import build_configured, fill

Key = tuple[str, str]
"""A component, such as ``unet``, and the name of a tensor in it."""


class Frame(Protocol):
    """What an asset is beside its tensors; holds none."""

    def build(self, tensors: Mapping[Key, torch.Tensor]) -> Any:
        """What reading the asset's files gives; the tensors become part of it."""
        ...


@dataclass(frozen=True, slots=True)
class ModuleFrame:
    """A module of diffusers or transformers without its tensors."""

    name: str
    """Of the component that it is."""
    component: type
    config: Any

    @classmethod
    def of(cls, name: str, module: Any) -> ModuleFrame:
        """The frame of a module that ``weights.py`` has filled."""
        return cls(name, type(module), module.config)

    def build(self, tensors: Mapping[Key, torch.Tensor]) -> Any:
        """The module, with the tensors of its component as its weights."""
        module = build_configured(self.component, self.config)
        fill(
            self.name, module, {key[1]: own for key, own in tensors.items() if key[0] == self.name}
        )
        return module


@dataclass(frozen=True, slots=True)
class AtRest:
    """An asset, taken apart. Adapters are not in the tensors, whatever is merged."""

    frame: Frame
    on_device: dict[Key, torch.Tensor]
    on_host: dict[Key, torch.Tensor]
    """What lives in the host's memory anyway, for the memory tier's sake."""


def module_tensors(name: str, module: torch.nn.Module) -> dict[Key, torch.Tensor]:
    """The tensors of a module that is the component ``name``, where they are."""
    return {(name, key): tensor for key, tensor in module.state_dict().items()}


def total_bytes(tensors: Mapping[Key, torch.Tensor]) -> int:
    """What the tensors take."""
    return sum(tensor.nbytes for tensor in tensors.values())
