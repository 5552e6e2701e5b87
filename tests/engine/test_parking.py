"""Models that leave the device and come back from the host's memory, on a CPU that stands for both:
what is parked is a copy, and so is what comes back.
"""

from __future__ import annotations

import dataclasses
import gc
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experimance_controlnet.catalog.specs import Catalog, Source
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine.engine import Engine
from experimance_controlnet.engine.host_cache import HostCache
from experimance_controlnet.engine.precision import EMULATED_FP8, FP32, Precision
from experimance_controlnet.engine.request import Asset, PixelImage
from experimance_controlnet.engine.sdxl import SdxlRunner
from experimance_controlnet.engine.tiers import PARKED, RESIDENT, MemoryTier
from experimance_controlnet.errors import ModelFileError
from tests.engine.conftest import (
    DEPTH,
    DRONE,
    TWO_ADAPTERS,
    draw,
    draw_one,
    loaded,
    make_request,
)
from tests.engine.oracle import all_equal

GB = 10**9
WAIT_S = 60.0
SETS: tuple[dict[str, Any], ...] = (
    {"steps": 1, "adapters": ()},
    {"steps": 1, "adapters": DRONE, "control": DEPTH},
    {"steps": 1, "adapters": TWO_ADAPTERS},
)


def host(free_bytes: int = GB) -> HostCache:
    return HostCache(lambda: free_bytes, lambda: None, pin=False)


@pytest.fixture
def parking(catalog: Catalog, store: ModelStore) -> SdxlRunner:
    return loaded(SdxlRunner(catalog, store, "cpu", host_cache=host()), "lightning")


def make_all_leave(runner: SdxlRunner) -> None:
    """As when memory has run out."""
    runner._assets.drop_idle(in_use=())
    assert runner.loaded_models == ()


def draw_sets(runner: SdxlRunner, model: str = "lightning") -> list[PixelImage]:
    return [draw_one(runner, model=model, **changes) for changes in SETS]


@pytest.mark.parametrize(
    ("tier", "precision"),
    [(RESIDENT, FP32), (PARKED, FP32), (RESIDENT, EMULATED_FP8)],
    ids=lambda choice: choice.name,
)
def test_the_same_bits_after_coming_back(
    catalog: Catalog, store: ModelStore, tier: MemoryTier, precision: Precision
) -> None:
    runner = SdxlRunner(catalog, store, "cpu", precision, tier, host_cache=host())
    expected = draw_sets(runner)  # the last one's adapters are merged when it leaves
    for _ in range(2):
        make_all_leave(runner)
        assert list(runner.parked_models) == ["lightning"]
        for picture, again in zip(expected, draw_sets(runner), strict=True):
            assert all_equal([picture, again])
        assert list(runner.parked_models) == []


def test_parked_after_its_encoders_were(parking: SdxlRunner) -> None:
    """What memory ran out for in the middle of its life is parked from where it is."""
    expected = draw_sets(parking)
    make_all_leave(parking)
    draw_sets(parking)
    parking._peek("lightning").park()
    draw_one(parking, adapters=TWO_ADAPTERS)
    make_all_leave(parking)
    for picture, again in zip(expected, draw_sets(parking), strict=True):
        assert all_equal([picture, again])


@pytest.fixture
def movable(catalog: Catalog, tmp_path: Path) -> tuple[Catalog, Callable[[], None]]:
    """The embedded catalogue over a copy of its files, and what deletes them."""
    from experimance_controlnet import catalog as package

    files = tmp_path / "files"
    shutil.copytree(Path(package.__file__).parent / "embedded", files)

    def moved(spec: Any) -> Any:
        local = {
            name: Source(str(files / source.uri.removeprefix("package:")))
            for name in ("source", "base_source")
            if (source := getattr(spec, name, None)) is not None
        }
        return dataclasses.replace(spec, **local)

    local = dataclasses.replace(
        catalog,
        models={name: moved(spec) for name, spec in catalog.models.items()},
        controlnets={name: moved(spec) for name, spec in catalog.controlnets.items()},
        loras={name: moved(spec) for name, spec in catalog.loras.items()},
    )
    return local, lambda: shutil.rmtree(files)


def test_twenty_turns_without_the_disk(
    movable: tuple[Catalog, Callable[[], None]], store: ModelStore
) -> None:
    catalog, delete_files = movable
    cache = host()
    runner = SdxlRunner(catalog, store, "cpu", host_cache=cache)
    expected = {}
    for model in ("lightning", "hyper"):
        expected[model] = draw_sets(runner, model)
        make_all_leave(runner)
    delete_files()
    places = [copy.data_ptr() for copy in _copies(cache)]
    for turn in range(20):
        model = ("lightning", "hyper")[turn % 2]
        asset = Asset("model", model)
        assert runner.source(asset) == "host"
        assert runner.make_room(asset, in_use=())
        changes = SETS[turn % 3]
        assert all_equal([draw_one(runner, model=model, **changes), expected[model][turn % 3]])
        make_all_leave(runner)
    assert sorted(places) == sorted(copy.data_ptr() for copy in _copies(cache))
    with pytest.raises(ModelFileError):  # the files are gone indeed
        runner.make_room(Asset("model", "base"), in_use=())


