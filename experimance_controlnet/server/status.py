"""What the server says about itself. Nothing here waits for the engine's thread."""

from __future__ import annotations

import time

from experimance_controlnet import __version__
from experimance_controlnet.data_types import (
    DownloadStatus,
    HealthResponse,
    LoadUnderWay,
    ServerStatus,
)
from experimance_controlnet.engine.engine import EngineHealth, LoadProgress
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
        downloads=[
            DownloadStatus(
                name=transfer.name,
                done_bytes=transfer.done_bytes,
                total_bytes=transfer.total_bytes,
                bytes_per_s=round(transfer.bytes_per_s, 1),
            )
            for transfer in services.files.downloads()
        ],
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
