"""L6, the request that everything is measured with: 6 Lightning steps, guidance 2, depth, an era.

No two have the same prompt and seed, so that text encoding is never a cache's work. The negative
prompt is the same every time, as installations send it.
"""

from __future__ import annotations

from benchmarks.full_size import CONTROLNET, ERA_WEIGHTS, ERAS, MODEL, Family
from benchmarks.pictures import hills
from experimance_controlnet.engine.request import Adapter, Control, GenerationRequest
from experimance_controlnet.workload import workload

STEPS, CFG, CONTROL_STRENGTH = 6, 2.0, 0.8
FIRST_ERA, SECOND_ERA = ERAS

_PLACES = ("river valley", "mountain village", "harbour", "desert road", "forest lake")
_LIGHTS = ("at sunset", "under snow", "in morning fog", "before a storm", "at noon")


def standard_request(
    family: Family, number: int, era: str | None, model: str = MODEL
) -> GenerationRequest:
    """The ``number``-th of its kind. ``era`` None is without adapters."""
    place, light = _PLACES[number % 5], _LIGHTS[number // 5 % 5]
    adapters = () if era is None else tuple(map(Adapter, ERAS[era], ERA_WEIGHTS))
    return GenerationRequest(
        request_id=f"benchmark-{number}",
        model=model,
        prompt=f"aerial photo of a {place} {light}, number {number}, highly detailed",
        negative_prompt="blurry, low quality, watermark",
        width=family.side_px,
        height=family.side_px,
        steps=STEPS,
        cfg=CFG,
        seed=number,
        scheduler="euler",
        adapters=adapters,
        control=Control(CONTROLNET, hills(family.side_px), CONTROL_STRENGTH),
        workload=workload(
            width=family.side_px, height=family.side_px, steps=STEPS, cfg=CFG, depth=True
        ),
    )