def _copies(cache: HostCache) -> list[torch.Tensor]:
    return [tensor for parked in cache._copies.values() for tensor in parked.tensors.values()]


def test_what_leaves_is_freed_on_the_device(parking: SdxlRunner) -> None:
    draw_sets(parking)
    model = parking._peek("lightning")
    watched = [
        weakref.ref(thing)
        for thing in (model, model.modules.unet, model.modules.unet.conv_in.weight)
    ]
    controlnet = weakref.ref(parking._assets.peek(Asset("controlnet", "sdxl_small")))
    del model
    make_all_leave(parking)
    assert [thing() for thing in [*watched, controlnet]] == [None] * 4


def test_unloading_frees_device_and_host(parking: SdxlRunner) -> None:
    draw_sets(parking)
    make_all_leave(parking)
    parking.unload("lightning")
    assert parking.parked_models == ()
    assert parking.source(Asset("model", "lightning")) == "disk"
    assert parking.source(Asset("lora", "drone", "lightning")) == "disk"
    draw_sets(parking)
    make_all_leave(parking)
    draw_sets(parking)
    copies = [weakref.ref(tensor) for tensor in _copies_of(parking, "lightning")]
    assert copies  # they stay beside the model that came back
    unet = weakref.ref(parking._peek("lightning").modules.unet)
    parking.unload("lightning")
    gc.collect()
    assert unet() is None
    assert [copy() for copy in copies] == [None] * len(copies)


def _copies_of(runner: SdxlRunner, model: str) -> list[torch.Tensor]:
    cache = runner._host_cache
    assert cache is not None
    return list(cache._copies[Asset("model", model)].tensors.values())


def test_it_comes_back_while_another_draws(
    catalog: Catalog, store: ModelStore, caplog: pytest.LogCaptureFixture
) -> None:
    runner = SdxlRunner(catalog, store, "cpu", host_cache=host())
    requests = [make_request(model=model, adapters=DRONE) for model in ("lightning", "base")]
    expected = [draw(runner, request)[0] for request in requests]
    make_all_leave(runner)
    engine = Engine(runner, queue_capacity=4, max_rows=8)
    engine.start()
    try:
        engine.load("lightning").result(WAIT_S)
        tickets = engine.submit(requests)
        pictures = [ticket.future.result(WAIT_S).pixels for ticket in tickets]
    finally:
        engine.stop(timeout_s=1.0)
    for picture, alone in zip(pictures, expected, strict=True):
        assert all_equal([picture, alone])
    assert {source for _, source in engine.model_loads()} == {"host"}
    events = [" ".join(record.message.split()) for record in caplog.records]
    for event, fields in (
        ("model_parked", ("model=base", "parked_bytes=", "copied_bytes=", "seconds=")),
        ("lora_parked", ("lora=drone",)),
        ("model_loaded", ("model=base", "source=host", "load_s=")),
        ("lora_loaded", ("lora=drone", "source=host")),
    ):
        assert any(event in line and all(field in line for field in fields) for line in events)


def test_without_room_on_the_host_it_is_read_again(catalog: Catalog, store: ModelStore) -> None:
    runner = SdxlRunner(catalog, store, "cpu", host_cache=host(free_bytes=1))
    expected = draw_sets(runner)
    make_all_leave(runner)
    assert runner.parked_models == ()
    for picture, again in zip(expected, draw_sets(runner), strict=True):
        assert all_equal([picture, again])


def test_a_load_says_how_far_it_is(catalog: Catalog, store: ModelStore) -> None:
    runner = SdxlRunner(catalog, store, "cpu", host_cache=host())
    assert runner.load_share is None
    for source in ("disk", "host"):
        assert runner.source(Asset("model", "base")) == source
        loaded(runner, "base")
        assert runner.load_share is not None and 0.95 < runner.load_share <= 1
        runner.load(Asset("lora", "drone", "base"))
        assert runner.load_share is None
        make_all_leave(runner)


def test_on_a_cpu_there_is_nothing_to_park(runner: SdxlRunner) -> None:
    make_all_leave(runner)
    assert runner.parked_models == ()
    assert runner.source(Asset("model", "lightning")) == "disk"
    runner.unload("lightning")
