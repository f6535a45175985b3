"""The operator's own model in the kit is compared with another backend, and faults are caught."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sglang_musa_ext import envs
from sglang_musa_ext.engines.changes import PLANS
from sglang_musa_ext.validation import command, model
from sglang_musa_ext.validation.engine import build_model
from sglang_musa_ext.validation.modes import PEERS, BackendChoice
from sglang_musa_ext.validation.report import FAIL, PASS, SKIP
from tests.support.warm import WarmPython


class FakeEngine:
    """An engine whose log-probabilities are off by ``shift``."""

    def __init__(self, shift: float, backend: str) -> None:
        self.shift, self.backend = shift, backend

    def ask(self, batch: list[list[int]], new_tokens: int) -> dict[str, Any]:
        # Requests in a batch are off a little, as on a device.
        off = self.shift + 0.01 * (len(batch) > 1)
        return {"tokens": [[7]] * len(batch), "logprobs": [[-1.0 - off]] * len(batch)}

    def flush(self) -> None:
        pass

    def reports(self) -> list[dict[str, Any]]:
        counts = {"plans": 3, "reuses": 5}
        return [{"backend": self.backend, "kernels": "mate", "statistics": counts}]


def statuses(
    monkeypatch: pytest.MonkeyPatch, shift: float = 0.0, backend: str = "MusaFA3Backend"
) -> list[str]:
    """Return the cases' outcomes on a MUSA device where ours is off by ``shift``."""

    @contextlib.contextmanager
    def fake(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> Iterator[FakeEngine]:
        assert arguments["model_path"] == "some/model"
        is_ours = arguments["attention_backend"] == "fa3"
        assert is_ours != ("SGLANG_MUSA_EXT" in environ), "triton serves without this package"
        yield FakeEngine(shift if is_ours else 0.0, backend)

    monkeypatch.setattr(model, "engine", fake)
    options = argparse.Namespace(device="musa", model="some/model", quick=True)
    return [case().status for _, case in model.OwnModel(options).cases()]


def test_an_own_model_is_compared_with_triton_on_musa(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rounding of other kernels is allowed, and no more; under graphs and without."""
    assert statuses(monkeypatch, 0.4) == [PASS, PASS, PASS]
    assert statuses(monkeypatch, 0.6) == [PASS, FAIL, FAIL]


def test_another_backend_in_our_place_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right answers of somebody else are no proof of this package."""
    assert statuses(monkeypatch, 0.0, "TritonAttnBackend") == [PASS, FAIL, FAIL]


def test_without_a_reference_nothing_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the other backend does not serve the model, ours is skipped with the reason."""

    def dies(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(model, "engine", dies)
    options = argparse.Namespace(device="musa", model="some/model", quick=True)
    outcomes = [case() for _, case in model.OwnModel(options).cases()]
    assert [outcome.status for outcome in outcomes] == [FAIL, SKIP, SKIP]
    assert "SGLang's triton gave no answer" in outcomes[1].reason


def test_the_part_runs_where_a_model_is_named() -> None:
    """``--model`` adds it to the parts; asking for it without a model is a usage error."""
    assert command._options(["--model", "x"]).only[-1] == "model"
    assert "model" not in command._options([]).only
    with pytest.raises(SystemExit, match="2"):
        command._options(["--only", "model"])


# Two engines boot as in test_validate.py's test of a served model.
@pytest.mark.long
@pytest.mark.engine
def test_an_own_model_is_served_on_a_cpu(warm: WarmPython, tmp_path: Path) -> None:
    """The kit serves a model from its folder with torch_native and with this package."""
    build_model(tmp_path / "own", layers=2, hidden=128)
    options = ("--only", "model", "--model", str(tmp_path / "own"), "--kernels", "reference")
    done = warm.run(
        [sys.executable, "-m", "sglang_musa_ext", "validate", *options, "--quick", "--out", "out"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "SGLANG_PLATFORM": "musa_reference"},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [outcome["status"] for outcome in report["outcomes"]] == [PASS, PASS]
    assert report["outcomes"][1]["numbers"]["reuses"] > 0


@pytest.mark.parametrize("choices", PEERS.values(), ids=PEERS)
def test_modes_compare_the_same_calls(choices: tuple[BackendChoice, BackendChoice]) -> None:
    """Prefill from the cache and a plan for every call are upstream's, so ours has both too."""
    theirs, ours = (way.environ for way in choices)
    assert theirs[PLANS] == "1"
    assert (ours[envs.RAW_PREFILL], ours[envs.PLANS]) == ("off", "always")
