"""The benchmark: who may be timed, what is taken from the measurements, and that it runs at all."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import operator
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sglang_musa_ext.attention
from sglang_musa_ext import envs
from sglang_musa_ext.benchmark import command as bench
from sglang_musa_ext.benchmark import in_tree as bench_in_tree
from sglang_musa_ext.benchmark import kernels as bench_kernels
from sglang_musa_ext.benchmark import probe as bench_probe
from sglang_musa_ext.benchmark import report as bench_report
from sglang_musa_ext.benchmark.probe import measurements
from sglang_musa_ext.engines.process import Engine, EngineDied, graph_arguments, last_error
from sglang_musa_ext.kernels.provider import FA3Kernels, reference_kernels
from sglang_musa_ext.validation.numerics import Shape

MODEL = bench.Model("small", "llama", {}, 1 << 20, {}, "", (1,), (64,), ())
RIGHT = {"tokens": [[4, 5]], "logprobs": [[-1.0, -2.0]]}
WRONG = {"tokens": [[4, 5]], "logprobs": [[-1.0, -2.5]]}


class FakeEngine:
    """An engine that gives the answer it was made with, and whose every pass takes
    ``milliseconds``.

    ``others`` are answers and times of peers whose backends take turns in it.
    """

    def __init__(
        self, answer: Any, milliseconds: float = 1.0, dies_after: int = 1 << 30,
        others: Mapping[str, tuple[Any, float]] | None = None,
    ) -> None:  # fmt: skip
        self.own, self.left = "upstream", dies_after
        self.served = {**(others or {}), "": (answer, milliseconds)}
        self.peers: list[str] = []
        self.batch = 1
        self.closed = False

    def _work(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise EngineDied("CUDA error: an illegal memory access was encountered")

    def _of(self, peer: str) -> tuple[Any, float]:
        return self.served[peer if peer in self.served else ""]

    def ask(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Any:
        self._work()
        return self._of(self.peers[0] if self.peers else "")[0]

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        self.batch = len(prompts)
        self._work()

    def scheduler(self, method: str, peers: list[str], mode: str | None) -> None:
        assert method == "bench_turns"
        assert (mode is None) == (len(peers) < 2), (
            "answers are of all passes, times of those of the place"
        )
        self.peers = peers

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def state(self) -> dict[str, Any]:
        rows = []
        for mode, turn, peer in itertools.product(
            ("DECODE", "EXTEND"), range(9), self.peers or [self.own]
        ):
            took = self._of(peer)[1]
            row = {
                "peer": peer,
                "turn": turn,
                "mode": mode,
                "batch": self.batch,
                "tokens": 1,
                "draft": False,
            }
            rows.append(
                row
                | {
                    "since": took,
                    "forward": took / 2,
                    "host_us": 1.0,
                    "calls": 2,
                    "attention_us": 8.0,
                }
            )
        return {"bench": json.dumps({"forwards": rows, "traces": [], "backend": "", "memory": {}})}


def entered(
    engines: Any, model: bench.Model = MODEL, kinds: Sequence[str] = bench.KINDS
) -> bench.Contest:
    """A contest of fake engines that has not begun."""
    options = argparse.Namespace(rounds=3, steps=8, device="cuda", kinds=kinds)
    for name, engine in engines.items():
        engine.own = name
    return bench.Contest(model, engines, options, Path())


def contest(**engines: Any) -> bench.Contest:
    """A contest of fake engines, after one decode place."""
    found = entered(engines)
    found._decode("decode", 1, 64)
    return found


def verdicts(found: bench.Contest) -> dict[str, tuple[str, int]]:
    """What was said of each peer, and how many times it has."""
    return {point.peer: (point.verdict, len(point.step_ms)) for point in found.points}


def test_peers_with_upstreams_answers_are_timed() -> None:
    """Equal answers give one time a round, of the whole step and of the pass, without the round
    that warms up.
    """
    found = contest(upstream=FakeEngine(RIGHT, 4.0), ours=FakeEngine(RIGHT, 2.0))
    assert verdicts(found) == {"upstream": ("equal", 3), "ours": ("equal", 3)}
    assert found.points[1].step_ms == [2.0] * 3
    assert found.points[1].forward_ms == [1.0] * 3


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
    found = verdicts(contest(upstream=FakeEngine(RIGHT), **{"in-tree": FakeEngine(answer)}))
    assert found["in-tree"][0].startswith("wrong output (off by ")
    assert found["in-tree"][1] == 0
    assert found["upstream"] == ("equal", 3)


def in_one_engine(shared: FakeEngine, **engines: Any) -> dict[str, tuple[str, list[float]]]:
    """The verdicts and times of a prefill place, where peers take turns in upstream's engine."""
    found = entered({"upstream": shared, **engines})
    found._prefill(64)
    assert not shared.peers, "upstream's engine was not given back to its own backend"
    assert [len(point.over_upstream) for point in found.points] == [
        len(point.forward_ms) for point in found.points
    ]
    return {point.peer: (point.verdict, point.forward_ms) for point in found.points}


