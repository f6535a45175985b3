"""The engine of one SGLang release, the importable one; scripts/matrix runs it on all.

Three kinds of models, each with pages of 64 tokens: uniform layers, sliding windows, multi-head
latent attention. The tokens must be those of transformers' greedy search and of the same release's
own ``torch_native`` backend, and the plans as many as the model's geometries. What one release
cannot do stands in ``releases.toml``, with its reason.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sglang_musa_ext.upstream.check import find_package, read_version
from tests.engine.test_engine_modes import CHUNKS, GEMMA_2, MLA, Mode, mode
from tests.support.answers import require_tokens_of_another, require_tokens_of_transformers
from tests.support.engine import (
    TORCH_NATIVE,
    EngineCase,
    EngineRun,
    EngineServer,
)
from tests.support.plan_table import note_plans
from tests.support.tiny_models import TinyModel, llama

EXPECTED_RELEASE = "SGLANG_EXPECTED_RELEASE"
"""The environment variable in which scripts/matrix says which release it means to test."""

# Softcap so high that it bends nothing: torch_native leaves it out.
UNCAPPED = TinyModel("Gemma2Config", {**GEMMA_2.fields, "attn_logit_softcapping": 1e4})
MODELS = {
    "dense": mode("dense", llama()),
    "sliding window": mode("sliding window", UNCAPPED, layers=4, geometries=2),
    "sliding window, softcap": mode("sliding window, softcap", GEMMA_2, layers=4, geometries=2),
    # Prefill without prefix attends over raw keys, without a plan: two calls in each phase.
    "MLA": mode("MLA", MLA, passes=7 + (2 + 7), unplanned_calls=2 + 2),
}
KNOWN_TO_TORCH_NATIVE = ["dense", "sliding window", "MLA"]


def test_release_is_the_expected_one() -> None:
    """The SGLang that is tested here is the one whose column of the matrix this is."""
    package = find_package()
    assert package is not None
    expected = os.environ.get(EXPECTED_RELEASE)
    if expected is None:
        pytest.skip(f"{EXPECTED_RELEASE} names no release")
    assert read_version(package) == expected


@pytest.mark.engine
def test_engine_is_of_the_expected_release(engines: EngineServer) -> None:
    """The engine's processes have imported that SGLang too."""
    package = find_package()
    assert package is not None
    assert engines.call(imported_version) == read_version(package)


def imported_version() -> str:
    import sglang

    return str(sglang.__version__)


@pytest.fixture(params=list(MODELS), scope="module")
def each(request: pytest.FixtureRequest) -> Mode:
    """One of ``MODELS``."""
    return MODELS[request.param]


@pytest.fixture(scope="module")
def ours(engines: EngineServer, each: Mode) -> EngineRun:
    """Return the composed backend's answers."""
    run = ask(engines, each)
    note_plans(each.name, each.geometries, run.statistics())
    return run


def ask(
    engines: EngineServer, each: Mode, arguments: Mapping[str, Any] | None = None, **options: Any
) -> EngineRun:
    return engines.run(
        EngineCase(
            engines.model(each.model), each.phases, {**CHUNKS, **(arguments or {})}, **options
        )
    )


@pytest.mark.engine
def test_tokens_equal_transformers(engines: EngineServer, each: Mode, ours: EngineRun) -> None:
    """Tokens are those of transformers' greedy search, and log-probabilities are close to its."""
    require_tokens_of_transformers(engines, ours.outputs, each.requests, each.model)


@pytest.mark.engine
@pytest.mark.parametrize("each", KNOWN_TO_TORCH_NATIVE, indirect=True, scope="module")
def test_tokens_equal_torch_native(engines: EngineServer, each: Mode, ours: EngineRun) -> None:
    """Tokens are those of the release's own backend, and log-probabilities close to its."""
    theirs = ask(engines, each, TORCH_NATIVE, before_boot=absorb_every_prefill)
    require_tokens_of_another(ours, theirs)


def absorb_every_prefill() -> None:
    """Let latent attention read the cache in each pass: torch_native reads no raw keys there."""
    from sglang.srt.models.deepseek_common.attention_backend_handler import (
        AttentionBackendRegistry,
        AttnForwardMethod,
    )

    AttentionBackendRegistry.register("torch_native", lambda *_: AttnForwardMethod.MLA)


@pytest.mark.engine
def test_plans_per_pass_are_the_model_s_geometries(each: Mode, ours: EngineRun) -> None:
    """The composed backend serves pages of 64 tokens, and computes one plan a geometry and pass."""
    report = ours.report()
    assert (report["backend"], report["kernels"], report["page_size"]) == (
        "MusaFA3Backend",
        "reference",
        64,
    )
    passes = report["statistics"]["passes"]
    # 115 tokens are one chunk of 128, or two where the release's scheduler counts whole pages.
    assert passes - each.passes in (0, 1)
    assert report["statistics"] == replace(each, passes=passes).statistics()


PREPARE = "from sglang_musa_ext.cpu.stand_ins import prepare_process; prepare_process()"


@pytest.mark.engine
@pytest.mark.skipif(
    EXPECTED_RELEASE not in os.environ,
    reason="test_http_server requires the same of the installed release",
)
def test_spawned_engine(
    engines: EngineServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine whose processes start Python anew finds the plugin in each, on any release."""
    # Up to 0.5.20 SGLang imports libraries that this machine lacks before it looks for platforms,
    # so each Python prepares itself as it starts. It imports this module after all paths are known.
    (tmp_path / "sitecustomize.py").write_text(PREPARE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    each = MODELS["dense"]
    request = each.requests[0]
    run = engines.spawn(EngineCase(engines.model(each.model), ((request,),), CHUNKS))
    assert run.tokens == [engines.greedy(engines.model(each.model), request)[0]]
    assert run.report()["backend"] == "MusaFA3Backend"
