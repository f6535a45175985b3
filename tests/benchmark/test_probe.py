"""The probe in an engine: whose turn a pass is, and what it notes of it."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import sglang_musa_ext.attention
from sglang_musa_ext import envs
from sglang_musa_ext.benchmark import probe as bench_probe
from sglang_musa_ext.benchmark.probe import measurements


class Runner:
    """A ``ModelRunner`` as far as the probe sees it."""

    is_draft_worker = False

    def __init__(self) -> None:
        self.attn_backend = object()


def forward(runner: Runner, batch: Any) -> Any:
    """A ``ModelRunner.forward`` of one attention call, by the backend that the runner has."""
    batch.probe.attend(lambda backend: None, batch.by or runner.attn_backend)
    return runner.attn_backend


def served(probe: bench_probe.Probe, runner: Runner, by: Any = None, mode: str = "EXTEND") -> Any:
    """The backend that a pass got."""
    named = SimpleNamespace(name=mode)
    return probe.forward(
        forward,
        runner,
        SimpleNamespace(forward_mode=named, input_ids=None, batch_size=1, probe=probe, by=by),
    )


def test_backends_take_turns_in_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round has every peer once, in changing orders; rows say whose they are."""
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
    assert [row["turn"] for row in rows] == [0, *sorted([*range(1, 9)] * 2)]
    probe.take_turns([])
    assert [served(probe, runner) for _ in range(3)] == [own] * 3
    assert dispatched == [False]


def test_turns_are_of_the_passes_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode pass between two prompts is nobody's turn, and the own backend's to serve."""
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
    monkeypatch.setattr(sglang_musa_ext.attention, "selection", stub, raising=False)
    monkeypatch.setenv(envs.KERNELS, "hopper")
    monkeypatch.setenv(envs.MODE, before) if before else monkeypatch.delenv(
        envs.MODE, raising=False
    )
    assert bench_probe._ours(Runner()).kernels == "hopper"
    assert os.environ.get(envs.MODE) == before


def test_a_pass_that_another_backend_served_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that a peer served out of turn raises, as its time would be noted for another."""
    monkeypatch.setattr(bench_probe, "BACKENDS", {"in-tree": lambda runner: object()})
    probe, runner = bench_probe.Probe(), Runner()
    served(probe, runner)
    probe.take_turns(["in-tree"])
    served(probe, runner)
    with pytest.raises(RuntimeError, match="dict served where it was the turn of in-tree"):
        served(probe, runner, by={1: 2})


def test_an_engine_without_the_probe_is_an_error() -> None:
    """SGLang goes on without a plugin that raises, so its absence is looked for."""
    with pytest.raises(RuntimeError, match="without the benchmark's probe"):
        measurements({"sglang_musa_ext": []})


def test_a_plan_for_every_call_is_a_setting_of_one_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend without reuse has it, and the process afterwards does not."""
    stub = SimpleNamespace(MusaFA3Backend=lambda runner: envs.Settings.from_environ())
    monkeypatch.setattr(sglang_musa_ext.attention, "selection", stub, raising=False)
    monkeypatch.delenv(envs.FORCE_UPDATE_METADATA, raising=False)
    built = {name: bench_probe.BACKENDS[name](Runner()) for name in ("ours", "ours without reuse")}
    assert {name: settings.force_update_metadata for name, settings in built.items()} == {
        "ours": False, "ours without reuse": True,
    }  # fmt: skip
    assert envs.FORCE_UPDATE_METADATA not in os.environ
