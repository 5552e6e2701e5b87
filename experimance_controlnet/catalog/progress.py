"""How far the running transfers are: for the log, ``/checkhealth`` and a bar in a terminal."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import structlog

_log = structlog.get_logger()

LOG_EVERY_S = 5.0
_RATE_OVER_S = 5.0
_SAMPLE_EVERY_S = 0.25


@dataclass(frozen=True, slots=True)
class TransferStatus:
    """A snapshot. ``total_bytes`` is None as long as the origin has not said it."""

    name: str
    done_bytes: int
    total_bytes: int | None
    bytes_per_s: float


class Transfer:
    """The progress of one transfer; every method may be called on any thread."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        self._lock = threading.Lock()
        self._planned_bytes: int | None = None
        self._ended_bytes = 0  # of files that are whole
        self._file_bytes: int | None = None  # length of the file that is on its way
        self._file_done_bytes = 0
        self._received_bytes = 0
        self._samples = deque([(clock(), 0)])  # time, received bytes; of the last seconds

    def plan(self, total_bytes: int) -> None:
        """How many bytes all files will have, where there are several."""
        with self._lock:
            self._planned_bytes = total_bytes

    def begin_file(self, size_bytes: int | None, done_bytes: int) -> None:
        """A file begins, or begins anew; so many of its bytes are on disk already."""
        with self._lock:
            self._file_bytes, self._file_done_bytes = size_bytes, done_bytes

    def end_file(self) -> None:
        """The file is whole."""
        with self._lock:
            self._ended_bytes += self._file_done_bytes
            self._file_bytes, self._file_done_bytes = None, 0

    def add(self, received_bytes: int) -> None:
        """Bytes that came just now."""
        with self._lock:
            self._file_done_bytes += received_bytes
            self._received_bytes += received_bytes
            now = self._clock()
            if now - self._samples[-1][0] >= _SAMPLE_EVERY_S:
                self._samples.append((now, self._received_bytes))
            while len(self._samples) > 1 and now - self._samples[1][0] >= _RATE_OVER_S:
                self._samples.popleft()

    def status(self) -> TransferStatus:
        """Where it is now; the rate is that of the last seconds."""
        with self._lock:
            now = self._clock()
            since, before = self._samples[0]
            for sample in self._samples:  # the last one that is old enough
                if now - sample[0] < _RATE_OVER_S:
                    break
                since, before = sample
            elapsed_s = now - since
            rate = (self._received_bytes - before) / elapsed_s if elapsed_s > 0 else 0.0
            return TransferStatus(
                name=self._name,
                done_bytes=self._ended_bytes + self._file_done_bytes,
                total_bytes=self._planned_bytes or self._file_bytes,
                bytes_per_s=rate,
            )


class Progress:
    """The transfers of one store that run."""

    def __init__(self, log_every_s: float = LOG_EVERY_S) -> None:
        self._log_every_s = log_every_s
        self._lock = threading.Lock()
        self._running: list[Transfer] = []

    def running(self) -> list[TransferStatus]:
        """In the order of their beginning."""
        with self._lock:
            transfers = list(self._running)
        return [transfer.status() for transfer in transfers]

    @contextmanager
    def transfer(self, name: str) -> Iterator[Transfer]:
        """A transfer that runs as long as the block, and says so in the log."""
        transfer, ended = Transfer(name), threading.Event()
        with self._lock:
            self._running.append(transfer)
        arguments = (transfer, ended)
        thread = threading.Thread(target=self._report, args=arguments, name="progress", daemon=True)
        thread.start()
        try:
            yield transfer
        finally:
            ended.set()
            thread.join()
            with self._lock:
                self._running.remove(transfer)

    def _report(self, transfer: Transfer, ended: threading.Event) -> None:
        while not ended.wait(self._log_every_s):
            now = transfer.status()
            _log.info(
                "download_progress",
                name=now.name,
                done_bytes=now.done_bytes,
                total_bytes=now.total_bytes,
                mb_per_s=round(now.bytes_per_s / 1e6, 1),
            )
