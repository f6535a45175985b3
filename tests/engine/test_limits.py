"""Limits of SGLang's own ``fa3`` in a running server that is started all the same.

Each failure is shown with the check at start left out: a row of ``upstream/limits.py`` that no
longer fails here can go, or needs an ``until``. With the check, the same server does not start.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from sglang_musa_ext.upstream import limits
from sglang_musa_ext.upstream.check import find_package, read_version
from sglang_musa_ext.upstream.releases import version_key
from tests.engine.test_engine_modes import (
    DEEPSEEK,
    EXPERTS,
    GEMMA_3,
    MLA_DENSE,
    NO_CACHE,
    QWEN_2,
    STEPWISE,
    TWO_RANKS,
)
from tests.support import images, tiny_models
from tests.support.answers import LOGPROB_TOLERANCE
from tests.support.engine import EngineCase, EngineFailed, EngineServer, Request, embed
from tests.support.tiny_models import TinyModel, WithoutVision, llama, tokens

pytestmark = pytest.mark.engine


@dataclass(frozen=True)
class Limit:
    """A server that a row is about."""

    word: str
    """Of the row's condition, for it alone."""
    model: TinyModel
    arguments: Mapping[str, Any]
    error: str
    """A line of its log then."""
    draft: TinyModel | None = None
    requests: tuple[Request, ...] = field(default_factory=lambda: (Request(tokens(70, seed=1)),))


SMALL_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# All layers are dense, because SGLang's experts of Llama-4 do not run on a CPU; the fourth one
# attends to the whole context.
LLAMA_4_FIELDS = {
    "text_config": tiny_models.SMALL
    | {
        "num_hidden_layers": 4,
        "intermediate_size_mlp": 128,
        "interleave_moe_layer_step": 5,
        "num_local_experts": 2,
        "use_qk_norm": False,
        "attention_chunk_size": 96,
        "pad_token_id": 0,
    },
    "vision_config": SMALL_VISION
    | {
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "vision_output_dim": 32,
    },
    "tie_word_embeddings": False,
}
LLAMA_4 = TinyModel("Llama4Config", LLAMA_4_FIELDS, "Llama4ForConditionalGeneration")

DRAFTS = {"speculative_num_steps": 3, "speculative_num_draft_tokens": 8}
TREE = DRAFTS | {"speculative_algorithm": "STANDALONE", "speculative_eagle_topk": 4}
LIMITS = [
    Limit(
        "STANDALONE",
        llama(),
        DRAFTS | {"speculative_algorithm": "STANDALONE", "speculative_eagle_topk": 1},
        "'NoneType' object has no attribute 'is_contiguous'",
        # As a draft, SGLang takes DeepSeek-V3 for its MTP layer.
        TinyModel("DeepseekV3Config", DEEPSEEK | {"num_nextn_predict_layers": 1}),
    ),
    Limit(
        "bfloat16 KV cache",
        llama(),
        {"dtype": "float16", "kv_cache_dtype": "bfloat16"},
        "to have the same dtype",
    ),
    Limit(
        "over sliding windows",
        GEMMA_3,
        TREE,
        "AssertionError: FlashAttention backend doesn't support topk > 1",
        llama(),
    ),
    Limit(
        "no multiple of the page",
        LLAMA_4,
        {},
        "AssertionError: attn_chunk_size 96 is not divisible by page_size 64",
    ),
]
OVER_LATENT_PAGES = Limit("of an MLA model at", MLA_DENSE, TREE, "", llama())
"""A server that answers wrongly, or ends."""


def require_release(word: str, since: str = "0.5.11") -> None:
    """Skip where the release has not the limit, or where a CPU cannot show it before ``since``."""
    package = find_package()
    assert package is not None
    version = read_version(package)
    assert version is not None
    (row,) = (row for row in limits.UPSTREAM_LIMITS if word in row.condition)
    if not row.holds_in(version):
        pytest.skip(f"SGLang {version} has not this limit")
    if version_key(version) < version_key(since):
        pytest.skip(f"before {since} SGLang's drafts need CUDA, or a compiler for their library")


def leave_the_check_out() -> None:
    vars(limits)["UPSTREAM_LIMITS"] = ()