def test_passes_without_graphs_are_timed_in_one_engine() -> None:
    """Times are those of the peers' backends in upstream's engine, and none are of their own
    engines.
    """
    shared = FakeEngine(RIGHT, 4.0, others={"ours": (RIGHT, 2.0), "in-tree": (RIGHT, 3.0)})
    found = in_one_engine(
        shared, ours=FakeEngine(RIGHT, 99.0), **{"in-tree": FakeEngine(WRONG, 99.0)}
    )
    assert found["upstream"] == ("equal", [2.0] * 3)
    assert found["ours"] == ("equal", [1.0] * 3)
    assert found["in-tree"] == ("wrong output (off by 0.5, not 0.12)", [])


def test_who_takes_turns_beside_the_peers_is_judged_and_timed() -> None:
    """A second backend of upstream's, and ours without plans, are there where the peers are that
    they stand beside.
    """
    others = {
        "ours": (RIGHT, 2.0),
        "upstream again": (RIGHT, 5.0),
        "ours without plans": (WRONG, 1.0),
    }
    found = in_one_engine(FakeEngine(RIGHT, 4.0, others=others), ours=FakeEngine(RIGHT))
    assert found["upstream again"] == ("equal", [2.5] * 3)
    assert found["ours without plans"] == ("wrong output (off by 0.5, not 0.12)", [])
    assert "ours without plans" not in in_one_engine(FakeEngine(RIGHT), ours=FakeEngine(WRONG))


def test_a_pass_is_compared_with_that_of_its_turn() -> None:
    """What the machine does to all passes of a turn is in no ratio: here each turn takes twice as
    long as the last.
    """
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


def test_answers_are_compared_in_that_engine_too() -> None:
    """A backend that is right in its own engine and wrong in upstream's gets no time."""
    found = in_one_engine(
        FakeEngine(RIGHT, 4.0, others={"ours": (WRONG, 2.0)}), ours=FakeEngine(RIGHT)
    )
    assert found["ours"] == ("wrong output (off by 0.5, not 0.12)", [])
    assert found["upstream"] == ("equal", [2.0] * 3)


def test_nobody_keeps_times_of_an_engine_that_died() -> None:
    """What upstream's engine had measured before it ended is of no use, and every peer in it says
    why.
    """
    found = entered({"upstream": FakeEngine(RIGHT, 4.0, 8), "ours": FakeEngine(RIGHT)})
    found._prefill(64)
    failed = "failed: CUDA error: an illegal memory access was encountered"
    assert [(point.verdict, point.forward_ms) for point in found.points] == [(failed, [])] * 4


class Runner:
    """What the probe sees of a ``ModelRunner``."""

    is_draft_worker = False

    def __init__(self) -> None:
        self.attn_backend = object()


def forward(runner: Runner, batch: Any) -> Any:
    """A ``ModelRunner.forward`` of one attention call, by the backend that the runner has."""
    batch.probe.attend(lambda backend: None, batch.by or runner.attn_backend)
    return runner.attn_backend


def served(probe: bench_probe.Probe, runner: Runner, by: Any = None, mode: str = "EXTEND") -> Any:
    """Which backend a pass got."""
    named = SimpleNamespace(name=mode)
    return probe.forward(
        forward,
        runner,
        SimpleNamespace(forward_mode=named, input_ids=None, batch_size=1, probe=probe, by=by),
    )


def test_backends_take_turns_in_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round of turns has every peer once, in changing orders; rows say whose they are, and the
    own one returns.
    """
    ours, dispatched = object(), [False]
    monkeypatch.setenv(bench_probe.PEER, "upstream")
    monkeypatch.setattr(bench_probe, "BACKENDS", {"ours": lambda runner: ours})

    def dispatch() -> Callable[[], None]:
        dispatched[0] = True
        return lambda: operator.setitem(dispatched, 0, False)

    monkeypatch.setattr(bench_probe, "_dispatched", dispatch)
    probe, runner = bench_probe.Probe(), Runner()
    own = runner.attn_backend
    assert served(probe, runner) is own
    probe.take_turns(["upstream", "ours"])
    names = {id(own): "upstream", id(ours): "ours"}
    taken = []
    for _ in range(16):
        backend = served(probe, runner)
        taken.append(names[id(backend)])
        assert dispatched == [backend is ours], (
            "only our backend may find its kernels under upstream's names"
        )
    rounds = {tuple(taken[index : index + 2]) for index in range(0, 16, 2)}
    assert rounds == {("upstream", "ours"), ("ours", "upstream")}
    rows = probe.drain()["forwards"]
    assert [row["peer"] for row in rows] == ["upstream", *taken]
    assert [row["turn"] for row in rows] == [0, *[turn for turn in range(1, 9) for _ in range(2)]]
    probe.take_turns([])
    assert [served(probe, runner) for _ in range(3)] == [own] * 3
    assert dispatched == [False]


def test_turns_are_of_the_passes_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler may run a decode pass between two prompts: it is nobody's turn, and the own
    backend's to serve.
    """
    ours = object()
    monkeypatch.setenv(bench_probe.PEER, "upstream")
    monkeypatch.setattr(bench_probe, "BACKENDS", {"ours": lambda runner: ours})
    monkeypatch.setattr(bench_probe, "_dispatched", lambda: lambda: None)
    probe, runner = bench_probe.Probe(), Runner()
    own = runner.attn_backend
    served(probe, runner)
    probe.take_turns(["upstream", "ours"], "EXTEND")
    taken = []
    for _ in range(4):
        taken.append(served(probe, runner))
        assert served(probe, runner, mode="DECODE") is own
    assert [taken.count(own), taken.count(ours)] == [2, 2]


