"""Between asyncio and the engine's thread: requests go in, results come back, and a client that has
gone takes its images along.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.types import Receive

from experimance_controlnet.engine.engine import Engine
from experimance_controlnet.engine.request import (
    GenerationRequest,
    GenerationResult,
    Progress,
    ProgressListener,
)
from experimance_controlnet.engine.tickets import Ticket
from experimance_controlnet.errors import RequestAbortedError


async def generate(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    client_gone: Callable[[], Awaitable[None]],
    on_progress: Callable[[Progress], None] | None = None,
) -> list[GenerationResult]:
    """Make all images of one client; one that fails, or the client's going, aborts the others.

    ``client_gone()`` returns when nobody waits any more. ``on_progress`` is called on the event
    loop after each step of each image.

    Raises:
        WorkerError: the first error of an image; RequestAbortedError when the client has gone.
    """
    tickets = engine.submit(requests, _on_loop(on_progress))
    results = asyncio.create_task(_all_results(tickets))
    gone = asyncio.ensure_future(client_gone())
    either: tuple[asyncio.Future[Any], ...] = (results, gone)
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if results.done():
            return results.result()
        gone.result()
        raise RequestAbortedError("The client has closed the connection.")
    finally:
        for ticket in tickets:
            if not ticket.future.done():
                engine.abort(ticket)
        results.cancel()
        gone.cancel()


async def _all_results(tickets: Sequence[Ticket]) -> list[GenerationResult]:
    # In a task of its own: a bare gather that is cancelled complains that nobody asked it why.
    return await asyncio.gather(*(asyncio.wrap_future(ticket.future) for ticket in tickets))


def until_disconnect(receive: Receive) -> Callable[[], Awaitable[None]]:
    """Watches the connection of a request whose body has been read."""

    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    return wait


def _on_loop(listener: Callable[[Progress], None] | None) -> ProgressListener | None:
    """The engine calls on its own thread and must not be held up."""
    if listener is None:
        return None
    loop = asyncio.get_running_loop()

    def post(progress: Progress) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            loop.call_soon_threadsafe(listener, progress)

    return post
