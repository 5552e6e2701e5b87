"""The socket that the server listens on. Imports little, so that a port in use is known at once."""

from __future__ import annotations

import errno
import socket

from experimance_controlnet.errors import SettingsError

BACKLOG = 2048
"""Connections that may wait to be accepted."""


def open_socket(host: str, port: int) -> socket.socket:
    """Listen; who connects before the application is ready waits.

    Raises:
        SettingsError: the address cannot be listened on; the cause is the OSError.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        # create_server adds the address in words of its own
        reason = (error.strerror or str(error)).partition(" (while")[0]
        at_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
        names = "PORT (--model-server-port)" if at_port else "HOST (--model-server-host)"
        raise SettingsError(
            f"MODEL_SERVER_{names}: cannot listen on {host} port {port}: {reason}"
        ) from error
    # Inherited by each connection. asyncio would set it, but not on one whose protocol number is 0,
    # as create_server's is; without it the end of an answer waits 40 ms for the client's
    # delayed acknowledgement of its beginning.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a client on this machine reaches the socket."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
