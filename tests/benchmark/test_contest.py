"""The contest of a model's peers: who may be timed, and what counts as a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest

from sglang_musa_ext.benchmark import command, peers
from sglang_musa_ext.benchmark import contest as bench
from sglang_musa_ext.benchmark.models import KINDS, MODELS, PAGE
from sglang_musa_ext.benchmark.probe import FORWARD_MODES
from tests.support.fake_bench import (
    MODEL,
    RIGHT,
    WRONG,
    FakeEngine,
    contest,
    entered,
    result,
    verdicts,
)


def test_peers_with_upstreams_answers_are_timed() -> None:
    """Equal answers give a time a round, of step and pass, without the round that warms up."""
    timed = contest(upstream=FakeEngine(RIGHT, 4.0), ours=FakeEngine(RIGHT, 2.0))
    assert verdicts(timed) == {"upstream": ("equal", 3), "ours": ("equal", 3)}
    assert timed.points[1].step_ms == [2.0] * 3
    assert timed.points[1].forward_ms == [1.0] * 3


@pytest.mark.parametrize(
    "answer",
    [
        WRONG,
        {"tokens": [[4, 5]], "logprobs": [[math.nan, -2.0]]},
        {"tokens": [[7, 5]], "logprobs": [[-1.5, -2.0]]},
    ],
)
def test_a_peer_with_other_answers_gets_no_time(answer: Any) -> None:
    """A wrong number is never timed, a NaN neither; the report says how wrong it was."""
    judged = verdicts(contest(upstream=FakeEngine(RIGHT), **{"in-tree": FakeEngine(answer)}))
    assert judged["in-tree"][0].startswith("wrong output (off by ")
    assert judged["in-tree"][1] == 0
    assert judged["upstream"] == ("equal", 3)


def in_one_engine(shared: FakeEngine, **engines: Any) -> dict[str, tuple[str, list[float]]]:
    """The verdicts and times of a prefill place, where peers take turns in upstream's engine."""
    shared_contest = entered({"upstream": shared, **engines})
    shared_contest._prefill(64)
    assert not shared.peers, "upstream's engine was not given back to its own backend"
    for point in shared_contest.points:
        assert len(point.over_upstream) == len(point.forward_ms)
    return {point.peer: (point.verdict, point.forward_ms) for point in shared_contest.points}


def test_passes_without_graphs_are_timed_in_one_engine() -> None:
    """Times are of the peers' backends in upstream's engine, none of their own engines."""
    shared = FakeEngine(RIGHT, 4.0, others={"ours": (RIGHT, 2.0), "in-tree": (RIGHT, 3.0)})
    times = in_one_engine(
        shared, ours=FakeEngine(RIGHT, 99.0), **{"in-tree": FakeEngine(WRONG, 99.0)}
    )
    assert times["upstream"] == ("equal", [2.0] * 3)
    assert times["ours"] == ("equal", [1.0] * 3)
    assert times["in-tree"] == ("wrong output (off by 0.5, not 0.12)", [])


def test_who_takes_turns_beside_the_peers_is_judged_and_timed() -> None:
    """Upstream again and ours without plans are there where their peers are."""
    others = {
        "ours": (RIGHT, 2.0),
        "upstream again": (RIGHT, 5.0),
        "ours without plans": (WRONG, 1.0),
    }
    times = in_one_engine(FakeEngine(RIGHT, 4.0, others=others), ours=FakeEngine(RIGHT))
    assert times["upstream again"] == ("equal", [2.5] * 3)
    assert times["ours without plans"] == ("wrong output (off by 0.5, not 0.12)", [])
    assert "ours without plans" not in in_one_engine(FakeEngine(RIGHT), ours=FakeEngine(WRONG))


def test_a_pass_is_compared_with_that_of_its_turn() -> None:
    """A change of the machine's speed is in no ratio: here each turn takes twice the last one."""
    rows = [
        {"peer": peer, "turn": turn, "forward": factor * 2.0**turn}
        for turn in range(4) for peer, factor in (("ours", 1.5), ("upstream", 1.0))
    ]  # fmt: skip
    ours, theirs = rows[::2], rows[1::2]
    assert bench.paired(ours, theirs, "forward") == 1.5
    assert bench.paired(ours[1:], theirs[:-1], "forward") == 1.5


def test_a_round_without_a_pass_is_an_error() -> None:
    """Times stand beside those of the same round, so that none may be missing."""
    with pytest.raises(RuntimeError, match="No prefill pass of ours in a round"):
        bench.record(bench.Point("prefill", 1, 64, "ours", "equal"), [])


