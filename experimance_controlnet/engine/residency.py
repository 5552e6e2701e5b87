"""Which models are in memory: as many as fit by measured free memory, least recently used leave."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Generic, TypeVar

import psutil
import structlog
import torch

log = structlog.get_logger()

ModelT = TypeVar("ModelT")

ACTIVATION_BYTES = 3 * 1024**3
"""Left free for activations: what a 1024x1024 batch needs beside the weights, with a margin."""


def free_memory_bytes(device: torch.device) -> int:
    """Free memory where models live: the device's, or the host's for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


class ResidentModels(Generic[ModelT]):
    """Loaded models by name, in order of use. Reading ``names`` is safe on any thread."""

    def __init__(self, free_bytes: Callable[[], int], release: Callable[[], None]) -> None:
        """``free_bytes`` measures, ``release`` gives the memory of dropped models back."""
        self._free_bytes = free_bytes
        self._release = release
        self._models: OrderedDict[str, ModelT] = OrderedDict()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._models)

    def peek(self, name: str) -> ModelT:
        """The model; it does not count as a use. Safe on any thread."""
        return self._models[name]

    def use(self, name: str) -> ModelT:
        """The model, which thereby becomes the most recently used."""
        self._models.move_to_end(name)
        return self._models[name]

    def add(self, name: str, model: ModelT) -> None:
        self._models[name] = model

    def drop(self, name: str) -> None:
        del self._models[name]
        self._release()
        log.info("model_unloaded", model=name)

    def make_room(self, needed_bytes: int, in_use: Collection[str]) -> None:
        """Drop idle models until the bytes are free, or none is left to drop: then loading may
        still succeed, since what is needed is an estimate.
        """
        if self._free_bytes() < needed_bytes:
            self._release()  # what allocators keep for later counts as used
        for name in tuple(self._models):
            if self._free_bytes() >= needed_bytes:
                return
            if name not in in_use:
                self.drop(name)
