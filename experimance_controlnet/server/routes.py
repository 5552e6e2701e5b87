"""The endpoints. Thin: each says what it takes and returns, and who does the work."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Annotated, Any

import pybase64
from fastapi import APIRouter, Header, Query, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import TypeAdapter

from experimance_controlnet.data_types import (
    ControlNetGenerateData,
    GenerateResponse,
    HealthResponse,
    ModelActionResponse,
    ModelsResponse,
    PingResponse,
    Problem,
)
from experimance_controlnet.errors import InvalidRequestError, UnknownNameError
from experimance_controlnet.server import problems
from experimance_controlnet.server.available import models_of
from experimance_controlnet.server.bridge import until_disconnect
from experimance_controlnet.server.codec import MEDIA_TYPES
from experimance_controlnet.server.generate import (
    Picture,
    Work,
    fetch_files,
    make_pictures,
    read_depth,
)
from experimance_controlnet.server.middleware import done_fields_of, request_id_of
from experimance_controlnet.server.negotiate import negotiate
from experimance_controlnet.server.resolve import Plan, make_plan
from experimance_controlnet.server.services import Services, TheServices
from experimance_controlnet.server.status import health_of
from experimance_controlnet.server.strict_json import StrictJsonRoute

_PROBLEM: dict[str, Any] = {
    "description": "A problem.",
    "content": {problems.MEDIA_TYPE: {"schema": Problem.model_json_schema()}},
}
_PROBLEM_STATUSES = (400, 406, 413, 415, 422, 429, 500, 502, 503, 504, 507)
_IMAGE_CONTENT = {
    media_type: {"schema": {"type": "string", "format": "binary"}}
    for media_type in MEDIA_TYPES.values()
}

_ANSWER = TypeAdapter(GenerateResponse)
"""Writes bytes at once, where the model's own method makes a string of them first."""

plain = APIRouter()
strict = APIRouter(route_class=StrictJsonRoute)

ModelName = Annotated[str, Query(min_length=1, max_length=64)]


@strict.post(
    "/generate",
    response_model=GenerateResponse,
    responses={
        200: {"description": "The image, in JSON or as the body.", "content": _IMAGE_CONTENT},
        **dict.fromkeys(_PROBLEM_STATUSES, _PROBLEM),
    },
)
async def generate(
    data: ControlNetGenerateData,
    services: TheServices,
    request: Request,
    accept: Annotated[str | None, Header()] = None,
) -> Response:
    """Make one or more images."""
    delivery = negotiate(accept, data)
    plan = make_plan(data, services.catalog, services.files.absent)
    _check_num_images(services, data.num_images)
    fields = done_fields_of(request.scope)
    fields.update(_plan_fields(plan))
    started_s = time.monotonic()
    with services.metrics.counting_losses(plan.model.name, data.num_images):
        services.engine.check_room(data.num_images)
        plan = await fetch_files(services, plan)
        depth = await read_depth(services, plan)
        work = Work(services, request_id_of(request.scope), plan, delivery.image_format)
        pictures = await make_pictures(work, depth, until_disconnect(request.receive))
        seconds = time.monotonic() - started_s
        if delivery.binary:
            response = _binary(pictures[0], MEDIA_TYPES[delivery.image_format])
        else:
            body = await services.codec.run(_json, plan, pictures, seconds)
            response = Response(body, media_type="application/json")
    for picture in pictures:
        services.metrics.image_done(plan.model.name, picture.metadata.times)
    services.metrics.workload_done(plan.workload)
    fields.update(_result_fields(pictures[0], seconds))
    return response


@plain.get("/ping")
async def ping() -> PingResponse:
    """Whether the process serves."""
    return PingResponse()


@plain.get("/checkhealth", responses={503: {"model": HealthResponse}})
@plain.get("/healthcheck", include_in_schema=False)
async def checkhealth(services: TheServices, response: Response) -> HealthResponse:
    """How the server is; 503 when the engine is dead or hangs."""
    health = health_of(services)
    if not health.model_server_healthy:
        response.status_code = 503
    return health


@plain.get("/models")
async def models(services: TheServices) -> ModelsResponse:
    """Every name that a request may hold, and where what it means is."""
    return await models_of(services)


@plain.post("/preload", responses={422: _PROBLEM, 503: _PROBLEM})
async def preload(services: TheServices, model_name: ModelName) -> ModelActionResponse:
    """Bring a model into memory; answers when it is there."""
    _check_model(services, "model_name", model_name)
    await services.bring(model_name)
    return _action(services, f"The model {model_name} is in memory.")


@plain.post("/unload", responses={422: _PROBLEM, 503: _PROBLEM})
async def unload(services: TheServices, model_key: ModelName) -> ModelActionResponse:
    """Free a model that no request uses."""
    _check_model(services, "model_key", model_key)
    await asyncio.wrap_future(services.engine.unload(model_key))
    return _action(services, f"The model {model_key} is not in memory.")


@plain.get("/metrics", response_class=Response)
async def metrics(services: TheServices) -> Response:
    """Prometheus' text format."""
    return Response(services.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _check_num_images(services: Services, num_images: int) -> None:
    most = services.settings.queue_capacity
    if num_images > most:  # would never fit: no 429, which invites another try
        raise InvalidRequestError("num_images", f"This server takes at most {most} at once.")


def _check_model(services: Services, field: str, name: str) -> None:
    known = services.catalog.models
    if name not in known:
        raise UnknownNameError(field, f"There is no such model; there are {', '.join(known)}.")


def _action(services: Services, message: str) -> ModelActionResponse:
    loaded = services.engine.health().models_loaded
    return ModelActionResponse(message=message, loaded_models=list(loaded))


def _binary(picture: Picture, media_type: str) -> Response:
    metadata = picture.metadata.model_dump(exclude={"prompt", "negative_prompt"})
    headers = {
        "X-Seed-Used": str(picture.metadata.seed),
        "X-Generation-Metadata": json.dumps(metadata),
    }
    return Response(picture.file, media_type=media_type, headers=headers)


def _json(plan: Plan, pictures: list[Picture], seconds: float) -> bytes:
    """On a codec thread: several images are tens of megabytes."""
    images = [pybase64.b64encode_as_string(picture.file) for picture in pictures]
    several = len(pictures) > 1
    first = pictures[0].metadata
    answer = GenerateResponse(
        image_b64=images[0],
        images_b64=images if several else None,
        generation_time=round(seconds, 4),
        seed_used=first.seed,
        model_used=first.model,
        era_used=first.era,
        metadata=first,
        images_metadata=[picture.metadata for picture in pictures] if several else None,
    )
    return _ANSWER.dump_json(answer)


def _plan_fields(plan: Plan) -> dict[str, Any]:
    """For the log; never the prompts."""
    data = plan.data
    return {
        "model": plan.model.name,
        "era": data.era,
        "size": f"{data.width}x{data.height}",
        "steps": plan.steps,
        "seed": plan.seed,
        "images": data.num_images,
        "workload": round(plan.workload, 3),
    }


def _result_fields(picture: Picture, seconds: float) -> dict[str, Any]:
    memory = picture.metadata.memory
    fields = picture.metadata.times.model_dump() | {"total_s": round(seconds, 4)}
    fields["ram_mb"] = memory.ram_mb
    if memory.gpu_memory is not None:
        fields["gpu_allocated_mb"] = memory.gpu_memory["allocated_mb"]
    return fields
