"""What is on the device: as much as fits as measured; the least recently used leaves."""

from __future__ import annotations

from collections import OrderedDict
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
        park: Callable[[Asset, Any], bool] = lambda asset, thing: False,
    ) -> None:
        """``free_bytes`` measures, ``release`` gives the memory of what was dropped back;
        ``forget`` is told of each thing that is about to leave. What leaves for want of room is
        given to ``park`` before that; it says whether it keeps a copy elsewhere.
        """
        self._free_bytes = free_bytes
        self._release = release
        self._forget = forget
        self._park = park
        self._things: OrderedDict[Asset, Any] = OrderedDict()

    def names(self, kind: str) -> tuple[str, ...]:
        """Of all assets of that kind, the least recently used first."""
        return tuple(asset.name for asset in tuple(self._things) if asset.kind == kind)

    def __contains__(self, asset: Asset) -> bool:
        return asset in self._things

    def peek(self, asset: Asset) -> Any:
        """What was added for the asset; it does not count as a use."""
        return self._things[asset]

    def use(self, asset: Asset) -> Any:
        """The same; the asset thereby becomes the most recently used."""
        self._things.move_to_end(asset)
        return self._things[asset]

    def add(self, asset: Asset, thing: Any) -> None:
        self._things[asset] = thing

    def drop(self, asset: Asset) -> None:
        """Let the asset go for good, and with a model the LoRAs that were read against it."""
        self._remove(asset)
        log.info(f"{asset.kind}_unloaded", **{asset.kind: asset.name})

    def _remove(self, asset: Asset) -> None:
        for lora in self._loras_of(asset):
            del self._things[lora]
        self._forget(asset, self._things[asset])
        del self._things[asset]
        self._release()

    def _loras_of(self, asset: Asset) -> list[Asset]:
        """None where it is no model."""
        is_model = asset.kind == "model"
        return [lora for lora in self._things if is_model and lora.model == asset.name]

    def _make_leave(self, asset: Asset) -> None:
        """The same, for want of room."""
        for lora in self._loras_of(asset):
            self._park(lora, self._things[lora])
        if self._park(asset, self._things[asset]):
            self._remove(asset)
        else:
            self.drop(asset)

    def drop_idle(self, in_use: Collection[Asset]) -> None:
        """Make everything leave that is not in use."""
        for asset in tuple(self._things):
            if asset in self._things and asset not in in_use:
                self._make_leave(asset)

    def make_room(self, needed_bytes: int, in_use: Collection[Asset]) -> bool:
        """Make idle assets leave until the bytes are free; False where that does not suffice."""
        for asset in tuple(self._things):
            if self._free_bytes() >= needed_bytes:
                return True
            if asset in self._things and asset not in in_use:
                self._make_leave(asset)
        return self._free_bytes() >= needed_bytes
