"""Seeded requests of a mixed clientele: models, sizes and eras, each with its share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experimance_controlnet.catalog.specs import SchedulerName
from experimance_controlnet.engine.request import Adapter, GenerationRequest


@dataclass(frozen=True, slots=True)
class Share:
    """A model's part of the requests, and the catalogue's defaults for it."""

    share: float
    steps: int
    cfg: float
    scheduler: SchedulerName


MODELS = {
    "lightning": Share(0.7, 6, 2.0, "euler"),
    "hyper": Share(0.2, 8, 6.0, "euler"),
    "base": Share(0.1, 20, 7.5, "dpm_sde"),
}

SIZES = {(1024, 1024): 0.8, (768, 768): 0.1, (512, 512): 0.1}
"""Width, height, pixels -> share of the requests."""

ERAS = {
    "wilderness": (Adapter("experimance_wilderness", 1.0),),
    "early_industrial": (Adapter("drone", 0.8), Adapter("experimance", 0.4)),
    "modern": (Adapter("drone", 0.3), Adapter("experimance", 0.6)),
    "future": (Adapter("experimance_future", 1.0),),
}
"""The catalogue's adapters; all eras are equally frequent."""

UNGUIDED = 0.1
"""Share of the Lightning requests that ask for cfg 1: one row instead of two."""


def draw_requests(
    rng: np.random.Generator, count: int, scale: float = 1.0
) -> list[GenerationRequest]:
    """So many, without a ControlNet. Sides are multiplied by ``scale``."""
    return [_request(rng, number, scale) for number in range(count)]


def _request(rng: np.random.Generator, number: int, scale: float) -> GenerationRequest:
    name = str(rng.choice(list(MODELS), p=[model.share for model in MODELS.values()]))
    model = MODELS[name]
    width, height = list(SIZES)[int(rng.choice(len(SIZES), p=list(SIZES.values())))]
    unguided = name == "lightning" and rng.random() < UNGUIDED
    return GenerationRequest(
        request_id=str(number),
        model=name,
        prompt=f"aerial photo of a valley, number {number}",
        negative_prompt=None,
        width=round(width * scale),
        height=round(height * scale),
        steps=model.steps,
        cfg=1.0 if unguided else model.cfg,
        seed=number,
        scheduler=model.scheduler,
        adapters=ERAS[str(rng.choice(list(ERAS)))],
    )