def case_of(engines: EngineServer, limit: Limit, **fields: Any) -> EngineCase:
    drafts = {}
    if limit.draft is not None:
        drafts["speculative_draft_model_path"] = str(engines.model(limit.draft))
    return EngineCase(
        engines.model(limit.model),
        (limit.requests,),
        STEPWISE | dict(limit.arguments) | drafts,
        **fields,
    )


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.word)
def test_a_server_ends_in_what_the_row_says(engines: EngineServer, limit: Limit) -> None:
    """Started all the same, the server serves its first request with the error that is named."""
    require_release(limit.word, "0.5.17" if limit.draft else "0.5.11")
    with pytest.raises(EngineFailed) as failure:
        engines.run(case_of(engines, limit, before_boot=leave_the_check_out))
    assert "Load weight end" in failure.value.log
    assert "fa3 does not serve" not in failure.value.log
    assert limit.error in failure.value.log


@pytest.mark.parametrize("limit", [LIMITS[1], OVER_LATENT_PAGES], ids=lambda limit: limit.word)
def test_a_server_is_refused_at_start(engines: EngineServer, limit: Limit) -> None:
    """It stops before a request, and says the row's condition, what to do, and its options."""
    with pytest.raises(EngineFailed) as failure:
        engines.run(case_of(engines, limit))
    (row,) = (row for row in limits.UPSTREAM_LIMITS if limit.word in row.condition)
    assert f"SGLang's {row} This server has --" in failure.value.log
    if limit is OVER_LATENT_PAGES:
        assert "This server has --page-size 64 --speculative-eagle-topk 4." in failure.value.log


def test_a_tree_over_latent_pages_is_verified_wrongly(engines: EngineServer) -> None:
    """Its tokens are others than transformers', where a chain's are equal; or the server ends."""
    require_release(OVER_LATENT_PAGES.word, "0.5.17")
    requests = tuple(Request(tokens(length, seed=length), 16) for length in (70, 200))
    limit = replace(OVER_LATENT_PAGES, requests=requests)
    case = case_of(engines, limit, before_boot=leave_the_check_out)
    expected = [engines.greedy(case.model, request)[0] for request in requests]
    with contextlib.suppress(EngineFailed):
        assert engines.run(case).tokens != expected


def test_ngram_at_the_end_of_the_context(engines: EngineServer) -> None:
    """A request that goes on to the end of the context ends the server with a leak of its pool."""
    require_release("NGRAM", "0.5.21")
    arguments = {
        "speculative_algorithm": "NGRAM",
        "speculative_num_draft_tokens": 8,
        "page_size": 1,
        "context_length": 96,
    }
    request = Request(tokens(12, seed=99) * 6, 23)
    case = EngineCase(engines.model(llama()), ((request,), (request,)), STEPWISE | arguments)
    with pytest.raises(EngineFailed) as failure:
        engines.run(case)
    # Not a word of the warning at start.
    assert "pool memory leak detected" in failure.value.log


def test_embeddings_over_an_fp8_cache_that_is_not_used(engines: EngineServer) -> None:
    """Queries are cast to fp8, and keys that no cache holds are not."""
    require_release("embeddings without")
    fp8 = {"dtype": "bfloat16", "kv_cache_dtype": "fp8_e4m3", "is_embedding": True}
    request = Request(tokens(70, seed=1))
    case = EngineCase(
        engines.model(QWEN_2), ((request,),), STEPWISE | NO_CACHE | fp8, {}, leave_the_check_out
    )
    with pytest.raises(EngineFailed) as failure:
        engines.call(embed, case)
    seen = "k.dtype is torch.bfloat16; expected q's own torch.float8_e4m3fn"
    assert seen in failure.value.log


LONG_AND_LATER = (Request(tokens(200, seed=1), 24), Request(tokens(300, seed=2), after=5))


def answers_in_chunks(engines: EngineServer, **arguments: Any) -> list[list[int]]:
    """Return two answers of Llama-4, one begun while the other decodes."""
    chunks = {"page_size": 1, "chunked_prefill_size": 128}
    case = EngineCase(
        engines.model(LLAMA_4),
        (LONG_AND_LATER,),
        STEPWISE | chunks | arguments,
        before_boot=leave_the_check_out,
        # SGLang mixes no requests that ask for them.
        logprobs=False,
    )
    return engines.run(case).tokens


def test_mixed_chunks_change_answers(engines: EngineServer) -> None:
    """A pass of prefill and decode together gives Llama-4 another answer than two passes do, and
    only to the request that decodes then.
    """
    require_release("in chunks (Llama-4) with")
    apart = answers_in_chunks(engines)
    mixed = answers_in_chunks(engines, enable_mixed_chunk=True)
    assert mixed[0][:5] == apart[0][:5]
    assert mixed[0] != apart[0]


