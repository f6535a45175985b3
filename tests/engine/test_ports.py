"""The ports that engines of tests hold."""

from __future__ import annotations

import socket

import pytest

from tests.support.ports import held_port


def bind(port: int, *, reuse: bool) -> socket.socket:
    """A socket on ``port`` of loopback, its address reusable or not."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
    try:
        server.bind(("127.0.0.1", port))
    except OSError:
        server.close()
        raise
    return server


def test_nobody_else_gets_a_held_port() -> None:
    """Whoever looks for a port of its own is refused a held one, and gets it afterwards."""
    with held_port() as port, pytest.raises(OSError, match="in use"):
        bind(port, reuse=False)
    bind(port, reuse=False).close()


def test_the_server_that_was_told_listens_on_a_held_port() -> None:
    """A server that reuses addresses listens there, and only one does."""
    with held_port() as port, bind(port, reuse=True) as server:
        server.listen()
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
        with pytest.raises(OSError, match="in use"):
            bind(port, reuse=True)