@pytest.mark.parametrize("before", ["off", None])
def test_our_backend_reads_its_settings_in_upstreams_engine(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the package is off, and would read no other setting, such as which kernels to take."""
    stub = SimpleNamespace(MusaFA3Backend=lambda runner: envs.Settings.from_environ())
    monkeypatch.setattr(sglang_musa_ext.attention, "mixin", stub, raising=False)
    monkeypatch.setenv(envs.KERNELS, "hopper")
    monkeypatch.setenv(envs.MODE, before) if before else monkeypatch.delenv(
        envs.MODE, raising=False
    )
    assert bench_probe._ours(Runner()).kernels == "hopper"
    assert os.environ.get(envs.MODE) == before


def test_a_pass_that_another_backend_served_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a release of SGLang does not ask the runner for its backend, a time of the wrong peer
    would be recorded.
    """
    monkeypatch.setattr(bench_probe, "BACKENDS", {"in-tree": lambda runner: object()})
    probe, runner = bench_probe.Probe(), Runner()
    served(probe, runner)
    probe.take_turns(["in-tree"])
    served(probe, runner)
    with pytest.raises(RuntimeError, match="dict served where it was the turn of in-tree"):
        served(probe, runner, by={1: 2})


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
    """An engine may end at its first question or while it is timed: its reason takes the place of a
    time.
    """
    dying = FakeEngine(RIGHT, 1.0, dies_after)
    found = contest(upstream=FakeEngine(RIGHT), **{"in-tree": dying})
    found._decode("decode", 1, 128)
    assert dying.closed
    assert [point.verdict for point in found.points if point.peer == "in-tree"] == [
        "failed: CUDA error: an illegal memory access was encountered"
    ] * 2
    assert [len(point.step_ms) for point in found.points if point.peer == "upstream"] == [3, 3]


def test_nobody_is_timed_without_upstream() -> None:
    """Without the answers to compare with there is nothing to verify, so there are no times."""
    found = verdicts(contest(upstream=FakeEngine(RIGHT, 1.0, 0), ours=FakeEngine(RIGHT)))
    assert found["ours"] == ("upstream gave no answer to compare with", 0)


def test_a_place_that_does_not_fit_is_said_so() -> None:
    """A KV cache that is too small for a place is the place's verdict, and no engine is asked."""
    found = entered({"upstream": FakeEngine(RIGHT, 1.0, 0)})
    found._decode("decode", 128, 32768)
    assert "needs a KV cache of" in found.points[0].verdict
    assert not found.failed


@pytest.mark.parametrize(
    ("capacity", "up"), [((1 << 20) - bench.PAGE, False), (1 << 20, True), (1 << 21, True)]
)
def test_a_peer_with_a_smaller_cache_is_not_timed(capacity: int, up: bool) -> None:
    """It would serve the same requests in other batches: it is out, with what its cache holds and
    what to do.
    """

    class Small(FakeEngine):
        def state(self) -> dict[str, Any]:
            return super().state() | {"memory_usage": {"token_capacity": capacity}}

    found = entered({"ours": Small(RIGHT)})
    memory = bench._first_state(bench.Peer("ours", "", "", {}), found)
    assert (bool(memory), "ours" in found.engines) == (up, up)
    assert up or f"holds {capacity} tokens and not {1 << 20}" in found.failed["ours"]


def test_only_what_was_asked_for_is_measured_and_reported() -> None:
    """With --kinds other places are left out of a run, and of a report of an earlier one."""
    model = dataclasses.replace(MODEL, prefills=(64,))
    for kinds, expected in (
        (("decode",), {"decode"}),
        (("prefill", "verify"), {"prefill"}),
        (bench.KINDS, None),
    ):
        found = entered({"upstream": FakeEngine(RIGHT)}, model, kinds)
        assert len(list(found.run())) == len(expected or model.kinds)
        assert {point.kind for point in found.points} == (expected or set(model.kinds))
    models = bench.of_kinds(result(), ["verify"])["models"]
    assert [len(model["points"]) for model in models.values()] == [0, 0, 6]


def test_a_gpu_in_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times beside another program's would say little, so there are none."""
    properties = SimpleNamespace(
        name="a GPU", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132
    )
    for free, refused in ((60 << 30, True), (79 << 30, False)):
        answers = {
            "is_available": True,
            "get_device_properties": properties,
            "mem_get_info": (free, 80 << 30),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        if refused:
            with pytest.raises(SystemExit, match="20 GiB of a GPU are in use"):
                bench._device("cuda")
        else:
            assert bench._device("cuda")["name"] == "a GPU"


def numbers(rows: bench.Rows) -> tuple[list[float], list[float], list[float]]:
    """What a round of these passes adds to a point: of a step, a pass and a call."""
    point = bench.Point("eager", 2, 64, "ours", "equal")
    bench.record(point, rows)
    return point.step_ms, point.forward_ms, point.call_us


def test_only_passes_after_their_like_count() -> None:
    """A step's time runs from one decode pass to the next: what follows a prefill or another batch
    is left out.
    """

    def row(mode: str, batch: int, since: float) -> dict[str, Any]:
        found = {"peer": "ours", "mode": mode, "batch": batch, "since": since}
        return found | {"forward": 1.0, "calls": 2, "attention_us": 8.0}

    rows = [row("EXTEND", 2, 0.0), row("DECODE", 2, 50.0), *[row("DECODE", 2, 9.0)] * 3]
    rows += [*[row("DECODE", 2, 3.0)] * 4, row("DECODE", 1, 70.0), row("DECODE", 1, 70.0)]
    assert numbers(bench.passes(rows, "DECODE", 2, "ours")) == ([3.0], [1.0], [4.0])
    theirs = {**row("DECODE", 2, 8.0), "peer": "upstream", "calls": 0}
    turns = [one for row in rows for one in (row, theirs)][4:14]
    assert numbers(bench.passes(turns, "DECODE", 2, "upstream")) == ([8.0], [1.0], [])
    assert numbers(bench.passes(turns, "DECODE", 2, "ours")) == ([3.0], [1.0], [4.0])
    assert bench.passes(rows, "DECODE", 2, "upstream") == []


def test_an_engine_without_the_probe_is_an_error() -> None:
    """SGLang goes on without a plugin that raises, so its absence is looked for."""
    with pytest.raises(RuntimeError, match="without the benchmark's probe"):
        measurements({"sglang_musa_ext": []})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"graphs": []}, {"disable_cuda_graph": True}),
        ({"graphs": [8]}, {"disable_cuda_graph": False, "cuda_graph_max_bs_decode": 8}),
        (
            {"graphs": [1, 8], "prefill_graphs": False},
            {"disable_cuda_graph": False, "cuda_graph_max_bs_decode": 8, "cuda_graph_bs_decode": [1, 8],
             "disable_prefill_cuda_graph": True},
        ),
    ],
)  # fmt: skip
def test_graphs_are_asked_for_in_the_words_of_the_release(arguments: Any, expected: Any) -> None:
    """The installed release's own names for batch sizes to capture take the values."""
    assert graph_arguments({"page_size": 64, **arguments}) == {"page_size": 64, **expected}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            (
                "loading\nTraceback:\n  x\ntorch.AcceleratorError: CUDA error: illegal\nSearch for "
                "it\n"
            ),
            "torch.AcceleratorError",
        ),
        ("RuntimeError: first\nValueError: second\nwarning: done\n", "ValueError: second"),
        ("loading\nKilled\n\n", "Killed"),
        ("", ""),
    ],
)
def test_an_engine_that_died_says_the_last_error_of_its_log(
    text: str, error: str, tmp_path: Path
) -> None:
    """The error that ended it is more than the status that it ended with."""
    log = tmp_path / "engine.log"
    log.write_text(text)
    assert last_error(log).startswith(error)
    assert last_error(tmp_path / "none.log") == ""


