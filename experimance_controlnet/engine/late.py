"""A runner that comes later: importing torch and the model libraries takes seconds, in which the
server should answer already.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import structlog

from experimance_controlnet.engine.request import (
    Asset,
    GenerationRequest,
    RequestState,
)
from experimance_controlnet.engine.runner import GpuMemory, LoadSource, PendingFrame, Runner, Stage

log = structlog.get_logger()


class LateRunner:
    """See :class:`experimance_controlnet.engine.runner.Runner`.

    Hand :meth:`open` to the engine as ``on_start``. Until it has returned, the properties and
    :meth:`gpu_memory` say that there is nothing yet; nobody calls anything else.
    """

    def __init__(
        self, make: Callable[[], Runner], device_wish: str, precision_wish: str, tier_wish: str
    ) -> None:
        """``make`` is slow; the wishes stand for what comes of them until that is known."""
        self._make = make
        self._device_wish = device_wish
        self._precision_wish = precision_wish
        self._tier_wish = tier_wish
        self._made: Runner | None = None

    def open(self) -> None:
        """Make the runner. Raises what ``make`` does."""
        started_s = time.monotonic()
        self._made = self._make()
        seconds = round(time.monotonic() - started_s, 3)
        log.info(
            "engine_ready",
            device=self._made.device_name,
            precision=self._made.precision,
            memory_tier=self._made.memory_tier,
            seconds=seconds,
        )

    @property
    def _runner(self) -> Runner:
        assert self._made is not None, "open() comes first"
        return self._made

    @property
    def device_name(self) -> str:
        return self._device_wish if self._made is None else self._made.device_name

    @property
    def precision(self) -> str:
        return self._precision_wish if self._made is None else self._made.precision

    @property
    def memory_tier(self) -> str:
        return self._tier_wish if self._made is None else self._made.memory_tier

    @property
    def loaded_models(self) -> tuple[str, ...]:
        return () if self._made is None else self._made.loaded_models

    @property
    def parked_models(self) -> tuple[str, ...]:
        return () if self._made is None else self._made.parked_models

    def gpu_memory(self) -> GpuMemory | None:
        return None if self._made is None else self._made.gpu_memory()

    def missing(self, request: GenerationRequest) -> Asset | None:
        return self._runner.missing(request)

    def has(self, asset: Asset) -> bool:
        return self._made is not None and self._made.has(asset)

    def source(self, asset: Asset) -> LoadSource:
        return self._runner.source(asset)

    @property
    def load_share(self) -> float | None:
        return None if self._made is None else self._made.load_share

    def make_room(self, asset: Asset, in_use: Collection[Asset]) -> bool:
        return self._runner.make_room(asset, in_use)

    def load(self, asset: Asset) -> Any:
        return self._runner.load(asset)

    def install(self, asset: Asset, loaded: Any) -> None:
        self._runner.install(asset, loaded)

    def unload(self, model: str) -> None:
        self._runner.unload(model)

    def admit(self, request: GenerationRequest, accepted_s: float) -> RequestState:
        return self._runner.admit(request, accepted_s)

    def prepare(self, state: RequestState) -> None:
        self._runner.prepare(state)

    def predict(self, states: Sequence[RequestState]) -> Sequence[Any]:
        return self._runner.predict(states)

    def advance(self, state: RequestState, prediction: Any) -> None:
        self._runner.advance(state, prediction)

    def decode(self, state: RequestState) -> PendingFrame:
        return self._runner.decode(state)

    def warm_up(self) -> bool:
        return self._runner.warm_up()

    def release_memory(self) -> None:
        self._runner.release_memory()

    def relieve(self, state: RequestState, stage: Stage, in_use: Collection[Asset]) -> str | None:
        return self._runner.relieve(state, stage, in_use)