def test_chunks_over_pages_change_answers(engines: EngineServer) -> None:
    """Up to the last release of this limit, pages of 32 give other answers than of 1, or none."""
    require_release("Llama-4) at pages")
    apart = answers_in_chunks(engines)
    with contextlib.suppress(EngineFailed):
        assert answers_in_chunks(engines, page_size=32) != apart


MLLAMA = TinyModel(
    "MllamaConfig",
    {
        "text_config": {
            **{name: value for name, value in tiny_models.SMALL.items() if name != "head_dim"},
            "num_hidden_layers": 3,
            "cross_attention_layers": [1],
            "pad_token_id": 0,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 4,
        },
        "image_token_index": tiny_models.VOCABULARY - 1,
        "tie_word_embeddings": False,
    },
    "MllamaForConditionalGeneration",
)
WITH_IMAGE = Request(tokens(20, seed=1), image=images.IMAGE)


def look_at_images() -> None:
    leave_the_check_out()
    images.prepare()


def look_at_tiles() -> None:
    """Have Mllama put its images together on a CPU: up to 0.5.12 it does on CUDA alone."""
    from torch.overrides import TorchFunctionMode

    class OnHost(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, arguments: Any = (), options: Any = None
        ) -> Any:
            options = {**(options or {})}
            if options.get("device") == "cuda":
                options["device"] = "cpu"
            return function(*arguments, **options)

    look_at_images()
    model: Any = importlib.import_module("sglang.srt.models.mllama").MllamaForConditionalGeneration
    put_together = model._batch_image_inputs

    def on_host(*arguments: Any) -> Any:
        with OnHost():
            return put_together(*arguments)

    model._batch_image_inputs = on_host


WITHOUT_IMAGE = Request(tokens(20, seed=2))


def of_mllama(engines: EngineServer, *phases: tuple[Request, ...], page_size: int) -> EngineCase:
    """Ask an encoder-decoder."""
    # So few pages of 64 that a token's place is no page's, and so many of 2 that it is one's.
    arguments = {"page_size": page_size, "max_total_tokens": 2048, "enable_multimodal": True}
    return EngineCase(
        engines.model(MLLAMA), phases, STEPWISE | arguments, before_boot=look_at_tiles
    )


def test_cross_attention_over_pages(engines: EngineServer) -> None:
    """Pages of 2 give another answer about an image than pages of 1, and the same answer without
    one; pages of 64 end in an IndexError.
    """
    require_release("encoder-decoder model at")
    asked = (WITHOUT_IMAGE,), (WITH_IMAGE,)
    text, about_image = engines.run(of_mllama(engines, *asked, page_size=1)).outputs
    assert len(about_image.tokens) == WITH_IMAGE.new_tokens
    same_text, about_other_keys = engines.run(of_mllama(engines, *asked, page_size=2)).outputs
    assert same_text.tokens == text.tokens
    assert same_text.logprobs == pytest.approx(text.logprobs, abs=LOGPROB_TOLERANCE)
    assert about_other_keys.tokens != about_image.tokens
    with pytest.raises(EngineFailed) as failure:
        engines.run(of_mllama(engines, *asked, page_size=64))
    assert "IndexError: index out of range" in failure.value.log


def test_several_images_at_once(engines: EngineServer) -> None:
    """Two requests of an encoder-decoder, each of which is answered alone, end in an AssertionError
    in one batch.
    """
    require_release("several requests")
    (output,) = engines.run(of_mllama(engines, (WITH_IMAGE,), page_size=1)).outputs
    assert len(output.tokens) == WITH_IMAGE.new_tokens
    with pytest.raises(EngineFailed) as failure:
        engines.run(of_mllama(engines, (WITH_IMAGE,) * 2, page_size=1))
    assert "AssertionError: Only encoder size 1 is supported" in failure.value.log


@dataclass(frozen=True)
class Unlimited(TinyModel):
    """A small Unlimited-OCR, whose weights SGLang makes up: transformers has no such model."""

    config: str = "UnlimitedVLConfig"

    def build(self, directory: Path) -> None:
        """Write the configuration to ``directory``."""
        language = {
            **tiny_models.SMALL,
            "use_mla": False,
            "architectures": ["DeepseekForCausalLM"],
            "torch_dtype": "float32",
        }
        config = {
            "architectures": ["UnlimitedOCRForCausalLM"],
            "model_type": "unlimited-ocr",
            "tile_tag": "2D",
            "sliding_window_size": 64,
            "torch_dtype": "float32",
            "language_config": language,
            "projector_config": {"projector_type": "linear", "input_dim": 64, "n_embed": 64},
            "vision_config": {},
        }
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(config))


