"""Turns the moments at which steps begin and end into what :class:`StepCosts` learns from.

A step's duration is taken **from the end of the step before to its own end**, and only where both
have the same weights, size and rows, and nothing but the engine's own bookkeeping lies between
them: no request was prepared, none decoded. On a device that works
while the host goes on, ``predict`` may return before its step is done; as long as it runs ahead by
no more than a fixed number of steps, the time between two returns is still the time of a step,
wherever in the beat the host waits. The duration of ``predict`` alone would be that of the launch.

A switch of weights happens inside ``predict``, almost always beside a preparation or a decode, so
it is what ``predict`` took beyond a step, once that is known. Where the host runs ahead, that is
a lower bound: a switch is never charged for work that is not its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from experimance_controlnet.engine.costs import StepCosts, SwitchKind
from experimance_controlnet.engine.request import Adapter, BatchKey, RequestState


@dataclass(slots=True)
class LiveWeights:
    """Which weights the device has at hand, as follows from the batches it was given.

    Each model keeps its own adapters merged while another one runs.
    """

    model: str | None = None
    adapters: dict[str, tuple[Adapter, ...]] = field(default_factory=dict)
    """By model."""

    def switches_to(self, key: BatchKey) -> tuple[SwitchKind, ...]:
        """What has to be switched before this key's next step."""
        other_adapters = self.adapters.get(key.model, ()) != key.adapters
        kinds: tuple[SwitchKind, ...] = ("adapters",) if other_adapters else ()
        return kinds if self.model == key.model else (*kinds, "model")

    def run(self, key: BatchKey) -> None:
        """A batch of this key takes a step."""
        self.model = key.model
        self.adapters[key.model] = key.adapters


@dataclass(frozen=True, slots=True)
class _Step:
    key: BatchKey
    rows: int
    first: bool
    """For one of the requests: it was prepared just before."""
    last: bool
    """For one of the requests: it is decoded right after."""
    switches: tuple[SwitchKind, ...]
    begun_s: float


class StepMeter:
    """Watches the engine's evaluations; engine's thread only."""

    def __init__(self, costs: StepCosts, clock: Callable[[], float]) -> None:
        """``clock`` in seconds, monotonic."""
        self._costs = costs
        self._clock = clock
        self._live = LiveWeights()
        self._under_way: _Step | None = None
        self._previous: tuple[_Step, float] | None = None  # with the moment of its end

    def begin(self, states: Sequence[RequestState]) -> None:
        """These are about to be evaluated. One that fails has no end and is forgotten."""
        if self._under_way is not None:
            self._previous = None
        key = states[0].key
        self._under_way = _Step(
            key=key,
            rows=sum(state.request.rows for state in states),
            first=any(state.step == 0 for state in states),
            last=any(state.step + 1 >= state.request.steps for state in states),
            switches=self._live.switches_to(key),
            begun_s=self._clock(),
        )
        self._live.run(key)

    def end(self) -> None:
        """The evaluation that began last has returned."""
        step, now_s = self._under_way, self._clock()
        assert step is not None, "end() comes after begin()"
        size = (step.key.width, step.key.height)
        if step.switches:
            # two at once could not be told apart; the first weights of all replace nothing
            if len(step.switches) == 1 and self._costs.is_measured(*size):
                excess_s = now_s - step.begun_s - self._costs.step_s(*size, step.rows)
                self._costs.observe_switch(step.switches[0], max(0.0, excess_s))
        elif self._previous is not None:
            previous, ended_s = self._previous
            same = (previous.key, previous.rows) == (step.key, step.rows)
            if same and not previous.last and not step.first:
                self._costs.observe(*size, step.rows, now_s - ended_s)
        self._under_way, self._previous = None, (step, now_s)
