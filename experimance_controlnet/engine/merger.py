"""Adapters merged in place into the live weights, and unmerged exactly.

Live peft layers cost several times the speed of merged weights. So the deltas are added to the
weights themselves, each time from a pristine copy of the layer: nothing accumulates, the order of
switches does not matter, and the storage of a weight never moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from experimance_controlnet.engine.lora import LoraFactors


class AdapterMerger:
    """Keeps one module's weights equal to pristine weights plus the wanted adapters."""

    def __init__(self, component: str, module: torch.nn.Module) -> None:
        """``component`` is the module's key in :attr:`LoraFactors.deltas`."""
        self._component = component
        self._module = module
        self._pristine: dict[str, torch.Tensor] = {}
        self._merged: tuple[tuple[LoraFactors, float], ...] | None = ()
        self._altered: set[str] = set()

    def apply(self, adapters: Sequence[tuple[LoraFactors, float]]) -> None:
        """Make exactly these adapters, at these strengths, the ones that are merged.

        Costs nothing where they are already.
        """
        wanted = tuple(adapters)
        if wanted == self._merged:
            return
        self._merged = None  # until done: an error half-way must not leave a claim behind
        touched: set[str] = set()
        for factors, _ in adapters:
            touched |= factors.deltas[self._component].keys()
        for path in sorted(self._altered - touched):
            self._weight(path).copy_(self._pristine[path])
        for path in sorted(touched):
            self._merge_layer(path, adapters)
        self._altered = touched
        self._merged = wanted

    def _merge_layer(self, path: str, adapters: Sequence[tuple[LoraFactors, float]]) -> None:
        weight = self._weight(path)
        if path not in self._pristine:
            self._pristine[path] = weight.detach().clone()
        self._altered.add(path)  # from here on there is something to put back
        total = self._pristine[path].float().contiguous().clone()
        for factors, strength in adapters:
            delta = factors.deltas[self._component].get(path)
            if delta is not None:
                delta.add_to(total, strength)
        weight.copy_(total)

    def _weight(self, path: str) -> torch.Tensor:
        return self._module.get_parameter(f"{path}.weight")
