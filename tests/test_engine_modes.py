"""The real engine in the modes that a plan's lifetime depends on: windows, sinks, MLA, MoE, ranks, speculation.

Tokens are compared with transformers' own greedy search, which shares no code with SGLang. How many calls take a
plan, and how many plans a pass computes, is derived from each model here: a *geometry* is one combination of window,
head counts and head dims among its layers. ``NOT_ON_A_CPU`` says what no engine on a CPU can show.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from sglang_musa_ext import envs

from . import tiny_models
from .engine import SUMMARY, EngineCase, EngineFailed, EngineRun, EngineServer, Request, SummaryRow
from .tiny_models import TinyModel, llama, tokens

pytestmark = pytest.mark.engine

LOGPROB_TOLERANCE = 1e-3
STEPWISE = {"disable_overlap_schedule": True}
CHUNKS = STEPWISE | {"chunked_prefill_size": 128}
TWO_RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}


@dataclass(frozen=True)
class Mode:
    """A model, requests, and how many calls and plans they must take."""

    name: str
    model: TinyModel
    layers: int = 2
    """Attention layers of one scheduler process."""
    geometries: int = 1
    """Different plans that one pass of them needs."""
    phases: tuple[tuple[Request, ...], ...] = ()
    passes: int = 0
    """Forward passes in which calls take plans, by hand."""
    unplanned_calls: int = 0
    """Calls over raw keys and values, which take no plan."""
    arguments: Mapping[str, Any] = field(default_factory=lambda: CHUNKS)
    environ: Mapping[str, str] = field(default_factory=dict)
    before_boot: Callable[[], None] | None = None
    backends: int = 1
    """Backends that report: one in each scheduler that answers."""

    @property
    def requests(self) -> list[Request]:
        """Of all phases."""
        return [request for phase in self.phases for request in phase]

    def statistics(self) -> dict[str, Any]:
        """What each backend must have counted."""
        planned = self.passes * self.layers
        plans = self.passes * self.geometries
        return {
            "passes": self.passes,
            "calls": planned + self.unplanned_calls,
            "planned_calls": planned,
            "plans": plans,
            "reuses": planned - plans,
            "passes_by_plans": {str(self.geometries): self.passes},
        }


def requests(*lengths: int) -> tuple[Request, ...]:
    """A request of each length, for eight tokens, with nothing in common."""
    return tuple(Request(tokens(length, seed=length)) for length in lengths)


def mode(name: str, model: TinyModel, **fields: Any) -> Mode:
    """A mode asked twice: 5 and 60 tokens in one prefill, then 300 tokens in chunks of 128."""
    usual: dict[str, Any] = {"phases": (requests(5, 60), requests(300)), "passes": (1 + 7) + (3 + 7)}
    return Mode(name, model, **usual | fields)


WINDOW, FULL = "sliding_attention", "full_attention"
FOUR_LAYERS = tiny_models.SMALL | {"num_hidden_layers": 4, "sliding_window": 64}
GEMMA = FOUR_LAYERS | {"tie_word_embeddings": True, "query_pre_attn_scalar": 16}
GEMMA_2 = TinyModel(
    "Gemma2Config",
    GEMMA
    | {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        # Low enough to bend these scores: a kernel that leaves softcap out gives other tokens.
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 10.0,
    },
)
GEMMA_3 = TinyModel("Gemma3TextConfig", GEMMA | {"layer_types": [FULL, WINDOW, WINDOW, FULL]})
GPT_OSS = TinyModel(
    "GptOssConfig", FOUR_LAYERS | {"swiglu_limit": 7.0, "num_local_experts": 4, "num_experts_per_tok": 2}
)
OLMO_3 = TinyModel("Olmo3Config", FOUR_LAYERS | {"layer_types": [FULL, WINDOW, FULL, WINDOW]})
DEEPSEEK = tiny_models.SMALL | {
    "head_dim": 64,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "first_k_dense_replace": 1,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
MLA = TinyModel("DeepseekV3Config", DEEPSEEK)
MLA_DENSE = TinyModel("DeepseekV3Config", DEEPSEEK | {"first_k_dense_replace": 2})
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
OPT = TinyModel(
    "OPTConfig",
    {
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": tiny_models.VOCABULARY,
        "max_position_embeddings": 2048,
        "init_std": tiny_models.WIDE,
        "word_embed_proj_dim": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
)
SHORT_THEN_AGAIN = (requests(5, 70, 200), requests(5, 70, 200))
LONG_THEN_AGAIN = (requests(300), requests(300))


def run_without_batch_invariant_operators() -> None:
    """Leave out deterministic inference's Triton matrix products, which ask for an accelerator."""
    import sglang.srt.batch_invariant_ops as operators

    operators.enable_batch_invariant_mode = lambda *_, **__: None


