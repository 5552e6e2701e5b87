"""Requests that come to a running engine when they come, however many wait already."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from experimance_controlnet.engine.engine import Engine
from experimance_controlnet.engine.request import GenerationRequest

STUCK_S = 10.0
"""Far more than a picture may take here: beyond so much for each, nothing will come any more."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What became of requests that were offered once."""

    latencies_s: dict[str, list[float]]
    """Of the finished ones, by model: from the moment they were to come until the pixels are there,
    whenever this process came to submit them."""
    accepted: int
    failures: tuple[str, ...]
    seconds: float
    """From the beginning until the last has ended."""
    others_cores: float
    """What other processes took of this machine meanwhile, in cores."""

    @property
    def finished(self) -> int:
        return sum(map(len, self.latencies_s.values()))


def offer(
    engine: Engine, requests: Sequence[GenerationRequest], moments_s: NDArray[np.float64]
) -> Offer:
    """Submit each request at its moment, seconds from now, ascending; wait until all have ended.

    Raises:
        QueueFullError: the engine takes fewer at a time.
        TimeoutError: some never ended.
    """
    ended_s: dict[int, float] = {}

    def note_end(index: int, _: Future[Any]) -> None:
        ended_s[index] = time.monotonic()

    others_before_s = _others_busy_s()
    started_s = time.monotonic()
    futures = []
    for index, (request, moment_s) in enumerate(zip(requests, moments_s, strict=True)):
        time.sleep(max(0.0, started_s + moment_s - time.monotonic()))
        [ticket] = engine.submit([request])
        ticket.future.add_done_callback(partial(note_end, index))
        futures.append(ticket.future)
    left = wait(futures, timeout=STUCK_S * len(requests)).not_done
    if left:
        raise TimeoutError(f"{len(left)} of {len(futures)} accepted requests never ended")
    seconds = time.monotonic() - started_s
    others_cores = max(0.0, _others_busy_s() - others_before_s) / seconds

    latencies_s: dict[str, list[float]] = {}
    failures = []
    for index, (request, future) in enumerate(zip(requests, futures, strict=True)):
        error = future.exception()
        if error is None:
            latency_s = ended_s[index] - started_s - float(moments_s[index])
            latencies_s.setdefault(request.model, []).append(latency_s)
        else:
            failures.append(repr(error))
    return Offer(latencies_s, len(futures), tuple(failures), seconds, others_cores)


def _others_busy_s() -> float:
    """Core seconds that all processes but this one have worked."""
    every, own = psutil.cpu_times(), psutil.Process().cpu_times()
    return float(every.user + every.nice + every.system - own.user - own.system)
