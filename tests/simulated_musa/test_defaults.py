"""The defaults of a MUSA user who names no backend, settled by SGLang on the simulated GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.simulated_musa.resolution import KINDS, Kind, Resolution, resolve
from tests.support.engine import EngineServer

pytestmark = pytest.mark.engine

FA3 = {
    "Llama", "Qwen3-MoE", "Gemma-2", "Gemma-3, text", "OLMo-2", "OLMo-3", "Llama-4", "Qwen2.5-VL",
    "MLA (DeepSeek-V3)", "MLA, EAGLE, topk 1", "Llama, EAGLE, topk 1",
    "Llama, EAGLE, topk 4", "Llama, `--page-size 16`", "Llama, deterministic inference",
    "Llama, hierarchical cache", "Llama, `--kv-cache-dtype fp8_e4m3`",
}  # fmt: skip
"""Kinds that fa3 serves right and no slower; the others keep what SGLang chooses."""


def resolved(kind: Kind, directory: Path, mode: str) -> Resolution:
    """Return what is settled on with this package in ``mode``."""
    os.environ["SGLANG_MUSA_EXT"] = mode
    return resolve(kind, directory)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name, scope="module")
def kind(request: pytest.FixtureRequest) -> Kind:
    """One of ``KINDS``."""
    kind: Kind = request.param
    return kind


def test_defaults(musa: EngineServer, kind: Kind, tmp_path: Path) -> None:
    """fa3 is chosen where it is right, else SGLang's choice stays; no default is refused."""
    alone: Resolution = musa.call(resolved, kind, tmp_path, "off")
    ours: Resolution = musa.call(resolved, kind, tmp_path, "auto")
    if kind.name in FA3:
        assert (ours.refusal, ours.backend) == ("", "fa3")
        assert ours.page_size == kind.arguments.get("page_size", 64)
    else:
        assert ours == alone
