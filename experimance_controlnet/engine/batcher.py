"""Who runs next, and with whom. No torch, no clock: a pure data structure.

The policy in one sentence: **the oldest request chooses the weights and the size; whoever can share
its batch rides along.** It follows that

* nothing starves: a request waits for at most the requests accepted before it;
* adapters and models are switched only when the oldest request ends, since until then it stays
  the oldest;
* a new arrival of the same kind joins at the next step, whatever step the others are at.
"""

from __future__ import annotations

from collections.abc import Iterator

from experimance_controlnet.engine.request import RequestState


class Batcher:
    """The admitted requests that still have steps to do, in order of acceptance."""

    def __init__(self, max_rows: int) -> None:
        """``max_rows``: UNet rows a batch may have. One request alone may always run."""
        self._max_rows = max_rows
        self._states: list[RequestState] = []

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[RequestState]:
        return iter(tuple(self._states))

    def add(self, state: RequestState) -> None:
        """Take a request in, behind all others."""
        self._states.append(state)

    def remove(self, state: RequestState) -> None:
        """Let a request go: finished, failed or aborted."""
        self._states.remove(state)

    def next_batch(self) -> list[RequestState]:
        """The requests that take the next step together, oldest first; empty where none waits."""
        if not self._states:
            return []
        oldest = self._states[0]
        batch = [oldest]
        free_rows = self._max_rows - oldest.request.rows
        for state in self._states[1:]:
            if state.key == oldest.key and state.request.rows <= free_rows:
                batch.append(state)
                free_rows -= state.request.rows
        return batch
