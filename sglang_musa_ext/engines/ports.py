"""Ports that nobody else on this machine gets while an engine uses them.

SGLang asks the system for a free port, lets go of it, and binds it again after its imports; two
engines that start at the same time can so come to the same one. Engines of this package get ports
of their own instead. What SGLang still looks for itself (the meeting point of each replica of data
parallelism; in some releases, queues between the ranks of one engine) may be gone when it listens:
such an engine is started again.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

LOOPBACK = "127.0.0.1"
FIRST_BLOCK, BLOCKS, BLOCK = 11000, 200, 50
"""Where the ports of servers of several engines begin, how many servers there may be on a machine,
and how many ports each has for itself. They lie below those that the system gives away, and below
those that SGLang chooses from since 0.5.22.
"""
DERIVED = range(233, 243)
"""What SGLang adds to a server's port for data-parallel attention: see its ``PortArgs``."""
TAKEN = re.compile(r"EADDRINUSE|[Aa]ddress already in use|port\w* at \d+ is not available")
"""In the output of an engine that could not listen."""

Result = TypeVar("Result")


@contextlib.contextmanager
def held_port(wanted: int = 0) -> Iterator[int]:
    """Yield a TCP port of loopback which only a server that is told of it can use meanwhile.

    A socket is bound to it and never listens. Bound so, it keeps the system from giving the port
    away; and because its address may be reused, a server that sets ``SO_REUSEADDR``, as PyTorch's
    rendezvous and uvicorn do, can bind the port too and listen there.

    Args:
        wanted: the port; 0 for one that the system chooses.

    Raises:
        OSError: somebody has ``wanted``.
    """
    with socket.socket() as holder:
        holder.bind((LOOPBACK, wanted))
        # Not before it is bound: it would then share the port of another holder.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield holder.getsockname()[1]


@contextlib.contextmanager
def held_block() -> Iterator[int]:
    """Yield the first of ``BLOCK`` ports for the engines of one server.

    Nobody else gets the block meanwhile, in this process or another one: the first port is held.
    The server must not listen on that one.

    Raises:
        OSError: every block has a port in use.
    """
    with contextlib.ExitStack() as stack:
        for first in range(FIRST_BLOCK, FIRST_BLOCK + BLOCKS * BLOCK, BLOCK):
            try:
                stack.enter_context(held_port(first))
                _require_free(first)
            except OSError:
                stack.close()
                continue
            yield first
            return
    raise OSError(
        f"each {BLOCK} ports from {FIRST_BLOCK} on have one that is in use, {BLOCKS} times; end "
        "what listens there"
    )


def _require_free(first: int) -> None:
    """Raise an ``OSError`` if a port of a block is in use, beside its first, which is held."""
    for offset in (*range(1, BLOCK), *DERIVED):
        with socket.socket() as probe:
            # What was in use a minute ago may be used again, as servers do.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((LOOPBACK, first + offset))


def rendezvous(arguments: Mapping[str, Any], port: int) -> dict[str, Any]:
    """Return what has the ranks of an engine with ``arguments`` meet at ``port``.

    Nothing if the arguments say where, or if there are replicas: each wants a port of its own, and
    SGLang looks for them.
    """
    replicas = arguments.get("dp_size", 1) > 1 and not arguments.get("enable_dp_attention")
    return {} if replicas or "nccl_port" in arguments else {"nccl_port": port}


def with_other_ports(
    attempt: Callable[[], Result],
    failure: type[Exception],
    again: Callable[[], object] = lambda: None,
) -> Result:
    """Return what ``attempt`` returns; repeat it once if an engine of it found its port taken.

    Args:
        attempt: starts an engine that answers nothing before it has all its ports.
        failure: what it raises for an engine that ended; its ``log`` is the engine's output.
        again: called before the second attempt.
    """
    try:
        return attempt()
    except failure as error:
        if not TAKEN.search(f"{error}\n{getattr(error, 'log', '')}"):
            raise
    again()
    return attempt()
