"""What is in memory: as much as fits by measured free memory, the least recently used leaves."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import structlog

from experimance_controlnet.engine.request import Asset

log = structlog.get_logger()


class Residency:
    """Models, ControlNets and LoRAs in memory, in order of use. Reading is safe on any thread."""

    def __init__(
        self,
        free_bytes: Callable[[], int],
        release: Callable[[], None],
        forget: Callable[[Asset, Any], None] = lambda asset, thing: None,
        park: Callable[[Asset, Any], object] = lambda asset, thing: None,
    ) -> None:
        """``free_bytes`` measures, ``release`` gives the memory of what was dropped back;
        ``forget`` is told of each thing that is about to leave, but for LoRAs that leave with their
        model.
        """
        self._park = park  # is given what leaves for want of room before it does
        self._free_bytes = free_bytes
        self._release = release
        self._forget = forget
        # In order of use. Replaced and never changed, since other threads iterate over it.
        self._things: dict[Asset, Any] = {}

    def names(self, kind: str) -> tuple[str, ...]:
        """Of all assets of that kind, the least recently used first."""
        return tuple(asset.name for asset in self._things if asset.kind == kind)

    def __contains__(self, asset: Asset) -> bool:
        return asset in self._things

    def peek(self, asset: Asset) -> Any:
        """What was added for the asset; it does not count as a use."""
        return self._things[asset]

    def use(self, asset: Asset) -> Any:
        """The same; the asset thereby becomes the most recently used."""
        thing = self._things[asset]
        self.add(asset, thing)
        return thing

    def add(self, asset: Asset, thing: Any) -> None:
        self._things = {**self._without({asset}), asset: thing}

    def drop(self, asset: Asset) -> None:
        """Let the asset go, and with a model the LoRAs that were read against it."""
        self._forget(asset, self._things[asset])
        self._things = self._without(self._leaving_with(asset))
        self._release()
        log.info(f"{asset.kind}_unloaded", **{asset.kind: asset.name})

    def _make_leave(self, asset: Asset) -> None:
        """Drop it, after what leaves with it was parked; both may come back."""
        for leaving in self._leaving_with(asset):
            self._park(leaving, self._things[leaving])
        self.drop(asset)

    def drop_idle(self, in_use: Collection[Asset]) -> None:
        """Let everything go that is not in use."""
        for asset in tuple(self._things):  # not the dict, which would keep what is dropped
            if asset in self._things and asset not in in_use:
                self._make_leave(asset)

    def make_room(self, needed_bytes: int, in_use: Collection[Asset]) -> bool:
        """Drop idle assets until the bytes are free; False where that does not suffice."""
        for asset in tuple(self._things):
            if self._free_bytes() >= needed_bytes:
                return True
            if asset in self._things and asset not in in_use:
                self._make_leave(asset)
        return self._free_bytes() >= needed_bytes

    def _leaving_with(self, asset: Asset) -> list[Asset]:
        """The LoRAs that were read against a model, and the asset itself, last."""
        is_model = asset.kind == "model"
        loras = [other for other in self._things if is_model and other.model == asset.name]
        return [*loras, asset]

    def _without(self, assets: Collection[Asset]) -> dict[Asset, Any]:
        return {other: thing for other, thing in self._things.items() if other not in assets}
