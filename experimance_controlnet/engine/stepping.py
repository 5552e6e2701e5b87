"""A batch's steps, from prepared requests to pictures on the host; engine's thread only.

An error ends the request that it is an error of, and no other. Want of memory is different: the
work is done again, with less memory each time, and the request's notes say what was given up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import structlog

from experimance_controlnet.engine.costs import StepCosts
from experimance_controlnet.engine.faults import attempt, is_out_of_memory
from experimance_controlnet.engine.meter import StepMeter
from experimance_controlnet.engine.request import Asset, PixelImage, RequestState
from experimance_controlnet.engine.runner import PendingFrame, Runner, Stage

log = structlog.get_logger()


class Outcomes(Protocol):
    """Who is told what becomes of requests."""

    def stepped(self, state: RequestState) -> None:
        """A step is done."""

    def all_stepped(self, state: RequestState) -> None:
        """No step is left; told before :meth:`stepped` is for the last."""

    def finished(self, state: RequestState, pixels: PixelImage) -> None:
        """The picture is there."""

    def failed(self, state: RequestState, error: Exception) -> None:
        """There will be none."""

    def assets_in_use(self) -> set[Asset]:
        """What must stay in memory."""


class Stepper:
    """Takes steps, and keeps the frames that the device still works on."""

    def __init__(
        self, runner: Runner, costs: StepCosts, clock: Callable[[], float], outcomes: Outcomes
    ) -> None:
        """``costs`` learns from the steps. ``clock`` in seconds, monotonic."""
        self._runner = runner
        self._costs = costs
        self._meter = StepMeter(costs, clock)
        self._clock = clock
        self._outcomes = outcomes
        self._frames: dict[RequestState, PendingFrame] = {}  # oldest first

    @property
    def decoding(self) -> bool:
        """Whether frames are on their way."""
        return bool(self._frames)

    def forget(self, state: RequestState) -> None:
        """Nobody wants its frame, if there is one."""
        self._frames.pop(state, None)

    def step(self, batch: Sequence[RequestState]) -> None:
        """One step for all of one batch. Where it was the last, the frame is on its way."""
        ready = [state for state in batch if self._prepared(state)]
        for state, prediction in self._predict(ready):
            if not self._attempt(state, partial(self._runner.advance, state, prediction)):
                continue
            if state.finished:
                self._outcomes.all_stepped(state)
            if self._attempt(state, partial(self._outcomes.stepped, state)) and state.finished:
                self._attempt(state, partial(self._decode, state), "decode")

    def deliver_frames(self, *, wait: bool) -> None:
        """Hand out the frames that are ready, in order; ``wait`` for the first if none is."""
        for state, frame in tuple(self._frames.items()):
            if not wait and not frame.ready():
                return
            pixels: list[PixelImage] = []
            if self._attempt(state, partial(self._fetch, state, pixels), "decode"):
                self._attempt(state, partial(self._outcomes.finished, state, *pixels))
            wait = False

    def _prepared(self, state: RequestState) -> bool:
        if state.timer.started_s is not None:
            return True
        state.timer.started_s = self._clock()
        if not self._attempt(state, partial(self._runner.prepare, state), "prepare"):
            return False
        state.timer.encoded_s = self._clock()
        return True

    def _predict(self, states: list[RequestState]) -> list[tuple[RequestState, Any]]:
        """One evaluation for all. Where it fails, one for each: only the culprit ends."""
        predictions: list[tuple[RequestState, Any]] = []
        if len(states) > 1:
            error = attempt(partial(self._evaluate, states, predictions))
            if error is None:
                return predictions
            self._split(states, error)
        for state in states:
            self._attempt(state, partial(self._evaluate, [state], predictions), "predict")
        return predictions

    def _split(self, states: list[RequestState], error: Exception) -> None:
        log.warning("batch_split", requests=len(states), error=repr(error))
        if is_out_of_memory(error):
            request = states[0].request
            rows = sum(state.request.rows for state in states)
            self._costs.observe_failure(request.width, request.height, rows)
            for state in states:
                state.notes.append("batch_split")
            self._runner.release_memory()  # not for other errors: graphs would be made anew

    def _evaluate(
        self, states: list[RequestState], predictions: list[tuple[RequestState, Any]]
    ) -> None:
        self._meter.begin(states)
        found = self._runner.predict(states)
        self._meter.end()
        predictions += zip(states, found, strict=True)

    def _decode(self, state: RequestState) -> None:
        self._frames[state] = self._runner.decode(state)

    def _fetch(self, state: RequestState, found: list[PixelImage]) -> None:
        # taken out: if there is too little memory for its second try, another frame is made
        frame = self._frames.pop(state, None) or self._runner.decode(state)
        pixels, notes = frame.result()
        state.notes += notes
        state.timer.decoded_s = self._clock()
        # The host is ahead of the device; when denoising really ended, only the device knows.
        state.timer.denoised_s = state.timer.decoded_s - frame.decode_s
        found.append(pixels)

    def _attempt(
        self, state: RequestState, work: Callable[[], object], stage: Stage | None = None
    ) -> bool:
        """Do the work for the request, again where it is a stage that only wants memory. Otherwise
        an error ends the request.
        """
        error = attempt(work)
        while error is not None and is_out_of_memory(error) and stage is not None:
            notes = len(state.notes)
            trouble = attempt(partial(self._relieve, state, stage))
            if trouble is not None or len(state.notes) == notes:
                error = trouble or error
                break
            error = attempt(work)
        if error is None:
            return True
        self._outcomes.failed(state, error)
        if is_out_of_memory(error):
            self._runner.release_memory()
        return False

    def _relieve(self, state: RequestState, stage: Stage) -> None:
        """Note what was done; nothing where nothing is left to do."""
        note = self._runner.relieve(state, stage, self._outcomes.assets_in_use())
        request_id = state.request.request_id
        log.warning("out_of_memory", request_id=request_id, stage=stage, relieved_by=note)
        if note is not None:
            state.notes.append(note)
