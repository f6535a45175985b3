"""The engine in modes that plans depend on: windows, sinks, MLA, MoE, ranks, speculation.

Tokens are compared with transformers' own greedy search, which shares no code with SGLang. How many
calls take a plan, and how many plans a pass computes, is derived from each model here: a *geometry*
is one combination of window, head counts and head dims among its layers. ``NOT_ON_A_CPU`` says what
no engine on a CPU can show.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from sglang_musa_ext import envs
from tests.support import tiny_models
from tests.support.answers import require_tokens_of_transformers
from tests.support.engine import (
    EngineCase,
    EngineFailed,
    EngineRun,
    EngineServer,
    Request,
    embed,
)
from tests.support.plan_table import note_plans
from tests.support.tiny_models import EagleDraft, TinyModel, llama, tokens

pytestmark = pytest.mark.engine

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
        """Counts that each backend must have."""
        planned = self.passes * self.layers
        plans = self.passes * self.geometries
        return {
            "passes": self.passes,
            "calls": planned + self.unplanned_calls,
            "raw_calls": 0,
            "unsplit_calls": 0,
            "planned_calls": planned,
            "plans": plans,
            "reuses": planned - plans,
            "passes_by_plans": {str(self.geometries): self.passes} if self.passes else {},
        }


def requests(*lengths: int) -> tuple[Request, ...]:
    """A request of each length, for eight tokens, with nothing in common."""
    return tuple(Request(tokens(length, seed=length)) for length in lengths)


def mode(name: str, model: TinyModel, **fields: Any) -> Mode:
    """A mode asked twice: 5 and 60 tokens in one prefill, then 300 tokens in chunks of 128."""
    usual: dict[str, Any] = {
        "phases": (requests(5, 60), requests(300)),
        "passes": (1 + 7) + (3 + 7),
    }
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
LAGUNA = TinyModel(
    "LagunaConfig",
    FOUR_LAYERS
    | {
        "layer_types": [FULL, WINDOW, FULL, WINDOW],
        "num_attention_heads_per_layer": [4, 8, 2, 8],
        "mlp_layer_types": ["dense"] * 4,
    },
)
GEMMA_3N = TinyModel(
    "Gemma3nTextConfig",
    GEMMA
    | {
        "num_hidden_layers": 6,
        "layer_types": [WINDOW, FULL] * 3,
        # The last two layers read what the two before them wrote.
        "num_kv_shared_layers": 2,
        # Wider than any request here: SGLang's window has one key more than transformers'.
        "sliding_window": 512,
        "vocab_size_per_layer_input": tiny_models.VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 6,
        "altup_num_inputs": 2,
        "intermediate_size": [128] * 6,
    },
    "Gemma3nForCausalLM",
)
GPT_OSS = TinyModel(
    "GptOssConfig",
    FOUR_LAYERS | {"swiglu_limit": 7.0, "num_local_experts": 4, "num_experts_per_tok": 2},
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
QWEN_2 = TinyModel("Qwen2Config", tiny_models.SMALL)
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
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


def accept_one_intermediate_size_a_layer() -> None:
    """Skip a check of tensor-parallel sizes that takes Gemma-3n's list of sizes for a number."""
    from sglang.srt.model_executor import model_runner

    model_runner.adjust_config_with_unaligned_cpu_tp = lambda model_config, *_, **__: model_config


# SGLang gives an out-of-tree platform one pool for all layers up to 0.5.21, and has to be told so.
ONE_POOL = CHUNKS | {"disable_hybrid_swa_memory": True}

