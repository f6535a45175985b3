"""SGLang on a simulated Moore Threads GPU, whichever release this environment imports.

``scripts/matrix`` runs it on all of them.
"""

from __future__ import annotations

import os

import pytest

from sglang_musa_ext.upstream.check import find_package, read_version
from tests.simulated_musa import cases
from tests.simulated_musa.cases import CASES, MusaCase, run_case
from tests.support.engine import EngineRun, EngineServer

pytestmark = pytest.mark.engine

EXPECTED_RELEASE = "SGLANG_EXPECTED_RELEASE"
"""The environment variable in which scripts/matrix says which release it means to test."""
NAMES = ("Llama", "Gemma-3", "OLMo-3", "MLA", "EAGLE, a chain")


def imported_version() -> str:
    """Return the version of the SGLang that this process imports."""
    import sglang

    return str(sglang.__version__)


def test_engine_is_of_the_expected_release(musa: EngineServer) -> None:
    """The engine's processes have imported the release whose column of the matrix this is."""
    package = find_package()
    assert package is not None
    version = read_version(package)
    assert musa.call(imported_version) == version
    assert os.environ.get(EXPECTED_RELEASE, version) == version


@pytest.fixture(params=NAMES, scope="module")
def case(request: pytest.FixtureRequest) -> MusaCase:
    """One of the cases that every release is asked."""
    (case,) = (case for case in CASES if case.name == request.param)
    return case


@pytest.fixture(scope="module")
def run(musa: EngineServer, case: MusaCase) -> EngineRun:
    """What its engine answers."""
    return run_case(musa, case)


def test_tokens_are_transformers(musa: EngineServer, case: MusaCase, run: EngineRun) -> None:
    """Every token is transformers' choice after the same text, or as good as it."""
    cases.require_right_tokens(musa, case, run)


def test_ours_serves_on_mate(run: EngineRun) -> None:
    """Every attention backend is ours, on MATE's kernels and on the device, and computes plans."""
    cases.require_ours_on_mate(run)
