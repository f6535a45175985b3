"""A server that prefills and one that decodes, on this machine, for tests that ask both."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from sglang_musa_ext.engines.ports import held_port
from tests.support.engine import (
    EngineCase,
    EngineRun,
    EngineServer,
    ask_booted,
    booted,
)
from tests.support.forks import fork_always

HALVES = ("prefill", "decode")
SECONDS = 100.0
"""The longest that one half waits for the other."""


def serve_apart(engines: EngineServer, case: EngineCase, meeting: Path) -> dict[str, EngineRun]:
    """Return the answers of both servers to the requests of ``case``, which have rooms.

    Args:
        engines: boots both.
        case: what both have in common.
        meeting: an empty folder, in which they wait for one another.
    """
    with held_port() as port, ThreadPoolExecutor(2) as threads:

        def serve(role: str) -> EngineRun:
            arguments = {
                "disaggregation_mode": role,
                "disaggregation_transfer_backend": "nixl",
                "disaggregation_bootstrap_port": port,
            }
            half = replace(
                case,
                arguments={**case.arguments, **arguments},
                environ={**case.environ, "SGLANG_HOST_IP": "127.0.0.1"},
                meeting_port=port,
            )
            run: EngineRun = engines.call(serve_half, half, role, meeting, timeout=2 * SECONDS)
            return run

        return dict(zip(HALVES, threads.map(serve, HALVES), strict=True))


def serve_half(case: EngineCase, role: str, meeting: Path) -> EngineRun:
    """Boot one of the two servers, and ask it when both are up; end it when both have answered."""
    fork_always()
    with booted(case) as engine:
        meet(meeting, role, "up")
        run = ask_booted(engine, case)
        meet(meeting, role, "answered")
    return run


def meet(meeting: Path, role: str, event: str) -> None:
    """Say that ``role`` has come to ``event``, and wait until both have."""
    (meeting / f"{role} {event}").touch()
    until = time.monotonic() + SECONDS
    while not all((meeting / f"{half} {event}").exists() for half in HALVES):
        if time.monotonic() > until:
            raise TimeoutError(f"the other half was not {event} within {SECONDS:.0f} s")
        time.sleep(0.05)
