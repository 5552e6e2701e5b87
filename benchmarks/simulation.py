"""A device and traffic for it that exist only as numbers, on a clock of their own.

Requests, sizes and weights are the product's own records; only the device pretends: a step takes
what a table says, give or take some noise. How the requests are served is not this module's affair.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.mixed_traffic import draw_requests
from experimance_controlnet.engine.costs import Size, SwitchKind
from experimance_controlnet.engine.meter import LiveWeights
from experimance_controlnet.engine.request import (
    BatchKey,
    GenerationRequest,
    PhaseTimer,
    RequestState,
)
from experimance_controlnet.engine.schedulers import make_scheduler

STEP_NOISE = 0.03
"""Standard deviation of a step's duration, relative."""


@dataclass(frozen=True, slots=True)
class CostTable:
    """What the simulated device needs, seconds."""

    device: str
    steps_s: dict[Size, dict[int, float]]
    """By size and rows, rows ascending; linear in between."""
    decode_s: dict[Size, float]
    switch_s: dict[SwitchKind, float]

    @classmethod
    def read(cls, path: Path) -> CostTable:
        """A file like ``results/step_costs.json``."""
        table = json.loads(path.read_text(encoding="utf-8"))
        steps_s: dict[Size, dict[int, float]] = {}
        decode_s: dict[Size, float] = {}
        for name, costs in table["sizes"].items():
            width, height = map(int, name.split("x"))
            steps_s[width, height] = {int(r): ms / 1000 for r, ms in costs["step_ms"].items()}
            decode_s[width, height] = costs["decode_ms"] / 1000
        switch_s = {kind: ms / 1000 for kind, ms in table["switch_ms"].items()}
        return cls(table["device"], steps_s, decode_s, switch_s)

    def step(self, size: Size, rows: int) -> float:
        """Seconds a step of this many rows takes. No wider than the table's widest."""
        points = self.steps_s[size]
        if rows > max(points):
            raise ValueError(f"the cost table ends before {rows} rows at {size}")
        return float(np.interp(rows, list(points), list(points.values())))

    def solo(self, request: GenerationRequest) -> float:
        """Seconds for a request that has the device to itself and finds its weights live."""
        size = (request.width, request.height)
        return request.steps * self.step(size, request.rows) + self.decode_s[size]


class Device:
    """Does one thing after another; its clock advances by what each takes."""

    def __init__(self, table: CostTable, seed: int) -> None:
        """``seed`` is that of the noise."""
        self.now_s = 0.0
        self._table = table
        self._noise = np.random.default_rng(seed)
        self._live = LiveWeights()

    def clock(self) -> float:
        """Seconds since the first moment."""
        return self.now_s

    def wait_until(self, moment_s: float) -> None:
        """Idle; not at all where the moment has passed."""
        self.now_s = max(self.now_s, moment_s)

    def predict(self, states: list[RequestState]) -> None:
        """Evaluate for requests of one key; includes the switch to their weights."""
        key = states[0].key
        self.now_s += sum(self._table.switch_s[kind] for kind in self._live.switches_to(key))
        self._live.run(key)
        rows = sum(state.request.rows for state in states)
        noise = max(0.5, 1 + STEP_NOISE * self._noise.standard_normal())
        self.now_s += self._table.step((key.width, key.height), rows) * noise

    def decode(self, state: RequestState) -> None:
        """Latents to pixels: the request is served."""
        self.now_s += self._table.decode_s[state.request.width, state.request.height]
        state.timer.decoded_s = self.now_s


def traffic(table: CostTable, load: float | None, count: int, seed: int) -> list[RequestState]:
    """Poisson arrivals, in order. ``load`` is arrivals a second times the mean of
    :meth:`CostTable.solo` over them: the share of the time for which a device would be busy that
    serves them one by one and never has to switch weights. None: all at once.
    """
    rng = np.random.default_rng(seed)
    requests = draw_requests(rng, count)
    gaps_s = np.zeros(count)
    if load is not None:
        mean_solo_s = sum(table.solo(request) for request in requests) / count
        gaps_s = rng.exponential(mean_solo_s / load, count)
    # nobody takes a noise step here, so all may share these
    scheduler, generator = make_scheduler("euler", {}, 1), torch.Generator()
    return [
        RequestState(
            request=request,
            key=BatchKey(request.model, request.adapters, request.width, request.height, 1),
            timer=PhaseTimer(float(accepted_s)),
            scheduler=scheduler,
            generator=generator,
        )
        for request, accepted_s in zip(requests, np.cumsum(gaps_s), strict=True)
    ]
