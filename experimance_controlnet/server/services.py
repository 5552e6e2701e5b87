"""What the routes share: one record per application, and the state of the models at its start."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import psutil
import structlog
from fastapi import Depends, Request

from experimance_controlnet.catalog.entries import model_sources
from experimance_controlnet.catalog.specs import Catalog, Source
from experimance_controlnet.data_types import MemoryUse
from experimance_controlnet.defaults import DEFAULT_CONTROLNET
from experimance_controlnet.engine.engine import Engine
from experimance_controlnet.errors import DrainingError, WorkerError
from experimance_controlnet.server.codec import CodecPool
from experimance_controlnet.server.files import ModelFiles
from experimance_controlnet.server.metrics import Metrics
from experimance_controlnet.settings import Settings

log = structlog.get_logger()


@dataclass(slots=True)
class Preload:
    """How the models of PRELOAD_MODEL are getting on."""

    pending: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Model -> why."""


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that a route may need."""

    settings: Settings
    catalog: Catalog
    engine: Engine
    files: ModelFiles
    metrics: Metrics
    codec: CodecPool
    preload: Preload = field(default_factory=Preload)
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the server begins to stop."""
    started_s: float = field(default_factory=time.monotonic)

    async def stop_engine(self) -> None:
        """Take no new work and let what was accepted finish, within the grace."""
        if self.draining.is_set():
            return
        self.engine.drain()
        self.draining.set()
        grace_s = self.settings.shutdown_grace_s
        if not await asyncio.to_thread(self.engine.stop, grace_s):
            log.warning("shutdown_incomplete", grace_s=grace_s)

    def memory(self) -> MemoryUse:
        """Of this process and its GPU."""
        gpu = self.engine.gpu_memory()
        return MemoryUse(
            ram_mb=round(psutil.Process().memory_info().rss / 2**20, 1),
            gpu_memory=gpu
            and {
                "allocated_mb": round(gpu.allocated_bytes / 2**20, 1),
                "reserved_mb": round(gpu.reserved_bytes / 2**20, 1),
                "total_mb": round(gpu.total_bytes / 2**20, 1),
            },
        )

    async def fetch(self, sources: Sequence[Source]) -> None:
        """Return when all of them are on this disk.

        Raises:
            ModelFileError: one of them cannot be had.
            DrainingError: the server stops and does not wait for a transfer.
        """
        fetch = asyncio.ensure_future(self.files.ensure(sources))
        stop = asyncio.ensure_future(self.draining.wait())
        try:
            await asyncio.wait({fetch, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not fetch.done():
                raise DrainingError("The server is stopping; send the request to another one.")
            fetch.result()
        finally:
            fetch.cancel()
            stop.cancel()

    async def bring(self, model: str) -> None:
        """Fetch and load a model of the catalogue, ready for its first request with a depth map.

        Raises:
            ModelFileError, UnavailableError
        """
        spec = self.catalog.models[model]
        await self.fetch(self._sources(model))
        # beside the load, which does not wait for it: pictures need it, being ready does not
        self.files.begin_hash(spec.source)
        await asyncio.wrap_future(self.engine.load(model))

    def _sources(self, model: str) -> list[Source]:
        sources = list(model_sources(self.catalog.models[model]))
        if DEFAULT_CONTROLNET in self.catalog.controlnets:
            sources.append(self.catalog.controlnets[DEFAULT_CONTROLNET].source)
        return sources

    async def preload_all(self, models: Sequence[str]) -> None:
        """Bring the models in one after the other; what fails is kept in :attr:`preload`."""
        self.preload.pending.extend(models)
        # until torch is imported nobody else needs the disk
        sources = [source for model in models for source in self._sources(model)]
        ahead = asyncio.ensure_future(self.files.read_ahead(sources))
        try:
            await self._bring_pending()
        finally:
            ahead.cancel()  # the thread goes on, nobody waits

    async def _bring_pending(self) -> None:
        while self.preload.pending:
            model = self.preload.pending[0]
            try:
                await self.bring(model)
            except DrainingError:
                return
            except (WorkerError, OSError) as error:
                log.error("preload_failed", model=model, reason=str(error))
                # an OSError's own text holds a path of this server
                reason = error.strerror if isinstance(error, OSError) else str(error)
                self.preload.failed[model] = reason or type(error).__name__
            finally:
                self.preload.pending.remove(model)


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


TheServices = Annotated[Services, Depends(_services)]
"""For the signatures of routes."""
