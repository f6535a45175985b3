"""Limits of SGLang's own ``fa3`` that graphs have, in an engine on the simulated GPU.

``tests/engine/test_limits.py`` shows those that an engine on a CPU has.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.engine.test_limits import require_release
from tests.simulated_musa import cases
from tests.simulated_musa.cases import CHAIN, EAGLE, FA3, LLAMA, MusaCase, run_case
from tests.support.engine import EngineFailed, EngineServer, Request
from tests.support.tiny_models import tokens

pytestmark = pytest.mark.engine


def test_chains_of_drafts_at_the_end_of_the_context(musa: EngineServer) -> None:
    """A request that stops before the end of the context is answered, and one that names no number
    of tokens goes on to it and ends the server with an AssertionError about the drafts' page table.
    """
    require_release("chains of drafts")
    # Pages of 64: the context ends with a page, and longer chains look behind it.
    longer = {"speculative_num_steps": 7, "speculative_num_draft_tokens": 8}
    arguments = CHAIN | longer | FA3 | {"context_length": 128}
    before, to_the_end = (Request(tokens(100, seed=3), count) for count in (16, 0))
    case = MusaCase("before the end", LLAMA, ((before,),), arguments, draft=EAGLE)
    cases.require_right_tokens(musa, case, run_case(musa, case))
    with pytest.raises(EngineFailed) as failure:
        run_case(musa, replace(case, phases=((to_the_end,),)))
    assert "FA3 draft-decode page_table" in failure.value.log
