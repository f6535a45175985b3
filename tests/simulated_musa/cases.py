"""Engines on the simulated GPU, started as a user would: no platform, backend or page size."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sglang_musa_ext import envs
from tests.engine import test_engine_modes as modes
from tests.simulated_musa import stand_ins
from tests.support import tiny_models
from tests.support.engine import EngineCase, EngineRun, EngineServer, Output, Request
from tests.support.tiny_models import EagleDraft, TinyModel, llama, tokens

CONTEXT = 8192
LIMIT = 0.05
"""The most that a token may be less probable than the best one after the same text, as a difference
of log-probabilities: some ten times what float16 changes in these models (0.006 seen). bfloat16 has
three bits less."""


def usual(release: tuple[int, ...]) -> dict[str, Any]:
    """Return every engine's arguments: small, with decode graphs, whose names changed in 0.5.14."""
    arguments: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": "float16",
        "random_seed": 0,
        "sampling_backend": "pytorch",
        "mem_fraction_static": 0.5,
        "max_total_tokens": 16384,
        "max_running_requests": 4,
        "log_level": "info",
    }
    if release >= (0, 5, 14):
        return arguments | {"cuda_graph_bs_decode": [1, 2, 4], "disable_prefill_cuda_graph": True}
    return arguments | {"cuda_graph_bs": [1, 2, 4], "disable_piecewise_cuda_graph": True}


_OLD_NAMES = {
    "cuda_graph_bs_decode": "cuda_graph_bs",
    "disable_prefill_cuda_graph": "disable_piecewise_cuda_graph",
    "cuda_graph_bs_prefill": "piecewise_cuda_graph_tokens",
    "cuda_graph_backend_prefill": None,
}
"""Names of arguments before 0.5.14; None: there was no choice."""


def named_as_in(release: tuple[int, ...], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``arguments`` under the names that a release has for them."""
    if release >= (0, 5, 14):
        return dict(arguments)
    named = {_OLD_NAMES.get(name, name): value for name, value in arguments.items()}
    return {name: value for name, value in named.items() if name is not None}


def prompts(*lengths: int, new_tokens: int = 8) -> tuple[Request, ...]:
    """Return a request of each length, with nothing in common."""
    return tuple(Request(tokens(length, seed=length), new_tokens) for length in lengths)


SHARED = tokens(1500, seed=77)


def swapping(first: int, second: int, prefix: int, cached: int) -> tuple[tuple[Request, ...], ...]:
    """Return requests whose contexts are of several splits: two of these many tokens, one of
    ``prefix`` and one that has ``cached`` of them in common with it.

    Long and short ones swap places, so that a plan of the batch before is wrong for the next one.
    """
    return (
        (Request(tokens(first, 1)), Request(tokens(40, 2))),
        (Request(tokens(30, 3)), Request(tokens(second, 4))),
        (Request(SHARED[:prefix]),),
        (Request(SHARED[:cached] + tokens(100, 5)), Request(tokens(200, 6))),
    )


LONG = swapping(900, 1100, prefix=1500, cached=1400)
LESS_LONG = swapping(520, 600, prefix=700, cached=640)
"""For what takes Triton's interpreter longest: a token of MLA's cache, and of the embedding of a
rank; also in chunks of 512.
"""
# A graph of a whole prefill has room for one request in each 512 tokens of a chunk.
ONE_BY_ONE = (LONG[0][:1], LONG[2], LONG[3][:1])
PREFIX = SHARED[:192]
REVERSED = (
    (Request(PREFIX),),
    (Request(PREFIX + tokens(60, 8)), Request(PREFIX + tokens(400, 9))),
    (Request(PREFIX + tokens(400, 10)), Request(PREFIX + tokens(60, 11))),
)
"""The last two phases have the same geometries, and neither's plans are right for the other."""
EXACT_PLANS = {"SIMULATED_MATE_PLANS": "exact"}
"""Has MATE's stand-in refuse a plan that is not that of its call, whether or not it shows."""
CHUNKS = {"chunked_prefill_size": 512}
FA3 = {"attention_backend": "fa3"}


@dataclass(frozen=True)
class MusaCase:
    """A model, what is asked of it, and how it is served."""

    name: str
    model: TinyModel
    phases: tuple[tuple[Request, ...], ...] = LONG
    arguments: Mapping[str, Any] = field(default_factory=lambda: CHUNKS)
    environ: Mapping[str, str] = field(default_factory=dict)
    draft: TinyModel | None = None
    limit: float = LIMIT
    captures_prefill: bool = False
    """True if prefill runs in graphs. With log-probabilities SGLang runs some kinds without."""
    shortfalls: Callable[..., list[float]] = tiny_models.shortfalls
    """Say how probable tokens are, called in a process without a simulated GPU's engine."""

    @property
    def requests(self) -> list[Request]:
        """Of all phases."""
        return [request for phase in self.phases for request in phase]


def wide(model: TinyModel, **fields: Any) -> TinyModel:
    """Return ``model`` with room for long contexts."""
    return replace(model, fields={**model.fields, "max_position_embeddings": CONTEXT, **fields})


class HalfModel(TinyModel):
    """A float16 checkpoint, for a model whose layers have the dtype of the checkpoint."""

    def build(self, directory: Path) -> None:
        """Write the model to ``directory`` as a checkpoint."""
        import torch
        import transformers

        super().build(directory)
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float16)
        model.save_pretrained(directory)

    @property
    def name(self) -> str:
        """A directory's name, other than that of the same model in float32."""
        return f"{super().name}-half"


