"""What the demo requires of a server's counts, beside those of the real engine."""

from __future__ import annotations

import pytest

from scripts.lib.demo.__main__ import StreamedAnswer, counts_since, require_composed
from scripts.lib.demo.server import DemoError
from sglang_musa_ext import envs
from tests.engine.test_engine import requests
from tests.support.engine import EngineCase, EngineRun, EngineServer
from tests.support.tiny_models import llama

ANSWER = StreamedAnswer("Paris.", 8, 1.0, 1.0)


@pytest.fixture(scope="module")
def served(engines: EngineServer) -> EngineRun:
    """Return a prompt's answer by an engine as the demo starts one, with every default."""
    case = EngineCase(
        engines.model(llama()), (requests(40), requests(70)), environ={envs.RAW_PREFILL: "on"}
    )
    return engines.run(case)


@pytest.mark.engine
def test_the_counts_of_an_engine_are_accepted(served: EngineRun) -> None:
    """A prompt without a prefix goes over raw keys, and each decode has a plan."""
    (before,), (after,) = served.reports[1:3]
    counts = counts_since(before["statistics"], after["statistics"])
    require_composed(after, counts, ANSWER)
    assert counts["calls"] == counts["raw_calls"] + counts["plans"] + counts["reuses"] > 0


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("passes", 1, "plans in"),
        ("plans", 1, "plans in"),
        ("reuses", 1, "expected every call"),
        ("calls", 1, "expected every call"),
        ("raw_calls", -2, "no call was over raw keys"),
    ],
)
def test_other_counts_are_refused(served: EngineRun, name: str, more: int, message: str) -> None:
    """A call that nobody planned, or counted twice, ends the demo."""
    (before,), (after,) = served.reports[1:3]
    counts = counts_since(before["statistics"], after["statistics"])
    counts[name] += more
    if name == "raw_calls":
        assert counts[name] == 0
        counts["calls"] += more
    with pytest.raises(DemoError, match=message):
        require_composed(after, counts, ANSWER)