ENGINE_MODES = [
    # Two geometries: layers with a window of 64 keys, and layers without. Softcap changes no plan.
    mode("Gemma-2", GEMMA_2, layers=4, geometries=2),
    mode("Gemma-3, full layer first", GEMMA_3, layers=4, geometries=2),
    mode("Olmo-3, full layer first", OLMO_3, layers=4, geometries=2),
    # MATE ignores a plan where there are sinks, so none is computed: 18 passes of 4 calls without.
    mode("GPT-OSS, sinks", GPT_OSS, passes=0, unplanned_calls=18 * 4, arguments=ONE_POOL),
    # Full layers of 4 and of 2 heads, and window layers that all have 8.
    mode("Laguna, head counts by layer", LAGUNA, layers=4, geometries=3, arguments=ONE_POOL),
    mode(
        "Gemma-3n, shared KV",
        GEMMA_3N,
        layers=6,
        geometries=2,
        before_boot=accept_one_intermediate_size_a_layer,
    ),
    # Prefill without prefix attends over raw keys: two calls, no plan. With one it is absorbed.
    mode(
        "MLA",
        MLA_DENSE,
        phases=SHORT_THEN_AGAIN,
        passes=7 + (1 + 7),
        unplanned_calls=2,
        arguments=STEPWISE,
    ),
    mode("MLA, MoE after a dense layer", MLA, passes=7 + (2 + 7), unplanned_calls=2 + 2),
    mode(
        "MLA, one-shot prefix",
        MLA,
        phases=LONG_THEN_AGAIN,
        # Each prefill, three chunks and one with 256 cached tokens, gathers its prefix as raw keys.
        passes=7 + 7,
        unplanned_calls=2 * (3 + 1),
        environ={"SGLANG_CHUNKED_PREFIX_CACHE_THRESHOLD": "1"},
    ),
    mode(
        "MLA, chunked prefix",
        MLA,
        phases=LONG_THEN_AGAIN,
        passes=7 + 7,
        # A call for each prefill's new keys, and for each 100 of its 0, 128, 256, 256 prefix keys.
        unplanned_calls=2 * ((1 + 0) + (1 + 2) + (1 + 3) + (1 + 3)),
        environ={
            "SGLANG_CHUNKED_PREFIX_CACHE_THRESHOLD": "1",
            "SGLANG_MAX_KV_CHUNK_CAPACITY": "100",
        },
    ),
    mode("Qwen2", QWEN_2),
    mode("Qwen3", TinyModel("Qwen3Config", tiny_models.SMALL)),
    mode("Qwen3-MoE", TinyModel("Qwen3MoeConfig", tiny_models.SMALL | EXPERTS)),
    mode("OPT", OPT),
    mode("tensor parallel 2", llama(), arguments=CHUNKS | {"tp_size": 2}, environ=TWO_RANKS),
    # Each of two stages has one layer, and the first reports. Two requests are two batches.
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


@dataclass(frozen=True)
class Speculation:
    """A way to draft, for the target model ``target``."""

    name: str
    algorithm: str
    draft: TinyModel | None
    target: TinyModel = field(default_factory=llama)
    topk: int = 1
    steps: int = 3
    draft_layers: int = 1
    draft_backends: int = 2
    """Backends that decode drafts: one for each step but the last."""
    planned_prefill: bool = True
    """Return whether a prefill of the target takes a plan; MLA's without prefix does not."""
    arguments: Mapping[str, Any] = field(default_factory=lambda: STEPWISE)

    def engine_arguments(self, draft: str | None) -> dict[str, Any]:
        """With the draft model at the path ``draft``."""
        usual: dict[str, Any] = {"speculative_algorithm": self.algorithm}
        if draft is not None:
            usual["speculative_draft_model_path"] = draft
            usual["speculative_num_steps"] = self.steps
            usual["speculative_eagle_topk"] = self.topk
        return (
            usual
            | {"speculative_num_draft_tokens": 4 if self.topk == 1 else 8}
            | dict(self.arguments)
        )

    def statistics(self, prefills: int, rounds: int) -> list[dict[str, Any]]:
        """Return the counts that the backends must have, in any order.

        A tree of drafts (topk > 1) is attended to in two calls with a plan each: what all branches
        share, and the branch. A chain is one call.
        """
        calls = 1 if self.topk == 1 else 2
        target = counts(2, {1: prefills if self.planned_prefill else 0}, {calls: rounds})
        if not self.planned_prefill:
            target["calls"] += 2 * prefills
        if self.draft is None:
            return [target]
        drafts = [counts(self.draft_layers, {calls: rounds}) for _ in range(self.draft_backends)]
        # After each prefill and each round the draft model reads what was accepted, as a chain.
        extend = counts(self.draft_layers, {1: prefills + rounds})
        return [target, extend, *drafts]


def counts(layers: int, *passes_by_plans: dict[int, int]) -> dict[str, Any]:
    """Statistics of passes in which each layer makes as many calls as the pass computes plans."""
    passes: dict[int, int] = {}
    for each in passes_by_plans:
        for plans, number in each.items():
            passes[plans] = passes.get(plans, 0) + number
    plans = sum(plans * number for plans, number in passes.items())
    return {
        "passes": sum(passes.values()),
        "calls": plans * layers,
        "raw_calls": 0,
        "unsplit_calls": 0,
        "planned_calls": plans * layers,
        "plans": plans,
        "reuses": plans * (layers - 1),
        "passes_by_plans": {
            str(plans): number for plans, number in sorted(passes.items()) if number
        },
    }


EAGLE = EagleDraft("LlamaConfig", tiny_models.SMALL, "LlamaForCausalLMEagle")
EAGLE_3 = EagleDraft("LlamaConfig", tiny_models.SMALL, "LlamaForCausalLMEagle3")
ONE_KEY_A_PAGE = STEPWISE | {"page_size": 1}

SPECULATIONS = [
    Speculation("EAGLE, topk 1", "EAGLE", EAGLE),
    Speculation("EAGLE, topk 4", "EAGLE", EAGLE, topk=4),
    Speculation("EAGLE, topk 4, page size 1", "EAGLE", EAGLE, topk=4, arguments=ONE_KEY_A_PAGE),
    Speculation("EAGLE-3", "EAGLE3", EAGLE_3),
    # The draft model is the target itself, so most drafts are accepted.
    Speculation("STANDALONE, topk 1", "STANDALONE", llama(), draft_layers=2),
    Speculation("STANDALONE, topk 4", "STANDALONE", llama(), draft_layers=2, topk=4),
    Speculation(
        "STANDALONE, one step", "STANDALONE", llama(), draft_layers=2, steps=1, draft_backends=0
    ),
    Speculation("MLA, topk 1", "STANDALONE", llama(), MLA, draft_layers=2, planned_prefill=False),
    # Drafts are what followed the same words before, in a tree; SGLang asks for page size 1.
    Speculation("NGRAM", "NGRAM", None, topk=10, arguments=ONE_KEY_A_PAGE),
]
REPEATING = Request(tokens(12, seed=99) * 6, 16)
SPECULATIVE_PHASES = ((Request(tokens(60, 60), 16),), (Request(tokens(300, 3), 16),), (REPEATING,))


@pytest.fixture(params=SPECULATIONS, ids=lambda each: each.name, scope="module")
def speculation(request: pytest.FixtureRequest) -> Speculation:
    """One of ``SPECULATIONS``."""
    speculation: Speculation = request.param
    return speculation


@pytest.fixture(scope="module")
def speculative(engines: EngineServer, speculation: Speculation) -> EngineRun:
    """Return the engine's answers with drafts."""
    return run_speculation(engines, speculation)


def run_speculation(
    engines: EngineServer, speculation: Speculation, environ: Mapping[str, str] | None = None
) -> EngineRun:
    draft = None if speculation.draft is None else str(engines.model(speculation.draft))
    model, arguments = engines.model(speculation.target), speculation.engine_arguments(draft)
    return engines.run(EngineCase(model, SPECULATIVE_PHASES, arguments, environ or {}))


def undrafted(engines: EngineServer, speculation: Speculation) -> list[list[int]]:
    """Return the target model's answers without drafts, according to transformers."""
    model = engines.model(speculation.target)
    asked = [request for (request,) in SPECULATIVE_PHASES]
    return [tokens for tokens, _ in engines.greedy_all(model, asked)]


def test_drafts_change_no_token(
    engines: EngineServer, speculation: Speculation, speculative: EngineRun
) -> None:
    """Tokens are those of plain decoding, and of transformers."""
    assert speculative.tokens == undrafted(engines, speculation)


def test_plans_of_target_and_draft(speculation: Speculation, speculative: EngineRun) -> None:
    """Target and draft backends are all ours, and each computes the plans of its own passes."""
    rounds = sum(output.verified for output in speculative.outputs)
    reports = speculative.reports[-1]
    assert {report["backend"] for report in reports} == {"MusaFA3Backend"}
    statistics = [report["statistics"] for report in reports]
    for number, each in enumerate(sorted(statistics, key=str)):
        note_plans(f"{speculation.name}: backend {number}", 1 if speculation.topk == 1 else 2, each)
    expected = speculation.statistics(len(SPECULATIVE_PHASES), rounds)
    assert sorted(statistics, key=str) == sorted(expected, key=str)


def test_accepted_drafts_save_rounds(speculation: Speculation, speculative: EngineRun) -> None:
    """A draft model that is the target is believed: only here would its stale plan show."""
    if speculation.draft == speculation.target:
        # Upstream's draft never sees a prompt's first token: not quite every draft is right.
        for output in speculative.outputs:
            assert output.verified <= 2 + len(output.tokens) / (1 + speculation.steps) * 1.5


@dataclass(frozen=True)
class Embedding:
    """A model that embeds prompts."""

    name: str
    model: TinyModel
    position: int
    """Of the token whose state is the embedding."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    planned: bool = True


NO_CACHE = {"disable_radix_cache": True, "chunked_prefill_size": -1}
"""Then SGLang attends over raw keys and values, and writes none to the cache."""
BERT = TinyModel(
    "BertConfig",
    {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": tiny_models.VOCABULARY,
        "max_position_embeddings": 2048,
        "initializer_range": tiny_models.WIDE,
        "position_embedding_type": "absolute",
        "pad_token_id": 0,
    },
    "BertModel",
)
EMBEDDINGS = [
    Embedding("decoder", QWEN_2, -1),
    Embedding("decoder without cache", QWEN_2, -1, NO_CACHE, planned=False),
    Embedding("encoder (BERT)", BERT, 0),
    Embedding("encoder (BERT) without cache", BERT, 0, NO_CACHE, planned=False),
]


@pytest.mark.parametrize("embedding", EMBEDDINGS, ids=lambda each: each.name)
def test_embeddings_equal_transformers(engines: EngineServer, embedding: Embedding) -> None:
    """Embeddings are transformers', of a decoder and an encoder, over cache and raw keys."""
    model, prompts = engines.model(embedding.model), requests(5, 70, 200)
    case = EngineCase(
        model, (prompts,), STEPWISE | {"is_embedding": True} | dict(embedding.arguments)
    )
    vectors, (report,) = engines.call(embed, case)
    expected = engines.call(
        tiny_models.embeddings, model, [each.prompt for each in prompts], embedding.position
    )
    for vector, other in zip(vectors, expected, strict=True):
        assert vector == pytest.approx(other, abs=1e-5)
    # One pass of two layers; attention over raw keys takes no plan.
    nothing = {
        "passes": 0,
        "calls": 2,
        "raw_calls": 0,
        "unsplit_calls": 0,
        "planned_calls": 0,
        "plans": 0,
        "reuses": 0,
        "passes_by_plans": {},
    }
    assert report["statistics"] == (counts(2, {1: 1}) if embedding.planned else nothing)
    note_plans(f"embedding, {embedding.name}", 1, report["statistics"])


CHECKED = [
    "Gemma-2",
    "Gemma-3, full layer first",
    "GPT-OSS, sinks",
    "MLA, MoE after a dense layer",
    "tensor parallel 2",
]
"""Modes that run once more under ``SGLANG_MUSA_EXT_CHECK=metadata``."""

NOT_ON_A_CPU = {
    "two-batch overlap": "SGLang wants an expert-parallel all-to-all backend, all of them CUDA's",
    "torch.compile and graphs": "SGLang asks the platform for a graph runner; a CPU has no graphs",
    "Gemma-4 (layers of different head dims)": "SGLang's own list of its backends lacks fa3",
    "Llama-4 (chunked-local attention)": "SGLang's experts in PyTorch cannot weigh their input",
    "Qwen3-Next (linear attention)": "its Triton kernels give wrong numbers in the interpreter",
    "MLA with a tree of drafts (topk > 1)": "SGLang reads its keys one a page; MLA's pages hold 64",
    "NGRAM with pages of 64": "SGLang refuses it with every backend but flashinfer",
    "cross attention": "its models take images or sound, whose processors are not set up here",
}
"""Modes that cannot run here for reasons outside of attention; docs/status.md has their cover."""


@pytest.fixture(params=ENGINE_MODES, ids=lambda each: each.name, scope="module")
def each(request: pytest.FixtureRequest) -> Mode:
    """One of ``ENGINE_MODES``."""
    each: Mode = request.param
    return each


@pytest.fixture(scope="module")
def run(engines: EngineServer, each: Mode) -> EngineRun:
    """Return the engine's answers in this mode."""
    run = run_mode(engines, each)
    for report in run.reports[-1]:
        note_plans(each.name, each.geometries, report["statistics"])
    return run


def run_mode(
    engines: EngineServer, each: Mode, environ: Mapping[str, str] | None = None
) -> EngineRun:
    model = engines.model(each.model)
    return engines.run(
        EngineCase(
            model,
            each.phases,
            each.arguments,
            {**each.environ, **(environ or {})},
            each.before_boot,
        )
    )


def test_tokens_equal_transformers(engines: EngineServer, each: Mode, run: EngineRun) -> None:
    """Tokens are those of transformers' greedy search, and log-probabilities are close to its."""
    require_tokens_of_transformers(engines, run.outputs, each.requests, each.model)


def test_plans_per_pass_are_the_model_s_geometries(each: Mode, run: EngineRun) -> None:
    """Every backend computes a plan per geometry and pass, and serves the other layers from it."""
    reports = run.reports[-1]
    assert [report["backend"] for report in reports] == ["MusaFA3Backend"] * each.backends
    assert [report["statistics"] for report in reports] == [each.statistics()] * each.backends


@pytest.mark.parametrize("name", CHECKED)
def test_every_reused_plan_is_right(engines: EngineServer, name: str) -> None:
    """Under SGLANG_MUSA_EXT_CHECK=metadata every reused plan equals a fresh one."""
    (checked,) = (each for each in ENGINE_MODES if each.name == name)
    run = run_mode(engines, checked, {envs.CHECK: "metadata"})
    assert run.report()["settings"]["check"] == "metadata"
    expected = engines.greedy_all(engines.model(checked.model), checked.requests)
    assert run.tokens == [tokens for tokens, _ in expected]


@pytest.mark.parametrize("name", ["EAGLE, topk 4", "MLA, topk 1"])
def test_every_reused_plan_of_drafts_is_right(engines: EngineServer, name: str) -> None:
    """The same with drafts: target, draft and draft-extend backends share no plan."""
    (speculation,) = (each for each in SPECULATIONS if each.name == name)
    run = run_speculation(engines, speculation, {envs.CHECK: "metadata"})
    assert run.tokens == undrafted(engines, speculation)


def ignore_window_sinks_and_softcap() -> None:
    """Serve with kernels that know neither windows nor sinks nor softcap."""
    from sglang_musa_ext.kernels import reference

    original = reference.flash_attn_with_kvcache
    plan = reference.get_scheduler_metadata

    def blind(*args: Any, **kwargs: Any) -> Any:
        kwargs.update(window_size=(-1, -1), sinks=None, softcap=0.0)
        return original(*args, **kwargs)

    def blind_plan(*args: Any, **kwargs: Any) -> Any:
        return plan(*args, **kwargs | {"window_size": (-1, -1)})

    functools.update_wrapper(blind, original)
    reference.flash_attn_with_kvcache, reference.get_scheduler_metadata = blind, blind_plan


@pytest.mark.parametrize(
    "name", ["Gemma-2", "Gemma-3, full layer first", "Olmo-3, full layer first", "GPT-OSS, sinks"]
)
def test_blind_kernels_are_noticed(engines: EngineServer, name: str) -> None:
    """Kernels without windows, sinks and softcap give other tokens: the models make use of them."""
    (mode,) = (each for each in ENGINE_MODES if each.name == name)
    case = EngineCase(
        engines.model(mode.model), mode.phases, mode.arguments, {}, ignore_window_sinks_and_softcap
    )
    answers = engines.run(case).tokens
    assert answers != [tokens for tokens, _ in engines.greedy_all(case.model, mode.requests)]


def test_page_size_that_mla_refuses(engines: EngineServer) -> None:
    """MLA with another page size than 64 stops the engine; the message names the right one."""
    with pytest.raises(
        EngineFailed, match=r"--page-size 32 does not work with the MLA kernels.*--page-size 64"
    ):
        engines.run(EngineCase(engines.model(MLA_DENSE), (), {"page_size": 32}))
