"""The way of one ``POST /generate``: plan, files, depth map, engine, image files."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from experimance_controlnet import __version__
from experimance_controlnet.data_types import (
    ControlApplied,
    GenerationMetadata,
    ImageFormat,
    LoraApplied,
    MemoryUse,
    PhaseTimes,
)
from experimance_controlnet.engine.request import GenerationResult, PixelImage
from experimance_controlnet.errors import NotFoundUpstreamError
from experimance_controlnet.server import bridge, codec
from experimance_controlnet.server.resolve import SEEDS, Plan, make_plan
from experimance_controlnet.server.services import Services


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished image file and what was really applied to it."""

    file: bytes
    metadata: GenerationMetadata


@dataclass(frozen=True, slots=True)
class Work:
    """A request under way: who asks for what."""

    services: Services
    request_id: str
    plan: Plan
    image_format: ImageFormat


async def fetch_files(services: Services, plan: Plan) -> Plan:
    """Bring everything the plan needs onto this disk; returns the plan that can be carried out.

    It is another one where the era's own LoRA turns out not to exist at its origin and the
    catalogue states an alternative.

    Raises:
        ModelFileError, DrainingError: see :meth:`Services.fetch`.
    """
    try:
        await services.fetch(plan.sources)
    except NotFoundUpstreamError:
        # the same body once more, with the seed that was drawn
        data = plan.data.model_copy(update={"seed": plan.seed})
        other = make_plan(data, services.catalog, services.files.absent)
        if other.era_alternative == plan.era_alternative:
            raise
        return await fetch_files(services, other)
    return plan


async def read_depth(services: Services, plan: Plan) -> codec.DepthMap | None:
    """The depth map of the request; None where it has none.

    Raises:
        BadDepthMapError: also where the plan does not need it, for nothing wrong is ignored.
    """
    data = plan.data
    if data.depth_map_b64 is not None:
        return await services.codec.run(codec.decode_depth, data.depth_map_b64)
    if data.mock_depth:
        return await services.codec.run(codec.mock_depth, data.width, data.height)
    return None


async def make_pictures(
    work: Work, depth: codec.DepthMap | None, client_gone: Callable[[], Awaitable[None]]
) -> list[Picture]:
    """Let the engine make the images, and make files of them.

    Raises:
        WorkerError: see :func:`bridge.generate`.
    """
    services = work.services
    accepted_s = time.monotonic()
    deadline_s = accepted_s + services.settings.request_timeout_s
    image = None if depth is None else depth.image
    requests = work.plan.requests(work.request_id, image, deadline_s)
    services.files.begin_hash(work.plan.model.source)  # beside the load of a model that is new here
    results = await bridge.generate(services.engine, requests, client_gone)
    model_hash = await services.files.content_hash(work.plan.model.source)
    control = _control_applied(work.plan, depth)
    memory = services.memory()
    pictures = (
        services.codec.run(
            _encode,
            result.pixels,
            work.image_format,
            work.plan.data.quality,
            _metadata(work, index, result, model_hash, control, memory),
            accepted_s,
        )
        for index, result in enumerate(results)
    )
    return list(await asyncio.gather(*pictures))


def _encode(
    pixels: PixelImage,
    image_format: ImageFormat,
    quality: int,
    metadata: GenerationMetadata,
    accepted_s: float,
) -> Picture:
    """On a codec thread. The file holds all metadata but the two times that end with the file."""
    started_s = time.monotonic()
    embedded = metadata.model_dump(exclude={"times": {"encode_image_s", "total_s"}})
    file = codec.encode_image(pixels, image_format, quality, json.dumps(embedded))
    ended_s = time.monotonic()
    times = metadata.times.model_copy(
        update={
            "encode_image_s": round(ended_s - started_s, 4),
            "total_s": round(ended_s - accepted_s, 4),
        }
    )
    return Picture(file, metadata.model_copy(update={"times": times}))


def _metadata(
    work: Work,
    index: int,
    result: GenerationResult,
    model_hash: str | None,
    control: ControlApplied | None,
    memory: MemoryUse,
) -> GenerationMetadata:
    plan, data = work.plan, work.plan.data
    return GenerationMetadata(
        request_id=work.request_id,
        prompt=data.prompt,
        negative_prompt=data.negative_prompt,
        model=plan.model.name,
        model_hash=model_hash,
        era=data.era,
        era_alternative=plan.era_alternative,
        lora_strength=data.lora_strength,
        requested_loras=data.loras,
        loras=[LoraApplied(name=lora.name, weight=lora.weight) for lora in plan.adapters],
        steps=plan.steps,
        cfg=plan.cfg,
        seed=(plan.seed + index) % SEEDS,
        scheduler=result.scheduler_class,
        scheduler_name=plan.scheduler,
        use_karras_sigmas=result.use_karras_sigmas,
        width=data.width,
        height=data.height,
        control=control,
        prompt_tokens=result.prompt_tokens,
        negative_prompt_tokens=result.negative_prompt_tokens,
        workload=round(plan.workload, 3),
        queue_time=round(result.queue_s, 4),
        times=PhaseTimes(
            queue_s=round(result.queue_s, 4),
            encode_s=round(result.encode_s, 4),
            denoise_s=round(result.denoise_s, 4),
            decode_s=round(result.decode_s, 4),
            encode_image_s=0.0,
            total_s=0.0,
        ),
        precision=work.services.engine.precision,
        memory=memory,
        notes=list(result.notes),
        server_version=__version__,
    )


def _control_applied(plan: Plan, depth: codec.DepthMap | None) -> ControlApplied | None:
    if plan.controlnet is None or plan.depth is None:
        return None
    assert depth is not None
    return ControlApplied(
        controlnet=plan.controlnet.name,
        strength=plan.data.controlnet_strength,
        start=plan.data.control_guidance_start,
        end=plan.data.control_guidance_end,
        depth=plan.depth,
        depth_sha256=depth.file_sha256,
    )
