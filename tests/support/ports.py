"""Ports that nobody else on this machine gets while an engine uses them.

SGLang asks the system for a free port, lets go of it, and binds it again after its imports; two
engines that start at the same time, of two workers of a test run, can so come to the same one.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """Yield a TCP port of loopback which only a server that is told of it can use meanwhile.

    A socket is bound to it and never listens. Bound so, it keeps the system from giving the port
    away; and because its address may be reused, a server that sets ``SO_REUSEADDR``, as PyTorch's
    rendezvous and uvicorn do, can bind the port too and listen there.
    """
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        # Not before it is bound: it would then share the port of another holder.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield holder.getsockname()[1]
