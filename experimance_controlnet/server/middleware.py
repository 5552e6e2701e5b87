"""What happens around every request, as pure ASGI: its id, its one log event, its size limit, and
the answer to errors that nobody foresaw.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from experimance_controlnet.errors import WorkerError

log = structlog.get_logger()

_USABLE_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
QUIET_ROUTES = frozenset({"/ping", "/checkhealth", "/healthcheck", "/metrics"})
"""Polled every few seconds: logged at debug, as long as all is well."""


def request_id_of(scope: Scope) -> str:
    """The id that :class:`RequestScope` has given to this request."""
    return str(scope["state"]["request_id"])


def done_fields_of(scope: Scope) -> dict[str, Any]:
    """Fields for the request's log event; a route adds what it knows."""
    fields: dict[str, Any] = scope["state"]["done_fields"]
    return fields


class RequestScope:
    """Outermost of all: gives each request an id and ends it with one ``request_done`` event.

    The id is the client's ``X-Request-ID`` where that is harmless, else a new one; the answer
    carries it, and so does every log event on the way.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        on_error: Callable[[str], Response],
        on_done: Callable[[str, int], None],
    ) -> None:
        """``on_error(request_id)`` makes the answer to an unforeseen error; ``on_done(route,
        status)`` counts.
        """
        self._app = app
        self._on_error = on_error
        self._on_done = on_done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _USABLE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, done_fields={})
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        started_s = time.monotonic()
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception as error:  # the top of HTTP: logged with the request's id
                code = WorkerError.code
                log.error("request_crashed", code=code, reason=repr(error), exc_info=error)
                if status is None:
                    await self._on_error(request_id)(scope, receive, send_with_id)
            finally:
                # no status: cancelled before it began to answer
                self._done(scope, status or 499, time.monotonic() - started_s)

    def _done(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self._on_done(route, status)
        quiet = route in QUIET_ROUTES and status < 400
        fields = {"method": scope["method"], "route": route, "status": status}
        fields |= {"http_s": round(seconds, 4)} | done_fields_of(scope)
        (log.debug if quiet else log.info)("request_done", **fields)


class BodyLimit:
    """Refuses a body as soon as its announced or its real length is above the limit.

    Starlette's own limit does the same, but answers in plain text.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await self._app(scope, self._counting(scope, receive), send)

    def _counting(self, scope: Scope, receive: Receive) -> Callable[[], Awaitable[Message]]:
        announced = Headers(scope=scope).get("content-length", "0")
        total = 0

        async def counted() -> Message:
            nonlocal total
            if announced.isdecimal() and int(announced) > self._max_bytes:
                raise self._too_large()
            message = await receive()
            total += len(message.get("body", b""))
            if total > self._max_bytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"The body is larger than {self._max_bytes // 10**6} MB.")
