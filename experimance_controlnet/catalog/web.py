"""GET over https: redirects by hand, access tokens, proxies; no word of a query or token in errors.

urllib3 and not httpx, because it hands on as much at once as it is asked for: for the same
gigabytes it needs Python's interpreter lock for a quarter of the time. The engine needs it too.
"""

from __future__ import annotations

import functools
import os
import ssl
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol
from urllib.parse import SplitResult, urldefrag, urljoin, urlsplit

import certifi
import urllib3
from urllib3.exceptions import HTTPError, LocationValueError, NewConnectionError, SSLError
from urllib3.exceptions import TimeoutError as SilenceError

from experimance_controlnet.catalog.answers import (
    BrokenOffError,
    OutOfRange,
    Part,
    Whole,
    read_answer,
)
from experimance_controlnet.catalog.location import is_loopback
from experimance_controlnet.errors import DownloadError

_MAX_REDIRECTS = 5
_CONNECT_S = 10.0
_CONNECTIONS_A_HOST = 32


def tokens_of(environment: Mapping[str, str]) -> dict[str, str]:
    """By host, the access tokens that an operator has set. The Hub's library finds its own."""
    token = environment.get("CIVITAI_TOKEN", "").strip()
    return {"civitai.com": token} if token else {}


class Http(Protocol):
    """What is needed of ``urllib3.PoolManager``."""

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        preload_content: bool,
        decode_content: bool,
        redirect: bool,
        retries: bool,
    ) -> urllib3.BaseHTTPResponse: ...

    def clear(self) -> None: ...


class Answer:
    """An open answer. ``meaning`` is what it says of itself, ``url`` where the redirects ended."""

    def __init__(
        self,
        label: str,
        url: str,
        meaning: Whole | Part | OutOfRange,
        response: urllib3.BaseHTTPResponse,
    ) -> None:
        self.label = label
        self.url = url
        self.meaning = meaning
        self._response = response

    def read(self, most_bytes: int) -> bytes:
        """So many bytes of the body, less only where it ends or breaks off, nothing thereafter.

        Raises BrokenOffError.
        """
        with _transport_errors(self.label):
            return self._response.read(most_bytes)

    def interrupt(self) -> None:
        """Make a ``read`` that waits on another thread end at once, in whatever way.

        What any ``read`` returns from now on means nothing.
        """
        with suppress(ValueError, RuntimeError, OSError):  # it may have ended by itself
            self._response.shutdown()


class Web:
    """Where files come from; safe to use from many threads.

    ``tokens`` are by host, with the port where the URL has one. Each is sent to its own host and to
    no other that it redirects to.
    """

    def __init__(
        self, tokens: Mapping[str, str], http: Http | None = None, *, silence_s: float = 30.0
    ) -> None:
        """``silence_s`` is how long an origin may send nothing. ``http``: other connections."""
        self._tokens = dict(tokens)
        self._http = http or _Proxied(silence_s)

    def close(self) -> None:
        """Close the connections that are kept for a next request."""
        self._http.clear()

    @contextmanager
    def get(
        self, label: str, url: str, headers: Mapping[str, str], *, home_url: str | None = None
    ) -> Iterator[Answer]:
        """The answer to a GET, closed at the end of the block.

        ``label`` names the file in errors. ``home_url`` is the address that once redirected to
        this one: a token is for its host only. Raises what ``answers.read_answer`` raises.
        """
        home = urlsplit(home_url or url).netloc
        for _ in range(_MAX_REDIRECTS + 1):
            with self._hop(label, url, home, headers) as response:
                location = response.get_redirect_location()
                if not location:
                    meaning = read_answer(label, response.status, response.headers)
                    yield Answer(label, url, meaning, response)
                    return
            url = _next_hop(label, url, location)
        raise DownloadError(f"{label}: more than {_MAX_REDIRECTS} redirects")

    @contextmanager
    def _hop(
        self, label: str, url: str, home: str, headers: Mapping[str, str]
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        sent = {"Accept-Encoding": "identity", "User-Agent": "experimance-controlnet", **headers}
        host = urlsplit(url).netloc
        if host == home and host in self._tokens:
            sent["Authorization"] = f"Bearer {self._tokens[host]}"
        with _transport_errors(label):
            response = self._http.request(
                "GET",
                url,
                headers=sent,
                preload_content=False,
                decode_content=False,
                redirect=False,
                retries=False,
            )
        try:
            yield response
        finally:
            response.close()  # a connection whose body was read to its end is kept for the next


class _Proxied:
    """Pools of connections: direct ones, and through what HTTPS_PROXY, HTTP_PROXY, NO_PROXY say."""

    def __init__(self, silence_s: float) -> None:
        self._options: dict[str, Any] = {
            "maxsize": _CONNECTIONS_A_HOST,
            "timeout": urllib3.Timeout(connect=_CONNECT_S, read=silence_s),
            "ssl_context": _trusted(),
        }
        self._direct = urllib3.PoolManager(**self._options)
        self._through: dict[str, urllib3.ProxyManager] = {}

    def request(self, method: str, url: str, **options: Any) -> urllib3.BaseHTTPResponse:
        return self._pool(urlsplit(url)).request(method, url, **options)

    def clear(self) -> None:
        for manager in (self._direct, *self._through.values()):
            for key in manager.pools.keys():  # noqa: SIM118 - it is not a dict
                manager.pools[key].close()  # clear alone leaves it to the garbage collector
            manager.clear()

    def _pool(self, url: SplitResult) -> urllib3.PoolManager:
        host = url.hostname or ""
        proxy = urllib.request.getproxies().get(url.scheme)
        if proxy is None or is_loopback(host) or urllib.request.proxy_bypass(host):
            return self._direct
        if proxy not in self._through:
            self._through[proxy] = urllib3.ProxyManager(proxy, **self._options)
        return self._through[proxy]


@functools.cache  # reading all authorities takes tens of milliseconds
def _trusted() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE") or certifi.where())


def _next_hop(label: str, url: str, location: str) -> str:
    try:
        target = urldefrag(urljoin(url, location)).url
        parts = urlsplit(target)
        host = parts.hostname or ""
    except ValueError as error:
        raise DownloadError(f"{label}: redirects to what is not a URL") from error
    to_loopback = urlsplit(url).scheme == parts.scheme == "http" and is_loopback(host)
    if not (parts.scheme == "https" or to_loopback) or not host or "@" in parts.netloc:
        raise DownloadError(f"{label}: redirects away from https")
    return target


@contextmanager
def _transport_errors(label: str) -> Iterator[None]:
    """Turn urllib3's errors into ours, in our own words: theirs can hold a URL with its query."""
    try:
        yield
    except LocationValueError as error:
        raise DownloadError(f"{label}: its address cannot be used") from error
    except SSLError as error:
        if isinstance(error.args[0], ssl.SSLCertVerificationError):
            raise DownloadError(
                f"{label}: the origin's certificate is not trusted; check the clock, the network, "
                "and SSL_CERT_FILE"
            ) from error
        raise BrokenOffError(f"{label}: no secure connection; check the network") from error
    except HTTPError as error:
        raise BrokenOffError(f"{label}: {_reason(error)}; check the network") from error


def _reason(error: HTTPError) -> str:
    if isinstance(error, NewConnectionError):  # a name that is not known among them
        return "the origin cannot be reached"
    if isinstance(error, SilenceError):
        return "the origin is silent for too long"
    return "the connection broke off"