LLAMA = wide(llama())
GEMMA_2, GEMMA_3 = wide(modes.GEMMA_2), wide(modes.GEMMA_3)
GPT_OSS = HalfModel("GptOssConfig", wide(modes.GPT_OSS).fields)
OLMO_3 = wide(modes.OLMO_3)
MLA_DENSE, MLA_EXPERTS = wide(modes.MLA_DENSE), wide(modes.MLA)
QWEN_3_MOE = wide(TinyModel("Qwen3MoeConfig", tiny_models.SMALL | modes.EXPERTS))
EAGLE = EagleDraft("LlamaConfig", {**LLAMA.fields}, "LlamaForCausalLMEagle")

BF16 = {"dtype": "bfloat16"}
CHAIN = {
    "speculative_algorithm": "EAGLE",
    "speculative_num_steps": 3,
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 4,
}
TREE = CHAIN | {"speculative_eagle_topk": 4, "speculative_num_draft_tokens": 8}
ALONE = CHAIN | {"speculative_algorithm": "STANDALONE"}
SPECULATIVE = (
    prompts(60, new_tokens=16),
    prompts(900, new_tokens=16),
    (Request(tokens(12, seed=99) * 6, 16),),
)
THOUSANDS = (prompts(4200, 60), prompts(40, 4100))
# Experts run in Triton's interpreter, which takes half a minute for a thousand tokens.
EXPERTS = (prompts(330, 40), prompts(40))
SIZES_OF_EXPERTS = {"cuda_graph_bs_decode": [1, 2]}
"""The decode graphs that are replayed for them: a capture runs the model three times."""
FEW_EXPERTS = (prompts(130, 40, new_tokens=4),)
"""For attention with sinks, which MATE never splits, so that longer contexts show nothing more."""
SIZE_OF_FEW_EXPERTS = {"cuda_graph_bs_decode": [2]}
TWICE = (prompts(560), prompts(560))
DRAFTS_BEHIND_A_PREFIX = (
    (Request(PREFIX, 16),),
    (Request(PREFIX + tokens(400, 9), 16), Request(PREFIX + tokens(60, 8), 16)),
)


def prefill_graphs(
    name: str,
    model: TinyModel,
    kind: str = "tc_piecewise",
    *,
    phases: tuple[tuple[Request, ...], ...] = LONG,
    limit: float = LIMIT,
    **more: Any,
) -> MusaCase:
    """Return a case whose prefill is captured, as SGLang does on MUSA by default up to 0.5.21."""
    arguments = {
        "disable_prefill_cuda_graph": False,
        "cuda_graph_backend_prefill": kind,
        "cuda_graph_bs_prefill": [64, 256, 512],
    }
    return MusaCase(
        name,
        model,
        phases,
        CHUNKS | arguments | more,
        limit=limit,
        captures_prefill=True,
    )


