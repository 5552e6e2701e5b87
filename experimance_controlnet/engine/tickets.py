"""The books: which requests have been accepted and have not ended yet. Safe on any thread."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from experimance_controlnet.engine.request import (
    GenerationRequest,
    GenerationResult,
    ProgressListener,
)
from experimance_controlnet.errors import QueueFullError, UnavailableError, WorkerError


@dataclass(eq=False, slots=True)
class Ticket:
    """A claim on one image. The future resolves exactly once and cannot be cancelled by its holder;
    to give a ticket up, call ``Engine.abort``.
    """

    request: GenerationRequest
    accepted_s: float
    on_progress: ProgressListener | None = None
    future: Future[GenerationResult] = field(default_factory=Future)


class Ledger:
    """Opens tickets, up to a capacity, and closes each once: by a result or an error."""

    def __init__(self, capacity: int) -> None:
        """``capacity`` in images."""
        self._capacity = capacity
        self._lock = threading.Lock()
        self._open: set[Ticket] = set()
        self._refusal: UnavailableError | None = None
        self._units_per_s: float | None = None

    def open(self, tickets: Sequence[Ticket]) -> None:
        """Accept all or none.

        Raises:
            QueueFullError: no room for all of them.
            UnavailableError: what :meth:`refuse` was given.
        """
        with self._lock:
            self._check_room(len(tickets))
            for ticket in tickets:
                ticket.future.set_running_or_notify_cancel()
            self._open.update(tickets)

    def check_room(self, images: int = 0) -> None:
        """Raises what :meth:`open` would raise for so many at this moment; opens nothing."""
        with self._lock:
            self._check_room(images)

    def refuse(self, refusal: UnavailableError) -> None:
        """From now on :meth:`open` raises this."""
        with self._lock:
            self._refusal = refusal

    def finish(self, ticket: Ticket, result: GenerationResult) -> None:
        """The image is made."""
        busy_s = result.encode_s + result.denoise_s + result.decode_s
        if self._close(ticket):
            self._learn_speed(ticket.request.workload, busy_s)
            ticket.future.set_result(result)

    def fail(self, ticket: Ticket, error: WorkerError) -> None:
        """The image will not be made."""
        if self._close(ticket):
            ticket.future.set_exception(error)

    def __contains__(self, ticket: Ticket) -> bool:
        return ticket in self._open

    def __len__(self) -> int:
        return len(self._open)

    def tickets(self) -> tuple[Ticket, ...]:
        """All open ones, in no order."""
        with self._lock:
            return tuple(self._open)

    def _check_room(self, images: int) -> None:
        if self._refusal is not None:
            raise self._refusal
        if len(self._open) + images > self._capacity:
            raise QueueFullError(
                f"{len(self._open)} of {self._capacity} images wait already; try again later.",
                retry_after_s=self._backlog_s(),
            )

    def _close(self, ticket: Ticket) -> bool:
        with self._lock:
            was_open = ticket in self._open
            self._open.discard(ticket)
        return was_open

    def _learn_speed(self, workload: float, busy_s: float) -> None:
        if busy_s <= 0:
            return
        rate = workload / busy_s
        known = self._units_per_s
        self._units_per_s = rate if known is None else 0.8 * known + 0.2 * rate

    def _backlog_s(self) -> float:
        """Seconds until the queue is empty at the speed seen so far; a guess before any image."""
        if self._units_per_s is None:
            return 5.0
        return max(1.0, sum(t.request.workload for t in self._open) / self._units_per_s)
