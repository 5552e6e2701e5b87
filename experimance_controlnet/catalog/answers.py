"""What an origin's answer to a GET means: the whole file, a part of it, or a typed error.

::

    DownloadError
    └── BrokenOffError       a fault that may pass: worth another try
        └── FutileError      the same, but what arrived before it is no reason to try for ever
            └── FileChangedError    the file is another one than at the start of the transfer
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from experimance_controlnet.errors import (
    AccessDeniedError,
    DownloadError,
    NotFoundUpstreamError,
)

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)


class BrokenOffError(DownloadError):
    """A fault that may pass. ``retry_after_s`` is the origin's own word on when."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class FutileError(BrokenOffError):
    """A fault that counts as a failed try even if bytes arrived before it."""


class FileChangedError(FutileError):
    """Parts of two states of a file must not become one."""


@dataclass(frozen=True, slots=True)
class Whole:
    """All of the file is in this answer. ``size_bytes`` is None where the origin does not say."""

    size_bytes: int | None


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes from ``start`` to before ``end``, of ``size_bytes`` (None: not said).

    ``version`` names the state of the file: a strong ETag, else the date of its last change, else
    None; as it is sent back in ``If-Range``.
    """

    start: int
    end: int
    size_bytes: int | None
    version: str | None


@dataclass(frozen=True, slots=True)
class OutOfRange:
    """The origin has no such part."""


def read_answer(label: str, status: int, headers: Mapping[str, str]) -> Whole | Part | OutOfRange:
    """What a GET brought, with or without Range; ``headers`` find a name in any case.

    ``label`` names the file in errors. Raises AccessDeniedError, NotFoundUpstreamError,
    BrokenOffError, DownloadError.
    """
    if status == 416:
        return OutOfRange()
    if status not in (200, 206):
        raise status_error(label, status, headers.get("Retry-After"))
    if headers.get("Content-Type", "").startswith("text/html"):
        raise DownloadError(
            f"{label}: the origin answers with a web page, perhaps a login: "
            "check the address and the access token"
        )
    if headers.get("Content-Encoding", "identity") != "identity":
        raise DownloadError(f"{label}: the origin sends it compressed, though not asked to")
    length = _number(headers.get("Content-Length"))
    if status == 200:
        return Whole(length)
    match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if match is None:
        raise DownloadError(f"{label}: the origin sends a part without saying which")
    start, end = int(match[1]), int(match[2]) + 1
    size_bytes = _number(match[3])
    if length not in (None, end - start) or not start < end <= (size_bytes or end):
        raise DownloadError(f"{label}: the origin contradicts itself about a part's length")
    return Part(start, end, size_bytes, _version(headers))


def status_error(label: str, status: int, retry_after: str | None = None) -> DownloadError:
    """The error for an origin's HTTP status other than 200 and 206."""
    message = f"{label}: the origin answers {status}"
    if status in (401, 403):
        return AccessDeniedError(
            f"{message}: it may not be read; an access token may be missing or wrong"
        )
    if status in (404, 410):
        return NotFoundUpstreamError(f"{message}: there is no such file; check its address")
    if status in (408, 425, 429) or status >= 500:
        seconds = _number(retry_after)
        return BrokenOffError(f"{message}: try again later", retry_after_s=seconds)
    return DownloadError(message)


def _version(headers: Mapping[str, str]) -> str | None:
    etag = headers.get("ETag", "")
    if etag.startswith('"') and etag.endswith('"') and len(etag) > 2:  # not weak ones: W/"..."
        return etag
    return headers.get("Last-Modified") or None


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() and text.isascii() and len(text) < 20 else None
