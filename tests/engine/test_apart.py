"""Prefill and decode on servers apart, both on this machine, over NIXL."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.engine.test_engine_modes import CHUNKS, MLA_DENSE
from tests.support.answers import require_tokens_of_transformers
from tests.support.apart import serve_apart
from tests.support.engine import EngineCase, EngineServer, Request
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


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(llama(), id="dense"),
        # Of MLA, the simulated GPU's tests show it each time.
        pytest.param(MLA_DENSE, id="MLA", marks=pytest.mark.long),
    ],
)
def test_what_one_server_prefills_another_decodes(
    engines: EngineServer, model: TinyModel, tmp_path: Path
) -> None:
    """Tokens are transformers'; the one server prefilled and the other did not."""
    runs = serve_apart(engines, EngineCase(engines.model(model), PHASES, CHUNKS), tmp_path)
    requests = [request for phase in PHASES for request in phase]
    require_tokens_of_transformers(engines, runs["decode"].outputs, requests, model)
    reports = {role: run.report() for role, run in runs.items()}
    assert {report["backend"] for report in reports.values()} == {"MusaFA3Backend"}
    # Passes of the one server are prefills, and of the other the decodes after the first token.
    new_tokens = requests[0].new_tokens
    decodes = reports["decode"]["statistics"]["passes"]
    assert decodes >= len(PHASES) * (new_tokens - 1)
    assert reports["prefill"]["statistics"]["passes"] < decodes