def shortfalls_over_fp8(
    model: Path, answers: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[float]:
    """Return ``tiny_models.shortfalls`` of a Llama whose queries, keys and values are rounded to
    float8_e4m3fn before they attend.
    """
    import torch
    import transformers
    from transformers.masking_utils import eager_mask
    from transformers.models.llama.modeling_llama import eager_attention_forward

    def attend(module: Any, *rows: Any, **options: Any) -> Any:
        """Attend with the first three of ``rows`` rounded; the fourth is a mask."""
        rounded = [row.bfloat16().to(torch.float8_e4m3fn).float() for row in rows[:3]]
        return eager_attention_forward(module, *rounded, *rows[3:], **options)

    transformers.AttentionInterface.register("fp8", attend)
    transformers.AttentionMaskInterface.register("fp8", eager_mask)
    return tiny_models.shortfalls(model, answers, "fp8")


FP8 = BF16 | FA3 | {"kv_cache_dtype": "fp8_e4m3"}
# Triton's interpreter takes half a minute for 512 tokens of MLA in these graphs.
SMALL_GRAPHS: Mapping[str, Any] = {"chunked_prefill_size": 128, "cuda_graph_bs_prefill": [64, 128]}
NO_OVERLAP = {"disable_overlap_schedule": True}

CASES = [
    MusaCase("Llama", LLAMA),
    MusaCase("Llama, thousands of tokens", LLAMA, THOUSANDS, {"chunked_prefill_size": 2048}),
    MusaCase("Llama, batch reversed", LLAMA, REVERSED, {}),
    MusaCase("Llama, no graphs", LLAMA, arguments=CHUNKS | {"disable_cuda_graph": True}),
    MusaCase("Llama, without overlap", LLAMA, arguments=CHUNKS | NO_OVERLAP),
    MusaCase(
        "Llama, keys in fp8", LLAMA, arguments=CHUNKS | FP8, limit=3 * LIMIT,
        shortfalls=shortfalls_over_fp8,
    ),
    prefill_graphs("Llama, prefill graphs", LLAMA),
    prefill_graphs("Gemma-3, prefill graphs", GEMMA_3),
    prefill_graphs("Llama, breakable prefill graphs", LLAMA, "breakable"),
    prefill_graphs("Llama, whole prefill graphs", LLAMA, "full", phases=ONE_BY_ONE),
    prefill_graphs(
        "MLA, prefill graphs", MLA_DENSE, phases=EXPERTS, limit=8 * LIMIT, **BF16, **SMALL_GRAPHS
    ),
    MusaCase("Qwen3-MoE", QWEN_3_MOE, EXPERTS, CHUNKS | SIZES_OF_EXPERTS),
    MusaCase("Gemma-2", GEMMA_2),
    MusaCase(
        "Gemma-2, outputs compared", GEMMA_2, arguments=CHUNKS | {"disable_cuda_graph": True},
        environ={envs.CHECK: "output"},
    ),
    MusaCase("Gemma-3", GEMMA_3),
    MusaCase("OLMo-3", OLMO_3),
    # A near tie between experts changes log-probabilities by 0.2.
    MusaCase(
        "GPT-OSS", GPT_OSS, FEW_EXPERTS, CHUNKS | FA3 | SIZE_OF_FEW_EXPERTS, limit=8 * LIMIT
    ),
    MusaCase("MLA", MLA_DENSE, LESS_LONG, CHUNKS | BF16, limit=8 * LIMIT),
    MusaCase(
        "MLA with experts", MLA_EXPERTS, EXPERTS, CHUNKS | BF16 | SIZES_OF_EXPERTS,
        limit=8 * LIMIT,
    ),
    MusaCase(
        "MLA, one-shot prefix", MLA_DENSE, TWICE, CHUNKS | BF16,
        {"SGLANG_CHUNKED_PREFIX_CACHE_THRESHOLD": "1"}, limit=8 * LIMIT,
    ),
    MusaCase(
        "MLA, chunked prefix", MLA_DENSE, TWICE, CHUNKS | BF16,
        {"SGLANG_CHUNKED_PREFIX_CACHE_THRESHOLD": "1", "SGLANG_MAX_KV_CHUNK_CAPACITY": "256"},
        limit=8 * LIMIT,
    ),
    MusaCase("EAGLE, a chain", LLAMA, SPECULATIVE, CHAIN, draft=EAGLE),
    MusaCase("EAGLE, a tree", LLAMA, SPECULATIVE, TREE, draft=EAGLE),
    MusaCase("EAGLE, a cached prefix", LLAMA, DRAFTS_BEHIND_A_PREFIX, CHAIN, draft=EAGLE),
    MusaCase("STANDALONE", LLAMA, SPECULATIVE, ALONE, draft=LLAMA),
    MusaCase("tensor parallel 2", LLAMA, LESS_LONG, CHUNKS | {"tp_size": 2}),
    MusaCase("pipeline parallel 2", LLAMA, arguments=CHUNKS | {"pp_size": 2}),
    MusaCase("data parallel 2", LLAMA, arguments=CHUNKS | {"dp_size": 2}),
]  # fmt: skip


def engine_case(
    musa: EngineServer,
    case: MusaCase,
    *,
    environ: Mapping[str, str] | None = None,
    before_boot: Callable[[], None] | None = None,
) -> EngineCase:
    """Return the engine of ``case`` and what to ask of it."""
    draft = (
        {} if case.draft is None else {"speculative_draft_model_path": str(musa.model(case.draft))}
    )
    usually = stand_ins.collectives
    if case.captures_prefill:
        usually = stand_ins.collectives_and_compiled_prefill
    return EngineCase(
        musa.model(case.model),
        case.phases,
        named_as_in(installed_release(), {**case.arguments, **draft}),
        {envs.RAW_PREFILL: "on", **case.environ, **(environ or {})},
        before_boot=before_boot or usually,
        usual=usual(installed_release()),
        logprobs=not case.captures_prefill,
    )


def run_case(
    musa: EngineServer,
    case: MusaCase,
    *,
    environ: Mapping[str, str] | None = None,
    before_boot: Callable[[], None] | None = None,
) -> EngineRun:
    """Boot the engine of ``case``, whose kernels refuse stale plans, and ask it."""
    strict = {**EXACT_PLANS, **(environ or {})}
    asked = engine_case(musa, case, environ=strict, before_boot=before_boot)
    run = musa.run(asked, timeout=300.0)
    if case.captures_prefill:
        in_graphs = re.findall(r"Prefill batch.* graph: (\w+)", musa.last_log.read_text())
        assert set(in_graphs) == {"True"}, "SGLang ran prefill outside of its graphs"
    return run


def require_right_tokens(musa: EngineServer, case: MusaCase, run: EngineRun) -> None:
    """Fail unless every token is transformers' choice after the same text, or as good as it."""
    lengths = [len(output.tokens) for output in run.outputs]
    assert lengths == [request.new_tokens for request in case.requests]
    assert worst(musa, case, run.outputs) <= case.limit


def require_ours_on_mate(run: EngineRun, *, has_sinks: bool = False) -> None:
    """Fail unless every attention backend is ours, on MATE's kernels and the device, with pages of
    64, and plans where MATE does not ignore plans, as it does with sinks.
    """
    reports = run.reports[-1]
    assert {report["backend"] for report in reports} == {"MusaFA3Backend"}
    assert {(report["kernels"], report["page_size"]) for report in reports} == {("mate", 64)}
    assert all(report["device"].startswith("musa:") for report in reports)
    # Which backends of a draft model run at all differs by release.
    assert any(report["statistics"]["plans"] > 0 for report in reports) != has_sinks
    assert any(report["statistics"]["calls"] > 0 for report in reports)


def installed_release() -> tuple[int, ...]:
    """Return the release of SGLang that this process, and so its children, imports."""
    return tuple(int(part) for part in importlib.metadata.version("sglang").split(".")[:3])


def worst(musa: EngineServer, case: MusaCase, outputs: list[Output]) -> float:
    """Return how much less probable the worst token of ``outputs`` is than the best one."""
    model = musa.model(case.model)
    answers = [
        (request.prompt, output.tokens)
        for output, request in zip(outputs, case.requests, strict=True)
    ]
    return max(musa.call(case.shortfalls, model, answers), default=0.0)
