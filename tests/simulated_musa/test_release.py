"""SGLang on a simulated Moore Threads GPU, whichever release this environment imports.

``scripts/matrix`` runs it on all of them.
"""

from __future__ import annotations

import os

import pytest

from sglang_musa_ext.upstream.check import find_package, read_version
from tests.simulated_musa import cases
from tests.simulated_musa.cases import CASES, run_case
from tests.support.engine import EngineServer

pytestmark = pytest.mark.engine

EXPECTED_RELEASE = "SGLANG_EXPECTED_RELEASE"
"""The environment variable in which scripts/matrix says which release it means to test."""
NAMES = (
    "Llama",
    "Llama, prefill graphs",
    "Gemma-3",
    "OLMo-3",
    "MLA",
    "MLA with experts",
    "EAGLE, a chain",
)


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


@pytest.mark.skipif(
    EXPECTED_RELEASE not in os.environ,
    reason="test_engine.py requires the same of the installed release",
)
@pytest.mark.parametrize("name", NAMES)
def test_serves_right(musa: EngineServer, name: str) -> None:
    """Every token is transformers' choice after the same text, or as good as it, and every backend
    that gave it is ours, on MATE's kernels and on the device.
    """
    (case,) = (case for case in CASES if case.name == name)
    run = run_case(musa, case)
    cases.require_right_tokens(musa, case, run)
    cases.require_ours_on_mate(run)
