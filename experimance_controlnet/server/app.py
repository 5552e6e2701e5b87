"""The application: its parts, and its beginning and end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI

from experimance_controlnet import __version__
from experimance_controlnet.catalog.hashes import HashNotes
from experimance_controlnet.catalog.specs import Catalog
from experimance_controlnet.engine.engine import Engine
from experimance_controlnet.server.codec import CodecPool
from experimance_controlnet.server.files import ModelFiles, Store
from experimance_controlnet.server.metrics import Metrics
from experimance_controlnet.server.middleware import BodyLimit, RequestScope
from experimance_controlnet.server.problems import crash_response, install_handlers
from experimance_controlnet.server.routes import plain, strict
from experimance_controlnet.server.services import Services
from experimance_controlnet.settings import Settings


def create_app(settings: Settings, catalog: Catalog, store: Store, engine: Engine) -> FastAPI:
    """A server of its own. Its lifespan starts the engine, and at the end drains and stops it.

    ``settings.preload_models`` are names of the catalogue.
    """
    services = Services(
        settings=settings,
        catalog=catalog,
        engine=engine,
        files=ModelFiles(store, HashNotes(settings.models_dir / ".cache" / "sha256")),
        metrics=Metrics(engine),
        codec=CodecPool(),
    )
    app = FastAPI(
        title="Experimance ControlNet",
        summary="SDXL images steered by depth maps, in the style of historical eras.",
        version=__version__,
        servers=[{"url": settings.explicit_url}] if settings.explicit_url else None,
        lifespan=_lifespan,
    )
    app.state.services = services
    app.include_router(strict)
    app.include_router(plain)
    install_handlers(app)
    # the last one added is the outermost
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_mb * 10**6)
    app.add_middleware(RequestScope, on_error=crash_response, on_done=services.metrics.request_done)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    services.engine.start()
    # in the background: /ping answers from the first moment
    preload = asyncio.create_task(services.preload_all(services.settings.preload_models))
    try:
        yield
    finally:
        preload.cancel()
        await asyncio.wait({preload})
        await services.stop_engine()
        services.codec.close()