def test_an_engine_that_cannot_boot_says_why(tmp_path: Path) -> None:
    """The first question gets the error, with what the log says last."""
    log = tmp_path / "engine.log"
    engine = Engine({"model_path": str(tmp_path / "none"), "device": "cpu", "graphs": []}, {}, log)
    try:
        with pytest.raises(EngineDied, match=r"Its log: \w+"):
            engine.ask([[4]], 1)
    finally:
        engine.close()


# --- the in-tree peer -----------------------------------------------------------------------------


def planning(plans: list[Any], calls: list[Any]) -> FA3Kernels:
    """Kernels that number their plans, and note what calls come with."""

    def plan(**arguments: Any) -> torch.Tensor:
        plans.append(arguments)
        return torch.full((6,), len(plans), dtype=torch.int32)

    def call(**arguments: Any) -> str:
        calls.append(arguments)
        return "output"

    return dataclasses.replace(
        reference_kernels(), get_scheduler_metadata=plan, flash_attn_with_kvcache=call
    )


def test_an_mla_plan_is_kept_in_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shim does with ``(workspace, reuse)`` what MATE does: computes into it, or takes what is
    there.
    """
    plans: list[Any] = []
    calls: list[Any] = []
    monkeypatch.setattr(bench_in_tree, "hopper_kernels", lambda device: planning(plans, calls))
    call = bench_in_tree.interface().flash_attn_with_kvcache
    workspace = torch.zeros(1 << 10, dtype=torch.uint8)
    arguments = {
        "q": torch.zeros(2, 16, 64), "qv": torch.zeros(2, 16, 512), "k_cache": torch.zeros(4, 64, 1, 64),
        "v_cache": torch.zeros(4, 64, 1, 512), "page_table": torch.zeros(2, 3, dtype=torch.int32),
        "cache_seqlens": torch.ones(2, dtype=torch.int32), "cu_seqlens_q": torch.arange(3, dtype=torch.int32),
        "max_seqlen_q": 1, "causal": True, "num_splits": 0,
    }  # fmt: skip
    with pytest.raises(
        RuntimeError, match="reuses an MLA plan of a batch size for which it computed none"
    ):
        call(**arguments, scheduler_metadata=(workspace, True))
    for reuse in (False, True, False):
        call(**arguments, scheduler_metadata=(workspace, reuse))
    assert [one["scheduler_metadata"].tolist() for one in calls] == [
        [2] * 6
    ] * 3  # All see the workspace's last.
    assert len(plans) == 2
    assert (plans[0]["headdim"], plans[0]["headdim_v"], plans[0]["max_seqlen_k"]) == (64, 512, 192)


# --- kernels alone --------------------------------------------------------------------------------


def test_a_call_is_timed_with_its_plan_and_without() -> None:
    """Each shape and window has three times of each timer, less what the timer itself takes."""
    plans: list[Any] = []

    def timer(function: Callable[[], Any]) -> float:
        before = len(plans)
        result = function()
        return 1.0 if result is None else 2.0 + 3.0 * (len(plans) - before)

    def plan(**arguments: Any) -> torch.Tensor:
        plans.append(arguments)
        return torch.zeros(4, dtype=torch.int32)

    def call(**arguments: Any) -> torch.Tensor:
        return torch.ones(2)

    kernels = dataclasses.replace(
        reference_kernels(), get_scheduler_metadata=plan, flash_attn_with_kvcache=call
    )
    shapes = {"decode": Shape((1,), (70,)), "verify": Shape((4,), (70,))}
    timers = {"graph": timer, "host": lambda function: 10.0 * timer(function)}
    found = list(bench_kernels.measure(kernels, torch.device("cpu"), timers, shapes))
    assert [one["call"] for one in found] == [
        f"{name}, {window}" for name in shapes for window in bench_kernels.WINDOWS
    ]
    assert [one["graph"] for one in found] == [{"without": 1.0, "with": 1.0, "plan": 4.0}] * 4
    assert [one["host"] for one in found] == [{"without": 10.0, "with": 10.0, "plan": 40.0}] * 4
    # One that is reused, and one for each timer.
    assert [one["window_size"] for one in plans[::3]] == [(-1, -1), (512, 0)] * 2
    assert [one["max_seqlen_q"] for one in plans[::6]] == [1, 4]


def test_the_host_is_timed_for_a_call() -> None:
    """What keeps the host for half a millisecond takes that long a call at least, and nothing takes
    less.
    """
    timer = bench_kernels.host_timer(torch.device("cpu"))
    assert timer(lambda: time.sleep(5e-4)) >= 500.0 > timer(lambda: None) > 0.0


def test_a_plan_that_changes_the_output_is_not_timed() -> None:
    """A call with its plan must give what it gives without, before either is timed."""

    def call(**arguments: Any) -> torch.Tensor:
        return torch.ones(2) if arguments["scheduler_metadata"] is None else torch.zeros(2)

    kernels = dataclasses.replace(reference_kernels(), flash_attn_with_kvcache=call)
    with pytest.raises(AssertionError, match="another output with its plan"):
        next(
            bench_kernels.measure(
                kernels, torch.device("cpu"), {"graph": lambda _: 1.0}, {"one": Shape((1,), (70,))}
            )
        )


# --- the report -----------------------------------------------------------------------------------


def result(each: float = 3.0, besides: float = 5.0) -> dict[str, Any]:
    """Measurements in which a plan costs ``each`` µs, and upstream's pass ``besides`` µs more."""
    models: dict[str, Any] = {}
    for name, (theirs, ours) in {"dense": (1, 1), "gemma2": (14, 2), "verify": (32, 1)}.items():
        kind, mode = ("verify", "TARGET_VERIFY") if name == "verify" else ("decode", "DECODE")
        traces = [
            {"peer": peer, "mode": mode, "kernels": {
                "void flash::prepare_varlen_num_blocks_kernel<1>": [plans, plans * each],
                "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...": [26, 260.0],
                "void flash::FlashAttnFwdCombine<...": [26, 52.0],
            }}
            for peer, plans in (("upstream", theirs), ("ours", ours))
        ]  # fmt: skip
        points = []
        for batch in (1, 8):
            time = 1000.0 + 100 * batch
            slow = time + each * (theirs - ours) + besides
            points += [point(kind, batch, "upstream", slow), point(kind, batch, "ours", time)]
            wrong = point(kind, batch, "in-tree", 0.0) | {"step_ms": [], "forward_ms": []}
            points.append(wrong | {"verdict": "wrong output (off by 0.5)"})
        held = {"allocator": {"allocated": 1 << 30, "reserved": 2 << 30},
                "sglang": {"kvcache": 4.0, "token_capacity": 1 << 16, "graph": {"decode": 0.25}}}  # fmt: skip
        more = {**held, "allocator": {"allocated": 1 << 30, "reserved": (2 << 30) + (1 << 20)}}
        run = {
            "title": name,
            "started": "today",
            "rounds": 3,
            "steps": 48,
            "points": points,
            "traces": traces,
        }
        models[name] = run | {"memory": {"upstream": held, "ours": more}}
    peers = {"upstream": "SGLang's own fa3", "ours": "sglang-musa-ext", "in-tree": "in tree"}
    return {
        "models": models,
        "peers": peers,
        "device": {"name": "a GPU"},
        "versions": {"sglang": "0.5.17"},
    }


