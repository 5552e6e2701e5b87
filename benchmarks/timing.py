"""Clocks that wait for the device, and a line about what is going on."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_STARTED_S = time.monotonic()


@dataclass(frozen=True, slots=True)
class Repeats:
    """How often a thing is done: first ``warm_up`` times unmeasured."""

    warm_up: int
    measured: int


def progress(text: str) -> None:
    """One line to stderr, so that stdout keeps the table and the JSON line."""
    print(f"[{time.monotonic() - _STARTED_S:6.1f} s] {text}", file=sys.stderr, flush=True)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was asked for; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times_ms(work: Callable[[int], object], repeats: Repeats, device: torch.device) -> list[float]:
    """Milliseconds of each measured call. ``work`` is given the call's number, warm-up included,
    so that it need not do the same thing twice.
    """
    times = []
    for number in range(repeats.warm_up + repeats.measured):
        synchronize(device)
        started_s = time.perf_counter()
        work(number)
        synchronize(device)
        times.append(1000 * (time.perf_counter() - started_s))
    return times[repeats.warm_up :]


def median_ms(work: Callable[[int], object], repeats: Repeats, device: torch.device) -> float:
    """Median of :func:`times_ms`, to a hundredth."""
    return round(statistics.median(times_ms(work, repeats, device)), 2)


def free_memory(device: torch.device) -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
