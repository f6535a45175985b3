"""The ports that engines hold, and engines that could not listen."""

from __future__ import annotations

import contextlib
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sglang_musa_ext.engines import ports
from sglang_musa_ext.engines.ports import held_block, held_port, rendezvous, with_other_ports
from sglang_musa_ext.validation.several import parts


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


def test_a_port_that_is_asked_for_is_refused_to_the_second() -> None:
    """Nobody shares a wanted port, not even another holder."""
    with held_port() as port, pytest.raises(OSError, match="in use"), held_port(port):
        pass
    with held_port(port) as again:
        assert again == port


def listened_on(first: int) -> set[int]:
    """Every port that a server of several engines is told of, or that SGLang derives from them."""
    told = set()
    for engine in (*parts(2, first, apart=False), *parts(1, first, apart=True)):
        told |= {engine["port"], engine.get("disaggregation_bootstrap_port", first)}
        meeting = int(engine.get("dist_init_addr", f":{first}").partition(":")[2])
        # PortArgs: the rendezvous, and for data-parallel attention what follows it.
        told |= set(range(meeting, meeting + 9))
    return told - {first}


def test_blocks_of_servers_do_not_meet() -> None:
    """Servers that start at the same time get other blocks, and ports within, below those that the
    system and SGLang give away.
    """
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(4) as threads:
        firsts = sorted(threads.map(lambda _: stack.enter_context(held_block()), range(8)))
    assert len(set(firsts)) == 8
    derived = {port + offset for port in firsts for offset in ports.DERIVED}
    told = [listened_on(first) for first in firsts]
    for first, own in zip(firsts, told, strict=True):
        assert own <= set(range(first + 1, first + ports.BLOCK))
        assert not own & derived
    assert ports.FIRST_BLOCK + ports.BLOCKS * ports.BLOCK + max(ports.DERIVED) < 22000


@pytest.mark.parametrize("offset", [0, 1, ports.BLOCK - 1, ports.DERIVED[0]])
def test_a_block_with_a_port_in_use_is_left_out(offset: int) -> None:
    """Whoever listens on one of its ports, or on one that SGLang derives, keeps it."""
    with held_block() as first:
        pass
    with bind(first + offset, reuse=True) as server:
        server.listen()
        with held_block() as other:
            assert other != first


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, True),
        ({"dp_size": 1}, True),
        ({"dp_size": 2, "enable_dp_attention": True}, True),
        ({"dp_size": 2}, False),
        ({"nccl_port": 5}, False),
    ],
)
def test_ranks_meet_at_the_held_port(arguments: dict[str, Any], told: bool) -> None:
    """All but replicas, of which each has a port of its own; what the caller says stays."""
    assert rendezvous(arguments, 4) == ({"nccl_port": 4} if told else {})


class Ended(RuntimeError):
    """An engine that ended with this output."""

    def __init__(self, log: str) -> None:
        super().__init__("it ended")
        self.log = log


@pytest.mark.parametrize(
    ("log", "attempts"),
    [
        ("port: 41459, useIpv6: false, code: -98, name: EADDRINUSE, message: address in use", 2),
        ("zmq.error.ZMQError: Address already in use (addr='tcp://127.0.0.1:41459')", 2),
        ("OSError: [Errno 98] error while attempting to bind: address already in use", 2),
        ("ValueError: nccl_port at 41459 is not available in 30 seconds.", 2),
        ("torch.AcceleratorError: CUDA error: out of memory", 1),
        ("", 1),
    ],
)
def test_a_taken_port_is_a_reason_for_one_more_attempt(log: str, attempts: int) -> None:
    """In PyTorch's words, ZeroMQ's, the event loop's and SGLang's; nothing else is, and no third is
    made.
    """
    made, between = list[int](), list[int]()

    def attempt() -> None:
        made.append(1)
        raise Ended(log)

    with pytest.raises(Ended):
        with_other_ports(attempt, Ended, lambda: between.append(1))
    assert (len(made), len(between)) == (attempts, attempts - 1)