def point(kind: str, batch: int, peer: str, micros: float) -> dict[str, Any]:
    """A point whose every round took ``micros``."""
    times = [micros / 1e3] * 3
    return {"kind": kind, "batch": batch, "tokens": 1024, "peer": peer, "verdict": "equal", "step_ms": times,
            "forward_ms": times, "call_us": [], "difference": 0.0}  # fmt: skip


def test_the_cost_of_a_plan_is_found_again() -> None:
    """Measurements that were made of known costs give those costs."""
    data = result(3.0, 5.0)
    found = bench_report.savings(data, bench_report.places(data))
    assert {saving.plans for saving in found} == {0, 12, 31}
    assert bench_report.fit(found) == pytest.approx((3.0, 5.0))
    assert "**3.00 µs for each plan" in bench_report.as_markdown(data)


def test_plans_are_counted_from_traces() -> None:
    """A trace tells the kernels that plan from those that attend and those that combine splits."""
    upstream = {"plans": 14, "each": 3.0, "calls": 26, "device": 14 * 3 + 260 + 52}
    assert bench_report.planned(result(), "gemma2", "DECODE", "upstream") == upstream
    row = f"| gemma2 | DECODE | ours | 2 | 3.00 | 26 | {2 * 3 + 260 + 52} | {318 / 354:.3f} |"
    assert row in bench_report.as_markdown(result())
    assert bench_report.planned(result(), "gemma2", "EXTEND", "upstream") is None


