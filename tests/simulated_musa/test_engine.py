"""The real, unmodified SGLang on a simulated Moore Threads GPU: its own MUSA branches, graphs and
defaults, and MATE's provider.

No backend is named unless a case says so. What is right is known from transformers, token by token
after the same text; that a plan is never stale is known from kernels that go wrong with one.
"""

from __future__ import annotations

import pytest

from tests.engine.test_engine import keep_plans_for_ever
from tests.simulated_musa import cases, stand_ins
from tests.simulated_musa.cases import CASES, MusaCase, run_case, worst
from tests.support.engine import EngineFailed, EngineRun, EngineServer

pytestmark = pytest.mark.engine


@pytest.fixture(params=CASES, ids=lambda case: case.name, scope="module")
def case(request: pytest.FixtureRequest) -> MusaCase:
    """One of ``CASES``."""
    case: MusaCase = request.param
    return case


@pytest.fixture(scope="module")
def run(musa: EngineServer, case: MusaCase) -> EngineRun:
    """Return the engine's answers."""
    return run_case(musa, case)


def test_tokens_are_transformers(musa: EngineServer, case: MusaCase, run: EngineRun) -> None:
    """Every token is transformers' choice after the same text, or as good as it."""
    cases.require_right_tokens(musa, case, run)


def test_ours_serves_on_mate(case: MusaCase, run: EngineRun) -> None:
    """Every attention backend is ours, on MATE's kernels and on the device, and computes plans."""
    cases.require_ours_on_mate(run, has_sinks=case.model == cases.GPT_OSS)


def test_raw_keys_serve_prefill(case: MusaCase, run: EngineRun) -> None:
    """Prefill without a prefix runs over raw keys, as it does by default, unless the cache is fp8:
    then those keys are not what other passes read.
    """
    if case.arguments.get("kv_cache_dtype") == "fp8_e4m3":
        assert not any(report["statistics"]["raw_calls"] for report in run.reports[-1])
    elif case.model == cases.LLAMA and case.draft is None:
        assert all(report["statistics"]["raw_calls"] > 0 for report in run.reports[-1])


# --- the tests can fail ---------------------------------------------------------------------------


def keep_plans_too_long() -> None:
    """Make the mistake that this package prevents: a plan serves every pass of its geometry."""
    stand_ins.collectives()
    keep_plans_for_ever()


@pytest.mark.parametrize("name", ["Llama, batch reversed", "MLA"])
def test_stale_plans_are_noticed(musa: EngineServer, name: str) -> None:
    """An engine that keeps its plans too long gives other tokens, or dies of it: in prefill, and in
    MLA's decode graphs. Other decode graphs lose their splits alone, which no token shows.
    """
    (case,) = (case for case in CASES if case.name == name)
    try:
        run = run_case(musa, case, before_boot=keep_plans_too_long)
    except EngineFailed as failure:
        noticed = "illegal memory access" in failure.log
    else:
        noticed = worst(musa, case, run.outputs) > case.limit
    assert noticed
