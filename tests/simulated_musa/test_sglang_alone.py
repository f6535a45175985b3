"""What SGLang by itself answers on the simulated GPU: what this package changes there, and what it
cannot change. Where a release corrects one of these, its test fails, and the docs can say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from tests.simulated_musa import cases
from tests.simulated_musa.cases import CASES, MusaCase, run_case
from tests.simulated_musa.in_tree import verdict
from tests.support.engine import EngineFailed, EngineServer

pytestmark = pytest.mark.engine

OFF = {"SGLANG_MUSA_EXT": "off"}


@pytest.mark.parametrize("name", ["Gemma-2", "Gemma-3", "OLMo-3"])
def test_the_in_tree_backend_is_wrong(musa: EngineServer, name: str) -> None:
    """SGLang's own MUSA backend loses windows and softcap where a prompt has no prefix."""
    (case,) = (case for case in CASES if case.name == name)
    assert verdict(musa, case).startswith("WRONG")


def test_the_in_tree_backend_is_right(musa: EngineServer) -> None:
    """It is right for a plain model, so that what it gets wrong is not the simulation's doing."""
    (case,) = (case for case in CASES if case.name == "Llama")
    assert verdict(musa, case).startswith("right")


@pytest.mark.parametrize("environ", [OFF, {}], ids=["alone", "with this package"])
@pytest.mark.parametrize(
    ("model", "arguments", "error"),
    [
        (cases.LLAMA, {"enable_deterministic_inference": True}, "No supported accelerator"),
        (cases.MLA_DENSE, {}, "BFloat16"),
    ],
    ids=["deterministic inference", "MLA in float16"],
)
def test_what_sglang_cannot_do(
    musa: EngineServer,
    model: Any,
    arguments: Mapping[str, Any],
    error: str,
    environ: Mapping[str, str],
) -> None:
    """It fails alike without this package and with it."""
    case = replace(MusaCase("fails", model, (cases.prompts(40),)), arguments=arguments)
    with pytest.raises(EngineFailed, match=error):
        run_case(musa, case, environ=environ)
