"""Features of SGLang beside plain serving, on the CPU platform: adapters, a hierarchical cache,
DFLASH, data-parallel attention.

Tokens are compared with transformers' own greedy search, which shares no code with SGLang; a model
with an adapter is compared with one that has the adapter merged into its weights.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.engine.test_engine_modes import DEEPSEEK, STEPWISE, TWO_RANKS
from tests.support import tiny_models
from tests.support.answers import require_tokens_of_transformers
from tests.support.engine import EngineCase, EngineServer, Request
from tests.support.tiny_models import AdaptedModel, DFlashDraft, TinyModel, llama, tokens

pytestmark = pytest.mark.engine

SHARED = tokens(150, seed=1)


# Adapters -----------------------------------------------------------------------------------------

ADAPTERS = {
    name: AdaptedModel("LlamaConfig", tiny_models.SMALL, seed=seed)
    for name, seed in (("one", 1), ("other", 2))
}


def test_adapters_over_one_shared_prefix(engines: EngineServer) -> None:
    """Two adapters and none, together and one after another, over one prefix, which each of them
    finds in the cache only where it computed it itself.
    """
    paths = {name: str(engines.model(model) / "adapter") for name, model in ADAPTERS.items()}
    suffix = SHARED + tokens(30, seed=2)
    users = (None, "one", "other")
    together = tuple(Request(SHARED, adapter=user) for user in users)
    apart = [(Request(suffix, adapter=user),) for user in users]
    phases = (together, *apart)
    run = engines.run(
        EngineCase(
            engines.model(llama()),
            phases,
            STEPWISE | {"enable_lora": True, "lora_paths": paths, "max_loras_per_batch": 3},
        )
    )
    requests = [request for phase in phases for request in phase]
    models = [ADAPTERS[request.adapter] if request.adapter else llama() for request in requests]
    require_tokens_of_transformers(engines, run.outputs, requests, models)
    assert len({tuple(output.tokens) for output in run.phases[0]}) == len(users)
    assert [output.cached_tokens for output in run.phases[0]] == [0, 0, 0]
    assert [phase[0].cached_tokens for phase in run.phases[1:]] == [128, 128, 128]


# A hierarchical cache -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [llama(), TinyModel("DeepseekV3Config", DEEPSEEK | {"first_k_dense_replace": 2})],
    ids=["dense", "MLA"],
)
def test_a_prefix_leaves_the_device_and_comes_back(engines: EngineServer, model: TinyModel) -> None:
    """A prefix that others drove out of a small pool is read back from the host's memory."""
    first = Request(SHARED)
    others = tuple(Request(tokens(200, seed=seed)) for seed in range(5, 9))
    again = Request(SHARED + tokens(20, seed=3))
    phases = ((first,), *((other,) for other in others), (again,))
    arguments = {
        "enable_hierarchical_cache": True,
        "hicache_ratio": 4.0,
        "hicache_write_policy": "write_through",
        "max_total_tokens": 512,
    }
    run = engines.run(EngineCase(engines.model(model), phases, STEPWISE | arguments))
    requests = [request for phase in phases for request in phase]
    require_tokens_of_transformers(engines, run.outputs, requests, model)
    assert run.phases[-1][0].cached_tokens == 128


# DFLASH -------------------------------------------------------------------------------------------


def asks_platforms_about_drafts() -> bool:
    from sglang.srt.platforms.interface import SRTPlatform

    return hasattr(SRTPlatform, "supports_speculative_draft_attention_backend")


def test_blocks_of_drafts_change_no_token(engines: EngineServer) -> None:
    """DFLASH drafts blocks of tokens at once; tokens are those of plain decoding."""
    if not engines.call(asks_platforms_about_drafts):
        pytest.skip("SGLang refuses DFLASH on devices out of its tree up to 0.5.20")
    target = TinyModel("Qwen3Config", tiny_models.SMALL)
    arguments = {
        "speculative_algorithm": "DFLASH",
        "speculative_draft_model_path": str(engines.model(DFlashDraft(fields=tiny_models.SMALL))),
    }
    phases = ((Request(tokens(60, 60), 16),), (Request(tokens(12, seed=99) * 6, 16),))
    run = engines.run(EngineCase(engines.model(target), phases, STEPWISE | arguments))
    requests = [request for phase in phases for request in phase]
    require_tokens_of_transformers(engines, run.outputs, requests, target)
    assert all(output.verified for output in run.outputs)


# Data-parallel attention --------------------------------------------------------------------------

# Experts of 64 columns: SGLang pads those of a rank on a CPU to multiples of 32.
MLA_MOE = TinyModel("DeepseekV3Config", DEEPSEEK | {"moe_intermediate_size": 64})
QWEN_3_MOE = TinyModel(
    "Qwen3MoeConfig",
    tiny_models.SMALL
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
)
DP_ATTENTION: dict[str, Any] = {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}


@pytest.mark.parametrize("model", [MLA_MOE, QWEN_3_MOE], ids=["MLA", "Qwen3-MoE"])
def test_data_parallel_attention_with_idle_and_unequal_ranks(
    engines: EngineServer, model: TinyModel
) -> None:
    """One request leaves a rank idle; two of different lengths, and then three, are unequal."""

    def phase(*lengths: int) -> tuple[Request, ...]:
        return tuple(Request(tokens(length, seed=length), 6) for length in lengths)

    phases = (phase(40), phase(70, 9), phase(30, 100, 5))
    case = EngineCase(engines.model(model), phases, STEPWISE | DP_ATTENTION, TWO_RANKS)
    run = engines.run(case, timeout=240)
    requests = list(itertools.chain.from_iterable(phases))
    require_tokens_of_transformers(engines, run.outputs, requests, model)
    reports = run.reports[-1]
    assert [report["backend"] for report in reports] == ["MusaFA3Backend"] * 2
    assert all(report["statistics"]["passes"] > 0 for report in reports)
