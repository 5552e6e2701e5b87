"""Less memory, the same pictures: on a CPU, where parking is a copy."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from experimance_controlnet.catalog.specs import Catalog
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine.engine import Engine
from experimance_controlnet.engine.request import Asset, RequestState
from experimance_controlnet.engine.sdxl import SdxlRunner
from experimance_controlnet.engine.tiers import MINIMAL, PARKED, RESIDENT, MemoryTier
from experimance_controlnet.engine.vae import Frame
from experimance_controlnet.errors import DeviceMemoryError
from tests.engine.conftest import (
    DEPTH,
    DRONE,
    SIZE_PX,
    TWO_ADAPTERS,
    admitted,
    draw,
    draw_one,
    loaded,
    make_request,
    step,
)
from tests.engine.oracle import all_equal, mean_difference

BIG_PX = 1024
"""Larger than a tile."""


@pytest.fixture(params=[PARKED, MINIMAL], ids=lambda tier: tier.name)
def frugal(request: pytest.FixtureRequest, catalog: Catalog, store: ModelStore) -> SdxlRunner:
    tier: MemoryTier = request.param
    runner = loaded(SdxlRunner(catalog, store, "cpu", tier=tier), "lightning")
    assert runner.memory_tier == tier.name
    return runner


def test_pictures_are_the_same(frugal: SdxlRunner, runner: SdxlRunner) -> None:
    for adapters in (TWO_ADAPTERS, (), DRONE):
        changes = {"adapters": adapters, "control": DEPTH}
        assert all_equal([draw_one(frugal, **changes), draw_one(runner, **changes)])


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("tier", [RESIDENT, PARKED, MINIMAL], ids=lambda tier: tier.name)
def test_what_leaves_is_gone_at_once(catalog: Catalog, store: ModelStore, tier: MemoryTier) -> None:
    """Programs that hold themselves would keep networks until garbage is collected."""
    runner = loaded(SdxlRunner(catalog, store, "cpu", tier=tier), "lightning")
    request = make_request(adapters=DRONE, control=DEPTH, steps=2)
    draw(runner, request)
    modules = runner._peek("lightning").modules
    parts = (modules.unet, modules.vae, modules.text_encoder, modules.text_encoder_2)
    left = [weakref.ref(part) for part in parts]
    left += [weakref.ref(runner._assets.peek(asset)) for asset in request.assets[:2]]
    del modules, parts
    for asset in reversed(request.assets):
        runner._assets.drop(asset)
    assert [reference() for reference in left] == [None] * 6


def test_parked_in_the_middle_of_its_life(runner: SdxlRunner) -> None:
    sets = (TWO_ADAPTERS, (), DRONE)
    before = [draw_one(runner, adapters=adapters) for adapters in sets]
    state = admitted(runner, make_request())
    notes = [runner.relieve(state, "prepare", in_use=())]
    state.notes.append("memory_released")
    runner.install(Asset("model", "lightning"), runner.load(Asset("model", "lightning")))
    draw_one(runner, adapters=TWO_ADAPTERS)
    notes += [runner.relieve(state, "prepare", in_use=()) for _ in range(2)]
    assert notes == ["memory_released", "offloaded", None]
    after = [draw_one(runner, adapters=adapters) for adapters in sets]
    for one, other in zip(before, after, strict=True):
        assert all_equal([one, other])


@pytest.mark.parametrize("width", [SIZE_PX, BIG_PX])
def test_what_a_request_can_do_without(runner: SdxlRunner, width: int) -> None:
    request = make_request(adapters=TWO_ADAPTERS, control=DEPTH, width=width, steps=1)
    state = admitted(runner, request)
    runner.install(Asset("model", "base"), runner.load(Asset("model", "base")))
    runner.prepare(state)
    step(runner, [state])
    given_up = []
    while (note := runner.relieve(state, "decode", in_use=request.assets)) is not None:
        given_up.append(note)
        state.notes.append(note)
        runner.decode(state).result()
    tiles = ["vae_tiled"] if width == BIG_PX else []  # a smaller one is no larger than a tile
    assert given_up == ["memory_released", *tiles, "offloaded"]
    assert runner.loaded_models == ("lightning",)
    assert all(runner.has(asset) for asset in request.assets)


def test_nothing_is_given_up_twice(frugal: SdxlRunner) -> None:
    state = admitted(frugal, make_request(width=BIG_PX))
    state.notes.append("memory_released")
    expected = None if frugal.memory_tier == "minimal" else "vae_tiled"
    assert frugal.relieve(state, "decode", in_use=()) == expected


class Tight(SdxlRunner):
    """Too small for a VAE on a whole picture."""

    def decode(self, state: RequestState) -> Frame:
        if not state.tiled:
            raise MemoryError
        return super().decode(state)


def test_notes_name_each_thing_once(catalog: Catalog, store: ModelStore) -> None:
    engine = Engine(Tight(catalog, store, "cpu"), queue_capacity=2, max_rows=2)
    engine.start()
    large, small = (make_request(width=width, steps=1) for width in (BIG_PX, SIZE_PX))
    [ticket, hopeless] = engine.submit([large, small])
    assert ticket.future.result(60).notes == ("memory_released", "vae_tiled")
    assert isinstance(hopeless.future.exception(60), DeviceMemoryError)
    engine.stop(timeout_s=1.0)


def test_a_large_picture_in_tiles(runner: SdxlRunner) -> None:
    state = admitted(runner, make_request(width=BIG_PX, height=SIZE_PX, steps=1))
    runner.prepare(state)
    step(runner, [state])
    whole, notes = runner.decode(state).result()
    assert notes == []
    state.tiled = True
    tiled, notes = runner.decode(state).result()
    assert notes == ["vae_tiled"]
    assert 0 < mean_difference(whole, tiled) < 12  # random weights exaggerate the statistics


def test_preparing_again_is_preparing_once(runner: SdxlRunner) -> None:
    once, twice = (admitted(runner, make_request(scheduler="euler_a")) for _ in range(2))
    runner.prepare(once)
    runner.prepare(twice)
    runner.prepare(twice)
    for state in (once, twice):
        while not state.finished:
            step(runner, [state])
    assert all_equal([runner.decode(state).result()[0] for state in (once, twice)])