def test_a_wrong_peer_has_words_in_place_of_times() -> None:
    """Nowhere does a peer with wrong output have a ratio."""
    rows = [
        row
        for row in bench_report.as_markdown(result()).splitlines()
        if row.startswith("| gemma2 | batch 1,")
    ]
    assert rows[0].endswith("| wrong output (off by 0.5) |")


@pytest.mark.parametrize(
    ("ours", "met"),
    [([0.96] * 3, "yes"), ([0.98, 0.96, 0.99], "within the spread"), ([0.98, 0.98, 0.99], "no")],
)
def test_a_bar_is_met_missed_or_within_the_spread(ours: list[float], met: str) -> None:
    """A bar compares the median; where only some rounds reach it, that is said."""
    data = result()
    first = data["models"]["gemma2"]["points"]
    first[0]["step_ms"], first[1]["step_ms"] = [1.0] * 3, ours
    rows = bench_report.bars(bench_report.places(data), data)
    [row] = [row for row in rows if row[0].startswith("decode step at batch 1, Gemma-2-like")]
    assert row[2] == met


def test_the_step_around_a_verify_pass_is_told_too() -> None:
    """A verify pass that is faster in a step that is not: both are there, each under its own head."""
    data = result()
    theirs, ours, _ = data["models"]["verify"]["points"][:3]
    theirs |= {"step_ms": [4.0] * 3, "forward_ms": [2.0] * 3}
    ours |= {"step_ms": [4.1, 4.2, 4.0], "forward_ms": [1.9] * 3}
    passes, _, rest = bench_report.as_markdown(data).partition(
        "## Whole step of speculative decoding"
    )
    assert "| verify | batch 1, 1024 tokens | 2.000 | 1.900 | 0.950 (0.950 to 0.950) |" in passes
    assert "| verify | batch 1, 1024 tokens | 4.000 | 4.100 | 1.025 (1.000 to 1.050) |" in rest


