"""The engine on the embedded model: real, tiny components."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from experimance_controlnet.catalog.registry import load_catalog
from experimance_controlnet.catalog.specs import Catalog
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine.request import (
    Adapter,
    Asset,
    Control,
    GenerationRequest,
    PixelImage,
    RequestState,
)
from experimance_controlnet.engine.sdxl import SdxlRunner
from tests.engine.oracle import Oracle

SIZE_PX = 256


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    return load_catalog("embedded")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    return ModelStore(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def oracle(catalog: Catalog, store: ModelStore) -> Oracle:
    return Oracle(catalog, store)


@pytest.fixture
def runner(catalog: Catalog, store: ModelStore) -> SdxlRunner:
    """A fresh one, ``lightning`` loaded."""
    return loaded(SdxlRunner(catalog, store, "cpu"), "lightning")


def loaded(runner: SdxlRunner, model: str) -> SdxlRunner:
    asset = Asset("model", model)
    runner.install(asset, runner.load(asset))
    return runner


def admitted(runner: SdxlRunner, request: GenerationRequest) -> RequestState:
    """Load what is missing, as the engine would, and take the request in."""
    while (asset := runner.missing(request)) is not None:
        runner.install(asset, runner.load(asset))
    return runner.admit(request, accepted_s=0.0)


def hills(seed: int = 0) -> Any:
    """A smooth depth map, 0..1."""
    phase = np.random.default_rng(seed).uniform(0, 6, size=4)
    y, x = np.mgrid[0:SIZE_PX, 0:SIZE_PX] / SIZE_PX * 6
    height = np.sin(x + phase[0]) * np.cos(y + phase[1]) + np.sin(2 * x + phase[2] + y)
    return ((height - height.min()) / np.ptp(height)).astype(np.float32)


RequestFactory = Callable[..., GenerationRequest]

_PLAIN = GenerationRequest(
    request_id="test",
    model="lightning",
    prompt="aerial view of a river in a forest at sunset",
    negative_prompt=None,
    width=SIZE_PX,
    height=SIZE_PX,
    steps=4,
    cfg=2.0,
    seed=7,
    scheduler="euler",
)
DEPTH = Control(controlnet="sdxl_small", depth=hills(), strength=0.8)
DRONE = (Adapter("drone", 0.8),)
TWO_ADAPTERS = (Adapter("drone", 0.8), Adapter("experimance", 0.4))


def make_request(**changes: Any) -> GenerationRequest:
    """A small request; ``changes`` are fields of GenerationRequest."""
    return dataclasses.replace(_PLAIN, **changes)


def draw(runner: SdxlRunner, *requests: GenerationRequest) -> list[PixelImage]:
    """Make the images, those of requests that may share a batch in one."""
    states = [admitted(runner, request) for request in requests]
    for state in states:
        runner.prepare(state)
    while running := [state for state in states if not state.finished]:
        step(runner, [state for state in running if state.key == running[0].key])
    return [runner.decode(state).result()[0] for state in states]


def step(runner: SdxlRunner, states: list[RequestState]) -> None:
    for state, prediction in zip(states, runner.predict(states), strict=True):
        runner.advance(state, prediction)


def draw_one(runner: SdxlRunner, **changes: Any) -> PixelImage:
    [image] = draw(runner, make_request(**changes))
    return image
