"""Which tier a device gets."""

from __future__ import annotations

import pytest
import torch

from experimance_controlnet.engine.device import DeviceMemory
from experimance_controlnet.engine.precision import FP8, FP16, Precision
from experimance_controlnet.engine.tiers import GB, choose_tier
from experimance_controlnet.errors import SettingsError


@pytest.mark.parametrize(
    ("wish", "budget_gb", "precision", "tier"),
    [
        ("auto", 140, FP16, "resident"),
        ("auto", 16.9, FP16, "resident"),  # a card of 16 GiB
        ("auto", 16.9, FP8, "parked"),
        ("auto", 12.6, FP16, "parked"),
        ("auto", 8.4, FP16, "minimal"),
        ("auto", None, FP16, "resident"),
        ("minimal", 140, FP16, "minimal"),
        ("resident", 8.4, FP16, "resident"),
    ],
)
def test_tiers(wish: str, budget_gb: float | None, precision: Precision, tier: str) -> None:
    budget_bytes = None if budget_gb is None else round(budget_gb * GB)
    assert choose_tier(wish, budget_bytes, precision).name == tier


def test_a_cpu_has_one_tier() -> None:
    with pytest.raises(SettingsError, match="MEMORY_TIER"):
        choose_tier("parked", None, FP16)


def test_a_cpu_has_no_limit() -> None:
    memory = DeviceMemory(torch.device("cpu"))
    assert memory.budget_bytes is None and memory.use() is None
    assert memory.free_bytes() > 0
    with pytest.raises(SettingsError, match="MEMORY_LIMIT_GB"):
        DeviceMemory(torch.device("cpu"), limit_bytes=8 * GB)
