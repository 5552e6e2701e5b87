"""The engine on a CUDA device: half precision, but the same pictures."""

from __future__ import annotations

import pytest
import torch

from experimance_controlnet.catalog.specs import Catalog
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.engine.request import Adapter
from experimance_controlnet.engine.schedulers import SCHEDULER_NAMES
from experimance_controlnet.engine.sdxl import SdxlRunner
from tests.engine.conftest import DEPTH, TWO_ADAPTERS, draw, draw_one, loaded, make_request
from tests.engine.oracle import all_equal, mean_difference

pytestmark = pytest.mark.gpu

HALF_PRECISION = 2.0
"""Mean difference of 255 levels that fp16 and bf16 may cost against fp32."""


@pytest.fixture
def cuda(catalog: Catalog, store: ModelStore) -> SdxlRunner:
    return loaded(SdxlRunner(catalog, store, "cuda"), "lightning")


@pytest.mark.parametrize("scheduler", SCHEDULER_NAMES)
@pytest.mark.parametrize("adapters", [(), TWO_ADAPTERS], ids=["plain", "adapters"])
def test_the_picture_is_that_of_the_cpu(
    cuda: SdxlRunner, runner: SdxlRunner, scheduler: str, adapters: tuple[Adapter, ...]
) -> None:
    changes = {"scheduler": scheduler, "adapters": adapters, "control": DEPTH}
    assert mean_difference(draw_one(cuda, **changes), draw_one(runner, **changes)) < HALF_PRECISION


def test_batched_is_alone(cuda: SdxlRunner) -> None:
    requests = [
        make_request(seed=seed, cfg=1.0 + seed, control=DEPTH if seed % 2 else None)
        for seed in range(4)
    ]
    for request, image in zip(requests, draw(cuda, *requests), strict=True):
        [alone] = draw(cuda, request)
        assert mean_difference(image, alone) < HALF_PRECISION


def test_adapter_switches_leave_nothing_behind(cuda: SdxlRunner) -> None:
    other = (Adapter("experimance_future", 1.0),)
    plain = [draw_one(cuda, adapters=adapters) for adapters in ((), TWO_ADAPTERS, other, ())]
    assert all_equal([plain[0], plain[3]])


def test_memory_is_measured_and_given_back(cuda: SdxlRunner) -> None:
    draw_one(cuda)
    memory = cuda.gpu_memory()
    assert memory is not None
    assert 0 < memory.allocated_bytes <= memory.reserved_bytes < memory.total_bytes
    cuda.unload("lightning")
    assert torch.cuda.memory_allocated() < memory.allocated_bytes
