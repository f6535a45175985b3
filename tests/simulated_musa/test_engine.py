"""The real, unmodified SGLang on a simulated Moore Threads GPU: its own MUSA branches, graphs and
defaults, and MATE's provider.

No backend is named unless a case says so. What is right is known from transformers, token by token
after the same text; that a plan is never stale is known from kernels that go wrong with one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.engine.test_engine import keep_plans_for_ever
from tests.simulated_musa import cases, stand_ins
from tests.simulated_musa.cases import CASES, MusaCase, run_case, worst
from tests.support.engine import EngineFailed, EngineRun, EngineServer

pytestmark = pytest.mark.engine


SLOW = ("MLA, prefill graphs",)
"""Cases for ``scripts/test -m long``: this one spends a minute in Triton's interpreter."""


def cases_to_ask() -> Iterator[Any]:
    """Every case, by its name."""
    for case in CASES:
        marks = [pytest.mark.long] if case.name in SLOW else []
        yield pytest.param(case, id=case.name, marks=marks)


@pytest.fixture(params=list(cases_to_ask()), scope="module")
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
    stand_ins.collectives_and_compiled_prefill()
    keep_plans_for_ever()


def lead_plans_into_captures() -> None:
    """Make another: a capture takes over the plans of the warm-up before it, so that its replays
    compute none.
    """
    from sglang_musa_ext.attention.plans import SchedulerMetadataCache

    stand_ins.collectives_and_compiled_prefill()
    cache: Any = SchedulerMetadataCache
    original = cache.end_pass
    latest: dict[int, Any] = {}

    def end_pass(self: Any) -> None:
        """End a pass; one in a capture begins with the plans of the latest that had some."""
        if self.current.plans or self.current.in_place:
            latest[id(self)] = self.current
        original(self)
        if self.capturing and id(self) in latest:
            former = latest[id(self)]
            self.current.plans, self.current.in_place = former.plans, former.in_place

    cache.end_pass = end_pass


@pytest.mark.parametrize("name", ["Llama, batch reversed", "MLA"])
def test_stale_plans_are_noticed(musa: EngineServer, name: str) -> None:
    """An engine that keeps its plans too long gives other tokens, or dies of it: in prefill, and in
    MLA's decode graphs. Other decode graphs lose their splits alone, which no token shows.
    """
    (case,) = (case for case in CASES if case.name == name)
    unchecked = {"SIMULATED_MATE_PLANS": "any"}
    try:
        run = run_case(musa, case, environ=unchecked, before_boot=keep_plans_too_long)
    except EngineFailed as failure:
        noticed = "illegal memory access" in failure.log
    else:
        noticed = worst(musa, case, run.outputs) > case.limit
    assert noticed


def graphs_and_mistakes() -> list[Any]:
    """Return graphs of decoding, of drafts and of a whole prefill, each with both mistakes; beside
    some, the others take too long.
    """
    quick = ("Llama", "MLA", "EAGLE, a chain", "Llama, whole prefill graphs")
    others = ("Gemma-3", "EAGLE, a tree", "STANDALONE")
    chosen = []
    for mistake in (lead_plans_into_captures, keep_plans_too_long):
        for name in (*quick, *others):
            is_quick = mistake is lead_plans_into_captures and name in quick
            marks = [] if is_quick else [pytest.mark.long]
            chosen.append(pytest.param(name, mistake, marks=marks))
    return chosen


@pytest.mark.parametrize(("name", "mistake"), graphs_and_mistakes())
def test_stale_plans_in_graphs_are_noticed(
    musa: EngineServer, name: str, mistake: Callable[[], None]
) -> None:
    """Kernels in graphs refuse a plan that is not that of their call, though it costs splits alone;
    so no engine above had one.
    """
    (case,) = (case for case in CASES if case.name == name)
    asked = cases.prompts(40, 700, new_tokens=4)
    if case.captures_prefill:  # One request, and no decoding.
        asked = cases.prompts(700, new_tokens=1)
    short = replace(case, phases=(asked,))
    with pytest.raises(EngineFailed) as failure:
        run_case(musa, short, before_boot=mistake)
    assert "a plan is not that of its call" in failure.value.log
