"""The real, unmodified SGLang on a simulated Moore Threads GPU: its own MUSA branches, graphs and defaults, and MATE's
provider.

No backend is named unless a case says so. What is right is known from transformers, token by token after the same
text; that a plan is never stale is known from kernels that go wrong with one.
"""

from __future__ import annotations

import importlib.metadata

import pytest

from tests.simulated_musa.cases import CASES, MusaCase, run_case, worst
from tests.support.engine import EngineRun, EngineServer

pytestmark = pytest.mark.engine

RELEASE = tuple(int(part) for part in importlib.metadata.version("sglang").split(".")[:3])


@pytest.fixture(params=CASES, ids=lambda case: case.name, scope="module")
def case(request: pytest.FixtureRequest) -> MusaCase:
    """One of ``CASES``."""
    case: MusaCase = request.param
    return case


@pytest.fixture(scope="module")
def run(musa: EngineServer, case: MusaCase) -> EngineRun:
    """What its engine answers."""
    return run_case(musa, case, RELEASE)


def test_tokens_are_transformers(musa: EngineServer, case: MusaCase, run: EngineRun) -> None:
    """Every token is transformers' choice after the same text, or as good as it."""
    assert [len(output.tokens) for output in run.outputs] == [
        each.new_tokens for each in case.requests
    ]
    assert worst(musa, case, run.outputs) <= case.limit


def test_ours_serves_on_mate(case: MusaCase, run: EngineRun) -> None:
    """Every attention backend is ours, on MATE's kernels, on the device, with pages of 64; and it reuses plans."""
    reports = run.reports[-1]
    assert {report["backend"] for report in reports} == {"MusaFA3Backend"}
    assert {(report["kernels"], report["page_size"]) for report in reports} == {("mate", 64)}
    assert all(report["device"].startswith("musa:") for report in reports)
    assert all(report["statistics"]["plans"] > 0 for report in reports)
