"""Reading answers, under the eye of a watchdog: no connection may keep a transfer waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from experimance_controlnet.catalog.answers import BrokenOffError, FutileError
from experimance_controlnet.catalog.web import Answer

READ_BYTES = 256 << 10
"""Read at once. TLS hands out 16 kB at a time: to go around in Python for each of them would make a
connection four times slower."""


class Reading:
    """An open answer that is being read; made by :meth:`Watchdog.over`."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._interruption: BrokenOffError | None = None
        self.since_s = time.monotonic()
        """When it last brought something."""

    def read(self, most_bytes: int = READ_BYTES) -> bytes:
        """The next READ_BYTES, or what is left; nothing at the end. Raises BrokenOffError."""
        data = b"" if self._interruption else self._answer.read(min(most_bytes, READ_BYTES))
        # After the call: an interrupted TLS connection may hand out what is still encrypted.
        if self._interruption is not None:
            raise self._interruption
        self.since_s = time.monotonic()
        return data

    def interrupt(self, reason: BrokenOffError) -> None:
        """Let a ``read`` that waits on another thread, and all further ones, raise this."""
        self._interruption = reason
        self._answer.interrupt()

    @property
    def label(self) -> str:
        """How the file is named in errors."""
        return self._answer.label


class Watchdog:
    """Interrupts every reading that brings less than READ_BYTES in ``slow_after_s``."""

    def __init__(self, slow_after_s: float) -> None:
        self._slow_after_s = slow_after_s
        self._lock = threading.Lock()
        self._open: set[Reading] = set()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    @contextmanager
    def over(self, answer: Answer) -> Iterator[Reading]:
        """Watch an answer while the block reads it."""
        reading = Reading(answer)
        with self._lock:
            self._open.add(reading)
        try:
            yield reading
        finally:
            with self._lock:
                self._open.remove(reading)

    def interrupt_all(self) -> None:
        """What is open now is of no use any more."""
        with self._lock:
            for reading in self._open:
                reading.interrupt(BrokenOffError(f"{reading.label}: interrupted"))

    def _watch(self) -> None:
        while not self._stopped.wait(self._slow_after_s / 4):
            with self._lock:
                for reading in self._open:
                    if time.monotonic() - reading.since_s > self._slow_after_s:
                        reading.interrupt(self._too_slow(reading))

    def _too_slow(self, reading: Reading) -> FutileError:
        return FutileError(
            f"{reading.label}: the origin sends less than {READ_BYTES >> 10} kB in "
            f"{self._slow_after_s:g} s; check the network"
        )
