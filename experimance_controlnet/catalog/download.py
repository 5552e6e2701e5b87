"""One attempt to bring one file over HTTP.

Staging, retries and checks of the content are the store's.
This module does not resume a cut transfer: the store gives every transfer a fresh folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from experimance_controlnet.catalog.disk import check_free_space
from experimance_controlnet.catalog.location import is_loopback, without_query
from experimance_controlnet.errors import (
    BadWeightsError,
    DownloadError,
    NotFoundUpstreamError,
)

_CHUNK_BYTES = 1 << 20
_MAX_REDIRECTS = 5


class BrokenOffError(DownloadError):
    """A fault that may pass: worth another try."""


def download_file(client: httpx.Client, url: str, target: Path, size_bytes: int | None) -> str:
    """Write the file behind a URL to ``target``; return its sha256, lower-case hex.

    ``size_bytes`` is the length that the catalogue states, if it does. Raises BrokenOffError for
    faults that may pass, NotFoundUpstreamError, DownloadError, BadWeightsError, DiskFullError.
    """
    label = without_query(url)
    try:
        with _open(client, url) as response:
            _check_answer(response, label)
            length = response.headers.get("Content-Length")
            if length is not None:
                if size_bytes not in (None, int(length)):
                    raise BadWeightsError(
                        f"{label} has {length} bytes; the catalogue says {size_bytes}"
                    )
                check_free_space(target.parent, int(length))
            return _save(response, target)
    except httpx.TransportError as error:  # a body shorter than its Content-Length among them
        raise BrokenOffError(f"{label}: {str(error) or type(error).__name__}") from error


def status_error(label: str, status: int) -> DownloadError:
    """The error for an origin's HTTP status other than 200."""
    message = f"{label}: the origin answers {status}"
    if status in (401, 403, 404, 410):
        return NotFoundUpstreamError(message)
    if status in (408, 429) or status >= 500:
        return BrokenOffError(message)
    return DownloadError(message)


@contextmanager
def _open(client: httpx.Client, url: str) -> Iterator[httpx.Response]:
    # by hand, since no hop may leave https
    request = client.build_request("GET", url, headers={"Accept-Encoding": "identity"})
    for _ in range(_MAX_REDIRECTS + 1):
        response = client.send(request, stream=True, follow_redirects=False)
        try:
            if response.next_request is None:
                yield response
                return
        finally:
            response.close()
        if not _may_redirect(request.url, response.next_request.url):
            raise DownloadError(f"{without_query(url)}: redirects away from https")
        request = response.next_request
    raise DownloadError(f"{without_query(url)}: more than {_MAX_REDIRECTS} redirects")


def _may_redirect(origin: httpx.URL, target: httpx.URL) -> bool:
    if target.scheme == "https":
        return True
    return {origin.scheme, target.scheme} == {"http"} and is_loopback(target.host)


def _check_answer(response: httpx.Response, label: str) -> None:
    if response.status_code != 200:
        raise status_error(label, response.status_code)
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise DownloadError(f"{label}: the origin answers with a web page, perhaps a login")


def _save(response: httpx.Response, target: Path) -> str:
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for chunk in response.iter_raw(_CHUNK_BYTES):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()
