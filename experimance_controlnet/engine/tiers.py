"""How much of a model stays on the device between its uses: by the memory that there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from experimance_controlnet.engine.precision import Precision
from experimance_controlnet.errors import SettingsError

TierName = Literal["resident", "parked", "minimal"]
GB = 10**9


@dataclass(frozen=True, slots=True)
class MemoryTier:
    """What is given up for memory. Pictures are the same in all tiers, but for a VAE in tiles."""

    name: TierName
    parks: bool
    """Text encoders (1.6 GB) and pristine copies of merged layers (4.4 GB) lie in the host's memory
    and travel when they are needed: for a new prompt, for other adapters."""
    records: bool
    """Work is recorded as graphs, which keep memory of their own."""
    tiles: bool
    """Large pictures are decoded in tiles."""
    working_bytes: int
    """What pictures take beside a model's weights, with a margin."""
    host_bytes: int = 0
    """What a model may come to take of the host's memory while it is in service."""


RESIDENT = MemoryTier("resident", False, True, False, 3 * GB)
PARKED = MemoryTier("parked", True, True, False, 3 * GB, 8 * GB)
MINIMAL = MemoryTier("minimal", True, False, True, 1 * GB, 8 * GB)

_TIERS: dict[str, MemoryTier] = {tier.name: tier for tier in (RESIDENT, PARKED, MINIMAL)}
_RESIDENT_FROM_BYTES, _PARKED_FROM_BYTES = 16 * GB, 10 * GB
"""What one model, a ControlNet and two adapters take at 1024x1024, as measured, with a margin."""


def choose_tier(wish: str, budget_bytes: int | None, precision: Precision) -> MemoryTier:
    """``auto``: the fastest that ``budget_bytes``, the memory for this process, allows for one
    model. None: models live in the host's memory, all of them.

    Raises:
        SettingsError: there is no device that anything could be moved away from.
    """
    if budget_bytes is None:
        if wish not in ("auto", "resident"):
            raise SettingsError(
                f"MEMORY_TIER (--memory-tier): {wish} needs a CUDA device; on a CPU leave it auto"
            )
        return RESIDENT
    if wish != "auto":
        return _TIERS[wish]
    left_bytes = budget_bytes - precision.copies_bytes
    if left_bytes >= _RESIDENT_FROM_BYTES:
        return RESIDENT
    return PARKED if left_bytes >= _PARKED_FROM_BYTES else MINIMAL
