"""What a transfer has to do, and how."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from experimance_controlnet.catalog.answers import FutileError
from experimance_controlnet.catalog.backoff import Backoff
from experimance_controlnet.catalog.partial import Partial
from experimance_controlnet.catalog.progress import Transfer
from experimance_controlnet.catalog.web import Web

READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Manner:
    """How files are fetched."""

    connections: int = 8
    range_bytes: int = 32 << 20
    save_every_s: float = 1.0
    """A killed process loses what came since; each time is a flush of what was written."""
    silence_s: float = 30.0
    """How long an origin may send nothing."""
    slow_after_s: float = 30.0
    slow_bytes_per_s: float = 2000.0
    """A connection that was slower for so long is given up, and another one tried."""
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


class Pace:
    """Notices a connection that delivers, but too little for anybody to wait for."""

    def __init__(self, manner: Manner) -> None:
        self._manner = manner
        self._since_s = time.monotonic()
        self._bytes = 0

    def check(self, label: str, received_bytes: int) -> None:
        """Count what came. Raises FutileError."""
        self._bytes += received_bytes
        elapsed_s = time.monotonic() - self._since_s
        if elapsed_s < self._manner.slow_after_s:
            return
        if self._bytes < self._manner.slow_bytes_per_s * elapsed_s:
            rate = round(self._bytes / elapsed_s)
            raise FutileError(f"{label}: the origin sends only {rate} bytes a second")
        self._since_s, self._bytes = time.monotonic(), 0
