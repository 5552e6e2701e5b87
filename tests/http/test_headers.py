"""Memory does not grow with what a client calls its headers."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import pytest

from tests.http.conftest import WAIT_S, RunningServer

LINE = b"X-Filler: " + b"a" * 10_000 + b"\r\n"
LINES = 5_000


def test_headers_without_an_end_are_refused(server: RunningServer) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), WAIT_S) as connection:
        connection.sendall(b"GET /ping HTTP/1.1\r\nHost: test\r\n")
        with pytest.raises(ConnectionError):
            connection.sendall(LINE * LINES)
    assert server.client.get("/ping").status_code == 200