def leave_towers_out() -> None:
    """Have the model look at text alone: the size of its vision towers is no setting."""
    import torch

    look_at_images()
    model: Any = importlib.import_module("sglang.srt.models.unlimited_ocr")
    model.build_sam_vit_b = model.build_clip_l = torch.nn.Identity


def test_windows_that_keep_what_was_prefilled(engines: EngineServer) -> None:
    """Unlimited-OCR starts and answers with pages of 1; with pages of 64 it says that it cannot."""
    require_release("Unlimited-OCR")
    request = Request(tokens(70, seed=1))
    case = EngineCase(
        engines.model(Unlimited()),
        ((request,),),
        STEPWISE | {"load_format": "dummy", "page_size": 1},
        before_boot=leave_towers_out,
    )
    (output,) = engines.run(case).outputs
    assert len(output.tokens) == request.new_tokens
    with pytest.raises(EngineFailed) as failure:
        engines.run(replace(case, arguments={**case.arguments, "page_size": 64}))
    # From 0.5.22 on the pool of a model of windows alone says so first, on any backend.
    said = ("AssertionError: Prefill-aware SWA requires page_size=1", "assert page_size == 1\n")
    assert any(line in failure.value.log for line in said)


GEMMA_3_IMAGES = WithoutVision(
    "Gemma3Config",
    {
        "text_config": GEMMA_3.fields,
        "vision_config": SMALL_VISION,
        "image_token_index": images.TOKEN,
        "boi_token_index": images.TOKEN - 1,
        "eoi_token_index": images.TOKEN + 1,
        "tie_word_embeddings": True,
    },
    "Gemma3ForConditionalGeneration",
)


def test_images_attend_one_way(engines: EngineServer) -> None:
    """Log-probabilities are those of transformers where an image's tokens see no later ones, and
    not those where they do, as the model was trained.
    """
    model = engines.model(GEMMA_3_IMAGES)
    text = tuple(token for token in tokens(30, seed=1) if token > images.TOKEN + 1)
    prompt = (*text, images.TOKEN - 1, *[images.TOKEN] * 30, images.TOKEN + 1, *text)
    request = Request(prompt, image=images.IMAGE)
    arguments = STEPWISE | {"enable_multimodal": True}
    case = EngineCase(model, ((request,),), arguments, before_boot=images.prepare)
    (output,) = engines.run(case).outputs
    one_way, both_ways = (
        engines.call(images.greedy, model, prompt, request.new_tokens, both)
        for both in (False, True)
    )
    assert output.tokens == one_way[0]
    assert output.logprobs == pytest.approx(one_way[1], abs=LOGPROB_TOLERANCE)
    assert output.logprobs != pytest.approx(both_ways[1], abs=10 * LOGPROB_TOLERANCE)


MOE = TinyModel("Qwen3MoeConfig", tiny_models.SMALL | EXPERTS)
"""Experts of 32 columns: 16 on each of two ranks."""


def test_padded_experts_answer_wrongly(engines: EngineServer) -> None:
    """Experts of 16 columns on each of two ranks: no error, but other log-probabilities."""
    require_release("no multiple of 32")
    request = Request(tokens(60, seed=2))
    case = EngineCase(
        engines.model(MOE), ((request,),), STEPWISE | {"tp_size": 2}, TWO_RANKS, leave_the_check_out
    )
    (output,) = engines.run(case).outputs
    _, logprobs = engines.greedy(case.model, request)
    pairs = zip(output.logprobs, logprobs, strict=True)
    wrong = [a for a, b in pairs if math.isnan(a) or abs(a - b) > LOGPROB_TOLERANCE]
    assert wrong


def test_padded_experts_are_refused_at_start(engines: EngineServer) -> None:
    """The row is met although SGLang has padded the configuration by then."""
    require_release("no multiple of 32")
    case = EngineCase(engines.model(MOE), (), STEPWISE | {"tp_size": 2}, TWO_RANKS)
    with pytest.raises(EngineFailed) as failure:
        engines.run(case)
    assert "no multiple of 32 on --device cpu" in failure.value.log