@pytest.mark.parametrize(
    ("kind", "tokens", "peer_count"), [("decode", 1, 1), ("eager", 1, 5), ("verify", 4, 1)]
)
def test_the_fewest_steps_give_every_peer_a_pass(kind: str, tokens: int, peer_count: int) -> None:
    """The fewest steps suffice in the worst order of turns, and one fewer do not."""
    model = MODELS["verify" if kind == "verify" else "dense-128"]
    mode = FORWARD_MODES[kind]
    # The worst: the passes that count begin behind the last one's turn, who comes last again.
    names = [f"peer {index}" for index in range(peer_count)]
    turns = [*names[:0:-1], *names[1:], names[0], *names] if peer_count > 1 else names * 20

    def seen(steps: int) -> set[str]:
        """The peers of the passes that count, where every pass gives all the tokens it can."""
        count = -(-(steps - 1) // tokens)
        ahead = ["nobody"] * (1 + bench.STARTING)
        order = [*ahead, *turns][:count]
        rows = [{"mode": "EXTEND", "batch": 1, "peer": "nobody"}]
        rows += [{"mode": mode, "batch": 1, "peer": peer} for peer in order]
        return {name for name in names if bench.passes(rows, mode, 1, name)}

    fewest = bench.fewest_steps(model, [kind], peers.FIELDS["musa"])
    assert seen(fewest) == {*names}
    assert seen(fewest - 1) != {*names}


def test_prefills_need_no_steps() -> None:
    """Each prompt of a prefill place is continued by one token, whatever was asked for."""
    assert bench.fewest_steps(MODELS["dense-64"], ["prefill"], peers.FIELDS["musa"]) == 1


def test_answers_are_compared_in_that_engine_too() -> None:
    """A backend that is right in its own engine and wrong in upstream's gets no time."""
    times = in_one_engine(
        FakeEngine(RIGHT, 4.0, others={"ours": (WRONG, 2.0)}), ours=FakeEngine(RIGHT)
    )
    assert times["ours"] == ("wrong output (off by 0.5, not 0.12)", [])
    assert times["upstream"] == ("equal", [2.0] * 3)


def test_nobody_keeps_times_of_an_engine_that_died() -> None:
    """Measurements of an upstream's engine that ended are of no use, and every peer says why."""
    entry = entered({"upstream": FakeEngine(RIGHT, 4.0, 8), "ours": FakeEngine(RIGHT)})
    entry._prefill(64)
    failed = "failed: CUDA error: an illegal memory access was encountered"
    assert [(point.verdict, point.forward_ms) for point in entry.points] == [(failed, [])] * 4


def test_what_upstream_varies_by_is_allowed() -> None:
    """Where two runs of upstream differ, a peer may differ by twice as much."""

    class Varying(FakeEngine):
        def ask(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Any:
            answer, milliseconds = self.served[""]
            answer = {"tokens": [[4, 5]], "logprobs": [[-1.0, answer["logprobs"][0][1] - 0.2]]}
            self.served[""] = answer, milliseconds
            return answer

    near = {"tokens": [[4, 5]], "logprobs": [[-1.0, -2.15]]}
    varied = contest(upstream=Varying(RIGHT), ours=FakeEngine(near))
    assert verdicts(varied)["ours"] == ("equal", 3)
    assert [point.allowed for point in varied.points] == [pytest.approx(0.4)] * 2
    assert verdicts(contest(upstream=FakeEngine(RIGHT), ours=FakeEngine(near)))["ours"][1] == 0


@pytest.mark.parametrize("dies_after", [0, 3])
def test_a_peer_that_dies_leaves_the_others_their_times(dies_after: int) -> None:
    """An engine may end at its first question or later: its reason replaces a time."""
    dying = FakeEngine(RIGHT, 1.0, dies_after)
    entry = contest(upstream=FakeEngine(RIGHT), **{"in-tree": dying})
    entry._decode("decode", 1, 128)
    assert dying.closed
    assert [point.verdict for point in entry.points if point.peer == "in-tree"] == [
        "failed: CUDA error: an illegal memory access was encountered"
    ] * 2
    assert [len(point.step_ms) for point in entry.points if point.peer == "upstream"] == [
        3,
        3,
    ]


def test_nobody_is_timed_without_upstream() -> None:
    """Without the answers to compare with there is nothing to verify, so there are no times."""
    judged = verdicts(contest(upstream=FakeEngine(RIGHT, 1.0, 0), ours=FakeEngine(RIGHT)))
    assert judged["ours"] == ("upstream gave no answer to compare with", 0)


def test_a_place_that_does_not_fit_is_said_so() -> None:
    """A KV cache that is too small for a place is the place's verdict, and no engine is asked."""
    entry = entered({"upstream": FakeEngine(RIGHT, 1.0, 0)})
    entry._decode("decode", 128, 32768)
    assert "needs a KV cache of" in entry.points[0].verdict
    assert not entry.failed


@pytest.mark.parametrize(
    ("capacity", "up"), [((1 << 20) - PAGE, False), (1 << 20, True), (1 << 21, True)]
)
def test_a_peer_with_a_smaller_cache_is_not_timed(capacity: int, up: bool) -> None:
    """A peer with a smaller cache is out: the reason says what it holds, and what to do."""

    class Small(FakeEngine):
        def state(self) -> dict[str, Any]:
            return super().state() | {"memory_usage": {"token_capacity": capacity}}

    entry = entered({"ours": Small(RIGHT)})
    memory = bench._first_state(peers.Peer("ours", "", "", {}), entry)
    assert (bool(memory), "ours" in entry.engines) == (up, up)
    assert up or f"holds {capacity} tokens and not {1 << 20}" in entry.failed["ours"]


def test_only_what_was_asked_for_is_measured_and_reported() -> None:
    """With --kinds other places are left out of a run, and of a report of an earlier one."""
    model = dataclasses.replace(MODEL, prefills=(64,))
    for kinds, expected in (
        (("decode",), {"decode"}),
        (("prefill", "verify"), {"prefill"}),
        (KINDS, None),
    ):
        entry = entered({"upstream": FakeEngine(RIGHT)}, model, kinds)
        assert len(list(entry.run())) == len(expected or model.kinds)
        assert {point.kind for point in entry.points} == (expected or set(model.kinds))
    models = command.of_kinds(result(), ["verify"])["models"]
    assert [len(model["points"]) for model in models.values()] == [0, 0, 6]


def numbers(rows: bench.Rows) -> tuple[list[float], list[float], list[float]]:
    """A round of these passes adds the times of a step, a pass and a call to a point."""
    point = bench.Point("eager", 2, 64, "ours", "equal")
    bench.record(point, rows)
    return point.step_ms, point.forward_ms, point.call_us


def test_only_passes_after_their_like_count() -> None:
    """A step's time runs between decode passes; what follows another pass is left out."""

    def row(mode: str, batch: int, since: float) -> dict[str, Any]:
        fields = {"peer": "ours", "mode": mode, "batch": batch, "since": since}
        return fields | {"forward": 1.0, "calls": 2, "attention_us": 8.0}

    rows = [row("EXTEND", 2, 0.0), row("DECODE", 2, 50.0), *[row("DECODE", 2, 9.0)] * 3]
    rows += [*[row("DECODE", 2, 3.0)] * 4, row("DECODE", 1, 70.0), row("DECODE", 1, 70.0)]
    assert numbers(bench.passes(rows, "DECODE", 2, "ours")) == ([3.0], [1.0], [4.0])
    theirs = {**row("DECODE", 2, 8.0), "peer": "upstream", "calls": 0}
    turns = [each for row in rows for each in (row, theirs)][4:14]
    assert numbers(bench.passes(turns, "DECODE", 2, "upstream")) == ([8.0], [1.0], [])
    assert numbers(bench.passes(turns, "DECODE", 2, "ours")) == ([3.0], [1.0], [4.0])
    assert bench.passes(rows, "DECODE", 2, "upstream") == []


def test_on_musa_the_answers_are_compared_with_tritons() -> None:
    """Kernels of another kind may differ by more than another number of splits, and by no more."""
    near = {"tokens": [[4, 5]], "logprobs": [[-1.0, -2.4]]}
    far = {"tokens": [[4, 5]], "logprobs": [[-1.0, -2.6]]}
    engines = {
        "triton": FakeEngine(RIGHT, 4.0, others={"ours": (near, 2.0), "in-tree": (near, 3.0)}),
        "ours": FakeEngine(near, 2.0),
        "in-tree": FakeEngine(far, 3.0),
    }
    entry = entered(engines, contenders=peers.FIELDS["musa"])
    entry._decode("decode", 1, 64)
    assert verdicts(entry) == {
        "triton": ("equal", 3), "ours": ("equal", 3),
        "in-tree": ("wrong output (off by 0.6, not 0.5)", 0),
    }  # fmt: skip
    entry.points.clear()
    entry._prefill(64)
    assert [(point.peer, point.over_upstream) for point in entry.points] == [
        ("triton", [1.0] * 3), ("ours", [0.5] * 3), ("in-tree", []), ("upstream again", [1.0] * 3),
    ]  # fmt: skip
