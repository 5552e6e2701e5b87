"""From an exception to the one body of every error, ``application/problem+json``.

The body never holds a traceback, nor what the client sent, apart from the names of fields.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from experimance_controlnet import errors
from experimance_controlnet.data_types import Problem
from experimance_controlnet.server.middleware import done_fields_of, request_id_of

log = structlog.get_logger()

MEDIA_TYPE = "application/problem+json"
FAULTS_SHOWN = 20
"""Of the faults of one body: a body can hold as many as it has bytes."""

STATUS: Mapping[type[errors.WorkerError], int] = {
    errors.InvalidRequestError: 422,
    errors.ModelFileError: 500,
    errors.DownloadError: 502,
    errors.ChecksumMismatchError: 502,
    errors.DiskFullError: 507,
    errors.UnavailableError: 503,
    errors.QueueFullError: 429,
    errors.DeadlineExceededError: 504,
    errors.RequestAbortedError: 499,
    errors.WorkerError: 500,
}
"""The nearest class counts: what is not here has the status of its base."""

_TITLES = {499: "Client Closed Request"}  # not in the standard library's list
_CODES = {
    400: "malformed_json",
    404: "not_found",
    405: "method_not_allowed",
    406: "not_acceptable",
    413: "body_too_large",
    415: "unsupported_media_type",
}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def install_handlers(app: FastAPI) -> None:
    """Answer every expected exception with a problem. The unexpected ones end in ``middleware``."""
    app.add_exception_handler(errors.WorkerError, _on_worker_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_client_gone)


def status_of(error: errors.WorkerError) -> int:
    """The HTTP status of an error of this package."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def problem_response(
    request_id: str,
    status: int,
    code: str,
    detail: str,
    *,
    faults: Sequence[Mapping[str, str]] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The answer. ``faults`` name each wrong field with its reason."""
    problem = Problem(
        title=_TITLES.get(status) or HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code,
        request_id=request_id,
        error_message=detail,
        errors=None if faults is None else [dict(fault) for fault in faults],
    )
    # ASCII: a message may hold what UTF-8 cannot
    body = json.dumps(problem.model_dump()).encode("ascii")
    return Response(body, status, media_type=MEDIA_TYPE, headers=dict(headers or {}))


def crash_response(request_id: str) -> Response:
    """The answer to an error that nobody foresaw; the log has its cause."""
    detail = f"Something went wrong; the server's log has the cause under {request_id}."
    return problem_response(request_id, 500, errors.WorkerError.code, detail)


async def _on_worker_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.WorkerError)
    headers, faults = {}, None
    if isinstance(error, errors.UnavailableError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, errors.InvalidRequestError):
        faults = [{"field": error.field, "reason": error.message}]
    if _is_fault(error):
        log.error(
            "problem_answered", code=error.code, reason=error.message, exc_info=error.__cause__
        )
    status = status_of(error)
    return _answer(request, status, error.code, error.message, faults=faults, headers=headers)


def _is_fault(error: errors.WorkerError) -> bool:
    """Whether the operator should know. That the server is busy, or stops, is no fault."""
    if isinstance(error, errors.UnavailableError):
        return isinstance(error, errors.DeviceMemoryError | errors.EngineDeadError)
    return status_of(error) >= 500


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if found[0]["type"] == "json_invalid":
        why, position = found[0]["ctx"]["error"], found[0]["loc"][1]
        detail = f"The body is not JSON: {why} at character {position}."
        return _answer(request, 400, "malformed_json", detail)
    faults = [{"field": _path(fault["loc"]), "reason": _reason(fault)} for fault in found]
    more = len(faults) - FAULTS_SHOWN
    del faults[FAULTS_SHOWN:]
    detail = "; ".join(f"{fault['field']}: {fault['reason']}" for fault in faults)
    detail += f"; and {more} more" if more > 0 else ""
    return _answer(request, 422, errors.InvalidRequestError.code, detail, faults=faults)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ClientDisconnect):  # FastAPI makes it a 400
        return await _on_client_gone(request, error)
    status, detail = error.status_code, error.detail
    if status == 400:  # FastAPI's word for a body that json.loads gives up on
        detail = "The body is not JSON: bad UTF-8, a number too long, or nested too deep."
    code = _CODES.get(status, "http_error")
    return _answer(request, status, code, detail, headers=error.headers)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    code = errors.RequestAbortedError.code
    return _answer(request, 499, code, "The client has closed the connection.")


def _answer(
    request: Request,
    status: int,
    code: str,
    detail: str,
    *,
    faults: Sequence[Mapping[str, str]] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    done_fields_of(request.scope)["code"] = code
    request_id = request_id_of(request.scope)
    return problem_response(request_id, status, code, detail, faults=faults, headers=headers)


def _path(location: Sequence[Any]) -> str:
    """``("body", "loras", 0, "name")`` as ``loras.0.name``; shows plain names only."""
    parts = [str(part) for part in location[1:]] or [str(location[0])]
    return ".".join(part if _PLAIN_NAME.fullmatch(part) else "(a name)" for part in parts)


def _reason(fault: Mapping[str, Any]) -> str:
    if fault["type"] == "extra_forbidden":
        return "there is no such field"
    return str(fault["msg"]).removeprefix("Value error, ")
