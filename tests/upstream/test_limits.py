"""Limits of SGLang's own ``fa3``: each is met by what it is about, and is still in the sources."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_musa_ext.upstream.limits import (
    UPSTREAM_LIMITS,
    Configuration,
    UpstreamLimit,
    limits_of,
    takes_images,
)
from sglang_musa_ext.upstream.names import FLASH_ATTENTION
from sglang_musa_ext.upstream.releases import SUPPORTED_RELEASES
from sglang_musa_ext.upstream.requirement import NONE_KNOWN
from tests.support.releases import require_release

# By a word of its condition: a configuration that meets the limit, and the change that avoids it.
MEETING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "encoder-decoder model at": (
        {"is_encoder_decoder": True, "page_size": 64, "max_running_requests": 1},
        {"page_size": 1},
    ),
    "several requests": ({"is_encoder_decoder": True, "page_size": 1}, {"max_running_requests": 1}),
    "Llama-4) at pages": (
        {"architectures": ("Llama4ForConditionalGeneration",), "page_size": 64},
        {"page_size": 1},
    ),
    "no multiple of the page": (
        {
            "architectures": ("Llama4ForConditionalGeneration",),
            "attention_chunk": 96,
            "page_size": 64,
        },
        {"page_size": 32},
    ),
    "Unlimited-OCR": (
        {"architectures": ("UnlimitedOCRForCausalLM",), "page_size": 64},
        {"page_size": 1},
    ),
    "Gemma-4": (
        {"architectures": ("Gemma4ForCausalLM",)},
        {"architectures": ("Gemma3ForCausalLM",)},
    ),
    "no multiple of 32": ({"device": "cpu", "expert_columns": 16}, {"expert_columns": 32}),
    "over sliding windows": (
        {"topk": 4, "has_sliding_windows": True, "page_size": 64},
        {"topk": 1},
    ),
    "of an MLA model": ({"topk": 4, "use_mla": True, "page_size": 64}, {"topk": 1}),
    "STANDALONE": (
        {
            "speculative_algorithm": "STANDALONE",
            "architectures": ("DeepseekV3ForCausalLMNextN",),
        },
        {"architectures": ("DeepseekV2ForCausalLM",)},
    ),
    "bfloat16 KV cache": (
        {"dtype": "float16", "kv_cache_dtype": "bfloat16"},
        {"kv_cache_dtype": "auto"},
    ),
    "embeddings without": (
        {"skips_cache": True, "kv_cache_dtype": "fp8_e4m3"},
        {"kv_cache_dtype": "auto"},
    ),
    "in float16 on MUSA": (
        {
            "on_musa": True,
            "use_mla": True,
            "dtype": "float16",
            "architectures": ("DeepseekV2ForCausalLM",),
        },
        {"dtype": "bfloat16"},
    ),
    "in chunks (Llama-4) with": (
        {"mixed_chunk": True, "architectures": ("Llama4ForConditionalGeneration",)},
        {"mixed_chunk": False},
    ),
    "both ways": (
        {"architectures": ("Gemma3ForConditionalGeneration",), "takes_images": True},
        {"takes_images": False},
    ),
    "Inkling": (
        {"architectures": ("InklingForConditionalGeneration",)},
        {"architectures": ("LlamaForCausalLM",)},
    ),
    "chains of drafts": ({"speculative_algorithm": "EAGLE"}, {"speculative_algorithm": None}),
    "NGRAM": ({"speculative_algorithm": "NGRAM"}, {"speculative_algorithm": None}),
}


@pytest.mark.parametrize("word", MEETING)
def test_a_limit_is_met_by_what_it_is_about_and_avoided_by_what_it_says(word: str) -> None:
    """Each limit applies to its configuration alone, and not to the one that it sends people to."""
    meeting, change = MEETING[word]
    assert len(met(word, meeting)) == 1
    assert met(word, meeting | change) == []


@pytest.mark.parametrize(
    "change",
    [
        {"on_musa": False},
        {"use_mla": False},
        {"dtype": "auto"},
        {"quantization": "fp8"},
        {"architectures": ("MiniCPM3ForCausalLM",)},
    ],
)
def test_float16_with_mla_is_served_elsewhere(change: dict[str, Any]) -> None:
    """Other devices, models with an attention of their own, and quantised weights have no cast."""
    meeting, _ = MEETING["in float16 on MUSA"]
    assert met("in float16 on MUSA", meeting | change) == []


@pytest.mark.parametrize(
    ("is_multimodal", "arguments", "expected"),
    [
        (True, {}, True),
        (True, {"language_model_only": False}, True),
        (True, {"language_model_only": True}, False),
        (False, {"language_model_only": False}, False),
    ],
)
def test_a_server_looks_at_images_as_sglang_settled(
    is_multimodal: bool, arguments: dict[str, bool], expected: bool
) -> None:
    """SGLang's own answer counts, and the option of 0.5.18 and later by which it refuses images."""
    config = SimpleNamespace(is_multimodal=is_multimodal)
    assert takes_images(SimpleNamespace(**arguments), config) is expected


def met(word: str, fields: dict[str, Any]) -> list[UpstreamLimit]:
    """Return the limits with ``word`` in their condition that a configuration meets."""
    return [limit for limit in limits_of(Configuration(**fields)) if word in limit.condition]


def test_every_limit_is_tried() -> None:
    """A new row needs a configuration that meets it."""
    assert len(MEETING) == len(UPSTREAM_LIMITS)


