from __future__ import annotations

import socket

from experimance_controlnet.server.listener import open_socket


def test_connections_send_without_waiting_for_acknowledgements() -> None:
    with (
        open_socket("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
