"""The defaults of a MUSA user who names no backend, settled by SGLang on the simulated GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sglang_musa_ext.doctor.server_arguments import probe_command
from sglang_musa_ext.doctor.surroundings import Surroundings
from sglang_musa_ext.upstream.check import installed_version
from tests.simulated_musa.resolution import (
    DRAFT,
    KINDS,
    Kind,
    Resolution,
    cells_of,
    documented,
    resolve,
)
from tests.support.engine import EngineServer

pytestmark = pytest.mark.engine

FA3 = {
    "Llama", "Qwen3-MoE", "Gemma-2", "Gemma-3, text", "Gemma-3, text and images", "OLMo-2",
    "OLMo-3", "Llama-4", "Qwen2.5-VL",
    "MLA (DeepSeek-V3)", "MLA, EAGLE, topk 1", "Llama, EAGLE, topk 1",
    "Llama, EAGLE, topk 4", "Llama, `--page-size 16`", "Llama, deterministic inference",
    "Llama, hierarchical cache", "Llama, `--kv-cache-dtype fp8_e4m3`",
}  # fmt: skip
"""Kinds that fa3 serves right and no slower; the others keep what SGLang chooses."""


def resolved(kind: Kind, directory: Path, mode: str) -> Resolution:
    """Return what is settled on with this package in ``mode``."""
    os.environ["SGLANG_MUSA_EXT"] = mode
    return resolve(kind, directory)


def doctors_choice(kind: Kind, directory: Path) -> str:
    """Return the backend that the doctor says a server of ``kind`` gets."""
    command = ["--model-path", str(directory)]
    for name, value in kind.arguments.items():
        command.append(f"--{name.replace('_', '-')}")
        if value is not True:
            command.append(str(directory if value == DRAFT else value))
    answer = probe_command(Surroundings(dict(os.environ), command))
    backend: str = answer.details["prefill attention"]["value"]
    return backend


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name, scope="module")
def kind(request: pytest.FixtureRequest) -> Kind:
    """One of ``KINDS``."""
    kind: Kind = request.param
    return kind


@pytest.fixture(scope="module")
def model(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the kind's configuration."""
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def alone(musa: EngineServer, kind: Kind, model: Path) -> Resolution:
    """What SGLang settles on by itself."""
    settled: Resolution = musa.call(resolved, kind, model, "off")
    return settled


@pytest.fixture(scope="module")
def ours(musa: EngineServer, kind: Kind, model: Path, alone: Resolution) -> Resolution:
    """What it settles on with this package."""
    settled: Resolution = musa.call(resolved, kind, model, "auto")
    return settled


def test_defaults(kind: Kind, alone: Resolution, ours: Resolution) -> None:
    """fa3 is chosen where it is right, else SGLang's choice stays; no default is refused."""
    if kind.name in FA3:
        assert (ours.refusal, ours.backend) == ("", "fa3")
        assert ours.page_size == kind.arguments.get("page_size", 64)
    else:
        assert ours == alone


def test_the_docs_say_so(kind: Kind, alone: Resolution, ours: Resolution) -> None:
    """The table of docs/simulated-musa.md is what the installed release gives."""
    assert documented(kind.name, str(installed_version())) == cells_of(alone, ours)


def test_the_doctor_says_so(musa: EngineServer, kind: Kind, model: Path, ours: Resolution) -> None:
    """The doctor, which reads config.json alone, names fa3 where a server gets it."""
    if ours.refusal:
        pytest.skip("SGLang refuses it on any backend")
    assert (musa.call(doctors_choice, kind, model) == "fa3") == (ours.backend == "fa3")