MODES = [
    # Two geometries: layers with a window of 64 keys, and layers without. Softcap changes no plan.
    mode("Gemma-2", GEMMA_2, layers=4, geometries=2),
    mode("Gemma-3, full layer first", GEMMA_3, layers=4, geometries=2),
    mode("Olmo-3, full layer first", OLMO_3, layers=4, geometries=2),
    # SGLang gives an out-of-tree platform one pool for all layers up to 0.5.21, and has to be told so.
    mode("GPT-OSS, sinks", GPT_OSS, layers=4, geometries=2, arguments=CHUNKS | {"disable_hybrid_swa_memory": True}),
    # A prefill without prefix attends over raw keys: two calls without a plan. With a prefix it is absorbed.
    mode("MLA", MLA_DENSE, phases=SHORT_THEN_AGAIN, passes=7 + (1 + 7), unplanned_calls=2, arguments=STEPWISE),
    mode("MLA, MoE after a dense layer", MLA, passes=7 + (2 + 7), unplanned_calls=2 + 2),
    mode(
        "MLA, one-shot prefix",
        MLA,
        phases=LONG_THEN_AGAIN,
        # Every prefill, three chunks and later one with 256 cached tokens, gathers its prefix into raw keys.
        passes=7 + 7,
        unplanned_calls=2 * (3 + 1),
        environ={"SGLANG_CHUNKED_PREFIX_CACHE_THRESHOLD": "1"},
    ),
    mode(
        "MLA, chunked prefix",
        MLA,
        phases=LONG_THEN_AGAIN,
        passes=7 + 7,
        # A call for the new keys of each prefill, and one for each 100 of its 0, 128, 256 and 256 prefix keys.
        unplanned_calls=2 * ((1 + 0) + (1 + 2) + (1 + 3) + (1 + 3)),
        environ={"SGLANG_CHUNKED_PREFIX_CACHE_THRESHOLD": "1", "SGLANG_MAX_KV_CHUNK_CAPACITY": "100"},
    ),
    mode("Qwen2", TinyModel("Qwen2Config", tiny_models.SMALL)),
    mode("Qwen3", TinyModel("Qwen3Config", tiny_models.SMALL)),
    mode("Qwen3-MoE", TinyModel("Qwen3MoeConfig", tiny_models.SMALL | EXPERTS)),
    mode("OPT", OPT),
    mode("tensor parallel 2", llama(), arguments=CHUNKS | {"tp_size": 2}, environ=TWO_RANKS),
    # Each of two stages has one of the two layers, and the first one reports. Two requests would be two batches.
    mode(
        "pipeline parallel 2",
        llama(),
        layers=1,
        phases=(requests(60), requests(300)),
        arguments=CHUNKS | {"pp_size": 2},
        environ=TWO_RANKS,
    ),
    mode(
        "data parallel 2",
        llama(),
        # Each scheduler gets one of the two requests.
        phases=(requests(70, 60),),
        passes=1 + 7,
        arguments=CHUNKS | {"dp_size": 2},
        environ=TWO_RANKS,
        backends=2,
    ),
    mode(
        "deterministic inference",
        llama(),
        arguments=CHUNKS | {"enable_deterministic_inference": True},
        before_boot=run_without_batch_invariant_operators,
    ),
]

CHECKED = [
    "Gemma-2",
    "Gemma-3, full layer first",
    "GPT-OSS, sinks",
    "MLA, MoE after a dense layer",
    "tensor parallel 2",
]
"""Modes that run once more under ``SGLANG_MUSA_EXT_CHECK=metadata``."""

