"""Comparisons of an engine's answers with those of others."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.support.engine import EngineRun, EngineServer, Output, Request
from tests.support.tiny_models import TinyModel

LOGPROB_TOLERANCE = 1e-3
"""The difference of log-probabilities in float32, of other kernels in another order."""


def require_tokens_of_transformers(
    engines: EngineServer,
    outputs: Sequence[Output],
    requests: Sequence[Request],
    models: TinyModel | Sequence[TinyModel],
) -> None:
    """Fail unless tokens are those of transformers' greedy search, and log-probabilities close.

    Args:
        engines: computes the search.
        outputs: of an engine, one for each request.
        requests: what it was asked.
        models: of all requests, or one for each of them.
    """
    if isinstance(models, TinyModel):
        expected = engines.greedy_all(engines.model(models), requests)
    else:
        asked = zip(models, requests, strict=True)
        expected = [engines.greedy(engines.model(model), request) for model, request in asked]
    for output, (tokens, logprobs) in zip(outputs, expected, strict=True):
        assert output.tokens == tokens
        assert output.logprobs == pytest.approx(logprobs, abs=LOGPROB_TOLERANCE)


def require_tokens_of_another(run: EngineRun, other: EngineRun) -> None:
    """Fail unless two engines give the same tokens, and close log-probabilities."""
    assert run.tokens == other.tokens
    for output, theirs in zip(run.outputs, other.outputs, strict=True):
        assert output.logprobs == pytest.approx(theirs.logprobs, abs=LOGPROB_TOLERANCE)
