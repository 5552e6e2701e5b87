"""What the server says about itself. Nothing here waits for the engine's thread."""

from __future__ import annotations

import time

from experimance_controlnet import __version__
from experimance_controlnet.data_types import (
    HealthResponse,
    LoadUnderWay,
    ModelInfo,
    ModelsResponse,
    ServerStatus,
)
from experimance_controlnet.engine.engine import EngineHealth, LoadProgress
from experimance_controlnet.engine.schedulers import SCHEDULER_NAMES
from experimance_controlnet.server.resolve import era_names, model_sources
from experimance_controlnet.server.services import Services


def health_of(services: Services) -> HealthResponse:
    """A snapshot; ``model_server_healthy`` is false when the engine is dead or hangs."""
    engine = services.engine.health()
    status = _status(services, engine)
    failed = services.preload.failed
    problem = next(
        (why for model, why in failed.items() if model not in engine.models_loaded), None
    )
    waits_for_models = bool(services.preload.pending) or not engine.models_loaded
    return HealthResponse(
        status=status,
        model_server_healthy=engine.alive and not engine.hung,
        ready_for_inference=status == "ready"
        or (status == "loading_models" and not waits_for_models),
        models_loaded=list(engine.models_loaded),
        models_parked=list(engine.models_parked),
        loading=[_load_under_way(load) for load in engine.loading],
        memory_usage=services.memory(),
        uptime=round(time.monotonic() - services.started_s, 3),
        queue_depth=engine.queue_depth,
        queue_workload=round(engine.queue_workload, 3),
        last_error=engine.last_error or problem,
        device=services.engine.device_name,
        precision=services.engine.precision,
        memory_tier=services.engine.memory_tier,
        version=__version__,
    )


def _load_under_way(load: LoadProgress) -> LoadUnderWay:
    return LoadUnderWay(
        kind=load.kind,
        name=load.name,
        source=load.source,
        seconds=None if load.seconds is None else round(load.seconds, 3),
        share=None if load.share is None else round(load.share, 3),
    )


def _status(services: Services, engine: EngineHealth) -> ServerStatus:
    if not engine.alive or engine.hung:
        return "error"
    if engine.draining:
        return "draining"
    if engine.models_loading:
        return "loading_models"
    if services.preload.pending:  # its files are on their way
        return "starting"
    if set(services.preload.failed) - set(engine.models_loaded):
        return "error"
    return "ready"


async def models_of(services: Services) -> ModelsResponse:
    """The catalogue's names, and where each model is."""
    catalog = services.catalog
    loaded = services.engine.health().models_loaded
    on_disk = await services.files.on_disk(
        {name: model_sources(model) for name, model in catalog.models.items()}
    )
    return ModelsResponse(
        available_models=list(catalog.models),
        available_eras=era_names(catalog),
        available_schedulers=["auto", *SCHEDULER_NAMES],
        available_loras=list(catalog.loras),
        available_controlnets=list(catalog.controlnets),
        models={
            name: ModelInfo(
                steps=model.steps,
                cfg=model.cfg,
                scheduler=model.scheduler,
                on_disk=on_disk[name],
                in_memory=name in loaded,
            )
            for name, model in catalog.models.items()
        },
    )
