"""The process around the application: its socket, its signals, its end.

The first SIGTERM or SIGINT drains: what was accepted finishes, what still comes gets 503, then the
process ends with 0. The second one ends it at once. A dead or hung engine ends it with 1, so that a
supervisor starts another.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from experimance_controlnet.server.listener import BACKLOG
from experimance_controlnet.server.services import Services

log = structlog.get_logger()

KEEP_ALIVE_S = 75
"""Longer than the clients' own limits (PyWorker's: 15 s): no connection closes under a request."""
LAST_ANSWERS_S = 5
"""For answers on their way to slow readers, once the engine has stopped."""
OBITUARY_S = 2.0
"""How long a server with a dead engine still answers, so that health checks can see why it ends."""
DEATH_LIMIT_S = 8.0
"""After this the process ends even if the event loop is stuck."""


def exit_after(delay_s: float, status: int = 1) -> None:
    """End the process later, whatever its threads are doing."""
    timer = threading.Timer(delay_s, os._exit, (status,))
    timer.daemon = True
    timer.start()


class Server(uvicorn.Server):
    """uvicorn with an end of our own: see the module. ``run`` serves until it is time to stop."""

    def __init__(self, app: FastAPI, on_listening: Callable[[], None] = lambda: None) -> None:
        """``app`` is of :func:`create_app`; ``on_listening`` is called when it can answer."""
        super().__init__(
            uvicorn.Config(
                app,
                # By default uvicorn takes httptools where that happens to be installed. It saves
                # 3 of 27 ms at bodies of a megabyte, but keeps headers of any length in memory.
                http="h11",
                log_config=None,  # its loggers pass everything on to ours
                access_log=False,  # we log one event a request
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=LAST_ANSWERS_S,
                backlog=BACKLOG,
            )
        )
        self._services: Services = app.state.services
        self._on_listening = on_listening
        self._failed_s: float | None = None
        self.exit_status = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._on_listening()

    async def main_loop(self) -> None:
        """Serve until told to stop, then go on serving until what was accepted is finished."""
        await super().main_loop()
        log.info("server_draining", exit_status=self.exit_status)
        draining = asyncio.create_task(self._services.stop_engine())
        while not draining.done():
            await asyncio.wait({draining}, timeout=0.1)
            await self.on_tick(counter=1)  # the engine may still fail, even with its last image

    async def on_tick(self, counter: int) -> bool:
        """Whether it is time to stop. uvicorn asks ten times a second."""
        return self._engine_failed() or await super().on_tick(counter)

    def _engine_failed(self) -> bool:
        engine = self._services.engine
        health = engine.health()
        if health.hung and health.alive:
            log.critical("engine_hung", watchdog_s=self._services.settings.watchdog_s)
            engine.give_up("The engine hangs.")
        elif health.alive:
            return False
        self._failed_s = self._failed_s or time.monotonic()
        self.exit_status = 1
        return time.monotonic() - self._failed_s > OBITUARY_S

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn's own would, at the end, raise the signal again and so lose the exit status."""
        if threading.current_thread() is not threading.main_thread():  # in tests
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal asks for an orderly end, the second does not wait for it."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
