"""Tiers and what is done when memory runs out, on a device whose memory is limited for the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from experimance_controlnet.catalog.specs import Catalog
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine.engine import Engine
from experimance_controlnet.engine.sdxl import SdxlRunner
from experimance_controlnet.engine.tiers import MINIMAL, PARKED, RESIDENT, MemoryTier
from experimance_controlnet.errors import DeviceMemoryError
from tests.engine.conftest import DEPTH, DRONE, TWO_ADAPTERS, draw_one, loaded, make_request
from tests.engine.oracle import all_equal, max_difference

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


def test_weights_and_their_copies_are_on_the_host(
    make: Callable[[MemoryTier], SdxlRunner],
) -> None:
    used = []
    for tier in (RESIDENT, PARKED):
        before = torch.cuda.memory_allocated()
        runner = make(tier)
        draw_one(runner, adapters=TWO_ADAPTERS)
        runner.release_memory()
        used.append(torch.cuda.memory_allocated() - before)
        del runner
        torch.cuda.empty_cache()
    assert used[1] < 0.7 * used[0]


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


def test_out_of_memory_for_real(
    make: Callable[[MemoryTier], SdxlRunner], limit: Callable[[int], None]
) -> None:
    """Below the peak of a large picture: it is made with less, or refused, and the next one works;
    nothing of it is left.
    """
    runner = make(RESIDENT)
    small = make_request(request_id="small")
    engine = Engine(runner, queue_capacity=4, max_rows=8)
    engine.start()
    try:
        [ticket] = engine.submit([small])
        expected = ticket.future.result(WAIT_S)
        runner.release_memory()
        baseline = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        big = make_request(request_id="big", width=BIG_PX, height=BIG_PX, steps=1)
        [ticket] = engine.submit([big])
        assert ticket.future.result(WAIT_S).notes == ()
        peak = torch.cuda.max_memory_reserved()
        ways = set()
        for share in (0.9, 0.75, 0.6, 0.45, 0.3, 0.15):
            limit(round(baseline + share * (peak - baseline)))
            [ticket] = engine.submit([big])
            error = ticket.future.exception(WAIT_S)
            if error is None:
                ways.add(ticket.future.result().notes)
            else:
                assert isinstance(error, DeviceMemoryError)
                ways.add(("refused",))
            del error, ticket
            [after] = engine.submit([small])
            assert all_equal([after.future.result(WAIT_S).pixels, expected.pixels])
        assert any("vae_tiled" in notes for notes in ways), ways
        assert ("refused",) in ways, ways
    finally:
        engine.stop(timeout_s=WAIT_S)
    runner.release_memory()
    assert torch.cuda.memory_allocated() <= baseline + 1 * MB
