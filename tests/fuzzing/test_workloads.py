"""Random workloads of the real engine say what SGLang's torch_native attention says."""

from __future__ import annotations

import pytest

from tests.fuzzing.workloads import (
    TalkAnswers,
    WrongTokens,
    _same_tokens,
    random_workload,
    run_workload,
)
from tests.support.engine import EngineServer

SEEDS = {"retracted": 40, "drafted": 21, "mixed chunks, aborts, a session": 29}
"""By what happens in them."""


@pytest.mark.engine
@pytest.mark.parametrize("name", SEEDS)
def test_a_random_workload_is_right(engines: EngineServer, name: str) -> None:
    """Every token of every talk, under pressure, is that of one talk after the other."""
    counts = run_workload(engines, random_workload(SEEDS[name]))
    assert counts["engine_tokens"] > 0
    assert counts["near_ties"] == 0
    assert (counts["retracted"] > 0) is (name == "retracted")


def test_the_same_seed_is_the_same_workload() -> None:
    """So that a seed in a report can be run again."""
    assert random_workload(7) == random_workload(7)
    assert random_workload(7) != random_workload(8)


def test_another_token_is_wrong_unless_both_are_as_likely() -> None:
    """A near tie ends the comparison of its talk; anything else is an error."""
    ours = TalkAnswers([[4, 5, 6]], [[-1.0, -2.0, -3.0]])
    assert _same_tokens(ours, TalkAnswers([[4, 5, 6, 7]], [[-1.0, -2.0, -3.0, -1.0]]), 0) == 3
    assert _same_tokens(ours, TalkAnswers([[4, 9, 6]], [[-1.0, -2.0001, -3.0]]), 0) == 1
    for wrong in (
        TalkAnswers([[4, 9, 6]], [[-1.0, -1.5, -3.0]]),
        TalkAnswers([[4, 5, 6]], [[-1.0, -2.1, -3.0]]),
    ):
        with pytest.raises(WrongTokens, match="turn 0, token 1"):
            _same_tokens(ours, wrong, 0)
