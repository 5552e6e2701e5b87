"""Adapters merged in place into the live weights, and unmerged exactly.

Live peft layers cost several times the speed of merged weights. So the deltas are added to the
weights themselves, each time from a pristine copy of the layer: nothing accumulates, the order of
switches does not matter, and the storage of a weight never moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from experimance_controlnet.engine.kernels.host_merge import plan_anywhere
from experimance_controlnet.engine.kernels.merge import (
    MergePlan,
    Target,
    Update,
    as_matrix,
    as_matrix_like,
)
from experimance_controlnet.engine.lora import LoraFactors
from experimance_controlnet.engine.offload import to_host

_PLANS = 8
"""Sets of adapters whose plans are kept: about a megabyte each, and some 50 ms to make anew."""


class AdapterMerger:
    """Keeps one module's weights equal to pristine weights plus the wanted adapters.

    A switch writes every layer that any adapter has touched so far, whatever was written before.
    """

    def __init__(self, component: str, module: torch.nn.Module) -> None:
        """``component`` is the module's key in :attr:`LoraFactors.deltas`."""
        self._component = component
        self._module = module
        self._parked = False  # pristine copies lie in the host's memory
        self._layers: dict[str, torch.nn.Module] = {}  # all that were ever touched
        self._pristine: dict[str, torch.Tensor] = {}  # of these
        self._places: list[int] = []  # where the plans believe their weights to be
        self._plans: dict[tuple[LoraFactors, ...], MergePlan] = {}  # the latest used is the last
        self._merged: tuple[tuple[LoraFactors, float], ...] | None = ()
        self._listener: Callable[[], None] = lambda: None

    @property
    def pristine_bytes(self) -> int:
        """What the copies take, wherever they lie."""
        return sum(copy.nbytes for copy in self._pristine.values())

    def pristine_weights(self) -> dict[str, torch.Tensor]:
        """What the weights of all layers that were ever touched are without adapters, by their
        names in the module's state. Nobody writes them.
        """
        return {f"{path}.weight": copy for path, copy in self._pristine.items()}

    def on_write(self, listener: Callable[[], None]) -> None:
        """Have ``listener`` called whenever weights were written: who holds what was made of them
        makes it anew. If it fails, the adapters do not count as merged.
        """
        self._listener = listener

    def apply(self, adapters: Sequence[tuple[LoraFactors, float]]) -> None:
        """Make exactly these adapters, at these strengths, the ones that are merged.

        Costs nothing where they are already.

        Raises:
            ValueError: an adapter does not fit the module; nothing is written.
        """
        wanted = tuple(adapters)
        if wanted == self._merged:
            return
        self._merged = None  # until done: an error half-way must not leave a claim behind
        plan = self._plan(tuple(factors for factors, _ in wanted))
        plan.run([strength for _, strength in wanted])
        self._listener()
        self._merged = wanted

    def park(self) -> None:
        """Move the pristine copies to the host's memory, for good. The live weights stay. If there
        is too little memory for it, so do the copies.
        """
        self._pristine = {
            path: to_host(copy) if copy.is_cuda else copy for path, copy in self._pristine.items()
        }
        self._parked = True
        self._plans.clear()

    def forget(self, factors: LoraFactors) -> None:
        """Give up all hold on an adapter, merged or not; it stays merged until the next one is."""
        for adapters in [adapters for adapters in self._plans if factors in adapters]:
            del self._plans[adapters]
        if self._merged is not None and factors in (merged for merged, _ in self._merged):
            self._merged = None  # by what is merged nothing can be recognised any more

    def _plan(self, adapters: tuple[LoraFactors, ...]) -> MergePlan:
        self._follow_the_weights()
        plan = self._plans.pop(adapters, None)
        if plan is None:
            self._touch(adapters)
            targets = [self._target(path, adapters) for path in self._pristine]
            plan = plan_anywhere(targets)
        self._plans[adapters] = plan
        if len(self._plans) > _PLANS:
            del self._plans[next(iter(self._plans))]
        return plan

    def _touch(self, adapters: tuple[LoraFactors, ...]) -> None:
        """Copy the layers that are touched for the first time, which no plan so far restores."""
        touched = {path for factors in adapters for path in factors.deltas[self._component]}
        for path in sorted(touched - self._pristine.keys()):
            self._plans.clear()
            layer = self._module.get_submodule(path)
            weight = _weight(layer)
            with torch.inference_mode(False):  # or it could not become a parameter again
                self._pristine[path] = to_host(weight) if self._parked else weight.clone()
            self._layers[path] = layer
            self._places.append(_place(layer))

    def _follow_the_weights(self) -> None:
        """Plans hold addresses: of weights that are elsewhere now they know nothing."""
        places = [_place(layer) for layer in self._layers.values()]
        if places != self._places:
            self._plans.clear()
            self._places = places

    def _target(self, path: str, adapters: tuple[LoraFactors, ...]) -> Target:
        weight = _weight(self._layers[path])
        deltas = [factors.deltas[self._component].get(path) for factors in adapters]
        updates = [
            Update(delta.up, as_matrix_like(delta.down, weight), delta.scale, slot)
            for slot, delta in enumerate(deltas)
            if delta is not None
        ]
        pristine = as_matrix_like(self._pristine[path], weight)
        return Target(as_matrix(weight), pristine, updates)


def _place(layer: torch.nn.Module) -> int:
    return layer.weight.data_ptr()  # type: ignore[operator]  # asked at every switch: no check


def _weight(layer: torch.nn.Module) -> torch.Tensor:
    assert isinstance(layer.weight, torch.Tensor)
    return layer.weight.detach()
