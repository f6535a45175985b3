"""A whole run of the benchmark's command over engines that are made up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sglang_musa_ext.benchmark import command, contest
from sglang_musa_ext.benchmark.peers import FIELDS
from sglang_musa_ext.benchmark.probe import PEER
from tests.support.fake_bench import RIGHT, FakeEngine


class BootedEngine(FakeEngine):
    """A fake engine that is started as a real one, and says which backend it has."""

    def __init__(
        self, arguments: Mapping[str, Any], environ: Mapping[str, str], log: Path, patience: float
    ) -> None:
        super().__init__(RIGHT)
        self.own = environ[PEER]
        [self.peer] = [peer for peer in FIELDS["cpu"].peers if peer.name == self.own]
        assert arguments["attention_backend"] == self.peer.attention
        self.tokens = arguments["max_total_tokens"]

    def scheduler(self, method: str, *values: Any, **arguments: Any) -> None:
        if method == "bench_turns":
            super().scheduler(method, *values, **arguments)

    def state(self) -> dict[str, Any]:
        measured = json.loads(super().state()["bench"]) | {"backend": self.peer.backend}
        usage = {"token_capacity": self.tokens, "kvcache": 1.0}
        return {"bench": json.dumps(measured), "memory_usage": usage}


def test_a_run_measures_every_place_and_writes_its_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Peers, models, engines and report fit together, and the exit status is 0."""
    monkeypatch.setattr(contest, "Engine", BootedEngine)
    options = ["--device", "cpu", "--rounds", "2", "--quick", "--out", str(tmp_path)]
    assert command.main(options) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    points = result["models"]["tiny"]["points"]
    assert {point["verdict"] for point in points} == {"equal"}
    assert {point["kind"] for point in points} == {"decode", "prefill", "eager"}
    assert "# Benchmark on CPU" in (tmp_path / "README.md").read_text()
    assert command.main(["--report", str(tmp_path / "bench.json"), "--out", str(tmp_path)]) == 0
