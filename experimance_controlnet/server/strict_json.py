"""A route that takes nothing but plain JSON, and says so before it reads the body."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException


class StrictJsonRoute(APIRoute):
    """Answers 415 to compressed bodies and to other media types than ``application/json``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            _check_headers(request)
            return await handle(request)

        return handle_json


def _check_headers(request: Request) -> None:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "Compressed bodies are not accepted; send plain JSON.")
    content_type = Message()
    content_type["content-type"] = request.headers.get("content-type", "")
    is_json = content_type.get_content_type() == "application/json"
    charset = str(content_type.get_param("charset", "utf-8"))
    if not is_json or charset.lower() != "utf-8":
        raise HTTPException(
            415, "Send JSON in UTF-8 with the header Content-Type: application/json."
        )
