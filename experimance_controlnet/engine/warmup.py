"""What a model's first pictures would wait for, done while nobody waits: kernels are compiled,
libraries choose their algorithms, graphs are recorded.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import structlog

from experimance_controlnet.engine.request import Control, GenerationRequest

if TYPE_CHECKING:
    from experimance_controlnet.engine.sdxl import SdxlRunner

log = structlog.get_logger()


class WarmUps:
    """Models that wait for their warm-up, and the one that is in the middle of it."""

    def __init__(self, runner: SdxlRunner) -> None:
        self._runner = runner
        self._queue: deque[tuple[GenerationRequest, Iterator[str]]] = deque()

    def plan(self, model: str, controlnet: str | None) -> None:
        """Warm the model up later, with the ControlNet where there is one."""
        request = standard_request(model, controlnet)
        self._queue.append((request, _pieces(self._runner, request)))

    def do_one_piece(self) -> bool:
        """Tens of milliseconds of work, or seconds where a kernel is compiled. False: none left."""
        while self._queue:
            request, pieces = self._queue[0]
            if self._runner.missing(request) is None and next(pieces, None) is not None:
                return True
            self._queue.popleft()
        return False


def standard_request(model: str, controlnet: str | None) -> GenerationRequest:
    """What most clients ask for."""
    flat = np.zeros((8, 8), dtype=np.float32)
    return GenerationRequest(
        request_id="warm-up",
        model=model,
        prompt="warm-up",
        negative_prompt=None,
        width=1024,
        height=1024,
        steps=2,
        cfg=2.0,
        seed=0,
        scheduler="euler",
        control=None if controlnet is None else Control(controlnet, flat, strength=1.0),
    )


def _pieces(runner: SdxlRunner, request: GenerationRequest) -> Iterator[str]:
    """Make the picture three times: compile, record, replay. Yields what has been done."""
    started_s = time.monotonic()
    for number in range(3):
        # a prompt of its own each time: a known one would not be encoded again
        fresh = dataclasses.replace(request, prompt=f"warm-up {number}")
        state = runner.admit(fresh, accepted_s=0.0)
        runner.prepare(state)
        yield "prepared"
        [prediction] = runner.predict([state])
        runner.advance(state, prediction)
        yield "stepped"
        runner.decode(state).discard()
        yield "decoded"
    seconds = round(time.monotonic() - started_s, 3)
    log.info("model_warmed_up", model=request.model, seconds=seconds)
