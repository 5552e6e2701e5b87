"""Ways to decide who runs next, for the engine and the simulation alike.

* ``ours``: the product's own batcher. It begins without a measurement.
* ``oldest``: step-level batching of up to as many rows as a batch may have, where the oldest
  request chooses the kind.
* ``fixed``: batches of up to 8 requests of one kind, run to completion. When the device is free, it
  takes the kind of the oldest request, and waits for more of them until that has waited 100 ms.
* ``fcfs``: first come, first served, one request at a time.
"""

from __future__ import annotations

from collections.abc import Callable

from experimance_controlnet.engine.batcher import Batcher, NewBatchPolicy, RequestQueue
from experimance_controlnet.engine.request import RequestState

Clock = Callable[[], float]
"""Seconds, monotonic: the one that requests are accepted on."""

FIXED_BATCH = 8
FIXED_PATIENCE_S = 0.1


class OldestChooses(RequestQueue):
    """The oldest request chooses the kind; others of it ride along, the oldest first."""

    def __init__(self, max_rows: int) -> None:
        super().__init__()
        self._max_rows = max_rows

    def next_batch(self) -> list[RequestState]:
        batch: list[RequestState] = []
        free_rows = self._max_rows
        for state in self._states:
            if state.key == self._states[0].key and state.request.rows <= free_rows:
                batch.append(state)
                free_rows -= state.request.rows
        return batch


class FixedBatches(RequestQueue):
    """Batches form before they start and end together."""

    def __init__(self, requests: int, patience_s: float, clock: Clock) -> None:
        """``requests`` a batch, or fewer where the oldest has waited for ``patience_s``."""
        super().__init__()
        self._requests, self._patience_s, self._clock = requests, patience_s, clock
        self._running: list[RequestState] = []

    def remove(self, state: RequestState) -> None:
        super().remove(state)
        if state in self._running:
            self._running.remove(state)

    def next_batch(self) -> list[RequestState]:
        if not self._running and self._states:
            oldest = self._states[0]
            batch = [state for state in self._states if state.key == oldest.key][: self._requests]
            waited_s = self._clock() - oldest.timer.accepted_s
            if len(batch) == self._requests or waited_s >= self._patience_s:
                self._running = batch
        return list(self._running)


POLICIES: dict[str, Callable[[Clock], NewBatchPolicy]] = {
    "ours": lambda clock: Batcher,
    "oldest": lambda clock: lambda max_rows, costs: OldestChooses(max_rows),
    "fixed": lambda clock: lambda *_: FixedBatches(FIXED_BATCH, FIXED_PATIENCE_S, clock),
    "fcfs": lambda clock: lambda *_: FixedBatches(1, 0.0, clock),
}
