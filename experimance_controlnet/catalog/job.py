"""What a transfer has to do, and how."""

from __future__ import annotations

from dataclasses import dataclass, field

from experimance_controlnet.catalog.backoff import Backoff
from experimance_controlnet.catalog.partial import Partial
from experimance_controlnet.catalog.progress import Transfer
from experimance_controlnet.catalog.web import Web


@dataclass(frozen=True, slots=True)
class Manner:
    """How files are fetched."""

    connections: int = 8
    range_bytes: int = 32 << 20
    save_every_s: float = 1.0
    """A killed process loses what came since; each time is a flush of what was written."""
    silence_s: float = 30.0
    """How long an origin may send nothing."""
    slow_after_s: float = 60.0
    """How long a connection may take for ``reading.READ_BYTES``; then another one is tried."""
    backoff: Backoff = field(default_factory=Backoff)


@dataclass(frozen=True, slots=True)
class Order:
    """What to fetch. ``label`` names it in errors; what nobody states is None."""

    label: str
    url: str
    size_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One file on its way."""

    order: Order
    partial: Partial
    web: Web
    transfer: Transfer
    manner: Manner