def test_what_is_slower_in_every_round_is_listed() -> None:
    """A place where ours loses every round is named; one that loses some is not."""
    data = result()
    points = data["models"]["dense"]["points"]
    points[0]["step_ms"], points[1]["step_ms"] = [1.0, 1.0, 1.0], [1.1, 1.2, 1.01]
    points[3]["step_ms"], points[4]["step_ms"] = [1.0, 1.0, 1.0], [1.1, 0.9, 1.01]
    [row] = [
        row
        for row in bench_report.bars(bench_report.places(data), data)
        if row[0].startswith("nothing slower")
    ]
    assert row[1] == "1 of 6"
    assert row[2].startswith("dense decode batch 1, 1024 tokens: 1.100 (1.010 to 1.200)")


def test_calls_are_told_with_what_a_plan_spares() -> None:
    """What a call takes with its plan is subtracted from what it takes without, in a graph and of
    the host.
    """
    graph, host = (
        {"without": 10.0, "with": 8.5, "plan": 2.5},
        {"without": 20.0, "with": 24.0, "plan": 9.0},
    )
    data = {**result(), "kernels": [{"call": "decode", "graph": graph, "host": host}]}
    row = "| decode | 10.00 | 8.50 | 1.50 | 2.50 | 20.00 | 24.00 | -4.00 | 9.00 |"
    assert row in bench_report.as_markdown(data)
    del data["kernels"][0]["host"]
    assert "| decode | 10.00 | 8.50 | 1.50 | 2.50 | – | – | – | – |" in bench_report.as_markdown(
        data
    )


def test_every_prefill_has_a_bar() -> None:
    """A prefill may take what upstream's takes: slower in every round is not met, in some is within
    the spread.
    """
    data = result()
    for tokens, ours in ((512, [1.1, 1.2, 1.3]), (2048, [0.9, 1.1, 1.2]), (8192, [0.9, 0.9, 1.1])):
        for peer, times in (("upstream", [1.0, 1.0, 1.0]), ("ours", ours)):
            point = {
                "kind": "prefill",
                "batch": 1,
                "tokens": tokens,
                "peer": peer,
                "verdict": "equal",
            }
            data["models"]["dense"]["points"].append(
                point | {"forward_ms": times, "step_ms": [], "call_us": []}
            )
    rows = [
        row
        for row in bench_report.bars(bench_report.places(data), data)
        if row[0].startswith("prefill")
    ]
    assert [row[0].rpartition("; ")[2] for row in rows] == [
        f"dense, {tokens} tokens" for tokens in (512, 2048, 8192)
    ]
    assert [row[2] for row in rows] == ["no", "within the spread", "yes"]


def test_what_the_host_takes_is_laid_beside_the_pass() -> None:
    """Calls of 2 µs more, 26 times a pass, make 52 µs, beside the 60 by which the pass is longer."""
    data = result()
    for peer, times, calls in (
        ("upstream", [4.0] * 3, [20.0] * 3),
        ("ours", [4.06] * 3, [22.0] * 3),
    ):
        found = {"kind": "eager", "batch": 10, "tokens": 64, "peer": peer, "verdict": "equal"}
        data["models"]["dense"]["points"].append(
            found | {"forward_ms": [], "step_ms": times, "call_us": calls}
        )
    [row] = bench_report.hosts(data, bench_report.places(data))
    assert row[2:5] == ["20.0", "22.0", "–"]
    assert row[6:] == ["26", "+52", "+60"]
    assert " | ".join(row) in bench_report.as_markdown(data)


def test_ratios_of_turns_are_told_with_who_stood_beside() -> None:
    """Where passes were compared one by one, that is the ratio; and what the same differs by is
    told with it.
    """
    data = result()
    paired = {
        "upstream": 1.0,
        "ours": 1.05,
        "in-tree": 0.9,
        "upstream again": 1.01,
        "ours without plans": 0.97,
    }
    for peer, ratio in paired.items():
        found = {
            "kind": "eager",
            "batch": 10,
            "tokens": 64,
            "peer": peer,
            "verdict": "equal",
            "forward_ms": [],
        }
        found |= {
            "step_ms": [2.0, 4.0],
            "call_us": [20.0, 20.0],
            "over_upstream": [ratio, ratio + 0.02],
        }
        data["models"]["dense"]["points"].append(found)
    text = bench_report.as_markdown(data)
    cells = [
        f"{ratio + 0.01:.3f} ({ratio:.3f} to {ratio + 0.02:.3f})"
        for ratio in list(paired.values())[1:]
    ]
    assert f"| dense | batch 10, 64 tokens | 3.000 | 3.000 | {' | '.join(cells)} |" in text
    assert (
        "| dense | eager, batch 10, 64 tokens | 20.0 | 20.0 | 20.0 | 1.000 (1.000 to 1.000) |"
        in text
    )


