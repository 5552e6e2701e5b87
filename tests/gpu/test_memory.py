"""Tiers and what is done when memory runs out, on a device whose memory is limited for the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from experimance_controlnet.catalog.specs import Catalog
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine.device import CONTEXT_BYTES
from experimance_controlnet.engine.engine import Engine
from experimance_controlnet.engine.graphs import Recorder, ReplayedWork
from experimance_controlnet.engine.request import Asset, GenerationRequest, GenerationResult
from experimance_controlnet.engine.sdxl import SdxlRunner
from experimance_controlnet.engine.tiers import MINIMAL, PARKED, RESIDENT, MemoryTier
from experimance_controlnet.errors import DeviceMemoryError
from tests.engine.conftest import DEPTH, DRONE, TWO_ADAPTERS, draw_one, loaded, make_request
from tests.engine.oracle import max_difference

pytestmark = pytest.mark.gpu

MB = 10**6
WAIT_S = 120.0
BIG_PX = 2048
"""Large enough that activations dwarf the tiny model."""


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """Limits what this process may allocate, in bytes, until the test is over."""
    total_bytes = torch.cuda.mem_get_info()[1]
    yield lambda limit_bytes: torch.cuda.set_per_process_memory_fraction(limit_bytes / total_bytes)
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture
def make(catalog: Catalog, store: ModelStore) -> Callable[[MemoryTier], SdxlRunner]:
    return lambda tier: loaded(SdxlRunner(catalog, store, "cuda", tier=tier), "lightning")


@pytest.mark.parametrize("tier", [PARKED, MINIMAL], ids=lambda tier: tier.name)
def test_pictures_are_the_same(make: Callable[[MemoryTier], SdxlRunner], tier: MemoryTier) -> None:
    resident, frugal = make(RESIDENT), make(tier)
    for adapters in (TWO_ADAPTERS, (), DRONE, TWO_ADAPTERS):
        changes = {"adapters": adapters, "control": DEPTH}
        pictures = [draw_one(runner, **changes) for runner in (resident, frugal)]
        assert max_difference(*pictures) <= 1


def test_weights_and_their_copies_wait_in_pinned_memory(
    make: Callable[[MemoryTier], SdxlRunner],
) -> None:
    runner = make(PARKED)
    draw_one(runner, adapters=TWO_ADAPTERS)
    model = runner._peek("lightning")
    for encoder in (model.modules.text_encoder, model.modules.text_encoder_2):
        assert all(parameter.is_pinned() for parameter in encoder.parameters())
    for merger in model._mergers.values():
        assert all(copy.is_pinned() for copy in merger._pristine.values())
    assert model._mergers["unet"]._pristine


def test_parking_in_the_middle_changes_nothing(
    make: Callable[[MemoryTier], SdxlRunner],
) -> None:
    runner = make(RESIDENT)
    sets = (TWO_ADAPTERS, (), DRONE)
    before = [draw_one(runner, adapters=adapters) for adapters in sets]
    runner._peek("lightning").park()
    runner.release_memory()
    for picture, adapters in zip(before, sets, strict=True):
        assert max_difference(picture, draw_one(runner, adapters=adapters)) <= 1


@pytest.mark.parametrize("spoil", [torch.cuda.synchronize, lambda: 1 / 0])
def test_a_recording_that_fails_leaves_nothing(spoil: Callable[[], object]) -> None:
    """The work runs as it is, the next one is recorded, and all memory comes back."""
    device = torch.device("cuda", torch.cuda.current_device())
    recorder = Recorder(device)
    source = torch.ones(64 * MB, device=device)
    target = torch.zeros_like(source)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()

    def good() -> None:
        target.copy_(3 * source)

    def bad() -> None:
        target.copy_(2 * source)
        if torch.cuda.is_current_stream_capturing():
            spoil()

    works = []
    for work in (good, bad, good):
        works.append(ReplayedWork(work, recorder))
        for _ in range(3):
            try:
                works[-1]()
            except ZeroDivisionError:
                assert work is bad
    assert target[0].item() == 3
    works.clear()
    recorder.renew_pool()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 4 * MB


def test_out_of_memory_for_real(
    make: Callable[[MemoryTier], SdxlRunner], limit: Callable[[int], None]
) -> None:
    """Below the peak of a large picture it is made with less, far below it is refused; the next
    one works, and nothing of it is left.
    """
    runner = make(RESIDENT)
    small = make_request(request_id="small")
    big = make_request(request_id="big", width=BIG_PX, height=BIG_PX, steps=1)
    engine = Engine(runner, queue_capacity=4, max_rows=8)
    engine.start()
    try:
        expected, small_peak = _drawn(engine, small)
        runner.release_memory()
        unlimited, big_peak = _drawn(engine, big)
        assert unlimited.notes == ()
        ways: set[tuple[str, ...]] = set()
        left = []
        for share in (0.9, 0.7, 0.5, 0.3, 0.1, 0.0) * 2:
            limit(round(1.2 * small_peak + share * (big_peak - small_peak)))
            ways.add(_drawn(engine, big)[0].notes)
            # libraries choose other algorithms where there is little memory for them
            assert max_difference(_drawn(engine, small)[0].pixels, expected.pixels) <= 1
            runner.release_memory()
            left.append(torch.cuda.memory_allocated())
        limit(left[-1] + 16 * MB)
        with pytest.raises(DeviceMemoryError):
            _drawn(engine, big)
        limit(round(1.2 * small_peak))
        assert max_difference(_drawn(engine, small)[0].pixels, expected.pixels) <= 1
    finally:
        engine.stop(timeout_s=WAIT_S)
    assert ("memory_released", "vae_tiled") in ways, ways
    # the first round leaves workspaces of libraries, the second nothing
    assert max(left[6:]) <= max(left[:6]) + 1 * MB, left


def _drawn(engine: Engine, request: GenerationRequest) -> tuple[GenerationResult, int]:
    """The picture, and the most memory that was reserved meanwhile."""
    torch.cuda.reset_peak_memory_stats()
    [ticket] = engine.submit([request])
    return ticket.future.result(WAIT_S), torch.cuda.max_memory_reserved()


def test_two_models_take_turns_over_the_host(catalog: Catalog, store: ModelStore) -> None:
    """They do not fit together: each comes back from pinned memory, to the same bits."""
    runner = SdxlRunner(catalog, store, "cuda", tier=RESIDENT)
    names = ("lightning", "hyper")
    expected = {}
    for name in names:
        expected[name] = draw_one(runner, model=name, adapters=TWO_ADAPTERS, control=DEPTH)
        runner._assets.drop_idle(in_use=())
    assert set(runner.parked_models) == set(names)
    cache = runner._host_cache
    assert cache is not None
    copies = [copy for parked in cache._copies.values() for copy in parked.tensors.values()]
    assert all(copy.is_pinned() for copy in copies if copy.nbytes)
    for turn in range(8):
        name = names[turn % 2]
        assert runner.source(Asset("model", name)) == "host"
        for adapters in (DRONE, TWO_ADAPTERS):
            picture = draw_one(runner, model=name, adapters=adapters, control=DEPTH)
        assert max_difference(picture, expected[name]) <= 1
        runner._assets.drop_idle(in_use=())
    for name in names:
        runner.unload(name)
    assert runner.parked_models == ()


@pytest.mark.usefixtures("limit")  # which lifts it
def test_models_take_turns_under_a_limit(catalog: Catalog, store: ModelStore) -> None:
    """The engine makes room by itself, by measured memory: by estimate none fits beside another."""
    limit_bytes = CONTEXT_BYTES + RESIDENT.working_bytes
    runner = SdxlRunner(catalog, store, "cuda", tier=RESIDENT, memory_limit_bytes=limit_bytes)
    engine = Engine(runner, queue_capacity=4, max_rows=8)
    engine.start()
    try:
        requests = [make_request(model=name) for name in ("lightning", "hyper")]
        expected = [_drawn(engine, request)[0].pixels for request in requests]
        for turn in range(6):
            pixels = _drawn(engine, requests[turn % 2])[0].pixels
            assert max_difference(pixels, expected[turn % 2]) <= 1
            assert len(runner.loaded_models) == 1
    finally:
        engine.stop(timeout_s=WAIT_S)
    loads = engine.model_loads()
    assert [loads[name, "disk"].count for name in ("lightning", "hyper")] == [1, 1]
    assert [loads[name, "host"].count for name in ("lightning", "hyper")] == [3, 3]
