"""Who runs next, and with whom. No torch and no clock: all it knows of time is when each request
was accepted and what :class:`StepCosts` says that work takes.

The policy in one sentence: **the request with the least work left goes first, and takes along as
many of its kind as make a step cheaper.** Every step anew, so a short request overtakes a long one
at the next step boundary; the long one loses nothing but time, since all its state is its own.

What "least" compares is a score in seconds, the lowest first:

    remaining work  +  switch x requests waiting  +  AGEING x moment of acceptance

* *Remaining work*: the steps left, each at the cost of the request's own rows, and the decode.
* *Switch*: what it takes to bring its adapters and model to life, nothing where they are. A switch
  delays everybody who waits, so it is charged once for each of them: the longer the queue, the
  longer the weights that are live stay.
* *Ageing*: of two requests, the one accepted t seconds earlier may have up to ``AGEING`` x t
  seconds more work and still goes first. Only differences of waiting matter, so no clock is needed.

**Nothing starves.** Call the lowest-scored request of a step its leader. Let x wait, R be its work,
S the dearest switch, n the most requests that ever wait at once. Then x scores at most
R + n S + AGEING x accepted(x), and any other request y at least AGEING x accepted(y), as work and
switches are never negative. So a y that was accepted more than

    (R + n S) / AGEING

seconds after x never leads while x waits. The others that may lead are finite in number, since the
queue is bounded, and each step brings its leader one step nearer to its end, after which it leads
no more. Hence x takes its next step after at most as many steps as those others have left, however
many newcomers there are and whatever is learnt about costs in the meantime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from experimance_controlnet.engine.costs import StepCosts
from experimance_controlnet.engine.meter import LiveWeights
from experimance_controlnet.engine.request import BatchKey, RequestState

AGEING = 0.3
"""Seconds of work that a second of waiting outweighs. 0 is pure least-work-first, which makes long
requests wait for every short one; large values are first come, first served. Chosen with
``benchmarks/batching.py``: less makes the slowest images (base) slower, more makes the mean worse.
"""


class BatchPolicy(Protocol):
    """What the engine needs of whoever decides who runs next. :class:`Batcher` is the product's;
    ``benchmarks/policies.py`` has others to compare it with.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[RequestState]: ...

    def add(self, state: RequestState) -> None:
        """Take a request in."""

    def remove(self, state: RequestState) -> None:
        """Let a request go: finished, failed or aborted."""

    def next_batch(self) -> list[RequestState]:
        """The requests that take the next step together, all of one key. Empty where none waits,
        or none should run yet: then it is asked again at once.
        """


NewBatchPolicy = Callable[[int, StepCosts], BatchPolicy]
"""Given the most rows a batch may have, and what is learnt about costs while it decides."""


class RequestQueue:
    """The admitted requests that still have steps to do: what every policy chooses from."""

    def __init__(self) -> None:
        self._states: list[RequestState] = []  # in order of admission

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[RequestState]:
        return iter(tuple(self._states))

    def add(self, state: RequestState) -> None:
        """Take a request in."""
        self._states.append(state)

    def remove(self, state: RequestState) -> None:
        """Let a request go: finished, failed or aborted."""
        self._states.remove(state)


class Batcher(RequestQueue):
    """Least remaining work first, in batches up to the knee of the measured curve."""

    def __init__(self, max_rows: int, costs: StepCosts) -> None:
        """``max_rows``: UNet rows a batch may have. One request alone may always run."""
        super().__init__()
        self._max_rows = max_rows
        self._costs = costs
        self._live = LiveWeights()

    def next_batch(self) -> list[RequestState]:
        """The requests that take the next step together, in order of admission; empty where none
        waits. Whoever asks runs them: their weights count as live from now on.
        """
        if not self._states:
            return []
        switch_s = {key: self._switch_s(key) for key in {state.key for state in self._states}}
        scores = {
            state: self._remaining_s(state)
            + switch_s[state.key] * len(self._states)
            + AGEING * state.timer.accepted_s
            for state in self._states
        }
        leader = min(scores, key=scores.__getitem__)
        kind = [state for state in self._states if state.key == leader.key]
        self._live.run(leader.key)
        batch = self._fill(sorted(kind, key=scores.__getitem__))
        return [state for state in kind if state in batch]

    def _fill(self, candidates: list[RequestState]) -> set[RequestState]:
        """The first, and others of its kind until the knee is reached; ``max_rows`` at most."""
        leader, *others = candidates
        width, height = leader.key.width, leader.key.height
        knee_rows = self._costs.knee_rows(width, height, self._max_rows)
        batch, rows = {leader}, leader.request.rows
        for state in others:
            more = rows + state.request.rows
            fits = more <= self._max_rows and self._costs.fits(width, height, more)
            if rows < knee_rows and fits:
                batch.add(state)
                rows = more
        return batch

    def _remaining_s(self, state: RequestState) -> float:
        request = state.request
        size = (request.width, request.height)
        step_s = self._costs.step_s(*size, request.rows)
        return (request.steps - state.step) * step_s + self._costs.decode_s(*size)

    def _switch_s(self, key: BatchKey) -> float:
        return sum(self._costs.switch_s(kind) for kind in self._live.switches_to(key))