NOT_ON_A_CPU = {
    "two-batch overlap": "SGLang asks for an expert-parallel all-to-all backend, all of which are CUDA's",
    "torch.compile and graphs": "SGLang compiles decode only together with graph capture, which a CPU has not",
    "Gemma-4 (layers of different head dims, shared KV)": "SGLang's own list of its attention backends lacks fa3",
    "linear attention (Qwen3-Next)": "its Triton kernels give wrong numbers in the interpreter",
}
"""What cannot run here for reasons outside of attention; the backend's own tests cover it."""


@pytest.fixture(params=MODES, ids=lambda each: each.name, scope="module")
def each(request: pytest.FixtureRequest) -> Mode:
    """One of ``MODES``."""
    each: Mode = request.param
    return each


@pytest.fixture(scope="module")
def run(engines: EngineServer, each: Mode) -> EngineRun:
    """What the engine answers in this mode."""
    run = run_mode(engines, each)
    for report in run.reports[-1]:
        SUMMARY.append(SummaryRow(each.name, each.geometries, report["statistics"]))
    return run


def run_mode(engines: EngineServer, each: Mode, environ: Mapping[str, str] | None = None) -> EngineRun:
    model = engines.model(each.model)
    return engines.run(
        EngineCase(model, each.phases, each.arguments, {**each.environ, **(environ or {})}, each.before_boot)
    )


def test_tokens_equal_transformers(engines: EngineServer, each: Mode, run: EngineRun) -> None:
    """Tokens are those of transformers' greedy search, and log-probabilities are close to its."""
    model = engines.model(each.model)
    for output, request in zip(run.outputs, each.requests, strict=True):
        expected, logprobs = engines.greedy(model, request)
        assert output.tokens == expected
        assert output.logprobs == pytest.approx(logprobs, abs=LOGPROB_TOLERANCE)


def test_plans_per_pass_are_the_model_s_geometries(each: Mode, run: EngineRun) -> None:
    """Every backend computes one plan per geometry and pass, and serves the other layers from it."""
    reports = run.reports[-1]
    assert [report["backend"] for report in reports] == ["MusaFA3Backend"] * each.backends
    assert [report["statistics"] for report in reports] == [each.statistics()] * each.backends


@pytest.mark.parametrize("name", CHECKED)
def test_every_reused_plan_is_right(engines: EngineServer, name: str) -> None:
    """Under SGLANG_MUSA_EXT_CHECK=metadata every reused plan is compared with a fresh one, and none differs."""
    (checked,) = (each for each in MODES if each.name == name)
    run = run_mode(engines, checked, {envs.CHECK: "metadata"})
    assert run.report()["settings"]["check"] == "metadata"
    assert run.tokens == [engines.greedy(engines.model(checked.model), request)[0] for request in checked.requests]


def ignore_window_sinks_and_softcap() -> None:
    """Serve with kernels that know neither windows nor sinks nor softcap."""
    from sglang_musa_ext import reference

    original = reference.flash_attn_with_kvcache
    plan = reference.get_scheduler_metadata

    def blind(*args: Any, **kwargs: Any) -> Any:
        kwargs.update(window_size=(-1, -1), sinks=None, softcap=0.0)
        return original(*args, **kwargs)

    def blind_plan(*args: Any, **kwargs: Any) -> Any:
        return plan(*args, **kwargs | {"window_size": (-1, -1)})

    functools.update_wrapper(blind, original)
    reference.flash_attn_with_kvcache, reference.get_scheduler_metadata = blind, blind_plan


@pytest.mark.parametrize("name", ["Gemma-2", "Gemma-3, full layer first", "Olmo-3, full layer first", "GPT-OSS, sinks"])
def test_blind_kernels_are_noticed(engines: EngineServer, name: str) -> None:
    """Kernels without windows, sinks and softcap give other tokens: the models make use of them."""
    (mode,) = (each for each in MODES if each.name == name)
    case = EngineCase(engines.model(mode.model), mode.phases, mode.arguments, {}, ignore_window_sinks_and_softcap)
    answers = engines.run(case).tokens
    assert answers != [engines.greedy(case.model, request)[0] for request in mode.requests]


def test_page_size_that_mla_refuses(engines: EngineServer) -> None:
    """MLA with another page size than 64 stops the engine, and the message names the one that works."""
    with pytest.raises(EngineFailed, match=r"--page-size 32 does not work with the MLA kernels.*--page-size 64"):
        engines.run(EngineCase(engines.model(MLA_DENSE), (), {"page_size": 32}))