def test_passes_whose_calls_take_no_plan_say_why() -> None:
    """A plan a layer is a bar not met, unless no plan can be passed there."""
    traces = [{"peer": peer, "mode": "EXTEND", "kernels": {"prepare_varlen_num_blocks": [27, 80.0]}}
              for peer in ("ours", "upstream")]  # fmt: skip
    data = result()
    data["models"] = {
        name: {**data["models"]["dense"], "traces": traces} for name in ("mla", "dense")
    }
    rows = {row[0]: row for row in bench_report.bars(bench_report.places(data), data)}
    assert rows["a plan a geometry: dense, EXTEND"][1:] == ["27, upstream 27", "no"]
    assert rows["a plan a geometry: mla, EXTEND"][2].startswith("none can be passed")


def test_memory_is_told_in_tokens() -> None:
    """A MiB more than upstream, at 64 KiB a token, is 16 tokens fewer."""
    rows = bench_report.memory(result())
    assert rows[1][-2:] == ["1.0 MiB", "-16"]


def test_what_a_reader_must_know_of_a_run_is_said() -> None:
    """A note and the machine's load stand beside the model that they are of."""
    data = result()
    data["models"]["dense"] |= {"note": "on a Sunday", "load": 17.25}
    text = bench_report.as_markdown(data)
    assert "| dense | dense | today | 3 | 48 | 17.2 |" in text
    assert "\n* dense: on a Sunday\n" in text


def test_a_report_has_its_plots(tmp_path: Path) -> None:
    """The page shows what is beside it, and names what was not measured."""
    planned = {"dense": ("decode", "prefill"), "mla": ("decode",)}
    pages = bench_report.write_report(result(), tmp_path, planned)
    assert {page.name for page in pages} == {"README.md", "ratios.png", "plans.png", "savings.png"}
    text = (tmp_path / "README.md").read_text()
    assert all(f"![{page.name}]({page.name})" in text for page in pages[1:])
    assert "Not measured:\n\n* dense: prefill\n* mla: decode\n" in text


def test_runs_are_merged_if_they_are_of_one_device() -> None:
    """A kind of places of a model is taken from the last run that has it; runs on two devices make
    no one report.
    """
    first, second = result(), result()
    old, new = point("decode", 1, "upstream", 1.0), point("prefill", 1, "upstream", 2.0)
    first["models"] = {
        "dense": {**first["models"]["dense"], "points": [old, new]},
        "verify": {"title": "alone"},
    }
    again = new | {"forward_ms": [9.0]}
    second["models"] = {"dense": {"title": "again", "points": [again], "traces": []}}
    found = bench.merged([first, second])["models"]
    assert found["verify"] == {"title": "alone"}
    assert found["dense"] == {
        "title": "again",
        "points": [old, again],
        "traces": first["models"]["dense"]["traces"],
    }
    with pytest.raises(SystemExit, match="differ in their device"):
        bench.merged([first, {**second, "device": {"name": "another"}}])


def test_the_limit_is_a_pass_without_plans() -> None:
    """The last column takes our own plans off too: 1100 of 1141 µs, less two plans of 3, for the
    window model.
    """
    data = result(3.0, 5.0)
    text = "\n".join(bench_report.cost_model(data, bench_report.places(data)))
    assert (
        f"| gemma2 | batch 1, 1024 tokens | 12 | 41.0 | 41.0 | {1100 / 1141:.3f} | "
        f"{1094 / 1141:.3f} |" in text
    )


@pytest.mark.engine
def test_the_benchmark_runs_without_a_gpu(tmp_path: Path) -> None:
    """Both engines boot with the probe, agree, and give a report that can be drawn again."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_")}
    command = [
        sys.executable,
        "-m",
        "sglang_musa_ext",
        "bench",
        "--device",
        "cpu",
        "--rounds",
        "1",
        "--steps",
        "10",
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=400,
        env=environ,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())["models"]["tiny"]
    assert not found["failed"]
    kinds = {
        (one["kind"], one["peer"])
        for one in found["points"]
        if one["verdict"] == "equal" and one["forward_ms"]
    }
    peers, beside = ("upstream", "ours"), ("upstream again", "ours without plans")
    assert kinds == {("decode", peer) for peer in peers} | {
        (kind, peer) for kind in ("prefill", "eager") for peer in (*peers, *beside)
    }
    # Only where it attended has a peer a time of its calls.
    assert {(one["kind"], one["peer"]) for one in found["points"] if one["call_us"]} >= {
        (kind, peer) for kind in ("prefill", "eager") for peer in ("upstream", "ours")
    }
    assert {(trace["peer"], trace["mode"]) for trace in found["traces"]} >= {
        ("ours", "DECODE"),
        ("ours", "EXTEND"),
    }
    assert "# Benchmark on CPU" in (tmp_path / "README.md").read_text()