@pytest.mark.parametrize("limit", UPSTREAM_LIMITS, ids=lambda limit: limit.condition[:30])
def test_a_limit_says_what_to_do(limit: Any) -> None:
    """A row has what happens, what to set instead, and where it is reported."""
    assert str(limit).startswith(f"fa3 does not serve {limit.condition}: ")
    assert "--" in limit.instead or "model" in limit.instead
    assert limit.reported == NONE_KNOWN or re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", limit.reported)


# What shows in upstream's sources that a limit is there, by module. ``tests/engine/test_limits.py``
# shows others in a running server.
GEMMA_3 = "sglang.srt.models.gemma3_mm"
INKLING = "sglang.srt.models.inkling_common.attn"
MODELS = "sglang.srt.arg_groups.model_hook"
LATENT = "sglang.srt.models.deepseek_common.attention_forward_methods.forward_mla"
EXPERTS = "sglang.srt.layers.moe.fused_moe_triton.layer"
EAGER = "sglang.srt.model_executor.runner.eager_runner"
EVIDENCE = {
    "over sliding windows": (
        FLASH_ATTENTION,
        r"doesn't support topk > 1 speculative decoding with page size > 1",
    ),
    "encoder-decoder model at": (
        FLASH_ATTENTION,
        (
            r"encoder_page_table = (?:forward_batch\.req_to_token_pool|self\.req_to_token_pool)"
            r"\.req_to_token\["
        ),
    ),
    "in chunks (Llama-4) with": (
        FLASH_ATTENTION,
        (
            r"if forward_batch\.forward_mode == ForwardMode\.EXTEND:\n"
            r"\s+self\._maybe_init_local_attn_metadata"
        ),
    ),
    # Where it is corrected, pages are counted here.
    "Llama-4) at pages": (
        FLASH_ATTENTION,
        r"local_attn_metadata = None\n\s+return\n\n\s+cu_seqlens_q_np = ",
    ),
    # The assertion is older, but chunks were rounded to pages before it.
    "no multiple of the page": (FLASH_ATTENTION, r"preserve_attn_chunk_size=True"),
    "embeddings without": (
        FLASH_ATTENTION,
        r"\(self\.kv_cache_dtype\)(?s:.)+elif self\.fa_skip_kv_cache:",
    ),
    "chains of drafts": (FLASH_ATTENTION, r'"FA3 draft-decode page_table"'),
    "in float16 on MUSA": (
        LATENT,
        (
            r"elif _is_musa:\n\s+attn_bmm_output = torch\.bmm\(\n"
            r"\s+attn_output\.to\(torch\.bfloat16\)\.transpose\(0, 1\), self\.w_vc\n"
        ),
    ),
    "several requests": (FLASH_ATTENTION, r"forward_batch\.encoder_lens\.numel\(\) == 1"),
    "Unlimited-OCR": (FLASH_ATTENTION, r"Prefill-aware SWA requires page_size=1"),
    "Gemma-4": (MODELS, r'"Gemma4 only supports trtllm_mha, triton'),
    "Inkling": (INKLING, r'assert (?:server_args\.)?attention_backend in \("fa4", "triton"\)'),
    # The mask of images is made for one backend alone.
    "both ways": (GEMMA_3, r"isinstance\([\w.()]+, TritonAttnBackend\)"),
    # Before, a rank's part was as large as what it is padded to, and the last one did not load.
    "no multiple of 32": (
        EXPERTS,
        r"loaded_shard_size = loaded_weight\.shape\[shard_dim\] // self\.moe_tp_size",
    ),
}

SIGNS_OF_A_FIX = {
    # A mixed pass is made a prefill before attention sees it.
    "in chunks (Llama-4) with": (EAGER, r"if mode\.is_mixed\(\) and not is_npu\(\)"),
    "no multiple of 32": (EXPERTS, r"# the buffer is padded\. Initialize padding even if"),
}
"""Signs that a later release has corrected it."""


@pytest.mark.parametrize("version", [release.version for release in SUPPORTED_RELEASES])
@pytest.mark.parametrize("word", EVIDENCE)
def test_a_limit_is_in_the_sources_of_its_releases(word: str, version: str) -> None:
    """A row that upstream has fixed, or that is not in a release it names, is noticed."""
    root = require_release(version)
    (limit,) = (limit for limit in UPSTREAM_LIMITS if word in limit.condition)
    is_there = is_in(root, *EVIDENCE[word])
    is_fixed = word in SIGNS_OF_A_FIX and is_in(root, *SIGNS_OF_A_FIX[word])
    assert (is_there and not is_fixed) == limit.holds_in(version)


def is_in(root: Path, module: str, pattern: str) -> bool:
    """Return whether the source of a release's module, if it has it, has ``pattern``."""
    source = root / (module.replace(".", "/") + ".py")
    if module == MODELS and not source.exists():  # up to 0.5.18
        source = root / "sglang/srt/server_args.py"
    return source.is_file() and bool(re.search(pattern, source.read_text(encoding="utf-8")))


def test_bounds_are_kept() -> None:
    """A row counts in its releases alone; where the release is not known, it counts."""
    from dataclasses import replace

    limit = replace(UPSTREAM_LIMITS[0], since="0.5.14", until="0.5.20")
    holding = [v for v in ("0.5.11", "0.5.14", "0.5.20", "0.5.21") if limit.holds_in(v)]
    assert holding == ["0.5.14", "0.5.20"]
    assert limit.holds_in(None)
