"""A runner without a model, for tests of engine and server: same interface, toy arithmetic.

The "image" is flat: its colour is a function of the seed, and the same alone or in a batch. What
happens in which order is recorded; what should go wrong is handed in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch

from experimance_controlnet.engine.request import (
    Asset,
    BatchKey,
    Conditioning,
    GenerationRequest,
    PhaseTimer,
    PixelImage,
    RequestState,
)
from experimance_controlnet.engine.runner import GpuMemory, LoadSource, PendingFrame, Stage
from experimance_controlnet.engine.schedulers import make_scheduler

Fault = Callable[[str, list[GenerationRequest]], None]
"""Called before each operation, with the requests that it is for; what it raises comes out."""


class FakeFrame:
    """A flat picture."""

    decode_s = 0.0

    def __init__(
        self,
        request: GenerationRequest,
        ready_s: float,
        fault: Fault = lambda operation, requests: None,
    ) -> None:
        """Ready when ``time.monotonic()`` is ``ready_s``."""
        self._request = request
        self._ready_s = ready_s
        self._fault = fault

    def ready(self) -> bool:
        return time.monotonic() >= self._ready_s

    def result(self) -> tuple[PixelImage, list[str]]:
        self._fault("result", [self._request])
        time.sleep(max(0.0, self._ready_s - time.monotonic()))
        colour = np.array([self._request.seed % 251 + 1, 128, 64], dtype=np.uint8)
        size = (self._request.height, self._request.width, 3)
        return np.broadcast_to(colour, size).copy(), []


class FakeRunner:
    """Takes ``step_s`` seconds a step and ``load_s`` a model; a frame is ready after ``frame_s``.

    ``fault(operation, requests)`` is called before each of ``make_room``, ``load`` and ``warm_up``
    (without requests), ``admit``, ``prepare``, ``predict``, ``advance``, ``decode`` and ``result``
    of a frame: raise in it to make that fail. ``remedies`` are what :meth:`relieve` can do for each
    request, in order; ``room(asset, in_use)`` is what :meth:`make_room` says. ``parked`` are models
    that wait in the host's memory at first.
    """

    device_name = "fake"
    precision = "fp32"
    memory_tier = "resident"
    load_share: float | None = 0.5

    def __init__(
        self,
        *,
        step_s: float = 0.0,
        load_s: float = 0.0,
        frame_s: float = 0.0,
        fault: Fault = lambda operation, requests: None,
        remedies: Sequence[str] = (),
        room: Callable[[Asset, Collection[Asset]], bool] = lambda asset, in_use: True,
        parked: Sequence[str] = (),
    ) -> None:
        self._step_s = step_s
        self._load_s = load_s
        self._frame_s = frame_s
        self._fault = fault
        self._remedies = remedies
        self._room = room
        self._models: list[str] = []
        self._parked = list(parked)
        self.batches: list[list[str]] = []
        """Request ids of each evaluation."""

    @property
    def loaded_models(self) -> tuple[str, ...]:
        return tuple(self._models)

    @property
    def parked_models(self) -> tuple[str, ...]:
        return tuple(self._parked)

    def gpu_memory(self) -> GpuMemory | None:
        return None

    def missing(self, request: GenerationRequest) -> Asset | None:
        asset = Asset("model", request.model)
        return None if self.has(asset) else asset

    def has(self, asset: Asset) -> bool:
        return asset.name in self._models

    def source(self, asset: Asset) -> LoadSource:
        return "host" if asset.name in self._parked else "disk"

    def make_room(self, asset: Asset, in_use: Collection[Asset]) -> bool:
        self._fault("make_room", [])
        return self._room(asset, in_use)

    def load(self, asset: Asset) -> Any:
        self._fault("load", [])
        time.sleep(self._load_s)
        return asset.name

    def install(self, asset: Asset, loaded: Any) -> None:
        self._models.append(asset.name)
        self._parked = [model for model in self._parked if model != asset.name]

    def unload(self, model: str) -> None:
        self._models = [other for other in self._models if other != model]
        self._parked = [other for other in self._parked if other != model]

    def admit(self, request: GenerationRequest, accepted_s: float) -> RequestState:
        self._fault("admit", [request])
        key = BatchKey(request.model, request.adapters, request.width, request.height, 1)
        return RequestState(
            request=request,
            key=key,
            timer=PhaseTimer(accepted_s),
            scheduler=make_scheduler(request.scheduler, {}, request.steps),
            generator=torch.Generator(),
        )

    def prepare(self, state: RequestState) -> None:
        self._fault("prepare", [state.request])
        nothing = torch.empty(0)
        state.conditioning = Conditioning(nothing, nothing, None, 1, 0)

    def predict(self, states: Sequence[RequestState]) -> Sequence[Any]:
        self.batches.append([state.request.request_id for state in states])
        self._fault("predict", [state.request for state in states])
        time.sleep(self._step_s)
        return [None] * len(states)

    def advance(self, state: RequestState, prediction: Any) -> None:
        self._fault("advance", [state.request])
        state.step += 1

    def decode(self, state: RequestState) -> PendingFrame:
        self._fault("decode", [state.request])
        return FakeFrame(state.request, time.monotonic() + self._frame_s, self._fault)

    def warm_up(self) -> bool:
        self._fault("warm_up", [])
        return False

    def release_memory(self) -> None:
        pass

    def relieve(self, state: RequestState, stage: Stage, in_use: Collection[Asset]) -> str | None:
        return next((note for note in self._remedies if note not in state.notes), None)
