"""SGLang by itself on the simulated GPU: what this package changes there, and what it cannot
change. Where a release corrects one of these, its test fails, and the docs can say so. What does
not involve this package changes with SGLang alone, and is run by ``scripts/test -m long``.
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


@pytest.mark.long
@pytest.mark.parametrize("name", ["Gemma-2", "Gemma-3", "OLMo-3"])
def test_the_in_tree_backend_is_wrong(musa: EngineServer, name: str) -> None:
    """SGLang's own MUSA backend loses windows and softcap where a prompt has no prefix."""
    (case,) = (case for case in CASES if case.name == name)
    assert verdict(musa, case).startswith("WRONG")


@pytest.mark.long
def test_the_in_tree_backend_is_right(musa: EngineServer) -> None:
    """It is right for a plain model, so that what it gets wrong is not the simulation's doing."""
    (case,) = (case for case in CASES if case.name == "Llama")
    assert verdict(musa, case).startswith("right")


DETERMINISTIC = (cases.LLAMA, {"enable_deterministic_inference": True})
FLOAT16: tuple[Any, Mapping[str, Any]] = (cases.MLA_DENSE, {})
FLOAT16_NAMED = (cases.MLA_DENSE, {"attention_backend": "fa3"})


@pytest.mark.parametrize(
    ("asked", "environ", "error"),
    [
        pytest.param(DETERMINISTIC, OFF, "No supported accelerator", marks=pytest.mark.long),
        (DETERMINISTIC, {}, "No supported accelerator"),
        pytest.param(FLOAT16, OFF, "BFloat16", marks=pytest.mark.long),
        (FLOAT16, {}, "BFloat16"),
        (FLOAT16_NAMED, {}, "fa3 does not serve MLA like DeepSeek's in float16 on MUSA"),
    ],
    ids=[
        "deterministic, alone",
        "deterministic, with us",
        "MLA, alone",
        "MLA, with us",
        "MLA, fa3 named",
    ],
)
def test_what_sglang_cannot_do(
    musa: EngineServer,
    asked: tuple[Any, Mapping[str, Any]],
    environ: Mapping[str, str],
    error: str,
) -> None:
    """It fails without this package, on the backend of SGLang's choice, and with it."""
    model, arguments = asked
    case = replace(MusaCase("fails", model, (cases.prompts(40),)), arguments=arguments)
    with pytest.raises(EngineFailed, match=error):
        run_case(musa, case, environ=environ)
