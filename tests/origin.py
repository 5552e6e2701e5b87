"""An HTTP origin with a script, as a real server on this machine's loopback."""

from __future__ import annotations

import itertools
import re
import ssl
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from experimance_controlnet.catalog.specs import Source


@dataclass
class Reply:
    """With an ``etag``, or with ``changed``, ranges are answered as RFC 9110 wants it."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    etag: str | None = None
    changed: str | None = None
    """Date for Last-Modified."""
    dislikes_conditions: bool = False
    """With If-Range, all of the file is sent."""
    cut_after: int | None = None
    """Bytes of the answer's body after which the connection breaks."""
    hold: threading.Event | None = None
    """Half of the body is sent, the rest when this is set."""
    drip_s: float = 0.0
    """Pause after each sixteenth of the answer's body."""


@dataclass
class Asked:
    """A request as it came."""

    path: str
    headers: dict[str, str]

    @property
    def span(self) -> tuple[int, int] | None:
        """First byte and the one behind the last one; None: no Range."""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        return (int(match[1]), int(match[2]) + 1) if match else None


class Origin:
    """The replies of each path in turn, the last one for ever."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.replies: dict[str, list[Reply]] = {}
        self.asked: list[Asked] = []
        self.connections = 0
        self.open_connections = 0
        self.sent_bytes = 0
        """Of bodies."""
        self._lock = threading.Lock()
        origin = self

        class Handler(_Handler):
            def setup(self) -> None:
                self.origin = origin
                origin.count_connection(1)
                super().setup()

            def finish(self) -> None:
                super().finish()
                origin.count_connection(-1)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            # the handshake is for the connection's own thread: it may fail
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._server.daemon_threads = True  # one may wait for a client that keeps its connection
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.port = self._server.server_port
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def requests(self) -> list[str]:
        """The paths, without queries."""
        return [asked.path for asked in self.asked]

    def serve(self, path: str, *replies: Reply) -> Source:
        self.replies[path] = list(replies)
        return Source(self.url + path)

    def next_reply(self, asked: Asked) -> Reply:
        with self._lock:
            self.asked.append(asked)
            script = self.replies.get(asked.path, [Reply(404)])
            return script.pop(0) if len(script) > 1 else script[0]

    def count_connection(self, change: int) -> None:
        with self._lock:
            self.connections += max(change, 0)
            self.open_connections += change

    def count(self, sent_bytes: int) -> None:
        with self._lock:
            self.sent_bytes += sent_bytes

    def close(self) -> None:
        for reply in itertools.chain(*self.replies.values()):
            if reply.hold is not None:
                reply.hold.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    origin: Origin

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply = self.origin.next_reply(Asked(path, headers))
        status, body, more = _answer(reply, Asked(path, headers))
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | more | reply.headers).items():
            self.send_header(name, value)
        self.end_headers()
        self._send(reply, body)

    def _send(self, reply: Reply, body: bytes) -> None:
        cut = body[: reply.cut_after]
        self.close_connection = len(cut) < len(body) or "Content-Length" in reply.headers
        parts = 16 if reply.drip_s else 2
        step = -(-len(cut) // parts) or 1
        try:
            for start in range(0, len(cut), step):
                self.wfile.write(cut[start : start + step])
                self.wfile.flush()
                self.origin.count(len(cut[start : start + step]))
                time.sleep(reply.drip_s)
                if reply.hold is not None and start == 0:
                    reply.hold.wait(10)
        except ConnectionError:
            self.close_connection = True  # the client gave up

    def log_message(self, *args: Any) -> None:
        pass


def _answer(reply: Reply, asked: Asked) -> tuple[int, bytes, dict[str, str]]:
    version = reply.etag or reply.changed
    more = {
        name: value
        for name, value in (("ETag", reply.etag), ("Last-Modified", reply.changed))
        if value is not None
    }
    span = asked.span
    condition = asked.headers.get("if-range", version)
    if reply.dislikes_conditions and "if-range" in asked.headers:
        condition = None
    if reply.status != 200 or version is None or span is None or condition != version:
        return reply.status, reply.body, more
    total = len(reply.body)
    start, end = span[0], min(span[1], total)
    if start >= total:
        return 416, b"", more | {"Content-Range": f"bytes */{total}"}
    return 206, reply.body[start:end], more | {"Content-Range": f"bytes {start}-{end - 1}/{total}"}
