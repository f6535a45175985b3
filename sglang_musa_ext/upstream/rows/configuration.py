"""Rows of what is read of upstream's objects: configurations, batches, metadata and pools."""

from __future__ import annotations

from sglang_musa_ext.upstream.names import FLASH_ATTENTION, MODEL_RUNNER
from sglang_musa_ext.upstream.requirement import Requirement

_FORWARD_BATCH = "sglang.srt.model_executor.forward_batch_info"
_UNTIL_UPSTREAM_ASKS = "Upstream asks an attention backend what it can serve."
_UNTIL_RAW_PREFILL = "Upstream itself prefills over raw keys where a batch has no prefix."

ROWS = (
    Requirement(
        "assigned",
        "sglang.srt.configs.model_config",
        "ModelConfig",
        (
            *("dtype", "head_dim", "v_head_dim", "swa_head_dim", "swa_v_head_dim"),
            *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"),
        ),
        why="Types and head dimensions that kernels lack are refused before the first request.",
        remove_when=_UNTIL_UPSTREAM_ASKS,
    ),
    Requirement(
        "assigned",
        "sglang.srt.configs.model_config",
        "ModelConfig",
        ("hf_config", "hf_text_config", "is_encoder_decoder", "has_attention_sinks"),
        why="They say what of a model upstream's fa3 cannot serve, and what MATE serves slowly.",
        remove_when=_UNTIL_UPSTREAM_ASKS,
    ),
    *(
        Requirement("attribute", module, name, why=why, remove_when=until)
        for module, name, why, until in (
            (
                "sglang.srt.mem_cache.memory_pool",
                "ReqToTokenPool.size",
                "It bounds the batches that kernels must be able to plan.",
                _UNTIL_UPSTREAM_ASKS,
            ),
            (
                MODEL_RUNNER,
                "ModelRunner.model_config",
                "It says what kernels must be able to serve.",
                _UNTIL_UPSTREAM_ASKS,
            ),
            (
                _FORWARD_BATCH,
                "ForwardBatch.forward_mode",
                "Prefill alone may go over raw keys.",
                _UNTIL_RAW_PREFILL,
            ),
            (
                _FORWARD_BATCH,
                "ForwardBatch.extend_prefix_lens_cpu",
                "A request with a prefix attends to more than raw keys.",
                _UNTIL_RAW_PREFILL,
            ),
            (
                _FORWARD_BATCH,
                "ForwardBatch.extend_seq_lens_cpu",
                "Rows beyond these lengths only pad the batch.",
                _UNTIL_RAW_PREFILL,
            ),
            (
                FLASH_ATTENTION,
                "FlashAttentionMetadata.cu_seqlens_q",
                "A call with other offsets has other queries than the whole batch.",
                _UNTIL_RAW_PREFILL,
            ),
            (
                FLASH_ATTENTION,
                "FlashAttentionMetadata.cache_seqlens_int32",
                "A call with other lengths attends to other keys than the batch's.",
                _UNTIL_RAW_PREFILL,
            ),
        )
    ),
)
