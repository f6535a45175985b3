"""Prefill and decode on servers apart, both on this machine, over NIXL."""

from __future__ import annotations

import importlib.util
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_engine_modes import LOGPROB_TOLERANCE, MLA_DENSE, STEPWISE
from tests.support.engine import (
    EngineCase,
    EngineRun,
    EngineServer,
    Request,
    ask_booted,
    booted,
    fork_always,
)
from tests.support.ports import held_port
from tests.support.tiny_models import TinyModel, llama, tokens

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        importlib.util.find_spec("nixl") is None,
        reason="NIXL, which moves keys and values between servers, is not installed",
    ),
]

LONG = tokens(200, seed=3)
PHASES = (
    (Request(tokens(5, seed=1), room=1), Request(tokens(70, seed=2), room=2)),
    (Request(LONG, room=3),),
    # All of this but a suffix was prefilled before.
    (Request(LONG + tokens(30, seed=4), room=4),),
)
HALVES = ("prefill", "decode")
SECONDS = 100.0


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


def serve_apart(engines: EngineServer, model: TinyModel, meeting: Path) -> dict[str, EngineRun]:
    """Return the answers of a server that prefills and one that decodes to the same requests."""
    path = engines.model(model)
    with held_port() as port, ThreadPoolExecutor(2) as threads:

        def serve(role: str) -> Any:
            arguments = {
                "disaggregation_mode": role,
                "disaggregation_transfer_backend": "nixl",
                "disaggregation_bootstrap_port": port,
                "chunked_prefill_size": 128,
            }
            case = EngineCase(
                path,
                PHASES,
                STEPWISE | arguments,
                {"SGLANG_HOST_IP": "127.0.0.1"},
                meeting_port=port,
            )
            return engines.call(serve_half, case, role, meeting, timeout=2 * SECONDS)

        return dict(zip(HALVES, threads.map(serve, HALVES), strict=True))


@pytest.mark.parametrize("model", [llama(), MLA_DENSE], ids=["dense", "MLA"])
def test_what_one_server_prefills_another_decodes(
    engines: EngineServer, model: TinyModel, tmp_path: Path
) -> None:
    """Tokens are transformers'; the one server prefilled and the other did not."""
    runs = serve_apart(engines, model, tmp_path)
    requests = [request for phase in PHASES for request in phase]
    for output, request in zip(runs["decode"].outputs, requests, strict=True):
        expected, logprobs = engines.greedy(engines.model(model), request)
        assert output.tokens == expected
        assert output.logprobs == pytest.approx(logprobs, abs=LOGPROB_TOLERANCE)
    reports = {role: run.report() for role, run in runs.items()}
    assert {report["backend"] for report in reports.values()} == {"MusaFA3Backend"}
    # Passes of the one server are prefills, and of the other the decodes after the first token.
    new_tokens = requests[0].new_tokens
    decodes = reports["decode"]["statistics"]["passes"]
    assert decodes >= len(PHASES) * (new_tokens - 1)
    assert reports["prefill"]["statistics"]["passes"] < decodes
