"""The commands of ``sglang-musa-ext`` on the simulated GPU, started as an operator starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.simulated_musa.build import ROOT
from tests.simulated_musa.cases import GEMMA_2, HalfModel
from tests.support import tiny_models
from tests.support.engine import EngineServer
from tests.support.warm import WarmPython

pytestmark = pytest.mark.engine

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(warm: WarmPython, musa_environment: Mapping[str, str], tmp_path: Path) -> Command:
    """Runs ``sglang-musa-ext`` with these arguments, in an empty folder."""
    paths = os.pathsep.join([musa_environment["PYTHONPATH"], str(ROOT)])
    environment = {**os.environ, **musa_environment, "PYTHONPATH": paths}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "sglang_musa_ext", *arguments]
        return warm.run(words, cwd=tmp_path, env=environment, timeout=900)

    return run


@pytest.fixture(scope="module")
def model(musa: EngineServer) -> Path:
    """A small model in float16."""
    sizes = {"head_dim": 64, "max_position_embeddings": 4096}
    return musa.model(HalfModel("LlamaConfig", tiny_models.SMALL | sizes))


def test_doctor(command: Command) -> None:
    """The doctor finds the device, MATE and the plugin; what fails is that torch is public."""
    done = command("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    failed = {name for name, check in checks.items() if check["status"] == "fail"}
    assert failed == {"torch", "triton", "collisions"}, done.stdout
    assert "MTT S5000 (simulated), MP 3.1" in checks["device"]["finding"]
    assert "MATE 0.2.7" in checks["mate"]["finding"]
    for name in ("sglang", "contract", "plugin", "device", "mate"):
        assert checks[name]["status"] == "pass", name


def test_doctor_says_what_a_server_gets(command: Command, model: Path) -> None:
    """Asked about a server's arguments, the doctor names what the server resolves to."""
    done = command("doctor", "--json", "--", "--model-path", str(model))
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["command"]["status"] == "pass", done.stdout
    assert "fa3" in checks["command"]["finding"]


def test_prewarm(command: Command, musa: EngineServer) -> None:
    """Every call that a model with windows and softcap makes is made."""
    done = command("prewarm", "--model", str(musa.model(GEMMA_2)), "--max-running-requests", "40")
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = {line.split("  ")[-1].split(",")[0] for line in done.stdout.splitlines()}
    assert kinds == {"paged cache", "raw keys"}


@pytest.mark.parametrize(
    "part",
    [
        "numerics",
        pytest.param("graphs", marks=pytest.mark.long),
        pytest.param("engine", marks=pytest.mark.long),
    ],
)
def test_validate(command: Command, tmp_path: Path, part: str) -> None:
    """The validation kit runs to its end, and all that it asks is right."""
    done = command("validate", "--quick", "--only", part, "--out", "report")
    report: dict[str, Any] = json.loads((tmp_path / "report" / "report.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["device"]["name"] == "MTT S5000 (simulated)"
    assert report["device"]["kernels"] == "mate"
    statuses = {outcome["status"] for outcome in report["outcomes"]}
    assert statuses == {"pass"}, report["outcomes"]


@pytest.mark.long
def test_validate_own_model(command: Command, tmp_path: Path, model: Path) -> None:
    """An operator's own model is served as by SGLang's triton."""
    done = command("validate", "--quick", "--only", "model", "--model", str(model), "--out", "own")
    report = json.loads((tmp_path / "own" / "report.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert {outcome["status"] for outcome in report["outcomes"]} == {"pass"}
