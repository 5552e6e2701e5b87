"""What a step costs on this device: learnt from the steps it takes. No torch, no clock.

A step's duration depends on the size and on the rows side by side. Where the device is not full, a
row more costs next to nothing; from the *knee* on, every row costs the same and a wider batch only
makes everybody in it late. Where that is differs from device to device and from size to size, so
it is measured. Not thread-safe: the engine's thread alone reads and writes.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Literal

from experimance_controlnet.workload import unet_flops, vae_decode_flops

SwitchKind = Literal["adapters", "model"]
Size = tuple[int, int]
"""Width, height, pixels."""

KNEE_TOLERANCE = 0.02
"""How much worse per row than the best width the knee may be. About what the median of a window
repeats to, so that noise alone does not widen batches; and chosen with ``benchmarks/batching.py``:
near saturation every per cent of throughput that a narrower batch gives away costs the queue
several per cent of waiting, and below it queues are too short to fill a batch anyway."""

MIN_OBSERVATIONS = 3
"""From so many on a width, or a switch, counts as measured: then its median survives one outlier,
such as kernels that are chosen and compiled when a device meets a shape for the first time."""

FAILURE_STEPS = 500
"""After so many measured steps a width that did not fit into memory may be tried again: what took
the memory, such as a model that was being loaded, may be gone. A failure costs about one step."""

_WINDOW = 15
"""Observations kept of each: enough for a steady median, few enough to follow a device that slows
down or recovers."""

_PRIOR_FLOPS_PER_S = 1e14
"""Before the first measurement; the order of a data-centre GPU. Only its ratio to switch costs and
to waiting matters, and only for the first few steps of a process."""


@dataclass(slots=True)
class _Failure:
    """A step that did not fit into memory."""

    rows: int
    steps_since: int = 0


class StepCosts:
    """Seconds a step, by size and rows, and seconds a switch of weights."""

    def __init__(self) -> None:
        """Nothing is measured yet: steps cost their arithmetic, switches nothing."""
        self._steps: dict[tuple[Size, int], deque[float]] = {}
        self._curves: dict[Size, _Curve] = {}
        self._switches: dict[SwitchKind, deque[float]] = {}
        self._estimates: dict[tuple[Size, int], float] = {}  # until the next observation
        self._failures: dict[Size, _Failure] = {}

    def observe_failure(self, width: int, height: int, rows: int) -> None:
        """A step of this many rows at this size did not fit into memory."""
        known = self._failures.get((width, height))
        narrowest = rows if known is None else min(rows, known.rows)
        self._failures[width, height] = _Failure(narrowest)

    def fits(self, width: int, height: int, rows: int) -> bool:
        """Whether no step of so many rows, or fewer, has failed lately for want of memory."""
        failure = self._failures.get((width, height))
        return failure is None or rows < failure.rows

    def observe(self, width: int, height: int, rows: int, step_s: float) -> None:
        """A step of this many rows at this size, pixels, has taken ``step_s`` seconds."""
        size = (width, height)
        if (failure := self._failures.get(size)) is not None:
            failure.steps_since += 1
            if failure.steps_since >= FAILURE_STEPS:
                del self._failures[size]
        seen = self._steps.setdefault((size, rows), deque(maxlen=_WINDOW))
        seen.append(step_s)
        if len(seen) >= MIN_OBSERVATIONS:
            self._curves.setdefault(size, _Curve()).set(rows, median(seen))
            self._estimates.clear()

    def observe_switch(self, kind: SwitchKind, seconds: float) -> None:
        """To bring other adapters or another model to life has taken so long."""
        self._switches.setdefault(kind, deque(maxlen=_WINDOW)).append(seconds)

    def switch_s(self, kind: SwitchKind) -> float:
        """Seconds such a switch takes; 0 before it is measured."""
        seen = self._switches.get(kind, ())
        return median(seen) if len(seen) >= MIN_OBSERVATIONS else 0.0

    def is_measured(self, width: int, height: int) -> bool:
        """Whether steps of this size have been seen often enough to say what they take."""
        return (width, height) in self._curves

    def step_s(self, width: int, height: int, rows: int) -> float:
        """Seconds a step of this many rows takes.

        Between measured widths linear; below the narrowest and beyond the widest proportional to
        rows. A size that is not measured costs what the most similar measured one does, times the
        ratio of UNet FLOPs; before any measurement, a nominal rate.
        """
        key = ((width, height), rows)
        known = self._estimates.get(key)
        if known is None:
            known = self._estimates[key] = self._estimate_s(*key)
        return known

    def decode_s(self, width: int, height: int) -> float:
        """Seconds from latents to pixels: the time of one row's step by the ratio of FLOPs."""
        per_flop = self.step_s(width, height, 1) / unet_flops(width, height)
        return vae_decode_flops(width, height) * per_flop

    def knee_rows(self, width: int, height: int, max_rows: int) -> int:
        """The smallest measured width that is within ``KNEE_TOLERANCE`` of the best per row.

        If that is the widest one measured, the curve may fall further: then it is twice that width,
        so that wider batches get tried, and measured, until they pay no more. It starts with two
        rows, one guided request: by the neutral prior, nothing is gained by more. At most
        ``max_rows``. Knees are not carried over from other sizes: a smaller picture fills the
        device later.
        """
        curve = self._curves.get((width, height))
        return min(max_rows, curve.knee_rows(max_rows) if curve else 2)

    def _estimate_s(self, size: Size, rows: int) -> float:
        if size in self._curves:
            return self._curves[size].step_s(rows)
        flops = unet_flops(*size)
        if not self._curves:
            return rows * flops / _PRIOR_FLOPS_PER_S
        similar = min(self._curves, key=lambda other: abs(math.log(flops / unet_flops(*other))))
        return self._curves[similar].step_s(rows) * flops / unet_flops(*similar)


class _Curve:
    """Seconds a step over rows, for one size; at least one point."""

    def __init__(self) -> None:
        self._rows: list[int] = []  # ascending
        self._step_s: dict[int, float] = {}

    def set(self, rows: int, step_s: float) -> None:
        if rows not in self._step_s:
            insort(self._rows, rows)
        self._step_s[rows] = step_s

    def step_s(self, rows: int) -> float:
        index = bisect_left(self._rows, rows)
        if index == 0 or index == len(self._rows):
            nearest = self._rows[min(index, len(self._rows) - 1)]
            return self._step_s[nearest] * rows / nearest
        left, right = self._rows[index - 1], self._rows[index]
        share = (rows - left) / (right - left)
        return (1 - share) * self._step_s[left] + share * self._step_s[right]

    def knee_rows(self, max_rows: int) -> int:
        widths = [rows for rows in self._rows if rows <= max_rows] or self._rows[:1]
        per_row_s = {rows: self._step_s[rows] / rows for rows in widths}
        good_s = min(per_row_s.values()) * (1 + KNEE_TOLERANCE)
        knee = next(rows for rows in widths if per_row_s[rows] <= good_s)
        return 2 * knee if knee == self._rows[-1] else knee
